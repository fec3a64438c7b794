"""Pages that are made from the code are fresh, links lead somewhere, and the README's code runs."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks/README.md"])


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "page",
    ["docs/recipe.md", "docs/commands.md", "docs/doctor.md", "docs/degradations.md", "README.md"],
)
def test_generated_pages_are_fresh(generate: ModuleType, page: str) -> None:
    assert (ROOT / page).read_text() == generate.PAGES[page](), "stale: run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_s_python_runs(quick: Path, tmp_path: Path) -> None:
    """As written, in a folder where the bundle is where the README says."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    shutil.copytree(quick / "build" / "quick", tmp_path / "build" / "solar")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "onnxruntime CPU, int8-cpu" in done.stdout


def test_the_readme_s_recipe_is_valid() -> None:
    from runtime.recipe import parse_recipe

    (text,) = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert parse_recipe(text, "README.md").name == "line3"


def test_shipped_recipes_are_valid_and_told_of() -> None:
    from runtime.recipe import load_recipe

    readme = (ROOT / "README.md").read_text()
    for path in sorted((ROOT / "train" / "recipes").glob("*.toml")):
        assert load_recipe(path).name == path.stem
        assert f"train/recipes/{path.name}" in readme


def test_make_explains_itself_and_its_targets_are_phony() -> None:
    """Folders are called train, export, calibration: without .PHONY make would do nothing."""
    if shutil.which("make") is None:
        pytest.skip("no make here: apt install make")
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z0-9-]+):.*##", makefile, re.MULTILINE)
    (phony,) = re.findall(r"^\.PHONY: (.*)", makefile, re.MULTILINE)
    assert set(targets) == set(phony.split())
    for target in targets:
        assert f"make {target}" in shown
    planned = subprocess.run(
        ["make", "-n", "train", "export"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert 'python -m train "train/recipes/solar.toml"' in planned
    assert 'python -m export "train/recipes/solar.toml"' in planned


def test_the_locks_name_no_index() -> None:
    for lock in (ROOT / "requirements").glob("*.txt"):
        text = lock.read_text()
        assert "--hash=sha256:" in text
        assert not re.search(r"https?://|--index|--find-links|file:", text), lock
