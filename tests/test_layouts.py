"""layouts.py, annotations.py and features.py: both layouts of features, a table of your own, every bad input."""
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import refused
from PIL import ExifTags, Image

from harness import pictures
from harness.settings import make
from sources import annotations, layouts, photos
from sources.features import upright_size

R, F = 3, 4
CAPTIONS = ["a red ball", "a ball, red!", "two dogs", "dogs play", "a blue house", "a house"]  # three images, two each


def features(images: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((images, R, F)).astype(np.float32)


def write_scan(folder: Path, stem: str, array: np.ndarray, captions: list[str], end: str = "\n") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{stem}_ims.npy", array)
    (folder / f"{stem}_caps.txt").write_text("\n".join(captions) + end, encoding="utf8")


def scan(folder: Path, dataset: str = "flickr8k", split: str = "val") -> layouts.Listing:
    return layouts.read(dataset, folder, (split,))[split]


def karpathy_image(name: str, split: str, captions: list[str], **more) -> dict:
    return {"filename": name, "split": split, "sentences": [{"raw": text} for text in captions]} | more


def write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_bottom_up(root: Path, image_id: int, feat: np.ndarray, box: np.ndarray) -> None:
    for folder in ("bu_att", "bu_box"):
        (root / "features_36" / folder).mkdir(parents=True, exist_ok=True)
    np.savez(root / "features_36" / "bu_att" / f"{image_id}.npz", feat=feat)
    np.save(root / "features_36" / "bu_box" / f"{image_id}.npy", box)


def boxes(regions: int, width: float, height: float) -> np.ndarray:
    corner = np.linspace(0.2, 1, regions)[:, None] * [width, height]
    return np.concatenate([corner / 2, corner], 1).astype(np.float32)


def turned(orientation: int) -> Image.Exif:
    """EXIF data with this orientation; 6 is a quarter turn."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


@pytest.fixture
def flickr(tmp_path):
    """Bottom-up files of Flickr8k: four images of which the third is of split val, with 2 to 5 regions each."""
    splits = ("train", "train", "val", "restval")
    images = [karpathy_image(f"{i}.jpg", s, [f"caption {i} {j}" for j in range(i + 1)]) for i, s in enumerate(splits)]
    write_json(tmp_path / "annotations" / "dataset_flickr8k.json", {"images": images})
    for i in range(4):
        write_bottom_up(tmp_path, i, np.full((2 + i, F), i, np.float32), boxes(2 + i, 100, 50))
    return tmp_path


def test_bottom_up_files_beside_a_shortened_list_are_refused(flickr):
    """They are named by the place in the whole list, so each picture would get another one's features."""
    path = flickr / "annotations" / "dataset_flickr8k.json"
    images = [image | {"imgid": place} for place, image in enumerate(json.loads(path.read_text())["images"])]
    write_json(path, {"images": images})
    assert len(layouts.read("flickr8k", flickr)["train"].captions) == 7
    write_json(path, {"images": images[1:]})
    refused(lambda: layouts.read("flickr8k", flickr), "images[0]", "imgid 1", "place in the whole list, 0")


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("each", [2, 4, 5])
@pytest.mark.parametrize("end", ["\n", ""])
def test_scan_rows_per_image_and_per_caption_read_the_same(tmp_path, dtype, each, end):
    array, captions = features(6).astype(dtype), [f"caption {i}" for i in range(6 * each)]
    write_scan(tmp_path / "once", "dev", array, captions, end)
    write_scan(tmp_path / "repeated", "dev", array.repeat(each, 0), captions, end)
    for split in (scan(tmp_path / "once"), scan(tmp_path / "repeated")):
        assert split.captions == captions
        assert split.image_of.tolist() == [i // each for i in range(6 * each)] and split.image_of.dtype == np.int64
        assert len(split.features) == 6 and split.features.dim == F and len(split.image_names) == 6
        regions, box, mask = split.features.read([4, 0, 4])
        assert regions.dtype == np.float32 and np.array_equal(regions, array[[4, 0, 4]].astype(np.float32))
        assert box.shape == (3, R, 4) and not box.any() and mask.shape == (3, R) and mask.all()
        assert split.pictures[0] is None


def test_scan_one_caption_per_image(tmp_path):
    write_scan(tmp_path, "dev", features(6), CAPTIONS)
    assert scan(tmp_path).image_of.tolist() == list(range(6))


def test_scan_one_image(tmp_path):
    write_scan(tmp_path, "dev", features(1).repeat(5, 0), CAPTIONS[:5])
    assert scan(tmp_path).image_of.tolist() == [0] * 5


def test_scan_rows_that_repeat_irregularly(tmp_path):
    write_scan(tmp_path, "dev", features(4).repeat([3, 2, 3, 3], 0), [str(i) for i in range(11)])
    refused(lambda: scan(tmp_path), "dev_ims.npy", "equally often")


def test_scan_rows_of_equal_images_are_still_counted(tmp_path):
    """The first two images are one picture twice."""
    array = features(6)
    array[1] = array[0]
    write_scan(tmp_path, "dev", array.repeat(5, 0), [str(i) for i in range(30)])
    assert np.array_equal(scan(tmp_path).features.read(range(6))[0], array)


def test_scan_splits(tmp_path):
    for stem, images in (("train", 3), ("dev", 2), ("test", 4)):
        write_scan(tmp_path, stem, features(images), [f"{stem} {i}" for i in range(2 * images)])
    found = layouts.read("flickr30k", tmp_path)
    assert {name: len(split.features) for name, split in found.items()} == {"train": 3, "val": 2, "test": 4}
    (tmp_path / "test_ims.npy").unlink()
    refused(lambda: layouts.read("flickr30k", tmp_path), "test_ims.npy", "missing")
    (tmp_path / "test_caps.txt").unlink()
    assert list(layouts.read("flickr30k", tmp_path)) == ["train", "val"]


def test_scan_coco_prefers_testall(tmp_path):
    write_scan(tmp_path, "test", features(2), CAPTIONS[:4])
    assert len(scan(tmp_path, "coco", "test").features) == 2
    write_scan(tmp_path, "testall", features(3), CAPTIONS)
    assert len(scan(tmp_path, "coco", "test").features) == 3


def test_scan_subfolder_of_this_dataset_only(tmp_path):
    write_scan(tmp_path / "coco_precomp", "dev", features(2), CAPTIONS[:4])
    write_scan(tmp_path / "f30k_precomp", "dev", features(3), CAPTIONS)
    assert len(scan(tmp_path, "flickr30k").features) == 3
    assert len(scan(tmp_path, "coco").features) == 2
    refused(lambda: scan(tmp_path, "flickr8k"), "no region features")
    write_scan(tmp_path / "my_precomp", "dev", features(1), CAPTIONS[:2])
    assert len(scan(tmp_path, "flickr8k").features) == 1


def test_scan_finds_pictures_by_caption_text(tmp_path):
    captions = ["A red ball .", "Same text", "Two dogs", "Same text", "A blue house", "Two dogs run"]
    write_scan(tmp_path / "f8k_precomp", "dev", features(3), captions)
    images = [
        karpathy_image("house.png", "val", ["a BLUE house!", "not there"], filepath="deep"),
        karpathy_image("ball.png", "val", ["a red ball", "same text"]),
        karpathy_image("dogs.png", "val", ["same text", "unlike"]),
    ]
    write_json(tmp_path / "dataset_flickr8k.json", {"images": images})
    for place, colour in (("images/ball.png", "red"), ("deep/house.png", "blue")):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 6), colour).save(tmp_path / place)
    split = scan(tmp_path)
    # The dogs share one caption with the ball's and the other is in no picture; "Two dogs run" is nobody's.
    assert split.image_names == ["ball.png", "row 1", "house.png"]
    ball, dogs, house = split.pictures
    assert photos.read(ball).getpixel((0, 0)) == (255, 0, 0) and photos.read(ball).size == (8, 6)
    assert dogs is None
    assert photos.read(house).getpixel((0, 0)) == (0, 0, 255)
    (tmp_path / "images" / "ball.png").write_bytes(b"no picture")
    refused(lambda: photos.read(ball), "ball.png", "picture")


