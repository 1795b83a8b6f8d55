"""Pictures, captions, regions and boxes: the file formats in which the two papers' data is published.

Part of neither paper, but both stand on it. An image is a bag of regions, each a feature vector and a box from an
object detector; a caption belongs to one image, and `image_of` (caption -> image row) alone says to which. Region
features come in two layouts: SCAN precomp, one array a split (SCAN, VSE-infinity, USER), and bottom-up, two files an
image (TERAN, TGDT). Karpathy's dataset_*.json has the captions of the second and finds pictures for the first. Features
stay on disk (COCO's are 33 GB) and a batch's rows are read by offset: a memory map's pages would count as our memory.
"""

from __future__ import annotations

import json
import os
import re
from collections import namedtuple
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

import scenes

# ------------------------------------------------------------------------------------------------------------- errors


class BadInput(ValueError):
    """Something the user gave is wrong; the message is one clear line for people."""


SCAN, TERAN = "linked from github.com/kuanghuei/SCAN", "linked from github.com/mesnico/TERAN"
KARPATHY, COCO = "from cs.stanford.edu/people/karpathy/deepimagesent", "from cocodataset.org"


@contextmanager
def explained(place: Path | str, expected: str):
    """Turns what NumPy and friends raise on a damaged or misnamed file into a BadInput that names the place."""
    try:
        yield
    except UnicodeDecodeError as e:
        line = e.object.count(b"\n", 0, e.start) + 1
        raise BadInput(f"{place}, line {line}: byte 0x{e.object[e.start]:02x} is not UTF-8") from None
    except Exception as e:  # NumPy, zipfile, zlib, json and PIL raise nearly anything: keep the block small
        raise BadInput(f"{place}: expected {expected} ({type(e).__name__}: {e})".replace("\n", " ")) from None


# ---------------------------------------------------------------------------------------------------- feature sources
# A source has len() = N images, .dim = F, .path for messages, and
# .read(rows) -> regions [n, R, F] float32, boxes [n, R, 4] float32 in 0..1, mask [n, R] bool (True = a real region).


class InMemory:
    """Features that are arrays already: regions [N, R, F], boxes [N, R, 4]."""

    def __init__(self, path: str, regions: np.ndarray, boxes: np.ndarray):
        self.path, self.regions, self.boxes, self.dim = path, regions, boxes, regions.shape[2]

    def __len__(self) -> int:
        return len(self.regions)

    def read(self, rows: Sequence[int]) -> tuple:
        regions, boxes = self.regions[rows], self.boxes[rows]
        return regions.astype(np.float32), boxes.astype(np.float32), np.ones(regions.shape[:2], bool)


class OneArray:
    """SCAN's `{split}_ims.npy`: [rows, R, F] float32 or float16, `repeat` rows in a run an image; boxes read as zeros.
    Raises BadInput when opened if the file is no such array or cut short, when read for a NaN or an infinity."""

    def __init__(self, path: Path):
        self.path, self.repeat = path, 1
        with explained(path, "a .npy file"), open(path, "rb") as file:
            major = np.lib.format.read_magic(file)[0]
            read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}[major]
            self.shape, fortran, self.dtype = read_header(file)
            self.start = file.tell()
        if len(self.shape) != 3 or 0 in self.shape or self.dtype not in (np.float32, np.float16) or fortran:
            found = f"{self.dtype} {list(self.shape)} in {'Fortran' if fortran else 'C'} order"
            raise BadInput(f"{path}: found {found}, expected float32 or float16 [images, regions, features] in C order")
        self.dim, self.row_bytes = self.shape[2], self.shape[1] * self.shape[2] * self.dtype.itemsize
        have, need = path.stat().st_size, self.start + self.shape[0] * self.row_bytes
        if have < need:
            row = max(0, have - self.start) // self.row_bytes
            raise BadInput(f"{path}: cut short: {have} of {need} bytes, the first incomplete row is {row}")

    def __len__(self) -> int:
        return self.shape[0] // self.repeat

    def read(self, rows: Sequence[int]) -> tuple:
        regions = np.empty((len(rows), *self.shape[1:]), np.float32)
        for place, image in enumerate(rows):
            row = int(image) * self.repeat
            with explained(self.path, f"{self.row_bytes} bytes for row {row}"):
                stored = np.fromfile(self.path, self.dtype, regions[0].size, offset=self.start + row * self.row_bytes)
                regions[place] = stored.reshape(self.shape[1:])
            if not np.isfinite(regions[place]).all():
                raise BadInput(f"{self.path}: NaN or infinity in row {row} (image {image})")
        return regions, np.zeros((*regions.shape[:2], 4), np.float32), np.ones(regions.shape[:2], bool)


