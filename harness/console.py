"""What both command lines share: errors as one line, and folders that one program writes at a time."""
from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sources.files import BadInput

CLOSED = (errno.EPIPE, errno.EIO)  # the reader of our output, or the terminal, is gone


def run_command(command: Callable[[], int]) -> int:
    """Run a command and return its exit code. Mistakes of the user and of the machine end in one line, not a traceback.

    Codes: 2 for an error, 130 after Ctrl-C, 141 if nobody reads the output any more.
    """
    try:
        return command()
    except BadInput as error:
        message = str(error)
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if error.errno in CLOSED:
            return leave_quietly()
        where = f"{error.filename}: " if error.filename else ""
        message = f"{where}{error.strerror or error}"
    except MemoryError:
        message = "the memory of this machine is not enough; a smaller --batch-size needs less"
    try:
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    except OSError:
        return leave_quietly()
    return 2


def leave_quietly() -> int:
    """Close the output, so that Python does not complain about it when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            os.dup2(nowhere, stream.fileno())
        except (OSError, ValueError):  # not a real file, as in a notebook
            pass
    return 141


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make `folder`, and be the only program that writes into it. What is still empty at the end is removed again.

    Raises BadInput if another program writes there, OSError if the folder cannot be made or written.
    """
    from filelock import FileLock, Timeout

    new = [part for part in (folder, *folder.parents) if not part.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BadInput(f"{folder}: another program is writing there; wait for it, or give another folder") from None
    try:
        yield
    finally:
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)
        for part in new:
            if not part.exists() or any(part.iterdir()):
                break
            part.rmdir()
