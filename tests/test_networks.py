"""networks.py, weights.py: networks of random weights against torchvision and transformers, step by step."""
import copy
import email.message
import hashlib
import io
import json
import pickle
import shutil
import socket
import sys
import urllib.error
import urllib.response
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import save_clip
from PIL import Image
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel

from sources import hub, networks
from sources.files import BadInput
from sources.weights import Classifier, load_classifier, load_detector

SMALL = "fasterrcnn_mobilenet_v3_large_320_fpn"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, str]:
    """Files of random weights, by the network's name."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    nets = {SMALL: torchvision.models.get_model(SMALL, weights=None, weights_backbone=None, num_classes=5),
            "resnet18": torchvision.models.resnet18()}
    for module in nets[SMALL].backbone.modules():  # one pass, so that its maps are not the same everywhere
        module.momentum = 1
    nets[SMALL].backbone(torch.randn(8, 3, 96, 96))
    for name, net in nets.items():
        torch.save(net.state_dict(), folder / f"{name}.pth")
    return {name: str(folder / f"{name}.pth") for name in nets}


@pytest.fixture(scope="module")
def detector(weights) -> networks.Detector:
    return networks.Detector(SMALL, load_detector(SMALL, weights[SMALL]), 7, 96)


@pytest.fixture(scope="module")
def grid(weights) -> networks.Grid:
    return networks.Grid(load_classifier("resnet18", weights["resnet18"]), 4, 64)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[networks.Clip]:
    folder = tmp_path_factory.mktemp("clips")
    return [networks.Clip(str(save_clip(folder / str(seed), seed))) for seed in range(2)]


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).resize((w, h)) for w, h in sizes]


SIZES = (50, 40), (40, 60), (1, 1), (300, 4)


def batch(network, images: list[Image.Image]) -> dict[str, torch.Tensor]:
    prepared = [network.prepare(image) for image in images]
    return {name: torch.stack([each[name] for each in prepared]) for name in prepared[0]}


@pytest.mark.parametrize("which", ["detector", "grid", "patches", "windows", "guide"])
def test_a_picture_is_seen_alike_whatever_stands_beside_it(which, detector, grid, clips):
    network = {"detector": detector, "grid": grid, "windows": networks.SceneWindows(), "guide": clips[0]}.get(which)
    network = network or networks.Patches(clips[0].name)
    images = pictures(*SIZES)
    whole = network.look(batch(network, images))
    for row, image in enumerate(images):
        alone = network.look(batch(network, [image]))
        for name, value in whole.items():
            assert np.allclose(alone[name][0], value[row], atol=1e-4), name
    shapes = {"regions": (network.identity.get("regions"), network.dim), "boxes": (network.identity.get("regions"), 4),
              "count": (), "clip": (network.dim,)}
    assert {name: value.shape for name, value in whole.items()} == {
        name: (len(SIZES), *shapes[name]) for name in whole}


@pytest.mark.parametrize("which", ["detector", "grid", "windows"])
def test_boxes_lie_in_the_picture(which, detector, grid):
    network = {"detector": detector, "grid": grid, "windows": networks.SceneWindows()}[which]
    seen = network.look(batch(network, pictures(*SIZES)))
    for boxes, count in zip(seen["boxes"], seen["count"], strict=True):
        assert 1 <= count <= len(boxes)
        boxes = boxes[: int(count)]
        assert boxes.min() >= 0 and boxes.max() <= 1 + 1e-6 and (boxes[:, 2:] > boxes[:, :2]).all()


def test_a_detector_s_features_are_pooled_in_its_boxes(detector):
    """Step by step for one picture, with torchvision's own parts: the boxes given back, pooled again."""
    prepared = batch(detector, pictures((50, 40)))
    seen, net = detector.look(prepared), detector.net
    count, (height, width) = int(seen["count"][0]), prepared["size"][0].tolist()
    assert (height, width) == (77, 96)
    boxes = torch.from_numpy(seen["boxes"][0, :count]) * torch.tensor([width, height, width, height])
    with torch.no_grad():
        mean, std = (torch.tensor(each)[:, None, None] for each in (detector.normalised.mean, detector.normalised.std))
        pixels = (prepared["pixels"].float() / 255 - mean) / std
        pooled = net.roi_heads.box_roi_pool(net.backbone(pixels), [boxes], [(96, 96)])  # the maps show the whole canvas
        assert np.allclose(net.roi_heads.box_head(pooled), seen["regions"][0, :count], atol=1e-3)


