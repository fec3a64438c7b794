"""Nothing that is read is run: no pickle, no eval, no shell, in any room; archives in one place.

The walker looks at the syntax of every file, so that a name in a comment is none. It is tried
itself on planted code of every kind that it is there to find.
"""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("runtime", "calibration", "train", "export")

RUNS_WHAT_IT_READS = {
    "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal",
    "shelve", "code", "codeop", "imp",
}  # fmt: skip
"""Modules that run, or can be made to run, what is in a file."""

ARCHIVES = {"zipfile", "tarfile", "shutil.unpack_archive", "gzip", "bz2", "lzma", "zlib.decompress"}
PROCESSES = {"subprocess", "multiprocessing", "pty", "os.fork", "os.posix_spawn"}

MAY_OPEN_ARCHIVES = {
    "runtime/bundle.py": "the one reader and writer of bundles: stored, flat, capped, one encoding",
    "runtime/evidence_pack.py": "the one reader and writer of packs: flat, capped, digests checked",
    "runtime/npz.py": "the one reader of golden samples: stored, and no larger than they are",
    "calibration/pipeline.py": "names the error of NumPy's reader, and opens none itself",
}
MAY_START_PROCESSES = {
    "runtime/trials.py": "libraries that may crash or hang are tried apart; fixed arguments",
    "runtime/delivery/activation.py": "a new slot is proven apart: a crash or a hang is a reason",
    "runtime/delivery/live.py": "ends the proof of a new slot when closed; starts none itself",
    "runtime/sources/camera_child.py": "a driver or decoder may crash or hang; ours, no arguments",
    "runtime/line/child.py": "brokers and PLCs must not hold the loop up; ours, fixed arguments",
    "export/pipeline.py": "asks git which commit this is; fixed arguments",
}


def found_in(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and fault of everything that must not be, wherever it is."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((node.lineno, fault) for fault in _imports(node))
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, fault) for fault in _calls(node))
        elif isinstance(node, ast.Attribute) and _name(node) in ("os.system", "os.popen"):
            yield node.lineno, f"{_name(node)} is a shell"


def _imports(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    modules = [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        yield from _from(node.module or "", modules)
        modules = [node.module or ""]
    for module in modules:
        top = module.partition(".")[0]
        if top in RUNS_WHAT_IT_READS:
            yield f"imports {top}"
        if top in ARCHIVES | PROCESSES:
            yield f"uses {top}"


def _from(module: str, names: list[str]) -> Iterator[str]:
    for name in names:
        whole = f"{module}.{name}"
        if whole in ARCHIVES | PROCESSES:
            yield f"uses {whole}"
        if whole in ("os.system", "os.popen"):
            yield f"{whole} is a shell"
        if whole in ("torch.load", "numpy.load", "importlib.import_module"):
            yield f"{whole} under a name of its own"


def _calls(node: ast.Call) -> Iterator[str]:
    name = _name(node.func)
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    if name in ("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec"):
        yield f"calls {name}"
    if name == "torch.load" and not _is(given.get("weights_only"), True):
        yield "torch.load without weights_only=True"
    if name in ("np.load", "numpy.load") and not _is(given.get("allow_pickle"), False):
        yield "np.load without allow_pickle=False"
    if name.startswith("yaml.") and name.rpartition(".")[2] in ("load", "unsafe_load", "full_load"):
        yield f"{name} makes objects"
    if not _is(given.get("shell", ast.Constant(False)), False):
        yield "shell=True"
    if name in PROCESSES or name.startswith(("os.exec", "os.spawn")):
        yield f"uses {name}"
    if name in ARCHIVES:
        yield f"uses {name}"
    if name.endswith((".read_pickle", ".to_pickle", ".unsafe_load_from_file")):
        yield f"calls {name}"


def _name(node: ast.AST) -> str:
    """``a.b.c`` of names and attributes; of what is called in between, only the end."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return ""


def _is(node: ast.AST | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def allowed(file: str, fault: str) -> bool:
    """Whether this file is named for this use."""
    what = fault.removeprefix("uses ")
    if what == fault:
        return False
    if what in ARCHIVES:
        return file in MAY_OPEN_ARCHIVES
    return file in MAY_START_PROCESSES


@functools.cache
def files() -> dict[str, ast.AST]:
    return {
        str(path.relative_to(ROOT)): ast.parse(path.read_text())
        for room in ROOMS
        for path in sorted((ROOT / room).rglob("*.py"))
    }


def test_no_file_runs_what_it_reads() -> None:
    faults = [
        f"{file}:{line}: {fault}"
        for file, tree in files().items()
        for line, fault in found_in(tree)
        if not allowed(file, fault)
    ]
    assert not faults, "\n".join(faults)


def test_every_exception_is_still_needed() -> None:
    """A file that no longer opens archives or starts processes may not keep its permission."""
    trees = files()
    for named, kind in ((MAY_OPEN_ARCHIVES, ARCHIVES), (MAY_START_PROCESSES, PROCESSES)):
        for file in named:
            uses = {fault.removeprefix("uses ") for _, fault in found_in(trees[file])}
            assert uses & kind, f"{file} needs no exception"


PLANTED = [
    ("import pickle", "imports pickle"),
    ("def f():\n    from joblib import load", "imports joblib"),
    ("import marshal as m", "imports marshal"),
    ("import torch\ntorch.load(path)", "torch.load without weights_only=True"),
    ("torch.load(path, weights_only=False)", "torch.load without weights_only=True"),
    ("torch.load(path, weights_only=chosen)", "torch.load without weights_only=True"),
    ("from torch import load", "torch.load under a name of its own"),
    ("np.load(path)", "np.load without allow_pickle=False"),
    ("numpy.load(path, allow_pickle=True)", "np.load without allow_pickle=False"),
    ("eval(text)", "calls eval"),
    ("exec(text)", "calls exec"),
    ("__import__(name)", "calls __import__"),
    ("from importlib import import_module", "importlib.import_module under a name of its own"),
    ("subprocess.run(words, shell=True)", "shell=True"),
    ("anything(words, shell=chosen)", "shell=True"),
    ("os.system(words)", "os.system is a shell"),
    ("run = os.popen", "os.popen is a shell"),
    ("from os import system", "os.system is a shell"),
    ("os.execvp(name, words)", "uses os.execvp"),
    ("import subprocess", "uses subprocess"),
    ("from multiprocessing import Pool", "uses multiprocessing"),
    ("import zipfile", "uses zipfile"),
    ("import tarfile", "uses tarfile"),
    ("zlib.decompress(data)", "uses zlib.decompress"),
    ("shutil.unpack_archive(path)", "uses shutil.unpack_archive"),
    ("yaml.load(text)", "yaml.load makes objects"),
]


@pytest.mark.parametrize(("code", "fault"), PLANTED, ids=[code for code, _ in PLANTED])
def test_the_walker_finds_what_was_planted(code: str, fault: str) -> None:
    faults = [found for _, found in found_in(ast.parse(code))]
    assert fault in faults
    assert not allowed("runtime/somewhere.py", fault)


@pytest.mark.parametrize(
    "code",
    [
        "model.eval()",
        "# import pickle, eval(x)",
        "'os.system(x)'",
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=False)",
        "re.compile(pattern)",
        "zlib.crc32(data)",
        "run(words, shell=False)",
    ],
)
def test_the_walker_leaves_alone_what_is_harmless(code: str) -> None:
    assert list(found_in(ast.parse(code))) == []
