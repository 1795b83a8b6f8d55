"""The search command: evaluate a trained run, make an index of a corpus, search either.

The concepts are in `retrieve.py`, the index is in `harness/index.py`.
"""
import argparse
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
from harness import engines, figures, index, models, pictures, push, qdrant, report, served
from harness import folder as folders
from harness import settings as settings_
from harness.settings import Settings
from retrieve import Embeddings, encode
from sources import layouts, photos
from sources.files import BadInput
from sources.store import facts

QUERIES = 256  # captions of a file searched together

# ------------------------------------------------------------------------------------------------- what is opened


@dataclass
class Searched:
    """A trained model, and what it searches: a split of its data, or pictures of another folder."""

    settings: Settings
    model: torch.nn.Module
    device: torch.device
    precision: str
    tokenizer: object
    seen: dict  # what computed the regions that the model was trained on (see pictures.prepare)
    split: data.Split | None = None
    words: list | None = None  # of the split's captions

    def texts(self, captions: list[str]) -> Embeddings:
        """Captions as written -> their embeddings."""
        words = data.tokenize(captions, self.tokenizer, self.settings.text.longest)
        return self.encode(data.text_batches(words, 256), "text", len(captions))

    def side(self, kind: str) -> Embeddings:
        """All images or all captions of the split."""
        if kind == "image":
            return self.encode(data.image_batches(self.split, 128), "image", len(self.split.features))
        return self.encode(data.text_batches(self.words, 256), "text", len(self.words))

    def image(self, split: data.Split, row: int) -> Embeddings:
        """One image of a split, this one or another."""
        return self.encode(data.image_batches(split, 1, np.array([row])), "image", 1)

    def encode(self, batches, kind: str, count: int) -> Embeddings:
        return encode(self.model, batches, kind, count, self.device, self.precision)


def open_run(folder: Path, args: argparse.Namespace, split: str | None, with_data: bool = True) -> Searched:
    """A run and, if wanted, a split of its data.

    Raises BadInput if the run, the data, or a network that looks at pictures is missing or does not fit.
    """
    if getattr(args, "from_run", None) not in (None, folder):
        raise BadInput(f"--from-run is for an index, and {folder} is a run")
    opened = folders.open_run(folder)
    moved = {name: str(getattr(args, name)) for name in ("data_root", "cache", "region_weights", "clip_model")
             if getattr(args, name)} | ({"skip_bad": True} if args.skip_bad else {})
    settings = settings_.from_flat(settings_.flat(opened.settings) | moved)
    device, precision = models.resolve(args.device, settings.run.precision)
    out = Searched(settings, opened.model.to(device), device, precision, opened.tokenizer, opened.checkpoint["seen"])
    if with_data:
        root = settings.run.data_root
        for name in (split,) if split else ("test", "val"):
            splits = data.load(settings.run.dataset, root, (name,), settings.pictures.regions,
                               settings.pictures.split_seed)
            if name in splits:
                break
        else:
            raise BadInput(f"{root}: {settings.run.dataset} has no {split} split here")
        out.split = splits[name]
        pictures.prepare({out.split.name: out.split}, settings, folder, device, args.workers, out.seen)
        folders.check_features(folder, opened.checkpoint, out.split.features.dim)
        out.words = data.tokenize(out.split.captions, out.tokenizer, settings.text.longest)
    return out


def check_content(place: Path | str, opened: index.Index, split: data.Split) -> None:
    """Raises BadInput if an index was made of other captions, pictures or features than the split has now."""
    if opened.manifest.get("content") != folders.content(split):
        raise BadInput(f"{place}: its captions, pictures or features have changed since it was made: "
                       "make the index again")


# ------------------------------------------------------------------------------------------------------- evaluate


def run_evaluate(args: argparse.Namespace) -> None:
    if qdrant.is_address(args.run):
        if args.shortlist or args.save or args.dtype != "float32":
            raise BadInput(f"{args.run}: --shortlist, --save and --dtype need a run")
        opened = open_index(args)
        if opened.manifest["split"] == "images":
            raise BadInput(f"{args.run} is an index of pictures without captions: it has no recall")
        run = open_run(opened.folder, args, opened.manifest["split"])
        check_content(args.run, opened, run.split)
        options = report.search_options(run.settings)
        print(report.table(served.evaluate(opened, run.side, run.split.image_of, **options)))
        return
    path = args.save or args.run / "shortlist.png"
    if args.save or args.shortlist:
        figures.check_place(path)
    if args.save and not args.shortlist:
        raise BadInput("--save keeps the picture that --shortlist draws: give both")
    run = open_run(args.run, args, args.split)
    if args.shortlist and run.settings.run.model == "user":
        raise BadInput(f"--shortlist: {args.run} has no fine tokens to re-rank by")
    result, images, texts = report.measure(run.model, run.split, run.words, run.settings, run.device, run.precision,
                                           dtype=index.DTYPES[args.dtype])
    print(report.table(result))
    if args.shortlist:
        lines = report.shortlists(images, texts, run.split.image_of, args.shortlist, run.settings.cmc.local_weight,
                                  run.settings.cmc.reduction)
        print("\n    K   R@1 i2t   R@1 t2i      rsum   seconds")
        for line in lines:
            print(f"{line['k']:5d}{line['i2t']['r1']:10.1f}{line['t2i']['r1']:10.1f}{line['rsum']:10.1f}"
                  f"{line['seconds']:10.2f}")
        figures.shortlists(lines, result, path)
        print(f"picture: {path}")


