"""Fetch Flickr30K, MSCOCO and Flickr8K into a folder: their pictures, with Karpathy's captions and splits beside them.

What is there is used, what is missing is fetched. `huggingface_hub` and `torch.hub` carry the bytes. Each file is
checked, unpacked and deleted before the next one is fetched. Whatever is not finished lies in `.fetching-DATASET`, a
folder that is removed at the end. So a fetch that was killed goes on with what is whole, and nobody trains on half a
dataset.
"""
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from sources import annotations, archives, hub, photos
from sources.annotations import Entry
from sources.download import FULL, HUB, Address, check, download
from sources.files import BadInput, locked, replace, write_whole


class Dataset(NamedTuple):
    captions: list[Address]  # if the first address fails, the next is tried
    pictures: dict[str, list[Address]]  # how the names of an archive's pictures begin -> the addresses of the archive
    counts: dict[str, int]  # images of each split


FLICKR30K = f"{HUB}/nlphuji/flickr30k/resolve/2b239befc81b6e3f035ce6bd52f5f4d60f5625f7"
FLICKR30K_ZIP = (4_390_240_817, "2ce2420c0d17f0531deaa89ac657b4d5067ec519da16ff1ea12acbf5619c7391")
COCO = f"{HUB}/GAIA-URJC/COCO_2014/resolve/c5a78cb5cc1bff1dc0a70fbb10896c9b768ba5e8"
COCO_TRAIN_ZIP = (13_510_573_713, "ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775")
COCO_VAL_ZIP = (6_645_013_297, "fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0")
FLICKR8K = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k"
KARPATHY = Address(  # Karpathy's captions of all three datasets
    f"{HUB}/gpantaz/karpathy_split/resolve/6d16916e8b915bd0a55bd1b7ba31ad0bd50b1160/caption_datasets.zip",
    36_745_453, "4cfd70132527b80933105e5829dc9034eaab9573482e2e680abbab6130244817")
SOURCES = {
    "flickr30k": Dataset(
        [Address(f"{FLICKR30K}/flickr_annotations_30k.csv", 12_896_305,
                 "395990db603ab8bafd5c7ab2746b22058bb1e75b78b3eb56ad755931364ac137"), KARPATHY],
        {"": [Address(f"{FLICKR30K}/flickr30k-images.zip", *FLICKR30K_ZIP),
              Address(f"{HUB}/TPagent/Flickr30k/resolve/main/flickr30k-images.zip", *FLICKR30K_ZIP)]},
        {"train": 29_000, "val": 1_014, "test": 1_000}),
    "coco": Dataset(
        [Address(f"{HUB}/openflamingo/eval_benchmark/resolve/7da41986ce0fa2864509b7585c277cde45910af5/"
                 "dataset_coco.json", 144_186_139), KARPATHY],
        {"COCO_train2014_": [Address(f"{COCO}/train2014.zip", *COCO_TRAIN_ZIP),
                             Address("http://images.cocodataset.org/zips/train2014.zip", *COCO_TRAIN_ZIP)],
         "COCO_val2014_": [Address(f"{COCO}/val2014.zip", *COCO_VAL_ZIP),
                           Address("http://images.cocodataset.org/zips/val2014.zip", *COCO_VAL_ZIP)]},
        {"train": 113_287, "val": 5_000, "test": 5_000}),
    "flickr8k": Dataset(
        [Address(f"{FLICKR8K}/Flickr8k_text.zip", 2_300_000, "bf6c1abcb8e4a833b7f922104de18627"), KARPATHY],
        {"": [Address(f"{FLICKR8K}/Flickr8k_Dataset.zip", 1_115_000_000, "f18a1e2920de5bd84dae7cf08ec78978"),
              Address(f"{HUB}/shivangibithel/Flickr8k/resolve/72fe4a741e11575c28b9f415f4d23c82bf7a7e35/Images.zip",
                      1_112_428_992, "497c137eaf599f85c8cc3fd71202c220f1299a19c05351d112ec8cc99c33252f")]},
        {"train": 6_000, "val": 1_000, "test": 1_000}),
}
TERMS = ("The pictures belong to the people who took them and stay under the terms of Flickr: use them for research, "
         "and do not pass them on.")


class Part(NamedTuple):
    """A file that is still to be fetched."""

    start: str | None  # how the names of its pictures begin; None: it holds the captions
    addresses: list[Address]
    share: float  # how much of it is still to be unpacked, 0 to 1


def work_of(dataset: str, root: Path) -> Path:
    """The folder in `root` of what is not finished. Each dataset has its own, since several may share a root."""
    return root / f".fetching-{dataset}"


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free


