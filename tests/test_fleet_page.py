"""docs/fleet.md: its commands run as they are written, from the first key to a rollback."""

import datetime
import hashlib
import importlib
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

from export.publish.options import now
from runtime.delivery.fleet import write_key, write_report
from runtime.delivery.status_document import BundleStatus, sign_status
from tests.signed_devices import healthy, moment, new_identity
from tests.test_publish import fetch
from tests.update_repository import tiny_bundle

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "fleet.md"
MARKED = re.compile(
    r"^<!-- run: [^\n]*test_fleet_page\.py[^\n]* -->\n```\w+\n(.*?)^```", re.M | re.S
)
MODULES = {"runtime": "runtime.__main__", "export": "export.__main__"}


def commands() -> list[str]:
    """Of the blocks that this file runs, each on one line; cron's without its times."""
    text = "".join(MARKED.findall(PAGE.read_text())).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return [re.sub(r"^(\S+ ){4}\* +", "", line) for line in lines]


class Place:
    """A folder in which there are the machines, the sticks and the people of the page."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for stick in ("stick", "root-a", "root-b", "targets"):
            (folder / "media" / stick).mkdir(parents=True)
        for version in ("1.1.0", "1.2.0"):
            path = folder / f"solar-{version}.zip"
            path.write_bytes(tiny_bundle(version, name="solar"))

    def words(self, line: str) -> list[str]:
        """A command of the page, here."""
        line = line.replace("/srv/repo", "repo").replace("/etc/", "etc/")
        line = line.replace("file:///media/", f"file://{self.folder}/media/")
        line = re.sub(r"(?<=\s)/media/", "media/", line)
        if "FINGERPRINT" in line:
            third = sorted((self.folder / "keys").glob("root-*.pub"))[2]
            line = line.replace("FINGERPRINT", third.stem.removeprefix("root-"))
        return shlex.split(line, comments=True)

    def run(self, words: list[str]) -> None:
        """What the page lets a machine do, and what it lets people do before and after."""
        if words[:2] == ["cp", "-r"]:
            shutil.copytree(words[2], Path(words[3]) / words[2])
            shutil.copy("repo/metadata/1.root.json", ".")
            return
        module, rest = ("runtime", words[1:]) if words[0] == "fieldfit" else (words[2], words[3:])
        if rest[0] == "promote":
            self.three_healthy_canaries()
        elif rest[0] == "refresh":
            shutil.copytree("keys/online", "etc/fieldfit")
            Path("etc/fieldfit/passphrase").write_text("a secret\n")
        assert importlib.import_module(MODULES[module]).main(rest) == 0, " ".join(words)
        if rest[:2] == ["keys", "init"]:
            self.hand_out_keys()
            before = "publish solar-1.1.0.zip --repo repo --channel line1 --keys keys"
            assert importlib.import_module("export.__main__").main(before.split()) == 0
        elif rest[:2] == ["keys", "new"]:
            (public,) = Path("media/person4").glob("*.pub")
            shutil.copy(public, "person4.pub")

    def hand_out_keys(self) -> None:
        roots = sorted(Path("keys").glob("root-*.pem"))
        for stick, pems in (
            ("root-a", roots[:1]),
            ("root-b", roots[1:2]),
            ("targets", Path("keys").glob("targets-*.pem")),
        ):
            for pem in pems:
                for file in (pem, pem.with_suffix(".pub")):
                    shutil.copy(file, Path("media") / stick)

    def three_healthy_canaries(self) -> None:
        (archive,) = Path("repo/targets/bundles").glob("*solar-1.2.0.zip")
        bundle = BundleStatus(
            name="solar", version="1.2.0", sha256=archive.name.partition(".")[0],
            since=now() - datetime.timedelta(days=2),
        )  # fmt: skip
        for number in range(3):
            device = new_identity(self.folder / f"device{number}")
            write_key(Path("fleet"), device.public)
            seen = moment(seen=now() - datetime.timedelta(minutes=1))
            status = healthy(device.device.id, moment=seen, bundle=bundle, update=None)
            write_report(Path("fleet"), device.device.id, sign_status(status, device))


def test_the_commands_lead_from_the_first_key_to_a_rollback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FIELDFIT_PASSPHRASE", "a secret")
    monkeypatch.setenv("FIELDFIT_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no test here cuts the power
    place = Place(tmp_path)
    written = [line for line in commands() if not line.startswith("pip ")]
    assert len(written) == 13
    for line in written:
        place.run(place.words(line))
    staged = [path.name for path in (tmp_path / "state" / "slots").iterdir()]
    assert staged == [hashlib.sha256(tiny_bundle("1.2.0", name="solar")).hexdigest()]
    offers = {
        channel: fetch(Path("repo"), tmp_path / channel, Path("1.root.json"), channel)[0].version
        for channel in ("line1-canary", "line1")
    }
    assert offers == {"line1-canary": "1.2.0", "line1": "1.1.0"}
