"""Plans are kept whole, under everything they are bound to, and every miss says why.

The plans here are a header and noise: what is in them is not the cache's business. Damage to a real
TensorRT-RTX plan is in ``test_plan_cache_damage.py``.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.engines.plan_cache import (
    Plan,
    PlanCache,
    PlanKey,
    Value,
    cache_folder,
    difference,
    supersedes,
)
from runtime.private_files import Lock
from tests.mounts import mounting
from tests.plan_files import KEY, NOBODY, changed, keep, make_plan, never

ROOT = Path(__file__).resolve().parent.parent


def found(cache: PlanCache, key: PlanKey = KEY) -> bytes:
    plan = cache.find(key)
    assert isinstance(plan, Plan), plan
    return plan.plan


def why(cache: PlanCache, key: PlanKey = KEY) -> str:
    reason = cache.find(key)
    assert isinstance(reason, str)
    assert reason
    assert "\n" not in reason
    return reason


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in (folder / "plans").iterdir())


@pytest.fixture
def cache(tmp_path: Path) -> PlanCache:
    return PlanCache(tmp_path / "cache")


def again(cache: PlanCache) -> PlanCache:
    """As another process would open it."""
    return PlanCache(cache.folder)


# --- keeping and finding


def test_what_was_kept_is_found_by_another_process_with_its_record(cache: PlanCache) -> None:
    plan = make_plan()
    assert cache.find(KEY) == "no plan yet"
    notes: dict[str, Value] = {"milliseconds": 1.25, "memory": "mapped", "graph": True, "calls": 3}
    reason = cache.keep(
        KEY, plan, seconds=301.5, typing="weak", attempts=["strong: no kernel"], notes=notes
    )
    assert reason == ""
    kept = again(cache).find(KEY)
    assert isinstance(kept, Plan)
    assert kept.plan == plan
    record = kept.record
    assert record.key == KEY
    assert (record.sha256, record.size) == (hashlib.sha256(plan).hexdigest(), len(plan))
    assert (record.seconds, record.typing) == (301.5, "weak")
    assert (record.attempts, record.notes) == (["strong: no kernel"], notes)
    assert record.built.endswith("Z")
    assert again(cache).entries() == [record]


def test_only_this_user_may_enter_and_names_are_digests(cache: PlanCache) -> None:
    assert cache.folder is not None
    keep(cache, changed(form="../../../etc/passwd"))
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    assert (cache.folder / "plans").stat().st_mode & 0o777 == 0o700
    key = changed(form="../../../etc/passwd").digest
    digest = hashlib.sha256(make_plan()).hexdigest()[:16]
    assert names(cache.folder) == [f"{key}-{digest}.plan", f"{key}.json"]


PARTS: list[tuple[dict[str, Any], str]] = [
    ({"version": "10.13.3.9"}, "built by TensorRT 10.3.0.30, this is TensorRT 10.13.3.9"),
    (
        {"flavour": "tensorrt-rtx", "version": "1.7.1.116"},
        "built by TensorRT 10.3.0.30, this is TensorRT-RTX 1.7.1.116",
    ),
    ({"gpu": "8.9"}, "built for compute capability 8.7, this is 8.9"),
    (
        {"platform": "linux-aarch64 L4T R36.5.0"},
        "built on linux-aarch64 L4T R36.4.3, this is linux-aarch64 L4T R36.5.0",
    ),
    (
        {"cuda": "12.6, driver 13.0"},
        "built with CUDA 12.6, driver 12.6, this is 12.6, driver 13.0",
    ),
    (
        {"options": {"batch": [1, 1, 32], "level": 3, "workspace": "half"}},
        "built with batch [1, 1, 8], asked for is [1, 1, 32]; with typing auto, asked for is "
        "unsaid; with workspace unsaid, asked for is half",
    ),
    (
        {"version": "10.13.3.9", "gpu": "8.9"},
        "built by TensorRT 10.3.0.30, this is TensorRT 10.13.3.9; for compute capability 8.7, "
        "this is 8.9",
    ),
    ({"model_sha256": "34cd" * 16}, "no plan yet"),
    ({"form": "fp16"}, "no plan yet"),
]


@pytest.mark.parametrize(("parts", "sentence"), PARTS)
def test_every_part_of_the_key_counts_and_is_named(
    cache: PlanCache, parts: dict[str, Any], sentence: str
) -> None:
    keep(cache)
    assert why(cache, changed(**parts)) == sentence


def test_the_sentence_compares_with_the_newest_plan_of_the_model(cache: PlanCache) -> None:
    keep(cache, changed(options={"level": 1}))
    keep(cache, changed(options={"level": 2}))
    assert cache.folder is not None
    older = cache.folder / "plans" / f"{changed(options={'level': 1}).digest}.json"
    reseal(older, {"built": "2020-01-01T00:00:00Z"})
    asked = changed(options={"level": 5})
    assert why(cache, asked) == "built with level 2, asked for is 5"


def test_the_order_of_options_makes_no_other_key() -> None:
    turned = changed(options=dict(reversed(KEY.options.items())))
    assert turned.digest == KEY.digest
    assert changed(options={**KEY.options, "level": "3"}).digest != KEY.digest


def test_a_difference_names_the_model_as_well() -> None:
    other = changed(model_sha256="34cd" * 16, form="fp16")
    assert difference(KEY, other) == (
        "built from the model 12ab12ab12ab, this is 34cd34cd34cd; from its form int8, this is fp16"
    )


@pytest.mark.parametrize("version", ["10.3.0", "10.3.0.30", "10.3.0.post1"])
def test_a_library_that_reports_a_shorter_version_keeps_its_plans(
    cache: PlanCache, version: str
) -> None:
    key = changed(version=version)
    assert keep(cache, key, make_plan("10.3.0.30")) == ""
    assert found(cache, key) == make_plan("10.3.0.30")


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (make_plan("10.13.3.9"), "the plan is by TensorRT 10.13.3.9, this is TensorRT 10.3.0.30"),
        (
            b"vtrt" + bytes(12) + (28).to_bytes(8, "little") + bytes([10, 3, 0, 30]),
            "the plan is by TensorRT-RTX 10.3.0.30, this is TensorRT 10.3.0.30",
        ),
        (b"\x08\x0a an ONNX file", "expected a TensorRT plan"),
        (b"", "expected a TensorRT plan"),
    ],
)
def test_a_plan_that_is_not_the_keys_is_not_kept(
    cache: PlanCache, plan: bytes, sentence: str
) -> None:
    reason = cache.keep(KEY, plan, seconds=1, typing="strong")
    assert reason.startswith(sentence)
    assert cache.find(KEY) == "no plan yet"


# --- what stays and what goes


def test_an_old_plan_stays_until_the_new_one_was_proven_and_kept(cache: PlanCache) -> None:
    keep(cache)
    new = changed(version="10.13.3.9", platform="linux-aarch64 L4T R38.2.0", cuda="13.0")
    assert isinstance(cache.find(new), str)  # now it is built, and replays the golden samples
    assert found(again(cache)) == make_plan()
    assert keep(cache, new) == ""
    assert [record.key for record in cache.entries()] == [new]
    assert len(names(cache.folder or Path())) == 2
    assert why(again(cache)) == difference(new, KEY)


@pytest.mark.parametrize(
    "parts",
    [
        {"options": {"level": 5}},
        {"gpu": "8.9"},
        {"form": "fp16"},
        {"model_sha256": "34cd" * 16},
    ],
)
def test_plans_that_another_program_may_want_stay(cache: PlanCache, parts: dict[str, Any]) -> None:
    keep(cache)
    keep(cache, changed(**parts))
    assert not supersedes(changed(**parts), KEY)
    assert found(again(cache)) == make_plan()


def test_building_again_under_the_same_key_replaces_the_plan(cache: PlanCache) -> None:
    keep(cache)
    newer = make_plan(seed=1)
    assert keep(cache, plan=newer) == ""
    assert found(again(cache)) == newer
    assert len(names(cache.folder or Path())) == 2
    assert keep(cache, plan=newer) == ""  # the very same bytes, as TensorRT-RTX builds them
    assert found(again(cache)) == newer


def test_beyond_the_limit_the_plan_that_was_not_used_for_longest_goes(tmp_path: Path) -> None:
    keys = [changed(form=form) for form in ("a", "b", "c", "d")]
    for age, key in enumerate(keys[:3]):
        keep(PlanCache(tmp_path), key, make_plan(size=20_000))
        os.utime(tmp_path / "plans" / f"{key.digest}.json", (1000 + age, 1000 + age))
    found(PlanCache(tmp_path), keys[0])  # the oldest, but used just now
    room = PlanCache(tmp_path).size() + 10_000
    keep(PlanCache(tmp_path, limit_bytes=room), keys[3], make_plan(size=20_000))
    assert {record.key.form for record in PlanCache(tmp_path).entries()} == {"a", "c", "d"}
    assert PlanCache(tmp_path).size() <= room


def test_a_plan_in_use_is_never_removed(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path, limit_bytes=30_000)
    keep(cache, plan=make_plan(size=20_000))
    other = changed(form="fp16")
    keep(cache, other, make_plan(size=20_000))
    assert len(cache.entries()) == 2
    keep(PlanCache(tmp_path, limit_bytes=30_000), changed(form="c"), make_plan(size=20_000))
    assert [record.key.form for record in cache.entries()] == ["c"]


def test_a_plan_larger_than_the_limit_is_not_kept(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path, limit_bytes=1000)
    assert keep(cache) == "the plan: expected at most 1,000 bytes, got 2,000"
    keep(PlanCache(tmp_path))
    assert "expected at most 1,000 bytes, got 2,000" in why(cache)


def test_a_removed_plan_is_gone(cache: PlanCache) -> None:
    assert cache.remove(KEY) == ""
    keep(cache)
    keep(cache, changed(form="fp16"))
    assert cache.remove(KEY) == ""
    assert cache.find(KEY) == "no plan yet"
    assert found(cache, changed(form="fp16"))
    assert cache.size() == sum(
        file.stat().st_size for file in (cache.folder or Path()).rglob("*.*")
    )


# --- damage


def reseal(record: Path, changes: dict[str, Any]) -> None:
    """Change a record as somebody would who knows how its digest is made."""
    content = msgspec.json.decode(record.read_bytes())["record"]
    body = msgspec.json.encode({**content, **changes})
    sealed = {"record": msgspec.Raw(body), "sha256": hashlib.sha256(body).hexdigest()}
    record.write_bytes(msgspec.json.encode(sealed))


@pytest.fixture(scope="module")
def kept() -> Iterator[tuple[PlanCache, Path, Path]]:
    """A cache with one plan, the plan's file and the record's; tests put them right again."""
    with tempfile.TemporaryDirectory() as folder:
        cache = PlanCache(Path(folder))
        keep(cache, plan=make_plan(size=400))
        (plan,) = Path(folder).glob("plans/*.plan")
        (record,) = Path(folder).glob("plans/*.json")
        yield cache, plan, record


@given(data=st.data(), in_plan=st.booleans())
def test_one_changed_byte_never_hands_out_anything_changed(
    kept: tuple[PlanCache, Path, Path], data: st.DataObject, in_plan: bool
) -> None:
    cache, plan, record = kept
    file = plan if in_plan else record
    good = file.read_bytes()
    before = cache.find(KEY)
    assert isinstance(before, Plan)
    place = data.draw(st.integers(0, len(good) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda byte: byte != good[place]))
    try:
        file.write_bytes(good[:place] + bytes([byte]) + good[place + 1 :])
        after = cache.find(KEY)
    finally:
        file.write_bytes(good)
    assert after == before or isinstance(after, str)
    if in_plan:
        assert "damaged" in str(after)


def test_no_bit_of_a_record_can_turn_unseen(kept: tuple[PlanCache, Path, Path]) -> None:
    cache, _, record = kept
    before, good = cache.find(KEY), record.read_bytes()
    try:
        for place in range(len(good)):
            record.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
            after = cache.find(KEY)
            assert isinstance(after, str), good[place - 9 : place + 1]
    finally:
        record.write_bytes(good)
    assert cache.find(KEY) == before


@given(length=st.integers(0, 10_000))
def test_a_shortened_record_is_refused(kept: tuple[PlanCache, Path, Path], length: int) -> None:
    cache, _, record = kept
    good = record.read_bytes()
    try:
        record.write_bytes(good[: length % len(good)])
        assert "the record is damaged" in why(cache)
    finally:
        record.write_bytes(good)


@pytest.mark.parametrize(
    "content",
    [
        b"{}",
        b'{"record":' + b"[" * 100_000,
        b'{"sha256":"\xff","record":{}}',
        b'{"record":{},"sha256":""}',
        b'{"record":"\xff","sha256":"' + b"0" * 64 + b'"}',
        b"\x80\x04K\x01.",
    ],
)
def test_a_record_that_is_none_is_refused(cache: PlanCache, content: bytes) -> None:
    keep(cache)
    (record,) = (cache.folder or Path()).glob("plans/*.json")
    record.write_bytes(content)
    assert "the record is damaged" in why(cache)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": 2}, "of another version: Invalid enum value 2 - at `$.format`"),
        ({"sha256": "../" * 21 + "x"}, "damaged or of another version"),
        ({"size": 10**18}, "damaged: expected 1,000,000,000,000,000,000 bytes"),
        ({"sha256": "0" * 64}, "0000000000000000.plan: expected beside its record, got none"),
    ],
)
def test_a_record_of_another_kind_is_refused(
    cache: PlanCache, changes: dict[str, Any], sentence: str
) -> None:
    keep(cache)
    (record,) = (cache.folder or Path()).glob("plans/*.json")
    reseal(record, changes)
    assert sentence in why(cache)


def test_a_plan_from_another_machine_is_refused_under_our_name(tmp_path: Path) -> None:
    ours, theirs = PlanCache(tmp_path / "ours"), PlanCache(tmp_path / "theirs")
    keep(ours)
    (tmp_path / "ours/plans" / f"{KEY.digest}.json").unlink()
    other = changed(gpu="11.0")
    keep(theirs, other)
    for file in (tmp_path / "theirs/plans").iterdir():
        shutil.copy(file, tmp_path / "ours/plans" / file.name.replace(other.digest, KEY.digest))
    assert why(ours) == (
        "not made by this cache for this machine: built for compute capability 11.0, this is 8.7"
    )


def test_a_version_in_the_header_that_is_not_the_keys_is_refused(
    cache: PlanCache, tmp_path: Path
) -> None:
    """Both digests are right: somebody put a plan and its record there."""
    keep(cache)
    (record,) = (cache.folder or Path()).glob("plans/*.json")
    plan = make_plan("10.13.3.9")
    digest = hashlib.sha256(plan).hexdigest()
    reseal(record, {"sha256": digest, "size": len(plan)})
    (record.parent / f"{KEY.digest}-{digest[:16]}.plan").write_bytes(plan)
    assert why(cache) == "the plan is by TensorRT 10.13.3.9, this is TensorRT 10.3.0.30"


def test_after_every_refusal_a_new_plan_takes_the_place(cache: PlanCache) -> None:
    keep(cache)
    (plan,) = (cache.folder or Path()).glob("plans/*.plan")
    (record,) = (cache.folder or Path()).glob("plans/*.json")
    for file in (plan, record):
        for spoil in (Path.unlink, empty, turn_into_pipe):
            spoil(file)
            assert isinstance(again(cache).find(KEY), str)
            assert keep(again(cache)) == ""
            assert found(again(cache)) == make_plan()
            assert len(names(cache.folder or Path())) == 2


def empty(file: Path) -> None:
    file.write_bytes(b"")


def turn_into_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def test_what_is_not_ours_stays_in_the_folder_and_nothing_is_in_its_way(cache: PlanCache) -> None:
    keep(cache)
    place = (cache.folder or Path()) / "plans"
    (place / "README").write_text("notes of the integrator")
    (place / f"{'0' * 32}.plan").mkdir()  # has the form of our names, but cannot be unlinked
    assert keep(again(cache), changed(form="fp16")) == ""
    assert found(again(cache)) == make_plan()
    assert (place / "README").exists()


def test_what_killed_processes_left_goes_with_the_next_plan_but_not_what_is_being_made(
    cache: PlanCache,
) -> None:
    keep(cache)
    place = (cache.folder or Path()) / "plans"
    dead, alive = changed(form="dead"), changed(form="alive")
    for key in (dead, alive):
        (place / f"{key.digest}-{'0' * 16}.plan").write_bytes(make_plan())
        (place / f".{key.digest}.json.a1b2c3d4").write_bytes(b"")
    with cache.lock(alive, never):
        keep(again(cache), changed(form="fp16"))
        left = {name.strip(".")[:32] for name in names(cache.folder or Path())}
        assert left == {KEY.digest, changed(form="fp16").digest, alive.digest}
        assert len(list(place.glob(f"*{alive.digest}*"))) == 3
    keep(again(cache))
    assert len(names(cache.folder or Path())) == 4


# --- the folder


def test_without_a_folder_everything_says_so(tmp_path: Path) -> None:
    cache = PlanCache(None)
    sentence = "there is no cache folder; set FIELDFIT_CACHE to one"
    assert cache.find(KEY) == sentence
    assert keep(cache) == sentence
    assert cache.keep_timing("tensorrt", "10.3.0.30", "8.7", b"x") == sentence
    assert cache.remove(KEY) == sentence
    assert cache.writable() == sentence
    assert cache.timing("tensorrt", "10.3.0.30", "8.7") == b""
    assert (cache.entries(), cache.size()) == ([], 0)
    with cache.lock(KEY, never) as unlocked:
        assert unlocked == sentence


@pytest.mark.parametrize("place", ["cache", "cache/plans"])
def test_a_file_in_the_folders_place_is_named(tmp_path: Path, place: str) -> None:
    cache = PlanCache(tmp_path / "cache")
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("")
    sentence = f"{tmp_path / place}: expected a folder, got a file"
    assert cache.writable() == sentence
    assert keep(cache) == sentence
    assert why(cache) in (sentence, f"{tmp_path / place}: Not a directory")
    with cache.lock(KEY, never) as unlocked:
        assert unlocked == sentence


def test_the_folder_is_where_the_user_or_the_desktop_says(tmp_path: Path) -> None:
    home = Path.home() / ".cache" / "fieldfit"
    assert cache_folder({"FIELDFIT_CACHE": "/a", "XDG_CACHE_HOME": "/b"}) == Path("/a")
    assert cache_folder({"XDG_CACHE_HOME": "/b"}) == Path("/b/fieldfit")
    assert cache_folder({"XDG_CACHE_HOME": "not/absolute"}) == home
    assert cache_folder({"FIELDFIT_CACHE": ""}) == home


def test_the_default_is_a_cache_in_that_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIELDFIT_CACHE", str(tmp_path / "here"))
    assert PlanCache.default().writable() == ""
    assert PlanCache.default().folder == tmp_path / "here"
    assert names(tmp_path / "here") == []


@pytest.mark.parametrize("part", ["*.plan", "*.json", ""])
def test_what_others_can_write_is_refused(cache: PlanCache, part: str) -> None:
    keep(cache)
    place = (cache.folder or Path()) / "plans"
    (target,) = place.glob(part) if part else (place,)
    target.chmod(0o770)
    assert f"{target}: others can write it (mode 770)" in why(cache)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")
@pytest.mark.parametrize("part", ["*.plan", "*.json", ""])
def test_what_another_user_owns_is_refused(cache: PlanCache, part: str) -> None:
    keep(cache)
    place = (cache.folder or Path()) / "plans"
    (target,) = place.glob(part) if part else (place,)
    os.chown(target, NOBODY, NOBODY)
    assert f"{target}: owned by another user (uid {NOBODY})" in why(cache)
    if not part:
        assert "owned by another user" in keep(cache)


# --- other processes

SCRIPT = """
import os, random, sys, tempfile  # while nobody has become nobody, who may not look for modules
from pathlib import Path
from runtime.engines.plan_cache import Plan, PlanCache
from runtime.private_files import Lock
from tests.plan_files import KEY, become_nobody, changed, keep, make_plan
folder = Path(sys.argv[1])
cache = PlanCache(folder)
"""


@contextlib.contextmanager
def start(code: str, folder: Path, *before: str) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        [*before, sys.executable, "-c", SCRIPT + code, str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()  # after a failed assertion it may wait for another one's lock


def run(code: str, folder: Path, *before: str) -> list[str]:
    """The lines that ``code`` prints in a process of its own."""
    with start(code, folder, *before) as process:
        out, err = process.communicate()
        assert process.returncode == 0, err
        return out.splitlines()


BUILD_ONCE = """
def waiting(pid):
    print("waits for", pid, flush=True)
