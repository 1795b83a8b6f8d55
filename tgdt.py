"""TGDT: the token-guided dual transformer.

Read beside Liu et al., "Efficient Token-Guided Image-Text Retrieval With Consistent Multimodal Contrastive
Training", the part on the architecture. There are two branches of the same kind, one for images and one for captions:

    regions + boxes -> region encoder -> Linear -> local encoder = region tokens -> global encoder = image vector
    word pieces     -> BERT, 6 layers -> Linear -> local encoder = word tokens   -> global encoder = text vector

The global encoder reads the local tokens: that is the token guidance. One pass gives both the fine tokens that the
local similarity aligns and the coarse vector that searches a million images. The symbols of the paper are listed in
docs/symbols.md.
"""
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Encoded(NamedTuple):
    """A branch's output for B inputs, in float32 (by `unit`). USER has no fine tokens, so tokens and mask are None."""

    globals: Tensor        # [B, D] unit length, the coarse embedding
    tokens: Tensor | None  # [B, T, D] unit length, the fine embeddings
    mask: Tensor | None    # [B, T] bool, True for real tokens
    plain: Tensor | None = None  # [B, T, D] unit length, in the unified model: tokens before the fine level


def transformer(width: int, layers: int, heads: int, feedforward: int, dropout: float) -> nn.TransformerEncoder:
    """A post-norm transformer encoder with ReLU over [B, T, width]. All encoders of TGDT but BERT are of this kind."""
    layer = nn.TransformerEncoderLayer(width, heads, feedforward, dropout, activation="relu", batch_first=True)
    # Nested tensors would cut the padding off and so change the shape of the output.
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def unit(vectors: Tensor) -> Tensor:
    """[..., D] -> [..., D] of unit length, in float32 or better: in bfloat16 the length is off by up to 0.5 %."""
    return F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1)


def box_geometry(boxes: Tensor) -> Tensor:
    """[B, R, 4] boxes in 0..1 -> [B, R, 5]: x1, y1, x2, y2 and the area (TGDT, region encoder)."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([x1, y1, x2, y2, (x2 - x1) * (y2 - y1)], -1)


class RegionEncoder(nn.Module):
    """Regions to contextual slots; slot 0 is the image token (TGDT, region encoder).

    A slot is a place in a transformer's sequence. feature_dim is F, width that of the transformer (F in the paper). The
    image token starts from the mean of the image's real regions and a box around the whole image. The released code
    starts it from zeros, and so does `zero_image_token`, which released weights need.
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
        """regions [B, R, F], boxes [B, R, 4] in 0..1, mask [B, R] -> slots [B, 1 + R, width], their mask [B, 1 + R]."""
        if self.zero_image_token:
            token, token_box = torch.zeros_like(regions[:, :1]), torch.zeros_like(boxes[:, :1])
        else:
            real = mask[:, :, None]                                                               # [B, R, 1]
            token = (regions * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)             # [B, 1, F]
            token_box = boxes.new_tensor([0.0, 0.0, 1.0, 1.0]).expand(len(boxes), 1, 4)           # [B, 1, 4]
        features = torch.cat([token, regions], 1)                                                 # [B, 1 + R, F]
        places = box_geometry(torch.cat([token_box, boxes], 1))                                   # [B, 1 + R, 5]
        mask = F.pad(mask, (1, 0), value=True)  # [B, 1 + R], the image token is always real
        slots = self.geometry(torch.cat([features, places], 2))                                   # [B, 1 + R, width]
        return self.encoder(slots, src_key_padding_mask=~mask), mask  # PyTorch's padding mask is True for padding


def first_layers(bert: nn.Module, layers: int) -> nn.Module:
    """Cut BERT to its first `layers` layers (TGDT, word encoder: six).

    BERT then returns what the full model has after that layer. Raises ValueError if it has fewer layers.
    """
    if not 1 <= layers <= len(bert.encoder.layer):
        raise ValueError(f"the text encoder has {len(bert.encoder.layer)} layers, {layers} were asked for")
    bert.encoder.layer = bert.encoder.layer[:layers]
    bert.config.num_hidden_layers = layers
    return bert


class TokenGuidedEncoder(nn.Module):
    """Slots to tokens, tokens to one vector (TGDT, token-guided dual transformer).

    Each branch has one of its own. Slot 0 is the image token or [CLS]; the *global* encoder's output for it is
    the coarse embedding. Both encoders see the padding mask. In the released code the global encoder does not, so the
    embedding of a caption changes with the longest caption of its batch.
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
        tokens = self.local_encoder(self.project(slots), src_key_padding_mask=~mask)              # [B, T, D]
        globals_ = self.global_encoder(tokens, src_key_padding_mask=~mask)[:, 0]                  # [B, D]
        return unit(globals_), unit(tokens)


class TGDT(nn.Module):
    """Both branches (TGDT, architecture). `bert` is a `BertModel` of transformers, already cut to its first layers.

    region_width 0 stands for the paper's choice, the width of the features. `batch` has the names and shapes of
    `data.Pairs`: regions [I, R, F], boxes [I, R, 4], region_mask [I, R]; word_ids and word_mask [B, W].
    """

    def __init__(
        self,
        bert: nn.Module,
        feature_dim: int = 2048,
        dim: int = 1024,
        region_width: int = 0,
        region_layers: int = 4,
        local_layers: int = 2,
        global_layers: int = 2,
        heads: int = 4,
        feedforward: int = 2048,
        dropout: float = 0.1,
        zero_image_token: bool = False,
    ):
        super().__init__()
        width = region_width or feature_dim
        self.region_encoder = RegionEncoder(
            feature_dim, width, region_layers, heads, feedforward, dropout, zero_image_token
        )
        self.bert = bert
        sizes = (local_layers, global_layers, heads, feedforward, dropout)  # alike in both branches
        self.image_branch = TokenGuidedEncoder(width, dim, *sizes)
        self.text_branch = TokenGuidedEncoder(bert.config.hidden_size, dim, *sizes)

    def encode_images(self, batch: Mapping[str, Tensor]) -> Encoded:
        """globals [I, D]; tokens [I, R, D], one per region, without the image token; mask [I, R]."""
        slots, mask = self.region_encoder(batch["regions"], batch["boxes"], batch["region_mask"])  # [I, 1 + R, width]
        globals_, tokens = self.image_branch(slots, mask)
        return Encoded(globals_, tokens[:, 1:], mask[:, 1:])

    def encode_texts(self, batch: Mapping[str, Tensor]) -> Encoded:
        """globals [B, D]; tokens [B, W - 2, D], one per word piece, without [CLS] and [SEP]; mask [B, W - 2]."""
        mask = batch["word_mask"]
        slots = self.bert(input_ids=batch["word_ids"], attention_mask=mask.long()).last_hidden_state  # [B, W, H]
        globals_, tokens = self.text_branch(slots, mask)
        # Slot 0 is [CLS] and the last real slot is [SEP], so a slot is a word if its right neighbour is real.
        return Encoded(globals_, tokens[:, 1:-1], mask[:, 2:])
