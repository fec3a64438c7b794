"""Pictures: whole PNG files that show what they are given, or no file at all."""

import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageColor

from train import plots
from train.adversarial import DISCRIMINATOR
from train.plots import Point, Step

BEFORE = dict.fromkeys(("blur", "dirt", "dark", "noise", "rows"), (0.1, 0.2, 0.3, 0.4, 0.5))
START = Step("as is", True, 0.63, (0.58, 0.67), 0.90, 0.0, "the source model")
HEAD = Step("head", True, 0.70, (0.66, 0.74), 0.895, 0.012, "AUC +0.076, $90 %$ above 0.041")
WORSE = Step("adversarial", False, 0.68, (0.64, 0.72), 0.86, 0.062, "source AUC lost 0.041")


def picture(path: Path) -> npt.NDArray[np.uint8]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def places(path: Path, colour: str) -> npt.NDArray[np.intp]:
    """Rows and columns ``[N, 2]`` of the pixels that are of ``colour``."""
    return np.argwhere((picture(path) == ImageColor.getrgb(colour)).all(axis=2))


def after(error: float) -> dict[str, tuple[float, ...]]:
    return dict.fromkeys(BEFORE, (error,) * 5)


def test_every_picture_is_a_png_of_one_width(tmp_path: Path) -> None:
    plots.write_robustness(tmp_path / "robustness.png", BEFORE, after(0.2), "head")
    plots.write_ladder(tmp_path / "ladder.png", [START, HEAD, WORSE], metric="AUC")
    history = [Point(epoch, 1 / epoch, 0.7, {"task": 1 / epoch}) for epoch in (1, 2, 3)]
    plots.write_curves(tmp_path / "curves.png", {"fine-tuning": history}, metric="AUC")
    # Two lines of panels, three steps, one history: the heights follow from those.
    sizes = {path.stem: picture(path).shape for path in tmp_path.iterdir()}
    heights = {"robustness": 0.9 + 2 * 1.7, "ladder": 1.4 + 3 * 0.85, "curves": 0.6 + 2.2}
    assert sizes == {name: (int(150 * high), 1350, 3) for name, high in heights.items()}


def test_larger_errors_are_drawn_higher(tmp_path: Path) -> None:
    for name, error in (("good", 0.1), ("bad", 0.45)):
        plots.write_robustness(tmp_path / f"{name}.png", BEFORE, after(error), "head")
    good, bad = (places(tmp_path / f"{name}.png", plots.BLUE) for name in ("good", "bad"))
    assert bad[:, 0].mean() < good[:, 0].mean() - 20


def test_each_degradation_has_its_panel(tmp_path: Path) -> None:
    plots.write_robustness(tmp_path / "five.png", BEFORE, after(0.2), "head")
    one = {"blur": BEFORE["blur"]}
    plots.write_robustness(tmp_path / "one.png", one, {"blur": (0.2,) * 5}, "head")
    five, single = (places(tmp_path / f"{name}.png", plots.BLUE) for name in ("five", "one"))
    assert 4 < len(five) / len(single) < 5  # both have the legend


def test_what_was_not_kept_is_red_and_what_was_kept_is_green(tmp_path: Path) -> None:
    kept = WORSE._replace(kept=True)
    plots.write_ladder(tmp_path / "dropped.png", [START, HEAD, WORSE], metric="AUC")
    plots.write_ladder(tmp_path / "kept.png", [START, HEAD, kept], metric="AUC")
    red = {name: len(places(tmp_path / f"{name}.png", plots.RED)) for name in ("dropped", "kept")}
    green = {name: len(places(tmp_path / f"{name}.png", plots.GREEN)) for name in red}
    assert red["dropped"] > 3 * red["kept"] > 0  # the legend has some red in both
    assert green["kept"] > green["dropped"]


def test_a_ladder_without_field_labels_can_be_drawn(tmp_path: Path) -> None:
    blind = [step._replace(field=None, interval=None, source=None) for step in (START, HEAD)]
    plots.write_ladder(tmp_path / "ladder.png", blind, metric="AUC")
    assert picture(tmp_path / "ladder.png").std() > 0


@pytest.mark.parametrize(
    ("last", "title"),
    [
        (HEAD, "“head” is kept: field AUC 0.630 → 0.700, source AUC 0.900 → 0.895"),
        (HEAD._replace(field=None), "“head” is kept: source AUC 0.900 → 0.895"),
        (START, "“as is” stays: nothing passed the gate"),
    ],
)
def test_the_title_says_what_came_out(last: Step, title: str) -> None:
    assert plots.ladder_title(START, last, "AUC") == title


def test_parts_may_begin_late_and_need_not_be_there(tmp_path: Path) -> None:
    histories = {
        "head": [Point(1, 0.5, 0.7, {})],
        "adversarial": [
            Point(1, 0.9, 0.7, {"task": 0.5}),
            Point(2, 0.8, 0.6, {"task": 0.4, DISCRIMINATOR: 0.8}),
        ],
    }
    plots.write_curves(tmp_path / "curves.png", histories, metric="AUC")
    purple = places(tmp_path / "curves.png", plots.PURPLE)
    # Only the second training has parts: the lower half, the third column.
    assert len(purple) > 0
    assert purple[:, 0].min() > picture(tmp_path / "curves.png").shape[0] / 2
    assert purple[:, 1].min() > 1350 / 2


def test_nothing_is_written_when_drawing_or_writing_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        plots.write_robustness(tmp_path / "a.png", BEFORE, {"blur": BEFORE["blur"]}, "head")
    assert list(tmp_path.iterdir()) == []
    occupied = tmp_path / "folder.png"
    (occupied / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="folder"):
        plots.write_ladder(occupied, [START, HEAD], metric="AUC")
    assert list(tmp_path.iterdir()) == [occupied]


def test_settings_of_the_process_stay_as_they_are(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    plots.write_ladder(tmp_path / "ladder.png", [START], metric="AUC")
    assert dict(mpl.rcParams) == before


def test_no_display_is_asked_for(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from train import plots\n"
        f"start = plots.Step(*{tuple(START)!r})\n"
        "plots.write_ladder(Path(sys.argv[1]), [start], metric='AUC')\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "ladder.png"],
        cwd=Path(__file__).parents[1],
        # Its list of fonts is made already.
        env={"MPLBACKEND": "TkAgg", "HOME": str(tmp_path), "MPLCONFIGDIR": mpl.get_cachedir()},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["False"]
    assert picture(tmp_path / "ladder.png").shape[1] == 1350
