"""Power cuts in the middle of stage, activate, commit and rollback: what is there afterwards?

Each cut shuts an ext4 file system down without writing its journal (EXT4_IOC_SHUTDOWN), at a
random moment; what had not reached the disk is gone. It is mounted again and the next cut follows
on the same files. It models the loss of page cache and journal, not torn sectors, nor drives that
lie about what they have written. The same commands without fsync show that cuts do harm.

Where other programs start mount namespaces meanwhile, run it in one of its own: unshare --mount.
"""

import contextlib
import errno
import fcntl
import multiprocessing
import os
import random
import struct
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
from tqdm import tqdm

from benchmarks.harness import Options, Report, Table
from benchmarks.small_bundles import small_zip
from runtime.bundle import Bundle
from runtime.delivery import slot_state
from runtime.delivery.floor import Floors
from runtime.delivery.slot_state import Refusal, Release, State, version_key
from runtime.delivery.slots import Slots
from runtime.errors import FieldfitError, UpdateError

LONG = True

CUTS, QUICK_CUTS = 1000, 10
VERSIONS = tuple(f"1.{minor}.0" for minor in range(8))
WITHOUT_FSYNC = "power cuts, fsync left out, each on a new disk"
STEPS, LONGEST = 12, 0.03
"""Steps that begin before the cut, and seconds from the last of them to the cut, at most."""

_SHUTDOWN = 0x8004587D
_NO_LOG_FLUSH = 2
_DISK_BYTES = 32 * 1024 * 1024

Verb = Literal["stage", "activate", "begin_try", "commit", "rollback", "collect"]
Violation = Literal[
    "state unreadable", "slot not whole", "acknowledged step lost", "next command failed"
]
VIOLATIONS: tuple[Violation, ...] = (
    "state unreadable", "slot not whole", "acknowledged step lost", "next command failed",
)  # fmt: skip


class Step(NamedTuple):
    """One command, on the slot ``sha256``."""

    verb: Verb
    sha256: str


class Said(NamedTuple):
    """What a worker says of its ``step``: that it begins, is done, or why it failed."""

    what: Literal["begins", "done", "failed"]
    step: Step
    why: str = ""


class Round(NamedTuple):
    """What one cut did."""

    violations: tuple[Violation, ...]
    acknowledged: int
    interrupted: str
    """The verb that was on its way, or nothing."""


class Series(NamedTuple):
    """The rounds of one kind of cut."""

    title: str
    rounds: list[Round]

    def count(self, violation: Violation) -> int:
        """Rounds that ended in ``violation``."""
        return sum(violation in one.violations for one in self.rounds)


