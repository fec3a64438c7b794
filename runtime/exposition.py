"""Metrics in the words of Prometheus, and those of a negotiation: a step down shows on a dashboard.

Text format 0.0.4 (Prometheus documentation, "Exposition formats"). It measures nothing itself.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Literal

from runtime.choose import Choice
from runtime.manifest import Manifest

Sample = tuple[Mapping[str, str], float]
Samples = Iterable[Sample]
Spread = tuple[Mapping[str, str], Mapping[float, float], float, int]
"""Labels, values by quantile, sum and count."""

Kind = Literal["gauge", "counter", "histogram", "summary"]


def engine_metrics(manifest: Manifest, choice: Choice) -> str:
    """Which engine runs the bundle, how it did on the golden samples, and what was passed over."""
    engine, selftest = choice.engine, choice.selftest
    which = {"bundle": manifest.name, "bundle_version": manifest.version}
    running = {
        "engine": engine.name, "engine_version": engine.version,
        "provider": engine.provider, "form": engine.form,
    }  # fmt: skip
    passed_over = [
        (which | {"engine": step.engine, "form": step.form, "fault": step.fault or "failed"}, 1.0)
        for step in choice.steps
        if not step.accepted
    ]
    return "".join(
        [
            _gauge("engine_info", "The engine that runs the bundle.", [(which | running, 1.0)]),
            _gauge("engine_passed_over", "Candidates that were rejected, and why.", passed_over),
            _gauge(
                "golden_agreement",
                "Share of golden samples answered as at export.",
                [(which, selftest.agreement)],
            ),
            _gauge(
                "golden_sqnr_db",
                "Closeness of the golden logits to those at export, in dB.",
                [(which, selftest.sqnr_db)],
            ),
        ]
    )


def metric(name: str, kind: Literal["gauge", "counter"], meaning: str, samples: Samples) -> str:
    """One metric ``fieldfit_NAME`` with its help, its type and its samples."""
    return heading(name, kind, meaning) + "".join(sample(name, *one) for one in samples)


def histogram(name: str, meaning: str, buckets: Mapping[float, int], total: float) -> str:
    """``buckets`` count what was observed up to and including each bound, the last one infinite;
    ``total`` is the sum of it all."""
    lines = [
        sample(f"{name}_bucket", {"le": f"{bound:g}" if bound != math.inf else "+Inf"}, count)
        for bound, count in buckets.items()
    ]
    lines += [sample(f"{name}_sum", {}, total), sample(f"{name}_count", {}, buckets[math.inf])]
    return heading(name, "histogram", meaning) + "".join(lines)


def summary(name: str, meaning: str, spreads: Iterable[Spread]) -> str:
    """Quantiles of late, and sum and count of all, for each set of labels."""
    lines = [heading(name, "summary", meaning)]
    for labels, quantiles, total, count in spreads:
        lines += [
            sample(name, {**labels, "quantile": f"{quantile:g}"}, value)
            for quantile, value in quantiles.items()
        ]
        lines += [sample(f"{name}_sum", labels, total), sample(f"{name}_count", labels, count)]
    return "".join(lines)


def heading(name: str, kind: Kind, meaning: str) -> str:
    """The lines that come before the samples of a metric."""
    return f"# HELP fieldfit_{name} {meaning}\n# TYPE fieldfit_{name} {kind}\n"


def sample(name: str, labels: Mapping[str, str], value: float) -> str:
    """One line. Any text is a label's value: quotes, backslashes and line breaks are escaped."""
    inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    return f"fieldfit_{name}{f'{{{inside}}}' if inside else ''} {value:.15g}\n"


def _gauge(name: str, meaning: str, samples: Samples) -> str:
    return metric(name, "gauge", meaning, samples)


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
