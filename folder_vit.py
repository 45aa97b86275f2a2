"""The images of a folder: their list by class, and what cannot be read of it."""

import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

IMAGE_EXTENSIONS = {
    ".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2",
    ".tga",
}  # fmt: skip
LARGEST_FILE = 2**30  # bytes


class DataError(ValueError):
    """A data folder that cannot be trained on; the text is one line with the remedy."""

    def __init__(self, text: str) -> None:
        super().__init__(printable(text))


class ImageLost(DataError):
    """An image that was there at the start of training; of several processes this one alone may know it."""


def printable(text: str) -> str:
    """One line for a log or terminal: file names may hold line feeds, escape codes or any bytes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def in_one_line(message: object) -> str:
    """`printable`, less the middle of one that quotes a value of thousands of digits."""
    text = printable(str(message))
    return text if len(text) <= 1100 else f"{text[:540]} ... {text[-540:]}"


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
    """Whether it is a folder. Raises DataError for a link to nowhere, whose class or split would be missed."""
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


def sizes_and_times(images: ImageFolder) -> tuple[np.ndarray, dict[int, str]]:
    """Each file's size and modification time, int64 (images, 2), and why some cannot be read, by index."""
    stats = np.empty((len(images.names), 2), np.int64)
    problems = {}
    folder = str(images.folder)
    for i, name in enumerate(images.names):
        *stats[i], problem = size_time_problem(os.path.join(folder, name))
        if problem:
            problems[i] = problem
    return stats, problems


def check_classes(images: ImageFolder, broken: dict[int, str]) -> None:
    """Raises DataError if all images of a class are `broken` (index: why)."""
    left = np.bincount(np.delete(images.targets, list(broken)), minlength=len(images.classes))
    for number in np.flatnonzero(left == 0):
        first = next(i for i in sorted(broken) if images.targets[i] == number)
        raise DataError(
            f"class folder {images.folder / images.classes[number]} has no image that can be decoded: "
            f"{images.path(first)} ({broken[first]}), ..."
        )
