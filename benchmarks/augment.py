"""Augmentation of a batch against a loop of torchvision's v2 transforms over its samples, alternately.

python benchmarks/augment.py [--threads N]

Both start from the same uint8 tensors on the device that trains and end with float32 in [-1, 1];
torchvision crops without antialiasing, its faster way.
On the CPU (results.md) the batch is 8 to 29 times as fast for small images and 1.0 to 2.9 times for large
ones; what torchvision lacks there is a draw that follows from the sample. No GPU was measured.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from harness import Parser, table
from timed import hardware

from augment_vit import Augmentation, Epoch

OPTIONS = {
    "crop, flip": {"crop": 0.3, "flip": "horizontal"},
    "crop, flip, affine": {"crop": 0.3, "flip": "horizontal", "affine": 0.2},
    "color": {"color": 0.4},
    "RandAugment": {"randaugment": 9},
    "all but mixing": {
        **{"crop": 0.3, "flip": "horizontal", "color": 0.4, "randaugment": 9, "erase": 0.25},
    },
}


def loop_of(options: dict[str, Any], size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same by torchvision: the fastest order of its own references, uint8 as long as possible."""
    from torchvision.transforms import InterpolationMode, v2

    bilinear, steps = InterpolationMode.BILINEAR, []
    if "crop" in options:
        steps.append(v2.RandomResizedCrop(size, (options["crop"], 1), antialias=False))
    if "flip" in options:
        steps.append(v2.RandomHorizontalFlip())
    if share := options.get("affine"):
        steps.append(
            v2.RandomAffine(
                45 * share, (share / 2, share / 2), (2**-share, 2**share), interpolation=bilinear
            )
        )
    if share := options.get("color"):
        steps.append(v2.ColorJitter(share, share, share))
    if magnitude := options.get("randaugment"):
        steps.append(
            v2.RandAugment(magnitude=magnitude, num_magnitude_bins=11, interpolation=bilinear)
        )
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
    if "erase" in options:
        steps.append(v2.RandomErasing(options["erase"]))
    transform = v2.Compose(steps)
    return lambda images: torch.stack([transform(image) for image in images])


def compare(options: dict[str, Any], images: torch.Tensor, repeats: int) -> tuple[float, float]:
    """Milliseconds that a batch takes here and in torchvision's loop, medians of turns."""
    batch, size = len(images), images.shape[-1]
    loop, positions = loop_of(options, size), np.arange(batch)
    epoch = Epoch(Augmentation(**options), batch, size, 0)
    ways = (lambda: epoch.show(images, positions), lambda: loop(images))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 2):
        for own, work in zip(times, ways, strict=True):
            began = time.perf_counter()
            work()
            if images.device.type == "cuda":
                torch.cuda.synchronize()
            own.append(1000 * (time.perf_counter() - began))
    # After the first ones, in which memory is set up.
    ours, theirs = (statistics.median(own[2:]) for own in times)
    return ours, theirs


def main(argv: list[str] | None = None) -> int:
    # fmt: off
    parser = Parser(prog="augment.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    add("--repeats", type=int, default=15, help="(default: %(default)s)")
    add("--quick", action="store_true", help="once")
    # fmt: on
    args = parser.parse_args(argv)
    if min(args.threads, args.repeats) < 1:
        parser.error("--threads and --repeats are at least 1")
    if args.quick:
        args.repeats = 1
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    began = time.perf_counter()
    import torchvision.transforms.v2  # noqa: F401

    print(
        f"{hardware()}, {args.threads} threads, {args.repeats} repeats\n\n"
        f"Importing torchvision.transforms.v2 after torch: {time.perf_counter() - began:.1f} s\n"
    )
    rows = []
    for batch, size in ((32, 224), (128, 32)):
        pixels = np.random.default_rng(0).integers(0, 256, (batch, 3, size, size), np.uint8)
        images = torch.from_numpy(pixels).to(device)
        for name, options in OPTIONS.items():
            ours, theirs = compare(options, images, args.repeats)
            what = f"{batch} of {size} x {size}"
            rows.append((name, what, f"{ours:.1f}", f"{theirs:.1f}", f"{theirs / ours:.1f}"))
    print(table(("augmentation", "images", "batch, ms", "loop of torchvision, ms", "ratio"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
