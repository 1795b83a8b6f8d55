"""From settings to the things they describe: the text encoder, the model, the device."""
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertModel, BertTokenizer

import data
import tgdt
import unified
import user
from harness.settings import Settings
from sources import hub, scenes
from sources.files import BadInput


def text_encoder(settings: Settings) -> tuple[BertModel, BertTokenizer]:
    """BERT, cut to the layers wanted, and its tokenizer.

    "from-scratch" is a small BERT of random weights over the words of the scenes. Any other name is a local folder or a
    model of huggingface.co. Raises BadInput if it cannot be had or does not fit. Never runs code that comes with a
    model.
    """
    name, dropout = settings.text.text_encoder, settings.architecture.dropout
    if name == "from-scratch":
        vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *scenes.VOCABULARY]
        tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)})
        config = BertConfig(
            vocab_size=len(vocabulary), hidden_size=128, num_hidden_layers=settings.text.text_layers,
            num_attention_heads=4, intermediate_size=256, max_position_embeddings=settings.text.longest,
            hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        )
        return BertModel(config, add_pooling_layer=False), tokenizer
    options = hub.options(name)
    try:
        tokenizer = read_tokenizer(name, **options)
        bert, found = BertModel.from_pretrained(
            name, add_pooling_layer=False, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
            is_decoder=False, add_cross_attention=False, attn_implementation="sdpa",  # whatever config.json says
            output_loading_info=True, dtype=torch.float32, **options)
    except Exception as error:  # transformers raises many kinds for a folder that is missing or damaged
        files = "config.json, tokenizer.json, tokenizer_config.json and model.safetensors"
        raise hub.cannot_load("text encoder", name, files, "--text-encoder", options["local_files_only"],
                              error) from error
    if missing := sorted(found["missing_keys"]):  # transformers would fill them with random numbers
        raise BadInput(f"the text encoder {name!r} of --text-encoder is not a BERT: it has no {missing[0]}, and "
                       f"{len(missing) - 1} more are missing")
    if any(piece.startswith("\u2581") for piece in tokenizer.get_vocab()):  # as in SentencePiece, which XLM-R uses
        raise BadInput(f"the text encoder {name!r} of --text-encoder does not read BERT's word pieces, and would not "
                       "know a single word; take one with BERT's own tokenizer")
    highest = max(tokenizer.get_vocab().values())
    if highest >= bert.config.vocab_size or highest >= len(tokenizer):
        raise BadInput(f"the text encoder {name!r} of --text-encoder has {len(tokenizer)} word pieces with numbers up "
                       f"to {highest} and a BERT for {bert.config.vocab_size}: they do not belong together")
    if settings.text.longest > (most := bert.config.max_position_embeddings):
        raise BadInput(f"--longest {settings.text.longest}: the text encoder {name!r} reads {most} word pieces at most")
    try:
        return tgdt.first_layers(bert, settings.text.text_layers), tokenizer
    except ValueError as error:
        raise BadInput(f"--text-layers: {error}") from error


def read_tokenizer(name: str | Path, **options) -> BertTokenizer:
    """BERT's tokenizer with the vocabulary of a folder or a model of the hub. No file there can name another class.

    Raises OSError or ValueError if there is none. options: for `from_pretrained`.
    """
    tokenizer = BertTokenizer.from_pretrained(name, **options)
    if len(tokenizer) == len(tokenizer.all_special_ids):  # without a vocabulary, transformers makes one of no words
        raise OSError("there is neither tokenizer.json nor vocab.txt")
    return tokenizer


