"""What users add without changing this package: problems, prompts, scorers and kinds of probe.

Each of the four has a registry of names: those built in, and those that an installed package declares as an entry point. What
is no name is a reference, to a function in a module (`module:function`) or in a file (`path/to/file.py:function`). From Python
the function itself can be given. A module a concern:

    finding      a name or a reference becomes the object; an object is named so that it can be found again
    fingerprint  a hash of a function's source, and of what it uses beside it: a run records which function judged it
    telling      how messages speak of what a user's function did
    travel       makes a user's modules part of what is sent to other processes, which may not have their files
"""

from roentgen.extensions.finding import ExtensionError, Found, Registry, file_of, given, in_file, is_reference, spell
from roentgen.extensions.fingerprint import fingerprint
from roentgen.extensions.telling import shown, spell_error
from roentgen.extensions.travel import imported_beside, make_portable

__all__ = [
    "ExtensionError",
    "Found",
    "Registry",
    "file_of",
    "fingerprint",
    "given",
    "imported_beside",
    "in_file",
    "is_reference",
    "make_portable",
    "shown",
    "spell",
    "spell_error",
]
