"""A served index answers as the one on disk does; a push goes on, never mixes models, and outlives a restart."""
import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from time import perf_counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import retrieve
import train
from harness import folder, index, push, qdrant, served
from retrieve import Embeddings
from sources.files import BadInput

pytest.importorskip("qdrant_client")
from qdrant_client import QdrantClient, models  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Local mode")
IMAGES, TEXTS, DIM = 40, 70, 8
IDENTITY = {"checkpoint": "abc", "run": "runs/x", "data": None, "dataset": "scenes", "split": "test",
            "dtype": "float32", "dim": DIM, "tokens": True}
NAMES = {"images": [f"image {row}" for row in range(IMAGES)], "captions": [f"caption {row}" for row in range(TEXTS)]}
ENGINES = ["memory", pytest.param("files", marks=pytest.mark.skipif(not find_spec("qdrant_edge"),
                                                                    reason="qdrant-edge-py is not installed"))]


def side(kind: str, count: int, longest: int, seed: int) -> Embeddings:
    chance = torch.Generator().manual_seed(seed)
    globals_, tokens = (F.normalize(torch.randn(*shape, DIM, generator=chance), dim=-1)
                        for shape in ((count,), (count, longest)))
    lengths = torch.randint(1, longest + 1, (count, 1), generator=chance)
    return Embeddings(kind, globals_, tokens, torch.arange(longest) < lengths)


@pytest.fixture(scope="module")
def sides() -> dict[str, Embeddings]:
    return {"image": side("image", IMAGES, 6, 0), "text": side("text", TEXTS, 5, 1)}


def an_engine(kind: str, folder: Path, monkeypatch) -> str:
    """The address of an engine: the client's memory in place of a server, or Qdrant's own on files."""
    if kind == "files":
        return f"qdrant:{folder}"
    connection = qdrant.Connection("qdrant://memory/test", QdrantClient(":memory:"), "test-")
    monkeypatch.setattr(qdrant, "connect", lambda address: connection)
    return connection.address


@pytest.fixture(params=ENGINES)
def address(request, tmp_path, monkeypatch) -> str:
    return an_engine(request.param, tmp_path / "served", monkeypatch)


@pytest.fixture(params=ENGINES, scope="module")
def opened(request, sides, tmp_path_factory) -> index.Index:
    """The sides, pushed and opened."""
    with pytest.MonkeyPatch.context() as patch:
        where = an_engine(request.param, tmp_path_factory.mktemp("served") / "index", patch)
        pushed(where, sides)
        return served.load(where)


def pushed(address: str, sides: dict, calls: list | None = None, approximate: dict | None = None, **changes) -> None:
    def encode(kind: str, items: np.ndarray) -> Embeddings:
        if calls is not None:
            calls.append((kind, int(items[0])))
        return sides[kind][torch.from_numpy(items)]

    counts = {kind: len(each) for kind, each in sides.items()}
    push.push(address, IDENTITY | changes, counts, encode, NAMES, approximate)


def same(corpus: served.Side, queries: Embeddings, ours: Embeddings, k: int, weight: float, reduction: str) -> None:
    rows, scores, coarse = corpus.search(queries, k, weight, reduction)
    wanted, wanted_scores = retrieve.search(queries, ours, k, weight, reduction)
    assert torch.equal(rows, wanted)
    assert torch.allclose(scores, wanted_scores, atol=2e-5)
    assert torch.allclose(coarse, (queries.globals[:, None] * ours.globals[wanted]).sum(2), atol=1e-6)


def test_a_served_index_answers_as_the_one_on_disk(sides, opened, tmp_path):
    index.build(tmp_path / "index", IDENTITY, {"image": IMAGES, "text": TEXTS},
                lambda kind, items: sides[kind][torch.from_numpy(items)], NAMES)
    disk = index.load(tmp_path / "index")
    opened.images.names.clear()
    for reduction in ("sum", "mean"):
        for k in (1, 7, 1000):
            same(opened.images, disk.texts, disk.images, k, 10.0, reduction)
            same(opened.texts, disk.images, disk.texts, k, 10.0, reduction)
    same(opened.images, disk.texts, disk.images, 7, 0.0, "sum")
    assert [opened.names["images"][row] for row in range(IMAGES)] == NAMES["images"]


def test_what_qdrant_cannot_re_rank_is_re_ranked_here(sides, opened, monkeypatch):
    """A caption without words, whose local similarity is 0, and a picture's query."""
    texts = sides["text"]
    wordless = Embeddings("text", texts.globals[:2], texts.tokens[:3], None, torch.tensor([0, 0, 3]))
    monkeypatch.setattr(served.Side, "max_sim", None)  # is not called
    same(opened.images, wordless, sides["image"], 7, 10.0, "sum")
    same(opened.texts, sides["image"], sides["text"], 7, 10.0, "mean")


