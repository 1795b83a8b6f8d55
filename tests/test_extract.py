"""extract.py, pictures.py: one pass over the pictures, nothing computed twice, nothing stale; and by command line."""
import errno
import json
import os
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import WORDS, save_clip, save_pictures
from PIL import Image

import data
import retrieve
import train
from harness import folder, pictures
from harness.settings import Settings, make
from sources import extract, files, networks, photos
from sources.files import BadInput


class Means:
    """A network that says of a picture its mean colour; it remembers which it has seen."""

    batch_size = 2

    def __init__(self, seen: list, weights: str = "w"):
        self.seen, self.prepare = seen, prepare
        self.identity = {"kind": "grid", "network": "means", "weights": weights, "regions": 2, "dim": 3}

    def look(self, batch: dict) -> dict:
        colours = batch["pixels"].numpy()
        self.seen += colours.tolist()
        return {"regions": np.repeat(colours[:, None], 2, 1), "boxes": np.zeros((len(colours), 2, 4)),
                "count": np.full(len(colours), 2)}


def prepare(picture: Image.Image) -> dict:
    return {"pixels": torch.from_numpy(np.asarray(picture, np.float32).mean((0, 1)))}


def colour(path: Path) -> list[float]:
    return np.asarray(Image.open(path), np.float32).mean((0, 1)).tolist()


@pytest.fixture
def seen(monkeypatch) -> list:
    seen: list = []
    monkeypatch.setattr(pictures, "regions_network", lambda settings, device: Means(seen))
    return seen


@pytest.fixture
def root(tmp_path) -> Path:
    save_pictures(tmp_path, [f"{i}.png" for i in range(5)])
    return tmp_path


def settings(root: Path, **more) -> Settings:
    return make(dict(dataset="folder", data_root=str(root), regions="grid", feature_dtype="float32") | more)


def split(root: Path, names: list[str], name: str = "train") -> data.Split:
    found = photos.find(root, [("", each) for each in names])
    captions = [f"{each} {i}" for each in names for i in range(2)]
    return data.Split(name, captions, np.arange(len(names)).repeat(2), None, names, found)


def features(split: data.Split) -> list:
    return split.features.read(np.arange(len(split.features)))[0][:, 0].tolist()


def run(root: Path, names: list[str], **more) -> data.Split:
    own = split(root, names)
    pictures.prepare({"train": own}, settings(root, **more), root / "run")
    return own


ALL = [f"{i}.png" for i in range(5)]


def test_each_picture_is_computed_once_for_all_splits(root, seen):
    splits = {"train": split(root, ALL[:3]), "val": split(root, ALL[3:], "val")}
    found = pictures.prepare(splits, settings(root), root / "run")
    assert found["regions"]["network"] == "means" and found["clip"] is None
    assert np.allclose(features(splits["train"]) + features(splits["val"]), [colour(root / name) for name in ALL])
    assert len(seen) == 5
    other = run(root, [ALL[4], ALL[0]])  # another order, another split: all there
    assert np.allclose(features(other), [colour(root / ALL[4]), colour(root / ALL[0])]) and len(seen) == 5


def test_what_is_said_meanwhile_does_not_stand_among_the_answers(root, seen, monkeypatch, capsys):
    monkeypatch.setattr(extract, "FIRST", 1)
    run(root, ALL)
    said = capsys.readouterr()
    assert "minutes for 5 pictures, measured on the first 2" in said.err and not said.out


def test_features_computed_anew_elsewhere_are_still_the_run_s_data_and_other_pictures_are_not(root, seen, monkeypatch):
    known = folder.fingerprint(run(root, ALL))
    shutil.rmtree(root / "cache")
    look = Means.look
    monkeypatch.setattr(Means, "look", lambda *given: look(*given) | {"regions": look(*given)["regions"] + 0.01})
    again = run(root, ALL)
    assert folder.fingerprint(again) == known and not np.allclose(features(again)[0], colour(root / "0.png"), atol=1e-3)
    Image.new("RGB", (9, 9), (1, 2, 3)).save(root / "3.png")
    assert folder.fingerprint(run(root, ALL)) != known


