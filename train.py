"""Train a model, measure it, leave a run folder.

    python train.py                                              the built-in scenes, TGDT, three minutes on two cores
    python train.py --dataset flickr30k --data-root DIR          Flickr30K from its feature files, or its pictures
    python train.py --dataset folder --data-root DIR             your own pictures and captions
    python train.py --dataset coco --data-root DIR --preset paper --device cuda
    python train.py --model user --guide self                    USER; --model tgdt-user is both papers in one model

--preset small (the default) is for a laptop, and on scenes smaller still; --preset paper has the released sizes and
rates. Any setting given beside it counts.

The run folder holds settings.json, checkpoint.pt (the last state), best.pt (by validation rsum), history.jsonl (a
line an epoch), metrics.json, and the pictures curves.png, retrieval.png and alignment.png (for USER, which has no fine
tokens, guide.png instead). Ctrl-C saves the state and stops; --resume goes on from it, on exactly the path that the
uninterrupted run would have taken.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import math
import signal
import sys
import time
from dataclasses import fields
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import BertTokenizer

import data
import losses
import retrieve as twostage
import tgdt
import user
from harness import extract, figures, measure
from harness import run as runs
from harness.run import Settings, State
from sources import files
from sources.files import BadInput

SAVE_EVERY = 600  # seconds between two checkpoints within an epoch


# ------------------------------------------------------------------------------------------------------ one step


def objective(model: torch.nn.Module, batch: dict, settings: Settings, easy: bool, precision: str,
              momentum: user.MomentumContrast | None = None) -> torch.Tensor:
    """The loss of one batch, its false negatives masked: CMC (TGDT), UTO (USER), or both (the unified model).

    `momentum` follows the model by a step; the keys of the batch come from it, and go into its queues.
    The batch holds each image once; `image_row` [B] tells which row of it a caption belongs to. The networks run in
    mixed precision, the loss always in float32. `easy` takes the mean over the negatives for the hardest one in CMC,
    which is a sum over the B pairs, as its paper has it; UTO is their mean, and stands beside CMC times B.
    """
    if momentum:
        momentum.update(model)
    images, texts = encode_pairs(model, batch, precision)
    row = batch["image_row"]
    image_global, text_global, positives = images.globals.float()[row], texts.globals.float(), row[:, None] == row
    loss = 0.0
    if settings.model != "user":
        local = losses.local_similarity(
            images.tokens.float(), images.mask, texts.tokens.float(), texts.mask, settings.words)[row]
        loss = losses.cmc(image_global, text_global, local, positives, settings.margin, settings.intra_margin,
                          settings.local_weight, "mean" if easy else "hardest")
    if settings.model == "tgdt":
        return loss
    if not settings.queue:
        uto = settings.batch_weight * losses.uto_batch(
            image_global @ text_global.T, settings.mu, settings.gamma, positives, settings.reward_floor)
        return uto if settings.model == "user" else loss + settings.uto_weight * len(row) * uto

    with torch.no_grad():
        image_keys, text_keys = (keys.globals.float() for keys in encode_pairs(momentum.encoder, batch, precision))
    owner = batch["image_index"]
    uto = losses.uto(
        image_global, text_global, image_keys[row], text_keys, momentum.image_queue.keys, momentum.text_queue.keys,
        settings.mu, settings.gamma, settings.batch_weight, positives,
        momentum.image_queue.no_negatives(owner), momentum.text_queue.no_negatives(owner), settings.reward_floor,
    )
    shown = owner.new_zeros(len(image_keys)).index_put((row,), owner)  # [I]: which image each row of regions is
    momentum.enqueue(image_keys, text_keys, shown, owner)
    return uto if settings.model == "user" else loss + settings.uto_weight * len(row) * uto


def encode_pairs(model: torch.nn.Module, batch: dict, precision: str) -> tuple[tgdt.Encoded, tgdt.Encoded]:
    """A batch's images and captions, in mixed precision."""
    device = batch["regions"].device
    # PyTorch's fused attention for processors has a slow backward pass: plain matrix products take half its time.
    attention = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
    with twostage.autocast(device, precision), attention:
        return model.encode_images(batch), encode_by_length(model, batch, 1 if device.type == "cuda" else 2)


