"""Epochs that a search computes with early stopping against one without, to the same best metric.

python benchmarks/early_stopping.py               3 seeds, about 12 minutes on 2 quiet cores
python benchmarks/early_stopping.py --quick       one seed, few epochs: does it run?

The tuners and the assessor are NNI's and ours, driven as NNI's manager drives them, with one trial after
the other; the trials are main_vit.py's own epochs on the digits, in this process. A configuration is
trained once and its curve kept, so a method is charged for every epoch it asks for, and no time is
spent on an epoch twice. "none" is Random search with every trial trained to the end; "Medianstop" and
"Halving" (ours) have the same trials; "Hyperband" is ours, whose promoted trials continue, run until it
has a result at least as good as that of "none", or three times its epochs.
"""

import json
import logging
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from harness import REPOSITORY, Parser, goals_table, table
from timed import hardware

import main_vit
import nni_vit
import setup_vit
from config_vit import resolve

sys.path.insert(0, str(REPOSITORY / "tuners"))

SPACE = {
    "lr": {"_type": "loguniform", "_value": [1e-5, 3e-2]},
    "vt_dim": {"_type": "choice", "_value": [16, 32, 64]},
    "vt_depth": {"_type": "choice", "_value": [1, 2, 3]},
    "dropout": {"_type": "uniform", "_value": [0.0, 0.4]},
}
MODEL = "--vt-heads 4 --mlp-dim 64 --batch-size 64 --precision float32"
JUDGED = "Halving"


class Row(NamedTuple):
    """One method and seed."""

    seed: int
    method: str
    epochs: int
    share: float  # of the epochs without early stopping
    best: float  # accuracy in percent
    reached: bool  # at least the best without early stopping


