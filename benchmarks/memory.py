"""Memory of one and of two runs against the number of images: 1, 4 and 16 times as many.

python benchmarks/memory.py [--images 200] [--image-size 224]

Each process goes through the cache, two epochs of the most images and as many batches of fewer, the first
20 through a small model. PSS, of /proc/PID/smaps_rollup, counts a page that several processes share in parts; the pages of the cache are the
kernel's, shared by all, and count nowhere.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from harness import REPOSITORY, Parser, goals_table, table
from PIL import Image
from timed import hardware

TIMES = (1, 4, 16)
PROCESS = """
import json, sys
from pathlib import Path
import setup_vit, main_vit, nni_vit, step_vit
from config_vit import resolve
args = resolve(main_vit.make_parser(), sys.argv[2:])
device = setup_vit.choose_device(args, nni_vit.Trial(asked=False))
data = setup_vit.open_images(args)
state = setup_vit.make_state(args, device)
for state.epoch in range(int(sys.argv[1])):
    for images, targets, soft in main_vit.epoch_batches(state, data.train, args, device):
        if state.step < 20:
            step_vit.training_step(state, images, targets, args, soft)
print("ready", flush=True)
sys.stdin.readline()
def kilobytes(file, name):
    return int(Path(file).read_text().split(name + ":")[1].split()[0])
print(json.dumps({
    "pss": kilobytes("/proc/self/smaps_rollup", "Pss") / 1000,
    "peak": kilobytes("/proc/self/status", "VmHWM") / 1000,
}))
"""


def write_images(folder: Path, count: int, size: int) -> None:
    """`count` images of noise, half of them in each of two classes."""
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
    for i in range(count):
        file = folder / "ab"[i % 2] / f"{i:06}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.roll(pixels, i, axis=0)).save(file, quality=50)


def measure(folder: Path, size: int, processes: int, epochs: int) -> list[dict[str, float]]:
    """PSS and peak in MB of so many processes that have the images open at the same time."""
    options = f"-s {size} -p 16 -vd 64 -d 2 -vh 2 -mlpd 64 -b 16 --threads 1"
    command = [sys.executable, "-c", PROCESS, str(epochs), *options.split()]
    command += ["--download-dir", str(folder), "--cache-dir", str(folder.parent / "cache")]
    running = [
        subprocess.Popen(
            command, cwd=REPOSITORY,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(processes)
    ]  # fmt: skip
    for process in running:
        if process.stdout.readline() != "ready\n":
            raise SystemExit("a process has failed")
    with ThreadPoolExecutor(processes) as pool:  # all of them are still there
        return [json.loads(out) for out, _ in pool.map(lambda p: p.communicate("\n"), running)]


def measure_times(
    times: int, args: argparse.Namespace
) -> tuple[list[float], tuple[str, str, str, str, str]]:
    """PSS in MB of one process, `args.repeats` times, and the row of the table."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "data")
        write_images(folder, args.images * times, args.image_size)
        epochs = 2 * TIMES[-1] // times
        measure(folder, args.image_size, 1, epochs)  # decodes
        ones = [measure(folder, args.image_size, 1, epochs)[0] for _ in range(args.repeats)]
        two = measure(folder, args.image_size, 2, epochs)
        cache = sum(file.stat().st_size for file in Path(place, "cache").glob("*.npy")) / 1e6
    each = " and ".join(f"{process['pss']:.0f}" for process in two)
    sizes = [one["pss"] for one in ones]
    peak = max(one["peak"] for one in ones)
    pss = f"{statistics.median(sizes):.0f}"
    return sizes, (f"{args.images * times:,}", f"{cache:,.0f}", pss, f"{peak:.0f}", each)


def main(argv: list[str] | None = None) -> int:
    # fmt: off
    parser = Parser(prog="memory.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--images", type=int, default=200, help="1 times (default: %(default)s)")
    add("--image-size", type=int, default=224, help="(default: %(default)s)")
    add("--repeats", type=int, default=3, help="(default: %(default)s)")
    add("--quick", action="store_true", help="40 images, once")
    # fmt: on
    args = parser.parse_args(argv)
    if args.quick:
        args.images, args.repeats = 40, 1
    if args.images < 20 or args.image_size < 16 or args.image_size % 16 or args.repeats < 1:
        parser.error("--images is at least 20, --image-size a multiple of 16, --repeats at least 1")
    print(f"{hardware()}\n")
    found = [measure_times(times, args) for times in TIMES]
    head = ("images", "cache, MB", "PSS of one, MB", "peak of one, MB", "PSS of each of two, MB")
    print(table(head, [row for _, row in found]))
    once, most = (statistics.median(found[i][0]) for i in (0, -1))
    what = "resident memory (PSS) of 1x the images over that of 16x"
    print(goals_table([(what, 0.95, once / most, args.repeats)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
