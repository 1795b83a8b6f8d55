"""Find the data of a run, and fetch what is missing of a published dataset.

Nothing here imports torch, so that without a network the message comes at once.
"""
import sys
from argparse import Namespace
from pathlib import Path

from harness import settings as settings_
from harness.settings import Settings
from sources import fetch, layouts, scan_features
from sources.files import BadInput


def first_look(given: dict, options: Namespace) -> None:
    """Warn of flags that have no effect.

    Raises BadInput if pictures or captions are missing and no address that has them can be reached.
    """
    if options.resume:  # nothing is fetched, and the flags are compared with that run's settings
        return
    settings = settings_.make(given)
    dataset, root = settings.run.dataset, data_root(settings)
    features = dataset == "scenes" or dataset in fetch.SOURCES and layouts.has_features(dataset, root)
    useless = dict.fromkeys(settings_.WITHOUT[settings.run.model].split(), f"--model {settings.run.model}")
    if features and settings.pictures.regions in ("auto", "files"):
        useless |= dict.fromkeys(settings_.OF_PICTURES.split(), "features that are computed already")
    for name, why in useless.items():
        if given[name] is not None:
            print(f"warning: {settings_.flag(name)} has no effect with {why}", file=sys.stderr)
    if dataset in fetch.SOURCES and not options.print_settings and are_wanted(settings, root, features):
        fetch.check_network(dataset, root)


def find_data(settings: Settings, check: bool, quiet: bool) -> None:
    """Decide where the data lives, by default in data/<dataset>, and fetch what is missing of a published dataset.

    What the folder has is used as it is. check=True (--fetch-only) also fetches and checks pictures that a run would
    not need, except with --regions files. Raises BadInput if the dataset has no files to fetch or to find, or if
    fetching fails.
    """
    dataset = settings.run.dataset
    if dataset not in fetch.SOURCES:
        if check:
            raise BadInput(f"--fetch-only: --dataset {dataset} has nothing to fetch")
        if dataset == "scenes" and settings.run.data_root:
            raise BadInput(f"--data-root {settings.run.data_root}: the built-in scenes have no files; give --dataset "
                           "folder, flickr8k, flickr30k or coco")
        return
    root = data_root(settings)
    settings.run.data_root = str(root)
    regions, features = settings.pictures.regions, layouts.has_features(dataset, root)
    begun = dataset in scan_features.IMAGES and (root / layouts.PRECOMP[dataset]).is_dir()
    if regions == "files" and (check and begun or not features and (check or dataset in scan_features.IMAGES)):
        scan_features.fetch_scan_features(dataset, root, quiet)
        features = True
    wanted = are_wanted(settings, root, features)
    if wanted and features and regions in ("auto", "files") and not quiet:
        fetch.say("--guide clip looks at the pictures, so they are fetched as well")
    if wanted or check and regions != "files":
        fetch.fetch(dataset, root, quiet=quiet)


def data_root(settings: Settings) -> Path:
    return Path(settings.run.data_root or Path("data", settings.run.dataset).absolute())


def are_wanted(settings: Settings, root: Path, features: bool) -> bool:
    """Whether a run needs pictures that are not there yet. features: whether the folder has files of features."""
    dataset, regions = settings.run.dataset, settings.pictures.regions
    enough = regions == "files" or regions == "auto" and features
    if enough and settings.enhancement.guide != "clip":
        return False
    return not fetch.finished(dataset, root) and not (enough and have_pictures(dataset, root))


def have_pictures(dataset: str, root: Path) -> bool:
    """Whether pictures lie beside the files of features in a folder, and no fetch of them was broken off."""
    try:
        found = [] if fetch.work_of(dataset, root).exists() else layouts.read(dataset, root, regions="files").values()
    except BadInput:  # a fetch may bring what is missing; if not, loading the data says what is wrong
        return False
    return any(picture for listing in found for picture in listing.pictures)
