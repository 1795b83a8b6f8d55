"""Retrieval, from the command line: measure a trained run, make an index of a corpus, search either.

    python retrieve.py evaluate RUN                       recall of a trained run, both directions
    python retrieve.py index    RUN --out INDEX           encode a split once, to be searched again and again
    python retrieve.py search   RUN_OR_INDEX "a red ring" the pictures that fit a caption best
    python retrieve.py search   RUN_OR_INDEX --image FILE the captions that fit a picture best

What happens underneath stands in `twostage.py` (TGDT, two-stage inference), `measure.py` and `recall.py` (both papers'
experiments), and `index.py`; what others call of them can be had from here.
"""
from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import BertTokenizer

import data
from harness import extract, figures
from harness import index as indices_on_disk
from harness import run as runs
from harness.measure import measure, table
from retrieve import Embeddings, encode, search, shortlists
from sources import layouts, photos
from sources.files import BadInput

QUERIES = 256  # captions of a file searched together

# ------------------------------------------------------------------------------------------------- what is opened


@dataclass
class Opened:
    """A run, and a split of its data or another dataset's."""

    settings: runs.Settings
    model: torch.nn.Module
    device: torch.device
    precision: str
    tokenizer: BertTokenizer
    seen: dict  # what looked at the pictures that it was trained on (see extract.prepare)
    split: data.Split | None
    words: data.Words | None

    def texts(self, captions: list[str]) -> Embeddings:
        """Captions as written -> their embeddings."""
        words = data.tokenize(captions, self.tokenizer, self.settings.longest)
        return self.encode(data.text_batches(words, 256), "text", len(captions))

    def side(self, kind: str) -> Embeddings:
        """All pictures or all captions of the split."""
        if kind == "image":
            return self.encode(data.image_batches(self.split, 128), "image", len(self.split.features))
        return self.encode(data.text_batches(self.words, 256), "text", len(self.split.captions))

    def encode(self, batches, kind: str, count: int) -> Embeddings:
        return encode(self.model, batches, kind, count, self.device, self.precision)


def open_run(folder: Path, args: argparse.Namespace, split: str | None, with_data: bool = True) -> Opened:
    """A run and, if wanted, a split. Raises BadInput when the run, the data or a network that looks at pictures are not
    there or do not fit."""
    settings, checkpoint, model, tokenizer = runs.open_run(folder)
    for name in ("data_root", "region_weights", "clip_model"):  # which may lie elsewhere by now
        setattr(settings, name, getattr(args, name) or getattr(settings, name))
    device, precision = runs.resolve(args.device, settings.precision)
    run = Opened(settings, model.to(device), device, precision, tokenizer, checkpoint["seen"], None, None)
    if with_data:
        root = Path(settings.data_root) if settings.data_root else None
        splits = data.load(settings.dataset, root, (split,) if split else ("test", "val"), settings.regions,
                           settings.split_seed)
        if split and split not in splits:
            raise BadInput(f"{root}: {settings.dataset} has no {split} split here")
        run.split = splits[split] if split else splits.get("test", splits.get("val"))
        extract.prepare({run.split.name: run.split}, settings, folder, device, wanted=run.seen)
        runs.check_width(folder, checkpoint, run.split.features.dim)
        run.words = data.tokenize(run.split.captions, tokenizer, settings.longest)
    return run


def best_checkpoint(folder: Path) -> Path:
    return folder / "best.pt" if (folder / "best.pt").is_file() else folder / "checkpoint.pt"


# ------------------------------------------------------------------------------------------------------- evaluate


def run_evaluate(args: argparse.Namespace) -> None:
    run = open_run(args.run, args, args.split)
    result, images, texts = measure(run.model, run.split, run.words, run.settings, run.device, run.precision,
                                    dtype=indices_on_disk.DTYPES[args.dtype], memory=args.memory)
    print(table(result))
    if args.shortlist:
        if texts.tokens is None:
            raise BadInput(f"--shortlist: {args.run} has no fine tokens to re-rank by")
        lines = shortlists(images, texts, run.split.image_of, args.shortlist, run.settings.local_weight,
                           run.settings.words, args.memory)
        print("\n    K   R@1 i2t   R@1 t2i      rsum   seconds")
        for line in lines:
            print(f"{line['k']:5d}{line['i2t']['r1']:10.1f}{line['t2i']['r1']:10.1f}{line['rsum']:10.1f}"
                  f"{line['seconds']:10.2f}")
        path = args.save or args.run / "shortlist.png"
        figures.shortlists(lines, result, path)
        print(f"picture: {path}")


