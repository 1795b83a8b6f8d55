"""From pictures to features, for the splits and settings of a run.

Both papers take their region features from files. `prepare` computes them from pictures for splits that have none, and
with --guide clip it also gives all splits their CLIP embeddings. The work itself is done in `sources/extract.py`.
"""
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import data
from harness import models
from harness.settings import Settings
from sources import layouts, networks, photos
from sources.extract import Cache, check_same, fill
from sources.features import InMemory, OneArray, Stored
from sources.files import BadInput, check_folder


def prepare(splits: dict[str, data.Split], settings: Settings, folder: Path, device: torch.device | str = "cpu",
            workers: int | None = None, wanted: dict | None = None) -> dict:
    """Give splits without features theirs and, with --guide clip, all splits their CLIP embeddings `clip` [N, E].

    folder: for the cache, if the settings name none and the data's folder cannot be written. workers: processes that
    decode pictures (None: one a core, at most 8). wanted: what this function returned when the model was trained. With
    it a network is loaded only if a picture is missing from the cache, and another network is refused.

    Returns {"regions": identity, "clip": identity or None}, which tell what the features were computed by. Raises
    BadInput if a network cannot be loaded, if pictures cannot be used (--skip-bad leaves these out), and if an image
    has another number of regions than --fixed-regions says.
    """
    wanted, cache = wanted or {}, cache_folder(settings, folder)
    root = Path(settings.run.data_root or folder)
    from_pictures = any(split.features is None for split in splits.values())
    makers = makers_of_networks(settings, device)
    caches = {}
    if from_pictures:
        caches["regions"] = Cache(makers["regions"], cache, wanted.get("regions"), settings.pictures.feature_dtype)
    if settings.enhancement.guide == "clip":
        caches["clip"] = Cache(makers["clip"], cache, wanted.get("clip"))
    scenes = settings.run.dataset == "scenes"
    found = {"regions": networks.SceneWindows.identity if scenes else {"kind": "files"}, "clip": None}
    found |= {name: each.identity for name, each in caches.items()}
    if not caches:
        check_regions(splits, settings)
        return found

    bad = {name: {} for name in splits}  # of each split, row -> what is wrong with its picture
    images = []                          # (split, row) of the pictures that are there
    for name, split in splits.items():
        for row, picture in enumerate(split.pictures):
            if picture is None:
                bad[name][row] = f"{split.image_names[row]}: no such picture in {root} or its usual subfolders"
            else:
                images.append((name, row))
    if not from_pictures:
        check_guided(splits, bad)
    rows, errors = fill([splits[name].pictures[row] for name, row in images], root, caches, workers)
    for place, message in errors.items():
        name, row = images[place]
        bad[name][row] = message
    leave_out(splits, bad, settings.pictures.skip_bad, from_pictures, cache)
    for name, split in splits.items():
        good = [place for place, (of, row) in enumerate(images) if of == name and row not in bad[name]]
        if "regions" in caches:
            split.features = Stored(caches["regions"].store, rows["regions"][good])
        if "clip" in caches:
            split.clip = caches["clip"].store.read("clip", rows["clip"][good])
    check_regions(splits, settings)
    return found


def check_regions(splits: dict[str, data.Split], settings: Settings) -> None:
    """Raises BadInput if an image has another number of regions than --fixed-regions says."""
    wanted = settings.enhancement.fixed_regions
    if wanted == 0:  # any number will do
        return
    for name, split in splits.items():
        alike = isinstance(split.features, (InMemory, OneArray))  # then all images have as many as the first
        for row in range(1 if alike else len(split.features)):
            found = split.features.read([row])[0].shape[1]
            if found != wanted:
                raise BadInput(f"--fixed-regions {wanted}: image {row} of {name} has {found} regions; 0 takes any "
                               "number of them")


def of_folder(settings: Settings, run: Path, device: torch.device | str, workers: int | None, wanted: dict
              ) -> data.Split:
    """A split of all pictures in the folder --data-root, without captions. The arguments are those of `prepare`.

    Raises BadInput if a run's regions came from files, since then it is not known what computed them.
    """
    if wanted["regions"]["kind"] == "files":
        raise BadInput(f"{run} was trained on feature files, and what computed them is not known: --images needs "
                       "a run that was trained on pictures, by --regions detector, grid or clip")
    root = Path(settings.run.data_root)
    found = photos.listed(root)
    names = [picture.relative_to(root).as_posix() for picture in found]
    split = data.Split("images", [], np.zeros(0, np.int64), None, names, found)
    prepare({"images": split}, settings, run, device, workers, wanted)
    return split


def one(picture: Path | np.ndarray, settings: Settings, device: torch.device | str, wanted: dict) -> data.Split:
    """A split of one picture without captions. Nothing is read from the cache or written to it.

    Raises BadInput if the picture cannot be read, and if it has another number of regions than --fixed-regions says.
    """
    split = data.Split("query", [], np.zeros(0, np.int64), None, [str(picture)], [picture])
    image = photos.read(picture)
    for name, make in makers_of_networks(settings, device).items():
        network = make()
        check_same(wanted[name], network.identity)
        seen = network.look({key: value[None] for key, value in network.prepare(image).items()})
        if name == "clip":
            split.clip = seen["clip"]
        else:
            count = int(seen["count"][0])
            split.features = InMemory(str(picture), seen["regions"][:, :count], seen["boxes"][:, :count])
    check_regions({split.name: split}, settings)
    return split


