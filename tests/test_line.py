"""The loop of the line: every frame gets a verdict of its own, and nothing that fails stops it.

The model, the engine and the outbox are real; sources and clocks are the tests' own.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from runtime.bundle import Bundle
from runtime.classifier import Classifier
from runtime.errors import DataError, EngineError
from runtime.line.feed import Feed
from runtime.line.in_hand import InHand
from runtime.line.inspection import Inspected, Inspector, iso, ok_labels
from runtime.line.line_metrics import LineMetrics, sentence
from runtime.line.loop import Line
from runtime.line.notify import Notifier
from runtime.line.outbox import Outbox, Unkept
from runtime.line.thermal import Cooling, Heat, read_heat
from runtime.line.verdict import Finding, Verdict
from runtime.monitoring.image_quality import Flag
from runtime.preprocess import ImageLike
from runtime.sources.frame import Frame
from tests.model_zips import LABELS, frames, model_zip

PATIENCE_S = 30.0
DEVICE = "d" * 32
PICTURE = frames(101)[100]


class Clock:
    """Monotonic time that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Listed:
    """A source of given frames; it remembers what is done."""

    live, dropped = False, 0

    def __init__(self, name: str, listed: Sequence[Frame]) -> None:
        self.name, self.listed = name, listed
        self.finished: list[str] = []

    def __iter__(self) -> Iterator[Frame]:
        yield from self.listed

    def done(self, frame: Frame) -> None:
        self.finished.append(frame.id)

    def close(self) -> None:
        pass


def frame(
    number: int, image: ImageLike | None = PICTURE, source: str = "cam", **rest: Any
) -> Frame:
    return Frame(source, str(number), image, 1.0e9 + number, time.monotonic(), **rest)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_zip(tmp_path_factory.mktemp("tiny"), "1")


@pytest.fixture
def classifier(archive: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Classifier]:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with Classifier.open(archive, threads=1) as opened:
        yield opened


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    with Outbox(tmp_path / "outbox.db", DEVICE) as opened:
        yield opened


class Bench:
    """A line with what hangs on it, and what it said."""

    def __init__(self, feed: Feed, inspector: Inspector, records: Any, **rest: Any) -> None:
        in_hand = InHand(rest.pop("in_hand", None) or nameless())
        self.said: list[dict[str, Any]] = []
        self.metrics = LineMetrics()
        self.line = Line(
            feed, inspector, records, in_hand,
            say=lambda said: self.said.append(msgspec.json.decode(msgspec.json.encode(said))),
            notifier=rest.pop("notifier", Notifier()), metrics=self.metrics,
            cooling=rest.pop("cooling", Cooling()),
            read_heat=rest.pop("read_heat", lambda: Heat({}, ())), **rest,
        )  # fmt: skip

    def verdicts(self) -> list[str]:
        return [said["verdict"] for said in self.said]


def nameless() -> Path:
    """A file that is gone when its descriptor is."""
    return Path(f"/proc/self/fd/{os.memfd_create('in_hand')}")


def inspector(classifier: Any, **rest: Any) -> Inspector:
    return Inspector(classifier, boot="b", **{"ok": LABELS[:1], **rest})


def kept(outbox: Outbox) -> list[Verdict]:
    rows = outbox.unsent(1000)
    return [msgspec.json.decode(row.payload, type=Verdict) for row in rows]


# --- one frame


def test_a_label_is_ok_a_defect_or_not_known_to_the_bundle(classifier: Classifier) -> None:
    answer = classifier(PICTURE)
    for ok, word in (([answer.label], "OK"), ([x for x in LABELS if x != answer.label], "DEFECT")):
        finding = inspector(classifier, ok=ok).inspect(frame(1), 0.0).finding
        assert (finding.verdict, finding.label, finding.reason) == (word, answer.label, "")
    with pytest.raises(DataError, match=r"no label 'fine' .* it has a, b, c, d"):
        inspector(classifier, ok=["fine"])
    with pytest.raises(DataError, match=r"--ok LABEL, one or more of a, b, c, d"):
        ok_labels(classifier.bundle.manifest, ())
    said = msgspec.structs.replace(classifier.bundle.manifest, ok_labels=("b", "c"))
    assert ok_labels(said, ()) == {"b", "c"}
    assert ok_labels(said, ["a"]) == {"a"}


