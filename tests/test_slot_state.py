"""The state machine of the slots: what each step does, what it refuses, and any order of them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from runtime.delivery import slot_state
from runtime.delivery.slot_state import (
    KEPT_FAILURES,
    TRIES,
    Failure,
    Refusal,
    Release,
    State,
    version_key,
)
from runtime.errors import UpdateError

DATE = "2026-01-01T00:00:00+00:00"


def release(version: str, variant: int = 0) -> Release:
    name = f"{version_key(version)}{variant}".encode().hex()[-64:].rjust(64, "0")
    return Release(sha256=name, name="small", version=version, manifest="0" * 64)


A, B, C = release("1.0.0"), release("1.1.0"), release("2.0.0")


def took(after: State | Refusal) -> State:
    assert isinstance(after, State), after
    return after


def refused(after: State | Refusal) -> str:
    assert isinstance(after, Refusal), after
    return after.reason


def committed(*releases: Release) -> State:
    state = State()
    for one in releases:
        state = slot_state.begin_try(took(slot_state.activate(state, one)), DATE)
        state = took(slot_state.commit(state))
    return state


# --- one step


def test_a_slot_is_tried_and_then_committed_and_the_one_before_stays_at_hand() -> None:
    state = took(slot_state.activate(committed(A), B))
    assert state.current == A
    state = took(slot_state.commit(slot_state.begin_try(state, DATE), B.sha256))
    assert (state.current, state.previous, state.pending, state.floor) == (B, A, None, "1.1.0")
    assert state.in_use() == {A.sha256, B.sha256}


def test_nothing_is_committed_that_was_not_tried() -> None:
    assert "not tried yet" in refused(slot_state.commit(took(slot_state.activate(State(), A))))


def test_tries_are_spent_before_they_begin_and_then_the_trial_has_failed() -> None:
    state = took(slot_state.activate(committed(A), B))
    for left in (2, 1, 0):
        state = slot_state.begin_try(state, DATE)
        assert state.pending
        assert state.pending.tries == left
    state = slot_state.begin_try(state, DATE)
    assert (state.current, state.pending) == (A, None)
    failure = state.failure(B.sha256)
    assert failure
    assert failure.reason.startswith("3 tries ended without an answer")
    assert slot_state.begin_try(state, DATE) is state


def test_a_rollback_gives_up_the_trial_or_else_the_current_slot() -> None:
    state = took(slot_state.activate(committed(A, B), C))
    state = took(slot_state.rollback(state, "NaN", DATE))
    assert (state.current, state.previous, state.pending) == (B, A, None)
    state = took(slot_state.rollback(state, "drops good cells", DATE))
    assert (state.current, state.previous) == (A, None)
    assert [failure.reason for failure in state.failures] == ["NaN", "drops good cells"]
    assert "no slot before it" in refused(slot_state.rollback(state, "again", DATE))
    assert "no slot is current" in refused(slot_state.rollback(State(), "again", DATE))


def test_what_was_given_up_is_tried_again_only_if_asked_for() -> None:
    state = took(slot_state.rollback(committed(A, B), "drops good cells", DATE))
    assert f"given up on {DATE}: drops good cells" in refused(slot_state.activate(state, B))
    state = took(slot_state.activate(state, B, again=True))
    state = took(slot_state.commit(slot_state.begin_try(state, DATE)))
    assert (state.current, state.failures) == (B, ())


def test_a_step_that_names_its_slot_may_be_said_twice_and_goes_one_step_only() -> None:
    state = took(slot_state.activate(committed(A, B), C))
    assert slot_state.activate(state, C) is state
    given_up = took(slot_state.rollback(state, "bad", DATE, C.sha256))
    assert slot_state.rollback(given_up, "bad", DATE, C.sha256) is given_up
    state = took(slot_state.commit(slot_state.begin_try(state, DATE), C.sha256))
    assert slot_state.commit(state, C.sha256) is state
    assert slot_state.activate(state, C) is state


def test_a_step_that_names_another_slot_is_refused() -> None:
    state = slot_state.begin_try(took(slot_state.activate(committed(A, B), C)), DATE)
    assert "2.0.0" in refused(slot_state.commit(state, A.sha256))
    assert "neither current nor on trial" in refused(
        slot_state.rollback(state, "bad", DATE, A.sha256)
    )
    assert "no slot is on trial" in refused(slot_state.commit(committed(A)))


def test_activating_the_current_slot_ends_the_trial_of_another() -> None:
    state = took(slot_state.activate(committed(A), B))
    assert took(slot_state.activate(state, A)).pending is None


def test_nothing_older_than_the_highest_committed_version_is_taken() -> None:
    state = took(slot_state.rollback(committed(A, C), "bad", DATE))
    assert "older than 2.0.0" in refused(slot_state.activate(state, B))
    state = took(slot_state.activate(state, B, allow_lower=True))
    state = took(slot_state.commit(slot_state.begin_try(state, DATE)))
    assert (state.current, state.floor) == (B, "2.0.0")


def test_the_floor_rises_by_the_value_of_the_numbers() -> None:
    assert committed(release("1.9.0"), release("1.10.0")).floor == "1.10.0"


def test_the_slot_before_that_fails_a_trial_of_its_own_is_no_way_back_any_more() -> None:
    state = took(slot_state.activate(committed(A, B), A, allow_lower=True))
    state = took(slot_state.rollback(state, "bad", DATE))
    assert (state.current, state.previous, state.pending) == (B, None, None)


def test_every_step_that_changes_the_state_is_counted() -> None:
    first = took(slot_state.activate(State(), A))
    assert (first.generation, slot_state.begin_try(first, DATE).generation) == (1, 2)


def test_a_damaged_slot_gives_way_to_the_one_before_and_is_not_barred() -> None:
    state = slot_state.damaged(committed(A, B), B.sha256, "a byte flipped", DATE)
    assert (state.current, state.previous) == (A, None)
    assert state.failure(B.sha256) == Failure(
        release=B, reason="a byte flipped", date=DATE, damaged=True
    )
    took(slot_state.activate(state, B))


def test_the_slot_before_that_is_on_trial_again_just_answers_once_the_current_one_is_damaged() -> (
    None
):
    state = took(slot_state.activate(committed(A, B), A, allow_lower=True))
    state = slot_state.damaged(state, B.sha256, "a byte flipped", DATE)
    assert (state.current, state.previous, state.pending) == (A, None, None)


def test_a_damaged_slot_with_none_before_it_stays_current() -> None:
    state = committed(A)
    assert slot_state.damaged(state, A.sha256, "a byte flipped", DATE) is state
    assert slot_state.damaged(state, C.sha256, "a byte flipped", DATE) is state


def test_only_the_last_failures_are_kept() -> None:
    state = State()
    for number in range(KEPT_FAILURES + 3):
        state = took(slot_state.activate(state, release(f"1.{number}.0")))
        state = took(slot_state.rollback(state, "bad", DATE))
    kept = [failure.release.version for failure in state.failures]
    assert kept == [f"1.{number}.0" for number in range(3, KEPT_FAILURES + 3)]


@pytest.mark.parametrize(
    "versions",
    [
        ("0.9", "1.0-rc1", "1.0-rc2", "1.0-rc10", "1.0", "1.0.1", "1.2", "1.10", "2.0.0", "10.0"),
        ("anything", "0.0.1"),
    ],
)
def test_versions_are_ordered_by_the_value_of_their_numbers(versions: tuple[str, ...]) -> None:
    assert sorted(set(versions), key=version_key) == list(versions)


def test_versions_that_say_the_same_are_equal() -> None:
    assert version_key("1.0") == version_key("1.0.0") == version_key("1.0.0+build7")


@given(st.lists(st.text(max_size=12), max_size=4))
def test_any_two_versions_can_be_ordered(versions: list[str]) -> None:
    assert len(sorted(versions, key=version_key)) == len(versions)


# --- its file


def test_a_state_file_that_a_newer_fieldfit_wrote_is_not_taken_for_damage() -> None:
    data = slot_state.encode(committed(A)).replace(b'"format": 1', b'"format": 2')
    with pytest.raises(UpdateError, match="format 2 is newer than 1"):
        slot_state.decode(data)


def test_no_flipped_bit_of_a_state_file_goes_unnoticed() -> None:
    state = took(slot_state.rollback(committed(A, B, C), "bad", DATE))
    data = slot_state.encode(state)
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            try:
                found = slot_state.decode(bytes(flipped))
            except UpdateError:
                continue  # a newer format
            assert isinstance(found, str) or found == state, (position, bit)


def test_a_state_file_that_is_cut_short_is_damaged() -> None:
    data = slot_state.encode(committed(A))
    for length in range(len(data) - 1):
        assert isinstance(slot_state.decode(data[:length]), str)


# --- any order of steps

RELEASES = [release("1.0.0"), release("1.0.0", 1), release("1.1.0"), release("2.0.0")]
some_release = st.sampled_from(RELEASES)


class AnyOrder(RuleBasedStateMachine):
    """Steps in any order, against what a person would write on a sheet of paper."""

    def __init__(self) -> None:
        super().__init__()
        self.state = State()
        self.answering: list[Release] = []
        """The current slot first, and the one before it."""
        self.trial: Release | None = None
        self.begun = 0
        self.bad: set[str] = set()
        self.highest = ""

    @rule(one=some_release, lower=st.booleans(), again=st.booleans())
    def activate(self, one: Release, lower: bool, again: bool) -> None:
        after = slot_state.activate(self.state, one, allow_lower=lower, again=again)
        if self.answering[:1] == [one]:
            self.trial = None
        elif self.trial != one:
            old = self.highest and version_key(one.version) < version_key(self.highest)
            if (old and not lower) or (one.sha256 in self.bad and not again):
                refused(after)
                return
            self.trial, self.begun = one, 0
        self.state = took(after)

    @rule()
    def begin_try(self) -> None:
        self.state = slot_state.begin_try(self.state, DATE)
        if self.trial and self.begun == TRIES:
            self.give_up(self.trial, bad=True)
        elif self.trial:
            self.begun += 1

    @rule(named=st.none() | some_release)
    def commit(self, named: Release | None) -> None:
        after = slot_state.commit(self.state, named.sha256 if named else None)
        if self.trial and named in (None, self.trial):
            if not self.begun:
                refused(after)
                return
            self.answering = [self.trial, *self.answering[:1]]
            self.bad.discard(self.trial.sha256)
            self.highest = max(self.highest, self.trial.version, key=version_key)
            self.trial = None
        elif not named or [named] != self.answering[:1]:
            refused(after)
            return
        self.state = took(after)

    @rule(named=st.none() | some_release)
    def rollback(self, named: Release | None) -> None:
        after = slot_state.rollback(self.state, "bad", DATE, named.sha256 if named else None)
        target = named or self.trial or next(iter(self.answering), None)
        has_one_before = [target] == self.answering[:1] and len(self.answering) == 2
        if target and (target == self.trial or has_one_before):
            self.give_up(target, bad=True)
        elif not named or [named] == self.answering[:1] or not self.state.failure(named.sha256):
            refused(after)
            return
        self.state = took(after)

    @rule(one=some_release)
    def damage(self, one: Release) -> None:
        self.state = slot_state.damaged(self.state, one.sha256, "a byte flipped", DATE)
        if self.answering != [one] and (one == self.trial or one in self.answering):
            self.give_up(one, bad=False)

    def give_up(self, one: Release, *, bad: bool) -> None:
        self.answering = [other for other in self.answering if other != one]
        if self.trial in (one, *self.answering[:1]):
            self.trial = None
        (self.bad.add if bad else self.bad.discard)(one.sha256)

    @precondition(lambda self: self.state.generation)
    @rule()
    def restart(self) -> None:
        found = slot_state.decode(slot_state.encode(self.state))
        assert isinstance(found, State)
        self.state = found

    @invariant()
    def the_same_as_on_paper(self) -> None:
        state = self.state
        assert [one for one in (state.current, state.previous) if one] == self.answering
        assert (state.pending.release if state.pending else None) == self.trial
        if state.pending:
            assert state.pending.tries == TRIES - self.begun
        assert {one.sha256 for one in RELEASES if state.barred(one.sha256)} == self.bad
        assert state.floor == self.highest

    @invariant()
    def no_slot_is_both_answering_and_on_trial(self) -> None:
        state = self.state
        assert state.current is None or state.current != state.previous
        assert state.pending is None or state.pending.release != state.current


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase
