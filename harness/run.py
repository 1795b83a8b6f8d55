"""A run: its settings, its model, its folder.

One dataclass holds every setting, with its help text; the presets are dictionaries of what differs. A run folder is
complete in itself: it holds the settings, the text encoder's shape and tokenizer, and the weights, so that it can be
moved to another machine and searched there.
"""
from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizer

import tgdt
import user
from sources import scenes
from sources.files import BadInput, read_json, write_json, write_whole

# ------------------------------------------------------------------------------------------------------ settings


def setting(default: object, help: str, choices: tuple[str, ...] | None = None) -> object:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Settings:
    """Everything that decides a run's outcome. The defaults are the small preset for real photographs."""

    dataset: str = setting("scenes", "what to train on", ("scenes", "flickr8k", "flickr30k", "coco", "folder"))
    data_root: str | None = setting(None, "folder of the dataset's files (not for scenes)")
    model: str = setting("tgdt", "which model", ("tgdt", "user", "tgdt-user"))
    preset: str = setting("small", "small: for a laptop; paper: the released sizes and rates", ("small", "paper"))
    seed: int = setting(0, "seed of weights, dropout, batch order and caption noise")
    # regions
    regions: str = setting("auto", "where regions come from: feature files, or pictures, by a detector, a classifier's "
                           "grid or CLIP's patches; auto: files where there are any, else the detector",
                           ("auto", "files", "detector", "grid", "clip"))
    region_network: str = setting("", "torchvision's network for them (none given: fasterrcnn_resnet50_fpn_v2 for the "
                                  "detector, resnet50 for the grid; --clip-model is that of clip)")
    region_weights: str = setting("", "its weights: a file, or a name such as COCO_V1 (none given: the best published)")
    boxes: int = setting(36, "regions a picture, of a detector or a grid")
    picture_side: int = setting(0, "pixels of a picture's side as the network sees it; 0: 800 detector, 384 grid")
    feature_dtype: str = setting("float32", "how computed features are kept", ("float32", "float16"))
    skip_bad: bool = setting(False, "go on without pictures that cannot be read, and say how many they are")
    cache: str | None = setting(None, "folder of what was computed from pictures (default DATA_ROOT/cache)")
    split_seed: int = setting(0, "seed by which --dataset folder draws splits where its table names none")
    # text
    text_encoder: str = setting("bert-base-uncased", "BERT: a hub name, a local folder, or from-scratch (scenes)")
    text_layers: int = setting(6, "how many of its layers to use, counted from the input")
    longest: int = setting(64, "captions are cut to so many word pieces, [CLS] and [SEP] counted")
    noise: float = setting(0.0, "part of a caption's words that are hidden, changed or left out while training")
    region_noise: float = setting(0.0, "part of a picture's regions that are left out while training")
    # guide (user, tgdt-user)
    guide: str = setting("none", "what enhances the regions: self is SGE, clip is CGE", ("none", "self", "clip"))
    clip_model: str = setting("openai/clip-vit-base-patch32", "CLIP of --guide clip: a hub name or a local folder")
    guide_dropout: float = setting(0.4, "dropout in SGE")
    sharpness: float = setting(1.0, "lambda of the guide's attention over the regions")
    slots: int = setting(0, "SGE's statistics slot by slot over so many regions, the released form; 0: masked")
    # architecture
    dim: int = setting(256, "D, size of the joint embedding")
    region_width: int = setting(512, "width of the region encoder; 0 is the features' own, as in the paper")
    region_layers: int = setting(1, "layers of the region encoder")
    local_layers: int = setting(1, "layers of each local encoder")
    global_layers: int = setting(1, "layers of each global encoder")
    heads: int = setting(4, "attention heads of every encoder")
    feedforward: int = setting(1024, "feed-forward width of every encoder")
    dropout: float = setting(0.1, "dropout in every encoder")
    # loss
    margin: float = setting(0.2, "margin of the inter-modal hinge")
    intra_margin: float = setting(0.3, "margin of the intra-modal consistency")
    local_weight: float = setting(10.0, "weight of local beside global similarity, in the loss and when re-ranking")
    words: str = setting("mean", "a caption's local similarity: sum (paper) or mean over words", ("sum", "mean"))
    easy_epochs: int = setting(1, "epochs with the mean over negatives before the hardest ones are taken")
    # momentum contrast (user, tgdt-user)
    queue: int = setting(2048, "keys in each of the two queues; 0: no momentum contrast, UTO on the batch alone")
    momentum: float = setting(0.999, "how much of itself a momentum encoder keeps at a step")
    mu: float = setting(90.0, "UTO's sharpness")
    gamma: float = setting(0.5, "similarity above which UTO counts a negative")
    reward_floor: bool = setting(False, "no gradient for true pairs whose similarity is below zero, as released")
    batch_weight: float = setting(20.0, "weight of UTO on the batch beside UTO on the queues")
    uto_weight: float = setting(0.03, "weight of UTO beside CMC (tgdt-user)")
    weights: str = setting("model", "what is evaluated and kept as best.pt: the model, or its momentum copy, an "
                           "average of what it has lately been (any model can have one)", ("model", "momentum"))
    # optimisation
    epochs: int = setting(10, "passes over the training captions")
    batch_size: int = setting(128, "captions a batch")
    captions_per_image: int = setting(1, "captions that stand together in a batch, their image encoded once")
    optimizer: str = setting("adamw", "which optimizer", ("adamw", "adam"))
    lr: float = setting(5e-4, "peak learning rate")
    text_lr: float = setting(0.1, "the text encoder's learning rate, as a part of the others'; 0: frozen")
    weight_decay: float = setting(1e-4, "weight decay")
    warmup: int = setting(100, "steps of linear warm-up")
    schedule: str = setting("linear", "after the warm-up: linear to 0, step (x 0.1), or constant",
                            ("linear", "step", "constant"))
    drop_every: int = setting(20, "epochs between two drops of the step schedule")
    clip: float = setting(2.0, "largest norm of the gradient")
    precision: str = setting("auto", "auto: bfloat16 on a GPU, float32 elsewhere", ("auto", "float32", "bfloat16"))
    # retrieval
    captions_shortlist: int = setting(50, "captions on an image's shortlist")
    images_shortlist: int = setting(100, "images on a caption's shortlist")

    def __post_init__(self):
        """Raises BadInput for a value that no run can have."""
        for name in ("epochs", "boxes", "text_layers", "dim", "heads", "feedforward", "captions_per_image",
                     "captions_shortlist", "images_shortlist", "drop_every", "local_layers", "global_layers",
                     "region_layers"):
            if getattr(self, name) < 1:
                raise BadInput(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 1")
        for name in ("noise", "region_noise", "dropout", "guide_dropout", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise BadInput(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 0, less than 1")
        if self.model == "tgdt" and self.guide != "none":
            raise BadInput(f"--guide {self.guide}: TGDT has no guide, --model user and --model tgdt-user have one")
        if self.model != "tgdt" and self.queue and self.queue < self.batch_size:
            raise BadInput(f"--queue {self.queue}: a batch's {self.batch_size} keys do not fit, expected at least that "
                           "many, or 0 for none")
        if self.mu <= 0:
            raise BadInput(f"--mu {self.mu}: expected more than 0")
        if self.batch_size < 2 * self.captions_per_image:
            raise BadInput(f"--batch-size {self.batch_size}: expected at least {2 * self.captions_per_image}, twice "
                           "--captions-per-image, so that there are two images and negatives")
        for name in ("dim", "region_width"):
            if getattr(self, name) % self.heads:
                raise BadInput(f"--{name.replace('_', '-')} {getattr(self, name)}: expected a multiple of the "
                               f"{self.heads} heads")

    @property
    def shortlist(self) -> tuple[int, int]:
        return self.captions_shortlist, self.images_shortlist


SCENES = {  # small preset, built-in scenes: words learnt from scratch, within three minutes on two cores
    "text_encoder": "from-scratch", "text_layers": 1, "text_lr": 1.0, "dim": 128, "region_width": 128,
    "feedforward": 256, "dropout": 0.0, "epochs": 5, "lr": 1e-3, "captions_per_image": 3, "batch_size": 72,
    "clip": 20.0, "schedule": "linear", "warmup": 100, "momentum": 0.999, "weights": "model",
}
USER = {  # small preset, USER: all captions of an image in one batch, a constant rate, and the average over it kept
    "guide": "self", "noise": 0.2, "dim": 1024, "epochs": 9, "batch_size": 160, "captions_per_image": 5, "lr": 1e-3,
    "schedule": "constant", "warmup": 0, "momentum": 0.997, "weights": "momentum",
}
PAPER = {  # the released configuration for Flickr30K (TGDT)
    "text_layers": 6, "dim": 1024, "region_width": 0, "region_layers": 4, "local_layers": 2, "global_layers": 2,
    "feedforward": 2048, "words": "sum", "easy_epochs": 0, "epochs": 60, "batch_size": 30, "optimizer": "adam",
    "lr": 1e-5, "text_lr": 1.0, "weight_decay": 0.0, "warmup": 1000, "schedule": "step", "drop_every": 20,
}
PAPER_USER = {  # the released configuration for Flickr30K (USER)
    "guide": "self", "noise": 0.2, "text_layers": 12, "dim": 1024, "epochs": 20, "schedule": "step", "drop_every": 10,
    "warmup": 0,
}
COCO = {"tgdt": {"batch_size": 40}, "user": {"epochs": 25, "drop_every": 15, "queue": 4096, "batch_weight": 1.0}}


def make_settings(given: dict) -> Settings:
    """Settings from what the user gave by name; the rest comes from the preset, then from the defaults."""
    dataset, model, preset = (given.get(name) or default for name, default in
                              (("dataset", "scenes"), ("model", "tgdt"), ("preset", "small")))
    chosen: dict = {}
    if preset == "paper":
        chosen |= PAPER_USER if model == "user" else PAPER
        chosen |= COCO["user" if model == "user" else "tgdt"] if dataset == "coco" else {}
        chosen |= {"text_encoder": "from-scratch", "text_layers": 2} if dataset == "scenes" else {}
    else:
        chosen |= USER if model == "user" else {}
        chosen |= SCENES if dataset == "scenes" else {}
    if model == "tgdt-user":  # no paper has it: TGDT's preset with USER's guide and noise
        chosen |= {"guide": "self", "noise": 0.2}
    if dataset == "scenes":  # every word of their captions counts: noise takes away what twins differ in
        chosen |= {"noise": 0.0}
    return Settings(**chosen | {name: value for name, value in given.items() if value is not None})


# --------------------------------------------------------------------------------------------------------- model


def text_encoder(settings: Settings) -> tuple[BertModel, BertTokenizer]:
    """The word encoder, cut to the layers wanted, and its tokenizer.

    "from-scratch" is a BERT of random weights over the closed vocabulary of the scenes. Anything else goes to
    `from_pretrained`. Raises BadInput when that finds nothing.
    """
    name = settings.text_encoder
    if name == "from-scratch":
        if settings.dataset != "scenes":
            raise BadInput("--text-encoder from-scratch knows the words of scenes only; give a BERT's name or folder")
        vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *scenes.VOCABULARY]
        tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)})
        config = BertConfig(
            vocab_size=len(vocabulary), hidden_size=128, num_hidden_layers=settings.text_layers,
            num_attention_heads=4, intermediate_size=256, max_position_embeddings=settings.longest,
            hidden_dropout_prob=settings.dropout, attention_probs_dropout_prob=settings.dropout,
        )
        return BertModel(config, add_pooling_layer=False), tokenizer
    transformers.logging.set_verbosity_error()  # else it reports at length on the pooler, which is not used
    transformers.logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        bert = BertModel.from_pretrained(name, add_pooling_layer=False, hidden_dropout_prob=settings.dropout,
                                         attention_probs_dropout_prob=settings.dropout)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"cannot load the text encoder {name!r}: neither a folder with config.json, weights and tokenizer nor a "
            f"model of huggingface.co within reach. Download huggingface.co/{name} elsewhere and give its folder to "
            f"--text-encoder. ({str(error).splitlines()[0]})"
        ) from error
    try:
        return tgdt.first_layers(bert, settings.text_layers), tokenizer
    except ValueError as error:
        raise BadInput(f"--text-layers: {error}") from error


