"""The messages that docs/jetson.md explains are those that the code prints."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def quoted() -> list[str]:
    """The first column of the table of messages."""
    page = (ROOT / "docs" / "jetson.md").read_text()
    table = page.split("## What fieldfit says")[1].split("\n## ")[0]
    return re.findall(r"^\| `(.+?)` \|", table, re.MULTILINE)


@functools.cache
def said() -> str:
    """Every piece of text in the runtime's code, pieces that are put together as one."""
    nodes = (
        node
        for path in sorted((ROOT / "runtime").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
    )
    return "\n".join(
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


@pytest.mark.parametrize("message", quoted())
def test_an_explained_message_is_in_the_code(message: str) -> None:
    assert message in said()


def test_the_table_has_messages() -> None:
    assert len(quoted()) > 10
