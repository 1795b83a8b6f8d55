"""What a frozen CLIP says of each picture: the guide of USER's CGE.

Read beside Zhang et al., "USER: Unified Semantic Enhancement With Momentum Contrast for Image-Text Retrieval", the part
on CLIP-guided enhancement. The CLIP is never trained, so each picture is embedded once and the embeddings are kept in
a file, whose name is made of the CLIP's weights and of the pictures: another CLIP or other pictures have another file.
"""
from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tqdm import tqdm
from transformers import CLIPImageProcessor, CLIPModel

import data
import run as runs
from data import BadInput

BATCH = 64  # pictures embedded together


class Clip:
    """The image half of a frozen CLIP: a hub name or a local folder. Raises BadInput when there is none."""

    def __init__(self, name: str, device: torch.device | str = "cpu"):
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            clip, report = CLIPModel.from_pretrained(name, output_loading_info=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise BadInput(
                f"cannot load the CLIP {name!r} for --guide clip: neither a folder with a CLIP's config.json and "
                f"weights nor a model of huggingface.co within reach. Download huggingface.co/{name} elsewhere and "
                f"give its folder to --clip-model. ({str(error).splitlines()[0]})") from error
        self.vision, self.project = clip.vision_model.to(device).eval(), clip.visual_projection.to(device)
        missing = sorted(key for key in report["missing_keys"] if key.startswith("vis"))
        if missing:  # they would be random numbers
            raise BadInput(f"the CLIP {name!r} of --clip-model has no {missing[0]} (and {len(missing) - 1} more)")
        side = clip.config.vision_config.image_size
        frame = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        try:
            self.processor = CLIPImageProcessor.from_pretrained(name, **frame)
        except OSError:  # no preprocessor_config.json: all CLIPs prepare pictures alike
            self.processor = CLIPImageProcessor(**frame)
        self.dim, self.device = self.project.out_features, device

    def fingerprint(self) -> bytes:
        """Of all weights and of how pictures are prepared: two CLIPs never share one."""
        digest = hashlib.blake2b(self.processor.to_json_string().encode())
        for part in (self.vision, self.project):
            for name, value in part.state_dict().items():
                digest.update(name.encode())
                digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.digest()

    @torch.inference_mode()
    def embed(self, pictures: Iterable[Image.Image]) -> np.ndarray:
        """n pictures -> [n, E] float32 of unit length."""
        pixels = self.processor(images=list(pictures), return_tensors="pt")["pixel_values"].to(self.device)
        seen = self.project(self.vision(pixel_values=pixels).pooler_output)
        return torch.nn.functional.normalize(seen.float(), dim=1).cpu().numpy()


def attach(splits: dict[str, data.Split], clip: Clip, folders: list[Path]) -> None:
    """Give each split its `clip` [N, E]: from a file in the first of `folders` that can be written, or computed.

    Raises BadInput for an image without a picture, naming it, before anything is computed.
    """
    for name, split in splits.items():
        missing = [row for row, picture in enumerate(split.pictures) if picture is None]
        if missing:
            raise BadInput(
                f"--guide clip needs the pictures, and {len(missing)} of {len(split.pictures)} of split {name} have "
                f"none, the first is image {missing[0]} ({split.image_names[missing[0]]}). Put the pictures, and "
                f"dataset_*.json that names them, into --data-root, or use --guide self")
    own = clip.fingerprint()
    for name, split in splits.items():
        path = cache_folder(folders) / f"{name}-{key(own, split)}.npy"
        shape = [len(split.pictures), clip.dim]
        if not path.is_file():
            found = compute(clip, split)
            path.parent.mkdir(parents=True, exist_ok=True)
            runs.write_whole(path, lambda file, found=found: np.save(file, found, allow_pickle=False))
        split.clip = data.read_array(path)
        if list(split.clip.shape) != shape:
            raise BadInput(f"{path}: found shape {list(split.clip.shape)}, expected {shape}: delete it, it is a cache")


def compute(clip: Clip, split: data.Split) -> np.ndarray:
    """[N, E] float32, with a progress bar."""
    parts = []
    with tqdm(total=len(split.pictures), desc=f"CLIP looks at {split.name}", unit="picture") as bar:
        for start in range(0, len(split.pictures), BATCH):
            rows = range(start, min(start + BATCH, len(split.pictures)))
            parts.append(clip.embed(split.picture(row) for row in rows))
            bar.update(len(rows))
    return np.concatenate(parts)


def key(clip: bytes, split: data.Split) -> str:
    """The name of a cache: a digest of the CLIP and of the pictures in their order.

    A picture in memory counts by its pixels, a file by its name, size and time of last change.
    """
    digest = hashlib.blake2b(clip, digest_size=12)
    for picture in split.pictures:
        if isinstance(picture, Path):
            facts = picture.stat()
            digest.update(f"{picture.name} {facts.st_size} {facts.st_mtime_ns}\n".encode())
        else:
            digest.update(np.ascontiguousarray(picture))
    return digest.hexdigest()


def cache_folder(folders: list[Path]) -> Path:
    """`clip` in the first folder that is there and can be written, else in the last."""
    usable = (folder for folder in folders[:-1] if folder.is_dir() and os.access(folder, os.W_OK))
    return next(usable, folders[-1]) / "clip"
