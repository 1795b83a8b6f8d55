"""One pass over pictures: their features from frozen networks are computed once and kept in stores.

A picture is decoded once for all networks that lack it, in other processes if there are many. Each batch is on the disk
before the next one begins, so a pass that was stopped goes on where it was. A picture that cannot be used does not stop
the pass: it is reported when all others are done.
"""
import errno
import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from sources import photos
from sources.files import BadInput
from sources.store import Facts, Store, digest, facts

FEW = 64  # up to this many pictures, starting other processes costs more than it saves
FIRST = 4  # batches, on which the time of a pass is measured


class Cache:
    """One network and the store of its features. The network is loaded only if a picture is missing from the store.

    make() loads the network. folder: where the stores of all networks lie. identity: the network's, if it is known; if
    not, the network is loaded at once to learn it. dtype: how features are stored, "float32" or "float16".
    """

    def __init__(self, make: Callable, folder: Path, identity: dict | None = None, dtype: str = "float32"):
        self.make, self.network = make, None if identity else make()
        self.identity = identity or self.network.identity
        if self.identity["kind"] == "clip-guide":
            self.arrays = {"clip": ((self.identity["dim"],), "f4")}
        else:
            count, dim = self.identity["regions"], self.identity["dim"]
            self.arrays = {"regions": ((count, dim), "f2" if dtype == "float16" else "f4"),
                           "boxes": ((count, 4), "f4"), "count": ((), "i4")}
        shapes = {name: [list(shape), kind] for name, (shape, kind) in self.arrays.items()}
        self.key = self.identity | {"arrays": shapes}
        name = hashlib.blake2b(json.dumps(self.key, sort_keys=True).encode(), digest_size=6).hexdigest()
        self.folder = folder / f"{self.identity['kind']}-{name}"

    @contextmanager
    def opened(self):
        """Lock the store and open it. If another program holds it, say so and wait.

        A store that may only be read is opened without a lock. That is enough if it has all pictures.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{self.folder}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"another program is looking at these pictures, waiting for it ({lock.lock_file})", file=sys.stderr)
            lock.acquire()
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EROFS) or not (self.folder / "identity.json").is_file():
                raise BadInput(f"{lock.lock_file}: cannot be locked ({error.strerror or error}), as on some network "
                               "file systems: take a folder on another disk, by --cache") from error
        try:
            self.store = Store(self.folder, self.key, self.arrays)
            yield
        finally:
            lock.release()

    def load(self) -> None:
        """Load the network. Raises BadInput if it is not the one that was expected."""
        if self.network is None:
            self.network = self.make()
            check_same(self.identity, self.network.identity)

    def add(self, pictures: list[tuple[str, Facts]], digests: list[str],
            batch: dict[str, np.ndarray]) -> dict[str, str]:
        """Write down pictures, given as (digest, facts), after the network has looked at the new ones among them.

        digests: of the prepared pictures that `batch` holds. Returns what is wrong with those left out, by digest.
        """
        new = [row for row, key in enumerate(digests) if self.store.find(key) is None]
        tensors = {name: torch.from_numpy(array[new]) for name, array in batch.items()}
        return self.store.add(pictures, self.network.look(tensors) if new else {})


def check_same(wanted: dict, found: dict) -> None:
    """Raises BadInput if a network is not the one that a model was trained with."""
    if wanted == found:
        return
    different = [key for key in found if wanted.get(key) != found[key]] or ["kind"]
    wanted_is, found_is = (", ".join(f"{key} {str(network.get(key))[:60]}" for key in different)
                           for network in (wanted, found))
    name = wanted.get("network", wanted.get("kind"))
    raise BadInput(f"the model was trained with the network {name} ({wanted_is}), but here is {found['network']} "
                   f"({found_is})")


def fill(pictures: Sequence[Path | np.ndarray], root: Path, caches: dict[str, Cache],
         workers: int | None = None) -> tuple[dict[str, np.ndarray], dict[int, str]]:
    """Look at the pictures that a cache lacks.

    root: names of files are kept relative to it. workers: processes that decode; None: one for each core, at most 8.
    Returns rows, for each cache the row [N] of each picture in its store (-1 if the picture cannot be used), and
    errors, what is wrong with the pictures that cannot be used.
    """
    known = [facts(picture, root) for picture in pictures]
    with ExitStack() as stack:
        for cache in caches.values():
            stack.enter_context(cache.opened())
            know_again(pictures, known, cache.store)
        errors = look_at_missing(pictures, known, caches, workers)
        found = {name: [cache.store.find(of) for of in known] for name, cache in caches.items()}
    rows = {name: np.array([-1 if row is None else row for row in each], np.int64) for name, each in found.items()}
    return rows, errors


def know_again(pictures: Sequence, known: list[Facts], store: Store) -> None:
    """Write down files whose time alone has changed, as after a copy to another machine. This needs no network.

    A file that cannot be read is left for `Decoded`, which says what is wrong with it.
    """
    names_and_sizes = {(name, size) for name, size, _ in store.digest_of}
    again = []
    for picture, of in zip(pictures, known, strict=True):
        if isinstance(picture, Path) and store.find(of) is None and of[:2] in names_and_sizes:
            with suppress(BadInput):
                again.append((digest(photos.read_file(picture)), of))
    if again := [(key, of) for key, of in again if store.find(key) is not None]:
        store.add(again, {})


def look_at_missing(pictures: Sequence, known: list[Facts], caches: dict[str, Cache],
                    workers: int | None) -> dict[int, str]:
    """Decode pictures and let each network look at those that its store lacks. Returns what went wrong, by picture."""
    lacking = [[name for name, cache in caches.items() if cache.store.find(of) is None] for of in known]
    todo = [place for place, names in enumerate(lacking) if names]
    if not todo:
        return {}
    used = {name: cache for name, cache in caches.items() if any(name in names for names in lacking)}
    for cache in used.values():
        cache.load()
    size = min(cache.network.batch_size for cache in used.values())
    batches = [todo[start : start + size] for start in range(0, len(todo), size)]
    if len(todo) <= FEW:
        workers = 0
    elif workers is None:
        workers = min(8, os.cpu_count() or 1)
    loader = DataLoader(Decoded(pictures, lacking, used), sampler=batches, batch_size=None, num_workers=workers,
                        collate_fn=tuple,  # changes nothing; without it arrays would become tensors
                        generator=torch.Generator())  # so that it takes no random numbers from the program's generator
    names = " and ".join(cache.identity["network"] for cache in used.values())
    bar = tqdm(total=len(todo), desc=f"features by {names}", unit="picture", dynamic_ncols=True)
    errors = {}
    try:
        with bar:
            with uninterrupted():
                read = iter(loader)  # starts the processes
            for digests, wrong, prepared in read:
                errors |= wrong
                for name, cache in used.items():
                    seen = [(key, known[place]) for place, key in digests.items() if name in lacking[place]]
                    if seen:
                        bad = cache.add(seen, *prepared.get(name, ([], {})))
                        errors |= {place: f"{known[place][0]}: {bad[key]}"
                                   for place, key in digests.items() if key in bad}
                bar.update(len(digests) + len(wrong))
                if bar.n == FIRST * size < len(todo):
                    minutes = bar.format_dict["elapsed"] / bar.n * len(todo) / 60
                    tqdm.write(f"about {minutes:.0f} minutes for {len(todo)} pictures, measured on the first {bar.n}",
                               file=sys.stderr)
    except KeyboardInterrupt:
        print(f"stopped: {bar.n} of {len(todo)} pictures are done, the next start goes on from there", file=sys.stderr)
        raise
    except torch.OutOfMemoryError as error:
        raise BadInput(f"the memory of the GPU is not enough for {size} pictures at a time; what was computed is kept: "
                       "go on when no other program uses the GPU, or by --device cpu") from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise BadInput("a process that decodes pictures was killed, perhaps because memory ran out; what was computed "
                       f"is kept: go on with fewer processes, by --workers 1 ({str(error).splitlines()[0]})") from error
    return errors


@contextmanager
def uninterrupted():
    """Ctrl-C waits until the end of the block. Python would lose one that comes while it forks a process."""
    before, heard = signal.getsignal(signal.SIGINT), []
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, lambda *given: heard.append(given))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if heard:
        raise KeyboardInterrupt


class Decoded(Dataset):
    """Decodes and prepares pictures, in other processes. decoded[places] -> digests, errors, prepared:

    digests {place: digest} of the pictures that can be used; errors {place: message} of the others; prepared, for each
    network that has to look at any of them, their digests and their arrays, stacked. These are no tensors, because
    PyTorch would send tensors through shared memory, of which a container may have too little.
    """

    def __init__(self, pictures: Sequence, lacking: list[list[str]], caches: dict[str, Cache]):
        self.pictures, self.lacking = pictures, lacking
        self.prepare = {name: cache.network.prepare for name, cache in caches.items()}
        self.stored = {name: set(cache.store.row_of) for name, cache in caches.items()}  # maybe under other names

    def __getitem__(self, places: list[int]) -> tuple[dict[int, str], dict[int, str], dict[str, tuple]]:
        digests, errors, prepared = {}, {}, {name: {} for name in self.prepare}
        for place in places:
            picture = self.pictures[place]
            try:
                content = photos.read_file(picture) if isinstance(picture, Path) else picture.tobytes()
                key = digest(content)
                names = [name for name in self.lacking[place]
                         if key not in self.stored[name] and key not in prepared[name]]
                image = photos.read(picture, content) if names else None
                tensors = {name: self.prepare[name](image) for name in names}
            except (BadInput, OSError, MemoryError) as error:
                errors[place] = str(error) or f"{picture}: {type(error).__name__}"
                continue
            digests[place] = key
            for name in names:
                prepared[name][key] = tensors[name]
        return digests, errors, {name: stacked(own) for name, own in prepared.items() if own}


def stacked(prepared: dict[str, dict[str, Tensor]]) -> tuple[list[str], dict[str, np.ndarray]]:
    """Prepared pictures by their digests -> the digests, and for each name an array of all pictures."""
    first = next(iter(prepared.values()))
    return list(prepared), {name: np.stack([own[name].numpy() for own in prepared.values()]) for name in first}