def test_scan_captions_of_two_images_in_one_row_tell_nothing(tmp_path):
    write_scan(tmp_path, "dev", features(1), ["first", "second"])
    images = [karpathy_image(f"{text}.jpg", "val", [text]) for text in ("first", "second")]
    write_json(tmp_path / "dataset_flickr8k.json", {"images": images})
    assert scan(tmp_path).image_names == ["row 0"]


def test_scan_bad_captions(tmp_path):
    write_scan(tmp_path, "dev", features(3), CAPTIONS)
    caps = tmp_path / "dev_caps.txt"
    caps.write_text("\n".join(CAPTIONS[:5]))
    refused(lambda: scan(tmp_path), "dev_caps.txt", "dev_ims.npy", "5 captions", "3")
    caps.write_text("a\nb\n \nd\ne\nf\n")
    refused(lambda: scan(tmp_path), "dev_caps.txt, line 3", "empty")
    caps.write_text("\n".join(CAPTIONS) + "\n\n")
    refused(lambda: scan(tmp_path), "dev_caps.txt, line 7", "empty")
    caps.write_text("")
    refused(lambda: scan(tmp_path), "dev_caps.txt, line 1", "empty")
    caps.write_bytes(b"a\nb\nc\nd\ncaf\xe9\nf\n")
    refused(lambda: scan(tmp_path), "dev_caps.txt, line 5", "0xe9", "UTF-8")
    caps.write_text("a\nb\x0bb\nc\u2028c\nd\re\ne\nf\n")  # only a newline ends a caption
    assert len(scan(tmp_path).captions) == 6
    caps.unlink()
    refused(lambda: scan(tmp_path), "dev_caps.txt", "missing", "github.com/kuanghuei/SCAN")


