"""Retrieval: encode, search in two stages, count recall.

Read beside TGDT, the part on inference, and both papers' experiments. What two stages are stands in `twostage.py`, what
recall is in `recall.py`; here trained models meet both, and the command line.

    python retrieve.py evaluate RUN                    recall of a trained run, both directions
    python retrieve.py search   RUN "a red ring"       the pictures that fit a caption best
    python retrieve.py search   RUN --image FILE       the captions that fit a picture best
"""
from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import BertTokenizer

import batching
import clip_guide
import data
import figures
import regions
import run as runs
from data import BadInput
from recall import alignment, metrics, ranks, recall, shortlist_ranks
from twostage import Embeddings, local_matrix, search

# ------------------------------------------------------------------------------------------------------- encode


@torch.inference_mode()
def encode(model: torch.nn.Module, batches: Iterable[Mapping[str, Tensor]], kind: str, count: int,
           device: torch.device | str = "cpu", precision: str = "float32") -> Embeddings:
    """Encode all pictures or all captions once; `batches` as from `batching.image_batches` or `batching.text_batches`.

    kind is "image" or "text", count the number of rows over all batches, precision "float32" or "bfloat16" (the
    network's; what comes back is float32). A batch's `image_index` or `caption_index` says where its rows go.
    """
    model.eval()
    encode_batch, key = {"image": (model.encode_images, "image_index"), "text": (model.encode_texts, "caption_index")}[
        kind]
    done, rows = [], []
    bar = tqdm(total=count, desc=f"encode {kind}s", unit=kind, leave=False, delay=2)
    for batch in batches:
        batch = {name: value.to(device) for name, value in batch.items()}
        with autocast(device, precision):
            encoded = encode_batch(batch)
        done.append(Embeddings(kind, encoded.globals.float(), encoded.tokens, encoded.mask))
        rows.append(batch[key])
        bar.update(len(batch[key]))
    bar.close()
    globals_ = done[0].globals.new_empty(count, done[0].globals.shape[1])
    tokens = mask = None
    if done[0].tokens is not None:
        longest = max(part.tokens.shape[1] for part in done)
        tokens = globals_.new_zeros(count, longest, done[0].tokens.shape[2])
        mask = torch.zeros(count, longest, dtype=torch.bool, device=globals_.device)
    for part, row in zip(done, rows, strict=True):
        globals_[row] = part.globals
        if tokens is not None:
            tokens[row, : part.tokens.shape[1]] = part.tokens.float()
            mask[row, : part.mask.shape[1]] = part.mask
    return Embeddings(kind, globals_, tokens, mask)


def autocast(device: torch.device | str, precision: str) -> contextlib.AbstractContextManager:
    """Mixed precision on `device` when precision is "bfloat16", nothing when it is "float32"."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16")


# ----------------------------------------------------------------------------------------------------- evaluate


@torch.inference_mode()
def evaluate(images: Embeddings, texts: Embeddings, image_of: Tensor, shortlist: tuple[int, int] = (50, 100),
             weight: float = 10.0, words: str = "sum", exhaustive: bool = True) -> dict:
    """Global only, exhaustive local, two-stage, and the mixed similarity without a shortlist: the metrics of each.

    image_of [captions] long. shortlist: captions for an image, images for a caption. `exhaustive=False` leaves out
    what needs every local similarity. Without tokens there is only "global". "seconds" says how long each took.
    """
    image_of = torch.as_tensor(image_of, device=images.globals.device)
    rows = torch.arange(len(images), device=images.globals.device)
    out, seconds, clock = {}, {}, Clock(images.globals.device)

    dots = images.globals @ texts.globals.T
    i2t, t2i = ranks(dots, rows, image_of), ranks(dots.T, image_of, rows)
    out["global"], seconds["global"] = metrics(i2t, t2i), clock.lap()
    if images.tokens is None:
        return {**out, "seconds": seconds}
    if exhaustive:
        local = local_matrix(images, texts, words)
        out["local"], seconds["local"] = recall(local, image_of), clock.lap()
    after_i2t = shortlist_ranks(*search(images, texts, shortlist[0], weight, words), rows, image_of, i2t)
    after_t2i = shortlist_ranks(*search(texts, images, shortlist[1], weight, words), image_of, rows, t2i)
    out["two_stage"], seconds["two_stage"] = metrics(after_i2t, after_t2i), clock.lap()
    if exhaustive:
        out["mixed"], seconds["mixed"] = recall(dots + weight * local, image_of), clock.lap() + seconds["local"]
    return {**out, "seconds": seconds}


def final(result: dict) -> dict:
    """The metrics by which a run is judged: two-stage, or global for a model without fine tokens."""
    return result.get("two_stage", result["global"])


def five_folds(images: Embeddings, texts: Embeddings, image_of: Tensor, **options: object) -> dict:
    """COCO's 1K protocol: the mean of the metrics over five folds of a fifth of the images each."""
    image_of = torch.as_tensor(image_of, device=images.globals.device)
    size, folds = len(images) // 5, []
    for fold in range(5):
        keep = image_of.div(size, rounding_mode="floor") == fold
        folds.append(evaluate(images[fold * size : (fold + 1) * size], texts[keep], image_of[keep] - fold * size,
                              **options))
    return mean_of(folds)