def measure(options: Options) -> Report:
    """Cut the power again and again; count what should never be.

    Raises UpdateError where ext4 cannot be mounted from a file: that takes root and loop devices.
    """
    cuts = QUICK_CUTS if options.quick else options.cuts or CUTS
    with tempfile.TemporaryDirectory(prefix="power-cuts-") as name:
        folder = Path(name)
        zips = [small_zip(folder, version, size=60_000) for version in VERSIONS]
        workers = Workers(zips)

        def shown(title: str, rounds: Iterator[Round], total: int) -> Series:
            bar = tqdm(rounds, desc=title, total=total, leave=False, disable=None)
            return Series(title, list(bar))

        kills, without = max(cuts // 4, QUICK_CUTS), max(cuts // 20, QUICK_CUTS)
        series = [
            shown("power cuts", _power_cuts(folder, workers, cuts, fsync=True), cuts),
            shown("kill -9", _kills(folder, workers, kills), kills),
            shown(WITHOUT_FSYNC, _without_fsync(folder, workers, without), without),
        ]
    return _report(series)


def _power_cuts(folder: Path, workers: "Workers", cuts: int, *, fsync: bool) -> Iterator[Round]:
    with Disk(folder) as disk:
        state = disk.folder / "state"
        Slots(state).recover()  # an empty state is there before the first cut
        for _ in range(cuts):
            yield _round(state, workers, disk.cut, fsync=fsync)


def _without_fsync(folder: Path, workers: "Workers", cuts: int) -> Iterator[Round]:
    for _ in range(cuts):
        yield from _power_cuts(folder, workers, 1, fsync=False)


def _kills(folder: Path, workers: "Workers", kills: int) -> Iterator[Round]:
    state = folder / "killed"
    Slots(state).recover()
    for _ in range(kills):
        yield _round(state, workers, lambda: contextlib.nullcontext(), fsync=True)


def _round(
    folder: Path,
    workers: "Workers",
    cut: Callable[[], contextlib.AbstractContextManager[None]],
    *,
    fsync: bool,
) -> Round:
    """Let a worker go on from what is there, stop it, and look."""
    slots = Slots(folder)
    before = slots.status()
    staged = {release.sha256 for release in before.staged} | before.state.in_use()
    said = workers.run(folder, cut, fsync=fsync)
    expected = Expected(before.state, staged, workers.releases)
    for word in said:
        expected.hear(word)
    violations = [*expected.violations, *look(slots, expected)]
    return Round(
        tuple(sorted(set(violations))),
        sum(word.what == "done" for word in said),
        expected.underway.verb if expected.underway else "",
    )


class Expected:
    """What must be there after a cut, by what a worker said: all that it acknowledged, and the
    step that was on its way wholly or not at all."""

    def __init__(self, state: State, staged: set[str], releases: dict[str, Release]) -> None:
        self.state = state
        self.staged = staged
        self.underway: Step | None = None
        self.violations: list[Violation] = []
        self._releases = releases

    def hear(self, said: Said) -> None:
        """Follow the worker."""
        if said.what == "begins":
            self.underway = said.step
        elif said.what == "failed":
            self.violations.append("next command failed")
        else:
            self.state = self.after(said.step)
            self.staged = self.kept(said.step)
            self.underway = None

    def states(self) -> list[State]:
        """Each state that may be there."""
        return [self.state] + ([self.after(self.underway)] if self.underway else [])

    def whole(self) -> set[str]:
        """The slots that must be there."""
        return self.kept(self.underway) & self.staged if self.underway else self.staged

    def after(self, step: Step) -> State:
        """The state after ``step``."""
        state, sha256 = self.state, step.sha256
        after: State | Refusal = state
        if step.verb == "activate":
            release = self._releases[sha256]
            after = slot_state.activate(state, release, allow_lower=True, again=True)
        elif step.verb == "begin_try":
            after = slot_state.begin_try(state, "")
        elif step.verb == "commit":
            after = slot_state.commit(state, sha256)
        elif step.verb == "rollback":
            after = slot_state.rollback(state, "", "", sha256)
        assert isinstance(after, State), after
        return after

    def kept(self, step: Step) -> set[str]:
        """The slots after ``step``."""
        if step.verb == "stage":
            return self.staged | {step.sha256}
        return self.state.in_use() if step.verb == "collect" else self.staged


def look(slots: Slots, expected: Expected) -> Iterator[Violation]:
    """What is not as it must be."""
    try:
        status, floor = slots.status(), Floors(slots.folder).read()
    except UpdateError:
        yield "state unreadable"
        return
    if status.problems:
        yield "state unreadable"
    if version_key(floor.version) < version_key(expected.state.floor):
        yield "acknowledged step lost"
    if _essence(status.state) not in [_essence(state) for state in expected.states()]:
        yield "acknowledged step lost"
    needed = expected.whole() | status.state.in_use()
    if not all(_is_whole(slots.folder / "slots" / sha256 / "bundle") for sha256 in needed):
        yield "slot not whole"


def _is_whole(bundle: Path) -> bool:
    try:
        Bundle.open(bundle)
    except FieldfitError:
        return False
    return True


def _essence(state: State) -> State:
    """The state without what no cut may be blamed for: dates, reasons and the count of steps."""
    failures = tuple(
        msgspec.structs.replace(failure, date="", reason="") for failure in state.failures
    )
    return msgspec.structs.replace(state, generation=0, failures=failures)


# --- workers


def churn(folder: Path, zips: Sequence[Path], seed: int, fsync: bool, mouth: Connection) -> None:
    """Stage, activate, try, commit and roll back until the end, saying each before and after."""
    if not fsync:
        os.fsync = lambda fd: None
    slots, choose = Slots(folder), random.Random(seed)
    shas = {path: Bundle.open(path).sha256() for path in zips}
    step = Step("stage", "")
    mouth.send(None)
    try:
        while True:
            for step, act in _steps(slots, shas, choose):
                mouth.send(Said("begins", step))
                act()
                mouth.send(Said("done", step))
    except Exception as error:
        with contextlib.suppress(BrokenPipeError):
            mouth.send(Said("failed", step, repr(error)))


def _steps(
    slots: Slots, shas: dict[Path, str], choose: random.Random
) -> Iterator[tuple[Step, Callable[[], object]]]:
    archive, sha256 = choose.choice(list(shas.items()))
    yield Step("stage", sha256), lambda: slots.stage(archive, allow_lower=True)
    activate = lambda: slots.activate(sha256, allow_lower=True, again=True)  # noqa: E731
    yield Step("activate", sha256), activate
    state = slots.status().state
    if state.pending is None:
        if state.previous and choose.random() < 0.5:
            yield Step("rollback", sha256), lambda: slots.rollback("drawn by lot", sha256)
        return
    for _ in range(choose.randint(1, max(1, state.pending.tries))):
        yield Step("begin_try", sha256), slots.begin_try
    state = slots.status().state
    if state.pending:
        if choose.random() < 0.7:
            yield Step("commit", sha256), lambda: slots.commit(sha256)
        else:
            yield Step("rollback", sha256), lambda: slots.rollback("drawn by lot", sha256)
    if choose.random() < 0.6:
        yield Step("collect", ""), slots.collect


class Workers:
    """Processes that run commands until they are stopped; forked from one that has imported."""

    def __init__(self, zips: Sequence[Path]) -> None:
        self._zips = zips
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["benchmarks.power_cuts"])
        self._random = random.Random(7)
        bundles = [Bundle.open(path) for path in zips]
        self.releases = {
            sha256: Release(
                sha256=sha256,
                name=bundle.manifest.name,
                version=bundle.manifest.version,
                manifest=bundle.manifest.digest,
            )
            for bundle in bundles
            if (sha256 := bundle.sha256())
        }

    def run(
        self,
        folder: Path,
        cut: Callable[[], contextlib.AbstractContextManager[None]],
        *,
        fsync: bool,
    ) -> list[Said]:
        """What a worker said that worked on ``folder`` until the cut, a moment drawn by lot."""
        ear, mouth = self._context.Pipe(duplex=False)
        seed = self._random.randrange(2**32)
        process = self._context.Process(target=churn, args=(folder, self._zips, seed, fsync, mouth))
        process.start()
        mouth.close()
        ear.recv()
        said: list[Said] = []
        begun = self._random.randint(0, STEPS)
        while sum(word.what == "begins" for word in said) < begun and _goes_on(said):
            said.append(ear.recv())
        time.sleep(self._random.uniform(0, LONGEST))
        while ear.poll() and _goes_on(said):
            said.append(ear.recv())
        with cut():
            process.kill()
            process.join()
        with contextlib.suppress(EOFError):
            while True:
                word = ear.recv()
                if word.what != "failed":  # a command fails, of course, when its disk is gone
                    said.append(word)
        ear.close()
        return said


