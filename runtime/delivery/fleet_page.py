"""Show a fleet: a table for a terminal, and one static page for a browser.

The page needs nothing beside itself: no script, no network, no other file, and it forbids the
browser to want any. All that comes from devices is escaped. Levels are words and signs, never
colour alone; roles are spelled out because a table shown as cards loses them (CSS display, ARIA).
It decides nothing and reads no clock.
"""

import datetime
import html
from collections import Counter
from collections.abc import Sequence

from runtime.delivery.fleet import Fleet, Row
from runtime.delivery.fleet_health import LEVELS, Level, span
from runtime.delivery.status_document import Status

COLUMNS = ("device", "health", "bundle", "engine", "drift", "last seen", "expires")

_SIGNS: dict[Level, str] = {"failing": "✕", "unknown": "?", "attention": "!", "healthy": "✓"}


def cells(row: Row, now: datetime.datetime) -> tuple[str, ...]:
    """The row's texts, in the order of COLUMNS and without its reasons."""
    status = row.status
    who = f"{row.name} ({row.device[:8]})" if row.name else f"refused: {row.device}"
    facts = ["–"] * (len(COLUMNS) - 2)
    if status is not None:
        facts = [_bundle(status), _engine(status), _drift(status)]
        facts += [_age(status, now), _expires(status, now)]
    return tuple(map(printable, (who, row.health.level, *facts)))


def reasons(row: Row) -> list[str]:
    """Why the row's level is no better."""
    return list(map(printable, row.health.reasons))


def printable(text: str) -> str:
    """``text`` without what would change a terminal, or the order in which text is read."""
    return "".join(character if character.isprintable() else "�" for character in text)


def table(fleet: Fleet, now: datetime.datetime) -> str:
    """For a terminal: one line a device, and its reasons below it."""
    body = [cells(row, now) for row in fleet.rows]
    widths = [max(len(line[index]) for line in [COLUMNS, *body]) for index in range(len(COLUMNS))]
    lines = [_line(COLUMNS, widths)]
    for row, line in zip(fleet.rows, body, strict=True):
        lines += [_line(line, widths), *(f"    {reason}" for reason in reasons(row))]
    return "\n".join([*lines, "", summary(fleet)])


def summary(fleet: Fleet) -> str:
    """How many devices are how: ``3 devices: 1 failing, 2 healthy; 1 document refused``."""
    devices = [row for row in fleet.rows if row.name]
    counts = Counter(row.health.level for row in devices)
    parts = ", ".join(f"{counts[level]} {level}" for level in LEVELS if counts[level])
    total = f"{_count(len(devices), 'device')}: {parts or 'none enrolled'}"
    refused = len(fleet.rows) - len(devices)
    return f"{total}; {_count(refused, 'document')} refused" if refused else total


def page(fleet: Fleet, now: datetime.datetime, title: str) -> str:
    """The whole page, HTML 5 in UTF-8."""
    head = "".join(
        f'<th role="columnheader" scope="col">{column}</th>' for column in (*COLUMNS, "reasons")
    )
    body = "\n".join(_html_row(row, now) for row in fleet.rows)
    return _PAGE.format(
        title=html.escape(title),
        style=_STYLE,
        summary=html.escape(summary(fleet)),
        made=f"{now:%Y-%m-%d %H:%M} UTC",
        stamp=now.isoformat(timespec="seconds"),
        head=head,
        body=body or f'<tr><td colspan="{len(COLUMNS) + 1}">No device is enrolled.</td></tr>',
    )


