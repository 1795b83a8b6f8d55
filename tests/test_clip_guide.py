"""clip_guide.py: embeddings of a tiny random CLIP, and a cache that is never stale."""
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTextModel

import clip_guide
from data import BadInput, InMemory, Split


def save_clip(folder: Path, seed: int = 0, size: int = 16) -> Path:
    """A whole CLIP of random weights, as huggingface.co has them: its text half is to be left alone."""
    torch.manual_seed(seed)
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = CLIPConfig(text_config=small | {"vocab_size": 9, "max_position_embeddings": 8},
                        vision_config=small | {"image_size": size, "patch_size": 8}, projection_dim=6)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[clip_guide.Clip]:
    folder = tmp_path_factory.mktemp("clips")
    return [clip_guide.Clip(str(save_clip(folder / str(seed), seed))) for seed in range(2)]


def make_split(pictures: list, name: str = "train") -> Split:
    n = len(pictures)
    features = InMemory("here", np.zeros((n, 1, 3), np.float32), np.zeros((n, 1, 4), np.float32))
    return Split(name, ["a"] * n, np.arange(n), features, [f"{i}.png" for i in range(n)], pictures)


def pixels(n: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (n, 20, 24, 3), dtype=np.uint8))


def test_embeddings_are_those_of_the_whole_clip(clips, tmp_path):
    whole = CLIPModel.from_pretrained(save_clip(tmp_path / "clip")).eval()
    pictures = [Image.fromarray(p) for p in pixels(3)]
    with torch.inference_mode():
        seen = whole.vision_model(pixel_values=clips[0].processor(images=pictures, return_tensors="pt")["pixel_values"])
        want = torch.nn.functional.normalize(whole.visual_projection(seen.pooler_output), dim=1)
    ours = clips[0].embed(pictures)
    assert ours.shape == (3, 6) and ours.dtype == np.float32
    assert np.allclose(ours, want.numpy(), atol=1e-5)
    alone = np.concatenate([clips[0].embed([picture]) for picture in pictures])
    assert np.allclose(ours, alone, atol=1e-5)


def test_each_picture_is_looked_at_once(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(clip_guide, "BATCH", 2)
    splits = {"train": make_split(pixels(5)), "val": make_split(pixels(3, seed=1), "val")}
    clip_guide.attach(splits, clips[0], [tmp_path])
    want = clips[0].embed([splits["train"].picture(row) for row in range(5)])
    assert np.allclose(splits["train"].clip, want, atol=1e-5) and splits["val"].clip.shape == (3, 6)

    monkeypatch.setattr(clip_guide, "compute", None)  # from here on the cache must do
    again = {"train": make_split(pixels(5))}
    clip_guide.attach(again, clips[0], [tmp_path])
    assert np.array_equal(again["train"].clip, splits["train"].clip)


@pytest.mark.parametrize("change", ["clip", "picture", "order", "file"])
def test_another_clip_or_other_pictures_never_read_a_stale_cache(clips, tmp_path, change):
    files = [tmp_path / f"{row}.png" for row in range(3)]
    for file, picture in zip(files, pixels(3), strict=True):
        Image.fromarray(picture).save(file)
    pictures = files if change == "file" else pixels(3)
    before = {"train": make_split(pictures)}
    clip_guide.attach(before, clips[0], [tmp_path])
    clip = clips[1] if change == "clip" else clips[0]
    if change == "file":
        Image.fromarray(pixels(1, seed=5)[0]).save(files[1])
        os.utime(files[1], ns=(0, files[0].stat().st_mtime_ns + 10**9))
    elif change == "picture":
        pictures = [*pictures[:2], pixels(1, seed=5)[0]]
    elif change == "order":
        pictures = [pictures[0], pictures[2], pictures[1]]
    after = {"train": make_split(pictures)}
    clip_guide.attach(after, clip, [tmp_path])
    assert np.allclose(after["train"].clip, clip.embed([after["train"].picture(row) for row in range(3)]), atol=1e-5)
    assert not np.allclose(after["train"].clip, before["train"].clip, atol=1e-3)


def test_a_picture_that_is_missing_is_named(clips, tmp_path):
    with pytest.raises(BadInput, match=r"2 of 3 of split train.*image 1 \(1.png\)"):
        clip_guide.attach({"train": make_split([pixels(1)[0], None, None])}, clips[0], [tmp_path])
    assert not list(tmp_path.iterdir())


def test_a_damaged_picture_and_a_damaged_cache_are_named(clips, tmp_path):
    broken = tmp_path / "0.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(BadInput, match="0.png"):
        clip_guide.attach({"train": make_split([broken])}, clips[0], [tmp_path])
    split = {"train": make_split(pixels(2))}
    clip_guide.attach(split, clips[0], [tmp_path])
    cache = next((tmp_path / "clip").glob("train-*.npy"))
    np.save(cache, np.zeros((1, 6), np.float32))
    with pytest.raises(BadInput, match=cache.name):
        clip_guide.attach(split, clips[0], [tmp_path])


def test_the_cache_lies_beside_the_data_or_else_beside_the_run(clips, tmp_path):
    data_root, run = tmp_path / "data", tmp_path / "run"
    data_root.mkdir()
    assert clip_guide.cache_folder([data_root, run]) == data_root / "clip"
    assert clip_guide.cache_folder([tmp_path / "nowhere", run]) == run / "clip"
    assert clip_guide.cache_folder([run]) == run / "clip"
    clip_guide.attach({"train": make_split(pixels(1))}, clips[0], [run])
    assert len(list((run / "clip").iterdir())) == 1


def test_a_folder_without_a_processor_prepares_pictures_as_clip_does(clips, tmp_path):
    folder = save_clip(tmp_path / "clip")
    (folder / "preprocessor_config.json").unlink()
    picture = Image.fromarray(pixels(1)[0])
    assert np.allclose(clip_guide.Clip(str(folder)).embed([picture]), clips[0].embed([picture]), atol=1e-6)


def test_no_clip_ends_in_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BadInput, match="--clip-model") as error:
        clip_guide.Clip(str(tmp_path / "nowhere"))
    assert "\n" not in str(error.value)
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    CLIPTextModel(CLIPTextConfig(**small)).save_pretrained(tmp_path / "text")
    with pytest.raises(BadInput, match="vis|cannot load"):  # never random numbers for weights that are not there
        clip_guide.Clip(str(tmp_path / "text"))
