"""What a support engineer asks for first: this machine, its libraries, what opens, the bundle.

It reports; it decides nothing. Every fact is read at the moment of asking.
"""

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

from runtime.bundle import Bundle
from runtime.version import __version__

LIBRARIES = ("numpy", "pillow", "msgspec", "onnxruntime", "onnxruntime-gpu", "tensorrt")
INT8_CPU_FLAGS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
"""Instructions that make INT8 on a CPU much faster than FP32: x86 VNNI and AMX, ARM dot product."""


def facts() -> dict[str, str]:
    """Names and values in the order they should be shown."""
    return {
        "fieldfit": __version__,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "distribution": _distribution(),
        "jetson": _first_line("/etc/nv_tegra_release") or "no",
        "python": f"{platform.python_version()} ({sys.executable})",
        "cpu": f"{_cpu_model()}, {len(os.sched_getaffinity(0))} cores for this process",
        "int8 on cpu": ", ".join(_cpu_flags())
        or "no dot-product instructions found: INT8 may be slower than FP32",
        "memory": _memory(),
        "cuda": _cuda(),
        **{name: _version(name) for name in LIBRARIES},
        "onnxruntime providers": _providers(),
    }


def bundle_facts(bundle: Bundle) -> dict[str, object]:
    """What ``bundle`` says about itself, under names that ``facts`` does not use."""
    manifest = bundle.manifest
    return {
        "bundle": f"{manifest.name} {manifest.version}",
        "adaptation": manifest.adaptation,
        "forms": [artifact.form for artifact in manifest.artifacts],
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _providers() -> str:
    """Those listed: onnxruntime lists some that do not open, and only the CPU's is tried here."""
    try:
        import onnxruntime
    except ImportError as error:
        return f"onnxruntime cannot be imported: {error}"
    return ", ".join(onnxruntime.get_available_providers()) + " (listed, not tried)"


def _cuda() -> str:
    from runtime.engines.cudart import probe

    return str(probe())


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "unknown")
    except OSError:
        return "unknown"


def _cpu_model() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _cpu_flags() -> list[str]:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith(("flags", "Features")):
            found = set(line.partition(":")[2].split())
            return [flag for flag in INT8_CPU_FLAGS if flag in found]
    return []


def _memory() -> str:
    values = {}
    for line in _lines("/proc/meminfo"):
        name, _, rest = line.partition(":")
        if name in ("MemTotal", "MemAvailable"):
            values[name] = int(rest.split()[0]) / 2**20
    if not values:
        return "unknown"
    return f"{values.get('MemAvailable', 0):.1f} of {values.get('MemTotal', 0):.1f} GiB available"


def _first_line(path: str) -> str:
    lines = _lines(path)
    return lines[0].strip("# \n") if lines else ""


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
