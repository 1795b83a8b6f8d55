"""An index on disk: a corpus encoded once, searched by memory mapping.

Read beside TGDT, the part on two-stage inference, whose first stage needs vectors and whose second needs tokens that a
large corpus has no memory for. A folder holds, for pictures and for captions, raw arrays in the order of the items:

    image.globals  float32 [N, D]     image.tokens  half precision [total, D], packed     image.offsets  int64 [N + 1]
    text.globals, text.tokens, text.offsets, likewise; names.json; manifest.json, which names the model's checkpoint

It grows in INDEX.partial, which is renamed when it is whole: a kill at any moment leaves the old index or none, and the
next attempt goes on where the last one stopped.
"""
from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from retrieve import Embeddings, nearest
from sources import files
from sources.files import BadInput

BLOCK = 1024  # items encoded and written together
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
KINDS = ("image", "text")
LARGE = 1_000_000  # vectors beyond which an approximate index takes over stage 1


@dataclass
class Index:
    """An index opened for searching: its manifest, both sides, what their items are called, and its run's folder."""

    manifest: dict
    images: Embeddings
    texts: Embeddings
    names: dict  # images [N], captions [M], image_of [M]
    folder: Path


def checkpoint_hash(path: Path) -> str:
    """What tells one checkpoint from another: a digest of its bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------------- writing


def build(out: Path, identity: dict, counts: dict[str, int], encode: Callable[[str, np.ndarray], Embeddings],
          names: dict, faiss: str = "auto") -> dict:
    """Write the index `out`, block by block, or go on with one that was interrupted.

    identity: what the index is of (checkpoint, split, dtype, ...), all of which must agree to go on. counts: items a
    kind. encode(kind, items [n]) -> their Embeddings, padded. faiss: "always" or "never" build an approximate index
    beside the exact vectors, "auto" beyond a million of them where FAISS is installed. Returns the manifest. Raises
    BadInput when `out` is there and is no index, or when FAISS is wanted and missing.
    """
    if faiss == "always":
        import_faiss()  # before hours of work, not after
    elif faiss == "auto" and max(counts.values()) > LARGE and not importlib.util.find_spec("faiss"):
        print("stage 1 will be exact, and slow for so many vectors: FAISS is not installed (pip install faiss-cpu)")
        faiss = "never"
    if out.exists() and not (out / "manifest.json").is_file():
        raise BadInput(f"{out}: there already, and no index (it has no manifest.json): give another --out")
    partial = out.with_name(out.name + ".partial")
    progress = files.read_json(partial / "progress.json") if (partial / "progress.json").is_file() else {}
    if progress.get("identity") != identity:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        progress = {"identity": identity, **{kind: {"items": 0, "bytes": {}} for kind in KINDS}}
    for kind in KINDS:
        write_side(partial, kind, counts[kind], progress, encode)
    manifest = identity | {"counts": counts, "faiss": {}}
    sides = {kind: open_side(partial, kind, manifest) for kind in KINDS}
    for kind, other in (KINDS, KINDS[::-1]):
        if faiss == "always" or faiss == "auto" and counts[kind] > LARGE:
            manifest["faiss"][kind] = approximate(partial, sides[kind], sides[other].globals[:256])
    files.write_json(partial / "names.json", names)
    files.write_json(partial / "manifest.json", manifest)
    replace(partial, out)
    return manifest


def write_side(folder: Path, kind: str, count: int, progress: dict, encode: Callable) -> None:
    """Append what is missing of one kind; after each block `progress` tells what is safe on the disk."""
    done = progress[kind]
    opened = {part: open(folder / f"{kind}.{part}", "ab") for part in ("globals", "tokens", "offsets")}
    try:
        for part, file in opened.items():
            file.truncate(done["bytes"].get(part, 0))  # a block half written does not count
        if not done["bytes"]:
            opened["offsets"].write(np.zeros(1, np.int64).tobytes())
        rows = done.get("rows", 0)
        with tqdm(total=count, initial=done["items"], desc=f"index {kind}s", unit=kind) as bar:
            for start in range(done["items"], count, BLOCK):
                items = np.arange(start, min(start + BLOCK, count))
                block = encode(kind, items)
                opened["globals"].write(raw(block.globals))
                if block.tokens is not None:
                    opened["tokens"].write(raw(block.tokens[block.mask].to(DTYPES[progress["identity"]["dtype"]])))
                    ends = rows + block.mask.sum(1).cumsum(0)
                    opened["offsets"].write(raw(ends))
                    rows = int(ends[-1])
                for file in opened.values():
                    file.flush()
                    os.fsync(file.fileno())
                done |= {"items": int(items[-1]) + 1, "rows": rows,
                         "bytes": {part: file.tell() for part, file in opened.items()}}
                files.write_json(folder / "progress.json", progress)
                bar.update(len(items))
    finally:
        for file in opened.values():
            file.close()


def raw(values: torch.Tensor) -> bytes:
    return values.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def replace(partial: Path, out: Path) -> None:
    """Put the new index in the old one's place; a kill between the steps leaves none there, and nothing to do again."""
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(partial, out)
    (out / "progress.json").unlink()
    shutil.rmtree(old, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------- opening


def is_index(folder: Path) -> bool:
    return (folder / "manifest.json").is_file()


def load(folder: Path) -> Index:
    """Map an index into memory. Raises BadInput for one that is damaged or of another program version."""
    manifest, names = files.read_json(folder / "manifest.json"), files.read_json(folder / "names.json")
    missing = {"checkpoint", "run", "split", "dtype", "dim", "counts", "tokens", "faiss"} - manifest.keys()
    if missing:
        raise BadInput(f"{folder / 'manifest.json'}: no manifest of an index (it has no {', '.join(sorted(missing))})")
    sides = (open_side(folder, kind, manifest) for kind in KINDS)
    return Index(manifest, *sides, names, Path(manifest["run"]))


def open_side(folder: Path, kind: str, manifest: dict) -> Embeddings:
    count, dim = manifest["counts"][kind], manifest["dim"]
    side = Embeddings(kind, mapped(folder / f"{kind}.globals", torch.float32, count * dim).view(count, dim))
    if manifest["tokens"]:
        side.offsets = mapped(folder / f"{kind}.offsets", torch.int64, count + 1)
        side.tokens = mapped(folder / f"{kind}.tokens", DTYPES[manifest["dtype"]], int(side.offsets[-1]) * dim)
        side.tokens = side.tokens.view(-1, dim)
    if kind in manifest["faiss"]:
        side.faiss = import_faiss().read_index(str(folder / f"{kind}.faiss"))
    return side


def mapped(path: Path, dtype: torch.dtype, size: int) -> torch.Tensor:
    """A raw file as a tensor whose pages come from the disk when they are touched."""
    have, need = path.stat().st_size if path.is_file() else 0, size * dtype.itemsize
    if have != need:
        raise BadInput(f"{path}: found {have} bytes, expected {need}: make the index anew")
    if size == 0:
        return torch.zeros(0, dtype=dtype)
    with warnings.catch_warnings():  # PyTorch knows no read-only tensors, and says so
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(np.memmap(path, np.uint8, "r")).view(dtype)


# ------------------------------------------------------------------------------------------ beyond a million vectors


def approximate(folder: Path, side: Embeddings, queries: torch.Tensor, k: int = 100) -> float:
    """Build a FAISS inverted-file index of one side's globals, `{kind}.faiss`; returns its recall.

    Recall: the share of the exact k nearest, over `queries` [q, D], that it finds. Raises BadInput without FAISS.
    """
    faiss = import_faiss()
    vectors = side.globals
    lists = max(1, min(int(4 * len(vectors) ** 0.5), len(vectors) // 40))
    built = faiss.index_factory(vectors.shape[1], f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    chosen = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[: 64 * lists]
    built.train(vectors[chosen].numpy())
    for start in tqdm(range(0, len(vectors), 2**16), desc=f"FAISS reads {side.kind}s", unit="block"):
        built.add(vectors[start : start + 2**16].numpy())
    built.nprobe = max(1, lists // 16)
    faiss.write_index(built, str(folder / f"{side.kind}.faiss"))
    k = min(k, len(vectors))
    exact, found = nearest(queries, vectors, k)[1], torch.from_numpy(built.search(queries.numpy(), k)[1])
    return (exact[:, :, None] == found[:, None]).any(2).float().mean().item()


def import_faiss():
    try:
        import faiss
    except ImportError as error:
        raise BadInput("FAISS is not installed: pip install faiss-cpu") from error
    return faiss
