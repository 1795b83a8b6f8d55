"""A served index: a corpus in Qdrant, searched there. docs/served.md says when this pays, and how to start a server.

Images and captions have a collection each. A point is an item, its id is the row; it has a vector `global`, vectors
`tokens` and a name. The stages are two queries: in a single one, each shard would make a shortlist of its own.
Stage 2 runs in Qdrant where its MaxSim is our local similarity, a sum over the query's tokens: for captions, with the
reductions sum and mean. Else the tokens of the shortlist come here.
"""
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import retrieve
from harness import engines, qdrant
from harness.index import DTYPES, KINDS, Index, check_values
from losses import over_words
from retrieve import Embeddings
from sources.files import BadInput, explained

REQUEST = 2**20  # numbers sent or fetched at once: about 12 MB of JSON, and a server takes 32
WIDER = 4        # HNSW looks at this many times the shortlist, which raises its recall
PIECE = 16       # queries sent at once
KNOWN = {"checkpoint", "run", "split", "data", "dtype", "dim", "tokens", "counts", "whole", "approximate"}


@dataclass
class Side:
    """All images or all captions of a served index."""

    kind: str
    server: qdrant.Connection
    manifest: dict
    names: dict = field(default_factory=dict)  # row -> name, of all that was found so far

    def __len__(self) -> int:
        return self.manifest["counts"][self.kind]

    def search(self, queries: Embeddings, shortlist: int, weight: float, reduction: str) -> tuple[Tensor, ...]:
        """`retrieve.search` -> rows [Q, K], scores [Q, K], and their global part [Q, K]; on the CPU."""
        found = []
        for block in (queries[start : start + PIECE].to("cpu") for start in range(0, len(queries), PIECE)):
            rows, coarse = self.nearest(block.globals, min(shortlist, len(self)), not self.manifest["approximate"])
            if not weight or block.tokens is None or not self.manifest["tokens"]:
                found.append((rows, coarse, coarse))
            elif block.kind == "text" and block.offsets.diff().min() > 0:
                local = over_words(self.max_sim(block, rows), block.offsets.diff()[:, None], reduction)
                scores, order = (coarse + weight * local).sort(dim=1, descending=True, stable=True)
                found.append((rows.gather(1, order), scores, coarse.gather(1, order)))
            else:
                ids = rows.unique()
                few = self.fetched(ids.tolist())  # it holds each query's shortlist, so its nearest are the same
                places, scores = engines.search(block, few, rows.shape[1], weight, reduction)
                found.append((ids[places], scores, (block.globals[:, None] * few.globals[places]).sum(2)))
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    def nearest(self, queries: Tensor, k: int, exact: bool) -> tuple[Tensor, Tensor]:
        """Stage 1 over all shards: rows [Q, k] and their dot products [Q, k]."""
        from qdrant_client import models

        how = models.SearchParams(exact=exact, hnsw_ef=WIDER * k)
        asked = [models.QueryRequest(query=query, using="global", limit=k, with_payload=["name"], params=how)
                 for query in queries.tolist()]
        answers = [answer.points for answer in self.server.ask("query_batch_points", self.kind, asked)]
        if not exact and min(map(len, answers)) < k:  # HNSW may find fewer than it was asked for
            return self.nearest(queries, k, True)
        if min(map(len, answers)) < k:
            raise BadInput(f"{self.server.address}: holds fewer than {k} of its {len(self)} items: push them again")
        self.names |= {point.id: point.payload["name"] for points in answers for point in points}
        return (torch.tensor([[point.id for point in points] for points in answers]),
                torch.tensor([[point.score for point in points] for points in answers]))

    def max_sim(self, captions: Embeddings, rows: Tensor) -> Tensor:
        """Stage 2 in Qdrant: for each word its most similar region, summed; [Q, K] for rows [Q, K]."""
        from qdrant_client import models

        words = captions.tokens.float().split(captions.offsets.diff().tolist())
        asked = [models.QueryRequest(query=query.tolist(), using="tokens", limit=len(ids), filter=only(ids),
                                     params=models.SearchParams(exact=True), with_payload=False)
                 for query, ids in zip(words, rows.tolist(), strict=True)]
        answers = self.server.ask("query_batch_points", self.kind, asked)
        scores = [{point.id: point.score for point in answer.points} for answer in answers]
        return torch.tensor([[of[row] for row in ids] for of, ids in zip(scores, rows.tolist(), strict=True)])

    def fetched(self, ids: list[int]) -> Embeddings:
        """Items with their vectors, brought here."""
        wanted, found = ["global", "tokens"] if self.manifest["tokens"] else ["global"], {}
        step = max(1, REQUEST // (50 * self.manifest["dim"]))  # few items have more than 50 tokens
        for start in range(0, len(ids), step):
            for point in self.server.ask("retrieve", self.kind, ids=ids[start : start + step], with_payload=False,
                                         with_vectors=wanted):
                found[point.id] = {name: np.array(vector, np.float32) for name, vector in point.vector.items()}
        whole = Embeddings(self.kind, torch.from_numpy(np.stack([found[row]["global"] for row in ids])))
        if self.manifest["tokens"]:
            tokens = [found[row].get("tokens", np.zeros((0, self.manifest["dim"]), np.float32)) for row in ids]
            whole.tokens = torch.from_numpy(np.concatenate(tokens)).to(DTYPES[self.manifest["dtype"]])
            whole.offsets = retrieve.offsets_of(torch.tensor([len(each) for each in tokens]))
        return whole


def only(ids: list[int]) -> object:
    """Qdrant's filter for these points."""
    from qdrant_client import models

    return models.Filter(must=[models.HasIdCondition(has_id=ids)])


def manifest_of(server: qdrant.Connection, kind: str) -> dict | None:
    """What a collection was made of, None if there is none. Raises BadInput if it is not ours."""
    if not server.ask("collection_exists", kind):
        return None
    manifest = server.ask("get_collection", kind).config.metadata
    if not isinstance(manifest, dict) or not KNOWN <= manifest.keys():
        raise BadInput(f"{server.address}: not an index of this program, or on a Qdrant older than 1.16")
    with explained(server.address, "an index of this program"):
        check_values(manifest)
    return manifest


def load(address: str) -> Index:
    """Open a served index. Raises BadInput if there is none, or if its push has not ended."""
    server = qdrant.connect(address)
    manifests = {kind: manifest_of(server, kind) for kind in KINDS}
    if not all(manifest and manifest["whole"] for manifest in manifests.values()):
        raise BadInput(f"{address}: no index there, or not all of it: push it by `python retrieve.py index`")
    images, texts = (Side(kind, server, manifests[kind]) for kind in KINDS)
    return Index(images.manifest, images, texts, {"images": images.names, "captions": texts.names},
                 Path(images.manifest["run"]))


def evaluate(opened: Index, side: Callable[[str], Embeddings], image_of: Sequence[int], shortlist: tuple[int, int],
             weight: float, reduction: str) -> dict:
    """The metrics of a served index. Its split, encoded here by side("image") and side("text"), asks the queries.

    Ranks beyond the shortlist come from the vectors here.
    """
    start = time.perf_counter()
    images, texts = side("image").to("cpu"), side("text").to("cpu")
    encoded, image_of, rows = time.perf_counter(), torch.as_tensor(image_of), torch.arange(len(images))
    ranks = []
    for corpus, queries, here, k, query_image, corpus_image in (
            (opened.texts, images, texts, shortlist[0], rows, image_of),
            (opened.images, texts, images, shortlist[1], image_of, rows)):
        found, scores, _ = corpus.search(queries, k, weight, reduction)
        stage1 = retrieve.global_ranks(queries, here, query_image, corpus_image)
        ranks.append(retrieve.shortlist_ranks(found, scores, query_image, corpus_image, stage1))
    name = "two_stage" if opened.manifest["tokens"] else "global"
    return {"split": opened.manifest["split"], "images": len(images), "captions": len(texts),
            name: retrieve.metrics(*ranks), "seconds": {"encode": encoded - start, name: time.perf_counter() - encoded}}
