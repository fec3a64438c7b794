"""Who may sign what: the first root, and every later change of it, signed by people apart.

A change is one small file that travels: it holds the root of now and the proposed one, so that
whoever signs sees what changes. It counts once enough old and enough new root keys have signed
(https://theupdateframework.github.io/specification/latest/#key-management-and-migration).
"""

import copy
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from securesystemslib.signer import Key
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp

from export.publish.keys import KeyRole, Ring, fingerprint
from export.publish.publication import seal
from export.publish.repository import (
    ROOT_DAYS,
    TARGETS_DAYS,
    File,
    Repository,
    next_snapshot,
    next_targets,
    next_timestamp,
    ordered,
    sign,
)
from runtime import atomic
from runtime.errors import ExportError

ROOT_KEYS = 3
ROOT_THRESHOLD = 2

MAX_PROPOSAL_BYTES = 1024 * 1024

SIGNS: Mapping[KeyRole, tuple[str, ...]] = {
    "root": ("root",),
    "targets": ("targets",),
    "online": ("snapshot", "timestamp"),
}
"""What a key of each kind signs, in TUF's words."""


def found(
    keys: Mapping[KeyRole, Sequence[Key]], ring: Ring, days: int, now: datetime.datetime
) -> list[File]:
    """The first files of a repository without targets, signed with ``ring``."""
    root = Root(consistent_snapshot=True, expires=now + datetime.timedelta(days=ROOT_DAYS))
    for kind, roles in SIGNS.items():
        for role in roles:
            for key in keys[kind]:
                root.add_key(key, role)
    root.roles["root"].threshold = ROOT_THRESHOLD
    targets = Targets(expires=now + datetime.timedelta(days=TARGETS_DAYS))
    snapshot = next_snapshot(Snapshot(), targets, days, now)
    snapshot.version = 1
    timestamp = next_timestamp(Timestamp(), snapshot, days, now)
    timestamp.version = 1
    return ordered(
        (),
        sign(targets, root, ring),
        sign(snapshot, root, ring),
        sign(timestamp, root, ring),
        sign(root, root, ring),
    )


class Proposal(NamedTuple):
    """A change of the root, on its way to enough signatures."""

    current: Metadata[Root]
    proposed: Metadata[Root]

    @property
    def missing(self) -> list[str]:
        """A sentence for each threshold that is not reached; empty once it counts."""
        verdict = self.proposed.signed.get_root_verification_result(
            self.current.signed, self.proposed.signed_bytes, self.proposed.signatures
        )
        sides = {"old": verdict.first, "new": verdict.second}
        return [
            f"{side.missing} more of the {name} root keys must sign: "
            f"{' or '.join(sorted(map(fingerprint, side.unsigned)))}"
            for name, side in sides.items()
            if not side
        ]

    @property
    def changes(self) -> list[str]:
        """What signing it agrees to, in words."""
        old, new = self.current.signed, self.proposed.signed
        lines = [f"root version {old.version} -> {new.version}, valid until {new.expires:%Y-%m-%d}"]
        for role in sorted(new.roles):
            was, becomes = set(old.roles[role].keyids), set(new.roles[role].keyids)
            lines += [f"{role}: key {fingerprint(key)} is revoked" for key in sorted(was - becomes)]
            lines += [f"{role}: key {fingerprint(key)} is added" for key in sorted(becomes - was)]
            if old.roles[role].threshold != new.roles[role].threshold:
                lines.append(f"{role}: {new.roles[role].threshold} signatures needed")
        return lines

    @property
    def signers(self) -> list[str]:
        """Key ids of the root keys, old and new, whose signatures count."""
        roots = (self.current.signed, self.proposed.signed)
        return list(dict.fromkeys(keyid for root in roots for keyid in root.roles["root"].keyids))

    def sign(self, ring: Ring) -> list[str]:
        """Sign with all root keys at hand, old and new, and return their fingerprints.

        Raises ExportError if none of them is one that may sign here.
        """
        signers = ring.signers(self.signers)
        if not signers:
            raise ExportError(
                "none of the keys at hand is a root key here, expected one of "
                f"{', '.join(sorted(map(fingerprint, self.signers)))}; name its folder with --keys"
            )
        for signer in signers:
            self.proposed.sign(signer, append=True)
        return [fingerprint(signer.public_key) for signer in signers]


