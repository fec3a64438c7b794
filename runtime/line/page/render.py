"""The status page as HTML: it works without a script, and a script only brings the next one.

All that is shown is made here, once a second; ``page.js`` puts the differences into the page that
is open. Verdicts and levels are words and shapes, never colour alone. It decides nothing: what is
wrong comes from ``alarms``.
"""

import datetime
from collections.abc import Iterable, Sequence
from typing import get_args

from runtime.delivery.fleet_health import Level, span
from runtime.line.page.alarms import Standing
from runtime.line.page.markup import Child, Element, el, html
from runtime.line.page.snapshot import Absent, Disk, Drift, Heat, Outbox, Snapshot
from runtime.line.page.tally import MINUTES, STRIP, Minute
from runtime.line.page.thumbnails import RecentFrame
from runtime.line.verdict import Word
from runtime.version import __version__

WORDS: tuple[Word, ...] = get_args(Word)
UNKNOWN = "–"

_STAGES = {
    "wait": "waits to be looked at",
    "preprocess": "decode and resize",
    "infer": "the model",
    "look": "health checks",
    "record": "kept on disk",
    "total": "from frame to verdict",
}

_LEAST_SCALE = 0.02
"""The chart's axis ends here at least: one defect an hour is no mountain."""


def page(published: Snapshot | Absent, standing: Standing, age_s: float | None) -> str:
    """The whole document, HTML 5 in UTF-8."""
    title = _title(published, standing)
    main = live(published, standing, age_s)
    return (
        _PAGE.replace("{title}", html(el("title", None, title)))
        .replace("{version}", __version__)
        .replace("{main}", main)
    )


def live(published: Snapshot | Absent, standing: Standing, age_s: float | None) -> str:
    """What changes: the document's ``main``."""
    shown: list[Child] = [_head(published, age_s), _banner(standing)]
    if isinstance(published, Snapshot):
        shown.append(_body(published, standing))
    attributes = {
        "id": "line",
        "class": "current" if standing.current else "stale",
        "data-title": _title(published, standing),
        "data-version": __version__,
    }
    return html(el("main", attributes, *shown))


def _title(published: Snapshot | Absent, standing: Standing) -> str:
    who = published.device if isinstance(published, Snapshot) else "fieldfit"
    return f"{standing.word} – {who}"


def _head(published: Snapshot | Absent, age_s: float | None) -> Element:
    if isinstance(published, Absent):
        return el("header", {"class": "head"}, el("h1", None, "fieldfit"))
    moment = published.time.astimezone()
    facts = [published.machine, f"fieldfit {published.fieldfit}", f"up {_up(published)}"]
    return el(
        "header", {"class": "head"},
        el("h1", None, published.device),
        el("p", {"class": "soft"}, " · ".join(filter(None, facts))),
        el(
            "p", {"class": "asof"}, "As of ",
            el("time", {"datetime": moment.isoformat(timespec="seconds")},
               f"{moment:%H:%M:%S}"),
            el("span", {"class": "soft"}, f" {moment:%Z}, {_age(age_s)}"),
        ),
    )  # fmt: skip


def _banner(standing: Standing) -> Element:
    alarms = [
        el("li", {"class": alarm.level}, _icon(alarm.level), el("span", None, alarm.sentence))
        for alarm in standing.alarms
    ]
    return el(
        "section", {"class": f"banner {standing.level}", "role": "status", "aria-label": "State"},
        el(
            "div", {"class": "state"},
            el("p", {"class": "word"}, _icon(standing.level), el("strong", None, standing.word)),
            el("p", {"class": "sentence"}, standing.sentence),
        ),
        el("ul", {"class": "alarms"}, *alarms) if alarms else None,
    )  # fmt: skip


def _body(snapshot: Snapshot, standing: Standing) -> Element:
    return el(
        "div", {"class": "body"},
        _verdicts(snapshot, standing),
        el(
            "div", {"class": "pair"},
            _frames("notable", "Latest that were not OK", snapshot.notable,
                    "Every frame was OK so far."),
            _frames("recent", "Latest frames", snapshot.recent, "No frame has been judged yet."),
        ),
        el(
            "div", {"class": "pair"},
            el("div", {"class": "stack"}, _cameras(snapshot), _speed(snapshot), _health(snapshot),
               _drift(snapshot.drift, snapshot.drift_fill)),
            el("div", {"class": "stack"}, _engine(snapshot), _machine(snapshot),
               _results(snapshot)),
        ),
    )  # fmt: skip


