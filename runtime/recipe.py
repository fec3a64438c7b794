"""The recipe: one TOML file, one complete configuration, checked whole before anything runs.

It lives on the ground floor because train, calibration and export each read their table of it and
may not import one another. It is strict: an unknown key, a wrong type or a value out of range is
an error that names the file, the table and the key, and guesses what was meant.
"""

import difflib
import enum
import hashlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from runtime.errors import RecipeError
from runtime.manifest import Minimum
from runtime.preprocess import InputSpec

Share = Annotated[float, msgspec.Meta(gt=0, lt=1)]
Rate = Annotated[float, msgspec.Meta(gt=0, le=1)]
Budget = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Strategy = Literal["auto", "as-is", "feature-extraction", "coral", "fine-tuning", "adversarial"]
Threshold = Literal["balanced-accuracy", "accuracy", "none"]
Forgetting = Literal["replay", "lwf", "l2-sp"]
Adversarial = Literal["dann", "cdan", "mcc"]
Metric = Literal["auc", "balanced-accuracy", "accuracy"]
Augmentation = Literal["flip-horizontal", "flip-vertical", "rotate-90"]
ReleaseForm = Literal["fp16", "int8", "int8-fp16", "int8-cpu"]

SIMULATED = "simulated"
"""The word for a target made from the source's own images."""


class Splits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Shares of each domain; together they make 1."""

    train: Share = 0.60
    """What training may see; calibration images come from here too."""
    validation: Share = 0.15
    """What decides between rungs and epochs, and what the gate between rungs judges by."""
    test: Share = 0.25
    """What the gate judges artifacts by; no choice ever sees it."""

    def __post_init__(self) -> None:
        total = self.train + self.validation + self.test
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"train + validation + test must be 1, got {total:g}")


class DataSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[data]``: where the images are."""

    source: str | None = None
    """The curated domain: a folder of class folders, a CSV file, or ``elpv[:mono|:poly]``. It may
    be missing if ``[source] checkpoint`` is given; what that model forgets is then not measured."""
    target: str | None = None
    """The field domain, in the same forms, or ``simulated``: half of the source's images as
    simulated field photos. Without one, the source is the field and nothing is adapted."""
    evidence: tuple[str, ...] = ()
    """Packs that ``fieldfit collect`` wrote: more field images, with the labels that stand beside
    ``PACK.zip`` in ``PACK.csv`` or the class folders of ``PACK``. They train and validate; the test
    images stay the same."""
    labels: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """Labelled images of the target's training split that training may use, every class by its
    share; the others count as unlabelled. 0 uses none, none given uses all."""
    splits: Splits = Splits()
    """How each domain is divided; see below."""
    limit: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Use at most this many images of each domain, stratified; 0 uses all."""


class ModelSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[model]``: the network and the weights it starts from."""

    architecture: str = "efficientnet_lite0"
    """Any timm model name."""
    weights: str = "embedded"
    """``embedded`` (EfficientNet-Lite0, ImageNet), ``pretrained`` (timm downloads them),
    ``random``, or the path of a ``.safetensors`` or torch state-dict file."""


def _check_strengths(name: str, strengths: tuple[float, ...]) -> None:
    if not strengths or not all(math.isfinite(strength) for strength in strengths):
        raise ValueError(f"{name} must list one or more finite strengths, e.g. [1e-3]")


class Schedule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The optimizer's course, the same words wherever weights of the network are trained."""

    epochs: Count = 6
    """Passes over the largest group of labelled images; early stopping may end sooner."""
    batch: Annotated[int, msgspec.Meta(ge=2, le=4096)] = 48
    """Images of one optimizer step, over all domains and processes."""
    learning_rate: Rate = 2e-4
    """Peak rate of the backbone, after warm-up, before cosine decay."""
    head_learning_rate: Rate = 5e-5
    """Peak rate of the head."""
    weight_decay: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1e-4
    """Of AdamW."""
    warmup: Budget = 0.1
    """Share of the steps over which the rate rises from 0."""
    patience: Annotated[int, msgspec.Meta(ge=0)] = 3
    """Epochs without a better validation score before training stops; 0 never stops early."""


