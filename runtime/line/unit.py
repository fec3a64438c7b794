"""The systemd unit that keeps the line running: what it starts, and all that it may not do.

Text in, text out; it writes and starts nothing. The words are those of systemd.service(5),
systemd.exec(5) and systemd.resource-control(5); `systemd-analyze security` judges the outcome.
Untested on a Jetson: there the device groups come from NVIDIA's drivers, see DEVICE_GROUPS.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

NAME = "fieldfit.service"

WATCHDOG_S = 10
"""A loop that ends no inference for so long is killed and started again."""

DEVICE_GROUPS = (
    "char-nvidia*", "char-nvhost*", "char-nvgpu*", "char-nvmap", "char-host1x*", "char-drm",
    "char-video4linux", "char-usb_device",
)  # fmt: skip
"""Of /proc/devices: NVIDIA's GPUs, on cards and on Jetsons, and cameras by V4L2 and USB."""

DEVICE_FILES = ("nvmap", "nvidia*", "nvhost*", "nvgpu/*/*", "nvsciipc", "host1x-fence", "video*")
"""Below /dev: drivers that share a group with everything else are let in file by file."""


class Line(NamedTuple):
    """What a unit is made for; paths are absolute."""

    command: tuple[str, ...]
    """What is started, argument by argument."""
    folder: Path
    """Where it is started."""
    writes: tuple[Path, ...]
    """Folders that it has to write."""
    reads: tuple[Path, ...]
    """Everything else that it needs: interpreter, bundle, sources."""
    network: bool
    """Whether it talks to cameras, a broker, a PLC or browsers."""
    low_port: bool = False
    """Whether it listens on one below 1024, such as Modbus' 502."""
    devices: tuple[Path, ...] = ()
    """Device files that are here and match DEVICE_FILES."""


def find_devices(folder: Path = Path("/dev")) -> tuple[Path, ...]:
    """The character devices below ``folder`` that an engine or a camera may need."""
    found = {file for pattern in DEVICE_FILES for file in folder.glob(pattern)}
    return tuple(sorted(file for file in found if file.is_char_device()))


def system_unit(line: Line) -> str:
    """The unit of a device: it runs as root, who owns the state, with none of root's rights.

    Mender, RAUC and Greengrass change that state as root, and nobody else may write it.
    """
    return _text(line, "multi-user.target", [*_SANDBOX, *_of_system(line)])


def user_unit(line: Line) -> str:
    """The unit of a user's own manager, which can withhold less (systemd.exec(5))."""
    return _text(line, "default.target", list(_SANDBOX))


_HEAD = """\
# Written by `fieldfit service install`; it is written anew by the same command.
[Unit]
Description=fieldfit: inspect what the line's cameras see
After=network.target time-sync.target
# A program that falls over at once, ten times in a row, is left lying for somebody to look at.
StartLimitIntervalSec=60
StartLimitBurst=10

[Service]
Type=notify
NotifyAccess=main
WorkingDirectory={folder}
ExecStart={command}
Environment=PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1 FIELDFIT_CACHE=%C/fieldfit
CacheDirectory=fieldfit
CacheDirectoryMode=0700
# Verdicts are in the outbox; what is worth a line of the journal comes on stderr.
StandardOutput=null
# The first start on a device may build engines.
TimeoutStartSec=30min
# Fed by the loop that finishes inferences: an engine that hangs, or fails on frame after frame,
# starves it.
WatchdogSec={watchdog}
Restart=always
RestartSec=5
# Wrong usage does not heal by itself.
RestartPreventExitStatus=2
# The loop ends its camera and sender processes itself, after the frame in hand.
KillMode=mixed
TimeoutStopSec=20
UMask=0077
"""

_SANDBOX = (
    "NoNewPrivileges=yes",
    "LockPersonality=yes",
    "RestrictNamespaces=yes",
    "RestrictRealtime=yes",
    "RestrictSUIDSGID=yes",
    "SystemCallArchitectures=native",
    "SystemCallFilter=@system-service",
    "SystemCallFilter=~@privileged",
    "# Whether the clock is synchronised is read with these; to set it takes a capability.",
    "SystemCallFilter=adjtimex clock_adjtime",
    "SystemCallErrorNumber=EPERM",
)
"""What a user's manager can hold back, too."""


def _of_system(line: Line) -> list[str]:
    families = "AF_UNIX AF_INET AF_INET6 AF_NETLINK" if line.network else "AF_UNIX"
    places = [*line.reads, *line.writes]
    at_home = any(path.is_relative_to(home) for path in places for home in _HOMES)
    in_tmp = any(path.is_relative_to(folder) for path in places for folder in _TEMPORARY)
    return [
        f"CapabilityBoundingSet={'CAP_NET_BIND_SERVICE' if line.low_port else ''}",
        "AmbientCapabilities=",
        f"ReadWritePaths={' '.join(_quoted(str(path)) for path in line.writes)}",
        "ProtectSystem=strict",
        f"ProtectHome={'read-only' if at_home else 'yes'}",
        "ProtectProc=invisible",
        "ProtectHostname=yes",
        "ProtectKernelLogs=yes",
        "ProtectKernelModules=yes",
        "ProtectKernelTunables=yes",
        "ProtectControlGroups=yes",
        "KeyringMode=private",
        "RemoveIPC=yes",
        *([] if in_tmp else ["PrivateTmp=yes"]),
        *([] if line.network else ["PrivateNetwork=yes", "IPAddressDeny=any"]),
        f"RestrictAddressFamilies={families}",
        "# GPU and cameras, and no other device.",
        "DevicePolicy=closed",
        *(f"DeviceAllow={group} rw" for group in DEVICE_GROUPS),
        *(f"DeviceAllow={_quoted(str(path))} rw" for path in line.devices),
    ]


_HOMES = (Path("/home"), Path("/root"), Path("/run/user"))
_TEMPORARY = (Path("/tmp"), Path("/var/tmp"))


def _text(line: Line, target: str, rules: Sequence[str]) -> str:
    command = " ".join(_quoted(word) for word in line.command)
    # WorkingDirectory= takes the rest of its line as it is, but for specifiers.
    folder = str(line.folder).replace("%", "%%")
    head = _HEAD.format(command=command, folder=folder, watchdog=WATCHDOG_S)
    return "\n".join([head + rules[0], *rules[1:], "", "[Install]", f"WantedBy={target}", ""])


def _quoted(word: str) -> str:
    """As systemd.service(5) reads it back: no variable, no specifier, one word."""
    plain = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    plain = plain.replace("\n", "\\n")
    return plain if plain and not set(plain) & set(" \t;'\"\\") else f'"{plain}"'