def test_scan_bad_arrays(tmp_path):
    write_scan(tmp_path, "dev", features(3), CAPTIONS)
    path = tmp_path / "dev_ims.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    refused(lambda: scan(tmp_path), "dev_ims.npy", f"{len(whole) - 1} of {len(whole)} bytes", "row is 2")
    path.write_bytes(whole[: len(whole) - 2 * R * F * 4])
    refused(lambda: scan(tmp_path), "dev_ims.npy", "row is 1")
    for content in (b"", b"not an array", whole[:20], b"\x93NUMPY\x09\x00" + whole[8:]):
        path.write_bytes(content)
        refused(lambda: scan(tmp_path), "dev_ims.npy", ".npy file")
    for array, found in (
        (features(3).astype(np.float64), "float64"),
        (np.ones((3, R, F), int), "int64"),
        (np.array([["a"]], object), "dev_ims.npy"),
        (np.asfortranarray(features(3)), "Fortran"),
        (features(3)[:, 0], f"[3, {F}]"),
        (features(0), f"[0, {R}, {F}]"),
    ):
        np.save(path, array, allow_pickle=True)
        refused(lambda: scan(tmp_path), "dev_ims.npy", found, "expected")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scan_features_that_are_not_finite(tmp_path, value):
    array = features(40)
    array[3, 2, 3] = value
    for stored, row in ((array, "row 3 "), (array.repeat(2, 0), "row 6 ")):
        write_scan(tmp_path, "dev", stored, [str(i) for i in range(80)])
        split = scan(tmp_path)
        split.features.read([0, 2, 4])
        refused(lambda: split.features.read([0, 3]), "dev_ims.npy", row, "image 3", "NaN")  # noqa: B023


