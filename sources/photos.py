"""Pictures in files: found by name, and read upright and in RGB whatever kind of file they are."""
import io
import os
import re
import stat
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from sources.files import BadInput, explained

FOLDERS = ("", "images", "flickr30k-images", "flickr30k_images", "Images", "Flicker8k_Dataset", "train2014", "val2014")
ENOUGH = 1600  # pixels of a side: the most that --picture-side may be, and twice the detector's default
MOST_PIXELS, MOST_BYTES = 100_000_000, 1_000_000_000  # of one picture
NO_PICTURES = {".eps", ".h5", ".hdf", ".mpeg", ".mpg", ".palm", ".pdf", ".ps"}  # Pillow lists them too
TURN = Image.Transpose
ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE, 6: TURN.ROTATE_270,
           7: TURN.TRANSVERSE, 8: TURN.ROTATE_90}  # by EXIF's orientation
UNUSABLE = re.compile(r"^[/\\]|^[A-Za-z]:|(^|[/\\])\.\.([/\\]|$)|[\x00-\x1f\x7f\ud800-\udfff]")


def usable(name: str) -> bool:
    """Whether a file's name stays in the folder that it belongs to, and is text without control characters."""
    return not UNUSABLE.search(name)


def read_file(path: Path, expected: str = "a picture", most: int = MOST_BYTES) -> bytes:
    """The bytes of a file. Raises BadInput if it is a pipe or a device, which may never end, or is too large."""
    with explained(path, expected):
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is a folder, a pipe or a device")
        if found.st_size > most:
            raise ValueError(f"it has {found.st_size:,} bytes, the limit is {most:,}")
        return path.read_bytes()


def read(source: Path | np.ndarray, content: bytes | None = None) -> Image.Image:
    """A picture, upright and in RGB, from a file or from pixels [H, W, 3] uint8.

    The picture is turned as its EXIF data say. Transparency becomes white, 16 bits become 8, CMYK and grey become RGB.
    A JPEG whose sides are at least 2, 4 or 8 times `ENOUGH` is shrunk by that factor while it is decoded, which saves
    most of the time.
    content: the bytes of the file, if they have been read already. Raises BadInput, naming the file, if it is not a
    picture, is cut short, or has more than `MOST_PIXELS` after that.
    """
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    content = read_file(source) if content is None else content
    with explained(source, "a picture"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata and of large pictures
        try:
            jpeg = content.startswith(b"\xff\xd8\xff")  # Image.open would refuse a large one before it is halved
            image = JpegImageFile(io.BytesIO(content)) if jpeg else Image.open(io.BytesIO(content))
        except UnidentifiedImageError:  # Pillow's message would name a buffer, not the file
            raise ValueError("Pillow does not know this kind of file") from None
        if image.format == "EPS":
            raise ValueError("PostScript is a program, it is not run")
        pixels = image.width * image.height
        image.draft(None, (ENOUGH, ENOUGH))
        if "progressive" not in image.info:  # a progressive JPEG takes the memory of all its pixels even so
            pixels = image.width * image.height
        if pixels > MOST_PIXELS:
            raise ValueError(f"it has {pixels:,} pixels, the limit is {MOST_PIXELS:,}")
        return in_rgb(upright(image))


def upright(image: Image.Image) -> Image.Image:
    """A picture turned as its EXIF data say. Malformed EXIF data do no harm, because only this tag is looked at."""
    image.load()  # turns a TIFF
    turn = UPRIGHT.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def orientation(image: Image.Image) -> int | None:
    """The EXIF tag that says how to turn a picture; None if there is none that can be read."""
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # Pillow raises many kinds for malformed EXIF data
        return None


def in_rgb(image: Image.Image) -> Image.Image:
    """Convert any of Pillow's modes to RGB. Raises ValueError for floating-point pixels: their range is unknown."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode.startswith("I"):  # 16 bits, which Pillow itself would cut off at 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        above = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", above.size, "white"), above).convert("RGB")
    return image.convert("RGB")


def listed(folder: Path) -> list[Path]:
    """All pictures in a folder and its subfolders, sorted, found by the endings of their names.

    Raises BadInput if there are none, if a folder cannot be read, and for a name that is not text.
    """
    def stop(error: OSError) -> None:
        raise BadInput(f"{error.filename}: {error.strerror}, expected a folder that can be read")

    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder, expected one with pictures")
    endings = Image.registered_extensions().keys() - NO_PICTURES
    found, seen = [], set()
    for at, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]  # thumbnails, the trash
        if (real := os.path.realpath(at)) in seen:  # two links to one folder, or a link that leads round in a circle
            folders.clear()
            continue
        seen.add(real)
        found += [Path(at, name) for name in names if Path(name).suffix.lower() in endings and not name.startswith(".")]
    found.sort()
    if not found:
        raise BadInput(f"{folder}: no pictures in it or in its subfolders")
    for name in (str(path.relative_to(folder)) for path in found):
        if not usable(name):
            raise BadInput(f"{folder}: the file name {name!r} has a drive's letter, a control character or text that "
                           "is not UTF-8: rename this file")
    return found


def find(root: Path, names: Sequence[tuple[str, str] | None]) -> list[Path | None]:
    """Find pictures, given as (folder, file name), below `root` or in one of its usual subfolders. None: not found.

    An accented letter may be one character or two, because file systems differ in that. Names that lead out of `root`
    are not looked for.
    """
    usual = [root / folder for folder in FOLDERS if (root / folder).is_dir()]

    def place(folder: str, name: str) -> Path | None:
        for form in ("", "NFC", "NFD"):
            file = unicodedata.normalize(form, name) if form else name
            for path in (root / folder / file, *(at / folder / file for at in usual), *(at / file for at in usual)):
                if os.path.isfile(path):  # unlike Path.is_file it says no to a name that is too long
                    return path
        return None

    return [place(*name) if name and all(map(usable, name)) else None for name in names]
