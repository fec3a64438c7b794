"""``fieldfit benchmark``: the bundle's forms against each other on this machine."""

import argparse
import json
import sys
from pathlib import Path

from runtime.verbs.options import (
    add_engine_options,
    add_verb,
    cache,
    positive,
    request,
    seconds,
)


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command."""
    parser = add_verb(
        verbs,
        "benchmark",
        run,
        summary="time the bundle's forms against each other on this machine",
        description="Time the forms that one engine runs in turn on the golden samples. The engine "
        "is the one that would be chosen here, or --engine; what TensorRT has not built yet is "
        "built and kept. Speeds are relative to the first form: in CPU time on a CPU, in wall "
        "time on a GPU.",
        example="fieldfit benchmark build/solar/bundle --engine onnxruntime-cpu --batch 16",
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="default 1")
    parser.add_argument("--seconds", type=seconds, default=5.0, metavar="S", help="default 5")
    add_engine_options(parser, threads=1)


def run(options: argparse.Namespace) -> int:
    """Print the table; 0."""
    import numpy as np

    from runtime.benchmark import interleave
    from runtime.bundle import Bundle
    from runtime.choose import open_forms
    from runtime.engines.engine import PROVIDER_TITLES

    bundle = Bundle.open(options.bundle)
    images = np.resize(bundle.golden()["images"], (options.batch, *bundle.manifest.input.shape))
    engines = open_forms(bundle, request(options), cache=cache(options))
    forms = ", ".join(engine.form for engine in engines)
    first = engines[0]
    print(f"fieldfit: timing {forms} for {options.seconds:g} s", file=sys.stderr)
    timings = interleave(engines, images, seconds=options.seconds)
    for engine in engines:
        engine.close()
    if options.json:
        print(json.dumps([timing._asdict() for timing in timings]))
        return 0
    threads = f", threads {options.threads}" if first.provider == "cpu" else ""
    engine_words = f"{first.name} {first.version} {PROVIDER_TITLES[first.provider]}"
    print(f"{engine_words}, batch {options.batch}{threads}; ms of one call")
    print(f"{'form':10}{'p50':>9}{'p90':>9}{'p99':>9}{'max':>9}{'CPU':>9}{'speed':>9}")
    for timing in timings:
        columns = "".join(f"{value:9.2f}" for value in [*timing.wall_ms.values(), timing.cpu_ms])
        print(f"{timing.form:10}{columns}{timing.relative_speed:8.2f}x")
    return 0
