"""The hub: found out of reach within two seconds, and never asked for code."""
import socket
import threading
import time

import pytest
from conftest import save_clip

from harness import models, settings
from sources import hub, networks
from sources.files import BadInput


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


def test_a_server_that_answers_is_within_reach(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub.within_reach()
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert not hub.within_reach()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert not hub.within_reach()  # the server is gone


def test_a_name_that_nobody_looks_up_takes_two_seconds_at_most(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    never = threading.Event()

    def hang(*given: object) -> None:
        never.wait(30)
        raise OSError

    monkeypatch.setattr(hub.socket, "create_connection", hang)
    start = time.perf_counter()
    assert not hub.within_reach()
    assert time.perf_counter() - start < hub.WAIT + 0.5
    never.set()


def test_without_a_hub_the_message_comes_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    start = time.perf_counter()
    with pytest.raises(BadInput, match="text encoder 'bert-base-uncased'.*--text-encoder"):
        models.text_encoder(settings.make({"dataset": "flickr8k"}))
    with pytest.raises(BadInput, match="CLIP 'openai/clip-vit-base-patch32'.*--clip-model"):
        networks.Clip("openai/clip-vit-base-patch32")
    assert time.perf_counter() - start < 2 * hub.WAIT + 2
    assert networks.Clip(str(save_clip(tmp_path))).dim == 6  # a folder needs no hub