def test_a_finding_says_when_where_and_by_what(classifier: Classifier) -> None:
    finding, fault, seen = inspector(classifier).inspect(frame(7), 0.5)
    assert (finding.source, finding.frame, finding.time) == ("cam", "7", "2001-09-09T01:46:47.000Z")
    assert (finding.bundle, finding.version, finding.boot) == ("tiny", "1", "b")
    assert finding.engine == "onnxruntime CPU, fp32"
    assert finding.milliseconds["wait"] == 500.0
    assert {"preprocess", "infer", "look"} <= set(finding.milliseconds)
    assert fault is None
    assert seen is not None
    assert iso(0.5) == "1970-01-01T00:00:00.500Z"


def test_an_abstaining_answer_is_abstain_and_says_the_score(archive: Path) -> None:
    with Classifier.open(archive, threads=1) as opened:
        opened.bundle.manifest = msgspec.structs.replace(opened.bundle.manifest, abstain_below=1.0)
        finding = inspector(opened).inspect(frame(1), 0.0).finding
    assert finding.verdict == "ABSTAIN"
    assert finding.reason.endswith("the bundle asks for 1.000")
    assert finding.score is not None


@pytest.mark.parametrize(
    ("bad", "fault", "reason"),
    [
        (frame(1, None, fault="camera lost: no frame for 1.2 s"), "camera", "camera lost"),
        (frame(1, b"no picture"), "image", "not an image"),
        (frame(1, "gone.png"), "image", "gone.png"),
        (frame(1, np.zeros((0, 4), np.uint8)), "image", "expected an array"),
    ],
)
def test_a_frame_that_cannot_be_inspected_says_why_and_never_the_last_answer(
    classifier: Classifier, bad: Frame, fault: str, reason: str
) -> None:
    line = inspector(classifier)
    assert line.inspect(frame(0), 0.0).finding.verdict in ("OK", "DEFECT")
    inspected = line.inspect(bad, 0.0)
    assert (inspected.finding.verdict, inspected.fault) == ("NOT INSPECTED", fault)
    assert reason in inspected.finding.reason
    assert (inspected.finding.label, inspected.finding.score) == (None, None)
    assert inspected.seen is None


class Failing:
    """A model that fails as it is told, and is sound otherwise."""

    def __init__(self, classifier: Classifier) -> None:
        self.sound = classifier
        self.bundle, self.engine = classifier.bundle, classifier.engine
        self.error: Exception | None = None

    def inspect(self, image: ImageLike) -> Any:
        if self.error:
            raise self.error
        return self.sound.inspect(image)


@pytest.mark.parametrize(
    ("error", "fault"),
    [(EngineError("it fell over"), "engine"), (ZeroDivisionError("bug"), "program"),
     (MemoryError(), "program")],
)  # fmt: skip
def test_a_failing_engine_or_a_bug_is_a_verdict_too(
    classifier: Classifier, caplog: pytest.LogCaptureFixture, error: Exception, fault: str
) -> None:
    model = Failing(classifier)
    line = inspector(model)
    model.error = error
    inspected = line.inspect(frame(1), 0.0)
    assert (inspected.finding.verdict, inspected.fault) == ("NOT INSPECTED", fault)
    model.error = None
    assert line.inspect(frame(2), 0.0).finding.verdict in ("OK", "DEFECT")


def test_an_answer_that_is_no_number_is_not_inspected(classifier: Classifier) -> None:
    class Overflowing(Failing):
        def inspect(self, image: ImageLike) -> Any:
            seen = self.sound.inspect(image)
            return seen._replace(answer=msgspec.structs.replace(seen.answer, score=float("nan")))

    inspected = inspector(Overflowing(classifier)).inspect(frame(1), 0.0)
    assert (inspected.finding.verdict, inspected.fault) == ("NOT INSPECTED", "engine")


class Checks:
    """Flags as a test wants them; it remembers what it was shown."""

    def __init__(self, *flags: Flag) -> None:
        self.flags, self.shown = flags, list[str]()

    def look(self, source: str, image: Any, bundle: Bundle) -> tuple[Flag, ...]:
        self.shown.append(f"{source} {image[0, 0, 0]} {bundle.manifest.name}")
        return self.flags

    def forget(self, source: str) -> None:
        self.shown.append(f"{source} none")


def test_a_flag_that_alarms_is_abstain_and_one_that_does_not_is_only_told(
    classifier: Classifier,
) -> None:
    noted = Flag("dark", "a little dark", 50.0, 60.0, False)
    grave = Flag("frozen", "it equals the 3 before", 3.0, 3.0, True)
    found = [
        inspector(classifier, checks=Checks(*flags)).inspect(frame(1), 0.0).finding
        for flags in ((), (noted,), (noted, grave))
    ]
    assert [one.flags for one in found] == [(), ("dark",), ("dark", "frozen")]
    assert found[0].verdict == found[1].verdict != "ABSTAIN"
    assert (found[2].verdict, found[2].reason) == ("ABSTAIN", "it equals the 3 before")