# --- verdicts


def _verdicts(snapshot: Snapshot, standing: Standing) -> Element:
    return _section(
        "verdicts", "Verdicts",
        el(
            "div", {"class": "now"},
            _newest(snapshot, standing),
            el("div", {"class": "course"}, _strip(snapshot), _counts(snapshot), _hour(snapshot)),
        ),
    )  # fmt: skip


def _newest(snapshot: Snapshot, standing: Standing) -> Element:
    if not standing.current:
        return el(
            "div", {"class": "newest none"},
            el("p", {"class": "big"}, "No current verdict"),
            el("p", None, "The line is silent: the part before the camera is not inspected."),
        )  # fmt: skip
    if not snapshot.recent:
        return el("div", {"class": "newest none"}, el("p", {"class": "big"}, "No verdict yet"))
    frame = snapshot.recent[0]
    return el(
        "div", {"class": f"newest {_slug(frame.verdict)}"},
        el("p", {"class": "big"}, _icon(frame.verdict), el("span", None, frame.verdict)),
        _picture(frame),
        el(
            "div", {"class": "said"},
            el("p", {"class": "label"}, _label(frame) or UNKNOWN),
            el("p", {"class": "why"}, frame.reason),
            el("p", {"class": "soft"}, f"{_clock(frame.time)} · {frame.source}"),
            el("p", {"class": "soft id"}, frame.frame),
        ),
    )  # fmt: skip


def _strip(snapshot: Snapshot) -> Element:
    newest = snapshot.strip[-1][0] if snapshot.strip else 0
    said = dict(snapshot.strip)
    cells = []
    for number in range(newest - STRIP + 1, newest + 1):
        word = said.get(number)
        cells.append(
            el("li", {"data-key": f"s{number}", "class": _slug(word) if word else "empty"},
               _icon(word) if word else None)
        )  # fmt: skip
    counted = _counted(word for _, word in snapshot.strip)
    label = f"The newest {len(snapshot.strip)} frames: {counted or 'none'}"
    return el(
        "div", {"class": "strip"},
        el("p", {"class": "soft"}, label),
        el("ol", {"data-keyed": "", "role": "img", "aria-label": f"{label}; newest at the right"},
           *cells),
    )  # fmt: skip


def _counts(snapshot: Snapshot) -> Element:
    total = sum(snapshot.verdicts.values())
    tiles = []
    for word in WORDS:
        count = snapshot.verdicts.get(word, 0)
        share = f"{count / total:.1%}" if total else UNKNOWN
        tiles.append(
            el("div", {"class": f"tile {_slug(word)}"},
               el("dt", None, _icon(word), el("span", None, word)),
               el("dd", None, f"{count:,}", el("span", {"class": "soft"}, share)))
        )  # fmt: skip
    since = snapshot.started.astimezone()
    labels = ", ".join(f"{label} {count:,}" for label, count in snapshot.labels.items())
    return el(
        "div", {"class": "counts"},
        el("dl", None, *tiles),
        el("p", {"class": "soft"}, f"{total:,} frames since {since:%Y-%m-%d %H:%M}. ",
           f"Defects: {labels}." if labels else ""),
    )  # fmt: skip


def _hour(snapshot: Snapshot) -> Element:
    """Share of frames that were not OK, minute by minute."""
    shares = [_not_ok(minute) for minute in snapshot.minutes]
    top = max([_LEAST_SCALE, *(sum(share.values()) for share in shares)])
    bars: list[Element] = []
    for index, (minute, share) in enumerate(zip(snapshot.minutes, shares, strict=True)):
        if not sum(minute.verdicts.values()):
            bars.append(_rect(index, 98, 2, "gap", None))
        bottom = 100.0
        for word, value in share.items():
            height = 100 * value / top
            bottom -= height
            if height:
                bars.append(_rect(index, bottom, height, _slug(word), _FILLS.get(word)))
    drawing = el(
        "svg",
        {"viewBox": f"0 0 {10 * MINUTES} 100", "preserveAspectRatio": "none", "role": "img",
         "aria-label": _hour_in_words(snapshot.minutes)},
        *bars,
    )  # fmt: skip
    return el(
        "figure", {"class": "hour"},
        el("figcaption", {"class": "soft"}, "Share of frames that were not OK, by minute"),
        el("div", {"class": "plot"},
           el("span", {"class": "top soft"}, f"{top:.0%}"), drawing),
        el("div", {"class": "axis soft"}, el("span", None, "1 h ago"),
           el("span", None, "30 min"), el("span", None, "now")),
    )  # fmt: skip


