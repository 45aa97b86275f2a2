"""From decoded images to batches: the demo, the splits, shuffling, flips and moves."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from images_vit import (
    DataError,
    ImageFolder,
    decode_folder,
    is_folder,
    printable,
    read_image_folder,
)

DEMO_FOLDER = Path("dataset/digits")


def hold_out(targets: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, validation): a seeded `fraction` of every class, at least one image of each.

    Raises DataError if a class has a single image.
    """
    generator = np.random.default_rng(seed)
    train, held_out = [], []
    for number in np.unique(targets):
        members = generator.permutation(np.flatnonzero(targets == number))
        if len(members) < 2:
            raise DataError(
                f"class number {number} has 1 image; training and validation need one each: "
                "add images or a val/ folder"
            )
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held_out.append(members[:count])
        train.append(members[count:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(held_out))


def make_digits(folder: Path = DEMO_FOLDER) -> Path:
    """The demo: the 1,797 handwritten digits (8x8, UCI) of scikit-learn as an image folder, 80 % in train/.

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
                f"the demo cannot be written to {folder}: {error.strerror or error}"
            ) from None
    finally:
        shutil.rmtree(copy, ignore_errors=True)
    return folder


# --- splits -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """The images that one purpose sees: rows `indices` of `pixels`, with `targets[indices]`."""

    pixels: np.ndarray  # uint8 (images, channels, size, size)
    targets: np.ndarray  # int64 (images,)
    indices: np.ndarray  # int64 (images of this split,)

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class Data:
    """What a run trains on, selects on and is tested on once, and what its log says of them."""

    classes: list[str]
    train: Split
    val: Split
    test: Split | None
    notes: list[str]


def _read_splits(
    download_dir: Path, num_classes: int | None, val_split: float | None
) -> dict[str, ImageFolder]:
    """The image folders of train and, where they exist and count, val and test."""
    has_train = is_folder(download_dir / "train")
    folders = {"train": read_image_folder(download_dir / "train" if has_train else download_dir)}
    classes = folders["train"].classes
    if num_classes not in (None, len(classes)):
        raise DataError(
            f"--num-classes is {num_classes}, but {folders['train'].folder} has {len(classes)} class "
            f"folders ({', '.join(classes[:10])}): leave --num-classes out or correct it"
        )
    for name in ("val", "test"):
        if has_train and is_folder(download_dir / name) and not (name == "val" and val_split):
            folders[name] = read_image_folder(download_dir / name, classes)
    return folders


def open_data(
    download_dir: Path,
    *,
    num_classes: int | None,
    image_size: int,
    channels: int,
    val_split: float | None,
    seed: int,
    cache_dir: Path,
    workers: int,
    skip_broken: bool,
) -> Data:
    """Read train/, val/ and test/ of `download_dir` (or its class folders), decoded and split.

    Validation is val/ where it exists, else a tenth of train/; a given `val_split` wins over val/.
    Raises DataError.
    """
    try:
        if not download_dir.is_dir():
            raise DataError(
                f"data folder {download_dir} does not exist; give --download-dir one that does"
            )
        folders = _read_splits(download_dir, num_classes, val_split)
    except OSError as error:
        raise DataError(
            f"data folder {download_dir} cannot be listed: {error.filename}: {error.strerror}"
        ) from None
    classes = folders["train"].classes

    notes, splits, broken = [], {}, []
    for name, images in folders.items():
        decoded = decode_folder(images, image_size, channels, cache_dir, workers)
        keep = np.array([i for i in range(len(images.paths)) if i not in decoded.broken], np.int64)
        splits[name] = Split(decoded.pixels, images.targets, keep)
        for number, name_of_class in enumerate(classes):
            if skip_broken and not (images.targets[keep] == number).any():
                raise DataError(
                    f"class folder {images.folder / name_of_class} has no image that can be decoded"
                )
        broken += [f"{images.paths[i]} ({why})" for i, why in sorted(decoded.broken.items())]
        if decoded.built:
            megabytes = decoded.pixels.nbytes / 1e6
            notes.append(f"decoded {images.folder} into {decoded.file} ({megabytes:,.1f} MB)")
        if images.ignored:
            kinds = ", ".join(f"{n} x {kind}" for kind, n in images.ignored.most_common(5))
            notes.append(f"{images.folder}: files that are not images left out: {kinds}")
    if broken:
        named = f"{len(broken)} images cannot be decoded: " + "; ".join(broken[:5])
        named += f"; and {len(broken) - 5} more" if len(broken) > 5 else ""
        if not skip_broken:
            raise DataError(f"{named}. Repair or remove them, or leave them out with --skip-broken")
        notes.append(f"{named}. Left out (--skip-broken)")

    if "val" not in splits:
        train = splits["train"]
        parts = hold_out(train.targets[train.indices], val_split or 0.1, seed)
        splits["train"], splits["val"] = (
            Split(train.pixels, train.targets, train.indices[part]) for part in parts
        )
    if len(splits["val"]) < 20 * len(classes):
        notes.append(
            f"validation has only {len(splits['val'])} images for {len(classes)} classes: "
            "selection on so few is noisy; --val-split 0.2 holds out more of train/"
        )
    notes = [printable(note) for note in notes]
    return Data(classes, splits["train"], splits["val"], splits.get("test"), notes)


# --- batches ----------------------------------------------------------------------------------------

FLIPS = {"none": (), "horizontal": (-1,), "vertical": (-2,), "both": (-1, -2)}


def batches(
    split: Split,
    batch_size: int,
    device: torch.device,
    order: np.ndarray | None = None,
    start: int = 0,
) -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
    """Batches of the split in `order` (positions within it; default as they lie), from batch `start` on.

    Yields images float32 (batch, channels, size, size) in [-1, 1] and targets (batch,), both on
    `device`, and the positions (batch,).
    """
    order = np.arange(len(split)) if order is None else order
    for first in range(start * batch_size, len(order), batch_size):
        positions = order[first : first + batch_size]
        rows = split.indices[positions]
        images = torch.from_numpy(split.pixels[rows]).to(device)
        targets = torch.from_numpy(split.targets[rows]).to(device)
        yield images.float().div_(127.5).sub_(1.0), targets, positions


def training_batches(
    split: Split,
    batch_size: int,
    device: torch.device,
    *,
    flip: str,
    affine: float,
    seed: int,
    start: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch, shuffled and augmented, from batch `start` on: (images, targets) as `batches` gives them.

    Every draw belongs to a sample of the epoch that `seed` stands for, whatever the batch it is in:
    an epoch that is resumed in its middle goes on with the same images.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(split))
    flipped = {dim: generator.random(len(split)) < 0.5 for dim in FLIPS[flip]}
    draws = generator.uniform(-affine, affine, (len(split), 4)).astype(np.float32)
    for images, targets, positions in batches(split, batch_size, device, order, start):
        for dim, chosen in flipped.items():
            mask = torch.from_numpy(chosen[positions]).to(device)
            images = torch.where(mask[:, None, None, None], images.flip(dim), images)
        if affine:
            images = move_randomly(images, torch.from_numpy(draws[positions]).to(device))
        yield images, targets


def move_randomly(images: Tensor, draws: Tensor) -> Tensor:
    """Rotate, scale and shift each image by its row of `draws` (batch, 4) in [-1, 1]; edges are continued.

    1 stands for 45 degrees, a scale of 2 and a shift by half the side.
    """
    angle = draws[:, 0] * (torch.pi / 4)
    cosine, sine = angle.cos() * 2 ** draws[:, 1], angle.sin() * 2 ** draws[:, 1]
    rows = (cosine, -sine, draws[:, 2], sine, cosine, draws[:, 3])
    matrices = torch.stack(rows, dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
