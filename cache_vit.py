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
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL

from cache_file_vit import CACHE_FORMAT, build_cache, open_cache, read_footer
from folder_vit import DataError, ImageFolder, printable, sizes_and_times
from images_vit import DecodedImages, decode_here
from machine_vit import available_memory

MODES = ("disk", "memory", "off")
# Files of pixels and, while they are built, temporary ones. The folder may hold others that are not ours.
OWN_FILES = re.compile(r"[0-9a-f]{32}(\.npy|\.\d+-[0-9a-f]{8}\.tmp)")
log = logging.getLogger("vit.cache")


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

    The cache file belongs to the folder, its list of (path, size, modification time), the image size
    and channels, and Pillow's version; where no image has colour, it holds one channel, which stands
    for all. (Two files that swap names and agree in size and time are not noticed; the time of change
    would tell, and would build it again after every copy of the folder.) Of processes that need the
    same one at once, one builds it and the others wait. While it is built it takes the space of all
    channels. Nothing is kept if files that were listed cannot be read then, or have changed. With a
    `limit` in bytes, files that no run has open make room, the least recently used first. "memory"
    decodes into this process's own memory; "off" keeps nothing but what is broken. Raises DataError on
    what cannot be read, if the cache folder cannot be written, or the disk, the limit or the memory has
    no room.
    """
    file, stats, problems = place_of(images, size, channels, cache_dir)
    shape = (len(images.names), channels, size, size)
    if mode == "memory" and math.prod(shape) > (available := available_memory()):
        raise DataError(
            f"--cache memory: the decoded images of {images.folder} take {math.prod(shape) / 1e9:,.2f} GB, "
            f"and {available / 1e9:,.2f} GB are free: leave it out, and they are kept on disk"
        )
    if mode != "disk":
        return decode_here(images, shape, stats, workers, mode, problems)
    try:
        pixels, built = open_cache(file, images, shape, stats), False
        if pixels is None:
            cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)  # as private as the images
            _remove_leftovers(cache_dir)
            with _locked(file.with_suffix(".lock")):
                pixels = open_cache(file, images, shape, stats)
                if pixels is None:
                    needed = shape[0] * (math.prod(shape[1:]) + 4)  # with a checksum for each
                    room = _room(cache_dir, needed, limit, images.folder)
                    pixels = build_cache(images, shape, stats, file, workers, problems, room)
                    built = True
        if pixels is None:
            raise OSError("it is damaged as soon as it is written")
    except OSError as error:
        raise DataError(
            f"the cache of decoded images cannot be kept in {cache_dir}: {error.strerror or error}; "
            "make room there, give --cache-dir another folder, or --cache off"
        ) from None
    return DecodedImages(pixels, pixels.broken, pixels.brightest, file, built)


def place_of(
    images: ImageFolder, size: int, channels: int, cache_dir: Path
) -> tuple[Path, np.ndarray, dict[int, str]]:
    """The cache file that belongs to the images as they are now, and their `sizes_and_times`."""
    stats, problems = sizes_and_times(images)
    decoder = [CACHE_FORMAT, PIL.__version__]  # another may read what this one cannot
    digest = hashlib.sha256(json.dumps([*decoder, size, channels, problems]).encode())
    # Copies of one archive can agree in every name, size and time, and not in their images.
    place = os.path.realpath(images.folder)
    digest.update("\0".join([place, *images.names]).encode(errors="surrogateescape"))
    digest.update(stats.tobytes())
    return cache_dir / f"{digest.hexdigest()[:32]}.npy", stats, problems


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
    """Remove what was not used for longest until `needed` bytes fit the limit. Raises DataError, also if the
    disk is too small: to find that out by claiming it would take what is left from others.
    """
    if limit is None:
        _check_disk(cache_dir, needed, folder)
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
        _check_disk(cache_dir, needed, folder)
        yield


def _check_disk(cache_dir: Path, needed: int, folder: Path) -> None:
    disk = shutil.disk_usage(cache_dir)
    if disk.total and needed > disk.free:  # some file systems of networks know neither
        raise DataError(
            f"the decoded images of {folder} take {needed / 1e9:,.3g} GB, and {cache_dir} has "
            f"{disk.free / 1e9:,.3g} GB free: make room there, give --cache-dir another folder or a smaller "
            "--image-size, or --cache off"
        )


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
    """List or clear; returns the exit status, 1 if a NAME is not there or could not be removed, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="cache_vit.py", description=__doc__.splitlines()[0])
    parser.add_argument("command", nargs="?", choices=("list", "clear"), default="list")
    parser.add_argument(
        "names", nargs="*", type=not_empty, metavar="NAME", help="as listed; all without one"
    )
    parser.add_argument("--cache-dir", type=Path, metavar="DIR", default=default_folder())
    args = parser.parse_args(argv)
    args.cache_dir = Path(os.path.expanduser(args.cache_dir))
    if not args.cache_dir.is_dir() and args.cache_dir != default_folder():
        what = "is not a folder" if args.cache_dir.exists() else "does not exist"
        error = f"cache folder {args.cache_dir} {what}"
        print(printable(f"cache_vit.py: error: {error}"), file=sys.stderr)
        return 2
    files = sorted(own_files(args.cache_dir, ".npy"), key=last_use)
    status, lines = 0, []
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
        lines.append(line)
    if args.command == "clear" and not args.names:
        _remove_leftovers(args.cache_dir)
    try:
        # All is removed by now: a reader that stops early, as head does, ends this.
        for line in lines:
            print(line)
        sys.stdout.flush()
    except OSError as error:  # a full disk
        print(f"cache_vit.py: the list cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    return status


def not_empty(name: str) -> str:
    """An argparse type: an empty name, of a variable that the shell does not know, would stand for all."""
    if not name:
        raise argparse.ArgumentTypeError("an empty name")
    return name


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
            status, found = os.fstat(content.fileno()), read_footer(content.fileno())
    except OSError as error:  # another user's, or gone meanwhile
        return printable(f"{file.stem[:8]}  cannot be read: {error.strerror}")
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(status.st_mtime))
    what = "damaged or of another version"
    if found:
        images, channels, size, _ = found[0]["shape"]
        what = f"{images:,} images {size} x {size} x {channels} of {found[0]['folder']}"
    return printable(f"{file.stem[:8]}  {used}  {status.st_size / 1e6:,.1f} MB  {what}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # cache_vit.py | head
    sys.exit(main())
