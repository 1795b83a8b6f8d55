"""Errors for people, and files that are whole or not there.

An error is one clear line that names the place, what was found there and what was expected. A file that is written here
replaces the old one at once: a kill at any moment leaves the one or the other.
"""
from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


class BadInput(ValueError):
    """Something the user gave is wrong; the message is one clear line for people."""


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


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that a kill at any moment leaves the old one or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_json(path: Path, value: object) -> None:
    write_whole(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read as JSON: {error}") from error