def test_scan_widths_differ(tmp_path):
    write_scan(tmp_path, "train", features(3), CAPTIONS)
    write_scan(tmp_path, "dev", features(3)[:, :, :2], CAPTIONS)
    refused(lambda: layouts.read("flickr8k", tmp_path), "4 in", "train_ims.npy", "2 in", "dev_ims.npy")


def test_file_that_shrinks_while_in_use(tmp_path):
    write_scan(tmp_path, "dev", features(3), CAPTIONS)
    split = scan(tmp_path)
    (tmp_path / "dev_ims.npy").write_bytes((tmp_path / "dev_ims.npy").read_bytes()[:-8])
    refused(lambda: split.features.read([2]), "dev_ims.npy", "row 2")


def test_bottom_up_flickr(flickr):
    found = layouts.read("flickr8k", flickr)
    assert list(found) == ["train", "val"]  # no image is of split test
    train = found["train"]
    assert train.captions == ["caption 0 0", "caption 1 0", "caption 1 1"] + [f"caption 3 {j}" for j in range(4)]
    assert train.image_of.tolist() == [0, 1, 1, 2, 2, 2, 2]
    assert train.image_names == ["0.jpg", "1.jpg", "3.jpg"]
    regions, box, mask = train.features.read([2, 0])  # the files 3 and 0
    assert regions.shape == (2, 5, F) and box.shape == (2, 5, 4)
    assert mask.tolist() == [[True] * 5, [True] * 2 + [False] * 3]
    assert (regions[0] == 3).all() and not regions[1].any() and not box[1, 2:].any()
    np.testing.assert_allclose(box[0], boxes(5, 1, 1), atol=1e-6)
    assert found["val"].features.read([0])[0].shape == (1, 4, F)


def test_bottom_up_boxes_are_over_the_size_that_is_known_best(flickr):
    path = flickr / "annotations" / "dataset_flickr8k.json"
    Image.new("RGB", (200, 100)).save(flickr / "1.jpg")
    content = json.loads(path.read_text())
    content["images"][3] |= {"width": 400, "height": 50}
    write_json(path, content)
    box = layouts.read("flickr8k", flickr, ("train",))["train"].features.read([0, 1, 2])[1]
    np.testing.assert_allclose(box[0, :2], boxes(2, 1, 1), atol=1e-6)  # neither the picture nor its size is known
    np.testing.assert_allclose(box[1, :3], boxes(3, 0.5, 0.5), atol=1e-6)
    np.testing.assert_allclose(box[2], boxes(5, 0.25, 1), atol=1e-6)


@pytest.mark.parametrize("ending", ["jpg", "tiff"])
def test_bottom_up_boxes_are_over_the_upright_picture(tmp_path, ending):
    Image.new("RGB", (200, 100)).save(tmp_path / f"x.{ending}", exif=turned(6))
    assert upright_size(tmp_path / f"x.{ending}") == photos.read(tmp_path / f"x.{ending}").size == (100, 200)
    Image.new("RGB", (200, 100)).save(tmp_path / "x.jpg", exif=turned(3))
    assert upright_size(tmp_path / "x.jpg") == (200, 100)


def test_bottom_up_boxes_outside_their_picture(flickr):
    Image.new("RGB", (60, 50)).save(flickr / "1.jpg")
    split = layouts.read("flickr8k", flickr, ("train",))["train"]
    refused(lambda: split.features.read([1]), "1.npy", "40 pixels outside", "60 x 50")
    np.save(flickr / "features_36" / "bu_box" / "0.npy", np.zeros((2, 4)))
    refused(lambda: split.features.read([0]), "0.npy", "0 x 0")


def test_fixed_regions_are_checked_for_each_image(flickr):
    train = layouts.read("flickr8k", flickr, ("train",))
    released = make(dict(data_root=str(flickr), model="user", fixed_regions=2))
    refused(lambda: pictures.prepare(train, released, flickr), "--fixed-regions 2: image 1 of train has 3 regions")