def kind(settings: Settings, splits: dict[str, data.Split], device: torch.device) -> str:
    """What --regions auto means for these splits: "files", or a network if a split has no features; it is printed.

    On a GPU it is the detector, whose regions are the papers' kind. On a CPU it is the grid, which is faster.
    """
    if settings.pictures.regions != "auto" or settings.run.dataset == "scenes":
        return settings.pictures.regions
    if splits and all(split.features is not None for split in splits.values()):
        return "files"
    chosen, other = ("detector", "grid") if device.type == "cuda" else ("grid", "detector")
    reason = "there is a GPU" if device.type == "cuda" else "there is no GPU, and a detector would take much longer"
    print(f"regions come from a {chosen}, because {reason}; --regions {other} changes that")
    return chosen


def fetch_models(settings: Settings) -> None:
    """Load the text encoder and the networks that a run would take, so that it needs no network later.

    Whether the machine that trains will have a GPU is not known here: for --regions auto, the default detector and the
    default grid are both fetched. Raises BadInput if something cannot be had.
    """
    models.text_encoder(settings)
    dataset, root, of = settings.run.dataset, settings.run.data_root, settings.pictures
    features = dataset == "scenes" or bool(root) and layouts.has_features(dataset, Path(root))
    kinds = [] if of.regions == "files" or of.regions == "auto" and features else [of.regions]
    if kinds == ["auto"]:
        named = of.region_network or of.region_weights
        kinds = [kind(settings, {}, models.resolve("auto", "auto")[0])] if named else ["detector", "grid"]
    for each in kinds:
        regions_network(replace(settings, pictures=replace(of, regions=each)), "cpu")
    if settings.enhancement.guide == "clip":
        networks.Clip(settings.enhancement.clip_model)


def makers_of_networks(settings: Settings, device: torch.device | str) -> dict[str, Callable]:
    """Functions that load the networks: "regions", and "clip" with --guide clip."""
    makers = {"regions": partial(regions_network, settings, device)}
    if settings.enhancement.guide == "clip":
        makers["clip"] = partial(networks.Clip, settings.enhancement.clip_model, device)
    return makers


def regions_network(settings: Settings, device: torch.device | str):
    of = settings.pictures
    return networks.regions_network(of.regions, of.region_network, of.region_weights, of.boxes, of.picture_side,
                                    settings.enhancement.clip_model, device)


def cache_folder(settings: Settings, folder: Path) -> Path:
    """Where the stores lie: --cache, else DATA_ROOT/cache if it is there or can be made, else `folder`/cache."""
    if settings.pictures.cache:
        return Path(settings.pictures.cache)
    root = settings.run.data_root
    if root and Path(root).is_dir():
        if (Path(root) / "cache").is_dir():
            return Path(root) / "cache"
        with suppress(BadInput):
            check_folder(Path(root))
            return Path(root) / "cache"
    return folder / "cache"


def leave_out(splits: dict[str, data.Split], bad: dict[str, dict[int, str]], skip: bool, from_pictures: bool,
              cache: Path) -> None:
    """Report the pictures that cannot be used. With `skip`, go on without them and their captions.

    That works if the features come `from_pictures`. Files of features have a row for each picture. Raises BadInput if
    there are such pictures and they may not be left out, or if fewer than two of train, or none of another split, are
    left.
    """
    messages = [message for of_split in bad.values() for _, message in sorted(of_split.items())]
    if not messages:
        return
    path, total = cache / "bad_pictures.txt", sum(len(split.pictures) for split in splits.values())
    cache.mkdir(parents=True, exist_ok=True)
    content = "".join(f"{message}\n" for message in messages)
    path.write_bytes(content.encode(errors="surrogateescape"))  # several GPUs may all write it at once
    report = f"{len(messages)} of {total} pictures cannot be used"
    if not (skip and from_pictures):
        way = "remove them from the data, or leave them out by --skip-bad" if from_pictures else "or take --guide self"
        raise BadInput(f"{report}, the first is {messages[0]}. All are listed in {path}. Repair them, {way}. "
                       "What was computed for the others is kept")
    print(f"{report} and are left out, listed in {path}", file=sys.stderr)
    for name, split in splits.items():
        good = np.array([row not in bad[name] for row in range(len(split.pictures))])
        if good.sum() < (needed := 2 if name == "train" else 1):
            raise BadInput(f"{good.sum()} of split {name}'s pictures can be used, expected {needed} or more: {path}")
        split.keep(good)


def check_guided(splits: dict[str, data.Split], missing: dict[str, dict[int, str]]) -> None:
    """Raises BadInput if the features come from files and pictures are missing, which --guide clip needs."""
    for name, of_split in missing.items():
        if of_split:
            row = min(of_split)
            raise BadInput(
                f"--guide clip needs the pictures, but {len(of_split)} of {len(splits[name].pictures)} of split {name} "
                f"are missing, the first is image {row} ({splits[name].image_names[row]}). Put the pictures, and the "
                f"dataset_*.json that names them, into --data-root, or let --fetch-only do so, or use --guide self")
