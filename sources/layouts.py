"""Pictures, captions, regions and boxes: the file formats in which the two papers' data is published.

Part of neither paper, but both stand on it. An image is a bag of regions, each a feature vector and a box from an
object detector; a caption belongs to one image, and `image_of` (caption -> image row) alone says to which. Region
features come in two layouts: SCAN precomp, one array a split (SCAN, VSE-infinity, USER), and bottom-up, two files an
image (TERAN, TGDT). Karpathy's dataset_*.json has the captions of the second and finds pictures for the first. Without
features, that file and the pictures are enough, and so is a table of one's own pictures: see `extract.py`.
"""

from __future__ import annotations

import csv
import json
import re
from collections import namedtuple
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sources import photos
from sources.features import TERAN, ManyFiles, OneArray, read_array
from sources.files import BadInput, explained

# where the published files are to be had from
SCAN = "linked from github.com/kuanghuei/SCAN"
KARPATHY, COCO = "from cs.stanford.edu/people/karpathy/deepimagesent", "from cocodataset.org"




class Listing(NamedTuple):
    """What the files of a dataset say of a split: M captions of N images."""

    captions: list[str]  # M, as written
    image_of: np.ndarray  # [M] int64, caption -> image row
    features: OneArray | ManyFiles | None  # None: to be computed from the pictures
    image_names: list[str]  # N: a file name, an id or a row number
    pictures: list[Path | None]  # N: None where there is no file

# What annotations say of an image. where: for messages; file: (filepath, filename); size: (width, height) or None
Entry = namedtuple("Entry", "where id split file size captions")
PRECOMP = {"flickr8k": "f8k_precomp", "flickr30k": "f30k_precomp", "coco": "coco_precomp"}
COCO_IDS = {"train": ("train", "restval"), "val": ("dev",), "test": ("test",)}


def read(dataset: str, root: Path | None, splits: Sequence[str] = ("train", "val", "test"), regions: str = "auto",
         split_seed: int = 0) -> dict[str, Listing]:
    """The splits of "flickr8k", "flickr30k", "coco" or "folder", one's own pictures and captions.

    "test" is left out where there is none. `root` holds the files. regions: "files" wants feature files, in either
    layout; "auto" takes them where they are; else, and for any other word, the splits have no features yet. split_seed
    draws the splits of a table that names none. Raises BadInput for whatever in `root` is missing or wrong.
    """
    if dataset not in (*PRECOMP, "folder"):
        raise BadInput(f"dataset '{dataset}': expected one of scenes, folder, {', '.join(PRECOMP)}")
    if not root or not Path(root).is_dir():
        raise BadInput(f"{root or '--data-root'}: no such folder, expected the one with the files of {dataset}")
    root = Path(root)
    if dataset == "folder":
        if regions == "files":
            raise BadInput("--regions files: --dataset folder has pictures, no feature files")
        return load_pictures(root, own_entries(root, split_seed), splits)
    file, own = f"dataset_{dataset}.json", PRECOMP[dataset]
    unnamed = (folder for folder in sorted(root.glob("*_precomp")) if folder.name not in PRECOMP.values())
    folders = (root, root / own, *unnamed)  # none that is another dataset's by its name
    scan = next((f for f in folders if any(f.glob("*_ims.npy")) or any(f.glob("*_caps.txt"))), None)
    if regions not in ("auto", "files"):
        return load_pictures(root, karpathy_entries(find_file(root, file, KARPATHY)), splits)
    if scan:
        path = find_file(root, file) or find_file(scan, file)
        found = load_scan(dataset, root, scan, karpathy_entries(path) if path else [], splits)
    elif (root / "features_36").is_dir():
        entries = coco_entries(root, splits) if dataset == "coco" else karpathy_entries(find_file(root, file, KARPATHY))
        found = load_bottom_up(root, entries, splits)
    elif regions == "auto" and find_file(root, file):
        return load_pictures(root, karpathy_entries(find_file(root, file)), splits)
    else:
        raise BadInput(
            f"{root}: no region features: neither train_ims.npy and train_caps.txt, here or in {own} ({SCAN}), nor "
            f"features_36/bu_att and features_36/bu_box ({TERAN}); to compute them from the pictures, {file} and the "
            f"pictures are wanted ({KARPATHY})"
        )
    widths = {s.features.dim: f"{s.features.dim} in {s.features.path} ({name})" for name, s in found.items()}
    if len(widths) > 1:
        raise BadInput(f"the splits differ in features per region: {', '.join(widths.values())}")
    return found