def encode_by_length(model: torch.nn.Module, batch: dict, groups: int) -> tgdt.Encoded:
    """`model.encode_texts(batch)`, computed in groups of captions of like length: the same result, less padding.

    Worth it on a processor, where padding costs as much as words; a GPU is better off with one group.
    """
    ids, mask = batch["word_ids"], batch["word_mask"]
    order = mask.sum(1).argsort()
    parts = []
    for rows in order.chunk(groups):
        longest = int(mask[rows].sum(1).max())
        parts.append(model.encode_texts({"word_ids": ids[rows, :longest], "word_mask": mask[rows, :longest]}))
    back = order.argsort()
    globals_ = torch.cat([part.globals for part in parts])[back]
    if parts[0].tokens is None:
        return tgdt.Encoded(globals_, None, None)
    widest = parts[-1].tokens.shape[1]
    padded = [F.pad(part.tokens, (0, 0, 0, widest - part.tokens.shape[1])) for part in parts]
    masks = [F.pad(part.mask, (0, widest - part.mask.shape[1])) for part in parts]
    return tgdt.Encoded(globals_, torch.cat(padded)[back], torch.cat(masks)[back])


def make_optimizer(model: torch.nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW or Adam; the pre-trained words take smaller steps than what starts from scratch."""
    words = {id(p) for p in model.bert.parameters()}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in words], "lr": settings.lr},
        {"params": [p for p in model.bert.parameters() if p.requires_grad], "lr": settings.lr * settings.text_lr},
    ]
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[settings.optimizer]
    return kind(groups, weight_decay=settings.weight_decay, fused=True)


def rate(step: int, steps_per_epoch: int, settings: Settings) -> float:
    """The learning rate at a step, as a part of its peak: linear warm-up, then linear to 0, x 0.1 in steps, or flat."""
    total = steps_per_epoch * settings.epochs
    warmup = min(settings.warmup, total // 2)
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "step":
        return 0.1 ** (step // steps_per_epoch // settings.drop_every)
    if settings.schedule == "constant":
        return 1.0
    return (total - step) / max(1, total - warmup)


# ----------------------------------------------------------------------------------------------- the whole run


class Interrupt:
    """Ctrl-C or SIGTERM is noted and obeyed after the step in hand; a second Ctrl-C stops at once."""

    def __init__(self):
        self.seen = False

    def __enter__(self) -> Interrupt:
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number: int, frame: object) -> None:
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def train(settings: Settings, out: Path, device: str = "auto", resume: bool = False, workers: int = 0) -> dict:
    """Train, evaluate, write the run folder `out`. Returns the metrics, or {} when it was interrupted.

    Raises BadInput for data, a text encoder, a CLIP, a checkpoint or a folder that cannot be used.
    """
    where, precision = runs.resolve(device, settings.precision)
    torch.manual_seed(settings.seed)
    splits = data.load(settings.dataset, settings.data_root and Path(settings.data_root), regions=settings.regions,
                       split_seed=settings.split_seed)
    settings.regions = extract.kind(settings, splits)
    last = runs.read_checkpoint(out / "checkpoint.pt") if resume and (out / "checkpoint.pt").is_file() else None
    bert, tokenizer = runs.text_encoder(settings)
    bert.requires_grad_(settings.text_lr > 0)  # words that take no steps need no gradients
    seen = extract.prepare(splits, settings, out, where, workers, last and last["seen"])
    feature_dim, clip_dim = splits["train"].features.dim, (seen["clip"] or {}).get("dim", 0)
    if last:
        runs.check_width(out, last, feature_dim)
    if settings.slots and settings.slots != (found := splits["train"].features.read([0])[0].shape[1]):
        raise BadInput(f"--slots {settings.slots}: the data has {found} regions an image; 0 takes any number of them")
    model = runs.build(settings, bert, feature_dim, clip_dim).to(where)
    momentum = None
    if settings.weights == "momentum" or settings.queue and settings.model != "tgdt":
        length = settings.queue if settings.model != "tgdt" else 0
        momentum = user.MomentumContrast(model, settings.dim, length, settings.momentum).to(where)
    words = {name: data.tokenize(split.captions, tokenizer, settings.longest) for name, split in splits.items()}

    out.mkdir(parents=True, exist_ok=True)
    runs.save_settings(out, settings)
    tokenizer.save_pretrained(out / "tokenizer")
    inputs = {"feature_dim": feature_dim, "seen": seen, "bert": bert.config.to_dict()}
    state = State(settings, model, momentum, make_optimizer(model, settings), inputs, where)
    if last:
        state.restore(last)

    plan = (splits["train"].image_of, settings.batch_size, settings.captions_per_image, settings.seed)
    per_epoch = len(data.epoch_batches(*plan, 0))
    bar = tqdm(total=settings.epochs * per_epoch, initial=state.epoch * per_epoch + state.step, unit="step",
               dynamic_ncols=True)
    started = time.perf_counter()
    with Interrupt() as interrupt, bar:
        while state.epoch < settings.epochs:
            noise = None
            if settings.noise:
                noise = data.CaptionNoise(tokenizer, settings.noise, (settings.seed, state.epoch))
            pairs = data.Pairs(splits["train"], words["train"], tokenizer.pad_token_id, noise,
                                   settings.region_noise, (settings.seed, state.epoch))
            # The loader's own generator keeps its hands off the global one, on which an exact resume rests.
            loader = DataLoader(pairs, sampler=data.epoch_batches(*plan, state.epoch)[state.step :],
                                batch_size=None, num_workers=workers, pin_memory=where.type == "cuda",
                                generator=torch.Generator())
            if not train_epoch(state, loader, per_epoch, precision, out, interrupt, bar):
                tqdm.write(f"stopped at epoch {state.epoch + 1}, step {state.step}; go on with --resume --out {out}")
                return {}
            state.epoch, state.step = state.epoch + 1, 0
            val = [measure.measure(one, splits["val"], words["val"], settings, where, precision, exhaustive=False)[0]
                   for one in (state.kept, *([model] if state.kept is not model else []))]
            close_epoch(state, *val, per_epoch=per_epoch, seconds=time.perf_counter() - started, out=out)

    settings, _, model, tokenizer = runs.open_run(out)
    return report(model.to(where), splits, words, tokenizer, settings, out, where, precision)


def train_epoch(state: State, loader: DataLoader, per_epoch: int, precision: str, out: Path, interrupt: Interrupt,
                bar: tqdm) -> bool:
    """The rest of the epoch in hand. Returns False when it was interrupted; the state is saved then."""
    settings, model, optimizer, saved = state.settings, state.model, state.optimizer, time.perf_counter()
    model.train()
    for batch in loader:
        batch = {name: value.to(state.device, non_blocking=True) for name, value in batch.items()}
        factor = rate(state.epoch * per_epoch + state.step, per_epoch, settings)
        for group, peak in zip(optimizer.param_groups, (1.0, settings.text_lr), strict=True):
            group["lr"] = settings.lr * peak * factor
        loss = objective(model, batch, settings, state.epoch < settings.easy_epochs, precision, state.momentum)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        state.step += 1
        bar.update()
        if state.step % 10 == 0 or state.step == per_epoch:
            value = loss.item() / (1 if settings.model == "user" else len(batch["image_row"]))
            if not math.isfinite(value):
                raise BadInput(f"the loss is {value} at epoch {state.epoch + 1}, step {state.step}: training diverged; "
                               f"try a smaller --lr. {out / 'checkpoint.pt'} holds the last good state")
            state.total, state.count = state.total + value, state.count + 1
            bar.set_postfix(epoch=state.epoch + 1, loss=f"{value:.3f}")
        if interrupt.seen:
            state.save(out / "checkpoint.pt")
            return False
        if time.perf_counter() - saved > SAVE_EVERY:
            state.save(out / "checkpoint.pt")
            saved = time.perf_counter()
    return True


def close_epoch(state: State, val: dict, val_model: dict | None = None, *, per_epoch: int, seconds: float,
                out: Path) -> None:
    """Write down an epoch that is over: a line of history, the curves, both checkpoints. val_model: the metrics of the
    model where its momentum copy is what is kept, to see what that is worth."""
    settings, final = state.settings, twostage.final(val)
    stages = [name for name in ("global", "two_stage") if name in val]
    state.history.append({
        "epoch": state.epoch, "loss": state.total / state.count,
        "lr": settings.lr * rate(state.epoch * per_epoch - 1, per_epoch, settings),
        "seconds": round(seconds, 1), "val": {name: val[name] for name in stages}})
    if val_model:
        state.history[-1]["val_model_rsum"] = twostage.final(val_model)["rsum"]
    if settings.model != "user":
        state.history[-1]["negatives"] = "mean" if state.epoch <= settings.easy_epochs else "hardest"
    state.total, state.count = 0.0, 0
    best = final["rsum"] >= max(twostage.final(line["val"])["rsum"] for line in state.history)
    if best:
        state.save_best(out / "best.pt")
    state.save(out / "checkpoint.pt")
    lines = "".join(json.dumps(line) + "\n" for line in state.history)
    files.write_whole(out / "history.jsonl", lambda file: file.write(lines.encode()))
    figures.curves(state.history, out / "curves.png")
    tqdm.write(f"epoch {state.epoch:3d}  loss {state.history[-1]['loss']:.3f}  val R@1 {final['i2t']['r1']:.1f} / "
               f"{final['t2i']['r1']:.1f}  rsum {final['rsum']:.1f}{'  best' if best else ''}")


# ------------------------------------------------------------------------------------------------ the last word


def report(model: torch.nn.Module, splits: dict, words: dict, tokenizer: BertTokenizer, settings: Settings, out: Path,
           device: torch.device, precision: str) -> dict:
    """Evaluate on test (val where there is none), print the table, write metrics.json and the pictures."""
    name = "test" if "test" in splits else "val"
    split = splits[name]
    if name == "val":
        print(f"{settings.dataset} has no test split here: the figures are those of val, which chose the checkpoint")
    result, images, texts = measure.measure(model, split, words[name], settings, device, precision)
    files.write_json(out / "metrics.json", result)
    print(measure.table(result))
    draw(model, split, images, texts, words[name], tokenizer, settings, out)
    print(f"run folder: {out}")
    return result


@torch.inference_mode()
def draw(model: torch.nn.Module, split: data.Split, images: twostage.Embeddings, texts: twostage.Embeddings,
         words: data.Words, tokenizer: BertTokenizer, settings: Settings, out: Path) -> None:
    """The sheet of queries, drawn at random but always the same ones; of its first caption what each word looks at, or
    of that caption's image, for a model without fine tokens, what the guide strengthens."""
    chance = torch.Generator().manual_seed(0)
    captions, pictures = (torch.randperm(len(e), generator=chance)[:n] for e, n in ((texts, 5), (images, 3)))
    options = (settings.local_weight, settings.words)
    images_found = twostage.search(texts[captions], images, settings.images_shortlist, *options)[0][:, :5]
    captions_found = twostage.search(images[pictures], texts, settings.captions_shortlist, *options)[0][:, :5]
    figures.retrieval(split, images_found, captions_found, captions, pictures, out / "retrieval.png")
    caption = int(captions[0])
    row = int(split.image_of[caption])
    if texts.tokens is not None:
        pieces = tokenizer.convert_ids_to_tokens(words.ids[words.offsets[caption] + 1 : words.offsets[caption + 1] - 1])
        dots = texts.tokens[caption, : len(pieces)] @ images.tokens[row, images.mask[row]].T
        boxes = split.features.read([row])[1][0][images.mask[row].cpu().numpy()]
        figures.alignment(split, row, pieces, dots.cpu().numpy(), boxes, out / "alignment.png")
    elif model.guide is not None:
        batch = data.image_side(split, np.array([row]))
        given = {name: value.to(images.globals.device) for name, value in batch.items()}
        added = model.guide(given["regions"], given["region_mask"], given.get("clip")) - given["regions"]
        real = batch["region_mask"][0]  # what is added to a region is the guide, of unit length, times its attention
        figures.guided(split, row, added.norm(dim=2)[0].cpu()[real].numpy(), batch["boxes"][0][real].numpy(),
                       out / "guide.png")


# -------------------------------------------------------------------------------------------- the command line


def parser() -> argparse.ArgumentParser:
    """One flag a setting. Their defaults come from model and preset, so --help shows the value of each."""
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = {"scenes": {}, "small": {"dataset": "flickr30k"}, "paper": {"dataset": "flickr30k", "preset": "paper"}}
    presets = {name: {kind: runs.make_settings(given | {"model": name}) for kind, given in kinds.items()}
               for name in ("tgdt", "user", "tgdt-user")}
    for f in fields(Settings):
        kind = f.default.__class__ if f.default is not None else str
        note = f.metadata["help"]
        values = {name: {kind: getattr(preset, f.name) for kind, preset in each.items()}
                  for name, each in presets.items()}
        if f.name in ("dataset", "model", "preset") or (values["tgdt"] == values["user"] == values["tgdt-user"]
                                                        and len(set(values["tgdt"].values())) == 1):
            note += f" (default {f.default})" if f.default is not None else ""
        else:
            for name, each in values.items():
                if name == "tgdt" or each != values["tgdt"]:
                    same, value = len(set(each.values())) == 1, each["paper"]
                    note += f" ({name}: {value if same else ', '.join(f'{k} {v}' for k, v in each.items())})"
        if kind is bool:
            out.add_argument("--" + f.name.replace("_", "-"), action="store_true", default=None, help=note)
            continue
        out.add_argument("--" + f.name.replace("_", "-"), type=kind, choices=f.metadata["choices"], help=note,
                         metavar=None if f.metadata["choices"] else {int: "N", float: "X", str: "TEXT"}[kind])
    out.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default auto)")
    out.add_argument("--workers", type=int, metavar="N", default=0,
                     help="processes that read features (default 0), or decode pictures (default: one a core)")
    out.add_argument("--out", type=Path, metavar="DIR", help="run folder (default runs/<dataset>-<model>)")
    out.add_argument("--resume", action="store_true", help="go on with the run in --out, from its last checkpoint")
    return out


def main(argv: list[str] | None = None) -> int:
    given = vars(parser().parse_args(argv))
    device, workers, out, resume = (given.pop(name) for name in ("device", "workers", "out", "resume"))
    matplotlib.use("Agg")  # a run draws into files, also where there is no screen
    try:
        settings = runs.make_settings(given)
        out = out or Path("runs") / f"{settings.dataset}-{settings.model}"
        if resume:
            settings = runs.resumed(out, given)
        elif (out / "settings.json").exists() or (out / "checkpoint.pt").exists():
            raise BadInput(f"{out} already holds a run: go on with it by --resume, or give another folder by --out")
        result = train(settings, out, device, resume, workers)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0 if result else 130


if __name__ == "__main__":
    sys.exit(main())
