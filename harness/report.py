"""The report of a run: a split measured, the table, metrics.json, and the pictures of the run folder."""
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from unicodedata import category

import numpy as np
import torch
from torch import nn
from transformers import BertTokenizer

import data
import retrieve
from harness import engines, figures
from harness.folder import Opened
from harness.settings import Settings
from retrieve import Embeddings
from sources.files import write_json
from sources.windows import overlap

# ------------------------------------------------------------------------------------------------ a whole split


def measure(model: nn.Module, split: data.Split, words: list[np.ndarray], settings: Settings,
            device: torch.device | str, precision: str, exhaustive: bool = True,
            dtype: torch.dtype | None = None) -> tuple[dict, Embeddings, Embeddings]:
    """Encode a split and evaluate it. Returns the metrics, the encoded images and the encoded captions.

    exhaustive: as in `retrieve.evaluate`. dtype: the type of the tokens while searching, None for float32.
    """
    start = time.perf_counter()
    images = retrieve.encode(model, data.image_batches(split, 128), "image", len(split.features), device, precision)
    texts = retrieve.encode(model, data.text_batches(words, 256), "text", len(split.captions), device, precision)
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    images, texts = images.to(dtype=dtype), texts.to(dtype=dtype)
    options = search_options(settings) | {"find": engines.search}
    result = retrieve.evaluate(images, texts, split.image_of, exhaustive=exhaustive, **options)
    result["seconds"]["encode"] = seconds
    if settings.run.dataset == "coco" and exhaustive and len(images) == 5000:
        result["folds_1k"] = five_folds(images, texts, split.image_of, **options)
    if split.truth is not None and exhaustive and texts.tokens is not None:
        one_piece = settings.text.text_encoder == "from-scratch"  # other tokenizers may split a word
        if one_piece and (found := alignment(images, texts, split)):
            result["alignment"] = found
    return {"split": split.name, "images": len(images), "captions": len(texts), **result}, images, texts


def search_options(settings: Settings) -> dict:
    """The keyword arguments of `retrieve.evaluate`."""
    return {"shortlist": (settings.search.captions_shortlist, settings.search.images_shortlist),
            "weight": settings.cmc.local_weight, "reduction": settings.cmc.reduction}


def final(result: dict) -> dict:
    """The metrics that a run is judged by: two-stage, or global for a model without fine tokens."""
    return result.get("two_stage", result["global"])


def five_folds(images: Embeddings, texts: Embeddings, image_of: Sequence[int], **options: object) -> dict:
    """COCO's 1K protocol: the mean of the metrics over five folds of a fifth of the images each."""
    image_of = torch.as_tensor(image_of, device=images.globals.device)
    size, folds = len(images) // 5, []
    for fold in range(5):
        captions = image_of.div(size, rounding_mode="floor") == fold
        folds.append(retrieve.evaluate(images[fold * size : (fold + 1) * size], texts[captions],
                                       image_of[captions] - fold * size, **options))
    return mean_of(folds)


def mean_of(results: list[dict]) -> dict:
    """The mean of dictionaries of one shape, number by number."""
    return {key: mean_of([r[key] for r in results]) if isinstance(value, dict)
            else sum(r[key] for r in results) / len(results) for key, value in results[0].items()}


def shortlists(images: Embeddings, texts: Embeddings, image_of: Sequence[int], lengths: Sequence[int],
               weight: float, reduction: str) -> list[dict]:
    """Two-stage metrics and seconds for several lengths K of the shortlist, the same K in both directions."""
    lines = []
    for k in lengths:
        result = retrieve.evaluate(images, texts, image_of, (k, k), weight, reduction, False, engines.search)
        lines.append({"k": k, "seconds": result["seconds"]["two_stage"], **result["two_stage"]})
    return lines


def alignment(images: Embeddings, texts: Embeddings, split: data.Split) -> dict | None:
    """Does a word look at what it names? The scenes know which words name which objects.

    A word is aligned if its most similar region lies on its object. Returns the percentage of aligned words, the
    percentage for a random region ("chance"), and the number of words. Words that `--longest` cut off do not count;
    None if no word is left.
    """
    images, texts = images.to("cpu"), texts.to("cpu")  # many small steps
    hits, chance = [], []
    for caption, named in enumerate(split.truth.word_objects):
        image = int(split.image_of[caption])
        words = texts.tokens_of(torch.tensor([caption]))                                            # [W, D]
        best = (words @ images.tokens_of(torch.tensor([image])).T).argmax(1).numpy()                # [W]
        _, boxes, mask = split.features.read([image])
        on_object = lies_on(boxes[0][mask[0]], split.truth.object_boxes[image])                     # [R, O] bool
        for word, thing in named:
            if word < len(best):
                hits.append(on_object[best[word], thing])
                chance.append(on_object[:, thing].mean())
    if not hits:
        return None
    return {"aligned": 100 * float(np.mean(hits)), "chance": 100 * float(np.mean(chance)), "words": len(hits)}