def test_checks_see_what_the_model_saw_and_where_an_image_is_missing(
    classifier: Classifier,
) -> None:
    checks = Checks()
    line = inspector(classifier, checks=checks)
    for image, source in ((frames(9)[8], "x"), (None, "x"), (b"no picture", "x"), (PICTURE, "y")):
        line.inspect(frame(1, image, source), 0.0)
    assert checks.shown == ["x 8 tiny", "x none", "y 100 tiny"]


# --- the loop


def test_frames_are_kept_said_and_done_in_order(classifier: Classifier, outbox: Outbox) -> None:
    images: list[ImageLike] = [PICTURE, b"no picture", PICTURE]
    source = Listed("cam", [frame(n, image) for n, image in enumerate(images)])
    bench = Bench(Feed([source]), inspector(classifier), outbox)
    bench.line.run()
    assert [said["seq"] for said in bench.said] == [1, 2, 3]
    assert [said["frame"] for said in bench.said] == source.finished == ["0", "1", "2"]
    assert bench.verdicts()[1] == "NOT INSPECTED"
    assert kept(outbox) == [msgspec.convert(said, Verdict) for said in bench.said]
    assert sum(bench.metrics.results.values()) == 3
    assert bench.metrics.results["NOT INSPECTED"] == 1


class Full:
    """A disk that refuses every second record."""

    def __init__(self, outbox: Outbox) -> None:
        self.outbox, self.asked = outbox, 0

    def append(self, finding: Finding) -> Verdict | Unkept:
        self.asked += 1
        return Unkept("No space left on device") if self.asked == 2 else self.outbox.append(finding)


def test_what_the_disk_refuses_is_said_as_not_inspected_and_is_not_done(
    classifier: Classifier, outbox: Outbox
) -> None:
    source = Listed("cam", [frame(n) for n in range(3)])
    bench = Bench(Feed([source]), inspector(classifier), Full(outbox))
    bench.line.run()
    refused = bench.said[1]
    assert refused["verdict"] == "NOT INSPECTED"
    assert "could not be kept: No space left on device" in refused["reason"]
    assert "seq" not in refused
    assert "label" not in refused or refused["label"] is None
    assert source.finished == ["0", "2"]
    assert bench.metrics.rejected["disk"] == bench.metrics.results["NOT INSPECTED"] == 1


def test_stop_ends_after_the_frame_in_hand(classifier: Classifier, outbox: Outbox) -> None:
    source = Listed("cam", [frame(n) for n in range(20)])
    bench = Bench(Feed([source]), inspector(classifier), outbox)

    class Stopping:
        def judged(self, frame: Frame, inspected: Inspected, said: Finding) -> None:
            if frame.id == "4":
                bench.line.stop()

        def tick(self) -> None:
            pass

    bench.line.beside.append(Stopping())
    bench.line.run()
    assert source.finished == ["0", "1", "2", "3", "4"]
    assert len(kept(outbox)) == 5


def test_a_frame_that_two_processes_did_not_survive_is_not_looked_at_again(
    classifier: Classifier, outbox: Outbox, tmp_path: Path
) -> None:
    path = tmp_path / "in_hand.json"

    class Dying(Failing):
        def inspect(self, image: ImageLike) -> Any:
            raise KeyboardInterrupt  # it goes past everything, as a kill does

    def run(model: Any) -> Bench:
        bench = Bench(Feed([Listed("in", [frame(7, source="in")])]), inspector(model), outbox,
                      in_hand=path)  # fmt: skip
        with contextlib.suppress(KeyboardInterrupt):
            bench.line.run()
        return bench

    assert run(Dying(classifier)).said == []
    assert run(Dying(classifier)).said == []
    (said,) = run(Dying(classifier)).said
    assert said["verdict"] == "NOT INSPECTED"
    assert said["reason"] == "the program ended 2 times while it looked at this frame"
    assert path.read_bytes() == b"", "it ended as it should"
    (said,) = run(classifier).said
    assert said["verdict"] in ("OK", "DEFECT")


def test_what_is_torn_holds_no_frame(tmp_path: Path) -> None:
    path = tmp_path / "in_hand.json"
    for torn in (b"", b'{"source":"in","fra', b"\xff\xff", b"[]"):
        path.write_bytes(torn)
        in_hand = InHand(path)
        assert in_hand.begin(frame(7, source="in")) == 0
        in_hand.close()
        in_hand = InHand(path)
        assert in_hand.begin(frame(8, source="in")) == 0, "another frame"
        in_hand.close()


