"""The outcome of a negotiation as Prometheus metrics: a step down shows on a dashboard.

Text format 0.0.4 (Prometheus documentation, "Exposition formats"). It measures nothing itself.
"""

from collections.abc import Iterable, Mapping
from typing import Literal

from runtime.choose import Choice
from runtime.manifest import Manifest

Sample = tuple[Mapping[str, str], float]
Kind = Literal["gauge", "counter"]


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


def metric(
    name: str, kind: Literal["gauge", "counter"], meaning: str, samples: Iterable[Sample]
) -> str:
    """One metric ``fieldfit_NAME`` with its help, its type and its samples."""
    return heading(name, kind, meaning) + "".join(sample(name, *one) for one in samples)


def heading(name: str, kind: Literal["gauge", "counter", "histogram"], meaning: str) -> str:
    """The lines that come before the samples of a metric."""
    return f"# HELP fieldfit_{name} {meaning}\n# TYPE fieldfit_{name} {kind}\n"


def sample(name: str, labels: Mapping[str, str], value: float) -> str:
    """One line. Any text is a label's value: quotes, backslashes and line breaks are escaped."""
    inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    return f"fieldfit_{name}{f'{{{inside}}}' if inside else ''} {value:.10g}\n"


def family(name: str, kind: Kind, meaning: str, samples: Iterable[Sample]) -> str:
    """One metric, ``fieldfit_NAME``, with its samples; only its head where there are none."""
    lines = [f"fieldfit_{name}{_inside(labels)} {value:.15g}" for labels, value in samples]
    return _whole(name, kind, meaning, lines)


def histogram(name: str, meaning: str, buckets: Mapping[float, int], total: float) -> str:
    """``buckets`` count observations up to and including each bound, the last being infinite;
    ``total`` is the sum of all that was observed."""
    lines = [
        f"fieldfit_{name}_bucket{_inside({'le': _bound(bound)})} {count}"
        for bound, count in buckets.items()
    ]
    lines += [
        f"fieldfit_{name}_sum {total:.15g}",
        f"fieldfit_{name}_count {[*buckets.values()][-1]}",
    ]
    return _whole(name, "histogram", meaning, lines)


def _gauge(name: str, meaning: str, samples: Iterable[Sample]) -> str:
    return family(name, "gauge", meaning, samples)


def _whole(name: str, kind: str, meaning: str, lines: Iterable[str]) -> str:
    head = [f"# HELP fieldfit_{name} {meaning}", f"# TYPE fieldfit_{name} {kind}"]
    return "\n".join([*head, *lines]) + "\n"


def _inside(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items()) + "}"


def _bound(value: float) -> str:
    return "+Inf" if value == float("inf") else f"{value:g}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