def test_half_precision(sides, address):
    """Words and regions are multiplied in either precision here and there, so scores differ by half's rounding."""
    pushed(address, sides, dtype="float16")
    opened = served.load(address)
    half = {kind: each.to(dtype=torch.float16) for kind, each in sides.items()}
    for corpus, ours, queries in ((opened.images, half["image"], sides["text"]),
                                  (opened.texts, half["text"], sides["image"])):
        _, scores, _ = corpus.search(queries, 7, 10.0, "sum")
        assert torch.allclose(scores, retrieve.search(queries, ours, 7, 10.0)[1], atol=0.05)


def test_a_model_without_fine_tokens(sides, address):
    coarse = {kind: Embeddings(kind, each.globals) for kind, each in sides.items()}
    pushed(address, coarse, tokens=False)
    opened = served.load(address)
    same(opened.images, coarse["text"], coarse["image"], 7, 10.0, "sum")
    same(opened.texts, coarse["image"], coarse["text"], 7, 10.0, "sum")


def recorded(monkeypatch, client: object) -> list:
    """The queries that an engine will be asked."""
    asked, kind = [], type(client)
    ask = kind.query_batch_points
    monkeypatch.setattr(kind, "query_batch_points", lambda *arguments: asked.extend(arguments[2]) or ask(*arguments))
    return asked


def test_the_shortlist_is_one_query_and_the_second_names_its_ids(sides, opened, monkeypatch):
    """With prefetch and rescoring in one query, each shard of a collection would take a shortlist of its own."""
    asked = recorded(monkeypatch, opened.images.server.client)
    found, _, _ = opened.images.search(sides["text"][:1], 7, 10.0, "sum")
    first, second = asked
    assert first.using == "global" and first.limit == 7 and first.params.exact and first.filter is None
    assert second.using == "tokens" and set(second.filter.must[0].has_id) == set(found[0].tolist())
    assert not first.prefetch and not second.prefetch


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [1, 4])
def test_a_push_goes_on_where_it_stopped(sides, address, monkeypatch, after):
    for module in (push, served):
        monkeypatch.setattr(module, "BLOCK" if module is push else "REQUEST", 16 if module is push else 400)
    calls, again = [], []

    class Failing(dict):
        def __getitem__(self, kind):
            if len(calls) > after:
                raise Killed
            return super().__getitem__(kind)

    with pytest.raises(Killed):
        pushed(address, Failing(sides), calls)
    with pytest.raises(BadInput, match="not all of it"):
        served.load(address)
    pushed(address, sides, again)
    every = [("image", start) for start in range(0, IMAGES, 16)] + [("text", start) for start in range(0, TEXTS, 16)]
    assert again == every[after:]
    same(served.load(address).images, sides["text"], sides["image"], 7, 10.0, "sum")
    once_more = []
    pushed(address, sides, once_more)
    assert once_more == []


def test_a_block_that_was_sent_in_part_is_sent_again(sides, address, monkeypatch):
    """Of a stopped block one shard may hold its points and another not, so that points in the middle are missing."""
    monkeypatch.setattr(push, "BLOCK", 16)
    whole, again = push.points_of, []

    def partly(side: Embeddings, items: np.ndarray, names: list) -> list:
        if items[0] == 32:
            raise Killed
        return whole(side, items, names)[:: 1 if items[0] == 0 else 2]

    monkeypatch.setattr(push, "points_of", partly)
    with pytest.raises(Killed):
        pushed(address, sides)
    monkeypatch.setattr(push, "points_of", whole)
    pushed(address, sides, again)
    assert again[0] == ("image", 16)
    same(served.load(address).images, sides["text"], sides["image"], IMAGES, 10.0, "sum")


def test_pictures_without_captions(sides, address, monkeypatch, capsys):
    monkeypatch.setattr(push, "PAUSE", 0)
    pushed(address, {"image": sides["image"], "text": sides["text"][:0]}, approximate={"image": 7, "text": 7})
    assert capsys.readouterr().out == "recall of approximate shortlists of images: 1.0000\n"  # by its own vectors
    same(served.load(address).images, sides["text"], sides["image"], 7, 10.0, "sum")


def test_a_collection_of_somebody_else_is_left_alone(sides, address):
    server = qdrant.connect(address)
    server.ask("create_collection", "image", vectors_config={}, metadata={"mine": 1})
    for call in (lambda: pushed(address, sides), lambda: served.load(address)):
        with pytest.raises(BadInput, match="not an index of this program"):
            call()


