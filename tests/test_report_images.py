"""The report's sections on images: samples, answers by class, and answers that changed."""

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from export.answers import CHECKPOINT, Answers
from export.report import answers, flipped, samples
from export.report.answers import confusion_matrix, judge, worst_confusions, worst_first
from export.report.facts import Facts, read_facts
from export.report.flipped import find_flips, find_mistakes
from export.report.page import write_page
from export.report.samples import choose_samples, count_images, find_twins
from runtime.dataset import Dataset, Example, SetAside
from runtime.metrics import softmax, wilson_interval
from runtime.recipe import SIMULATED
from tests.browser import Browser, browser
from tests.conftest import QUICK, WriteDomain
from train.domains import check_images, list_domain
from train.simulate import simulate

Floats = npt.NDArray[np.float32]
SECTIONS = (samples.make, answers.make, flipped.make)


@pytest.fixture
def facts(quick: Path, monkeypatch: pytest.MonkeyPatch) -> Facts:
    """Of the quick export."""
    monkeypatch.chdir(quick)
    return read_facts(QUICK)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


def shown(facts: Facts, folder: Path, tab: Browser) -> str:
    """The words of a page with the three sections, after its pictures are decoded."""
    write_page(folder / "report.html", facts, SECTIONS)
    tab.open((folder / "report.html").as_uri())
    assert tab.problems == []
    tab.run("Promise.all([...document.images].map(image => image.decode()))")
    text: str = tab.run("document.querySelector('main').innerText")
    return text


def logits(*rows: tuple[float, ...]) -> Floats:
    return np.array(rows, dtype=np.float32)


def sure(classes: npt.NDArray[np.int64], count: int, by: float = 4.0) -> Floats:
    """Logits that answer ``classes``, each ``by`` above the others."""
    return (np.eye(count, dtype=np.float32) * by)[classes]


def example(number: int, **told: object) -> Example:
    given = {"path": f"/p/{number}.png", "sha256": f"{number:064}", "domain": "target", **told}
    return msgspec.convert(given, Example)


def answered(facts: Facts, **said: Floats) -> Facts:
    """With these answers instead, ``int8_cpu`` for int8-cpu."""
    forms = {form.replace("_", "-"): array for form, array in said.items()}
    return facts._replace(answers=facts.answers._replace(logits=forms))


def test_a_confusion_counts_images_by_label_and_answer_and_no_unknown_ones() -> None:
    labels = np.array([0, 0, 1, 2, 2, 2, -1])
    predicted = np.array([0, 1, 1, 2, 0, 0, 1])
    assert confusion_matrix(predicted, labels, 3).tolist() == [[1, 1, 0], [0, 1, 0], [2, 0, 1]]


def test_forms_are_judged_together_only_if_every_answer_is_the_same() -> None:
    labels = np.array([0, 1, 1, -1])
    one = sure(np.array([0, 1, 0, 0]), 2)
    # Equal counts, other images: what is taken for what is no sign that nothing changed.
    other = sure(np.array([0, 0, 1, 0]), 2)
    first, second = judge({CHECKPOINT: one, "fp32": one * 2, "int8": other}, labels)
    assert (first.forms, second.forms) == ((CHECKPOINT, "fp32"), ("int8",))
    assert (first.matrix == second.matrix).all()
    assert (first.right, first.images) == (2, 3)
    assert first.interval == wilson_interval(2, 3)
    assert first.recalls == (1.0, 0.5)


def test_confusions_are_told_by_how_many_images_they_are_and_classes_by_their_recall() -> None:
    matrix = np.array([[7, 3, 0], [0, 3, 3], [0, 0, 0]])
    assert [(c.label, c.answer, c.images, c.share) for c in worst_confusions(matrix)] == [
        (1, 2, 3, 0.5),
        (0, 1, 3, 0.3),
    ]
    assert worst_first([0.9, None, 0.0, 0.4]) == [2, 3, 0, 1]


def test_flips_are_told_with_their_direction_the_most_harmful_first() -> None:
    labels = np.array([0, 0, 1, 2, -1, 1, 0])
    before = sure(np.array([0, 0, 0, 0, 0, 1, 0]), 3)
    after = sure(np.array([1, 1, 1, 1, 1, 1, 0]), 3)
    after[1, 1] = 6  # surer than the flip of row 0
    flips = find_flips(before, after, labels, 1.0)
    assert [(f.row, f.direction) for f in flips] == [
        (1, "lost"), (0, "lost"), (3, "both wrong"), (4, "unknown"), (2, "won"),
    ]  # fmt: skip
    assert [(f.before.class_index, f.after.class_index) for f in flips] == [(0, 1)] * 5


def test_a_defect_that_now_passes_comes_before_a_good_part_that_is_now_refused() -> None:
    labels = np.array([0, 1, 1])
    before = sure(labels, 2)
    after = logits((0, 9), (2, 0), (1, 0))  # the good part's is the surest of all
    good = find_flips(before, after, labels, 1.0, ok=[0])
    assert [(f.row, f.passed) for f in good] == [(1, True), (2, True), (0, False)]
    assert [f.row for f in find_flips(before, after, labels, 1.0)] == [0, 1, 2]


