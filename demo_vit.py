"""The demo: the images that a run without --download-dir trains on."""

import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from data_vit import hold_out
from folder_vit import DataError

DEMO_FOLDER = Path("dataset/digits")


def make_digits(folder: Path = DEMO_FOLDER) -> Path:
    """Write the 1,797 handwritten digits (8x8, UCI) of scikit-learn as an image folder, 80 % in train/.

    Written once; processes that start together write each its own copy, and one becomes `folder`.
    """
    if folder.is_dir():
        return folder
    from sklearn.datasets import load_digits

    digits = load_digits()
    train, test = hold_out(digits.target, 0.2, seed=0)
    copy = folder.with_name(f".{folder.name}-{os.getpid()}")
    try:
        for split, indices in (("train", train), ("test", test)):
            for index in indices:
                path = copy / split / str(digits.target[index]) / f"{index:04d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = (digits.images[index] * (255 / 16)).round().astype(np.uint8)
                Image.fromarray(pixels).save(path)
        copy.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # else another process was first
            raise DataError(
                f"the demo cannot be written to {folder}: {error.strerror or error}; start in a folder "
                "that you may write to, or give --download-dir your own images"
            ) from None
    finally:
        shutil.rmtree(copy, ignore_errors=True)
    return folder