def test_two_models_or_corpora_are_never_mixed(sides, address):
    pushed(address, sides)
    calls = []
    for changes in ({"checkpoint": "other"}, {"split": "val"}, {"pictures": [["a.jpg", 1]]}):
        with pytest.raises(BadInput, match=f"another {next(iter(changes))}: give another address"):
            pushed(address, sides, calls, **changes)
    pushed(address, sides, calls, run="moved", data="moved")  # where things lie may change
    manifest = served.load(address).manifest
    assert calls == [] and manifest["checkpoint"] == "abc" and manifest["run"] == "moved" == manifest["data"]


def test_approximate_shortlists_report_their_recall(sides, address, monkeypatch, capsys):
    monkeypatch.setattr(push, "PAUSE", 0)
    pushed(address, sides, approximate={"image": 7, "text": 1000})
    said = capsys.readouterr().out.splitlines()
    assert said == [f"recall of approximate shortlists of {kind}s: 1.0000" for kind in ("image", "text")]  # so few
    opened = served.load(address)
    asked = recorded(monkeypatch, opened.images.server.client)
    opened.images.search(sides["text"][:1], 7, 10.0, "sum")
    assert opened.manifest["approximate"] and not asked[0].params.exact
    del opened  # one program at a time opens the files
    pushed(address, sides)  # without the flag it is exact again
    assert not served.load(address).manifest["approximate"]


# ------------------------------------------------------------------------------------------------- over the network


class Server:
    """Qdrant's HTTP interface, as far as it is used here, in front of the client's memory."""

    def __init__(self):
        self.memory, self.faults, self.keys = QdrantClient(":memory:"), [], set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def reply(self) -> None:
                outer.keys.add(self.headers["api-key"])
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "null")
                status = outer.faults.pop(0) if outer.faults else 200
                if status is None:  # the connection breaks
                    return
                result = outer.answer(self.command, self.path.partition("?")[0].split("/")[2:], body) \
                    if status == 200 else None
                content = json.dumps({"result": result, "status": "ok", "time": 0.0}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_POST = do_PATCH = reply

            def log_message(self, *arguments: object) -> None:
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"qdrant://127.0.0.1:{self.http.server_port}/test"

    def answer(self, method: str, path: list[str], body: dict) -> object:
        name, ask = path[0], self.memory
        if method == "GET":
            exists = ask.collection_exists(name)
            return {"exists": exists} if path[1:] else json.loads(ask.get_collection(name).model_dump_json())
        if len(path) == 1:
            change = models.CreateCollection if method == "PUT" else models.UpdateCollection
            change = change(**body)
            call = ask.create_collection if method == "PUT" else ask.update_collection
            return call(name, vectors_config=change.vectors, metadata=change.metadata)
        if method == "PUT":
            ask.upsert(name, [models.PointStruct(**point) for point in body["points"]])
            return {"operation_id": 0, "status": "completed"}
        if path[-1] == "count":
            return {"count": ask.count(name, models.Filter(**body["filter"])).count}
        if path[-1] == "batch":
            found = ask.query_batch_points(name, [models.QueryRequest(**each) for each in body["searches"]])
            return [json.loads(each.model_dump_json()) for each in found]
        found = ask.retrieve(name, body["ids"], body["with_payload"], body["with_vector"])
        return [json.loads(each.model_dump_json()) for each in found]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(qdrant, "WAITS", (0, 0))
    out = Server()
    Thread(target=out.http.serve_forever, args=(0.02,), daemon=True).start()
    yield out
    out.http.shutdown()
    out.http.server_close()


def test_a_server_that_restarts_is_asked_again(sides, server, monkeypatch):
    monkeypatch.setenv("QDRANT_API_KEY", "secret")
    with pytest.warns(UserWarning, match="insecure connection"):
        pushed(server.address, sides)
        opened = served.load(server.address)
        server.faults = [503, None, 200, None, 500]
        same(opened.images, sides["text"], sides["image"], 7, 10.0, "mean")
        same(opened.texts, sides["image"], sides["text"], 7, 10.0, "sum")
    assert server.keys == {"secret"} and not server.faults


@pytest.mark.parametrize("faults, said", [([503] * 9, "no Qdrant answers there"), ([401] * 9, "QDRANT_API_KEY"),
                                          ([400], "400")])
def test_a_server_that_refuses_or_stays_away(server, faults, said):
    server.faults = faults
    with pytest.raises(BadInput, match=said):
        served.load(server.address)


def test_nobody_there_is_said_at_once_in_one_line(capsys):
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as unused:
        port = unused.server_port
    start = perf_counter()
    assert retrieve.main(["search", f"qdrant://127.0.0.1:{port}/photos", "a dog"]) == 2
    said = capsys.readouterr().err
    assert "no Qdrant answers there" in said and said.count("\n") == 1 and perf_counter() - start < 3


@pytest.mark.parametrize("address", ["qdrant:", "qdrants:place", "qdrant://", "qdrant://host:6333", "qdrant://host/a/b",
                                     "qdrant://me:key@host/a", "qdrant://me:key@host:abc/a", "qdrant://host:99999/a",
                                     "qdrant://[host/a"])
def test_a_malformed_address_is_refused(address, capsys):
    assert retrieve.main(["search", address, "a dog"]) == 2
    said = capsys.readouterr().err
    assert "expected qdrant://HOST:PORT/NAME" in said and "me:key" not in said


def test_an_address_of_version_6(capsys):
    assert retrieve.main(["search", "qdrant://[::1]:9/photos", "a dog"]) == 2  # nobody listens there
    assert "no Qdrant answers there" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"dim": "8"}, {"counts": {}}, {"dtype": "float99"}], ids=str)