def test_scores_are_a_devices_that_is_with_the_temperature_of_training() -> None:
    one, other = logits((1, 0)), logits((0, 3))
    (flip,) = find_flips(one, other, np.array([0]), 2.5)
    assert flip.before.score == pytest.approx(softmax(one, temperature=2.5)[0, 0])
    assert flip.after.score == pytest.approx(softmax(other, temperature=2.5)[0, 1])
    assert flip.after.score != pytest.approx(softmax(other)[0, 1])


def test_the_surest_mistakes_come_first_and_unknown_labels_are_none() -> None:
    labels = np.array([0, 1, -1, 1, 0])
    said = logits((0, 1), (3, 0), (5, 0), (0, 5), (0, 2))
    assert [m.row for m in find_mistakes(said, labels, 1.0)] == [1, 4, 0]


def test_strata_take_turns_among_the_samples_and_test_images_come_first() -> None:
    common = [example(i, stratum="a", split="train") for i in range(9)]
    common += [example(20, stratum="a", split="test")]
    rare = [example(30, stratum="b", split="validation"), example(31, stratum="b", split="train")]
    chosen = [e.path for e in choose_samples(common + rare, 4)]
    assert chosen == ["/p/20.png", "/p/0.png", "/p/30.png", "/p/31.png"]
    strata = [example(i, stratum=str(i)) for i in range(6)]
    assert len(choose_samples(strata, 4)) == 6


def test_images_are_counted_by_class_domain_and_split(facts: Facts) -> None:
    found = Counter(f"{e.domain} {e.split} {e.label}" for e in facts.dataset.examples)
    together, *classes = count_images(facts.dataset)
    assert [row.name for row in classes] == ["defective", "functional"]
    for row in classes:
        for start, domain in ((0, "source"), (4, "target")):
            counts = [found[f"{domain} {s} {row.name}"] for s in ("train", "validation", "test")]
            assert row.numbers[start : start + 4] == (*counts, sum(counts))
    assert together.numbers == tuple(map(sum, zip(*(c.numbers for c in classes), strict=True)))


def simulated(folder: Path, pictures: WriteDomain) -> list[Example]:
    pictures(folder / "clean", {"bad": 8, "good": 8})
    clean = check_images(list_domain(str(folder / "clean"), "source")).candidates
    splits = ("train", "train", "validation", "test")
    examples = [
        msgspec.convert({**msgspec.to_builtins(c), "split": splits[i % 4]}, Example)
        for i, c in enumerate(clean)
    ]
    return simulate(examples, seed=0, folder=folder / "photos")


def test_a_simulated_photo_stands_beside_the_image_that_it_was_made_of(
    facts: Facts, tmp_path: Path, pictures: WriteDomain
) -> None:
    examples = simulated(tmp_path, pictures)
    twins = find_twins(examples)
    held_out = [e for e in examples if e.domain == "target" and e.split != "train"]
    assert len(twins) == len(held_out) == 8
    for photo in held_out:
        assert Path(photo.path).name.startswith(twins[photo.sha256].sha256[:32])
    data = msgspec.structs.replace(facts.recipe.data, target=SIMULATED)
    dataset = Dataset(classes=("bad", "good"), examples=tuple(examples))
    recipe = msgspec.structs.replace(facts.recipe, data=data)
    section = samples.make(facts._replace(recipe=recipe, dataset=dataset))
    assert section.body.count("<figure>") == 2 * samples.EACH
    assert section.body.count('alt="clean image, ') == 2 * samples.EACH
    assert section.body.count('alt="simulated field image, ') == 2 * samples.EACH


def test_the_page_shows_what_was_answered_with_every_picture(
    facts: Facts, tmp_path: Path, page: Browser
) -> None:
    labels = facts.answers.labels
    right = sure(labels, 2)
    worse = right.copy()
    worse[[0, 3]] = right[[0, 3], ::-1]
    text = shown(answered(facts, checkpoint=right, fp32=right, int8=worse), tmp_path, page)
    assert f"{len(labels)} are answered rightly by checkpoint and fp32 (100.0%" in text
    assert f"{len(labels) - 2} by int8" in text
    assert "was right, now wrong: 2" in text.lower()
    assert "No answer flipped: fp32." in text
    assert f"It makes none on {len(labels)} labelled test images." in text
    for row in (0, 3):
        assert Path(facts.answers.examples[row].path).name in text
    widths = page.run("[...document.images].map(image => image.naturalWidth)")
    assert len(widths) > 2
    assert set(widths) == {facts.recipe.input.size[1]}
    cells = page.run("[...document.querySelectorAll('.matrix td.number')].map(c => c.innerText)")
    counts = [int(cell.split()[0]) for cell in cells]
    known = Counter(labels.tolist())
    assert counts[:4] == [known[0], 0, 0, known[1]]
    assert sum(counts[4:]) == len(labels)
    assert counts[5] + counts[6] == 2


def test_nothing_of_the_page_is_wider_than_a_phone(
    facts: Facts, tmp_path: Path, page: Browser
) -> None:
    page.resize(390, 844)
    shown(facts, tmp_path, page)
    assert page.run("document.documentElement.scrollWidth") == 390


