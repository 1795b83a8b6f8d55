"""Files that are hostile or odd: each is refused in one line that names it, and never read without bound."""
import io
import json
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import refused
from PIL import Image

from sources import features, layouts, photos
from sources.features import ManyFiles, OneArray, Stored, read_array
from sources.files import BadInput, explained
from sources.store import Store, digest, facts

GOOD = [("p1.jpg", "train"), ("p2.jpg", "val"), ("p3.jpg", "test")]


def folder(root: Path, kind: str, rows: list[tuple[str, str]], caption: str = "a dog") -> dict:
    """Read a folder whose annotations say this of pictures and splits."""
    if kind == "csv":
        (root / "captions.csv").write_text("file,caption,split\n" + "".join(f"{f},{caption},{s}\n" for f, s in rows))
    elif kind == "jsonl":
        lines = [json.dumps({"file": f, "caption": caption, "split": s}) for f, s in rows]
        (root / "captions.jsonl").write_text("\n".join(lines))
    else:
        images = [{"filename": f, "split": s, "sentences": [{"raw": caption}]} for f, s in rows]
        (root / "dataset_own.json").write_text(json.dumps({"images": images}))
    return layouts.read("folder", root)


PLACES = {"csv": ("captions.csv, line 5", "captions.csv, line 2"), "jsonl": ("jsonl, line 4", "jsonl, line 1"),
          "json": ("images[3]", "images[0]")}


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("name", ["p1.jpg", "./p1.jpg", ".//p1.jpg", "images/p1.jpg"])
def test_a_picture_in_two_splits_is_reported_with_both_places(tmp_path, kind, name):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "images" / "p1.jpg")
    refused(lambda: folder(tmp_path, kind, [*GOOD, (name, "val")]), *PLACES[kind], "p1.jpg", "val", "train")


def test_one_picture_under_two_spellings_is_one_image(tmp_path):
    read = folder(tmp_path, "csv", [*GOOD, ("./p1.jpg", "train")])["train"]
    assert read.image_names == ["p1.jpg"] and read.image_of.tolist() == [0, 0]


@pytest.mark.parametrize("split", ["training", "Train", "", 3, ["train"], None])
def test_an_unknown_split_of_a_json_is_reported(tmp_path, split):
    refused(lambda: folder(tmp_path, "json", [*GOOD, ("p4.jpg", split)]), "dataset_own.json", "images[3]", "split")


def test_an_unknown_split_is_named_with_what_was_expected(tmp_path):
    refused(lambda: folder(tmp_path, "json", [("p4.jpg", "training")]), "'training'", "expected train, val or test")


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("name", ["/etc/passwd", "../p1.jpg", "a/../../p1.jpg", "..", "a\\..\\..\\b", "a\x07.jpg",
                                  "C:/p1.jpg", "c:\\p1.jpg"])  # on Windows, a place of its own
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, kind, name):
    refused(lambda: folder(tmp_path, kind, [*GOOD, (name, "val")]), PLACES[kind][0], "inside of the data's folder")
    assert photos.find(tmp_path, [("", name), ("..", "p1.jpg"), ("/", "etc/passwd")]) == [None] * 3


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_text_with_half_a_character_is_refused(tmp_path, kind):
    refused(lambda: folder(tmp_path, kind, [*GOOD, ("caf\udce9.jpg", "val")]), PLACES[kind][0], "UTF-8", "\\udce9")
    refused(lambda: folder(tmp_path, kind, GOOD, "a \ud83d dog"), PLACES[kind][1], "surrogates")


@pytest.mark.parametrize("name", [5, None, ["p1.jpg"]])
def test_a_file_name_of_another_type_is_refused(tmp_path, name):
    refused(lambda: folder(tmp_path, "json", [(name, "train")]), "images[0]", "file name")


def test_a_folder_with_a_name_that_is_no_text_is_refused(tmp_path):
    for name in (b"caf\xe9.jpg", b"two\nlines.jpg"):
        path = os.path.join(os.fsencode(tmp_path), name)
        open(path, "wb").close()
        refused(lambda: photos.listed(tmp_path), str(tmp_path), "rename")
        os.unlink(path)


