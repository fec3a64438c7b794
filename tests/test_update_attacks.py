"""Flipped bits, a seeded sample over both transports; ``benchmarks.update_attacks`` flips all."""

import random
from pathlib import Path

import pytest

from benchmarks.update_attacks import Target
from tests.update_repository import Server

EACH = 12


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return Target.make(tmp_path_factory.mktemp("target"))


@pytest.mark.parametrize("transport", ["http", "file"])
def test_no_flipped_bit_makes_a_wrong_bundle(target: Target, transport: str) -> None:
    draw = random.Random(transport)
    with Server(target.forge.folder) as server:
        source = server.url if transport == "http" else target.forge.folder.as_uri()
        for file in target.files():
            for bit in draw.sample(range(8 * file.stat().st_size), EACH):
                verdict = target.trial(file, bit, source)
                assert verdict in ("refused", "harmless"), (file.name, bit)
        assert bool(server.log) == (transport == "http")


def test_what_is_not_flipped_is_staged_and_a_wrong_bundle_is_called_wrong(target: Target) -> None:
    """So that the verdicts above mean something."""
    file = target.files()[-1]
    untouched = Path(target.forge.folder / "unread")
    untouched.write_bytes(b"x")
    assert target.trial(untouched, 0) == "harmless"
    assert target.trial(file, 0) == "refused"
    assert target._replace(right="0" * 64).trial(untouched, 0) == "WRONG"
