"""CIFAR-10 (Krizhevsky 2009) as folders of images: downloads 170 MB, writes 60,000 files of 150 MB in all.

python examples/cifar10/prepare.py [FOLDER]     by default dataset/cifar10, as in the config.yml beside this file
"""

import sys
from pathlib import Path

from torchvision.datasets import CIFAR10


def main(folder: Path) -> None:
    """Write folder/train/<class>/*.png and folder/test/<class>/*.png."""
    for split in ("train", "test"):
        images = CIFAR10(folder / "download", train=split == "train", download=True)
        for name in images.classes:
            (folder / split / name).mkdir(parents=True, exist_ok=True)
        for i, (image, label) in enumerate(images):
            image.save(folder / split / images.classes[label] / f"{i:05}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "dataset/cifar10"))
