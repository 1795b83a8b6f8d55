"""Clear errors, files that are never left half written, and folders that one program writes at a time.

An error message is one line. It names the file, line or index, says what was found there and what was expected.
"""
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

WINDOWS = os.name == "nt"


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
    """Write a file by `write(file)`. If the program is killed, the old file or the new one is there, never a part.

    Raises OSError, with the name of the file, if it cannot be written, for instance because the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        replace(partial, path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink()  # it takes room, and is of no use
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides it behind its own error
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror or str(cause), str(path)) from error


def replace(source: Path, target: Path) -> None:
    """os.replace. On Windows it fails while another program reads the target, such as a virus scanner: wait a bit."""
    for wait in (0.05, 0.2, 1, 3, 10) if WINDOWS else ():
        try:
            return os.replace(source, target)
        except PermissionError:
            time.sleep(wait)
    os.replace(source, target)


def append(path: Path, end: int, content: bytes) -> None:
    """Write `content` after the first `end` bytes of a file, and wait until it is on the disk.

    What came after these bytes is cut off: it is the rest of a write that was interrupted. Raises BadInput if the
    file cannot be written, for instance because the disk is full.
    """
    try:
        with open(path, "ab") as file:
            if (found := file.tell()) < end:
                raise BadInput(f"{path}: found {found:,} bytes, expected {end:,}: it was cut short: remove its folder")
            file.truncate(end)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise BadInput(f"{path}: cannot be written: {error.strerror}; what was written before is kept") from error


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make a folder and its parents. Those that are new, and still empty at the end of the block, are removed again."""
    new = [part for part in (folder, *folder.parents) if not part.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):  # no longer empty, or renamed
            for part in new:
                part.rmdir()


def check_folder(folder: Path) -> None:
    """Raises BadInput if a folder cannot be made, or if no file can be written into it. Leaves nothing behind."""
    try:
        with made(folder):
            probe = folder / f".{os.getpid()}.probe"  # not tempfile, which on Windows may try for ever
            probe.touch()
            probe.unlink()
    except OSError as error:
        raise BadInput(f"{folder}: expected a folder that can be written: {error.strerror}") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make `folder`, and be the only program that writes into it. What is still empty at the end is removed again.

    Raises BadInput if another program writes there, and if the folder cannot be made or written.
    """
    from filelock import FileLock, Timeout  # here, so that --help need not wait for it

    check_folder(folder)
    with made(folder):
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise BadInput(f"{folder}: another program is writing there; wait for it, or give another folder") from None
        except OSError as error:
            raise BadInput(f"{folder}: cannot be locked ({error.strerror or error}), as on some network file systems: "
                           "take a folder on another disk") from error
        try:
            yield
        finally:
            with suppress(OSError):
                os.unlink(lock.lock_file)  # while it is held: after the release it may be another program's
            lock.release()


def write_json(path: Path, value: object) -> None:
    write_whole(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def read_json(path: Path) -> dict:
    """What a JSON file holds. Raises BadInput if it is missing, not JSON, or a pipe or device, which may never end."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file")
    with explained(path, "JSON"):
        return json.loads(path.read_text(encoding="utf8"))


def read_weights(path: Path, expected: str, allowed: Sequence[type] = ()) -> object:
    """Read a file of torch.save onto the CPU without running any code from it.

    expected: what the file should be, for the message. allowed: classes that it may hold besides tensors, numbers,
    texts, lists and dictionaries. Raises BadInput if the file is missing or is anything else.
    """
    import torch  # here, so that --help need not wait for it

    if not path.is_file():
        raise BadInput(f"{path}: no such file, expected {expected}")
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load fails in many ways; its long messages recommend unsafe loading
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise BadInput(f"{path}: expected {expected} ({reason})") from error