# ------------------------------------------------------------------------------------------------- odd kinds of files


def odd_files(root: Path) -> dict[str, str]:
    """Makes files that may not be read. Returns what is said of each."""
    (root / "dangling.jpg").symlink_to(root / "nowhere")
    (root / "loop.jpg").symlink_to(root / "loop.jpg")
    (root / "zero.jpg").symlink_to("/dev/zero")
    (root / "folder.jpg").mkdir()
    os.mkfifo(root / "pipe.jpg")
    with open(root / "large.jpg", "wb") as file:
        file.truncate(photos.MOST_BYTES + 1)  # takes no room on the disk
    return {"dangling.jpg": "No such file", "loop.jpg": "symbolic links", "zero.jpg": "device", "folder.jpg": "folder",
            "pipe.jpg": "pipe", "large.jpg": "1,000,000,000"}


def test_only_regular_files_are_read(tmp_path):
    for name, said in odd_files(tmp_path).items():
        refused(lambda: photos.read(tmp_path / name), name, said)  # noqa: B023
        refused(lambda: read_array(tmp_path / name), name)  # noqa: B023
        assert facts(tmp_path / name, tmp_path)[0] == name
    found = photos.find(tmp_path, [("", name) for name in ("dangling.jpg", "loop.jpg", "zero.jpg", "pipe.jpg")])
    assert found == [None] * 4


def test_a_link_to_a_picture_elsewhere_is_the_user_s_own(tmp_path):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (3, 2)).save(tmp_path / "away.png")
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "away.png")
    assert photos.read(photos.find(tmp_path / "data", [("", "link.png")])[0]).size == (3, 2)


def test_a_pipe_is_no_annotation_file(tmp_path):
    for name in ("captions.csv", "captions.jsonl", "dataset_own.json"):
        os.mkfifo(tmp_path / name)
    refused(lambda: layouts.read("folder", tmp_path), "found 0 of these")


