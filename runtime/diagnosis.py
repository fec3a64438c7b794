"""What the doctor's findings are, and which of them deserve a look: each with its reason.

Pure: findings in, sentences out. It does not know how findings are made, nor how they are shown.
"""

import re
from collections.abc import Mapping

import msgspec

from runtime.machine import INT8_INSTRUCTIONS, Machine

GIB = 2**30
BUILD_NEEDS = 2 * GIB
PLANS_NEED = GIB
_YEAR = 2024
_FIRST_WITH_NUMPY_2 = (1, 19)
"""onnxruntime's release notes; a later one may have been built for NumPy 1 all the same, as wheels
for JetPack 6 are (microsoft/onnxruntime#27562), and then NumPy says so."""


class Library(msgspec.Struct, frozen=True, kw_only=True):
    """A library that was imported."""

    version: str | None = None
    reason: str = ""
    """Why it cannot be imported; empty if it can."""


class Provider(msgspec.Struct, frozen=True, kw_only=True):
    """A provider that onnxruntime lists."""

    opens: bool
    """True if it opened and computed a convolution itself."""
    reason: str = ""


class OnnxRuntime(msgspec.Struct, frozen=True, kw_only=True):
    """onnxruntime as it is imported, and the packages it may come from."""

    library: Library
    numpy: str | None
    packages: dict[str, str]
    providers: dict[str, Provider]
    built_for_numpy_1: bool
    """True if NumPy complained while it was imported."""


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """The first CUDA device."""

    compute_capability: str
    integrated: bool
    """True on a Jetson: its memory is the machine's."""
    free_bytes: int
    total_bytes: int
    cuda_runtime: str
    cuda_driver: str
    """The newest CUDA that the driver knows."""


class Cuda(msgspec.Struct, frozen=True, kw_only=True):
    """The GPU, or the reason why there is none."""

    gpu: Gpu | None = None
    reason: str = ""


