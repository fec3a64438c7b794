"""``python -m export keys VERB``: the key ceremony, and every later change of who may sign.

Root keys stay with people who are apart; what they sign travels as one small file.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from securesystemslib.signer import SSlibKey

from export.publish import ceremony
from export.publish.ceremony import Proposal, read_proposal, write_proposal
from export.publish.keys import (
    KeyRole,
    NewKey,
    Ring,
    fingerprint,
    generate,
    passphrases,
    read_public,
    save,
)
from export.publish.options import (
    add_days,
    add_keys,
    add_passphrase,
    add_repository,
    days,
    now,
    ring,
    say_next,
    write_with_bar,
)
from export.publish.repository import METADATA, ONLINE_DAYS, Repository, check_files, locked
from runtime.errors import ExportError

Verb = Callable[[argparse.Namespace], int]

KINDS: tuple[KeyRole, ...] = ("root", "targets", "online")


def parse(words: list[str]) -> tuple[Verb, argparse.Namespace]:
    """The function of the verb and its options; wrong usage ends the program with 2."""
    parser = argparse.ArgumentParser(
        prog="python -m export keys",
        description="Who may sign what devices believe: two of three root keys, held by three "
        "people, decide; a targets key, offline, signs what is published; an online key says that "
        "it is current.",
        epilog="Start with: python -m export keys init --repo repo --keys keys",
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for add in (_add_init, _add_new, _add_rotate, _add_renew, _add_sign, _add_install, _add_show):
        add(verbs)
    options = parser.parse_args(words)
    return options.verb, options


_Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def _verb(verbs: _Verbs, name: str, run: Verb, summary: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=summary, description=text)
    parser.set_defaults(verb=run)
    return parser


def _add_init(verbs: _Verbs) -> None:
    parser = _verb(
        verbs, "init", _init, "make all keys and an empty repository",
        "The key ceremony: make three root keys, a targets key and an online key, each encrypted "
        "with a passphrase of its own, and a repository that they sign. Do it on a machine "
        "without a network, then carry the keys to where they belong; it says where.",
    )  # fmt: skip
    add_repository(parser)
    parser.add_argument(
        "--keys", type=Path, required=True, metavar="DIR", help="where the new keys are put"
    )
    add_passphrase(parser)
    add_days(parser)


def _add_new(verbs: _Verbs) -> None:
    parser = _verb(
        verbs, "new", _new, "make one key on this machine",
        "Make one key pair. The .pub file is no secret: hand it to whoever runs `keys rotate`.",
    )  # fmt: skip
    parser.add_argument("--role", choices=KINDS, required=True)
    parser.add_argument("--keys", type=Path, required=True, metavar="DIR", help="where it is put")
    add_passphrase(parser)


def _add_rotate(verbs: _Verbs) -> None:
    parser = _verb(
        verbs, "rotate", _rotate, "propose to replace keys, e.g. stolen ones",
        "Propose a root in which keys are replaced, and sign it with the root keys at hand. It "
        "counts once two old and two new root keys have signed it (`keys sign`, on any machine); "
        "`keys install` puts it into force.",
    )  # fmt: skip
    parser.add_argument("--role", choices=KINDS, required=True, help="kind of the keys")
    parser.add_argument(
        "--revoke", action="append", default=[], metavar="FINGERPRINT",
        help="the key to replace; may be given several times; not needed where there is one",
    )  # fmt: skip
    parser.add_argument(
        "--add", type=Path, action="append", default=[], metavar="FILE.pub",
        help="public key that takes its place, made with `keys new`",
    )  # fmt: skip
    parser.add_argument(
        "--new-keys", type=Path, metavar="DIR", help="make the new keys here, and put them there"
    )
    _add_proposing(parser)


def _add_renew(verbs: _Verbs) -> None:
    parser = _verb(
        verbs, "renew", _renew, "propose the same root for another year",
        "Propose a root with the same keys and a new date of expiry, and sign it with the root "
        "keys at hand.",
    )  # fmt: skip
    _add_proposing(parser)


def _add_proposing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the proposal; default root-VERSION.proposal"
    )
    add_repository(parser)
    add_keys(parser)


def _add_sign(verbs: _Verbs) -> None:
    parser = _verb(
        verbs, "sign", _sign, "sign a proposal with the root keys at hand",
        "Show what a proposal changes, and add the signatures of the root keys at hand to its "
        "file. Needs no repository and no network.",
    )  # fmt: skip
    parser.add_argument("proposal", type=Path)
    add_keys(parser)


def _add_install(verbs: _Verbs) -> None:
    parser = _verb(
        verbs, "install", _install, "put a signed proposal into force",
        "Put a proposal into force that enough root keys have signed. What a new targets or "
        "online key has to sign is signed now; where the old key is at hand, too, no device is "
        "refused meanwhile.",
    )  # fmt: skip
    parser.add_argument("proposal", type=Path)
    add_repository(parser)
    add_keys(parser)
    add_days(parser)


def _add_show(verbs: _Verbs) -> None:
    parser = _verb(
        verbs, "show", _show, "roles, keys, thresholds and days left",
        "Show every role's keys, how many of them must sign, and when it expires.",
    )  # fmt: skip
    add_repository(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _init(options: argparse.Namespace) -> int:
    repo, folder = options.repo.resolve(), options.keys.resolve()
    if folder == repo or repo in folder.parents:
        raise ExportError(f"{options.keys}: lies in {options.repo}, which is copied to devices")
    check_files(options.repo)
    if (options.repo / METADATA / "1.root.json").exists():  # what is written last
        raise ExportError(
            f"{options.repo}: is a repository already; `keys rotate` changes its keys"
        )
    keys: dict[KeyRole, list[NewKey]] = {
        "root": [generate("root") for _ in range(ceremony.ROOT_KEYS)],
        "targets": [generate("targets")],
        "online": [generate("online")],
    }
    ask = passphrases(options.passphrase_file)
    held = Ring([], ask)
    made = [key for kind in KINDS for key in keys[kind]]
    for key in made:
        held.add(key)
    public = {kind: [key.public for key in keys[kind]] for kind in KINDS}
    files = ceremony.found(public, held, options.days or ONLINE_DAYS, now())
    save(made, options.keys, ask)
    options.repo.mkdir(parents=True, exist_ok=True)
    with locked(options.repo):
        write_with_bar(options.repo, files)
    print(_where_to(keys, options.keys, options.repo))
    return 0


def _where_to(keys: dict[KeyRole, list[NewKey]], folder: Path, repo: Path) -> str:
    roots = "\n".join(
        f"  {key.name}  stick of person {number}, in a safe of their own"
        for number, key in enumerate(keys["root"], 1)
    )
    return f"""keys made in {folder}, each a .pem (secret) and a .pub (no secret). Carry them to:
{roots}
      two of these three decide who may sign anything; needed once a year and after a theft
  {keys["targets"][0].name}  stick that is plugged in only to publish
      signs which bundles there are and who gets them; whoever has it and the online key can
      publish to every device
  {keys["online"][0].name}  workstation or server that runs `python -m export refresh` every day
      says what is current; whoever steals it can only hold devices back
