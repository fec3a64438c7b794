"""The outcome of a negotiation as Prometheus metrics: a step down shows on a dashboard.

Text format 0.0.4 (Prometheus documentation, "Exposition formats"). It measures nothing itself.
"""

from collections.abc import Iterable, Mapping

from runtime.choose import Choice
from runtime.manifest import Manifest

Sample = tuple[Mapping[str, str], float]


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


def _gauge(name: str, meaning: str, samples: Iterable[Sample]) -> str:
    lines = [f"# HELP fieldfit_{name} {meaning}", f"# TYPE fieldfit_{name} gauge"]
    for labels, value in samples:
        inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        lines.append(f"fieldfit_{name}{{{inside}}} {value:g}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