class Cache(msgspec.Struct, frozen=True, kw_only=True):
    """Where built engines are kept."""

    folder: str | None
    unwritable: str
    """Why it cannot be written; empty if it can."""
    free_bytes: int
    """On the disk of the folder; 0 if it cannot be written."""
    plans: int
    plans_bytes: int


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """Something to look at, and why."""

    what: str
    reason: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All of it; field names are the keys of ``--json``."""

    fieldfit: str
    python: str
    packages: dict[str, str]
    machine: Machine
    cuda: Cuda
    tensorrt: dict[str, Library]
    onnxruntime: OnnxRuntime
    cache: Cache
    look_at: tuple[Look, ...]


def what_to_look_at(
    here: Machine,
    cuda: Cuda,
    tensorrt: Mapping[str, Library],
    onnxruntime: OnnxRuntime,
    cache: Cache,
) -> tuple[Look, ...]:
    """What a support engineer would ask about next, most fundamental first."""
    decisions = [
        _clock(here),
        _l4t_hidden(here),
        _throttled(here),
        _slow_mode(here),
        _no_int8(here),
        _no_gpu(here, cuda, tensorrt),
        _little_memory(here, cuda),
        _two_packages(onnxruntime),
        _numpy_abi(onnxruntime),
        _not_imported(onnxruntime),
        *(_not_opened(name, provider) for name, provider in onnxruntime.providers.items()),
        _cache(cache),
    ]
    return tuple(decision for decision in decisions if decision is not None)


def _clock(here: Machine) -> Look | None:
    if here.time.year >= _YEAR:
        return None
    return Look(
        what="clock",
        reason=f"it says {here.time:%Y-%m-%d}, which is long past: certificates and signatures "
        "will be refused; set the time, or give the board a battery or NTP",
    )


def _l4t_hidden(here: Machine) -> Look | None:
    if here.l4t is not None or not here.is_jetson:
        return None
    return Look(
        what="jetson",
        reason=f"{here.model}, but its L4T release cannot be read, so a built engine would not be "
        "replaced when L4T is: mount /etc/nv_tegra_release into the container",
    )


def _throttled(here: Machine) -> Look | None:
    if not here.throttling:
        return None
    hottest = next(iter(here.temperatures.items()), None)
    at = f" at {hottest[1]:.0f} °C ({hottest[0]})" if hottest else ""
    return Look(
        what="heat",
        reason=f"{', '.join(here.throttling)} is active{at}: clocks are held down and timings say "
        "nothing about a cool board; look at fan and enclosure",
    )


def _slow_mode(here: Machine) -> Look | None:
    mode = here.power_mode
    if mode is None or mode.name.startswith("MAXN"):
        return None
    fastest = [name for name in mode.offered if name.startswith("MAXN")]
    if not fastest:
        return None
    return Look(
        what="power mode",
        reason=f"{mode.name}, while this board also offers {fastest[0]}: engines are slower than "
        "they could be; nvpmodel -m sets it, if power supply and cooling allow",
    )


def _no_int8(here: Machine) -> Look | None:
    if here.int8_instructions:
        return None
    return Look(
        what="int8 on cpu",
        reason=f"{here.cpu} has none of {', '.join(INT8_INSTRUCTIONS)}: INT8 may be "
        "slower than FP32 there; fieldfit benchmark measures it",
    )


def _no_gpu(here: Machine, cuda: Cuda, tensorrt: Mapping[str, Library]) -> Look | None:
    if cuda.gpu is not None:
        return None
    installed = [name for name, library in tensorrt.items() if library.version]
    if here.is_jetson:
        why = f"this is a Jetson, but its GPU cannot be used: {cuda.reason}"
    elif installed:
        why = f"{', '.join(installed)} is installed, but no GPU can be used: {cuda.reason}"
    else:
        return None
    if here.container:
        why += f"; in {here.container}, was the NVIDIA runtime asked for?"
    return Look(what="gpu", reason=why)


def _little_memory(here: Machine, cuda: Cuda) -> Look | None:
    if cuda.gpu is None or not cuda.gpu.integrated or here.memory is None:
        return None
    if here.memory.available >= BUILD_NEEDS:
        return None
    return Look(
        what="memory",
        reason=f"{gib(here.memory.available)} GiB available to CPU and GPU together, expected "
        f"{gib(BUILD_NEEDS)} to build an engine: stop other programs or the desktop meanwhile, "
        "or add swap",
    )


def _two_packages(onnxruntime: OnnxRuntime) -> Look | None:
    names = list(onnxruntime.packages)
    if len(names) < 2:
        return None
    return Look(
        what="onnxruntime packages",
        reason=f"{' and '.join(names)} are installed into the same folder and have overwritten "
        f"parts of each other: pip uninstall {' '.join(names)}, then install the one you want",
    )


def _numpy_abi(onnxruntime: OnnxRuntime) -> Look | None:
    numpy, version = onnxruntime.numpy, onnxruntime.library.version
    if numpy is None or _numbers(numpy) < (2,):
        return None
    if not onnxruntime.built_for_numpy_1 and (
        version is None or _numbers(version) >= _FIRST_WITH_NUMPY_2
    ):
        return None
    return Look(
        what="numpy",
        reason=f"onnxruntime {version or ''} was built for NumPy 1 and meets {numpy}: it may crash "
        "or not import; pip install 'numpy<2'".replace("  ", " "),
    )


def _not_imported(onnxruntime: OnnxRuntime) -> Look | None:
    if onnxruntime.library.version:
        return None
    return Look(
        what="onnxruntime",
        reason=f"it cannot be imported, so there is no CPU engine: {onnxruntime.library.reason}",
    )


def _not_opened(name: str, provider: Provider) -> Look | None:
    # Azure's provider is in every CPU package; it sends models to a service and runs none here.
    if provider.opens or name == "AzureExecutionProvider":
        return None
    return Look(
        what=name,
        reason=f"onnxruntime lists it, but it does not open: {provider.reason}",
    )


def _cache(cache: Cache) -> Look | None:
    if cache.unwritable:
        why = f"engines are built again at every start: {cache.unwritable}"
    elif cache.free_bytes < PLANS_NEED:
        why = (
            f"{gib(cache.free_bytes)} GiB left on the disk of {cache.folder}, expected "
            f"{gib(PLANS_NEED)}: plans may not be kept"
        )
    else:
        return None
    return Look(what="cache of engines", reason=why)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def gib(size: int) -> str:
    """Bytes in GiB, with one decimal."""
    return f"{size / GIB:.1f}"
