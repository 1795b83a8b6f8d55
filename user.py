"""USER: unified semantic enhancement with momentum contrast.

Read beside Zhang et al., "USER: Unified Semantic Enhancement With Momentum Contrast for Image-Text Retrieval". First a
guide makes a picture's regions agree on what matters, then both branches pool their tokens into one vector:

    regions     -> SGE or CGE -> Linear + MLP -> GPO = image vector
    word pieces -> BERT       -> Linear       -> GPO = text vector

SGE finds the guide in the regions themselves, CGE takes it from a frozen CLIP. While training, momentum copies of both
branches fill two queues of keys: an image is contrasted with thousands of captions that are not in its batch, a
caption with as many images.
"""
from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from sources.files import BadInput
from tgdt import Encoded, take_weights

# ----------------------------------------------------------------------------------------- semantic enhancement


def enhance(regions: Tensor, mask: Tensor, guide: Tensor, sharpness: float = 1.0) -> Tensor:
    """Add the guide to the regions, the more the better they agree with it (USER, semantic enhancement).

    a = l2norm(softmax over the real regions of sharpness * guide . region),  region' = region + a * guide.
    regions [B, R, F], mask [B, R], guide [B, F] unit length; sharpness is the paper's lambda. Returns [B, R, F].
    """
    agreement = sharpness * (regions @ guide[:, :, None]).squeeze(2).masked_fill(~mask, float("-inf"))
    attention = F.normalize(agreement.softmax(1), dim=1)
    return torch.addcmul(regions, attention[:, :, None], guide[:, None, :])


def pack(padded: Tensor, mask: Tensor) -> Tensor:
    """[B, T, D] -> the n real tokens [n, D], row by row: no statistics of padding, no work for it."""
    return padded.flatten(0, 1) if mask.all() else padded[mask]


def unpack(packed: Tensor, mask: Tensor) -> Tensor:
    """[n, D] -> [B, T, D], zeros where there is padding."""
    if mask.all():
        return packed.view(*mask.shape, -1)
    return packed.new_zeros(*mask.shape, packed.shape[1]).index_put((mask,), packed)


class SelfGuidedEnhancement(nn.Module):
    """SGE: the picture's mean region tells which regions matter, their weighted sum is the guide (USER, SGE).

    feature_dim is F. Statistics of the regions are taken over all real regions of the batch, number by number, so that
    padding, order and the number of regions change nothing. The released code takes them slot by slot, over a fixed
    number of regions; `slots` does the same for released weights (0: not).
    """

    def __init__(self, feature_dim: int, dropout: float = 0.4, sharpness: float = 1.0, slots: int = 0):
        super().__init__()
        self.sharpness, self.slots = sharpness, slots
        self.local = nn.Linear(feature_dim, feature_dim)
        self.local_norm = nn.BatchNorm1d(slots or feature_dim)
        self.picture = nn.Linear(feature_dim, feature_dim)
        self.picture_norm = nn.BatchNorm1d(feature_dim)
        self.score = nn.Linear(feature_dim, 1)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.local, self.picture, self.score):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def guide(self, regions: Tensor, mask: Tensor) -> Tensor:
        """[B, F] unit length: the regions' sum, weighted by how each one agrees with their mean (USER, SGE).

        regions [B, R, F], mask [B, R]. Raises BadInput where statistics are of `slots` and a picture has more or fewer.
        """
        if self.slots and (regions.shape[1] != self.slots or not mask.all()):
            found = " to ".join(map(str, sorted({int(n) for n in mask.sum(1).aminmax()})))
            raise BadInput(f"the model's statistics are of {self.slots} regions a picture, slot by slot; found {found}")
        mean = ((mask / mask.sum(1, keepdim=True))[:, None] @ regions).squeeze(1)                   # [B, F]
        local = self.local(regions)
        local = self.local_norm(local) if self.slots else unpack(self.local_norm(pack(local, mask)), mask)
        local = self.dropout(local.tanh())                                                          # [B, R, F]
        picture = self.dropout(self.picture_norm(self.picture(mean)).tanh())                        # [B, F]
        # The score of local * picture, without that product: its weights times the picture, against each region.
        scores = (local @ (self.score.weight * picture)[:, :, None]).squeeze(2) + self.score.bias   # [B, R]
        weights = scores.masked_fill(~mask, float("-inf")).softmax(1)
        return F.normalize((weights[:, None] @ regions).squeeze(1), dim=1)

    def forward(self, regions: Tensor, mask: Tensor, clip: Tensor | None = None) -> Tensor:
        """regions [B, R, F], mask [B, R] -> enhanced regions [B, R, F]. `clip` is not used: see CGE."""
        return enhance(regions, mask, self.guide(regions, mask), self.sharpness)