def build(settings: Settings, bert: BertModel, feature_dim: int, clip_dim: int = 0) -> torch.nn.Module:
    """The model of the settings, for region features of `feature_dim` numbers and CLIP embeddings of `clip_dim`.

    Raises BadInput if the region encoder is as wide as the features (`--region-width 0`), and the heads do not divide
    that.
    """
    enhancement, shape = settings.enhancement, settings.architecture
    guide = None
    if enhancement.guide == "self":
        guide = user.SelfGuidedEnhancement(
            feature_dim, enhancement.guide_dropout, enhancement.sharpness, enhancement.fixed_regions)
    elif enhancement.guide == "clip":
        guide = user.CLIPGuidedEnhancement(clip_dim, feature_dim, enhancement.sharpness)
    if settings.run.model == "user":
        return user.USER(bert, feature_dim, shape.dim, guide)
    if settings.run.model == "tgdt-user":
        return unified.Unified(bert, feature_dim, shape.dim, guide, shape.local_layers, shape.heads, shape.feedforward,
                               shape.dropout, shape.fine_gradient)
    if not shape.region_width and feature_dim % shape.heads:
        raise BadInput(f"--region-width 0 is the width of the features, {feature_dim}: expected a multiple of the "
                       f"{shape.heads} heads; give another --region-width or other --heads")
    return tgdt.TGDT(
        bert, feature_dim, shape.dim, shape.region_width, shape.region_layers, shape.local_layers,
        shape.global_layers, shape.heads, shape.feedforward, shape.dropout,
    )


def warn(splits: dict[str, data.Split], words: dict[str, list[np.ndarray]], tokenizer: BertTokenizer) -> None:
    """Say on standard error what makes the figures of a run worth little: few images, or words that BERT lacks."""
    for name, split in splits.items():
        if name != "train" and (count := len(split.image_names)) < 10:
            print(f"warning: the {name} split has {count} images, so its figures say little", file=sys.stderr)
    warn_of_unknown(words["train"], tokenizer)


def warn_of_unknown(words: list[np.ndarray], tokenizer: BertTokenizer) -> None:
    """Say on standard error if the text encoder does not know more than one in a hundred of the word pieces."""
    pieces = np.concatenate([ids[1:-1] for ids in words])
    if (unknown := int((pieces == tokenizer.unk_token_id).sum())) > 0.01 * len(pieces):
        print(f"warning: the text encoder does not know {unknown:,} of {len(pieces):,} word pieces", file=sys.stderr)


def warn_of_long(words: list[np.ndarray], longest: int) -> None:
    """Say on standard error if a query is as long as the longest caption that is read, for its end may be cut off."""
    if any(len(ids) == longest for ids in words):
        print(f"warning: only the first {longest - 2} word pieces of a caption are read", file=sys.stderr)


def gpu_fault() -> str:
    """Why PyTorch cannot compute on a GPU here; nothing if it can."""
    if not torch.cuda.is_available():
        without = "" if torch.version.cuda or torch.version.hip else ", and was built without CUDA: see pytorch.org"
        return f"PyTorch finds no GPU on this machine{without}"
    try:
        torch.ones(1, device="cuda").add_(1).item()
    except RuntimeError as error:
        if "no kernel image" not in str(error):
            raise
        return "this PyTorch was not built for a GPU as old as this one: pytorch.org has older builds"
    return ""


def resolve(device: str, precision: str) -> tuple[torch.device, str]:
    """What "auto" means on this machine: its first GPU, else the CPU; bfloat16 on a GPU that has it, else float32.

    Also turns TF32 off in cuDNN. Raises BadInput for "cuda" where there is no GPU.
    """
    fault = "" if device == "cpu" else gpu_fault()
    if device == "cuda" and fault:
        raise BadInput(f"--device cuda: {fault}; use --device cpu")
    if fault and torch.cuda.is_available():
        print(f"warning: {fault}; using the CPU", file=sys.stderr)
    found = torch.device("cpu" if device == "cpu" or fault else "cuda")
    if precision == "auto":  # older GPUs emulate bfloat16, and are slow with it
        fast = found.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bfloat16" if fast else "float32"
    torch.backends.cudnn.allow_tf32 = False  # GPO's recurrent network would round float32 to 10 bits otherwise
    return found, precision
