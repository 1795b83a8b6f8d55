"""An index on disk: a corpus encoded once, searched by memory mapping (TGDT, two-stage inference).

Stage 1 needs the vectors, stage 2 the tokens, for which a large corpus has no room in memory. The folder holds, for
images and for captions, raw arrays in the order of the items:

    image.globals  float32 [N, D]     image.tokens  --dtype [total, D], packed     image.offsets  int64 [N + 1]
    text.globals, text.tokens, text.offsets likewise; names.json; manifest.json, which names the model's checkpoint

An index grows in a hidden folder beside it, which is renamed when it is whole. A kill at any moment leaves the old
index or none, and the next attempt goes on where the last one stopped.
"""
import hashlib
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from harness.folder import best_checkpoint
from retrieve import Embeddings
from sources import files
from sources.files import BadInput, append, check_folder, explained, locked, made, read_json, write_json

BLOCK = 1024  # items encoded and written together
CHECKED = 2**28  # bytes of an array whose checksum is compared whenever the index is opened
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
KINDS = ("image", "text")
PARTS = ("globals", "tokens", "offsets")
ARRAYS = [f"{kind}.{part}" for kind in KINDS for part in PARTS]
Encode = Callable[[str, np.ndarray], Embeddings]


@dataclass
class Index:
    """An index opened for searching."""

    manifest: dict
    images: Embeddings
    texts: Embeddings
    names: dict   # images [N], captions [M]
    folder: Path  # of its run


