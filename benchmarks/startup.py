"""Where the first seconds of a run go, and how they grow with the number of images.

python benchmarks/startup.py [--data chest_xray] [--growth 5000 50000 500000 1000000]

The first table is of a second run on the same images, alternately with a process that imports torch and
torchvision; a run imports no torchvision. The other one is of real, empty files in a temporary folder and of a
cache of 1 x 1 pixels in the place of theirs; what follows, in a run, does not depend on the number of images.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from harness import REPOSITORY, Parser, goals_table, image_folder, table
from timed import hardware

import cache_file_vit
import cache_vit
from demo_vit import DEMO_FOLDER
from folder_vit import read_image_folder

# Prints what it has done since the process began, in seconds; it ends before the first step would be over.
RUN = """
import json, os, sys, time
ticks = int(open("/proc/self/stat").read().rpartition(")")[2].split()[19])
began = time.time() - float(open("/proc/uptime").read().split()[0]) + ticks / os.sysconf("SC_CLK_TCK")
parts, last = {}, began
def part(name):
    global last
    now = time.time()
    parts[name] = parts.get(name, 0) + now - last
    last = now
def after(module, function, name):
    whole = getattr(module, function)
    def wrapped(*args, **kwargs):
        value = whole(*args, **kwargs)
        part(name)
        return value
    setattr(module, function, wrapped)
part("Python")
import torch
part("import torch")
import numpy, PIL.Image, yaml, tqdm
part("import numpy, Pillow, yaml, tqdm")
import main_vit, data_vit, setup_vit, step_vit
part("import of this project")
after(main_vit, "resolve", "command line")
after(setup_vit, "choose_device", "device, cores")
after(setup_vit, "output_folder", "output folder")
after(data_vit, "read_image_folder", "list the images")
after(data_vit, "decode_folder", "open the cache")
after(setup_vit, "open_images", "split")
import vit
after(vit, "build_model", "model")
after(setup_vit, "make_state", "optimizer")
def first_step(*args):
    part("log, first batch")
    print("PARTS", json.dumps(parts), flush=True)
    os._exit(0)
step_vit.training_step = first_step
main_vit.main(sys.argv[1:])
"""
BASE = """
import json, os, time
ticks = int(open("/proc/self/stat").read().rpartition(")")[2].split()[19])
began = time.time() - float(open("/proc/uptime").read().split()[0]) + ticks / os.sysconf("SC_CLK_TCK")
import torch, torchvision
print("PARTS", json.dumps({"base": time.time() - began}))
"""
NNI = """
import json, time
import torch, nni_vit
began = time.time()
nni_vit.trial_module()
import requests
print("PARTS", json.dumps({"base": time.time() - began}))
"""


def parts_of(code: str, place: str, *argv: str) -> dict[str, float]:
    """What a process that runs `code` in the folder `place` says of its time, in seconds."""
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], cwd=place,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("PARTS ")]
    if not lines:
        raise SystemExit(f"a run ended with status {done.returncode}: {done.stderr.strip()[-300:]}")
    return json.loads(lines[0].removeprefix("PARTS "))


def first_seconds(data: Path | None, repeats: int) -> None:
    """Prints the table of a second run, and the goal."""
    runs, bases, nnis = [], [], []
    with tempfile.TemporaryDirectory() as place:
        argv = ["--cache-dir", "cache", *(("--download-dir", str(data)) if data else ())]
        for i in range(repeats + 1):
            run = parts_of(RUN, place, *argv, "--model-dir", str(i))
            base, nni = parts_of(BASE, place)["base"], parts_of(NNI, place)["base"]
            if i:  # the first one decodes
                runs.append(run)
                bases.append(base)
                nnis.append(nni)
        images = len(read_image_folder((data or Path(place, DEMO_FOLDER)) / "train").names)
    whole = [sum(run.values()) for run in runs]
    beyond = [a - b for a, b in zip(whole, bases, strict=True)]
    rows = {name: [run[name] for run in runs] for name in runs[0]}
    rows |= {
        "**all, to the first step**": whole,
        "a process that imports torch and torchvision": bases,
        "**beyond that**": beyond,
        "nni.trial and requests, under NNI only": nnis,
    }
    medians = [(name, f"{statistics.median(values):.3f}") for name, values in rows.items()]
    print(f"{images:,} images in train/, {repeats} runs\n")
    print(table(("part of a second run", "seconds"), medians))
    what = "second trial, 0.5 s over its time before the first step beyond the imports"
    # A run can be at its first step before torchvision would be imported: then 10 times.
    seconds = max(statistics.median(beyond), 0.05)
    print(goals_table([(f"{what} ({images:,} images)", 1, 0.5 / seconds, repeats)]))


def growth(counts: list[int]) -> None:
    """Prints what listing and opening take for each number of images."""
    rows = []
    for count in counts:
        with tempfile.TemporaryDirectory() as place:
            rows.append(growth_row(count, Path(place)))
    head = ("images", "list, s", "sizes and times, s", "open the cache, s", "memory, MB")
    print(table(head, rows))


def growth_row(count: int, place: Path) -> tuple[str, ...]:
    folder = place / "data"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for i in range(count // 2):
            os.close(os.open(folder / name / f"image-{i:07}.jpg", os.O_CREAT | os.O_WRONLY))
    before = resident()
    began = time.perf_counter()
    images = read_image_folder(folder)
    listed = time.perf_counter()
    file = cache_vit.place_of(images, 1, 1, place)[0]
    known = time.perf_counter()
    shape = (len(images.names), 1, 1, 1)
    checksums = np.full(len(images.names), 0xD202EF8D, "<u4")  # CRC-32 of one byte 0
    info = {"folder": str(folder), "shape": shape, "broken": {}, "brightest": 0}
    content = cache_file_vit.make_header(shape) + bytes(len(images.names))
    file.write_bytes(content + cache_file_vit.make_footer(shape, checksums, info))
    del content, checksums
    opening = time.perf_counter()
    decoded = cache_vit.decode_folder(images, 1, 1, place, 1)
    opened = time.perf_counter() - opening - (known - listed)
    if decoded.built:
        raise SystemExit("the cache was not found")
    times = (listed - began, known - listed, max(0, opened))
    return (f"{count:,}", *(f"{t:.3f}" for t in times), f"{resident() - before:,.0f}")


def resident() -> float:
    """MB of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1000


def main(argv: list[str] | None = None) -> int:
    # fmt: off
    parser = Parser(prog="startup.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=image_folder, metavar="DIR", help="with train/ and test/ (default: the digits demo)")
    add("--repeats", type=int, default=5, help="of a second run (default: %(default)s)")
    add("--growth", type=int, nargs="+", metavar="IMAGES", default=[5_000, 50_000, 500_000, 1_000_000], help="(default: %(default)s)")
    add("--quick", action="store_true", help="one second run, up to 10,000 images")
    # fmt: on
    args = parser.parse_args(argv)
    if args.quick:
        args.repeats, args.growth = 1, [1_000, 10_000]
    if args.repeats < 1 or min(args.growth) < 2:
        parser.error("--repeats is at least 1, --growth at least 2")
    print(f"{hardware()}\n")
    first_seconds(args.data, args.repeats)
    growth(args.growth)
    return 0


if __name__ == "__main__":
    sys.exit(main())
