"""What a channel is to offer next, and why not: publish, promote, roll back.

It reads a repository and a bundle, and decides. It knows no keys, and writes nothing.
"""

import datetime
from pathlib import Path
from typing import NamedTuple

from tuf.api.metadata import TargetFile, Targets

from export.publish.repository import File, Repository, next_targets, place, target_file
from runtime.bundle import Bundle
from runtime.delivery.channel import Offer, channel_path, decode, encode
from runtime.delivery.slot_state import version_key
from runtime.errors import ExportError, UpdateError

HIGHEST = "highest"
"""In the custom part of a channel's target: the highest version that the channel ever offered."""


class Plan(NamedTuple):
    """What would change. ``targets`` is None if nothing would."""

    news: tuple[str, ...]
    files: tuple[File, ...] = ()
    """Targets to write before the metadata that names them."""
    targets: Targets | None = None
    """The next version, unsigned."""


class _Release(NamedTuple):
    """A bundle as a target."""

    name: str
    version: str
    target: TargetFile

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({self.target.hashes['sha256'][:12]})"


def bundle_path(name: str, version: str) -> str:
    """The target path of a bundle."""
    return f"bundles/{name}-{version}.zip"


def publish(
    repository: Repository,
    archive: Path,
    channel: str,
    cohort: int,
    now: datetime.datetime,
    *,
    allow_unverified: bool = False,
) -> Plan:
    """Offer the bundle in ``archive`` to ``cohort`` percent of the devices of ``channel``.

    Raises ExportError if the channel has had a higher version or another model, if the version is
    taken by another bundle, or if the bundle is UNVERIFIED and that is not allowed; BundleError if
    it is damaged.
    """
    if not archive.is_file():
        raise ExportError(
            f"{archive}: expected a bundle's zip; `make export` writes NAME-VERSION.zip"
        )
    file = File.copy_of(archive, archive.name)  # first, so that what is verified is what is signed
    manifest = Bundle.open(archive).manifest
    if not manifest.adaptation.verified and not allow_unverified:
        raise ExportError(
            f"{archive}: {manifest.adaptation}; label more field images, or say --allow-unverified"
        )
    path = bundle_path(manifest.name, manifest.version)
    release = _Release(manifest.name, manifest.version, target_file(path, file))
    taken = repository.target(path)
    if taken is not None and taken.hashes != release.target.hashes:
        raise ExportError(
            f"{archive}: {manifest.name} {manifest.version} was published with other contents "
            f"({taken.hashes['sha256'][:12]}); raise version in the recipe's [export]"
        )
    _check_rising(repository, channel, release)
    return _offer(repository, channel, release, cohort, now, file=file._replace(path=path))


def promote(
    repository: Repository, source: str, destination: str, cohort: int, now: datetime.datetime
) -> Plan:
    """Offer on ``destination`` what ``source`` offers: the same bytes under the same digest.

    Raises ExportError if ``source`` offers nothing or a lower version than ``destination`` had.
    """
    release = _release(repository, current(repository, source))
    _check_rising(repository, destination, release)
    return _offer(repository, destination, release, cohort, now)


def roll_back(
    repository: Repository, channel: str, version: str, cohort: int, now: datetime.datetime
) -> Plan:
    """Offer a lower version again, and let devices take it.

    Raises ExportError if the repository has no such version or the channel had none above it.
    """
    offered = current(repository, channel)
    had = highest(repository, channel)
    if version_key(version) >= version_key(had):
        raise ExportError(
            f"channel {channel}: has offered up to {offered.name} {had}, and {version} is not "
            "lower; `python -m export publish` or `promote` offers it"
        )
    target = repository.target(bundle_path(offered.name, version))
    if target is None:
        raise ExportError(
            f"{repository.folder}: has no {offered.name} {version}; it has "
            f"{', '.join(versions(repository, offered.name))}"
        )
    release = _Release(offered.name, version, target)
    repository.check(target)
    return _offer(repository, channel, release, cohort, now, allow_lower=True)


