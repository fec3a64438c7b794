"""Pictures in a page: drawings as SVG that follow the page's light and dark, photographs inline.

It does not know what they show.
"""

import base64
import hashlib
import io
import re

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from calibration.gallery import encode_thumbnail
from runtime.preprocess import UInt8
from train import plots

SIDE = 160
"""Of a photograph, in pixels: sharp at the size of a thumb."""

COLOURS = {
    plots.BLACK: "currentColor",
    "#FFFFFF": "var(--paper)",
    plots.GRID: "var(--line)",
    "#DADADA": "var(--line)",
    "#8C8C8C": "var(--soft)",
    "#F4F4F4": "var(--tile)",
    plots.ORANGE: "var(--orange)",
    plots.GREEN: "var(--green)",
    plots.BLUE: "var(--blue)",
    plots.RED: "var(--red)",
    plots.PURPLE: "var(--purple)",
    plots.SKY: "var(--sky)",
}
"""What the colours of train/plots are called in the page, which has them for light and dark."""

_COLOUR = re.compile("|".join(COLOURS), re.IGNORECASE)


def svg(figure: Figure, alt: str) -> Markup:
    """``figure`` as inline SVG; ``alt`` says in words what is to be seen in it."""
    file = io.StringIO()
    # Ids are names within the page: of two drawings they must differ, of two reports they need not.
    salt = f"drawing-{hashlib.sha256(alt.encode()).hexdigest()[:8]}"
    # Text as outlines: it keeps the width that the layout was made for, whatever fonts there are.
    with plots.style(), mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": salt}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    drawing = file.getvalue()
    drawing = drawing[drawing.index("<svg ") :]
    drawing = _COLOUR.sub(lambda found: COLOURS[found[0].upper()], drawing)
    drawing = re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r"<svg \1", drawing, count=1)
    drawing = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{salt}-", drawing)
    head = f'<svg role="img" aria-label="{escape(alt)}" '
    return Markup('<div class="drawing">{}</div>').format(Markup(head + drawing[5:]))


def photo(levels: UInt8, alt: str) -> Markup:
    """An image ``[H, W, C]`` as the model sees it, at most SIDE pixels a side, inline."""
    data = base64.b64encode(encode_thumbnail(levels, SIDE)).decode()
    return Markup('<img decoding="async" alt="{}" src="data:image/jpeg;base64,{}">').format(
        alt, data
    )
