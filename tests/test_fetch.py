"""Fetching, against a server of the test's own: whole datasets, broken sources, kills, and no network."""
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import served
from conftest import refused
from served import COUNTS, SPLITS, Server, address, jpegs, packed, serve

from sources import archives, fetch, files, hub, layouts, scan_features
from sources.download import Address
from sources.fetch import Dataset

ROOT = Path(__file__).parent.parent
CHILD = """
import json, os, signal, sys
from pathlib import Path
from sources import fetch
from sources.download import Address
from sources.files import BadInput

captions, pictures, counts = json.loads(sys.argv[3])
pictures = {start: [Address(*one) for one in addresses] for start, addresses in pictures.items()}
source = fetch.Dataset([Address(*one) for one in captions], pictures, counts)
victim, left, replace = sys.argv[4], [int(sys.argv[5])], os.replace

def replace_or_die(old, new):  # dies before a file whose name ends so gets its name, for the n-th time
    left[0] -= str(new).endswith(victim)
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(old, new)

if victim:
    os.replace = replace_or_die
try:
    fetch.fetch(sys.argv[1], Path(sys.argv[2]), source)
except BadInput as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
"""


pytestmark = pytest.mark.usefixtures("no_proxy")


@pytest.fixture
def server():
    with Server() as running:
        yield running


def child(server: Server, root: Path, dataset: str, source: Dataset, victim: str = "", times: int = 0,
          **environment: str) -> subprocess.Popen:
    """Fetch in a process of its own, since the address of the hub is read when a program starts."""
    variables = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(root.parent / "hf-home"),
                 "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen([sys.executable, "-c", CHILD, dataset, str(root), json.dumps(source), victim, str(times)],
                            env=variables, stderr=subprocess.PIPE, text=True)


def said(process: subprocess.Popen, code: int = 0) -> str:
    """What a process said on standard error; it must end with this code."""
    text = process.communicate(timeout=60)[1]
    assert process.returncode == code, text
    return text


