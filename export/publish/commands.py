"""``python -m export publish | promote | rollback | refresh``: what devices are offered."""

import argparse
import contextlib
import datetime
from collections.abc import Callable
from pathlib import Path

from export.publish import channels
from export.publish.channels import Plan
from export.publish.options import (
    add_days,
    add_keys,
    add_repository,
    days,
    now,
    percent,
    ring,
    say_next,
    write_with_bar,
)
from export.publish.publication import preview, renew, sign_publication, why_renew
from export.publish.repository import Repository, locked
from runtime.errors import ExportError
from runtime.verbs.fleet import duration, look

Verb = Callable[[argparse.Namespace], int]


def parse(verb: str, words: list[str]) -> tuple[Verb, argparse.Namespace]:
    """The function of ``verb`` and its options; wrong usage ends the program with 2."""
    add, run, description, example = _VERBS[verb]
    parser = argparse.ArgumentParser(
        prog=f"python -m export {verb}", description=description, epilog=f"Example: {example}"
    )
    add(parser)
    return run, parser.parse_args(words)


def _add_offer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cohort",
        type=percent,
        default=100,
        metavar="PERCENT",
        help="offer it to this share of the devices, drawn anew for each bundle; raise it later by "
        "saying the same again with more; default 100",
    )
    add_repository(parser)
    add_keys(parser)
    add_days(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="only say what would change; needs no keys"
    )


def _add_publish(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="a bundle's zip")
    parser.add_argument("--channel", required=True, help="which devices, e.g. line1-canary")
    parser.add_argument(
        "--allow-unverified",
        action="store_true",
        help="publish a bundle whose adaptation no field labels confirm",
    )
    _add_offer(parser)


def _add_promote(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="source", required=True, metavar="CHANNEL")
    parser.add_argument("--to", dest="destination", required=True, metavar="CHANNEL")
    parser.add_argument(
        "--require-healthy",
        type=int,
        metavar="N",
        help="only if N devices have run that bundle and been healthy, and none speaks against it",
    )
    parser.add_argument(
        "--for",
        dest="duration",
        type=duration,
        default=datetime.timedelta(hours=24),
        metavar="TIME",
        help="for this long, e.g. 90m, 24h or 7d; default 24h",
    )
    parser.add_argument(
        "--fleet", metavar="DIR|URL", help="the devices' status: a folder, or mqtt(s)://host/topic"
    )
    parser.add_argument(
        "--devices", type=Path, metavar="DIR",
        help="folder of the devices' keys; default DIR/devices, needed for MQTT",
    )  # fmt: skip
    _add_offer(parser)