class Trainings:
    """Learning curves of configurations, in percent of validation accuracy, trained as far as asked."""

    def __init__(self, epochs: int, seed: int, threads: int) -> None:
        self.options = [*MODEL.split(), *f"--epochs {epochs} --seed {seed}".split()]
        self.options += ["--threads", str(threads), "--cache-dir", "cache"]
        self.curves: dict[str, tuple[Iterator[float], list[float]]] = {}

    def curve(self, parameters: dict[str, Any], epochs: int) -> list[float]:
        """The first `epochs` values of a configuration."""
        key = json.dumps(parameters, sort_keys=True)
        if key not in self.curves:
            self.curves[key] = self.train(parameters), []
        training, values = self.curves[key]
        while len(values) < epochs:
            values.append(next(training))
        return values[:epochs]

    def train(self, parameters: dict[str, Any]) -> Iterator[float]:
        """Epoch for epoch what a trial reports, by the functions that a trial runs."""
        args = resolve(main_vit.make_parser(), self.options, parameters)
        device = setup_vit.choose_device(args, nni_vit.Trial(asked=False))
        data = setup_vit.open_images(args)
        state = setup_vit.make_state(args, device)
        total_steps = args.epochs * -(-len(data.train) // args.batch_size)
        for state.epoch in range(args.epochs):
            main_vit.train(state, data.train, args, device, total_steps, lambda: None)
            metrics, _, _ = main_vit.validate(state, data.val, args, device, lambda: None)
            state.complete_epoch({}, is_best=False, is_whole=True)
            yield metrics["accuracy"]


def random_search(
    trainings: Trainings, trials: int, epochs: int, seed: int, assessor: Any
) -> tuple[int, float]:
    """Epochs computed and the best of all trials, with an assessor of NNI or without."""
    from nni.algorithms.hpo.random_tuner import RandomTuner
    from nni.assessor import AssessResult

    tuner = RandomTuner(seed=seed)
    tuner.update_search_space(SPACE)
    computed, best = 0, 0.0
    for number in range(trials):
        parameters = tuner.generate_parameters(number)
        for epoch in range(1, epochs + 1):
            history = trainings.curve(parameters, epoch)
            computed, best = computed + 1, max(best, history[-1])
            if assessor and assessor.assess_trial(number, history) is AssessResult.Bad:
                break
        if assessor:
            assessor.trial_end(number, success=len(history) == epochs)
    return computed, best


def hyperband(
    trainings: Trainings, target: float, most: int, epochs: int, seed: int
) -> tuple[int, int, float]:
    """Epochs computed with trials that continue, those without, and the best, until `target`."""
    from hyperband_tuner import Hyperband

    jobs: list[dict[str, Any]] = []

    class Advisor(Hyperband):
        def send(self, command: Any, data: str) -> None:
            if command.name == "NewTrialJob":
                jobs.append(json.loads(data))

    advisor = Advisor(R=epochs, eta=3, exec_mode="serial", seed=seed)
    advisor.handle_initialize(SPACE)
    done: dict[str, int] = {}  # epochs, by configuration
    continued, scratch, best = 0, 0, 0.0
    while best < target and continued < most:
        advisor.handle_request_trial_jobs(1)
        job = jobs.pop(0)
        parameters = dict(job["parameters"])
        budget = parameters.pop("TRIAL_BUDGET")
        key = json.dumps(parameters)
        value = max(trainings.curve(parameters, budget))
        continued, scratch = continued + budget - done.get(key, 0), scratch + budget
        done[key], best = budget, max(best, value)
        trial = {"parameter_id": job["parameter_id"], "trial_job_id": job["parameter_id"]}
        result = {"value": json.dumps(value), "type": "FINAL", "sequence": 0}
        advisor.handle_report_metric_data(trial | result)
        end = {"event": "SUCCEEDED", "hyper_params": json.dumps(job)}
        advisor.handle_trial_end(trial | end)
    return continued, scratch, best


def compare(trainings: Trainings, trials: int, epochs: int, seed: int) -> list[Row]:
    """One seed, all methods."""
    from halving_assessor import Halving
    from nni.algorithms.hpo.medianstop_assessor import MedianstopAssessor

    whole, target = random_search(trainings, trials, epochs, seed, None)
    median = MedianstopAssessor("maximize", start_step=max(2, epochs // 6))
    halving = Halving("maximize")
    continued, scratch, best = hyperband(trainings, target, 3 * whole, epochs, seed)
    rows = [
        ("none", whole, target),
        ("Medianstop", *random_search(trainings, trials, epochs, seed, median)),
        (JUDGED, *random_search(trainings, trials, epochs, seed, halving)),
        ("Hyperband, continuing", continued, best),
        ("Hyperband, from scratch", scratch, best),
    ]
    return [
        Row(seed, method, count, count / whole, value, value >= target)
        for method, count, value in rows
    ]


def one_round(largest: int, eta: int) -> tuple[int, int, int]:
    """Trials and epochs of one round of Hyperband: continuing, and from scratch."""
    from nni.algorithms.hpo.hyperband_advisor import Bracket

    s_max = int(np.log(largest) / np.log(eta) + 1e-6)
    trials = continuing = scratch = 0
    for s in range(s_max, -1, -1):
        bracket, before = Bracket("", s, s_max, eta, largest, "maximize"), 0
        for bracket.i in range(s + 1):
            n, r = bracket.get_n_r()
            trials, scratch = trials + n, scratch + n * r
            continuing, before = continuing + n * (r - before), r
    return trials, continuing, scratch


def report(rows: list[Row]) -> None:
    """Print every seed, the medians and the goal."""
    cells = [
        (
            r.seed,
            r.method,
            r.epochs,
            f"{r.share:.2f}",
            f"{r.best:.2f}",
            "yes" if r.reached else "no",
        )
        for r in rows
    ]
    head = ("seed", "method", "epochs", "share of those without", "best accuracy, %", "as good")
    print(table(head, cells))
    summary = []
    for method in dict.fromkeys(row.method for row in rows):
        mine = [row for row in rows if row.method == method]
        shares = [row.share for row in mine]
        median, extremes = statistics.median(shares), f"{min(shares):.2f} to {max(shares):.2f}"
        as_good = f"{sum(row.reached for row in mine)} of {len(mine)}"
        summary.append((method, f"{median:.2f}", extremes, as_good))
    print(table(("method", "share of the epochs, median", "range", "as good"), summary))
    judged = [row for row in rows if row.method == JUDGED]
    reached = sum(row.reached for row in judged)
    shares = [row.share for row in judged]
    # A seed that has spent all that it may and is not as good decides.
    share = statistics.median(shares) if reached == len(judged) else max(shares)
    what = "epochs without early stopping over those with it"
    what += f" ({JUDGED}; as good in {reached} of {len(judged)}"
    what += ")" if reached == len(judged) else "; the dearest seed's)"
    print(goals_table([(what, 2, 1 / share, len(judged))]))


def main(argv: list[str] | None = None) -> int:
    # fmt: off
    parser = Parser(prog="early_stopping.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--seeds", type=int, default=3, help="(default: %(default)s)")
    add("--trials", type=int, default=20, help="(default: %(default)s)")
    add("--epochs", type=int, default=27, help="(default: %(default)s)")
    add("--threads", type=int, default=1, help="(default: %(default)s)")
    add("--quick", action="store_true", help="1 seed, 4 trials of 3 epochs")
    # fmt: on
    args = parser.parse_args(argv)
    if args.quick:
        args.seeds, args.trials, args.epochs = 1, 4, 3
    if min(args.seeds, args.trials, args.threads) < 1 or args.epochs < 2:
        parser.error("--seeds, --trials and --threads are at least 1, --epochs at least 2")
    print(
        f"{hardware()}\n\n{args.seeds} seeds, {args.trials} trials of at most {args.epochs} epochs on "
        f"the digits, threads: {args.threads}\n"
    )
    logging.disable(logging.INFO)  # NNI's goes to stdout
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # the demo is written here
        rows = []
        for seed in range(args.seeds):
            trainings = Trainings(args.epochs, seed, args.threads)
            rows += compare(trainings, args.trials, args.epochs, seed)
    report(rows)
    rounds = []
    for largest, eta in ((9, 3), (27, 3), (81, 3), (16, 2), (64, 4)):
        trials, continuing, scratch = one_round(largest, eta)
        saved = f"{1 - continuing / scratch:.0%}"
        rounds.append((largest, eta, trials, continuing, scratch, saved))
    print("Epochs of one round of Hyperband, computed:\n")
    print(table(("R", "eta", "trials", "continuing", "from scratch", "saved"), rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
