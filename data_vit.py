"""From decoded images to batches: the splits, shuffling, shards."""

import hashlib
import itertools
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from augment_vit import Augmentation, Epoch, send, to_float
from cache_file_vit import CachedPixels
from cache_vit import decode_folder
from folder_vit import (
    DataError,
    ImageFolder,
    check_classes,
    is_folder,
    most_common,
    not_decoded,
    read_image_folder,
)
from images_vit import DecodingPixels, Pixels

# Folders of these names beside each other are parts of a data set, hardly its classes.
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}


def hold_out(
    targets: np.ndarray, fraction: float, seed: int, classes: list[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Indices (train, validation): a seeded `fraction` of every class, at least one image of each.

    Raises DataError if a class has a single image.
    """
    generator = np.random.default_rng(seed)
    train, held_out = [], []
    for number in np.unique(targets):
        members = generator.permutation(np.flatnonzero(targets == number))
        if len(members) < 2:
            name = f"number {number}" if classes is None else f"folder {classes[number]}"
            raise DataError(
                f"class {name} has 1 image that can be used; training and validation need one each: "
                "add images or a val/ folder"
            )
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held_out.append(members[:count])
        train.append(members[count:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(held_out))


# --- splits -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """The images that one purpose sees: rows `indices` of `pixels`, with `targets[indices]`.

    One channel stands for all where no image of the folder has colour, from here to the model.
    """

    pixels: "Pixels | np.ndarray | Resident"  # uint8 (images, channels, size, size)
    targets: np.ndarray  # int64 (images,)
    indices: np.ndarray  # int64 (images of this split,)

    def __len__(self) -> int:
        return len(self.indices)

    def steps(self, batch_size: int) -> int:
        """Batches of an epoch; the last may be short."""
        return math.ceil(len(self) / batch_size)


@dataclass(frozen=True)
class Data:
    """What a run trains on, selects on and is tested on once, and what its log says of them."""

    classes: list[str]
    train: Split
    val: Split
    test: Split | None
    notes: list[str]
    fingerprints: dict[str, str]  # of the images of each split, by its name

    def identity(self) -> dict[str, Any]:
        """What a checkpoint keeps of its images."""
        return {
            "classes": self.classes,
            "train_images": len(self.train),
            "val_images": len(self.val),
            "fingerprints": {name: self.fingerprints[name] for name in ("train", "val")},
        }

    def mismatch(self, saved: dict[str, Any]) -> str | None:
        """None if a checkpoint is of these images, by names and splits, else what it is of."""
        own = self.identity()
        if saved["classes"] != own["classes"]:
            return "other classes than the data"
        for name, what in (("train_images", "training"), ("val_images", "validation")):
            if (count := saved.get(name, own[name])) != own[name]:
                return f"{count:,} {what} images, here are {own[name]:,}"
        if saved.get("fingerprints", own["fingerprints"]) != own["fingerprints"]:
            return "as many images, but not of the same names, classes and splits"
        return None


def fingerprint(images: ImageFolder, rows: list[int]) -> str:
    """A hash of the names of the images `rows`, which begin with their class."""
    names = "\0".join(images.names[row] for row in rows)
    return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()


def read_splits(
    download_dir: Path, num_classes: int | None, val_split: float | None
) -> dict[str, ImageFolder]:
    """The image folders of train and, where they exist and count, val and test. Raises DataError."""
    if not os.path.isdir(download_dir):  # Path's own raises where a name is too long
        there = os.path.exists(download_dir)
        what = "is a file: unpack it" if there else "does not exist"
        raise DataError(f"data folder {download_dir} {what}; give --download-dir a folder")
    try:
        return _list_splits(download_dir, num_classes, val_split)
    except OSError as error:
        raise DataError(
            f"data folder {download_dir} cannot be listed: {error.filename}: {error.strerror}"
        ) from None


def _list_splits(
    download_dir: Path, num_classes: int | None, val_split: float | None
) -> dict[str, ImageFolder]:
    has_train = is_folder(download_dir / "train")
    folders = {"train": read_image_folder(download_dir / "train" if has_train else download_dir)}
    classes = folders["train"].classes
    splits = [] if has_train else [name for name in classes if name.lower() in SPLIT_NAMES]
    divided = any(set(os.listdir(download_dir / name)) & set(classes) for name in splits)
    if len(splits) > 1 or divided:  # "valid" beside "invalid" is a class
        raise DataError(
            f"{download_dir} has no train/, and {', '.join(splits)} would be classes: call its parts "
            "train, val and test, or move its class folders into train/"
        )
    if num_classes not in (None, len(classes)):
        raise DataError(
            f"--num-classes is {num_classes}, but {folders['train'].folder} has {len(classes)} class "
            f"folders ({', '.join(classes[:10])}): leave --num-classes out or correct it"
        )
    for name in sorted(os.listdir(download_dir)) if has_train else ():
        unused = name.lower() in SPLIT_NAMES and name not in ("train", "val", "test")
        if unused and is_folder(download_dir / name):
            raise DataError(
                f"{download_dir / name} beside train/ would not be used: call it val or test, or move "
                "it away"
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
    cache: str = "disk",
    cache_limit: float | None = None,
) -> Data:
    """Read train/, val/ and test/ of `download_dir` (or its class folders), decoded and split.

    Validation is val/ where it exists, else a tenth of train/; a given `val_split` wins over val/.
    `cache` is "disk", "memory" or "off", `cache_limit` in GB, as `decode_folder` has them. Raises
    DataError.
    """
    folders = read_splits(download_dir, num_classes, val_split)
    classes = folders["train"].classes

    notes, splits, broken = [], {}, []
    limit = None if cache_limit is None else cache_limit * 1e9
    for name, images in folders.items():
        decoded = decode_folder(images, image_size, channels, cache_dir, workers, cache, limit)
        keep = np.delete(np.arange(len(images.names)), list(decoded.broken))
        splits[name] = Split(decoded.pixels, images.targets, keep)
        if skip_broken:
            check_classes(images, decoded.broken)
        broken += [f"{images.path(i)} ({why})" for i, why in sorted(decoded.broken.items())]
        size = f"{decoded.pixels.nbytes / 1e6:,.1f} MB"
        size += ", grey" if decoded.pixels.shape[1] < channels else ""
        if cache == "off":
            notes.append(f"{images.folder} is decoded in every epoch (--cache off)")
        elif decoded.built:
            notes.append(f"decoded {images.folder} into {decoded.file or 'memory'} ({size})")
        else:
            notes.append(f"{images.folder} is read from the cache {decoded.file} ({size})")
        if 0 < decoded.brightest < 128:
            notes.append(
                f"{images.folder}: no pixel is brighter than {decoded.brightest} of 255. If its files hold "
                "fewer bits than they could, a scanner's 14 of 16, say, scale them: grey levels are lost"
            )
        if images.ignored:
            notes.append(f"{images.folder}: files left out: {most_common(images.ignored)}")
    if broken:
        named = not_decoded(broken)
        if not skip_broken:
            raise DataError(
                f"{named}. Repair or remove them, or leave them out with --skip-broken; a run that is resumed "
                "needs them as they were"
            )
        notes.append(f"{named}. Left out (--skip-broken)")

    if "val" not in splits:
        train = splits["train"]
        parts = hold_out(train.targets[train.indices], val_split or 0.1, seed, classes)
        splits["train"], splits["val"] = (
            replace(train, indices=train.indices[part]) for part in parts
        )
    if len(splits["val"]) < 20 * len(classes):
        notes.append(
            f"validation has only {len(splits['val'])} images for {len(classes)} classes: "
            "selection on so few is noisy; more images, or a larger --val-split, make it less so"
        )
    fingerprints = {
        name: fingerprint(folders.get(name, folders["train"]), split.indices.tolist())
        for name, split in splits.items()
    }
    return Data(classes, splits["train"], splits["val"], splits.get("test"), notes, fingerprints)


# --- from the cache to the device ---------------------------------------------------------------------


class Resident:
    """The images of `pixels` in the memory of `device`, each from its first reading on."""

    def __init__(self, pixels: Pixels | np.ndarray, device: torch.device) -> None:
        self.pixels, self.shape = pixels, pixels.shape
        self.tensor = torch.empty(pixels.shape, dtype=torch.uint8, device=device)
        self.present = np.zeros(len(pixels), bool)

    def __len__(self) -> int:
        return len(self.pixels)


def keep_on_device(data: Data, device: torch.device, free: int) -> Data:
    """Images for training and validation go to the device if they fit half of its `free` bytes.

    The other half is for the model and what it computes.
    """
    parts = {id(split.pixels): split.pixels for split in (data.train, data.val)}  # mostly the same
    if sum(pixels.nbytes for pixels in parts.values()) > free / 2:
        return data
    try:
        resident = {key: Resident(pixels, device) for key, pixels in parts.items()}
    except torch.OutOfMemoryError:  # trials that start together count on the same free memory
        torch.cuda.empty_cache()  # the others need it
        return data
    train, val = (replace(s, pixels=resident[id(s.pixels)]) for s in (data.train, data.val))
    return replace(data, train=train, val=val)


Fetched = tuple[np.ndarray, Tensor]  # rows of a split's pixels, and their images in host memory


def source_of(split: Split, positions: np.ndarray) -> tuple[Pixels | np.ndarray, np.ndarray]:
    """Where the images at `positions` are read from, and which rows: on the device only those that it lacks."""
    pixels, rows = split.pixels, split.indices[positions]
    if isinstance(pixels, Resident):
        return pixels.pixels, rows[~pixels.present[rows]]
    return pixels, rows


def fetch(split: Split, positions: np.ndarray, device: torch.device) -> Fetched:
    """The images at `positions` in host memory, where a GPU takes them from while it computes.

    Of images that are kept on the device, only those that it lacks. Raises DataError.
    """
    pixels, rows = source_of(split, positions)
    shape = (len(rows), *pixels.shape[1:])
    images = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    if isinstance(pixels, Pixels):
        pixels.read(rows, images.numpy())
    else:
        np.take(pixels, rows, axis=0, out=images.numpy(), mode="clip")  # unbuffered
    return rows, images


def gather(
    split: Split, positions: np.ndarray, device: torch.device, fetched: Fetched | None = None
) -> tuple[Tensor, Tensor]:
    """Images uint8 (batch, channels, size, size) and targets (batch,), on `device`.

    `fetched` is what `fetch` gave for the same positions. Raises DataError.
    """

    rows, images = fetched or fetch(split, positions, device)
    images = images.to(device, non_blocking=True)
    if isinstance(pixels := split.pixels, Resident):
        if len(rows):
            pixels.tensor[send(rows, device)] = images
            pixels.present[rows] = True
        images = pixels.tensor[send(split.indices[positions], device)]
    targets = send(split.targets[split.indices[positions]], device)
    return images, targets


def read_ahead(
    split: Split, parts: list[np.ndarray], device: torch.device
) -> Iterator[tuple[np.ndarray, Fetched]]:
    """Each of `parts` with its images, which are read while the one before it is computed.

    For a GPU, or to decode, a thread does it. Where the CPU computes, a thread would take its time: there the
    kernel alone reads ahead, told of each part one earlier.
    """

    def read(positions: np.ndarray, after: np.ndarray | None) -> Fetched:
        if after is not None:
            pixels, rows = source_of(split, after)
            if isinstance(pixels, CachedPixels):
                pixels.will_read(rows)
        return fetch(split, positions, device)

    pairs = list(itertools.zip_longest(parts, parts[1:]))
    if device.type == "cpu" and not isinstance(split.pixels, DecodingPixels):
        for positions, after in pairs:
            yield positions, read(positions, after)
        return
    with ThreadPoolExecutor(1) as reader:
        tasks = (reader.submit(read, *pair) for pair in pairs)
        ahead = next(tasks, None)
        for positions in parts:
            now, ahead = ahead, next(tasks, None)
            yield positions, now.result()


# --- batches ----------------------------------------------------------------------------------------


def share_of(count: int, rank: int, ranks: int) -> slice:
    """What process `rank` of `ranks` takes of `count` things in a row; sizes differ by at most one."""
    return slice(count * rank // ranks, count * (rank + 1) // ranks)


def batches(
    split: Split, batch_size: int, device: torch.device, rank: int = 0, ranks: int = 1
) -> Iterator[tuple[Tensor, Tensor, np.ndarray]]:
    """Batches of the split in its order, or `rank`'s part of every batch, which may be empty.

    Yields images float32 (batch, channels, size, size) in [-1, 1] and targets (batch,), both on
    `device`, and the positions (batch,).
    """
    everything = np.arange(len(split))
    whole = [everything[i : i + batch_size] for i in range(0, len(split), batch_size)]
    parts = [positions[share_of(len(positions), rank, ranks)] for positions in whole]
    for positions, fetched in read_ahead(split, parts, device):
        images, targets = gather(split, positions, device, fetched)
        yield to_float(images), targets, positions


def training_batches(
    split: Split,
    batch_size: int,
    device: torch.device,
    augmentation: Augmentation,
    *,
    num_classes: int,
    seed: int,
    start: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """One epoch, shuffled and augmented, from batch `start` on, or `rank`'s part of every batch.

    Yields images and targets as `batches` does and None or, where images are mixed, the probabilities
    (batch, num_classes) to train on, whose largest the targets then are. A part of a short last batch may be empty.
    """
    # Every draw belongs to a sample of the epoch that `seed` stands for, whatever the batch it is in:
    # an epoch that is resumed in its middle, or shared by processes, shows the same images. Each is mixed
    # with the next of the epoch, the last with the first.
    epoch = Epoch(augmentation, len(split), split.pixels.shape[-1], seed)
    ring, beyond = np.append(epoch.order, epoch.order[:1]), int(epoch.mixes)
    parts = []
    for first in range(start * batch_size, len(split), batch_size):
        own = share_of(min(batch_size, len(split) - first), rank, ranks)
        parts.append(ring[first + own.start : first + own.stop + beyond])
    for positions, fetched in read_ahead(split, parts, device):
        images, targets = gather(split, positions, device, fetched)
        images = epoch.show(images, positions)
        if not epoch.mixes:
            yield images, targets, None
            continue
        images, share = epoch.mix(images[:-1], images[1:], positions[:-1])
        classes = F.one_hot(targets, num_classes)
        soft = classes[:-1] * share + classes[1:] * (1 - share)
        yield images, soft.argmax(dim=1), soft
