"""The unified model: USER's coarse search and TGDT's late interaction over the same tokens. Neither paper has it.

    regions     -> Linear + MLP   = region tokens -> GPO        = image vector
                                                  -> fine level = fine region tokens
    word pieces -> BERT -> Linear = word tokens   -> GPO        = text vector
                                                  -> fine level = fine word tokens

It is USER with TGDT's idea of token guidance: the coarse vector is pooled from the tokens that late interaction aligns.
InfoNCE trains three levels: the coarse vectors, the plain tokens, and the fine tokens. With a frozen text encoder, a
fine level of its own makes re-ranking worthwhile. It reads the tokens without their gradients, so that it cannot harm
the coarse vectors. docs/claims.md has the measurements behind these choices, and docs/results.md says that the model
falls behind USER once BERT is fine-tuned.
"""
from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from tgdt import Encoded, box_geometry
from user import USER


class FineLevel(nn.Module):
    """A pre-norm transformer encoder over tokens, without gradients to what is below.

    The last weights of each layer start at zero, so that at first it returns the tokens as they are.
    """

    def __init__(self, dim: int, layers: int, heads: int, feedforward: int, dropout: float):
        super().__init__()
        layer = nn.TransformerEncoderLayer(dim, heads, feedforward, dropout, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        for layer in self.encoder.layers:
            for last in (layer.self_attn.out_proj, layer.linear2):
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)

    def forward(self, tokens: Tensor, mask: Tensor, added: Tensor | float = 0.0) -> Tensor:
        """tokens [B, T, D], mask [B, T] bool; added [B, T, D], what the tokens do not say -> [B, T, D]."""
        return self.encoder(tokens.detach() + added, src_key_padding_mask=~mask)


class Unified(USER):
    """USER with a fine level (`layers`, `heads`, `feedforward` and `dropout` are the fine level's).

    The fine level of the images also sees where the regions lie, which the coarse vectors do not.
    """

    def __init__(
        self, bert: nn.Module, feature_dim: int = 2048, dim: int = 1024, guide: nn.Module | None = None,
        layers: int = 1, heads: int = 4, feedforward: int = 2048, dropout: float = 0.1,
    ):
        super().__init__(bert, feature_dim, dim, guide)
        self.geometry = nn.Linear(5, dim)
        nn.init.zeros_(self.geometry.weight)
        nn.init.zeros_(self.geometry.bias)
        self.fine_regions = FineLevel(dim, layers, heads, feedforward, dropout)
        self.fine_words = FineLevel(dim, layers, heads, feedforward, dropout)

    def encode_images(self, batch: Mapping[str, Tensor]) -> Encoded:
        """globals [B, D]; tokens and plain tokens [B, R, D], one a region; mask [B, R]."""
        plain, mask = self.region_tokens(batch)                                                 # [B, R, D]
        fine = self.fine_regions(plain, mask, self.geometry(box_geometry(batch["boxes"])))      # [B, R, D]
        globals_ = F.normalize(self.image_pool(plain, mask), dim=1)
        return Encoded(globals_, F.normalize(fine, dim=2), mask, F.normalize(plain, dim=2))

    def encode_texts(self, batch: Mapping[str, Tensor]) -> Encoded:
        """globals [B, D]; tokens and plain tokens [B, W - 2, D], one a word piece, without [CLS] and [SEP]; mask."""
        plain, mask = self.word_tokens(batch)                                                   # [B, W, D]
        fine = self.fine_words(plain, mask)                                                     # [B, W, D]
        globals_ = F.normalize(self.text_pool(plain, mask), dim=1)
        return Encoded(globals_, F.normalize(fine[:, 1:-1], dim=2), mask[:, 2:], F.normalize(plain[:, 1:-1], dim=2))