def test_bottom_up_bad_files(flickr):
    def read(rows=(0, 1, 2)):
        return layouts.read("flickr8k", flickr, ("train",))["train"].features.read(rows)

    att, box = flickr / "features_36" / "bu_att" / "1.npz", flickr / "features_36" / "bu_box" / "1.npy"
    good = att.read_bytes()
    for array, found in (
        (np.ones((3, F + 1)), f"[3, {F + 1}], expected [3, {F}]"),
        (np.ones(F), f"[{F}]"),
        (np.ones((0, F)), f"[0, {F}]"),
        (np.full((3, F), np.nan), "NaN or infinity (image 1)"),
        (np.array(["x"]), "expected"),
        (np.array([None]), "expected"),
    ):
        np.savez(att, feat=array)
        refused(read, str(att), found)
    np.savez(att, other=np.ones((3, F)))
    refused(read, str(att), "key 'feat'")
    for content in (b"", b"PK nonsense", good[:200]):
        att.write_bytes(content)
        refused(read, str(att), ".npz")
    att.write_bytes(good)
    for array, found in ((np.ones((2, 4)), "[2, 4], expected [3, 4]"), (np.full((3, 4), np.inf), "NaN or infinity")):
        np.save(box, array)
        refused(read, str(box), found)
    box.write_bytes(b"")
    refused(read, str(box), ".npy")
    read((0, 2))


def test_bottom_up_missing_files(flickr):
    for i in (1, 3):
        (flickr / "features_36" / "bu_box" / f"{i}.npy").unlink()
    refused(lambda: layouts.read("flickr8k", flickr), str(Path("bu_box") / "1.npy"), "1 more of 3")
    for path in (flickr / "features_36" / "bu_att").iterdir():
        path.unlink()
    (flickr / "features_36" / "bu_att").rmdir()
    refused(lambda: layouts.read("flickr8k", flickr), "bu_att", "github.com/mesnico/TERAN")


def test_bottom_up_bad_annotations(flickr):
    path = flickr / "annotations" / "dataset_flickr8k.json"
    content = json.loads(path.read_text())
    load = lambda: layouts.read("flickr8k", flickr)  # noqa: E731
    for images, found in (
        ([*content["images"][:3], {"filename": "x"}], "images[3]"),
        ([*content["images"][:3], karpathy_image("x", "train", ["a", " "])], "images[3], x: an empty caption"),
        ([*content["images"][:3], karpathy_image("x", "train", [])], "images[3], x"),
        ([*content["images"][:3], None], "images[3]"),
        (content["images"][:2], "no image of split val"),
        (7, "'images'"),
    ):
        write_json(path, {"images": images})
        refused(load, found)
    path.write_text('{"images":\n[{,')
    refused(load, "dataset_flickr8k.json", "line 2")
    path.write_bytes(b'{\n"images": "\xff"}')
    refused(load, "dataset_flickr8k.json, line 2", "UTF-8")
    path.unlink()
    refused(load, "dataset_flickr8k.json", "missing", "--fetch-only")


