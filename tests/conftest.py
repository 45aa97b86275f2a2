"""Small folders of real images, and main_vit.py run in this process or in one of its own."""

import contextlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What a CPU computes is compared to the bit. test_on_gpu.py gets the GPUs back, in pytest-xdist's workers too.
os.environ.setdefault("GPUS_OF_TESTS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# As in an activated environment: --check looks for the program of a trialCommand.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

import numpy as np
import pytest
import torch
from PIL import Image

import main_vit

REPOSITORY = Path(__file__).resolve().parents[1]
COLORS = {"cat": (200, 60, 60), "dog": (60, 200, 60), "eel": (60, 60, 200)}


@dataclass(frozen=True)
class Result:
    """How one call of main_vit.py ended; it ran in the folder `cwd`."""

    status: int  # as subprocess reports it: negative is a signal
    stdout: str
    stderr: str
    cwd: Path


def write_images(
    folder: Path, classes: list[str], count: int, seed: int = 0, noise: float = 20
) -> Path:
    """`count` noisy 12x12 images of one colour a class in `folder`/<class>/; returns `folder`."""
    generator = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = generator.normal(COLORS[name], noise, (12, 12, 3)).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="session")
def make_images() -> Callable[..., Path]:
    """make_images(folder, ["cat", "dog"], 20) writes a folder of class folders."""
    return write_images


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """train/ with 20 and test/ with 10 images of each of two classes that are easy to tell apart."""
    write_images(tmp_path / "images" / "train", ["cat", "dog"], 20, seed=1)
    write_images(tmp_path / "images" / "test", ["cat", "dog"], 10, seed=2)
    return tmp_path / "images"


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home folder of all runs: caches of images and of matplotlib's fonts go there, not to ours."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def run_main(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Callable[..., Result]:
    """run_main("--epochs", 1, ...) runs main_vit.py in a folder of its own, `process=True` as a process."""

    def run(*args: Any, process: bool = False, cwd: Path | None = None) -> Result:
        cwd = cwd or tmp_path_factory.mktemp("cwd")
        argv = [str(arg) for arg in args]
        if process:
            command = [sys.executable, str(REPOSITORY / "main_vit.py"), *argv]
            env = {**os.environ, "HOME": str(home)}
            done = subprocess.run(
                command, env=env, cwd=cwd, capture_output=True, text=True, timeout=120
            )
            return Result(done.returncode, done.stdout, done.stderr, cwd)
        out, err = io.StringIO(), io.StringIO()
        with (
            pytest.MonkeyPatch.context() as patch,
            process_state(),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            patch.setenv("HOME", str(home))
            patch.chdir(cwd)
            status = main_vit.main(argv)
        return Result(status, out.getvalue(), err.getvalue(), cwd)

    return run


@contextlib.contextmanager
def process_state() -> Iterator[None]:
    """Puts back what a run changes in its process: signal handlers, log handlers, threads."""
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    root, threads = logging.getLogger(), torch.get_num_threads()
    before, level = root.handlers[:], root.level
    root.handlers[:] = []  # else logging.basicConfig(force=True) would close pytest's own
    try:
        yield
    finally:
        root.handlers[:] = before
        root.setLevel(level)
        torch.set_num_threads(threads)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


@pytest.fixture(scope="session")
def start_main(
    tmp_path_factory: pytest.TempPathFactory, home: Path
) -> Callable[..., contextlib.AbstractContextManager[subprocess.Popen]]:
    """`with start_main(...) as process:` starts main_vit.py with pipes; it is ended on leaving."""

    @contextlib.contextmanager
    def start(*args: Any) -> Iterator[subprocess.Popen]:
        command = [sys.executable, str(REPOSITORY / "main_vit.py"), *map(str, args)]
        with subprocess.Popen(
            command,
            env={**os.environ, "HOME": str(home)},
            cwd=tmp_path_factory.mktemp("cwd"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    return start


@pytest.fixture(scope="session")
def read_lines() -> Callable[[Path], list[dict[str, Any]]]:
    """read_lines(folder) is the metrics.jsonl of a run, without the two measurements of time."""

    def read(folder: Path) -> list[dict[str, Any]]:
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [
            {k: v for k, v in line.items() if k not in ("seconds", "images_per_second")}
            for line in lines
        ]

    return read
