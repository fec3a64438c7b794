"""Two processes of a torchrun come to what one comes to, and fail with one message."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from runtime.errors import RecipeError
from tests.tiny_training import CPU, Seen, network, pictures, train
from train import distributed
from train.batches import Drawn, Pictures, Steps
from train.device import cores
from train.features import compute_features, predict
from train.objective import TaskLoss

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
UNEVEN: dict[str, Any] = {
    "make": lambda model: TaskLoss(model, keep_answers=0.5, l2_sp=0.01),
    "settings": {"freeze": ("conv_stem", "bn1"), "augment": ("flip-vertical",)},
    "schedule": {"epochs": 2, "learning_rate": 2e-5},
}
"""Batches of 4 source images and 3 of the field, which two processes cannot share evenly: one has
a field image more. The field has no teacher, so that its part of what is kept is uneven, too."""

TOGETHER = """
import json, sys
from pathlib import Path
import numpy as np
from safetensors.torch import save_file
from tests.test_distributed import UNEVEN
from tests.tiny_training import CPU, FREEZE, Seen, network, pictures, train
from train import console, distributed, stages
from train.features import cached_features, predict

folder = Path(sys.argv[1])
stages.WORTH = 0
with distributed.session():
    seen = Seen()
    objective, _ = train(folder, seen, **UNEVEN, save_every_s=0.0)
    again = Seen()
    train(folder, again, **UNEVEN)
    _, kept = train(folder / "kept", settings={"cache_frozen": True, "freeze": FREEZE})
    pixels, _ = pictures(150)
    features = cached_features(network(), pixels, "p", folder / "cache", CPU)
    result = {
        "losses": seen.losses, "resumed": again.resumed_at, "notes": kept.notes,
        "logits": predict(network(), pixels, CPU, rows=np.arange(140)).tolist(),
        "features": np.asarray(features, np.float32).tolist(),
        "everyone": distributed.gather_rows(np.array([distributed.rank()])).tolist(),
        "told": distributed.broadcast(f"from {distributed.rank()}"),
        "mine": distributed.rank(),
    }
    console.say(f"spoken by {distributed.rank()}")
    (folder / f"result-{distributed.rank()}.json").write_text(json.dumps(result))
    save_file(objective.model.state_dict(), folder / f"weights-{distributed.rank()}.safetensors")
"""

FAILING = """
import sys
from runtime.command import run_command
from runtime.errors import DataError
from train import distributed

def run():
    with distributed.session():
        if str(distributed.rank()) in sys.argv[1]:
            raise DataError("images/7.png: expected an image; take it out")
        distributed.barrier()
    return 0

sys.exit(run_command("train", run))
"""

LONG = """
import sys
from pathlib import Path
from runtime.command import run_command
from tests.tiny_training import Seen, train
from train import distributed

def run():
    with distributed.session():
        seen = Seen(lambda step: sys.stderr.write(f"<step {step}>\\n") if distributed.main() else 0)
        train(Path(sys.argv[1]), seen, schedule={"epochs": 500})
    return 0

sys.exit(run_command("train", run, interrupted="interrupted; go on from here"))
"""


def command(code: str, folder: Path, *arguments: str) -> list[str]:
    """A torchrun of two processes that run ``code``."""
    script = folder / "script.py"
    script.write_text(code)
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(script), *arguments,
    ]  # fmt: skip


def torchrun(code: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(code, folder, *arguments), cwd=ROOT, env=ENVIRONMENT, capture_output=True,
        text=True, timeout=240, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What two processes made of TOGETHER, and what they said."""
    folder = tmp_path_factory.mktemp("together")
    done = torchrun(TOGETHER, folder, str(folder))
    assert done.returncode == 0, done.stderr
    return folder, done.stderr


@pytest.mark.slow
def test_two_processes_train_to_the_weights_of_one(
    together: tuple[Path, str], tmp_path: Path
) -> None:
    folder, _ = together
    seen = Seen()
    objective, _ = train(tmp_path, seen, **UNEVEN)
    results = [json.loads((folder / f"result-{rank}.json").read_text()) for rank in (0, 1)]
    for result in results:
        np.testing.assert_allclose(result["losses"], seen.losses, rtol=1e-4)
        assert result["resumed"] == 8, "both go on from the state that the first one saved"
    start, alone = network().state_dict(), objective.model.state_dict()
    both = [load_file(folder / f"weights-{rank}.safetensors") for rank in (0, 1)]
    far = torch.cat([(alone[n] - start[n]).flatten() for n in alone]).norm()
    apart = torch.cat([(alone[n] - both[0][n]).flatten() for n in alone]).norm()
    assert apart < 0.02 * far
    assert all(torch.equal(both[0][n], both[1][n]) for n in alone)


