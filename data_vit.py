"""From a folder of images to batches: classes, splits, decoding, the cache of decoded images, flips."""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

IMAGE_EXTENSIONS = {
    *(".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".jp2", ".tga"),
}
CACHE_FORMAT = 1  # to be raised when decoding changes
DEMO_FOLDER = Path("dataset/digits")


class DataError(ValueError):
    """A data folder that cannot be trained on; the text is one line with the remedy."""


# --- the folder -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageFolder:
    """The images of one split's folder: `paths[i]` is of class number `targets[i]`."""

    folder: Path
    classes: list[str]
    paths: list[Path]
    targets: np.ndarray  # int64 (images,)
    ignored: Counter = field(default_factory=Counter)  # extension -> files that are not images


def read_image_folder(folder: Path, classes: list[str] | None = None) -> ImageFolder:
    """List the class folders of `folder`; `classes` are those of train/, which number all splits.

    Raises DataError if there is no such folder, fewer than two classes, other classes than train/'s
    or a class without an image.
    """
    if not folder.is_dir():
        raise DataError(
            f"data folder {folder} does not exist; give --download-dir a folder that does"
        )
    found = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(found) < 2:
        raise DataError(
            f"data folder {folder} has {len(found)} class folders; "
            "it needs one sub-folder of images for each of at least 2 classes"
        )
    if classes is not None and found != classes:
        different = ", ".join(sorted(set(found) ^ set(classes)))
        raise DataError(f"{folder} has other classes than train/: {different}")
    paths, targets, ignored = [], [], Counter()
    for number, name in enumerate(found):
        images = []
        for path in _files_below(folder / name):
            if path.suffix.lower() in IMAGE_EXTENSIONS:
                images.append(path)
            else:
                ignored[path.suffix or path.name] += 1
        if not images:
            raise DataError(f"class folder {folder / name} has no images (*.jpg, *.png, ...)")
        paths += images
        targets += [number] * len(images)
    return ImageFolder(folder, found, paths, np.array(targets, dtype=np.int64), ignored)


def _files_below(folder: Path) -> list[Path]:
    """Files at any depth, sorted, without hidden ones; links to folders are followed, circles once."""
    files, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else sorted(f for f in folders if not f.startswith("."))
        if real not in seen:
            files += [Path(parent, name) for name in names if not name.startswith(".")]
        seen.add(real)
    return sorted(files)


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
    for split, indices in (("train", train), ("test", test)):
        for index in indices:
            path = copy / split / str(digits.target[index]) / f"{index:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = (digits.images[index] * (255 / 16)).round().astype(np.uint8)
            Image.fromarray(pixels).save(path)
    try:
        copy.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(copy)
        if not folder.is_dir():
            raise
    return folder


# --- decoding ---------------------------------------------------------------------------------------


def decode_image(path: Path, size: int, channels: int) -> np.ndarray:
    """One image as uint8 (channels, size, size), turned as its EXIF says and squeezed to a square.

    Transparent pixels become white; 16-bit grey keeps its upper 8 bits. Raises whatever Pillow raises
    on a file that it cannot decode (OSError, SyntaxError, ValueError, ...).
    """
    mode = {1: "L", 3: "RGB"}[channels]
    with Image.open(path) as image:
        image.draft(mode, (size, size))  # lets libjpeg decode at a fraction of the size
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            pixels = np.asarray(image).astype(np.int64) >> 8
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("floating-point pixels have no defined range")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert(mode).resize((size, size), Image.Resampling.BICUBIC)
        pixels = np.asarray(image).reshape(size, size, channels)
    return pixels.transpose(2, 0, 1)


@dataclass(frozen=True)
class DecodedImages:
    """All images of an `ImageFolder`, decoded: `pixels[i]` is uint8 (channels, size, size)."""

    pixels: np.ndarray  # uint8 (images, channels, size, size), mapped from the cache
    broken: dict[int, str]  # index -> why it could not be decoded
    file: Path
    built: bool  # by this process, just now


def decode_folder(
    images: ImageFolder, size: int, channels: int, cache_dir: Path, workers: int
) -> DecodedImages:
    """Decode every image once and keep the result in `cache_dir`, where every later run maps it.

    The cache file belongs to the list of (path, size, modification time) and to the image size and
    channels. Of processes that need the same one at once, one builds it and the others wait.
    Raises DataError if the cache folder cannot be written or the disk has no room.
    """
    listing = [
        [str(path.relative_to(images.folder)), *_size_and_time(path)] for path in images.paths
    ]
    key = hashlib.sha256(json.dumps([CACHE_FORMAT, size, channels, listing]).encode()).hexdigest()
    file = cache_dir / f"{key[:32]}.npy"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            built = False
            try:
                pixels, broken = _open_cache(file)
            except (FileNotFoundError, ValueError, EOFError):  # ... or cut off by a crash
                _build_cache(images, size, channels, file, workers)
                pixels, broken = _open_cache(file)
                built = True
    except OSError as error:
        raise DataError(
            f"the cache of decoded images cannot be kept in {cache_dir}: {error.strerror or error}; "
            "make room there or give --cache-dir another folder"
        ) from None
    return DecodedImages(pixels, broken, file, built)


def _open_cache(file: Path) -> tuple[np.ndarray, dict[int, str]]:
    """The pixels and the reasons of what is broken, by index."""
    broken = json.loads(file.with_suffix(".json").read_text())
    return np.load(file, mmap_mode="r"), {int(i): why for i, why in broken.items()}


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:  # a link to nowhere; decoding it says so
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _build_cache(images: ImageFolder, size: int, channels: int, file: Path, workers: int) -> None:
    temporary = file.with_suffix(".tmp")
    shape = (len(images.paths), channels, size, size)
    try:
        pixels = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
        # Claim the disk space now: writing to a mapped file on a full disk would kill the process.
        with open(temporary, "r+b") as reserved:
            os.posix_fallocate(reserved.fileno(), 0, temporary.stat().st_size)
        broken = {}
        # Threads are enough: Pillow decodes and resizes without Python's lock.
        pool = ThreadPoolExecutor(workers)
        try:
            tasks = {
                pool.submit(_decode_into, pixels, i, path, size, channels): i
                for i, path in enumerate(images.paths)
            }
            description = f"decoding {images.folder}"
            for task in tqdm(
                as_completed(tasks), description, len(tasks), leave=False, disable=None
            ):
                if (reason := task.result()) is not None:
                    broken[tasks[task]] = reason
        finally:
            pool.shutdown(cancel_futures=True)
        pixels.flush()
        file.with_suffix(".json").write_text(json.dumps(broken))
        temporary.rename(file)
    finally:
        temporary.unlink(missing_ok=True)


def _decode_into(pixels: np.ndarray, i: int, path: Path, size: int, channels: int) -> str | None:
    """Decode into row `i`; returns why that was not possible."""
    try:
        pixels[i] = decode_image(path, size, channels)
    except Exception as error:  # decoders raise nearly anything on broken bytes
        return " ".join(str(error).split()) or type(error).__name__
    return None


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
    if not download_dir.is_dir():
        raise DataError(
            f"data folder {download_dir} does not exist; give --download-dir one that does"
        )
    has_train = (download_dir / "train").is_dir()
    folders = {"train": read_image_folder(download_dir / "train" if has_train else download_dir)}
    classes = folders["train"].classes
    if num_classes not in (None, len(classes)):
        raise DataError(
            f"--num-classes is {num_classes}, but {folders['train'].folder} has {len(classes)} class "
            f"folders ({', '.join(classes[:10])}): leave --num-classes out or correct it"
        )
    for name in ("val", "test"):
        if has_train and (download_dir / name).is_dir() and not (name == "val" and val_split):
            folders[name] = read_image_folder(download_dir / name, classes)

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
