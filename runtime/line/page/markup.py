"""HTML made of elements, never of text: whatever a label or a path says stays text.

It knows nothing of what is shown.
"""

from collections.abc import Mapping
from xml.etree import ElementTree

Element = ElementTree.Element
Child = Element | str | None
"""None is nothing."""


def el(tag: str, attributes: Mapping[str, str] | None = None, *children: Child) -> Element:
    """An element with ``attributes`` around ``children``, in order; names are the code's own."""
    made = Element(tag, {name: printable(text) for name, text in (attributes or {}).items()})
    for child in children:
        if isinstance(child, str):
            _append(made, printable(child))
        elif child is not None:
            made.append(child)
    return made


def html(element: Element) -> str:
    """HTML 5 of ``element``."""
    return ElementTree.tostring(element, encoding="unicode", method="html")


def printable(text: str) -> str:
    """``text`` without what is no text, or would change the order in which it is read."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def _append(element: Element, text: str) -> None:
    if len(element):
        element[-1].tail = (element[-1].tail or "") + text
    else:
        element.text = (element.text or "") + text