Copy each pair, compare it there, then wipe {folder}. Passphrases go by another way.
Give every device {repo / METADATA}/1.root.json by hand: it is what they trust.
next: python -m export publish BUNDLE.zip --repo {repo} --channel NAME --keys STICK --keys ONLINE"""


def _new(options: argparse.Namespace) -> int:
    key = generate(options.role)
    save([key], options.keys, passphrases(options.passphrase_file))
    print(f"{options.keys / key.name}.pub  fingerprint {fingerprint(key.public)}")
    return 0


def _rotate(options: argparse.Namespace) -> int:
    repository = Repository.read(options.repo)
    kind: KeyRole = options.role
    holders = repository.root.roles[ceremony.SIGNS[kind][0]].keyids
    revoked: Sequence[str] = options.revoke or (holders if len(holders) == 1 else ())
    if not revoked:
        raise ExportError(
            f"{kind}: expected --revoke with one or more of "
            f"{', '.join(sorted(map(fingerprint, holders)))}"
        )
    added: list[SSlibKey] = [read_public(path) for path in options.add]
    made = [generate(kind) for _ in range(len(revoked) - len(added))]
    if made and options.new_keys is None:
        raise ExportError(
            f"{kind}: {len(made)} new key(s) needed; name them with --add FILE.pub, or say "
            "--new-keys DIR to make them here"
        )
    held = ring(options)
    for key in made:
        held.add(key)
    proposal = ceremony.propose(
        repository.roots[-1], kind, revoked, [*added, *(key.public for key in made)], now()
    )
    return _propose(options, proposal, held, made)


def _renew(options: argparse.Namespace) -> int:
    repository = Repository.read(options.repo)
    proposal = ceremony.propose(repository.roots[-1], None, (), (), now())
    return _propose(options, proposal, ring(options), [])


def _propose(
    options: argparse.Namespace, proposal: Proposal, held: Ring, made: list[NewKey]
) -> int:
    version = proposal.proposed.signed.version
    path = options.out or Path(f"root-{version}.proposal")
    if path.exists():
        raise ExportError(f"{path}: exists; install or remove it first, or say --out FILE")
    if any(held.has(keyid) for keyid in proposal.signers):
        proposal.sign(held)
    if made:
        save(made, options.new_keys, passphrases(options.passphrase_file))
    write_proposal(proposal, path)
    _tell(proposal, path)
    return 0


def _sign(options: argparse.Namespace) -> int:
    proposal = read_proposal(options.proposal)
    for line in proposal.changes:
        print(line)
    signed = proposal.sign(ring(options))
    write_proposal(proposal, options.proposal)
    print(f"signed with {', '.join(signed)}")
    _tell(proposal, options.proposal, changes=False)
    return 0


def _tell(proposal: Proposal, path: Path, *, changes: bool = True) -> None:
    for line in proposal.changes if changes else ():
        print(line)
    for line in proposal.missing:
        print(line)
    if proposal.missing:
        print(f"next: python -m export keys sign {path} --keys STICK, where such a key is")
    else:
        print(f"next: python -m export keys install {path} --repo DIR --keys DIR")


def _install(options: argparse.Namespace) -> int:
    proposal = read_proposal(options.proposal)
    moment = now()
    with locked(options.repo):
        if missing := proposal.missing:
            raise ExportError(f"{options.proposal}: {'; '.join(missing)}")
        repository = Repository.read(options.repo, following=proposal.proposed.signed)
        files = ceremony.install(
            repository, proposal, ring(options), days(options, repository), moment
        )
        for line in proposal.changes:
            print(line)
        for name in repository.channels():
            offer = repository.offer(name)
            if offer is not None:
                print(f"channel {name}: {offer.name} {offer.version} ({offer.sha256[:12]}): yours?")
        write_with_bar(options.repo, files)
    say_next(options.repo, moment)
    return 0


def _show(options: argparse.Namespace) -> int:
    lines = ceremony.show(Repository.read(options.repo), now())
    if options.json:
        print(json.dumps([line._asdict() for line in lines]))
        return 0
    rows = [("role", "signatures", "expires", "left", "keys")]
    rows += [(line.role, line.threshold, line.expires, line.left, line.keys) for line in lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    return 0
