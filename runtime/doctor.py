"""What a support engineer asks for first: this machine, its libraries, what opens, what stands out.

It reports; it decides nothing about engines. Every fact is read at the moment of asking, and
nothing is called fine that was not tried: libraries are imported and providers opened, each in a
process of its own. The JSON form of a report is ``msgspec.to_builtins``; ``text`` is for people.
"""

import importlib.metadata
import platform
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from runtime import machine, trials
from runtime.bundle import Bundle
from runtime.diagnosis import (
    Cache,
    Cuda,
    Gpu,
    Library,
    OnnxRuntime,
    Provider,
    Report,
    gib,
    what_to_look_at,
)
from runtime.machine import Machine
from runtime.trials import Outcome
from runtime.version import __version__

TENSORRT_MODULES = {
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
    "tensorrt-lean": "tensorrt_lean",
    "tensorrt-dispatch": "tensorrt_dispatch",
}
"""Flavours and their Python modules. Lean and dispatch runtimes run plans but build none."""

ONNXRUNTIME_PACKAGES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "onnxruntime-directml",
)
"""They all install the same folder ``onnxruntime``: of two, one overwrites half of the other."""


def examine() -> Report:
    """Look at this machine. Takes about a second, and ``trials.TIMEOUT_S`` for what hangs."""
    here = machine.describe()
    cuda = _cuda()
    tensorrt, onnxruntime = _libraries()
    cache = _cache()
    return Report(
        fieldfit=__version__,
        python=f"{platform.python_version()} ({sys.executable})",
        packages=_versions(("numpy", "pillow", "msgspec")),
        machine=here,
        cuda=cuda,
        tensorrt=tensorrt,
        onnxruntime=onnxruntime,
        cache=cache,
        look_at=what_to_look_at(here, cuda, tensorrt, onnxruntime, cache),
    )


def bundle_facts(bundle: Bundle) -> dict[str, object]:
    """What ``bundle`` says about itself."""
    manifest = bundle.manifest
    return {
        "bundle": f"{manifest.name} {manifest.version}",
        "adaptation": manifest.adaptation,
        "forms": [artifact.form for artifact in manifest.artifacts],
    }


def _cuda() -> Cuda:
    from runtime.engines.cudart import probe

    device = probe()
    if isinstance(device, str):
        return Cuda(reason=device)
    return Cuda(
        gpu=Gpu(
            compute_capability=device.capability,
            integrated=device.integrated,
            free_bytes=device.free_bytes,
            total_bytes=device.total_bytes,
            cuda_runtime=device.runtime_version,
            cuda_driver=device.driver_version,
        )
    )


def _cache() -> Cache:
    from runtime.engines.plan_cache import PlanCache

    cache = PlanCache.default()
    unwritable = cache.writable()  # this makes the folder
    return Cache(
        folder=str(cache.folder) if cache.folder else None,
        unwritable=unwritable,
        free_bytes=0 if unwritable or not cache.folder else shutil.disk_usage(cache.folder).free,
        plans=len(cache.entries()),
        plans_bytes=cache.size(),
    )


def _libraries() -> tuple[dict[str, Library], OnnxRuntime]:
    imports = {name: ("import", module) for name, module in TENSORRT_MODULES.items()}
    outcomes = trials.run_trials({"onnxruntime": ("providers",), **imports})
    listing = outcomes.pop("onnxruntime")
    listed: list[str] = listing.answer["providers"] if listing.answer else []
    opened = trials.run_trials({name: ("open", name) for name in listed})
    return (
        {name: _library(outcome) for name, outcome in outcomes.items()},
        OnnxRuntime(
            library=_library(listing),
            numpy=listing.answer["numpy"] if listing.answer else _version("numpy"),
            packages=_versions(ONNXRUNTIME_PACKAGES),
            providers={
                name: Provider(opens=outcome.answer is not None, reason=outcome.reason)
                for name, outcome in opened.items()
            },
            built_for_numpy_1="compiled using NumPy 1.x" in listing.said,
        ),
    )


def _library(outcome: Outcome) -> Library:
    if outcome.answer is None:
        return Library(reason=outcome.reason)
    return Library(version=outcome.answer["version"])


def _versions(names: Iterable[str]) -> dict[str, str]:
    """Those of these packages that are installed, and their versions."""
    versions = {name: _version(name) for name in names}
    return {name: version for name, version in versions.items() if version is not None}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


_COLUMNS = 100

Rows = Sequence[tuple[str, str | Sequence[str]]]
"""Names and values as they are shown; of several values each gets a line."""


def text(report: Report, bundle: Mapping[str, object] | None = None) -> str:
    """The report for people: a section each, and at the end what to look at.

    ``bundle`` holds what is known about a bundle, by name; values are shown as ``str`` does.
    """
    sections = _sections(report)
    if bundle:
        sections["bundle"] = [
            (name, [str(line) for line in value] if isinstance(value, list) else str(value))
            for name, value in bundle.items()
        ]
    sections["what to look at"] = [(look.what, look.reason) for look in report.look_at] or [
        ("", "nothing that stands out")
    ]
    width = max(len(name) for rows in sections.values() for name, _ in rows) + 2
    return "\n\n".join(_section(title, rows, width) for title, rows in sections.items())


def _section(title: str, rows: Rows, width: int) -> str:
    lines = [title]
    for name, value in rows:
        for index, line in enumerate([value] if isinstance(value, str) else value):
            first = f"  {'' if index else name:<{width}}"
            lines += textwrap.wrap(
                line,
                _COLUMNS,
                initial_indent=first,
                subsequent_indent=" " * len(first),
                break_long_words=False,
                break_on_hyphens=False,
            )
    return "\n".join(lines)