with cache.lock(KEY, waiting) as unlocked:
    found = cache.find(KEY)
    if isinstance(found, Plan):
        print("found", len(found.plan))
    else:
        print("builds:", found, flush=True)
        sys.stdin.readline()
        print("kept", cache.keep(KEY, make_plan(), seconds=1, typing="strong"))
"""


def test_of_two_processes_one_builds_and_the_other_waits_and_finds(tmp_path: Path) -> None:
    with start(BUILD_ONCE, tmp_path) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "builds: no plan yet\n"
        with start(BUILD_ONCE, tmp_path) as second:
            assert second.stdout is not None
            assert second.stdout.readline() == f"waits for {first.pid}\n"
            assert first.communicate("go on\n") == ("kept \n", "")
            assert second.communicate() == (f"found {len(make_plan())}\n", "")
    assert len(names(tmp_path)) == 2  # no lock is left behind


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    with start(BUILD_ONCE, tmp_path) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "builds: no plan yet\n"
        with start(BUILD_ONCE, tmp_path) as second:
            assert second.stdout is not None
            assert second.stdout.readline() == f"waits for {first.pid}\n"
            first.kill()
            assert second.stdout.readline() == "builds: no plan yet\n"
            assert second.communicate("go on\n") == ("kept \n", "")


@pytest.mark.parametrize("renewed", [False, True])
def test_a_lock_whose_file_was_removed_before_it_was_locked_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renewed: bool
) -> None:
    path = tmp_path / "a.lock"
    flock = fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        path.unlink()
        if renewed:
            path.touch()
        flock(descriptor, operation)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", late)
        assert Lock.attempt(path) is None
    with contextlib.closing(Lock.acquire(path, never)):
        assert Lock.attempt(path) is None


def test_removing_a_plan_leaves_the_lock_to_its_holder(cache: PlanCache) -> None:
    keep(cache)
    with cache.lock(KEY, never):
        assert cache.remove(KEY) == ""
        assert names(cache.folder or Path()) == [f"{KEY.digest}.lock"]
    assert names(cache.folder or Path()) == []


def test_other_keys_are_not_locked(cache: PlanCache) -> None:
    with cache.lock(KEY, never) as first, cache.lock(changed(gpu="1"), never) as second:
        assert (first, second) == ("", "")


EACH_STEP = """
for step in range(1000):
    pid = os.fork()
    if pid == 0:
        left = [step]
        def die(event, arguments):
            if event.partition(".")[0] in ("open", "os", "tempfile", "fcntl"):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
        sys.addaudithook(die)
        keep(cache, plan=make_plan(seed=step + 1))
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    found = PlanCache(folder).find(KEY)
    whole = [make_plan(seed=seed) for seed in range(step + 2)]
    print(code, whole.index(found.plan) if isinstance(found, Plan) else found)
    if code == 0:
        break
