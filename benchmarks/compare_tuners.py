"""Tuners against each other on our own trial: the best metric after so many trials, several seeds.

    python benchmarks/compare_tuners.py --output tuners --trials 16 --seeds 10

Each trial is a call of main_vit.py in this process, on the digits: torch and the images are loaded once.
A tuner is asked and told one trial at a time, as NNI would at trialConcurrency 1. Results are kept in
OUTPUT.json by their parameters, so an interrupted comparison goes on, and equal trials are run once;
OUTPUT.md and OUTPUT.png are the table and the plot of docs/tuners.md.
16 trials x 10 seeds x 8 tuners and one search of GridSearch, of about 1.5 s each, are half an hour on one core.
"""

import argparse
import contextlib
import importlib
import io
import json
import logging
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tuners")]

SPACE = {  # numbers only and without log, so that every tuner can search it
    "lr": {"_type": "uniform", "_value": [0.0003, 0.02]},
    "vt_dim": {"_type": "choice", "_value": [16, 32, 48]},
    "vt_depth": {"_type": "quniform", "_value": [1, 3, 1]},
    "dropout": {"_type": "uniform", "_value": [0.0, 0.4]},
    "weight_decay": {"_type": "uniform", "_value": [0.0, 0.3]},
    "batch_size": {"_type": "choice", "_value": [16, 32, 64]},
}
TUNERS = {
    "Random": ("nni.algorithms.hpo.random_tuner.RandomTuner", {}),
    "TPE": ("tpe_tuner.Tpe", {"tpe_args": {"n_startup_jobs": 6}}),
    "Anneal": ("anneal_tuner.Anneal", {}),
    "SMAC": ("smac_tuner.Smac", {"startup_trials": 6}),
    "Evolution": ("nni_tuners.Evolution", {"population_size": 6}),
    "GP": ("nni_tuners.GP", {"cold_start_num": 6, "selection_num_warm_up": 1000,
                             "selection_num_starting_points": 3}),
    "Metis": ("nni_tuners.Metis", {"cold_start_num": 6, "selection_num_starting_points": 3}),
    "DNGO": ("dngo_tuner.Dngo", {"trials_per_update": 6, "num_epochs_per_training": 100}),
    "GridSearch": ("nni_tuners.GridSearch", {}),
}  # fmt: skip


class Trials:
    """Runs trials, and remembers the results of all that were run, over calls of this script too."""

    def __init__(self, file: Path, command: list[str]) -> None:
        self.file, self.command = file, command
        self.known = json.loads(file.read_text()) if file.exists() else {}

    def run(self, parameters: dict[str, Any]) -> float | None:
        """The validation accuracy in percent; None if the trial fails."""
        argv = [f"--{name.replace('_', '-')}={value}" for name, value in sorted(parameters.items())]
        key = " ".join(argv + self.command)
        if key not in self.known:
            self.known[key] = run_trial(argv + self.command)
            self.file.write_text(json.dumps(self.known, indent=1))
        return self.known[key]


def run_trial(argv: list[str]) -> float | None:
    """One call of main_vit.py in this process."""
    import main_vit

    output = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            status = main_vit.main([*argv, "--model-dir", folder])
        results = Path(folder) / "results.json"
        return json.loads(results.read_text())["validation"]["accuracy"] if status == 0 else None


def search(name: str, seed: int, count: int, trials: Trials) -> list[float]:
    """The best accuracy after each trial of one search."""
    path, arguments = TUNERS[name]
    module, _, cls = path.rpartition(".")
    if name != "GridSearch":
        arguments = {**arguments, "seed": seed}
    if name != "Random":
        arguments = {**arguments, "optimize_mode": "maximize"}
    tuner = getattr(importlib.import_module(module), cls)(**arguments)
    tuner.update_search_space(SPACE)
    best: list[float] = []
    for number in range(count):
        parameters = tuner.generate_parameters(number)
        value = trials.run(parameters)
        if value is not None:
            tuner.receive_trial_result(number, parameters, {"default": value})
        tuner.trial_end(number, value is not None)
        best.append(max([*best[-1:], value or 0.0]))
    return best


def table(curves: dict[str, list[list[float]]], counts: list[int]) -> str:
    """Mean and standard deviation over seeds of the best accuracy after so many trials, best first."""
    lines = [
        "| tuner | " + " | ".join(f"after {n} trials" for n in counts) + " |",
        "|---" * (len(counts) + 1) + "|",
    ]
    for name in sorted(curves, key=lambda n: -statistics.mean(c[-1] for c in curves[n])):
        cells = []
        for n in counts:
            values = [curve[n - 1] for curve in curves[name]]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.2f} +- {spread:.2f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(curves: dict[str, list[list[float]]], file: Path) -> None:
    """Mean over seeds of the best accuracy against the number of trials."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, runs in curves.items():
        means = [statistics.mean(values) for values in zip(*runs, strict=True)]
        axes.plot(range(1, len(means) + 1), means, label=name)
    axes.set(xlabel="trials", ylabel="best validation accuracy (%)")
    axes.set_ylim(bottom=min(run[min(3, len(run) - 1)] for runs in curves.values() for run in runs))
    axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    """The comparison, to OUTPUT.json (every trial), OUTPUT.md and OUTPUT.png."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("tuners"))
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--tuners", nargs="+", choices=TUNERS, default=list(TUNERS))
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    command = [f"--epochs={args.epochs}", "--threads=1", "--mlp-dim=64", "--vt-heads=4"]
    trials = Trials(args.output.with_suffix(".json"), command)
    curves: dict[str, list[list[float]]] = {}
    for name in args.tuners:
        seeds = 1 if name == "GridSearch" else args.seeds  # it has no chance in it
        for seed in range(seeds):
            curves.setdefault(name, []).append(search(name, seed, args.trials, trials))
            print(f"{name} seed {seed}: {curves[name][-1][-1]:.2f} %", flush=True)
    counts = sorted({n for n in (5, 10, args.trials) if n <= args.trials})
    args.output.with_suffix(".md").write_text(table(curves, counts))
    plot(curves, args.output.with_suffix(".png"))
    print(table(curves, counts))


if __name__ == "__main__":
    main()
