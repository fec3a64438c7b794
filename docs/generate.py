"""Write what can be made from the code: recipe keys, command help, doctor's keys, README's table.

``make docs`` runs it; a test fails when a page is stale. It invents no words: what the pages say
are docstrings of ``runtime`` and the help texts of the commands.
"""

import ast
import contextlib
import datetime
import importlib
import inspect
import io
import itertools
import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints
from unittest import mock

import msgspec
import tomllib

from benchmarks import summary
from benchmarks.run import find
from export import table
from export.release import Release
from runtime import choose, diagnosis, machine, manifest, preprocess, recipe
from runtime.choose import Step
from runtime.diagnosis import Report
from runtime.manifest import Adaptation
from runtime.recipe import Recipe
from train.degradations import degradations_page

MODULES = {
    module.__name__: module for module in (choose, diagnosis, machine, manifest, preprocess, recipe)
}
DOCS = Path(__file__).resolve().parent
BEGIN = "<!-- begin generated: make docs -->"
END = "<!-- end generated -->"
COMMANDS = (
    ("train",), ("train", "degradations"), ("calibration",), ("export",), ("export", "gate"),
    ("export", "report"), ("export", "compare"),
    ("export", "keys"), ("export", "publish"), ("export", "promote"), ("export", "rollback"),
    ("export", "refresh"),
    ("runtime",), ("runtime", "classify"), ("runtime", "watch"), ("runtime", "page"),
    ("runtime", "collect"), ("runtime", "serve"), ("runtime", "service"), ("runtime", "build"),
    ("runtime", "verify"), ("runtime", "doctor"), ("runtime", "benchmark"), ("runtime", "update"),
    ("runtime", "stage"), ("runtime", "activate"), ("runtime", "commit"), ("runtime", "rollback"),
    ("runtime", "status"), ("runtime", "fleet", "enroll"), ("runtime", "fleet", "report"),
    ("runtime", "fleet", "status"),
)  # fmt: skip


def recipe_page() -> str:
    """``recipe.md``: every table and key with type, default and meaning."""
    lines = [
        "# The recipe",
        "",
        "<!-- Generated from runtime/recipe.py by `make docs`; edit the docstrings there. -->",
        "",
        "One TOML file is one complete configuration. Unknown keys, wrong types and values out of",
        "range are errors that name the table and the key. Relative paths are relative to the",
        "recipe's folder; results go to `build/NAME/` in the working directory.",
        "",
        "<!-- run: tests/test_docs.py::test_a_recipe_on_a_page_is_valid -->",
        "```toml",
        (DOCS.parent / "train" / "recipes" / "solar.toml").read_text().rstrip(),
        "```",
        "",
        "## Top level",
        "",
        *_table(Recipe, skip_tables=True),
    ]
    for field in msgspec.structs.fields(Recipe):
        struct = _struct(field.type)
        if struct is not None:
            lines += ["", f"## [{field.name}]", "", _first(inspect.getdoc(struct)), ""]
            lines += _table(struct)
            for inner in msgspec.structs.fields(struct):
                nested = _struct(inner.type)
                if nested is not None:
                    title = f"### [{field.name}.{inner.name}]"
                    lines += ["", title, "", _first(inspect.getdoc(nested)), "", *_table(nested)]
    return "\n".join(lines) + "\n"


