"""One trial of the original experiment in three ways, alternately, each as a process of its own.

python benchmarks/compare.py --data chest_xray

The original's way (way_original.py), timm's (way_timm.py) and this project's, each in the settings
named in the table: same images, model and batch, Adam without clipping, evaluation after every epoch, and one
rule for precision: float32 in the original's way, as it was; for the others that in which main_vit.py
computes fastest on the device. Of the settings of one way the fastest counts.
"""

import argparse
import importlib.util
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from harness import ORIGINAL, REPOSITORY, Parser, goals_table, image_folder, run, table

FULL = (5216, 5)  # training images and epochs of the original experiment
# A model that takes no time.
QUICK = {**ORIGINAL, "image_size": 32, "patch_num": 4, "dim": 32, "depth": 1, "mlp_dim": 32}
LR = "5e-4"
COMPILED = "timm, compiled"


def subset(data: Path, folder: Path, images: int) -> tuple[int, int]:
    """Copy evenly chosen images to folder/train and an eighth as many of test/ to folder/val."""
    counts = []
    for split, name, wanted in (("train", "train", images), ("test", "val", max(images // 8, 8))):
        files = sorted(path for path in (data / split).glob("*/*") if path.is_file())
        # Evenly over the sorted names, so that the classes keep their shares.
        chosen = [
            files[i * len(files) // min(wanted, len(files))] for i in range(min(wanted, len(files)))
        ]
        for path in chosen:
            target = folder / name / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        counts.append(len(chosen))
    return counts[0], counts[1]


class Trial:
    """One way in one setting, run again and again."""

    def __init__(self, name: str, way: str, options: tuple[str, ...] = ()) -> None:
        self.name, self.way, self.options = name, way, options
        self.walls: list[float] = []  # seconds, whole processes
        self.epochs: list[float] = []  # seconds, one later epoch with its evaluation
        self.rates: list[float] = []  # images/s of training in the last epoch
        self.accuracy = self.parameters = 0.0

    def run(self, folder: Path, size: dict[str, int], args: argparse.Namespace) -> None:
        """Start the process once; the images are in folder/images."""
        out = folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        if self.name.endswith("cold"):
            shutil.rmtree(folder / "cache", ignore_errors=True)
        command = (self.ours if self.way == "ours" else self.others)(folder, size, args)
        metrics = out / "metrics.jsonl"
        wall, times = run([*command, *self.options], args.threads, args.device == "cuda", metrics)
        last = json.loads(metrics.read_text().splitlines()[-1])
        self.walls.append(wall)
        self.epochs += [later - earlier for earlier, later in itertools.pairwise(times)]
        self.rates.append(last["images_per_second"])
        results = out / "results.json"
        self.accuracy = last.get("accuracy") or last["val_accuracy"]
        self.parameters = (
            json.loads(results.read_text())["model_parameters"]
            if self.way == "ours"
            else last["parameters"]
        )

    def ours(self, folder: Path, size: dict[str, int], args: argparse.Namespace) -> list[str]:
        return [
            str(REPOSITORY / "main_vit.py"), "--download-dir", str(folder / "images"),
            "--image-size", str(size["image_size"]), "--patch-num", str(size["patch_num"]),
            "--vt-dim", str(size["dim"]), "--vt-depth", str(size["depth"]),
            "--vt-heads", str(size["heads"]), "--dim-head", str(size["dim_head"]),
            "--mlp-dim", str(size["mlp_dim"]), "--batch-size", str(size["batch_size"]),
            "--optimizer", "adam", "--lr", LR, "--scheduler", "constant", "--clip-grad", "0",
            "--epochs", str(args.epochs), "--model-dir", str(folder / "out"),
            "--cache-dir", str(folder / "cache"),
            *(("--threads", str(args.threads)) if args.threads else ()),
        ]  # fmt: skip

    def others(self, folder: Path, size: dict[str, int], args: argparse.Namespace) -> list[str]:
        return [
            str(REPOSITORY / "benchmarks" / f"way_{self.way}.py"), "--data", str(folder / "images"),
            "--model", json.dumps(size), "--epochs", str(args.epochs), "--device", args.device,
            "--lr", LR, "--out", str(folder / "out" / "metrics.jsonl"),
        ]  # fmt: skip

    def full_wall(self, args: argparse.Namespace) -> float:
        """Seconds that FULL would take: the start and end as measured, its epochs from the later ones."""
        epoch = statistics.median(self.epochs)
        start = statistics.median(self.walls) - args.epochs * epoch
        return start + FULL[1] * epoch * FULL[0] / args.images


def main(argv: list[str] | None = None) -> int:
    # fmt: off
    parser = Parser(prog="compare.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=image_folder, required=True, metavar="DIR", help="with train/ and test/")
    add("--images", type=int, default=1920, help="of training; 5216 are all of the chest X-rays (default: %(default)s)")
    add("--epochs", type=int, default=2, help="the original has 5 (default: %(default)s)")
    add("--repeats", type=int, default=3, help="(default: %(default)s)")
    add("--threads", type=int, help="of every way (default: torch's)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    add("--quick", action="store_true", help="a tiny model, once: shows that everything runs")
    # fmt: on
    args = parser.parse_args(argv)
    if min(args.images, args.epochs - 1, args.repeats, args.threads or 1) < 1:
        parser.error("--images, --repeats and --threads are at least 1, --epochs at least 2")
    for package in ("timm", "vit_pytorch"):
        if importlib.util.find_spec(package) is None:
            parser.error(f"{package} is missing: pip install -r benchmarks/requirements.txt")
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:  # as main_vit.py has it: cuDNN's attention would cost each process seconds of planning
        os.environ["TORCH_CUDNN_SDPA_DEPRIORITIZED"] = "1"
    from timed import hardware

    size = QUICK if args.quick else ORIGINAL
    if args.quick:
        args.images, args.repeats = min(args.images, 32), 1
    precision = chosen_precision(size)
    trials = ways(precision, compiled=not args.quick)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        args.images, held_out = subset(args.data, folder / "images", args.images)
        for _ in range(args.repeats):
            for trial in [*trials]:
                try:
                    trial.run(folder, size, args)
                except SystemExit as failure:
                    if trial.name != COMPILED:
                        raise
                    print(f"{COMPILED}, is left out (it needs a C++ compiler): {failure}\n")
                    trials.remove(trial)
                    continue
                print(f"{trial.name}: {trial.walls[-1]:.1f} s", file=sys.stderr, flush=True)
    print(
        f"{hardware()}\n\n{args.images} training and {held_out} held-out images, {args.epochs} epochs, "
        f"{args.repeats} repeats, {args.device}, threads: {args.threads or 'as torch chooses'}; "
        f"precision: float32 in the original's way, {precision} in the others. Wall is the whole "
        f"process; the last column computes {FULL[0]:,} images x {FULL[1]} epochs from its start "
        "and its later epochs. Accuracy of so few images and epochs only shows that all learn.\n"
    )
    report(trials, args)
    return 0


def chosen_precision(size: dict[str, int]) -> str:
    """What main_vit.py computes a model of this size in on this device."""
    import main_vit
    import nni_vit
    import setup_vit
    from config_vit import resolve

    sizes = ["--image-size", size["image_size"], "--patch-num", size["patch_num"]]
    sizes += ["--vt-dim", size["dim"], "--batch-size", size["batch_size"]]
    args = resolve(main_vit.make_parser(), [str(word) for word in sizes])
    setup_vit.choose_device(args, nni_vit.Trial(asked=False))
    return args.precision


def ways(precision: str, compiled: bool) -> list[Trial]:
    """Every way in the settings that are tried."""
    amp = () if precision == "float32" else ("--amp", precision)
    cores = len(os.sched_getaffinity(0))
    trials = [Trial("original, as it was", "original")]
    for workers in sorted({2, cores}):
        options = ("--workers", str(workers))
        trials += [
            Trial(f"original, {workers} workers", "original", options),
            Trial(f"timm, {workers} workers", "timm", (*options, *amp)),
        ]
    if compiled:
        options = ("--workers", str(max(2, cores)), *amp, "--compile")
        trials.append(Trial(COMPILED, "timm", options))
    return [*trials, Trial("ours, cache cold", "ours"), Trial("ours, cache warm", "ours")]


def report(trials: list[Trial], args: argparse.Namespace) -> None:
    """Print the measured table and that of the goals."""
    full = {trial.name: trial.full_wall(args) for trial in trials}
    # Cold and warm differ by the decoding, which grows with the images.
    cold, warm = trials[-2:]
    decoding = max(statistics.median(cold.walls) - statistics.median(warm.walls), 0)
    full[cold.name] = full[warm.name] + decoding * FULL[0] / args.images
    rows = [
        (
            trial.name,
            f"{trial.parameters:,}",
            f"{statistics.median(trial.walls):.1f}",
            f"{statistics.median(trial.rates):.1f}",
            f"{trial.accuracy:.1f}",
            f"{full[trial.name]:.0f}",
        )
        for trial in trials
    ]
    head = ("way", "parameters", "wall, s", "images/s", "accuracy, %", "full experiment, s")
    print(table(head, rows))
    gpu = args.device == "cuda"
    goals = []
    for way, wanted in (("original", 20 if gpu else 3), ("timm", 2 if gpu else 1.5)):
        best = min(full[trial.name] for trial in trials if trial.way == way)
        for cache in ("cold", "warm"):
            what = f"one trial, cache {cache}, against {way}'s best ({args.device}, wall time)"
            goals.append((what, wanted, best / full[f"ours, cache {cache}"], args.repeats))
    print(goals_table(goals))


if __name__ == "__main__":
    sys.exit(main())