def _rect(index: int, y: float, height: float, name: str, fill: str | None) -> Element:
    """``fill`` is a pattern over the colour, for those who see no colours."""
    place = {"x": f"{10 * index + 1}", "y": f"{y:.2f}", "width": "8", "height": f"{height:.2f}"}
    solid = el("rect", {**place, "class": name})
    return el("g", None, solid, el("rect", {**place, "fill": fill})) if fill else solid


_FILLS: dict[Word, str] = {"ABSTAIN": "url(#hatch)", "NOT INSPECTED": "url(#dots)"}


def _not_ok(minute: Minute) -> dict[Word, float]:
    total = sum(minute.verdicts.values())
    return {word: minute.verdicts.get(word, 0) / total if total else 0.0 for word in WORDS[1:]}


def _hour_in_words(minutes: Sequence[Minute]) -> str:
    counts = {word: sum(m.verdicts.get(word, 0) for m in minutes) for word in WORDS}
    listed = ", ".join(f"{count:,} {word}" for word, count in counts.items())
    return f"In the last hour: {listed}"


# --- frames


def _frames(name: str, title: str, frames: Sequence[RecentFrame], none: str) -> Element:
    cards = [_card(frame) for frame in frames]
    listed = el("ul", {"class": "cards", "data-keyed": ""}, *cards)
    return _section(name, title, listed if cards else el("p", {"class": "soft"}, none))


def _card(frame: RecentFrame) -> Element:
    return el(
        "li", {"class": f"card {_slug(frame.verdict)}", "data-key": f"f{frame.number}"},
        _picture(frame),
        el("p", {"class": "verdict"}, _icon(frame.verdict), el("strong", None, frame.verdict)),
        el("p", {"class": "label"}, _label(frame) or UNKNOWN),
        el("p", {"class": "why", "title": frame.reason}, frame.reason) if frame.reason else None,
        el("p", {"class": "soft id", "title": f"{frame.source}: {frame.frame}"},
           f"{_clock(frame.time)} · {frame.source}"),
    )  # fmt: skip


def _picture(frame: RecentFrame) -> Element:
    if not frame.picture:
        return el("div", {"class": "picture missing"}, "no image")
    described = f"{frame.verdict} {frame.label or ''}".strip()
    return el(
        "img", {"class": "picture", "src": f"thumbnails/{frame.picture}", "width": "192",
                "height": "192", "alt": f"Frame {frame.frame} of {frame.source}: {described}"},
    )  # fmt: skip


def _label(frame: RecentFrame) -> str:
    if frame.label is None:
        return ""
    return frame.label if frame.score is None else f"{frame.label} {frame.score:.1%}"


# --- panels


def _cameras(snapshot: Snapshot) -> Element:
    rows = []
    for camera in snapshot.cameras:
        state = camera.fault or ("delivers" if camera.age_s is not None else "no frame yet")
        level: Level = "failing" if camera.fault else "healthy"
        rows.append((
            el("span", None, camera.name, el("small", {"class": "soft"}, f" {camera.kind}")),
            el("span", {"class": level}, _icon(level), state),
            UNKNOWN if camera.age_s is None else _seconds(camera.age_s),
            f"{snapshot.rates.get(camera.name, 0.0):.1f}",
            f"{camera.dropped:,}",
        ))  # fmt: skip
    heads = ("source", "state", "newest frame", "frames/s", "dropped")
    return _panel("sources", "Sources", _table(heads, rows, "No source is known."))


