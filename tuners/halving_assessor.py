"""Successive halving as an assessor: the best part of the trials at each rung of epochs goes on."""

import math
from typing import Any

from nni.assessor import Assessor, AssessResult
from nni.utils import extract_scalar_history


class Halving(Assessor):
    """Ends a trial that, after `first` epochs, `eta` times as many, and so on, is not within the best 1/eta.

    It is compared by its best epoch so far with what all trials before it had reached after as many
    epochs, ended ones too: the stopping variant of ASHA (Li et al. 2020, https://arxiv.org/abs/1810.05934).
    The first trials of a rung, which have nobody to be compared with, go on. Raises ValueError.
    """

    def __init__(self, optimize_mode: str = "maximize", first: int = 2, eta: float = 3) -> None:
        if optimize_mode not in ("maximize", "minimize"):
            raise ValueError(f"optimize_mode is {optimize_mode}, not maximize or minimize")
        if first < 1 or eta <= 1:
            raise ValueError(f"first {first} is to be at least 1, eta {eta} above 1")
        self.sign = 1 if optimize_mode == "maximize" else -1
        self.first, self.eta = first, eta
        self.rungs: dict[int, dict[str, float]] = {}  # epochs -> what each trial had reached then

    def assess_trial(self, trial_job_id: str, trial_history: list[Any]) -> AssessResult:
        """NNI calls it after every epoch, with the metrics of all epochs of the trial."""
        values = [self.sign * value for value in extract_scalar_history(trial_history)]
        epochs = self.first
        while epochs <= len(values):
            reached = self.rungs.setdefault(epochs, {})
            if trial_job_id not in reached:
                reached[trial_job_id] = max(values[:epochs])
                if len(reached) >= self.eta:
                    best = sorted(reached.values(), reverse=True)
                    # Equal values go on: accuracies of few images often are.
                    if reached[trial_job_id] < best[math.ceil(len(best) / self.eta) - 1]:
                        return AssessResult.Bad
            epochs = math.ceil(epochs * self.eta)
        return AssessResult.Good