def build(settings: Settings, bert: BertModel, feature_dim: int, clip_dim: int = 0) -> tgdt.TGDT | user.USER:
    """The model that the settings describe, for region features of `feature_dim` numbers and CLIP's of `clip_dim`."""
    guide = None
    if settings.guide == "self":
        guide = user.SelfGuidedEnhancement(feature_dim, settings.guide_dropout, settings.sharpness, settings.slots)
    elif settings.guide == "clip":
        guide = user.CLIPGuidedEnhancement(clip_dim, feature_dim, settings.sharpness)
    if settings.model == "user":
        return user.USER(bert, feature_dim, settings.dim, guide)
    return tgdt.TGDT(
        bert, feature_dim, settings.dim, settings.region_width or None, settings.region_layers,
        settings.local_layers, settings.global_layers, settings.heads, settings.feedforward, settings.dropout,
        guide=guide,
    )


def resolve(device: str, precision: str) -> tuple[torch.device, str]:
    """What "auto" means here: the first GPU where there is one, and bfloat16 on it. Raises BadInput without one."""
    if device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: this machine has no GPU that PyTorch can use; --device cpu does without")
    found = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    return found, ("bfloat16" if found.type == "cuda" else "float32") if precision == "auto" else precision


# -------------------------------------------------------------------------------------------------------- folder


