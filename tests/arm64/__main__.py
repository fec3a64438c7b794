"""Run a real bundle on aarch64, and compare every answer with this machine's: `make test-arm64`.

Exit code 0: everything holds. 1: something differs. 77: no aarch64 machine can be had here; the
sentence says why. 2: wrong usage.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from runtime import Bundle, FieldfitError, atomic
from runtime.manifest import encode
from tests.arm64 import judge, machine
from tests.arm64.judge import Check

ROOT = Path(__file__).resolve().parent.parent.parent
LOCK = ROOT / "requirements" / "device.txt"
DEVICE = Path(__file__).with_name("device.py")
QUICK = ROOT / "train" / "recipes" / "quick.toml"
PAGE = ROOT / "docs" / "arm64.md"
BEGIN, END = "<!-- begin measured: make test-arm64 ARM64=--record -->", "<!-- end measured -->"
SKIPPED = 77


def main(argv: list[str] | None = None) -> int:
    """Make the machine, run every check there, and return the exit code."""
    options = _parser().parse_args(argv)
    host = machine.look_at_host()
    try:
        if options.install:
            machine.install_host_packages(host, _say)
            host = machine.look_at_host()
        if reason := machine.impossible(host):
            raise machine.ImpossibleError(reason)
        options.cache.mkdir(parents=True, exist_ok=True)
        with (options.cache / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return _run(options, host)
    except machine.ImpossibleError as error:
        print(f"SKIPPED: no aarch64 machine here: {error}")
        return SKIPPED
    except (machine.FailedError, FieldfitError) as error:
        print(f"test-arm64: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.arm64", description=__doc__)
    parser.add_argument(
        "--bundle", type=Path, help="default build/solar/bundle, or else the quick recipe's"
    )
    parser.add_argument(
        "--cache", type=Path, default=ROOT / "build" / "arm64", help="default build/arm64"
    )
    parser.add_argument("--fresh", action="store_true", help="make the machine anew")
    parser.add_argument(
        "--install",
        action="store_true",
        help="on Debian as root: install debootstrap and qemu-user-static, register the emulator",
    )
    parser.add_argument("--record", action="store_true", help="write the table to docs/arm64.md")
    return parser


def _run(options: argparse.Namespace, host: machine.Host) -> int:
    start = time.monotonic()
    bundle = options.bundle or _own_bundle(options.cache, fresh=options.fresh)
    device, made = machine.make(options.cache.resolve(), LOCK, host, fresh=options.fresh, say=_say)
    _say(f"{'made' if made else 'found'} the machine; installing fieldfit's wheel there")
    for old in device.exchange.iterdir():
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    machine.install_wheel(device, _wheel(device.exchange / "dist"))
    _say(f"running {bundle} there")
    report = _trial(device, bundle, native=machine.native(host))
    report["seconds"] = {
        "making the machine": int((device.home / "seconds").read_text()),
        "made in this run": made,
        "this run": round(time.monotonic() - start),
    }
    _show(report)
    atomic.write_text(options.cache / "report.json", json.dumps(report, indent=1) + "\n")
    if options.record:
        record(PAGE, report)
    return 0 if report["passed"] else 1


def _own_bundle(cache: Path, *, fresh: bool) -> Path:
    """The default recipe's bundle if it was exported, otherwise one of the quick recipe."""
    solar = ROOT / "build" / "solar" / "bundle"
    if solar.is_dir():
        return solar
    quick = cache / "build" / "quick" / "bundle"
    if fresh or not quick.is_dir():
        _say("no build/solar/bundle: training and exporting the quick recipe")
        for room in ("train", "export"):
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            command = [sys.executable, "-m", room, str(QUICK)]
            subprocess.run(command, cwd=cache, env=environment, check=True, stdout=sys.stderr)
    return quick


