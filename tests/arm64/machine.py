"""An aarch64 machine to test on: this one if it is one, otherwise Debian under user emulation.

It knows how to make the machine and run commands on it, not what is tested there. Everything is
fetched by this machine's own tools with their own settings (apt's mirror and proxy, pip's index
and certificates); the emulated root has no network and no setting of either.
"""

import abc
import contextlib
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

SUITE = "bookworm"
PYTHON = (3, 11)
"""The Python of SUITE; what the wheels are fetched for."""
GLIBC = 36
"""Minor version of SUITE's glibc 2: the newest manylinux tag that runs there."""
DEBIAN_PACKAGES = ("python3-venv",)
HOST_PACKAGES = ("debootstrap", "qemu-user-static")
ENVIRONMENT = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
    "PIP_CONFIG_FILE": "/dev/null",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_ROOT_USER_ACTION": "ignore",
}
CPU = "cortex-a76"
"""What qemu is to be: with half precision and dot products, as the Cortex-A78AE of a Jetson Orin,
which qemu does not know."""
CPUINFO = """\
processor\t: {core}
BogoMIPS\t: 62.50
Features\t: fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1
"""
"""What Linux prints for one core of CPU; qemu 7 shows a program the file of this machine."""

_BINFMT = Path("/proc/sys/fs/binfmt_misc")
_BINFMT_RULE = Path("/usr/lib/binfmt.d/qemu-aarch64.conf")

Say = Callable[[str], None]


class ImpossibleError(Exception):
    """Why there is no aarch64 machine to be had here: one sentence with the way out."""


class FailedError(Exception):
    """A command that had to work did not."""


class Host(NamedTuple):
    """What decides whether this machine can be, or emulate, an aarch64 machine."""

    system: str
    machine: str
    root: bool
    missing: tuple[str, ...]
    """HOST_PACKAGES that are not installed."""
    namespaces: bool
    """A process may have mounts of its own."""
    binfmt: bool
    """The kernel starts aarch64 programs, also in a root without the emulator."""