def test_the_cache_of_a_folder_that_cannot_be_written_goes_to_the_run(root, seen, monkeypatch):
    """On Windows and on some network file systems only an attempt tells whether it can."""
    def check_folder(folder: Path) -> None:
        raise BadInput("cannot be written")

    monkeypatch.setattr(pictures, "check_folder", check_folder)
    run(root, ALL)
    assert (root / "run" / "cache").is_dir() and not (root / "cache").exists()


def test_only_what_is_new_is_computed(root, seen):
    run(root, ALL[:3])
    run(root, ALL)
    assert len(seen) == 5
    Image.new("RGB", (9, 9), (1, 2, 3)).save(root / "1.png")           # edited
    shutil.copy(root / "2.png", root / "copy.png")                     # copied
    (root / "deep").mkdir()
    (root / "3.png").rename(root / "deep" / "3.png")                   # moved
    os.utime(root / "4.png", ns=(0, 0))                                # touched
    names = ["0.png", "1.png", "2.png", "copy.png", "deep/3.png", "4.png"]
    found = run(root, names)
    assert seen[5:] == [[1, 2, 3]]
    assert np.allclose(features(found), [colour(root / name) for name in names])


def test_pictures_that_were_copied_with_new_times_need_no_network(root, seen, monkeypatch):
    identity = {"regions": Means(seen).identity}
    run(root, ALL)
    for name in ALL:
        os.utime(root / name, ns=(0, 0))

    def absent(settings, device):
        raise BadInput("no weights here")

    monkeypatch.setattr(pictures, "regions_network", absent)
    again = split(root, ALL)
    pictures.prepare({"train": again}, settings(root), root / "run", wanted=identity)
    assert np.allclose(features(again), [colour(root / name) for name in ALL])
    content = (root / "1.png").read_bytes()
    (root / "1.png").write_bytes(content[:-1] + b"?")  # another picture of the same name and size has to be looked at
    with pytest.raises(BadInput, match="no weights here"):
        pictures.prepare({"train": split(root, ALL)}, settings(root), root / "run", wanted=identity)


def test_twins_in_one_batch_are_computed_once(root, seen):
    shutil.copy(root / "0.png", root / "00.png")
    found = run(root, ["0.png", "00.png"])
    assert len(seen) == 1 and np.allclose(features(found), [colour(root / "0.png")] * 2)


def test_other_weights_or_another_precision_have_a_store_of_their_own(root, seen, monkeypatch):
    first = run(root, ALL)
    assert len(seen) == 5
    half = run(root, ALL, feature_dtype="float16")
    assert len(seen) == 10 and half.features.path != first.features.path
    monkeypatch.setattr(pictures, "regions_network", lambda settings, device: Means(seen, "other"))
    assert run(root, ALL).features.path != first.features.path and len(seen) == 15


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_extraction_goes_on_where_it_was_stopped(root, seen, monkeypatch, capsys, stop):
    class Stops(Means):
        def look(self, batch):
            if len(self.seen) >= 2:
                raise stop("here")
            return super().look(batch)

    monkeypatch.setattr(pictures, "regions_network", lambda settings, device: Stops(seen))
    with pytest.raises(stop):
        run(root, ALL)
    assert len(seen) == 2 and (stop is RuntimeError or "2 of 5" in capsys.readouterr().err)
    monkeypatch.setattr(pictures, "regions_network", lambda settings, device: Means(seen))
    assert np.allclose(features(run(root, ALL)), [colour(root / name) for name in ALL]) and len(seen) == 5


def test_a_second_program_waits_for_the_first_and_computes_nothing_twice(root, seen, monkeypatch):
    begun, second_waits = threading.Event(), threading.Event()

    class Slow(Means):
        def look(self, batch):
            begun.set()
            assert second_waits.wait(20)
            return super().look(batch)

    def told(message: str, file) -> None:
        assert message.startswith("another program is looking at these pictures")
        second_waits.set()

    monkeypatch.setattr(pictures, "regions_network", lambda settings, device: Slow(seen))
    monkeypatch.setattr(extract, "print", told, raising=False)
    with ThreadPoolExecutor(2) as programs:
        first = programs.submit(run, root, ALL[:3])
        assert begun.wait(20)
        second = programs.submit(run, root, ALL)
        splits = first.result(30), second.result(30)
    assert len(seen) == 5  # three by the first, two by the second
    for split, names in zip(splits, (ALL[:3], ALL), strict=True):
        assert np.allclose(features(split), [colour(root / name) for name in names])


