"""The layouts in which datasets lie on a disk, and how each is read.

Region features come in two layouts. "scan" is one array for each split, as SCAN, VSE-infinity and USER use it.
"bottom-up" is two files for each image, as TERAN and TGDT use it. "pictures" has annotations and pictures only; the
features are computed from the pictures later (see `extract.py`).
"""
import math
import posixpath
import re
import sys
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sources import annotations, photos
from sources.annotations import KARPATHY, Entry
from sources.features import TERAN, ManyFiles, OneArray
from sources.files import BadInput, explained

SCAN = "linked from github.com/kuanghuei/SCAN"
PRECOMP = {"flickr8k": "f8k_precomp", "flickr30k": "f30k_precomp", "coco": "coco_precomp"}


class Listing(NamedTuple):
    """A split as the files of a dataset describe it: M captions of N images."""

    captions: list[str]  # M, as written
    image_of: np.ndarray  # [M] int64, caption -> row of its image
    features: OneArray | ManyFiles | None  # None: to be computed from the pictures
    image_names: list[str]  # N: a file name or a row number
    pictures: list[Path | None]  # N: None if there is no file


def read(dataset: str, root: Path | str | None, splits: Sequence[str] = ("train", "val", "test"), regions: str = "auto",
         split_seed: int = 0) -> dict[str, Listing]:
    """Read the splits of "flickr8k", "flickr30k", "coco", or "folder" (your own pictures and captions).

    root: the folder with the files. A "test" split is left out if the dataset has none. regions: "files" asks for files
    of features; "auto" takes them if they are there; with any other word the splits come without features. split_seed
    draws the splits of a table that names none. Raises BadInput if a file is missing or wrong.
    """
    if not root or not Path(root).is_dir():
        raise BadInput(f"{root}: no such folder, expected the one with the files of {dataset}" if root else
                       f"--dataset {dataset}: name the folder with its files by --data-root")
    root = Path(root)
    json_file = f"dataset_{dataset}.json"
    layout, folder = find_layout(dataset, root, regions)
    if layout == "scan":
        path = annotations.find(root, json_file) or annotations.find(folder, json_file)
        entries = annotations.read_karpathy(path) if path else []
        found = read_scan(dataset, root, folder, entries, splits)
    elif dataset == "folder":
        found = read_pictures(root, annotations.read_own(root, split_seed), splits)
    elif dataset == "coco" and layout == "bottom-up":
        found = read_pictures(root, annotations.read_coco(root, splits), splits, folder)
    else:
        entries = annotations.read_karpathy(annotations.need(root, json_file, KARPATHY), layout == "bottom-up")
        found = read_pictures(root, entries, splits, folder if layout == "bottom-up" else None)
    widths = {listing.features.dim: f"{listing.features.dim} in {listing.features.path} ({name})"
              for name, listing in found.items() if listing.features is not None}
    if len(widths) > 1:
        raise BadInput(f"the splits differ in features per region: {', '.join(widths.values())}")
    return found


def find_layout(dataset: str, root: Path, regions: str) -> tuple[str, Path]:
    """Which layout the data has, and the folder of its features: ("scan", folder), ("bottom-up", folder) or
    ("pictures", root). Raises BadInput if features are asked for and there are none."""
    if dataset == "folder" and regions == "files":
        raise BadInput("--regions files: --dataset folder has pictures, no files of features")
    if dataset == "folder" or regions not in ("auto", "files"):
        return "pictures", root
    others = [folder for folder in sorted(root.glob("*_precomp")) if folder.name not in PRECOMP.values()]
    for folder in (root, root / PRECOMP[dataset], *others):
        if any(folder.glob("*_ims.npy")) or any(folder.glob("*_caps.txt")):
            return "scan", folder
    if (root / "features_36").is_dir():
        return "bottom-up", root / "features_36"
    if regions == "auto" and annotations.find(root, f"dataset_{dataset}.json"):
        return "pictures", root
    raise BadInput(
        f"{root}: no region features. Expected train_ims.npy and train_caps.txt, here or in {PRECOMP[dataset]} "
        f"({SCAN}), or features_36/bu_att and features_36/bu_box ({TERAN}). To compute them from the pictures, put "
        f"dataset_{dataset}.json and the pictures here ({KARPATHY})")


def has_features(dataset: str, root: Path) -> bool:
    """Whether a folder has files of features, in either layout."""
    try:
        return find_layout(dataset, root, "files")[0] != "pictures"
    except BadInput:
        return False


