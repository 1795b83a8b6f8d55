"""From pictures to what the models see: regions, and CLIP's embeddings, in one pass over the pictures.

What comes before both papers, who take their region features from files. `prepare` gives splits without features
theirs, and with --guide clip all splits their CLIP embeddings. What is in the stores already (see `store.py`) is not
computed again. A picture is decoded once for all networks that want it, by several processes; what has been computed is
safe after each batch, and a picture that cannot be used is reported at the end, by name.
"""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import data
from harness import run as runs
from sources import files, frozen, photos
from sources.features import InMemory
from sources.files import BadInput
from sources.store import Facts, Store, Stored, digest, facts

BATCH = {"detector": 4, "grid": 32, "clip": 32, "clip-guide": 32, "scenes": 50}  # pictures that a network sees together
FEW = 64  # so many pictures are not worth processes of their own


# ------------------------------------------------------------------------------------------------------- the one call


def prepare(splits: dict[str, data.Split], settings: runs.Settings, folder: Path, device: torch.device | str = "cpu",
            workers: int = 0, wanted: dict | None = None) -> dict:
    """Give splits without features theirs and, with --guide clip, all splits their CLIP embeddings `clip` [N, E].

    folder: for the cache, where settings name none and the data's folder cannot be written. workers: decoding processes
    (0: as many as there are cores, 8 at most). wanted: what this returned when the model was trained, so that a network
    is loaded only if a picture is missing, and refused if it is another. Returns {"regions": identity, "clip": identity
    or None}. Raises BadInput for pictures that cannot be used, unless --skip-bad leaves them out, and for a network
    that is not to be had.
    """
    cache, wanted = cache_folder(settings, folder), wanted or {}
    root = Path(settings.data_root) if settings.data_root else folder
    from_pictures = any(split.features is None for split in splits.values())
    lookers = {}
    if from_pictures:
        lookers["regions"] = Looker(partial(regions_network, settings, device), wanted.get("regions"), cache,
                                    settings.feature_dtype)
    if settings.guide == "clip":
        lookers["clip"] = Looker(partial(frozen.Clip, settings.clip_model, device), wanted.get("clip"), cache)
    found = {name: looker.identity for name, looker in lookers.items()}
    found = {"regions": frozen.SceneWindows.identity if settings.dataset == "scenes" else {"kind": "files"},
             "clip": None} | found
    if not lookers:
        return found
    bad = {name: {row: f"{split.image_names[row]}: no such picture in {root} or its usual folders"
                  for row, picture in enumerate(split.pictures) if picture is None} for name, split in splits.items()}
    if not from_pictures:
        check_guided(splits, bad)
    items = [(name, row) for name, split in splits.items()
             for row in range(len(split.pictures)) if row not in bad[name]]
    pictures = [splits[name].pictures[row] for name, row in items]
    about = [known(picture, root) for picture in pictures]
    with ExitStack() as locks:
        for looker in lookers.values():
            looker.open(locks)
        for place, message in look(pictures, about, list(lookers.values()), workers).items():
            bad[items[place][0]][items[place][1]] = message
    leave_out(splits, bad, settings.skip_bad and from_pictures, cache)
    good = [(name, facts) for (name, row), facts in zip(items, about, strict=True) if row not in bad[name]]
    for name, split in splits.items():
        rows = {what: np.array([looker.store.find(facts) for owner, facts in good if owner == name], np.int64)
                for what, looker in lookers.items()}
        if "regions" in lookers:
            split.features = Stored(lookers["regions"].store, rows["regions"])
        if "clip" in lookers:
            split.clip = lookers["clip"].store.read("clip", rows["clip"])
    return found


def one(picture: Path | np.ndarray, settings: runs.Settings, device: torch.device | str, wanted: dict) -> data.Split:
    """A split of one picture and no captions, computed at once and kept nowhere."""
    split = data.Split("query", [], np.zeros(0, np.int64), None, [str(picture)], [picture])
    image = photos.read(picture)
    for name, make in (("regions", partial(regions_network, settings, device)),
                       ("clip", partial(frozen.Clip, settings.clip_model, device))):
        if name == "clip" and settings.guide != "clip":
            continue
        network = make()
        check_same(wanted[name], network.identity)
        seen = network.look({key: value[None] for key, value in network.prepare(image).items()})
        if name == "clip":
            split.clip = seen["clip"]
        else:
            count = int(seen["count"][0])
            split.features = InMemory(str(picture), seen["regions"][:, :count], seen["boxes"][:, :count])
    return split