def mean_of(results: list[dict]) -> dict:
    """Dictionaries of one shape -> their mean, number by number."""
    first = results[0]
    return {key: mean_of([r[key] for r in results]) if isinstance(first[key], dict)
            else sum(r[key] for r in results) / len(results) for key in first}


class Clock:
    """Seconds since the last lap, with the device's queue waited for."""

    def __init__(self, device: torch.device | str):
        self.device, self.last = torch.device(device), time.perf_counter()

    def lap(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before, self.last = self.last, time.perf_counter()
        return self.last - before


# -------------------------------------------------------------------------------------------- the command line


def measure(model: torch.nn.Module, split: data.Split, words: batching.Words, settings: runs.Settings,
            device: torch.device | str, precision: str, exhaustive: bool = True,
            ) -> tuple[dict, Embeddings, Embeddings]:
    """Encode a split and evaluate it: the metrics (see `evaluate`), its pictures and its captions encoded."""
    clock = Clock(device)
    images = encode(model, batching.image_batches(split, 128), "image", len(split.features), device, precision)
    texts = encode(model, batching.text_batches(words, 256), "text", len(split.captions), device, precision)
    seconds = clock.lap()
    options = dict(shortlist=settings.shortlist, weight=settings.local_weight, words=settings.words)
    result = evaluate(images, texts, split.image_of, exhaustive=exhaustive, **options)
    result["seconds"]["encode"] = seconds
    if settings.dataset == "coco" and exhaustive and len(images) == 5000:
        result["folds_1k"] = five_folds(images, texts, split.image_of, **options)
    if split.truth is not None and exhaustive and texts.tokens is not None:
        result["alignment"] = alignment(
            texts.tokens, images.tokens, split.image_of, split.truth.boxes, split.truth.object_boxes,
            split.truth.word_objects)
    return {"split": split.name, "images": len(images), "captions": len(texts), **result}, images, texts


NAMES = {"global": "global only", "local": "exhaustive local", "two_stage": "two-stage", "mixed": "exhaustive mixed"}


def table(result: dict) -> str:
    """The metrics of `measure` as text: a line a way of searching, both directions, and the seconds each took."""
    lines = [f"{result['split']}: {result['images']} images, {result['captions']} captions, "
             f"encoded in {result['seconds']['encode']:.1f} s"]
    for title, part in (("", result), ("mean of five folds of 1K", result.get("folds_1k"))):
        if part is None:
            continue
        lines += [title] if title else []
        lines.append(f"{'':18}{'image to text':^24}{'text to image':^24}")
        lines.append(f"{'':18}" + f"{'R@1':>6}{'R@5':>6}{'R@10':>6}{'med':>5} " * 2 + f"{'rsum':>7}{'seconds':>9}")
        for key, name in NAMES.items():
            if key in part:
                row = "".join("".join(f"{part[key][way][r]:6.1f}" for r in ("r1", "r5", "r10"))
                              + f"{part[key][way]['median_rank']:5.0f} " for way in ("i2t", "t2i"))
                lines.append(f"{name:18}{row}{part[key]['rsum']:7.1f}{part['seconds'][key]:9.2f}")
    if "alignment" in result:
        a = result["alignment"]
        lines.append(f"alignment: {a['aligned']:.1f} % of {a['words']} words that name an object look at it "
                     f"(chance {a['chance']:.1f} %)")
    return "\n".join(lines)


@dataclass
class Opened:
    """A run and a split to search."""

    settings: runs.Settings
    model: torch.nn.Module
    device: torch.device
    precision: str
    split: data.Split
    words: batching.Words
    tokenizer: BertTokenizer
    clip: clip_guide.Clip | None  # of a run with --guide clip


def open_split(args: argparse.Namespace) -> Opened:
    """What the command line names. Raises BadInput when the run, the data or the CLIP are not there or do not fit."""
    settings, checkpoint, model, tokenizer = runs.open_run(args.run)
    device, precision = runs.resolve(args.device, settings.precision)
    root = args.data_root or (Path(settings.data_root) if settings.data_root else None)
    splits = data.load(settings.dataset, root, (args.split,) if args.split else ("test", "val"))
    if args.split and args.split not in splits:
        raise BadInput(f"{root}: {settings.dataset} has no {args.split} split here")
    split = splits[args.split] if args.split else splits.get("test", splits.get("val"))
    clip = clip_guide.Clip(settings.clip_model, device) if settings.guide == "clip" else None
    runs.check_widths(args.run, checkpoint, split.features.dim, clip.dim if clip else 0)
    if clip:
        clip_guide.attach({split.name: split}, clip, [*([root] if root else []), args.run])
    words = batching.tokenize(split.captions, tokenizer, settings.longest)
    return Opened(settings, model.to(device), device, precision, split, words, tokenizer, clip)


def run_evaluate(args: argparse.Namespace) -> None:
    run = open_split(args)
    print(table(measure(run.model, run.split, run.words, run.settings, run.device, run.precision)[0]))


def run_search(args: argparse.Namespace) -> None:
    if args.caption is not None and not args.caption.strip():
        raise BadInput("the caption is empty")
    if args.top < 1:
        raise BadInput(f"--top {args.top}: expected at least 1")
    if args.save and args.save.suffix not in (".png", ".jpg", ".pdf", ".svg"):
        raise BadInput(f"--save {args.save}: expected a name that ends in .png, .jpg, .pdf or .svg")
    run = open_split(args)
    settings, split, model, how = run.settings, run.split, run.model, (run.device, run.precision)
    if args.caption is not None:
        asked = batching.tokenize([args.caption], run.tokenizer, settings.longest)
        query = encode(model, batching.text_batches(asked, 1), "text", 1, *how)
        corpus = encode(model, batching.image_batches(split, 128), "image", len(split.features), *how)
        names, k = split.image_names, settings.images_shortlist
    else:
        batch, picture = picture_query(run, args.image)
        query = encode(model, [batch], "image", 1, *how)
        corpus = encode(model, batching.text_batches(run.words, 256), "text", len(split.captions), *how)
        names, k = split.captions, settings.captions_shortlist
    indices, scores = search(query, corpus, max(k, args.top), settings.local_weight, settings.words)
    indices, scores = indices[0, : args.top].tolist(), scores[0, : args.top].tolist()
    for place, (index, score) in enumerate(zip(indices, scores, strict=True), 1):
        print(f"{place:3d}  {score:8.3f}  {names[index]}")
    if args.save:
        if args.caption is not None:
            figures.found_images(split, args.caption, indices, args.save)
        else:
            figures.found_captions(picture, [names[i] for i in indices], args.save)
        print(f"picture: {args.save}")


def picture_query(run: Opened, name: str) -> tuple[dict[str, Tensor], Image.Image | None]:
    """A batch of one picture: an image of the split by name or row, or on scenes, whose detector is built in, any file.

    Raises BadInput when it is none of these.
    """
    split, plain = run.split, Path(name).name
    if name.isdigit() and int(name) < len(split.image_names):
        row = int(name)
    elif name in split.image_names or plain in split.image_names:
        row = split.image_names.index(name if name in split.image_names else plain)
    elif split.truth is not None and Path(name).is_file():
        try:
            picture = Image.open(name).convert("RGB").resize((regions.SIDE, regions.SIDE))
        except OSError as error:
            raise BadInput(f"{name}: not a picture ({error})") from error
        pixels = np.asarray(picture)[None]
        boxes = regions.propose(pixels)
        found = data.InMemory(name, regions.describe(pixels, boxes), boxes)
        alone = data.Split(split.name, [], np.zeros(0, np.int64), found, [name], pixels)
        if run.clip:
            alone.clip = run.clip.embed([picture])
        batch = batching.image_side(alone, np.zeros(1, np.int64))
        return batch | {"image_index": torch.zeros(1, dtype=torch.long)}, picture
    else:
        raise BadInput(f"{name}: neither a picture of the {split.name} split, by name or by row (0 to "
                       f"{len(split.image_names) - 1}), nor, on scenes, a picture file")
    batch = batching.image_side(split, np.array([row]))
    return batch | {"image_index": torch.zeros(1, dtype=torch.long)}, split.picture(row)


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = out.add_subparsers(required=True, metavar="evaluate | search")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("run", type=Path, metavar="RUN", help="a run folder that train.py wrote")
    shared.add_argument("--split", choices=("val", "test"), help="which split (default test, val where there is none)")
    shared.add_argument("--data-root", type=Path, metavar="DIR", help="the data, if no longer where it was trained on")
    shared.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default auto)")
    one = commands.add_parser("evaluate", parents=[shared], help="recall, both directions",
                              description="Recall of a run: global only, exhaustive local, two-stage; both directions.")
    one.set_defaults(command=run_evaluate)
    two = commands.add_parser("search", parents=[shared], help="find pictures by a caption, or captions by a picture",
                              description="Search a split with your own words, or with a picture.")
    query = two.add_mutually_exclusive_group(required=True)
    query.add_argument("caption", nargs="?", help="a caption to find pictures for")
    query.add_argument("--image", metavar="FILE",
                       help="a picture to find captions for: one of the split's, by name or row; on scenes any file")
    two.add_argument("--top", type=int, default=5, metavar="N", help="how many to show (default 5)")
    two.add_argument("--save", type=Path, metavar="PICTURE.png", help="draw what was found")
    two.set_defaults(command=run_search)
    return out


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        args.command(args)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