def _add_rollback(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--channel", required=True)
    parser.add_argument("--to", dest="version", required=True, metavar="VERSION")
    _add_offer(parser)


def _add_refresh(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--targets", action="store_true", help="renew the targets, too; needs the targets key"
    )
    add_repository(parser)
    add_keys(parser)
    add_days(parser)


def _publish(options: argparse.Namespace) -> int:
    return _carry_out(
        options,
        lambda repository, moment: channels.publish(
            repository,
            options.bundle,
            options.channel,
            options.cohort,
            moment,
            allow_unverified=options.allow_unverified,
        ),
    )


def _promote(options: argparse.Namespace) -> int:
    return _carry_out(options, lambda repository, moment: _promotion(options, repository, moment))


def _promotion(
    options: argparse.Namespace, repository: Repository, moment: datetime.datetime
) -> Plan:
    news: tuple[str, ...] = ()
    if options.require_healthy is not None:
        news = _proof(options, repository, moment)
    plan = channels.promote(repository, options.source, options.destination, options.cohort, moment)
    return plan._replace(news=(*news, *plan.news))


def _proof(
    options: argparse.Namespace, repository: Repository, moment: datetime.datetime
) -> tuple[str, ...]:
    """What speaks for the bundle. Raises ExportError unless it is enough."""
    from runtime.delivery.fleet_health import healthy_canaries

    if options.fleet is None:
        raise ExportError("--require-healthy: expected --fleet DIR, the devices' status documents")
    offer = channels.current(repository, options.source)
    verdict = healthy_canaries(
        look(options.fleet, options.devices, moment)[0].documents,
        offer.sha256,
        options.require_healthy,
        options.duration,
        moment,
    )
    if not verdict.ok:
        raise ExportError(
            f"{offer.name} {offer.version} not promoted: {'; '.join(verdict.reasons)}"
        )
    return verdict.reasons


def _roll_back(options: argparse.Namespace) -> int:
    return _carry_out(
        options,
        lambda repository, moment: channels.roll_back(
            repository, options.channel, options.version, options.cohort, moment
        ),
    )


def _carry_out(
    options: argparse.Namespace, decide: Callable[[Repository, datetime.datetime], Plan]
) -> int:
    """Decide and tell; sign and write unless it is a dry run."""
    from train import console

    moment = now()
    with contextlib.nullcontext() if options.dry_run else locked(options.repo):
        repository = Repository.read(options.repo)
        plan = decide(repository, moment)
        for line in plan.news:
            console.say(line)
        if plan.targets is None and not repository.unfinished:
            return 0
        if options.dry_run:
            for line in preview(repository, plan.targets, plan.files):
                console.say(f"would write {line}")
            return 0
        keys, valid = ring(options), days(options, repository)
        if plan.targets is None:
            console.say("devices do not see that yet; an earlier command was cut short")
            write_with_bar(options.repo, renew(repository, keys, valid, moment))
        else:
            publication = sign_publication(
                repository, plan.targets, plan.files, keys, valid, moment
            )
            write_with_bar(options.repo, publication.files)
            if publication.waits:
                console.say(
                    "signed; devices see it only once the online key has signed it, too. next: "
                    f"python -m export refresh --repo {options.repo}, where that key is"
                )
                return 0
    say_next(options.repo, moment)
    return 0


def _refresh(options: argparse.Namespace) -> int:
    from train import console

    moment = now()
    with locked(options.repo):
        repository = Repository.read(options.repo)
        valid = days(options, repository)
        why = "asked for" if options.targets else why_renew(repository, valid, moment)
        if why is None:
            until = min(repository.snapshot.signed.expires, repository.timestamp.signed.expires)
            console.say(f"nothing to renew: valid until {until:%Y-%m-%d}, more than half is left")
            return 0
        console.say(f"renewing for {valid} days: {why}")
        files = renew(repository, ring(options), valid, moment, targets=options.targets)
        write_with_bar(options.repo, files)
    say_next(options.repo, moment)
    return 0


_VERBS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Verb, str, str]] = {
    "publish": (
        _add_publish,
        _publish,
        "Offer a bundle to the devices of a channel: verify it, sign it with the targets key, and "
        "put it into force with the online key. Without the online key it is signed only; refresh "
        "puts it into force elsewhere. Whoever reads meanwhile gets the old state or the new one.",
        "python -m export publish build/solar/solar-1.2.0.zip --repo repo --channel line1-canary "
        "--cohort 10 --keys /media/stick --keys keys/online",
    ),
    "promote": (
        _add_promote,
        _promote,
        "Offer on one channel what another offers: the same bytes under the same digest.",
        "python -m export promote --repo repo --from line1-canary --to line1 --require-healthy 3 "
        "--for 24h --fleet fleet --keys /media/stick --keys keys/online",
    ),
    "rollback": (
        _add_rollback,
        _roll_back,
        "Offer a lower version again, by newer metadata that lets devices go back to it.",
        "python -m export rollback --repo repo --channel line1 --to 1.1.0 --keys /media/stick "
        "--keys keys/online",
    ),
    "refresh": (
        _add_refresh,
        _refresh,
        "Sign snapshot and timestamp again, with the online key alone, when less than half of "
        "their time is left or newer targets wait. Made to be run by cron every day.",
        "python -m export refresh --repo repo --keys keys/online --passphrase-file secret",
    ),
}
