"""The frozen networks that look at pictures: what turns a photograph into regions, and CLIP, which guides CGE.

Both papers start from region features that others computed. Here they come from pictures, by networks of torchvision
and transformers that are never trained: a detector's best boxes with the features pooled in them (the bottom-up
features of both papers are of this kind), the cells of a classification network's last feature map, or CLIP's patches.

Each network has `identity`, all that decides its output; `prepare`, which turns a picture into tensors (in another
process: it knows nothing of the network); and `look`, which turns a batch of these into arrays. No picture's output
depends on those beside it.
"""
from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
import transformers
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from transformers import CLIPImageProcessor, CLIPModel

from sources import windows
from sources.files import BadInput

DEFAULTS = {"detector": ("fasterrcnn_resnet50_fpn_v2", 800), "grid": ("resnet50", 384), "clip": ("", 0),
            "scenes": ("", windows.SIDE)}  # of each kind of regions the network and the side of the picture it sees


def fingerprint(*parts: nn.Module) -> str:
    """Of all weights and buffers, by name: two networks never share one."""
    hashed = hashlib.blake2b(digest_size=16)
    for part in parts:
        for name, value in part.state_dict().items():
            hashed.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            hashed.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return hashed.hexdigest()


# ------------------------------------------------------------------------------------- pictures, in another process


def squashed(picture: Image.Image, side: int) -> dict[str, Tensor]:
    """The whole picture as a square: pixels [3, side, side] uint8."""
    return {"pixels": as_tensor(picture.resize((side, side), Image.Resampling.BICUBIC))}


def on_canvas(picture: Image.Image, side: int) -> dict[str, Tensor]:
    """The picture, its longer side `side`, in a corner of a grey square, always of one size, so that a network's
    padding does not depend on the batch: pixels [3, side, side] uint8, and its height and width there, size [2]."""
    scale = side / max(picture.size)
    width, height = (max(1, round(scale * length)) for length in picture.size)
    canvas = Image.new("RGB", (side, side), (124, 116, 104))  # the mean colour: nothing, once it is normalised
    canvas.paste(picture.resize((width, height), Image.Resampling.BICUBIC))
    return {"pixels": as_tensor(canvas), "size": torch.tensor([height, width])}


def as_clip_sees(picture: Image.Image, processor: CLIPImageProcessor) -> dict[str, Tensor]:
    """The middle of the picture, as CLIP was trained on it: pixels [3, S, S] float32."""
    return {"pixels": processor(images=picture, return_tensors="pt")["pixel_values"][0]}


def as_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def cells(a_side: int) -> np.ndarray:
    """[a_side * a_side, 4]: the boxes of a grid's cells, row by row, in 0..1."""
    y, x = np.divmod(np.arange(a_side * a_side), a_side)
    return (np.stack([x, y, x + 1, y + 1], 1) / a_side).astype(np.float32)


# ----------------------------------------------------------------------------------------------- regions from pictures


