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
    computed = features and settings.pictures.regions in ("auto", "files")
    for name, why in without_effect(settings, computed).items():
        if given[name] is not None:
            print(f"warning: {settings_.flag(name)} has no effect with {why}", file=sys.stderr)
    if dataset in fetch.SOURCES and not options.print_settings and are_wanted(settings, root, features):
        fetch.check_network(dataset, root)


def without_effect(settings: Settings, computed: bool) -> dict[str, str]:
    """Setting -> what makes it useless beside the others. computed: the regions' features are there already."""
    run, guide, regions = settings.run, settings.enhancement.guide, settings.pictures.regions
    copy = settings.momentum.keep == "momentum" or run.model != "tgdt" and settings.momentum.queue > 0
    found = {}
    for useless, why, names in (
        (run.dataset != "folder", f"--dataset {run.dataset}", "split_seed"),
        ("clip" not in (guide, regions), f"--guide {guide} and --regions {regions}", "clip_model"),
        (regions == "clip", "--regions clip", "boxes region_network region_weights picture_side"),
        (computed, "features that are computed already",
         "boxes region_network region_weights picture_side feature_dtype"),
        (guide != "self", f"--guide {guide}", "guide_dropout"),
        (guide == "none", "--guide none", "sharpness"),
        (settings.infonce.infonce_weight == 0, "--infonce-weight 0", "temperature"),
        (not copy, "--keep model" + (" and --queue 0" if run.model != "tgdt" else ""), "momentum"),
        (settings.training.schedule != "step", f"--schedule {settings.training.schedule}", "drop_every"),
        (True, f"--model {run.model}", settings_.WITHOUT[run.model]),
    ):
        if useless:
            found |= dict.fromkeys(names.split(), why)
    return found


def find_data(settings: Settings, check: bool, quiet: bool) -> None:
    """Decide where the data lives, by default in data/<dataset>, and fetch what is missing of a published dataset.

    What the folder has is used as it is. check=True (--fetch-only) also fetches and checks pictures that a run would
    not need, except with --regions files. Raises BadInput if the dataset has no files to fetch or to find, or if
    fetching fails.
    """
    dataset = settings.run.dataset
    if dataset not in fetch.SOURCES:
        if check and settings.text.text_encoder == "from-scratch":
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
