"""What both command lines share: how a command ends."""
from __future__ import annotations

import errno
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable

from sources.files import WINDOWS, BadInput

# The reader of our output, or the terminal, is gone.
CLOSED = (errno.EPIPE, errno.EIO, *((errno.EINVAL,) if WINDOWS else ()))
LINE_BREAK = "\\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\\s*"  # an error takes one line
MEMORY = "out of memory|(can't|cannot) allocate memory|alloc_failed"
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def run_command(command: Callable[[], int | None]) -> int:
    """Run a command and return its exit code. Mistakes of the user and of the machine end in one line, not a traceback.

    Codes: 2 for an error, 130 after Ctrl-C, 141 if nobody reads the output any more.
    """
    if at_once := signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # see `start.first_look`
        signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more --workers than cores: as was asked for
    sys.stdout, sys.stderr = sys.stdout or open(os.devnull, "w"), sys.stderr or open(os.devnull, "w")  # None by >&-
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not in a notebook
            stream.reconfigure(errors="backslashreplace")  # for a terminal that lacks a letter of a caption
    try:
        return code_of(command)
    finally:
        if at_once:  # also while Python clears up
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def code_of(command: Callable[[], int | None]) -> int:
    """Run a command and return its exit code. An error is printed in one line first."""
    try:
        code = command() or 0
        sys.stdout.flush()  # here, so that an error of the output is still reported
        return code
    except BadInput as error:  # from a process of --workers, the message stands at the end of a traceback
        message = str(error).rsplit("BadInput: ", 1)[-1]
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if error.errno in CLOSED and not error.filename:  # with a name, it is a disk that fails
            return leave_quietly()
        where = f"{error.filename}: " if error.filename else ""
        message = f"{where}{error.strerror or error}"
    except (MemoryError, RuntimeError) as error:
        message = fault_of_the_machine(error)
        if not message:
            raise
    try:
        print(f"error: {re.sub(LINE_BREAK, ' ', message.strip())}", file=sys.stderr)
        sys.stdout.flush()
    except OSError as error:
        code = leave_quietly()  # what is still to be written has nowhere to go
        return code if error.errno in CLOSED else 2
    return 2


def fault_of_the_machine(error: MemoryError | RuntimeError) -> str:
    """The message for an error that this machine is to blame for; empty for an error in the program."""
    if "DataLoader worker" in str(error):
        return "a process that reads batches has ended, perhaps because memory ran out: take fewer --workers"
    # PyTorch and cuBLAS say it by a RuntimeError, on a GPU and without one.
    if isinstance(error, MemoryError) or re.search(MEMORY, str(error), re.IGNORECASE):
        return ("the memory of this machine or of its GPU is not enough; training needs less with a smaller "
                "--batch-size, TGDT also with --pieces")
    return ""


def leave_quietly() -> int:
    """Close the output, so that Python does not complain about it when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            os.dup2(nowhere, stream.fileno())
        except (OSError, ValueError):  # not a real file, as in a notebook
            pass
    return 141


def ignore_interrupts(worker: int) -> None:
    """For a process that reads batches: Ctrl-C reaches it too, and so does a SIGTERM to the whole group. It goes on,
    because the loop stops after the current step."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def as_arrays(batch: dict) -> dict:
    """What such a process sends. PyTorch would send tensors through shared memory; with too little of it, as in many
    containers, the loop would wait for ever."""
    return {name: value.numpy() for name, value in batch.items()}


class Interrupt:
    """Notes Ctrl-C, SIGTERM or a closed terminal, so that the loop stops after the current step. A second one stops
    at once."""

    def __init__(self):
        self.seen = False

    def __enter__(self) -> Interrupt:
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
        self.before = {number: signal.signal(number, self.note) for number in heard}
        return self

    def note(self, number: int, frame: object) -> None:
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