class ManyFiles:
    """Bottom-up files: `bu_att/{id}.npz` with key `feat` [R, F] and `bu_box/{id}.npy` [R, 4] in pixels, for each image.

    Boxes are divided by the picture's size, as the annotations or else the picture tell; failing both, by the largest
    x2 and y2 of the image's boxes: a detector's boxes nearly always touch the border. Batches are padded to the most
    regions. Raises BadInput when opened for missing files, when read for damaged or unfitting ones."""

    def __init__(self, path: Path, ids: list[int], sizes: list[tuple | None], pictures: list[Path | None]):
        self.path, self.ids, self.sizes, self.pictures = path, ids, sizes, pictures
        for folder, ending in (("bu_att", "npz"), ("bu_box", "npy")):
            with explained(path / folder, f"a folder of bottom-up files, {TERAN}"):
                there = set(os.listdir(path / folder))
            missing = [file for i in ids if (file := f"{i}.{ending}") not in there]
            if missing:
                raise BadInput(f"{path / folder / missing[0]}: missing, as are {len(missing) - 1} more of {len(ids)}")
        self.dim = read_array(path / "bu_att" / f"{ids[0]}.npz", "feat").shape[-1]

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, rows: Sequence[int]) -> tuple:
        images = [self.image(int(row)) for row in rows]
        shape = (len(images), max(len(feat) for feat, _ in images))
        regions, boxes = np.zeros((*shape, self.dim), np.float32), np.zeros((*shape, 4), np.float32)
        mask = np.zeros(shape, bool)
        for place, (feat, box) in enumerate(images):
            regions[place, : len(feat)], boxes[place, : len(feat)], mask[place, : len(feat)] = feat, box, True
        return regions, boxes, mask

    def image(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """An image's features [R, F] and its boxes [R, 4] in 0..1."""
        feat_file = self.path / "bu_att" / f"{self.ids[row]}.npz"
        box_file = self.path / "bu_box" / f"{self.ids[row]}.npy"
        feat, box = read_array(feat_file, "feat"), read_array(box_file)
        for file, array, shape in ((feat_file, feat, [max(1, len(feat)), self.dim]), (box_file, box, [len(feat), 4])):
            if list(array.shape) != shape:
                raise BadInput(f"{file}: found shape {list(array.shape)}, expected {shape} (regions first)")
            if not np.isfinite(array).all():
                raise BadInput(f"{file}: NaN or infinity (image {row})")
        if self.sizes[row] is None:
            picture = self.pictures[row]
            with explained(picture, "a picture"):
                self.sizes[row] = Image.open(picture).size if picture else tuple(box[:, 2:].max(0).tolist())
        width, height = self.sizes[row]
        outside = max(-box.min(), (box - (width, height, width, height)).max())
        if outside > 1 or min(width, height) <= 0:  # a pixel is rounding
            raise BadInput(f"{box_file}: a box lies {outside:g} pixels outside its {width:g} x {height:g} picture")
        return feat, (box / (width, height, width, height)).clip(0, 1)


def read_array(path: Path, key: str | None = None, dtype: type = np.float32) -> np.ndarray:
    """The array of a .npy file, or the one called `key` of a .npz archive; never a pickle."""
    with explained(path, f"an .npz archive with key '{key}'" if key else "a .npy array"):
        array = np.load(path, allow_pickle=False)
        return np.atleast_1d((array[key] if key else array).astype(dtype, casting="same_kind"))


# -------------------------------------------------------------------------------------------------------- the layouts


@dataclass
class Split:
    """A split of a dataset: M captions of N images."""

    name: str  # "train", "val" or "test"
    captions: list[str]  # M, as written
    image_of: np.ndarray  # [M] int64, caption -> image row
    features: InMemory | OneArray | ManyFiles
    image_names: list[str]  # N: a file name, an id or a row number
    pictures: Sequence[Path | np.ndarray | None]  # N: a file or pixels, None where there is none
    truth: scenes.Scenes | None = None  # scenes only: what is where, to measure alignment by
    clip: np.ndarray | None = None  # [N, E] a frozen CLIP's embeddings, where they guide (see clip_guide.py)

    def picture(self, row: int) -> Image.Image | None:
        """An image row's picture, RGB; None if it has none. Raises BadInput for a file that is no picture."""
        with explained(self.pictures[row], "a picture"):
            if isinstance(self.pictures[row], Path):
                return Image.open(self.pictures[row]).convert("RGB")
            return None if self.pictures[row] is None else Image.fromarray(self.pictures[row])


# What annotations say of an image. where: for messages; file: (filepath, filename); size: (width, height) or None
Entry = namedtuple("Entry", "where id split file size captions")
PRECOMP = {"flickr8k": "f8k_precomp", "flickr30k": "f30k_precomp", "coco": "coco_precomp"}
COCO_IDS = {"train": ("train", "restval"), "val": ("dev",), "test": ("test",)}
PICTURES = ("", "images", "flickr30k-images", "flickr30k_images", "Images", "train2014", "val2014")


def load(dataset: str, root: Path | None, splits: Sequence[str] = ("train", "val", "test")) -> dict[str, Split]:
    """The splits of "scenes" (no root), "flickr8k", "flickr30k" or "coco"; "test" is left out where there is none.

    `root` holds the files, in either layout. Raises BadInput for whatever in there is missing or wrong.
    """
    if dataset == "scenes":
        return {name: scenes_split(name) for name in splits}
    if dataset not in PRECOMP:
        raise BadInput(f"dataset '{dataset}': expected one of scenes, {', '.join(PRECOMP)}")
    if not root or not Path(root).is_dir():
        raise BadInput(f"{root or '--data-root'}: no such folder, expected the one with the files of {dataset}")
    root, file = Path(root), f"dataset_{dataset}.json"
    unnamed = (folder for folder in sorted(root.glob("*_precomp")) if folder.name not in PRECOMP.values())
    folders = (root, root / PRECOMP[dataset], *unnamed)  # none that is another dataset's by its name
    scan = next((f for f in folders if any(f.glob("*_ims.npy")) or any(f.glob("*_caps.txt"))), None)
    if scan:
        path = find_file(root, file) or find_file(scan, file)
        found = load_scan(dataset, root, scan, karpathy_entries(path) if path else [], splits)
    elif (root / "features_36").is_dir():
        entries = coco_entries(root, splits) if dataset == "coco" else karpathy_entries(find_file(root, file, KARPATHY))
        found = load_bottom_up(root, entries, splits)
    else:
        raise BadInput(
            f"{root}: no region features: neither train_ims.npy and train_caps.txt, here or in {PRECOMP[dataset]} "
            f"({SCAN}), nor features_36/bu_att and features_36/bu_box ({TERAN}); from pictures none are computed here"
        )
    widths = {s.features.dim: f"{s.features.dim} in {s.features.path} ({s.name})" for s in found.values()}
    if len(widths) > 1:
        raise BadInput(f"the splits differ in features per region: {', '.join(widths.values())}")
    return found


def scenes_split(name: str) -> Split:
    truth = scenes.make(name, seed=0)  # the same for every training seed
    names = [f"scene {row}" for row in range(len(truth.pictures))]
    features = InMemory(f"scenes {name}", truth.regions, truth.boxes)
    return Split(name, truth.captions, truth.image_of, features, names, truth.pictures, truth)


def load_scan(dataset: str, root: Path, folder: Path, entries: list[Entry], splits: Sequence[str]) -> dict[str, Split]:
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
        image_of, pictures = np.arange(len(captions)) // each, find_pictures(root, files)
        found[name] = Split(name, captions, image_of, features, names, pictures)
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


def load_bottom_up(root: Path, entries: list[Entry], splits: Sequence[str]) -> dict[str, Split]:
    """Bottom-up files: captions, image ids and sizes from the annotations."""
    found = {}
    for name in splits:
        own = [entry for entry in entries if entry.split == name]
        if not own and name == "test":
            continue
        if not own:
            raise BadInput(f"{root}: the annotations have no image of split {name}")
        for entry in (entry for entry in own if not entry.captions or "" in entry.captions):
            raise BadInput(f"{entry.where}, {entry.file[1]}: an empty caption or none at all")
        pictures = find_pictures(root, [entry.file for entry in own])
        features = ManyFiles(root / "features_36", [e.id for e in own], [e.size for e in own], pictures)
        captions = [caption for entry in own for caption in entry.captions]
        image_of = np.repeat(np.arange(len(own)), [len(entry.captions) for entry in own])
        names = [entry.file[1] for entry in own]
        found[name] = Split(name, captions, image_of, features, names, pictures)
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


def find_pictures(root: Path, files: list[tuple[str, str] | None]) -> list[Path | None]:
    """Where the pictures (filepath, filename) are, in one of the usual folders; each folder is listed once."""
    folders = [root / folder for folder in dict.fromkeys((*PICTURES, *(file[0] for file in files if file)))]
    there = {folder: set(os.listdir(folder)) for folder in folders if folder.is_dir()}
    return [next((d / file[1] for d in there if file[1] in there[d]), None) if file else None for file in files]