def test_the_first_picture_does_not_decide_how_a_detector_sees_the_others(weights):
    wide, tall = pictures((90, 30), (30, 90))
    seen = []
    for images in ([wide], [tall, wide]):
        fresh = networks.Detector(SMALL, load_detector(SMALL, weights[SMALL]), 7, 96)
        seen += [fresh.look(batch(fresh, [image])) for image in images]
    alone, _, after = seen
    assert all(np.allclose(alone[name], after[name], atol=1e-4) for name in alone)


def test_the_likeliest_of_overlapping_boxes_stays(detector):
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [30, 30, 40, 40], [90, 90, 120, 99], [5, 5, 5.5, 20]])
    scores = torch.tensor([0.5, 0.9, 0.3, 0.2, 1.0])
    kept = detector.best(boxes, scores, (80, 100))
    assert kept.tolist() == [[1, 0, 11, 10], [30, 30, 40, 40]]     # the fourth is outside, the fifth is no pixel wide
    assert detector.best(boxes[4:], scores[4:], (80, 100)).tolist() == [[0, 0, 100, 80]]
    many = torch.cat([torch.arange(20)[:, None] * 4.0, torch.zeros(20, 1)], 1)
    assert len(detector.best(torch.cat([many, many + 3], 1), torch.rand(20), (96, 96))) == detector.count


def test_a_grid_is_the_last_feature_map(grid, weights):
    net = torchvision.models.resnet18()
    net.load_state_dict(torch.load(weights["resnet18"], weights_only=True))
    prepared = batch(grid, pictures(*SIZES))
    with torch.no_grad():
        trunk = torch.nn.Sequential(*list(net.eval().children())[:-2])
        pixels = prepared["pixels"].float().permute(0, 2, 3, 1) / 255
        pixels = (pixels - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
        maps = trunk(pixels.permute(0, 3, 1, 2))                                                    # [B, 512, 2, 2]
    seen = grid.look(prepared)
    assert np.allclose(seen["regions"][:, 1], maps[:, :, 0, 1], atol=1e-4)
    assert seen["boxes"][0].tolist() == [[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 1, 1]]
    with pytest.raises(BadInput, match="--boxes 35"):
        networks.Grid(load_classifier("resnet18", weights["resnet18"]), 35, 64)


def test_patches_and_the_guide_are_those_of_the_whole_clip(clips):
    whole = CLIPModel.from_pretrained(clips[0].name).eval()
    images, patches = pictures(*SIZES), networks.Patches(clips[0].name)
    with torch.inference_mode():
        inputs = clips[0].processor(images=images, return_tensors="pt")
        want = torch.nn.functional.normalize(whole.get_image_features(**inputs).pooler_output, dim=1)
        seen = clips[0].look(batch(clips[0], images))["clip"]
        square = clips[0].processor(images=[image.resize((16, 16), 3) for image in images], return_tensors="pt")
        slots = whole.vision_model.post_layernorm(whole.vision_model(**square).last_hidden_state)[:, 1:]
    assert seen.dtype == np.float32 and np.allclose(seen, want, atol=1e-5)
    assert np.allclose(patches.look(batch(patches, images))["regions"], slots, atol=1e-4)


def test_a_thin_picture_is_cut_before_clip_scales_it_up(clips):
    given = []

    def processor(images, **options):
        given.append(images.size)
        return clips[0].processor(images=images, **options)

    for size, cut in (((3, 20_000), (3, 12)), ((50, 4), (16, 4)), ((16, 4), (16, 4)), ((9, 7), (9, 7))):
        assert networks.as_clip_sees(Image.new("RGB", size), processor)["pixels"].shape == (3, 16, 16)
        assert given.pop() == cut


def test_what_decides_the_output_decides_the_identity(detector, grid, weights, clips, tmp_path):
    def resnet(file: str) -> Classifier:
        return load_classifier("resnet18", file)

    same = networks.Grid(resnet(weights["resnet18"]), 4, 64)
    assert same.identity == grid.identity
    torch.manual_seed(1)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "other.pth")
    first = copy.deepcopy(detector.net)  # torchvision's first detectors have no epsilon in their BatchNorms
    for module in first.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 0.0
    without_epsilon = networks.Detector(detector.identity["network"], first, detector.count, detector.identity["side"])
    others = [networks.Grid(resnet(str(tmp_path / "other.pth")), 4, 64),
              networks.Grid(resnet(weights["resnet18"]), 9, 64), networks.Grid(resnet(weights["resnet18"]), 4, 32),
              detector, without_epsilon, networks.Patches(clips[0].name), networks.Patches(clips[1].name), *clips]
    identities = [network.identity for network in (same, *others)]
    assert all(one != other for i, one in enumerate(identities) for other in identities[:i])
    moved = save_clip(tmp_path / "moved")  # the same weights in another folder are the same CLIP
    assert networks.Clip(str(moved)).identity == clips[0].identity


