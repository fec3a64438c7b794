"""docs/evidence.md: its commands do what it says, and its figures are those of the code."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from PIL import Image

from runtime.classifier import Classifier
from runtime.evidence_pack import MAX_IMAGE_BYTES, MAX_IMAGES, REASONS, open_pack
from runtime.line.evidence import ROOM, SAME_LEVELS, Rules
from runtime.line.evidence_folder import Caps
from runtime.recipe import parse_recipe
from tests.evidence_frames import picture
from tests.model_zips import model_zip

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "evidence.md").read_text()


def test_the_commands_keep_evidence_and_pack_it(tmp_path: Path) -> None:
    watch, collect = (
        [sys.executable, "-m", "runtime", *shlex.split(line)]
        for line in re.findall(r"^fieldfit (.*)$", TEXT, re.MULTILINE)
    )
    (tmp_path / "build" / "solar").mkdir(parents=True)
    archive = model_zip(tmp_path, "1", labels=("functional", "defective", "c", "d"))
    archive.rename(tmp_path / "build" / "solar" / "bundle")
    (tmp_path / "inbox").mkdir()
    close = set()
    with Classifier.open(tmp_path / "build" / "solar" / "bundle", threads=1) as classifier:
        for number in range(8):
            file = tmp_path / "inbox" / f"{number}.png"
            Image.fromarray(picture(number)).save(file)
            second, first = sorted(classifier(file).probabilities.values())[-2:]
            close |= {file.name} if first - second < Rules().margin else set()
    assert 0 < len(close) <= 4  # a minute takes no more
    state = str(tmp_path / "state")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "FIELDFIT_STATE": state}
    with subprocess.Popen(
        [*watch, "--threads", "1"], cwd=tmp_path, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as line:  # fmt: skip
        assert line.stdout is not None
        for _ in range(8):
            line.stdout.readline()
        line.send_signal(signal.SIGTERM)
        _, said = line.communicate(timeout=60)
    assert line.returncode == 0, said
    done = subprocess.run(
        collect, cwd=tmp_path, env=env, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert 'evidence = ["line3.zip"]' in done.stdout
    with open_pack(tmp_path / "line3.zip") as pack:
        kept = {Path(r.frame).name: pack.read(r) for r in pack.contents.records}
    assert {name: kept.get(name) for name in close} == {
        name: (tmp_path / "inbox" / name).read_bytes() for name in close
    }
    assert len(kept) < 8


def test_the_recipe_is_valid() -> None:
    (toml,) = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    assert parse_recipe(f'name = "x"\n{toml}', "docs/evidence.md").data.evidence == ("line3.zip",)


def test_the_figures_are_those_of_the_code() -> None:
    caps, rules = Caps(), Rules()
    for words in [
        f"{caps.per_minute} a minute, {caps.per_hour} an hour, {caps.per_day} a day",
        f"| images | {caps.files:,} |",
        "1 GiB on disk",
        f"closer than {rules.margin}",
        f"one frame in {rules.sample_every:,}",
        f"({MAX_IMAGE_BYTES // 2**20} MiB)",
        f"or {MAX_IMAGES:,} images",
        f"within\n{SAME_LEVELS:g} of 256 levels",
    ]:
        assert words in TEXT, words
    assert (caps.bytes, caps.reserve, ROOM) == (2**30, 2**30, 8)
    for reason in REASONS:
        assert f"| `{reason}` |" in TEXT
