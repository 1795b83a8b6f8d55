"""The unified model: USER's coarse vectors and TGDT's late interaction, made of the same tokens. Neither paper has it.

    regions     -> Linear + MLP   = region tokens -> GPO        = image vector
                                                  -> fine level = fine region tokens
    word pieces -> BERT -> Linear = word tokens   -> GPO        = text vector
                                                  -> fine level = fine word tokens

It is USER with TGDT's idea of token guidance: the coarse vector is pooled from tokens that learn to be aligned as well.
The fine level makes fine tokens of them, which re-rank; it also sees the boxes. InfoNCE trains three levels: the coarse
vectors, the plain tokens, and the fine tokens. On photographs half of its answers come from the momentum copy, which
soon is the better model (momentum distillation). A fine level of its own makes re-ranking worthwhile. Its gradient
stops at the tokens below, because the coarse vectors would pay for it. docs/unified.md has the measurements behind
these choices, and docs/results.md has the model beside both papers'.
"""
from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from tgdt import Encoded, box_geometry, unit
from user import USER


def fine_level(dim: int, layers: int, heads: int, feedforward: int, dropout: float) -> nn.TransformerEncoder:
    """A pre-norm transformer encoder over tokens, [B, T, D] -> [B, T, D].

    The last weights of each layer start at zero, so that at first it returns the tokens as they are.
    """
    layer = nn.TransformerEncoderLayer(dim, heads, feedforward, dropout, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    for each in encoder.layers:
        for last in (each.self_attn.out_proj, each.linear2):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
    return encoder


class Unified(USER):
    """USER with a fine level (`layers`, `heads`, `feedforward` and `dropout` are the fine level's).

    The fine level of the images also sees where the regions lie, which the coarse vectors do not. fine_gradient: the
    share of the fine level's gradient that reaches the tokens below, 0 to 1. With 0 it cannot harm the coarse vectors.
    """

    def __init__(
        self, bert: nn.Module, feature_dim: int = 2048, dim: int = 1024, guide: nn.Module | None = None,
        layers: int = 1, heads: int = 4, feedforward: int = 2048, dropout: float = 0.1, fine_gradient: float = 0.0,
    ):
        super().__init__(bert, feature_dim, dim, guide)
        self.fine_gradient = fine_gradient
        self.geometry = nn.Linear(5, dim)
        nn.init.zeros_(self.geometry.weight)
        nn.init.zeros_(self.geometry.bias)
        self.fine_regions = fine_level(dim, layers, heads, feedforward, dropout)
        self.fine_words = fine_level(dim, layers, heads, feedforward, dropout)

    def below(self, tokens: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]: the tokens as the fine level reads them, with a share of the gradient."""
        return self.fine_gradient * tokens + (1 - self.fine_gradient) * tokens.detach()

    def encode_images(self, batch: Mapping[str, Tensor]) -> Encoded:
        """globals [I, D]; tokens and plain tokens [I, R, D], one per region; mask [I, R]."""
        tokens, mask = self.region_tokens(batch)                                                # [I, R, D]
        placed = self.below(tokens) + self.geometry(box_geometry(batch["boxes"]))               # [I, R, D]
        fine = self.fine_regions(placed, src_key_padding_mask=~mask)                            # [I, R, D]
        return Encoded(unit(self.image_pool(tokens, mask)), unit(fine), mask, unit(tokens))

    def encode_texts(self, batch: Mapping[str, Tensor]) -> Encoded:
        """globals [B, D]; tokens and plain tokens [B, W - 2, D], one per word piece, without [CLS] and [SEP]; mask."""
        tokens, mask = self.word_tokens(batch)                                                  # [B, W, D]
        fine = self.fine_words(self.below(tokens), src_key_padding_mask=~mask)                  # [B, W, D]
        return Encoded(unit(self.text_pool(tokens, mask)), unit(fine[:, 1:-1]), mask[:, 2:], unit(tokens[:, 1:-1]))