@pytest.mark.parametrize(("file", "change"), [("preprocessor_config.json", {"image_mean": [0, 0, 0]}),
                                              ("config.json", {"hidden_act": "gelu"})])
def test_what_a_clip_does_besides_its_weights_is_part_of_the_identity(clips, tmp_path, file, change):
    folder = save_clip(tmp_path)
    config = json.loads((folder / file).read_text())
    config.get("vision_config", config).update(change)
    (folder / file).write_text(json.dumps(config))
    assert networks.Clip(str(folder)).identity != clips[0].identity
    assert networks.Patches(str(folder)).identity != networks.Patches(clips[0].name).identity


def test_a_clip_cannot_ask_for_an_attention_of_the_hub(clips, tmp_path):
    """Such a name would have transformers load a kernel, which is code, from there."""
    folder = shutil.copytree(clips[0].name, tmp_path / "clip")
    wish = {"attn_implementation": "kernels-community/flash-attn2"}
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | wish))
    assert networks.Clip(str(folder)).identity == clips[0].identity


def test_a_clip_in_half_precision_is_computed_in_single(clips, tmp_path):
    CLIPModel.from_pretrained(clips[0].name).half().save_pretrained(tmp_path)
    for network, name in ((networks.Clip, "clip"), (networks.Patches, "regions")):
        half, whole = network(str(tmp_path)), network(clips[0].name)
        prepared = batch(whole, pictures(*SIZES))
        assert np.allclose(half.look(prepared)[name], whole.look(prepared)[name], atol=0.01)


@pytest.mark.parametrize("made_for_it", [True, False])
def test_a_gpu_that_only_imitates_bfloat16_computes_in_float32(monkeypatch, made_for_it):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True:
                        made_for_it or including_emulation)
    monkeypatch.setattr(torch, "autocast", lambda *given, enabled: enabled)
    assert networks.in_bfloat16(torch.device("cuda")) == made_for_it
    assert not networks.in_bfloat16(torch.device("cpu"))


def test_in_bfloat16_as_on_a_gpu_the_features_are_nearly_the_same(detector, grid, clips, monkeypatch):
    patches = networks.Patches(clips[0].name)
    for network, name in ((detector, "regions"), (grid, "regions"), (patches, "regions"), (clips[0], "clip")):
        prepared = batch(network, pictures(*SIZES))
        exact = network.look(prepared)[name]
        with monkeypatch.context() as patch:
            patch.setattr(networks, "in_bfloat16", lambda device: torch.autocast(device.type, torch.bfloat16))
            rounded = network.look(prepared)[name]
        assert rounded.dtype == np.float32 and np.isfinite(rounded).all() and (rounded != exact).any()
        if network is not detector:  # it may choose other boxes
            assert np.allclose(rounded, exact, atol=0.02 * abs(exact).max()), name


