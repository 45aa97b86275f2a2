"""What a checkpoint costs beside a training step: medians, alternately in one process.

python benchmarks/checkpoint_cost.py
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch
from timed import hardware

import main_vit
import setup_vit
import utils_vit
from config_vit import resolve

MODELS = {
    "digits, found by the search": "-s 16 -p 8 -ch 1 -vd 48 -d 3 -vh 4 -mlpd 128",
    "chest X-rays, the original": "-s 300 -pn 10 -vd 256 -d 6 -vh 8 -mlpd 500 -b 16",
    "ViT-S/16 at 224": "-s 224 -p 16 -vd 384 -d 12 -vh 6 -mlpd 1536 -b 16",
}


def main() -> None:
    print(hardware())
    print("| model | parameters | step, ms | checkpoint, ms | file, MB | one a minute costs |")
    print("|---|---|---|---|---|---|")
    for name, options in MODELS.items():
        args = resolve(main_vit.make_parser(), [*options.split(), "--num-classes", "2"])
        device = setup_vit.choose_device(args, None)
        state = setup_vit.make_state(args, device)
        images = torch.randn(args.batch_size, args.channel, args.image_size, args.image_size)
        targets = torch.arange(args.batch_size) % 2
        times: dict[str, list[float]] = {"step": [], "checkpoint": []}
        with tempfile.TemporaryDirectory(dir=".") as folder:
            saver = utils_vit.Saver(Path(folder), {}, None, None)
            for i in range(24):
                began = time.perf_counter()
                main_vit.training_step(state, images.to(device), targets.to(device), args)
                saved = time.perf_counter()
                saver.save(state, is_best=i % 4 == 0)
                if i >= 4:  # after the first ones, in which memory is set up
                    times["step"].append(saved - began)
                    times["checkpoint"].append(time.perf_counter() - saved)
            size = saver.file.stat().st_size / 1e6
        step, checkpoint = (1000 * statistics.median(times[key]) for key in times)
        parameters = sum(p.numel() for p in state.model.parameters())
        print(
            f"| {name} | {parameters:,} | {step:.1f} | {checkpoint:.1f} | {size:.1f} "
            f"| {checkpoint / 60_000:.2%} |"
        )


if __name__ == "__main__":
    main()
