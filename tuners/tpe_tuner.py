"""NNI's TPE, that no result, failure or resume of a trial can end, and that learns after 10 trials.

tuner: {codeDirectory: tuners, className: tpe_tuner.Tpe, classArgs: {optimize_mode: maximize}}
"""

import math
from collections import defaultdict
from typing import Any

import numpy as np
from nni.algorithms.hpo.tpe_tuner import Record, TpeTuner
from nni.common.hpo_utils import Deduplicator, deformat_parameters, format_parameters
from nni.utils import OptimizeMode
from robust_tuner import Robust

STARTUP_JOBS = 10  # as in Optuna; with NNI's 20 a search of 20 trials is a random one
TRIES = 100  # for parameters that were not tried yet


class Tpe(Robust, TpeTuner):
    """The arguments are those of NNI's TPE; `n_startup_jobs`, the trials at random first, are 10 and not 20."""

    def __init__(
        self,
        optimize_mode: str = "minimize",
        seed: int | None = None,
        tpe_args: dict[str, Any] | None = None,
    ) -> None:
        seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        super().__init__(optimize_mode, seed, {"n_startup_jobs": STARTUP_JOBS} | (tpe_args or {}))
        first, gamma = self.args.n_startup_jobs, self.args.gamma
        # Where its first results are not some good and some bad ones NNI's raises, which ends the search.
        if not 0 < min(math.ceil(gamma * math.sqrt(first)), self.args.linear_forgetting) < first:
            raise ValueError(f"n_startup_jobs {first} does not go with gamma {gamma}")
        self._seed = seed
        self._results: list[tuple[dict[str, Any], float]] = []

    def _new_space(self, space: dict[str, Any]) -> None:
        self.space, self.dedup = self._specs, Deduplicator(self._specs)
        # NNI's own keeps the number of a choice, which may be another's now.
        self._params = {i: format_parameters(p, self._specs) for i, p in self._suggested.items()}
        self._running_params = {i: p for i, p in self._params.items() if i in self._running_params}
        self._history.clear()
        results, self._results = self._results, []
        self._replay_fitting(results)
        for params in self._params.values():  # those that run or failed, too
            self.dedup.add_history(params)

    def _propose(self, parameter_id: int) -> dict[str, Any]:
        # Among choices the best of 24 candidates is soon always the same, and NNI's takes for it the next of a
        # grid, from its first corner on. A single candidate is a draw from what is good so far.
        unused, self.dedup, args = self.dedup, lambda params: params, self.args
        history, self._history = self._history, self._with_failures()
        try:
            for _ in range(TRIES):
                if self._is_new(super()._propose(parameter_id)):
                    break
                del self._running_params[parameter_id]
                self.args = args._replace(n_ei_candidates=1)
        finally:
            self.dedup, self.args, self._history = unused, args, history
        params = self.dedup(self._params[parameter_id])  # NoMoreTrialError where nothing is left
        self._params[parameter_id] = self._running_params[parameter_id] = params
        return deformat_parameters(params, self.space)

    def _with_failures(self) -> dict[str, list[Record]]:
        """What NNI's learns from, and trials that failed as the worst: left out, they would be suggested again."""
        history = defaultdict(list, {key: [*known] for key, known in self._history.items()})
        worst = max((record.loss for known in history.values() for record in known), default=None)
        for i in sorted(self._ended - self._told) if history else ():
            for key, value in self._params.get(i, {}).items():
                history[key].append(Record(value, worst))
        return history

    def _tell(self, parameter_id: int, parameters: dict[str, Any], value: float) -> None:
        self._results.append((parameters, value))
        # The trial may have been reported as ended before its result arrived here.
        self._running_params.setdefault(parameter_id, self._params[parameter_id])
        super()._tell(parameter_id, parameters, value)

    def _replay(self, parameters: dict[str, Any], value: float) -> None:
        self._results.append((parameters, value))
        super()._replay(parameters, value)
        if self.liar:
            self.liar.update(-value if self.optimize_mode is OptimizeMode.Maximize else value)

    def _under_way(self, parameters: dict[str, Any]) -> None:
        self.dedup.add_history(format_parameters(parameters, self._specs))

    def _reseed(self, number: int) -> None:
        self.rng = np.random.default_rng([self._seed, number])