@pytest.mark.parametrize("workers", [None, 0, 2])
def test_workers_see_the_same(root, seen, monkeypatch, workers):
    monkeypatch.setattr(extract, "FEW", 0)
    (root / "2.png").write_bytes(b"no picture")
    own = split(root, ALL)
    pictures.prepare({"train": own}, settings(root, skip_bad=True), root / "run", workers=workers)
    assert np.allclose(features(own), [colour(root / name) for name in ALL if name != "2.png"])


def test_workers_send_arrays_because_tensors_would_need_shared_memory(root):
    cache = extract.Cache(lambda: Means([]), root / "cache")
    with cache.opened():
        decoded = extract.Decoded([root / name for name in ALL], [["regions"]] * 5, {"regions": cache})
    digests, errors, prepared = decoded[[0, 1]]
    assert len(digests) == 2 and not errors and type(prepared["regions"][1]["pixels"]) is np.ndarray


def test_a_loader_with_workers_leaves_arrays_as_they_are(root, seen, monkeypatch):
    monkeypatch.setattr(extract, "FEW", 0)
    added = []
    add = extract.Cache.add
    monkeypatch.setattr(extract.Cache, "add", lambda *given: added.append(given[3]) or add(*given))
    run(root, ALL)
    assert len(added) == 3 and all(type(batch["pixels"]) is np.ndarray for batch in added)


def test_a_picture_whose_features_are_not_finite_is_a_bad_picture(root, seen, monkeypatch):
    class Fails(Means):
        def look(self, batch):
            found = super().look(batch)
            found["regions"][np.abs(found["regions"][:, 0] - colour(root / "1.png")).max(1) < 1e-3] = 1e5
            return found

    monkeypatch.setattr(pictures, "regions_network", lambda settings, device: Fails(seen))
    with pytest.raises(BadInput, match="1 of 5 pictures cannot be used, the first is 1.png: .*half precision"):
        run(root, ALL, feature_dtype="float16")
    found = run(root, ALL, feature_dtype="float16", skip_bad=True)
    assert found.image_names == ["0.png", "2.png", "3.png", "4.png"] and len(seen) == 6  # only the bad one again


def test_bad_pictures_are_reported_after_all_others_are_safe(root, seen, capsys):
    (root / "1.png").write_bytes(b"no picture")
    names = [*ALL, "nowhere é.png"]
    with pytest.raises(BadInput) as error:
        run(root, names)
    for part in ("2 of 6 pictures", "1.png", "--skip-bad", str(root / "cache" / "bad_pictures.txt")):
        assert part in str(error.value)
    listed = (root / "cache" / "bad_pictures.txt").read_text(encoding="utf8").splitlines()
    assert len(listed) == 2 and "1.png" in listed[0] and "nowhere é.png: no such picture" in listed[1]
    assert len(seen) == 4
    found = run(root, names, skip_bad=True)
    assert "2 of 6" in capsys.readouterr().err and len(seen) == 4
    assert found.image_names == ["0.png", "2.png", "3.png", "4.png"] and len(found.pictures) == 4
    assert np.allclose(features(found), [colour(root / name) for name in found.image_names])
    assert found.captions == [f"{name} {i}" for name in found.image_names for i in range(2)]
    assert found.image_of.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    for names, left in ((["1.png"], 0), (["0.png", "1.png"], 1)):
        with pytest.raises(BadInput, match=f"{left} of split train's pictures can be used, expected 2 or more"):
            run(root, names, skip_bad=True)