def commands_page() -> str:
    """``commands.md``: the help text of every command."""
    lines = [
        "# Commands",
        "",
        "<!-- Generated from the commands' --help by `make docs`. -->",
        "",
        "Results go to stdout, everything else to stderr. Exit codes: 0 success, 1 an error with",
        "one line that says what to do, 2 wrong usage, 130 interrupted.",
    ]
    for module, *verb in COMMANDS:
        program = "fieldfit" if module == "runtime" else f"python -m {module}"
        name = " ".join([program, *verb])
        lines += ["", f"## {name}", "", "```text", _help(module, verb).rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _help(module: str, verb: list[str]) -> str:
    """What ``--help`` prints, whatever the terminal is."""
    main = importlib.import_module(f"{module}.__main__").main
    printed = io.StringIO()
    plain = {"COLUMNS": "88", "NO_COLOR": "1", "PYTHON_COLORS": "0"}
    with (
        mock.patch.dict(os.environ, plain),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        main([*verb, "--help"])
    return printed.getvalue()


def doctor_page() -> str:
    """``doctor.md``: every key of ``fieldfit doctor --json``."""
    lines = [
        "# What `fieldfit doctor --json` says",
        "",
        "<!-- Generated from runtime/diagnosis.py and runtime/machine.py by `make docs`. -->",
        "",
        "`fieldfit doctor` prints the same for people, and warns under *what to look at*. `*` is",
        "any name, `[]` any item of a list; what cannot be read is `null`.",
        "",
        *_json_table(Report),
        "",
        "## bundle",
        "",
        "`null` unless a bundle was named: `fieldfit doctor BUNDLE --json`. `bundle.bundle` is its",
        "name and version, `bundle.forms` are the forms in it, `bundle.engine` is the engine that",
        '`fieldfit classify` would run, or `"none"`, and `bundle.reasons` are the steps that led',
        "to it, as sentences. If no engine can run it there are no steps and the exit code is 1.",
        "",
        *_json_table(Adaptation, "bundle.adaptation."),
        "",
        "Candidates in the order in which they were tried:",
        "",
        *_json_table(Step, "bundle.steps[]."),
    ]
    return "\n".join(lines) + "\n"


def readme() -> str:
    """``README.md`` with the table of the newest measured release of the default recipe."""
    path = DOCS.parent / "benchmarks" / "results" / "quality.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    release = msgspec.convert(record["report"]["figures"]["solar"]["release"], Release)
    lines = [
        "| " + " | ".join(table.COLUMNS) + " |",
        "| --- |" + " ---: |" * (len(table.COLUMNS) - 1),
        *("| " + " | ".join(row) + " |" for row in table.rows(release)),
        "",
        f"*{table.title(release)}; {record['machine']['processor']}, "
        f"{record['date']}; made by `make train export`.*",
    ]
    text = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, _, after = rest.partition(END)
    return summary.fill(before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + after)


ROOMS = {
    "export": ("composes: forms, gate, bundle", "torch and onnx"),
    "train": ("learns: the checkpoint", "torch"),
    "calibration": ("measures: ranges, two dialects", "onnx"),
    "runtime": ("answers: all that a device runs", "neither"),
}
"""What each room does, and what it needs to be installed."""

_SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" \
aria-labelledby="title description">
<!-- Made from the import contracts of pyproject.toml by `make docs`. -->
<title id="title">The four rooms of fieldfit, and who may import whom</title>
<desc id="description">{description}</desc>
<style>
svg {{ --back: #f6f7f9; --box: #ffffff; --edge: #57606a; --text: #1f2328; --soft: #57606a; }}
@media (prefers-color-scheme: dark) {{
svg {{ --back: #161b22; --box: #0d1117; --edge: #9198a1; --text: #f0f6fc; --soft: #9198a1; }}
}}
text {{ font-family: system-ui, sans-serif; font-size: 17px; fill: var(--text); }}
.name {{ font-weight: 600; font-size: 20px; }}
.soft {{ fill: var(--soft); }}
.box {{ fill: var(--box); stroke: var(--edge); stroke-width: 1.5; }}
.arrow {{ stroke: var(--edge); stroke-width: 1.5; }}
.head {{ fill: var(--edge); }}
.border {{ stroke: var(--edge); stroke-dasharray: 5 5; }}
</style>
<defs><marker id="head" viewBox="0 0 10 10" refX="10" refY="5" markerWidth="9" markerHeight="9" \
orient="auto"><path class="head" d="M0 0 10 5 0 10z"/></marker></defs>
<rect width="{width}" height="{height}" rx="12" style="fill: var(--back)"/>
{parts}
</svg>
"""


def rooms_picture() -> str:
    """``rooms.svg``: the rooms as the contract of their layers stacks them, arrows down."""
    contract = _layers()
    width, wide, high, apart, top = 640, 290, 96, 64, 20
    places = {}
    for row, rooms in enumerate(contract):
        for number, room in enumerate(rooms):
            middle = width / 2 + (number - (len(rooms) - 1) / 2) * (wide + 20)
            places[room] = (middle, top + row * (high + apart))
    parts = []
    for row, below in itertools.pairwise(contract):
        for (x1, y1), (x2, y2) in itertools.product(
            *([places[r] for r in e] for e in (row, below))
        ):
            lean = (x2 - x1) / 4
            parts.append(
                f'<line class="arrow" x1="{x1 + lean:g}" y1="{y1 + high:g}" '
                f'x2="{x2 - lean:g}" y2="{y2:g}" marker-end="url(#head)"/>'
            )
    for room, (middle, y) in places.items():
        does, needs = ROOMS[room]
        parts += [
            f'<rect class="box" x="{middle - wide / 2:g}" y="{y:g}" width="{wide}" '
            f'height="{high}" rx="8"/>',
            f'<text class="name" text-anchor="middle" x="{middle:g}" y="{y + 30:g}">{room}</text>',
            f'<text text-anchor="middle" x="{middle:g}" y="{y + 56:g}">{does}</text>',
            f'<text class="soft" text-anchor="middle" x="{middle:g}" y="{y + 80:g}">'
            f"knows {needs}</text>",
        ]
    border = top + (len(contract) - 1) * (high + apart) - apart / 2
    parts += [
        f'<line class="border" x1="24" x2="{width - 24}" y1="{border:g}" y2="{border:g}"/>',
        f'<text class="soft" x="24" y="{border - 8:g}">workstation</text>',
        f'<text class="soft" x="24" y="{border + 20:g}">device</text>',
    ]
    told = (f"{room} {does}, knows {needs}" for room, (does, needs) in ROOMS.items())
    return _SVG.format(
        width=width,
        height=top * 2 + len(contract) * high + (len(contract) - 1) * apart,
        description=f"{'; '.join(told)}. Arrows are imports: all point down.",
        parts="\n".join(parts),
    )


def _layers() -> list[list[str]]:
    """The rooms from the top to the ground floor, those of one level beside each other."""
    project = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    contract = next(c for c in contracts if c["type"] == "layers" and "containers" not in c)
    return [[room.strip() for room in layer.split("|")] for layer in contract["layers"]]


PAGES = {
    "docs/recipe.md": recipe_page,
    "docs/commands.md": commands_page,
    "docs/doctor.md": doctor_page,
    "docs/degradations.md": degradations_page,
    "docs/rooms.svg": rooms_picture,
    "README.md": readme,
    "benchmarks/README.md": lambda: summary.fill(summary.INDEX.read_text(encoding="utf-8"), find()),
    "benchmarks/results/README.md": lambda: summary.page(summary.records()),
}


def _table(struct: type, *, skip_tables: bool = False) -> list[str]:
    meanings = _attribute_docs(struct)
    hints = get_type_hints(struct, include_extras=True)
    lines = ["| key | values | default | meaning |", "| --- | --- | --- | --- |"]
    for field in msgspec.structs.fields(struct):
        if _struct(field.type) is not None:
            if not skip_tables:
                row = (f"`{field.name}`", "table", "see below", meanings.get(field.name, ""))
                lines.append("| " + " | ".join(row) + " |")
            continue
        default = "required" if field.default is msgspec.NODEFAULT else _toml(field.default)
        values = _values(hints[field.name]).replace("|", "\\|")
        meaning = meanings.get(field.name, "").replace("|", "\\|")
        lines.append(f"| `{field.name}` | {values} | {default} | {meaning} |")
    return lines


def _json_table(struct: type, prefix: str = "") -> list[str]:
    rows = _json_rows(struct, prefix)
    return ["| key | values | meaning |", "| --- | --- | --- |", *rows]


def _json_rows(struct: type, prefix: str) -> list[str]:
    """A row for each key, and under it those of what it holds."""
    meanings = _attribute_docs(struct)
    rows = []
    for name, hint in get_type_hints(struct).items():
        kinds = [hint, *get_args(hint)]
        inner = next((found for kind in kinds if (found := _struct(kind)) is not None), None)
        container = {dict: ".*", tuple: "[]"}.get(get_origin(hint) or hint, "")
        meaning = meanings.get(name) or (_first(inspect.getdoc(inner)) if inner else "")
        rows.append(f"| `{prefix}{name}` | {_json_values(hint)} | {meaning} |")
        if inner is not None:
            rows += _json_rows(inner, f"{prefix}{name}{container}.")
    return rows


def _json_values(kind: Any) -> str:
    """What JSON makes of a type, in words."""
    arguments = get_args(kind)
    if type(None) in arguments:
        others = [each for each in arguments if each is not type(None)]
        return f"{_json_values(others[0]) if len(others) == 1 else 'text'} or `null`"
    if get_origin(kind) is dict:
        return "object" if _struct(arguments[1]) else f"object of {_json_values(arguments[1])}"
    if get_origin(kind) is tuple:
        return "list" if _struct(arguments[0]) else f"list of {_json_values(arguments[0])}"
    if _struct(kind):
        return "object"
    return "time (ISO 8601)" if kind is datetime.datetime else _values(kind)


def _struct(kind: Any) -> type | None:
    return kind if isinstance(kind, type) and issubclass(kind, msgspec.Struct) else None


def _values(kind: Any) -> str:
    """A type in words."""
    if get_origin(kind) is Annotated:
        base, *notes = get_args(kind)
        return " ".join([_values(base), *filter(None, (_bounds(note) for note in notes))])
    if str(get_origin(kind)) == "typing.Literal":
        return ", ".join(f'`"{value}"`' for value in get_args(kind))
    if isinstance(kind, type) and issubclass(kind, str) and hasattr(kind, "__members__"):
        return ", ".join(f'`"{member.value}"`' for member in kind)  # type: ignore[attr-defined]
    arguments = get_args(kind)
    if get_origin(kind) is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {_values(arguments[0])}"
        return f"list of {len(arguments)}: {_values(arguments[0])}"
    if arguments:  # a union with None
        return " or ".join(_values(a) for a in arguments if a is not type(None))
    words = {int: "whole number", float: "number", str: "text", bool: "`true` or `false`"}
    return words.get(kind, str(kind))


def _bounds(note: Any) -> str:
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    parts = [f"{word} {getattr(note, name):g}" for name, word in words.items()
             if getattr(note, name, None) is not None]  # fmt: skip
    if getattr(note, "pattern", None):
        parts.append(f"matching `{note.pattern}`")
    return ", ".join(parts)


def _toml(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return "`[" + ", ".join(_toml(v).strip("`") for v in value) + "]`"
    if isinstance(value, str):
        return f'`"{getattr(value, "value", value)}"`'
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _attribute_docs(struct: type) -> dict[str, str]:
    """The string under each attribute of a class and its bases: Python keeps none of them."""
    docs: dict[str, str] = {}
    for base in reversed(struct.__mro__):
        if base.__module__ in MODULES:
            docs |= _own_attribute_docs(base)
    return docs


def _own_attribute_docs(struct: type) -> dict[str, str]:
    body = next(
        node.body
        for node in ast.parse(inspect.getsource(MODULES[struct.__module__])).body
        if isinstance(node, ast.ClassDef) and node.name == struct.__name__
    )
    docs = {}
    for attribute, text in itertools.pairwise(body):
        if (
            isinstance(attribute, ast.AnnAssign)
            and isinstance(attribute.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            docs[attribute.target.id] = _first(str(text.value.value))
    return docs


def _first(text: str | None) -> str:
    """A docstring on one line, with Markdown's single backticks."""
    words = re.sub(r"\s+", " ", (text or "").replace("``", "`")).strip()
    words = re.sub(r"^`\[[a-z._]+\]`: ", "", words)  # the heading says it already
    return words[:1].upper() + words[1:]


def main() -> int:
    """Write every page."""
    for name, page in PAGES.items():
        (DOCS.parent / name).write_text(page(), encoding="utf-8")
        print(f"wrote {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
