"""What is inside the files that `fetch.py` brings: pictures in zip archives, and captions in three forms."""
import csv
import json
import os
import shutil
import stat
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from sources import photos
from sources.files import BadInput, explained, replace

MOST_TEXT = 500_000_000  # bytes of a file of captions inside of an archive
FLICKR8K_LISTS = {"train": "Flickr_8k.trainImages.txt", "val": "Flickr_8k.devImages.txt",
                  "test": "Flickr_8k.testImages.txt"}


@contextmanager
def opened(path: Path) -> Iterator[tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]]:
    """Open a zip archive. Gives it, and its files by their base names, without those that macOS adds.

    Raises BadInput if the archive is damaged (also for an error inside the block), and if it has a link in it or a
    name that leads out of a folder. OSError passes: it is about the disk.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {}
            for info in archive.infolist():
                if not photos.usable(info.filename) or stat.S_ISLNK(info.external_attr >> 16):
                    raise BadInput(f"the archive has {info.filename!r} in it, a link or a name that leads out of the "
                                   "folder")
                if not info.is_dir() and "__MACOSX" not in info.filename:
                    members.setdefault(PurePosixPath(info.filename).name, info)
            yield archive, members
    except (OSError, BadInput):
        raise
    except Exception as error:  # zipfile raises many kinds
        raise BadInput(f"the archive is damaged ({type(error).__name__}: {error})") from error


def unpack(path: Path, wanted: dict[str, Path], quiet: bool = False) -> None:
    """Unpack the pictures `wanted` (the name of a file -> where it belongs) from a zip archive, in any folder of it.

    Each picture gets its name when it is complete. Raises BadInput if the archive is damaged or lacks a picture, and if
    it would unpack to more than twice its size, which photographs never do. Raises OSError if the disk is full.
    """
    most = 2 * path.stat().st_size
    with opened(path) as (archive, members):
        lost = sorted(wanted.keys() - members.keys())
        if lost:
            raise BadInput(f"the archive lacks {len(lost)} of {len(wanted)} pictures, the first is {lost[0]}")
        size = sum(members[name].file_size for name in wanted)
        if size > most:
            raise BadInput(f"the archive would unpack to {size:,} bytes, the limit is {most:,}")
        for folder in {target.parent for target in wanted.values()}:
            folder.mkdir(parents=True, exist_ok=True)
        for name, target in tqdm(wanted.items(), f"unpacking {path.name}", unit=" pictures", disable=quiet):
            partial = target.with_name(f"{name}.partial")
            with archive.open(members[name]) as inside, open(partial, "wb") as file:
                shutil.copyfileobj(inside, file)
            replace(partial, target)
    if hasattr(os, "sync"):  # not on Windows
        os.sync()  # the archive will be deleted next


def karpathy_json(path: Path, name: str) -> bytes:
    """Karpathy's dataset_*.json out of a file that was fetched.

    path: such a JSON itself, a zip with a JSON of this name, Flickr30K's table (.csv), or the zip of Flickr8K's texts.
    Raises BadInput if it is none of these.
    """
    if path.suffix == ".json":
        return path.read_bytes()
    if path.suffix == ".csv":
        return as_json(flickr30k_table(path))
    with opened(path) as (archive, members):
        def text(member: str) -> bytes:
            if member not in members:
                raise BadInput(f"the archive lacks {member}")
            if members[member].file_size > MOST_TEXT:
                raise BadInput(f"{member} would unpack to {members[member].file_size:,} bytes, the limit is "
                               f"{MOST_TEXT:,}")
            return archive.read(members[member])

        if name in members:
            return text(name)
        lists = {split: text(file).decode().split() for split, file in FLICKR8K_LISTS.items()}
        return as_json(flickr8k_texts(text("Flickr8k.token.txt").decode(), lists))


def as_json(images: list[dict]) -> bytes:
    return json.dumps({"images": images}).encode()


def flickr30k_table(path: Path) -> list[dict]:
    """Flickr30K's table with the columns img_id, filename, split, and raw and sentids, which are JSON lists."""
    images = []
    with explained(path, "a table in UTF-8"), open(path, encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file, strict=True):
            with explained(f"image {len(images)}", "img_id, filename, split, and JSON lists raw and sentids"):
                sentences = [{"raw": raw, "sentid": sentid}
                             for raw, sentid in zip(json.loads(row["raw"]), json.loads(row["sentids"]), strict=True)]
                images.append({"imgid": int(row["img_id"]), "filename": row["filename"], "split": row["split"],
                               "sentences": sentences})
    return sorted(images, key=lambda image: image["imgid"])


def flickr8k_texts(tokens: str, lists: dict[str, list[str]]) -> list[dict]:
    """Flickr8K's captions, lines of "name.jpg#0<TAB>caption", for the pictures that the lists of the splits name."""
    captions = defaultdict(list)
    for line in tokens.split("\n"):
        name, _, caption = line.partition("\t")
        captions[name.rpartition("#")[0]].append({"raw": caption.strip()})
    return [{"filename": name, "split": split, "sentences": captions[name]}
            for split, files in lists.items() for name in files]