def test_an_engine_that_fails_three_times_in_a_row_silences_watchdog_and_heartbeat(
    classifier: Classifier, outbox: Outbox
) -> None:
    model, beats = Failing(classifier), list[int]()

    class Failed:
        def judged(self, frame: Frame, inspected: Inspected, said: Finding) -> None:
            model.error = EngineError("it fell over") if 1 <= int(frame.id) < 5 else None

        def tick(self) -> None:
            pass

    bench: Bench = Bench(
        Feed([Listed("cam", [frame(n) for n in range(8)])]), inspector(model), outbox,
        beat=lambda: beats.append(len(bench.said)),
    )  # fmt: skip
    bench.line.beside.append(Failed())
    bench.line.run()
    assert [word == "NOT INSPECTED" for word in bench.verdicts()] == [
        n in range(2, 6) for n in range(8)
    ]
    assert beats == [1, 2, 3, 4, 7, 8], "nothing after the third and fourth failure"


def test_what_hangs_on_the_loop_may_fail(
    classifier: Classifier, outbox: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    class Page:
        def judged(self, frame: Frame, inspected: Inspected, said: Finding) -> None:
            raise OSError("no such folder")

        def tick(self) -> None:
            raise ValueError("no")

    source = Listed("cam", [frame(n) for n in range(5)])
    bench = Bench(Feed([source]), inspector(classifier), outbox)
    bench.line.beside.append(Page())
    with caplog.at_level(logging.WARNING):
        bench.line.run()
    assert len(source.finished) == 5
    told = [record.getMessage() for record in caplog.records if "no such" in record.getMessage()]
    assert told == [
        "page: OSError: no such folder",
        "page: OSError: no such folder (2 times so far)",
        "page: OSError: no such folder (4 times so far)",
    ]


# --- several sources


def test_sources_take_turns_and_each_frame_comes_once() -> None:
    sources = [
        Listed(name, [frame(n, source=name) for n in range(count)])
        for name, count in (("a", 30), ("b", 30), ("c", 5))
    ]
    feed = Feed(sources)
    taken = []
    while not feed.ended:
        if got := feed.take(PATIENCE_S):
            taken.append(got.frame)
    for source in sources:
        assert [f.id for f in taken if f.source == source.name] == [f.id for f in source.listed]


def test_a_slow_source_and_a_fast_one_both_get_their_turn() -> None:
    """The fast one has a frame at every moment; each of the slow one is next, or next but one."""
    slow, fast = Camera("slow"), Camera("fast")
    feed = Feed([fast, slow])
    for _ in range(100):
        fast.go.release()
    for number in range(1, 4):
        slow.go.release()
        _until(lambda number=number: slow.given == number and _waits(feed, "slow"))
        _until(lambda: _waits(feed, "fast"))
        assert "slow" in {taken.frame.source for _ in range(2) if (taken := feed.take(PATIENCE_S))}
    assert fast.given < 10, "a source is read one frame ahead, and no further"
    assert set(feed.ages()) == {"slow", "fast"}
    feed.close()
    assert slow.closed.is_set()


def test_nothing_comes_of_a_source_that_brings_nothing() -> None:
    camera = Camera()
    feed = Feed([camera])
    assert feed.take(0.01) is None
    assert not feed.ended
    feed.close()
    assert feed.ended


class Camera:
    """A source whose frames a test lets go."""

    live, dropped = True, 0

    def __init__(self, name: str = "cam") -> None:
        self.name = name
        self.go = threading.Semaphore(0)
        self.given = 0
        self.closed = threading.Event()

    def __iter__(self) -> Iterator[Frame]:
        while True:
            self.go.acquire()
            if self.closed.is_set():
                return
            self.given += 1
            yield frame(self.given, source=self.name)

    def done(self, frame: Frame) -> None:
        pass

    def close(self) -> None:
        self.closed.set()
        self.go.release()


def _waits(feed: Feed, name: str) -> bool:
    return any(lane.frame for lane in feed._lanes if lane.source.name == name)


def test_a_source_that_fails_is_a_frame_without_an_image_and_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Unsteady(Listed):
        tries = 0

        def __iter__(self) -> Iterator[Frame]:
            self.tries += 1
            if self.tries == 1:
                raise OSError("the bus is gone")
            yield from self.listed

    monkeypatch.setattr("runtime.line.feed._AGAIN_S", (0.01, 0.01))
    feed = Feed([Unsteady("cam", [frame(1)])])
    first, second = feed.take(PATIENCE_S), feed.take(PATIENCE_S)
    assert first is not None
    assert second is not None
    assert (first.frame.image, first.frame.fault) == (None, "OSError: the bus is gone")
    assert second.frame.id == "1"


def _until(true: Any) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


# --- heat


def test_a_hot_machine_works_half_of_the_time_then_less_and_comes_back_slowly() -> None:
    cooling = Cooling(limit_c=80.0)
    hot, warm, cool = (Heat({"CPU": value}, ()) for value in (85.0, 77.0, 60.0))
    assert cooling.observe(warm, 0.0) is None
    assert cooling.observe(hot, 1.0) == (
        "CPU at 85.0 °C, the limit is 80 °C: works 50% of the time"
    )
    assert cooling.rest_s(0.02) == pytest.approx(0.02)
    assert cooling.observe(hot, 5.0) is None, "what was done must have had its time"
    assert cooling.observe(hot, 11.0)
    assert cooling.share == 0.25
    assert cooling.observe(warm, 60.0) is None, "between limit and limit - 5 nothing changes"
    assert cooling.observe(cool, 70.0) == "CPU at 60.0 °C, cooler again: works 50% of the time"
    assert cooling.observe(cool, 80.0) is None
    assert cooling.observe(cool, 100.0) == "CPU at 60.0 °C, cooler again: works 100% of the time"
    assert not cooling.shedding
    assert cooling.reason == ""
    assert cooling.rest_s(10.0) == 0.0


def test_it_never_works_less_than_an_eighth_and_always_shows_that_it_is_alive() -> None:
    cooling = Cooling()
    for now in range(0, 1000, 10):
        cooling.observe(Heat({"GPU": 99.0}, ("gpu-throttle-alert",)), float(now))
    assert cooling.share == 1 / 8
    assert cooling.rest_s(30.0) == 0.5
    assert "gpu-throttle-alert is active" in cooling.reason


def test_heat_is_read_from_the_kernel_s_files(tmp_path: Path) -> None:
    thermal = tmp_path / "sys" / "class" / "thermal"
    for file, text in {
        "thermal_zone0/type": "CPU-therm", "thermal_zone0/temp": "61500",
        "thermal_zone1/type": "GPU-therm", "thermal_zone1/temp": "72250",
        "cooling_device0/type": "gpu-throttle-alert", "cooling_device0/cur_state": "1",
        "cooling_device1/type": "pwm-fan", "cooling_device1/cur_state": "3",
    }.items():  # fmt: skip
        (thermal / file).parent.mkdir(parents=True, exist_ok=True)
        (thermal / file).write_text(f"{text}\n")
    heat = read_heat(tmp_path)
    assert (str(heat), heat.celsius) == ("GPU-therm at 72.2 °C", 72.25)
    assert heat.throttling == ("gpu-throttle-alert",)
    assert str(read_heat(tmp_path / "elsewhere")) == "no sensor"


def test_a_hot_line_rests_after_each_frame_as_long_as_it_worked_on_it(
    classifier: Classifier, outbox: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    clock, rested = Clock(), list[float]()

    class Slow(Failing):
        def inspect(self, image: ImageLike) -> Any:
            clock.now += 0.1
            return super().inspect(image)

    def heat() -> Heat:
        return Heat({"CPU": 95.0 if clock.now < 101.0 else 60.0}, ())

    def rest(seconds: float) -> None:
        rested.append(seconds)
        clock.now += seconds + 5.0  # so that every frame has a look at the sensors

    bench = Bench(
        Feed([Listed("cam", [frame(n) for n in range(9)])]), inspector(Slow(classifier)), outbox,
        clock=clock, rest=rest, cooling=Cooling(limit_c=80.0), read_heat=heat,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        bench.line.run()
    assert rested[0] == pytest.approx(0.1)
    assert rested[-1] == 0.0
    assert "CPU at 95.0 °C, the limit is 80 °C: works 50% of the time" in caplog.text
    assert "cooler again: works 100% of the time" in caplog.text


# --- the summary


def test_the_summary_counts_by_verdict() -> None:
    assert sentence({"DEFECT": 3, "OK": 9}, 2) == "12 frames: 9 OK, 3 DEFECT; 2 dropped"
    assert sentence({"OK": 1}, 0) == "1 frame: 1 OK; 0 dropped"
    assert sentence({}, 0) == "0 frames; 0 dropped"
