"""The training command and a dataset that is not there: without a network one line says what to do."""
import time

import train


def test_without_a_network_the_command_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    start = time.perf_counter()
    assert train.main(["--dataset", "flickr30k"]) == 2
    assert time.perf_counter() - start < 2.5
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ") and str(tmp_path / "data" / "flickr30k") in message
    assert "flickr30k-images.zip" in message and "4.4 GB" in message and "--dataset scenes" in message
    assert train.main(["--dataset", "scenes", "--fetch-only"]) == 2
    assert "is not fetched from anywhere" in capsys.readouterr().err
