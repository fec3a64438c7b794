"""How to make this release again, and how to check that it is what it says: digests, commands."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import msgspec

from export.release import Release
from export.report.facts import Facts
from export.report.page import Section, render

DIRTY = "-dirty"
"""What git describe appends where files differ from the revision."""

ROOMS = ("train", "export")
"""That are run again, in this order."""


def make(facts: Facts) -> Section:
    """Everything that the result of ``facts`` depends on."""
    release, training = facts.release, facts.training
    body = render(
        "reproduce.html",
        release=release,
        training=training,
        dirty=bool(release.git and release.git.endswith(DIRTY)),
        again=_again(release, facts.file),
        check=_check(release, facts.recipe.build) if facts.manifest else (),
        digests=_digests(facts),
        versions={**training.versions, **release.versions},
        mixed=training.versions.items() - release.versions.items(),
        budgets=msgspec.to_builtins(release.gate),
        changed=facts.recipe.sha256 != release.recipe_sha256,
        text=facts.file.read_text(encoding="utf-8"),
    )
    lead = "What this release was made of, how to make it again, and how to check it."
    return Section("reproduce", "Reproduce", lead, body)


def _again(release: Release, recipe: Path) -> Sequence[str]:
    clean = release.git is not None and not release.git.endswith(DIRTY)
    commands = [f"git checkout {release.git}"] if clean else []
    return [*commands, *(shlex.join(["python", "-m", room, str(recipe)]) for room in ROOMS)]


def _check(release: Release, build: Path) -> Sequence[str]:
    return (
        shlex.join(["fieldfit", "verify", str(build / release.archive)]),
        shlex.join(["python", "-m", "export", "gate", str(build / "bundle")]),
    )


def _digests(facts: Facts) -> list[tuple[str, str]]:
    """SHA-256 of each thing, by what it is."""
    release = facts.release
    found = [("bundle, in its manifest", facts.manifest.digest)] if facts.manifest else []
    return [
        *found,
        ("train/checkpoint.safetensors", release.checkpoint_sha256),
        ("recipe, defaults included", release.recipe_sha256),
        ("all images, labels and splits", release.dataset_sha256),
        ("the test images, with labels", release.judged_sha256),
    ]