def read_checkpoint(path: Path) -> dict:
    """A checkpoint that this program wrote. Raises BadInput for anything else; runs no code from the file."""
    if not path.is_file():
        raise BadInput(f"{path}: no such checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load fails in many ways on a file that is something else
        raise BadInput(f"{path}: not a checkpoint, or a damaged one ({type(error).__name__})") from error
    wanted = {"settings", "feature_dim", "seen", "bert", "model", "epoch"}
    if not isinstance(checkpoint, dict) or not wanted <= checkpoint.keys():
        raise BadInput(f"{path}: not a checkpoint of this program (it has no {', '.join(sorted(wanted))})")
    return checkpoint


def stored_settings(folder: Path) -> Settings:
    """The settings of the run in `folder`. Raises BadInput when there is none, or one of another program version."""
    if not (folder / "settings.json").is_file():
        raise BadInput(f"{folder}: no run here (no settings.json)")
    values = read_json(folder / "settings.json")
    known = {f.name for f in fields(Settings)}
    if values.keys() != known:
        odd = sorted(values.keys() ^ known)
        raise BadInput(f"{folder / 'settings.json'}: not the settings of this program ({', '.join(odd[:5])})")
    return Settings(**values)


def resumed(out: Path, given: dict) -> Settings:
    """The settings of the run in `out`; what was given anew must agree with them, but for a larger --epochs."""
    stored = stored_settings(out)
    for name, value in given.items():
        before = getattr(stored, name)
        if value is not None and value != before:
            if name != "epochs" or value < before:
                raise BadInput(f"{out} holds a run with --{name.replace('_', '-')} {before}, not {value}: "
                               "resume it with its own settings (more --epochs are welcome), or give another --out")
            stored.epochs = value
    return stored


def open_run(folder: Path) -> tuple[Settings, dict, tgdt.TGDT | user.USER, BertTokenizer]:
    """A trained model and its tokenizer from a run folder: the best checkpoint, or the last where none is best yet.

    Returns the settings, the checkpoint, the model in eval mode and the tokenizer. Raises BadInput.
    """
    settings = stored_settings(folder)
    best, last = folder / "best.pt", folder / "checkpoint.pt"
    path = best if best.is_file() else last
    checkpoint = read_checkpoint(path)
    model = build(settings, BertModel(BertConfig(**checkpoint["bert"]), add_pooling_layer=False),
                  checkpoint["feature_dim"], (checkpoint["seen"]["clip"] or {}).get("dim", 0))
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise BadInput(f"{path}: its weights do not fit {folder / 'settings.json'}") from error
    try:
        return settings, checkpoint, model.eval(), AutoTokenizer.from_pretrained(folder / "tokenizer")
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder / 'tokenizer'}: no tokenizer that can be read") from error


