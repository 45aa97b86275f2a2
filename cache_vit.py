"""Decoded images: on disk, where all trials share them, in memory, or decoded at every reading.

python cache_vit.py                  list what is kept on disk
python cache_vit.py clear [NAME...]  remove it, except what a run has open
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import secrets
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from images_vit import (
    DataError,
    DecodedImages,
    ImageFolder,
    ImageLost,
    Pixels,
    decode_again,
    decode_all,
    decode_here,
    printable,
    quiet_pillow,
    size_time_problem,
)

CACHE_FORMAT = 6  # to be raised when decoding or the file changes
MODES = ("disk", "memory", "off")
HEADER_LENGTH, TAIL_LENGTH = 128, 12  # bytes
# Files of pixels and, while they are built, temporary ones. The folder may hold others that are not ours.
OWN_FILES = re.compile(r"[0-9a-f]{32}(\.npy|\.\d+-[0-9a-f]{8}\.tmp)")
log = logging.getLogger("vit.cache")


class CachedPixels(Pixels):
    """Rows of a cache file. It is read, not mapped: the pages of the kernel's cache, which all trials
    share, do not count as memory of each of them, and a disk that fails ends in an error to act on.
    """

    def __init__(
        self, images: ImageFolder, shape: tuple[int, ...], file: Path, descriptor: int
    ) -> None:
        super().__init__(images, shape, shape[1])
        self.file, self.descriptor = file, descriptor
        self.checksums = np.zeros(0, "<u4")
        self.broken: dict[int, str] = {}
        self.stats = np.zeros((0, 2), np.int64)  # size and modification time of the image files
        self.verified = np.zeros(shape[0], bool)
        self.named: set[int] = set()

    def __del__(self) -> None:
        os.close(self.descriptor)

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """As Pixels; a row's first reading in this process compares its checksum."""
        for row, image in zip(rows.tolist(), out, strict=True):
            try:
                place, length = self._place(row)
                whole = os.preadv(self.descriptor, [image], place) == length
            except OSError:  # of the disk
                whole = False
            if whole and not self.verified[row]:
                self.verified[row] = whole = zlib.crc32(image) == self.checksums[row]
            if not whole:
                self._heal(row, image)

    def will_read(self, rows: np.ndarray) -> None:
        """Let the kernel fetch these rows from the disk, where it does not have them, and wait for none."""
        for row in rows.tolist():
            os.posix_fadvise(self.descriptor, *self._place(row), os.POSIX_FADV_WILLNEED)

    def _place(self, row: int) -> tuple[int, int]:
        """Where the row begins in the file, and its length."""
        length = math.prod(self.shape[1:])
        return HEADER_LENGTH + row * length, length

    def _heal(self, row: int, image: np.ndarray) -> None:
        """Decode a damaged row again, for this run and, where it may write, for all others."""
        path = self.images.path(row)
        if row in self.broken:
            image[:] = 0
        elif size_time_problem(str(path)) != (*self.stats[row], ""):
            raise ImageLost(
                f"the cache {self.file} is damaged at {path}, which has changed since it was decoded: "
                "start again"
            )
        else:
            quiet_pillow()
            decode_again(path, self.channels, image)
        if row not in self.named:
            self.named.add(row)
            log.warning(printable(f"the cache {self.file} was damaged at {path}: decoded it again"))
        with contextlib.suppress(OSError), open(self.file, "r+b") as file:
            if os.path.sameopenfile(file.fileno(), self.descriptor):
                os.pwrite(file.fileno(), image.tobytes(), self._place(row)[0])