"""


def test_a_process_that_dies_at_any_step_leaves_the_old_plan_or_the_new_one(
    tmp_path: Path,
) -> None:
    keep(PlanCache(tmp_path))
    steps = [line.split(maxsplit=1) for line in run(EACH_STEP, tmp_path)]
    assert [code for code, _ in steps] == ["9"] * (len(steps) - 1) + ["0"]
    assert len(steps) > 20
    current = 0
    for step, (_, seen) in enumerate(steps):
        assert int(seen) in (current, step + 1)
        current = int(seen)
    assert current == len(steps)
    assert len(names(tmp_path)) == 2  # the last one cleaned up after all the others


KILLS = """
import signal, time
dice = random.Random(5)
for kill in range(30):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        while True:
            plan = make_plan(size=200_000, seed=dice.randrange(1000))
            os.write(write, b".")
            keep(PlanCache(folder), plan=plan)
    os.read(read, 1)
    time.sleep(dice.uniform(0, 0.02))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(read), os.close(write)
    found = PlanCache(folder).find(KEY)
    whole = found if isinstance(found, str) else len(found.plan)
    print(whole)
keep(cache)
"""


def test_thirty_killed_writers_leave_whole_plans(tmp_path: Path) -> None:
    keep(PlanCache(tmp_path), plan=make_plan(size=200_000))
    assert run(KILLS, tmp_path) == ["200000"] * 30
    assert found(PlanCache(tmp_path)) == make_plan()
    assert len(names(tmp_path)) == 2


# --- disks that are full, read-only, or not ours

AS_NOBODY = "become_nobody()"
ANSWERS = """
print(cache.writable())
print(keep(cache))
with cache.lock(KEY, print) as unlocked:
    print(unlocked)
