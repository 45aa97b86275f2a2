"""Files that are written whole or not at all."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def replace_file(filename: Path, content: bytes | memoryview) -> None:
    """Write a file atomically and durably: temporary file in the same folder, fsync, rename, fsync."""
    temporary = filename.with_name(f".{filename.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, filename)
    except OSError as error:
        error.filename = error.filename or str(filename)  # a full disk names none
        with suppress(OSError):  # the folder may be read-only or gone by now
            temporary.unlink()
        raise
    folder = os.open(filename.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, atomically. `source` is later replaced, never rewritten."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


@contextmanager
def full_disk_of(folder: Path) -> Iterator[None]:
    """Names `folder` in the error of a full disk, for which the system names no file."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:
            error.filename = str(folder)
        raise


def json_object(text: bytes) -> dict[str, Any]:
    """What a JSON text holds; nothing if it was damaged by a crash or by hand."""
    with suppress(ValueError):
        if isinstance(content := json.loads(text), dict):
            return content
    return {}
