"""What users add without changing this package: problems, prompts, scorers and kinds of probe.

Each of the four has a registry of names: the built-in ones, and those that an installed package declares as an entry point. A
string that is not a registered name is a reference to a function in a module (`module:function`) or in a file
(`path/to/file.py:function`). From Python, the function itself can be given. The modules:

    registry     finds the object that a name or a reference means, and names a given object so that it can be found again
    fingerprint  hashes a function's source and what it uses: a run records which function judged it
    error_text   formats what a user's function returned or raised, for error messages
    pickling     sends a user's modules to other processes, which may not have their files
"""

from roentgen.extensions.error_text import format_error, preview
from roentgen.extensions.fingerprint import fingerprint
from roentgen.extensions.pickling import imported_beside, make_portable
from roentgen.extensions.registry import (
    Extension,
    ExtensionError,
    Registry,
    display_name,
    file_of,
    given,
    in_file,
    is_reference,
)

__all__ = [
    "Extension",
    "ExtensionError",
    "Registry",
    "display_name",
    "file_of",
    "fingerprint",
    "format_error",
    "given",
    "imported_beside",
    "in_file",
    "is_reference",
    "make_portable",
    "preview",
]
