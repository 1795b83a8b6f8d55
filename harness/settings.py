"""The settings: one small dataclass per group, one line per setting; then the checks.

    name: Annotated[type, help, (lowest, highest)] = default

The type is a plain one, or Literal with all choices. Every number has a range, which includes both ends. No two groups
share a name, and `train.py` has a flag for each. The defaults are the released configuration of TGDT on Flickr30K, and
of USER for what only USER has, except --guide. `presets.py` says what each preset changes.
"""
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Annotated, Literal, NamedTuple, get_args, get_origin, get_type_hints

from harness.presets import PRESETS
from sources.files import BadInput, read_json, write_json


@dataclass
class Run:
    """The run"""

    dataset: Annotated[Literal["scenes", "flickr8k", "flickr30k", "coco", "folder"], "what to train on"] = "scenes"
    data_root: Annotated[str | None, "folder of the data (default: data/<dataset>; scenes need none)"] = None
    model: Annotated[Literal["tgdt", "user", "tgdt-user"], "which model; tgdt-user is both papers in one"] = "tgdt"
    preset: Annotated[Literal["small", "paper"], "small is for a laptop, paper has the released values"] = "small"
    seed: Annotated[int, "seed of weights, dropout, batch order and caption noise", (0, 2**32 - 1)] = 0
    precision: Annotated[Literal["auto", "float32", "bfloat16"], "auto is bfloat16 on a GPU that has it"] = "auto"


@dataclass
class Pictures:
    """Pictures and regions"""

    regions: Annotated[Literal["auto", "files", "detector", "grid", "clip"], "where regions come from: feature files, "
                       "a detector, a classifier's grid, CLIP's patches; auto: files if any, else the "
                       "detector on a GPU, the grid without one"] = "auto"
    region_network: Annotated[str, "torchvision's network for them (default: fasterrcnn_resnet50_fpn_v2 for the "
                              "detector, resnet50 for the grid; clip uses --clip-model)"] = ""
    region_weights: Annotated[str, "its weights: a file, or a name such as COCO_V1 (default: the best published)"] = ""
    boxes: Annotated[int, "regions per picture, from a detector or a grid", (1, 500)] = 36
    picture_side: Annotated[int, "side of the network's input in pixels; 0: 800 (detector), 384 (grid)", (0, 1600)] = 0
    feature_dtype: Annotated[Literal["float32", "float16"], "how computed features are stored"] = "float16"
    skip_bad: Annotated[bool, "leave out pictures that cannot be read, and print how many"] = False
    cache: Annotated[str | None, "folder for what is computed from pictures (default: DATA_ROOT/cache)"] = None
    split_seed: Annotated[int, "seed of the splits of --dataset folder, if its table names none", (0, 2**32 - 1)] = 0


@dataclass
class Text:
    """Captions"""

    text_encoder: Annotated[str, "BERT: a hub name, a local folder, or from-scratch (scenes)"] = "bert-base-uncased"
    text_layers: Annotated[int, "how many of its layers are used, from the input on", (1, 100)] = 6
    longest: Annotated[int, "word pieces a caption is cut to, with [CLS] and [SEP]", (3, 512)] = 64
    noise: Annotated[float, "share of a caption's words hidden, changed or left out in training", (0, 0.99)] = 0.0


@dataclass
class Architecture:
    """Architecture (user has only --dim, and --dropout in its BERT)"""

    dim: Annotated[int, "D, size of the joint embedding", (2, 8192)] = 1024
    region_width: Annotated[int, "width of tgdt's region encoder; 0 is the features' own (paper)", (0, 8192)] = 0
    region_layers: Annotated[int, "layers of tgdt's region encoder", (1, 24)] = 4
    local_layers: Annotated[int, "layers of each local encoder, or fine level (tgdt-user)", (1, 24)] = 2
    global_layers: Annotated[int, "layers of tgdt's global encoders", (1, 24)] = 2
    heads: Annotated[int, "attention heads of each encoder", (1, 64)] = 4
    feedforward: Annotated[int, "feed-forward width of each encoder", (1, 32768)] = 2048
    dropout: Annotated[float, "dropout in each encoder", (0, 0.99)] = 0.1
    fine_gradient: Annotated[float, "share of the fine level's gradient that the tokens get (tgdt-user)", (0, 1)] = 0.0


