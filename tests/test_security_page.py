"""docs/security.md promises nothing without a proof that exists."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "security.md").read_text()
PROOF = re.compile(r"`(tests/\w+\.py)::(\w+)`")
PROMISES = PAGE.partition("## What is promised")[2].partition("## What is the integrator")[0]


@functools.cache
def named_tests(file: str) -> set[str]:
    """Names of the tests that pytest would collect from the file's top level."""
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("file", "test"), sorted(set(PROOF.findall(PAGE))))
def test_a_proof_that_is_named_exists(file: str, test: str) -> None:
    assert test.startswith("test_")
    assert test in named_tests(file)


def test_every_promise_has_a_proof() -> None:
    rows = [line for line in PROMISES.splitlines() if line.startswith("| ")]
    promises = [row for row in rows if not row.startswith(("| attack or accident", "| ---"))]
    assert len(promises) >= 30
    for promise in promises:
        assert promise.count("|") == 4, promise
        assert PROOF.search(promise.split("|")[3]), promise


def test_files_that_are_named_exist() -> None:
    named = set(re.findall(r"`((?:runtime|docs|export)/[\w/.-]+)`", PAGE))
    assert named
    for file in named:
        assert (ROOT / file).is_file(), file
