"""The training command and a dataset that is not there: without a network one line says what to do."""
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import train
from harness import fetching, models, pictures, settings
from sources import fetch, hub, layouts, networks, scan_features
from sources.files import BadInput

ROOT = Path(__file__).parent.parent


def test_without_a_network_the_command_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    asked = []

    def refused(address: tuple, *rest: object, **more: object) -> None:
        asked.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", refused)
    assert train.main(["--dataset", "flickr30k"]) == 2 and asked == []  # so nobody waits for a connection
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ") and str(tmp_path / "data" / "flickr30k") in message
    assert "flickr30k-images.zip" in message and "4.4 GB" in message and "--dataset scenes" in message
    assert train.main(["--dataset", "scenes", "--fetch-only"]) == 2
    assert "has nothing to fetch" in capsys.readouterr().err
    assert train.main(["--data-root", "photos"]) == 2
    assert "the built-in scenes have no files; give --dataset folder" in capsys.readouterr().err
    assert train.main(["--dataset", "flickr8k", "--regions", "files", "--fetch-only"]) == 2
    assert "not for flickr8k" in capsys.readouterr().err


def test_the_message_comes_before_anything_slow_is_imported(tmp_path):
    child = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
sys.argv = ["train.py", "--dataset", "coco"]
try:
    runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
finally:
    print([name for name in ("torch", "transformers", "matplotlib") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", child], cwd=tmp_path, env={"HF_HUB_OFFLINE": "1"}, text=True,
                          capture_output=True)
    assert done.returncode == 2 and done.stdout == "[]\n"
    assert done.stderr.startswith("error: there is no network") and done.stderr.count("\n") == 1


def test_features_do_not_replace_the_pictures_that_clip_looks_at(root, monkeypatch, capsys):
    """A folder with SCAN's files alone is enough, until --guide clip asks for pictures: these are fetched then."""
    monkeypatch.setattr(hub, "within_reach", lambda address="": False)
    plain = {"dataset": "flickr8k", "data_root": str(root), "model": "user"}
    fetching.find_data(settings.make(plain), False, False)
    with pytest.raises(BadInput, match="Flickr8k_Dataset.zip"):
        fetching.find_data(settings.make(plain | {"guide": "clip"}), False, False)
    assert "--guide clip looks at the pictures" in capsys.readouterr().err
    monkeypatch.setattr(fetch, "finished", lambda dataset, folder: folder == root)  # now they are there
    fetching.find_data(settings.make(plain | {"guide": "clip"}), False, False)
    assert capsys.readouterr().err == ""


def test_fetch_only_completes_a_folder_with_some_features(tmp_path, monkeypatch):
    (tmp_path / "f30k_precomp").mkdir()
    (tmp_path / "f30k_precomp" / "test_caps.txt").write_text("a dog\n" * 5)
    asked = []
    monkeypatch.setattr(scan_features, "fetch_scan_features", lambda dataset, *others: asked.append(dataset))
    chosen = settings.make({"dataset": "flickr30k", "data_root": str(tmp_path), "regions": "files"})
    fetching.find_data(chosen, True, True)
    assert asked == ["flickr30k"]


def test_pictures_beside_bottom_up_files_are_enough_for_clip(tmp_path, monkeypatch):
    """COCO's bottom-up files come with COCO's own annotations, not with Karpathy's JSON."""
    chosen = settings.make({"dataset": "coco", "data_root": str(tmp_path), "model": "user", "guide": "clip"})
    listing = layouts.Listing([], np.zeros(0), None, ["1.jpg", "2.jpg"], [None, None])
    monkeypatch.setattr(layouts, "read", lambda *given, **more: {"train": listing})
    assert fetching.are_wanted(chosen, tmp_path, True)
    listing.pictures[1] = tmp_path / "2.jpg"
    assert not fetching.are_wanted(chosen, tmp_path, True)
    fetch.work_of("coco", tmp_path).mkdir()  # a fetch was broken off
    assert fetching.are_wanted(chosen, tmp_path, True)


def test_fetch_only_brings_every_network_that_the_training_may_take(root, tmp_path, monkeypatch):
    """Whether the machine that trains has a GPU, which takes the detector, cannot be known where things are fetched."""
    brought: list[str] = []
    monkeypatch.setattr(models, "text_encoder", lambda settings: brought.append("text"))
    monkeypatch.setattr(pictures, "regions_network", lambda settings, device: brought.append(settings.pictures.regions))
    monkeypatch.setattr(networks, "Clip", lambda name: brought.append("guide"))
    for folder, more, expected in (
        (tmp_path, {}, ["text", "detector", "grid"]), (tmp_path, {"regions": "clip"}, ["text", "clip"]),
        (root, {}, ["text"]), (root, {"regions": "grid"}, ["text", "grid"]), (root, {"regions": "files"}, ["text"]),
        (root, {"model": "user", "guide": "clip"}, ["text", "guide"]),
    ):
        brought.clear()
        pictures.fetch_models(settings.make({"dataset": "flickr8k", "data_root": str(folder)} | more))
        assert brought == expected
    brought.clear()
    assert train.main(["--dataset", "folder", "--data-root", str(tmp_path), "--fetch-only"]) == 0
    assert train.main(["--text-encoder", "bert-base-uncased", "--fetch-only"]) == 0  # the scenes have their features
    assert brought == ["text", "detector", "grid", "text"]