@pytest.fixture
def coco(tmp_path):
    """Bottom-up files of COCO: image 10 in train2014; 20 (restval), 30 (val) and 40 (test) in val2014."""
    def image(i):
        return {"id": i, "file_name": f"COCO_{i}.jpg", "width": 100, "height": 50}

    def caption(a):
        return {"id": a, "image_id": a // 10 * 10, "caption": f"caption {a} \n"}

    years = {"train": ([10], [11, 12]), "val": ([40, 30, 20], [41, 31, 42, 21, 32, 22, 23])}
    for year, (images, captions) in years.items():
        content = {"images": [image(i) for i in images], "annotations": [caption(a) for a in captions]}
        write_json(tmp_path / "annotations" / f"captions_{year}2014.json", content)
    for part, ids in {"train": [12, 11], "restval": [21, 22, 23], "dev": [31, 32], "test": [42, 41]}.items():
        np.save(tmp_path / "annotations" / f"coco_{part}_ids.npy", ids)
    for i in (10, 20, 30, 40):
        write_bottom_up(tmp_path, i, np.full((2, F), i), boxes(2, 50, 50))
    return tmp_path


def test_bottom_up_coco(coco):
    found = layouts.read("coco", coco)
    assert found["train"].captions == [f"caption {a}" for a in (12, 11, 21, 22, 23)]
    assert found["train"].image_of.tolist() == [0, 0, 1, 1, 1]
    assert found["train"].image_names == ["COCO_10.jpg", "COCO_20.jpg"]
    assert found["val"].captions == ["caption 31", "caption 32"]
    assert found["test"].captions == ["caption 42", "caption 41"]
    regions, box, _ = found["train"].features.read([1])
    assert (regions == 20).all()
    np.testing.assert_allclose(box[0], boxes(2, 0.5, 1), atol=1e-6)
    (coco / "val2014").mkdir()
    Image.new("RGB", (100, 50), "red").save(coco / "val2014" / "COCO_20.jpg")
    train = layouts.read("coco", coco)["train"]
    assert train.pictures[0] is None and photos.read(train.pictures[1]).size == (100, 50)


def test_bottom_up_coco_files_without_a_folder(coco):
    for path in list((coco / "annotations").iterdir()):
        path.rename(coco / path.name)
    (coco / "coco_test_ids.npy").unlink()
    assert list(layouts.read("coco", coco)) == ["train", "val"]


def test_bottom_up_coco_bad_annotations(coco):
    folder = coco / "annotations"
    np.save(folder / "coco_dev_ids.npy", [31, 99])
    refused(lambda: layouts.read("coco", coco), "coco_dev_ids.npy", "entry 1", "annotation 99")
    np.save(folder / "coco_dev_ids.npy", [0.5])
    refused(lambda: layouts.read("coco", coco), "coco_dev_ids.npy", ".npy array")
    (folder / "coco_restval_ids.npy").unlink()
    refused(lambda: layouts.read("coco", coco), "coco_restval_ids.npy", "missing")
    write_json(folder / "captions_val2014.json", {"images": []})
    refused(lambda: layouts.read("coco", coco), "captions_val2014.json", "annotations")
    (folder / "captions_train2014.json").unlink()
    refused(lambda: layouts.read("coco", coco), "captions_train2014.json", "missing", "cocodataset.org")


def test_no_features(tmp_path):
    refused(lambda: layouts.read("flickr30k", tmp_path / "none"), str(tmp_path / "none"), "no such folder")
    refused(lambda: layouts.read("flickr30k", None), "name the folder with its files by --data-root")
    everywhere = ("train_ims.npy", "f30k_precomp", "features_36", "kuanghuei/SCAN", "mesnico/TERAN",
                  "dataset_flickr30k.json")
    refused(lambda: layouts.read("flickr30k", tmp_path), *everywhere)
    write_json(tmp_path / "dataset_flickr30k.json", {"images": [karpathy_image("x.jpg", "train", ["a caption"])]})
    refused(lambda: layouts.read("flickr30k", tmp_path, regions="files"), *everywhere)
    assert layouts.read("flickr30k", tmp_path, ("train",))["train"].features is None  # to be computed from pictures


def test_each_layout_is_recognised(tmp_path):
    for dataset, regions in (("folder", "auto"), ("flickr8k", "grid")):
        assert layouts.find_layout(dataset, tmp_path, regions) == ("pictures", tmp_path)
    write_json(tmp_path / "annotations" / "dataset_flickr8k.json", {"images": []})
    assert layouts.find_layout("flickr8k", tmp_path, "auto") == ("pictures", tmp_path)
    (tmp_path / "features_36").mkdir()
    assert layouts.find_layout("flickr8k", tmp_path, "files") == ("bottom-up", tmp_path / "features_36")
    write_scan(tmp_path / "f8k_precomp", "dev", features(1), CAPTIONS[:2])
    assert layouts.find_layout("flickr8k", tmp_path, "auto") == ("scan", tmp_path / "f8k_precomp")
    assert layouts.find_layout("coco", tmp_path, "auto") == ("bottom-up", tmp_path / "features_36")
    assert layouts.find_layout("flickr8k", tmp_path, "detector") == ("pictures", tmp_path)


def own(folder: Path, text: str, name: str = "captions.csv") -> list:
    (folder / name).write_text(text, encoding="utf8")
    return annotations.read_own(folder, 0)


def test_a_table_of_one_s_own_pictures(tmp_path):
    table = """\ufeffSplit, File ,Caption
train,a b/é.jpg,"a red, round ball"
val,1.jpg,a dog
train,a b/é.jpg,a ball
test,2.jpg, a cat 
"""
    entries = own(tmp_path, table)
    assert [(e.file, e.split, e.captions) for e in entries] == [
        (("", "a b/é.jpg"), "train", ["a red, round ball", "a ball"]), (("", "1.jpg"), "val", ["a dog"]),
        (("", "2.jpg"), "test", ["a cat"])]
    (tmp_path / "captions.csv").unlink()
    lines = ['{"file": "a b/é.jpg", "caption": "a red, round ball", "split": "train"}', "",
             '{"split": "dev", "File": "1.jpg", "caption": "a dog"}']
    again = own(tmp_path, "\n".join(lines), "captions.jsonl")
    assert [(e.file[1], e.split, e.captions) for e in again] == [
        ("a b/é.jpg", "train", ["a red, round ball"]), ("1.jpg", "val", ["a dog"])]


def test_splits_are_drawn_by_seed_and_not_by_order(tmp_path):
    lines = [f"{i}.jpg,caption {i} {j}" for i in range(40) for j in range(2)]
    first = {e.file: e.split for e in own(tmp_path, "\n".join(["file,caption", *lines]))}
    again = {e.file: e.split for e in own(tmp_path, "\n".join(["file,caption", *lines[::-1]]))}
    assert first == again and set(first.values()) == {"train", "val", "test"}
    assert first != {e.file: e.split for e in annotations.read_own(tmp_path, 1)}


def test_a_picture_keeps_its_split_when_others_come():
    names = [f"{i}.jpg" for i in range(2000)]
    few, many = annotations.draw_splits(names[::2], 0), annotations.draw_splits(names, 0)
    assert few == {name: many[name] for name in names[::2]}
    counts = Counter(many.values())
    assert 160 < counts["val"] < 240 and 160 < counts["test"] < 240
    for seed in range(200):  # of few pictures, train gets two, to tell them apart
        for count in (4, 5, 6):
            counts = Counter(annotations.draw_splits(names[:count], seed).values())
            assert counts["train"] >= 2 and counts["val"] >= 1 and counts["test"] >= 1


def test_only_line_ends_end_a_line_of_a_table(tmp_path):
    odd = "a\x0cb\x1cc\x85d\u2028e\u2029f"
    lines = ["file,caption,split", f"1.jpg,{odd},train", '2.jpg,"two\nlines",val', "3.jpg,,val"]
    assert [e.captions for e in own(tmp_path, "\r\n".join(lines[:3]))] == [[odd], ["two\nlines"]]
    refused(lambda: own(tmp_path, "\n".join(lines)), "captions.csv, line 5")


def test_tables_as_other_programs_write_them(tmp_path):
    """Windows writes backslashes and a byte-order mark, pandas writes null where nothing is."""
    write_json(tmp_path / "sub" / "dataset_x.json", {"images": [karpathy_image("1.jpg", "train", ["a dog"])]})
    path = tmp_path / "sub" / "dataset_x.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert annotations.read_karpathy(path)[0].captions == ["a dog"]
    lines = [json.dumps({"file": f"sub\\{i}.jpg", "caption": "a dog", "split": None}) for i in range(4)]
    (tmp_path / "sub" / "1.jpg").touch()
    (tmp_path / "sub\\2.jpg").touch()  # a backslash is part of a name on Linux
    entries = own(tmp_path, "\n".join(lines), "captions.jsonl")
    assert [e.file[1] for e in entries] == ["sub/0.jpg", "sub/1.jpg", "sub\\2.jpg", "sub/3.jpg"]
    assert {e.split for e in entries} == {"train", "val", "test"}
    lines[2] = '{"file": "caf\\udce9.jpg", "caption": "a dog"}'  # drawn, then refused
    refused(lambda: own(tmp_path, "\n".join(lines), "captions.jsonl"), "captions.jsonl, line 3", "UTF-8")


@pytest.mark.parametrize(("text", "expected"), [
    ("", ["line 1", "file, caption"]),
    ("image,caption\n1.jpg,a dog", ["line 1", "image, caption"]),
    ("file,caption\n1.jpg,", ["line 2", "a file and a caption"]),
    ("file,caption\n1.jpg,a dog, running", ["line 2", "quotes"]),
    ('file,caption\n1.jpg,"a dog\n', ["line 2"]),
    ("file,caption,split\n1.jpg,a dog,training", ["line 2", "'training'", "train, val or test"]),
    ("file,caption,split\n1.jpg,a dog,train\n1.jpg,a cat,val", ["line 3", "1.jpg", "split val", "train above"]),
    ("file,caption,split\n1.jpg,a dog,train\n2.jpg,a cat,", ["line 3", "no split"]),
    ("file,caption\n1.jpg,a dog", ["1 pictures", "at least 4"]),
    ("file,caption", ["no captions"]),
    ("file,caption,split\n1.jpg,a dog,train\n2.jpg,a cat,test", ["no picture has split val", "splits are drawn"]),
    ("file,caption,Caption\n1.jpg,a dog,a hound", ["line 1", "two columns are called caption"]),
])
def test_bad_tables(tmp_path, text, expected):
    refused(lambda: own(tmp_path, text), "captions.csv", *expected)


@pytest.mark.parametrize("line", ["no json", "[1]", '{"file": 3, "caption": "a"}', '{"caption": "a"}'])
def test_bad_lines(tmp_path, line):
    lines = '{"file": "1.jpg", "caption": "a"}\n' + line
    refused(lambda: own(tmp_path, lines, "captions.jsonl"), "captions.jsonl", "line 2")


def test_a_picture_has_one_entry_and_a_name_of_its_own(tmp_path):
    images = [karpathy_image("1.jpg", "train", ["a cat"], filepath="cats"),
              karpathy_image("1.jpg", "train", ["a dog"], filepath="dogs"), karpathy_image("1.jpg", "train", ["a cow"]),
              karpathy_image("2.jpg", "train", ["a hen"])]
    write_json(tmp_path / "dataset_own.json", {"images": images})
    assert layouts.read("folder", tmp_path, ("train",))["train"].image_names == [
        "cats/1.jpg", "dogs/1.jpg", "1.jpg", "2.jpg"]
    write_json(tmp_path / "dataset_own.json", {"images": images + images[1:2]})
    refused(lambda: layouts.read("folder", tmp_path, ("train",)), "1.jpg is in", "all captions of a picture")


def test_no_table_or_too_many(tmp_path):
    refused(lambda: annotations.read_own(tmp_path, 0), "captions.csv", "captions.jsonl", "found 0")
    tables = [tmp_path / name for name in ("captions.csv", "captions.jsonl")]
    for table in tables:
        table.touch()
    refused(lambda: annotations.read_own(tmp_path, 0), "has captions.csv and captions.jsonl")
    for table in tables:
        table.unlink()
    for name in ("a", "b"):
        write_json(tmp_path / f"dataset_{name}.json", {"images": [karpathy_image("1.jpg", "train", ["a dog"])]})
    refused(lambda: annotations.read_own(tmp_path, 0), "found 2")
    (tmp_path / "dataset_a.json").unlink()
    assert layouts.read("folder", tmp_path, ("train",))["train"].captions == ["a dog"]
    refused(lambda: layouts.read("folder", tmp_path, ("train",), "files"), "--regions files")
