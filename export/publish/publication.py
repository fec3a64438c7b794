"""Carry out what was decided: sign it, and write it so that devices never see half of it.

It knows neither bundles nor channels. All is signed before the first file is written: a missing
key or a wrong passphrase changes nothing.
"""

import datetime
from typing import Any, NamedTuple

from tuf.api.metadata import Metadata, Root, Targets

from export.publish.keys import Ring
from export.publish.repository import (
    METADATA,
    TIMESTAMP,
    File,
    Repository,
    metadata_path,
    next_snapshot,
    next_targets,
    next_timestamp,
    ordered,
    sign,
)

SOON = datetime.timedelta(days=30)
"""From when on the expiry of what the offline keys signed is told of."""


class Publication(NamedTuple):
    """What is to be written, in this order."""

    files: list[File]
    waits: bool = False
    """Whether devices see it only after the online key has signed, too."""


def online_key(repository: Repository, ring: Ring) -> bool:
    """Whether the key that signs snapshot and timestamp is at hand."""
    return any(ring.has(keyid) for keyid in repository.root.roles["timestamp"].keyids)


def sign_publication(
    repository: Repository,
    targets: Targets,
    files: tuple[File, ...],
    ring: Ring,
    days: int,
    now: datetime.datetime,
) -> Publication:
    """The next targets, and what puts them into force if the online key is at hand.

    Raises ExportError if a key is missing or cannot be unlocked.
    """
    signed = sign(targets, repository.root, ring)
    if not online_key(repository, ring):
        return Publication(ordered(files, signed), waits=True)
    return Publication(ordered(files, signed, *seal(repository, targets, ring, days, now)))


def seal(
    repository: Repository,
    targets: Targets,
    ring: Ring,
    days: int,
    now: datetime.datetime,
    *,
    root: Root | None = None,
) -> list[Metadata[Any]]:
    """A new snapshot and timestamp over ``targets``, for the repository's root or the next one.

    Raises ExportError if the online key is missing or cannot be unlocked.
    """
    judge, also = (repository.root, None) if root is None else (root, repository.root)
    snapshot = next_snapshot(repository.snapshot.signed, targets, days, now)
    timestamp = next_timestamp(repository.timestamp.signed, snapshot, days, now)
    return [
        sign(snapshot, judge, ring, also=also),
        sign(timestamp, judge, ring, also=also),
    ]


def renew(
    repository: Repository,
    ring: Ring,
    days: int,
    now: datetime.datetime,
    *,
    targets: bool = False,
) -> list[File]:
    """New snapshot and timestamp, and with ``targets`` also the targets with a new expiry."""
    if not targets:
        return ordered((), *seal(repository, repository.targets.signed, ring, days, now))
    following = next_targets(repository, {}, now)
    signed = sign(following, repository.root, ring)
    return ordered((), signed, *seal(repository, following, ring, days, now))


def why_renew(repository: Repository, days: int, now: datetime.datetime) -> str | None:
    """Why snapshot and timestamp should be signed again, or None while half their time is left.

    Each renewal costs every device two small downloads.
    """
    if repository.unfinished:
        return "newer targets wait for the online key"
    if days != repository.days:
        return f"signed for {repository.days} days so far"
    expires = min(repository.snapshot.signed.expires, repository.timestamp.signed.expires)
    left = expires - now
    if left < datetime.timedelta(days=days) / 2:
        return f"{left.days} days left" if left.days >= 0 else "expired"
    return None


def expiring(repository: Repository, now: datetime.datetime) -> list[str]:
    """A sentence for what an offline key should soon renew."""
    ways = {
        "root": (repository.root, "`python -m export keys renew`"),
        "targets": (repository.targets.signed, "`python -m export refresh --targets`"),
    }
    return [
        f"{role} expires on {signed.expires:%Y-%m-%d}; {way} renews it, with its offline key"
        for role, (signed, way) in ways.items()
        if signed.expires - now < SOON
    ]


def preview(repository: Repository, targets: Targets | None, files: tuple[File, ...]) -> list[str]:
    """The files that a publication would write, in order; ``targets`` is None if they stay."""
    return [
        *(f"{file.path} ({file.size:,} bytes)" for file in files),
        *([] if targets is None else [metadata_path(targets)]),
        f"{METADATA}/{repository.snapshot.signed.version + 1}.snapshot.json",
        TIMESTAMP,
    ]