def test_regions_and_the_clip_guide_in_one_pass(root, seen, tmp_path_factory, monkeypatch):
    clip = save_clip(tmp_path_factory.mktemp("clip"))
    opened = []
    read = photos.read
    monkeypatch.setattr(photos, "read", lambda *given: opened.append(given[0]) or read(*given))
    own = split(root, ALL)
    guided = settings(root, model="user", guide="clip", clip_model=str(clip))
    found = pictures.prepare({"train": own}, guided, root / "run")
    assert len(opened) == 5 and own.clip.shape == (5, 6) and found["clip"]["dim"] == 6
    network = networks.Clip(str(clip))
    want = [network.look({name: value[None] for name, value in network.prepare(read(root / each)).items()})["clip"][0]
            for each in ALL]
    assert np.allclose(own.clip, want, atol=1e-5)
    other = settings(root, model="user", guide="clip", clip_model=str(save_clip(tmp_path_factory.mktemp("clip"), 1)))
    again = split(root, ALL)
    pictures.prepare({"train": again}, other, root / "run")  # another CLIP: its own store, the regions' as before
    assert len(seen) == 5 and not np.allclose(again.clip, own.clip, atol=1e-3)


def test_pixels_in_memory_are_looked_at_once_too(seen, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    chosen = make(dict(regions="grid", cache=str(tmp_path), feature_dtype="float32"))
    for _ in range(2):
        own = data.Split("val", ["a"] * 4, np.arange(4), None, list("abcd"), pixels)
        pictures.prepare({"val": own}, chosen, tmp_path)
        assert np.allclose(features(own), pixels.astype(np.float32).mean((1, 2)))
    assert len(seen) == 4


def test_a_model_keeps_to_the_network_it_was_trained_with(root, seen, monkeypatch):
    found = pictures.prepare({"train": split(root, ALL[:4])}, settings(root), root / "run")

    def gone(settings, device):
        raise BadInput("the network is gone")

    monkeypatch.setattr(pictures, "regions_network", gone)
    pictures.prepare({"val": split(root, ALL[:4])}, settings(root), root / "run", wanted=found)  # nothing is missing
    with pytest.raises(BadInput, match="gone"):
        pictures.prepare({"val": split(root, ALL)}, settings(root), root / "run", wanted=found)
    monkeypatch.setattr(pictures, "regions_network", lambda settings, device: Means(seen, "other"))
    with pytest.raises(BadInput, match="trained with the network means.*weights w.*but here is means.*weights other"):
        pictures.prepare({"val": split(root, ALL)}, settings(root), root / "run", wanted=found)


def test_any_picture_can_be_seen_as_a_scene_is(tmp_path):
    splits = data.load("scenes", None, ("val",))
    found = pictures.prepare(splits, Settings(), tmp_path)
    Image.fromarray(splits["val"].pictures[3]).save(tmp_path / "scene.png")
    alone = pictures.one(tmp_path / "scene.png", Settings(), "cpu", found)
    assert np.allclose(alone.features.read([0])[0], splits["val"].features.read([3])[0], atol=1e-6)
    with pytest.raises(BadInput, match="--fixed-regions 2: image 0 of query has 36"):
        pictures.one(tmp_path / "scene.png", make(dict(model="user", fixed_regions=2)), "cpu", found)
    split = data.Split("images", [], np.zeros(0, np.int64), None, ["scene.png"], [tmp_path / "scene.png"])
    pictures.prepare({"images": split}, make(dict(data_root=str(tmp_path))), tmp_path, wanted=found)
    assert np.allclose(split.features.read([0])[0], splits["val"].features.read([3])[0], rtol=1e-3)  # stored in float16


def test_ctrl_c_waits_while_processes_start():
    with pytest.raises(KeyboardInterrupt), extract.uninterrupted():
        signal.raise_signal(signal.SIGINT)
        waited = True
    assert waited and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_complete_cache_that_may_only_be_read_is_enough(root, seen, monkeypatch):
    first, again = split(root, ALL), split(root, ALL)
    found = pictures.prepare({"train": first}, settings(root), root / "run")

    def closed(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(extract.FileLock, "acquire", closed)
    monkeypatch.setattr(files, "append", closed)
    seen.clear()
    pictures.prepare({"train": again}, settings(root), root / "run", wanted=found)
    assert not seen and features(again) == features(first)


def test_the_cache_lies_beside_the_data_or_else_beside_the_run(tmp_path):
    assert pictures.cache_folder(settings(tmp_path), tmp_path / "run") == tmp_path / "cache"
    assert pictures.cache_folder(settings(tmp_path / "nowhere"), tmp_path / "run") == tmp_path / "run" / "cache"
    assert pictures.cache_folder(Settings(), tmp_path / "run") == tmp_path / "run" / "cache"
    assert pictures.cache_folder(settings(tmp_path, cache="else"), tmp_path / "run") == Path("else")


# --------------------------------------------------------------------------------------- the whole way, by command line


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, list[str]]:
    """For each kind of regions the flags that name a small network of random weights."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    small = "fasterrcnn_mobilenet_v3_large_320_fpn"
    torch.save(torchvision.models.get_model(small, weights=None, weights_backbone=None, num_classes=3).state_dict(),
               folder / "detector.pth")
    torch.save(torchvision.models.mobilenet_v3_small().state_dict(), folder / "grid.pth")
    return {"detector": ["--region-network", small, "--region-weights", str(folder / "detector.pth"), "--boxes", "3",
                         "--picture-side", "64"],
            "grid": ["--region-network", "mobilenet_v3_small", "--region-weights", str(folder / "grid.pth"), "--boxes",
                     "4", "--picture-side", "64"],
            "clip": ["--clip-model", str(save_clip(folder / "clip"))]}


@pytest.fixture
def own(tmp_path) -> Path:
    """A folder of one's own: 20 pictures, two captions each in a table that names no splits."""
    folder = tmp_path / "own pictures"
    names = [f"album é/{i}.png" for i in range(20)]
    save_pictures(folder, names)
    rng = np.random.default_rng(0)
    lines = [f'"{name}","{" ".join(rng.choice(WORDS, 6))}"' for name in names for _ in range(2)]
    (folder / "captions.csv").write_text("\n".join(["file,caption", *lines]), encoding="utf8")
    return folder


def small(flags: list[str], root: Path) -> list[str]:
    flags = list(flags)
    flags[flags.index("--dataset") + 1], flags[flags.index("--data-root") + 1] = "folder", str(root)
    return [*flags, "--epochs", "1"]


@pytest.mark.parametrize("kind", ["detector", "clip"])
def test_from_pictures_to_a_model_and_a_search(kind, flags, own, weights, tmp_path, capsys, request):
    """A run of the detector also draws; the others would draw the same."""
    folder, drawn = tmp_path / "run", {"retrieval.png", "alignment.png"} if kind == "detector" else set()
    if not drawn:
        request.getfixturevalue("undrawn")
    assert train.main([*small(flags, own), "--regions", kind, *weights[kind]]) == 0
    assert drawn <= {path.name for path in folder.iterdir()}
    assert json.loads((folder / "metrics.json").read_text())["images"] == 2 and (own / "cache").is_dir()
    assert retrieve.main(["evaluate", str(folder), "--split", "val"]) == 0

    new = tmp_path / "holiday"
    names = ["a.png", "with space.png", "é/b.png"]
    save_pictures(new, names, seed=3)
    capsys.readouterr()
    index = tmp_path / "index"
    assert retrieve.main(["index", str(folder), "--images", str(new), "--out", str(index)]) == 0
    assert "3 images and 0 captions" in capsys.readouterr().out
    assert not (new / "cache").exists()  # one's pictures are left alone
    sheet = tmp_path / "found.png"
    assert retrieve.main(["search", str(index), "a red dog", "--json", "--save", str(sheet)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[0])["found"]
    assert sorted(item["name"] for item in found) == names and sheet.is_file()
    assert retrieve.main(["search", str(folder), "--image", str(new / "a.png")]) == 0  # any file finds captions
    assert retrieve.main(["search", str(index), "--image", str(new / "a.png")]) == 2
    assert "without captions" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_a_picture_more_is_a_picture_more_in_the_index(flags, own, weights, tmp_path, capsys, monkeypatch):
    assert train.main([*small(flags, own), "--regions", "grid", *weights["grid"]]) == 0
    run, index = str(tmp_path / "run"), str(tmp_path / "index")
    assert retrieve.main(["index", run, "--images", str(own), "--out", index]) == 0
    save_pictures(own, ["new.png"], seed=9)
    (own / "broken.jpg").write_bytes(b"no picture")
    assert retrieve.main(["index", run, "--images", str(own), "--out", index]) == 2
    assert "broken.jpg" in capsys.readouterr().err
    looked = []
    look = networks.Grid.look
    monkeypatch.setattr(networks.Grid, "look", lambda *given: looked.append(len(given[1]["pixels"])) or look(*given))
    assert retrieve.main(["index", run, "--images", str(own), "--out", index, "--skip-bad"]) == 0
    said = capsys.readouterr()
    assert "1 of 22 pictures" in said.err and "21 images" in said.out
    assert sum(looked) == 0  # the new one was kept before
    monkeypatch.chdir(index)
    assert retrieve.main(["index", run, "--images", str(own), "--out", ".", "--skip-bad"]) == 0


@pytest.mark.usefixtures("undrawn")
def test_a_run_is_searched_with_its_own_kind_of_regions_only(flags, own, weights, root, tmp_path, capsys):
    """Trained on files: nobody knows what computed them. Trained by other weights: refused by name."""
    assert train.main([*flags[:-2], "--epochs", "1", "--out", str(tmp_path / "files"), "--data-root",
                       str(make_scan(tmp_path / "scan"))]) == 0
    assert retrieve.main(["index", str(tmp_path / "files"), "--images", str(root), "--out", str(tmp_path / "i")]) == 2
    assert "feature files" in capsys.readouterr().err
    assert train.main([*small(flags, own), "--regions", "grid", *weights["grid"]]) == 0
    torch.manual_seed(5)
    torch.save(torchvision.models.mobilenet_v3_small().state_dict(), tmp_path / "other.pth")
    assert retrieve.main(["index", str(tmp_path / "run"), "--images", str(root), "--out", str(tmp_path / "i"),
                          "--region-weights", str(tmp_path / "other.pth")]) == 2
    assert "the model was trained with the network mobilenet_v3_small (weights" in capsys.readouterr().err
    assert train.main(["--resume", "--out", str(tmp_path / "run"), "--epochs", "2"]) == 0  # from the cache alone


def make_scan(folder: Path) -> Path:
    folder.mkdir()
    for name, images in (("train", 8), ("dev", 4)):
        np.save(folder / f"{name}_ims.npy", np.random.default_rng(0).normal(size=(images, 3, 6)).astype(np.float32))
        (folder / f"{name}_caps.txt").write_text("\n".join(["a red dog"] * images))
    return folder


@pytest.mark.usefixtures("undrawn")
def test_karpathy_s_json_and_the_pictures_are_enough(flags, own, weights, tmp_path, capsys):
    images = [{"filename": f"{i}.png", "filepath": "album é", "split": ["train", "val"][i % 5 == 0],
               "sentences": [{"raw": "a red dog runs"}, {"raw": "a blue cat"}]} for i in range(20)]
    (own / "dataset_flickr8k.json").write_text(json.dumps({"images": images}))
    flags = [*flags, "--data-root", str(own), "--epochs", "1", *weights["grid"]]
    assert train.main(flags) == 0  # no --regions: there are no feature files and no GPU, so the grid looks
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["pictures"]["regions"] == "grid"
    said = capsys.readouterr().out
    assert "flickr8k has no test split" in said and "--regions detector changes that" in said
    assert retrieve.main(["search", str(tmp_path / "run"), "--image", "0.png"]) == 0


def test_a_picture_that_is_missing_for_the_guide_is_named(root, clip_folder):
    splits = {"train": split(root, ["0.png", "no.png", "none.png"])}
    splits["train"].features = object()  # from files
    with pytest.raises(BadInput, match=r"2 of 3 of split train.*image 1 \(no.png\)"):
        pictures.prepare(splits, settings(root, model="user", guide="clip", clip_model=str(clip_folder)), root)
    (root / "1.png").write_bytes(b"no picture")
    splits = {"train": split(root, ["0.png", "1.png"])}
    splits["train"].features = object()
    guided = settings(root, model="user", guide="clip", clip_model=str(clip_folder), skip_bad=True)
    with pytest.raises(BadInput, match="1.png.*Repair them, or take --guide self"):  # a row of the files is not skipped
        pictures.prepare(splits, guided, root)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))