def check_width(folder: Path, checkpoint: dict, feature_dim: int) -> None:
    """Raises BadInput when the data's features are not as wide as those the run was trained on."""
    if feature_dim != checkpoint["feature_dim"]:
        raise BadInput(f"{folder} was trained on region features of {checkpoint['feature_dim']} numbers, the data has "
                       f"{feature_dim}")


def save_settings(folder: Path, settings: Settings) -> None:
    write_json(folder / "settings.json", asdict(settings))


# ------------------------------------------------------------------------------------------------------ its state


@dataclass
class State:
    """Where a run stands: all that an exact resume needs, and what a checkpoint holds."""

    settings: Settings
    model: torch.nn.Module
    momentum: user.MomentumContrast | None
    optimizer: torch.optim.Optimizer
    inputs: dict  # feature_dim, seen (see extract.prepare) and bert: what building the model needs beside the settings
    device: torch.device
    epoch: int = 0
    step: int = 0  # of the epoch in hand
    total: float = 0.0  # sum and count of the losses looked at in it
    count: int = 0
    history: list[dict] = field(default_factory=list)

    @property
    def kept(self) -> torch.nn.Module:
        """What is evaluated, and kept where it is the best so far."""
        return self.momentum.encoder if self.settings.weights == "momentum" else self.model

    def save_best(self, path: Path) -> None:
        state = self.inputs | {"settings": asdict(self.settings), "epoch": self.epoch, "model": self.kept.state_dict()}
        write_whole(path, lambda file: torch.save(state, file))

    def save(self, path: Path) -> None:
        state = self.inputs | {"settings": asdict(self.settings), "rng": torch.get_rng_state()}
        state |= {name: getattr(self, name) for name in ("epoch", "step", "total", "count", "history")}
        state |= {name: part.state_dict() for name, part in self.parts().items()}
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state()
        write_whole(path, lambda file: torch.save(state, file))

    def restore(self, saved: dict) -> None:
        for name, part in self.parts().items():
            part.load_state_dict(saved[name])
        for name in ("epoch", "step", "total", "count", "history"):
            setattr(self, name, saved[name])
        torch.set_rng_state(saved["rng"])
        if self.device.type == "cuda" and "cuda_rng" in saved:
            torch.cuda.set_rng_state(saved["cuda_rng"])

    def parts(self) -> dict:
        parts = {"model": self.model, "momentum": self.momentum, "optimizer": self.optimizer}
        return {name: part for name, part in parts.items() if part is not None}