def decode_folder(
    images: ImageFolder,
    size: int,
    channels: int,
    cache_dir: Path,
    workers: int,
    mode: str = "disk",
    limit: float | None = None,
) -> DecodedImages:
    """Decode every image once and, on "disk", keep the result in `cache_dir` for every later run.

    The cache file belongs to the folder, its list of (path, size, modification time), the image size and
    channels; where no image has colour, it holds one channel, which stands for all. (Two files that
    change places and agree in both are not noticed; the time of change would tell, and would build it
    again after every copy of the folder.) Of processes that need the same one at once, one builds it and
    the others wait. While it is built it takes the space of all channels. Nothing is kept of files that
    could be listed, but then not read. With a `limit` in bytes, files that no run has open make room, the
    least recently used first. "memory" decodes into this process's own; "off" keeps nothing but what is
    broken. Raises DataError on what cannot be read, if the cache folder cannot be written, or the disk,
    the limit or the memory has no room.
    """
    file, stats, problems = place_of(images, size, channels, cache_dir)
    shape = (len(images.names), channels, size, size)
    if mode != "disk":
        return decode_here(images, shape, workers, mode, problems)
    try:
        pixels, built = _open_cache(file, images, shape, stats), False
        if pixels is None:
            cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)  # as private as the images
            _remove_leftovers(cache_dir)
            with _locked(file.with_suffix(".lock")):
                pixels = _open_cache(file, images, shape, stats)
                if pixels is None:
                    pixels = _build_cache(images, shape, stats, file, workers, problems, limit)
                    built = True
        if pixels is None:
            raise OSError("it is damaged as soon as it is written")
    except OSError as error:
        raise DataError(
            f"the cache of decoded images cannot be kept in {cache_dir}: {error.strerror or error}; "
            "make room there, give --cache-dir another folder, or --cache off"
        ) from None
    return DecodedImages(pixels, pixels.broken, file, built)


def place_of(
    images: ImageFolder, size: int, channels: int, cache_dir: Path
) -> tuple[Path, np.ndarray, dict[int, str]]:
    """The cache file that belongs to the images as they are now, each one's size and modification time
    int64 (images, 2), and why some cannot be read, by index.
    """
    stats = np.empty((len(images.names), 2), np.int64)
    problems = {}
    folder = str(images.folder)
    for i, name in enumerate(images.names):
        *stats[i], problem = size_time_problem(f"{folder}/{name}")
        if problem:
            problems[i] = problem
    digest = hashlib.sha256(json.dumps([CACHE_FORMAT, size, channels, problems]).encode())
    # Copies of one archive can agree in every name, size and time, and not in their images.
    place = os.path.realpath(images.folder)
    digest.update("\0".join([place, *images.names]).encode(errors="surrogateescape"))
    digest.update(stats.tobytes())
    return cache_dir / f"{digest.hexdigest()[:32]}.npy", stats, problems


# --- the cache file ---------------------------------------------------------------------------------
# An .npy array that numpy can map; behind it a CRC-32 for each row, a JSON of what it holds, the length
# of that (8 bytes) and the CRC-32 of the header and all of this (4 bytes). So the whole need not be
# read before the first step, and a damaged row is noticed where it is read.


def make_header(shape: list[int] | tuple[int, ...]) -> bytes:
    """Of an .npy file, version 1.0, always of the same length."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {tuple(shape)}, }}"
    text = text.ljust(HEADER_LENGTH - 11) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def make_footer(shape: tuple[int, ...], checksums: np.ndarray, info: dict[str, Any]) -> bytes:
    """What stands behind the pixels of such a file."""
    text = json.dumps(info).encode()
    footer = checksums.astype("<u4").tobytes() + text + len(text).to_bytes(8, "little")
    return footer + zlib.crc32(make_header(shape) + footer).to_bytes(4, "little")


def _read_footer(descriptor: int) -> tuple[dict[str, Any], np.ndarray] | None:
    """{"folder", "shape", "broken"} and the checksums (images,); None if anything is not as written."""
    try:
        length = os.fstat(descriptor).st_size
        tail = os.pread(descriptor, TAIL_LENGTH, max(0, length - TAIL_LENGTH))
        text_length = int.from_bytes(tail[:8], "little")
        start = length - TAIL_LENGTH - text_length
        if start < HEADER_LENGTH:
            return None
        info = json.loads(os.pread(descriptor, text_length, start))
        shape = tuple(info["shape"])
        begin = HEADER_LENGTH + math.prod(shape)
        checksums = np.frombuffer(os.pread(descriptor, start - begin, begin), "<u4")
        whole = os.pread(descriptor, HEADER_LENGTH, 0) == make_header(shape)
        footer = make_footer(shape, checksums, info)
        whole = whole and len(checksums) == shape[0] and begin + len(footer) == length
        whole = whole and len(shape) == 4
    except Exception:  # whatever a damaged file leads to
        return None
    return (info, checksums) if whole and footer[-4:] == tail[-4:] else None


def _open_cache(
    file: Path, images: ImageFolder, shape: tuple[int, ...], stats: np.ndarray
) -> CachedPixels | None:
    """The pixels in `file`; None if there is no such file or it is damaged."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except FileNotFoundError:
        return None
    pixels = CachedPixels(images, shape, file, descriptor)  # and closes it
    with contextlib.suppress(OSError):  # that it is in use, and when it was last
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.utime(descriptor)
    found = _read_footer(descriptor)
    if found is None or found[0]["shape"] not in (list(shape), [shape[0], 1, *shape[2:]]):
        return None
    info, pixels.checksums = found
    pixels.shape = tuple(info["shape"])
    pixels.broken = {int(i): why for i, why in info["broken"].items()}
    pixels.stats = stats
    return pixels


