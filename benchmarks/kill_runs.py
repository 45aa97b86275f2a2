"""Kill training with SIGKILL at random moments, resume it, and compare with a run that was left alone.

python benchmarks/kill_runs.py --kills 100 --seed 1
python benchmarks/kill_runs.py --kills 100 --seed 2 --latest 2 --writing 0 -- --checkpoint-steps 3 --precision bfloat16

Every run takes the digits demo through 2 short epochs with a checkpoint after every step; it is killed
up to `--latest` seconds after its first new checkpoint (in a share of `--writing` at the very moment
that a checkpoint is being written), started again by the same command, and so on until it gets to its
end. Then its weights, EMA, optimizer state, metrics lines and results must equal those of the run that
was left alone, to the bit.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from timed import hardware

REPOSITORY = Path(__file__).resolve().parents[1]
PARAMETERS = (
    "--vt-dim 32 --vt-depth 2 --vt-heads 2 --mlp-dim 64 --batch-size 16 --epochs 2 --threads 1 "
    "--dropout 0.1 --affine 0.1 --moving-average-decay 0.9 --checkpoint-steps 1 --auto-resume"
)


# Every start is a process of its own, forked from one that has imported torch: not 5 seconds but half a one.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["main_vit", "torch.utils.tensorboard", "matplotlib.figure"])


def run(argv: list[str], environment: dict[str, str]) -> None:
    """main_vit.py with `argv`, in a process of its own."""
    from tqdm import tqdm

    import main_vit

    tqdm.set_lock(threading.RLock())  # its own would leave a semaphore behind in every kill
    os.environ.update(environment)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    sys.exit(main_vit.main(argv))


def kill_until_done(
    argv: list[str],
    output: Path,
    seed: int,
    environment: dict[str, str],
    latest: float = 0.4,
    writing: float = 0.5,
) -> int:
    """Run main_vit.py with `argv` to its end, killing it on the way; returns the number of kills."""
    rng = random.Random(seed)
    kills = 0
    while True:
        began = time.time_ns()
        process = processes.Process(target=run, args=(argv, environment))
        process.start()
        # One start in six is left alone, so that the run gets to its end.
        if rng.random() < 5 / 6:
            while process.is_alive() and not written_since(output, began):
                time.sleep(0.002)
            time.sleep(rng.uniform(0, latest))
            temporary = output / ".checkpoint.pth.tar.tmp"
            patience = time.monotonic() + 1 if rng.random() < writing else 0
            while time.monotonic() < patience and not temporary.exists():
                time.sleep(0.0002)
            process.kill()
        process.join()
        if process.exitcode == 0:
            return kills
        if process.exitcode != -signal.SIGKILL:
            raise RuntimeError(f"status {process.exitcode}, see above")
        kills += 1


def written_since(output: Path, began: int) -> bool:
    try:
        return (output / "checkpoint.pth.tar").stat().st_mtime_ns > began
    except FileNotFoundError:
        return False


def outcome(output: Path) -> dict:
    """All that must be the same, with tensors as bytes."""
    from utils_vit import load_checkpoint

    found = {}
    for name in ("checkpoint", "model_best"):
        state = load_checkpoint(output / f"{name}.pth.tar")
        for key in ("model", "ema"):
            found |= {f"{name} {key} {k}": v.numpy().tobytes() for k, v in state[key].items()}
        for i, moments in state["optimizer"]["state"].items():
            found |= {f"{name} optimizer {i} {k}": v.numpy().tobytes() for k, v in moments.items()}
        found[f"{name} step"] = state["step"]
    for line in (output / "metrics.jsonl").read_text().splitlines():
        line = {
            k: v for k, v in json.loads(line).items() if k not in ("seconds", "images_per_second")
        }
        found[f"metrics {line['epoch']}"] = line
    found["results"] = (output / "results.json").read_text()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="at least so many (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--latest", type=float, default=0.4, help="seconds (default: 0.4)")
    parser.add_argument("--writing", type=float, default=0.5, help="share (default: 0.5)")
    parser.add_argument("options", nargs="*", help="of main_vit.py, after --")
    args = parser.parse_args()
    argv = [*PARAMETERS.split(), *args.options, "--model-dir"]
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "whole")
        subprocess.run(
            [sys.executable, str(REPOSITORY / "main_vit.py"), *argv, str(whole)],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        expected, kills, runs, lost = outcome(whole), 0, 0, 0
        while kills < args.kills:
            output = Path(folder, str(runs))
            kills += kill_until_done(
                [*argv, str(output)], output, args.seed * 10_000 + runs, {},
                latest=args.latest, writing=args.writing,
            )  # fmt: skip
            runs += 1
            found = outcome(output)
            different = [k for k in expected | found if found.get(k) != expected.get(k)]
            lost += bool(different)
            print(
                f"{runs} runs, {kills} kills, {lost} with a difference {different[:3]}", flush=True
            )
    print(f"{hardware()}: {kills} kills of {runs} runs, {lost} runs with a difference")
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
