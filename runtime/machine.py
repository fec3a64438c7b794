"""Facts of this machine, read from ``/proc``, ``/sys`` and ``/etc`` at the moment of asking.

It knows no library, neither ours nor CUDA nor TensorRT. Every function takes the ``root`` of a file
tree, so that a copy of another machine's files can be read the same way.
"""

import platform
import re
from pathlib import Path

_RELEASE = re.compile(r"R(\d+) \(release\), REVISION: ([\d.]+)")

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
"""Implementer and part number, as Arm's and NVIDIA's manuals and ``lscpu`` name them."""


def platform_tag(root: Path = Path("/")) -> str:
    """What an engine is bound to besides its GPU, e.g. ``linux-aarch64 L4T R36.4.3``.

    ``linux-x86_64`` where there is no L4T, NVIDIA's Linux for Jetson.
    """
    tag = f"{platform.system().lower()}-{platform.machine()}"
    release = l4t_release(root)
    return f"{tag} L4T {release}" if release else tag


def l4t_release(root: Path = Path("/")) -> str | None:
    """The release of NVIDIA's Linux for Jetson, e.g. ``R36.4.3``; None on any other machine."""
    found = _RELEASE.search(_text(root / "etc/nv_tegra_release"))
    return f"R{found[1]}.{found[2]}" if found else None


def cpu_model(root: Path = Path("/")) -> str:
    """The CPU's name, e.g. ``AMD EPYC 9R14`` or ``Cortex-A78AE``; ``unknown`` if nothing says it.

    The kernel names no ARM core: implementer and part number do.
    """
    fields: dict[str, str] = {}
    for line in _text(root / "proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    core = _ARM_CORES.get((fields.get("CPU implementer", ""), fields.get("CPU part", "")))
    return core or fields.get("model name") or "unknown"


def _text(path: Path) -> str:
    """The file's text, or nothing where it cannot be read: an absent file is a fact as well."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").replace("\0", "")
    except OSError:
        return ""
