"""Fetch SCAN's region features of Flickr30K and MSCOCO by kagglehub: the ones behind the tables of the papers."""
import os
import shutil
import sys
from pathlib import Path

from sources import hub
from sources.fetch import free_bytes, human, say
from sources.files import BadInput, locked
from sources.layouts import PRECOMP

HANDLE = "kuanghueilee/scan-features"  # on kaggle.com
IMAGES = {"flickr30k": {"test": 1_000, "dev": 1_014, "train": 29_000},
          "coco": {"testall": 5_000, "dev": 5_000, "train": 113_287}}
AN_IMAGE = 36 * 2048 * 4  # bytes: 36 regions of 2048 numbers


def fetch_scan_features(dataset: str, root: Path, quiet: bool = False) -> None:
    """Bring _ims.npy and _caps.txt of each split into root/f30k_precomp or root/coco_precomp.

    kagglehub goes on where it was if it is stopped. The files move to their place when all are there. Raises BadInput
    if there are no such features, if kagglehub is not installed, if the disk is too small, or if the transfer fails.
    """
    if dataset not in IMAGES:
        raise BadInput(f"--regions files: SCAN has features for {' and '.join(IMAGES)}, not for {dataset}; "
                       "--regions auto computes some from the pictures")
    folder, work = root / PRECOMP[dataset], root / f".fetching-features-{dataset}"
    wanted = {f"{split}_{kind}": images * AN_IMAGE if kind == "ims.npy" else 0
              for split, images in IMAGES[dataset].items() for kind in ("ims.npy", "caps.txt")
              if not (folder / f"{split}_{kind}").is_file()}
    if not wanted:
        return
    need, there = sum(wanted.values()), free_bytes(root)
    about = (f"SCAN's region features from kaggle.com/datasets/{HANDLE}, {human(need)}: 36 regions per image, as in "
             "the papers' tables, without boxes")
    try:
        import kagglehub
    except ImportError:
        raise BadInput(f"{folder}: missing. Run `{sys.executable} -m pip install kagglehub` and start again, which "
                       f"fetches {about}. Or put {', '.join(wanted)} there yourself") from None
    if not quiet:
        say(f"fetching {about}, into {folder}; {human(there)} of disk are free")
    rest = need - sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    if rest > there:
        raise BadInput(f"{folder}: the features take {human(rest)} of disk, but {human(there)} are free")
    if not hub.within_reach("https://www.kaggle.com"):
        raise BadInput(f"there is no network: kaggle.com cannot be reached. Fetch {', '.join(wanted)} on another "
                       f"machine and put them into {folder}. They are {about}")
    with locked(work):
        before = os.environ.get("KAGGLEHUB_CACHE")
        os.environ["KAGGLEHUB_CACHE"] = str(work.absolute())  # on the same disk, so that a move costs nothing
        try:
            found = [Path(kagglehub.dataset_download(HANDLE, path=f"data/data/{folder.name}/{name}"))
                     for name in wanted]
        except Exception as error:  # kagglehub raises many kinds
            raise BadInput(f"{folder}: the transfer from kaggle.com failed: {' '.join(str(error).split())}. Start "
                           "again, and it goes on where it was") from error
        finally:
            os.environ.pop("KAGGLEHUB_CACHE")
            os.environ.update({} if before is None else {"KAGGLEHUB_CACHE": before})
        if folder.exists():
            for path in found:
                os.replace(path, folder / path.name)
        else:  # all at once: a folder with half of the features would be taken for one that has them
            os.replace(found[0].parent, folder)
    shutil.rmtree(work, ignore_errors=True)
