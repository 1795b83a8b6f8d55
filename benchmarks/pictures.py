"""Pictures a second: from files to a store, and the network alone on tensors that are ready.

    python benchmarks/pictures.py [--regions grid|detector|clip] [--pictures N] [--images FOLDER] [--rounds N]

The networks have random weights, which take as long as trained ones: resnet50 for the grid, fasterrcnn_resnet50_fpn_v2
for the detector, and a CLIP of the shape of ViT-B/32. Without --images the pictures are made here: JPEGs of 500 x 375
with as much detail as a photograph. Both are timed in turn, in one process, on the same pictures.
"""
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
from sources import networks, photos
from sources.extract import Cache, fill


def draw(folder: Path, count: int) -> list[Path]:
    """Smooth noise of several scales. The files take 40 to 60 kB, about as much as photographs of that size."""
    rng = np.random.default_rng(0)
    for row in range(count):
        layers = [Image.fromarray(rng.integers(0, 256, (375 // s, 500 // s, 3), dtype=np.uint8)).resize((500, 375))
                  for s in (64, 8, 3)]
        image = Image.blend(Image.blend(layers[0], layers[1], 0.4), layers[2], 0.15).filter(ImageFilter.BoxBlur(1))
        image.save(folder / f"{row}.jpg", quality=92)
    return photos.listed(folder)


def save_weights(kind: str, folder: Path) -> Path:
    """Write random weights to a file, and return it; of a CLIP, to a folder."""
    torch.manual_seed(0)
    if kind == "clip":
        CLIPModel(CLIPConfig()).save_pretrained(folder / "clip")  # its defaults are the shape of ViT-B/32
        CLIPImageProcessor().save_pretrained(folder / "clip")
        return folder / "clip"
    name = {"grid": "resnet50", "detector": "fasterrcnn_resnet50_fpn_v2"}[kind]
    options = {} if kind == "grid" else {"weights_backbone": None}
    torch.save(torchvision.models.get_model(name, weights=None, **options).state_dict(), folder / "weights.pth")
    return folder / "weights.pth"


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
        (folder / "images").mkdir()
        pictures = photos.listed(args.images) if args.images else draw(folder / "images", args.pictures)
        pictures = pictures[: args.pictures]
        weights = str(save_weights(args.regions, folder))
        network = networks.regions_network(args.regions, "", weights, 36, 0, weights, device)
        ready = [network.prepare(photos.read(picture)) for picture in pictures]
        parts = [ready[start : start + network.batch_size] for start in range(0, len(ready), network.batch_size)]
        batches = [{name: torch.stack([each[name] for each in part]) for name in part[0]} for part in parts]
        network.look(batches[0])
        alone, whole = [], []
        for number in range(args.rounds):
            start = time.perf_counter()
            for batch in batches:
                network.look(batch)
            alone.append(len(pictures) / (time.perf_counter() - start))
            caches = {"regions": Cache(lambda: network, folder / f"cache{number}")}
            start = time.perf_counter()
            fill(pictures, folder, caches)
            whole.append(len(pictures) / (time.perf_counter() - start))
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    shares = [100 * w / a for w, a in zip(whole, alone, strict=True)]
    print(f"{args.regions}, {len(pictures)} pictures, {name}, {args.rounds} rounds: the network alone "
          f"{statistics.median(alone):.1f} pictures/s, the whole pass {statistics.median(whole):.1f}; by round "
          f"{', '.join(f'{share:.0f}' for share in shares)} %, median {statistics.median(shares):.0f} %")


if __name__ == "__main__":
    main()