print(cache.find(KEY) if isinstance(cache.find(KEY), str) else "found")
"""


@contextlib.contextmanager
def public_folder() -> Iterator[Path]:
    """Not under pytest's own folder, which nobody else may enter."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_a_folder_that_may_not_be_written_is_a_sentence_and_its_plans_are_found() -> None:
    with public_folder() as folder:
        keep(PlanCache(folder))
        (folder / "plans").chmod(0o555)
        sentence = f"{folder}: Permission denied"
        assert run(AS_NOBODY + ANSWERS, folder) == [sentence, sentence, sentence, "found"]
        (folder / "plans").chmod(0o700)


def test_a_folder_that_may_not_be_read_is_a_sentence() -> None:
    with public_folder() as folder:
        keep(PlanCache(folder))
        (folder / "plans").chmod(0o000)
        sentence = f"{folder}: Permission denied"
        assert run(AS_NOBODY + ANSWERS, folder) == [sentence] * 4
        (folder / "plans").chmod(0o700)


def test_a_folder_that_may_not_be_made_is_a_sentence() -> None:
    with public_folder() as folder:
        folder.chmod(0o555)
        sentence = f"{folder / 'new'}: Permission denied"
        assert run(AS_NOBODY + ANSWERS, folder / "new") == [sentence] * 3 + ["no plan yet"]


