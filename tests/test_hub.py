"""The hub: found out of reach within two seconds, and never asked for code."""
import json
import runpy
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest
from conftest import save_clip
from safetensors.torch import load_file, save_file
from transformers import BertTokenizer

from harness import models, settings
from sources import download, hub, networks
from sources.files import BadInput

pytestmark = pytest.mark.usefixtures("no_proxy")


def test_a_server_that_answers_is_within_reach(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub.within_reach()
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert not hub.within_reach()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert not hub.within_reach()  # the server is gone


@pytest.mark.parametrize("address", ["http://127.0.0.1:80o", "https://[hub", "mirror.example"])
def test_an_address_of_the_hub_that_is_none_is_refused(monkeypatch, address):
    monkeypatch.setenv("HF_ENDPOINT", address)
    with pytest.raises(BadInput, match="HF_ENDPOINT: expected an address"):
        hub.within_reach()


@pytest.mark.parametrize("written", ["http://127.0.0.1:{}", "127.0.0.1:{}"])
def test_a_hub_behind_a_proxy_is_within_reach_where_the_proxy_is(monkeypatch, written):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HTTP_PROXY", written.format(server.getsockname()[1]))
        assert hub.within_reach()
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert not hub.within_reach()
    monkeypatch.delenv("NO_PROXY")
    assert not hub.within_reach()  # the proxy is gone


@pytest.mark.parametrize("given, expected", [("", "https://huggingface.co"),
                                             ("http://hub.example/", "http://hub.example")])
def test_data_sets_come_from_the_same_hub(monkeypatch, given, expected):
    monkeypatch.setenv("HF_ENDPOINT", given)
    assert runpy.run_path(download.__file__)["HUB"] == f"{expected}/datasets"


def test_a_name_that_nobody_looks_up_does_not_hang(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(hub, "WAIT", 0.2)
    never = threading.Event()

    def hang(*given: object, **more: object) -> None:
        never.wait(30)
        raise OSError

    monkeypatch.setattr(hub.socket, "getaddrinfo", hang)
    start = time.perf_counter()
    assert not hub.within_reach()
    assert time.perf_counter() - start < hub.WAIT + 2  # not the 30 of a hanging call
    never.set()


def test_a_dead_address_of_a_name_does_not_hide_the_one_that_answers(monkeypatch):
    monkeypatch.setattr(hub, "WAIT", 0.2)
    places = [("::1", 443, 0, 0), ("127.0.0.1", 443)]  # IPv6 first, which many networks swallow
    monkeypatch.setattr(hub.socket, "getaddrinfo", lambda *given, **more: [(0, 0, 0, "", place) for place in places])

    def connect(place: tuple, wait: float) -> socket.socket:
        if place[0] == "::1":
            time.sleep(wait)
            raise TimeoutError
        return socket.socket()

    monkeypatch.setattr(hub.socket, "create_connection", connect)
    assert hub.within_reach("https://hub.example")
    del places[1]
    assert not hub.within_reach("https://hub.example")


def test_without_a_hub_one_knock_each_tells_which_files_to_fetch_and_where_to_put_them(monkeypatch, tmp_path):
    """The hub's own library would knock again and again, for half a minute."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    knocks = []

    def refused(address: tuple, *rest: object, **more: object) -> None:
        knocks.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", refused)
    with pytest.raises(BadInput) as text:
        models.text_encoder(settings.make({"dataset": "flickr8k"}))
    with pytest.raises(BadInput) as clip:
        networks.Clip("openai/clip-vit-base-patch32")
    assert knocks.count(("127.0.0.1", 9)) == 2 and len(knocks) < 4  # huggingface_hub once asks for news of its own
    for error, words in ((text, ["bert-base-uncased/tree/main", "tokenizer.json", "440 MB", "--text-encoder"]),
                         (clip, ["clip-vit-base-patch32/tree/main", "preprocessor_config.json", "605 MB", "--clip-m"])):
        message = str(error.value)
        assert "cannot be reached" in message and "config.json" in message and all(word in message for word in words)
    assert networks.Clip(str(save_clip(tmp_path))).dim == 6  # a folder needs no hub


def test_what_a_folder_lacks_is_reported(bert, tmp_path):
    """Without weights or words of its own a BERT would be made of random numbers, or know no word."""
    def load(folder: Path | str) -> str:
        with pytest.raises(BadInput) as error:
            models.text_encoder(settings.make({"dataset": "flickr8k", "text_encoder": str(folder), "text_layers": 1}))
        assert str(folder) in str(error.value) and "\n" not in str(error.value)
        return str(error.value)

    assert "no such folder" in load(tmp_path / "none") and "no such folder" in load("./none")
    copied = shutil.copytree(bert, tmp_path / "bert")
    (copied / "tokenizer.json").unlink()
    assert "neither tokenizer.json nor vocab.txt" in load(copied)
    shutil.copy(bert / "tokenizer.json", copied)
    words = json.loads((copied / "tokenizer.json").read_text())
    words["model"]["vocab"]["one more"] = len(words["model"]["vocab"])
    (copied / "tokenizer.json").write_text(json.dumps(words))
    assert f"a BERT for {len(words['model']['vocab']) - 1}" in load(copied)
    words["model"]["vocab"]["one more"] += 7
    (copied / "tokenizer.json").write_text(json.dumps(words))
    assert "do not belong together" in load(copied)
    shutil.copy(bert / "tokenizer.json", copied)
    weights = load_file(copied / "model.safetensors")
    weights.pop("encoder.layer.0.output.dense.bias")
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    assert "not a BERT: it has no encoder.layer.0.output.dense.bias" in load(copied)
    (copied / "model.safetensors").unlink()
    assert "expected a folder with config.json" in load(copied)


def test_a_text_encoder_that_asks_for_code_gets_none(bert, tmp_path, monkeypatch):
    """In a text encoder's folder and in a run's: the words are read, no code runs, nobody is asked at the terminal."""
    copied = shutil.copytree(bert, tmp_path / "bert")
    (copied / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    for name, wishes in (
        ("tokenizer_config.json", {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine"] * 2}}),
        ("config.json", {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModel": "mine.Mine"}}),
    ):
        (copied / name).write_text(json.dumps(json.loads((copied / name).read_text()) | wishes))
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("asked"))
    chosen = settings.make({"dataset": "flickr8k", "text_encoder": str(copied), "text_layers": 1})
    for tokenizer in (models.text_encoder(chosen)[1], models.read_tokenizer(copied, trust_remote_code=False)):
        assert type(tokenizer) is BertTokenizer
        assert tokenizer("a red dog").input_ids == BertTokenizer.from_pretrained(bert)("a red dog").input_ids
    assert not (tmp_path / "ran").exists()