def _goes_on(said: list[Said]) -> bool:
    return not said or said[-1].what != "failed"


class Disk:
    """An ext4 file system in a file; ``cut`` takes its power and brings it back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "disk"
        self._image = folder / "disk.img"

    def __enter__(self) -> "Disk":
        self.folder.mkdir(exist_ok=True)
        self._image.write_bytes(b"")
        os.truncate(self._image, _DISK_BYTES)
        _run("mkfs.ext4", "-q", "-F", self._image)
        self._mount()
        return self

    def __exit__(self, *error: object) -> None:
        _run("umount", self.folder)

    @contextlib.contextmanager
    def cut(self) -> Iterator[None]:
        """Nothing that is not on the disk gets there any more; the block is what stops with it."""
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(descriptor)
        yield
        _run("umount", self.folder)
        self._mount()

    def _mount(self) -> None:
        """Mount it, and see that it is mounted anew.

        Any process that starts a mount namespace copies our mount, and until it ends, mounting
        gives back the file system that was shut down: there the power has not come back yet.
        """
        for _ in range(100):
            _run("mount", "-o", "loop", self._image, self.folder)
            if self._is_on():
                return
            _run("umount", self.folder)
            time.sleep(0.1)
        raise UpdateError(
            "the disk is still shut down after 10 s: another mount namespace holds it; measure in "
            "one of your own: unshare --mount python -m benchmarks.run power_cuts"
        )

    def _is_on(self) -> bool:
        probe = self.folder / "probe"
        try:
            probe.touch()
            probe.unlink()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return False
        return True


def _run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UpdateError(
            f"{command[0]}: expected an ext4 file system on a loop device, got "
            f"{done.stderr.strip()!r}; run it as root on a machine that has loop devices"
        )


# --- the report


def _report(series: Sequence[Series]) -> Report:
    rows = tuple(
        (one.title, str(len(one.rounds)), *(str(one.count(kind)) for kind in VIOLATIONS))
        for one in series
    )
    interrupted = Counter(one.interrupted for one in series[0].rounds)
    acknowledged = sum(one.acknowledged for one in series[0].rounds)
    hit = tuple((verb or "between two", str(n)) for verb, n in interrupted.most_common())
    clean = not any(one.violations for one in series[0].rounds)
    count = len(series[0].rounds)
    bound = f"0 of {count:,} means below {300 / count:.2g} % with 95 % confidence." if clean else ""
    notes = (
        f"Between the power cuts {acknowledged:,} steps were acknowledged; each must be there "
        f"afterwards, and the interrupted one wholly or not at all. {bound}",
        "ext4 on a loop device, shut down with EXT4_IOC_SHUTDOWN without flushing the journal, "
        "mounted again. Page cache and journal are lost; torn sectors and drives that lie about "
        "what they wrote are not modelled.",
    )
    return Report(
        title="Power cuts while bundles are staged, activated, committed and rolled back",
        tables=(
            Table(title="Violations", columns=("", "cuts", *VIOLATIONS), rows=rows, notes=notes),
            Table(title="What the power cuts interrupted", columns=("step", "cuts"), rows=hit),
        ),
        figures={
            one.title: {
                "cuts": len(one.rounds),
                "acknowledged": sum(r.acknowledged for r in one.rounds),
                "violations": {kind: one.count(kind) for kind in VIOLATIONS},
                "interrupted": dict(Counter(r.interrupted for r in one.rounds)),
            }
            for one in series
        },
    )