def kind(settings: runs.Settings, splits: dict[str, data.Split]) -> str:
    """What --regions auto means for these splits."""
    if settings.regions != "auto" or settings.dataset == "scenes":
        return settings.regions
    return "detector" if any(split.features is None for split in splits.values()) else "files"


def regions_network(settings: runs.Settings, device: torch.device | str):
    kind = "scenes" if settings.dataset == "scenes" and settings.regions == "auto" else settings.regions
    return frozen.regions_network(kind, settings.region_network, settings.region_weights, settings.boxes,
                                  settings.picture_side, settings.clip_model, device)


def cache_folder(settings: runs.Settings, folder: Path) -> Path:
    """The folder of the stores: as set, else `cache` beside the data if it can be written there, else in `folder`."""
    if settings.cache:
        return Path(settings.cache)
    root = Path(settings.data_root) if settings.data_root else None
    return (root if root and os.access(root, os.W_OK) else folder) / "cache"


# ------------------------------------------------------------------------------------------------ networks and stores


@dataclass
class Looker:
    """A store and the network that fills it, which is loaded only to learn what it is, or when a picture is missing."""

    make: Callable[[], object]
    identity: dict | None
    cache: Path
    dtype: str = "float32"
    network: object = None
    store: Store = field(init=False)

    def __post_init__(self):
        if self.identity is None:
            self.network = self.make()
            self.identity = self.network.identity

    def open(self, locks: ExitStack) -> None:
        """Open the store, once no other program writes there."""
        kind = self.identity["kind"]
        arrays = {"clip": ((self.identity["dim"],), "f4")} if kind == "clip-guide" else {
            "regions": ((self.identity["regions"], self.identity["dim"]), "f2" if self.dtype == "float16" else "f4"),
            "boxes": ((self.identity["regions"], 4), "f4"), "count": ((), "i4")}
        whole = self.identity | {"arrays": {name: [list(shape), kind] for name, (shape, kind) in arrays.items()}}
        key = hashlib.blake2b(json.dumps(whole, sort_keys=True).encode(), digest_size=6).hexdigest()
        self.cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.cache / f"{kind}-{key}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"another program is looking at these pictures, waiting for it ({lock.lock_file})")
            lock.acquire()
        locks.callback(lock.release)
        self.store = Store(self.cache / f"{kind}-{key}", whole, arrays)

    def wake(self) -> None:
        if self.network is None:
            self.network = self.make()
            check_same(self.identity, self.network.identity)


def check_same(wanted: dict, found: dict) -> None:
    """Raises BadInput when pictures would be seen by another network than the one that a model was trained with."""
    if wanted == found:
        return
    different = [key for key in found if wanted.get(key) != found[key]] or ["kind"]
    told = [", ".join(f"{key} {str(one.get(key))[:60]}" for key in different) for one in (wanted, found)]
    raise BadInput(f"the model was trained on what {wanted.get('network', wanted['kind'])} sees ({told[0]}), not on "
                   f"what {found['network']} sees here ({told[1]})")


# ----------------------------------------------------------------------------------------------------------- one pass


def look(pictures: list[Path | np.ndarray], about: list[Facts], lookers: list[Looker], workers: int) -> dict[int, str]:
    """Let each looker see the pictures that its store lacks. Returns what is wrong with those that cannot be used."""
    lacking = [[n for n, looker in enumerate(lookers) if looker.store.find(facts) is None] for facts in about]
    todo = [place for place, lack in enumerate(lacking) if lack]
    needed = sorted({n for lack in lacking for n in lack})
    for n in needed:
        lookers[n].wake()
    decoded = Decoded([pictures[place] for place in todo], [lacking[place] for place in todo],
                      {n: lookers[n].network.prepare for n in needed},
                      {n: set(lookers[n].store.row_of) for n in needed})
    loader = DataLoader(decoded, batch_size=min((BATCH[lookers[n].identity["kind"]] for n in needed), default=1),
                        num_workers=0 if len(todo) <= FEW else workers or min(8, os.cpu_count() or 1),
                        collate_fn=together, generator=torch.Generator())
    names, bad = " and ".join(lookers[n].identity["network"] for n in needed), {}
    bar = tqdm(total=len(todo), desc=f"{names} at the pictures", unit="picture", disable=not todo, dynamic_ncols=True)
    try:
        with bar:
            for items, prepared in loader:
                items = [(todo[place], key, message) for place, key, message in items]
                bad |= {place: message for place, _, message in items if message}
                for n in needed:
                    mine = [(key, about[place]) for place, key, message in items
                            if not message and n in lacking[place]]
                    keep(lookers[n], mine, *prepared.get(n, ([], {})))
                bar.update(len(items))
    except KeyboardInterrupt:
        print(f"stopped: {bar.n} of {len(todo)} pictures are done, the next start goes on from there")
        raise
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise BadInput("a process that decodes pictures was killed, perhaps for want of memory; what was computed is "
                       f"kept: go on with fewer, by --workers 1 ({str(error).splitlines()[0]})") from error
    finally:
        for n in needed:
            lookers[n].store.flush()
    return bad


