"""Windows: a simple stand-in for the detector, used for the built-in scenes.

The papers take 36 regions of each picture from a frozen detector. Here `propose` picks the windows whose colour differs
most from their surroundings, and `describe` turns the pixels of each into a feature vector. Most windows hold no
object, as with a detector. Nothing is learnt, and only pixels are used: how a scene was drawn is not known here.
"""
from collections.abc import Iterator

import numpy as np

SIDE, BOXES = 128, 36  # width and height of a picture in pixels, and its number of regions
HALF = SIDE // 2  # boxes are found and described at half the resolution; all numbers below count these pixels
CELLS = 4  # a box is described by 4 x 4 cells
DIM = CELLS * CELLS * (3 + 8) + 3 + 2  # of each cell 3 colours and 8 edge directions; colour around; width and height
WINDOWS = ((9, 9, 3), (12, 12, 3), (16, 16, 4), (21, 21, 4), (10, 20, 5), (20, 10, 5))  # width, height, step
ANCHORS = np.array([(x, y, x + w, y + h) for w, h, step in WINDOWS
                    for y in range((HALF - h) % step // 2, HALF - h + 1, step)
                    for x in range((HALF - w) % step // 2, HALF - w + 1, step)])


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes [n, 4] and [m, 4]: [n, m]."""
    a, b = a[:, None], b[None]
    both = np.maximum(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0).prod(-1)
    return both / ((a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - both)


def halved(pictures: np.ndarray) -> Iterator[np.ndarray]:
    """Sums of 2 x 2 pixels, 50 pictures at a time: [n, 64, 64, 3] int16."""
    if pictures.dtype != np.uint8 or pictures.shape[1:] != (SIDE, SIDE, 3) or not len(pictures):
        raise ValueError(f"pictures should be uint8 [N, {SIDE}, {SIDE}, 3], not {pictures.dtype} {pictures.shape}")
    for start in range(0, len(pictures), 50):
        rows = pictures[start : start + 50, ::2].astype(np.int16) + pictures[start : start + 50, 1::2]
        yield rows[:, :, ::2] + rows[:, :, 1::2]


def integral(maps: np.ndarray) -> np.ndarray:
    """Sums of all pixels above and left of each corner, and their count: [n, 64, 64, C] -> [n, 65, 65, C + 1]."""
    table = np.zeros((len(maps), HALF + 1, HALF + 1, maps.shape[-1] + 1), np.int32)
    table[:, 1:, 1:, :-1], table[:, 1:, 1:, -1] = maps, 1
    np.cumsum(table, 1, out=table)
    return np.cumsum(table, 2, out=table)


def sums(table: np.ndarray, boxes: np.ndarray, parts: int = 1) -> np.ndarray:
    """Sums over the parts x parts cells of each box: boxes [n or 1, K, 4] -> [n, K, parts, parts, channels].

    table: from `integral`. boxes: in whole pixels of the halved picture.
    """
    low, high = boxes[..., None, :2], boxes[..., None, 2:]
    x, y = np.moveaxis(low + (high - low) * np.arange(parts + 1)[:, None] // parts, -1, 0)
    picture = np.arange(len(table))[:, None, None, None]
    corners = (picture * (HALF + 1) + y[..., :, None]) * (HALF + 1) + x[..., None, :]
    at = table.reshape(-1, table.shape[-1]).take(corners, 0)
    at = at[:, :, 1:] - at[:, :, :-1]
    return at[:, :, :, 1:] - at[:, :, :, :-1]


def grown(boxes: np.ndarray) -> np.ndarray:
    """The boxes, larger by a quarter of their width and height on each side."""
    return np.clip(boxes + np.tile(boxes[..., 2:] - boxes[..., :2], 2) // 4 * (-1, -1, 1, 1), 0, HALF)


def propose(pictures: np.ndarray) -> np.ndarray:
    """Pick the windows whose colour differs most from their surroundings, without much overlap.

    pictures [N, 128, 128, 3] uint8 -> boxes [N, 36, 4] float32, x1 y1 x2 y2 in 0..1, the most different first.
    Everything is computed in whole numbers, so that all machines pick the same. Raises ValueError for other arrays.
    """
    near = overlap(ANCHORS, ANCHORS) > 0.45
    found = []
    for chunk in halved(pictures):
        table = integral(chunk)
        inside = sums(table, ANCHORS[None])
        around = sums(table, grown(ANCHORS)[None]) - inside
        contrast = 4 * inside[..., :3] // inside[..., 3:] - 4 * around[..., :3] // around[..., 3:]
        score = (contrast**2).sum((2, 3, 4))
        kept = []
        for _ in range(BOXES):
            kept.append(score.argmax(1))
            score[near[kept[-1]]] = -1  # neither this window nor its neighbours can be picked again
        found.append(ANCHORS[np.stack(kept, 1)])
    return (np.concatenate(found) / HALF).astype(np.float32)


def edges(halves: np.ndarray) -> np.ndarray:
    """Edge strength by direction, of the colour with the strongest edge: [n, 64, 64, 3] -> [n, 64, 64, 8]."""
    dx, dy = np.zeros_like(halves), np.zeros_like(halves)
    dx[:, :, 1:-1], dy[:, 1:-1] = halves[:, :, 2:] - halves[:, :, :-2], halves[:, 2:] - halves[:, :-2]
    best = (abs(dx) + abs(dy)).argmax(-1)[..., None]
    dx, dy = np.take_along_axis(dx, best, -1), np.take_along_axis(dy, best, -1)
    flat, steep = abs(dx), abs(dy)
    # Eight directions, divided at the slopes 5/12 (nearly tan 22.5), 1 and 12/5. An arctangent would differ in its last
    # bits from machine to machine.
    turn = 4 * ((dx < 0) != (dy < 0)) + (12 * steep > 5 * flat) + (steep > flat) + (5 * steep > 12 * flat)
    return (flat + steep) * (turn == np.arange(8))


def describe(pictures: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """The features of boxes: colours and edges in 4 x 4 cells, the mean colour around the box, its width and height.

    pictures [N, 128, 128, 3] uint8, boxes [N, K, 4] in 0..1 -> [N, K, 181] float32. Constants bring the numbers near
    zero mean and unit scale. Raises ValueError for other arrays.
    """
    if boxes.ndim != 3 or boxes.shape[::2] != (len(pictures), 4):
        raise ValueError(f"boxes should be [{len(pictures)}, K, 4], not {boxes.shape}")
    corners = np.clip(np.rint(boxes * HALF), 0, HALF).astype(np.int64)
    out = []
    for i, chunk in enumerate(halved(pictures)):
        box = corners[50 * i : 50 * i + 50]
        table = integral(np.concatenate([chunk, edges(chunk)], -1))
        cells = sums(table, box, CELLS)
        around = sums(table, grown(box))[:, :, 0, 0] - cells.sum((2, 3))
        cells, around = (part[..., :-1] / np.maximum(part[..., -1:], 1) for part in (cells, around))
        turns = cells[..., 3:] / (cells[..., 3:].mean((2, 3), keepdims=True).sum(4, keepdims=True) + 8)
        extent = (box[..., 2:] - box[..., :2]) / 8 - 2
        parts = (cells[..., :3] / 256 - 2, turns * 4 - 0.5, around[..., :3] / 256 - 2, extent)
        out.append(np.concatenate([part.reshape(*box.shape[:2], -1) for part in parts], -1).astype(np.float32))
    return np.concatenate(out)
