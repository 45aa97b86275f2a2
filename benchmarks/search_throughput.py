"""A search of many trials, 2 at a time, against the best that the same cores give to one trial alone.

python benchmarks/search_throughput.py

The trials are a real NNI experiment on the digits demo: one configuration, the tuner Random draws the
seed. Throughput is images trained per second from the start of the first trial to the end of the last,
with all that NNI and start-up cost; alone it is that of one run of the same command, the better of one
thread and all cores.
"""

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import REPOSITORY, Parser, goals_table, run, table

AT_A_TIME = 2
MODEL = "--vt-dim 64 --vt-depth 4 --vt-heads 8 --mlp-dim 128 --patch-num 8"  # the largest that is searched


def search(folder: Path, trials: int, epochs: int) -> tuple[float, int, dict[str, list[float]]]:
    """Seconds from the first trial's start to the last one's end, how many succeeded, and `gaps`."""
    sys.path.insert(0, str(REPOSITORY / "tests"))
    from nni_tools import experiment  # on a port and in a home of its own, and stopped by its id

    config = {
        "trialCommand": f"{sys.executable} {REPOSITORY}/main_vit.py --request-from-nni "
        f"--epochs {epochs} {MODEL}",
        "searchSpace": {"seed": {"_type": "randint", "_value": [0, 1_000_000]}},
        "trialConcurrency": AT_A_TIME,
        "maxTrialNumber": trials,
    }
    with experiment(config, folder) as running:
        running.wait(timeout=3600)
        found = running.trials()
        between = gaps(found, [running.output(trial["trialJobId"]) for trial in found])
    ended = [trial for trial in found if trial["status"] == "SUCCEEDED"]
    span = max(t["endTime"] for t in found) - min(t["startTime"] for t in found)
    return span / 1000, len(ended), between


def gaps(trials: list[dict[str, Any]], folders: list[Path]) -> dict[str, list[float]]:
    """Seconds of each trial that are not training: of NNI before it, ours before and after its steps."""
    starts = sorted(trial["startTime"] / 1000 for trial in trials)
    ends = sorted(trial["endTime"] / 1000 for trial in trials)
    parts: dict[str, list[float]] = {
        # The k-th end makes room for trial number k + AT_A_TIME.
        "NNI: end of a trial to start of the next": [
            start - end for end, start in zip(ends, starts[AT_A_TIME:], strict=False)
        ],
        "ours: start of the process to its first step": [],
        "ours: last checkpoint to end (test, pictures, exit)": [],
    }
    _, before, after = parts.values()
    for trial, folder in zip(trials, folders, strict=True):
        # args.yaml is the last thing that is written before the first step.
        before.append((folder / "args.yaml").stat().st_mtime - trial["startTime"] / 1000)
        saved = (folder / "checkpoint.pth.tar").stat().st_mtime
        after.append(trial["endTime"] / 1000 - saved)
    return parts


def alone(folder: Path, threads: int, epochs: int) -> tuple[float, float, int]:
    """Of one run: images/s of the whole process and of its training alone, and images of an epoch."""
    out = folder / f"alone-{threads}-{len([*folder.glob('alone-*')])}"
    command = [
        *(str(REPOSITORY / "main_vit.py"), *MODEL.split(), "--epochs", str(epochs)),
        *("--threads", str(threads), "--model-dir", str(out)),
    ]
    wall, _ = run(command)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    images = json.loads((out / "results.json").read_text())["images"]["train"]
    rate = statistics.median(line["images_per_second"] for line in lines)
    return images * epochs / wall, rate, images


def main(argv: list[str] | None = None) -> int:
    # fmt: off
    parser = Parser(prog="search_throughput.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--trials", type=int, default=20, help="(default: %(default)s)")
    add("--epochs", type=int, default=10, help="of a trial (default: %(default)s)")
    add("--repeats", type=int, default=3, help="of the runs alone (default: %(default)s)")
    add("--quick", action="store_true", help="4 trials of an epoch")
    # fmt: on
    args = parser.parse_args(argv)
    if min(args.trials, args.epochs, args.repeats) < 1:
        parser.error("--trials, --epochs and --repeats are at least 1")
    if args.quick:
        args.trials, args.epochs, args.repeats = 4, 1, 1
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from timed import hardware

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "home").mkdir()
        os.environ["HOME"] = str(folder / "home")  # a cache of images of its own
        os.chdir(folder)  # the demo is written here, for both
        cores = len(os.sched_getaffinity(0))
        _, _, images = alone(folder, 1, 1)  # writes the demo and the cache
        single: dict[int, list[tuple[float, float]]] = {1: [], cores: []}
        for _ in range(args.repeats):
            for threads, found in single.items():
                found.append(alone(folder, threads, args.epochs)[:2])
        span, succeeded, between = search(folder, args.trials, args.epochs)
    rate = images * args.epochs * succeeded / span
    rows = []
    for threads, found in single.items():
        whole, training = (statistics.median(values) for values in zip(*found, strict=True))
        rows.append((f"alone, {threads} threads", f"{whole:.0f}", f"{training:.0f}", args.repeats))
    rows.append((f"{succeeded} trials, 2 at a time", f"{rate:.0f}", "", 1))
    best = max(statistics.median(whole for whole, _ in found) for found in single.values())
    steady = max(statistics.median(training for _, training in found) for found in single.values())
    print(f"{hardware()}\n\n{args.epochs} epochs a trial, {MODEL}\n")
    print(table(("images/s", "of whole processes", "of training alone", "n"), rows))
    rows = [(what, f"{statistics.median(s):.2f}", len(s)) for what, s in between.items()]
    print(table(("seconds of a trial outside of its training", "median", "n"), rows))
    what = "search of {} trials, 2 at a time, against one alone: images/s of {}"
    print(goals_table([(what.format(succeeded, "whole processes"), 0.9, rate / best, 1)]))
    print(
        f"Against the training loop of the run alone, without its start: {rate / steady:.2f}. What is "
        "missing there is the start of each trial, which longer trials spread over more images."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
