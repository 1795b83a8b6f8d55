"""The run folder: what is read back from it, and checked.

A run folder is complete in itself. It holds the settings, the shape and the tokenizer of the text encoder, and the
weights, so that it can be moved to another machine and searched there.
"""
import hashlib
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizer

import data
from harness import models
from harness import settings as settings_
from harness.settings import Settings
from sources.features import Stored
from sources.files import BadInput, explained, read_weights

PARTS = ("settings.json", "checkpoint.pt", "best.pt", "tokenizer", "history.jsonl", "metrics.json", "curves.png",
         "retrieval.png", "alignment.png", "guide.png", "manifest.json")  # of a run folder, and of an index
# What every checkpoint of ours holds.
CHECKPOINT = {"settings": dict, "feature_dim": int, "seen": dict, "bert": dict, "train_data": str, "model": dict,
              "epoch": int}
# Where a model's regions may come from: files, or a network of `sources/networks.py`.
KINDS = ("files", "detector", "grid", "clip", "scenes")
# What decides the shape of a BERT. Nothing else of a checkpoint reaches transformers.
BERT = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
        "max_position_embeddings", "type_vocab_size", "layer_norm_eps", "pad_token_id", "hidden_dropout_prob",
        "attention_probs_dropout_prob")


class Opened(NamedTuple):
    """A trained run, ready to encode."""

    settings: Settings
    checkpoint: dict
    model: nn.Module  # in eval mode
    tokenizer: BertTokenizer


def best_checkpoint(folder: Path) -> Path:
    """best.pt, or checkpoint.pt if no epoch has ended yet."""
    return folder / "best.pt" if (folder / "best.pt").exists() else folder / "checkpoint.pt"


def read_checkpoint(path: Path) -> dict:
    """A checkpoint that this program wrote. Raises BadInput if it is anything else; runs no code from the file."""
    checkpoint = read_weights(path, "a checkpoint of this program")
    if not isinstance(checkpoint, dict) or not all(
            isinstance(checkpoint.get(name), kind) for name, kind in CHECKPOINT.items()):
        raise BadInput(f"{path}: not a checkpoint of this program, which has {', '.join(sorted(CHECKPOINT))}")
    with explained(path, "a checkpoint that says what computed its regions"):
        regions, clip = checkpoint["seen"]["regions"], checkpoint["seen"]["clip"]
        known = regions["kind"] in KINDS and (not clip or clip["kind"] == "clip-guide")  # these become names of folders
        sizes = [] if regions["kind"] == "files" else [regions["regions"], regions["dim"]]
        sizes += [clip["dim"]] if clip else []
        if not known or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(f"found {regions} and {clip}")
    return checkpoint


def read_settings(folder: Path) -> Settings:
    """The settings of the run in `folder`. Raises BadInput if there is no run."""
    if not (folder / "settings.json").is_file():
        hint = "; it is an index: name its run" if (folder / "manifest.json").is_file() else ""
        raise BadInput(f"{folder}: no run here (no settings.json){hint}")
    return settings_.read(folder / "settings.json")


MAY_CHANGE = ("data_root", "cache", "region_weights", "clip_model", "skip_bad")  # where files are; --skip-bad


def resumed_settings(folder: Path, given: dict) -> Settings:
    """The settings to go on with: those of the run in `folder`, with what may change taken from `given`.

    given: what the command line says, by field name; None means not given. Files may have moved, and more epochs may
    be asked for. Raises BadInput if anything else differs.
    """
    values = settings_.flat(read_settings(folder))
    if not (folder / "checkpoint.pt").is_file() and (folder / "best.pt").is_file():
        raise BadInput(f"{folder / 'checkpoint.pt'}: missing, so the run cannot go on; best.pt can still be searched")
    for name, value in given.items():
        before = values[name]
        if value is None or value == before or (name, value) == ("regions", "auto"):  # settings.json has what it became
            continue
        if name not in MAY_CHANGE and (name != "epochs" or value < before):
            raise BadInput(f"{folder} holds a run with {settings_.flag(name)} {before}, not {value}: resume it with "
                           "its own settings (more --epochs are allowed), or give another --out")
        values[name] = value
    return settings_.from_flat(values)


def check_settings(path: Path, checkpoint: dict, settings: Settings) -> None:
    """Raises BadInput if a checkpoint belongs to other settings than those in settings.json."""
    for group, inside in asdict(settings).items():
        known = checkpoint["settings"].get(group)
        for name, value in inside.items():
            before = known.get(name) if isinstance(known, dict) else None
            if before != value and name not in (*MAY_CHANGE, "epochs"):
                raise BadInput(f"{path} was made with {settings_.flag(name)} {before}, but settings.json beside it "
                               f"says {value}")


