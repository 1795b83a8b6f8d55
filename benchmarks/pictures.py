"""Pictures a second from files to a store, against the network alone on tensors that are ready.

    python benchmarks/pictures.py [--regions grid|detector|clip] [--pictures N] [--images FOLDER] [--rounds N]

Networks have random weights, which take as long as trained ones: resnet50 for the grid, fasterrcnn_resnet50_fpn_v2, and
a CLIP of the shape of ViT-B/32. Without --images the pictures are drawn here, JPEGs of 500 x 375 with a photograph's
detail. Both are timed in turn, in the same process, on the same pictures.
"""
from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageFilter
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
import extract
import photos
from run import Settings


def draw(folder: Path, count: int) -> list[Path]:
    """Smooth noise of several scales: about as large as photographs of that size are, 40 to 60 kB."""
    rng = np.random.default_rng(0)
    for row in range(count):
        layers = [Image.fromarray(rng.integers(0, 256, (375 // s, 500 // s, 3), dtype=np.uint8)).resize((500, 375))
                  for s in (64, 8, 3)]
        image = Image.blend(Image.blend(layers[0], layers[1], 0.4), layers[2], 0.15).filter(ImageFilter.BoxBlur(1))
        image.save(folder / f"{row}.jpg", quality=92)
    return photos.listed(folder)


def save_weights(kind: str, folder: Path) -> dict:
    """Random weights in a file, and the settings that name them."""
    torch.manual_seed(0)
    if kind == "clip":
        CLIPModel(CLIPConfig()).save_pretrained(folder / "clip")  # its defaults are the shape of ViT-B/32
        CLIPImageProcessor().save_pretrained(folder / "clip")
        return {"clip_model": str(folder / "clip")}
    name = {"grid": "resnet50", "detector": "fasterrcnn_resnet50_fpn_v2"}[kind]
    options = {} if kind == "grid" else {"weights_backbone": None}
    torch.save(torchvision.models.get_model(name, weights=None, **options).state_dict(), folder / "weights.pth")
    return {"region_weights": str(folder / "weights.pth")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regions", choices=("grid", "detector", "clip"), default="grid")
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        settings = Settings(regions=args.regions, **save_weights(args.regions, folder))
        (folder / "images").mkdir()
        pictures = (photos.listed(args.images) if args.images else draw(folder / "images", args.pictures))
        pictures = pictures[: args.pictures]
        network = extract.regions_network(settings, device)
        size = extract.BATCH[args.regions]
        ready = [network.prepare(photos.read(picture)) for picture in pictures]
        batches = [{name: torch.stack([each[name] for each in ready[start : start + size]]) for name in ready[0]}
                   for start in range(0, len(ready), size)]
        network.look(batches[0])
        alone, whole = [], []
        for number in range(args.rounds):
            start = time.perf_counter()
            for batch in batches:
                network.look(batch)
            alone.append(len(pictures) / (time.perf_counter() - start))
            settings.cache = str(folder / f"cache{number}")
            split = data.Split("all", [], np.zeros(0, np.int64), None, [p.name for p in pictures], list(pictures))
            extract.regions_network = lambda *given: network  # loading it is not what is measured
            start = time.perf_counter()
            extract.prepare({"all": split}, settings, folder, device)
            whole.append(len(pictures) / (time.perf_counter() - start))
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    shares = [100 * w / a for w, a in zip(whole, alone, strict=True)]
    print(f"{args.regions}, {len(pictures)} pictures, {name}, {args.rounds} rounds: the network alone "
          f"{statistics.median(alone):.1f} pictures/s, the whole pass {statistics.median(whole):.1f}; by round "
          f"{', '.join(f'{share:.0f}' for share in shares)} %, median {statistics.median(shares):.0f} %")


if __name__ == "__main__":
    main()