# ---------------------------------------------------------------------------------------------------------- index


def run_index(args: argparse.Namespace) -> None:
    address, checkpoint = qdrant.is_address(args.out), index.checkpoint_of(args.run)
    if args.approximate and not address:
        raise BadInput("--approximate is for an index in Qdrant: --out qdrant://HOST:PORT/NAME")
    if address and args.dtype == "bfloat16":
        raise BadInput("--dtype bfloat16: Qdrant holds float32 and float16")
    if address:
        qdrant.connect(args.out)  # if it fails, say so before the data is loaded
    place = args.out if address else index.place_of(args.out)  # before the data is loaded
    if args.images:
        if args.split:
            raise BadInput("--images FOLDER has no splits: give it without --split")
        run = open_run(args.run, args, None, with_data=False)
        cache = args.run / "pushed.cache" if address else place.with_name(f"{place.name}.cache")
        settings = settings_.from_flat(settings_.flat(run.settings) | {
            "data_root": str(args.images), "skip_bad": args.skip_bad, "cache": str(args.cache or cache)})
        run.split, run.words = pictures.of_folder(settings, args.run, run.device, args.workers, run.seen), []
    else:
        run = open_run(args.run, args, args.split)
    if index.checkpoint_of(args.run) != checkpoint:  # an epoch of a training ended in between
        raise BadInput(f"{args.run} was trained further while its data was read: start again")
    split, settings = run.split, run.settings
    root = args.images or settings.run.data_root
    identity = {"checkpoint": checkpoint, "run": str(args.run.resolve()),
                "dataset": settings.run.dataset, "split": split.name, "dtype": args.dtype,
                "data": str(Path(root).resolve()) if root else None, "dim": settings.architecture.dim,
                "tokens": settings.run.model != "user", "content": folders.content(split)}
    if args.images:  # other pictures make another index
        listed = str([list(facts(picture, args.images)) for picture in split.pictures])
        identity["pictures"] = hashlib.sha256(listed.encode()).hexdigest()

    def encode_items(kind: str, items: np.ndarray) -> Embeddings:
        if kind == "text":
            return run.encode(data.text_batches([run.words[item] for item in items], 256), "text", len(items))
        return run.encode(data.image_batches(split, 128, items), "image", len(items))

    names = {"images": split.image_names, "captions": split.captions}
    counts = {"image": len(split.features), "text": len(split.captions)}
    if address:
        lengths = {"image": settings.search.images_shortlist, "text": settings.search.captions_shortlist}
        push.push(args.out, identity, counts, encode_items, names, lengths if args.approximate else None)
    else:
        index.build(args.out, identity, counts, encode_items, names)
    size = "" if address else f", {sum(file.stat().st_size for file in place.iterdir()) / 1e6:.1f} MB"
    print(f"index of {counts['image']} images and {counts['text']} captions{size}: {args.out}")


# --------------------------------------------------------------------------------------------------------- search


