"""Annotation files: which captions belong to which picture, and to which split.

Three kinds are read, all into a list of `Entry`: Karpathy's dataset_*.json, COCO's captions_*2014.json with TERAN's
lists of annotation ids, and a table of your own, captions.csv or captions.jsonl.
"""
import csv
import hashlib
import io
import json
import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sources import photos
from sources.features import TERAN, read_array
from sources.files import BadInput, explained

KARPATHY, COCO = "python train.py --dataset NAME --fetch-only fetches them", "from cocodataset.org"
COCO_PARTS = {"train": ("train", "restval"), "val": ("dev",), "test": ("test",)}
OTHER_NAMES = {"restval": "train", "dev": "val"}  # names of splits in files -> ours


class Entry(NamedTuple):
    """What an annotation file says of one image."""

    where: str  # the file and the place in it, for messages
    id: int  # the name of the image's bottom-up files
    split: str  # "train", "val" or "test"
    file: tuple[str, str]  # the folder (or "") and the file name of the picture
    size: tuple[float, float] | None  # width and height of the picture, if they are given
    captions: list[str]


def find(root: Path, name: str) -> Path | None:
    """The annotation file of this name in root/annotations or in root, or None."""
    return next((path for path in (root / "annotations" / name, root / name) if path.is_file()), None)


def need(root: Path, name: str, source: str) -> Path:
    """Like `find`, but raises BadInput if the file is missing. source: where people get it from."""
    path = find(root, name)
    if path is None:
        raise BadInput(f"{root / 'annotations' / name}: missing, also not in {root} ({source})")
    return path


def read_karpathy(path: Path, by_place: bool = False) -> list[Entry]:
    """Karpathy's JSON. The id of an image is its place in the list, as in TERAN's files.

    by_place: these files are used, so raise BadInput if an image has an imgid that is not its place.
    """
    with explained(path, "JSON with a list 'images'"):
        images = list(json.loads(path.read_bytes().decode("utf-8-sig"))["images"])
    entries = []
    for place, image in enumerate(images):
        where = f"{path}: images[{place}]"
        with explained(where, "filename, split and sentences with raw text"):
            split = OTHER_NAMES.get(image["split"], image["split"])
            file = (image.get("filepath", ""), image["filename"])
            size = (float(image["width"]), float(image["height"])) if "width" in image else None
            captions = [sentence["raw"].strip() for sentence in image["sentences"]]
            if by_place and (number := image.get("imgid", place)) != place:
                raise ValueError(f"imgid {number}: bottom-up files are named by the place in the whole list, {place}")
            entries.append(Entry(where, place, split, file, size, captions))
    return checked(entries)


def checked(entries: list[Entry]) -> list[Entry]:
    """The same entries. Raises BadInput for an unknown split, text that is broken, or a file outside of the folder."""
    for entry in entries:
        with explained(entry.where, "a file name and captions that are text"):
            name = posixpath.join(*entry.file)
            "".join(entry.captions).encode()
        if not photos.usable(name):
            raise BadInput(f"{entry.where}: found the file name {name!r}, expected one inside of the data's folder, "
                           "in UTF-8 and without control characters")
        if entry.split not in ("train", "val", "test"):
            raise BadInput(f"{entry.where}: split {entry.split!r}, expected train, val or test")
    return entries


def read_coco(root: Path, splits: Sequence[str]) -> list[Entry]:
    """COCO's annotations with TERAN's coco_*_ids.npy, which list the annotation ids of a split."""
    images, captions = {}, {}  # image id -> (file, size); annotation id -> (image id, caption)
    for name in ("captions_train2014.json", "captions_val2014.json"):
        path = need(root, name, COCO)
        with explained(path, "JSON with COCO's lists 'images' (id, file_name, width, height) and 'annotations'"):
            content = json.loads(path.read_bytes().decode("utf-8-sig"))
            for image in content["images"]:
                images[image["id"]] = (image["file_name"], (float(image["width"]), float(image["height"])))
            for annotation in content["annotations"]:
                captions[annotation["id"]] = (annotation["image_id"], annotation["caption"].strip())
    entries = []
    for split in splits:
        if split == "test" and find(root, "coco_test_ids.npy") is None:
            continue
        of_split: dict[int, Entry] = {}
        for part in COCO_PARTS[split]:
            path = need(root, f"coco_{part}_ids.npy", TERAN)
            for place, annotation in enumerate(read_array(path, dtype=np.int64).ravel().tolist()):
                image, caption = captions.get(annotation, (None, ""))
                if image not in images:
                    raise BadInput(f"{path}: entry {place}, annotation {annotation}, is not in captions_*2014.json")
                file, size = images[image]
                entry = Entry(f"{path}: image {image}", image, split, ("", file), size, [])
                of_split.setdefault(image, entry).captions.append(caption)
        entries += of_split.values()
    return checked(entries)


