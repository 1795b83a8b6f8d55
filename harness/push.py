"""Push a corpus into Qdrant, block by block; a push that was stopped goes on where it was."""
import time
from bisect import bisect_left

import numpy as np
import torch
from tqdm import tqdm

from harness import qdrant, served
from harness.index import BLOCK, DTYPES, KINDS, Encode
from retrieve import Embeddings
from sources.files import BadInput

PROBES = 200  # queries that measure the recall of --approximate
PAUSE = 1     # seconds between two checks whether the graph is built
MAY_CHANGE = ("run", "data", "whole", "approximate")  # where things lie, and how far a push came


def push(address: str, identity: dict, counts: dict[str, int], encode: Encode, names: dict,
         approximate: dict[str, int] | None = None) -> None:
    """Push a corpus, or go on with a push that was stopped. identity, counts, encode, names: as for `index.build`.

    approximate: kind of the corpus -> length of its shortlists. Stage 1 then uses HNSW, and its recall is printed.
    Raises BadInput if another model or corpus is there.
    """
    server = qdrant.connect(address)
    from qdrant_client import models

    manifest = identity | {"counts": counts, "whole": False, "approximate": False}
    for kind in KINDS:
        settle(server, kind, manifest)
    for kind, each in zip(KINDS, (names["images"], names["captions"]), strict=True):
        push_side(server, kind, counts[kind], encode, each, DTYPES[identity["dtype"]])
    vectors = {"global": models.VectorParamsDiff(hnsw_config=graph(approximate))}
    moved = {name: identity[name] for name in ("run", "data") if identity[name]}  # Qdrant would drop a None
    for kind in KINDS:
        server.ask("update_collection", kind, vectors_config=vectors,
                   metadata={"whole": True, "approximate": bool(approximate), **moved})
    for kind in KINDS:
        if approximate and counts[kind]:
            print(f"recall of approximate shortlists of {kind}s: {recall(server, kind, approximate[kind]):.4f}")


def settle(server: qdrant.Connection, kind: str, manifest: dict) -> None:
    """Make a collection, or check that the one that is there holds the same corpus of the same model."""
    from qdrant_client import models

    if served.manifest_of(server, kind) is None:
        shape = {"size": manifest["dim"], "distance": models.Distance.DOT, "hnsw_config": graph(False)}
        max_sim = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
        vectors = {"global": models.VectorParams(**shape)}
        if manifest["tokens"]:
            vectors["tokens"] = models.VectorParams(**shape, datatype=manifest["dtype"], on_disk=True,
                                                    multivector_config=max_sim)
        server.ask("create_collection", kind, vectors_config=vectors, metadata=manifest)
    there = served.manifest_of(server, kind)
    other = [name for name in manifest if name not in MAY_CHANGE and there.get(name) != manifest[name]]
    if other:
        raise BadInput(f"{server.address}: holds an index with another {', '.join(other)}: give another address")


def graph(approximate: object) -> object:
    """HNSW's setting. Without edges there is none; it is built at the end of a push, if at all."""
    from qdrant_client import models

    return models.HnswConfigDiff(m=16 if approximate else 0)


def push_side(server: qdrant.Connection, kind: str, count: int, encode: Encode, names: list[str],
              dtype: torch.dtype) -> None:
    """Push what is missing of one kind. A block is acknowledged before the next is sent."""
    def missing(start: int) -> bool:
        ids = list(range(start, min(start + BLOCK, count)))
        return server.ask("count", kind, count_filter=served.only(ids), exact=True).count < len(ids)

    first = BLOCK * bisect_left(range(0, count, BLOCK), True, key=missing)  # whole blocks come first, then none
    with tqdm(total=count, initial=min(first, count), desc=f"push {kind}s", unit=kind, disable=not count) as bar:
        for start in range(first, count, BLOCK):
            items = np.arange(start, min(start + BLOCK, count))
            side = encode(kind, items).to("cpu", dtype)
            longest = 0 if side.tokens is None else int(side.offsets.diff().max())
            step = max(1, served.REQUEST // (side.globals.shape[1] * (1 + longest)))
            for part in np.split(items, range(step, len(items), step)):
                points = points_of(side[torch.from_numpy(part - start)], part, names)
                server.ask("upsert", kind, points=points, wait=True)
                bar.update(len(part))


def points_of(side: Embeddings, items: np.ndarray, names: list[str]) -> list:
    """Items as Qdrant's points. An item without tokens has its global vector only."""
    from qdrant_client import models

    vectors = [{"global": vector} for vector in side.globals.tolist()]
    if side.tokens is not None:
        for vector, tokens in zip(vectors, side.tokens.float().split(side.offsets.diff().tolist()), strict=True):
            vector |= {"tokens": tokens.tolist()} if len(tokens) else {}
    return [models.PointStruct(id=item, vector=vector, payload={"name": names[item]})
            for item, vector in zip(items.tolist(), vectors, strict=True)]


def recall(server: qdrant.Connection, kind: str, k: int) -> float:
    """The share, 0 to 1, of the exact shortlists that HNSW finds.

    Up to PROBES vectors of the other kind are the queries, or of the corpus itself if there are none.
    """
    time.sleep(PAUSE)  # the graph is built in the background
    while (status := server.ask("get_collection", kind).status) not in ("green", "grey"):
        if status == "red":
            raise BadInput(f"{server.address}: Qdrant could not build the graph of the {kind}s, its log says why")
        time.sleep(PAUSE)
    corpus, other = (served.Side(side, server, served.manifest_of(server, side)) for side in (
        kind, "text" if kind == "image" else "image"))
    probed = other if len(other) else corpus
    rows = np.linspace(0, len(probed) - 1, min(PROBES, len(probed))).astype(int).tolist()
    queries, k, pairs = probed.fetched(sorted(set(rows))).globals, min(k, len(corpus)), 0
    for part in queries.split(served.PIECE):
        found, exact = (corpus.nearest(part, k, way)[0] for way in (False, True))
        pairs += (found[:, :, None] == exact[:, None]).sum().item()
    return pairs / (len(queries) * k)