@dataclass
class Enhancement:
    """Semantic enhancement (user, tgdt-user)"""

    guide: Annotated[Literal["none", "self", "clip"], "what enhances the regions: self is SGE, clip is CGE"] = "none"
    clip_model: Annotated[str, "CLIP of --guide clip: a hub name or a folder"] = "openai/clip-vit-base-patch32"
    guide_dropout: Annotated[float, "dropout in SGE", (0, 0.99)] = 0.4
    sharpness: Annotated[float, "lambda of the guide's attention over the regions", (0, 1000)] = 1.0
    fixed_regions: Annotated[int, "SGE has statistics for each of N regions, as released; 0 is off", (0, 500)] = 0


@dataclass
class CMC:
    """CMC loss (tgdt; of these, tgdt-user has --local-weight and --reduction)"""

    margin: Annotated[float, "margin of the inter-modal hinge", (0, 10)] = 0.2
    intra_margin: Annotated[float, "margin of the intra-modal consistency", (0, 10)] = 0.3
    local_weight: Annotated[float, "weight of the local similarity in re-ranking, and in CMC", (0, 1000)] = 10.0
    reduction: Annotated[Literal["sum", "mean"], "how a caption's words are pooled; sum is the paper's"] = "sum"


@dataclass
class UTO:
    """UTO loss (user, tgdt-user)"""

    mu: Annotated[float, "sharpness of the soft maximum over the negatives", (0.01, 10_000)] = 90.0
    gamma: Annotated[float, "similarity above which a negative counts", (-1, 1)] = 0.5
    batch_weight: Annotated[float, "weight of UTO on the batch; UTO on each queue has weight 1", (0, 1000)] = 20.0
    reward_floor: Annotated[bool, "no gradient for true pairs whose similarity is below zero, as released"] = True


@dataclass
class InfoNCE:
    """InfoNCE (tgdt-user; beside the papers' losses in tgdt and user)"""

    infonce_weight: Annotated[float, "weight of InfoNCE on every level that the model has", (0, 1000)] = 0.0
    temperature: Annotated[float, "temperature of its softmax", (0.001, 100)] = 0.05
    distill: Annotated[float, "share of its target that comes from the momentum copy, not the truth", (0, 1)] = 0.0


@dataclass
class Momentum:
    """Momentum contrast (user, tgdt-user; tgdt may have a copy, but no queue)"""

    queue: Annotated[int, "keys in each queue; 0 is UTO on the batch alone, without a queue", (0, 262_144)] = 2048
    momentum: Annotated[float, "share of itself that the momentum encoder keeps in a step", (0, 0.999999)] = 0.999
    keep: Annotated[Literal["model", "momentum"], "what is evaluated and kept as best.pt: the model, or its momentum "
                    "copy, an average of its last states (any model can have one)"] = "model"


@dataclass
class Training:
    """Training"""

    epochs: Annotated[int, "passes over the training captions", (1, 10_000)] = 60
    batch_size: Annotated[int, "captions in a batch, at most", (2, 16_384)] = 30
    captions_per_image: Annotated[int, "captions of an image that share a batch", (1, 1000)] = 1
    easy_epochs: Annotated[int, "number of first epochs in which CMC averages over all negatives", (0, 10_000)] = 0
    lr: Annotated[float, "peak learning rate", (1e-9, 10)] = 1e-5
    text_lr: Annotated[float, "learning rate of BERT, as a multiple of --lr; 0 freezes its weights", (0, 100)] = 1.0
    weight_decay: Annotated[float, "weight decay of AdamW; 0 makes it Adam", (0, 1)] = 0.0
    warmup: Annotated[int, "steps of linear warm-up", (0, 1_000_000)] = 1000
    schedule: Annotated[Literal["linear", "step", "constant"], "rate after the warm-up; linear falls to 0"] = "step"
    drop_every: Annotated[int, "epochs between two drops of --schedule step, each to a tenth", (1, 10_000)] = 20
    max_norm: Annotated[float, "largest norm of the gradient; longer ones are scaled to it", (1e-6, 1e6)] = 2.0