def test_what_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="a.png: Permission denied, expected a picture"), explained("a.png", "a picture"):
        raise PermissionError(13, "Permission denied")
    with pytest.raises(BadInput, match="Is a directory, expected a file"), explained("a", "a file"):
        open(tmp_path)
    with pytest.raises(BadInput, match="^as it was$"), explained("a", "a file"):
        raise BadInput("as it was")

    def closed(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("os.scandir", closed)
    refused(lambda: photos.listed(tmp_path), str(tmp_path), "Permission denied")


# ------------------------------------------------------------------------------------------------------------- bounds


def test_a_picture_has_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(photos, "MOST_PIXELS", 5_000_000)
    for name, options in (("a.png", {}), ("whole.jpg", {"progressive": True}), ("a.jpg", {})):
        Image.new("RGB", (4000, 3300)).save(tmp_path / name, **options)
    for name in ("a.png", "whole.jpg"):
        refused(lambda: photos.read(tmp_path / name), name, "13,200,000 pixels", "5,000,000")  # noqa: B023
    assert photos.read(tmp_path / "a.jpg").size == (2000, 1650)  # decoded at half its size
    monkeypatch.undo()
    png = bytearray((tmp_path / "a.png").read_bytes())
    png[16:24] = (13_300).to_bytes(4, "big") * 2  # it only declares them
    png[29:33] = zlib.crc32(bytes(png[12:29])).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(png)
    refused(lambda: photos.read(tmp_path / "bomb.png"), "bomb.png", "176,890,000 pixels", "100,000,000")


def test_a_picture_that_is_a_program_is_not_run(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    refused(lambda: photos.read(tmp_path / "a.jpg"), "a.jpg", "PostScript")


def npy(shape: tuple, version: int = 1, kind: str = "<f4", content: bytes = b"", length: int = 118) -> bytes:
    """A .npy file that declares this, whatever follows."""
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".ljust(length - 1).encode() + b"\n"
    length_field = len(header).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + length_field + header + content


ARRAYS = {
    "nine gigabytes": (npy((2**20, 2304)), "9,663,676,416"),
    "more than exists": (npy((10**20, 2048)), "declares"),
    "an overflow": (npy((0, 10**30)), "expected"),
    "negative": (npy((-3, 4), content=bytes(48)), "[-3, 4]"),
    "both negative": (npy((-3, -4), content=bytes(48)), "[-3, -4]"),
    "version 3": (npy((3, 4), 3, content=bytes(48)), "version 3"),
    "version 0": (npy((3, 4), 0, content=bytes(48)), "version 0"),
    "a wide type": (npy((3, 4), kind="V2147483647"), "declares"),
    "objects": (npy((3, 4), kind="|O", content=bytes(96)), "expected"),
    "texts": (npy((3, 4), kind="<U1", content=bytes(48)), "expected"),
    "cut short": (npy((3, 4), content=bytes(40)), "expected"),
    "a long header": (npy((3, 4), 2, content=bytes(48), length=100_000), "expected"),
    "zeros for a header": (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(20_000), "expected"),
    "no array": (b"hello", "expected"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_is_judged_by_what_it_declares(tmp_path, name):
    content, said = ARRAYS[name]
    (tmp_path / "1.npy").write_bytes(content)
    refused(lambda: read_array(tmp_path / "1.npy"), "1.npy", said)
    with zipfile.ZipFile(tmp_path / "1.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("feat.npy", content)
    refused(lambda: read_array(tmp_path / "1.npz", "feat"), "1.npz", said)
    refused(lambda: OneArray(tmp_path / "1.npy"), "1.npy", "expected")


def test_an_archive_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "1.npz", "w", zipfile.ZIP_DEFLATED) as archive, \
            archive.open("feat.npy", "w") as member:
        member.write(b"\x93NUMPY\x02\x00\xff\xff\xff\xff")
        for _ in range(200):
            member.write(bytes(2**20))
    refused(lambda: read_array(tmp_path / "1.npz", "feat"), "1.npz", "expected")


def test_an_array_reads_as_numpy_reads_it(tmp_path):
    array = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    for name, values in {"plain": array, "half": array.astype(np.float16), "turned": np.asfortranarray(array),
                         "big": array.astype(">f4"), "none": array[:0], "one": array[0, 0]}.items():
        for version in ((1, 0), (2, 0)):
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.asanyarray(values), version)
            (tmp_path / f"{name}.npy").write_bytes(buffer.getvalue())
            np.testing.assert_array_equal(read_array(tmp_path / f"{name}.npy"), np.atleast_1d(values))
        np.savez_compressed(tmp_path / name, feat=values)
        np.testing.assert_array_equal(read_array(tmp_path / f"{name}.npz", "feat"), np.atleast_1d(values))


def test_one_row_of_an_array_has_a_bound(tmp_path):
    with open(tmp_path / "dev_ims.npy", "wb") as file:
        file.write(npy((1, 36, 2**20)))
        file.truncate(36 * 2**22 + 128)
    refused(lambda: OneArray(tmp_path / "dev_ims.npy"), "dev_ims.npy", "150,994,944", "67,108,864")


# ------------------------------------------------------------------------------------------------------------ numbers


def both_kinds(root: Path, value: float) -> list:
    """One image among two with 3 regions of 4 numbers, one of them `value`, in both layouts."""
    array = np.ones((2, 3, 4), np.float32)
    array[1] = array[1] * value if value == 0 else 1
    array[1, 2, 3] = value
    np.save(root / "dev_ims.npy", array)
    for name in ("bu_att", "bu_box"):
        (root / name).mkdir(exist_ok=True)
    for image in range(2):
        np.savez(root / "bu_att" / f"{image}.npz", feat=array[image])
        np.save(root / "bu_box" / f"{image}.npy", np.array([[0, 0, 5, 5]] * 3))
    return [OneArray(root / "dev_ims.npy"), ManyFiles(root, [0, 1], [(9.0, 9.0)] * 2, [None] * 2)]


@pytest.mark.parametrize(("value", "said"), [(np.nan, "NaN or infinity"), (-np.inf, "NaN or infinity"),
                                             (1e30, "1e+30"), (-1e30, "1e+30"), (2e6, "2e+06")])
def test_numbers_that_no_feature_has_are_named(tmp_path, value, said):
    for source, place in zip(both_kinds(tmp_path, value), ("row 1", "1.npz"), strict=True):
        source.read([0])
        refused(lambda: source.read([0, 1]), said, place, "1,000,000", "image 1")  # noqa: B023


def test_zeros_are_reported_once(tmp_path, capsys):
    features.told.clear()
    for source in both_kinds(tmp_path, 0):
        source.read([0])
        assert capsys.readouterr().err == ""
        source.read([1, 1])
        source.read([1])
        warning = capsys.readouterr().err
        assert warning.count("\n") == 1 and "all features are zero" in warning and str(source.path) in warning


@pytest.mark.parametrize("size", [(float("nan"), 9.0), (float("inf"), 9.0), (-9.0, 9.0), (0.0, 0.0), (9.0, 1e300)])
def test_a_size_that_no_picture_has(tmp_path, size):
    source = both_kinds(tmp_path, 1)[1]
    source.sizes[0] = size
    refused(lambda: source.read([0]), "0.npy", "picture")


def test_features_of_no_width(tmp_path):
    both_kinds(tmp_path, 1)
    np.savez(tmp_path / "bu_att" / "0.npz", feat=np.ones((3, 0)))
    refused(lambda: ManyFiles(tmp_path, [0], [None], [None]).read([0]), "0.npz", "[3, 0]")


# ---------------------------------------------------------------------------------------------------- a damaged cache


STORED = {"regions": ((3, 2), "f4"), "boxes": ((3, 4), "f4"), "count": ((), "i4")}


@pytest.fixture
def cached(tmp_path) -> Path:
    rows = {"regions": np.ones((2, 3, 2)), "boxes": np.ones((2, 3, 4)), "count": np.full(2, 3)}
    pictures = [(digest(bytes([number])), (f"{number}.png", 9, 9)) for number in range(2)]
    Store(tmp_path / "grid-1", {"network": "a"}, STORED).add(pictures, rows)
    return tmp_path / "grid-1"


def rows(*numbers: int) -> bytes:
    return "".join(f'[{row}, "{row}{place}", "{place}.png", 1, 1]\n' for place, row in enumerate(numbers)).encode()


@pytest.mark.parametrize(("file", "content"), [
    ("identity.json", b"{"), ("identity.json", b"\xff\xfe"), ("identity.json", b"[]"), ("identity.json", b"[" * 9999),
    ("pictures.jsonl", b"\xff\n"), ("pictures.jsonl", b"{}\n"), ("pictures.jsonl", b"7\n"),
    ("pictures.jsonl", b'[0, "a", ["b"], 1, 1]\n'), ("pictures.jsonl", rows(1, 0)), ("pictures.jsonl", rows(0, 10**30)),
    ("pictures.jsonl", rows(-1)), ("pictures.jsonl", rows(0, 0)), ("pictures.jsonl", rows(0, 1, 2)),
    ("regions", b""), ("regions", b"a" * 48), ("regions", np.full(12, np.nan, "f4").tobytes()),
    ("boxes", np.full(24, np.inf, "f4").tobytes()), ("count", np.array([3, 4], "i4").tobytes()),
    ("count", np.array([0, 3], "i4").tobytes()), ("count", np.array([-1, 3], "i4").tobytes()), ("count", b"x" * 8),
])
def test_a_damaged_cache_says_which_folder_to_delete(cached, file, content):
    (cached / file).write_bytes(content)
    refused(lambda: Stored(Store(cached, {"network": "a"}, STORED), np.arange(2)).read([0, 1]),
            f"delete the folder {cached}")


def test_absurd_features_are_not_stored(cached):
    store = Store(cached, {"network": "a"}, STORED)
    values = {"regions": np.full((1, 3, 2), 1e30), "boxes": np.ones((1, 3, 4)), "count": np.ones(1)}
    assert list(store.add([(digest(b"new"), ("new.png", 1, 1))], values)) == [digest(b"new")]
    assert len(Store(cached, {"network": "a"}, STORED)) == 2
