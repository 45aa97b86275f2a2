"""The images of a folder: their list, and what decodes them, once or at every reading."""

import contextlib
import ctypes
import itertools
import logging
import math
import os
import stat
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from machine_vit import available_memory

IMAGE_EXTENSIONS = {
    *(".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".jp2", ".tga"),
}
# What a file may turn out to be, whatever it is called. Pillow left to choose would hand PostScript to
# Ghostscript. TGA, which has no signature, is looked for in *.tga only.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000")
LARGEST_FILE = 2**30  # bytes; Pillow refuses more than 179 million pixels
LARGE_IMAGE = 2**24  # pixels
_large_images = threading.Lock()  # decoded one at a time: up to 12 bytes a pixel, 2.2 GB


class DataError(ValueError):
    """A data folder that cannot be trained on; the text is one line with the remedy."""

    def __init__(self, text: str) -> None:
        super().__init__(printable(text))


class ImageLost(DataError):
    """An image that was there at the start of training; of several processes this one alone may know it."""


def printable(text: str) -> str:
    """One line for a log or terminal: file names may hold line feeds, escape codes or any bytes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def not_decoded(broken: list[str]) -> str:
    """What is said of images that cannot be decoded, each with its reason: how many, the first five by name."""
    named = f"{len(broken)} images cannot be decoded: " + "; ".join(broken[:5])
    return named + (f"; and {len(broken) - 5} more" if len(broken) > 5 else "")


# --- the folder -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageFolder:
    """The images of one split's folder: `folder / names[i]` is of class number `targets[i]`."""

    folder: Path
    classes: list[str]
    names: list[str]  # strings: a million Path objects take seconds and a gigabyte
    targets: np.ndarray  # int64 (images,)
    ignored: Counter = field(default_factory=Counter)  # extension -> files that are not images

    def path(self, i: int) -> Path:
        """The file of image `i`."""
        return self.folder / self.names[i]


def read_image_folder(folder: Path, classes: list[str] | None = None) -> ImageFolder:
    """List the class folders of `folder`; `classes` are those of train/, which number all splits.

    Raises DataError if there is no such folder, fewer than two classes, other classes than train/'s
    or a class without an image.
    """
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {what}: give one that holds the class folders")
    entries = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    found = [p.name for p in entries if is_folder(p)]
    if len(found) < 2:
        raise DataError(
            f"data folder {folder} has {len(found)} class folders; "
            "it needs one sub-folder of images for each of at least 2 classes"
        )
    if classes is not None and found != classes:
        lacking, besides = set(classes) - set(found), set(found) - set(classes)
        different = [f"it lacks {', '.join(sorted(lacking))}"] if lacking else []
        different += [f"it also has {', '.join(sorted(besides))}"] if besides else []
        hint = f" (did you mean {folder / 'test'}?)" if "test" in besides else ""
        raise DataError(f"{folder} has other classes than train/: {'; '.join(different)}{hint}")
    names, counts, ignored = [], [], Counter()
    if loose := sum(p.suffix.lower() in IMAGE_EXTENSIONS and p.name not in found for p in entries):
        ignored["image in no class folder"] = loose
    for name in found:
        before, others = len(names), Counter()
        for file in files_below(str(folder), name):
            extension = os.path.splitext(file)[1]
            if extension.lower() in IMAGE_EXTENSIONS:
                names.append(file)
            else:
                others[extension or os.path.basename(file)] += 1
        if len(names) == before:
            holds = f", but {most_common(others)}" if others else ""
            raise DataError(
                f"class folder {folder / name} has no images (*.jpg, *.png, ...){holds}"
            )
        ignored += others
        counts.append(len(names) - before)
    targets = np.repeat(np.arange(len(found), dtype=np.int64), counts)
    return ImageFolder(folder, found, names, targets, ignored)


def most_common(kinds: Counter) -> str:
    """The five most frequent, each with its number."""
    return ", ".join(f"{number:,} x {kind}" for kind, number in kinds.most_common(5))


def is_folder(path: Path) -> bool:
    """Raises DataError for a link to nowhere: the class or split that it stands for would be missed."""
    if path.is_symlink() and not path.exists():
        raise DataError(f"{path} is a link to nowhere ({os.readlink(path)}); repair or remove it")
    return path.is_dir()


def files_below(root: str, folder: str) -> Iterator[str]:
    """Files at any depth of `root`/`folder` by their path below `root`, sorted by its parts.

    Hidden ones are left out; links to folders are followed, circles once. Raises OSError.
    """
    seen: set[str] = set()

    def entries(name: str) -> Iterator[tuple[str, bool]]:
        """(name, whether it is a folder) of what `root`/`name` holds, last one first."""
        real = os.path.realpath(os.path.join(root, name))
        if real in seen:
            return
        seen.add(real)
        with os.scandir(os.path.join(root, name)) as scan:
            found = sorted((e.name, e) for e in scan if not e.name.startswith("."))
        for own, entry in reversed(found):
            try:
                folder = entry.is_dir()
            except OSError:  # a link to itself
                folder = False
            yield f"{name}/{own}", folder

    waiting = [(folder, True)]
    while waiting:
        name, is_a_folder = waiting.pop()
        if is_a_folder:
            waiting += entries(name)
        else:
            yield name


def size_time_problem(path: str) -> tuple[int, int, str]:
    """Size, modification time, and why the file cannot be read, if so; a pipe would block for ever."""
    try:
        status = os.stat(path)
    except OSError as error:  # a link to nowhere
        return -1, -1, error.strerror
    if not stat.S_ISREG(status.st_mode):
        return -1, -1, "not a regular file"
    # The second call costs as much as the first, and what everybody may read needs none.
    if status.st_mode & 0o444 != 0o444 and not os.access(path, os.R_OK):
        return -1, -1, "Permission denied"
    problem = f"file of {status.st_size:,} bytes" if status.st_size > LARGEST_FILE else ""
    return status.st_size, status.st_mtime_ns % 2**63, problem  # far dates have more digits


def check_classes(images: ImageFolder, broken: dict[int, str]) -> None:
    """Raises DataError if of a class all images are `broken`: why, by index."""
    left = np.bincount(np.delete(images.targets, list(broken)), minlength=len(images.classes))
    for number in np.flatnonzero(left == 0):
        first = next(i for i in sorted(broken) if images.targets[i] == number)
        raise DataError(
            f"class folder {images.folder / images.classes[number]} has no image that can be decoded: "
            f"{images.path(first)} ({broken[first]}), ..."
        )


# --- decoding ---------------------------------------------------------------------------------------


def decode_image(path: Path, size: int, channels: int) -> np.ndarray:
    """One image as uint8 (channels, size, size), turned as its EXIF says and squeezed to a square.

    Transparent pixels become white; 16-bit grey keeps its upper 8 bits; of several frames the first
    counts. Raises OSError with an errno if the file cannot be read, MemoryError, and whatever Pillow
    raises if it cannot be decoded (OSError without one, SyntaxError, ValueError, ...).
    """
    return np.broadcast_to(decode_planes(path, size, channels), (channels, size, size))


def decode_planes(path: Path, size: int, channels: int) -> np.ndarray:
    """As `decode_image`, but (1, size, size) of an image without colour, however it is stored."""
    mode = {1: "L", 3: "RGB"}[channels]
    # Read at once: Pillow and libtiff map files, and one cut short meanwhile would kill the process.
    content = BytesIO(path.read_bytes())
    formats = (*IMAGE_FORMATS, "TGA") if path.suffix.lower() == ".tga" else IMAGE_FORMATS
    with contextlib.ExitStack() as stack:
        try:
            image = stack.enter_context(Image.open(content, formats=formats))
        except UnidentifiedImageError:  # which names the buffer
            raise ValueError("not an image") from None
        image.draft(mode, (size, size))  # lets libjpeg decode at a fraction of the size
        if image.width * image.height > LARGE_IMAGE:
            stack.enter_context(_large_images)
        exif = image.getexif()
        for tag in exif.keys() - {ExifTags.Base.Orientation}:  # Pillow writes back what is there,
            del exif[tag]  # which fails at tags of a wrong type
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):
            pixels = np.asarray(image)
            low, high = int(pixels.min()), int(pixels.max())
            if low < 0 or high >= 2**16:
                raise ValueError("32-bit or signed pixels have no defined range")
            if image.mode == "I" and image.format == "TIFF" and 0 < high < 2**8:
                raise ValueError(
                    f"pixels of 32 bits up to {high} have no defined range: of 8 or of 16 bits"
                )
            image = Image.fromarray((pixels >> 8).astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("floating-point pixels have no defined range")
        if image.has_transparency_data:
            image = image.convert("RGBA").resize((size, size), Image.Resampling.BICUBIC)
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if image.mode not in (mode, "L"):
            image = image.convert(mode)
        if image.mode == "RGB" and is_grey(image):
            image = image.getchannel(0)
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(size, size, -1).transpose(2, 0, 1)


def is_grey(image: Image.Image) -> bool:
    """Whether the three channels of an RGB image are equal."""
    for top in range(0, image.height, 64):  # in strips: most with colour show it in the first
        strip = image.crop((0, top, image.width, min(top + 64, image.height)))
        red, green, blue = (channel.tobytes() for channel in strip.split())
        if not red == green == blue:
            return False
    return True


def quiet_pillow() -> None:
    """Keep Pillow's and libtiff's remarks out of the user's log: each file is decoded or named."""
    with contextlib.suppress(OSError, AttributeError):  # libtiff writes to stderr by itself
        ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    # For good: to restore the filters of the process is not safe where several threads decode.
    warnings.filterwarnings("ignore", module="PIL")


def _decode(path: Path, size: int, channels: int) -> np.ndarray:
    """`decode_planes`, raising DataError if the file cannot be read and ValueError if not decoded."""
    try:
        return decode_planes(path, size, channels)
    except Exception as error:  # decoders raise nearly anything on broken bytes
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(
                f"{path} could be read when the folder was listed, but no more: {error.strerror}; "
                "start again when the folder is whole"
            ) from None
        if isinstance(error, MemoryError):  # the file may be sound
            raise DataError(
                f"{path} takes more memory to decode than there is: end other programs, or make it smaller"
            ) from None
        reason = printable(" ".join(str(error).split())[:200]) or type(error).__name__
        raise ValueError(reason) from None


def decode_all(
    images: ImageFolder,
    shape: tuple[int, ...],
    workers: int,
    problems: dict[int, str],
    keep: Callable[[int, np.ndarray], None],
) -> tuple[dict[int, str], np.ndarray]:
    """Hand the planes of every image without a problem to `keep`.

    Returns why the others could not be decoded, by index, and which rows have no colour, bool (images,).
    """
    grey = np.ones(shape[0], bool)

    def decode(row: int) -> str | None:
        try:
            image = _decode(images.path(row), shape[2], shape[1])
        except DataError:
            raise
        except ValueError as error:
            return str(error)
        grey[row] = len(image) == 1
        keep(row, image)
        return None

    broken = dict(problems)
    rows = [row for row in range(shape[0]) if row not in problems]
    quiet_pillow()
    bar = tqdm(
        None,
        printable(f"decoding {images.folder}"),
        len(rows),
        leave=False,
        disable=None,
        unit="img",
    )
    # Threads are enough: Pillow decodes and resizes without Python's lock.
    pool = ThreadPoolExecutor(workers)
    try:
        with bar:
            for first in range(0, len(rows), 4096):  # a million tasks would take a gigabyte
                part = rows[first : first + 4096]
                for row, reason in zip(part, pool.map(decode, part), strict=True):
                    bar.update()
                    if reason is not None:
                        broken[row] = reason
    finally:
        pool.shutdown(cancel_futures=True)
    return broken, grey


def decode_again(path: Path, channels: int, image: np.ndarray) -> None:
    """Fill `image` (channels, size, size), or (1, size, size) if it had no colour at the start.

    Raises ImageLost if it has by now, or cannot be decoded any more.
    """
    try:
        planes = _decode(path, image.shape[1], channels)
        if len(planes) > len(image):
            raise DataError(f"{path} has got colour since the start: start again")
        image[:] = planes
    except DataError as error:
        raise ImageLost(str(error)) from None
    except ValueError as error:
        raise ImageLost(f"{path} cannot be decoded any more: {error}; repair it") from None


class Pixels:
    """Decoded images that are read when they are needed, as uint8 (images, channels, size, size)."""

    def __init__(self, images: ImageFolder, shape: tuple[int, ...], channels: int) -> None:
        """`channels` are those that were asked for; one stands for all where none has colour."""
        self.images, self.shape, self.channels = images, shape, channels

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        """What an array of all images would give for an index, a slice or an array of them."""
        rows = np.arange(len(self))[key]
        out = np.empty((rows.size, *self.shape[1:]), np.uint8)
        self.read(rows.ravel(), out)
        return out.reshape(*rows.shape, *self.shape[1:])

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Fill `out` (rows, channels, size, size) with the images `rows`. Raises DataError."""
        raise NotImplementedError


class DecodingPixels(Pixels):
    """Images decoded whenever they are read, by several threads."""

    def __init__(
        self, images: ImageFolder, shape: tuple[int, ...], channels: int, workers: int
    ) -> None:
        super().__init__(images, shape, channels)
        self.pool = ThreadPoolExecutor(workers)

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        paths = map(self.images.path, rows.tolist())
        list(self.pool.map(decode_again, paths, itertools.repeat(self.channels), out))


@dataclass(frozen=True)
class DecodedImages:
    """All images of an `ImageFolder`, decoded: `pixels[i]` is uint8 (channels, size, size).

    Where no image of the folder has colour, it is (1, size, size): one channel stands for all.
    """

    pixels: Pixels | np.ndarray  # (images, channels, size, size) or (images, 1, ...)
    broken: dict[int, str]  # index -> why it could not be decoded
    file: Path | None  # of the cache on disk
    built: bool  # by this process, just now


def decode_here(
    images: ImageFolder, shape: tuple[int, ...], workers: int, mode: str, problems: dict[int, str]
) -> DecodedImages:
    """Decode into memory, or once to see what is broken; `shape` has the channels that are asked for."""
    one_channel = (shape[0], 1, *shape[2:])
    if mode == "off":
        broken, grey = decode_all(images, shape, workers, problems, lambda row, planes: None)
        kept = one_channel if grey.all() else shape
        return DecodedImages(DecodingPixels(images, kept, shape[1], workers), broken, None, True)
    needed, available = math.prod(shape), available_memory()
    if needed > available:
        raise DataError(
            f"--cache memory: the decoded images of {images.folder} take {needed / 1e9:,.2f} GB, and "
            f"{available / 1e9:,.2f} GB are free: leave it out, and they are kept on disk"
        )
    pixels = np.zeros(shape, np.uint8)
    broken, grey = decode_all(images, shape, workers, problems, pixels.__setitem__)
    if grey.all() and shape[1] > 1:
        close_ranks = pixels.reshape(-1, 1, *shape[2:])
        for row in range(shape[0]):
            close_ranks[row] = pixels[row, :1]  # never over a row that is still to come
        del close_ranks
        pixels.resize(one_channel, refcheck=False)  # gives the rest back
    return DecodedImages(pixels, broken, None, True)