def propose(
    root: Metadata[Root],
    kind: KeyRole | None,
    revoked: Sequence[str],
    added: Sequence[Key],
    now: datetime.datetime,
) -> Proposal:
    """A root after ``root`` in which keys of one kind are replaced, or, for None, only renewed.

    ``revoked`` are beginnings of key ids. Raises ExportError if one names no key or several, or if
    there would be more or fewer keys than before.
    """
    following = copy.deepcopy(root.signed)
    following.version += 1
    following.expires = now + datetime.timedelta(days=ROOT_DAYS)
    for role in SIGNS[kind] if kind else ():
        for keyid in [_key_id(root.signed, role, start) for start in revoked]:
            following.revoke_key(keyid, role)
        for key in added:
            following.add_key(key, role)
        before, after = len(root.signed.roles[role].keyids), len(following.roles[role].keyids)
        if before != after:
            raise ExportError(
                f"{role}: expected {before} different key(s) afterwards, got {after}; add as many "
                "as are revoked"
            )
    return Proposal(root, Metadata(following))


def _key_id(root: Root, role: str, start: str) -> str:
    matches = [keyid for keyid in root.roles[role].keyids if start and keyid.startswith(start)]
    if len(matches) != 1:
        known = ", ".join(sorted(map(fingerprint, root.roles[role].keyids)))
        raise ExportError(
            f"{role}: expected the fingerprint of one of its keys, {known}; got {start!r}"
        )
    return matches[0]


def write_proposal(proposal: Proposal, path: Path) -> None:
    """Write it as one file."""
    content = {name: metadata.to_dict() for name, metadata in proposal._asdict().items()}
    atomic.write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def read_proposal(path: Path) -> Proposal:
    """Read it, and verify that its current root is one. Raises ExportError if it is no proposal."""
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(MAX_PROPOSAL_BYTES))
        current: Metadata[Root] = Metadata.from_dict(content["current"])
        proposed: Metadata[Root] = Metadata.from_dict(content["proposed"])
        current.verify_delegate(Root.type, current)
        if proposed.signed.version != current.signed.version + 1:
            raise ValueError("its versions do not follow each other")
    except FileNotFoundError:
        raise ExportError(
            f"{path}: no such file; `python -m export keys rotate` writes one"
        ) from None
    except (RepositoryError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(
            f"{path}: expected a proposal of `keys rotate` or `renew`: {error}"
        ) from error
    return Proposal(current, proposed)


def install(
    repository: Repository, proposal: Proposal, ring: Ring, days: int, now: datetime.datetime
) -> list[File]:
    """The files that put a proposal into force: the root, and all that new keys have to sign.

    Where the old key is at hand, too, it signs as well, so that no device is refused between.
    Raises ExportError if new keys are missing, or the repository has moved on. That enough root
    keys have signed is the caller's to check (``Proposal.missing``).
    """
    if proposal.current.to_dict() != repository.roots[-1].to_dict():
        raise ExportError(
            f"the proposal follows another root than {repository.folder} has (version "
            f"{repository.root.version}); make a new one from this repository"
        )
    old, new = repository.root, proposal.proposed.signed
    changed = {
        role for role in new.roles if set(new.roles[role].keyids) != set(old.roles[role].keyids)
    }
    signed: list[Metadata[Any]] = [proposal.proposed]
    targets = repository.targets.signed
    if "targets" in changed:
        targets = next_targets(repository, {}, now)
        signed.append(sign(targets, new, ring, also=old))
    if changed - {"root"}:
        signed += seal(repository, targets, ring, days, now, root=new)
    return ordered((), *signed)


class RoleLine(NamedTuple):
    """One role, as people check it."""

    role: str
    threshold: str
    keys: str
    expires: str
    left: str


def show(repository: Repository, now: datetime.datetime) -> list[RoleLine]:
    """Each role's keys, threshold and expiry."""
    newest = {
        "root": repository.root,
        "targets": repository.targets.signed,
        "snapshot": repository.snapshot.signed,
        "timestamp": repository.timestamp.signed,
    }
    lines = []
    for name, signed in newest.items():
        role = repository.root.roles[name]
        days = (signed.expires - now).days
        lines.append(
            RoleLine(
                role=f"{name} v{signed.version}",
                threshold=f"{role.threshold} of {len(role.keyids)}",
                keys=" ".join(sorted(map(fingerprint, role.keyids))),
                expires=f"{signed.expires:%Y-%m-%d}",
                left=f"{days} days" if days >= 0 else "EXPIRED",
            )
        )
    return lines
