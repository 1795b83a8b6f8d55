"""The frozen networks that look at pictures: four kinds of regions, and the CLIP that guides CGE.

Both papers start from region features that were computed elsewhere. Here networks that are never trained compute them
from pictures: `Detector` gives its best boxes, as the bottom-up features of both papers do, `Grid` the cells of a
classifier's last feature map, `Patches` the patches of a CLIP, and `SceneWindows` the windows of the built-in scenes.

All classes are used alike:

    prepare(picture) -> tensors       of one picture; may run in another process
    look(batch) -> arrays             batch: prepared pictures, stacked; no picture's result depends on the others
    identity                          a dictionary of all that decides the result: network, weights, sizes
    batch_size                        how many pictures to look at together: more on a GPU, to fill it
"""
from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms
from torchvision.models.detection.image_list import ImageList
from transformers import CLIPImageProcessor, CLIPModel

from sources import hub, windows
from sources.files import BadInput
from sources.weights import Classifier, fingerprint, load_classifier, load_detector


def regions_network(kind: str, name: str, weights: str, count: int, side: int, clip: str,
                    device: torch.device | str) -> Detector | Grid | Patches | SceneWindows:
    """The network of --regions KIND. If `name` is empty or `side` is 0, the kind's default is taken.

    weights: see `weights.find`. count: regions a picture (detector, grid). side: of the network's input, in pixels.
    clip: name or folder of the CLIP. Any other kind means the windows of the scenes. Raises BadInput if the network or
    its weights cannot be had.
    """
    if kind == "detector":
        name = name or "fasterrcnn_resnet50_fpn_v2"
        return Detector(name, load_detector(name, weights), count, side or 800, device)
    if kind == "grid":
        return Grid(load_classifier(name or "resnet50", weights), count, side or 384, device)
    return Patches(clip, device) if kind == "clip" else SceneWindows()


def in_bfloat16(device: torch.device) -> torch.autocast:
    """A block in which the heavy layers run in bfloat16 if the device is a GPU made for it. Elsewhere it does nothing.

    Older GPUs (V100, T4) can only imitate bfloat16, which is slow.
    """
    made_for_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast("cuda", torch.bfloat16, enabled=made_for_it)


def squashed(picture: Image.Image, side: int) -> dict[str, Tensor]:
    """The whole picture as a square: pixels [3, side, side] uint8."""
    return {"pixels": transforms.functional.pil_to_tensor(picture.resize((side, side), Image.Resampling.BICUBIC))}


def on_canvas(picture: Image.Image, side: int) -> dict[str, Tensor]:
    """The picture in the corner of a grey square, its longer side scaled to `side`.

    Returns pixels [3, side, side] uint8, and size [2], the height and width there. All pictures get the same canvas, so
    that no batch needs padding, which would make results depend on the batch.
    """
    scale = side / max(picture.size)
    width, height = (max(1, round(scale * length)) for length in picture.size)
    canvas = Image.new("RGB", (side, side), (124, 116, 104))  # the mean colour, which becomes zero
    canvas.paste(picture.resize((width, height), Image.Resampling.BICUBIC))
    return {"pixels": transforms.functional.pil_to_tensor(canvas), "size": torch.tensor([height, width])}


