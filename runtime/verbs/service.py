"""``fieldfit service``: the systemd unit that keeps ``fieldfit watch`` running."""

import argparse
import json
import os
import sys
from pathlib import Path

from runtime import atomic
from runtime.delivery.floor import second_copy
from runtime.delivery.slots import default_folder
from runtime.line import unit
from runtime.verbs import watch
from runtime.verbs.options import add_verb

SYSTEM = Path("/etc/systemd/system")


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb, and its own three, to the command."""
    service = verbs.add_parser(
        "service",
        help="keep fieldfit watch running with systemd",
        description="Write the systemd unit that starts `fieldfit watch` with the arguments given "
        "here, watches over its loop, and lets it do nothing else. Nothing is started.",
        epilog="Start with: fieldfit service show watch:/srv/inbox --ok good",
    )
    actions = service.add_subparsers(metavar="VERB", required=True)
    for name, run, summary, example in (
        ("show", _show, "print the unit", "show /dev/video0 --ok good"),
        ("install", _install, "write the unit", "install /dev/video0 --ok good"),
    ):
        action = add_verb(
            actions,
            name,
            run,
            summary=summary,
            description=f"{summary.capitalize()} that runs `fieldfit watch` with these arguments, "
            "in the current folder. They are checked as watch would.",
            example=f"fieldfit service {example}",
        )
        _add_user_option(action)
        action.add_argument(
            "arguments", nargs=argparse.REMAINDER, metavar="WATCH-ARGUMENT",
            help="what comes after `fieldfit watch`; options of service come before it",
        )  # fmt: skip
    uninstall = add_verb(
        actions,
        "uninstall",
        _uninstall,
        summary="remove the unit",
        description="Remove the unit and what enables it. What runs goes on until it is stopped.",
        example="fieldfit service uninstall",
    )
    _add_user_option(uninstall)


def _add_user_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--user", action="store_true", help="for the systemd of this user, not of the device"
    )


def _show(options: argparse.Namespace) -> int:
    text = _text(options, _line(options))
    print(json.dumps({"unit": text}) if options.json else text, end="\n" if options.json else "")
    return 0


def _install(options: argparse.Namespace) -> int:
    line = _line(options)
    for folder in line.writes:  # systemd starts nothing that may write to what is not there
        atomic.make_folder(folder)
    path = _folder(options.user) / unit.NAME
    atomic.write_text(path, _text(options, line))
    systemctl = _systemctl(options.user)
    return _say(
        options, f"wrote {path}", path,
        f"{systemctl} daemon-reload && {systemctl} enable --now {unit.NAME}",
    )  # fmt: skip


def _uninstall(options: argparse.Namespace) -> int:
    folder = _folder(options.user)
    path = folder / unit.NAME
    if not path.exists():
        return _say(options, f"{path} is not there: nothing to remove", path, "")
    for link in folder.glob(f"*.wants/{unit.NAME}"):
        link.unlink()
    path.unlink()
    systemctl = _systemctl(options.user)
    return _say(
        options, f"removed {path}", path,
        f"{systemctl} stop {unit.NAME} && {systemctl} daemon-reload",
    )  # fmt: skip


def _say(options: argparse.Namespace, done: str, path: Path, following: str) -> int:
    if options.json:
        print(json.dumps({"path": str(path), "done": done, "next": following}))
    else:
        print(done)
        if following:
            print(f"next: {following}")
    return 0


def _line(options: argparse.Namespace) -> unit.Line:
    arguments = [word for word in options.arguments if word != "--"]
    asked = watch.parse(arguments)
    state = (asked.state or default_folder()).absolute()
    command = (sys.executable, "-m", "runtime", "watch", *arguments, "--state", str(state))
    return unit.Line(
        command=command,
        folder=Path.cwd(),
        writes=(state, second_copy(state).parent, *watch.written(asked)),
        reads=(Path(sys.executable), Path(__file__), Path.cwd(), *watch.read(asked)),
        network=watch.needs_network(asked),
        low_port=watch.needs_low_port(asked),
        devices=unit.find_devices(),
    )


def _text(options: argparse.Namespace, line: unit.Line) -> str:
    return unit.user_unit(line) if options.user else unit.system_unit(line)


def _folder(user: bool) -> Path:
    if not user:
        return SYSTEM
    config = os.environ.get("XDG_CONFIG_HOME")
    return (Path(config) if config else Path.home() / ".config") / "systemd" / "user"


def _systemctl(user: bool) -> str:
    return "systemctl --user" if user else "systemctl"
