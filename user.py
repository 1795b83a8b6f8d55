"""USER: unified semantic enhancement with momentum contrast.

Read beside Zhang et al., "USER: Unified Semantic Enhancement With Momentum Contrast for Image-Text Retrieval". A guide
first strengthens the regions that matter in an image. Then both branches pool their tokens into one vector:

    regions     -> SGE or CGE -> Linear + MLP -> GPO = image vector
    word pieces -> BERT       -> Linear       -> GPO = text vector

SGE finds the guide in the regions themselves, CGE takes it from a frozen CLIP. While training, momentum copies of both
branches fill two queues of keys. An image is then contrasted with thousands of captions outside its batch, and a
caption with as many images. The symbols of the paper are listed in docs/symbols.md.
"""
from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tgdt import Encoded, unit


def of_real_tokens(layer: Callable[[Tensor], Tensor], tokens: Tensor, mask: Tensor) -> Tensor:
    """Apply a layer to the real tokens alone, so that padding takes no part in BatchNorm's statistics.

    tokens [B, T, D], mask [B, T] bool; the layer maps [n, D] to [n, E]. Returns [B, T, E], zeros at the padding.
    """
    real = layer(tokens[mask])                              # [n, E], n the number of real tokens
    out = real.new_zeros(*mask.shape, real.shape[1])        # [B, T, E]
    out[mask] = real
    return out


# ----------------------------------------------------------------------------------------- semantic enhancement


def enhance(regions: Tensor, mask: Tensor, guide: Tensor, sharpness: float = 1.0) -> Tensor:
    """Add the guide to each region: the better a region agrees, the more is added (USER, semantic enhancement).

    a = l2norm(softmax over the real regions of sharpness * guide . region),  region' = region + a * guide.
    regions [B, R, F], mask [B, R] bool, guide [B, F] of unit length; sharpness is the paper's lambda.
    Returns [B, R, F].
    """
    guide = guide.to(regions.dtype)  # `unit` made it float32, but the regions may be in half precision
    agreement = sharpness * (regions @ guide[:, :, None]).squeeze(2)                                # [B, R]
    attention = F.normalize(agreement.masked_fill(~mask, float("-inf")).softmax(1), dim=1)          # [B, R]
    return regions + attention[:, :, None] * guide[:, None, :]


class SelfGuidedEnhancement(nn.Module):
    """SGE: the mean region tells which regions matter, and their weighted sum is the guide (USER, SGE).

    feature_dim is F, sharpness the paper's lambda. BatchNorm takes its statistics over all real regions of the batch,
    so that padding and order change nothing, and images may have any number of regions. The released code takes them
    separately for each of 36 region slots; `fixed_regions=36` does the same for released weights (0 turns it off).
    """

    def __init__(self, feature_dim: int, dropout: float = 0.4, sharpness: float = 1.0, fixed_regions: int = 0):
        super().__init__()
        self.sharpness, self.fixed_regions = sharpness, fixed_regions
        self.local = nn.Linear(feature_dim, feature_dim)    # the paper's L, of each region
        # With fixed regions BatchNorm reads [B, 36, F], so its channels are the 36 slots, not the F features.
        self.local_norm = nn.BatchNorm1d(fixed_regions or feature_dim)
        self.picture = nn.Linear(feature_dim, feature_dim)  # the paper's G, of the whole image
        self.picture_norm = nn.BatchNorm1d(feature_dim)
        self.score = nn.Linear(feature_dim, 1)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.local, self.picture, self.score):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def guide(self, regions: Tensor, mask: Tensor) -> Tensor:
        """The guide of each image, [B, F] of unit length (USER, SGE).

        regions [B, R, F], mask [B, R] bool. With `fixed_regions`, raises ValueError unless every image has that many.
        """
        if self.fixed_regions and (regions.shape[1] != self.fixed_regions or not mask.all()):
            fewest, most = mask.sum(1).aminmax()
            raise ValueError(f"this SGE wants exactly {self.fixed_regions} regions per image, found {fewest} to {most} "
                             f"padded to {regions.shape[1]}")
        mean = (regions * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)                      # [B, F]
        if self.fixed_regions:
            local = self.local_norm(self.local(regions))
        else:
            local = of_real_tokens(lambda real: self.local_norm(self.local(real)), regions, mask)
        local = self.dropout(local.tanh())                                                          # L, [B, R, F]
        picture = self.dropout(self.picture_norm(self.picture(mean)).tanh())                        # G, [B, F]
        scores = self.score(local * picture[:, None, :]).squeeze(2)                                 # [B, R]
        weights = scores.masked_fill(~mask, float("-inf")).softmax(1)                               # [B, R]
        return unit((weights[:, :, None] * regions).sum(1))

    def forward(self, regions: Tensor, mask: Tensor, clip: Tensor | None = None) -> Tensor:
        """regions [B, R, F], mask [B, R] -> enhanced regions [B, R, F]. SGE does not use `clip`, CGE does."""
        return enhance(regions, mask, self.guide(regions, mask), self.sharpness)