def finished(dataset: str, root: Path) -> bool:
    """Whether `root` has the captions and pictures of the dataset, with no archive and no broken fetch beside them.

    This is a quick look: one of the pictures that the start of the JSON names is enough, and one of each archive.
    """
    path = annotations.find(root, f"dataset_{dataset}.json")
    zips = [root / address.name for addresses in SOURCES[dataset].pictures.values() for address in addresses]
    if path is None or any(unfinished.exists() for unfinished in (work_of(dataset, root), *zips)):
        return False
    with open(path, "rb") as file:
        start = file.read(100_000).decode(errors="replace")
    names = set(re.findall(r'"filename": *"([^"/\\]+)"', start))
    # (rglob would not look into a folder that is a link.)
    there = {path.name for pattern in ("*", "*/*", "*/*/*") for path in root.glob(pattern)}
    each = all(any(name.startswith(start) for name in there) for start in SOURCES[dataset].pictures)
    return each and (not names or not names.isdisjoint(there))


def fetch(dataset: str, root: Path, source: Dataset | None = None, quiet: bool = False) -> None:
    """Bring a dataset into the folder `root`, and check that it is whole.

    Afterwards `root` has dataset_<name>.json and every picture that it names. It says first, on standard error, what it
    is going to do. source: where the dataset comes from, by default what `SOURCES` says. Raises BadInput if the disk is
    too small, if there is no network, or if what was fetched is not the dataset.
    """
    source = source or SOURCES[dataset]
    entries, parts = plan(dataset, root, source)
    work = work_of(dataset, root)
    if parts:
        announce(dataset, root, parts, free_bytes(root), quiet)
        reached = within_reach(work, parts)
        work.mkdir(parents=True, exist_ok=True)
        try:
            with locked(work):
                tidy(work, source)
                for part in parts:
                    if part.start is None:
                        get(work, part, reached, quiet, partial(save_captions, dataset, root, source))
                        entries = read(dataset, root, source)
                    elif wanted := missing(root, entries, part.start):
                        get(work, part, reached, quiet, partial(archives.unpack, wanted=wanted, quiet=quiet))
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise BadInput(f"{root}: the disk is full; make room and start again, what is whole is kept") from error
    lost = missing(root, entries, "")
    if lost:
        raise BadInput(f"{root}: {len(lost)} pictures of dataset_{dataset}.json are missing, the first is {min(lost)}")
    shutil.rmtree(work, ignore_errors=True)
    if not quiet:
        say(f"{dataset} is whole in {root}: " + ", ".join(f"{count:,} {name}" for name, count in source.counts.items()))


def check_network(dataset: str, root: Path) -> None:
    """Raises BadInput, with what to do, if something is missing in `root` and no address that has it can be reached."""
    if parts := plan(dataset, root, SOURCES[dataset])[1]:
        within_reach(work_of(dataset, root), parts)