def _line(texts: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(text.ljust(width) for text, width in zip(texts, widths, strict=True)).rstrip()


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _bundle(status: Status) -> str:
    bundle = status.bundle
    return f"{bundle.name} {bundle.version} ({bundle.sha256[:8]})" if bundle else "none"


def _engine(status: Status) -> str:
    engine = status.engine
    return f"{engine.name} {engine.version} {engine.provider}, {engine.form}" if engine else "–"


def _drift(status: Status) -> str:
    if status.drift is None:
        return "–"
    return f"{'yes' if status.drift.drifted else 'no'} (p {status.drift.p_value:.2g})"


def _age(status: Status, now: datetime.datetime) -> str:
    age = now - status.moment.seen
    if age < datetime.timedelta():
        return "now" if age > datetime.timedelta(minutes=-5) else f"in {span(-age)}"
    return f"{span(age)} ago"


def _expires(status: Status, now: datetime.datetime) -> str:
    """The first expiry of its metadata."""
    if status.update is None or not status.update.expires:
        return "–"
    role, first = min(status.update.expires.items(), key=lambda item: item[1])
    if first < now:
        return f"{span(now - first)} ago ({role})"
    return f"in {span(first - now)} ({role})"


def _html_row(row: Row, now: datetime.datetime) -> str:
    level = row.health.level
    texts = [html.escape(text) for text in cells(row, now)]
    texts[1] = f'<span class="level {level}"><span aria-hidden="true">{_SIGNS[level]}</span> '
    texts[1] += f"{level}</span>"
    if row.status:
        seen = row.status.moment.seen
        texts[4] = f'<time datetime="{seen.isoformat(timespec="seconds")}">{texts[4]}</time>'
    listed = "".join(f"<li>{html.escape(reason)}</li>" for reason in reasons(row))
    columns = [
        f'<td role="cell" data-label="{column}">{text}</td>'
        for column, text in zip(COLUMNS[1:], texts[1:], strict=True)
    ]
    why = f"<ul>{listed}</ul>" if listed else "none"
    return (
        f'<tr role="row"><th role="rowheader" scope="row">{texts[0]}</th>{"".join(columns)}'
        f'<td role="cell" data-label="reasons">{why}</td></tr>'
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
style-src 'unsafe-inline'; img-src data:">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="summary">{summary}</p>
<p>As of <time datetime="{stamp}">{made}</time>. Only documents that an enrolled device signed
are shown; whoever is not heard of is unknown.</p>
<table role="table">
<caption>Devices, worst first</caption>
<thead role="rowgroup"><tr role="row">{head}</tr></thead>
<tbody role="rowgroup">
{body}
</tbody>
</table>
</main>
</body>
</html>
"""

_STYLE = """
:root { --back: #fff; --text: #1a1d21; --soft: #565d66; --line: #d5d9de; --card: #f6f7f9;
  --failing: #a4161a; --unknown: #5a3d99; --attention: #7a4d00; --healthy: #17602f; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171a; --text: #e8eaed; --soft: #a9b0b8; --line: #363c43; --card: #1d2125;
    --failing: #ff8a80; --unknown: #c3a6ff; --attention: #ffc35c; --healthy: #7ddb95; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; }
main { max-width: 90rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { margin: 0 0 .25rem; font-size: 1.6rem; }
p { margin: 0 0 .75rem; color: var(--soft); max-width: 60rem; }
.summary { color: var(--text); font-weight: 600; }
table { width: 100%; border-collapse: collapse; }
caption { text-align: left; color: var(--soft); padding: .5rem 0; }
th, td { text-align: left; vertical-align: top; padding: .6rem .75rem;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
thead th { color: var(--soft); font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 600; min-width: 11rem; }
tbody td { min-width: 7.5rem; }
ul { margin: 0; padding-left: 1.1rem; }
.level { font-weight: 600; white-space: nowrap; }
.failing { color: var(--failing); } .unknown { color: var(--unknown); }
.attention { color: var(--attention); } .healthy { color: var(--healthy); }
@media (max-width: 60rem) {
  table, tbody, tr, th, td, caption { display: block; }
  thead { display: none; }
  tbody tr { background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
    padding: .5rem .25rem; margin-bottom: .75rem; }
  tbody th, tbody td { border: 0; padding: .2rem .75rem; }
  tbody td { display: grid; grid-template-columns: 6rem 1fr; gap: .5rem; }
  tbody td::before { content: attr(data-label); color: var(--soft); }
  tbody td[colspan] { display: block; } tbody td[colspan]::before { content: none; }
}
"""