def test_the_first_detectors_are_what_torchvision_makes_of_their_weights(tmp_path, monkeypatch):
    """Their BatchNorms have no epsilon, which matters where a channel hardly varies. (700 MB of memory.)"""
    name = "fasterrcnn_resnet50_fpn"
    net = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.fill_(1e-5)
            module.weight.data.fill_(1e-3)
    state = net.state_dict()
    published = torchvision.models.get_model_weights(name)
    file = tmp_path / Path(published.COCO_V1.url).name
    torch.save(state, file)
    monkeypatch.setattr(published, "get_state_dict", lambda self, **options: state)
    theirs = torchvision.models.get_model(name, weights=published.COCO_V1).eval()
    ours = load_detector(name, str(file)).eval()
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for one, other in zip(ours.backbone(pixels).values(), theirs.backbone(pixels).values(), strict=True):
            torch.testing.assert_close(one, other)


def test_weights_that_cannot_be_downloaded_are_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def unreachable(*given, **more):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    for load, name, file in ((load_detector, "fasterrcnn_resnet50_fpn_v2", "fasterrcnn_resnet50_fpn_v2_coco"),
                             (load_classifier, "resnet50", "resnet50-")):
        with pytest.raises(BadInput) as error:
            load(name, "")
        for part in (str(tmp_path / "checkpoints" / file), "https://download.pytorch.org/models/", "--region-weights"):
            assert part in str(error.value)
        assert "\n" not in str(error.value)


class Trap:
    def __reduce__(self):
        return print, ("the file ran code",)


@pytest.mark.parametrize("content", [pickle.dumps(Trap(), 2), b"", b"<html>", "resnet18"],
                         ids=["code", "nothing", "a page", "another network's"])
def test_weights_that_lie_ready_are_checked_like_a_file_that_is_named(content, weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints" / Path(torchvision.models.ResNet50_Weights.DEFAULT.url).name
    place.parent.mkdir(parents=True)
    place.write_bytes(Path(weights[content]).read_bytes() if content == "resnet18" else content)
    with pytest.raises(BadInput) as error:
        load_classifier("resnet50", "")
    assert str(error.value).startswith(f"{place}: ") and "\n" not in str(error.value)
    assert "ran code" not in capsys.readouterr().out


def test_weights_are_downloaded_once_and_only_whole(weights, tmp_path, monkeypatch):
    content, asked = Path(weights["resnet18"]).read_bytes(), []

    def served(request):
        asked.append(request.full_url)
        assert socket.getdefaulttimeout() == 60  # a server that falls silent is not waited for
        return urllib.response.addinfourl(io.BytesIO(content), email.message.Message(), request.full_url)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(hub, "within_reach", lambda address: True)
    monkeypatch.setattr(torch.hub, "urlopen", served)
    with pytest.raises(BadInput):  # these are not torchvision's weights
        load_classifier("resnet18", "")
    assert not list((tmp_path / "hub" / "checkpoints").iterdir())
    monkeypatch.setattr(torchvision.models.ResNet18_Weights.DEFAULT.value, "url",
                        f"https://nowhere/resnet18-{hashlib.sha256(content).hexdigest()[:8]}.pth", raising=False)
    assert [load_classifier("resnet18", "").name for _ in range(2)] == ["resnet18"] * 2 and len(asked) == 2


def test_networks_and_weights_that_do_not_fit_are_refused(weights, tmp_path):
    (tmp_path / "text.pth").write_text("hello")
    for name, odd in (("list", [1]), ("number", {0: torch.zeros(1)}), ("scalar", {"x.bias": torch.tensor(1.0)})):
        torch.save(odd, tmp_path / f"{name}.pth")
    for load, name, file, told in (
        (load_detector, "resnet18", weights["resnet18"], "--region-network resnet18: expected a detection"),
        (load_detector, "retinanet_resnet50_fpn", weights["resnet18"], "two-stage"),
        (load_detector, "fasterrcnn_resnet50_fpn", weights[SMALL], "not the weights of fasterrcnn_resnet50"),
        (load_classifier, "resnet50", weights["resnet18"], "not the weights of resnet50"),
        (load_classifier, "nonet", "", "--region-network nonet"),
        (load_classifier, "densenet121", weights["resnet18"], "avgpool"),
        (load_classifier, "resnet18", "COCO_V9", "--region-weights COCO_V9: neither a file nor one of IMAGENET1K"),
        (load_classifier, "resnet18", str(tmp_path / "text.pth"), "text.pth: expected a state dict"),
        (load_classifier, "resnet18", str(tmp_path / "list.pth"), "list.pth: expected a state dict"),
        (load_classifier, "resnet18", str(tmp_path / "number.pth"), "number.pth: expected a state dict"),
        (load_classifier, "resnet18", str(tmp_path / "scalar.pth"), "scalar.pth: not the weights of resnet18"),
    ):
        with pytest.raises(BadInput) as error:
            load(name, file)
        assert told in str(error.value) and "\n" not in str(error.value)


def test_a_network_whose_package_is_missing_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(BadInput, match="efficientnet-lite0: run pip install"):
        load_classifier("efficientnet-lite0", "")


def test_a_classifier_of_other_classes_may_be_used(tmp_path):
    torch.save(torchvision.models.mobilenet_v3_small(num_classes=7).state_dict(), tmp_path / "own.pth")
    assert networks.Grid(load_classifier("mobilenet_v3_small", str(tmp_path / "own.pth")), 4, 64).dim == 576


@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_googlenet_gets_pixels_from_minus_one_to_one(tmp_path):
    """It has learnt from them; torchvision's transforms give another scale, which the network then has to change."""
    torch.save(torchvision.models.googlenet(weights=None, init_weights=False).state_dict(),
               tmp_path / "own.pth")
    grid, given = networks.Grid(load_classifier("googlenet", str(tmp_path / "own.pth")), 4, 64), []
    grid.net.conv1.register_forward_pre_hook(lambda module, pixels: given.append(pixels[0]))
    grid.look({"pixels": torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 64, 64)})
    assert torch.allclose(given[0].amin((1, 2, 3)), torch.tensor([-1.0, 1.0]), atol=1e-4)
    assert torch.allclose(given[0].amax((1, 2, 3)), torch.tensor([-1.0, 1.0]), atol=1e-4)


