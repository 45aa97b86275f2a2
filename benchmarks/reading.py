"""An epoch of images from the cache against decoding each with Pillow, alternately, medians.

python benchmarks/reading.py --data chest_xray_fullsize [--image-size 224] [--repeats 5]

Both give uint8 batches of 32 of the same images in one shuffled order, one by one thread. "Pillow" is `Image.open`,
`convert` and `resize` of the whole image; "Pillow, draft" decodes as the cache is built: libjpeg at a fraction of
the size, and one channel of images without colour, of which the cache has only one. "first" is the first epoch
of a process, in which the checksum of each image is compared.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from harness import Parser, goals_table, image_folder, table
from PIL import Image
from timed import hardware

import cache_vit
from folder_vit import ImageFolder, read_image_folder
from images_vit import decode_image


def with_pillow(path: Path, size: int) -> np.ndarray:
    """uint8 (3, size, size)."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
    return pixels.transpose(2, 0, 1)


def measure(images: ImageFolder, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of an epoch of each way, `args.repeats` times."""
    size = args.image_size
    order = np.random.default_rng(0).permutation(len(images.names))

    def epoch(read: Callable[[np.ndarray, np.ndarray], None], channels: int) -> float:
        batch = np.empty((32, channels, size, size), np.uint8)
        began = time.perf_counter()
        for first in range(0, len(order), 32):
            rows = order[first : first + 32]
            read(rows, batch[: len(rows)])
        return time.perf_counter() - began

    def decoding(decode: Callable[[Path], np.ndarray]) -> Callable[[np.ndarray, np.ndarray], None]:
        def read(rows: np.ndarray, out: np.ndarray) -> None:
            for row, image in zip(rows, out, strict=True):
                image[:] = decode(images.path(row))

        return read

    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as cache:
        cache_vit.decode_folder(images, size, 3, Path(cache), 2)
        for _ in range(args.repeats):
            pixels = cache_vit.decode_folder(images, size, 3, Path(cache), 2).pixels
            ways = {
                "cache, first": pixels.read,
                "Pillow": decoding(lambda path: with_pillow(path, size)),
                "cache": pixels.read,
                "Pillow, draft": decoding(lambda path: decode_image(path, size, 3)),
            }
            for name, read in ways.items():
                channels = pixels.shape[1] if name.startswith("cache") else 3
                times.setdefault(name, []).append(epoch(read, channels))
    return times


def main(argv: list[str] | None = None) -> int:
    # fmt: off
    parser = Parser(prog="reading.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=image_folder, required=True, metavar="DIR", help="images of full size, with train/ and test/")
    add("--image-size", type=int, default=224, help="(default: %(default)s)")
    add("--repeats", type=int, default=5, help="(default: %(default)s)")
    add("--quick", action="store_true", help="once")
    # fmt: on
    args = parser.parse_args(argv)
    if args.quick:
        args.repeats = 1
    if min(args.image_size, args.repeats) < 1:
        parser.error("--image-size and --repeats are at least 1")
    images = read_image_folder(args.data / "train")
    times = measure(images, args)
    count, size = len(images.names), args.image_size
    print(f"{hardware()}\n\n{count:,} images at {size} x {size}, {args.repeats} repeats\n")
    ratios, rows = {}, []
    for name, values in times.items():
        pairs = zip(times["Pillow"], values, strict=True)
        ratios[name] = statistics.median(pillow / own for pillow, own in pairs)
        rows.append((name, f"{count / statistics.median(values):,.0f}", f"{ratios[name]:.1f}"))
    print(table(("way", "images/s", "times Pillow"), rows))
    what = "an epoch of full-size images from the cache against Pillow"
    print(goals_table([(what, 20, ratios["cache"], args.repeats)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
