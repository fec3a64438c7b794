"""What a person writes for a source, taken apart: which kind it is, where, with which settings.

It opens nothing.
"""

import difflib
import re
import urllib.parse
from pathlib import Path
from typing import Literal

import msgspec

from runtime.errors import DataError

Kind = Literal["files", "watch", "video", "stream", "v4l2", "gstreamer", "aravis"]

CAMERAS: tuple[Kind, ...] = ("stream", "v4l2", "gstreamer", "aravis")
"""Kinds that go on while nobody looks."""

_PREFIXES: dict[str, Kind] = {
    "watch": "watch", "video": "video", "gst": "gstreamer", "aravis": "aravis"
}  # fmt: skip
_STREAMS = ("rtsp", "rtsps", "http", "https", "udp", "tcp", "srt", "rtmp")
"""Protocols that FFmpeg brings to OpenCV."""

V4L2_SETTINGS = ("fourcc", "width", "height", "fps")
"""In the order in which they must be set: the format decides which sizes there are."""

UNDERSTOOD = (
    "a file, folder or glob, watch:FOLDER, video:FILE, rtsp://... (or another stream), "
    "/dev/videoN, gst:PIPELINE, aravis:CAMERA"
)


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """One source as asked for."""

    kind: Kind
    place: str
    """Path, URL, pipeline or the camera's id; empty for the first GenICam camera there is."""
    settings: dict[str, str] = {}
    """GenICam features by name, or those of V4L2_SETTINGS."""

    def __str__(self) -> str:
        """As written, without user name and password."""
        prefix = {kind: f"{word}:" for word, kind in _PREFIXES.items()}.get(self.kind, "")
        return prefix + without_login(self.place)


def without_login(text: str) -> str:
    """``text`` less user names and passwords, of URLs and of GStreamer's ``rtspsrc``."""
    return re.sub(r"(?<=://)[^/\s]*@|\buser-(?:id|pw)=\S+ ?", "", text)


def parse(text: str) -> Address:
    """Take ``text`` apart. Raises DataError if it is no source, naming those there are."""
    if not text:
        raise DataError(f"expected a source, got nothing; there are {UNDERSTOOD}")
    word, colon, rest = text.partition(":")
    if _exists(text) and not text.startswith("/dev/video"):
        return Address(kind="files", place=text)
    if rest.startswith("//"):
        if word in _STREAMS:
            return Address(kind="stream", place=text)
        raise DataError(_not_understood(text, word, _STREAMS, "://"))
    if colon and (kind := _PREFIXES.get(word)):
        if kind == "aravis":
            place, settings = _settings(rest, text)
            return Address(kind=kind, place=place, settings=settings)
        if not rest:
            raise DataError(f"{text}: expected something after the colon: {UNDERSTOOD}")
        return Address(kind=kind, place=rest)
    if text.startswith("/dev/video"):
        place, settings = _settings(text, text)
        if unknown := set(settings) - set(V4L2_SETTINGS):
            names = ", ".join(sorted(unknown))
            raise DataError(f"{text}: no setting {names}; there are {', '.join(V4L2_SETTINGS)}")
        _check_numbers(text, settings)
        return Address(kind="v4l2", place=place, settings=settings)
    if colon and re.fullmatch(r"[a-z]+", word):
        raise DataError(_not_understood(text, word, list(_PREFIXES), ":"))
    return Address(kind="files", place=text)


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # too long a name, a zero byte in it
        return False


def _settings(text: str, whole: str) -> tuple[str, dict[str, str]]:
    """``PLACE?NAME=VALUE&NAME=VALUE``."""
    place, _, query = text.partition("?")
    if not query:
        return place, {}
    try:
        pairs = urllib.parse.parse_qsl(query, strict_parsing=True, keep_blank_values=True)
    except ValueError as error:
        raise DataError(f"{whole}: expected settings like ?width=1920&height=1080") from error
    for name, value in pairs:
        # They reach the camera as one text of words.
        if not re.fullmatch(r"\w+", name) or not re.fullmatch(r"\S+", value):
            raise DataError(f"{whole}: {name}={value} is no setting: a name and one word")
    return place, dict(pairs)


def _check_numbers(text: str, settings: dict[str, str]) -> None:
    for name, value in settings.items():
        if name == "fourcc":
            if not re.fullmatch(r"[A-Z0-9]{4}", value):
                raise DataError(f"{text}: fourcc is four letters like MJPG, got {value}")
        elif not re.fullmatch(r"[1-9]\d{0,5}", value):
            raise DataError(f"{text}: {name} is a whole number above 0, got {value}")


def _not_understood(text: str, word: str, known: list[str] | tuple[str, ...], sign: str) -> str:
    near = difflib.get_close_matches(word, known, 1)
    hint = f"did you mean {near[0]}{sign}?" if near else "and there is no such file"
    said = f"{without_login(text)}: no source begins with {word}{sign}"
    return f"{said}; {hint} There are {UNDERSTOOD}"