def load_scan(dataset: str, root: Path, folder: Path, entries: list[Entry], splits: Sequence[str]) -> dict[str, Listing]:
    """SCAN's layout. COCO's test split is testall, the 5K images, if present. Pictures are found by caption text."""
    file_of_text, found = {}, {}
    for entry in entries:
        for text in map(plain, entry.captions):  # a text of several images tells nothing
            file_of_text[text] = entry.file if file_of_text.get(text, entry.file) == entry.file else None
    for name in splits:
        testall = dataset == "coco" and name == "test" and (folder / "testall_ims.npy").exists()
        stem = "testall" if testall else {"val": "dev"}.get(name, name)
        ims, caps = folder / f"{stem}_ims.npy", folder / f"{stem}_caps.txt"
        missing = [path for path in (ims, caps) if not path.is_file()]
        if name == "test" and len(missing) == 2:
            continue
        if missing:
            raise BadInput(f"{missing[0]}: missing, expected for split {name} ({SCAN})")
        captions, features = read_captions(caps), OneArray(ims)
        if len(captions) % features.shape[0]:
            raise BadInput(f"{caps}: {len(captions)} captions, expected a multiple of the {features.shape[0]} in {ims}")
        features.repeat = rows_an_image(features) if len(captions) == features.shape[0] else 1
        each = len(captions) // len(features)
        told = [{file_of_text.get(plain(t)) for t in captions[i : i + each]} for i in range(0, len(captions), each)]
        files = [(texts - {None}).pop() if len(texts - {None}) == 1 else None for texts in told]
        names = [file[1] if file else f"row {row}" for row, file in enumerate(files)]
        image_of, pictures = np.arange(len(captions)) // each, photos.find(root, files)
        found[name] = Listing(captions, image_of, features, names, pictures)
    return found


