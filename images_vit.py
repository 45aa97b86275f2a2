"""The images of a folder: their list, what decodes them, and the cache of decoded images that trials share."""

import contextlib
import ctypes
import fcntl
import hashlib
import json
import logging
import os
import stat
import threading
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

IMAGE_EXTENSIONS = {
    *(".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".jp2", ".tga"),
}
# What a file may turn out to be, whatever it is called. Pillow left to choose would hand PostScript to
# Ghostscript. TGA, which has no signature, is looked for in *.tga only.
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000")
LARGEST_FILE = 2**30  # bytes; Pillow refuses more than 179 million pixels
LARGE_IMAGE = 2**24  # pixels
_large_images = threading.Lock()  # decoded one at a time: 8 bytes a pixel, 1.4 GB at most
CACHE_FORMAT = 2  # to be raised when decoding changes


class DataError(ValueError):
    """A data folder that cannot be trained on; the text is one line with the remedy."""

    def __init__(self, text: str) -> None:
        super().__init__(printable(text))


def printable(text: str) -> str:
    """One line for a log or terminal: file names may hold line feeds, escape codes or any bytes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


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
    found = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".") and is_folder(p))
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


def is_folder(path: Path) -> bool:
    """Raises DataError for a link to nowhere: the class or split that it stands for would be missed."""
    if path.is_symlink() and not path.exists():
        raise DataError(f"{path} is a link to nowhere ({os.readlink(path)}); repair or remove it")
    return path.is_dir()


def _files_below(folder: Path) -> list[Path]:
    """Files at any depth, sorted, without hidden ones; links to folders are followed, circles once."""

    def fail(error: OSError) -> None:  # os.walk would leave the folder out
        raise error

    files, seen = [], set()
    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else sorted(f for f in folders if not f.startswith("."))
        if real not in seen:
            files += [Path(parent, name) for name in names if not name.startswith(".")]
        seen.add(real)
    return sorted(files)


# --- decoding ---------------------------------------------------------------------------------------


def decode_image(path: Path, size: int, channels: int) -> np.ndarray:
    """One image as uint8 (channels, size, size), turned as its EXIF says and squeezed to a square.

    Transparent pixels become white; 16-bit grey keeps its upper 8 bits; of several frames the first
    counts. Raises OSError with an errno if the file cannot be read, and whatever Pillow raises if it
    cannot be decoded (OSError without one, SyntaxError, ValueError, ...).
    """
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
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):
            pixels = np.asarray(image) >> 8
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("floating-point pixels have no defined range")
        transparent = image.has_transparency_data
        between = "RGBA" if transparent else mode
        if image.mode != between:
            image = image.convert(between)
        image = image.resize((size, size), Image.Resampling.BICUBIC)
        if transparent:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image).convert(mode)
    return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)


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
    channels. Of processes that need the same one at once, one builds it and the others wait. Nothing
    is kept of files that could be listed, but then not read. Raises DataError on those, if the cache
    folder cannot be written or the disk has no room.
    """
    listing = [
        (str(path.relative_to(images.folder)), *_size_time_problem(path)) for path in images.paths
    ]
    key = hashlib.sha256(json.dumps([CACHE_FORMAT, size, channels, listing]).encode()).hexdigest()
    file = cache_dir / f"{key[:32]}.npy"
    problems = {i: problem for i, (*_, problem) in enumerate(listing) if problem}
    try:
        found, built = _open_cache(file), False
        if found is None:
            cache_dir.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(cache_dir)
            with _locked(file.with_suffix(".lock")):
                found = _open_cache(file)
                if found is None:
                    found = _build_cache(images, size, channels, file, workers, problems)
                    built = True
    except OSError as error:
        raise DataError(
            f"the cache of decoded images cannot be kept in {cache_dir}: {error.strerror or error}; "
            "make room there or give --cache-dir another folder"
        ) from None
    return DecodedImages(*found, file, built)


def _size_time_problem(path: Path) -> tuple[int, int, str]:
    """Size, modification time, and why the file cannot be read, if so; a pipe would block for ever."""
    try:
        status = path.stat()
    except OSError as error:  # a link to nowhere
        return -1, -1, error.strerror
    if not stat.S_ISREG(status.st_mode):
        return -1, -1, "not a regular file"
    if not os.access(path, os.R_OK):
        return -1, -1, "Permission denied"
    problem = f"file of {status.st_size:,} bytes" if status.st_size > LARGEST_FILE else ""
    return status.st_size, status.st_mtime_ns, problem


@contextlib.contextmanager
def _locked(file: Path, wait: bool = True) -> Iterator[None]:
    """One process at a time, of any user who may read `file`. Raises BlockingIOError without `wait`."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:  # it is another user's
        if not file.exists():
            raise
        descriptor = os.open(file, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove_leftovers(cache_dir: Path) -> None:
    """Temporary files of builders that were killed: those whose lock is free."""
    for leftover in cache_dir.glob("*.tmp"):
        lock = cache_dir / f"{leftover.name.split('.')[0]}.lock"
        with contextlib.suppress(OSError), _locked(lock, wait=False):
            leftover.unlink()


def _open_cache(file: Path) -> tuple[np.ndarray, dict[int, str]] | None:
    """Pixels and the reasons of what is broken, by index; None if there is no such file or it is damaged.

    Behind the array there are the reasons (JSON) and the CRC-32 of all before it (4 bytes).
    """
    try:
        content = np.memmap(file, np.uint8, "r")
        if zlib.crc32(content[:-4]) != int.from_bytes(content[-4:].tobytes(), "big"):
            return None
        pixels = np.load(file, mmap_mode="r")
    except (FileNotFoundError, ValueError):  # ... or empty
        return None
    broken = json.loads(content[pixels.offset + pixels.nbytes : -4].tobytes())
    return pixels, {int(i): why for i, why in broken.items()}


def _build_cache(
    images: ImageFolder,
    size: int,
    channels: int,
    file: Path,
    workers: int,
    problems: dict[int, str],
) -> tuple[np.ndarray, dict[int, str]]:
    """Decode into a temporary file that becomes `file`; returns what `_open_cache` would."""
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    shape = (len(images.paths), channels, size, size)
    try:
        pixels = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
        with open(temporary, "r+b") as out:
            # Claim the disk space now: writing to a mapped file on a full disk would kill the process.
            os.posix_fallocate(out.fileno(), 0, pixels.offset + pixels.nbytes)
            with quiet_pillow():
                broken = problems | _decode_all(images, pixels, workers, problems)
            out.seek(0, os.SEEK_END)
            out.write(json.dumps(broken).encode())
            out.flush()
            checksum = zlib.crc32(np.memmap(temporary, np.uint8, "r"))
            out.write(checksum.to_bytes(4, "big"))
            out.flush()
            os.fsync(out.fileno())
        temporary.rename(file)
    finally:
        temporary.unlink(missing_ok=True)
    pixels.setflags(write=False)
    return pixels, broken


@contextlib.contextmanager
def quiet_pillow() -> Iterator[None]:
    """Pillow's and libtiff's remarks stay out of the user's log: each file is decoded or named."""
    with contextlib.suppress(OSError, AttributeError):  # libtiff writes to stderr by itself
        ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)
    logger = logging.getLogger("PIL")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _decode_all(
    images: ImageFolder, pixels: np.ndarray, workers: int, problems: dict[int, str]
) -> dict[int, str]:
    """Decode every image without a problem into its row; returns why some could not be, by index."""
    size, channels = pixels.shape[2], pixels.shape[1]
    broken = {}
    # Threads are enough: Pillow decodes and resizes without Python's lock.
    pool = ThreadPoolExecutor(workers)
    try:
        tasks = {
            pool.submit(_decode_into, pixels, i, path, size, channels): i
            for i, path in enumerate(images.paths)
            if i not in problems
        }
        description = printable(f"decoding {images.folder}")
        for task in tqdm(as_completed(tasks), description, len(tasks), leave=False, disable=None):
            if (reason := task.result()) is not None:
                broken[tasks[task]] = reason
    finally:
        pool.shutdown(cancel_futures=True)
    return broken


def _decode_into(pixels: np.ndarray, i: int, path: Path, size: int, channels: int) -> str | None:
    """Decode into row `i`; returns why that was not possible."""
    try:
        pixels[i] = decode_image(path, size, channels)
    except Exception as error:  # decoders raise nearly anything on broken bytes
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(
                f"{path} could be read when the folder was listed, but no more: {error.strerror}; "
                "start again when the folder is whole"
            ) from None
        return printable(" ".join(str(error).split())[:200]) or type(error).__name__
    return None