def run_search(args: argparse.Namespace) -> None:
    captions = check_search(args)
    opened = open_index(args) if qdrant.is_address(args.run) or index.is_index(args.run) else None
    no_captions = opened is not None and opened.manifest["split"] == "images"  # an index of a folder of pictures
    if no_captions and args.image is not None:
        raise BadInput(f"{args.run} is an index of pictures without captions: search it by a caption")
    needs_data = not no_captions and (opened is None or args.image is not None or args.save is not None)
    where, split = (opened.folder, opened.manifest["split"]) if opened else (args.run, args.split)
    run = open_run(where, args, split, needs_data)
    if opened and needs_data:
        check_content(args.run, opened, run.split)

    wanted = "image" if args.image is None else "text"
    if opened:
        corpus, names = ((opened.images, opened.names["images"]) if wanted == "image" else
                         (opened.texts, opened.names["captions"]))
    else:
        corpus, names = run.side(wanted), run.split.image_names if wanted == "image" else run.split.captions
    fine = run.settings.run.model != "user"
    if args.image is not None:
        split, row = picture_query(run, args.image)
        rows, found = answer(run, run.image(split, row), corpus, names, args.top)
        report.show(args.image, found[0], args.json, fine)
    else:
        words = data.tokenize(captions, run.tokenizer, run.settings.text.longest)  # names a bad one before any answer
        models.warn_of_unknown(words, run.tokenizer)
        models.warn_of_long(words, run.settings.text.longest)
        blocks = range(0, len(captions), QUERIES)
        for start in tqdm(blocks, desc="search", unit=f"{QUERIES} queries", disable=len(blocks) == 1):
            asked = captions[start : start + QUERIES]
            rows, found = answer(run, run.texts(asked), corpus, names, args.top)
            for caption, answers in zip(asked, found, strict=True):
                report.show(caption, answers, args.json, fine, len(captions) > 1)
    if args.save:
        rows = rows[0].tolist()
        if no_captions:  # a split of the pictures that were found
            found = [names[row] for row in rows]
            files = photos.find(Path(args.data_root or opened.manifest["data"]), [("", name) for name in found])
            run.split, rows = data.Split("images", [], np.zeros(0, np.int64), None, found, files), range(len(rows))
        if args.image is None:
            figures.found_images(run.split, captions[0], rows, args.save)
        else:
            figures.found_captions(split.picture(row), [names[row] for row in rows], args.save)
        print(f"picture: {args.save}", file=sys.stderr if args.json else sys.stdout)


def answer(run: Searched, query: Embeddings, corpus: Embeddings, names: list[str],
           top: int) -> tuple[Tensor, list[list[dict]]]:
    """The rows found [q, top], and of each its name, its score, and the two parts of the score."""
    settings, weight = run.settings, run.settings.cmc.local_weight
    shortlist = settings.search.images_shortlist if corpus.kind == "image" else settings.search.captions_shortlist
    options = (max(shortlist, top), weight, settings.cmc.reduction)
    if isinstance(corpus, served.Side):
        rows, scores, coarse = (found[:, :top] for found in corpus.search(query, *options))
    else:
        query = query.to(corpus.globals.device)  # an index lies on the disk, and is searched by the CPU
        rows, scores = (found[:, :top] for found in engines.search(query, corpus, *options))
        coarse = torch.stack([corpus.globals[own] @ vector for vector, own in zip(query.globals, rows, strict=True)])
    rows, scores, coarse = rows.cpu(), scores.cpu(), coarse.cpu()
    fine = (scores - coarse) / weight if weight else torch.zeros_like(scores)
    lines = zip(rows.tolist(), scores.tolist(), coarse.tolist(), fine.tolist(), strict=True)
    return rows, [[{"name": names[row], "row": row, "score": score, "global": a, "local": b}
                   for row, score, a, b in zip(*line, strict=True)] for line in lines]


def open_index(args: argparse.Namespace) -> index.Index:
    """The index that was asked for. Raises BadInput if its run is gone, or has been trained further since."""
    opened = served.load(args.run) if qdrant.is_address(args.run) else index.load(args.run)
    opened.folder = args.from_run or opened.folder
    found = index.checkpoint_of(opened.folder)
    if found != opened.manifest["checkpoint"]:
        raise BadInput(f"{args.run} was made with another checkpoint; {folders.best_checkpoint(opened.folder)} "
                       f"{'differs' if found else 'is missing'}: make the index again, or give --from-run")
    if args.split not in (None, opened.manifest["split"]):
        raise BadInput(f"{args.run} is an index of split {opened.manifest['split']}, not {args.split}")
    return opened


def check_search(args: argparse.Namespace) -> list[str]:
    """The captions asked for. Raises BadInput if the flags make no sense."""
    if args.save:
        figures.check_place(args.save)
    if args.queries:
        if args.save:
            raise BadInput("--save draws one query, --queries has many")
        return layouts.read_captions(args.queries)
    if args.image is None and not args.caption.strip():
        raise BadInput("the caption is empty")
    return [args.caption]


def picture_query(run: Searched, name: str) -> tuple[data.Split, int]:
    """A split and a row in it: an image of the run's split, or any file if the run was trained on pictures.

    Raises BadInput if it is neither.
    """
    split, row, from_files = run.split, run.split.row_of(name), run.seen["regions"]["kind"] == "files"
    if row is None and from_files and Path(name).name in split.image_names:  # a path will do, only its name counts
        row = split.row_of(Path(name).name)
    if row is not None:
        return split, row
    if from_files or not Path(name).is_file():
        raise BadInput(f"{name}: no image of the {split.name} split, by name or by row (0 to "
                       f"{len(split.image_names) - 1}). Any picture file will do if a run was trained on pictures")
    return pictures.one(Path(name), run.settings, run.device, run.seen), 0
