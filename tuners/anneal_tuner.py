"""Simulated annealing in the place of NNI's Anneal, whose hyperopt 0.1.2 fails with numpy from 2.2 on.

    tuner: {codeDirectory: tuners, className: anneal_tuner.Anneal, classArgs: {optimize_mode: maximize}}

As in hyperopt (its module `anneal`), a trial is a neighbour of one of the best so far, and the more
is known, the closer a neighbour is.
"""

from typing import Any

import numpy as np
from nni.algorithms.hpo.random_tuner import suggest_parameter
from nni.common.hpo_utils import deformat_parameters
from robust_tuner import Remembering

MEAN_RANK = 2.0  # of the trial whose neighbour is tried next: the best has rank 1
SHRINKING = 0.1  # the neighbourhood is 1 / (1 + SHRINKING * results) of the range


class Anneal(Remembering):
    """Every type of search space, nested ones too; the same seed and results repeat a search."""

    def __init__(self, optimize_mode: str = "minimize", seed: int | None = None) -> None:
        super().__init__(optimize_mode, seed)

    def _propose(self, parameter_id: int) -> dict[str, Any]:
        ranked = sorted((t for t in self._known() if t[1] is not None), key=lambda trial: trial[1])
        width = 1 / (1 + SHRINKING * len(ranked))
        for _ in range(20):
            rank = min(self._rng.geometric(1 / MEAN_RANK), len(ranked))
            centre = ranked[rank - 1][0] if ranked else {}
            point = self._neighbour(centre, width)
            if self._is_new(deformat_parameters(point, self._specs)):
                break
            width = min(1.0, width * 1.5)  # around here all is known: look further away
        point = self._unused(point)  # raises NoMoreTrialError where every combination was tried
        return deformat_parameters(point, self._specs)

    def _neighbour(self, centre: dict[Any, Any], width: float) -> dict[Any, Any]:
        """A point whose every parameter is drawn around its value at the centre, if it has one there."""
        point: dict[Any, Any] = {}
        for key, spec in self._specs.items():
            if not spec.is_activated_in(point):
                continue
            value = suggest_parameter(self._rng, spec)
            if key in centre:
                value = near(self._rng, spec, centre[key], value, width)
            point[key] = value
        return point


def near(
    rng: np.random.Generator, spec: Any, centre: float, anywhere: float, width: float
) -> float:
    """A value of one parameter, in NNI's internal form; `anywhere` is one drawn from the whole range."""
    if spec.categorical:
        return anywhere if rng.random() < width else centre
    if spec.normal_distributed:
        return rng.normal(centre, spec.sigma * width)
    if spec.q is not None and rng.random() < width:
        return anywhere  # in a neighbourhood of less than a step there is only the centre
    centre = min(max(centre, spec.low), spec.high)  # of a space that has become smaller, say
    reach = (spec.high - spec.low) * width / 2
    return rng.uniform(max(spec.low, centre - reach), min(spec.high, centre + reach))
