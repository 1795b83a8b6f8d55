"""Clear errors, and files that are never left half written.

An error message is one line. It names the file, line or index, says what was found there and what was expected.
"""
from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


class BadInput(ValueError):
    """Something that the user gave is wrong. The message is one clear line for people."""


@contextmanager
def explained(place: Path | str, expected: str):
    """Turns any error inside the block into a BadInput that says where it happened and what was expected there.

    Use it around a small block that reads a file: NumPy, zipfile, json and PIL raise many kinds of errors.
    """
    try:
        yield
    except BadInput:
        raise
    except UnicodeDecodeError as e:
        line = e.object.count(b"\n", 0, e.start) + 1
        raise BadInput(f"{place}, line {line}: byte 0x{e.object[e.start]:02x} is not UTF-8") from None
    except Exception as e:
        if isinstance(e, OSError) and e.strerror:  # such as a missing permission: nothing is known of the content
            raise BadInput(f"{place}: {e.strerror}, expected {expected}") from None
        raise BadInput(f"{place}: expected {expected} ({type(e).__name__}: {e})".replace("\n", " ")) from None


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file by `write(file)`. If the program is killed, the old file or the new one is there, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def append(path: Path, end: int, content: bytes) -> None:
    """Write `content` behind the first `end` bytes of a file, and wait until it is on the disk.

    What stood behind these bytes is cut off: it is the rest of a write that was interrupted. Raises BadInput if the
    file cannot be written, for instance because the disk is full.
    """
    try:
        with open(path, "ab") as file:
            file.truncate(end)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise BadInput(f"{path}: cannot be written: {error.strerror}; what was written before is kept") from error


def write_json(path: Path, value: object) -> None:
    write_whole(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: cannot be read as JSON: {error}") from error


def read_weights(path: Path, expected: str, allowed: Sequence[type] = ()) -> object:
    """Read a file of torch.save onto the CPU without running any code from it.

    expected: what the file should be, for the message. allowed: classes that it may hold besides tensors, numbers,
    texts, lists and dictionaries. Raises BadInput if the file is missing or is anything else.
    """
    import torch  # here, so that --help need not wait for it

    if not Path(path).is_file():
        raise BadInput(f"{path}: no such file, expected {expected}")
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load fails in many ways; its long messages recommend unsafe loading
        raise BadInput(f"{path}: expected {expected} ({type(error).__name__})") from error