class CLIPGuidedEnhancement(nn.Module):
    """CGE: the guide is a frozen CLIP's embedding of the picture, projected to the regions' width (USER, CGE).

    The authors have not released this part: it is built from the paper's idea. clip_dim is E, feature_dim is F.
    """

    def __init__(self, clip_dim: int, feature_dim: int, sharpness: float = 1.0):
        super().__init__()
        self.sharpness = sharpness
        self.project = nn.Linear(clip_dim, feature_dim)

    def forward(self, regions: Tensor, mask: Tensor, clip: Tensor) -> Tensor:
        """regions [B, R, F], mask [B, R], clip [B, E] -> enhanced regions [B, R, F]."""
        return enhance(regions, mask, F.normalize(self.project(clip), dim=1), self.sharpness)


# ----------------------------------------------------------------------------------------------------- encoders


class GeneralizedPooling(nn.Module):
    """GPO: pool each number over the tokens by learnt weights on its sorted values (VSE-infinity; USER, encoders).

    Weight 1 on the first place would be max pooling, equal weights mean pooling. The weights depend on nothing but the
    number of tokens n: a bidirectional GRU reads the sinusoids of the places 1..n and gives each place a score.
    """

    def __init__(self, width: int = 32, temperature: float = 0.1):
        super().__init__()
        self.width, self.temperature = width, temperature
        self.gru = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.score = nn.Linear(width, 1, bias=False)

    def weights(self, lengths: Tensor, longest: int) -> Tensor:
        """lengths [B] -> weights [B, longest] that sum to 1 over each row's first `lengths` places, 0 beyond."""
        place = torch.arange(longest, device=lengths.device)
        rate = torch.exp(torch.arange(0, self.width, 2, device=lengths.device) * (-math.log(10000) / self.width))
        angle = place[:, None] * rate
        sinusoids = torch.stack([angle.sin(), angle.cos()], 2).flatten(1)                     # [longest, width]
        distinct, which = lengths.unique(return_inverse=True)  # few: the GRU runs once a length, not once a row
        inputs = nn.utils.rnn.pack_padded_sequence(
            sinusoids.expand(len(distinct), -1, -1), distinct.cpu(), batch_first=True, enforce_sorted=False)
        read, _ = nn.utils.rnn.pad_packed_sequence(self.gru(inputs)[0], batch_first=True, total_length=longest)
        scores = self.score((read[..., : self.width] + read[..., self.width :]) / 2).squeeze(2) / self.temperature
        return scores.masked_fill(place >= distinct[:, None], float("-inf")).softmax(1)[which]

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens [B, T, D], mask [B, T] with at least one real token a row -> [B, D]."""
        columns = tokens.transpose(1, 2).contiguous()         # [B, D, T]: the last dimension is the fastest to sort
        if mask.all():
            ordered = columns.sort(2, descending=True)[0]
        else:                                                 # padding comes to the end, where the weights are 0
            beyond = torch.arange(mask.shape[1], device=mask.device) >= mask.sum(1, keepdim=True)
            ordered = columns.masked_fill(~mask[:, None], float("-inf")).sort(2, descending=True)[0]
            ordered = ordered.masked_fill(beyond[:, None], 0)
        with torch.autocast(tokens.device.type, enabled=False):
            weights = self.weights(mask.sum(1), mask.shape[1])
            return (ordered.to(weights.dtype) @ weights[:, :, None]).squeeze(2)


class USER(nn.Module):
    """Both branches (USER, encoders). `bert` is a `BertModel`, `guide` one of the two enhancements above or None.

    `batch` has the names and the shapes of `batching.Pairs`: regions [B, R, F], region_mask [B, R], for CGE also clip
    [B, E]; word_ids and word_mask [B, W]. There are no fine tokens: what is encoded is the coarse vector alone.
    """

    def __init__(self, bert: BertModel, feature_dim: int = 2048, dim: int = 1024, guide: nn.Module | None = None):
        super().__init__()
        self.guide = guide
        self.project = nn.Linear(feature_dim, dim)
        self.widen = nn.Linear(feature_dim, dim // 2)
        self.widen_norm = nn.BatchNorm1d(dim // 2)
        self.narrow = nn.Linear(dim // 2, dim)
        self.image_pool = GeneralizedPooling()
        self.bert = bert
        self.project_words = nn.Linear(bert.config.hidden_size, dim)
        self.text_pool = GeneralizedPooling()
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def encode_images(self, batch: Mapping[str, Tensor]) -> Encoded:
        """globals [B, D] unit length; no tokens."""
        regions, mask = batch["regions"], batch["region_mask"]
        if self.guide is not None:
            regions = self.guide(regions, mask, batch.get("clip"))
        real = pack(regions, mask)
        tokens = unpack(self.project(real) + self.narrow(self.widen_norm(self.widen(real)).relu()), mask)
        return Encoded(F.normalize(self.image_pool(tokens, mask), dim=1), None, None)

    def encode_texts(self, batch: Mapping[str, Tensor]) -> Encoded:
        """globals [B, D] unit length, pooled over all word pieces with [CLS] and [SEP]; no tokens."""
        mask = batch["word_mask"]
        slots = self.bert(input_ids=batch["word_ids"], attention_mask=mask.long()).last_hidden_state
        return Encoded(F.normalize(self.text_pool(self.project_words(slots), mask), dim=1), None, None)


# -------------------------------------------------------------------------------------------- momentum contrast


class Queue(nn.Module):
    """The last `length` keys, each with the image it came from; the oldest make room for the newest (MoCo; USER).

    keys [K, D] unit length, owner [K] long: the image of each key, -1 where none has come yet.
    """

    def __init__(self, length: int, dim: int):
        super().__init__()
        self.register_buffer("keys", torch.zeros(length, dim))
        self.register_buffer("owner", torch.full((length,), -1))
        self.register_buffer("end", torch.zeros((), dtype=torch.long))  # where the next key goes

    @torch.no_grad()
    def add(self, keys: Tensor, owner: Tensor) -> None:
        """keys [B, D], owner [B]. Any B up to the queue's length, which need not be a multiple of it."""
        length = len(self.owner)
        if len(keys) > length:
            raise ValueError(f"a batch of {len(keys)} keys does not fit into a queue of {length}")
        place = (self.end + torch.arange(len(keys), device=keys.device)) % length
        self.keys = self.keys.index_copy(0, place, keys.to(self.keys.dtype))  # not in place: the loss just taken on
        self.owner = self.owner.index_copy(0, place, owner)                   # the old keys still needs them
        self.end.copy_((self.end + len(keys)) % length)

    def no_negatives(self, image_index: Tensor) -> Tensor:
        """image_index [B] of the queries -> [B, K] bool: keys of the query's own image, and places still empty."""
        return (self.owner == image_index[:, None]) | (self.owner < 0)