class SourceSettings(Schedule, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[source]``: the model that is good on clean images: trained here, or brought along."""

    checkpoint: str | None = None
    """A whole classifier to start from, as ``.safetensors`` or torch state dict; none trains one
    on the source images from the weights of ``[model]``."""
    classes: tuple[str, ...] = ()
    """Class names in the order of its outputs; a checkpoint of fieldfit knows its own."""
    batch: Annotated[int, msgspec.Meta(ge=2, le=4096)] = 32
    """Images of one optimizer step, over all processes."""
    patience: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Epochs without a better validation score before training stops; 0 makes all of them and
    keeps the best, since the last ones, at the lowest rate, often are."""
    head_l2: tuple[Annotated[float, msgspec.Meta(ge=0)], ...] = (1e-4, 1e-3, 1e-2)
    """L2 penalties to try for the head that training starts from; validation picks one."""

    def __post_init__(self) -> None:
        _check_strengths("head_l2", self.head_l2)
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes must name each class once")
        if self.classes and self.checkpoint is None:
            raise ValueError("classes belong to a checkpoint; without one they come from the data")


class HeadSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[train.head]``: rung 1, a linear head on the frozen backbone's cached features."""

    epochs: Count = 100
    """Most passes of L-BFGS over the features."""
    l2: tuple[Annotated[float, msgspec.Meta(ge=0)], ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    """Strengths of the pull towards the source head; cross-validation on field labels picks one."""
    folds: Annotated[int, msgspec.Meta(ge=2, le=20)] = 5
    """Of that cross-validation."""

    def __post_init__(self) -> None:
        _check_strengths("l2", self.l2)


class FineTuningSettings(Schedule, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[train.fine_tuning]``: rung 2, the network at a low rate from rung 1's head."""

    min_steps: Annotated[int, msgspec.Meta(ge=1)] = 60
    """Steps to take even if the epochs are over sooner: few labels make short epochs."""
    against_forgetting: Forgetting = "replay"
    """``replay`` puts source images into every batch; ``lwf`` (learning without forgetting) asks
    for the source model's answers on field images; ``l2-sp`` pulls weights back to the source's."""
    keep_answers: Annotated[float, msgspec.Meta(ge=0, le=100)] = 1.0
    """Weight of keeping the source model's answers, on replayed images or, with ``lwf``, on
    field images; 0 does not."""
    l2_sp: Annotated[float, msgspec.Meta(ge=0, le=100)] = 0.01
    """Strength of the pull towards the source's weights, with ``l2-sp``."""
    tune: tuple[str, ...] = ()
    """Modules to train besides the head, by timm's names, e.g. ``blocks.0``; none trains all that
    ``[train] freeze`` leaves."""
    interpolation: tuple[Rate, ...] = (1.0, 0.75, 0.5, 0.25)
    """WiSE-FT: shares of the way from the source model to the fine-tuned one, or to that of rung 3,
    tried in this order until what the source knew is kept."""


class AdversarialSettings(Schedule, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[train.adversarial]``: rung 3, features in which the domains cannot be told apart."""

    method: Adversarial = "dann"
    """``dann`` (Ganin et al. 2016), ``cdan`` (Long et al. 2018) or ``mcc`` (Jin et al. 2020), which
    needs no discriminator."""
    max_weight: Annotated[float, msgspec.Meta(ge=0, le=10)] = 0.1
    """Where the ramp of the domain loss ends. 1 is the paper's; it collapsed on some shifts."""
    hidden: Annotated[int, msgspec.Meta(ge=1, le=8192)] = 256
    """Units of the discriminator's hidden layer."""
    dropout: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.5
    """In the discriminator."""
    discriminator_learning_rate: Rate = 1e-3
    """Peak rate of the discriminator."""
    temperature: Annotated[float, msgspec.Meta(gt=0, le=100)] = 2.5
    """Of ``mcc``."""
    min_images: Annotated[int, msgspec.Meta(ge=2)] = 500
    """Field training images, labelled or not, below which ``auto`` does not try this rung."""


class LadderGate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[train.gate]``: what a rung must prove on held-out images before it replaces the last."""

    confidence: Annotated[float, msgspec.Meta(ge=0.5, lt=1)] = 0.90
    """Of the paired bootstrap interval of the gain on the field over the source model as it is; its
    lower end must be above 0."""
    min_gain: Budget = 0.01
    """Least gain over what was kept before: a further rung is dearer and changes more."""
    min_labels: Annotated[int, msgspec.Meta(ge=1)] = 50
    """Labelled held-out field images below which a result is marked unverified."""
    max_auc_drop: Budget = 0.01
    """Most AUC that the source may lose against the source model."""
    max_balanced_accuracy_drop: Budget = 0.02
    """Most balanced accuracy that the source may lose, at the threshold that ships."""
    max_negative_flips: Budget = 0.03
    """Most source images that the source model had right and the candidate has wrong."""
    max_rate_ratio: Annotated[float, msgspec.Meta(gt=1)] = 2.0
    """How far the rate of each predicted class may be from the expected one, as a factor."""
    stop_gap: Budget = 0.03
    """The ladder ends when the field's metric is at most this far below the source's."""


class SimilaritySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[train.similarity]``: the report of what an adaptation changed."""

    images: Annotated[int, msgspec.Meta(ge=8)] = 64
    """Source images for the robustness sweep, each degraded in every way at every severity."""


class TrainSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[train]``: how far the model is adapted, and how."""

    strategy: Strategy = "auto"
    """``auto`` climbs the ladder as far as the data asks for; a rung's name makes that rung (and
    those that it starts from) the only candidate."""
    metric: Metric = "auc"
    """What a rung must improve on the field."""
    threshold: Threshold = "balanced-accuracy"
    """What the decision threshold is chosen for, on source and field validation images together;
    ``none`` leaves the classes' scores as they are."""
    freeze: tuple[str, ...] = ()
    """Modules whose weights stay as they are, by timm's names, e.g. ``conv_stem``, ``blocks.0``."""
    augment: tuple[Augmentation, ...] = ("flip-horizontal", "flip-vertical")
    """Each is applied to half of the images, at random; leave out what changes the label."""
    degrade: Budget = 0.0
    """Share of the source's training images that are shown as simulated field photos."""
    cache_frozen: bool = True
    """Keep the output of frozen stages on disk instead of computing it in every epoch."""
    compile: bool = False
    """torch.compile: minutes at the start, faster steps; for long runs on a GPU."""
    head: HeadSettings = HeadSettings()
    """Rung 1; see below."""
    fine_tuning: FineTuningSettings = FineTuningSettings()
    """Rung 2; see below."""
    adversarial: AdversarialSettings = AdversarialSettings()
    """Rung 3; see below."""
    gate: LadderGate = LadderGate()
    """The gate between rungs; see below."""
    similarity: SimilaritySettings = SimilaritySettings()
    """The report of what changed; see below."""


class CalibrationSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[calibration]``: how INT8 ranges are measured."""

    images: Annotated[int, msgspec.Meta(ge=8, le=4096)] = 128
    """Images of the target's training split; 64 or more are advised."""
    method: Literal["auto", "minmax", "percentile", "entropy", "mse"] = "auto"
    """How a range is chosen from what was observed. ``auto`` takes ``minmax`` where an activation
    bounds a tensor, and elsewhere the method whose logits are nearest to the float graph's on
    training images that were held out; ``minmax`` unless another is clearly better. ``percentile``
    leaves out the largest values, ``entropy`` keeps most of the distribution's information,
    ``mse`` has the least squared error."""
    percentile: Annotated[float, msgspec.Meta(ge=99, le=100)] = 99.99
    """Share of the activations inside the range, in percent, for ``percentile``, also where
    ``auto`` tries it."""


class ExportSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[export]``: what is released."""

    version: Annotated[str, msgspec.Meta(pattern=r"^[0-9]+(\.[0-9]+)*([a-z0-9.+-]*)\Z")] = "0.1.0"
    """Of the bundle; the zip is called NAME-VERSION.zip."""
    forms: tuple[ReleaseForm, ...] = ("fp16", "int8", "int8-cpu")
    """Forms to offer to the gate beside ``fp32``, which is always there. ``int8-fp16`` is
    ``int8`` with its float parts in half, for TensorRT only."""
    golden: Annotated[int, msgspec.Meta(ge=2, le=64)] = 8
    """Golden samples in the bundle, replayed wherever it is opened."""
    require: Minimum | None = None
    """The least that a device may run it on: ``"tensorrt"``, or ``"cuda"`` for any engine on its
    GPU. A device that cannot refuses the bundle; by default it steps down, and says so."""
    ok: tuple[str, ...] = ()
    """Labels of parts that are good: a line says OK to those and DEFECT to all others. Without,
    ``fieldfit watch`` has to be told with ``--ok``."""
    max_error_accepted: Annotated[float, msgspec.Meta(gt=0, lt=0.5)] | None = None
    """Largest share of wrong answers among those that are given: the device abstains below the
    score from which on, with 95 % confidence, validation images allow no more. By default it
    never abstains."""

    def __post_init__(self) -> None:
        if len(set(self.forms)) != len(self.forms):
            raise ValueError(f"forms must name each form once, got {', '.join(self.forms)}")


class GateSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``[gate]``: what an artifact may lose against the checkpoint on held-out field images."""

    min_agreement: Budget = 0.98
    """Smallest share of images on which it gives the checkpoint's answer."""
    min_sqnr_db: Annotated[float, msgspec.Meta(ge=0, le=200)] = 15.0
    """Smallest signal-to-quantization-noise ratio of its logits, in decibels."""
    max_accuracy_drop: Budget = 0.01
    """Largest loss of accuracy, as a share: 0.01 is one point."""
    max_credible_accuracy_drop: Budget = 0.02
    """Largest loss of accuracy that the labelled images may leave open, with 95 % confidence: the
    upper end of the paired interval. Where there are too few to leave so little open even for a
    form that changes no answer (fewer than 149 for 0.02) it does not count, and that is said."""
    max_worst_recall_drop: Budget = 0.03
    """Largest loss of the recall of the class that has the smallest."""


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One complete configuration."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")]
    """Results go to ``build/NAME/``."""
    data: DataSettings
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**31)] = 0
    """Of splits, order, augmentation and every choice; the same seed gives the same result."""
    input: InputSpec = InputSpec()
    model: ModelSettings = ModelSettings()
    source: SourceSettings = SourceSettings()
    train: TrainSettings = TrainSettings()
    calibration: CalibrationSettings = CalibrationSettings()
    export: ExportSettings = ExportSettings()
    gate: GateSettings = GateSettings()

    def __post_init__(self) -> None:
        if self.name == "cache":
            raise ValueError("name must not be 'cache': build/cache is where caches are kept")
        if self.data.source is None and (
            self.source.checkpoint is None or self.data.target is None
        ):
            raise ValueError(
                '[data] source is missing; add for example: source = "images/clean"; without '
                "source images, give both [source] checkpoint (the model to adapt) and [data] "
                "target (the field images)"
            )
        if self.data.target == SIMULATED and self.data.source is None:
            raise ValueError(f'[data] target = "{SIMULATED}" is made from source images: name them')

    @property
    def build(self) -> Path:
        """The folder of everything this recipe makes, under the working directory."""
        return Path("build") / self.name

    @property
    def sha256(self) -> str:
        """Digest of the effective configuration, defaults included, comments not."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()


def load_recipe(path: Path) -> Recipe:
    """Read and check the recipe at ``path``; relative paths in it are relative to its folder.

    Raises RecipeError that names the file, the table, the key, and what was expected.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: no such recipe{_other_recipes(path)}") from error
    except IsADirectoryError as error:
        raise RecipeError(f"{path}: is a folder{_other_recipes(path / 'x')}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    recipe = parse_recipe(text, str(path))
    return _with_absolute_paths(recipe, path.resolve().parent)


def parse_recipe(text: str, name: str) -> Recipe:
    """Check the recipe ``text``; ``name`` stands for its file in messages.

    Raises RecipeError.
    """
    try:
        import tomllib as toml
    except ModuleNotFoundError:  # Python 3.10: the train extra installs tomli
        try:
            import tomli as toml  # type: ignore[no-redef,unused-ignore]
        except ModuleNotFoundError as error:
            raise RecipeError("reading recipes on Python 3.10 needs: pip install tomli") from error
    try:
        tables = toml.loads(text)
    except (toml.TOMLDecodeError, RecursionError) as error:
        raise RecipeError(f"{name}: not valid TOML: {error}") from error
    try:
        return msgspec.convert(tables, Recipe)
    except msgspec.ValidationError as error:
        raise RecipeError(f"{name}: {_explain(str(error), tables)}") from error


def _explain(message: str, tables: dict[str, Any]) -> str:
    """msgspec's message in the recipe's words: table, key, what is expected, what came."""
    problem, _, at = message.partition(" - at `")
    steps = re.findall(r"\.(\w+)|\[(\d+)\]", at)
    keys: list[str | int] = [name or int(index) for name, index in steps]
    place = at.rstrip("`").removeprefix("$").removeprefix(".")
    if place:
        inside_table = len(keys) > 1 or _is_table(_type_at(keys))
        place = f"[{place}]: " if inside_table else f"{place}: "
    named = re.match(r"Object (contains unknown|missing required) field `(.+)`", problem)
    if named and named[1] == "contains unknown":
        return f"{place}unknown key {named[2]!r}; {_hint(named[2], keys)}"
    if named:
        example = _EXAMPLES.get(named[2], f"{named[2]} = ...")
        return f"{place}the key {named[2]} is missing; add for example: {example}"
    if not problem.startswith(("Expected `", "Invalid enum")):
        return f"{place}{problem}"  # our own words, from a __post_init__
    kind, value = _type_at(keys), _value_at(tables, keys)
    choices = _choices(kind)
    if not choices:
        return f"{place}expected {_describe(kind)}, got {_show(value)}"
    close = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{place}{_show(value)} is not one of: {', '.join(choices)}{hint}"


_EXAMPLES = {
    "name": 'name = "solar"',
    "data": '[data] with source = "images/clean"',
}
"""A line for each key without a default."""


def _hint(key: str, keys: list[str | int]) -> str:
    """Where an unknown key of the table at ``keys`` may have been meant to go."""
    known = _fields(_type_at(keys))
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    tables = {name: _type_at([name]) for name in _fields(Recipe)}
    homes = [name for name, kind in tables.items() if _is_table(kind) and key in _fields(kind)]
    return f"it belongs to [{homes[0]}]" if homes else f"known keys: {', '.join(known)}"


def _type_at(keys: list[str | int]) -> Any:
    """The annotation at ``keys``, with its limits."""
    kind: Any = Recipe
    for key in keys:
        kind = _bare(kind)
        if isinstance(key, str):
            kind = get_type_hints(kind, include_extras=True)[key]
        else:
            items = get_args(kind)
            kind = items[0] if items[-1] is Ellipsis else items[key]
    return kind


def _value_at(tables: dict[str, Any], keys: list[str | int]) -> Any:
    value: Any = tables
    for key in keys:
        value = value[key]
    return value


def _bare(kind: Any) -> Any:
    """``kind`` without its limits and without None."""
    if get_origin(kind) is Annotated:
        return _bare(get_args(kind)[0])
    if type(None) in get_args(kind):
        return _bare(get_args(kind)[0])
    return kind


def _is_table(kind: Any) -> bool:
    return hasattr(_bare(kind), "__struct_fields__")


def _fields(kind: Any) -> list[str]:
    return [field.name for field in msgspec.structs.fields(_bare(kind))]


def _choices(kind: Any) -> list[str]:
    kind = _bare(kind)
    if get_origin(kind) is Literal:
        return [str(value) for value in get_args(kind)]
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return [str(member.value) for member in kind]
    return []


_WORDS = {float: "a number", int: "a whole number", str: "text", bool: "true or false"}
_LIMITS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def _describe(kind: Any) -> str:
    """``kind`` in words, e.g. "a number, above 0 and at most 1"."""
    bare = _bare(kind)
    if _is_table(bare):
        return "a table"
    if get_origin(bare) is tuple:
        items = get_args(bare)
        return "a list" if items[-1] is Ellipsis else f"a list of {len(items)} values"
    words = _WORDS[bare]
    # Of what may also be left out, the limits are those of what may be given.
    parts = [part for part in (kind, *get_args(kind)) if get_origin(part) is Annotated]
    metas = [m for part in parts for m in get_args(part) if isinstance(m, msgspec.Meta)]
    limits = [
        f"{word} {getattr(meta, name):.12g}"
        for meta in metas
        for name, word in _LIMITS.items()
        if getattr(meta, name) is not None
    ]
    patterns = [f"matching {meta.pattern}" for meta in metas if meta.pattern]
    return ", ".join([words, " and ".join(limits + patterns)]).removesuffix(", ")


def _show(value: Any) -> str:
    """``value`` as it stands in the recipe, cut where it is long."""
    if isinstance(value, dict):
        return "a table"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _other_recipes(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path()
    found = sorted(file.name for file in folder.glob("*.toml") if file.name != "pyproject.toml")
    return f"; {folder} has: {', '.join(found)}" if found else ""


def _with_absolute_paths(recipe: Recipe, folder: Path) -> Recipe:
    def resolve(place: str) -> str:
        return str((folder / Path(place).expanduser()).resolve())

    data, model = recipe.data, recipe.model
    data = msgspec.structs.replace(
        data,
        source=_place(data.source, resolve),
        target=_place(data.target, resolve),
        evidence=tuple(map(resolve, data.evidence)),
    )
    if model.weights not in ("embedded", "pretrained", "random"):
        model = msgspec.structs.replace(model, weights=resolve(model.weights))
    source = recipe.source
    if source.checkpoint is not None:
        source = msgspec.structs.replace(source, checkpoint=resolve(source.checkpoint))
    return msgspec.structs.replace(recipe, data=data, model=model, source=source)


def _place(place: str | None, resolve: Callable[[str], str]) -> str | None:
    if place is None or place == SIMULATED or is_embedded(place):
        return place
    return resolve(place)


def is_embedded(place: str | None) -> bool:
    """Whether ``place`` names the sample data set rather than a path."""
    return place is not None and (place == "elpv" or place.startswith("elpv:"))