def _build_cache(
    images: ImageFolder,
    shape: tuple[int, ...],
    stats: np.ndarray,
    file: Path,
    workers: int,
    problems: dict[int, str],
    limit: float | None,
) -> CachedPixels | None:
    """Decode into a temporary file that becomes `file`, whose lock this process has; the pixels in it."""
    for dead in file.parent.glob(f"{file.stem}.*.tmp"):  # of one that had the lock and was killed
        with contextlib.suppress(OSError):  # another user's
            dead.unlink()
    row_length = math.prod(shape[1:])
    # A name that nobody else can have put a link under, where the folder is open to others.
    temporary = file.with_suffix(f".{os.getpid()}-{secrets.token_hex(4)}.tmp")
    descriptor = None
    try:
        with _room(file.parent, shape[0] * (row_length + 4), limit, images.folder):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
            descriptor = os.open(temporary, flags, 0o666)
            # Claim the disk space now, rather than fail after an hour of decoding.
            os.posix_fallocate(descriptor, 0, HEADER_LENGTH + shape[0] * row_length)
        checksums = np.full(shape[0], zlib.crc32(bytes(math.prod(shape[2:]))), "<u4")

        def keep(row: int, planes: np.ndarray) -> None:
            content = planes.tobytes()
            checksums[row] = zlib.crc32(content)
            _write(descriptor, content, HEADER_LENGTH + row * row_length)

        broken, grey = decode_all(images, shape, workers, problems, keep)
        kept = _settle(descriptor, shape, grey, checksums)
        info = {"folder": str(images.folder), "shape": kept, "broken": broken}
        _write(descriptor, make_header(kept), 0)
        _write(descriptor, make_footer(kept, checksums, info), HEADER_LENGTH + math.prod(kept))
        os.fsync(descriptor)
        with contextlib.suppress(OSError):  # so that nobody removes it before it is opened
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        temporary.rename(file)
        return _open_cache(file, images, shape, stats)
    finally:
        if descriptor is not None:
            os.close(descriptor)
        temporary.unlink(missing_ok=True)


def _settle(
    descriptor: int, shape: tuple[int, ...], grey: np.ndarray, checksums: np.ndarray
) -> tuple[int, ...]:
    """Make rows of one length: so far those without colour hold their first channel only.

    Where none has colour this is all that is kept, else they get the others. Returns the shape of the file.
    """
    plane, row_length, all_grey = math.prod(shape[2:]), math.prod(shape[1:]), grey.all()
    for row in np.flatnonzero(grey).tolist() if shape[1] > 1 else ():
        content = os.pread(descriptor, plane, HEADER_LENGTH + row * row_length)
        if all_grey:
            _write(descriptor, content, HEADER_LENGTH + row * plane)
        else:
            content *= shape[1]
            checksums[row] = zlib.crc32(content)
            _write(descriptor, content, HEADER_LENGTH + row * row_length)
    if not all_grey:
        return shape
    os.ftruncate(descriptor, HEADER_LENGTH + shape[0] * plane)
    return (shape[0], 1, *shape[2:])


def _write(descriptor: int, content: bytes, place: int) -> None:
    while content:  # a disk that fills up takes a part
        written = os.pwrite(descriptor, content, place)
        content, place = content[written:], place + written


