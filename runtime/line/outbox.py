"""Verdicts that are kept before they are sent, on disk, until the other side has said it has them.

One SQLite file in WAL mode. ``append`` is one transaction with ``synchronous=FULL``: what it
returned survives a power cut (NORMAL is known to lose acknowledged records). Nothing that a disk
does is an exception here: a record that could not be kept is an ``Unkept`` with its reason, and a
damaged file is set aside, said, and what is still whole in it taken over. It knows no broker.

Beside the file lie ``NAME.ceiling``, above every number that was ever given, so that none is given
twice even when the file is lost, and ``NAME.lock``, which is held shared by all that read or write
and alone by who sets a damaged file aside.
"""

import contextlib
import fcntl
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import msgspec

from runtime import atomic
from runtime.line.verdict import Finding, Verdict, numbered

SCHEMA = 1
MAX_ROWS = 100_000
MAX_BYTES = 64 * 1024 * 1024

MAX_RECORD_BYTES = 64 * 1024
"""Of one finding: no reason is that long, and one record must not push all others out."""

_APPLICATION = 0x46464F42
"""Tells our files from other SQLite databases."""
_RESERVED = 1000
"""Numbers that one write of the ceiling covers."""
_BUSY_S = 1.0
"""The sender's transactions take well below a millisecond; a lock held longer is a fault."""
_JOURNAL_BYTES = 4 * 1024 * 1024

_TABLES = (
    "CREATE TABLE record (seq INTEGER PRIMARY KEY, payload BLOB NOT NULL)",
    "CREATE TABLE latest (name TEXT PRIMARY KEY, payload BLOB NOT NULL, sent INTEGER NOT NULL)",
    "CREATE TABLE count (name TEXT PRIMARY KEY, value INTEGER NOT NULL)",
    "INSERT INTO count VALUES ('last', 0), ('rows', 0), ('bytes', 0), ('sent', 0), "
    "('dropped', 0), ('refused', 0), ('unkept', 0), ('damaged', 0)",
    """CREATE TRIGGER record_added AFTER INSERT ON record BEGIN
         UPDATE count SET value = value + 1 WHERE name = 'rows';
         UPDATE count SET value = value + length(new.payload) WHERE name = 'bytes';
       END""",
    """CREATE TRIGGER record_removed AFTER DELETE ON record BEGIN
         UPDATE count SET value = value - 1 WHERE name = 'rows';
         UPDATE count SET value = value - length(old.payload) WHERE name = 'bytes';
       END""",
)

_TAKEN_OVER = ("sent", "dropped", "refused", "unkept", "damaged")
_STATUS = "status"

Inode = tuple[int, int]

Synchronous = Literal["FULL", "NORMAL"]
_Result = TypeVar("_Result")


class Unkept(NamedTuple):
    """A record that is not on the disk, has no number, and will not be sent."""

    reason: str


class Row(NamedTuple):
    """A record that waits to be sent."""

    seq: int
    payload: bytes
    """JSON of a ``Verdict``."""


class Counts(NamedTuple):
    """What the outbox has and has had, since the device was set up."""

    last: int = 0
    """The last number that was given."""
    rows: int = 0
    """Records that wait."""
    bytes: int = 0
    """Of their payloads; the file is larger."""
    sent: int = 0
    dropped: int = 0
    """Oldest ones that went unsent because the outbox was full."""
    refused: int = 0
    """Taken out because no broker will ever take them."""
    unkept: int = 0
    """Findings that could not be written at all."""
    damaged: int = 0
    """Times that a damaged file was set aside."""


class _DamageError(Exception):
    """The file is no outbox, or no longer."""


class _Key(msgspec.Struct):
    device: str
    seq: int


def is_whole(row: Row, device: str) -> bool:
    """Whether ``row`` is JSON, and holds what it is filed as: SQLite has no checksum of it."""
    try:
        key = msgspec.json.decode(row.payload, type=_Key)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return (key.device, key.seq) == (device, row.seq)


def _say(sentence: str) -> None:
    print(f"fieldfit: {sentence}", file=sys.stderr, flush=True)


