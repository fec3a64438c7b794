"""How a command ends: its exit code, and its one line of explanation as the last thing said."""

import sys
from collections.abc import Callable, Iterator

import pytest

from runtime.command import run_command
from runtime.errors import DataError


def half_way(make_error: Callable[[], BaseException]) -> int:
    """Stop inside a loop over a generator that still has something to say, as a bar does.

    It is a variable of this frame, and so lives as long as the traceback does.
    """

    def bar() -> Iterator[int]:
        try:
            yield 1
        finally:
            print("the bar as it stood", file=sys.stderr)

    steps = bar()
    for _ in steps:
        raise make_error()
    return 0


@pytest.mark.parametrize(
    ("make_error", "code", "line"),
    [
        (KeyboardInterrupt, 130, "train: interrupted; go on"),
        (lambda: DataError("no images; give a folder"), 1, "train: no images; give a folder"),
    ],
)
def test_the_explanation_is_the_last_line(
    make_error: Callable[[], BaseException],
    code: int,
    line: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    done = run_command("train", lambda: half_way(make_error), interrupted="interrupted; go on")
    assert done == code
    assert capsys.readouterr().err.splitlines() == ["the bar as it stood", line]


def test_the_explanation_is_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else another process' line comes between it and its end, as it did under torchrun."""
    written: list[str] = []

    class Stream:
        write = staticmethod(written.append)

    def fail() -> int:
        raise DataError("no images")

    monkeypatch.setattr(sys, "stderr", Stream())
    assert run_command("train", fail) == 1
    assert written == ["train: no images\n"]