def rows_an_image(features: OneArray) -> int:
    """How many rows in a run an image has where there is a row a caption, by a look at both ends and between."""
    total, row = features.shape[0], cache(lambda index: features.read([index])[0].tobytes())
    for size in (size for size in range(min(total, 64), 1, -1) if total % size == 0):
        starts = {0, size % total, *(np.linspace(0, total // size - 1, 8).astype(int) * size).tolist()}
        if all(row(start) == row(start + i) for start in starts for i in range(1, size)):
            if len({row(start) for start in starts}) == 1 < len(starts):  # as in a file never filled
                raise BadInput(f"{features.path}: the rows of different images are equal, expected features")
            return size
    if total > 1 and all(row(i) == row(i + 1) for i in (0, total // 3, total // 2)):
        raise BadInput(f"{features.path}: rows repeat, expected equally often for every image")
    return 1


def read_captions(path: Path) -> list[str]:
    """A caption a line, the last with or without a newline. Raises BadInput for an empty line or broken UTF-8."""
    with explained(path, "a readable file"):  # not splitlines(): it would also split at rarer marks than newlines
        captions = [line.strip() for line in path.read_bytes().decode().removesuffix("\n").split("\n")]
    if "" in captions:
        raise BadInput(f"{path}, line {captions.index('') + 1}: empty, expected a caption")
    return captions


def load_bottom_up(root: Path, entries: list[Entry], splits: Sequence[str]) -> dict[str, Listing]:
    """Bottom-up files: captions, image ids and sizes from the annotations."""
    found = load_pictures(root, entries, splits)
    for name, split in found.items():
        own = [entry for entry in entries if entry.split == name]
        features = ManyFiles(root / "features_36", [e.id for e in own], [e.size for e in own], split.pictures)
        found[name] = split._replace(features=features)
    return found


def load_pictures(root: Path, entries: list[Entry], splits: Sequence[str]) -> dict[str, Listing]:
    """Splits without features: what annotations say, and where the pictures are."""
    found = {}
    for name in splits:
        own = [entry for entry in entries if entry.split == name]
        if not own and name == "test":
            continue
        if not own:
            raise BadInput(f"{root}: the annotations have no image of split {name}")
        for entry in (entry for entry in own if not entry.captions or "" in entry.captions):
            raise BadInput(f"{entry.where}, {entry.file[1]}: an empty caption or none at all")
        captions = [caption for entry in own for caption in entry.captions]
        image_of = np.repeat(np.arange(len(own)), [len(entry.captions) for entry in own])
        names = [entry.file[1] for entry in own]
        found[name] = Listing(captions, image_of, None, names, photos.find(root, [entry.file for entry in own]))
    return found


def karpathy_entries(path: Path) -> list[Entry]:
    """Karpathy's JSON; an image's id is its place in the list, as TERAN's files count. restval belongs to train."""
    entries = []
    with explained(path, "JSON with a list 'images'"):
        images = list(json.loads(path.read_bytes().decode())["images"])
    for place, image in enumerate(images):
        where = f"{path}: images[{place}]"
        with explained(where, "filename, split and sentences with raw text"):
            captions = [sentence["raw"].strip() for sentence in image["sentences"]]
            size = (float(image["width"]), float(image["height"])) if "width" in image else None
            file, split = (image.get("filepath", ""), image["filename"]), image["split"].replace("restval", "train")
            entries.append(Entry(where, place, split, file, size, captions))
    return entries


def own_entries(root: Path, split_seed: int) -> list[Entry]:
    """One's own pictures: captions.csv (a line of titles, then file, caption and perhaps split), captions.jsonl (the
    same names in an object a line), or a JSON like Karpathy's. Without splits a tenth of the pictures, 1,000 at most,
    is drawn for val and as many for test; `split_seed` alone decides which, not their order in the file."""
    path = next((root / name for name in ("captions.csv", "captions.jsonl") if (root / name).is_file()), None)
    if path is None:
        annotations = sorted([*root.glob("dataset*.json"), *root.glob("annotations/dataset*.json")])
        if len(annotations) != 1:
            raise BadInput(f"{root}: expected captions.csv or captions.jsonl, with a file and a caption a line, or one "
                           f"dataset_*.json, found {len(annotations)} of these")
        return karpathy_entries(annotations[0])
    entries: dict[str, Entry] = {}
    for where, line in table_lines(path):
        file, caption, split = ((line.get(name) or "").strip() for name in ("file", "caption", "split"))
        if not file or not caption:
            raise BadInput(f"{where}: found {json.dumps(line, ensure_ascii=False)}, expected a file and a caption")
        split = {"restval": "train", "dev": "val"}.get(split, split)
        if split not in ("train", "val", "test", ""):
            raise BadInput(f"{where}: split {split!r}, expected train, val or test")
        entry = entries.setdefault(file, Entry(where, len(entries), split, ("", file), None, []))
        if entry.split != split:
            raise BadInput(f"{where}: {file} is of split {split or 'none'} here, and of {entry.split or 'none'} above")
        entry.captions.append(caption)
    unnamed = [entry for entry in entries.values() if not entry.split]
    if not unnamed:
        return list(entries.values())
    if len(unnamed) < len(entries):
        raise BadInput(f"{unnamed[0].where}: no split, where other lines of the file have one")
    if len(entries) < 4:
        raise BadInput(f"{path}: {len(entries)} pictures, expected 4 at least, to draw train, val and test from")
    names = sorted(entries)
    order, part = np.random.default_rng(split_seed).permutation(len(names)), min(max(len(names) // 10, 1), 1000)
    split_of = {names[row]: ("val", "test", "train")[min(place // part, 2)] for place, row in enumerate(order)}
    return [entry._replace(split=split_of[file]) for file, entry in entries.items()]


def table_lines(path: Path) -> list[tuple[str, dict]]:
    """Where each line of a .csv or .jsonl stands, and what it says, its names in lower case."""
    with explained(path, "a readable file"):
        text = path.read_bytes().decode("utf-8-sig")
    if path.suffix == ".csv":
        with explained(path, "comma-separated values"):
            reader = csv.DictReader(text.splitlines(keepends=True), strict=True)
            titles = [title.strip().lower() for title in reader.fieldnames or []]
        if not {"file", "caption"} <= set(titles):
            raise BadInput(f"{path}, line 1: found {', '.join(titles) or 'nothing'}, expected titles: file, caption")
        reader.fieldnames, lines = titles, []
        while True:
            with explained(f"{path}, line {reader.line_num + 1}", "comma-separated values"):
                line = next(reader, None)
            if line is None:
                return lines
            where = f"{path}, line {reader.line_num}"
            if None in line:
                raise BadInput(f"{where}: more values than titles; a caption with a comma is wanted in quotes")
            lines.append((where, line))
    lines = []
    for number, content in enumerate(text.split("\n"), 1):
        if content.strip():
            with explained(f"{path}, line {number}", "a JSON object with file and caption"):
                line = {str(name).lower(): value for name, value in json.loads(content).items()}
                if not all(isinstance(line.get(name, ""), str) for name in ("file", "caption", "split")):
                    raise TypeError("file, caption and split are texts")
            lines.append((f"{path}, line {number}", line))
    return lines


def coco_entries(root: Path, splits: Sequence[str]) -> list[Entry]:
    """TERAN's annotations of COCO: a split is a list of annotation ids; train = train + restval."""
    images, captions, entries = {}, {}, []
    for name in ("captions_train2014.json", "captions_val2014.json"):
        path = find_file(root, name, COCO)
        with explained(path, "JSON with COCO's lists 'images' (id, file_name, width, height) and 'annotations'"):
            content = json.loads(path.read_bytes().decode())
            images |= {i["id"]: (i["file_name"], (float(i["width"]), float(i["height"]))) for i in content["images"]}
            captions |= {a["id"]: (a["image_id"], a["caption"].strip()) for a in content["annotations"]}
    for split in splits:
        own: dict[int, Entry] = {}
        for part in COCO_IDS[split] if split != "test" or find_file(root, "coco_test_ids.npy") else ():
            path = find_file(root, f"coco_{part}_ids.npy", TERAN)
            for place, annotation in enumerate(read_array(path, dtype=np.int64).ravel().tolist()):
                image, caption = captions.get(annotation, (None, ""))
                if image not in images:
                    raise BadInput(f"{path}: entry {place}, annotation {annotation}, is not in captions_*2014.json")
                entry = Entry(f"{path}: image {image}", image, split, ("", images[image][0]), images[image][1], [])
                own.setdefault(image, entry).captions.append(caption)
        entries += own.values()
    return entries


def find_file(root: Path, name: str, source: str = "") -> Path | None:
    """An annotation file, if it is there; raises BadInput if it is not but has to be, having a `source`."""
    path = next((path for path in (root / "annotations" / name, root / name) if path.is_file()), None)
    if path is None and source:
        raise BadInput(f"{root / 'annotations' / name}: missing, also not in {root} ({source})")
    return path


def plain(text: str) -> str:
    """Letters and digits in lower case: the same for a caption as written and as tokenised."""
    return re.sub(r"[\W_]+", "", text.lower())
