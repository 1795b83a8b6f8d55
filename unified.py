"""The unified model: USER's coarse vectors and TGDT's late interaction, made of the same tokens. Neither paper has it.

    regions     -> Linear + MLP   = region tokens -> GPO        = image vector
                                                  -> fine level = fine region tokens
    word pieces -> BERT -> Linear = word tokens   -> GPO        = text vector
                                                  -> fine level = fine word tokens

It is USER with TGDT's idea of token guidance: the coarse vector is pooled from tokens that learn to be aligned as well.
These are the plain tokens. The fine level, a small transformer on each side, turns them into the fine tokens, which
re-rank. On the image side it also sees the boxes of the regions. Its gradient stops at the plain tokens, because that
gradient would make the coarse vectors worse.

The loss is USER's, plus InfoNCE on the coarse vectors, on the plain tokens and on the fine tokens. On photographs half
of each InfoNCE target comes from the momentum copy, which is soon better than the model itself (momentum
distillation). docs/unified.md has the measurements behind these choices, docs/results.md the comparison with both
papers' models.
"""
from collections.abc import Mapping

from torch import Tensor, nn

from tgdt import Encoded, box_geometry, unit
from user import USER


def fine_level(dim: int, layers: int, heads: int, feedforward: int, dropout: float) -> nn.TransformerEncoder:
    """A pre-norm transformer encoder with ReLU over tokens, [B, T, D] -> [B, T, D].

    Attention and feed-forward both end in a linear layer, and add what it gives to their input. These start at zero,
    so an untrained fine level returns the tokens as they are.
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
    share of the fine level's gradient that reaches the plain tokens, 0 to 1. With 0 it cannot harm the coarse vectors.
    """

    def __init__(
        self, bert: nn.Module, feature_dim: int = 2048, dim: int = 1024, guide: nn.Module | None = None,
        layers: int = 1, heads: int = 4, feedforward: int = 2048, dropout: float = 0.1, fine_gradient: float = 0.0,
    ):
        super().__init__(bert, feature_dim, dim, guide)
        self.fine_gradient = fine_gradient
        self.geometry = nn.Linear(5, dim)  # zero at first, like the ends of the fine level: the boxes change nothing
        nn.init.zeros_(self.geometry.weight)
        nn.init.zeros_(self.geometry.bias)
        self.fine_regions = fine_level(dim, layers, heads, feedforward, dropout)
        self.fine_words = fine_level(dim, layers, heads, feedforward, dropout)

    def scale_gradient(self, plain: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]: the same values, but only the share `fine_gradient` of the gradient flows back."""
        return plain.detach().lerp(plain, self.fine_gradient)

    def encode_images(self, batch: Mapping[str, Tensor]) -> Encoded:
        """globals [I, D]; tokens and plain tokens [I, R, D], one per region; mask [I, R]."""
        plain, mask = self.region_tokens(batch)                                                 # [I, R, D], [I, R]
        placed = self.scale_gradient(plain) + self.geometry(box_geometry(batch["boxes"]))       # [I, R, D]
        fine = self.fine_regions(placed, src_key_padding_mask=~mask)                            # [I, R, D]
        coarse = self.image_pool(plain, mask)                                                   # [I, D]
        return Encoded(globals=unit(coarse), tokens=unit(fine), mask=mask, plain=unit(plain))

    def encode_texts(self, batch: Mapping[str, Tensor]) -> Encoded:
        """globals [B, D]; tokens and plain tokens [B, W - 2, D], one per word piece, without [CLS] and [SEP]; mask."""
        plain, mask = self.word_tokens(batch)                                                   # [B, W, D], [B, W]
        fine = self.fine_words(self.scale_gradient(plain), src_key_padding_mask=~mask)          # [B, W, D]
        coarse = self.text_pool(plain, mask)                                                    # [B, D]
        plain, fine, mask = plain[:, 1:-1], fine[:, 1:-1], mask[:, 2:]  # drop [CLS], [SEP], as in TGDT.encode_texts
        return Encoded(globals=unit(coarse), tokens=unit(fine), mask=mask, plain=unit(plain))