def _wheel(out: Path) -> Path:
    """fieldfit's wheel, built from this tree into ``out``."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir"]
    done = subprocess.run([*command, out, ROOT], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise machine.FailedError(f"the wheel cannot be built: {done.stdout[-1000:]}{done.stderr}")
    (wheel,) = out.glob("*.whl")
    return wheel


def _trial(device: machine.Machine, bundle: Path, *, native: bool) -> dict[str, Any]:
    """Everything that is asked of the machine, and what it answered."""
    opened = Bundle.open(bundle)
    golden = opened.golden()
    inside, out = device.inside, device.exchange / "out"
    out.mkdir()
    shutil.copytree(bundle, device.exchange / "bundle")
    shutil.copytree(bundle.parent / "samples", device.exchange / "samples")
    spoil(opened, device.exchange / "spoiled")
    shutil.copy(DEVICE, device.exchange)

    verified = device.fieldfit("verify", f"{inside}/bundle", "--json")
    spoiled = device.fieldfit("verify", f"{inside}/spoiled", "--json")
    doctor = device.fieldfit("doctor", f"{inside}/bundle", "--json")
    classify = ("classify", f"{inside}/bundle", f"{inside}/samples", "--json")
    classified = device.fieldfit(*classify, "--form", "int8-cpu")
    device.must(device.python, f"{inside}/{DEVICE.name}", f"{inside}/bundle", f"{inside}/out")
    facts = json.loads((out / "facts.json").read_text())
    got = _load(out / "logits.npz")
    expected = {form: golden[f"logits.{form}"] for form in got} if native else _here(bundle)
    rows = [judge.compare(form, expected[form], got[form]) for form in got]
    checks = [
        _base_install(facts),
        _verified(verified),
        _refused(spoiled),
        _doctor(doctor),
        _classified(classified, bundle),
        *(Check(f"logits of {row.form}", row.passed, judge.reason(row)) for row in rows),
    ]
    return {
        "bundle": f"{opened.manifest.name} {opened.manifest.version}",
        "bundle_digest": opened.manifest.digest,
        "golden_images": len(golden["images"]),
        "machine": {
            "kind": "native" if native else "emulated",
            "emulator": "" if native else machine.emulator(),
            **{name: facts[name] for name in ("machine", "system", "python", "onnxruntime")},
        },
        "compared_with": "golden logits of the bundle" if native else "this machine, x86_64",
        "base_install_bytes": {
            name: size
            for name, size in facts["bytes"].items()
            if name in judge.base_distributions(LOCK.read_text())
        },
        "import_runtime_loads": facts["loaded"],
        "rows": [{**row._asdict(), "passed": row.passed} for row in rows],
        "table": judge.table(rows),
        "checks": [check._asdict() for check in checks],
        "passed": all(check.passed for check in checks),
    }


def spoil(bundle: Bundle, folder: Path) -> None:
    """Write ``bundle`` to ``folder`` with the classes of int8-cpu's golden logits exchanged.

    Every digest is right, as if the form's kernels were wrong: only the replay can find it.
    """
    folder.mkdir()
    golden = bundle.golden()
    golden["logits.int8-cpu"] = np.roll(golden["logits.int8-cpu"], 1, axis=1)
    entries = []
    for entry in bundle.manifest.files:
        path = folder / entry.name
        path.write_bytes(bundle.read(entry.name))
        if entry.name == bundle.manifest.golden:
            np.savez(path, **golden)  # type: ignore[arg-type]
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        entries.append(msgspec.structs.replace(entry, sha256=digest, size=len(data)))
    manifest = msgspec.structs.replace(bundle.manifest, files=tuple(entries))
    (folder / "manifest.json").write_bytes(encode(manifest))


def _here(bundle: Path) -> dict[str, np.ndarray]:
    """The logits of each form on this machine, by the same script."""
    with tempfile.TemporaryDirectory() as out:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(DEVICE), str(bundle), out]
        subprocess.run(command, env=environment, check=True)
        return _load(Path(out) / "logits.npz")


def _load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _base_install(facts: dict[str, Any]) -> Check:
    stray = judge.beyond_base(facts["loaded"], LOCK.read_text())
    base = {owner.lower() for owner in facts["loaded"].values()}
    reason = f"import runtime loads {', '.join(sorted(base))}, and nothing beyond the base install"
    if stray:
        reason = f"import runtime loads {', '.join(stray)}, not of the base install"
    return Check("import runtime", not stray, reason)


def _verified(done: "subprocess.CompletedProcess[str]") -> Check:
    name = "fieldfit verify"
    if done.returncode != 0:
        return Check(name, False, f"exit code {done.returncode}: {done.stdout}{done.stderr}")
    steps = json.loads(done.stdout)["selftests"]
    told = "; ".join(f"{step['form']}: {step['reason']}" for step in steps)
    return Check(name, all(step["accepted"] for step in steps), told)


def _refused(done: "subprocess.CompletedProcess[str]") -> Check:
    name = "fieldfit verify, tampered bundle"
    if done.returncode != 1 or not done.stdout:
        return Check(name, False, f"expected exit code 1, got {done.returncode}: {done.stderr}")
    steps = {step["form"]: step for step in json.loads(done.stdout)["selftests"]}
    failed = [form for form, step in steps.items() if not step["accepted"]]
    return Check(name, failed == ["int8-cpu"], f"exit code 1, {steps['int8-cpu']['reason']}")


def _doctor(done: "subprocess.CompletedProcess[str]") -> Check:
    name = "fieldfit doctor"
    if done.returncode != 0:
        return Check(name, False, f"exit code {done.returncode}: {done.stdout}{done.stderr}")
    report = json.loads(done.stdout)
    here, engine = report["machine"], report["bundle"]["engine"]
    told = (
        f"{here['architecture']}, {here['cpu']}, {', '.join(here['int8_instructions'])}; {engine}"
    )
    return Check(name, here["architecture"] == "aarch64" and engine != "none", told)


def _classified(done: "subprocess.CompletedProcess[str]", bundle: Path) -> Check:
    name = "fieldfit classify"
    if done.returncode != 0:
        return Check(name, False, f"exit code {done.returncode}: {done.stdout}{done.stderr}")
    command = [sys.executable, "-m", "runtime", "classify", str(bundle)]
    command += [str(bundle.parent / "samples"), "--json", "--form", "int8-cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    here = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    expected, got = _lines(here.stdout), _lines(done.stdout)
    reason = judge.different(expected, got)
    return Check(name, not reason, reason or f"{len(got)} samples are answered as on this machine")


def _lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def _show(report: dict[str, Any]) -> None:
    where = report["machine"]
    print(f"{where['system']}, {where['machine']} ({where['kind']} {where['emulator']})".rstrip())
    print(f"Python {where['python']}, onnxruntime {where['onnxruntime']}")
    print(f"{report['bundle']}, {report['golden_images']} golden images")
    for check in report["checks"]:
        print(f"{'ok  ' if check['passed'] else 'FAIL'} {check['name']}: {check['reason']}")
    print(*report["table"], sep="\n")
    print(f"base install: {_install_size(report)}")
    seconds = report["seconds"]
    made = "made in this run" if seconds["made in this run"] else "kept from an earlier run"
    print(f"{seconds['this run']} s; the machine took {seconds['making the machine']} s, {made}")


def _install_size(report: dict[str, Any]) -> str:
    sizes: dict[str, int] = dict(report["base_install_bytes"])
    largest = sorted(sizes, key=sizes.__getitem__, reverse=True)
    parts = ", ".join(f"{name} {sizes[name] / 1e6:.1f}" for name in largest)
    return f"{sum(sizes.values()) / 1e6:.0f} MB ({parts})"


def record(page: Path, report: dict[str, Any]) -> None:
    """Put what was measured between the marks of ``page``."""
    before, mark, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise machine.FailedError(f"{page}: expected the marks {BEGIN} and {END}")
    where, seconds = report["machine"], report["seconds"]
    lines = [
        f"{where['system']} for {where['machine']} ({where['emulator'] or 'native'}), Python "
        f"{where['python']}, onnxruntime {where['onnxruntime']}. Bundle `{report['bundle']}`, "
        f"digest `{report['bundle_digest'][:12]}`, {report['golden_images']} golden images, "
        f"compared with {report['compared_with']}.",
        "",
        *report["table"],
        "",
        *(
            f"- {'ok' if c['passed'] else 'FAIL'}: {c['name']}: {c['reason']}"
            for c in report["checks"]
        ),
        f"- Base install: {_install_size(report)}.",
        f"- Making the machine took {seconds['making the machine']} s, and this run "
        f"{seconds['this run']} s with the machine "
        f"{'made in it' if seconds['made in this run'] else 'made before'}.",
    ]
    atomic.write_text(page, "\n".join([before + mark, "", *lines, "", END + after]))


def _say(line: str) -> None:
    print(f"test-arm64: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
