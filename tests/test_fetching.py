"""From nothing to a dataset: files put there by hand are checked and unpacked; without a network one line helps."""
import csv
import json
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
import train
from sources import fetch
from sources.download import Address
from sources.files import BadInput

COUNTS = {"train": 3, "val": 1, "test": 1}


def put_by_hand(root: Path, pictures: int = 5, escape: bool = False) -> fetch.Dataset:
    """Flickr30K's two files as their addresses have them, small, in `root`; returns where they are said to be from."""
    root.mkdir(parents=True)
    with open(root / "flickr_annotations_30k.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["raw", "sentids", "split", "filename", "img_id"])
        for row, split in enumerate(["train", "train", "train", "val", "test"]):
            captions = [f"caption {row} {i}, with a comma" for i in range(5)]
            writer.writerow([json.dumps(captions), json.dumps(list(range(5))), split, f"{row}.jpg", row])
    with zipfile.ZipFile(root / "flickr30k-images.zip", "w") as archive:
        for row in range(pictures):
            pixels = np.random.default_rng(row).integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "one.jpg")
            archive.write(root / "one.jpg", f"flickr30k-images/{'../../' if escape and row == 2 else ''}{row}.jpg")
            archive.writestr(f"__MACOSX/flickr30k-images/._{row}.jpg", b"no picture")
        (root / "one.jpg").unlink()
    sizes = {name: (root / name).stat().st_size for name in ("flickr_annotations_30k.csv", "flickr30k-images.zip")}
    table, images = (Address(f"http://127.0.0.1:9/{name}", size) for name, size in sizes.items())
    return fetch.Dataset([table], {"": [images]}, COUNTS)


def test_files_that_were_put_there_by_hand_are_enough(tmp_path):
    root = tmp_path / "flickr30k"
    fetch.fetch("flickr30k", root, put_by_hand(root), quiet=True)
    splits = data.load("flickr30k", root)
    assert {name: len(split.pictures) for name, split in splits.items()} == COUNTS
    assert splits["train"].captions[:2] == ["caption 0 0, with a comma", "caption 0 1, with a comma"]
    assert splits["test"].picture(0).size == (20, 20) and fetch.finished("flickr30k", root)


def test_an_archive_that_lacks_a_picture_is_no_dataset(tmp_path):
    root = tmp_path / "flickr30k"
    with pytest.raises(BadInput, match="flickr30k"):
        fetch.fetch("flickr30k", root, put_by_hand(root, pictures=4), quiet=True)
    assert not fetch.finished("flickr30k", root) or not (root / "images" / "4.jpg").exists()


def test_no_path_leaves_the_folder(tmp_path):
    root = tmp_path / "deep" / "er" / "flickr30k"
    before = {path for path in tmp_path.rglob("*.jpg")}
    try:
        fetch.fetch("flickr30k", root, put_by_hand(root, escape=True), quiet=True)
    except BadInput:
        pass
    assert all(root in path.parents for path in set(tmp_path.rglob("*.jpg")) - before)


def test_a_disk_that_is_too_small_is_refused(tmp_path):
    root = tmp_path / "flickr30k"
    with pytest.raises(BadInput, match="of disk at its peak"):
        fetch.fetch("flickr30k", root, put_by_hand(root), quiet=True, free=lambda folder: 10)


def test_without_a_network_the_command_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    start = time.perf_counter()
    assert train.main(["--dataset", "flickr30k"]) == 2
    assert time.perf_counter() - start < 2.5
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ") and str(tmp_path / "data" / "flickr30k") in message
    assert "flickr30k-images.zip" in message and "4.4 GB" in message and "--dataset scenes" in message
    assert train.main(["--dataset", "scenes", "--fetch-only"]) == 2
    assert "is not fetched from anywhere" in capsys.readouterr().err