class Machine(abc.ABC):
    """An aarch64 machine with a device environment in ``python``."""

    prefix: str
    """Its folder's name begins with this."""
    python: str
    """The interpreter of the device environment, as the machine sees it."""
    base_python: str
    """The interpreter that makes that environment."""

    def __init__(self, home: Path, exchange: Path, inside: str) -> None:
        self.home = home
        """The folder that the whole machine is in."""
        self.exchange = exchange
        """A folder of this machine that the other one sees as ``inside``."""
        self.inside = inside

    @abc.abstractmethod
    def command(self, arguments: Sequence[str]) -> list[str]:
        """What this machine runs so that the other one runs ``arguments``."""

    def environment(self) -> Mapping[str, str]:
        """Environment variables there: a clean few."""
        return ENVIRONMENT

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run ``arguments`` there; the exit code is the caller's to judge."""
        return subprocess.run(
            self.command(arguments),
            capture_output=True,
            text=True,
            env=self.environment(),
            check=False,
        )

    def must(self, *arguments: str) -> str:
        """Run ``arguments`` there and return stdout.

        Raises FailedError if the exit code is not 0.
        """
        return _finished(arguments, self.run(*arguments))

    def fieldfit(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run the device command there."""
        return self.run(self.python, "-m", "runtime", *arguments)


class Native(Machine):
    """This machine, with an environment of its own in ``folder``."""

    prefix = "device"

    @staticmethod
    def made_of() -> tuple[str, ...]:
        """What decides whether a made one can be used again."""
        return (sys.executable, sys.version)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, folder / "exchange", str(folder / "exchange"))
        self.python = str(folder / "device" / "bin" / "python")
        self.base_python = sys.executable

    def command(self, arguments: Sequence[str]) -> list[str]:
        """As it is."""
        return list(arguments)


class Emulated(Machine):
    """Debian's aarch64 in the folder ``root``, run by qemu-user through the kernel's binfmt.

    Mounts are in a namespace of their own and end with the command: nothing of this machine is
    ever mounted where a later removal of ``root`` could reach it. There is no network.
    """

    prefix = "root"
    python = "/opt/device/bin/python"
    base_python = "/usr/bin/python3"

    @staticmethod
    def made_of() -> tuple[str, ...]:
        """What decides whether a made one can be used again."""
        return (SUITE, *DEBIAN_PACKAGES)

    def __init__(self, root: Path) -> None:
        super().__init__(root, root / "srv" / "exchange", "/srv/exchange")

    def command(self, arguments: Sequence[str]) -> list[str]:
        """In a chroot with /proc and /sys of the emulated processor.

        Without them onnxruntime warns that it cannot detect the processor's instructions; with /sys
        and this machine's /proc/cpuinfo its detection crashes.
        """
        script = (
            'mount -t proc proc "$0/proc" && mount -t sysfs -o ro sysfs "$0/sys" && '
            'mount --bind "$0/srv/cpuinfo" "$0/proc/cpuinfo" && exec chroot "$0" "$@"'
        )
        cpuinfo = self.home / "srv" / "cpuinfo"
        cpuinfo.write_text("\n".join(CPUINFO.format(core=core) for core in range(_cores())))
        # No PID namespace: a program that crashes as process 1 would hang instead.
        return ["unshare", "--mount", "--net", "sh", "-c", script, str(self.home), *arguments]

    def environment(self) -> Mapping[str, str]:
        """The clean one, and the processor that qemu is to be."""
        return {**ENVIRONMENT, "QEMU_CPU": CPU}


def look_at_host() -> Host:
    """The facts of this machine."""
    rule = _BINFMT / "qemu-aarch64"
    packages = {"debootstrap": "debootstrap", "qemu-user-static": "qemu-aarch64-static"}
    return Host(
        system=platform.system(),
        machine=platform.machine(),
        root=os.geteuid() == 0,
        missing=tuple(name for name in HOST_PACKAGES if shutil.which(packages[name]) is None),
        namespaces=shutil.which("unshare") is not None
        and _quiet("unshare", "--mount", "--net", "true"),
        binfmt=rule.exists() and registered(rule.read_text()),
    )


def registered(rule: str) -> bool:
    """Whether a rule of binfmt_misc, as the kernel prints it, works in any root (flag F)."""
    lines = rule.splitlines()
    flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    return lines[:1] == ["enabled"] and "F" in flags


def impossible(host: Host) -> str:
    """Why ``host`` can neither be nor emulate aarch64, and the way out; empty if it can."""
    if host.system != "Linux":
        return f"expected Linux, got {host.system}; run this on Debian or an aarch64 board"
    if native(host):
        return ""
    if not host.root:
        return "emulation needs root for chroot and mounts; run `sudo make test-arm64`"
    if host.missing:
        return (
            f"{' and '.join(host.missing)} not found; on Debian: apt install "
            f"{' '.join(host.missing)}, or add --install"
        )
    if not host.namespaces:
        return (
            "this container may not mount or make namespaces; start it privileged, or run this "
            "on the machine itself"
        )
    if not host.binfmt:
        return (
            "the kernel does not start aarch64 programs: no enabled qemu-aarch64 rule with flag F "
            f"in {_BINFMT}; on Debian: systemctl restart systemd-binfmt, or add --install"
        )
    return ""


def native(host: Host) -> bool:
    """Whether ``host`` needs no emulation."""
    return host.system == "Linux" and host.machine == "aarch64"


def install_host_packages(host: Host, say: Say) -> None:
    """On Debian as root: install what is missing and tell the kernel of the emulator.

    Raises FailedError if apt-get does not work.
    """
    if native(host) or not host.root or shutil.which("apt-get") is None:
        return
    if host.missing:
        say(f"apt-get install {' '.join(host.missing)}")
        quiet = ["apt-get", "-qq", "-y"]
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        _run([*quiet, "update"], environment)
        _run([*quiet, "install", "--no-install-recommends", *host.missing], environment)
    if not host.binfmt and _BINFMT_RULE.exists():
        say("telling the kernel to start aarch64 programs with qemu-aarch64-static")
        if not (_BINFMT / "register").exists():
            _quiet("mount", "-t", "binfmt_misc", "none", str(_BINFMT))
        if (_BINFMT / "register").exists():
            (rule,) = (t for t in _BINFMT_RULE.read_text().splitlines() if t.startswith(":"))
            with contextlib.suppress(OSError):  # not allowed: what follows says so
                (_BINFMT / "register").write_text(rule)


def key(system: Sequence[str], lock: bytes) -> str:
    """What a made machine is found under: 12 hex digits of its ``system`` and its ``lock``."""
    digest = hashlib.sha256("\n".join(system).encode())
    digest.update(hashlib.sha256(lock).digest())
    return digest.hexdigest()[:12]


def make(cache: Path, lock: Path, host: Host, *, fresh: bool, say: Say) -> tuple[Machine, bool]:
    """The machine of ``lock`` below ``cache``, and whether it was made now.

    It is whole or not there: made beside its place and renamed. ``fresh`` makes it anew.

    Raises ImpossibleError if Debian's mirror does not answer, FailedError if a step does not work.
    """
    kind: type[Emulated] | type[Native] = Native if native(host) else Emulated
    place = cache / f"{kind.prefix}-{key(kind.made_of(), lock.read_bytes())}"
    if place.exists() and not fresh:
        return kind(place), False
    start = time.monotonic()
    partial = cache / f".{kind.prefix}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    machine = kind(partial)
    if isinstance(machine, Emulated):
        _debootstrap(partial, say)
    say("fetching the device's wheels for aarch64 and installing them there")
    _install_base(machine, lock)
    (partial / "seconds").write_text(f"{time.monotonic() - start:.0f}")
    for old in cache.glob(f"{kind.prefix}-*"):
        shutil.rmtree(old)
    partial.rename(place)
    return kind(place), True


def _debootstrap(root: Path, say: Say) -> None:
    environment = dict(os.environ)
    if proxy := apt_proxy(_run(["apt-config", "dump"]) if shutil.which("apt-config") else ""):
        environment.setdefault("http_proxy", proxy)
    mirror = apt_mirror(
        _run(["apt-get", "indextargets", "--format", "$(ORIGIN)|$(REPO_URI)|$(CODENAME)"])
        if shutil.which("apt-get")
        else ""
    )
    if mirror:
        _check_mirror(mirror, environment)
    say(f"making a root of Debian {SUITE} for aarch64; this takes a few minutes")
    _run(
        [
            *("unshare", "--mount", "debootstrap", "--arch=arm64", "--variant=minbase"),
            *(
                f"--include={','.join(DEBIAN_PACKAGES)}",
                SUITE,
                str(root),
                *([mirror] * bool(mirror)),
            ),
        ],
        environment,
    )


def apt_mirror(targets: str) -> str:
    """The Debian mirror that apt uses; empty for debootstrap's own default.

    ``targets`` has lines ``ORIGIN|URI|CODENAME`` of `apt-get indextargets`. Any Debian archive
    serves SUITE, whatever suite this machine runs; that of updates or security has not all. Of the
    kinds of address that apt knows, debootstrap knows http and https.
    """
    for line in targets.splitlines():
        origin, uri, codename = line.split("|")
        if origin == "Debian" and codename.isalpha() and uri.startswith("http"):
            return uri
    return ""


def apt_proxy(dump: str) -> str:
    """The HTTP proxy that apt uses, from the lines of `apt-config dump`; empty if there is none."""
    found = re.search(r'^Acquire::http::Proxy "([^"]+)";', dump, re.MULTILINE)
    return found[1] if found and found[1] != "DIRECT" else ""


def _check_mirror(mirror: str, environment: Mapping[str, str]) -> None:
    address = f"{mirror.rstrip('/')}/dists/{SUITE}/InRelease"
    handler = urllib.request.ProxyHandler(
        {"http": environment["http_proxy"]} if "http_proxy" in environment else None
    )
    try:
        urllib.request.build_opener(handler).open(address, timeout=30).close()
    except (urllib.error.URLError, TimeoutError) as error:
        raise ImpossibleError(
            f"apt's Debian mirror does not answer ({error}); the first run needs the network, "
            "later ones do not"
        ) from error


def _install_base(machine: Emulated | Native, lock: Path) -> None:
    """The device environment, as on a device: pip, pinned hashes, wheels only."""
    wheels = machine.exchange / "wheels"
    wheels.mkdir(parents=True)
    target: list[str] = []
    if isinstance(machine, Emulated):
        tags = [f"manylinux_2_{minor}_aarch64" for minor in range(17, GLIBC + 1)]
        target = ["--python-version", ".".join(map(str, PYTHON)), "--implementation", "cp"]
        target += [word for tag in ["manylinux2014_aarch64", *tags] for word in ("--platform", tag)]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    pinned = ["--require-hashes", "-r"]
    _run([*pip, "--only-binary", ":all:", *target, *pinned, str(lock), "-d", str(wheels)])
    shutil.copy(lock, wheels)
    environment = str(Path(machine.python).parent.parent)
    machine.must(machine.base_python, "-m", "venv", environment)
    offline = ["--no-index", "--find-links", f"{machine.inside}/wheels"]
    inside = f"{machine.inside}/wheels/{lock.name}"
    machine.must(machine.python, "-m", "pip", "install", "-q", *offline, *pinned, inside)
    shutil.rmtree(wheels)


def install_wheel(machine: Machine, wheel: Path) -> None:
    """Install fieldfit's ``wheel`` there in place of an earlier one, and check what it needs.

    Raises FailedError if a dependency is missing.
    """
    shutil.copy(wheel, machine.exchange)
    pip = [machine.python, "-m", "pip"]
    inside = f"{machine.inside}/{wheel.name}"
    machine.must(*pip, "install", "-q", "--no-index", "--no-deps", "--force-reinstall", inside)
    machine.must(*pip, "check")


def emulator() -> str:
    """Name and version of the emulator."""
    line = _run(["qemu-aarch64-static", "--version"]).splitlines()[0]
    return line.partition(" (")[0]


def _cores() -> int:
    """Processors that /sys tells of, whatever this process may use."""
    return os.cpu_count() or 1


def _quiet(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return _finished(command, done)


def _finished(command: Sequence[str], done: "subprocess.CompletedProcess[str]") -> str:
    if done.returncode != 0:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        tail = "\n  ".join(lines[-8:])
        raise FailedError(f"{shlex.join(command)[:300]}: exit code {done.returncode}\n  {tail}")
    return done.stdout