def test_labels_and_file_names_are_words_never_markup(
    facts: Facts, tmp_path: Path, page: Browser
) -> None:
    name, file = "<b>\"bad\" & 'worse'</b>", 'it\'s "6" <i>.png'

    def renamed(e: Example) -> Example:
        label = name if e.label == "defective" else e.label
        return msgspec.structs.replace(e, label=label, path=str(tmp_path / file))

    shutil.copyfile(facts.answers.examples[0].path, tmp_path / file)
    examples = tuple(renamed(e) for e in facts.answers.examples[:8])  # only the first is there
    labels = facts.answers.labels[:8]
    rest = [e for e in facts.dataset.examples if e not in facts.answers.examples]
    dataset = msgspec.structs.replace(
        facts.dataset, classes=(name, "functional"), examples=(*rest[:9], *examples),
        set_aside=(SetAside(path=f"/x/{file}", reason="<u>"),),
        duplicates=((f"/x/{file}", "/x/2.png"),),
    )  # fmt: skip
    said = sure(labels, 2)
    told = Answers(examples, labels, {CHECKPOINT: said, "int8": said[:, ::-1]})
    text = shown(facts._replace(dataset=dataset, answers=told), tmp_path, page)
    assert page.run("document.querySelectorAll('main b, main i, main u').length") == 0
    assert text.count(name) > 3
    assert text.count(file) > 3
    alts = page.run("[...document.querySelectorAll('.cards img')].map(i => i.alt)")
    gone = page.run("[...document.querySelectorAll('.cards .gone')].map(i => i.ariaLabel)")
    assert (len(alts), len(gone)) == (1, 7)
    assert all(spoken.startswith(f"{file}, label ") for spoken in alts + gone)
    assert all(name in spoken for spoken in alts + gone)


def test_a_picture_that_is_gone_or_another_one_by_now_is_not_shown(
    facts: Facts, tmp_path: Path
) -> None:
    there, gone, other = facts.answers.examples[:3]
    gone = msgspec.structs.replace(gone, path=str(tmp_path / "gone.png"))
    shutil.copyfile(there.path, tmp_path / "other.png")
    other = msgspec.structs.replace(other, path=str(tmp_path / "other.png"))
    said = sure(facts.answers.labels[:3], 2)
    told = Answers(
        (there, gone, other), facts.answers.labels[:3], {CHECKPOINT: said, "int8": said[:, ::-1]}
    )
    body = flipped.make(facts._replace(answers=told)).body
    assert body.count("<img ") == 1
    assert body.count('class="gone"') == 2
    assert "not there any more</span>" in body
    assert "changed since training</span>" in body


def test_of_many_flips_the_worst_are_shown_and_the_others_counted(facts: Facts) -> None:
    said = sure(facts.answers.labels, 2)
    count = len(said)
    assert count > flipped.SHOWN
    body = flipped.make(answered(facts, checkpoint=said, int8=said[:, ::-1])).body
    assert body.count("<li>") == flipped.SHOWN
    assert f"{count - flipped.SHOWN} more are not shown" in body
    assert "No answer flipped" not in body


def test_of_many_mistakes_the_surest_are_shown(facts: Facts) -> None:
    wrong = sure(1 - facts.answers.labels, 2)
    body = flipped.make(answered(facts, checkpoint=wrong, fp32=wrong)).body
    assert body.count("<li>") == flipped.MISTAKES
    assert f"It answers {len(wrong)} of {len(wrong)} labelled test images wrong" in body


def test_without_labels_only_flips_are_told(facts: Facts) -> None:
    unknown = facts._replace(
        answers=facts.answers._replace(labels=np.full(len(facts.answers.labels), -1))
    )
    assert answers.make(unknown) is None
    body = flipped.make(unknown).body
    assert "No test image has a label." in body
    assert "now wrong" not in body


def test_of_many_classes_only_the_worst_confusions_are_listed(facts: Facts) -> None:
    many = 40
    names = tuple(f"class-{index:02}" for index in range(many))
    labels = np.arange(len(facts.answers.labels)) % many
    examples = tuple(
        msgspec.structs.replace(e, label=names[index])
        for e, index in zip(facts.answers.examples, labels, strict=True)
    )
    dataset = msgspec.structs.replace(facts.dataset, classes=names, examples=examples)
    predicted = np.where(np.arange(len(labels)) % 2, labels, (labels + 1) % many)
    told = Answers(examples, labels, {CHECKPOINT: sure(predicted, many)})
    section = answers.make(facts._replace(dataset=dataset, answers=told))
    assert section is not None
    assert 'class="matrix"' not in section.body
    assert f"of which these {answers.WORST} have the most images" in section.body
    listed = section.body.partition("What is taken for what most often")[2]
    assert listed.count('<tr><th scope="row">') == answers.WORST
    pictured = samples.make(facts._replace(dataset=dataset))
    assert pictured.body.count("<h3>class-") == samples.FEW
    assert f"{many - samples.FEW} more classes are not pictured" in pictured.body