class Outbox:
    """The records of one device that are still to be sent, oldest first.

    ``max_rows`` and ``max_bytes`` (of payloads) bound it: the oldest go first, and are counted.
    ``synchronous`` is FULL for who appends. A sender may use NORMAL: losing the news that a record
    was sent costs a duplicate, and its transactions then never wait for the disk.
    ``tell`` is called with one sentence when something happened that a person should know.

    It may be used by several threads and processes at once.
    """

    def __init__(
        self,
        path: Path,
        device: str,
        *,
        max_rows: int = MAX_ROWS,
        max_bytes: int = MAX_BYTES,
        synchronous: Synchronous = "FULL",
        tell: Callable[[str], object] = _say,
    ) -> None:
        self.path = path
        self.device = device
        self._max = max_rows, max_bytes
        self._synchronous = synchronous
        self._tell = tell
        self._thread = threading.RLock()
        self._database: sqlite3.Connection | None = None
        self._file: Inode | None = None
        self._checked: Inode | None = None
        self._ceiling = 0
        self._unkept = 0  # of this process, not yet counted in the file
        self._counts = Counts()

    # --- the loop's side

    def append(self, finding: Finding) -> Verdict | Unkept:
        """Give ``finding`` the next number and keep it; it is on the disk when this returns."""
        size = len(msgspec.json.encode(finding))
        if size > MAX_RECORD_BYTES:
            self._unkept += 1
            return Unkept(f"expected at most {MAX_RECORD_BYTES:,} bytes, got {size:,}")

        def act(database: sqlite3.Connection) -> Verdict:
            with _transaction(database):
                seq = _count(database, "last") + 1
                self._reserve(seq)
                verdict = numbered(finding, self.device, seq)
                payload = msgspec.json.encode(verdict)
                database.execute("INSERT INTO record VALUES (?, ?)", (seq, payload))
                _set(database, "last", seq)
                _add(database, "unkept", self._unkept)
                self._make_room(database)
            self._unkept = 0
            return verdict

        kept = self._on_file(act)
        if isinstance(kept, Unkept):
            self._unkept += 1
        return kept

    def put_status(self, document: bytes) -> Unkept | None:
        """Keep the device's newest status document, for the sender to pass on."""

        def act(database: sqlite3.Connection) -> None:
            with _transaction(database):
                database.execute("REPLACE INTO latest VALUES (?, ?, 0)", (_STATUS, document))

        return self._on_file(act)

    # --- the sender's side

    def unsent(self, limit: int, after: int = 0) -> list[Row]:
        """The oldest records above number ``after``, at most ``limit``; none if it cannot say."""

        def act(database: sqlite3.Connection) -> list[Row]:
            query = "SELECT seq, payload FROM record WHERE seq > ? ORDER BY seq LIMIT ?"
            return [Row(*row) for row in database.execute(query, (after, limit))]

        rows = self._on_file(act)
        return [] if isinstance(rows, Unkept) else rows

    def sent(self, *seqs: int) -> Unkept | None:
        """The other side has these."""
        return self._remove(seqs, "sent")

    def refuse(self, seq: int, reason: str) -> Unkept | None:
        """Take out a record that can never be sent, and say why."""
        refused = self._remove((seq,), "refused")
        if refused is None:
            self._tell(f"{self.path.name}: record {seq} will not be sent: {reason}")
        return refused

    def unsent_status(self) -> bytes | None:
        """The newest status document, unless it was sent."""

        def act(database: sqlite3.Connection) -> bytes | None:
            query = "SELECT payload FROM latest WHERE name = ? AND NOT sent"
            found: tuple[bytes] | None = database.execute(query, (_STATUS,)).fetchone()
            return found[0] if found else None

        document = self._on_file(act)
        return None if isinstance(document, Unkept) else document

    def status_sent(self, document: bytes) -> Unkept | None:
        """The other side has this one, which may no longer be the newest."""

        def act(database: sqlite3.Connection) -> None:
            query = "UPDATE latest SET sent = 1 WHERE name = ? AND payload = ?"
            with _transaction(database):
                database.execute(query, (_STATUS, document))

        return self._on_file(act)

    # --- everybody's

    def counts(self) -> Counts:
        """What it has and has had; as last known if the file cannot be read now."""

        def act(database: sqlite3.Connection) -> Counts:
            return Counts(**dict(database.execute("SELECT name, value FROM count")))

        counts = self._on_file(act)
        if not isinstance(counts, Unkept):
            self._counts = counts
        return self._counts._replace(unkept=self._counts.unkept + self._unkept)

    @property
    def rows(self) -> int:
        """Records that wait to be sent."""
        return self.counts().rows

    @property
    def dropped(self) -> int:
        """Records that went unsent because the outbox was full."""
        return self.counts().dropped

    def close(self) -> None:
        """Let go of the file; the next call opens it again."""
        with self._thread:
            if self._database:
                self._database.close()
            self._database, self._file = None, None

    def __enter__(self) -> "Outbox":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- inside a transaction

    def _remove(self, seqs: Iterable[int], counted_as: str) -> Unkept | None:
        def act(database: sqlite3.Connection) -> None:
            with _transaction(database):
                for seq in seqs:
                    removed = database.execute("DELETE FROM record WHERE seq = ?", (seq,)).rowcount
                    _add(database, counted_as, removed)

        return self._on_file(act)

    def _make_room(self, database: sqlite3.Connection) -> None:
        max_rows, max_bytes = self._max
        while _count(database, "rows") > max_rows or _count(database, "bytes") > max_bytes:
            database.execute("DELETE FROM record WHERE seq = (SELECT min(seq) FROM record)")
            _add(database, "dropped", 1)

    def _reserve(self, seq: int) -> None:
        """Raises OSError if no number as high as ``seq`` may be given."""
        if seq > self._ceiling:
            ceiling = seq + _RESERVED - 1
            atomic.write_text(self._beside(".ceiling"), f"{ceiling}\n")
            self._ceiling = ceiling

    # --- the file

    def _on_file(self, act: Callable[[sqlite3.Connection], _Result]) -> _Result | Unkept:
        """``act`` on the open file, or on a new one if this is damaged."""
        with self._thread:
            try:
                with self._locked(fcntl.LOCK_SH):
                    tried = _inode(self.path)
                    try:
                        return act(self._connected())
                    except (_DamageError, sqlite3.DatabaseError) as error:
                        if not _is_damage(error):
                            raise
                        damage = " ".join(str(error).split())
                with self._locked(fcntl.LOCK_EX):
                    self.close()
                    if _inode(self.path) == tried:  # else another process has done it
                        self._set_aside(damage)
                    return act(self._connected())
            except (OSError, sqlite3.Error, _DamageError) as error:
                self.close()  # what was opened on a full disk stays read-only when that has room
                return Unkept(f"{self.path}: {error}")

    @contextlib.contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        """Raises OSError where another process keeps it longer than any should."""
        atomic.make_folder(self.path.parent)
        deadline = time.monotonic() + _BUSY_S
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(self._beside(".lock"), flags, 0o600)
        try:
            while True:
                try:
                    fcntl.flock(descriptor, how | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.001)
            yield
        finally:
            os.close(descriptor)

    def _connected(self) -> sqlite3.Connection:
        """The file that is there now, which another process may have put in place of ours."""
        if self._database is None or self._file != _inode(self.path):
            self.close()
            self._database = self._open()
            self._file = self._checked = _inode(self.path)
        return self._database

    def _open(self) -> sqlite3.Connection:
        self._ceiling = self._read_ceiling()
        if self._beside("-wal").exists() and not self.path.exists():
            raise _DamageError("its journal is there and it is not")
        database = sqlite3.connect(
            self.path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
        )
        try:
            if not _is_empty(database):  # somebody else's is not even touched
                _check(database, thoroughly=self._checked != _inode(self.path))
            database.execute("PRAGMA journal_mode = WAL")
            database.execute(f"PRAGMA synchronous = {self._synchronous}")
            database.execute(f"PRAGMA journal_size_limit = {_JOURNAL_BYTES}")
            with _transaction(database):
                if _is_empty(database):
                    self._create(database)
        except BaseException:
            database.close()
            raise
        return database

    def _create(self, database: sqlite3.Connection) -> None:
        """Make the tables; what is whole in a file that was set aside is taken over."""
        for statement in _TABLES:
            database.execute(statement)
        database.execute(f"PRAGMA application_id = {_APPLICATION}")
        database.execute(f"PRAGMA user_version = {SCHEMA}")
        rows, counts = _salvage(self._damaged, self.device)
        database.executemany("INSERT INTO record VALUES (?, ?)", rows)
        for name in _TAKEN_OVER:
            _add(database, name, counts.get(name, 0))
        _set(database, "last", max(self._ceiling, counts.get("last", 0), *(r.seq for r in rows)))
        if self._damaged.exists():
            _add(database, "damaged", 1)
            self._tell(f"{self.path}: {len(rows)} unsent records taken over into a new file")

    def _set_aside(self, damage: str) -> None:
        """Nothing may hold the file open, and nobody wait for it. Raises OSError as renaming."""
        wal, old_wal = self._beside("-wal"), Path(f"{self._damaged}-wal")
        if self.path.exists():
            # In this order, so that a crash in between leaves a journal alone: that is seen.
            old_wal.unlink(missing_ok=True)
            self.path.replace(self._damaged)
        if wal.exists():
            wal.replace(old_wal)
        self._beside("-shm").unlink(missing_ok=True)
        self._tell(f"{self.path}: {damage}; set aside as {self._damaged.name}")

    def _read_ceiling(self) -> int:
        try:
            return int(self._beside(".ceiling").read_bytes()[:20])
        except (FileNotFoundError, ValueError):
            return 0

    @property
    def _damaged(self) -> Path:
        return self._beside(".damaged")

    def _beside(self, ending: str) -> Path:
        return self.path.with_name(self.path.name + ending)


