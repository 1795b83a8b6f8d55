"""store.py: rows that are whole or not there, found by what the picture is."""
import numpy as np
import pytest

from sources.features import Stored
from sources.files import BadInput
from sources.store import Store, digest, facts

ARRAYS = {"regions": ((3, 2), "f4"), "boxes": ((3, 4), "f4"), "count": ((), "i4")}


def values(*rows: int) -> dict[str, np.ndarray]:
    rows = np.array(rows, np.float32)
    return {"regions": np.ones((len(rows), 3, 2)) * rows[:, None, None],
            "boxes": np.ones((len(rows), 3, 4)) * rows[:, None, None] / 10, "count": np.full(len(rows), 2)}


def picture(number: int, name: str = "", time: int = 0) -> tuple:
    return digest(bytes([number])), (name or f"{number}.png", 100, time)


@pytest.fixture
def store(tmp_path) -> Store:
    store = Store(tmp_path / "grid-1", {"network": "a"}, ARRAYS)
    store.add([picture(5), picture(7)], values(5, 7))
    return store


def again(store: Store) -> Store:
    return Store(store.folder, {"network": "a"}, ARRAYS)


def test_what_was_added_is_read_back_and_found_by_facts_or_by_content(store):
    store.add([picture(9)], values(9))
    for opened in (store, again(store)):
        rows = [opened.find(picture(number)[1]) for number in (9, 5, 7)]
        assert rows == [opened.find(picture(number)[0]) for number in (9, 5, 7)] == [2, 0, 1]
        assert opened.read("regions", rows)[:, 0, 0].tolist() == [9, 5, 7]
        assert opened.find(("5.png", 100, 1)) is None and opened.find(digest(b"other")) is None
    source = Stored(again(store), np.array([2, 0, 0]))
    regions, boxes, mask = source.read(np.array([0, 2]))
    assert len(source) == 3 and source.dim == 2
    assert regions.dtype == np.float32 and regions.shape == (2, 2, 2) and regions[:, 0, 0].tolist() == [9, 5]
    assert boxes.shape == (2, 2, 4) and boxes[1, 0, 0] == pytest.approx(0.5) and mask.all()


def test_moved_copied_and_repeated_pictures_take_no_new_row(store):
    store.add([picture(5, "moved.png"), picture(9), picture(9, "twin.png")], values(9))
    store.add([picture(7, "copy.png", 3)], {})
    for opened in (store, again(store)):
        assert len(opened) == 3
        assert [opened.find((name, 100, time)) for name, time in
                (("moved.png", 0), ("9.png", 0), ("twin.png", 0), ("copy.png", 3), ("7.png", 0))] == [0, 2, 2, 1, 1]
    assert (store.folder / "count").stat().st_size == 3 * 4


@pytest.mark.parametrize("cut", range(1, 40, 6))
def test_a_kill_while_writing_leaves_whole_rows(store, cut):
    """Arrays come first, lines last: a line half written and whatever stands behind the whole rows do not count."""
    lines = store.folder / "pictures.jsonl"
    before = lines.read_bytes()
    store.add([picture(9)], values(9))
    lines.write_bytes(lines.read_bytes()[: len(before) + cut])
    opened = again(store)
    assert len(opened) == 2 and opened.find(picture(9)[1]) is None
    opened.add([picture(11)], values(11))
    assert again(opened).read("regions", [0, 1, 2])[:, 0, 0].tolist() == [5, 7, 11]
    assert lines.read_bytes().startswith(before) and lines.read_bytes().endswith(b"\n")


def test_a_store_that_has_been_damaged_is_named(store):
    with open(store.folder / "boxes", "r+b") as file:
        file.truncate(50)
    with pytest.raises(BadInput, match="boxes.*50 bytes.*2 rows.*delete"):
        again(store)
    with pytest.raises(BadInput, match="identity.json.*delete"):
        Store(store.folder, {"network": "b"}, ARRAYS)
    (store.folder / "pictures.jsonl").write_text("[1]\n")
    with pytest.raises(BadInput, match="pictures.jsonl"):
        again(store)


def test_a_disk_that_is_full_is_reported_and_the_rows_before_are_kept(store, monkeypatch):
    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(BadInput, match="regions: cannot be written: No space left"):
        store.add([picture(9)], values(9))
    monkeypatch.undo()
    assert len(again(store)) == 2 and store.find(picture(9)[1]) is None
    store.add([picture(11)], values(11))  # in the place of what was half written
    assert again(store).read("regions", [0, 1, 2])[:, 0, 0].tolist() == [5, 7, 11]
    assert (store.folder / "regions").stat().st_size == 3 * 3 * 2 * 4


def test_half_precision_and_features_that_are_not_finite(tmp_path):
    half = Store(tmp_path / "half", {}, ARRAYS | {"regions": ((3, 2), "f2")})
    half.add([picture(1)], values(1))
    assert half.read("regions", [0]).dtype == np.float32 and (half.folder / "regions").stat().st_size == 12
    for number, told in ((1e6, "half precision"), (float("nan"), "no finite regions")):
        wrong = half.add([picture(2)], values(number))
        assert list(wrong) == [picture(2)[0]] and told in wrong[picture(2)[0]]
    assert len(half) == 1


def test_only_the_rows_with_such_numbers_are_left_out(store):
    wrong = store.add([picture(number) for number in (1, 2, 3)], values(1, float("nan"), 3))
    assert list(wrong) == [picture(2)[0]]
    for opened in (store, again(store)):
        assert [opened.find(picture(number)[1]) for number in (1, 2, 3)] == [2, None, 3]
        assert opened.read("regions", [2, 3])[:, 0, 0].tolist() == [1, 3]


def test_facts_change_with_the_file(tmp_path):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a b.png"
    path.write_bytes(b"12")
    first = facts(path, tmp_path)
    assert first[:2] == ("in/a b.png", 2)
    path.write_bytes(b"123")
    assert facts(path, tmp_path) != first
