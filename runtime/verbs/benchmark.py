"""``fieldfit benchmark``: the bundle's forms against each other on this machine."""

import argparse
import json
import sys
from pathlib import Path

from runtime.verbs.options import add_verb, positive, seconds


def add(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to the command."""
    parser = add_verb(
        verbs,
        "benchmark",
        run,
        summary="time the bundle's forms against each other on this machine",
        description="Time the forms in turn on the golden samples; speeds are ratios of CPU time "
        "to fp32's.",
        example="fieldfit benchmark build/solar/bundle --threads 1 --batch 16",
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="default 1")
    parser.add_argument("--seconds", type=seconds, default=5.0, metavar="S", help="default 5")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="default 1")


def run(options: argparse.Namespace) -> int:
    """Print the table; 0."""
    import numpy as np

    from runtime.benchmark import interleave
    from runtime.bundle import Bundle
    from runtime.engines.onnxruntime_engine import OnnxRuntimeEngine

    bundle = Bundle.open(options.bundle)
    forms = [form for form in ("fp32", "int8-cpu") if bundle.manifest.artifact(form)]
    images = np.resize(bundle.golden()["images"], (options.batch, *bundle.manifest.input.shape))
    engines = [
        OnnxRuntimeEngine(bundle.model(form), form=form, threads=options.threads) for form in forms
    ]
    print(f"fieldfit: timing {', '.join(forms)} for {options.seconds:g} s", file=sys.stderr)
    timings = interleave(engines, images, seconds=options.seconds)
    if options.json:
        print(json.dumps([timing._asdict() for timing in timings]))
        return 0
    print(f"onnxruntime CPU, batch {options.batch}, threads {options.threads}; ms of one call")
    print(f"{'form':10}{'p50':>9}{'p90':>9}{'p99':>9}{'max':>9}{'CPU':>9}{'speed':>9}")
    for timing in timings:
        columns = "".join(f"{value:9.2f}" for value in [*timing.wall_ms.values(), timing.cpu_ms])
        print(f"{timing.form:10}{columns}{timing.relative_speed:8.2f}x")
    return 0
