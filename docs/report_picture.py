"""Make docs/report.png and docs/report-dark.png: the top of the default recipe's release report.

make train export report, then python -m docs.report_picture
"""

import io
import tempfile
from pathlib import Path

from PIL import Image

from tests.browser import browser

REPORT = Path("build/solar/report.html")
OUT = Path(__file__).parent


def main() -> None:
    """Take two pictures of a browser, for those who like it light and for those who do not."""
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        browser(Path(folder)) as chrome,
    ):
        for name, dark in (("report.png", False), ("report-dark.png", True)):
            chrome.resize(1100, 620, dark=dark)
            chrome.open(REPORT.resolve().as_uri())
            shot = Image.open(io.BytesIO(chrome.picture(whole=False)))
            # Text on one ground: 64 colours are enough, and a third of the bytes.
            shot.convert("RGB").quantize(64).save(OUT / name, optimize=True)


if __name__ == "__main__":
    main()