def test_a_network_of_your_own_gives_a_grid():
    own = Classifier("mine", torch.nn.AvgPool2d(4), lambda net, pixels: net(pixels), (0, 0, 0), (1, 1, 1))
    network = networks.Grid(own, 4, 16)
    prepared = batch(network, pictures((16, 16)))
    quarter = prepared["pixels"][0, :, :8, 8:].float().mean((1, 2)) / 255
    assert network.dim == 3 and np.allclose(network.look(prepared)["regions"][0, 1], quarter, atol=1e-5)
    assert network.identity["network"] == "mine"
    with pytest.raises(BadInput, match="--picture-side 2: mine cannot look at such a picture"):
        networks.Grid(own, 4, 2)


def test_a_folder_without_a_processor_prepares_pictures_as_clip_does(clips, tmp_path):
    folder = save_clip(tmp_path / "clip")
    (folder / "preprocessor_config.json").unlink()
    bare, images = networks.Clip(str(folder)), pictures((30, 20))
    assert np.allclose(bare.look(batch(bare, images))["clip"], clips[0].look(batch(clips[0], images))["clip"],
                       atol=1e-6)


@pytest.mark.parametrize(("file", "content"), [
    ("model.safetensors", b""), ("config.json", b"[]"), ("preprocessor_config.json", b"{"),
    ("preprocessor_config.json", b"[]"), ("preprocessor_config.json", b'{"image_mean": "abc"}')])
def test_a_damaged_clip_is_refused_in_one_line(tmp_path, file, content):
    folder = save_clip(tmp_path / "clip")
    (folder / file).write_bytes(content)
    with pytest.raises(BadInput, match="--clip-model .*: cannot load the CLIP: expected a folder with") as error:
        networks.Clip(str(folder))
    assert "\n" not in str(error.value)


def test_no_clip_ends_in_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BadInput, match="--clip-model") as error:
        networks.Clip(str(tmp_path / "nowhere"))
    assert "\n" not in str(error.value)
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    CLIPTextModel(CLIPTextConfig(**small)).save_pretrained(tmp_path / "text")
    with pytest.raises(BadInput, match="has no vision_model"):  # never random numbers for weights that are not there
        networks.Clip(str(tmp_path / "text"))
