"""As a user would: from an empty folder to metrics.json, against a server that plays all sources."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from served import COUNTS, Server, images, serve
from transformers import BertConfig, BertModel, BertTokenizer

from sources import scenes

ROOT = Path(__file__).parent.parent
# The command with other sources, drawing nothing. It can die as by kill -9, after features were written but before the
# line that makes them count.
CHILD = """
import json, os, signal, sys
from pathlib import Path
from sources import fetch
from sources.download import Address

dataset, (captions, pictures, counts), dies = sys.argv.pop(1), json.loads(sys.argv.pop(1)), sys.argv.pop(1)
pictures = {start: [Address(*one) for one in addresses] for start, addresses in pictures.items()}
fetch.SOURCES[dataset] = fetch.Dataset([Address(*one) for one in captions], pictures, counts)

import train
from harness import figures, report
from sources import files
report.draw = figures.curves = lambda *given: None
append = files.append

def dying(path, *rest):
    if path.name == "pictures.jsonl":
        os.kill(os.getpid(), signal.SIGKILL)
    append(path, *rest)

if dies:
    files.append = dying
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> dict[str, bytes]:
    """The files of a tiny BERT, as a repository of the hub has them."""
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *scenes.VOCABULARY]
    BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                         intermediate_size=32, max_position_embeddings=64)).save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> str:
    """A file of random weights for the grid."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("network") / "mobilenet.pth"
    torch.save(torchvision.models.mobilenet_v3_small().state_dict(), path)
    return str(path)


class User:
    """Somebody in an empty folder, with the real command line."""

    def __init__(self, home: Path, dataset: str, encoder: dict[str, bytes], network: str):
        self.home, self.dataset, self.server = home, dataset, Server()
        self.source = serve(self.server, dataset)
        self.server.files |= {f"/tiny/bert/resolve/main/{name}": content for name, content in encoder.items()}
        self.small = ["--text-encoder", "tiny/bert", "--text-layers", "1", "--dim", "8", "--region-width", "8",
                      "--feedforward", "16", "--batch-size", "4", "--captions-per-image", "1",
                      "--region-network", "mobilenet_v3_small", "--region-weights", network,
                      "--boxes", "4", "--picture-side", "64", "--epochs", "1"]
        (home / "empty").mkdir()

    def types(self, *more: str, dies: bool = False) -> str:
        """python train.py --dataset NAME, and what it says; it must end well, or be killed."""
        home = str(self.home / "hf-home")
        variables = {name: value for name, value in os.environ.items()
                     if name.upper() not in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_HUB_OFFLINE")}
        variables |= {"HF_ENDPOINT": self.server.url, "HF_HOME": home, "PYTHONPATH": str(ROOT)}
        sources = json.dumps(self.source)
        done = subprocess.run(
            [sys.executable, "-c", CHILD, self.dataset, sources, "dies" if dies else "", "--dataset", self.dataset,
             *self.small, *more],
            cwd=self.home / "empty", env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == (-signal.SIGKILL if dies else 0), done.stdout
        return done.stdout

    def has_a_table(self) -> None:
        """The folder holds what the README promises: the data, a run with its metrics, and nothing half done."""
        counts, folder = self.source.counts, self.home / "empty"
        metrics = json.loads((folder / "runs" / f"{self.dataset}-tgdt" / "metrics.json").read_text())
        found = metrics["split"], metrics["images"], metrics["captions"]
        assert found == ("test", counts["test"], 5 * counts["test"])
        assert 0 < metrics["two_stage"]["rsum"] <= 600
        data = folder / "data" / self.dataset
        names = {name for name, _, _ in images(self.dataset, COUNTS[self.dataset])}
        assert {path.name for path in data.rglob("*.jpg")} == names
        assert {path.name for path in data.iterdir()} - {"train2014", "val2014", "images"} == {
            "cache", f"dataset_{self.dataset}.json"}
        seen = [json.loads(line) for line in next(data.glob("cache/*/pictures.jsonl")).read_text().splitlines()]
        assert sorted(Path(name).name for _, _, name, _, _ in seen) == sorted(names)


@pytest.fixture
def user(tmp_path, encoder, network, request) -> User:
    found = User(tmp_path, request.param, encoder, network)
    with found.server:
        yield found


@pytest.mark.parametrize("user", ["coco"], indirect=True)
def test_what_was_fetched_is_enough_for_a_machine_without_a_network(user):
    assert "coco is complete" in user.types("--fetch-only")
    user.server.files.clear()
    user.server.asked.clear()
    user.types("--quiet")
    assert user.server.gets() == []
    user.has_a_table()


@pytest.mark.parametrize("user", ["flickr30k"], indirect=True)
def test_a_command_that_was_killed_goes_on_and_fetches_nothing_twice(user):
    said = user.types(dies=True) + user.types("--resume")
    user.has_a_table()
    plan, choice, table = said.index("To be fetched"), said.index("--regions detector"), said.index("two-stage")
    assert plan < said.index("research") < said.index("is whole") < choice < table
    fetched = user.server.gets()
    assert len(fetched) == len(set(fetched)) and "model.safetensors" in fetched
