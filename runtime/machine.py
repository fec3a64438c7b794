"""Facts of this machine, read from ``/proc``, ``/sys`` and ``/etc`` at the moment of asking.

It knows no library but msgspec: neither CUDA nor TensorRT nor onnxruntime. Functions take the
``root`` of a file tree, so that a copy of another machine's files can be read the same way. What
cannot be read is None or empty, never guessed.
"""

import ctypes
import datetime
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

ROOT = Path("/")

INT8_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
"""What makes INT8 on a CPU much faster than FP32: x86 VNNI and AMX, ARM dot product."""

JETPACKS = {
    "R35.2": "5.1",
    "R35.3": "5.1.1",
    "R35.4": "5.1.2",
    "R35.5": "5.1.3",
    "R35.6": "5.1.4 or 5.1.5",
    "R36.3": "6.0",
    "R36.4": "6.1 or 6.2",
    "R36.5": "6.2.2",
    "R38.2": "7.0",
    "R38.4": "7.1",
    "R39.2": "7.2",
}
"""JetPack of each L4T (NVIDIA's JetPack archive); a dpkg entry says it more exactly."""

_RELEASE = re.compile(r"R(\d+) \(release\), REVISION: ([\d.]+)")
_POWER_MODE = re.compile(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>")
_DEFAULT_POWER_MODE = re.compile(r"<\s*PM_CONFIG\s+DEFAULT=(\d+)\s*>")
_JETPACK_PACKAGES = ("nvidia-jetpack", "nvidia-jetpack-runtime")
_TIME_ERROR = 5
"""adjtimex(2): the clock is not synchronised."""

_ARM_CORES = {
    ("0x41", "0xd03"): "Cortex-A53",
    ("0x41", "0xd07"): "Cortex-A57",
    ("0x41", "0xd08"): "Cortex-A72",
    ("0x41", "0xd0b"): "Cortex-A76",
    ("0x41", "0xd0c"): "Neoverse-N1",
    ("0x41", "0xd42"): "Cortex-A78AE",
    ("0x41", "0xd4f"): "Neoverse-V2",
    ("0x41", "0xd83"): "Neoverse-V3AE",
    ("0x4e", "0x004"): "Carmel",
}
"""Implementer and part number, as Linux's arch/arm64/include/asm/cputype.h names them."""


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes, from ``/proc/meminfo``."""

    total: int
    available: int
    swap_total: int
    swap_free: int


class PowerMode(msgspec.Struct, frozen=True, kw_only=True):
    """nvpmodel's mode on a Jetson."""

    name: str
    """E.g. ``15W`` or ``MAXN_SUPER``."""
    offered: tuple[str, ...]
    """All modes of this board, as ``/etc/nvpmodel.conf`` lists them."""
    chosen: bool
    """False if nobody has chosen one yet: then it is the one that the board starts with."""


class Frequency(msgspec.Struct, frozen=True, kw_only=True):
    """What a clock does and may do, in MHz."""

    current: int
    lowest: int
    highest: int

    @property
    def pinned(self) -> bool:
        """True if the clock may not move, as after ``jetson_clocks``."""
        return self.lowest == self.highest


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """This machine, apart from the libraries on it."""

    kernel: str
    architecture: str
    distribution: str | None
    model: str | None
    """The board or computer, as its firmware names it."""
    l4t: str | None
    """Release of NVIDIA's Linux for Jetson, e.g. ``R36.4.3``; None on any other machine."""
    jetpack: str | None
    container: str | None
    cpu: str
    cores: int
    """That this process may use."""
    int8_instructions: tuple[str, ...]
    memory: Memory | None
    power_mode: PowerMode | None
    frequencies: dict[str, Frequency]
    governor: str | None
    temperatures: dict[str, float]
    """Degrees Celsius by the kernel's name of the zone."""
    throttling: tuple[str, ...]
    """The kernel's names of what is slowed down by heat at this moment."""
    overcurrent_events: dict[str, int]
    """Since the start, on Orin: oc1 undervoltage, oc2 average, oc3 instantaneous over-current."""
    time: datetime.datetime
    clock_synchronised: bool
    nvidia_driver: str | None
    gpus: tuple[str, ...]
    """Names that the NVIDIA driver gives; it gives none on a Jetson."""

    @property
    def is_jetson(self) -> bool:
        """By L4T, or by the board's name: a container may see only that."""
        return self.l4t is not None or "Jetson" in (self.model or "")


def describe(root: Path = ROOT) -> Machine:
    """Read everything; takes a few milliseconds."""
    return Machine(
        kernel=_line(root / "proc/sys/kernel/osrelease") or platform.release(),
        architecture=platform.machine(),
        distribution=_distribution(root),
        model=_line(root / "proc/device-tree/model")
        or _line(root / "sys/class/dmi/id/product_name")
        or None,
        l4t=l4t_release(root),
        jetpack=jetpack(root),
        container=container(root),
        cpu=cpu_model(root),
        cores=len(os.sched_getaffinity(0)),
        int8_instructions=int8_instructions(root),
        memory=memory(root),
        power_mode=power_mode(root),
        frequencies=frequencies(root),
        governor=governor(root),
        temperatures=temperatures(root),
        throttling=throttling(root),
        overcurrent_events=overcurrent_events(root),
        time=datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0),
        clock_synchronised=clock_synchronised(),
        nvidia_driver=nvidia_driver(root),
        gpus=gpus(root),
    )


