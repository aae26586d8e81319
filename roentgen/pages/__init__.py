"""The base of the HTML pages: `templates/page.html` contains the head, colors and tables that all pages share.

A page extends it in its own package's `templates/`. Each page is one static file without scripts; all text is escaped.
"""

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined


def page_environment(package: str) -> Environment:
    """Return the Jinja environment for a package's templates."""
    return Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("roentgen.pages")]),
        autoescape=True,
        undefined=StrictUndefined,  # a misspelled name in the template is an error, not a hole in the page
        trim_blocks=True,
        lstrip_blocks=True,
    )