def _speed(snapshot: Snapshot) -> Element:
    top = max([spread.p99 for spread in snapshot.stages.values()], default=0.0) or 1.0
    rows = [
        (
            el("span", None, stage, el("small", {"class": "soft"}, f" {_STAGES.get(stage, '')}")),
            f"{spread.p50:.1f}", f"{spread.p90:.1f}", f"{spread.p99:.1f}",
            _bar(spread.p50 / top, spread.p99 / top),
        )
        for stage, spread in snapshot.stages.items()
    ]  # fmt: skip
    heads = ("stage", "p50", "p90", "p99", "")
    return _panel(
        "speed", "Speed",
        el("p", None, el("b", {"class": "figure"}, f"{snapshot.per_second:.1f}"),
           el("span", {"class": "soft"}, " frames a second, the last 10 s; below, milliseconds")),
        _table(heads, rows, "No frame has been timed yet."),
    )  # fmt: skip


def _bar(median: float, tail: float) -> Element:
    """Median and 99th percentile on one scale; the numbers stand beside it."""
    return el(
        "svg", {"class": "bar", "viewBox": "0 0 100 10", "preserveAspectRatio": "none",
                "aria-hidden": "true"},
        el("rect", {"class": "tail", "y": "2", "width": f"{100 * tail:.1f}", "height": "6"}),
        el("rect", {"class": "median", "y": "2", "width": f"{100 * median:.1f}", "height": "6"}),
    )  # fmt: skip


def _health(snapshot: Snapshot) -> Element:
    rows = [
        (
            flag.word,
            f"{flag.recent / snapshot.last_minute:.0%}" if snapshot.last_minute else UNKNOWN,
            f"{flag.count:,}",
            el("span", None, flag.reason,
               el("small", {"class": "soft"}, f" {_clock(flag.time)}")),
        )
        for flag in snapshot.flags
    ]  # fmt: skip
    heads = ("flag", "last minute", "in all", "last reason")
    return _panel(
        "health", "Input health", _table(heads, rows, "No frame was flagged since the start.")
    )


def _drift(windows: Sequence[Drift] | None, fill: float) -> Element:
    if windows is None:
        return _panel("drift", "Drift", el("p", {"class": "soft"}, "Unknown: it is not watched, "
                      "or the bundle has no reference statistics."))  # fmt: skip
    rows = [
        (
            drift.of,
            _mark("attention" if drift.drifted else "healthy",
                  "drifted" if drift.drifted else "as the reference"),
            f"{drift.p_value:.2g}", f"{drift.alpha:.2g}", f"{drift.window:,}",
        )
        for drift in windows
    ]  # fmt: skip
    heads = ("of", "state", "p", "alarm below", "frames")
    return _panel(
        "drift", "Drift",
        _table(heads, rows, "The first window is not full yet."),
        el("p", {"class": "soft"}, f"The window that is being filled: {fill:.0%}"),
    )  # fmt: skip


def _engine(snapshot: Snapshot) -> Element:
    model, engine = snapshot.model, snapshot.engine
    facts: list[tuple[str, Child]] = []
    if model:
        facts += [
            ("bundle", f"{model.name} {model.version}"),
            ("slot", el("code", None, model.slot[:12]) if model.slot else "not in a slot"),
            ("trial", _mark("attention", model.trial) if model.trial else "no"),
            ("adaptation", _mark("healthy" if model.verified else "attention", model.adaptation)),
            ("OK labels", ", ".join(model.ok_labels) or UNKNOWN),
        ]
    if engine:
        facts.append(("engine", engine.name))
        if engine.degraded:
            facts.append(("slower than it should be", _mark("attention", engine.degraded)))
    reasons = [el("li", None, reason) for reason in (engine.reasons if engine else ())]
    return _panel(
        "engine", "Model and engine",
        _facts(facts),
        el("details", None, el("summary", None, "Why this engine"), el("ol", None, *reasons))
        if reasons else None,
    )  # fmt: skip


def _machine(snapshot: Snapshot) -> Element:
    return _panel(
        "machine", "Machine",
        _facts([*_heat(snapshot.heat), *(_disk(disk) for disk in snapshot.disks)]),
    )  # fmt: skip