def platform_tag(root: Path = ROOT) -> str:
    """What an engine is bound to besides its GPU, e.g. ``linux-aarch64 L4T R36.4.3``.

    ``linux-x86_64`` where there is no L4T.
    """
    tag = f"{platform.system().lower()}-{platform.machine()}"
    release = l4t_release(root)
    return f"{tag} L4T {release}" if release else tag


def l4t_release(root: Path = ROOT) -> str | None:
    """The release of NVIDIA's Linux for Jetson, e.g. ``R36.4.3``; None on any other machine."""
    found = _RELEASE.search(_text(root / "etc/nv_tegra_release"))
    return f"R{found[1]}.{found[2]}" if found else None


def jetpack(root: Path = ROOT) -> str | None:
    """JetPack as dpkg knows it, else by the L4T release, else that it is unknown; None elsewhere.

    A board may be flashed with L4T alone: then no package says which JetPack it belongs to.
    """
    release = l4t_release(root)
    if release is None:
        return None
    installed = _installed_jetpack(root)
    if installed:
        return installed
    mapped = JETPACKS.get(".".join(release.split(".")[:2]))
    return f"{mapped}, by its L4T" if mapped else f"unknown JetPack for L4T {release}"


def cpu_model(root: Path = ROOT) -> str:
    """The CPU's name, e.g. ``AMD EPYC 9R14`` or ``Cortex-A78AE``; ``unknown`` if nothing says it.

    The kernel names no ARM core: implementer and part number do.
    """
    fields = _cpuinfo(root)
    core = _ARM_CORES.get((fields.get("CPU implementer", ""), fields.get("CPU part", "")))
    return core or fields.get("model name") or "unknown"


def int8_instructions(root: Path = ROOT) -> tuple[str, ...]:
    """Those of INT8_INSTRUCTIONS that this CPU has."""
    fields = _cpuinfo(root)
    present = set((fields.get("flags") or fields.get("Features") or "").split())
    return tuple(name for name in INT8_INSTRUCTIONS if name in present)


def memory(root: Path = ROOT) -> Memory | None:
    """Memory and swap. On a Jetson the GPU lives in the same memory."""
    kib = {}
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        kib[name] = int(value.split()[0])
    if "MemTotal" not in kib:
        return None
    return Memory(
        total=kib["MemTotal"] * 1024,
        available=kib.get("MemAvailable", 0) * 1024,
        swap_total=kib.get("SwapTotal", 0) * 1024,
        swap_free=kib.get("SwapFree", 0) * 1024,
    )


def power_mode(root: Path = ROOT) -> PowerMode | None:
    """What ``nvpmodel -q`` prints, from the two files it works on; no root needed.

    ``nvpmodel -m`` writes ``pmode:0002`` to its status file; before that the default of
    ``/etc/nvpmodel.conf`` holds. None where there is no nvpmodel.
    """
    configuration = _text(root / "etc/nvpmodel.conf")
    names = {int(number): name for number, name in _POWER_MODE.findall(configuration)}
    status = re.search(r"pmode:(\d+)", _text(root / "var/lib/nvpmodel/status"))
    number = status or _DEFAULT_POWER_MODE.search(configuration)
    if number is None:
        return None
    return PowerMode(
        name=names.get(int(number[1]), f"mode {int(number[1])}"),
        offered=tuple(names.values()),
        chosen=status is not None,
    )


