"""The arms of the ablations: what is changed, under which names, and which arms are compared.

An arm is a model and its changes, separated by commas: "user, no guide, --queue 512". A change is a name of `CHANGES`,
or a flag of train.py with its value. Where there is no flag, a change takes the run that `harness.training.set_up`
gives, replaces a part of it before it is trained, and returns it; or it has a loss, called as `train.batch_loss` is.
"""
from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn
from tqdm import tqdm
from transformers import BertModel
from transformers.modeling_outputs import BaseModelOutput

import data
import losses
import tgdt
import train
import user
from harness import models
from harness.training import Run
from sources import networks
from sources.features import InMemory
from sources.files import BadInput, write_whole
from unified import Unified

# ------------------------------------------------------------------------------------------------ other parts of a run


def copies(run: Run) -> list[nn.Module]:
    """The model, and its momentum copy if there is one."""
    return [run.model] if run.momentum is None else [run.model, run.momentum.encoder]


class OtherBranch(nn.Module):
    """A branch of TGDT whose global encoder does not read the local tokens as they are.

    reads: "slots" are what the local encoder reads too, so there is no token guidance. "detached" are the local tokens
    without their gradient, as in the released training.
    """

    def __init__(self, branch: tgdt.TokenGuidedEncoder, reads: str):
        super().__init__()
        self.project, self.local_encoder, self.global_encoder = (
            branch.project, branch.local_encoder, branch.global_encoder)
        self.reads = reads

    def forward(self, slots: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        slots = self.project(slots)
        tokens = self.local_encoder(slots, src_key_padding_mask=~mask)
        read = slots if self.reads == "slots" else tokens.detach()
        globals_ = self.global_encoder(read, src_key_padding_mask=~mask)[:, 0]
        return tgdt.unit(globals_), tgdt.unit(tokens)


def other_branches(run: Run, reads: str) -> Run:
    for model in copies(run):
        model.image_branch = OtherBranch(model.image_branch, reads)
        model.text_branch = OtherBranch(model.text_branch, reads)
    return run


def pools(run: Run) -> list[user.GeneralizedPooling]:
    return [pool for model in copies(run) for pool in (model.image_pool, model.text_pool)]


def start_as_mean(run: Run) -> Run:
    """GPO starts as mean pooling: all places have the score 0."""
    for pool in pools(run):
        nn.init.zeros_(pool.score.weight)
    return run


def broad_pooling(run: Run, factor: float = 1.0) -> Run:
    """GPO with a temperature of 1, not 0.1: its weights start broad, and ten times as large scores make them narrow.

    factor: what the last weights of GPO are multiplied by. With 10 GPO is what it was at the start, but as Adam's steps
    stay as large as they were, its score is learnt at a tenth of the rate.
    """
    for pool in pools(run):
        pool.temperature = 1.0
        pool.score.weight.data.mul_(factor)
    return run


def mean_pooling(run: Run) -> Run:
    """The mean over the tokens in place of GPO."""
    for pool in pools(start_as_mean(run)):
        pool.requires_grad_(False)
    return run


def grid_boxes(run: Run) -> Run:
    """Boxes for features without any, whose 36 regions are the cells of a 6 x 6 grid, row by row."""
    cells = networks.cells(6)

    def with_boxes(read: Callable, rows) -> tuple:
        regions, _, mask = read(rows)
        return regions, np.tile(cells, (len(regions), 1, 1)), mask

    for split in run.splits.values():
        split.features.read = partial(with_boxes, split.features.read)
    return run


class OwnBranch(Unified):
    """The fine level reads tokens of its own, from layers like those of the plain tokens that start with their weights.

    The plain tokens stay what the coarse vectors are pooled from. Features and BERT serve both.
    """

    def encode_images(self, batch: dict) -> tgdt.Encoded:
        tokens, mask = self.region_tokens(batch)
        own = user.of_real_tokens(partial(user.USER.embed_regions, self.own), batch["regions"], mask)
        fine = self.fine_regions(own + self.geometry(tgdt.box_geometry(batch["boxes"])), src_key_padding_mask=~mask)
        return tgdt.Encoded(tgdt.unit(self.image_pool(tokens, mask)), tgdt.unit(fine), mask, tgdt.unit(tokens))

    def encode_texts(self, batch: dict) -> tgdt.Encoded:
        mask = batch["word_mask"]
        states = self.bert(input_ids=batch["word_ids"], attention_mask=mask.long()).last_hidden_state
        tokens, own = self.project_words(states), self.own["project_words"](states)
        fine = self.fine_words(own, src_key_padding_mask=~mask)
        return tgdt.Encoded(tgdt.unit(self.text_pool(tokens, mask)), tgdt.unit(fine[:, 1:-1]), mask[:, 2:],
                            tgdt.unit(tokens[:, 1:-1]))


def own_branch(run: Run) -> Run:
    for model in copies(run):
        model.__class__ = OwnBranch
        model.own = nn.ModuleDict({name: copy.deepcopy(getattr(model, name))
                                   for name in ("project", "mlp_in", "mlp_norm", "mlp_out", "project_words")})
    return run


def stand_in_for_clip(run: Run) -> Run:
    """CGE guided by the mean of an image's own regions, in place of CLIP's embedding."""
    for split in run.splits.values():
        rows = np.arange(len(split.features))
        means = [split.features.read(part)[0].mean(1) for part in np.array_split(rows, -(-len(rows) // 256))]
        split.clip = np.concatenate(means)
        split.clip /= np.linalg.norm(split.clip, axis=1, keepdims=True)
    dim = run.inputs["feature_dim"]
    guide = user.CLIPGuidedEnhancement(dim, dim, run.settings.enhancement.sharpness).to(run.device)
    for model in copies(run):
        model.guide = copy.deepcopy(guide)
    return run


def no_boxes(run: Run) -> Run:
    for split in run.splits.values():
        split.features.boxes = np.zeros_like(split.features.boxes)
    return run


def boxes_as_features(run: Run) -> Run:
    """The box geometry of TGDT is appended to the features of each region. The model is rebuilt for F + 5."""
    for split in run.splits.values():
        found = split.features
        geometry = tgdt.box_geometry(torch.from_numpy(found.boxes)).numpy()                            # [N, R, 5]
        split.features = InMemory(found.path, np.concatenate([found.regions, geometry], 2), found.boxes)
    run.model = models.build(run.settings, run.model.bert, run.inputs["feature_dim"] + 5).to(run.device)
    old, dim = run.momentum, run.settings.architecture.dim
    run.momentum = user.MomentumContrast(run.model, dim, len(old.image_queue.owner), old.momentum, old.warm)
    run.momentum.to(run.device)
    return run


class KeysInTraining(user.MomentumContrast):
    """Images are encoded as in training: with dropout, and normalised by the batch. Only parameters follow the model.

    In the released code BERT stays in eval mode all the same.
    """

    def train(self, mode: bool = True) -> KeysInTraining:
        nn.Module.train(self, True)
        self.encoder.bert.eval()
        return self

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        keep = self.rate()
        for ours, theirs in zip(self.encoder.parameters(), model.parameters(), strict=True):
            ours.lerp_(theirs, 1 - keep)
        self.steps += 1


def keys_in_training(run: Run) -> Run:
    run.momentum.__class__ = KeysInTraining
    run.momentum.train()
    return run


def cold_momentum(run: Run) -> Run:
    """The momentum is the same from the first step on."""
    run.momentum.warm = False
    return run


class UnmaskedQueue(user.Queue):
    """Keys of a query's own image count as negatives."""

    def positives(self, image_index: Tensor) -> Tensor:
        return (self.owner < 0).expand(len(image_index), -1)


def queue_unmasked(run: Run) -> Run:
    for queue in (run.momentum.image_queue, run.momentum.text_queue):
        queue.__class__ = UnmaskedQueue
    return run


def full_queue(run: Run) -> Run:
    """The queues start full of random positive vectors, which belong to no image."""
    for queue in (run.momentum.image_queue, run.momentum.text_queue):
        queue.keys.copy_(F.normalize(torch.rand_like(queue.keys), dim=1))
        queue.owner.fill_(2**40)
    return run


# ----------------------------------------------------------------------------------------------------- other losses


def batch_unmasked(model, momentum, batch, settings, precision, negatives) -> Tensor:
    """UTO in which other captions of an image count as negatives in the batch."""
    images, texts, keys, _ = train.forward(model, momentum, batch, settings, precision)
    return losses.uto(images.globals[batch["image_row"]], texts.globals, keys, None, **vars(settings.uto))


def hinge_alone(model, momentum, batch, settings, precision, negatives) -> Tensor:
    """The hinge in place of UTO, on the batch alone, a mean over the pairs."""
    (images, texts, _, _), row = train.forward(model, momentum, batch, settings, precision), batch["image_row"]
    similarity = images.globals[row] @ texts.globals.T
    return losses.hinge(similarity, settings.cmc.margin, row[:, None] == row, negatives) / len(row)


def fine_alone(model, momentum, batch, settings, precision, negatives) -> Tensor:
    """CMC's hinge on the local similarities alone: nothing trains the coarse vectors."""
    (images, texts, _, _), row = train.forward(model, momentum, batch, settings, precision), batch["image_row"]
    local = losses.local_similarity(images.tokens, images.mask, texts.tokens, texts.mask, settings.cmc.reduction)
    return losses.hinge(settings.cmc.local_weight * local[row], settings.cmc.margin, row[:, None] == row, negatives)


def entropy_of_pooling(model, momentum, batch, settings, precision, negatives) -> Tensor:
    """The model's own loss, less the entropy of GPO's weights, of the images and of the captions."""
    loss = train.batch_loss(model, momentum, batch, settings, precision, negatives)
    for pool, mask in ((model.image_pool, batch["region_mask"]), (model.text_pool, batch["word_mask"])):
        weights = pool.pooling_weights(mask.sum(1), mask.shape[1])                              # [B, T]
        loss = loss + (weights * weights.clamp(min=1e-12).log()).sum(1).mean()  # finite, also in its gradient
    return loss


def fewer_regions(model, momentum, batch, settings, precision, negatives) -> Tensor:
    """The model's own loss on images that lack a fifth of their regions, drawn again for each batch."""
    mask = batch["region_mask"]
    kept = mask & (torch.rand(mask.shape, device=mask.device) >= 0.2)
    return train.batch_loss(model, momentum, dict(batch) | {"region_mask": kept}, settings, precision, negatives)


def other_unified(model, momentum, batch, settings, precision, negatives, change) -> Tensor:
    """The unified model's loss with one change.

    change: "plain" leaves out InfoNCE on the fine tokens, so the fine level is never trained and the fine tokens stay
    equal to the plain ones. "tokens" leaves out InfoNCE on the plain tokens. "hinge" adds CMC's hinge on the fine
    tokens, "intra" its intra-modal term (also to USER's loss). "taught two-stage": on each level the teacher is the
    copy's two-stage similarity.
    """
    images, texts, keys, teacher = train.forward(model, momentum, batch, settings, precision)
    cmc, row = settings.cmc, batch["image_row"]
    positives = row[:, None] == row
    infonce = vars(settings.infonce) | {"teacher": teacher}

    def loss_on(*sides) -> Tensor:
        return losses.unified_loss(*sides, row, keys, reduction=cmc.reduction, **vars(settings.uto), **infonce)

    def local(images, texts) -> Tensor:
        return losses.local_similarity(images.tokens, images.mask, texts.tokens, texts.mask, cmc.reduction)[row]

    if change in ("plain", "tokens"):
        def one_level(side):
            return side._replace(tokens=getattr(side, change), plain=None)

        infonce["teacher"] = teacher and tuple(map(one_level, teacher))
        return loss_on(one_level(images), one_level(texts))
    if change == "hinge":
        return loss_on(images, texts) + losses.hinge(local(images, texts), cmc.margin, positives, negatives) / len(row)
    if change == "intra":
        term = losses.intra_consistency(images.globals[row], texts.globals, cmc.intra_margin)
        return loss_on(images, texts) + term / len(row)
    two_stage = teacher[0].globals[row] @ teacher[1].globals.T + cmc.local_weight * local(*teacher)
    loss = losses.uto(images.globals[row], texts.globals, keys, positives, **vars(settings.uto))
    for level in losses.levels(images, texts, row, cmc.reduction):
        nce = losses.info_nce(level, infonce["temperature"], positives, two_stage, infonce["distill"])
        loss = loss + infonce["infonce_weight"] * nce
    return loss


# ------------------------------------------------------------------------------------------------------ frozen BERT


class Remembered(nn.Module):
    """A frozen BERT that has read all captions before. It is called as BERT is, and takes their states from a file.

    words: the word pieces of all captions that it will be asked for. path: the file, which is written if it is not
    there, in half precision.
    """

    def __init__(self, bert: BertModel, words: list[np.ndarray], path: Path, device: torch.device | str = "cpu"):
        super().__init__()
        self.config = bert.config
        with FileLock(f"{path}.lock"):  # another arm may want the same file at the same time
            if not path.is_file():
                states = read_all(bert.eval(), words, device)
                write_whole(path, lambda file: np.save(file, states))
        states = torch.from_numpy(np.load(path)).split([len(ids) for ids in words])
        self.states = {ids.tobytes(): state for ids, state in zip(words, states, strict=True)}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutput:
        out = torch.zeros(*input_ids.shape, self.config.hidden_size)
        captions = input_ids.cpu().numpy().astype(np.int32)
        for row, length in enumerate(attention_mask.sum(1).tolist()):
            out[row, :length] = self.states[captions[row, :length].tobytes()]
        return BaseModelOutput(out.to(input_ids.device))


@torch.no_grad()
def read_all(bert: BertModel, words: list[np.ndarray], device: torch.device | str) -> np.ndarray:
    """BERT's states of the captions, one after the other: [all their word pieces, width] float16."""
    states: list = [None] * len(words)
    for batch in tqdm(list(data.text_batches(words, 256)), desc="BERT reads", unit="batch"):
        mask = batch["word_mask"].long().to(device)
        found = bert(input_ids=batch["word_ids"].to(device), attention_mask=mask).last_hidden_state.half().cpu()
        for caption, state in zip(batch["caption_index"].tolist(), found, strict=True):
            states[caption] = state[: len(words[caption])]
    return torch.cat(states).numpy()


def remember(run: Run) -> Run:
    """Put a remembered BERT in the place of the frozen one. Its file serves all arms beside the run folder."""
    words = [ids for captions in run.words.values() for ids in captions]
    text = run.settings.text
    key = hashlib.sha256(np.concatenate(words).tobytes() + f"{text.text_encoder} {text.text_layers}".encode())
    path = run.out.parent / f"words-{key.hexdigest()[:12]}.npy"
    bert = Remembered(run.model.bert, words, path, run.device)
    for model in copies(run):
        model.bert = bert
    return run


# ------------------------------------------------------------------------------------------------------------- arms

BUDGETS = {
    "flickr8k": "--dataset flickr8k --precision bfloat16 --text-lr 0 --dropout 0 --noise 0 --longest 32 --dim 256 "
                "--feedforward 512 --schedule linear --keep model --batch-size 160 --captions-per-image 5 --epochs 5 "
                "--momentum 0.995",
    "flickr8k-full": "--dataset flickr8k --precision bfloat16",
    "scenes": "--dataset scenes",
}
MODELS = {"tgdt": "--model tgdt", "user": "--model user", "unified": "--model tgdt-user"}


class Change(NamedTuple):
    """One change to an arm: flags of train.py, a change to the run before it is trained, or another loss."""

    flags: str = ""
    to_run: Callable[[Run], Run] = lambda run: run
    loss_of: Callable | None = None


CHANGES = {
    "longer": Change("--epochs 10"),
    "averaged": Change("--schedule constant --keep momentum"),  # the momentum copy, over a rate that does not fall
    "falling rate": Change("--schedule linear"),
    "not averaged": Change("--schedule linear --keep model --momentum 0.999"),  # on scenes, whose preset is averaged
    "one caption an image": Change("--captions-per-image 1"),
    "coarse alone": Change("--local-weight 0"),
    "fine alone": Change(loss_of=fine_alone),
    "no intra-modal term": Change("--intra-margin 9"),
    "beside": Change(to_run=partial(other_branches, reads="slots")),
    "detached": Change(to_run=partial(other_branches, reads="detached")),
    "no guide": Change("--guide none"),
    "stand-in for CLIP": Change("--guide none", stand_in_for_clip),
    "no boxes": Change(to_run=no_boxes),         # on scenes, whose features are in memory
    "boxes": Change(to_run=boxes_as_features),   # of USER, on scenes
    "no queue": Change("--queue 0"),
    "hinge": Change(loss_of=hinge_alone),
    "mean first": Change(to_run=start_as_mean),
    "mean pooling": Change(to_run=mean_pooling),
    "broad pooling": Change(to_run=broad_pooling),
    "slow pooling": Change(to_run=partial(broad_pooling, factor=10.0)),
    "entropy": Change(loss_of=entropy_of_pooling),
    "InfoNCE": Change("--infonce-weight 1"),  # on every level that is searched
    "no UTO": Change("--batch-weight 0 --queue 0"),
    "plain tokens alone": Change(loss_of=partial(other_unified, change="plain")),  # no fine level
    "fine tokens alone": Change(loss_of=partial(other_unified, change="tokens")),
    "own branch": Change(to_run=own_branch),  # without a guide
    "grid boxes": Change(to_run=grid_boxes),  # for the features of the budget "flickr8k"
    "hinge too": Change(loss_of=partial(other_unified, change="hinge")),
    "intra-modal term": Change(loss_of=partial(other_unified, change="intra")),
    "fewer regions": Change(loss_of=fewer_regions),
    "distilled": Change("--distill 0.5"),  # the momentum copy teaches, on every level that InfoNCE trains
    "taught two-stage": Change(loss_of=partial(other_unified, change="taught two-stage")),
    # What this project does otherwise than USER's released code, undone:
    "fixed regions": Change("--fixed-regions 36"),
    "reward floor": Change("--reward-floor"),
    "batch unmasked": Change(loss_of=batch_unmasked),
    "queue unmasked": Change(to_run=queue_unmasked),
    "keys in training": Change(to_run=keys_in_training),
    "cold momentum": Change(to_run=cold_momentum),
    "full queue": Change(to_run=full_queue),
}

UNTAUGHT = "unified, averaged, --distill 0"  # the unified model without a teacher
EXTENDED = "unified, averaged, own branch, intra-modal term"

# Each idea: the arm with it, and the arm without it. An arm is searched two-stage, or by global alone if it has no
# tokens; another way of searching, or an epoch, comes after a colon. First the papers' ideas:
CLAIMS = {
    "1 one model: two-stage, or coarse alone": ("tgdt", "tgdt: global"),
    "1 one model: coarse and fine, or fine alone": ("tgdt: mixed", "tgdt: local"),
    "1 trained on both levels, or on coarse alone": ("tgdt", "tgdt, coarse alone: global"),
    "1 trained on both levels, or on fine alone": ("tgdt", "tgdt, fine alone: local"),
    "2 CMC with its intra-modal term, or without": ("tgdt", "tgdt, no intra-modal term"),
    "2 its margin: 0.3, or 0.1": ("tgdt", "tgdt, --intra-margin 0.1"),
    "3 a shortlist re-ranked, or everything": ("tgdt", "tgdt: mixed"),
    "5 the global encoder reads the tokens, or what they are made of": ("tgdt", "tgdt, beside"),
    "5 it reads the tokens, or the tokens without gradients": ("tgdt", "tgdt, detached"),
    "6 SGE, or no guide": ("user", "user, no guide"),
    "6 SGE, or no guide; twice the steps": ("user, longer", "user, no guide, longer"),
    "6 CGE by a stand-in for CLIP, or SGE": ("user, stand-in for CLIP", "user"),
    "7 UTO, or the hinge; both on the batch": ("user, no guide, no queue", "user, no guide, no queue, hinge"),
    "7 the same, twice the steps": ("user, no guide, no queue, longer", "user, no guide, no queue, hinge, longer"),
    "8 queues of 512, or none": ("user, no guide, --queue 512", "user, no guide, no queue"),
    "8 queues of 2,048, or none": ("user, no guide", "user, no guide, no queue"),
    "8 queues of 2,048, or none; twice the steps": ("user, no guide, longer", "user, no guide, no queue, longer"),
    "8 queues of 8,192, or none": ("user, no guide, --queue 8192", "user, no guide, no queue"),
    "9 true pairs masked in the batch, or not": ("user, no guide", "user, no guide, batch unmasked"),
    "9 true pairs masked in the queue, or not": ("user, no guide", "user, no guide, queue unmasked"),
}
UNIFIED = {  # the unified model beside its parents, and its parts
    "the unified model, or TGDT": ("unified, averaged", "tgdt, averaged"),
    "the unified model, or TGDT with InfoNCE and a teacher": (
        "unified, averaged", "tgdt, averaged, InfoNCE, distilled"),
    "the unified model, or USER": ("unified, averaged", "user, no guide, averaged"),
    "the unified model, or USER with InfoNCE and a teacher": (
        "unified, averaged", "user, no guide, averaged, InfoNCE, distilled"),
    "its coarse level, or that of USER with InfoNCE and a teacher": (
        "unified, averaged: global", "user, no guide, averaged, InfoNCE, distilled"),
    "re-ranked, or its coarse level alone": ("unified, averaged", "unified, averaged: global"),
    "GPO over the tokens, or their mean": ("unified, averaged", "unified, averaged, mean pooling"),
    "its coarse level by GPO, or by the mean": ("unified, averaged: global", "unified, averaged, mean pooling: global"),
    "averaged at a constant rate, or the model at a falling one": ("unified, averaged", "unified, --keep model"),
    "the momentum copy teaches, or not": ("unified, averaged", UNTAUGHT),
    "the momentum copy teaches, or not; USER with InfoNCE": (
        "user, no guide, averaged, InfoNCE, distilled", "user, no guide, averaged, InfoNCE"),
    "the momentum copy teaches, or not; TGDT with InfoNCE": (
        "tgdt, averaged, InfoNCE, distilled", "tgdt, averaged, InfoNCE"),
    "the copy gives half of each target, or 0.8; USER with InfoNCE": (
        "user, no guide, averaged, InfoNCE, distilled", "user, no guide, averaged, InfoNCE, --distill 0.8"),
    "the copy gives half of each target, or all; USER with InfoNCE": (
        "user, no guide, averaged, InfoNCE, distilled", "user, no guide, averaged, InfoNCE, --distill 1"),
    "the copy's two-stage similarity teaches every level, or each level has its own teacher": (
        "unified, averaged, taught two-stage", "unified, averaged"),
    "with the intra-modal term, or without": ("unified, averaged, intra-modal term", "unified, averaged"),
    "the fine level on tokens of its own, or on those of the coarse level": (
        "unified, averaged, own branch", "unified, averaged"),
    # Extended by both of these, own fine tokens and the intra-modal term:
    "extended, or not": (EXTENDED, "unified, averaged"),
    "extended: the unified model, or TGDT with InfoNCE and a teacher": (
        EXTENDED, "tgdt, averaged, InfoNCE, distilled"),
    "extended: the unified model, or USER with InfoNCE and a teacher": (
        EXTENDED, "user, no guide, averaged, InfoNCE, distilled"),
    "extended: the unified model, or USER with InfoNCE, a teacher and the intra-modal term": (
        EXTENDED, "user, no guide, averaged, InfoNCE, distilled, intra-modal term"),
    "extended: re-ranked, or its coarse level alone": (EXTENDED, f"{EXTENDED}: global"),
    "with the intra-modal term, or without; USER with InfoNCE and a teacher": (
        "user, no guide, averaged, InfoNCE, distilled, intra-modal term",
        "user, no guide, averaged, InfoNCE, distilled"),
    "with UTO, or without": ("unified, averaged", "unified, averaged, no UTO"),
    # With BERT fine-tuned, and on the scenes, where the unified model's preset has a temperature of 0.01:
    "small preset: the unified model, or TGDT": ("unified", "tgdt"),
    "small preset: the unified model, or TGDT; after eight epochs": (
        "unified: epoch 8", "tgdt, --epochs 8: epoch 8"),
    "small preset: the unified model, or TGDT with InfoNCE and a teacher; after five epochs": (
        "unified: epoch 5", "tgdt, InfoNCE, distilled, --epochs 5: epoch 5"),
    "small preset: the unified model, or TGDT with InfoNCE": ("unified", "tgdt, InfoNCE, --temperature 0.01"),
    "small preset: the unified model, or USER": ("unified", "user"),
    "small preset: the unified model, or USER with InfoNCE": ("unified", "user, InfoNCE, --temperature 0.01"),
    "small preset: the unified model, or USER with InfoNCE and a teacher": ("unified", "user, InfoNCE, distilled"),
    "small preset: USER, or TGDT; after eight epochs": ("user: epoch 8", "tgdt, --epochs 8: epoch 8"),
    "small preset: USER, or TGDT, both with InfoNCE and a teacher; after five epochs": (
        "user, InfoNCE, distilled: epoch 5", "tgdt, InfoNCE, distilled, --epochs 5: epoch 5"),
    "small preset: InfoNCE and a teacher beside CMC, or neither; both TGDT, after five epochs": (
        "tgdt, InfoNCE, distilled, --epochs 5: epoch 5", "tgdt, --epochs 8: epoch 5"),
    "small preset: InfoNCE and a teacher beside UTO, or neither; both USER": ("user, InfoNCE, distilled", "user"),
    "small preset: TGDT re-ranked, or its coarse level alone": ("tgdt, --epochs 8", "tgdt, --epochs 8: global"),
    "small preset: TGDT with InfoNCE and a teacher re-ranked, or its coarse level alone": (
        "tgdt, InfoNCE, distilled, --epochs 5", "tgdt, InfoNCE, distilled, --epochs 5: global"),
    "small preset: its coarse level, or that of USER with InfoNCE and a teacher": (
        "unified: global", "user, InfoNCE, distilled"),
    "small preset: re-ranked, or its coarse level alone": ("unified", "unified: global"),
    "small preset: the momentum copy teaches, or not; USER with InfoNCE": (
        "user, InfoNCE, distilled", "user, InfoNCE"),
    # With BERT frozen, without a teacher:
    "no teacher: the unified model, or TGDT with InfoNCE": (UNTAUGHT, "tgdt, averaged, InfoNCE"),
    "no teacher: the unified model, or USER with InfoNCE": (UNTAUGHT, "user, no guide, averaged, InfoNCE"),
    "no teacher: its coarse level, or that of USER with InfoNCE": (
        f"{UNTAUGHT}: global", "user, no guide, averaged, InfoNCE"),
    "no teacher: re-ranked, or its coarse level alone": (UNTAUGHT, f"{UNTAUGHT}: global"),
    "no teacher: with a fine level, or the plain tokens alone": (UNTAUGHT, f"{UNTAUGHT}, plain tokens alone"),
    "no teacher: the plain tokens alone, coarse, or USER with InfoNCE": (
        f"{UNTAUGHT}, plain tokens alone: global", "user, no guide, averaged, InfoNCE"),
    "no teacher: InfoNCE on the plain tokens too, or not; one layer": (
        f"{UNTAUGHT}, --local-layers 1", f"{UNTAUGHT}, --local-layers 1, fine tokens alone"),
    "no teacher: two layers in the fine level, or one": (UNTAUGHT, f"{UNTAUGHT}, --local-layers 1"),
    "no teacher: the fine level's gradient cut off, or whole": (UNTAUGHT, f"{UNTAUGHT}, --fine-gradient 1"),
    "no teacher: the fine level's gradient cut off, or whole; one layer": (
        f"{UNTAUGHT}, --local-layers 1", f"{UNTAUGHT}, --local-layers 1, --fine-gradient 1"),
    "no teacher: the fine level's gradient cut off, or 0.3 of it": (UNTAUGHT, f"{UNTAUGHT}, --fine-gradient 0.3"),
    "no teacher: CMC's hinge on the fine tokens too, or not; one layer": (
        f"{UNTAUGHT}, --local-layers 1, hinge too", f"{UNTAUGHT}, --local-layers 1"),
    "no teacher: the fine level sees the cells' boxes, or none; one layer": (
        f"{UNTAUGHT}, --local-layers 1, grid boxes", f"{UNTAUGHT}, --local-layers 1"),
    "small preset: the fine level's gradient cut off, or whole": ("unified", "unified, --fine-gradient 1"),
    "small preset: extended, or not": ("unified, own branch, intra-modal term", "unified"),
    "InfoNCE beside UTO, or not; both USER": ("user, no guide, averaged, InfoNCE", "user, no guide, averaged"),
    "InfoNCE beside CMC, or not; both TGDT": ("tgdt, averaged, InfoNCE", "tgdt, averaged"),
}
OURS = {  # what we do otherwise than the released code, or have tried
    "TGDT averaged at a constant rate, or the model at a falling one": ("tgdt, averaged", "tgdt"),
    "USER averaged at a constant rate, or the model at a falling one": ("user, no guide, averaged", "user, no guide"),
    "USER averaged, or the model; both at a falling rate": (
        "user, no guide, averaged, falling rate", "user, no guide"),
    "scenes: TGDT averaged at a constant rate, or the model at a falling one": ("tgdt", "tgdt, not averaged"),
    "scenes: USER averaged at a constant rate, or the model at a falling one": ("user", "user, not averaged"),
    "scenes: the unified model averaged at a constant rate, or the model at a falling one": (
        "unified", "unified, not averaged"),
    "SGE's statistics over all regions, or for each of 36": ("user", "user, fixed regions"),
    "five captions of an image in a batch, or one": (
        "user, no guide, averaged", "user, no guide, averaged, one caption an image"),
    "GPO starts as the mean, or at random": ("user, no guide, averaged, mean first", "user, no guide, averaged"),
    "GPO starts as the mean, or at random; BERT fine-tuned, after three epochs": (
        "user, mean first: epoch 3", "user: epoch 3"),
    "GPO starts as the mean, or at random; BERT fine-tuned, after six epochs": (
        "user, mean first: epoch 6", "user: epoch 6"),
    "GPO's score learnt at a tenth of the rate, or not; BERT fine-tuned": ("user, slow pooling", "user"),
    "GPO at a temperature of 1, or of 0.1; BERT fine-tuned": ("user, broad pooling", "user"),
    "GPO at a temperature of 1, or of 0.1; BERT fine-tuned, after six epochs": (
        "user, broad pooling: epoch 6", "user: epoch 6"),
    "GPO with its entropy in the loss, or without; BERT fine-tuned, after six epochs": (
        "user, entropy: epoch 6", "user: epoch 6"),
    "GPO with its entropy in the loss, or without; BERT fine-tuned": ("user, entropy", "user"),
    "the mean in place of GPO, or GPO": ("user, no guide, averaged, mean pooling", "user, no guide, averaged"),
    "GPO at a temperature of 1, or of 0.1": ("user, no guide, averaged, broad pooling", "user, no guide, averaged"),
    "GPO's score learnt at a tenth of the rate, or not": (
        "user, no guide, averaged, slow pooling", "user, no guide, averaged"),
    "GPO with its entropy in the loss, or without": ("user, no guide, averaged, entropy", "user, no guide, averaged"),
    "a reward below 0, or none": ("user, no guide", "user, no guide, reward floor"),
    "keys encoded in eval mode, or in training mode": ("user, no guide", "user, no guide, keys in training"),
    "a momentum that grows, or a constant one": ("user, no guide", "user, no guide, cold momentum"),
    "queues that start empty, or full of random keys": ("user, no guide", "user, no guide, full queue"),
}


def split_arm(text: str) -> tuple[str, str]:
    """An arm of `CLAIMS` -> its name, and how it is searched."""
    arm, _, search = text.partition(": ")
    return arm, search or ("global" if arm.startswith("user") else "two_stage")


ARMS = list(dict.fromkeys(split_arm(text)[0] for pair in (CLAIMS | UNIFIED | OURS).values() for text in pair))


def changes_of(arm: str) -> list[Change]:
    """Raises BadInput if the arm has a model or a change that is not known, or two changes of the loss."""
    model, *names = arm.split(", ")
    unknown = [name for name in names if name not in CHANGES and not name.startswith("--")]
    if model not in MODELS or unknown:
        raise BadInput(f"the arm {arm!r}: {(unknown or [model])[0]!r} is no model and no change; models: "
                       f"{', '.join(MODELS)}; changes: {', '.join(CHANGES)}, or a flag")
    if len(own := [name for name in names if name in CHANGES and CHANGES[name].loss_of]) > 1:
        raise BadInput(f"the arm {arm!r}: {own[0]!r} and {own[1]!r} are two losses, expected one at most")
    return [Change(MODELS[model]), *(CHANGES[name] if name in CHANGES else Change(name) for name in names)]
