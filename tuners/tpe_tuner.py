"""NNI's TPE, unchanged in what it suggests, that no result, failure or resume of a trial can end.

tuner: {codeDirectory: tuners, className: tpe_tuner.Tpe, classArgs: {optimize_mode: maximize}}
"""

from typing import Any

import numpy as np
from nni.algorithms.hpo.tpe_tuner import TpeTuner
from nni.common.hpo_utils import Deduplicator, format_parameters
from nni.utils import OptimizeMode
from robust_tuner import Robust


class Tpe(Robust, TpeTuner):
    """The arguments are those of NNI's TPE."""

    def __init__(
        self,
        optimize_mode: str = "minimize",
        seed: int | None = None,
        tpe_args: dict[str, Any] | None = None,
    ) -> None:
        seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        super().__init__(optimize_mode, seed, tpe_args)
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