def test_a_manifest_with_values_of_another_kind_is_refused(sides, monkeypatch, tmp_path, change):
    where = an_engine("memory", tmp_path, monkeypatch)
    pushed(where, sides)
    of, server = served.manifest_of(qdrant.connect(where), "image"), qdrant.connect(where)
    monkeypatch.setattr(server.client, "get_collection", lambda name: SimpleNamespace(
        config=SimpleNamespace(metadata=of | change)))
    with pytest.raises(BadInput, match="expected an index of this program"):
        served.load(where)


def test_a_graph_that_cannot_be_built_is_not_waited_for(sides, monkeypatch, tmp_path):
    where = an_engine("memory", tmp_path, monkeypatch)
    pushed(where, sides)
    monkeypatch.setattr(push, "PAUSE", 0)
    monkeypatch.setattr(qdrant.connect(where).client, "get_collection", lambda name: SimpleNamespace(status="red"))
    with pytest.raises(BadInput, match="could not build the graph"):
        push.recall(qdrant.connect(where), "image", 3)


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "qdrant_client", None)
    assert retrieve.main(["search", "qdrant://host/a", "a dog"]) == 2
    assert "pip install qdrant-client" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- the command lines


@pytest.mark.parametrize("model", ["tgdt", "user"])
def test_the_commands(flags, server, undrawn, tmp_path, capsys, monkeypatch, model):
    run, disk = str(tmp_path / "run"), str(tmp_path / "index")
    assert train.main([*flags, "--model", model, "--epochs", "1"]) == 0
    places = [disk, server.address, *([f"qdrant:{tmp_path / 'served'}"] if find_spec("qdrant_edge") else [])]
    assert retrieve.main(["index", run, "--out", server.address, "--dtype", "bfloat16"]) == 2
    assert "bfloat16: Qdrant holds float32 and float16" in capsys.readouterr().err
    for place in places:
        assert retrieve.main(["index", run, "--out", place, "--dtype", "float32"]) == 0
    for query in (["a red dog"], ["--image", "2"]):
        answers = []
        for place in places:
            capsys.readouterr()
            assert retrieve.main(["search", place, *query, "--top", "3", "--json"]) == 0
            answers.append(json.loads(capsys.readouterr().out)["found"])
        for found in answers[1:]:
            assert [(item["row"], item["name"]) for item in found] == [(a["row"], a["name"]) for a in answers[0]]
            for ours, theirs in zip(found, answers[0], strict=True):
                assert ours == pytest.approx(theirs, abs=1e-4)
    lines = []
    for place in (run, *places[1:]):
        capsys.readouterr()
        assert retrieve.main(["evaluate", place]) == 0
        kept = "two-stage" if model == "tgdt" else "global only"
        lines += [line.split()[:-1] for line in capsys.readouterr().out.splitlines() if line.startswith(kept)]
    assert len(lines) == len(places) and all(line == lines[0] for line in lines)  # all but the seconds
    assert retrieve.main(["search", server.address, "a red dog", "--save", str(tmp_path / "found.png")]) == 0
    assert retrieve.main(["evaluate", server.address, "--shortlist", "1"]) == 2
    with monkeypatch.context() as patch:  # the data has changed since
        patch.setattr(folder, "fingerprint", lambda split: "other")
        capsys.readouterr()
        assert retrieve.main(["evaluate", server.address]) == 2
        assert "have changed since it was made" in capsys.readouterr().err

    weights = Path(run) / "best.pt"
    weights.write_bytes(weights.read_bytes() + b"trained on")
    capsys.readouterr()
    assert retrieve.main(["search", server.address, "a red dog"]) == 2
    assert "another checkpoint" in capsys.readouterr().err
    assert retrieve.main(["index", run, "--out", server.address, "--dtype", "float16"]) == 2
