"""Imports point down, and the ground floor runs where torch is not installed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "runtime": {"runtime"},
    "calibration": {"calibration", "runtime"},
    "train": {"train", "runtime"},
    "export": {"export", "train", "calibration", "runtime"},
}
TORCH = {"torch", "torchvision", "timm", "safetensors"}
MAY_USE_TORCH = {"train", "export"}
BASE = {"numpy", "PIL", "msgspec", "tqdm", "onnxruntime"}
"""What a device installs; pyproject's dependencies by their import names."""
FLEET = {"tuf", "securesystemslib", "cryptography", "urllib3", "paho"}
"""What the extras ``fleet`` and ``mqtt`` bring."""
LINE = {"cv2", "starlette", "uvicorn", "h11", "pymodbus"}
"""What the extras ``camera``, ``serve`` and ``modbus`` bring."""
LAZY = {"tensorrt", "tensorrt_rtx", "tomllib", "tomli"} | FLEET | LINE
"""What runtime may import inside a function: a device may have it."""


def imports(file: Path) -> set[str]:
    """Top-level names that a file imports anywhere, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_point_down(room: str) -> None:
    for file in sorted((ROOT / room).rglob("*.py")):
        found = imports(file)
        upward = (found & set(MAY_IMPORT)) - MAY_IMPORT[room]
        assert not upward, f"{file.relative_to(ROOT)} imports {upward}"
        if room not in MAY_USE_TORCH:
            assert not found & TORCH, f"{file.relative_to(ROOT)} imports {found & TORCH}"


def test_runtime_imports_what_a_device_has() -> None:
    allowed = BASE | LAZY | {"runtime"} | set(sys.stdlib_module_names)
    for file in sorted((ROOT / "runtime").rglob("*.py")):
        assert imports(file) <= allowed, f"{file}: {imports(file) - allowed}"


def test_the_face_imports_and_answers_with_torch_blocked(quick: Path) -> None:
    """In a process of its own, with every workstation library made unimportable."""
    blocked = sorted(TORCH | {"onnx", "onnxscript", "rich", "tensorboard", "tomli"})
    sample = next((quick / "build/quick/samples").iterdir())
    code = f"""
import sys
for name in {blocked}: sys.modules[name] = None
from runtime import Classifier
classifier = Classifier.open({str(quick / "build/quick/bundle")!r})
print(classifier({str(sample)!r}).label)
assert not any(sys.modules.get(n) for n in {blocked} + ["train", "export", "calibration"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("defective", "functional")


def test_importing_the_face_loads_no_engine_library_and_no_extra() -> None:
    names = sorted({"tensorrt", "tensorrt_rtx", "torch", "onnx"} | FLEET | LINE)
    code = f"import sys, runtime; print([n for n in {names} if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_face_is_complete_and_sorted() -> None:
    import runtime

    public = {name for name in runtime.__all__ if not name.startswith("_")}
    assert sorted(public) == [n for n in runtime.__all__ if not n.startswith("_")]
    for name in public:
        assert getattr(runtime, name).__module__.startswith("runtime.")


def test_there_are_no_rooms_beside_the_four() -> None:
    packages = {p.parent.name for p in ROOT.glob("*/__init__.py")} - {"benchmarks"}
    assert packages == set(MAY_IMPORT)
    for room in MAY_IMPORT:
        assert not list((ROOT / room).rglob("util*"))