def _heat(heat: Heat | None) -> Iterable[tuple[str, Child]]:
    if heat is None:
        return [("temperature", UNKNOWN)]
    zones = ", ".join(f"{zone} {celsius:.0f} °C" for zone, celsius in heat.zones.items())
    limit = f" (limit {heat.limit_c:.0f} °C)" if heat.limit_c is not None else ""
    throttled = ", ".join(heat.throttling)
    return [
        ("temperature", f"{zones}{limit}" if zones else "no sensor can be read"),
        ("throttling", _mark("attention", throttled) if throttled else "none"),
        ("works", _mark("attention", f"{heat.share:.0%} of the time: {heat.reason}")
         if heat.share < 1 else "all of the time"),
    ]  # fmt: skip


def _disk(disk: Disk) -> tuple[str, Child]:
    share = disk.free / disk.total if disk.total else 0.0
    text = f"{_bytes(disk.free)} free of {_bytes(disk.total)} ({share:.0%})"
    return f"disk {disk.path}", text


def _results(snapshot: Snapshot) -> Element:
    facts: list[tuple[str, Child]] = [*_outbox(snapshot.outbox)]
    update, evidence = snapshot.update, snapshot.evidence
    if evidence:
        limit = f" of {_bytes(evidence.limit_bytes)}" if evidence.limit_bytes else ""
        facts.append(
            ("evidence", f"{evidence.kept:,} frames kept, {_bytes(evidence.bytes)}{limit}")
        )
        for why, count in evidence.refused.items():
            facts.append((f"not kept: {why}", f"{count:,}"))
    if update is None:
        facts.append(("updates", UNKNOWN))
    else:
        level: Level = "attention" if update.failed else "healthy"
        facts.append(("last update", _mark(level, update.outcome) if update.outcome else UNKNOWN))
        for role, expires in sorted(update.expires.items()):
            facts.append((f"{role} expires", _until(expires, snapshot.time)))
    return _panel("results", "Results and updates", _facts(facts))


def _outbox(outbox: Outbox | None) -> Iterable[tuple[str, Child]]:
    if outbox is None:
        return [("outbox", UNKNOWN)]
    to = outbox.to or "nowhere: no broker is named"
    state = _mark("attention", outbox.fault) if outbox.fault else to
    lost = {"dropped": outbox.dropped, "not kept": outbox.unkept, "refused": outbox.refused}
    return [
        ("sent to", state),
        ("wait", f"{outbox.rows:,} ({_bytes(outbox.bytes)})"),
        ("sent", f"{outbox.sent:,}"),
        ("lost", ", ".join(f"{count:,} {how}" for how, count in lost.items())),
    ]


# --- parts


def _section(name: str, title: str, *children: Child) -> Element:
    heading = el("h2", {"id": f"{name}-title"}, title)
    return el("section", {"id": name, "aria-labelledby": f"{name}-title"}, heading, *children)


def _panel(name: str, title: str, *children: Child) -> Element:
    section = _section(name, title, *children)
    section.set("class", "panel")
    return section


def _table(heads: Sequence[str], rows: Sequence[Sequence[Child]], none: str) -> Element:
    if not rows:
        return el("p", {"class": "soft"}, none)
    top = [el("th", {"role": "columnheader", "scope": "col"}, head) for head in heads]
    body = [
        el(
            "tr", {"role": "row"},
            el("th", {"role": "rowheader", "scope": "row"}, row[0]),
            *(el("td", {"role": "cell", "data-label": head}, cell)
              for head, cell in zip(heads[1:], row[1:], strict=True)),
        )
        for row in rows
    ]  # fmt: skip
    # Roles are spelled out because a table that is shown as cards loses them (CSS display, ARIA).
    return el(
        "table", {"role": "table"},
        el("thead", {"role": "rowgroup"}, el("tr", {"role": "row"}, *top)),
        el("tbody", {"role": "rowgroup"}, *body),
    )  # fmt: skip


def _facts(facts: Iterable[tuple[str, Child]]) -> Element:
    pairs = [el("div", None, el("dt", None, name), el("dd", None, fact)) for name, fact in facts]
    return el("dl", {"class": "facts"}, *pairs)


def _mark(level: Level, text: str) -> Element:
    return el("span", {"class": level}, _icon(level), text)