def _is_empty(database: sqlite3.Connection) -> bool:
    return not _value(database, "SELECT count(*) FROM sqlite_master")


def _check(database: sqlite3.Connection, *, thoroughly: bool) -> None:
    """Raises _DamageError if this is no outbox, a newer one, or not whole, which takes a while."""
    if _value(database, "PRAGMA application_id") != _APPLICATION:
        raise _DamageError("not an outbox")
    schema = _value(database, "PRAGMA user_version")
    if schema != SCHEMA:
        raise _DamageError(f"expected an outbox of schema {SCHEMA}, got {schema}")
    found = _value(database, "PRAGMA quick_check(1)") if thoroughly else "ok"
    if found != "ok":
        raise _DamageError(f"damaged: {found}")


def _is_damage(error: Exception) -> bool:
    """SQLITE_CORRUPT and SQLITE_NOTADB have no class of their own in Python, all others do."""
    return isinstance(error, _DamageError) or type(error) is sqlite3.DatabaseError


def _salvage(path: Path, device: str) -> tuple[list[Row], dict[str, int]]:
    """The records and counts that can still be read, from both ends up to what is damaged."""
    rows: dict[int, Row] = {}
    counts: dict[str, int] = {}
    if path.exists():
        with contextlib.closing(sqlite3.connect(path)) as database:
            with contextlib.suppress(sqlite3.Error):
                counts.update(database.execute("SELECT name, value FROM count"))
            for order in ("ASC", "DESC"):
                with contextlib.suppress(sqlite3.Error):
                    for row in database.execute(f"SELECT * FROM record ORDER BY seq {order}"):
                        rows[row[0]] = Row(*row)
    return [rows[seq] for seq in sorted(rows) if is_whole(rows[seq], device)], counts


def _inode(path: Path) -> Inode | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:  # some errors have ended it already
            database.execute("ROLLBACK")
        raise


def _value(database: sqlite3.Connection, query: str) -> object:
    (value,) = database.execute(query).fetchone()
    return value


def _count(database: sqlite3.Connection, name: str) -> int:
    found = database.execute("SELECT value FROM count WHERE name = ?", (name,)).fetchone()
    return int(found[0])


def _set(database: sqlite3.Connection, name: str, value: int) -> None:
    database.execute("UPDATE count SET value = ? WHERE name = ?", (value, name))


def _add(database: sqlite3.Connection, name: str, value: int) -> None:
    database.execute("UPDATE count SET value = value + ? WHERE name = ?", (value, name))
