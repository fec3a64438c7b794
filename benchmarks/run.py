"""``python -m benchmarks.run``: measure, and write the tables to ``benchmarks/results``.

Every other file of this folder with a ``measure(options)`` is a benchmark; its docstring's first
line is its help.
"""

import argparse
import functools
import importlib
import pkgutil
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import benchmarks
from benchmarks import harness, summary
from runtime.command import run_command
from runtime.errors import FieldfitError
from runtime.verbs.options import positive

BUNDLE = Path("build") / "solar" / "bundle"
OF_A_BUNDLE = (
    "calibration", "coldstart", "device", "drift", "end_to_end", "inference", "openvino",
    "quantization", "scaling", "serving", "soak",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the benchmarks that are asked for and return the exit code."""
    modules = find()
    options = _parser(modules).parse_args(argv)
    names = options.names or [n for n, m in modules.items() if not getattr(m, "LONG", False)]
    return run_command("benchmarks", lambda: _run({n: modules[n] for n in names}, options))


def find() -> dict[str, ModuleType]:
    """The benchmarks by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(benchmarks.__path__))
    modules = {n: importlib.import_module(f"benchmarks.{n}") for n in names if n != "run"}
    return {name: module for name, module in modules.items() if hasattr(module, "measure")}


def _parser(modules: dict[str, ModuleType]) -> argparse.ArgumentParser:
    summaries = "\n".join(
        f"  {name:<15}{summary.first_line(module)}" for name, module in modules.items()
    )
    long = [name for name, module in modules.items() if getattr(module, "LONG", False)]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Measure on this machine and write benchmarks/results/NAME.json and NAME.md.\n"
        "Speeds are ratios of interleaved runs; leave the machine alone meanwhile.\n\n"
        f"benchmarks:\n{summaries}",
        epilog="Example: python -m benchmarks.run inference --bundle build/solar-all/bundle",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names",
        nargs="*",
        choices=[[], *modules],
        metavar="NAME",
        help=f"default all but those that take long: {', '.join(long)}",
    )
    parser.add_argument(
        "--bundle", type=Path, default=BUNDLE, metavar="PATH", help=f"default {BUNDLE}"
    )
    parser.add_argument(
        "--cuts", type=positive, metavar="N", help="power_cuts, outbox_cuts: how many"
    )
    parser.add_argument("--minutes", type=positive, metavar="N", help="soak: how long")
    parser.add_argument(
        "--quick", action="store_true", help="a few seconds: print the tables, write nothing"
    )
    return parser


def _run(modules: dict[str, ModuleType], options: argparse.Namespace) -> int:
    """Measure one after the other; what cannot run here is told of, and the others go on."""
    if len(modules) == 1:
        for name, module in modules.items():
            _measure(name, module, options)
        return 0
    ends = {name: _end(name, module, options) for name, module in modules.items()}
    missing = {name: end.error for name, end in ends.items() if end.error}
    for name, error in missing.items():
        _say(f"{name} was not measured: {error}")
    _say(f"{len(ends) - len(missing)} of {len(ends)} measured")
    return int(len(missing) == len(ends) or any(end.bug for end in ends.values()))


class _End(NamedTuple):
    """How a benchmark ended; without an error it was measured."""

    error: str = ""
    bug: bool = False


def _end(name: str, module: ModuleType, options: argparse.Namespace) -> _End:
    try:
        _measure(name, module, options)
    except FieldfitError as error:
        return _End(str(error))
    except Exception as error:
        traceback.print_exc()  # and on: what the others find may have taken an hour
        return _End(f"a bug, {type(error).__name__}: {error}", bug=True)
    return _End()


def _measure(name: str, module: ModuleType, options: argparse.Namespace) -> None:
    chosen = harness.Options(
        bundle=options.bundle, quick=options.quick, cuts=options.cuts, minutes=options.minutes
    )
    _say(f"{name} ...")
    measure = functools.partial(module.measure, chosen)
    record = harness.run(name, measure, _command(name, options))
    print(harness.markdown(record), flush=True)
    if not options.quick:
        paths = harness.write(record, page=getattr(module, "PAGE", None))
        for path in (*paths, *summary.write(find())):
            _say(f"wrote {path}")


def _say(text: str) -> None:
    print(f"benchmarks: {text}", file=sys.stderr)


def _command(name: str, options: argparse.Namespace) -> str:
    command = f"python -m benchmarks.run {name}"
    if options.bundle != BUNDLE and name in OF_A_BUNDLE:
        # Figures are published: where a bundle lies on this disk is nobody's business.
        shown = options.bundle.name if options.bundle.is_absolute() else options.bundle
        command += f" --bundle {shown}"
    if options.cuts and name in ("power_cuts", "outbox_cuts"):
        command += f" --cuts {options.cuts}"
    if options.minutes and name == "soak":
        command += f" --minutes {options.minutes}"
    return command + (" --quick" if options.quick else "")


if __name__ == "__main__":
    sys.exit(main())