def last_checkpoint(folder: Path, settings: Settings) -> dict | None:
    """checkpoint.pt, to go on from; None if there is none yet. Raises BadInput if it or best.pt is damaged."""
    path = folder / "checkpoint.pt"
    if not path.is_file():
        return None
    checkpoint = read_checkpoint(path)
    check_settings(path, checkpoint, settings)
    if (best := folder / "best.pt").exists():
        read_checkpoint(best)
    elif checkpoint["epoch"] > 0:
        print(f"warning: {best} is missing; the next epoch writes a new one", file=sys.stderr)
    return checkpoint


def open_run(folder: Path) -> Opened:
    """The trained model of a run folder: the best checkpoint, or the last one if no epoch has ended yet.

    Raises BadInput if a part of the folder is missing, damaged, or does not fit the others.
    """
    settings, path = read_settings(folder), best_checkpoint(folder)
    checkpoint = read_checkpoint(path)
    if path.name == "checkpoint.pt" and checkpoint["epoch"] > 0:
        raise BadInput(f"{folder / 'best.pt'}: missing, though {checkpoint['epoch']} epochs have ended")
    with explained(path, f"a checkpoint that fits {folder / 'settings.json'}"):
        check_settings(path, checkpoint, settings)
        bert, tokenizer = text_encoder(path, checkpoint)
        clip_dim = (checkpoint["seen"]["clip"] or {}).get("dim", 0)
        model = models.build(settings, bert, checkpoint["feature_dim"], clip_dim)
        model.load_state_dict(checkpoint["model"])
    return Opened(settings, checkpoint, model.eval(), tokenizer)


def text_encoder(path: Path, checkpoint: dict) -> tuple[BertModel, BertTokenizer]:
    """A BERT of the shape that checkpoint `path` has, not yet with its weights, and the tokenizer of its run.

    Raises BadInput if the tokenizer cannot be read or belongs to another BERT, or if no BERT has this shape.
    """
    try:
        tokenizer = models.read_tokenizer(path.parent / "tokenizer", trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many kinds
        raise BadInput(f"{path.parent / 'tokenizer'}: the tokenizer cannot be read") from error
    with explained(path, "a checkpoint with the shape of a BERT"):
        config = BertConfig(**{name: checkpoint["bert"][name] for name in BERT})
        bert = BertModel(config, add_pooling_layer=False)
    if (highest := max(tokenizer.get_vocab().values())) >= config.vocab_size:
        raise BadInput(f"{path.parent / 'tokenizer'}: has word pieces with numbers up to {highest}, but the BERT of "
                       f"{path.name} knows {config.vocab_size}: it belongs to another run")
    return bert, tokenizer


def content(split: data.Split) -> str:
    """A digest of all that an index keeps of a split: see `fingerprint`, and the names of its images."""
    whole = "\n".join([fingerprint(split), *split.image_names])
    return hashlib.blake2b(whole.encode(errors="surrogateescape"), digest_size=16).hexdigest()


def check_features(folder: Path, checkpoint: dict, feature_dim: int) -> None:
    """Raises BadInput if the data's features are not as wide as those that the run was trained on."""
    if feature_dim != checkpoint["feature_dim"]:
        raise BadInput(f"{folder} was trained on region features of {checkpoint['feature_dim']} numbers, the data has "
                       f"{feature_dim}")


def check_data(folder: Path, checkpoint: dict, inputs: dict) -> None:
    """Raises BadInput if the data that a run would go on with, see `Run.inputs`, is not what it began with."""
    check_features(folder, checkpoint, inputs["feature_dim"])
    for name in ("train", "val"):
        if checkpoint.get(f"{name}_data", inputs[f"{name}_data"]) != inputs[f"{name}_data"]:
            raise BadInput(f"{folder}: the captions or features of split {name} have changed since the run began")


def fingerprint(split: data.Split) -> str:
    """A digest of a split: its captions, the image of each, and the features of some 16 to 32 of its images.

    Features that a network computed from pictures differ a little between a GPU and a CPU. So for these the
    digest covers the pictures, all of them. (The network is compared elsewhere, see `pictures.prepare`.)
    """
    hashed = hashlib.blake2b(digest_size=16)
    hashed.update("\n".join(split.captions).encode())
    hashed.update(np.asarray(split.image_of, np.int64).tobytes())
    if isinstance(split.features, Stored):
        hashed.update(" ".join(split.features.digests()).encode())
        return hashed.hexdigest()
    for row in sorted({*range(0, len(split.features), max(1, len(split.features) // 16)), len(split.features) - 1}):
        for array in split.features.read([row]):
            hashed.update(array.tobytes())
    return hashed.hexdigest()


def check_finite(model: nn.Module, out: Path, epoch: int, step: int) -> None:
    """Raises BadInput if a weight of the model is not finite."""
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise diverged(out, "a weight is not finite", epoch, step)


def diverged(out: Path, found: str, epoch: int, step: int) -> BadInput:
    """The error of a training whose numbers are not finite any more."""
    kept = out / "checkpoint.pt"
    return BadInput(f"{found} at epoch {epoch + 1}, step {step}: training diverged, try a smaller --lr. "
                    + (f"{kept} holds the last good state" if kept.is_file() else "Nothing was kept"))
