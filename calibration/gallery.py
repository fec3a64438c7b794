"""A page that shows the calibration images, each with the reason why it was taken or refused.

One HTML file without scripts or anything from elsewhere, so that it can be mailed and still works
in ten years. It shows what it is given and decides nothing.
"""

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any, TypeAlias

from PIL import Image

from calibration.images import Choice, Chosen
from runtime import atomic
from runtime.dataset import SetAside
from runtime.errors import DataError
from runtime.preprocess import InputSpec, UInt8, preprocess

SIDE = 144
"""Of a thumbnail, in pixels: sharp at the size of a thumb, and 1,000 of them are some 5 MB."""

UNLABELLED = "(no label)"
"""As Choice.per_class calls them."""

Track: TypeAlias = Callable[[Sequence[Any]], Iterable[Any]]
"""Wraps the images that are about to be opened, e.g. in a progress bar."""


def thumbnail(path: Path, spec: InputSpec) -> bytes:
    """A JPEG of at most SIDE pixels a side of what the model sees of the image at ``path``.

    Raises DataError if it cannot be read.
    """
    return encode_thumbnail(preprocess(path, spec))


def encode_thumbnail(levels: UInt8, side: int = SIDE) -> bytes:
    """A JPEG of at most ``side`` pixels a side of an image ``[H, W, C]``, gray or RGB."""
    picture = Image.fromarray(levels[:, :, 0] if levels.shape[2] == 1 else levels)
    picture.thumbnail((side, side), Image.Resampling.BOX)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return file.getvalue()


def data_url(path: Path, spec: InputSpec) -> str | None:
    """The thumbnail as a page holds it; None if the image cannot be read."""
    try:
        data = thumbnail(path, spec)
    except DataError:
        return None
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"


def write_gallery(
    path: Path,
    choice: Choice,
    spec: InputSpec,
    *,
    title: str,
    classes: Sequence[str],
    track: Track | None = None,
) -> None:
    """Write every chosen image of ``choice``, by class, and every refused one, with its reason.

    An image that cannot be read is a grey field that says so. ``title`` is the page's, ``classes``
    those of the recipe; one of them without images is shown, too.
    """
    counts = choice.per_class(classes)
    images: list[Chosen | SetAside] = [*choice.chosen, *choice.refused]
    figures = [_figure(image, spec) for image in (track(images) if track else images)]
    chosen, refused = figures[: len(choice.chosen)], figures[len(choice.chosen) :]
    sections = [
        _section(
            name,
            [
                figure
                for image, figure in zip(choice.chosen, chosen, strict=True)
                if (image.label or UNLABELLED) == name
            ],
        )
        for name in counts
    ]
    if refused:
        sections.append(_section("Refused", refused, note="looked at, and not used"))
    page = PAGE.substitute(
        title=escape(title),
        style=STYLE,
        lead=f"{len(chosen)} of {choice.candidates} images of the training split; "
        f"{len(refused)} refused",
        rows="".join(_row(name, count) for name, count in counts.items()),
        sections="".join(sections),
    )
    atomic.write_text(path, page)


def _row(name: str, count: int) -> str:
    warning = "" if count else ' class="none"'
    return f"<tr{warning}><th scope=row>{escape(name)}</th><td>{count}</td></tr>"


def _section(name: str, figures: Sequence[str], note: str = "") -> str:
    heading = f"{escape(name)} <small>{len(figures)}{note and f' {note}'}</small>"
    return f'<section><h2>{heading}</h2><div class="grid">{"".join(figures)}</div></section>\n'


def _figure(image: Chosen | SetAside, spec: InputSpec) -> str:
    name = Path(image.path).name
    label = image.label or "unlabelled" if isinstance(image, Chosen) else "refused"
    picture = '<div class="broken">no picture</div>'
    if source := data_url(Path(image.path), spec):
        alt = escape(f"{label}: {name}")
        picture = f'<img loading="lazy" alt="{alt}" src="{source}">'
    return (
        f'<figure title="{escape(image.path)}">{picture}'
        f"<figcaption>{escape(image.reason)}<br><span>{escape(name)}</span></figcaption></figure>\n"
    )


STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d1d1f; --soft: #5c5c62;
  --line: #d8d8dc; --tile: #f3f3f5; --warn: #a33a00; }
@media (prefers-color-scheme: dark) { :root { --paper: #161618; --ink: #ececee; --soft: #a3a3aa;
  --line: #3a3a3f; --tile: #232327; --warn: #ff9d5c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.5rem; line-height: 1.25; }
h2 { margin: 2rem 0 .75rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line);
  font-size: 1.125rem; }
small { color: var(--soft); font-size: .875rem; font-weight: normal; }
table { margin-top: 1rem; border-collapse: collapse; }
th, td { padding: .125rem 1.5rem .125rem 0; text-align: left; font-weight: normal; }
td { text-align: right; font-variant-numeric: tabular-nums; }
.none { color: var(--warn); font-weight: bold; }
.grid { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); }
figure { margin: 0; padding: .5rem; border-radius: .375rem; background: var(--tile);
  break-inside: avoid; overflow-wrap: anywhere; }
figure img, .broken { display: block; width: 100%; border-radius: .25rem; }
.broken { padding: 40% 0; border: 1px dashed var(--line); color: var(--soft); line-height: 0;
  text-align: center; }
figcaption { margin-top: .375rem; font-size: .8125rem; line-height: 1.35; }
figcaption span { color: var(--soft); }
@media print { body { max-width: none; padding: 0; font-size: 10pt; }
  .grid { grid-template-columns: repeat(5, 1fr); gap: .5rem; }
  figure { border: 1px solid var(--line); background: none; } }
"""

PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>$style</style>
</head>
<body>
<h1>$title</h1>
<p>$lead</p>
<table>$rows</table>
$sections
</body>
</html>
""")
