"""Classify the images whose paths come on stdin, one a line, with the bundle that is current.

It stands for your camera loop: whatever gives one frame after the other.
"""

import json
import logging
import sys

import msgspec

from runtime.delivery.live import LiveClassifier
from runtime.delivery.slots import default_folder
from runtime.errors import DataError


def answer(live: LiveClassifier, path: str) -> object:
    """What there is to say about one image."""
    try:
        return msgspec.to_builtins(live(path))
    except DataError as error:
        return {"path": path, "error": str(error)}


logging.basicConfig(level=logging.WARNING, format="line: %(message)s")
with LiveClassifier(default_folder()) as live:
    for line in sys.stdin:
        print(json.dumps(answer(live, line.strip())), flush=True)
