"""The documents: every block is run or says what it needs, links lead somewhere, pages are fresh.

CONTRIBUTING.md says how a block is marked. A new block without a mark fails here.
"""

import argparse
import ast
import contextlib
import functools
import importlib
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import tomllib

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


HERE = "tests/test_docs.py"
ENGINE = f"{HERE}::test_an_engine_is_added_and_keeps_the_contract"
DEGRADATION = f"{HERE}::test_a_degradation_is_added_and_keeps_the_rules"
FAMILY = f"{HERE}::test_a_model_family_goes_through_both_dialects"
RECIPE = f"{HERE}::test_a_recipe_on_a_page_is_valid"
README = f"{HERE}::test_the_readme_s_python_runs"
PHOTOS = f"{HERE}::test_the_python_of_the_degradations_page_runs"
LOOP = f"{HERE}::test_the_loop_of_the_slots_page_runs"
RUN_HERE = (ENGINE, DEGRADATION, FAMILY, RECIPE, README, PHOTOS, LOOP)

SHOWN = {"text", "json", "csv", "ini", "nginx", "mermaid"}
"""Languages of blocks that nobody is asked to run."""
COMMANDS = {"sh", "cron"}
RUN = COMMANDS | {"python", "toml", "diff"}
"""Languages of blocks that somebody will copy: each must have a mark."""