def frequencies(root: Path = ROOT) -> dict[str, Frequency]:
    """Clocks of the first CPU core and of every GPU part, by name."""
    found = {}
    cpu = root / "sys/devices/system/cpu/cpu0/cpufreq"
    scales = [(cpu, "cpu0", ("scaling_cur_freq", "scaling_min_freq", "scaling_max_freq"), 1000)]
    scales += [
        (folder, folder.name, ("cur_freq", "min_freq", "max_freq"), 1_000_000)
        for folder in sorted((root / "sys/class/devfreq").glob("*gpu*"))
    ]
    for folder, name, files, per_mhz in scales:
        values = [_number(folder / file) for file in files]
        if None not in values:
            current, lowest, highest = (value // per_mhz for value in values if value is not None)
            found[name] = Frequency(current=current, lowest=lowest, highest=highest)
    return found


def governor(root: Path = ROOT) -> str | None:
    """The CPU frequency governor, or several, where cores differ."""
    files = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
    return ", ".join(sorted({_line(file) for file in files} - {""})) or None


def temperatures(root: Path = ROOT) -> dict[str, float]:
    """Degrees Celsius by zone, hottest first. A zone that is switched off cannot be read."""
    found = {}
    for zone in (root / "sys/class/thermal").glob("thermal_zone*"):
        value = _number(zone / "temp")
        if value is not None:
            found[_line(zone / "type") or zone.name] = value / 1000
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def throttling(root: Path = ROOT) -> tuple[str, ...]:
    """Cooling devices that act by slowing something down, and do so now (L4T's alerts)."""
    return tuple(
        sorted(
            name
            for device in (root / "sys/class/thermal").glob("cooling_device*")
            if (name := _line(device / "type")).endswith(("-throttle-alert", "hot-surface-alert"))
            and (_number(device / "cur_state") or 0) > 0
        )
    )


def overcurrent_events(root: Path = ROOT) -> dict[str, int]:
    """Counts of Orin's power alarms since the start, e.g. ``{"oc1": 0, "oc3": 2}``.

    Each one throttles CPU and GPU for a moment (Jetson Linux guide, Platform Power).
    """
    found = {}
    for file in sorted((root / "sys/class/hwmon").glob("hwmon*/oc*_event_cnt")):
        count = _number(file)
        if count is not None:
            found[file.name.removesuffix("_event_cnt")] = count
    return found


def container(root: Path = ROOT) -> str | None:
    """The kind of container that this process seems to run in, or None."""
    if (root / "run/.containerenv").exists():
        return "Podman"
    if "kubepods" in _text(root / "proc/1/cgroup"):
        return "Kubernetes"
    return "Docker" if (root / ".dockerenv").exists() else None


def clock_synchronised() -> bool:
    """Whether the kernel's clock is disciplined by NTP or the like (adjtimex(2), read only)."""
    timex = ctypes.create_string_buffer(512)  # larger than struct timex; zero asks, sets nothing
    state = ctypes.CDLL(None).adjtimex(timex)
    return bool(0 <= state < _TIME_ERROR)


def boot_id(root: Path = ROOT) -> str:
    """The kernel's id of this start of the machine; empty where it gives none."""
    try:
        text = (root / "proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return ""
    found = re.match(r"[0-9a-f-]{36}", text)
    return found[0] if found else ""


def nvidia_driver(root: Path = ROOT) -> str | None:
    """Version of the loaded NVIDIA kernel module, e.g. ``580.142``."""
    found = re.search(
        r"NVRM version:.*?\s(\d+\.[\d.]+)\s", _text(root / "proc/driver/nvidia/version")
    )
    return found[1] if found else None


def gpus(root: Path = ROOT) -> tuple[str, ...]:
    """Names of the GPUs that the NVIDIA driver runs."""
    files = sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
    return tuple(
        line.partition(":")[2].strip()
        for file in files
        for line in _text(file).splitlines()
        if line.startswith("Model:")
    )


def _distribution(root: Path) -> str | None:
    for line in _text(root / "etc/os-release").splitlines():
        name, _, value = line.partition("=")
        if name == "PRETTY_NAME":
            return value.strip("\"'")
    return None


def _installed_jetpack(root: Path) -> str | None:
    """Version of the JetPack package in dpkg's list, which is several megabytes: read by line."""
    name, installed = "", False
    for line in _lines(root / "var/lib/dpkg/status"):
        field, _, value = line.partition(": ")
        if field == "Package":
            name, installed = value.strip(), False
        elif field == "Status":
            installed = value.strip() == "install ok installed"
        elif field == "Version" and installed and name in _JETPACK_PACKAGES:
            return value.strip()
    return None


def _cpuinfo(root: Path) -> dict[str, str]:
    """The fields of the first core."""
    fields: dict[str, str] = {}
    for line in _text(root / "proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields


def _number(path: Path) -> int | None:
    text = _line(path)
    return int(text) if text.lstrip("-").isdecimal() else None


def _line(path: Path) -> str:
    """The first line; firmware ends its own with a NUL."""
    return _text(path).partition("\n")[0].strip("\0 \t")


def _text(path: Path) -> str:
    """The file's text, or nothing where it cannot be read: an absent file is a fact as well."""
    return "".join(_lines(path))


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from file
    except OSError:  # absent, forbidden, or a sensor that is switched off
        return
