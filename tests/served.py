"""A server on 127.0.0.1 that plays the hub and plain addresses, and the benchmarks' files in their real layouts."""
import csv
import hashlib
import io
import json
import re
import zipfile
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from time import sleep

from PIL import Image

from sources import scenes
from sources.download import Address
from sources.fetch import Dataset

COMMIT = "0123456789" * 4
SPLITS = {"train": 5, "val": 2, "test": 2}
COUNTS = {"flickr30k": SPLITS, "flickr8k": SPLITS, "coco": {"train": 4, "restval": 2, "val": 2, "test": 2}}
Images = list[tuple[str, str, list[str]]]  # (file name, split, captions) of each image


class Server:
    """Serves `files` (path -> bytes), and keeps what it was asked in `asked`: (method, path).

    faults: path -> "gated", "no repository", "no file", "error 500", "cut" or "cut once" (half the bytes), "slow".
    """

    def __init__(self):
        self.files, self.faults, self.asked = {}, {}, []
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), handler(self))
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> "Server":
        Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def gets(self) -> list[str]:
        """The names of the files that were fetched."""
        return [path.rsplit("/", 1)[1] for method, path in self.asked if method == "GET" and path in self.files]


def handler(server: Server) -> type:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def log_message(self, *words: object) -> None:
            pass

        def refuse(self, code: int, why: str = "") -> None:
            self.send_response(code)
            self.send_header("X-Error-Code", why)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def answer(self, body: bool) -> None:
            fault = server.faults.get(self.path)
            server.asked.append((self.command, self.path))
            if fault == "gated":
                return self.refuse(403, "GatedRepo")
            if fault == "no repository":
                return self.refuse(404, "RepoNotFound")
            if fault == "no file" or self.path not in server.files:
                return self.refuse(404, "EntryNotFound")
            if fault == "error 500" and body:
                return self.refuse(500)
            content = server.files[self.path]
            start = int(re.findall(r"\d+", self.headers["Range"])[0]) if self.headers["Range"] else 0
            self.send_response(206 if start else 200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(content) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if not body:
                return None
            if fault == "slow":
                for at in range(start, len(content), 500):
                    self.wfile.write(content[at : at + 500])
                    sleep(0.1)
            elif fault in ("cut", "cut once"):
                if fault == "cut once":
                    del server.faults[self.path]
                self.wfile.write(content[start : start + len(content) // 2])
                self.close_connection = True
            else:
                self.wfile.write(content[start:])
            return None

    return Handler


def on_hub(repository: str, name: str) -> str:
    return f"/datasets/{repository}/resolve/{COMMIT}/{name}"


@cache
def drawn() -> scenes.Scenes:
    return scenes.make("train", count=10)


def images(dataset: str, counts: dict[str, int]) -> Images:
    """So many images of each split, with five captions each. A "restval" of COCO has pictures of val2014."""
    listed = []
    for split, count in counts.items():
        for _ in range(count):
            row, number = len(listed), len(listed) + 1
            folder = "train2014" if split == "train" else "val2014"
            name = f"COCO_{folder}_{number:012}.jpg" if dataset == "coco" else f"{1000 + number}_ab.jpg"
            captions = [f'"here", {caption}' for caption in drawn().captions[5 * row : 5 * row + 5]]
            listed.append((name, split, captions))
    return listed


def jpegs(listed: Images) -> dict[str, bytes]:
    """A drawn scene for each image: name -> bytes."""
    found = {}
    for row, (name, _, _) in enumerate(listed):
        content = io.BytesIO()
        Image.fromarray(drawn().pictures[row, :96]).save(content, "jpeg")
        found[name] = content.getvalue()
    return found


def packed(members: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, inside in members.items():
            archive.writestr(name, inside)
    return content.getvalue()


def in_folder(folder: str, pictures: dict[str, bytes]) -> bytes:
    """Pictures as they lie in the archives: in a folder, with what macOS adds, and with one that has no captions."""
    members = {f"{folder}/": b"", f"__MACOSX/{folder}/._.DS_Store": b"x"}
    for name, content in pictures.items():
        members |= {f"{folder}/{name}": content, f"__MACOSX/{folder}/._{name}": b"Mac OS X"}
    return packed(members | {f"{folder}/no-caption.jpg": b"not wanted"})


def karpathy(listed: Images) -> bytes:
    """Karpathy's JSON."""
    return json.dumps({"images": [
        ({"filepath": name.split("_")[1]} if name.startswith("COCO") else {}) |
        {"filename": name, "imgid": place, "split": split, "sentences": [{"raw": raw} for raw in captions]}
        for place, (name, split, captions) in enumerate(listed)]}).encode()


def flickr30k_table(listed: Images) -> bytes:
    """flickr_annotations_30k.csv: JSON lists in cells; the rows are in another order than img_id."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["raw", "sentids", "split", "filename", "img_id"])
    for place, (name, split, captions) in reversed(list(enumerate(listed))):
        ids = list(range(5 * place, 5 * place + len(captions)))
        table.writerow([json.dumps(captions), json.dumps(ids), split, name, place])
    return text.getvalue().encode()


def flickr8k_texts(listed: Images) -> bytes:
    """Flickr8k_text.zip: all captions in one file, also of a picture that is in no split, and a list for each split."""
    lines = [f"{name}#{number}\t{raw}" for name, _, captions in listed for number, raw in enumerate(captions)]
    lists = {f"Flickr_8k.{title}Images.txt": "".join(f"{name}\n" for name, of, _ in listed if of == split).encode()
             for split, title in (("train", "train"), ("val", "dev"), ("test", "test"))}
    return packed({"Flickr8k.token.txt": "\n".join([*lines, "no-split.jpg#0\ta cat\n"]).encode(),
                   "__MACOSX/._Flickr8k.token.txt": b"x", "readme.txt": b"x", **lists})


def address(server: Server, path: str, content: bytes, hashed: str = "sha256") -> Address:
    """Serve some content, and give its address with its size and hash."""
    server.files[path] = content
    return Address(server.url + path, len(content), hashlib.new(hashed, content).hexdigest() if hashed else "")


def serve(server: Server, dataset: str, plain: bool = False) -> Dataset:
    """Serve a small dataset in its real layout: what is on the hub there, or all as plain addresses."""
    def at(repository: str, name: str, content: bytes, hashed: str = "sha256") -> Address:
        return address(server, f"/plain/{name}" if plain else on_hub(repository, name), content, hashed)

    listed = images(dataset, COUNTS[dataset])
    pictures = jpegs(listed)
    spare = at("gpantaz/karpathy_split", "caption_datasets.zip",
               packed({f"dataset_{dataset}.json": karpathy(listed), "dataset_other.json": b"x"}))
    if dataset == "flickr30k":
        captions = at("nlphuji/flickr30k", "flickr_annotations_30k.csv", flickr30k_table(listed))
        found = {"": [at("nlphuji/flickr30k", "flickr30k-images.zip", in_folder("flickr30k-images", pictures))]}
    elif dataset == "flickr8k":
        captions = address(server, "/release/Flickr8k_text.zip", flickr8k_texts(listed), "md5")
        content = in_folder("Flicker8k_Dataset", pictures)
        found = {"": [address(server, "/release/Flickr8k_Dataset.zip", content, "md5")]}
    else:
        captions, found = at("openflamingo/eval_benchmark", "dataset_coco.json", karpathy(listed), ""), {}
        for folder in ("train2014", "val2014"):
            content = in_folder(folder, {name: inside for name, inside in pictures.items() if folder in name})
            found[f"COCO_{folder}_"] = [at("GAIA-URJC/COCO_2014", f"{folder}.zip", content),
                                        address(server, f"/zips/{folder}.zip", content)]
    counts = COUNTS[dataset] if dataset != "coco" else {"train": 6, "val": 2, "test": 2}
    return Dataset([captions, spare], found, counts)
