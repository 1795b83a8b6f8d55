"""Train a model, measure it, leave a run folder.

    python train.py                                              the built-in scenes, TGDT, three minutes on two cores
    python train.py --dataset flickr30k --data-root DIR          Flickr30K from its feature files
    python train.py --dataset coco --data-root DIR --preset paper --device cuda

--preset small (the default) is for a laptop, and on scenes smaller still; --preset paper has the released sizes and
rates. Any setting given beside it counts.

The run folder holds settings.json, checkpoint.pt (the last state), best.pt (by validation rsum), history.jsonl (a
line an epoch), metrics.json, and the pictures curves.png, retrieval.png and alignment.png. Ctrl-C saves the state
and stops; --resume goes on from it, on exactly the path that the uninterrupted run would have taken.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import math
import signal
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import BertTokenizer

import data
import figures
import losses
import retrieve
import run as runs
import tgdt
from data import BadInput
from run import Settings

SAVE_EVERY = 600  # seconds between two checkpoints within an epoch


# ------------------------------------------------------------------------------------------------------ one step


def objective(model: torch.nn.Module, batch: dict, settings: Settings, easy: bool, precision: str) -> torch.Tensor:
    """The loss of one batch, summed over its B pairs: CMC with the false negatives masked.

    The batch holds each image once; `image_row` [B] tells which row of it a caption belongs to. The networks run in
    mixed precision, the loss always in float32. `easy` takes the mean over the negatives for the hardest one.
    """
    device = batch["regions"].device
    # PyTorch's fused attention for processors has a slow backward pass: plain matrix products take half its time.
    attention = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
    with retrieve.autocast(device, precision), attention:
        images, texts = model.encode_images(batch), encode_by_length(model, batch, 1 if device.type == "cuda" else 2)
    row = batch["image_row"]
    local = losses.local_similarity(
        images.tokens.float(), images.mask, texts.tokens.float(), texts.mask, settings.words
    )[row]
    return losses.cmc(
        images.globals.float()[row], texts.globals.float(), local,
        positives=row[:, None] == row[None, :], margin=settings.margin, intra_margin=settings.intra_margin,
        local_weight=settings.local_weight, negatives="mean" if easy else "hardest",
    )


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
    widest = parts[-1].tokens.shape[1]
    padded = [F.pad(part.tokens, (0, 0, 0, widest - part.tokens.shape[1])) for part in parts]
    masks = [F.pad(part.mask, (0, widest - part.mask.shape[1])) for part in parts]
    back = order.argsort()
    return tgdt.Encoded(torch.cat([part.globals for part in parts])[back], torch.cat(padded)[back],
                        torch.cat(masks)[back])


def make_optimizer(model: torch.nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW or Adam; the pre-trained words take smaller steps than what starts from scratch."""
    words = {id(p) for p in model.bert.parameters()}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in words], "lr": settings.lr},
        {"params": list(model.bert.parameters()), "lr": settings.lr * settings.text_lr},
    ]
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[settings.optimizer]
    return kind(groups, weight_decay=settings.weight_decay, fused=True)


