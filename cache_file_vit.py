"""A file of decoded images: its rows are read, repaired where they are damaged, and written once."""

import contextlib
import fcntl
import json
import logging
import math
import os
import secrets
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from folder_vit import ImageFolder
from images_vit import Pixels, decode_again, decode_all, quiet_pillow

CACHE_FORMAT = 8  # to be raised when decoding or the file changes
HEADER_LENGTH, TAIL_LENGTH = 128, 12  # bytes
log = logging.getLogger("vit.cache")


class CachedPixels(Pixels):
    """Rows of a cache file. It is read, not mapped: the pages of the kernel's cache, which all trials
    share, do not count as memory of each of them, and a disk that fails ends in an error to act on.
    """

    def __init__(
        self,
        images: ImageFolder,
        shape: tuple[int, ...],
        stats: np.ndarray,
        file: Path,
        descriptor: int,
    ) -> None:
        super().__init__(images, shape, shape[1], stats)
        self.file, self.descriptor = file, descriptor
        self.checksums = np.zeros(0, "<u4")
        self.broken: dict[int, str] = {}
        self.brightest = 0
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
        else:
            quiet_pillow()
            decode_again(path, self.channels, self.stats[row], image)
        if row not in self.named:
            self.named.add(row)
            log.warning(f"the cache {self.file} was damaged at {path}: decoded it again")
        place, length = self._place(row)
        with contextlib.suppress(OSError), open(self.file, "r+b") as file:
            # To lengthen a file that was cut short would make zeros of rows that others have verified.
            inside = place + length <= os.fstat(self.descriptor).st_size
            if inside and os.path.sameopenfile(file.fileno(), self.descriptor):
                os.pwrite(file.fileno(), image.tobytes(), place)


# --- its form -----------------------------------------------------------------------------------------
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


def read_footer(descriptor: int) -> tuple[dict[str, Any], np.ndarray] | None:
    """{"folder", "shape", "broken", "brightest"} and the checksums (images,); None if anything is not as written."""
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


# --- opening and building it ----------------------------------------------------------------------------


def open_cache(
    file: Path, images: ImageFolder, shape: tuple[int, ...], stats: np.ndarray
) -> CachedPixels | None:
    """The pixels in `file`; None if there is no such file or it is damaged."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except FileNotFoundError:
        return None
    pixels = CachedPixels(images, shape, stats, file, descriptor)  # which closes the descriptor
    with contextlib.suppress(OSError):  # that it is in use, and when it was last
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.utime(descriptor)
    found = read_footer(descriptor)
    if found is None or found[0]["shape"] not in (list(shape), [shape[0], 1, *shape[2:]]):
        return None
    info, pixels.checksums = found
    pixels.shape = tuple(info["shape"])
    pixels.broken = {int(i): why for i, why in info["broken"].items()}
    pixels.brightest = info["brightest"]
    return pixels


def build_cache(
    images: ImageFolder,
    shape: tuple[int, ...],
    stats: np.ndarray,
    file: Path,
    workers: int,
    problems: dict[int, str],
    room: contextlib.AbstractContextManager[None],
) -> CachedPixels | None:
    """Decode into a temporary file that becomes `file`, whose lock this process has; the pixels in it.

    The disk space is claimed within `room`, which sees to it that there is as much.
    """
    for dead in file.parent.glob(f"{file.stem}.*.tmp"):  # of one that had the lock and was killed
        with contextlib.suppress(OSError):  # another user's
            dead.unlink()
    row_length = math.prod(shape[1:])
    # A name that nobody else can have put a link under, where the folder is open to others.
    temporary = file.with_suffix(f".{os.getpid()}-{secrets.token_hex(4)}.tmp")
    descriptor = None
    try:
        with room:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
            descriptor = os.open(temporary, flags, 0o666)
            # Claim the disk space now, rather than fail after an hour of decoding.
            os.posix_fallocate(descriptor, 0, HEADER_LENGTH + shape[0] * row_length)
        checksums = np.full(shape[0], zlib.crc32(bytes(math.prod(shape[2:]))), "<u4")

        def keep(row: int, planes: np.ndarray) -> None:
            content = planes.tobytes()
            checksums[row] = zlib.crc32(content)
            _write(descriptor, content, HEADER_LENGTH + row * row_length)

        broken, grey, brightest = decode_all(images, shape, stats, workers, problems, keep)
        kept = _settle(descriptor, shape, grey, checksums)
        info = {"folder": str(images.folder), "shape": kept, "broken": broken}
        info["brightest"] = brightest
        _write(descriptor, make_header(kept), 0)
        _write(descriptor, make_footer(kept, checksums, info), HEADER_LENGTH + math.prod(kept))
        os.fsync(descriptor)
        with contextlib.suppress(OSError):  # so that nobody removes it before it is opened
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        temporary.rename(file)
        return open_cache(file, images, shape, stats)
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
