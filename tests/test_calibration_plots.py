"""The picture of a table: whole PNG files in which every tensor has its row."""

import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageColor

from calibration import plots
from calibration.table import Table, TableKey, TensorRange
from tests.calibration_graphs import draw_images, make_table, small_cnn


def table(*chosen: float, clipped: float = 0.0) -> Table:
    """Tensors that held -8 to 8, of which ``chosen`` times as much is represented."""
    tensors = {
        f"tensor {number} with a rather long name/of/a/block_{number}": TensorRange(
            observed=(-8.0, 8.0),
            chosen=(-8.0 * share, 8.0 * share),
            clipped=clipped,
            channel_means=(),
        )
        for number, share in enumerate(chosen)
    }
    key = TableKey(graph="", images="", preprocessing="", method="mse")
    return Table(key=key, images=1, tensors=tensors)


def places(path: Path, colour: str) -> npt.NDArray[np.intp]:
    """Rows and columns ``[N, 2]`` of the pixels that are of ``colour``."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        levels = np.asarray(image.convert("RGB"))
    return np.argwhere((levels == ImageColor.getrgb(colour)).all(axis=2))


def below_the_legend(found: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    return found[found[:, 0] > 0.6 * plots.DPI]


def test_the_picture_grows_with_the_graph(tmp_path: Path) -> None:
    for count in (1, 60):
        plots.write_ranges(tmp_path / f"{count}.png", table(*[1.0] * count), {})
        with Image.open(tmp_path / f"{count}.png") as picture:
            assert picture.size == (1350, int(150 * (1.5 + count * plots.ROW)))


def test_what_is_not_represented_is_seen(tmp_path: Path) -> None:
    for share in (1.0, 0.1):
        plots.write_ranges(tmp_path / f"{share}.png", table(share, share, share), {})
    whole, part = (places(tmp_path / f"{share}.png", plots.BLUE) for share in (1.0, 0.1))
    assert np.ptp(part[:, 1]) < 0.9 * np.ptp(whole[:, 1])
    covered, bare = (places(tmp_path / f"{share}.png", plots.GREY) for share in (1.0, 0.1))
    assert len(bare) > 2 * len(covered)


def test_only_tensors_with_values_outside_are_marked_farther_right_for_more(
    tmp_path: Path,
) -> None:
    middles = []
    for share in (0.0, 1e-9, 1e-4, 1e-2):
        path = tmp_path / f"{share}.png"
        plots.write_ranges(path, table(0.9, 0.9, clipped=share), {})
        marks = below_the_legend(places(path, plots.ORANGE))
        middles.append(np.median(marks[:, 1]) if len(marks) else 0)
    assert middles == sorted(middles)
    assert len(set(middles)) == 4
    name = next(iter(table(1.0).tensors))
    plots.write_ranges(tmp_path / "held.png", table(1.0, 1.0), {name: 0.01})
    assert len(below_the_legend(places(tmp_path / "held.png", plots.PURPLE))) > 0


def test_a_measured_table_is_drawn_and_settings_come_back(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    plots.write_ranges(tmp_path / "ranges.png", make_table(small_cnn(), draw_images(8)), {})
    assert dict(mpl.rcParams) == before
    assert len(places(tmp_path / "ranges.png", plots.BLUE)) > 1000


def test_no_display_is_needed_and_calibration_alone_loads_no_matplotlib() -> None:
    code = "import calibration, sys; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
