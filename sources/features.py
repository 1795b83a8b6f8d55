"""Region features, wherever they lie: in memory, in one array, in two files for each image, or in a store.

All four classes are used alike. len() is the number of images N, `dim` the width F of a feature, `path` a name for
messages, and

    read(rows) -> regions [n, R, F] float32, boxes [n, R, 4] float32 in 0..1, mask [n, R] bool, True for real regions

Rows are read from the disk when they are asked for, with plain reads: the pages of a memory map would count as memory
of this program.
"""
import io
import math
import os
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from sources import photos
from sources.files import BadInput, explained
from sources.store import LARGEST, Store

TERAN = "linked from github.com/mesnico/TERAN"
MOST = 64 * 2**20  # bytes of one image's features, or of one file that lists ids
told: set[str] = set()  # the sources that were warned about, whose features are all zero


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
    """SCAN's {split}_ims.npy, [rows, R, F] in float32 or float16. It has no boxes, so they are zeros.

    repeat: how many equal rows each image has. Raises BadInput when it is opened if the file is another array or is
    cut short, and when it is read if a row holds numbers that no feature has.
    """

    def __init__(self, path: Path):
        self.path, self.repeat = path, 1
        with explained(path, "a .npy file"), open(path, "rb") as file:
            self.shape, fortran, self.dtype = read_header(file)
            self.start = file.tell()
        if len(self.shape) != 3 or 0 in self.shape or self.dtype not in (np.float32, np.float16) or fortran:
            found = f"{self.dtype} {list(self.shape)} in {'Fortran' if fortran else 'C'} order"
            raise BadInput(f"{path}: found {found}, expected float32 or float16 [images, regions, features] in C order")
        self.dim, self.row_bytes = self.shape[2], self.shape[1] * self.shape[2] * self.dtype.itemsize
        if self.row_bytes > MOST:
            raise BadInput(f"{path}: a row has {self.row_bytes:,} bytes, the limit is {MOST:,}")
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
            check(regions[place], self.path, f"in row {row} (image {image})", self.path)
        return regions, np.zeros((*regions.shape[:2], 4), np.float32), np.ones(regions.shape[:2], bool)


class ManyFiles:
    """Bottom-up files: bu_att/{id}.npz with key "feat" [R, F], and bu_box/{id}.npy [R, 4] in pixels, for each image.

    Boxes are divided by the size of the picture. The size comes from the annotations, else from the picture itself,
    else it is the largest x2 and y2 of the image's boxes, because a detector's boxes nearly always reach the border.
    Images with fewer regions than others in the batch are padded. Raises BadInput when it is opened if files are
    missing, and when it is read if a file is damaged or does not fit.
    """

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
        """The features [R, F] of one image and its boxes [R, 4] in 0..1."""
        feat_file = self.path / "bu_att" / f"{self.ids[row]}.npz"
        box_file = self.path / "bu_box" / f"{self.ids[row]}.npy"
        feat, box = read_array(feat_file, "feat"), read_array(box_file)
        wanted = [max(1, len(feat)), max(1, self.dim)]
        for file, array, shape in ((feat_file, feat, wanted), (box_file, box, [len(feat), 4])):
            if list(array.shape) != shape:
                raise BadInput(f"{file}: found shape {list(array.shape)}, expected {shape} (regions first)")
            check(array, file, f"(image {row})", self.path if file == feat_file else None)
        if self.sizes[row] is None:
            picture = self.pictures[row]
            with explained(picture, "a picture"):
                self.sizes[row] = upright_size(picture) if picture else tuple(box[:, 2:].max(0).tolist())
        width, height = self.sizes[row]
        outside = max(-box.min(), (box - (width, height, width, height)).max())
        if not (outside <= 1 and 0 < min(width, height) and max(width, height) <= LARGEST):  # one pixel is rounding
            raise BadInput(f"{box_file}: a box lies {outside:g} pixels outside its {width:g} x {height:g} picture")
        return feat, (box / (width, height, width, height)).clip(0, 1)


class Stored:
    """Features that were computed from pictures: image i has row rows[i] of a store."""

    def __init__(self, store: Store, rows: np.ndarray):
        self.store, self.rows, self.path = store, rows, str(store.folder)
        self.dim = store.arrays["regions"][0][1]

    def __len__(self) -> int:
        return len(self.rows)

    def digests(self) -> list[str]:
        """The digest of each image's picture."""
        digest_of = {row: digest for digest, row in self.store.row_of.items()}
        return [digest_of[row] for row in self.rows]

    def read(self, rows: Sequence[int]) -> tuple:
        of_store = self.rows[rows]
        count = self.store.read("count", of_store)  # [n] real regions
        most = count.max()
        with self.store.told():
            if not 0 < count.min() <= most <= self.store.arrays["regions"][0][0]:
                raise BadInput(f"{self.store.folder / 'count'}: found counts from {count.min()} to {most}")
        regions, boxes = (self.store.read(name, of_store)[:, :most] for name in ("regions", "boxes"))
        return regions, boxes, np.arange(most) < count[:, None]


def upright_size(picture: Path) -> tuple[int, int]:
    """Width and height of a picture, turned as its EXIF data say. Pixels are decoded only if it has to be turned."""
    image = Image.open(picture)
    turned = photos.orientation(image) in (5, 6, 7, 8)
    return photos.upright(image).size if turned else image.size


def check(values: np.ndarray, path: Path | str, where: str, source: Path | str | None = None) -> None:
    """Raises BadInput for NaN, infinity and numbers beyond LARGEST. path, where: for the message.

    Warns once for each `source` if all values are zero.
    """
    largest = np.abs(values).max()
    if not largest <= LARGEST:
        found = f"the number {largest:g}" if largest < np.inf else "NaN or infinity"
        raise BadInput(f"{path}: {found} {where}, expected numbers up to {LARGEST:,.0f}")
    if source and not largest and str(source) not in told:
        told.add(str(source))
        print(f"warning: {path}: all features are zero {where}, maybe also elsewhere", file=sys.stderr)


def read_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """The shape, the order and the type that a .npy file declares. What follows in the file are the numbers."""
    start = io.BytesIO(file.read(2**14))
    version = np.lib.format.read_magic(start)[0]
    if version not in (1, 2):
        raise ValueError(f"found version {version} of the format, expected 1 or 2")
    read = np.lib.format.read_array_header_1_0 if version == 1 else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(start)
    if min(shape, default=0) < 0:
        raise ValueError(f"found shape {list(shape)}")
    file.seek(start.tell())
    return shape, fortran, dtype


def read_array(path: Path, key: str | None = None, dtype: type = np.float32) -> np.ndarray:
    """The array of a .npy file, or the one called `key` of a .npz archive. Pickled objects are refused."""
    with explained(path, f"an .npz archive with key '{key}'" if key else "a .npy array"):
        file = io.BytesIO(photos.read_file(path, "a file of features", MOST))
        with zipfile.ZipFile(file).open(f"{key}.npy") if key else file as array:
            shape, fortran, kind = read_header(array)
            size = math.prod(shape) * kind.itemsize
            if size > MOST:
                raise ValueError(f"it declares {size:,} bytes, the limit is {MOST:,}")
            values = np.frombuffer(array.read(size), kind, math.prod(shape))
        return np.atleast_1d(values.reshape(shape, order="F" if fortran else "C").astype(dtype, casting="same_kind"))
