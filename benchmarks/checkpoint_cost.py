"""What a checkpoint costs beside a training step: medians, alternately in one process.

python benchmarks/checkpoint_cost.py

It writes to the folder it is started in: what fsync costs is a matter of the disk.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from harness import Parser, table
from limits import CONFIGURATIONS
from timed import hardware

import main_vit
import nni_vit
import setup_vit
import step_vit
import utils_vit
from config_vit import resolve

# Name: parameters, and the steps that are measured, each followed by a checkpoint.
MODELS = {
    "digits, found by the search": ("-s 16 -p 8 -ch 1 -vd 48 -d 3 -vh 4 -mlpd 128", 40),
    "the original": (CONFIGURATIONS["the original"], 20),
    "ViT-S/16 at 224": (CONFIGURATIONS["ViT-S/16 at 224"], 12),
}
HEAD = (
    *("model", "parameters", "n", "step, ms", "checkpoint, ms", "disk", "file, MB"),
    *("one a minute", "one every 100 steps"),
)


def measure(options: str, n: int) -> tuple[str, ...]:
    """A row of the table but for its name."""
    args = resolve(main_vit.make_parser(), [*options.split(), "--num-classes", "2"])
    device = setup_vit.choose_device(args, nni_vit.Trial(asked=False))
    state = setup_vit.make_state(args, device)
    images = torch.randn(args.batch_size, args.channel, args.image_size, args.image_size)
    images, targets = images.to(device), (torch.arange(args.batch_size) % 2).to(device)
    steps, checkpoints, disk, waits = [], [], [], []
    fsync = os.fsync

    def timed_fsync(descriptor: int) -> None:
        began = time.perf_counter()
        fsync(descriptor)
        waits.append(time.perf_counter() - began)

    with tempfile.TemporaryDirectory(dir=".") as folder, mock.patch("os.fsync", timed_fsync):
        saver = utils_vit.Saver(Path(folder), {}, None, None)
        for i in range(n + 4):
            waits.clear()
            began = time.perf_counter()
            step_vit.training_step(state, images, targets, args)
            if device.type == "cuda":
                torch.cuda.synchronize()
            saved = time.perf_counter()
            saver.save(state, is_best=i % 4 == 0)
            if i >= 4:  # after the first ones, in which memory is set up
                steps.append(saved - began)
                checkpoints.append(time.perf_counter() - saved)
                disk.append(sum(waits))
        size = saver.file.stat().st_size / 1e6
    step, checkpoint = statistics.median(steps), statistics.median(checkpoints)
    parameters = sum(p.numel() for p in state.model.parameters())
    return (
        f"{parameters:,}", str(n), f"{1000 * step:.1f}", f"{1000 * checkpoint:.1f}",
        f"{statistics.median(disk) / checkpoint:.0%}", f"{size:.1f}",
        f"{checkpoint / 60:.2%}", f"{checkpoint / (100 * step):.2%}",
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="checkpoint_cost.py", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the smallest model, 4 steps")
    args = parser.parse_args(argv)
    rows = [
        (name, *measure(options, 4 if args.quick else n))
        for name, (options, n) in [*MODELS.items()][: 1 if args.quick else None]
    ]
    print(
        f"{hardware()}\n\nMedians of n steps, every one followed by a checkpoint with its checksum, "
        'every fourth by that of the best too; "disk" is the part of it that waits for fsync.\n'
    )
    print(table(HEAD, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
