"""A store: what a frozen network says of pictures, computed once, kept on disk, never stale.

Part of neither paper. A folder, DATA_ROOT/cache/KIND-KEY, whose KEY is made of the network, its weights and how
pictures are prepared for it (`identity.json` says it at length). In it are raw arrays, a row a picture in the order in
which they were computed, and `pictures.jsonl`, which says of each row the digest of the picture's bytes, its name, its
size and the time of its last change:

    regions  float32 or float16 [n, R, F]     boxes  float32 [n, R, 4] in 0..1     count  int32 [n], of real regions
    clip     float32 [n, E]                   (a CLIP's store has this array alone)

A picture is looked up by name, size and time, and by its digest where these have changed: what was moved or copied is
found again, what was edited is computed anew, what was added is appended. A row counts only once its line is written,
after its arrays: a kill at any moment leaves whole rows.
"""
from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from sources import files
from sources.files import BadInput, explained

Facts = tuple[str, int, int]  # a file's name from the data's folder, its size, the time of its last change


def digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def facts(path: Path, root: Path) -> Facts:
    """What tells one state of a file from another, without reading it."""
    found = path.stat()
    return os.path.relpath(path, root).replace(os.sep, "/"), found.st_size, found.st_mtime_ns


class Store:
    """The store in `folder`, opened or begun. arrays: of each a row's shape and its type, {"clip": ((512,), "f4")}.

    Raises BadInput for a folder that holds something else, or less than it says.
    """

    def __init__(self, folder: Path, identity: dict, arrays: dict[str, tuple[tuple[int, ...], str]]):
        self.folder, self.arrays = folder, arrays
        self.row_of: dict[str, int] = {}     # digest -> row
        self.digest_of: dict[Facts, str] = {}
        self.writer, self.unwritten, self.failed = ThreadPoolExecutor(1), deque(), False  # nobody waits for the disk
        if not (folder / "identity.json").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            files.write_json(folder / "identity.json", identity)
        if files.read_json(folder / "identity.json") != identity:
            raise BadInput(f"{folder / 'identity.json'}: not that of this network: delete the folder, it is a cache")
        self.read_lines()

    def __len__(self) -> int:
        return len(self.row_of)

    def row_bytes(self, name: str) -> int:
        shape, kind = self.arrays[name]
        return int(np.prod(shape)) * np.dtype(kind).itemsize

    def read_lines(self) -> None:
        """Take note of the rows that are whole; a last line without its end does not count."""
        path = self.folder / "pictures.jsonl"
        self.whole = 0  # bytes of whole lines
        for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
            if line.endswith(b"\n"):
                with explained(path, "lines of a row, a digest, a name, a size and a time"):
                    row, key, *known = json.loads(line)
                self.row_of[key] = row
                self.digest_of[tuple(known)] = key
                self.whole += len(line)
        for name in self.arrays:
            have = (self.folder / name).stat().st_size if (self.folder / name).is_file() else 0
            if have < len(self) * self.row_bytes(name):
                raise BadInput(f"{self.folder / name}: found {have} bytes, expected {len(self)} rows of "
                               f"{self.row_bytes(name)}: delete the folder, it is a cache")

    def find(self, known: Facts | str) -> int | None:
        """The row of a picture by its facts or by its digest."""
        return self.row_of.get(known if isinstance(known, str) else self.digest_of.get(known, ""))

    def add(self, pictures: Sequence[tuple[str, Facts]], values: dict[str, np.ndarray]) -> None:
        """Write down pictures (digest, facts): those of a new digest, in their order, are the rows of `values`; one may
        come twice. They are on the disk after `flush`. Raises BadInput for a value that is not finite. Nobody else may
        write meanwhile."""
        parts = []
        new = [key for key in dict.fromkeys(key for key, _ in pictures) if key not in self.row_of]
        for name, (shape, kind) in self.arrays.items():
            with np.errstate(over="ignore"):
                rows = values[name].astype(kind) if new else np.zeros((0, *shape), kind)
            if rows.shape != (len(new), *shape):
                raise ValueError(f"{name} should be {(len(new), *shape)}, got {rows.shape}")
            if not np.isfinite(rows).all():
                row = int(np.flatnonzero(~np.isfinite(rows).reshape(len(rows), -1).all(1))[0])
                which = next(known[0] for key, known in pictures if key == new[row])
                raise BadInput(f"{which}: the network gives no finite {name}" + (
                    " in half precision: take --feature-dtype float32" if kind == "f2" else ""))
            parts.append((name, len(self) * self.row_bytes(name), rows.tobytes()))
        before = len(self)
        self.row_of |= {key: before + place for place, key in enumerate(new)}
        self.digest_of |= {known: key for key, known in pictures}
        lines = "".join(json.dumps([self.row_of[key], key, *known]) + "\n" for key, known in pictures).encode()
        parts.append(("pictures.jsonl", self.whole, lines))  # last: it makes the rows count
        self.whole += len(lines)
        self.unwritten.append(self.writer.submit(self.append, parts))
        while len(self.unwritten) > 2:
            self.unwritten.popleft().result()

    def flush(self) -> None:
        """Wait until all that was added is on the disk. Raises BadInput when it cannot be written."""
        while self.unwritten:
            self.unwritten.popleft().result()

    def append(self, parts: list[tuple[str, int, bytes]]) -> None:
        """Write each part after the first `end` bytes of its file; what stands behind these does not count. After a
        failure nothing more is written: it would leave a hole."""
        for name, end, content in parts if not self.failed else ():
            try:
                with open(self.folder / name, "ab") as file:
                    file.truncate(end)
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                self.failed = True
                raise BadInput(f"{self.folder / name}: cannot be written: {error.strerror}; what was computed before "
                               "is kept") from error

    def read(self, name: str, rows: Sequence[int]) -> np.ndarray:
        """Rows of an array, as float32 (the count as int32). Raises BadInput where the file has been cut short."""
        shape, kind = self.arrays[name]
        path, size = self.folder / name, self.row_bytes(name)
        out = np.empty((len(rows), *shape), np.int32 if kind == "i4" else np.float32)
        with explained(path, f"{size} bytes a row"), open(path, "rb") as file:
            for place, row in enumerate(rows):
                file.seek(int(row) * size)
                out[place] = np.frombuffer(file.read(size), kind).reshape(shape)
        return out


class Stored:
    """Region features from a store (a source, see `features.py`): image i of N has row rows[i]."""

    def __init__(self, store: Store, rows: np.ndarray):
        self.store, self.rows, self.path = store, rows, str(store.folder)
        self.dim = store.arrays["regions"][0][1]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: Sequence[int]) -> tuple:
        which = self.rows[rows]
        count = self.store.read("count", which)
        mask = np.arange(count.max()) < count[:, None]
        return *(self.store.read(name, which)[:, : count.max()] for name in ("regions", "boxes")), mask
