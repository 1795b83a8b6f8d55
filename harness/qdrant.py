"""Qdrant, on a server or in this process: who is asked, and what happens if nobody answers.

    qdrant://HOST:PORT/NAME   a server; qdrants:// if it speaks TLS. Its key comes from QDRANT_API_KEY alone
    qdrant:FOLDER             Qdrant's engine in this process, on files in this folder

The client has a mode on files of its own. It unpickles them, which would run code from a folder, so it is not used.
"""
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

from sources.files import BadInput, read_json, write_json

WAITS = (1, 2, 4, 8, 16, 30)  # seconds between attempts while a server restarts


def is_address(place: Path | str) -> bool:
    return str(place).startswith(("qdrant:", "qdrants:"))


@dataclass
class Connection:
    """A client with the methods of `qdrant_client.QdrantClient`, and how the names of its collections begin."""

    address: str
    client: object
    prefix: str = ""

    def ask(self, method: str, kind: str, *arguments: object, patient: bool = True, **options: object) -> object:
        """Call a method for the collection of `kind`. If patient, a server that does not answer is asked again.

        Raises BadInput if it does not answer in the end, or refuses.
        """
        from qdrant_client.common.client_exceptions import ResourceExhaustedResponse
        from qdrant_client.http.exceptions import ResponseHandlingException, UnexpectedResponse

        for wait in (*(WAITS if patient else ()), None):
            try:
                return getattr(self.client, method)(self.prefix + kind, *arguments, **options)
            except (ResponseHandlingException, ResourceExhaustedResponse, UnexpectedResponse) as error:
                status, said = getattr(error, "status_code", None), str(error)
            if status in (401, 403):
                raise BadInput(f"{self.address}: refused ({status}): put the server's key into QDRANT_API_KEY")
            if status is not None and status < 500:
                raise BadInput(f"{self.address}: {said}")
            if wait is not None:
                time.sleep(wait)
        raise BadInput(f"{self.address}: no Qdrant answers there: {said}")


def connect(address: str) -> Connection:
    """Connect. Raises BadInput if the address is wrong, a package is missing, or nothing answers within 5 seconds."""
    try:
        from qdrant_client import QdrantClient
    except ImportError:
        raise BadInput(f"{address}: needs Qdrant's client: pip install qdrant-client qdrant-edge-py") from None
    try:
        url = urlsplit(address)
        port = url.port or 6333
    except ValueError as error:  # not a host, or not a port
        raise BadInput(f"{address.rpartition('@')[2]}: expected qdrant://HOST:PORT/NAME or qdrant:FOLDER "
                       f"({error})") from None
    if address.startswith("qdrant:") and not address.startswith("qdrant://") and url.path:
        return Connection(address, Embedded(Path(address.removeprefix("qdrant:"))))
    name, key = url.path.strip("/"), os.environ.get("QDRANT_API_KEY")
    if "@" in url.netloc or not url.hostname or not name or "/" in name:
        raise BadInput(f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}: expected qdrant://HOST:PORT/NAME "
                       "or qdrant:FOLDER; put a key into QDRANT_API_KEY")
    host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname  # an IPv6 address
    first, client = (QdrantClient(host=host, port=port, https=url.scheme == "qdrants", api_key=key,
                                  timeout=seconds, check_compatibility=False) for seconds in (5, 120))
    Connection(address, first, f"{name}-").ask("collection_exists", "image", patient=False)
    return Connection(address, client, f"{name}-")


@dataclass
class Embedded:
    """Qdrant's engine in this process, with the methods of `QdrantClient` that served.py and push.py call."""

    folder: Path
    shards: dict = field(default_factory=dict)

    def shard(self, name: str) -> object:
        """A collection, opened. Raises BadInput if the package is missing or another program has it open."""
        try:
            import qdrant_edge as edge
        except ImportError:
            raise BadInput(f"qdrant:{self.folder}: needs Qdrant's engine: pip install qdrant-edge-py") from None
        if name not in self.shards:
            path, manifest = self.folder / name, read_json(self.folder / f"{name}.json")
            graph = edge.HnswIndexConfig(16 if manifest["approximate"] else 0, 100, 10000)
            vectors = {"global": edge.EdgeVectorParams(manifest["dim"], edge.Distance.Dot, hnsw_config=graph)}
            if manifest["tokens"]:
                vectors["tokens"] = edge.EdgeVectorParams(
                    manifest["dim"], edge.Distance.Dot, hnsw_config=edge.HnswIndexConfig(0, 100, 10000),
                    datatype=getattr(edge.VectorStorageDatatype, manifest["dtype"].capitalize()),
                    multivector_config=edge.MultiVectorConfig(edge.MultiVectorComparator.MaxSim))
            path.mkdir(exist_ok=True)
            make = edge.EdgeShard.load if (path / "edge_config.json").is_file() else edge.EdgeShard.create
            try:
                self.shards[name] = make(str(path), edge.EdgeConfig(vectors=vectors))
            except Exception as error:  # it raises nothing narrower
                raise BadInput(f"{path}: cannot be opened; another program may use it: {error}") from error
        return self.shards[name]

    def collection_exists(self, name: str) -> bool:
        return (self.folder / f"{name}.json").is_file()

    def get_collection(self, name: str) -> SimpleNamespace:
        manifest = read_json(self.folder / f"{name}.json")
        return SimpleNamespace(status="green", config=SimpleNamespace(metadata=manifest))

    def create_collection(self, name: str, vectors_config: dict, metadata: dict) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / f"{name}.json", metadata)

    def update_collection(self, name: str, vectors_config: dict, metadata: dict) -> None:
        self.shard(name).close()
        write_json(self.folder / f"{name}.json", read_json(self.folder / f"{name}.json") | metadata)
        del self.shards[name]
        self.shard(name).optimize()

    def upsert(self, name: str, points: list, wait: bool) -> None:
        import qdrant_edge as edge

        points = [edge.Point(point.id, point.vector, point.payload) for point in points]
        self.shard(name).update(edge.UpdateOperation.upsert_points(points))

    def count(self, name: str, count_filter: object, exact: bool) -> SimpleNamespace:
        import qdrant_edge as edge

        return SimpleNamespace(count=self.shard(name).count(edge.CountRequest(exact, only(count_filter))))

    def query_batch_points(self, name: str, requests: list) -> list[SimpleNamespace]:
        import qdrant_edge as edge

        asked = [edge.QueryRequest(query=edge.Query.Nearest(request.query, using=request.using), limit=request.limit,
                                   filter=only(request.filter), with_payload=request.with_payload,
                                   params=edge.SearchParams(request.params.hnsw_ef, request.params.exact))
                 for request in requests]
        return [SimpleNamespace(points=self.shard(name).query(each)) for each in asked]

    def retrieve(self, name: str, ids: list[int], with_payload: bool, with_vectors: list[str]) -> list:
        return self.shard(name).retrieve(ids, with_payload, with_vectors)


def only(conditions: object) -> object:
    """The client's filter for some ids as the engine's."""
    import qdrant_edge as edge

    return conditions and edge.Filter(must=[edge.HasIdCondition(set(conditions.must[0].has_id))])
