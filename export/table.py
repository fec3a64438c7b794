"""The table at the end of an export: what each form costs and gains, and the verdict."""

from export.release import FormReport, Release
from runtime.manifest import Quality
from train import console

# fmt: off
COLUMNS = (
    "form", "MB", "accuracy", "worst recall", "agrees", "SQNR dB", "CPU speed", "TensorRT",
    "verdict",
)
# fmt: on


def title(release: Release) -> str:
    """What was judged, and on what."""
    return (
        f"{release.name} {release.version} on {release.reference.samples} held-out "
        f"{release.field} images"
    )


def rows(release: Release) -> list[list[str]]:
    """The cells of the table under COLUMNS: the checkpoint first, then each form."""
    checkpoint = ["checkpoint", "", *_quality(release.reference), "", "", "reference"]
    return [checkpoint, *(_row(report) for report in release.forms)]


def show(release: Release) -> None:
    """Print the table and, below it, whether the model is proven and the reason of each verdict."""
    console.table(title(release), COLUMNS, rows(release))
    console.say(f"adaptation: {release.adaptation}")
    if release.statistics is not None:
        console.say(f"reference: {release.statistics}")
    if release.abstention is not None:
        console.say("; ".join([release.abstention.reason, *map(str, release.abstention.tested)]))
    for report in release.forms:
        words = "ships" if report.released else "is not in the bundle"
        console.say(f"{report.form} {words}: {report.reason}")
    for sentence in remarks(release):
        console.say(sentence)


def remarks(release: Release) -> list[str]:
    """What the table's short words leave out: forms that are slow, engines not built or not run."""
    shipped = [report for report in release.forms if report.released]
    found = [
        f"{report.form} is slower than fp32 on this CPU ({report.relative_speed:.2f}x): "
        f"{release.machine} devices will not choose it by themselves"
        for report in shipped
        if _slow(report)
    ]
    found += [
        f"{report.form}: no engine was built: {report.engine.reason}"
        for report in shipped
        if report.engine is not None and not report.engine.built
    ]
    engines = [report.engine for report in release.forms if report.engine is not None]
    if engines and engines[0].gpu is None and engines[0].built:
        first = engines[0]
        found.append(
            f"engines were built by {first.flavour} {first.version} for {first.targets} and not "
            f"run: {first.gpu_reason}"
        )
    return found


def _row(report: FormReport) -> list[str]:
    quality = _quality(report.attempts[-1].quality) if report.attempts else ["-"] * 4
    speed = "" if report.relative_speed is None else f"{report.relative_speed:.2f}x"
    engine = "" if report.engine is None else report.engine.summary
    verdict = "refused"
    if report.released:
        verdict = "ships, slower" if _slow(report) else "ships"
    return [report.form, f"{report.bytes / 1e6:.1f}", *quality, speed, engine, verdict]


def _slow(report: FormReport) -> bool:
    return report.relative_speed is not None and report.relative_speed < 1


def _quality(quality: Quality) -> list[str]:
    sqnr = "" if quality.sqnr_db >= 200 else f"{quality.sqnr_db:.1f}"
    return [share(quality.accuracy), share(quality.worst_recall), share(quality.agreement), sqnr]


def share(value: float | None) -> str:
    """A share in per cent, or a dash where it could not be measured."""
    return "-" if value is None else f"{value:.1%}"