def read_scan(dataset: str, root: Path, folder: Path, entries: list[Entry],
              splits: Sequence[str]) -> dict[str, Listing]:
    """SCAN's layout. The pictures, if any, are found by the captions' text. COCO's test split is "testall" (5K images),
    if it is there."""
    file_of_text: dict[str, tuple | None] = {}  # None: the text belongs to several images
    for entry in entries:
        for text in map(plain, entry.captions):
            file_of_text[text] = entry.file if file_of_text.get(text, entry.file) == entry.file else None
    found = {}
    for name in splits:
        stem = {"val": "dev"}.get(name, name)
        if dataset == "coco" and name == "test" and (folder / "testall_ims.npy").exists():
            stem = "testall"
        array_file, captions_file = folder / f"{stem}_ims.npy", folder / f"{stem}_caps.txt"
        missing = [path for path in (array_file, captions_file) if not path.is_file()]
        if name == "test" and len(missing) == 2:
            continue
        if missing:
            raise BadInput(f"{missing[0]}: missing, expected for split {name} ({SCAN})")
        captions, features = read_captions(captions_file), OneArray(array_file)
        rows = features.shape[0]
        if len(captions) % rows:
            raise BadInput(f"{captions_file}: {len(captions)} captions, expected a multiple of the {rows} rows of "
                           f"{array_file}")
        features.repeat = rows_an_image(features) if len(captions) == rows else 1
        images, each = len(features), len(captions) // len(features)
        files = []  # of each image the file that its captions name, None if they name none or several
        for image in range(images):
            named = {file_of_text.get(plain(text)) for text in captions[image * each : (image + 1) * each]} - {None}
            files.append(named.pop() if len(named) == 1 else None)
        names = [file[1] if file else f"row {row}" for row, file in enumerate(files)]
        found[name] = Listing(captions, np.arange(len(captions)) // each, features, names, photos.find(root, files))
    return found


def read_captions(path: Path) -> list[str]:
    """One caption a line; the last line may lack its newline. The path - is standard input.

    Raises BadInput for an empty line or broken UTF-8.
    """
    if str(path) == "-":
        if sys.stdin is None:
            raise BadInput("standard input: closed, expected captions")
        content, path = sys.stdin.buffer.read(), "standard input"
    else:
        content = photos.read_file(path, "a file of captions")
    with explained(path, "a readable file"):  # splitlines() would also split at other characters than newlines
        captions = [line.strip() for line in content.decode("utf-8-sig").removesuffix("\n").split("\n")]
    if "" in captions:
        raise BadInput(f"{path}, line {captions.index('') + 1}: empty, expected a caption")
    return captions


def rows_an_image(features: OneArray) -> int:
    """How often each image's row is repeated in a file with one row for each caption; 1 if rows do not repeat.

    The file may be large, so only its start, its end and six places between are compared. Two images that are equal
    are one run of rows, so the size is the greatest common divisor of the first two runs.
    """
    total, row = features.shape[0], cache(lambda index: features.read([index])[0].tobytes())

    def run(start: int) -> int:
        end = min(total, start + 65)
        return next((at for at in range(start, end) if row(at) != row(start)), end) - start

    first = run(0)
    size = math.gcd(first, run(first))
    starts = (np.linspace(0, total // size - 1, 8).astype(int) * size).tolist()
    irregular = any(row(start) != row(start + i) for start in starts for i in range(size))
    if first == 65 or size == 1 < first or total % size or irregular:
        raise BadInput(f"{features.path}: rows repeat, expected equally often for every image, and at most 64 times")
    return size


def plain(text: str) -> str:
    """Letters and digits in lower case, so that a caption and its tokenised form become equal."""
    return re.sub(r"[\W_]+", "", text.lower())


def read_pictures(root: Path, entries: list[Entry], splits: Sequence[str],
                  features: Path | None = None) -> dict[str, Listing]:
    """The splits as annotations describe them. features: the folder of bottom-up files, or None if there is none.

    Raises BadInput if a picture is in two of the splits, since a model would be tested on what it has learnt.
    """
    found: dict[str, Listing] = {}
    entry_of: dict[Path, Entry] = {}  # a picture -> the first entry that has it
    for name in splits:
        own = [entry for entry in entries if entry.split == name]
        if not own and name == "test":
            continue
        if not own:
            raise BadInput(f"{root}: the annotations have no image of split {name}")
        bad = [entry for entry in own if not entry.captions or "" in entry.captions]
        if bad:
            raise BadInput(f"{bad[0].where}, {bad[0].file[1]}: an empty caption or none at all")
        captions = [caption for entry in own for caption in entry.captions]
        image_of = np.repeat(np.arange(len(own)), [len(entry.captions) for entry in own])
        pictures = photos.find(root, [entry.file for entry in own])
        for entry, picture in zip(own, pictures, strict=True):
            first = entry_of.setdefault(picture or root.joinpath(*entry.file), entry)
            if first.split != name:
                raise BadInput(f"{entry.where}: {entry.file[1]} has split {name} here, but split {first.split} in "
                               f"{first.where}")
            if first is not entry:
                raise BadInput(f"{entry.where}: {entry.file[1]} is in {first.where} already, expected one entry with "
                               "all captions of a picture")
        files = ManyFiles(features, [e.id for e in own], [e.size for e in own], pictures) if features else None
        often = Counter(entry.file[1] for entry in own)  # a name that occurs twice gets its folder in front
        names = [entry.file[1] if often[entry.file[1]] == 1 else posixpath.join(*entry.file) for entry in own]
        found[name] = Listing(captions, image_of, files, names, pictures)
    return found
