"""A store: the features that a frozen network gives pictures, computed once and kept in a folder.

The folder DATA_ROOT/cache/KIND-KEY belongs to one network: its name, its weights and how pictures are prepared for it
decide the KEY, and are written to identity.json. It holds raw arrays, with one row for each picture in the order in
which they were computed:

    regions  float32 or float16 [n, R, F]     boxes  float32 [n, R, 4] in 0..1     count  int32 [n] real regions
    clip     float32 [n, E]                   (the only array of a CLIP guide)

Each line of pictures.jsonl holds a row number, the digest of a picture's bytes, and the picture's name, size and time
of change. A picture is looked up by name, size and time first, then by digest. So a picture that was moved or copied is
found again, and one that was edited is computed again. A line is written after its row of the arrays, and a row without
a line does not count. So the store stays whole if the program is killed at any moment.
"""
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from sources import files
from sources.files import BadInput, explained

LARGEST = 1e6  # a feature beyond this is no feature: it comes from damage, or from a network that fails
Facts = tuple[str, int, int]  # a picture's name below the data's folder, its size, the time of its last change


def digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def facts(picture: Path | np.ndarray, root: Path) -> Facts:
    """What identifies the present state of a picture: a file by name, size and time, pixels by their digest.

    A file that cannot be looked at has size and time 0. Whoever reads it learns why.
    """
    if isinstance(picture, np.ndarray):
        return digest(picture.tobytes()), picture.size, 0
    name = os.path.relpath(picture, root).replace(os.sep, "/")
    try:
        found = picture.stat()
    except OSError:
        return name, 0, 0
    return name, found.st_size, found.st_mtime_ns


class Store:
    """Opens the store in `folder`, or begins one. arrays: name -> (shape of a row, type), as {"clip": ((512,), "f4")}.

    Only one program at a time may add to a store. Raises BadInput if the folder is damaged or is of another network.
    """

    def __init__(self, folder: Path, identity: dict, arrays: dict[str, tuple[tuple[int, ...], str]]):
        self.folder, self.arrays = folder, arrays
        self.row_of: dict[str, int] = {}  # digest -> row
        self.digest_of: dict[Facts, str] = {}
        self.whole = 0  # how many bytes of pictures.jsonl are whole lines
        if not (folder / "identity.json").is_file():
            files.write_json(folder / "identity.json", identity)
        with self.told():
            if files.read_json(folder / "identity.json") != identity:
                raise BadInput(f"{folder / 'identity.json'}: of another network")
            self.read_lines()
            for name in arrays:
                have = (folder / name).stat().st_size if (folder / name).is_file() else 0
                if have < len(self) * self.row_bytes(name):
                    raise BadInput(f"{folder / name}: found {have} bytes, expected {len(self)} rows of "
                                   f"{self.row_bytes(name)}")

    @contextmanager
    def told(self) -> Iterator[None]:
        """Adds to a BadInput inside the block which folder to delete."""
        try:
            yield
        except BadInput as error:
            raise BadInput(f"{error}; delete the folder {self.folder}, it is a cache") from None

    def __len__(self) -> int:
        return len(self.row_of)

    def row_bytes(self, name: str) -> int:
        shape, kind = self.arrays[name]
        return int(np.prod(shape)) * np.dtype(kind).itemsize

    def read_lines(self) -> None:
        path = self.folder / "pictures.jsonl"
        for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
            if not line.endswith(b"\n"):  # the program was killed while it wrote this line
                break
            with explained(path, "lines of a row, a digest, a name, a size and a time"):
                row, key, *known = json.loads(line)
                if self.row_of.setdefault(key, len(self)) != row:
                    raise ValueError(f"row {row} is in the wrong place")
                self.digest_of[tuple(known)] = key
            self.whole += len(line)

    def find(self, known: Facts | str) -> int | None:
        """The row of a picture, by its facts or by its digest; None if it is not here."""
        return self.row_of.get(known if isinstance(known, str) else self.digest_of.get(known, ""))

    def add(self, pictures: Sequence[tuple[str, Facts]], values: dict[str, np.ndarray]) -> dict[str, str]:
        """Write down pictures, given as (digest, facts). When this returns, they are on the disk.

        values: for each array one row for each digest that is new, in the order of `pictures`. Pictures with NaN,
        infinity or numbers beyond LARGEST are left out. Returns what is wrong with these, by digest. Raises BadInput if
        the disk cannot be written.
        """
        new = list(dict.fromkeys(key for key, _ in pictures if key not in self.row_of))
        rows, wrong = {}, {}
        for name in self.arrays if new else ():
            rows[name] = self.converted(name, values[name], len(new))
            absurd = ~(np.abs(rows[name].astype("f4")) <= LARGEST).reshape(len(new), -1).all(1)
            advice = " in half precision: take --feature-dtype float32" if self.arrays[name][1] == "f2" else ""
            wrong = {new[row]: f"the network gives no finite {name}{advice}" for row in np.flatnonzero(absurd)} | wrong
        good = [row for row, key in enumerate(new) if key not in wrong]
        for name in rows:
            files.append(self.folder / name, len(self) * self.row_bytes(name), rows[name][good].tobytes())
        new_rows = {new[row]: len(self) + place for place, row in enumerate(good)}
        pictures = [(key, known) for key, known in pictures if key not in wrong]
        lines = [json.dumps([new_rows.get(key, self.find(key)), key, *known]) + "\n" for key, known in pictures]
        content = "".join(lines).encode()
        files.append(self.folder / "pictures.jsonl", self.whole, content)  # last, because it makes the rows count
        self.whole += len(content)
        self.row_of |= new_rows
        self.digest_of |= {known: key for key, known in pictures}
        return wrong

    def converted(self, name: str, rows: np.ndarray, count: int) -> np.ndarray:
        """The rows in the array's type, in which large numbers may become infinite. count: how many there should be."""
        shape, kind = self.arrays[name]
        if rows.shape != (count, *shape):
            raise ValueError(f"{name} should be {(count, *shape)}, got {rows.shape}")
        with np.errstate(over="ignore"):
            return rows.astype(kind)

    def read(self, name: str, rows: Sequence[int]) -> np.ndarray:
        """Rows of an array as float32 (of "count" as int32). Raises BadInput if the file has been damaged."""
        shape, kind = self.arrays[name]
        path, size = self.folder / name, self.row_bytes(name)
        out = np.empty((len(rows), *shape), np.int32 if kind == "i4" else np.float32)
        with self.told(), explained(path, f"{size} bytes a row"), open(path, "rb") as file:
            for place, row in enumerate(rows):
                file.seek(int(row) * size)
                out[place] = np.frombuffer(file.read(size), kind).reshape(shape)
                if not (np.abs(out[place]) <= LARGEST).all():
                    raise ValueError(f"row {row} has absurd numbers")
        return out