class CLIPGuidedEnhancement(nn.Module):
    """CGE: the guide is a frozen CLIP's embedding of the image, projected to the width of the regions (USER, CGE).

    The authors have not released this part. It is built from the paper's idea. clip_dim is E, feature_dim is F.
    """

    def __init__(self, clip_dim: int, feature_dim: int, sharpness: float = 1.0):
        super().__init__()
        self.sharpness = sharpness
        self.project = nn.Linear(clip_dim, feature_dim)

    def forward(self, regions: Tensor, mask: Tensor, clip: Tensor) -> Tensor:
        """regions [B, R, F], mask [B, R], clip [B, E] -> enhanced regions [B, R, F]."""
        return enhance(regions, mask, unit(self.project(clip)), self.sharpness)


# ----------------------------------------------------------------------------------------------------- encoders


class GeneralizedPooling(nn.Module):
    """GPO: sort each feature over the tokens, then take a learnt weighted sum of the places (VSE-infinity; USER).

    All weight on the first place is max pooling, equal weights are mean pooling. The weights depend on the number of
    tokens and on nothing else: a bidirectional GRU reads the sinusoids of the places and gives each place a score.
    """

    def __init__(self, width: int = 32, temperature: float = 0.1):
        super().__init__()
        self.width, self.temperature = width, temperature
        self.gru = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.score = nn.Linear(width, 1, bias=False)

    def pooling_weights(self, lengths: Tensor, longest: int) -> Tensor:
        """lengths [B] -> weights [B, longest] that sum to 1 over the first `lengths` places, 0 beyond."""
        place = torch.arange(longest, device=lengths.device)
        # The sinusoids of "Attention Is All You Need": angle = place / 10000^(2k / width)
        rate = torch.exp(torch.arange(0, self.width, 2, device=lengths.device) * (-math.log(10000) / self.width))
        angle = place[:, None] * rate                                                           # [longest, width / 2]
        sinusoids = torch.stack([angle.sin(), angle.cos()], 2).flatten(1)                       # [longest, width]
        # A batch has few different lengths, n of them. The GRU reads each once, and the rows [B] pick theirs.
        distinct, row = lengths.unique(return_inverse=True)                                     # [n], [B]
        inputs = sinusoids.to(self.score.weight.dtype).expand(len(distinct), -1, -1)            # [n, longest, width]
        # Packed, so that the backward GRU starts at the last real place, not in the padding.
        inputs = pack_padded_sequence(inputs, distinct.cpu(), batch_first=True, enforce_sorted=False)
        read, _ = pad_packed_sequence(self.gru(inputs)[0], batch_first=True, total_length=longest)
        forwards, backwards = read.chunk(2, dim=2)                                              # [n, longest, width]
        scores = self.score((forwards + backwards) / 2).squeeze(2) / self.temperature           # [n, longest]
        return scores.masked_fill(place >= distinct[:, None], float("-inf")).softmax(1)[row]    # [B, longest]

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens [B, T, D], mask [B, T] bool with at least one real token per row -> [B, D]."""
        ordered = tokens.masked_fill(~mask[:, :, None], float("-inf")).sort(1, descending=True).values
        ordered = ordered.masked_fill(ordered == float("-inf"), 0)       # padding has weight 0, but 0 * -inf is NaN
        with torch.autocast(tokens.device.type, enabled=False):          # in half precision the softmax loses digits
            weights = self.pooling_weights(mask.sum(1), mask.shape[1])                          # [B, T]
            return (weights[:, None, :] @ ordered.to(weights.dtype)).squeeze(1)


class USER(nn.Module):
    """Both branches (USER, encoders). `bert` is a `BertModel` of transformers, `guide` is SGE, CGE or None.

    `batch` has the names and shapes of `data.Pairs`: regions [I, R, F], region_mask [I, R], for CGE also clip [I, E];
    word_ids and word_mask [B, W]. USER has no fine tokens: its branches give the coarse vectors only.
    """

    def __init__(self, bert: nn.Module, feature_dim: int = 2048, dim: int = 1024, guide: nn.Module | None = None):
        super().__init__()
        self.guide = guide  # calling it gives the enhanced regions, not the guide vector
        self.project = nn.Linear(feature_dim, dim)
        self.mlp_in = nn.Linear(feature_dim, dim // 2)
        self.mlp_norm = nn.BatchNorm1d(dim // 2)
        self.mlp_out = nn.Linear(dim // 2, dim)
        self.image_pool = GeneralizedPooling()
        self.bert = bert
        self.project_words = nn.Linear(bert.config.hidden_size, dim)
        self.text_pool = GeneralizedPooling()
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def embed_regions(self, regions: Tensor) -> Tensor:
        """[n, F] -> [n, D]: a linear layer plus a small MLP."""
        return self.project(regions) + self.mlp_out(self.mlp_norm(self.mlp_in(regions)).relu())

    def region_tokens(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What GPO pools of an image: region tokens [I, R, D], not yet of unit length, and their mask [I, R]."""
        regions, mask = batch["regions"], batch["region_mask"]
        if self.guide is not None:
            regions = self.guide(regions, mask, batch.get("clip"))                              # [I, R, F], enhanced
        return of_real_tokens(self.embed_regions, regions, mask), mask

    def word_tokens(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What GPO pools of a caption: word tokens [B, W, D] with [CLS] and [SEP], and their mask [B, W]."""
        mask = batch["word_mask"]
        states = self.bert(input_ids=batch["word_ids"], attention_mask=mask.long()).last_hidden_state
        return self.project_words(states), mask

    def encode_images(self, batch: Mapping[str, Tensor]) -> Encoded:
        """globals [I, D] of unit length; no tokens."""
        return Encoded(unit(self.image_pool(*self.region_tokens(batch))), None, None)

    def encode_texts(self, batch: Mapping[str, Tensor]) -> Encoded:
        """globals [B, D] of unit length; no tokens."""
        return Encoded(unit(self.text_pool(*self.word_tokens(batch))), None, None)


# -------------------------------------------------------------------------------------------- momentum contrast


class Queue(nn.Module):
    """The newest `length` keys, each with the image that it belongs to (MoCo; USER, momentum contrast).

    A key is a coarse vector made by the momentum copy. keys [K, D] of unit length; owner [K] long, the image of each
    key, -1 where there is no key yet.
    """

    def __init__(self, length: int, dim: int):
        super().__init__()
        self.register_buffer("keys", torch.zeros(length, dim))
        self.register_buffer("owner", torch.full((length,), -1))
        self.register_buffer("end", torch.zeros((), dtype=torch.long))  # where the next key goes

    @torch.no_grad()
    def add(self, keys: Tensor, owner: Tensor) -> None:
        """Write keys [B, D] and their images [B] over the oldest ones. Raises ValueError if they do not fit."""
        length = len(self.owner)
        if len(keys) > length:
            raise ValueError(f"a batch of {len(keys)} keys does not fit into a queue of {length}")
        place = (self.end + torch.arange(len(keys), device=keys.device)) % length
        # A new tensor, not a change in place: the backward pass of the loss still needs the old keys.
        self.keys = self.keys.index_copy(0, place, keys.to(self.keys.dtype))
        self.owner = self.owner.index_copy(0, place, owner)
        self.end.copy_((self.end + len(keys)) % length)

    def positives(self, image_index: Tensor) -> Tensor:
        """Keys that are not negatives of a query: those of its own image, and empty places. [B] long -> [B, K] bool."""
        return (self.owner == image_index[:, None]) | (self.owner < 0)


class MomentumContrast(nn.Module):
    """Momentum copies of both branches, and the queues of their keys (USER, momentum contrast).

    The copy follows the model by  copy <- r copy + (1 - r) model , its weights and BatchNorm's buffers alike (the
    released code averages the weights alone). It always encodes in eval mode, without dropout and with running
    statistics. With a constant r it remembers its random start for about 1 / (1 - r) steps. With `warm` r grows,
    r = min(momentum, 1 - 1 / (steps + 1)), so that the copy is at first the mean of all the model's states so far.
    """

    def __init__(self, model: nn.Module, dim: int, length: int = 2048, momentum: float = 0.999, warm: bool = False):
        super().__init__()
        self.momentum, self.warm = momentum, warm
        self.encoder = copy.deepcopy(model).requires_grad_(False)
        self.image_queue, self.text_queue = Queue(length, dim), Queue(length, dim)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.train(False)

    def train(self, mode: bool = True) -> MomentumContrast:
        """Ignore the mode and stay in eval mode: keys are encoded without dropout."""
        return super().train(False)

    def rate(self) -> float:
        """r at this step."""
        return min(self.momentum, 1 - 1 / (int(self.steps) + 1)) if self.warm else self.momentum

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Follow the model by one step."""
        keep = self.rate()
        for ours, theirs in zip(self.encoder.state_dict().values(), model.state_dict().values(), strict=True):
            if ours.is_floating_point():
                ours.lerp_(theirs, 1 - keep)  # keep * ours + (1 - keep) * theirs
            else:  # BatchNorm's counter of batches
                ours.copy_(theirs)
        self.steps += 1

    @torch.no_grad()
    def enqueue(self, image_keys: Tensor, text_keys: Tensor, image_owner: Tensor, text_owner: Tensor) -> None:
        """image_keys [I, D] and text_keys [B, D] enter the queues; their owners [I] and [B] are rows of the split."""
        self.image_queue.add(image_keys, image_owner)
        self.text_queue.add(text_keys, text_owner)
