"""PBT for NNI's `tuner: {codeDirectory: tuners, className: pbt_tuner.PBT}`.

NNI 3.0's own ends at a trial that fails after its final result, waits for ever for one that ends without
a result, and sends members that failed to checkpoints that there are not.
"""

import copy
import logging
import math
import os
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
from nni.algorithms.hpo import pbt_tuner
from nni.algorithms.hpo.pbt_tuner import exploit_and_explore
from nni.utils import OptimizeMode, json2parameter, split_index
from robust_tuner import finite_number

log = logging.getLogger(f"nni.{__name__}")  # which NNI writes to dispatcher.log


class PBT(pbt_tuner.PBTTuner):
    """Population based training (Jaderberg et al. 2017, https://arxiv.org/abs/1711.09846), seeded.

    After each step, one trial of every member, the worst `fraction` and all that failed go on from the
    checkpoint of one of the best, with its values perturbed.
    """

    def __init__(
        self,
        optimize_mode: str = "maximize",
        all_checkpoint_dir: str | None = None,
        population_size: int = 10,
        factor: float = 0.2,
        resample_probability: float = 0.25,
        fraction: float = 0.2,
        seed: int | None = None,
    ) -> None:
        if all_checkpoint_dir and (own := os.getenv("NNI_CHECKPOINT_DIRECTORY")):
            # In a folder that other experiments were given too the first step would go on from theirs.
            all_checkpoint_dir = os.path.join(all_checkpoint_dir, Path(own).parent.name)
        super().__init__(
            optimize_mode,
            all_checkpoint_dir,
            population_size,
            factor,
            resample_probability,
            fraction,
        )
        # NNI calls a tuner from two threads, one of them for the ends of trials alone.
        self.lock = threading.RLock()
        random.seed(seed)  # what NNI's code draws from
        np.random.seed(seed)

    @property
    def worst(self) -> float:
        """The score of a trial without a result."""
        return math.inf if self.optimize_mode is OptimizeMode.Minimize else -math.inf

    def update_search_space(self, search_space: dict[str, Any]) -> None:
        """Draw the first members. Raises ValueError for a nested choice, which cannot be perturbed."""
        for name, spec in search_space.items():
            if spec["_type"] == "choice" and any(isinstance(v, dict) for v in spec["_value"]):
                raise ValueError(f"PBT cannot perturb the nested choice {name}")
        with self.lock:
            if self.population:  # `nnictl update searchspace`: the members are of the old one
                log.warning("a population that is under way keeps its search space")
                return
            super().update_search_space(search_space)
            for trial in self.population:  # NNI's own draws of them cannot be seeded
                trial.hyper_parameters |= self.new_values()

    def new_values(self) -> dict[str, Any]:
        """A random configuration of the search space."""
        state = np.random.RandomState(np.random.randint(2**31))
        every = dict.fromkeys(self.space, True)
        return split_index(json2parameter(self.searchspace_json, every, state))

    def generate_parameters(self, parameter_id: int, **kwargs: Any) -> dict[str, Any]:
        with self.lock:
            return copy.deepcopy(super().generate_parameters(parameter_id, **kwargs))

    def receive_trial_result(
        self, parameter_id: int, parameters: dict[str, Any], value: Any, **kwargs: Any
    ) -> None:
        """A final result; ignored if it is not a number, or not of a running trial."""
        score = finite_number(value)
        with self.lock:
            if parameter_id in self.running and score is not None:
                self.end_member(parameter_id, score)
            else:
                log.warning("ignored: trial %s, result %s", parameter_id, value)

    def trial_end(self, parameter_id: int, success: bool, **kwargs: Any) -> None:
        """The end of a trial, which has failed if no result of it is known by now."""
        with self.lock:
            if parameter_id in self.running:
                self.end_member(parameter_id, self.worst)

    def end_member(self, parameter_id: int, score: float) -> None:
        """One member has done this step; the last one of them starts the next step."""
        trial = self.running.pop(parameter_id)
        trial.score = score
        self.finished.append(trial)
        self.finished_trials += 1
        if self.finished_trials == self.population_size:
            self._proceed_next_epoch()

    def _proceed_next_epoch(self) -> None:
        """Let the worst and the failed go on from the best; hand out what was asked for meanwhile."""
        self.epoch += 1
        maximize = self.optimize_mode is OptimizeMode.Maximize
        members = sorted(self.finished, key=lambda trial: trial.score, reverse=maximize)
        succeeded = [trial for trial in members if math.isfinite(trial.score)]
        share = math.ceil(self.fraction * len(members))
        # As they were in the step that ends; one at least, for those that failed.
        tops = copy.deepcopy(succeeded[: max(share, 1)])
        kept = succeeded[: max(len(members) - share, 1)]
        for trial in members:
            own = trial.hyper_parameters
            if trial in kept:
                trial.clean_id()
                own["load_checkpoint_dir"] = own["save_checkpoint_dir"]
                own["save_checkpoint_dir"] = os.path.join(trial.checkpoint_dir, str(self.epoch))
        for trial in members:
            if trial not in kept and tops:
                top = tops[np.random.randint(len(tops))]
                # Its own draws of new values cannot be seeded.
                exploit_and_explore(trial, top, self.factor, 0, self.epoch, self.searchspace_json)
                for name, value in self.new_values().items():
                    if random.random() < self.resample_probability:
                        trial.hyper_parameters[name] = value
            elif not tops:  # all failed: other values, from what each of them last went on from
                trial.clean_id()
                new = os.path.join(trial.checkpoint_dir, str(self.epoch))
                trial.hyper_parameters |= self.new_values() | {"save_checkpoint_dir": new}
        self.population, self.finished, self.finished_trials, self.pos = members, [], 0, -1
        while self.param_ids and self.pos + 1 < len(self.population):
            parameter_id = self.param_ids.pop(0)
            self.credit -= 1
            self.send_trial_callback(parameter_id, self.generate_parameters(parameter_id))

    def import_data(self, data: list[dict[str, Any]]) -> None:
        """After `nnictl resume`: go on behind the last step that left a checkpoint of any member.

        Members without one count as failed. Results that come while trials run are ignored.
        """
        steps: dict[int, dict[str, tuple[dict[str, Any], float]]] = {}
        for entry in data:
            parameters = entry["parameter"]
            folder = Path(parameters.get("save_checkpoint_dir", ""))
            score = finite_number(entry["value"])
            if folder.name.isdecimal() and folder.is_dir() and score is not None:
                steps.setdefault(int(folder.name), {})[str(folder.parent)] = (parameters, score)
        with self.lock:
            if self.running or self.epoch or not steps:
                return
            # The last step may have been under way; then the one before it is whole.
            last = max(steps)
            if len(steps[last]) < self.population_size and last - 1 in steps:
                last -= 1
            self.epoch = last
            for trial in self.population:
                parameters, score = steps[last].get(trial.checkpoint_dir, (None, self.worst))
                trial.hyper_parameters = copy.deepcopy(parameters) or trial.hyper_parameters
                trial.score = score
            self.finished = self.population
            self._proceed_next_epoch()
