"""data.py: splits from the scenes and from files."""
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data


def test_scenes():
    split = data.load("scenes", None, ("val",))["val"]
    regions, box, mask = split.features.read(np.array([3, 0]))
    assert len(split.features) == 250 and len(split.captions) == len(split.image_of) == 1250
    assert np.array_equal(regions, split.truth.regions[[3, 0]]) and np.array_equal(box, split.truth.boxes[[3, 0]])
    assert mask.all() and mask.shape == regions.shape[:2] and regions.shape[2] == split.features.dim
    assert 0 <= box.min() and box.max() <= 1
    assert np.array_equal(np.array(split.picture(3)), split.truth.pictures[3])
    assert split.captions[0] == "there is a small red triangle as well as a little red star and a purple star"  # seed 0


def test_the_scenes_have_windows_unless_another_kind_of_regions_is_asked_for():
    for regions, given in (("auto", True), ("files", True), ("grid", False)):
        assert (data.load("scenes", None, ("val",), regions)["val"].features is not None) == given


def test_a_split_from_files(tmp_path: Path):
    np.save(tmp_path / "dev_ims.npy", np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32))
    (tmp_path / "dev_caps.txt").write_text("a red ball\na ball\ntwo dogs\ndogs play")
    split = data.load("flickr8k", tmp_path, ("val",))["val"]
    assert split.name == "val" and len(split.features) == 2 and split.image_of.tolist() == [0, 0, 1, 1]
    assert split.picture(0) is None and split.truth is None and split.clip is None
    split.keep(np.array([False, True]))
    assert split.captions == ["two dogs", "dogs play"] and split.image_of.tolist() == [0, 0]
    assert split.image_names == ["row 1"] and split.pictures == [None]
    Image.new("RGB", (8, 6), "red").save(tmp_path / "ball.png")
    (tmp_path / "no.png").write_bytes(b"no picture")
    split.pictures = [tmp_path / "ball.png", tmp_path / "no.png"]
    assert split.picture(0).size == (8, 6)
    with pytest.raises(data.BadInput, match="no.png.*picture"):
        split.picture(1)


def test_the_splits_of_one_s_own_pictures_are_drawn_by_the_seed(tmp_path):
    (tmp_path / "captions.csv").write_text("file,caption\n" + "".join(f"{row}.jpg,a dog\n" for row in range(40)))
    first, again, other = ({name: split.image_names for name, split in
                            data.load("folder", tmp_path, split_seed=seed).items()} for seed in (0, 0, 1))
    assert first == again != other


def test_an_image_is_found_by_its_name_before_its_row():
    split = data.Split("val", [], np.array([]), None, ["1", "0", "b.jpg"], [None] * 3)
    assert [split.row_of(name) for name in ("0", "1", "2", "b.jpg", "3", "-1")] == [1, 0, 2, 2, None, None]