def _icon(name: str) -> Element:
    """A shape of the document's sprite; the word always stands beside it."""
    return el(
        "svg", {"class": "icon", "aria-hidden": "true", "width": "16", "height": "16"},
        el("use", {"href": f"#{_slug(name)}"}),
    )  # fmt: skip


def _slug(word: str) -> str:
    return word.lower().replace(" ", "-")


def _counted(words: Iterable[Word]) -> str:
    listed = list(words)
    return ", ".join(f"{listed.count(word)} {word}" for word in WORDS if word in listed)


def _clock(time: str) -> str:
    """Local time of day of an ISO moment."""
    try:
        return (
            f"{datetime.datetime.fromisoformat(time.replace('Z', '+00:00')).astimezone():%H:%M:%S}"
        )
    except ValueError:
        return time


def _age(age_s: float | None) -> str:
    if age_s is None:
        return "before the last restart"
    return "now" if age_s < 2 else f"{span(datetime.timedelta(seconds=age_s))} ago"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else span(datetime.timedelta(seconds=seconds))


def _up(snapshot: Snapshot) -> str:
    return span(snapshot.time - snapshot.started)


def _until(expires: datetime.datetime, now: datetime.datetime) -> Child:
    left = expires - now
    if left < datetime.timedelta():
        return _mark("attention", f"expired {span(-left)} ago")
    return f"in {span(left)} ({expires:%Y-%m-%d})"


def _bytes(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if value >= 10 or unit == "B" else f"{value:.1f} {unit}"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="icon.svg">
<link rel="stylesheet" href="page.css?{version}">
<noscript><meta http-equiv="refresh" content="5"></noscript>
<script src="page.js?{version}" defer></script>
{title}
</head>
<body>
<svg width="0" height="0" class="sprite" aria-hidden="true"><defs>
<symbol id="ok" viewBox="0 0 16 16"><circle cx="8" cy="8" r="7.5"/>
<path class="in" d="M4.5 8.3l2.4 2.5 4.6-5.3"/></symbol>
<symbol id="defect" viewBox="0 0 16 16"><rect x=".7" y=".7" width="14.6" height="14.6" rx="2"/>
<path class="in" d="M4.8 4.8l6.4 6.4M11.2 4.8l-6.4 6.4"/></symbol>
<symbol id="abstain" viewBox="0 0 16 16"><path d="M8 .3L15.7 8 8 15.7.3 8z"/>
<path class="in" d="M6.2 6.6c0-2.6 3.7-2.4 3.7-.2 0 1.5-1.8 1.4-1.8 3M8 11.6v.4"/></symbol>
<symbol id="not-inspected" viewBox="0 0 16 16"><path d="M5 .6h6L15.4 5v6L11 15.4H5L.6 11V5z"/>
<path class="in" d="M4.3 8h7.4"/></symbol>
<symbol id="healthy" viewBox="0 0 16 16"><circle cx="8" cy="8" r="7.5"/>
<path class="in" d="M4.5 8.3l2.4 2.5 4.6-5.3"/></symbol>
<symbol id="attention" viewBox="0 0 16 16"><path d="M8 .8l7.6 14H.4z"/>
<path class="in" d="M8 5.6v4.6M8 12.3v.4"/></symbol>
<symbol id="failing" viewBox="0 0 16 16"><rect x=".7" y=".7" width="14.6" height="14.6" rx="2"/>
<path class="in" d="M4.8 4.8l6.4 6.4M11.2 4.8l-6.4 6.4"/></symbol>
<symbol id="unknown" viewBox="0 0 16 16"><path d="M8 .3L15.7 8 8 15.7.3 8z"/>
<path class="in" d="M6.2 6.6c0-2.6 3.7-2.4 3.7-.2 0 1.5-1.8 1.4-1.8 3M8 11.6v.4"/></symbol>
<pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse"><path class="hatch"
d="M0 6L6 0"/></pattern>
<pattern id="dots" width="4" height="8" patternUnits="userSpaceOnUse"><path class="hatch"
d="M0 4h2"/></pattern>
</defs></svg>
<p id="lost" class="banner unknown" role="alert" hidden></p>
{main}
</body>
</html>
"""