class Detector:
    """A two-stage detector of torchvision: its `count` best boxes, whatever they hold, and the features pooled in them.

    A proposal's box is the one refined for its likeliest class; of boxes that overlap the likeliest stays. Then the
    features are pooled once more, in the boxes that are left, so that features and boxes belong together.
    """

    def __init__(self, name: str, weights: str, count: int, side: int, device: torch.device | str = "cpu"):
        state = torchvision_weights(name, weights, "detection")
        classes = state.get("roi_heads.box_predictor.cls_score.weight")
        if classes is None:
            raise BadInput(f"--region-network {name}: its weights have no box predictor; a two-stage detector is "
                           "wanted, such as fasterrcnn_resnet50_fpn_v2")
        net = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=len(classes))
        load_weights(net, state, name, weights)
        self.net, self.device, self.count = net.to(device).eval(), device, count
        self.mean, self.std = (torch.tensor(values, device=device)[:, None, None] for values in
                               (net.transform.image_mean, net.transform.image_std))
        self.dim = net.roi_heads.box_predictor.cls_score.in_features
        self.identity = {"kind": "detector", "network": name, "weights": fingerprint(net), "side": side,
                         "regions": count, "dim": self.dim}
        self.prepare = partial(on_canvas, side=side)

    @torch.inference_mode()
    def look(self, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """pixels [B, 3, S, S] and size [B, 2] -> regions [B, R, F], boxes [B, R, 4] in 0..1, count [B]."""
        heads, sizes = self.net.roi_heads, [tuple(size) for size in batch["size"].tolist()]
        pixels = (batch["pixels"].to(self.device).float() / 255 - self.mean) / self.std
        maps = self.net.backbone(pixels)
        maps = {"0": maps} if isinstance(maps, Tensor) else maps
        proposals = self.net.rpn(ImageList(pixels, sizes), maps)[0]
        scores, shifts = heads.box_predictor(heads.box_head(heads.box_roi_pool(maps, proposals, sizes)))
        refined = heads.box_coder.decode(shifts, proposals)                               # [all proposals, classes, 4]
        likeliest, label = scores.softmax(1)[:, 1:].max(1)                                # class 0 is the background
        refined = refined[torch.arange(len(label), device=label.device), label + 1]
        each = [len(own) for own in proposals]
        found = [self.best(*own) for own in zip(refined.split(each), likeliest.split(each), sizes, strict=True)]
        features = heads.box_head(heads.box_roi_pool(maps, found, sizes)).split([len(boxes) for boxes in found])
        shapes = {"regions": (self.count, self.dim), "boxes": (self.count, 4), "count": ()}
        out = {name: np.zeros((len(found), *shape), np.float32) for name, shape in shapes.items()}
        for row, (boxes, seen, (height, width)) in enumerate(zip(found, features, sizes, strict=True)):
            out["regions"][row, : len(boxes)] = seen.cpu().numpy()
            out["boxes"][row, : len(boxes)] = (boxes / boxes.new_tensor([width, height, width, height])).cpu().numpy()
            out["count"][row] = len(boxes)
        return out

    def best(self, boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> Tensor:
        """boxes [P, 4] in pixels, scores [P] -> the best, `count` at most; the whole picture where there is none."""
        boxes = torchvision.ops.clip_boxes_to_image(boxes, size)
        real = torchvision.ops.remove_small_boxes(boxes, 1)
        kept = torchvision.ops.nms(boxes[real], scores[real], self.net.roi_heads.nms_thresh)[: self.count]
        return boxes[real][kept] if len(kept) else boxes.new_tensor([[0, 0, size[1], size[0]]])


class Grid:
    """A classification network of torchvision: the cells of its last feature map, laid over the whole picture."""

    def __init__(self, name: str, weights: str, count: int, side: int, device: torch.device | str = "cpu"):
        across = round(count**0.5)
        if across * across != count:
            raise BadInput(f"--boxes {count}: a grid has a square number of cells, such as 36 or 49")
        net, self.maps, mean, std = classifier(name, weights)
        self.net, self.device, self.across = net.to(device).eval(), device, across
        self.net.to(memory_format=torch.channels_last)
        self.mean, self.std = (torch.tensor(values, device=device)[:, None, None] for values in (mean, std))
        self.boxes, self.prepare = cells(across), partial(squashed, side=side)
        self.dim = self.features(torch.zeros(1, 3, side, side, dtype=torch.uint8)).shape[2]
        self.identity = {"kind": "grid", "network": name, "weights": fingerprint(net), "side": side, "regions": count,
                         "dim": self.dim}

    @torch.inference_mode()
    def features(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] uint8 -> [B, R, F]."""
        pixels = (pixels.to(self.device).float() / 255 - self.mean) / self.std
        maps = self.maps(self.net, pixels.contiguous(memory_format=torch.channels_last))
        return F.adaptive_avg_pool2d(maps, self.across).flatten(2).transpose(1, 2)

    def look(self, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """pixels [B, 3, S, S] -> regions [B, R, F], boxes [B, R, 4] in 0..1, count [B]."""
        return of_cells(self.features(batch["pixels"]), self.boxes)


class Patches:
    """CLIP's patches: the last hidden states of its image half, laid over the whole picture (squashed, not cropped)."""

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        self.clip = Clip(name, device)
        side = self.clip.side
        across = side // self.clip.vision.config.patch_size
        self.boxes, self.prepare = cells(across), partial(squashed, side=side)
        self.mean, self.std = (torch.tensor(values, device=device)[:, None, None] for values in
                               (self.clip.processor.image_mean, self.clip.processor.image_std))
        self.dim, self.device = self.clip.vision.config.hidden_size, device
        self.identity = {"kind": "clip", "network": "CLIP", "weights": fingerprint(self.clip.vision),
                         "side": side, "regions": across**2, "dim": self.dim}

    @torch.inference_mode()
    def look(self, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """pixels [B, 3, S, S] -> regions [B, R, F], boxes [B, R, 4] in 0..1, count [B]."""
        pixels = (batch["pixels"].to(self.device).float() / 255 - self.mean) / self.std
        slots = self.clip.vision(pixel_values=pixels).last_hidden_state[:, 1:]  # without the class token
        return of_cells(self.clip.vision.post_layernorm(slots), self.boxes)


class SceneWindows:
    """The stand-in for a detector that the built-in scenes have (see `windows.py`), for any picture."""

    dim, identity = windows.DIM, {"kind": "scenes", "network": "windows", "regions": windows.BOXES, "dim": windows.DIM}
    prepare = staticmethod(partial(squashed, side=windows.SIDE))

    def look(self, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
        pixels = batch["pixels"].permute(0, 2, 3, 1).numpy()
        boxes = windows.propose(pixels)
        return {"regions": windows.describe(pixels, boxes), "boxes": boxes,
                "count": np.full(len(boxes), windows.BOXES)}


def of_cells(features: Tensor, boxes: np.ndarray) -> dict[str, np.ndarray]:
    found = features.float().cpu().numpy()
    return {"regions": found, "boxes": np.broadcast_to(boxes, (len(found), *boxes.shape)),
            "count": np.full(len(found), len(boxes))}


# --------------------------------------------------------------------------------------------------------------- CLIP


class Clip:
    """The image half of a frozen CLIP, a hub name or a local folder, and its embedding of a picture, the guide of CGE.

    Read beside USER, the part on CLIP-guided enhancement. Raises BadInput when there is no such CLIP.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            clip, report = CLIPModel.from_pretrained(name, output_loading_info=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise BadInput(
                f"cannot load the CLIP {name!r}: neither a folder with a CLIP's config.json and weights nor a model of "
                f"huggingface.co within reach. Download config.json, preprocessor_config.json and model.safetensors of "
                f"huggingface.co/{name} elsewhere and give their folder to --clip-model. "
                f"({str(error).splitlines()[0]})") from error
        self.vision, self.project = clip.vision_model.to(device).eval(), clip.visual_projection.to(device)
        missing = sorted(key for key in report["missing_keys"] if key.startswith("vis"))
        if missing:  # they would be random numbers
            raise BadInput(f"the CLIP {name!r} of --clip-model has no {missing[0]} (and {len(missing) - 1} more)")
        self.side = side = clip.config.vision_config.image_size
        frame = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        try:
            self.processor = CLIPImageProcessor.from_pretrained(name, **frame)
        except OSError:  # no preprocessor_config.json: all CLIPs prepare pictures alike
            self.processor = CLIPImageProcessor(**frame)
        self.name, self.dim, self.device = name, self.project.out_features, device
        self.identity = {"kind": "clip-guide", "network": "CLIP", "weights": fingerprint(self.vision, self.project),
                         "prepared": self.processor.to_json_string(), "dim": self.dim}
        self.prepare = partial(as_clip_sees, processor=self.processor)

    @torch.inference_mode()
    def look(self, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """pixels [B, 3, S, S] -> clip [B, E] float32 of unit length."""
        seen = self.project(self.vision(pixel_values=batch["pixels"].to(self.device)).pooler_output)
        return {"clip": F.normalize(seen.float(), dim=1).cpu().numpy()}


# ------------------------------------------------------------------------------------------------- names and weights


def regions_network(kind: str, name: str, weights: str, count: int, side: int, clip: str,
                    device: torch.device | str) -> Detector | Grid | Patches | SceneWindows:
    """The network of `--regions KIND`; an empty name, or a side of 0, is that kind's default."""
    name, side = name or DEFAULTS[kind][0], side or DEFAULTS[kind][1]
    if kind == "detector":
        return Detector(name, weights, count, side, device)
    if kind == "grid":
        return Grid(name, weights, count, side, device)
    return Patches(clip, device) if kind == "clip" else SceneWindows()


def classifier(name: str, weights: str) -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor], tuple, tuple]:
    """A classification network, how to get its last feature map [B, F, h, w], and the mean and std of its pixels."""
    state = torchvision_weights(name, weights, "classification")
    classes = [len(value) for key, value in state.items() if key.endswith("bias")][-1:]
    net = torchvision.models.get_model(name, weights=None, num_classes=(classes or [1000])[0])
    if not hasattr(net, "avgpool"):
        raise BadInput(f"--region-network {name}: its last feature map is not known here; take one whose pooling is "
                       "called avgpool, such as resnet50, efficientnet_b0, convnext_tiny or regnet_y_400mf")
    load_weights(net, state, name, weights)
    how = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    return net, last_map, how.mean, how.std


def last_map(net: nn.Module, pixels: Tensor) -> Tensor:
    """What a torchvision classifier pools: the input of its `avgpool`."""
    seen = []
    hook = net.avgpool.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    try:
        net(pixels)
    finally:
        hook.remove()
    return seen[0]


def torchvision_weights(name: str, weights: str, module: str) -> dict[str, Tensor]:
    """A state dict of torchvision's network `name`: from a local file, or by the name of published weights.

    weights: a file, a name such as COCO_V1, or "" for the best that are published. Raises BadInput, saying which file
    is wanted, from where, and where to put it, when it is not there and cannot be downloaded.
    """
    known = torchvision.models.list_models(module=torchvision.models if module == "classification" else
                                           torchvision.models.detection)
    if name not in known:
        raise BadInput(f"--region-network {name}: expected a {module} network of torchvision, such as "
                       f"{DEFAULTS['grid' if module == 'classification' else 'detector'][0]}")
    published = torchvision.models.get_model_weights(name)
    if Path(weights).is_file():
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load fails in many ways on a file that is something else
            raise BadInput(f"{weights}: expected a state dict of {name} ({type(error).__name__})") from error
        if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
            raise BadInput(f"{weights}: expected a state dict of {name}, a dictionary of tensors")
        return state
    if (weights or "DEFAULT") not in published.__members__:
        raise BadInput(f"--region-weights {weights}: neither a file nor one of {', '.join(published.__members__)}")
    chosen = published[weights or "DEFAULT"]
    place = Path(torch.hub.get_dir()) / "checkpoints" / chosen.url.rsplit("/", 1)[1]
    try:
        return chosen.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise BadInput(f"{place}: the weights of {name} are not there and cannot be downloaded ({error}). Download "
                       f"{chosen.url} elsewhere and put it there, or give the file to --region-weights") from error


def load_weights(net: nn.Module, state: dict[str, Tensor], name: str, weights: str) -> None:
    """Raises BadInput for weights of another network."""
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise BadInput(f"{weights}: not the weights of {name}: {str(error).splitlines()[1].strip()}") from error