def as_clip_sees(picture: Image.Image, processor: CLIPImageProcessor) -> dict[str, Tensor]:
    """The middle of the picture, as CLIP was trained: pixels [3, S, S] float32."""
    side = 4 * min(picture.size)  # the rest of a thin picture is cut off anyway, but would first be scaled up
    left, top = (max(0, length - side) // 2 for length in picture.size)
    picture = picture.crop((left, top, min(picture.width, left + side), min(picture.height, top + side)))
    return {"pixels": processor(images=picture, return_tensors="pt")["pixel_values"][0]}


class Detector:
    """The `count` best boxes of a two-stage detector of torchvision, whatever they hold, and the features in them.

    Each proposal is refined for its likeliest class. Of boxes that overlap, the likeliest stays. Then the features are
    pooled again in the boxes that are left, so that features and boxes belong together.
    """

    def __init__(self, name: str, net: nn.Module, count: int, side: int, device: torch.device | str = "cpu"):
        self.net, self.count, self.side, self.device = net.to(device).eval(), count, side, torch.device(device)
        self.batch_size = 8 if self.device.type == "cuda" else 4
        self.normalised = transforms.Normalize(net.transform.image_mean, net.transform.image_std)
        self.dim = net.roi_heads.box_predictor.cls_score.in_features
        self.identity = {"kind": "detector", "network": name, "weights": fingerprint(net), "side": side,
                         "regions": count, "dim": self.dim, "version": 2}  # 1 could pool at twice the right scale
        if any(module.eps == 0 for module in net.modules() if isinstance(module, nn.BatchNorm2d)):
            self.identity["epsilon"] = 0  # see `load_detector`
        self.prepare = partial(on_canvas, side=side)

    @torch.inference_mode()
    def look(self, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """pixels [B, 3, S, S] and size [B, 2] -> regions [B, R, F], boxes [B, R, 4] in 0..1, count [B]."""
        heads, sizes = self.net.roi_heads, [tuple(size) for size in batch["size"].tolist()]
        pixels = self.normalised(batch["pixels"].to(self.device) / 255)
        with in_bfloat16(self.device):
            maps = self.net.backbone(pixels)
        maps = {name: of_level.float() for name, of_level in maps.items()}
        proposals = self.net.rpn(ImageList(pixels, sizes), maps)[0]
        scores, shifts = heads.box_predictor(self.pooled(maps, proposals))
        refined = heads.box_coder.decode(shifts, proposals)  # [all proposals, classes, 4]
        likeliest, label = scores.softmax(1)[:, 1:].max(1)  # class 0 is the background
        refined = refined[torch.arange(len(label), device=label.device), label + 1]
        each = [len(own) for own in proposals]
        found = [self.best(*own) for own in zip(refined.split(each), likeliest.split(each), sizes, strict=True)]
        features = self.pooled(maps, found).split([len(boxes) for boxes in found])
        out = {"regions": np.zeros((len(found), self.count, self.dim), np.float32),
               "boxes": np.zeros((len(found), self.count, 4), np.float32),
               "count": np.array([len(boxes) for boxes in found])}
        for row, (boxes, seen, (height, width)) in enumerate(zip(found, features, sizes, strict=True)):
            out["regions"][row, : len(boxes)] = seen.cpu().numpy()
            out["boxes"][row, : len(boxes)] = (boxes / boxes.new_tensor([width, height, width, height])).cpu().numpy()
        return out

    def pooled(self, maps: dict[str, Tensor], boxes: list[Tensor]) -> Tensor:
        """The features [all boxes, F] in some boxes of each picture."""
        canvases = [(self.side, self.side)] * len(boxes)  # torchvision finds the maps' scale from what they show
        inside = self.net.roi_heads.box_roi_pool(maps, boxes, canvases)
        with in_bfloat16(self.device):
            features = self.net.roi_heads.box_head(inside)
        return features.float()

    def best(self, boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> Tensor:
        """boxes [P, 4] in pixels, scores [P] -> at most `count` boxes, best first; if none is left, the whole picture.

        size: height and width of the picture.
        """
        boxes = torchvision.ops.clip_boxes_to_image(boxes, size)
        real = torchvision.ops.remove_small_boxes(boxes, 1)
        kept = torchvision.ops.nms(boxes[real], scores[real], self.net.roi_heads.nms_thresh)[: self.count]
        return boxes[real][kept] if len(kept) else boxes.new_tensor([[0, 0, size[1], size[0]]])


def cells(across: int) -> np.ndarray:
    """[across * across, 4]: the boxes of a grid's cells, row by row, in 0..1."""
    y, x = np.divmod(np.arange(across * across), across)
    return (np.stack([x, y, x + 1, y + 1], 1) / across).astype(np.float32)


def of_cells(features: Tensor, boxes: np.ndarray) -> dict[str, np.ndarray]:
    """Features [B, R, F] of the cells `boxes` [R, 4] -> the arrays that `look` returns."""
    found = features.float().cpu().numpy()
    return {"regions": found, "boxes": np.broadcast_to(boxes, (len(found), *boxes.shape)),
            "count": np.full(len(found), len(boxes))}


class Grid:
    """The last feature map of a classification network, pooled into `count` cells that cover the whole picture.

    side: of the network's input, in pixels. Raises BadInput if `count` is not a square, or `side` is too small.
    """

    def __init__(self, classifier: Classifier, count: int, side: int, device: torch.device | str = "cpu"):
        self.across = round(count**0.5)
        if self.across**2 != count:
            raise BadInput(f"--boxes {count}: a grid has a square number of cells, such as 36 or 49")
        self.net = classifier.net.to(device, memory_format=torch.channels_last).eval()
        self.device = torch.device(device)
        self.batch_size = 128 if self.device.type == "cuda" else 32
        self.last_map, self.normalised = classifier.last_map, transforms.Normalize(classifier.mean, classifier.std)
        self.boxes, self.prepare = cells(self.across), partial(squashed, side=side)
        try:
            self.dim = self.features(torch.zeros(1, 3, side, side, dtype=torch.uint8)).shape[2]
        except RuntimeError as error:
            raise BadInput(f"--picture-side {side}: {classifier.name} cannot look at such a picture "
                           f"({str(error).splitlines()[0]})") from error
        self.identity = {"kind": "grid", "network": classifier.name, "weights": fingerprint(self.net), "side": side,
                         "regions": count, "dim": self.dim}

    @torch.inference_mode()
    def features(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] uint8 -> [B, R, F]."""
        pixels = self.normalised(pixels.to(self.device) / 255).contiguous(memory_format=torch.channels_last)
        with in_bfloat16(self.device):
            maps = self.last_map(self.net, pixels)
        return F.adaptive_avg_pool2d(maps.float(), self.across).flatten(2).transpose(1, 2)

    def look(self, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """pixels [B, 3, S, S] -> regions [B, R, F], boxes [B, R, 4] in 0..1, count [B]."""
        return of_cells(self.features(batch["pixels"]), self.boxes)


class Patches:
    """The last hidden states of a CLIP's patches. They cover the whole picture, which is squashed, not cropped."""

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        clip = Clip(name, device)
        self.vision, self.device, self.batch_size = clip.vision, clip.device, clip.batch_size
        across = clip.side // clip.vision.config.patch_size
        self.boxes, self.prepare = cells(across), partial(squashed, side=clip.side)
        self.normalised = transforms.Normalize(clip.processor.image_mean, clip.processor.image_std)
        self.dim = clip.vision.config.hidden_size
        self.identity = {"kind": "clip", "network": "CLIP", "weights": fingerprint(clip.vision), "side": clip.side,
                         "regions": across**2, "dim": self.dim, "layers": clip.layers,
                         "pixels": [list(clip.processor.image_mean), list(clip.processor.image_std)]}

    @torch.inference_mode()
    def look(self, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """pixels [B, 3, S, S] -> regions [B, R, F], boxes [B, R, 4] in 0..1, count [B]."""
        pixels = self.normalised(batch["pixels"].to(self.device) / 255)
        with in_bfloat16(self.device):
            states = self.vision(pixel_values=pixels).last_hidden_state
        return of_cells(self.vision.post_layernorm(states[:, 1:].float()), self.boxes)  # without the class token


class SceneWindows:
    """The stand-in for a detector that the built-in scenes use (see `windows.py`), for any picture."""

    batch_size = 50
    dim, identity = windows.DIM, {"kind": "scenes", "network": "windows", "regions": windows.BOXES, "dim": windows.DIM}
    prepare = staticmethod(partial(squashed, side=windows.SIDE))

    def look(self, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """pixels [B, 3, S, S] -> regions [B, R, F], boxes [B, R, 4] in 0..1, count [B]."""
        pixels = batch["pixels"].permute(0, 2, 3, 1).numpy()
        boxes = windows.propose(pixels)
        return {"regions": windows.describe(pixels, boxes), "boxes": boxes,
                "count": np.full(len(boxes), windows.BOXES)}


class Clip:
    """The image half of a frozen CLIP. Its embedding of a picture is the guide of CGE (USER, CLIP-guided enhancement).

    name: a model of huggingface.co or a local folder. Raises BadInput if there is no such CLIP.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        options = hub.options(name)
        cannot_load = partial(
            hub.cannot_load, "CLIP", name, "config.json, preprocessor_config.json and pytorch_model.bin or "
            "model.safetensors", "--clip-model", options["local_files_only"])
        try:
            clip, report = CLIPModel.from_pretrained(name, output_loading_info=True, dtype=torch.float32,
                                                     attn_implementation="sdpa", **options)  # not config.json's
        except Exception as error:  # transformers raises many kinds for a folder that is missing or damaged
            raise cannot_load(error) from error
        missing = sorted(key for key in report["missing_keys"] if key.startswith("vis"))
        if missing:  # transformers would fill them with random numbers
            raise BadInput(f"the CLIP {name!r} of --clip-model has no {missing[0]} (and {len(missing) - 1} more)")
        self.vision, self.project = clip.vision_model.to(device).eval(), clip.visual_projection.to(device)
        self.side = side = clip.config.vision_config.image_size
        frame = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        try:
            self.processor = CLIPImageProcessor.from_pretrained(name, **options, **frame)
            as_clip_sees(Image.new("RGB", (side, side)), self.processor)  # fails if its numbers make no sense
        except Exception as error:
            if not isinstance(error, OSError) or (Path(name) / "preprocessor_config.json").is_file():
                raise cannot_load(error) from error
            self.processor = CLIPImageProcessor(**frame)  # there is none, but all CLIPs prepare pictures alike
        self.name, self.dim, self.device = name, self.project.out_features, torch.device(device)
        self.layers = {key: getattr(self.vision.config, key)  # what the shapes of the weights do not tell
                       for key in ("hidden_act", "layer_norm_eps", "num_attention_heads")}
        self.batch_size = 128 if self.device.type == "cuda" else 32
        self.identity = {"kind": "clip-guide", "network": "CLIP", "weights": fingerprint(self.vision, self.project),
                         "prepared": self.processor.to_json_string(), "dim": self.dim, "layers": self.layers}
        self.prepare = partial(as_clip_sees, processor=self.processor)

    @torch.inference_mode()
    def look(self, batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """pixels [B, 3, S, S] -> clip [B, E] float32 of unit length."""
        pixels = batch["pixels"].to(self.device)
        with in_bfloat16(self.device):
            seen = self.project(self.vision(pixel_values=pixels).pooler_output)
        return {"clip": F.normalize(seen.float(), dim=1).cpu().numpy()}