def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    before = mounting(f"mount -t tmpfs -o size=64k,mode=700 none {tmp_path}")
    code = """
keep(cache)
print(cache.keep(changed(form="fp16"), make_plan(size=200_000), seconds=1, typing="strong"))
print(len(list((folder / "plans").iterdir())), type(cache.find(KEY)).__name__)
(folder / "rest").write_bytes(bytes(4096))
try:
    while True:
        with (folder / "rest").open("ab") as rest:
            rest.write(bytes(4096))
except OSError:
    print(cache.writable())
print(cache.keep(KEY, make_plan(seed=1), seconds=1, typing="strong"))
print(len(list((folder / "plans").iterdir())), cache.find(KEY).plan == make_plan())
"""
    sentence = f"{tmp_path}: No space left on device"
    expected = [sentence, "2 Plan", sentence, sentence, "2 True"]
    assert run(code, tmp_path, *before) == expected


def test_a_read_only_disk_is_a_sentence_and_its_plans_are_found(tmp_path: Path) -> None:
    keep(PlanCache(tmp_path))
    before = mounting(
        f"mount --bind {tmp_path} {tmp_path} && mount -o remount,ro,bind {tmp_path} {tmp_path}"
    )
    sentence = f"{tmp_path}: Read-only file system"
    assert run(ANSWERS, tmp_path, *before) == [sentence, sentence, sentence, "found"]


