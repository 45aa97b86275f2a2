"""What the benchmarks share: their command line, their processes, their tables."""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

# The experiment of the original design. Its dim_head was 64, whatever the width and the heads.
ORIGINAL = {
    "image_size": 300, "patch_num": 10, "dim": 256, "depth": 6, "heads": 8, "dim_head": 64,
    "mlp_dim": 500, "batch_size": 16,
}  # fmt: skip
GOALS_HEAD = ("goal", "wanted", "measured", "n")


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def image_folder(text: str) -> Path:
    """An argparse type: a folder with train/ and test/, each with class folders."""
    folder = Path(text).expanduser().absolute()
    for split in ("train", "test"):
        if not (folder / split).is_dir():
            raise argparse.ArgumentTypeError(
                f"{folder / split} is not a folder; give one with train/ and test/, each with a "
                "folder of images per class (the chest X-rays are doi 10.17632/rscbjbr9sj)"
            )
    return folder


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def goals_table(rows: Sequence[tuple[str, float, float | None, int]]) -> str:
    """The table that run_all.py collects: what, at least how many times, how many times, repeats."""
    cells = (
        (what, f"{wanted:g}", "not measured" if got is None else f"{got:.2f}", n)
        for what, wanted, got, n in rows
    )
    return table(GOALS_HEAD, [*cells])


def run(
    command: Sequence[str], threads: int | None = None, gpu: bool = False, watch: Path | None = None
) -> tuple[float, list[float]]:
    """Seconds from the start of a process to its end, and to each line that it wrote to `watch`.

    Exits with its last line if it fails.
    """
    environment = dict(os.environ)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    if not gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    times: list[float] = []
    with tempfile.TemporaryFile("w+") as messages:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *command], env=environment, stdout=subprocess.DEVNULL, stderr=messages
        )
        try:
            while watch and process.poll() is None:
                lines = watch.read_text().count("\n") if watch.exists() else 0
                times += [time.perf_counter() - began] * (lines - len(times))
                time.sleep(0.05)
            process.wait()
        finally:
            process.kill()
        seconds = time.perf_counter() - began
        messages.seek(0)
        if process.returncode:
            said = messages.read().strip().splitlines() or ["no message"]
            sys.exit(f"{Path(command[0]).name} ended with status {process.returncode}: {said[-1]}")
    return seconds, times
