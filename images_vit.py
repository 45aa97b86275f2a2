"""What decodes images, once or at every reading."""

import contextlib
import ctypes
import itertools
import logging
import math
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from folder_vit import DataError, ImageFolder, ImageLost, printable, size_time_problem

# What a file may turn out to be, whatever it is called. Pillow left to choose would hand PostScript to
# Ghostscript. TGA, which has no signature, is looked for in *.tga only.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000")
LARGE_IMAGE = 2**24  # pixels; Pillow refuses more than 179 million
_large_images = threading.Lock()  # decoded one at a time: up to 12 bytes a pixel, 2.2 GB


def decode_image(path: Path, size: int, channels: int) -> np.ndarray:
    """One image as uint8 (channels, size, size), turned as its EXIF says and squeezed to a square.

    Transparent pixels become white; of several frames the first counts; 16-bit grey keeps its upper 8
    bits, and is refused if these would be nearly black. Raises OSError with an errno if the file cannot
    be read, MemoryError, and whatever Pillow raises if it cannot be decoded (OSError without one, ...).
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
            if 0 < high < 2**12:  # a scanner's 12 bits, say
                raise ValueError(
                    f"no pixel above {high:,} of 65,535, nearly black: scale it to 16 bits, or to 8"
                )
            clear = image.info.get("transparency")  # of a PNG, one value
            image = Image.fromarray(np.where(pixels == clear, 255, pixels >> 8).astype(np.uint8))
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


def _decode(path: Path, size: int, channels: int, listed: np.ndarray | None) -> np.ndarray:
    """`decode_planes`, raising ValueError if the file cannot be decoded.

    Raises DataError if it cannot be read, or has not the size and time any more that were `listed`, where
    that counts: decoded images that are kept stand for the files that were there then.
    """
    now, why, reason = listed, None, None
    try:
        planes = decode_planes(path, size, channels)
    except MemoryError:  # the file may be sound
        raise DataError(
            f"{path} takes more memory to decode than there is: end other programs, or make it smaller"
        ) from None
    except Exception as error:  # decoders raise nearly anything on broken bytes
        if isinstance(error, OSError) and error.errno is not None:
            why = error.strerror
        reason = printable(" ".join(str(error).split())[:200]) or type(error).__name__
    if listed is not None and not why:
        *now, why = size_time_problem(str(path))
    if why:
        raise DataError(
            f"{path} could be read when the folder was listed, but no more: {why}; start again when the "
            "folder is whole"
        )
    if listed is not None and now != [*listed]:
        raise DataError(
            f"{path} has changed since the folder was listed: start again when it is whole"
        )
    if reason:
        raise ValueError(reason)
    return planes


def decode_all(
    images: ImageFolder,
    shape: tuple[int, ...],
    stats: np.ndarray | None,
    workers: int,
    problems: dict[int, str],
    keep: Callable[[int, np.ndarray], None],
) -> tuple[dict[int, str], np.ndarray, int]:
    """Hand the planes of every image without a problem to `keep`.

    Returns why the others could not be decoded, by index, which rows have no colour, bool (images,), and
    the brightest pixel of all, of 255.
    """
    grey, brightest = np.ones(shape[0], bool), np.zeros(shape[0], np.uint8)

    def decode(row: int) -> str | None:
        try:
            listed = None if stats is None else stats[row]
            image = _decode(images.path(row), shape[2], shape[1], listed)
        except DataError:
            raise
        except ValueError as error:
            return str(error)
        grey[row], brightest[row] = len(image) == 1, image.max()
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
    return broken, grey, int(brightest.max())


def decode_again(path: Path, channels: int, listed: np.ndarray, image: np.ndarray) -> None:
    """Fill `image` (channels, size, size), or (1, size, size) if no image of its folder has colour.

    Raises ImageLost if the file is not the one any more whose size and time were `listed`.
    """
    try:
        planes = _decode(path, image.shape[1], channels, listed)
        if len(planes) > len(image):  # its size and time are those of the grey image that it was
            raise DataError(f"{path} has got colour since the folder was listed: start again")
        image[:] = planes
    except DataError as error:
        raise ImageLost(str(error)) from None
    except ValueError as error:
        raise ImageLost(f"{path} cannot be decoded any more: {error}; repair it") from None


class Pixels:
    """Decoded images that are read when they are needed, as uint8 (images, channels, size, size)."""

    def __init__(
        self, images: ImageFolder, shape: tuple[int, ...], channels: int, stats: np.ndarray
    ) -> None:
        """`channels` are those that were asked for; one stands for all where none has colour.

        `stats` are what `sizes_and_times` found.
        """
        self.images, self.shape, self.channels, self.stats = images, shape, channels, stats

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
        self,
        images: ImageFolder,
        shape: tuple[int, ...],
        channels: int,
        stats: np.ndarray,
        workers: int,
    ) -> None:
        super().__init__(images, shape, channels, stats)
        self.pool = ThreadPoolExecutor(workers)

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        paths = map(self.images.path, rows.tolist())
        channels = itertools.repeat(self.channels)
        list(self.pool.map(decode_again, paths, channels, self.stats[rows], out))


@dataclass(frozen=True)
class DecodedImages:
    """All images of an `ImageFolder`, decoded: `pixels[i]` is uint8 (channels, size, size).

    Where no image of the folder has colour, it is (1, size, size): one channel stands for all.
    """

    pixels: Pixels | np.ndarray  # (images, channels, size, size) or (images, 1, ...)
    broken: dict[int, str]  # index -> why it could not be decoded
    brightest: int  # pixel's value, of 255
    file: Path | None  # of the cache on disk
    built: bool  # by this process, just now


def decode_here(
    images: ImageFolder,
    shape: tuple[int, ...],
    stats: np.ndarray | None,
    workers: int,
    mode: str,
    problems: dict[int, str],
) -> DecodedImages:
    """Decode into memory, or once to see what is broken; `shape` has the channels that are asked for.

    Without `stats` it does not count whether a file has changed since it was listed.
    """
    one_channel = (shape[0], 1, *shape[2:])
    if mode == "off":
        broken, grey, brightest = decode_all(
            images, shape, stats, workers, problems, keep=lambda *_: None
        )
        kept = one_channel if grey.all() else shape
        pixels = DecodingPixels(images, kept, shape[1], stats, workers)
        return DecodedImages(pixels, broken, brightest, None, True)
    pixels = np.zeros(shape, np.uint8)
    broken, grey, brightest = decode_all(
        images, shape, stats, workers, problems, keep=pixels.__setitem__
    )
    if grey.all() and shape[1] > 1:
        packed = pixels.reshape(-1, 1, *shape[2:])
        for row in range(shape[0]):
            packed[row] = pixels[row, :1]  # never over a row that is still to be read
        del packed
        pixels.resize(one_channel, refcheck=False)  # gives the rest back
    return DecodedImages(pixels, broken, brightest, None, True)