def rate(step: int, steps_per_epoch: int, settings: Settings) -> float:
    """The learning rate at a step, as a part of its peak: linear warm-up, then linear to 0, or x 0.1 in steps."""
    total = steps_per_epoch * settings.epochs
    warmup = min(settings.warmup, total // 2)
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "step":
        return 0.1 ** (step // steps_per_epoch // settings.drop_every)
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

    Raises BadInput for data, a text encoder, a checkpoint or a folder that cannot be used.
    """
    where, precision = runs.resolve(device, settings.precision)
    torch.manual_seed(settings.seed)
    splits = data.load(settings.dataset, settings.data_root and Path(settings.data_root))
    last = runs.read_checkpoint(out / "checkpoint.pt") if resume and (out / "checkpoint.pt").is_file() else None
    bert, tokenizer = runs.text_encoder(settings)
    feature_dim = splits["train"].features.dim
    model = runs.build(settings, bert, last["feature_dim"] if last else feature_dim).to(where)
    runs.check_features(out, feature_dim, model)
    optimizer = make_optimizer(model, settings)
    words = {name: data.tokenize(split.captions, tokenizer, settings.longest) for name, split in splits.items()}

    out.mkdir(parents=True, exist_ok=True)
    runs.save_settings(out, settings)
    tokenizer.save_pretrained(out / "tokenizer")
    epoch, step, history, total, count = 0, 0, [], 0.0, 0  # total and count: the loss of the epoch in hand
    if last:
        model.load_state_dict(last["model"])
        optimizer.load_state_dict(last["optimizer"])
        epoch, step, history, total, count = (last[name] for name in ("epoch", "step", "history", "total", "count"))
        torch.set_rng_state(last["rng"])
        if where.type == "cuda" and "cuda_rng" in last:
            torch.cuda.set_rng_state(last["cuda_rng"])

    def model_state() -> dict:
        return {"settings": asdict(settings), "feature_dim": feature_dim, "bert": bert.config.to_dict(),
                "epoch": epoch, "model": model.state_dict()}

    def save_last() -> None:
        state = model_state() | {"optimizer": optimizer.state_dict(), "step": step, "history": history,
                                 "total": total, "count": count, "rng": torch.get_rng_state()}
        if where.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state()
        runs.write_whole(out / "checkpoint.pt", lambda file: torch.save(state, file))

    pairs = data.Pairs(splits["train"], words["train"], tokenizer.pad_token_id)
    plan = (splits["train"].image_of, settings.batch_size, settings.captions_per_image, settings.seed)
    per_epoch = len(data.epoch_batches(*plan, 0))
    bar = tqdm(total=settings.epochs * per_epoch, initial=epoch * per_epoch + step, unit="step", dynamic_ncols=True)
    started, saved = time.perf_counter(), time.perf_counter()
    with Interrupt() as interrupt, bar:
        while epoch < settings.epochs:
            model.train()
            # The loader's own generator keeps its hands off the global one, on which an exact resume rests.
            loader = DataLoader(pairs, sampler=data.epoch_batches(*plan, epoch)[step:], batch_size=None,
                                num_workers=workers, pin_memory=where.type == "cuda", generator=torch.Generator())
            for batch in loader:
                batch = {name: value.to(where, non_blocking=True) for name, value in batch.items()}
                factor = rate(epoch * per_epoch + step, per_epoch, settings)
                for group, peak in zip(optimizer.param_groups, (1.0, settings.text_lr), strict=True):
                    group["lr"] = settings.lr * peak * factor
                loss = objective(model, batch, settings, epoch < settings.easy_epochs, precision)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
                optimizer.step()
                step += 1
                bar.update()
                if step % 10 == 0 or step == per_epoch:
                    value = loss.item() / len(batch["image_row"])
                    if not math.isfinite(value):
                        raise BadInput(f"the loss is {value} at epoch {epoch + 1}, step {step}: training diverged; "
                                       f"try a smaller --lr. {out / 'checkpoint.pt'} holds the last good state")
                    total, count = total + value, count + 1
                    bar.set_postfix(epoch=epoch + 1, loss=f"{value:.3f}")
                if interrupt.seen:
                    save_last()
                    tqdm.write(f"stopped at epoch {epoch + 1}, step {step}; go on with --resume --out {out}")
                    return {}
                if time.perf_counter() - saved > SAVE_EVERY:
                    save_last()
                    saved = time.perf_counter()
            epoch, step = epoch + 1, 0
            val = retrieve.measure(model, splits["val"], words["val"], settings, where, precision, exhaustive=False)[0]
            final = val["two_stage"]
            history.append({"epoch": epoch, "loss": total / count,
                            "negatives": "mean" if epoch <= settings.easy_epochs else "hardest",
                            "lr": settings.lr * rate(epoch * per_epoch - 1, per_epoch, settings),
                            "seconds": round(time.perf_counter() - started, 1),
                            "val": {name: val[name] for name in ("global", "two_stage")}})
            total, count = 0.0, 0
            best = final["rsum"] >= max(line["val"]["two_stage"]["rsum"] for line in history)
            if best:
                runs.write_whole(out / "best.pt", lambda file: torch.save(model_state(), file))
            save_last()
            saved = time.perf_counter()
            lines = "".join(json.dumps(line) + "\n" for line in history)
            runs.write_whole(out / "history.jsonl", lambda file, lines=lines: file.write(lines.encode()))
            figures.curves(history, out / "curves.png")
            tqdm.write(f"epoch {epoch:3d}  loss {history[-1]['loss']:.3f}  val R@1 {final['i2t']['r1']:.1f} / "
                       f"{final['t2i']['r1']:.1f}  rsum {final['rsum']:.1f}{'  best' if best else ''}")

    settings, model, tokenizer = runs.open_run(out)
    return report(model.to(where), splits, words, tokenizer, settings, out, where, precision)


# ------------------------------------------------------------------------------------------------ the last word


def report(model: torch.nn.Module, splits: dict, words: dict, tokenizer: BertTokenizer, settings: Settings, out: Path,
           device: torch.device, precision: str) -> dict:
    """Evaluate on test (val where there is none), print the table, write metrics.json and the pictures."""
    name = "test" if "test" in splits else "val"
    split = splits[name]
    if name == "val":
        print(f"{settings.dataset} has no test split here: the figures are those of val, which chose the checkpoint")
    result, images, texts = retrieve.measure(model, split, words[name], settings, device, precision)
    runs.write_json(out / "metrics.json", result)
    print(retrieve.table(result))
    draw(split, images, texts, words[name], tokenizer, settings, out)
    print(f"run folder: {out}")
    return result


def draw(split: data.Split, images: retrieve.Embeddings, texts: retrieve.Embeddings, words: data.Words,
         tokenizer: BertTokenizer, settings: Settings, out: Path) -> None:
    """The sheet of queries, drawn at random but always the same ones, and the alignment of its first caption."""
    chance = torch.Generator().manual_seed(0)
    captions, pictures = (torch.randperm(len(e), generator=chance)[:n] for e, n in ((texts, 5), (images, 3)))
    options = (settings.local_weight, settings.words)
    images_found = retrieve.search(texts[captions], images, settings.images_shortlist, *options)[0][:, :5]
    captions_found = retrieve.search(images[pictures], texts, settings.captions_shortlist, *options)[0][:, :5]
    figures.retrieval(split, images_found, captions_found, captions, pictures, out / "retrieval.png")
    caption = int(captions[0])
    row = int(split.image_of[caption])
    pieces = tokenizer.convert_ids_to_tokens(words.ids[words.offsets[caption] + 1 : words.offsets[caption + 1] - 1])
    dots = texts.tokens[caption, : len(pieces)] @ images.tokens[row, images.mask[row]].T
    boxes = split.features.read([row])[1][0][images.mask[row].cpu().numpy()]
    figures.alignment(split, row, pieces, dots.cpu().numpy(), boxes, out / "alignment.png")


# -------------------------------------------------------------------------------------------- the command line


def parser() -> argparse.ArgumentParser:
    """One flag a setting. Their defaults come from the preset, so --help shows each preset's value."""
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    presets = {"scenes": runs.make_settings({}), "small": runs.make_settings({"dataset": "flickr30k"}),
               "paper": runs.make_settings({"dataset": "flickr30k", "preset": "paper"})}
    for f in fields(Settings):
        kind = f.default.__class__ if f.default is not None else str
        note = f.metadata["help"]
        values = {name: getattr(preset, f.name) for name, preset in presets.items()}
        if f.name in ("dataset", "preset") or len(set(values.values())) == 1:
            note += f" (default {f.default})" if f.default is not None else ""
        else:
            note += f" ({', '.join(f'{name} {value}' for name, value in values.items())})"
        out.add_argument("--" + f.name.replace("_", "-"), type=kind, choices=f.metadata["choices"], help=note,
                         metavar=None if f.metadata["choices"] else {int: "N", float: "X", str: "TEXT"}[kind])
    out.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default auto)")
    out.add_argument("--workers", type=int, metavar="N", default=0, help="processes that read features (default 0)")
    out.add_argument("--out", type=Path, metavar="DIR", help="run folder (default runs/<dataset>-<model>)")
    out.add_argument("--resume", action="store_true", help="go on with the run in --out, from its last checkpoint")
    return out


def main(argv: list[str] | None = None) -> int:
    given = vars(parser().parse_args(argv))
    device, workers, out, resume = (given.pop(name) for name in ("device", "workers", "out", "resume"))
    try:
        settings = runs.make_settings(given)
        out = out or Path("runs") / f"{settings.dataset}-{settings.model}"
        if resume:
            settings = resumed(out, given)
        elif (out / "settings.json").exists() or (out / "checkpoint.pt").exists():
            raise BadInput(f"{out} already holds a run: go on with it by --resume, or give another folder by --out")
        result = train(settings, out, device, resume, workers)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0 if result else 130


def resumed(out: Path, given: dict) -> Settings:
    """The settings of the run in `out`; what was given anew must agree with them, but for a larger --epochs."""
    stored = runs.stored_settings(out)
    for name, value in given.items():
        before = getattr(stored, name)
        if value is not None and value != before:
            if name != "epochs" or value < before:
                raise BadInput(f"{out} holds a run with --{name.replace('_', '-')} {before}, not {value}: "
                               "resume it with its own settings (more --epochs are welcome), or give another --out")
            stored.epochs = value
    return stored


if __name__ == "__main__":
    sys.exit(main())