@dataclass
class Search:
    """Two-stage search"""

    captions_shortlist: Annotated[int, "captions on an image's shortlist", (1, 1_000_000)] = 50
    images_shortlist: Annotated[int, "images on a caption's shortlist", (1, 1_000_000)] = 100


@dataclass
class Settings:
    """Everything that decides a run's outcome. `make` gives the settings of a preset."""

    run: Run = field(default_factory=Run)
    pictures: Pictures = field(default_factory=Pictures)
    text: Text = field(default_factory=Text)
    architecture: Architecture = field(default_factory=Architecture)
    enhancement: Enhancement = field(default_factory=Enhancement)
    cmc: CMC = field(default_factory=CMC)
    uto: UTO = field(default_factory=UTO)
    infonce: InfoNCE = field(default_factory=InfoNCE)
    momentum: Momentum = field(default_factory=Momentum)
    training: Training = field(default_factory=Training)
    search: Search = field(default_factory=Search)


# ------------------------------------------------------------------------------------------------------ checks


class Field(NamedTuple):
    """What one line of a group says."""

    group: str
    type: type                         # bool, int, float or str
    optional: bool                     # may be None
    choices: tuple[str, ...]           # empty if any value of the type will do
    help: str
    range: tuple[float, float] | None  # of a number


GROUPS: dict[str, type] = get_type_hints(Settings)
FIELDS: dict[str, Field] = {}
for _group, _class in GROUPS.items():
    for _name, _hint in get_type_hints(_class, include_extras=True).items():
        _type, _help, *_range = get_args(_hint)
        _choices = get_args(_type) if get_origin(_type) is Literal else ()
        _optional = isinstance(_type, UnionType)  # str | None
        _plain = str if _choices or _optional else _type
        FIELDS[_name] = Field(_group, _plain, _optional, _choices, _help, _range[0] if _range else None)