# ---------------------------------------------------------------------------------------------------------- index


def run_index(args: argparse.Namespace) -> None:
    if args.images:
        run = open_run(args.run, args, None, with_data=False)
        run.split, run.words = own_pictures(run, args), data.tokenize([], run.tokenizer, run.settings.longest)
    else:
        run = open_run(args.run, args, args.split)
    split, settings = run.split, run.settings
    root = args.images or settings.data_root
    identity = {"checkpoint": indices_on_disk.checkpoint_hash(best_checkpoint(args.run)),
                "run": str(args.run.resolve()), "dataset": settings.dataset, "split": split.name, "dtype": args.dtype,
                "data": str(Path(root).resolve()) if root else None, "dim": settings.dim,
                "tokens": settings.model != "user"}
    if args.images:  # other pictures are another index
        identity["pictures"] = [list(extract.known(picture, args.images)) for picture in split.pictures]

    def encode_items(kind: str, items: np.ndarray) -> Embeddings:
        if kind == "text":
            return run.encode(data.text_batches(run.words.take(items), 256), "text", len(items))
        batches = ({**data.image_side(split, part), "image_index": torch.from_numpy(part - items[0])}
                   for part in np.array_split(items, -(-len(items) // 128)))
        return run.encode(batches, "image", len(items))

    names = {"images": split.image_names, "captions": split.captions, "image_of": split.image_of.tolist()}
    counts = {"image": len(split.features), "text": len(split.captions)}
    manifest = indices_on_disk.build(args.out, identity, counts, encode_items, names, args.faiss)
    for kind, found in manifest["faiss"].items():
        print(f"FAISS finds {100 * found:.1f} % of the 100 {kind}s that are nearest")
    size = sum(file.stat().st_size for file in args.out.iterdir())
    print(f"index of {counts['image']} images and {counts['text']} captions, {size / 1e6:.1f} MB: {args.out}")


def own_pictures(run: Opened, args: argparse.Namespace) -> data.Split:
    """A split of all pictures in a folder, without captions, seen as the run's own were. Raises BadInput for a run
    whose regions came from files: nobody here knows what computed them."""
    if run.seen["regions"]["kind"] == "files":
        raise BadInput(f"{args.run} was trained on feature files, and what computed them is not known here: --images "
                       "wants a run that was trained on pictures, by --regions detector, grid or clip")
    if args.split:
        raise BadInput("--images FOLDER has no splits: give it without --split")
    found = photos.listed(args.images)
    names = [picture.relative_to(args.images).as_posix() for picture in found]
    split = data.Split("images", [], np.zeros(0, np.int64), None, names, found)
    settings = replace(run.settings, data_root=str(args.images), skip_bad=args.skip_bad,
                       cache=str(args.out.with_name(args.out.name + ".cache")))
    extract.prepare({"images": split}, settings, args.run, run.device, args.workers, run.seen)
    return split


# --------------------------------------------------------------------------------------------------------- search


def run_search(args: argparse.Namespace) -> None:
    captions = check_search(args)
    index = open_index(args) if indices_on_disk.is_index(args.run) else None
    folder = index.folder if index else args.run
    with_data = index is None or args.image is not None or args.save is not None
    own = index is not None and index.manifest["split"] == "images"  # pictures of a folder, without captions
    run = open_run(folder, args, index.manifest["split"] if index else args.split, with_data and not own)
    if own:
        if args.image is not None:
            raise BadInput(f"{args.run} is an index of pictures without captions: search it by a caption")
        names = index.names["images"]
        run.split = data.Split("images", [], np.zeros(0, np.int64), None, names,
                               photos.find(Path(index.manifest["data"]), [("", name) for name in names]))
    wanted, k = ("image", run.settings.images_shortlist) if args.image is None else (
        "text", run.settings.captions_shortlist)
    if index:
        corpus, names = (index.images, index.names["images"]) if wanted == "image" else (
            index.texts, index.names["captions"])
    else:
        corpus, names = run.side(wanted), run.split.image_names if wanted == "image" else run.split.captions

    def answer(query: Embeddings) -> tuple[Tensor, list[list[dict]]]:
        """Rows found [q, top], and of each the name, the score and its parts."""
        weight = run.settings.local_weight
        rows, scores = search(query, corpus, max(k, args.top), weight, run.settings.words, args.memory)
        rows, scores = rows[:, : args.top].cpu(), scores[:, : args.top].cpu()
        coarse = (query.globals.cpu()[:, None] * corpus.globals[rows.to(corpus.globals.device)].cpu()).sum(2)
        fine = (scores - coarse) / weight if weight else torch.zeros_like(scores)
        parts = (part.tolist() for part in (rows, scores, coarse, fine))
        return rows, [[{"name": names[row], "row": row, "score": score, "global": a, "local": b}
                       for row, score, a, b in zip(*line, strict=True)] for line in zip(*parts, strict=True)]

    if args.image is not None:
        batch, picture = picture_query(run, args.image)
        rows, found = answer(run.encode([batch], "image", 1))
        show(args.image, found[0], args.json, corpus.tokens is not None)
    else:
        blocks = range(0, len(captions), QUERIES)
        for start in tqdm(blocks, desc="search", unit=f"{QUERIES} queries", disable=len(blocks) == 1):
            asked = captions[start : start + QUERIES]
            rows, found = answer(run.texts(asked))
            for caption, answers in zip(asked, found, strict=True):
                show(caption, answers, args.json, corpus.tokens is not None, len(captions) > 1)
    if args.save:
        if args.image is None:
            figures.found_images(run.split, captions[0], rows[0].tolist(), args.save)
        else:
            figures.found_captions(picture, [names[row] for row in rows[0].tolist()], args.save)
        print(f"picture: {args.save}", file=sys.stderr if args.json else sys.stdout)


def open_index(args: argparse.Namespace) -> indices_on_disk.Index:
    """The index that was asked for. Raises BadInput when its run is gone, or has been trained on since."""
    index = indices_on_disk.load(args.run)
    index.folder = args.from_run or Path(index.manifest["run"])
    weights = best_checkpoint(index.folder)
    found = indices_on_disk.checkpoint_hash(weights) if weights.is_file() else None
    if found != index.manifest["checkpoint"]:
        raise BadInput(f"{args.run} was made with another checkpoint than {weights} "
                       f"{'is now' if found else '(which is not there)'}: make the index anew, or give --from-run")
    if args.split not in (None, index.manifest["split"]):
        raise BadInput(f"{args.run} is an index of split {index.manifest['split']}, not {args.split}")
    return index


def check_search(args: argparse.Namespace) -> list[str]:
    """The captions asked for. Raises BadInput for what cannot be asked."""
    if args.top < 1:
        raise BadInput(f"--top {args.top}: expected at least 1")
    if args.save and args.save.suffix not in (".png", ".jpg", ".pdf", ".svg"):
        raise BadInput(f"--save {args.save}: expected a name that ends in .png, .jpg, .pdf or .svg")
    if args.queries:
        if args.save:
            raise BadInput("--save draws one query, --queries has many")
        return layouts.read_captions(args.queries)
    if args.caption is not None and not args.caption.strip():
        raise BadInput("the caption is empty")
    return [args.caption]


def show(query: str, found: list[dict], as_json: bool, fine: bool, titled: bool = False) -> None:
    """A line of JSON, or a table: the score and what it is made of."""
    if as_json:
        print(json.dumps({"query": query, "found": found}, ensure_ascii=False), flush=True)
        return
    if titled:
        print(f"\n{query}")
    print(f"  #{'score':>9}{'global':>9}{'local':>9}" if fine else f"  #{'score':>9}")
    for place, item in enumerate(found, 1):
        parts = f"{item['global']:9.3f}{item['local']:9.3f}" if fine else ""
        print(f"{place:3d}{item['score']:9.3f}{parts}  {item['name']}")


def picture_query(run: Opened, name: str) -> tuple[dict[str, Tensor], Image.Image | None]:
    """A batch of one picture: an image of the split by name or row, or for a run whose regions came from pictures any
    file.

    Raises BadInput when it is none of these.
    """
    split, plain = run.split, Path(name).name
    if name.isdigit() and int(name) < len(split.image_names):
        row = int(name)
    elif name in split.image_names or plain in split.image_names:
        row = split.image_names.index(name if name in split.image_names else plain)
    elif run.seen["regions"]["kind"] != "files" and Path(name).is_file():
        alone = extract.one(Path(name), run.settings, run.device, run.seen)
        batch = data.image_side(alone, np.zeros(1, np.int64))
        return batch | {"image_index": torch.zeros(1, dtype=torch.long)}, alone.picture(0)
    else:
        raise BadInput(f"{name}: neither a picture of the {split.name} split, by name or by row (0 to "
                       f"{len(split.image_names) - 1}), nor, for a run that was trained on pictures, a picture file")
    batch = data.image_side(split, np.array([row]))
    return batch | {"image_index": torch.zeros(1, dtype=torch.long)}, split.picture(row)


def gigabytes(text: str) -> int:
    """An option's gigabytes -> bytes."""
    value = float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text}: expected more than 0")
    return int(value * 1e9)


def lengths(text: str) -> list[int]:
    """An option's "10,20,50" -> [10, 20, 50]."""
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return sorted(set(values))


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = out.add_subparsers(required=True, metavar="evaluate | index | search")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--split", choices=("train", "val", "test"),
                        help="which split (default test, val where there is none)")
    shared.add_argument("--data-root", type=Path, metavar="DIR", help="the data, if no longer where it was trained on")
    shared.add_argument("--region-weights", metavar="FILE", help="likewise the weights of what looks at pictures")
    shared.add_argument("--clip-model", metavar="FOLDER", help="likewise the CLIP")
    shared.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default auto)")
    shared.add_argument("--memory", type=gigabytes, metavar="GB",
                        help="what a search may use on the way (default a quarter of what is free)")
    one = commands.add_parser("evaluate", parents=[shared], help="recall, both directions",
                              description="Recall of a run: global only, exhaustive local, two-stage; both directions.")
    one.add_argument("run", type=Path, metavar="RUN", help="a run folder that train.py wrote")
    one.add_argument("--dtype", choices=tuple(indices_on_disk.DTYPES), default="float32",
                     help="how tokens are stored while searching (default float32)")
    one.add_argument("--shortlist", type=lengths, metavar="K,K,...",
                     help="two-stage recall and time for these lengths of the shortlist, drawn as a picture")
    one.add_argument("--save", type=Path, metavar="PICTURE.png", help="that picture (default RUN/shortlist.png)")
    one.set_defaults(command=run_evaluate)
    two = commands.add_parser("index", parents=[shared], help="encode a split once, to be searched again and again",
                              description="Write an index: all pictures and captions of a split, encoded.")
    two.add_argument("run", type=Path, metavar="RUN", help="a run folder that train.py wrote")
    two.add_argument("--out", type=Path, metavar="INDEX", required=True, help="the index, a folder")
    two.add_argument("--images", type=Path, metavar="FOLDER",
                     help="index the pictures in this folder instead of a split; wants a run trained on pictures")
    two.add_argument("--skip-bad", action="store_true", help="go on without pictures that cannot be read")
    two.add_argument("--workers", type=int, metavar="N", default=0, help="processes that decode (default: one a core)")
    two.add_argument("--dtype", choices=tuple(indices_on_disk.DTYPES), default="float16",
                     help="how tokens are stored (default float16)")
    two.add_argument("--faiss", choices=("auto", "always", "never"), default="auto",
                     help="an approximate stage 1 by FAISS (auto: beyond a million vectors)")
    two.set_defaults(command=run_index)
    three = commands.add_parser("search", parents=[shared], help="find pictures by a caption, or captions by a picture",
                                description="Search a split or an index with your own words, or with a picture.")
    three.add_argument("run", type=Path, metavar="RUN_OR_INDEX", help="a run folder, or an index made of one")
    query = three.add_mutually_exclusive_group(required=True)
    query.add_argument("caption", nargs="?", help="a caption to find pictures for")
    query.add_argument("--queries", type=Path, metavar="FILE", help="a file of captions, one a line")
    query.add_argument("--image", metavar="FILE",
                       help="a picture to find captions for: one of the split's, by name or row; or, for a run that "
                       "was trained on pictures or on scenes, any file")
    three.add_argument("--top", type=int, default=5, metavar="N", help="how many to show (default 5)")
    three.add_argument("--json", action="store_true", help="a line of JSON a query, for programs")
    three.add_argument("--save", type=Path, metavar="PICTURE.png", help="draw what was found")
    three.add_argument("--from-run", type=Path, metavar="RUN", help="the index's run, if no longer where it was")
    three.set_defaults(command=run_search)
    return out


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    matplotlib.use("Agg")  # it draws into files, also where there is no screen
    try:
        args.command(args)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


