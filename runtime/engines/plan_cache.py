"""Keep built TensorRT plans on this machine, and hand out none but those that it kept here itself.

A plan is bound to its library, GPU and platform, and is executable code that TensorRT checks for
neither damage nor origin. So each lies beside a record of the key that it was built under and of
its digest, and whatever does not match is a miss, with a sentence that says why. It knows files
and keys; it does not know TensorRT, nor how a plan is built or judged.

The order for a caller, so that two processes build once and nothing unproven is ever kept:
``find``; if that is a reason, ``lock``, ``find`` again, build, replay the golden samples, ``keep``.
"""

import contextlib
import datetime
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec

from runtime import atomic
from runtime.engines.tensorrt_library import Flavour, plan_header
from runtime.errors import EngineError
from runtime.private_files import Lock, Waiting, check_folder, check_size, read_private

LIMIT_BYTES = 2 * 1024 * 1024 * 1024
"""Plans of this much are kept, unless the caller says otherwise."""

_MAX_RECORD_BYTES = 256 * 1024
_MAX_TIMING_BYTES = 256 * 1024 * 1024
_DIGEST_BYTES = 32
_TITLES: dict[Flavour, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
_NAME = re.compile(r"\.?([0-9a-f]{32})(-[0-9a-f]{16})?\.(json|plan|timing|lock)(\.\w+)?\Z")
"""Of every file here; those that ``atomic`` has not finished start with a dot."""

Value = bool | int | float | str


class PlanKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that a plan is bound to, or was built from."""

    flavour: Flavour
    version: str
    """Of the library, e.g. ``10.3.0.26``."""
    gpu: str
    """Compute capability, e.g. ``8.7``, and whatever else tells GPUs apart."""
    platform: str
    """E.g. ``linux-aarch64 L4T R36.4.3``."""
    cuda: str
    """Runtime and driver, e.g. ``12.6, driver 12.6``."""
    model_sha256: str
    """Of the ONNX bytes."""
    form: str
    options: dict[str, bool | int | str | list[int]]
    """What the builder was asked for: batch sizes, level, typing and the like."""

    @property
    def digest(self) -> str:
        """The name of its files."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()[:32]


class PlanRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is known about a plan that was kept."""

    format: Literal[1] = 1
    key: PlanKey
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    size: int
    """Bytes."""
    built: str
    """UTC, e.g. ``2026-11-25T09:44:01Z``."""
    seconds: float
    """That the build took."""
    typing: str
    """Who chose the types of the network's tensors: ``strong`` or ``weak``."""
    attempts: list[str]
    """What was tried before in vain, and why."""
    notes: dict[str, Value]
    """What the caller measured with it."""


class Plan(NamedTuple):
    """A plan whose bytes are the ones that were kept; ``record.sha256`` is their digest."""

    plan: bytes
    record: PlanRecord


class _File(NamedTuple):
    path: Path
    size: int
    used: float
    """Seconds since the epoch of its last change; ``find`` touches the record."""


class _Sealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A record as it lies on disk; the digest is that of the record's bytes."""

    record: msgspec.Raw
    sha256: str


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Where fieldfit keeps what it can make again; None for a user without a home folder.

    ``$FIELDFIT_CACHE``, else ``fieldfit`` in ``$XDG_CACHE_HOME``, else ``~/.cache/fieldfit``
    (XDG Base Directory Specification, which says to ignore relative paths).
    """
    if chosen := environment.get("FIELDFIT_CACHE"):
        return Path(chosen)
    base = Path(environment.get("XDG_CACHE_HOME", ""))
    if base.is_absolute():
        return base / "fieldfit"
    try:
        return Path("~/.cache/fieldfit").expanduser()
    except RuntimeError:
        return None


def difference(was: PlanKey, now: PlanKey) -> str:
    """In which parts two keys differ, for people: ``built by TensorRT 10.3.0.26, this is ...``."""
    parts = [
        ("by", f"{_TITLES[was.flavour]} {was.version}", f"{_TITLES[now.flavour]} {now.version}"),
        ("for compute capability", was.gpu, now.gpu),
        ("on", was.platform, now.platform),
        ("with CUDA", was.cuda, now.cuda),
        ("from the model", was.model_sha256[:12], now.model_sha256[:12]),
        ("from its form", was.form, now.form),
    ]
    changed = [f"{how} {old}, this is {new}" for how, old, new in parts if old != new]
    for name in sorted(was.options.keys() | now.options.keys()):
        before, asked = (options.get(name, "unsaid") for options in (was.options, now.options))
        if before != asked:
            changed.append(f"with {name} {before}, asked for is {asked}")
    return f"built {'; '.join(changed)}"


def supersedes(new: PlanKey, old: PlanKey) -> bool:
    """Whether ``new`` is what became of ``old`` when the software of the machine was updated.

    Plans for other options or another GPU are not superseded: another program may want them.
    """
    updated = msgspec.structs.replace(
        old, version=new.version, platform=new.platform, cuda=new.cuda
    )
    return new.digest != old.digest and new.digest == updated.digest


class PlanCache:
    """The plans in ``FOLDER/plans``, which only this user may enter.

    No method raises for what is wrong with the folder or a file in it: those that return a ``str``
    return the reason. Without a folder, or with one that cannot be written, nothing is kept.
    """

    def __init__(self, folder: Path | None, *, limit_bytes: int = LIMIT_BYTES) -> None:
        self.folder = folder
        self._limit = limit_bytes
        self._in_use: set[str] = set()

    @classmethod
    def default(cls) -> "PlanCache":
        """The cache of this user (see cache_folder)."""
        return cls(cache_folder())

    def find(self, key: PlanKey) -> Plan | str:
        """The plan that was kept under ``key``, or one sentence why there is none to be had.

        The bytes handed out are those whose digest was checked.
        """
        try:
            plan = self._load(key)
        except (EngineError, OSError) as error:
            return self._sentence(error)
        self._in_use.add(key.digest)
        with contextlib.suppress(OSError):  # where use cannot be noted, nothing is removed either
            os.utime(self._place() / f"{key.digest}.json")
        return plan

    def keep(
        self,
        key: PlanKey,
        plan: bytes,
        *,
        seconds: float,
        typing: str,
        attempts: Sequence[str] = (),
        notes: Mapping[str, Value] | None = None,
    ) -> str:
        """Keep a plan that was proven, inside ``lock(key)``; why it could not be kept, or nothing.

        The fields are those of PlanRecord. The plan that was under ``key`` stays until this one is
        on disk. Then those go that it supersedes and, beyond the limit, those that were not used
        for the longest time; never one that this object handed out.
        """
        now = datetime.datetime.now(datetime.timezone.utc)
        record = PlanRecord(
            key=key,
            sha256=hashlib.sha256(plan).hexdigest(),
            size=len(plan),
            built=now.strftime("%Y-%m-%dT%H:%M:%SZ"),
            seconds=seconds,
            typing=typing,
            attempts=list(attempts),
            notes=dict(notes or {}),
        )
        try:
            check_size(len(plan), self._limit, "the plan")
            _check_header(plan, key)
            place = self._make_place()
            self._sweep()
            try:
                atomic.write_bytes(_plan_file(place, record), plan)
                # From here on, and not before, this plan is the one under its key.
                atomic.write_bytes(place / f"{key.digest}.json", _seal(record))
            finally:
                with contextlib.suppress(OSError):
                    _unlink(self._leftovers(key.digest))
        except (EngineError, OSError) as error:
            return self._sentence(error)
        self._in_use.add(key.digest)
        self._make_room(key)
        return ""

    @contextlib.contextmanager
    def lock(self, key: PlanKey, waiting: Waiting) -> Iterator[str]:
        """Hold ``key`` against other processes; yield nothing, or why there can be no lock.

        ``waiting`` is called before waiting for another process that holds it.
        """
        with contextlib.ExitStack() as held:
            reason = ""
            try:
                lock = Lock.acquire(self._make_place() / f"{key.digest}.lock", waiting)
                held.enter_context(contextlib.closing(lock))
            except (EngineError, OSError) as error:
                reason = self._sentence(error)
            yield reason

    def remove(self, key: PlanKey) -> str:
        """Forget the plan under ``key``; why that was not possible, or nothing."""
        try:
            _unlink(self._files_of(key.digest))
        except FileNotFoundError:
            return ""
        except (EngineError, OSError) as error:
            return self._sentence(error)
        self._in_use.discard(key.digest)
        return ""

    def entries(self) -> list[PlanRecord]:
        """The records of all plans, the last used first; none where they cannot be read."""
        try:
            files = self._files()
        except (EngineError, OSError):
            return []
        digests = sorted(files, key=lambda digest: _last_use(files[digest]), reverse=True)
        records = [self._record(digest) for digest in digests]
        return [record for record in records if record is not None]

    def size(self) -> int:
        """Bytes of all files, also of those that will be removed."""
        try:
            return sum(_size(own) for own in self._files().values())
        except (EngineError, OSError):
            return 0

    def writable(self) -> str:
        """Why plans cannot be kept here, or nothing. It tries: the folder is made."""
        import tempfile  # only who asks pays for it

        try:
            with tempfile.TemporaryFile(dir=self._make_place()) as file:
                file.write(bytes(4096))
        except (EngineError, OSError) as error:
            return self._sentence(error)
        return ""

    def timing(self, flavour: Flavour, version: str, gpu: str) -> bytes:
        """The builder's timing cache for this library and GPU; empty if there is none, or no good.

        It only makes builds faster, so nothing is said about a damaged one.
        """
        try:
            file = self._place() / f"{_timing_digest(flavour, version, gpu)}.timing"
            data = read_private(file, _MAX_TIMING_BYTES)
        except (EngineError, OSError):
            return b""
        digest, timing = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        return timing if digest == hashlib.sha256(timing).digest() else b""

    def keep_timing(self, flavour: Flavour, version: str, gpu: str, timing: bytes) -> str:
        """Keep the builder's timing cache, all of it; why it could not be kept, or nothing."""
        digest = _timing_digest(flavour, version, gpu)
        try:
            check_size(_DIGEST_BYTES + len(timing), _MAX_TIMING_BYTES, "the timing cache")
            place = self._make_place()
            lock = Lock.acquire(place / f"{digest}.lock", waiting=lambda _: None)
            with contextlib.closing(lock):
                sealed = hashlib.sha256(timing).digest() + timing
                atomic.write_bytes(place / f"{digest}.timing", sealed)
        except (EngineError, OSError) as error:
            return self._sentence(error)
        return ""

    def _place(self) -> Path:
        """The folder of the plans. Raises EngineError unless it is ours alone."""
        if self.folder is None:
            raise EngineError("there is no cache folder; set FIELDFIT_CACHE to one")
        place = self.folder / "plans"
        check_folder(place)
        return place

    def _make_place(self) -> Path:
        if self.folder is not None:
            try:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                (self.folder / "plans").mkdir(mode=0o700, exist_ok=True)
            except FileExistsError as error:
                raise EngineError(f"{error.filename}: expected a folder, got a file") from error
        return self._place()

    def _sentence(self, error: EngineError | OSError) -> str:
        """What is wrong; an OSError would name a file that nobody knows."""
        return f"{self.folder}: {error.strerror}" if isinstance(error, OSError) else str(error)

    def _load(self, key: PlanKey) -> Plan:
        try:
            place = self._place()
            data = read_private(place / f"{key.digest}.json", _MAX_RECORD_BYTES)
        except FileNotFoundError:
            raise EngineError(self._why_none(key)) from None
        record = _unseal(data, f"{key.digest}.json")
        if record.key.digest != key.digest:
            raise EngineError(
                f"not made by this cache for this machine: {difference(record.key, key)}"
            )
        file = _plan_file(place, record)
        try:
            plan = read_private(file, self._limit)
        except FileNotFoundError:
            raise EngineError(f"{file.name}: expected beside its record, got none") from None
        got = hashlib.sha256(plan).hexdigest()
        if (len(plan), got) != (record.size, record.sha256):
            raise EngineError(
                f"{file.name}: damaged: expected {record.size:,} bytes of sha256 "
                f"{record.sha256[:12]}, got {len(plan):,} of {got[:12]}"
            )
        _check_header(plan, key)
        return Plan(plan, record)

    def _why_none(self, key: PlanKey) -> str:
        """Compare with the newest plan of the same model and form."""
        try:
            strays = self._files_of(key.digest)
        except FileNotFoundError:
            return "no plan yet"
        if any(file.path.suffix == ".plan" for file in strays):
            return "a plan without a record: not made by this cache, or not finished"
        same = [
            record
            for record in self.entries()
            if (record.key.model_sha256, record.key.form) == (key.model_sha256, key.form)
        ]
        if not same:
            return "no plan yet"
        return difference(max(same, key=lambda record: record.built).key, key)

    def _files(self) -> dict[str, list[_File]]:
        """All files by the digest in their name."""
        files: dict[str, list[_File]] = {}
        for path in self._place().iterdir():
            if name := _NAME.match(path.name):
                with contextlib.suppress(FileNotFoundError):  # another process removes, too
                    status = path.lstat()
                    file = _File(path, status.st_size, status.st_mtime)
                    files.setdefault(name[1], []).append(file)
        return files

    def _files_of(self, digest: str) -> list[_File]:
        return self._files().get(digest, [])

    def _record(self, digest: str) -> PlanRecord | None:
        """The record under ``digest`` if it can be believed."""
        try:
            name = f"{digest}.json"
            record = _unseal(read_private(self._place() / name, _MAX_RECORD_BYTES), name)
        except (EngineError, OSError):
            return None
        return record if record.key.digest == digest else None

    def _sweep(self) -> None:
        """Remove what killed processes left behind."""
        for digest in self._files():
            if self._leftovers(digest):
                self._discard(digest, self._leftovers)

    def _discard(self, digest: str, choose: Callable[[str], list[_File]]) -> None:
        """Remove what ``choose`` finds under ``digest``, unless another process works on it now.

        What cannot be removed is in nobody's way, and tried again with the next plan.
        """
        with contextlib.suppress(EngineError, OSError):
            if lock := Lock.attempt(self._place() / f"{digest}.lock"):
                with contextlib.closing(lock):
                    _unlink(choose(digest))

    def _leftovers(self, digest: str) -> list[_File]:
        """Files that no record speaks of, except the lock, which is its holder's."""
        record = self._record(digest)
        wanted = {f"{digest}.timing", f"{digest}.lock"}
        if record is not None:
            wanted |= {f"{digest}.json", _plan_file(Path(), record).name}
        return [file for file in self._files_of(digest) if file.path.name not in wanted]

    def _make_room(self, key: PlanKey) -> None:
        """Remove superseded plans and, beyond the limit, those not used for the longest time."""
        for record in self.entries():
            if supersedes(key, record.key):
                self._discard(record.key.digest, self._files_of)
        with contextlib.suppress(EngineError, OSError):
            files = self._files()
            total = sum(_size(own) for own in files.values())
            for digest in sorted(files, key=lambda digest: _last_use(files[digest])):
                if total > self._limit and digest not in self._in_use:
                    self._discard(digest, self._files_of)
                    total -= _size(files[digest])


def _check_header(plan: bytes, key: PlanKey) -> None:
    """Some libraries report three of the four numbers of their version, so those are compared."""
    header = plan_header(plan)
    numbers = re.match(r"\d+(\.\d+)*", key.version)
    expected = numbers[0].split(".")[:4] if numbers else []
    got = header.version.split(".")[: len(expected)]
    if (header.flavour, got) != (key.flavour, expected):
        raise EngineError(
            f"the plan is by {_TITLES[header.flavour]} {header.version}, this is "
            f"{_TITLES[key.flavour]} {key.version}"
        )


def _seal(record: PlanRecord) -> bytes:
    body = msgspec.json.format(msgspec.json.encode(record), indent=1)
    return msgspec.json.encode(_Sealed(msgspec.Raw(body), hashlib.sha256(body).hexdigest()))


def _unseal(data: bytes, name: str) -> PlanRecord:
    try:
        sealed = msgspec.json.decode(data, type=_Sealed)
        if hashlib.sha256(sealed.record).hexdigest() != sealed.sha256:
            raise EngineError(f"{name}: the record is damaged: its digest does not match")
        return msgspec.json.decode(sealed.record, type=PlanRecord)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EngineError(
            f"{name}: the record is damaged or of another version: {error}"
        ) from error


def _plan_file(place: Path, record: PlanRecord) -> Path:
    """Named by key and content: a new plan lies beside the old one until the record changes."""
    return place / f"{record.key.digest}-{record.sha256[:16]}.plan"


def _timing_digest(flavour: Flavour, version: str, gpu: str) -> str:
    return hashlib.sha256(msgspec.json.encode([flavour, version, gpu])).hexdigest()[:32]


def _last_use(files: Sequence[_File]) -> float:
    """Of an entry: when its record was touched last."""
    return max((file.used for file in files if file.path.suffix in (".json", ".timing")), default=0)


def _size(files: Sequence[_File]) -> int:
    return sum(file.size for file in files)


def _unlink(files: Sequence[_File]) -> None:
    """Remove files, the record first; the lock is its holder's to remove."""
    for file in sorted(files, key=lambda file: file.path.suffix != ".json"):
        if file.path.suffix != ".lock":
            file.path.unlink(missing_ok=True)
