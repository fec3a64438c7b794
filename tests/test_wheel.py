"""The wheel as a device installs it: base dependencies only, oldest and newer Pythons, no torch."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "device.txt"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a clean copy, so that nothing untracked or stale gets in."""
    source = tmp_path_factory.mktemp("source")
    for name in ("train", "calibration", "export", "runtime"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (built,) = (source / "dist").glob("*.whl")
    return built


def test_the_wheel_holds_the_four_rooms_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    rooms = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    assert rooms == {"train", "calibration", "export", "runtime"}
    assert "train/recipes/solar.toml" in names
    assert {f"runtime/line/page/{file}" for file in ("page.css", "page.js", "icon.svg")} <= set(
        names
    )
    assert not [n for n in names if n.endswith((".pyc", ".png", ".onnx", ".pth"))]
    assert any(n.endswith("licenses/LICENSE") for n in names)


def python(version: str) -> str | None:
    """An interpreter of ``version`` that runs: on PATH, or one that pyenv keeps."""
    candidates = [shutil.which(f"python{version}")]
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates += [str(p / "bin" / "python") for p in sorted(root.glob(f"{version}.*"))]
    for candidate in filter(None, candidates):
        done = subprocess.run(
            [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.stdout.strip() == version:
            return candidate
    return None


def any_python(*versions: str) -> str:
    for version in versions:
        if found := python(version):
            return found
    pytest.skip(f"no Python {' or '.join(versions)} here: install one (python{versions[0]})")


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.parametrize("versions", [("3.10",), ("3.12", "3.13")], ids=lambda v: v[0])
def test_the_base_install_runs_a_bundle_without_torch(
    wheel: Path, quick: Path, tmp_path: Path, versions: tuple[str, ...]
) -> None:
    interpreter = any_python(*versions)
    uv = [sys.executable, "-m", "uv"]
    device = tmp_path / "device"
    subprocess.run([*uv, "venv", "-q", "-p", interpreter, device], check=True)
    into = ["-q", "-p", str(device / "bin" / "python")]
    subprocess.run([*uv, "pip", "install", *into, "--require-hashes", "-r", LOCK], check=True)
    subprocess.run([*uv, "pip", "install", *into, "--no-deps", wheel], check=True)
    subprocess.run([*uv, "pip", "check", *into], check=True)

    fieldfit = str(device / "bin" / "fieldfit")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}

    def run(*arguments: object) -> str:
        done = subprocess.run(
            [*map(str, arguments)],
            capture_output=True, text=True, cwd=tmp_path, env=clean, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    build = quick / "build" / "quick"
    verified = json.loads(run(fieldfit, "verify", build / "quick-0.1.0.zip", "--json"))
    assert verified["passed"], verified
    answers = run(fieldfit, "classify", build / "bundle", build / "samples", "--json").splitlines()
    assert len(answers) == len(list((build / "samples").iterdir()))
    assert "onnxruntime" in run(fieldfit, "doctor", build / "bundle")
    run(fieldfit, "benchmark", build / "bundle", "--seconds", "0.2")
    for module in ("torch", "onnx", "rich", "timm", "safetensors"):
        code = f"import importlib.util as u; assert u.find_spec({module!r}) is None"
        run(device / "bin" / "python", "-c", code)