def flag(name: str) -> str:
    """batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")


WITHOUT = {  # settings that have no effect with a model (it refuses --guide, if it has none)
    "tgdt": "guide_dropout sharpness fine_gradient mu gamma batch_weight reward_floor queue",
    "user": "region_width region_layers local_layers global_layers heads feedforward fine_gradient margin intra_margin "
            "local_weight reduction easy_epochs captions_shortlist images_shortlist",
    "tgdt-user": "region_width region_layers global_layers margin intra_margin easy_epochs",
}


def check_value(name: str, value: object) -> None:
    """Raises BadInput for a value of the wrong type, outside of the range or not among the choices."""
    known = FIELDS[name]
    right = isinstance(value, (int, float) if known.type is float else known.type)
    right = right and isinstance(value, bool) == (known.type is bool)  # in Python, True is an int
    right = right and (not known.choices or value in known.choices)
    right = right and (not known.range or known.range[0] <= value <= known.range[1])  # NaN is in no range
    if right or value is None and known.optional:
        return
    expected = " or ".join(known.choices) or {bool: "true or false", str: "text"}.get(known.type)
    if known.range:
        expected = f"a {'whole ' if known.type is int else ''}number from {known.range[0]:,} to {known.range[1]:,}"
    raise BadInput(f"{flag(name)} {value}: expected {expected}")


def check(settings: Settings) -> None:
    """Raises BadInput if a setting has a value that no run can have, or two settings contradict each other."""
    for name, value in flat(settings).items():
        check_value(name, value)
    run, shape, training, queue = settings.run, settings.architecture, settings.training, settings.momentum.queue
    if settings.text.text_encoder == "from-scratch" and run.dataset != "scenes":
        raise BadInput("--text-encoder from-scratch knows the words of scenes only; give a BERT's name or folder")
    if 0 < settings.pictures.picture_side < 32:
        raise BadInput(f"--picture-side {settings.pictures.picture_side}: expected 0, or at least 32 pixels")
    if settings.pictures.regions == "grid" and math.isqrt(boxes := settings.pictures.boxes) ** 2 != boxes:
        raise BadInput(f"--boxes {boxes}: a grid has a square number of cells, such as 36 or 49")
    if run.model == "tgdt" and settings.enhancement.guide != "none":
        raise BadInput(f"--guide {settings.enhancement.guide}: only --model user and --model tgdt-user have a guide")
    if (regions := settings.enhancement.fixed_regions) and settings.enhancement.guide != "self":
        raise BadInput(f"--fixed-regions {regions}: it is a part of SGE, expected --guide self")
    if run.model != "tgdt" and 0 < queue < training.batch_size:
        raise BadInput(f"--queue {queue}: expected at least --batch-size {training.batch_size}, or 0 for no queue")
    if (share := settings.infonce.distill) and settings.infonce.infonce_weight == 0:
        raise BadInput(f"--distill {share}: it is a part of InfoNCE, expected --infonce-weight above 0")
    if share and settings.momentum.keep == "model" and (run.model == "tgdt" or queue == 0):
        raise BadInput(f"--distill {share}: there is no momentum copy to learn from, expected --keep momentum"
                       + ("" if run.model == "tgdt" else " or a --queue"))
    if training.batch_size < 2 * training.captions_per_image:
        raise BadInput(f"--batch-size {training.batch_size}: expected at least {2 * training.captions_per_image}, "
                       "twice --captions-per-image, so that a batch has two images")
    for name, models in (("dim", ("tgdt", "tgdt-user")), ("region_width", ("tgdt",))):
        if run.model in models and getattr(shape, name) % shape.heads:
            raise BadInput(f"{flag(name)} {getattr(shape, name)}: expected a multiple of the {shape.heads} heads")


# --------------------------------------------------------------------------------------------- make, read, write


def make(given: dict) -> Settings:
    """The settings of the dataset, model and preset in `given`, with all other values in it put on top.

    given: setting -> value; None means not given. Raises BadInput for values that `check` refuses.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if unknown := given.keys() - FIELDS.keys():
        raise BadInput(f"no such setting: {', '.join(sorted(unknown))}")
    values = flat(Settings()) | given
    for name in ("dataset", "model", "preset"):
        check_value(name, values[name])
    for_model, for_datasets = PRESETS[values["preset"], values["model"]]
    return from_flat(values | for_model | for_datasets.get(values["dataset"], {}) | given)


def from_flat(values: dict) -> Settings:
    """The settings from the value of each, checked."""
    groups = {group: {name: values[name] for name, known in FIELDS.items() if known.group == group} for group in GROUPS}
    settings = Settings(**{group: GROUPS[group](**inside) for group, inside in groups.items()})
    check(settings)
    return settings


def flat(settings: Settings) -> dict:
    """setting -> value, without the groups."""
    return {name: getattr(getattr(settings, known.group), name) for name, known in FIELDS.items()}


def read(path: Path) -> Settings:
    """The settings that `write` wrote. Raises BadInput for a file of another shape, or values that `check` refuses."""
    stored = read_json(path)
    if not isinstance(stored, dict) or not all(isinstance(inside, dict) for inside in stored.values()):
        raise BadInput(f"{path}: expected the settings by group, as `train.py --print-settings` prints them")
    found = {(group, name) for group, inside in stored.items() for name in inside}
    known = {(field.group, name) for name, field in FIELDS.items()}
    if odd := sorted(found ^ known):
        what = "is missing" if odd[0] in known else "is no setting of this program"
        raise BadInput(f"{path}: {'.'.join(odd[0])} {what}")
    try:
        return from_flat({name: value for inside in stored.values() for name, value in inside.items()})
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None


def write(path: Path, settings: Settings) -> None:
    """Write the settings as JSON, one object per group."""
    write_json(path, asdict(settings))