@torch.inference_mode()
def pooling(model: nn.Module, split: data.Split, words: list[np.ndarray]) -> dict[str, list[float]]:
    """The weights that GPO gives to the sorted places of the first image, and of a caption of middle length."""
    device = next(model.parameters()).device
    lengths = {"image": int(split.features.read([0])[2].sum()), "text": sorted(map(len, words))[len(words) // 2]}
    pools = {"image": model.image_pool, "text": model.text_pool}
    weights = {side: pools[side].pooling_weights(torch.tensor([length], device=device), length)[0]
               for side, length in lengths.items()}
    return {side: [round(value, 4) for value in found.tolist()] for side, found in weights.items()}


def lies_on(boxes: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """Which of boxes [R, 4] lie on which of objects [O, 4], [R, O] bool: IoU at least 0.3, or the centre inside."""
    centre = ((boxes[:, :2] + boxes[:, 2:]) / 2)[:, None]
    inside = ((centre >= objects[:, :2]) & (centre <= objects[:, 2:])).all(2)
    return inside | (overlap(boxes, objects) >= 0.3)


NAMES = {"global": "global only", "local": "exhaustive local", "two_stage": "two-stage", "mixed": "exhaustive mixed"}


def table(result: dict) -> str:
    """The metrics of `measure` as text: a line for each way of searching, both directions, and its seconds."""
    lines = [f"{result['split']}: {result['images']} images, {result['captions']} captions, "
             f"encoded in {result['seconds']['encode']:.1f} s"]
    for title, part in (("", result), ("mean of five folds of 1K", result.get("folds_1k"))):
        if part is None:
            continue
        lines += [title] if title else []
        lines.append(f"{'':18}{'image to text':^24}{'text to image':^24}")
        lines.append(f"{'':18}" + f"{'R@1':>6}{'R@5':>6}{'R@10':>6}{'med':>5} " * 2 + f"{'rsum':>7}{'seconds':>9}")
        for key, name in NAMES.items():
            if key in part:
                row = "".join("".join(f"{part[key][way][r]:6.1f}" for r in ("r1", "r5", "r10"))
                              + f"{part[key][way]['median_rank']:5.0f} " for way in ("i2t", "t2i"))
                lines.append(f"{name:18}{row}{part[key]['rsum']:7.1f}{part['seconds'][key]:9.2f}")
    if "alignment" in result:
        found = result["alignment"]
        lines.append(f"alignment: {found['aligned']:.1f} % of {found['words']} words that name an object look at it "
                     f"(chance {found['chance']:.1f} %)")
    return "\n".join(lines)


def show(query: str, found: list[dict], as_json: bool, fine: bool, titled: bool = False) -> None:
    """Print a line of JSON or a table: the scores and their parts, a local part only if the model is `fine`."""
    if as_json:
        found = [item if fine else {name: item[name] for name in item if name != "local"} for item in found]
        utf8 = (sys.stdout.encoding or "").lower() in ("utf-8", "utf8")
        print(json.dumps({"query": query, "found": found}, ensure_ascii=not utf8), flush=True)
        return
    if titled:
        print(f"\n{query}")
    print(f"  #{'score':>9}{'global':>9}{'local':>9}" if fine else f"  #{'score':>9}")
    for place, item in enumerate(found, 1):
        parts = f"{item['global']:9.3f}{item['local']:9.3f}" if fine else ""
        # A caption may hold any character. The blanks of a file name stay as they are, so that it can be copied.
        name = "".join(letter if letter.isprintable() or category(letter) == "Zs" else " " for letter in item["name"])
        print(f"{place:3d}{item['score']:9.3f}{parts}  {name}")


# ------------------------------------------------------------------------------------------- the end of a run


def report(best: Opened, splits: dict[str, data.Split], words: dict[str, list], out: Path, device: torch.device,
           precision: str) -> None:
    """Evaluate on test (on val if there is no test split), print the table, write metrics.json and the pictures.

    best: the run in the folder `out`, opened, with the weights of its best epoch.
    """
    settings, model = best.settings, best.model.to(device)
    name = "test" if "test" in splits else "val"
    if name == "val":
        print(f"{settings.run.dataset} has no test split here: these figures are of val, which chose the best epoch")
    result, images, texts = measure(model, splits[name], words[name], settings, device, precision)
    write_json(out / "metrics.json", {"epoch": best.checkpoint["epoch"], **result, "precision": precision})
    print(table(result))
    draw(model, splits[name], images, texts, words[name], best.tokenizer, settings, out)
    print(f"run folder: {out}")


@torch.inference_mode()
def draw(model: nn.Module, split: data.Split, images: Embeddings, texts: Embeddings, words: list[np.ndarray],
         tokenizer: BertTokenizer, settings: Settings, out: Path) -> None:
    """Draw some queries with what they found, and what the first caption's words look at.

    The queries are drawn at random, and are always the same. A model without fine tokens gets a picture of what its
    guide strengthens in the image of the first caption instead.
    """
    options = search_options(settings)
    captions_shortlist, images_shortlist = options.pop("shortlist")
    chance = torch.Generator().manual_seed(0)
    captions = torch.randperm(len(texts), generator=chance)[:5]
    pictures = torch.randperm(len(images), generator=chance)[:3]
    images_found = retrieve.search(texts[captions], images, images_shortlist, **options)[0][:, :5]
    captions_found = retrieve.search(images[pictures], texts, captions_shortlist, **options)[0][:, :5]
    figures.retrieval(split, images_found, captions_found, captions, pictures, out / "retrieval.png")
    caption, row = captions[:1], int(split.image_of[captions[0]])
    if texts.tokens is not None:
        pieces = tokenizer.convert_ids_to_tokens(words[int(caption)][1:-1])
        dots = texts.tokens_of(caption) @ images.tokens_of(torch.tensor([row])).T                   # [W, R]
        _, boxes, mask = split.features.read([row])
        figures.alignment(split, row, pieces, dots.float().cpu().numpy(), boxes[0][mask[0]], out / "alignment.png")
    elif model.guide is not None:
        batch = data.image_side(split, np.array([row]))
        device = next(model.parameters()).device
        given = {name: value.to(device) for name, value in batch.items()}
        added = model.guide(given["regions"], given["region_mask"], given.get("clip")) - given["regions"]
        real = batch["region_mask"][0]  # what is added to a region is the guide, of unit length, times its attention
        figures.guided(split, row, added.norm(dim=2)[0].cpu()[real].numpy(), batch["boxes"][0][real].numpy(),
                       out / "guide.png")