# --- the folder of all of them ------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(
    file: Path, wait: bool = True, work: str = "decoding the same images"
) -> Iterator[None]:
    """One process at a time, of any user who may read `file`. Raises BlockingIOError without `wait`."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except PermissionError:  # it is another user's
        if not file.exists():
            raise
        descriptor = os.open(file, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise
            log.info(f"another run is {work}: waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def own_files(cache_dir: Path, suffix: str) -> list[Path]:
    """The files of the cache that end so, .npy or .tmp."""
    return [file for file in cache_dir.glob(f"*{suffix}") if OWN_FILES.fullmatch(file.name)]


def _remove_leftovers(cache_dir: Path) -> None:
    """Temporary files of builders that were killed: those whose lock is free."""
    for leftover in own_files(cache_dir, ".tmp"):
        lock = cache_dir / f"{leftover.name.split('.')[0]}.lock"
        with contextlib.suppress(OSError), _locked(lock, wait=False):
            leftover.unlink()


@contextlib.contextmanager
def _room(cache_dir: Path, needed: int, limit: float | None, folder: Path) -> Iterator[None]:
    """Remove what was not used for longest until `needed` bytes fit the limit. Raises DataError."""
    if limit is None:
        yield
        return
    with _locked(cache_dir / "limit.lock", work="making room in the cache"):
        files = {}
        for file in own_files(cache_dir, ".npy") + own_files(cache_dir, ".tmp"):
            with contextlib.suppress(FileNotFoundError):  # another builder's, renamed by now
                files[file] = file.stat()
        used = sum(status.st_size for status in files.values())
        for file in sorted(files, key=lambda file: files[file].st_mtime_ns):
            if used + needed > limit and needed <= limit and file.suffix == ".npy" and remove(file):
                used -= files[file].st_size
        if used + needed > limit:
            beside = (
                "" if needed > limit else f" beside the {used / 1e9:,.3g} GB that runs have open"
            )
            raise DataError(
                f"the decoded images of {folder} take {needed / 1e9:,.3g} GB{beside}, and --cache-limit "
                f"is {limit / 1e9:,.3g}: raise it, or --cache off decodes in every epoch instead"
            )
        yield


def remove(file: Path) -> bool:
    """Remove a cache file unless a run has it open; whether it is gone."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.unlink()
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def default_folder() -> Path:
    """Where the decoded images of this user are kept."""
    return Path(os.path.expanduser("~/.cache/vit-nni"))


def main(argv: list[str] | None = None) -> int:
    """List or clear; returns the exit status, 1 if something could not be removed, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="cache_vit.py", description=__doc__.splitlines()[0])
    parser.add_argument("command", nargs="?", choices=("list", "clear"), default="list")
    parser.add_argument("names", nargs="*", metavar="NAME", help="as listed; all without one")
    parser.add_argument("--cache-dir", type=Path, metavar="DIR", default=default_folder())
    args = parser.parse_args(argv)
    args.cache_dir = Path(os.path.expanduser(args.cache_dir))
    if not args.cache_dir.is_dir() and args.cache_dir != default_folder():
        error = f"cache folder {args.cache_dir} does not exist"
        print(printable(f"cache_vit.py: error: {error}"), file=sys.stderr)
        return 2
    files = sorted(own_files(args.cache_dir, ".npy"), key=last_use)
    status = 0
    for name in args.names:
        if not any(file.stem.startswith(name) for file in files):
            print(printable(f"cache_vit.py: {args.cache_dir} has no {name}"), file=sys.stderr)
            status = 1
    for file in files:
        if args.names and not any(file.stem.startswith(name) for name in args.names):
            continue
        line = describe(file)
        if args.command == "clear":
            removed = remove(file)
            status = status or int(not removed)
            line = f"{'removed' if removed else 'kept, a run has it open:'}  {line}"
        print(line)
    if args.command == "clear" and not args.names:
        _remove_leftovers(args.cache_dir)
    return status


def last_use(file: Path) -> float:
    """Seconds since 1970; 0 if the file is gone meanwhile."""
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def describe(file: Path) -> str:
    """One line: name, last use, megabytes, images, their size, data folder."""
    try:
        with open(file, "rb") as content:
            status, found = os.fstat(content.fileno()), _read_footer(content.fileno())
    except OSError as error:  # another user's, or gone meanwhile
        return printable(f"{file.stem[:8]}  cannot be read: {error.strerror}")
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(status.st_mtime))
    what = "damaged or of another version"
    if found:
        images, channels, size, _ = found[0]["shape"]
        what = f"{images:,} images {size} x {size} x {channels} of {found[0]['folder']}"
    return printable(f"{file.stem[:8]}  {used}  {status.st_size / 1e6:,.1f} MB  {what}")


if __name__ == "__main__":
    sys.exit(main())