def versions(repository: Repository, name: str) -> list[str]:
    """The versions of model ``name`` that the repository has, in ascending order."""
    prefix, suffix = bundle_path(name, ""), ".zip"
    prefix = prefix.removesuffix(suffix)
    found = [
        path[len(prefix) : -len(suffix)]
        for path in repository.targets.signed.targets
        if path.startswith(prefix) and path[len(prefix)].isdigit()
    ]
    return sorted(found, key=version_key)


def current(repository: Repository, channel: str) -> Offer:
    """What ``channel`` offers. Raises ExportError if there is no such channel."""
    offer = repository.offer(channel)
    if offer is None:
        known = ", ".join(repository.channels()) or "none yet"
        raise ExportError(f"channel {channel}: not in {repository.folder}; channels there: {known}")
    return offer


def _release(repository: Repository, offer: Offer) -> _Release:
    """Raises ExportError unless the bundle lies in the repository as it was signed."""
    target = repository.target(offer.path)
    if target is None or target.hashes["sha256"] != offer.sha256:
        raise ExportError(f"{repository.folder}: {offer.path} is not what the channel names")
    repository.check(target)
    return _Release(offer.name, offer.version, target)


def highest(repository: Repository, channel: str) -> str:
    """The highest version that ``channel`` has ever offered; empty, below all, if it is new."""
    target = repository.target(channel_path(channel))
    return "" if target is None else str(target.custom[HIGHEST])


def _check_rising(repository: Repository, channel: str, release: _Release) -> None:
    offer = repository.offer(channel)
    if offer is None:
        return
    if offer.name != release.name:
        raise ExportError(
            f"channel {channel}: carries {offer.name}, got {release.name}; a channel carries one "
            "model, take another channel"
        )
    had = highest(repository, channel)
    if version_key(release.version) < version_key(had):
        back = f"`python -m export rollback --channel {channel} --to {release.version}`"
        known = release.version in versions(repository, release.name)
        raise ExportError(
            f"channel {channel}: has offered {release.name} {had}, and devices take nothing lower, "
            f"got {release.version}; raise the version"
            + (f", or say {back} if going back is meant" if known else "")
        )


def _offer(
    repository: Repository,
    channel: str,
    release: _Release,
    cohort: int,
    now: datetime.datetime,
    *,
    file: File | None = None,
    allow_lower: bool = False,
) -> Plan:
    before = repository.offer(channel)
    offer = Offer(
        name=release.name,
        version=release.version,
        path=release.target.path,
        sha256=release.target.hashes["sha256"],
        size=release.target.length,
        percentage=cohort,
        allow_lower=allow_lower,
        published=now,
    )
    try:
        decode(encode(offer))
    except UpdateError as error:
        raise ExportError(
            f"{release}: devices would refuse its name or version: {error}"
        ) from error
    if before is not None and _same(before, offer):
        return Plan((f"channel {channel}: offers {_words(before)} already",))
    document = File.of(channel_path(channel), encode(offer))
    files = {document.path: document}
    if file is not None:
        files[file.path] = file
    targets = next_targets(repository, files, now)
    top = max(highest(repository, channel), release.version, key=version_key)
    targets.targets[document.path].unrecognized_fields["custom"] = {HIGHEST: top}
    was = "nothing" if before is None else _words(before)
    news = [f"channel {channel}: {was} -> {_words(offer)}"]
    if before is None and (others := repository.channels()):
        news.append(f"channel {channel}: is new; so far there are {', '.join(others)}")
    return Plan(
        tuple(news),
        tuple(
            one._replace(path=place(target_file(path, one))) for path, one in sorted(files.items())
        ),
        targets,
    )


def _same(one: Offer, other: Offer) -> bool:
    return (one.sha256, one.percentage, one.allow_lower) == (
        other.sha256,
        other.percentage,
        other.allow_lower,
    )


def _words(offer: Offer) -> str:
    share = "all devices" if offer.percentage == 100 else f"{offer.percentage} % of the devices"
    lower = ", allowed to be lower than what they had" if offer.allow_lower else ""
    return f"{offer.name} {offer.version} ({offer.sha256[:12]}) for {share}{lower}"