def read_own(root: Path, split_seed: int) -> list[Entry]:
    """The annotations of a folder of your own: captions.csv, captions.jsonl, or one dataset_*.json like Karpathy's."""
    tables = [path for path in (root / "captions.csv", root / "captions.jsonl") if path.is_file()]
    if len(tables) == 2:
        raise BadInput(f"{root}: has captions.csv and captions.jsonl, expected one of them")
    if tables:
        return read_table(tables[0], split_seed)
    found = sorted(path for pattern in ("dataset*.json", "annotations/dataset*.json") for path in root.glob(pattern)
                   if path.is_file())
    if len(found) != 1:
        raise BadInput(f"{root}: expected captions.csv or captions.jsonl, with a file and a caption on each line, or "
                       f"one dataset_*.json, found {len(found)} of these")
    return read_karpathy(found[0])


def read_table(path: Path, split_seed: int) -> list[Entry]:
    """A table with a file, a caption and maybe a split on each line. If it names no splits, they are drawn."""
    entries: dict[str, Entry] = {}
    for where, line in csv_lines(path) if path.suffix == ".csv" else json_lines(path):
        file, caption, split = ((line.get(name) or "").strip() for name in ("file", "caption", "split"))
        split = OTHER_NAMES.get(split, split)
        if not file or not caption:
            raise BadInput(f"{where}: found {json.dumps(line, ensure_ascii=False)}, expected a file and a caption")
        if "\\" in file and photos.find(path.parent, [("", file)]) == [None]:
            file = file.replace("\\", "/")  # the table is from Windows
        file = posixpath.normpath(file)  # ./p1.jpg is p1.jpg
        entry = entries.setdefault(file, Entry(where, len(entries), split, ("", file), None, []))
        if entry.split != split:
            raise BadInput(f"{where}: {file} has split {split or 'none'} here, but {entry.split or 'none'} above, "
                           f"in {entry.where}")
        entry.captions.append(caption)
    if not entries:
        raise BadInput(f"{path}: no captions")
    without_split = [entry for entry in entries.values() if not entry.split]
    if not without_split:
        if lacking := {"train", "val"} - {entry.split for entry in checked(list(entries.values()))}:
            raise BadInput(f"{path}: no picture has split {min(lacking)}; without the column split, splits are drawn")
        return list(entries.values())
    if len(without_split) < len(entries):
        raise BadInput(f"{without_split[0].where}: no split, but other lines of the file have one")
    if len(entries) < 4:
        raise BadInput(f"{path}: {len(entries)} pictures, expected at least 4, to draw train, val and test from")
    split_of = draw_splits(list(entries), split_seed)
    return checked([entry._replace(split=split_of[file]) for file, entry in entries.items()])


def draw_splits(names: list[str], seed: int) -> dict[str, str]:
    """About a tenth of the pictures goes to val, as many to test, the rest to train. val and test get at least
    one, and train at least two.

    A hash gives each picture a number from 0 to 1, so it keeps its split when others come or go.
    """
    hashes = {name: hashlib.sha256(f"{seed}:{name}".encode(errors="replace")).hexdigest() for name in names}
    numbers = {name: int(digits, 16) / 2**256 for name, digits in hashes.items()}
    order = sorted(names, key=numbers.get)
    val_end = min(max(sum(number < 0.1 for number in numbers.values()), 1), len(names) - 3)
    test_end = min(max(sum(number < 0.2 for number in numbers.values()), val_end + 1), len(names) - 2)
    splits = ["val"] * val_end + ["test"] * (test_end - val_end) + ["train"] * (len(names) - test_end)
    return dict(zip(order, splits, strict=True))


def csv_lines(path: Path) -> list[tuple[str, dict]]:
    """Each line of a .csv file: where it stands, and its values by the titles of line 1."""
    with explained(path, "a readable file"):
        text = path.read_bytes().decode("utf-8-sig")
    with explained(path, "comma-separated values"):
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        reader.fieldnames = titles = [title.strip().lower() for title in reader.fieldnames or []]
    if not {"file", "caption"} <= set(titles):
        raise BadInput(f"{path}, line 1: found {', '.join(titles) or 'nothing'}, expected titles: file, caption")
    if twice := [title for title in ("file", "caption", "split") if titles.count(title) > 1]:
        raise BadInput(f"{path}, line 1: two columns are called {twice[0]}, expected one caption on each line")
    lines = []
    while True:
        with explained(f"{path}, line {reader.line_num + 1}", "comma-separated values"):
            line = next(reader, None)
        if line is None:
            return lines
        where = f"{path}, line {reader.line_num}"
        if None in line:
            raise BadInput(f"{where}: more values than titles; put quotes around a caption that has a comma")
        lines.append((where, line))


def json_lines(path: Path) -> list[tuple[str, dict]]:
    """Each line of a .jsonl file that is not empty: where it stands, and its object."""
    with explained(path, "a readable file"):
        text = path.read_bytes().decode("utf-8-sig")
    lines = []
    for number, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        with explained(f"{path}, line {number}", "a JSON object with file and caption"):
            line = {str(name).lower(): value for name, value in json.loads(content).items() if value is not None}
            if not all(isinstance(line.get(name, ""), str) for name in ("file", "caption", "split")):
                raise TypeError("file, caption and split must be texts")
        lines.append((f"{path}, line {number}", line))
    return lines