def checksum(path: Path) -> str:
    """What tells one file from another: a digest of its bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoint_of(run: Path) -> str | None:
    """The checksum of the weights in a run folder; None if there are none."""
    weights = best_checkpoint(run)
    return checksum(weights) if weights.is_file() else None


def files_of(manifest: dict) -> list[str]:
    """The files whose checksums an index keeps."""
    parts = PARTS if manifest["tokens"] else ("globals",)
    return ["names.json", *(f"{kind}.{part}" for kind in KINDS for part in parts)]


# ------------------------------------------------------------------------------------------------------- writing


def build(out: Path, identity: dict, counts: dict[str, int], encode: Encode, names: dict) -> None:
    """Write the index `out`, block by block, or go on with one that was interrupted.

    identity: what the index is made of (checkpoint, split, dtype, ...); all of it must agree to go on. counts: the
    number of items of each kind. encode(kind, items [n]) -> their embeddings. Raises BadInput if `out` is there and is
    no index, or if another program is writing it.
    """
    out = place_of(out)
    growing = out.with_name(f".{out.name}.index-in-progress")
    with locked(out.with_name(f".{out.name}.index-lock")), made(growing):  # not in `growing`, which will be renamed
        progress = read_progress(growing, identity)
        for kind in KINDS:
            write_side(growing, kind, counts[kind], progress, encode)
        write_json(growing / "names.json", names)
        checksums = {name: checksum(growing / name) for name in files_of(identity)}
        write_json(growing / "manifest.json", identity | {"counts": counts, "checksums": checksums})
        replace(growing, out)


def place_of(out: Path) -> Path:
    """Where `out` leads to. Raises BadInput if something else is there, or the folder around it cannot be written."""
    place = Path(os.path.realpath(out))
    missing = [name for name in ("manifest.json", "names.json", "image.globals") if not (place / name).is_file()]
    if os.path.lexists(place) and missing:  # an index that is replaced is deleted, and nothing else may be
        raise BadInput(f"{out}: is there already, and is not an index (it has no {missing[0]}): give another --out")
    own = {"manifest.json", "names.json", "progress.json", *ARRAYS}
    if others := sorted({path.name for path in place.glob("*")} - own):
        raise BadInput(f"{out}: the index there would be replaced, but its folder also holds {others[0]}: move "
                       "that away, or give another --out")
    check_folder(place.parent)
    return place


def replace(growing: Path, out: Path) -> None:
    """Put the new index in the place of the old one. After a kill between the steps, nothing is encoded again."""
    old = out.with_name(f".{out.name}.index-replaced")
    shutil.rmtree(old, ignore_errors=True)  # the rest of an earlier call that was killed while it cleaned up
    if out.exists():
        files.replace(out, old)
    files.replace(growing, out)
    (out / "progress.json").unlink(missing_ok=True)
    shutil.rmtree(old, ignore_errors=True)


def read_progress(growing: Path, identity: dict) -> dict:
    """How far the last attempt came. If it was for another index or is damaged, delete its files and start again."""
    try:
        progress = read_json(growing / "progress.json")
        if progress["identity"] == identity and all(set(progress[kind]) >= {"items", "tokens"} for kind in KINDS):
            return progress
    except (BadInput, KeyError, TypeError):
        pass
    for name in (*ARRAYS, "progress.json"):
        (growing / name).unlink(missing_ok=True)
    return {"identity": identity, **{kind: {"items": 0, "tokens": 0} for kind in KINDS}}


def write_side(folder: Path, kind: str, count: int, progress: dict, encode: Encode) -> None:
    """Write what is missing of one kind. After each block `progress` says what is safe on the disk."""
    done, identity = progress[kind], progress["identity"]
    dim, dtype = identity["dim"], DTYPES[identity["dtype"]]

    def write(part: str, content: bytes) -> None:  # after what is safe; what an interrupted block left is cut off
        safe = {"globals": 4 * dim * done["items"], "tokens": dtype.itemsize * dim * done["tokens"],
                "offsets": 8 * (done["items"] + 1)}
        append(folder / f"{kind}.{part}", safe[part], content)

    write("globals", b"")
    if identity["tokens"]:
        write("tokens", b"")
        if done["items"] == 0:
            append(folder / f"{kind}.offsets", 0, np.zeros(1, np.int64).tobytes())
    with tqdm(total=count, initial=done["items"], desc=f"index {kind}s", unit=kind, disable=not count) as bar:
        for start in range(done["items"], count, BLOCK):
            items = np.arange(start, min(start + BLOCK, count))
            block = encode(kind, items)
            write("globals", raw(block.globals))
            if identity["tokens"]:
                write("tokens", raw(block.tokens.to(dtype)))
                write("offsets", raw(done["tokens"] + block.offsets[1:]))
                done["tokens"] += len(block.tokens)
            done["items"] += len(items)
            write_json(folder / "progress.json", progress)
            bar.update(len(items))


def raw(values: torch.Tensor) -> bytes:
    return values.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


# ------------------------------------------------------------------------------------------------------- opening


def is_index(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()


def load(folder: Path) -> Index:
    """Open an index; its arrays are mapped, not read.

    Raises BadInput if a part is missing or damaged. Arrays up to CHECKED bytes are compared with their checksums. Of
    larger ones only the size is checked, since reading them would take longer than the search.
    """
    manifest = read_manifest(folder / "manifest.json")
    images, texts = (open_side(folder, kind, manifest) for kind in KINDS)
    for name in files_of(manifest):
        path = folder / name
        if not path.is_file() or path.stat().st_size <= CHECKED and checksum(path) != manifest["checksums"][name]:
            raise BadInput(f"{path}: missing, or changed since the index was made: make the index again")
    return Index(manifest, images, texts, read_json(folder / "names.json"), Path(manifest["run"]))


def read_manifest(path: Path) -> dict:
    """The manifest of an index. Raises BadInput if it is another file, or is damaged."""
    manifest = read_json(path)
    with explained(path, "the manifest of an index: make the index again"):
        check_values(manifest)
        if manifest["checksums"].keys() != set(files_of(manifest)):
            raise ValueError("other files are listed")
    return manifest


def check_values(manifest: dict) -> None:
    """Raises KeyError if a manifest lacks a value, and ValueError if one is of the wrong kind."""
    shape = {"checkpoint": str, "run": str, "split": str, "dtype": str, "dim": int, "tokens": bool}
    right = all(type(manifest[name]) is kind for name, kind in shape.items()) and manifest["dtype"] in DTYPES
    if not right or not all(type(count := manifest["counts"][kind]) is int and count >= 0 for kind in KINDS):
        raise ValueError("a value of the wrong kind")


def open_side(folder: Path, kind: str, manifest: dict) -> Embeddings:
    """The embeddings of one kind, mapped."""
    count, dim = manifest["counts"][kind], manifest["dim"]
    globals_ = mapped(folder / f"{kind}.globals", torch.float32, count * dim).view(count, dim)
    if not manifest["tokens"]:
        return Embeddings(kind, globals_)
    offsets = mapped(folder / f"{kind}.offsets", torch.int64, count + 1)
    if count and (int(offsets[0]) != 0 or int(offsets.diff().min()) < 0):
        raise BadInput(f"{folder / f'{kind}.offsets'}: not rising from 0: make the index again")
    tokens = mapped(folder / f"{kind}.tokens", DTYPES[manifest["dtype"]], int(offsets[-1]) * dim).view(-1, dim)
    return Embeddings(kind, globals_, tokens, None, offsets)


def mapped(path: Path, dtype: torch.dtype, size: int) -> torch.Tensor:
    """A raw file as a tensor whose pages come from the disk when they are used."""
    have, need = path.stat().st_size if path.is_file() else 0, size * dtype.itemsize
    if have != need:
        raise BadInput(f"{path}: found {have} bytes, expected {need}: make the index again")
    if size == 0:
        return torch.zeros(0, dtype=dtype)
    with warnings.catch_warnings():  # PyTorch has no read-only tensors, and warns
        warnings.simplefilter("ignore", UserWarning)
        # (torch.from_file maps it for writing, and fails for a file that is larger than the memory.)
        return torch.from_numpy(np.memmap(path, np.uint8, "r")).view(dtype)
