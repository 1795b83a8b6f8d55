"""TGDT: the token-guided dual transformer.

Read beside Liu et al., "Efficient Token-Guided Image-Text Retrieval With Consistent Multimodal Contrastive
Training", the part on the architecture. Two homogeneous branches, one for a picture and one for a caption:

    regions + boxes -> region encoder -> Linear -> local encoder = region tokens -> global encoder = image vector
    word pieces     -> BERT, 6 layers -> Linear -> local encoder = word tokens   -> global encoder = text vector

The global encoder reads the local tokens: that is the token guidance. One pass gives the fine tokens that the local
similarity aligns and the coarse vector that searches a million pictures.
"""
from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel


class Encoded(NamedTuple):
    """What one branch gives for B inputs."""

    globals: Tensor  # [B, D] unit length: the coarse embedding
    tokens: Tensor   # [B, T, D] unit length: the fine embeddings
    mask: Tensor     # [B, T] bool: which of them are real


def transformer(width: int, layers: int, heads: int, feedforward: int, dropout: float) -> nn.TransformerEncoder:
    """A post-norm ReLU transformer encoder over [B, T, width]; every encoder of TGDT but BERT is one of these."""
    layer = nn.TransformerEncoderLayer(width, heads, feedforward, dropout, activation="relu", batch_first=True)
    # Nested tensors would cut the padding off and change the output's shape.
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def box_geometry(boxes: Tensor) -> Tensor:
    """[B, R, 4] boxes in 0..1 -> [B, R, 5]: x1, y1, x2, y2 and the area (TGDT, region encoder)."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([x1, y1, x2, y2, (x2 - x1) * (y2 - y1)], -1)


class RegionEncoder(nn.Module):
    """Regions to contextual slots; slot 0 is the image token (TGDT, region encoder).

    feature_dim is F, width the transformer's width (the papers use F). The image token starts from the mean of the
    picture's real regions and a box around the whole picture. The released code starts it from zeros;
    `zero_image_token` does the same for released weights.
    """

    def __init__(
        self, feature_dim: int, width: int, layers: int, heads: int, feedforward: int, dropout: float,
        zero_image_token: bool = False,
    ):
        super().__init__()
        self.zero_image_token = zero_image_token
        self.geometry = nn.Sequential(nn.Linear(feature_dim + 5, width), nn.ReLU(), nn.Linear(width, width))
        self.encoder = transformer(width, layers, heads, feedforward, dropout)

    def forward(self, regions: Tensor, boxes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """regions [B, R, F], boxes [B, R, 4] in 0..1, mask [B, R] -> slots [B, 1 + R, width], their mask."""
        if self.zero_image_token:
            token, token_box = torch.zeros_like(regions[:, :1]), torch.zeros_like(boxes[:, :1])
        else:
            real = mask[:, :, None].to(regions.dtype)
            token = (regions * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
            token_box = boxes.new_tensor([0.0, 0.0, 1.0, 1.0]).expand(len(boxes), 1, 4)
        slots = torch.cat([token, regions], 1)
        geometry = box_geometry(torch.cat([token_box, boxes], 1))
        mask = F.pad(mask, (1, 0), value=True)
        slots = self.geometry(torch.cat([slots, geometry], 2))
        return self.encoder(slots, src_key_padding_mask=~mask), mask


class TokenGuidedEncoder(nn.Module):
    """Slots to tokens, tokens to one vector (TGDT, token-guided dual transformer).

    The same module serves both branches. Slot 0 is the image token or [CLS]; its output of the *global* encoder is
    the coarse embedding. Both encoders see the padding mask: without it in the second, as in the released code, a
    caption's embedding changes with the longest caption of its batch.
    """

    def __init__(
        self, width: int, dim: int, local_layers: int, global_layers: int, heads: int, feedforward: int, dropout: float
    ):
        super().__init__()
        self.project = nn.Linear(width, dim)
        self.local_encoder = transformer(dim, local_layers, heads, feedforward, dropout)
        self.global_encoder = transformer(dim, global_layers, heads, feedforward, dropout)

    def forward(self, slots: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """slots [B, T, width], mask [B, T] -> globals [B, D], tokens [B, T, D], all of unit length."""
        tokens = self.local_encoder(self.project(slots), src_key_padding_mask=~mask)
        globals_ = self.global_encoder(tokens, src_key_padding_mask=~mask)[:, 0]
        return F.normalize(globals_, dim=-1), F.normalize(tokens, dim=-1)


class TGDT(nn.Module):
    """Both branches (TGDT). `bert` is a `BertModel`, already cut to the layers that are wanted.

    region_width None means the papers' choice, the features' own width. `guide` is no part of TGDT: the unified model
    puts one of USER's enhancements (`user.py`) in front of the region encoder. `batch` has the names and the shapes of
    `batching.Pairs`: regions [B, R, F], boxes [B, R, 4], region_mask [B, R]; word_ids and word_mask [B, W].
    """

    def __init__(
        self,
        bert: BertModel,
        feature_dim: int = 2048,
        dim: int = 1024,
        region_width: int | None = None,
        region_layers: int = 4,
        local_layers: int = 2,
        global_layers: int = 2,
        heads: int = 4,
        feedforward: int = 2048,
        dropout: float = 0.1,
        zero_image_token: bool = False,
        guide: nn.Module | None = None,
    ):
        super().__init__()
        width = region_width or feature_dim
        self.guide = guide
        shape = (local_layers, global_layers, heads, feedforward, dropout)
        self.region_encoder = RegionEncoder(
            feature_dim, width, region_layers, heads, feedforward, dropout, zero_image_token
        )
        self.bert = bert
        self.image_branch = TokenGuidedEncoder(width, dim, *shape)
        self.text_branch = TokenGuidedEncoder(bert.config.hidden_size, dim, *shape)

    def encode_images(self, batch: Mapping[str, Tensor]) -> Encoded:
        """globals [B, D]; tokens [B, R, D], one a region, without the image token; mask [B, R]."""
        regions, mask = batch["regions"], batch["region_mask"]
        if self.guide is not None:
            regions = self.guide(regions, mask, batch.get("clip"))
        slots, mask = self.region_encoder(regions, batch["boxes"], mask)
        globals_, tokens = self.image_branch(slots, mask)
        return Encoded(globals_, tokens[:, 1:], mask[:, 1:])

    def encode_texts(self, batch: Mapping[str, Tensor]) -> Encoded:
        """globals [B, D]; tokens [B, W - 2, D], one a word piece, without [CLS] and [SEP]; mask [B, W - 2]."""
        mask = batch["word_mask"]
        slots = self.bert(input_ids=batch["word_ids"], attention_mask=mask.long()).last_hidden_state
        globals_, tokens = self.text_branch(slots, mask)
        # Slot 0 is [CLS], and the last real slot is [SEP]: a slot is a word just where its right neighbour is real.
        return Encoded(globals_, tokens[:, 1:-1], mask[:, 2:])


# ---------------------------------------------------------------------------------------------- the word encoder


def first_layers(bert: BertModel, layers: int | None) -> BertModel:
    """Cut BERT to its first `layers` layers: its output is then the full model's hidden state of that number."""
    if layers is not None:
        if layers > len(bert.encoder.layer):
            raise ValueError(f"the text encoder has {len(bert.encoder.layer)} layers, {layers} were asked for")
        bert.encoder.layer = bert.encoder.layer[:layers]
        bert.config.num_hidden_layers = layers
    return bert