def check_whole(root: Path, dataset: str, source: Dataset) -> None:
    """The folder holds the dataset and nothing else, and reads as one."""
    listed = served.images(dataset, COUNTS[dataset])
    files = {path.name: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert files.keys() == {name for name, _, _ in listed} | {f"dataset_{dataset}.json"}
    assert {name: files[name] for name, _, _ in listed} == jpegs(listed)
    found = layouts.read(dataset, root, regions="grid")
    assert {name: len(split.image_names) for name, split in found.items()} == source.counts
    caption_of = {name: captions for name, _, captions in listed}
    for split in found.values():
        assert None not in split.pictures
        assert split.captions == [caption for name in split.image_names for caption in caption_of[name]]
    assert fetch.finished(dataset, root)


@pytest.mark.parametrize("dataset", COUNTS)
def test_a_whole_dataset_is_fetched_once(tmp_path, server, dataset):
    source, root = serve(server, dataset), tmp_path / "data" / dataset
    assert not fetch.finished(dataset, root)
    plan = said(child(server, root, dataset, source))
    assert "research" in plan and "at its peak" in plan and all(a.url in plan for a in source.captions)
    check_whole(root, dataset, source)
    gets = server.gets()
    assert len(gets) == len(set(gets)) == 1 + len(source.pictures)  # the second addresses are left alone
    server.asked.clear()
    fetch.fetch(dataset, root, source)
    assert server.asked == []


def test_flickr30k_keeps_the_order_of_its_ids(tmp_path):
    """Bottom-up files are named by the place in Karpathy's list."""
    listed = served.images("flickr30k", SPLITS)
    (tmp_path / "table.csv").write_bytes(served.flickr30k_table(listed))
    rows = json.loads(archives.karpathy_json(tmp_path / "table.csv", "dataset_flickr30k.json"))["images"]
    assert [(row["imgid"], row["filename"]) for row in rows] == [(i, name) for i, (name, _, _) in enumerate(listed)]
    assert rows[1]["sentences"][2] == {"raw": listed[1][2][2], "sentid": 7}


def test_the_addresses_are_well_formed():
    for dataset, source in fetch.SOURCES.items():
        for addresses in (source.captions, *source.pictures.values()):
            assert len(addresses) == 2 and len({a.url for a in addresses}) == 2, dataset
            for one in addresses:
                assert len(one.hash) in (0, 32, 64) and set(one.hash) <= set("0123456789abcdef")
                commit = re.search("/resolve/(.+?)/", one.url)
                assert not commit or len(commit[1]) == 40 or (commit[1] == "main" and one.hash)


@pytest.mark.parametrize("fault, words", [
    ("gated", ["agree to its terms", "/datasets/nlphuji/flickr30k", "hf auth login"]),
    ("no repository", ["no such dataset"]), ("no file", ["no such file"]), ("error 500", ["transfer failed", "500"])])
def test_what_the_hub_refuses_is_reported_with_what_to_do(tmp_path, server, fault, words):
    source = serve(server, "flickr30k")
    server.faults[source.pictures[""][0].url.removeprefix(server.url)] = fault
    error = said(child(server, tmp_path / "data", "flickr30k", source), code=2).split("error: ")[1]
    assert error.count("\n") == 1 and all(word in error for word in [*words, "flickr30k-images.zip was not fetched"])
    assert f"put it into {tmp_path / 'data'}" in error
    assert not fetch.finished("flickr30k", tmp_path / "data")


def test_a_transfer_that_breaks_on_the_hub_is_tried_again(tmp_path, server):
    source = serve(server, "flickr30k")
    server.faults[source.pictures[""][0].url.removeprefix(server.url)] = "cut once"
    said(child(server, tmp_path / "data", "flickr30k", source))
    check_whole(tmp_path / "data", "flickr30k", source)
    assert server.gets().count("flickr30k-images.zip") == 2


# ------------------------------------------------------------------------------- plain addresses, in this very process


BAD_ZIPS = {
    "cut short": (lambda good: good[: len(good) * 95 // 100], "damaged"),
    "not an archive": (lambda good: b"<html>" * (len(good) // 6), "damaged"),
    "a flipped byte": (lambda good: good[:400] + bytes([good[400] ^ 1]) + good[401:], "damaged"),
    "a name that climbs out": (lambda good: rezipped(good, lambda name: f"../../{Path(name).name}"), "leads out"),
    "an absolute name": (lambda good: rezipped(good, lambda name: f"/tmp/{Path(name).name}"), "leads out"),
    "a link": (lambda good: rezipped(good, lambda name: name, mode=0o120777), "a link"),
    "a bomb": (lambda good: bomb(good), "would unpack to"),
    "a picture too few": (lambda good: rezipped(good, lambda name: name.replace("1001_ab", "other")), "1001_ab.jpg"),
}


def rezipped(good: bytes, rename: Callable[[str], str], mode: int = 0o100644) -> bytes:
    """The same archive with other names and modes."""
    content = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(content, "w") as new:
        for info in old.infolist():
            if not info.is_dir():
                renamed = zipfile.ZipInfo(rename(info.filename))
                renamed.external_attr = mode << 16
                new.writestr(renamed, old.read(info))
    return content.getvalue()


def bomb(good: bytes) -> bytes:
    """The same archive, in which one picture is many zeros."""
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in members if name.endswith("/1001_ab.jpg"))
    return packed(members | {name: bytes(20_000_000)})


def test_a_damaged_archive_is_refused_and_the_second_source_is_tried(tmp_path, server):
    for number, (kind, (damage, word)) in enumerate(BAD_ZIPS.items()):
        source, root = serve(server, "flickr30k", plain=True), tmp_path / str(number)
        good = server.files["/plain/flickr30k-images.zip"]
        bad = address(server, f"/bad{number}/images.zip", damage(good))
        broken = source._replace(pictures={"": [bad]})
        refused(lambda root=root, broken=broken: fetch.fetch("flickr30k", root, broken), bad.url, word)
        assert not fetch.finished("flickr30k", root), kind
        assert not list(fetch.work_of("flickr30k", root).rglob("*.zip"))
        both = source._replace(pictures={"": [bad, *source.pictures[""]]})
        fetch.fetch("flickr30k", root, both, quiet=True)
        check_whole(root, "flickr30k", source)


@pytest.mark.parametrize("fault, wrong, words", [
    ("cut", {}, "bytes, expected about"), ("", {"size": 1_000_000}, "expected about 1,000,000"),
    ("", {"hash": "0" * 64}, "expected 0000"), ("no file", {}, "404")])
def test_a_file_that_is_not_the_right_one_is_reported_with_every_address(tmp_path, server, fault, wrong, words):
    source = serve(server, "flickr8k", plain=True)
    first = source.pictures[""][0]._replace(**wrong)
    second = address(server, "/second/Images.zip", server.files["/release/Flickr8k_Dataset.zip"])
    server.faults = {"/release/Flickr8k_Dataset.zip": fault, "/second/Images.zip": "no file"}
    both = source._replace(pictures={"": [first, second]})
    refused(lambda: fetch.fetch("flickr8k", tmp_path, both), first.url, second.url, words, "Start again", str(tmp_path))
    server.faults = {"/release/Flickr8k_Dataset.zip": fault}
    fetch.fetch("flickr8k", tmp_path, both, quiet=True)
    check_whole(tmp_path, "flickr8k", source)


def test_captions_that_are_not_the_dataset_are_refused(tmp_path, server):
    source, listed = serve(server, "flickr30k", plain=True), served.images("flickr30k", SPLITS)
    few = [(name, split, captions[: 4 if name == listed[3][0] else 5]) for name, split, captions in listed]
    for content, word in ((served.flickr30k_table(listed[1:]), "found 4 train"),
                          (served.flickr30k_table(few), "4 captions"),
                          (served.flickr30k_table(listed).replace(b"[", b"(", 1), "image 0"), (b"\xff\xfe", "UTF-8")):
        bad = [address(server, "/bad/flickr_annotations_30k.csv", content)]
        refused(lambda bad=bad: fetch.fetch("flickr30k", tmp_path, source._replace(captions=bad)), bad[0].url, word)
        assert not (tmp_path / "dataset_flickr30k.json").exists()
    for inside, word in ({"Flickr_8k.trainImages.txt": b""}, "lacks"), ({"dataset_flickr30k.json": b"[" * 9}, "images"):
        bad = [address(server, "/bad/texts.zip", packed(inside))]
        refused(lambda bad=bad: fetch.fetch("flickr30k", tmp_path, source._replace(captions=bad)), bad[0].url, word)
    spare = source._replace(captions=[*bad, source.captions[1]])  # Karpathy's own JSON
    fetch.fetch("flickr30k", tmp_path, spare)
    check_whole(tmp_path, "flickr30k", source)
    (tmp_path / "dataset_flickr30k.json").write_bytes(served.karpathy(listed[:-1]))  # the user's own, a part of it
    refused(lambda: fetch.fetch("flickr30k", tmp_path, source), "found 5 train, 2 val, 1 test images")


def test_what_the_user_has_put_there_is_used_and_kept(tmp_path, server):
    source = serve(server, "flickr8k", plain=True)
    texts, pictures = server.files.pop("/release/Flickr8k_text.zip"), server.files.pop("/release/Flickr8k_Dataset.zip")
    own = [tmp_path / "Flickr8k_text.zip", tmp_path / "Flickr8k_Dataset.zip"]
    own[0].write_bytes(texts)
    own[1].write_bytes(pictures[:-9])
    refused(lambda: fetch.fetch("flickr8k", tmp_path, source), str(own[1]), "Remove this file")
    own[1].write_bytes(pictures)
    fetch.fetch("flickr8k", tmp_path, source)
    assert server.asked == [] and [path.read_bytes() for path in own] == [texts, pictures]
    for path in own:
        path.unlink()
    check_whole(tmp_path, "flickr8k", source)
    one = next((tmp_path / "images").iterdir())
    one.unlink()  # a picture that is lost is fetched again, with its archive
    server.files |= {"/release/Flickr8k_Dataset.zip": pictures}
    fetch.fetch("flickr8k", tmp_path, source)
    assert server.gets() == ["Flickr8k_Dataset.zip"]
    check_whole(tmp_path, "flickr8k", source)


def test_a_folder_with_captions_alone_is_not_finished(tmp_path, server):
    """COCO's own archives, put beside its own JSON, are unpacked."""
    source = serve(server, "coco", plain=True)
    content = {path.rsplit("/", 1)[1]: content for path, content in server.files.items()}
    server.files.clear()
    (tmp_path / "dataset_coco.json").write_bytes(content["dataset_coco.json"])
    assert not fetch.finished("coco", tmp_path)
    for name in re.findall(r"COCO_val2014_\w+.jpg", content["dataset_coco.json"].decode()):
        (tmp_path / name).touch()
    assert not fetch.finished("coco", tmp_path)  # val2014 alone
    for name in ("train2014.zip", "val2014.zip"):
        (tmp_path / name).write_bytes(content[name])
    fetch.fetch("coco", tmp_path, source)
    assert not fetch.finished("coco", tmp_path)  # the next start looks again at what the archives hold
    for name in ("train2014.zip", "val2014.zip"):
        (tmp_path / name).unlink()
    check_whole(tmp_path, "coco", source)


def test_an_empty_picture_does_not_hide_a_whole_one(tmp_path, server):
    source = serve(server, "flickr8k", plain=True)
    fetch.fetch("flickr8k", tmp_path, source)
    whole = next((tmp_path / "images").iterdir())
    (tmp_path / whole.name).touch()
    fetch.fetch("flickr8k", tmp_path, source)
    assert (tmp_path / whole.name).read_bytes() == whole.read_bytes()


# ------------------------------------------------------------------------------------------------- disk, kills, network


def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(tmp_path, server, monkeypatch, capsys):
    source = serve(server, "coco", plain=True)
    sizes = [addresses[0].size for addresses in source.pictures.values()]
    captions = source.captions[0].size
    peak = 1.03 * captions + max(2.03 * sizes[0], 1.03 * sizes[0] + 2.03 * sizes[1])  # an archive beside its pictures
    monkeypatch.setattr(fetch, "free_bytes", lambda folder: int(peak) - 1)
    refused(lambda: fetch.fetch("coco", tmp_path / "a" / "b", source), "at its peak", "--data-root")
    assert server.asked == [] and not (tmp_path / "a").exists()
    assert f"{peak / 1e6:.1f} MB of disk at its peak" in capsys.readouterr().err
    monkeypatch.setattr(fetch, "free_bytes", lambda folder: int(peak) + 1)
    fetch.fetch("coco", tmp_path, source)
    check_whole(tmp_path, "coco", source)


def test_a_disk_that_becomes_full_is_reported_and_what_is_whole_is_kept(tmp_path, server, monkeypatch):
    source = serve(server, "flickr8k", plain=True)
    twice = source._replace(pictures={"": source.pictures[""] * 2})
    copy, room = archives.shutil.copyfileobj, [3]

    def write(inside: object, file: object) -> None:
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        copy(inside, file)

    monkeypatch.setattr(archives.shutil, "copyfileobj", write)
    refused(lambda: fetch.fetch("flickr8k", tmp_path, twice), "the disk is full", str(tmp_path))
    assert len(list((tmp_path / "images").glob("*.jpg"))) == 3
    room[0] = 99
    fetch.fetch("flickr8k", tmp_path, source)
    assert server.gets() == ["Flickr8k_text.zip", "Flickr8k_Dataset.zip"] and room[0] == 99 - 6
    check_whole(tmp_path, "flickr8k", source)


@pytest.mark.parametrize("victim, times", [("dataset_flickr30k.json", 0), ("dataset_flickr30k.json", 1), (".jpg", 0),
                                           (".jpg", 4)])
def test_killed_while_it_converts_or_unpacks(tmp_path, server, victim, times):
    source, root = serve(server, "flickr30k"), tmp_path / "data"
    said(child(server, root, "flickr30k", source, victim, times), code=-signal.SIGKILL)
    assert not fetch.finished("flickr30k", root)
    assert len(list(root.rglob("*.jpg"))) == (times if victim == ".jpg" else 0)
    said(child(server, root, "flickr30k", source))
    check_whole(root, "flickr30k", source)
    assert sorted(server.gets()) == ["flickr30k-images.zip", "flickr_annotations_30k.csv"]  # nothing twice


def test_killed_while_it_downloads(tmp_path, server):
    source, root = serve(server, "flickr30k"), tmp_path / "data"
    work = fetch.work_of("flickr30k", root)
    path = source.pictures[""][0].url.removeprefix(server.url)
    server.faults[path] = "slow"
    process = child(server, root, "flickr30k", source)
    while not ("flickr30k-images.zip" in server.gets() and list(work.rglob("*.incomplete"))):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    said(process, code=-signal.SIGKILL)
    assert not fetch.finished("flickr30k", root) and list(work.rglob("*.incomplete"))
    server.faults[path] = "no file"
    said(child(server, root, "flickr30k", source), code=2)
    assert not list(work.rglob("*.incomplete"))  # half a file is of no use to the library
    server.faults.clear()
    said(child(server, root, "flickr30k", source))
    check_whole(root, "flickr30k", source)
    assert server.gets().count("flickr_annotations_30k.csv") == 1


def test_two_datasets_in_one_folder_leave_each_other_s_archives_alone(tmp_path, server):
    kept = fetch.work_of("coco", tmp_path) / "0" / "train2014.zip"  # of a fetch that was broken off
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"whole")
    for _ in range(2):  # the second time nothing is missing
        fetch.fetch("flickr8k", tmp_path, serve(server, "flickr8k", plain=True))
        assert kept.read_bytes() == b"whole" and fetch.finished("flickr8k", tmp_path)


def test_pictures_behind_a_link_are_there(tmp_path, server):
    root = tmp_path / "data"
    fetch.fetch("flickr8k", root, serve(server, "flickr8k", plain=True))
    pictures = next(path for path in root.iterdir() if path.is_dir())
    pictures.rename(tmp_path / "elsewhere")
    pictures.symlink_to(tmp_path / "elsewhere")
    assert fetch.finished("flickr8k", root)


def test_two_programs_do_not_fetch_into_one_folder(tmp_path, server):
    source = serve(server, "flickr8k", plain=True)
    fetch.work_of("flickr8k", tmp_path).mkdir()
    with files.locked(fetch.work_of("flickr8k", tmp_path)):
        refused(lambda: fetch.fetch("flickr8k", tmp_path, source), "another program")
    fetch.fetch("flickr8k", tmp_path, source)
    check_whole(tmp_path, "flickr8k", source)


@pytest.mark.parametrize("dataset, files", [
    ("flickr30k", ["12.9 MB", "4.4 GB", "nlphuji/flickr30k/resolve/2b239be", "TPagent/Flickr30k", "-images.zip"]),
    ("coco", ["144.2 MB", "13.5 GB", "6.6 GB", "dataset_coco.json", "images.cocodataset.org/zips/val2014.zip"]),
    ("flickr8k", ["2.3 MB", "1.1 GB", "jbrownlee/Datasets/releases/download/Flickr8k/Flickr8k_Dataset.zip"])])
def test_without_a_network_two_seconds_tell_what_to_fetch_and_where_to_put_it(tmp_path, monkeypatch, dataset, files):
    def hang(*given: object) -> None:
        time.sleep(30)
        raise OSError

    monkeypatch.setattr(hub.socket, "create_connection", hang)
    monkeypatch.setattr(hub, "WAIT", hub.WAIT if dataset == "flickr30k" else 0.2)
    start = time.perf_counter()
    monkeypatch.setattr(fetch, "free_bytes", lambda folder: 10**12)
    refused(lambda: fetch.fetch(dataset, tmp_path / "data", quiet=True),
            "no network", *files, str(tmp_path / "data"), "--dataset scenes")
    assert time.perf_counter() - start < hub.WAIT + 2  # not the 30 of a hanging call
    assert list(tmp_path.iterdir()) == []


def test_a_second_source_is_taken_if_the_first_cannot_be_reached(tmp_path, server):
    source = serve(server, "flickr8k", plain=True)
    gone = Address("http://127.0.0.1:9/Flickr8k_Dataset.zip", source.pictures[""][0].size)
    fetch.fetch("flickr8k", tmp_path, source._replace(pictures={"": [gone, *source.pictures[""]]}))
    check_whole(tmp_path, "flickr8k", source)


# ------------------------------------------------------------------------------------------------------ SCAN's features


KAGGLEHUB = """
import os
from pathlib import Path

def dataset_download(handle, path):
    assert handle == "kuanghueilee/scan-features"
    target = Path(os.environ["KAGGLEHUB_CACHE"]) / "datasets/kuanghueilee/scan-features/versions/2" / path
    target.parent.mkdir(parents=True, exist_ok=True)
    if os.environ.get("KAGGLE_FAILS") == target.name:
        raise ConnectionError("broken")
    target.write_text(path)
    return str(target)
"""


def test_features_of_scan_come_by_kagglehub(tmp_path, monkeypatch, capsys):
    root, free = tmp_path / "data", [10**12]
    root.mkdir()
    monkeypatch.setattr(scan_features, "free_bytes", lambda folder: free[0])
    monkeypatch.setitem(sys.modules, "kagglehub", None)  # as if it were not installed
    refused(lambda: scan_features.fetch_scan_features("flickr30k", root), "-m pip install kagglehub",
            "without boxes", "papers' tables", "9.1 GB")
    refused(lambda: scan_features.fetch_scan_features("flickr8k", root), "flickr8k")
    monkeypatch.delitem(sys.modules, "kagglehub")
    (tmp_path / "kagglehub.py").write_text(KAGGLEHUB)
    monkeypatch.syspath_prepend(tmp_path)
    free[0] = 10**9
    refused(lambda: scan_features.fetch_scan_features("flickr30k", root), "9.1 GB of disk")
    part = root / ".fetching-features-flickr30k" / "datasets" / "part"  # a transfer that was stopped before its end
    part.parent.mkdir(parents=True)
    part.touch()
    os.truncate(part, 9 * 10**9)
    monkeypatch.setattr(hub, "within_reach", lambda address: False)
    refused(lambda: scan_features.fetch_scan_features("flickr30k", root), "no network")
    free[0] = 10**12
    refused(lambda: scan_features.fetch_scan_features("flickr30k", root), "no network", "f30k_precomp")
    monkeypatch.setattr(hub, "within_reach", lambda address: address == "https://www.kaggle.com")
    with files.locked(root / ".fetching-features-flickr30k"):
        refused(lambda: scan_features.fetch_scan_features("flickr30k", root), "another program")
    monkeypatch.setenv("KAGGLE_FAILS", "train_ims.npy")
    refused(lambda: scan_features.fetch_scan_features("flickr30k", root), "broken", "Start again")
    assert not (root / "f30k_precomp").exists()
    monkeypatch.delenv("KAGGLE_FAILS")
    scan_features.fetch_scan_features("flickr30k", root)
    found = {path.relative_to(root).as_posix(): path.read_text() for path in root.rglob("*") if path.is_file()}
    assert found == {f"f30k_precomp/{split}_{kind}": f"data/data/f30k_precomp/{split}_{kind}"
                     for split in ("train", "dev", "test") for kind in ("ims.npy", "caps.txt")}
    assert "KAGGLEHUB_CACHE" not in os.environ
    (root / "f30k_precomp" / "train_ims.npy").unlink()
    (root / "f30k_precomp" / "dev_ims.npy").write_text("my own")
    scan_features.fetch_scan_features("flickr30k", root)  # what is lost, and no more
    assert (root / "f30k_precomp" / "train_ims.npy").exists() and not (root / ".fetching-features-flickr30k").exists()
    assert (root / "f30k_precomp" / "dev_ims.npy").read_text() == "my own"
    capsys.readouterr()
    scan_features.fetch_scan_features("flickr30k", root)
    assert capsys.readouterr().err == ""