class MomentumContrast(nn.Module):
    """Momentum copies of both branches, and the queues of their keys (USER, momentum contrast).

    The copy follows the model by  copy <- r copy + (1 - r) model , parameters and BatchNorm's buffers alike (the
    released code leaves the buffers where they began), so that it can encode as it would when testing: without dropout
    and by running statistics. A copy that starts at random would hold on to its start for 1 / (1 - r) steps; `warm`
    lets r grow with the steps, min(r, 1 - 1 / (steps + 1)), so that it is an average of what the model has been.
    """

    def __init__(self, model: nn.Module, dim: int, length: int = 2048, momentum: float = 0.999, warm: bool = True):
        super().__init__()
        self.momentum, self.warm = momentum, warm
        frozen = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}
        self.encoder = copy.deepcopy(model, frozen).requires_grad_(False)  # what never changes is shared, not copied
        self.image_queue, self.text_queue = Queue(length, dim), Queue(length, dim)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.train(False)

    def train(self, mode: bool = True) -> MomentumContrast:
        """Stays in eval mode, whatever is asked for: keys are drawn without dropout."""
        return super().train(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Follow the model by one step."""
        steps = int(self.steps)
        keep = min(self.momentum, 1 - 1 / (steps + 1)) if self.warm else self.momentum
        theirs, ours = model.state_dict(), self.encoder.state_dict()
        own = [name for name in ours if ours[name].data_ptr() != theirs[name].data_ptr()]
        real = [name for name in own if ours[name].is_floating_point()]
        torch._foreach_lerp_([ours[name] for name in real], [theirs[name] for name in real], 1 - keep)
        for name in set(own) - set(real):  # BatchNorm's counter of batches
            ours[name].copy_(theirs[name])
        self.steps += 1

    @torch.no_grad()
    def enqueue(self, image_keys: Tensor, text_keys: Tensor, image_index: Tensor, caption_owner: Tensor) -> None:
        """image_keys [I, D] with the images they are, image_index [I]; text_keys [B, D] with theirs, [B]."""
        self.image_queue.add(image_keys, image_index)
        self.text_queue.add(text_keys, caption_owner)


# --------------------------------------------------------------------------------------------- released weights


RELEASED_NAMES = (  # theirs -> ours, of the image state and of the text state; mlp.bns.1 and the pooler take no part
    {"fc.": "project.", "mlp.layers.0.": "widen.", "mlp.bns.0.": "widen_norm.", "mlp.layers.1.": "narrow.",
     "gpool.gru.": "image_pool.gru.", "gpool.linear.": "image_pool.score.",
     "v_sa.embedding_local.0.": "guide.local.", "v_sa.embedding_local.1.": "guide.local_norm.",
     "v_sa.embedding_global.0.": "guide.picture.", "v_sa.embedding_global.1.": "guide.picture_norm.",
     "v_sa.embedding_common.0.": "guide.score."},
    {"bert.": "bert.", "linear.": "project_words.", "gpool.gru.": "text_pool.gru.",
     "gpool.linear.": "text_pool.score."},
)


def load_released(path: str | Path, text_config: BertConfig | None = None) -> USER:
    """The model with SGE, in eval mode, from the authors' `model_best.pth`.

    The file holds {epoch, model: [image state, text state], best_rsum, opt: Namespace, Eiters}. It is read without
    running any code from it. text_config describes the BERT that was trained; None means `bert-base-uncased`.
    Raises ValueError, naming the file, when it is not such a checkpoint or its weights do not fit.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        states, sharpness = checkpoint["model"], checkpoint["opt"].attention_lamda
        dim, feature_dim = states[0]["fc.weight"].shape
        slots = len(states[0]["v_sa.embedding_local.1.weight"])
    except FileNotFoundError:
        raise
    except Exception as error:  # torch.load has many ways to fail on a file that is something else
        raise ValueError(f"{path} is not a released USER checkpoint: {type(error).__name__}: {error}") from error
    bert = BertModel(text_config or BertConfig(), add_pooling_layer=False)
    model = USER(bert, feature_dim, dim, SelfGuidedEnhancement(feature_dim, sharpness=sharpness, slots=slots))
    take_weights(model, path, list(zip(states, RELEASED_NAMES, strict=True)))
    return model.eval()