def plan(dataset: str, root: Path, source: Dataset) -> tuple[list[Entry], list[Part]]:
    """The captions that are in `root`, none if there are none, and the files that are still to be fetched."""
    entries = read(dataset, root, source)
    parts = [] if entries else [Part(None, source.captions, 1)]
    for start, addresses in source.pictures.items():
        share = len(missing(root, entries, start)) / max(1, len(named(entries, start))) if entries else 1
        parts += [Part(start, addresses, share)] if share else []
    return entries, parts


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def human(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def read(dataset: str, root: Path, source: Dataset) -> list[Entry]:
    """The captions that are in `root`, checked; an empty list if there are none."""
    path = annotations.find(root, f"dataset_{dataset}.json")
    return checked(path, source.counts) if path else []


def checked(path: Path, counts: dict[str, int]) -> list[Entry]:
    """Read Karpathy's JSON.

    Raises BadInput if a split has another number of images, or if an image has fewer than five captions.
    """
    entries = annotations.read_karpathy(path)
    found = Counter(entry.split for entry in entries)
    if found != counts:
        raise BadInput(f"{path}: found {', '.join(f'{found[name]:,} {name}' for name in counts)} images, expected "
                       f"{', '.join(f'{count:,} {name}' for name, count in counts.items())}")
    few = next((entry for entry in entries if len(entry.captions) < 5), None)
    if few:
        raise BadInput(f"{few.where}: {few.file[1]} has {len(few.captions)} captions, expected five or more")
    return entries


def named(entries: list[Entry], start: str) -> list[tuple[str, str]]:
    """Folder and file name of the pictures whose names begin with `start`."""
    return [entry.file for entry in entries if entry.file[1].startswith(start)]


def missing(root: Path, entries: list[Entry], start: str) -> dict[str, Path]:
    """The pictures of `named` that are missing or empty: the name of the file -> where it belongs."""
    files = named(entries, start)
    return {name: path or root / (folder or "images") / name
            for (folder, name), path in zip(files, photos.find(root, files), strict=True)
            if path is None or path.stat().st_size == 0}


def place(work: Path, number: int, address: Address) -> Path:
    """Where the file of a part's address `number` lies: beside `work` if the user has put it there, else in `work`."""
    own = work.parent / address.name
    return own if own.is_file() else work / str(number) / address.name


def is_there(work: Path, part: Part) -> bool:
    return any(place(work, number, address).is_file() for number, address in enumerate(part.addresses))


def announce(dataset: str, root: Path, parts: list[Part], free: int, quiet: bool) -> None:
    """Say what will be fetched, and how much disk that takes. Raises BadInput if less than that is free."""
    lines, unpacked, most = [f"{dataset} goes to {root}. To be fetched:"], 0, 0
    for part in parts:
        size = part.addresses[0].size
        unpacked += 1.03 * size * part.share  # a disk is filled in whole blocks
        there = is_there(work_of(dataset, root), part)
        most = max(most, unpacked + (0 if there else size))
        first = "is there" if there else human(size)
        lines += [f"{'or' if number else first:>10}  {address.url}" for number, address in enumerate(part.addresses)]
    if not quiet:
        say("\n".join(lines))
        say(f"This takes {human(most)} of disk at its peak, {human(unpacked)} in the end. {human(free)} are free.")
        say(TERMS)
    if most > free:
        raise BadInput(f"{root}: fetching {dataset} takes {human(most)} of disk at its peak, but {human(free)} are "
                       "free. Make room, or name a folder on a larger disk by --data-root")


def within_reach(work: Path, parts: list[Part]) -> dict[str, bool]:
    """Which addresses can be reached, found out in two seconds. Raises BadInput if a part has none that can."""
    hosts = {urlsplit(address.url).netloc: "" if address.url.startswith(HUB) else address.url
             for part in parts for address in part.addresses}  # "" stands for the hub
    with ThreadPoolExecutor() as pool:
        answers = dict(zip(hosts, pool.map(hub.within_reach, hosts.values()), strict=True))
    reached = {address.url: answers[urlsplit(address.url).netloc] for part in parts for address in part.addresses}
    lost = [part for part in parts
            if not is_there(work, part) and not any(reached[address.url] for address in part.addresses)]
    if lost:
        files = [f"{human(part.addresses[0].size)} from " + " or ".join(address.url for address in part.addresses)
                 for part in lost]
        raise BadInput(f"there is no network: {' and '.join(host for host in hosts if not answers[host])} cannot be "
                       f"reached. Fetch on another machine: {'; '.join(files)}. Put these files into {work.parent} as "
                       "they are, and start again. HF_ENDPOINT can name a mirror of the hub. --dataset scenes and "
                       "--dataset folder need no network")
    return reached


def tidy(work: Path, source: Dataset) -> None:
    """Delete what an earlier fetch has left half done."""
    whole = {place(work, number, address) for addresses in (source.captions, *source.pictures.values())
             for number, address in enumerate(addresses)}
    for path in work.rglob("*"):
        if path.is_file() and path not in whole and path.name != ".lock":
            path.unlink()


def get(work: Path, part: Part, reached: dict[str, bool], quiet: bool, use: Callable[[Path], None]) -> None:
    """Fetch a part from the first address that has it, check it, call use(path), and delete it.

    A file that is there already is tried first; one that the user has put there is not deleted. Raises BadInput with
    the reason for each address if all fail.
    """
    failures = []
    addresses = sorted(enumerate(part.addresses), key=lambda pair: not place(work, *pair).is_file())
    for number, address in addresses:
        path = place(work, number, address)
        try:
            if not path.is_file():
                if not reached[address.url]:
                    raise BadInput("it cannot be reached")
                download(address, path, quiet)
            if not quiet:
                say(f"checking {address.name}")
            check(path, address)
            use(path)
        except BadInput as error:
            if path.parent == work.parent:
                raise BadInput(f"{path}: {error}. Remove this file, and it will be fetched") from error
            path.unlink(missing_ok=True)
            failures.append(f"{address.url}: {error}")
            continue
        if path.parent != work.parent:
            path.unlink(missing_ok=True)
        return
    raise BadInput(f"{part.addresses[0].name} was not fetched. {'; '.join(failures)}. Start again to try once more, or "
                   f"bring one of these files by other means and put it into {work.parent}")


def save_captions(dataset: str, root: Path, source: Dataset, path: Path) -> None:
    """Write root/dataset_<name>.json from a file of captions. Raises BadInput if that does not hold the dataset."""
    name = f"dataset_{dataset}.json"
    made = work_of(dataset, root) / name
    write_whole(made, lambda file: file.write(archives.karpathy_json(path, name)))
    checked(made, source.counts)
    replace(made, root / name)
