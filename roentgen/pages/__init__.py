"""The frame of the HTML pages: `templates/page.html` has the head, the colors and the tables that all pages share.

A page extends it in its own package's `templates/`. Pages are one static file each, without scripts; all text is escaped.
"""

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined


def page_environment(package: str) -> Environment:
    """Return the environment in which a package's templates are rendered."""
    return Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("roentgen.pages")]),
        autoescape=True,
        undefined=StrictUndefined,  # a misspelled name in the template is an error, not a hole in the page
        trim_blocks=True,
        lstrip_blocks=True,
    )