def _sections(report: Report) -> dict[str, Rows]:
    """Title and rows of each section, without bundle and warnings."""
    return {
        "machine": _machine_rows(report),
        "cuda": _cuda_rows(report.machine, report.cuda),
        "tensorrt": [
            (name, f"{library.version}, imports" if library.version else f"no: {library.reason}")
            for name, library in report.tensorrt.items()
        ],
        "onnxruntime": _onnxruntime_rows(report.onnxruntime),
        "cache of engines": _cache_rows(report.cache),
    }


def _machine_rows(report: Report) -> Rows:
    here = report.machine
    synchronised = "synchronised" if here.clock_synchronised else "not synchronised"
    rows: list[tuple[str, str | None]] = [
        ("fieldfit", report.fieldfit),
        ("python", report.python),
        ("packages", ", ".join(f"{name} {version}" for name, version in report.packages.items())),
        ("system", f"Linux {here.kernel} {here.architecture}"),
        ("distribution", here.distribution),
        ("model", here.model),
        ("jetson", _jetson(here)),
        ("container", here.container or "none seen"),
        ("cpu", f"{here.cpu}, {here.cores} cores for this process"),
        ("int8 on cpu", ", ".join(here.int8_instructions) or "no dot-product instructions"),
        ("memory", _memory(here)),
        *(_jetson_rows(here) if here.is_jetson else ()),
        ("clocks", ", ".join(_frequency(*item) for item in here.frequencies.items()) or None),
        ("governor", here.governor),
        (
            "temperature",
            ", ".join(f"{zone} {value:.0f} °C" for zone, value in here.temperatures.items())
            or None,
        ),
        ("clock", f"{here.time:%Y-%m-%d %H:%M:%S} UTC, {synchronised}"),
    ]
    return [(name, value if value is not None else "unknown") for name, value in rows]


def _memory(here: Machine) -> str | None:
    if here.memory is None:
        return None
    shared = ", shared with the GPU" if here.is_jetson else ""
    swap = f"{gib(here.memory.swap_free)} of {gib(here.memory.swap_total)} GiB"
    return f"{gib(here.memory.available)} of {gib(here.memory.total)} GiB available{shared}; " + (
        f"swap {swap} free" if here.memory.swap_total else "no swap"
    )


def _jetson(here: Machine) -> str:
    if here.l4t:
        return f"L4T {here.l4t}, JetPack {here.jetpack}"
    return "yes, with an L4T that cannot be read" if here.is_jetson else "no"


def _jetson_rows(here: Machine) -> list[tuple[str, str | None]]:
    counts = [f"{name} {count}" for name, count in here.overcurrent_events.items()]
    return [
        ("power mode", _power_mode(here)),
        ("slowed by heat", ", ".join(here.throttling) or "no"),
        ("over-current", f"{', '.join(counts)} since the start" if counts else None),
    ]


def _power_mode(here: Machine) -> str | None:
    mode = here.power_mode
    if mode is None:
        return None
    default = "" if mode.chosen else ", the default"
    return f"{mode.name}{default}; offered: {', '.join(mode.offered)}"


def _frequency(name: str, clock: machine.Frequency) -> str:
    if clock.pinned:
        return f"{name} {clock.current} MHz, pinned"
    return f"{name} {clock.current} MHz ({clock.lowest} to {clock.highest})"


def _cuda_rows(here: Machine, cuda: Cuda) -> Rows:
    rows = [("driver", here.nvidia_driver or "no NVIDIA kernel module is loaded")]
    if cuda.gpu is None:
        return [
            *rows,
            ("gpu", ", ".join(here.gpus) or "none named"),
            ("cuda", f"no: {cuda.reason}"),
        ]
    gpu = cuda.gpu
    kind = "integrated" if gpu.integrated else "discrete"
    return [
        *rows,
        ("gpu", ", ".join(here.gpus) or here.model or "not named"),
        ("device 0", f"compute capability {gpu.compute_capability}, {kind}"),
        ("gpu memory", f"{gib(gpu.free_bytes)} of {gib(gpu.total_bytes)} GiB free"),
        ("cuda", f"{gpu.cuda_runtime}; the driver knows {gpu.cuda_driver}"),
    ]


def _onnxruntime_rows(onnxruntime: OnnxRuntime) -> Rows:
    library = onnxruntime.library
    packages = [f"{name} {version}" for name, version in onnxruntime.packages.items()]
    return [
        ("onnxruntime", library.version or f"no: {library.reason}"),
        ("from package", ", ".join(packages) or "none that pip knows"),
        ("numpy", onnxruntime.numpy or "not installed"),
        *(
            (
                name,
                "opens, and computed a convolution"
                if provider.opens
                else f"listed, does not open: {provider.reason}",
            )
            for name, provider in onnxruntime.providers.items()
        ),
    ]


def _cache_rows(cache: Cache) -> Rows:
    rows = [
        ("folder", cache.folder or "none"),
        ("writable", f"no: {cache.unwritable}" if cache.unwritable else "yes, tried"),
        ("plans", f"{cache.plans}, {cache.plans_bytes / 2**20:.1f} MiB"),
    ]
    return rows if cache.unwritable else [*rows, ("disk", f"{gib(cache.free_bytes)} GiB free")]
