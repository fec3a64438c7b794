"""The page: sections in the order in which they are read, in one file without scripts.

It does not know what a section says.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from runtime import atomic

if TYPE_CHECKING:  # facts need torch; a page of another kind does not
    from export.report.facts import Facts

REPORT = "report.html"

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


class Tile(NamedTuple):
    """One large figure with what it is."""

    value: str
    words: str


class Section(NamedTuple):
    """A part of the page."""

    id: str
    title: str
    lead: str
    """What is found here, in a sentence that may be read alone."""
    body: Markup


Make: TypeAlias = "Callable[[Facts], Section | None]"
"""None where there is nothing of the kind: a report without source images has no retention."""


def render(template: str, **values: object) -> Markup:
    """The template of this name in ``templates/``, filled in; values are escaped."""
    return Markup(_TEMPLATES.get_template(template).render(**values))


def write_page(path: Path, facts: "Facts", sections: Iterable[Make]) -> None:
    """Write the page of what ``sections`` make of ``facts``, whole or not at all."""
    made = [section for make in sections if (section := make(facts)) is not None]
    atomic.write_text(path, render("page.html", facts=facts, sections=made))
