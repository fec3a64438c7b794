"""``fieldfit collect``: pack the evidence of this device into one file."""

import argparse
import collections
import datetime
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from runtime.delivery.identity import device
from runtime.delivery.slots import default_folder
from runtime.errors import DataError
from runtime.evidence_pack import Contents, Record, what_fits, write_pack
from runtime.line.evidence_folder import FOLDER, mark_packed, read_image, read_records
from runtime.verbs.options import add_state_option, add_verb

_QUIET_S = 2.0


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command."""
    parser = add_verb(
        verbs,
        "collect",
        run,
        summary="pack the evidence of this device for the next training",
        description="Pack the images that fieldfit watch kept as evidence, with what was said of "
        "each, into one file. The next call packs only what came since; the images stay until "
        "newer ones need their room. May run while fieldfit watch does. Interrupted, it leaves "
        "nothing behind, and the same command begins again.",
        example="fieldfit collect evidence --out line3.zip",
    )
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        metavar="FOLDER",
        help="as fieldfit watch --evidence was told; default evidence in the state folder",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PACK.zip",
        help="the file to write; default evidence-DEVICE-TIME.zip in this folder",
    )
    parser.add_argument("--all", action="store_true", help="pack what was packed before as well")
    add_state_option(parser)


def run(options: argparse.Namespace) -> int:
    """1 if an image or a record was found damaged, else 0."""
    state: Path = options.state or default_folder()
    folder: Path = options.folder or state / FOLDER
    known, problems = read_records(folder) if folder.is_dir() else ([], [])
    waiting = [record for record, packed in known if options.all or not packed]
    if not waiting:
        return _nothing(folder, len(known), problems, options)
    chosen = what_fits(waiting)
    who, moment = device(state), datetime.datetime.now(datetime.timezone.utc)
    stem = f"evidence-{who.id[:8]}-{moment:%Y%m%dT%H%M%SZ}"
    out: Path = options.out or Path(f"{stem}.zip")
    if out.exists():
        raise DataError(f"{out}: is there already, and may be the only copy; name another --out")
    made = moment.isoformat(timespec="seconds")

    def read(record: Record) -> bytes | None:
        data = read_image(folder, record)
        if data is None and (folder / record.image).exists():
            problems.append(f"{record.image}: damaged since it was kept, left out")
        return data

    contents = Contents(device=who.id, device_name=who.name, made=made, records=tuple(chosen))
    written = write_pack(out, contents, read, _tracked)
    if not written:
        out.unlink()
        return _nothing(folder, len(known), problems, options)
    mark_packed(folder, written)
    _tell(out, written, len(waiting) - len(chosen), problems, options)
    return 1 if problems else 0


def _tracked(records: Iterable[Record]) -> Iterator[Record]:
    """A bar for what takes longer than a moment."""
    from tqdm import tqdm

    yield from tqdm(
        records, "packing", unit=" images", delay=_QUIET_S, disable=None, leave=False,
        file=sys.stderr,
    )  # fmt: skip


def _nothing(folder: Path, known: int, problems: list[str], options: argparse.Namespace) -> int:
    if options.json:
        print(json.dumps({"pack": None, "images": 0, "reasons": {}, "problems": problems}))
    elif known:
        print(f"nothing new: all {known} images were packed before; again with: --all")
    else:
        print(f"{folder}: no evidence yet; fieldfit watch keeps it")
    _say(problems)
    return 1 if problems else 0


def _tell(
    out: Path, written: tuple[Record, ...], left: int, problems: list[str],
    options: argparse.Namespace,
) -> None:  # fmt: skip
    counts = collections.Counter(record.why for record in written)
    _say(problems)
    if options.json:
        facts = {"pack": str(out), "images": len(written), "left": left, "reasons": dict(counts)}
        print(json.dumps({**facts, "problems": problems}))
        return
    for reason, count in counts.most_common():
        print(f"{reason:<11}{count:>6}")
    print(f"{out}: {len(written)} images, {out.stat().st_size / 1e6:.1f} MB")
    if left:
        print(f"{left} more did not fit: run the same command again, with another --out")
    print(
        f"next: copy it to the workstation, beside the recipe, and add under [data]: evidence = "
        f'["{out.name}"]; to label it, see docs/evidence.md'
    )


def _say(problems: list[str]) -> None:
    for problem in problems:
        print(f"fieldfit: {problem}", file=sys.stderr)
