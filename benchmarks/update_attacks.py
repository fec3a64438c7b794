"""Every bit of a repository flipped, one at a time: does a device ever take a wrong bundle?

A device that runs one version is offered the next by a repository with one flipped bit: in any
metadata file (a rotated root included), the channel's file or the bundle. Each trial begins with
the same device.
"""

import contextlib
import os
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from tqdm import tqdm

from benchmarks.harness import Options, Report, Table
from runtime.delivery.slots import Slots
from runtime.delivery.update import Request, update
from runtime.errors import UpdateError
from tests.update_repository import Forge, copy_device

LONG = True

DEVICE = "0" * 32
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
QUICK_FLIPS = 200

Verdict = Literal["refused", "harmless", "WRONG"]


class Target(NamedTuple):
    """A device that runs 1.0, and a repository that offers it 1.1, both in one folder."""

    forge: Forge
    state: Path
    right: str
    """Digest of the bundle that it may take."""

    @classmethod
    def make(cls, folder: Path) -> "Target":
        """Publish, update and commit 1.0; rotate the root; publish 1.1."""
        forge, state = Forge(folder / "repository"), folder / "state"
        forge.publish("1.0")
        request = Request(forge.folder.as_uri(), "line", forge.trust)
        update(state, request, device=DEVICE)
        Slots(state).begin_try()
        Slots(state).commit()
        forge.root.version = 2
        forge.write(forge.root, forge.keys.root[:2])
        return cls(forge, state, forge.publish("1.1").sha256)

    def files(self) -> list[Path]:
        """What a device reads on its way to 1.1."""
        folder = self.forge.folder
        metadata = ("2.root", "timestamp", "2.snapshot", "2.targets")
        targets = (
            self.forge.targets.targets[path].get_prefixed_paths()[0]
            for path in ("channels/line.json", "bundles/tiny-1.1.zip")
        )
        return [
            *(folder / "metadata" / f"{name}.json" for name in metadata),
            *(folder / "targets" / path for path in targets),
        ]

    def trial(self, file: Path, bit: int, source: str | None = None) -> Verdict:
        """What a copy of the device makes of the repository with this bit of ``file`` flipped."""
        with tempfile.TemporaryDirectory(dir=MEMORY) as name, _flipped(file, bit):
            state = copy_device(self.state, Path(name) / "state")
            before = Slots(state).status()
            try:
                update(state, Request(source, "line"), device=DEVICE)
            except UpdateError:
                return "refused" if Slots(state).status() == before else "WRONG"
            except Exception:
                return "WRONG"
            after = Slots(state).status().state
            pending = after.pending.release.sha256 if after.pending else None
            whole = pending == self.right and after.current == before.state.current
            return "harmless" if whole else "WRONG"


@contextlib.contextmanager
def _flipped(file: Path, bit: int) -> Iterator[None]:
    honest = file.read_bytes()
    data = bytearray(honest)
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)
    try:
        yield
    finally:
        file.write_bytes(honest)


def measure(options: Options) -> Report:
    """Flip every bit; with ``--quick`` a seeded sample of them."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        target = Target.make(Path(folder))
        flips = [(file, bit) for file in target.files() for bit in range(8 * file.stat().st_size)]
        if options.quick:
            flips = random.Random(7).sample(flips, QUICK_FLIPS)
        counts: dict[str, Counter[str]] = {}
        for file, bit in tqdm(flips, disable=None):
            name = file.name.split(".", 1)[1] if len(file.name) > 64 else file.name
            counts.setdefault(name, Counter())[target.trial(file, bit)] += 1
    total = sum(counts.values(), Counter())
    verdicts = ("refused", "harmless", "WRONG")
    rows = [
        (name, f"{count.total():,}", *(f"{count[verdict]:,}" for verdict in verdicts))
        for name, count in [*counts.items(), ("all", total)]
    ]
    return Report(
        title="Flipped bits in a repository",
        tables=(
            Table(
                title="What a device made of them",
                columns=("file", "bits", "refused", "the right bundle all the same", "wrong"),
                rows=tuple(rows),
                notes=(
                    "*Refused*: one sentence, and the slots as they were. *The right bundle all "
                    "the same*: the bit carried no meaning, and what was staged is, byte for byte, "
                    "what was published. *Wrong*: anything else, also a crash. From a stick "
                    "(`file:`); a sample goes over HTTP in `tests/test_update_attacks.py`.",
                ),
            ),
        ),
        figures={name: dict(count) for name, count in [*counts.items(), ("all", total)]},
    )