@pytest.mark.slow
def test_every_process_gets_all_answers_and_one_writes_and_speaks(
    together: tuple[Path, str],
) -> None:
    folder, said = together
    pixels, _ = pictures(150)
    logits, features = (
        predict(network(), pixels[:140], CPU),
        compute_features(network(), pixels, CPU),
    )
    for rank in (0, 1):
        result = json.loads((folder / f"result-{rank}.json").read_text())
        assert result["mine"] == rank
        assert result["everyone"] == [0, 1]
        assert result["told"] == "from 0"
        np.testing.assert_allclose(result["logits"], logits, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(result["features"], features, rtol=2e-3, atol=2e-3)
        assert "computed once" in result["notes"][0]
    assert len(list((folder / "cache").glob("features-*"))) == 1
    assert "spoken by 0" in said
    assert "spoken by 1" not in said


@pytest.mark.slow
@pytest.mark.parametrize("who", ["1", "01"])
def test_a_failure_ends_all_processes_with_one_message(tmp_path: Path, who: str) -> None:
    done = torchrun(FAILING, tmp_path, who)
    assert done.returncode == 1
    assert done.stderr.count("train: images/7.png: expected an image; take it out") == 1


@pytest.mark.slow
def test_ctrl_c_stops_all_processes_at_one_step_and_any_number_of_them_can_go_on(
    tmp_path: Path,
) -> None:
    """A terminal sends it to all processes, torchrun then once more."""
    with subprocess.Popen(
        command(LONG, tmp_path, str(tmp_path)), cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    ) as running:  # fmt: skip
        assert running.stderr is not None
        before = next(line for line in running.stderr if "<step 3>" in line)
        os.killpg(running.pid, signal.SIGINT)
        said = running.stderr.read()
    assert said.count("train: interrupted; go on from here") == 1
    # Wherever it stands in a line: torchrun and both processes write to one stream.
    steps = re.findall(r"<step (\d+)>", before + said)
    seen = Seen(lambda step: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, seen, schedule={"epochs": 500})
    assert int(steps[-1]) == seen.resumed_at


def test_without_torchrun_one_process_is_all() -> None:
    with distributed.session(), distributed.main_first():
        assert (distributed.rank(), distributed.size(), distributed.main()) == (0, 1, True)
        part = np.arange(3)
        assert distributed.gather_rows(part) is part
        assert distributed.broadcast("x") == "x"
        values = torch.ones(2)
        assert distributed.mean(values) is values


@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_parts_of_a_batch_are_the_whole_and_differ_by_one_image_at_most(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    from tests.tiny_training import groups

    def steps() -> Steps:
        return Steps(
            groups(24), Pictures(pictures(24)[0]), augment=("rotate-90",), square=True,
            degrade=0.5, classes=2, seed=1,
        )  # fmt: skip

    whole = steps()[5]
    parts: list[Drawn] = []
    monkeypatch.setattr(distributed, "size", lambda: size)
    for rank in range(size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(steps()[5])
    lengths = [len(part.labels) for part in parts]
    assert max(lengths) - min(lengths) <= 1
    for kind in range(len(whole)):
        dealt = torch.empty_like(whole[kind])
        for rank, part in enumerate(parts):
            dealt[rank::size] = part[kind]
        torch.testing.assert_close(dealt, whole[kind], rtol=0, atol=0, equal_nan=True)


def test_a_batch_with_fewer_images_than_processes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "size", lambda: 8)
    with pytest.raises(RecipeError, match="batch = 7 cannot be divided over 8 processes; raise"):
        train(tmp_path)


def test_cores_are_shared_between_the_processes_of_a_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = cores()
    assert alone == len(os.sched_getaffinity(0))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert cores() == max(1, alone // 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert cores() == 1
