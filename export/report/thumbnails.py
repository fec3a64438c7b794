"""A recipe's images small, as the model sees them; a word in the place of one that is gone.

It does not know what they are shown for.
"""

import hashlib
from pathlib import Path

from markupsafe import Markup

from export.report.figure import photo
from runtime.preprocess import InputSpec, preprocess


def thumbnail(path: str, sha256: str, spec: InputSpec, alt: str) -> Markup:
    """The image at ``path`` after ``runtime.preprocess``, inline; ``alt`` says what it shows.

    A file that is gone or whose bytes are not those of ``sha256`` any more leaves a placeholder
    that says so: another picture under the old answers would be a lie.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        return _placeholder(alt, "not there any more")
    except OSError as error:
        return _placeholder(alt, f"cannot be read: {error.strerror}")
    if hashlib.sha256(data).hexdigest() != sha256:
        return _placeholder(alt, "changed since training")
    return photo(preprocess(data, spec), alt)


def _placeholder(alt: str, reason: str) -> Markup:
    return Markup('<span class="gone" role="img" aria-label="{}: {}">{}</span>').format(
        alt, reason, reason
    )