class Decoded(Dataset):
    """What can be done in other processes: item i -> (i, digest, "", {n: prepared for looker n}), or (i, "", what is
    wrong with the picture, {}). known: the digests that a looker's store has, under another name perhaps."""

    def __init__(self, pictures: list, lacking: list[list[int]], prepare: dict[int, Callable], known: dict[int, set]):
        self.pictures, self.lacking, self.prepare, self.known = pictures, lacking, prepare, known

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> tuple[int, str, str, dict]:
        picture = self.pictures[i]
        try:
            content = picture.read_bytes() if isinstance(picture, Path) else picture.tobytes()
            key = digest(content)
            wanting = [n for n in self.lacking[i] if key not in self.known[n]]
            image = photos.read(picture, content) if wanting else None
            return i, key, "", {n: self.prepare[n](image) for n in wanting}
        except (BadInput, OSError, MemoryError) as error:
            return i, "", str(error) or f"{picture}: {type(error).__name__}", {}


def together(items: list[tuple]) -> tuple[list[tuple], dict]:
    """Items of `Decoded` -> their (i, digest, message), and for looker n the digests and stacked tensors of its own."""
    prepared = {}
    for n in {n for item in items for n in item[3]}:
        own = [(key, tensors[n]) for _, key, _, tensors in items if n in tensors]
        prepared[n] = [key for key, _ in own], {name: torch.stack([tensors[name] for _, tensors in own])
                                                for name in own[0][1]}
    return [item[:3] for item in items], prepared


def keep(looker: Looker, pictures: list[tuple[str, Facts]], keys: list[str], batch: dict[str, torch.Tensor]) -> None:
    """Look at those of a batch whose digests, `keys`, are new, and write down all `pictures` of the batch."""
    first = {key: place for place, key in reversed(list(enumerate(keys))) if looker.store.find(key) is None}
    chosen = sorted(first.values())
    values = looker.network.look({name: tensor[chosen] for name, tensor in batch.items()}) if chosen else {}
    looker.store.add(pictures, values)


def known(picture: Path | np.ndarray, root: Path) -> Facts:
    """What a picture is looked up by: a file by its name, size and time, pixels by themselves."""
    return facts(picture, root) if isinstance(picture, Path) else (digest(picture.tobytes()), picture.size, 0)


# ------------------------------------------------------------------------------------------------------- bad pictures


def leave_out(splits: dict[str, data.Split], bad: dict[str, dict[int, str]], skip: bool, cache: Path) -> None:
    """Report pictures that cannot be used, by name; with `skip` go on without them and their captions."""
    messages = [message for own in bad.values() for _, message in sorted(own.items())]
    if not messages:
        return
    path, total = cache / "bad_pictures.txt", sum(len(split.pictures) for split in splits.values())
    files.write_whole(path, lambda file: file.write("".join(f"{message}\n" for message in messages).encode()))
    told = f"{len(messages)} of {total} pictures cannot be used"
    if not skip:
        raise BadInput(f"{told}, the first is {messages[0]}; all are listed in {path}. Mend them, take them out of the "
                       "captions' file, or leave them out by --skip-bad; what was computed of the others is kept")
    print(f"{told} and are left out, listed in {path}")
    for name, split in splits.items():
        good = np.array([row not in bad[name] for row in range(len(split.pictures))])
        if not good.any():
            raise BadInput(f"no picture of split {name} can be used, see {path}")
        split.keep(good)


def check_guided(splits: dict[str, data.Split], bad: dict[str, dict[int, str]]) -> None:
    """Raises BadInput where features are there and pictures are not, which only --guide clip wants."""
    for name, own in bad.items():
        if own:
            row = min(own)
            raise BadInput(
                f"--guide clip needs the pictures, and {len(own)} of {len(splits[name].pictures)} of split {name} have "
                f"none, the first is image {row} ({splits[name].image_names[row]}). Put the pictures, and "
                f"dataset_*.json that names them, into --data-root, or use --guide self")