FENCE = re.compile(
    r"^(?P<mark><!--[^\n]*-->\n)?```(?P<language>[^\n]*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
MARK = re.compile(r"<!-- (?P<how>run|alike): (?P<test>\S+::\w+)(?: as (?P<file>\S+))? -->\n")


class Block(NamedTuple):
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    how: str
    """``run``: a test takes it from the page; ``alike``: a test does the like; else empty."""
    test: str
    file: str
    """Where a walk-through writes it."""

    @property
    def needs(self) -> str:
        """What this machine need not have, as the block's first line tells the reader."""
        found = re.match(r"# needs: (.+)\n", self.text)
        return found[1] if found else ""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@functools.cache
def blocks() -> tuple[Block, ...]:
    """Every fenced block of every page, in order."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in FENCE.finditer(text):
            line = text.count("\n", 0, match.start("language")) + 1
            mark = MARK.fullmatch(match["mark"] or "")
            how, test, file = mark.groups(default="") if mark else ("", "", "")
            found.append(Block(page, line, match["language"], match["text"], how, test, file))
    return tuple(found)


def marked(test: str) -> list[Block]:
    """The blocks that ``test`` of this file has to run."""
    return [block for block in blocks() if (block.how, block.test) == ("run", test)]


@functools.cache
def named_tests(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


# --- marks


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_block_is_indented_or_left_open(page: Path) -> None:
    """None could hide from the tests below."""
    text = page.read_text()
    assert len(re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE)) == 2 * len(FENCE.findall(text))


@pytest.mark.parametrize("block", blocks(), ids=str)
def test_a_block_is_run_or_says_what_it_needs(block: Block) -> None:
    assert block.language in SHOWN | RUN, f"{block}: say a language, of {sorted(SHOWN | RUN)}"
    if block.language in RUN:
        assert bool(block.test) != bool(block.needs), (
            f"{block}: mark it as CONTRIBUTING.md says: run, alike, or needs"
        )
    if block.test:
        file, name = block.test.split("::")
        assert name in named_tests(file), f"{block}: there is no {block.test}"
        assert name.startswith("test_")
        if block.how == "run" and file != HERE:
            assert block.page.name in (ROOT / file).read_text(), f"{file} does not read {block}"
    if block.how == "run" and block.test.startswith(HERE):
        assert block.test in RUN_HERE, f"{block} is run by nobody"


def test_contributing_says_how_to_mark() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for mark in ("`<!-- run: ", "`<!-- alike: ", "`# needs: "):
        assert mark in text


# --- commands


class Understood(BaseException):
    """The words were parsed; no FieldfitError, so that no command takes it for one."""


MAKE = re.compile(r"^([a-z0-9-]+):.*##", re.MULTILINE)
PROGRAMS = {
    "train": "train.__main__",
    "calibration": "calibration.__main__",
    "export": "export.__main__",
    "runtime": "runtime.__main__",
    "benchmarks.run": "benchmarks.run",
    "tests.arm64": "tests.arm64.__main__",
}
OTHERS = {"pytest", "venv"}
"""Modules that are not ours."""
STAND_INS = {"N": "1", "PERCENT": "10", "T": "24h", "HOST:PORT": "127.0.0.1:1", "...": "x"}
"""For placeholders that are more than text."""


class Command(NamedTuple):
    """One command of a page."""

    where: str
    words: tuple[str, ...]
    whole: bool
    """False for one in a sentence, where required words may be left out."""


def commands() -> Iterator[Command]:
    """Those of ours in every block of commands and in every sentence."""
    for block in blocks():
        if block.language in COMMANDS and block.test != ENGINE:
            for line in lines_of(block):
                yield Command(str(block), tuple(shlex.split(line, comments=True)), True)
    for page in PAGES:
        if page.name == "CHANGELOG.md":  # it tells of former versions
            continue
        for code in re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text())):
            if code.startswith(("fieldfit ", "python -m ", "make ", "torchrun ")):
                yield Command(page.name, tuple(shlex.split(code)), False)


def lines_of(block: Block) -> list[str]:
    """Lines of a block of commands, without comments, each on one line; cron's without times."""
    text = block.text.replace("\\\n", " ")
    if block.language == "cron":
        text = re.sub(r"^(\S+\s+){5}", "", text, flags=re.MULTILINE)
    lines = [part for line in text.splitlines() for part in re.split(r" && ", line)]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def module_and_words(command: Command) -> tuple[str, list[str]] | None:
    """Which of our programs it starts and with what; None if it is another's."""
    words = [word for word in command.words if word != "sudo"]
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        del words[0]
    if words[:1] == ["fieldfit"]:
        return "runtime", words[1:]
    if words[:1] in (["python"], ["torchrun"]) and "-m" in words:
        module, *rest = words[words.index("-m") + 1 :]
        return module, rest
    return None


def complaint(module: str, words: list[str], whole: bool) -> str:
    """What argparse says of them; empty if it takes them."""

    parse = argparse.ArgumentParser.parse_args

    def only_parse(self: argparse.ArgumentParser, *arguments: Any) -> None:
        parse(self, *arguments)
        raise Understood

    main = importlib.import_module(PROGRAMS[module]).main
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            try:
                main([STAND_INS.get(word, word) for word in words])
            except Understood:
                return ""
            except SystemExit as end:
                if end.code == 0:  # --help
                    return ""
    error = said.getvalue().strip().rpartition("error: ")[2]
    return "" if not whole and "required" in error else error


def test_every_command_of_ours_is_one_that_the_program_takes() -> None:
    wrong, seen = [], 0
    for command in commands():
        found = module_and_words(command)
        if found is None or found[0] in OTHERS:
            continue
        seen += 1
        if found[0] not in PROGRAMS:
            wrong.append(f"{command.where}: no program {found[0]}")
        elif said := complaint(*found, command.whole):
            wrong.append(f"{command.where}: {' '.join(command.words)}: {said}")
    assert wrong == []
    assert seen > 80


def test_other_commands_are_make_s_targets_and_extras_of_ours() -> None:
    targets = set(MAKE.findall((ROOT / "Makefile").read_text()))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for command in commands():
        for word in command.words[1:] if command.words[:1] == ("make",) else ():
            assert word in targets or "=" in word or word.isupper(), f"{command.where}: {word}"
        for word in command.words:
            if extra := re.fullmatch(r"fieldfit\[([\w,-]+)\]", word):
                assert set(extra[1].split(",")) <= set(project["optional-dependencies"]), word


def test_a_block_that_is_only_like_a_test_has_no_foreign_command() -> None:
    for block in blocks():
        if block.how == "alike":
            for line in lines_of(block):
                words = shlex.split(line, comments=True)
                ours = module_and_words(Command(str(block), tuple(words), True)) is not None
                assert ours or words[0] in ("make", ".ci/run"), f"{block}: {line}"


# --- blocks that are run here


@pytest.mark.parametrize("block", marked(RECIPE), ids=str)
def test_a_recipe_on_a_page_is_valid(block: Block) -> None:
    """Whole, or with the tables around it that the page does not show."""
    from runtime.recipe import parse_recipe

    text = block.text
    text = text if re.search(r"^name = ", text, re.MULTILINE) else f'name = "x"\n{text}'
    text = text if "[data]" in text else f'{text}\n[data]\nsource = "clean"\n'
    assert parse_recipe(text, str(block)).name


def test_an_engine_is_added_and_keeps_the_contract(tmp_path: Path) -> None:
    """Block after block, in a copy of the tree."""
    from tests.model_zips import model_zip

    tree = tmp_path / "tree"
    for room in ("runtime", "calibration", "train", "export", "tests"):
        shutil.copytree(ROOT / room, tree / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    (tree / "build" / "solar").mkdir(parents=True)
    model_zip(tmp_path, "1").rename(tree / "build" / "solar" / "bundle")
    said = ""
    for block in marked(ENGINE):
        if block.language == "text":
            assert block.text.rstrip() in said
        elif block.file:
            assert not (tree / block.file).exists()
            (tree / block.file).write_text(block.text)
        elif block.language == "diff":
            apply(block, tree)
        else:
            for line in lines_of(block):
                said = run(line, tree)
                assert "SKIPPED" not in said
    assert said


def test_a_degradation_is_added_and_keeps_the_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As written, but that pytest's own tests are called here: their start costs seconds."""
    import train
    from train import degradations

    (tmp_path / "train").mkdir()
    copy = Path(shutil.copy(degradations.__file__, tmp_path / "train"))
    for block in marked(DEGRADATION):
        apply(block, tmp_path)
    more = load(copy)
    (name,) = set(more.DEGRADATIONS) - set(degradations.DEGRADATIONS)
    monkeypatch.setitem(sys.modules, "train.degradations", more)
    monkeypatch.setattr(train, "degradations", more)
    rules = load(ROOT / "tests" / "test_degradations.py")
    assert name in rules.NAMES
    for image in (rules.cell(), rules.portrait()):
        rules.test_each_severity_changes_more_than_the_one_below(name, image)
    for shape in ((24, 40, 1), (40, 24, 3), (9, 9, 1)):
        rules.test_a_picture_depends_on_its_own_seed_alone(name, shape)
    rules.test_another_seed_is_another_picture(name)


def test_a_model_family_goes_through_both_dialects(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As written, but that pytest's own tests are called here: their start costs seconds."""
    from calibration import onnxruntime_dialect, tensorrt_dialect
    from tests import test_calibration_families as families

    code, output, line = marked(FAMILY)
    (tmp_path / "page.py").write_text(code.text)
    load(tmp_path / "page.py")
    assert capsys.readouterr().out == output.text
    (tmp_path / "tests").mkdir()
    copy = Path(shutil.copy(families.__file__, tmp_path / "tests"))
    apply(line, tmp_path)
    more = load(copy).FAMILIES
    (name,) = set(more) - set(families.FAMILIES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.FAMILIES, name, more[name])
        families.test_every_layer_of_a_real_network_is_an_integer_kernel(name)
        families.test_the_first_kernel_reads_bytes(name)
        for dialect in (tensorrt_dialect, onnxruntime_dialect):
            families.test_a_real_network_keeps_its_meaning(name, dialect)


def test_the_python_of_the_degradations_page_runs(tmp_path: Path) -> None:
    """On the images and seeds that it speaks of."""
    (block,) = marked(PHOTOS)
    given = "import torch\nimages = torch.full((2, 32, 48, 3), 200, dtype=torch.uint8)\n"
    (tmp_path / "page.py").write_text(f"{given}seeds = torch.arange(2)\n{block.text}")
    page = load(tmp_path / "page.py")
    assert page.dark.shape == page.photos.shape == page.images.shape
    assert page.dark.max() < 100


def test_the_loop_of_the_slots_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device with one bundle, and a camera of two frames."""
    from runtime.delivery.slots import Slots
    from tests.model_zips import frames, model_zip

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    slots = Slots(tmp_path / "state")
    slots.activate(slots.stage(model_zip(tmp_path, "1")).sha256)
    slots.begin_try()
    slots.commit()
    (block,) = marked(LOOP)
    text = block.text.replace("/var/lib/fieldfit", str(tmp_path / "state"))
    given = "from tests.model_zips import frames\ncamera = frames(2)\n"
    (tmp_path / "page.py").write_text(given + text)
    page = load(tmp_path / "page.py")
    assert len(page.camera) == len(frames(2))
    assert (page.answer.version, page.answer.label in "abcd") == ("1", True)


def load(file: Path) -> ModuleType:
    """Run a file as a module that nothing else imports."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def apply(block: Block, tree: Path) -> None:
    done = subprocess.run(
        ["git", "apply", "--recount", "-"], input=block.text, cwd=tree, text=True,
        capture_output=True, check=False, env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tree)},
    )  # fmt: skip
    assert done.returncode == 0, f"{block}: {done.stderr}"


def run(line: str, tree: Path) -> str:
    """What a command of a walk-through prints."""
    program, *words = shlex.split(line, comments=True)
    words = {"python": words, "fieldfit": ["-m", "runtime", *words]}[program]
    done = subprocess.run(
        [sys.executable, *words], cwd=tree, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(tree), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
    return done.stdout


def test_the_readme_s_python_runs(quick: Path, tmp_path: Path) -> None:
    """As written, in a folder where the bundle is where the README says."""
    (block,) = marked(README)
    shutil.copytree(quick / "build" / "quick", tmp_path / "build" / "solar")
    done = subprocess.run(
        [sys.executable, "-c", block.text], capture_output=True, text=True, cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "onnxruntime CPU, int8-cpu" in done.stdout


# --- pages that are made from the code


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    return load(ROOT / "docs" / "generate.py")


MADE = (
    "docs/recipe.md", "docs/commands.md", "docs/doctor.md", "docs/degradations.md",
    "docs/rooms.svg", "README.md", "benchmarks/README.md", "benchmarks/results/README.md",
)  # fmt: skip


@pytest.mark.parametrize("page", MADE)
def test_generated_pages_are_fresh(generate: ModuleType, page: str) -> None:
    assert (ROOT / page).read_text() == generate.PAGES[page](), "stale: run `make docs`"


def test_no_page_is_made_unwatched(generate: ModuleType) -> None:
    assert set(MADE) == set(generate.PAGES)


def test_every_verb_has_its_help_on_the_page_of_commands() -> None:
    page = (ROOT / "docs" / "commands.md").read_text()
    verbs = re.findall(
        r"^    ([a-z]+)", page.partition("## fieldfit\n")[2].partition("```\n\n")[0], re.MULTILINE
    )
    assert len(verbs) >= 16
    for verb in verbs:
        assert re.search(rf"^## fieldfit {verb}\b", page, re.MULTILINE), verb


# --- links


@functools.cache
def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    text = FENCE.sub("", page.read_text())
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        found.add(slug if slug not in found else f"{slug}-1")
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    targets = re.findall(r"\]\(([^)\s]+)", text)
    targets += re.findall(r"^\[[^\]]+\]: (\S+)", text, re.MULTILINE)
    targets += re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
    for target in targets:
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        there = page.parent / file if file else page
        assert there.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(there), f"{page.name}: no heading for {target}"


def test_a_named_reference_is_given() -> None:
    """``[words][name]`` without its ``[name]: address`` would be shown as it is written."""
    for page in PAGES:
        text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))
        named = {name.lower() for name in re.findall(r"\]\[([^\]]+)\]", text)}
        given = {name.lower() for name in re.findall(r"^\[([^\]]+)\]: ", text, re.MULTILINE)}
        assert named == given, page.name


def test_the_index_leads_to_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    linked = {(ROOT / "docs" / target).resolve() for target in re.findall(r"\]\(([^)#\s]+)", index)}
    for page in sorted((ROOT / "docs").glob("*.md")):
        assert page.name == "README.md" or page in linked, f"docs/README.md: {page.name}"


# --- what pages say of the code


def test_the_architecture_names_every_contract_and_only_files_that_exist() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for contract in project["tool"]["importlinter"]["contracts"]:
        assert f"| {contract['name']} |" in page.replace("\\|", "|"), contract["name"]
    for room, table in re.findall(
        r"\| files of `(\w+)/` \| question \|\n(.*?)\n\n", page, re.DOTALL
    ):
        for row in table.splitlines()[1:]:
            files, folder = row.split(" | ")[0], ROOT / room
            for name in re.findall(r"`([^`]+)`", files):
                file = name if name.endswith("/") else f"{name}.py"
                found = [place / file for place in (folder, ROOT / room)]
                assert any(path.exists() for path in found), f"{room}: {name}"
                if name.endswith("/") and folder == ROOT / room:
                    folder /= name


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