# ---------------------------------------------------------------------------------------------- released weights


RELEASED_NAMES = {  # theirs -> ours; what is not listed takes no part in the forward pass
    "img_txt_enc.txt_enc.bert_model.": "bert.",
    "img_txt_enc.img_enc.pos_encoding_image.map.": "region_encoder.geometry.",
    "img_txt_enc.img_enc.transformer_encoder.": "region_encoder.encoder.",
    "img_txt_enc.img_proj.": "image_branch.project.",
    "img_txt_enc.cap_proj.": "text_branch.project.",
    "img_txt_enc.transformer_encoder_2.": "image_branch.local_encoder.",
    "img_txt_enc.transformer_encoder_1.": "text_branch.local_encoder.",
    "img_txt_enc.transformer_encoder_img.": "image_branch.global_encoder.",
    "img_txt_enc.transformer_encoder_text.": "text_branch.global_encoder.",
}


def load_released(path: str | Path, text_config: BertConfig | None = None) -> TGDT:
    """The model, in eval mode, from the authors' `model_best_rsum.pth.tar`.

    The file holds {epoch, model, optimizer, scheduler, opt: Namespace, config: dict, Eiters}. It is read without
    running any code from it. text_config describes the BERT that was trained; None means `bert-base-uncased`.
    Raises ValueError, naming the file, when it is not such a checkpoint or its weights do not fit.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config, weights = checkpoint["config"], checkpoint["model"]
        layers = config["text-model"]["extraction-hidden-layer"]
        joint, image = config["model"], config["image-model"]
    except FileNotFoundError:
        raise
    except Exception as error:  # torch.load has many ways to fail on a file that is something else
        raise ValueError(f"{path} is not a released TGDT checkpoint: {type(error).__name__}: {error}") from error
    bert = first_layers(BertModel(text_config or BertConfig()), layers)
    model = TGDT(
        bert,
        feature_dim=image["feat-dim"],
        dim=joint["embed-size"],
        region_layers=image["transformer-layers"],
        local_layers=joint["layers"],
        global_layers=joint["layers"],
        dropout=joint["dropout"],
        zero_image_token=True,
    )
    take_weights(model, path, [(weights, RELEASED_NAMES)])
    return model.eval()


def take_weights(model: nn.Module, path: str | Path, states: Sequence[tuple[dict, dict]]) -> None:
    """Fill a model with released weights; states: pairs of a state dict and its names, theirs -> ours.

    Raises ValueError, naming the file, when one of the model's weights is missing or of another shape.
    """
    renamed = {ours + name.removeprefix(theirs): tensor for weights, names in states
               for name, tensor in weights.items() for theirs, ours in names.items() if name.startswith(theirs)}
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in renamed]
    unfit = [name for name in wanted if name in renamed and renamed[name].shape != wanted[name].shape]
    if missing or unfit:
        what = f"has no {missing[0]}" if missing else (
            f"{unfit[0]} is {list(renamed[unfit[0]].shape)}, expected {list(wanted[unfit[0]].shape)}")
        raise ValueError(f"{path}: {what} ({len(missing)} missing, {len(unfit)} of another shape)")
    model.load_state_dict({name: renamed[name] for name in wanted})