# --- the builder's timing cache


def test_timings_are_kept_by_library_and_gpu(cache: PlanCache) -> None:
    assert cache.timing("tensorrt", "10.3.0.30", "8.7") == b""
    assert cache.keep_timing("tensorrt", "10.3.0.30", "8.7", b"timings") == ""
    assert again(cache).timing("tensorrt", "10.3.0.30", "8.7") == b"timings"
    assert cache.timing("tensorrt", "10.3.0.30", "8.9") == b""
    assert cache.timing("tensorrt", "10.13.3.9", "8.7") == b""
    assert cache.timing("tensorrt-rtx", "10.3.0.30", "8.7") == b""
    keep(cache)
    assert again(cache).timing("tensorrt", "10.3.0.30", "8.7") == b"timings"


def test_damaged_timings_are_none(cache: PlanCache) -> None:
    cache.keep_timing("tensorrt", "10.3.0.30", "8.7", b"timings")
    (file,) = (cache.folder or Path()).glob("plans/*.timing")
    good = file.read_bytes()
    for bad in (b"", good[:-1], good[:31], good[:-1] + b"x", b"x" + good[1:], good + b"x"):
        file.write_bytes(bad)
        assert cache.timing("tensorrt", "10.3.0.30", "8.7") == b""


def test_timings_that_nobody_uses_make_room_for_plans(tmp_path: Path) -> None:
    PlanCache(tmp_path).keep_timing("tensorrt", "10.3.0.30", "8.7", bytes(20_000))
    keep(PlanCache(tmp_path, limit_bytes=20_000), plan=make_plan(size=10_000))
    assert PlanCache(tmp_path).timing("tensorrt", "10.3.0.30", "8.7") == b""
    assert found(PlanCache(tmp_path)) == make_plan(size=10_000)
