"""Tuners of NNI 3.0 that a trial can end, or that never end, made to survive; the search is NNI's own.

tuner: {codeDirectory: tuners, className: nni_tuners.GridSearch}
"""

import functools
import math
import random
from typing import Any

import nni
import numpy as np
import scipy.optimize
from nni.algorithms.hpo.batch_tuner import BatchTuner
from nni.algorithms.hpo.evolution_tuner import EvolutionTuner, Individual
from nni.algorithms.hpo.gp_tuner import GPTuner
from nni.algorithms.hpo.gp_tuner import util as gp_util
from nni.algorithms.hpo.gridsearch_tuner import GridSearchTuner
from nni.algorithms.hpo.metis_tuner import MetisTuner
from nni.algorithms.hpo.metis_tuner import lib_acquisition_function as metis_library
from nni.algorithms.hpo.metis_tuner.Regression_GP import CreateModel as metis_model
from robust_tuner import RANGES, Robust, seed_after

# NNI's Metis fits five models a suggestion, each from 250 starting points: minutes for a few keys.
metis_process = functools.partial(metis_model.create_model, n_restarts_optimizer=5)


class GridSearch(Robust, GridSearchTuner):
    """Every combination once, then the end of the experiment; ranges are halved again and again."""

    def _new_space(self, space: dict[str, Any]) -> None:
        self.space = self._specs
        self.vector, self.divisions = None, {}  # of the grid as it was
        self._init_grid()

    def _propose(self, parameter_id: int) -> dict[str, Any]:
        # NNI's own compares JSON, in which 4 and 4.0 differ: after a resume it would repeat itself.
        while not self._is_new(parameters := super()._propose(parameter_id)):
            pass
        return parameters

    def _replay(self, parameters: dict[str, Any], value: float) -> None:
        """A grid learns nothing."""


class Batch(Robust, BatchTuner):
    """Every combination of the list once; NNI's leaves some out and repeats others after a resume."""

    types = ("choice",)

    def _check_types(self, search_space: dict[str, Any]) -> None:
        super()._check_types(search_space)
        values = [value for spec in search_space.values() for value in spec["_value"]]
        if len(search_space) != 1 or not all(isinstance(value, dict) for value in values):
            raise ValueError("Batch takes one choice, of which every value is a whole sample")

    def _fits(self, parameters: Any) -> bool:
        return any(parameters in spec["_value"] for spec in self._search_space.values())

    def _propose(self, parameter_id: int) -> dict[str, Any]:
        left = [value for value in self._values if self._is_new(value)]
        if not left:
            raise nni.NoMoreTrialError
        return left[0]

    def _replay(self, parameters: dict[str, Any], value: float) -> None:
        """A list learns nothing."""


class Evolution(Robust, EvolutionTuner):
    """NNI's ends the search where a trial fails after its result, or succeeds without one."""

    def __init__(
        self, optimize_mode: str = "maximize", population_size: int = 32, seed: int | None = None
    ) -> None:
        super().__init__(optimize_mode, population_size)
        self._seed = seed

    def _new_space(self, space: dict[str, Any]) -> None:
        super()._new_space(space)
        self.running_trials = {  # with the choices as the space has them now
            i: Individual(with_index(space, self._suggested[i]))
            for i in self.running_trials
            if i in self._suggested
        }
        random.seed(self._seed)  # NNI's draws from both
        self.random_state = np.random.RandomState(self._seed)
        self.population = []
        for _ in range(self.population_size):
            self._random_generate_individual()

    def _propose(self, parameter_id: int) -> dict[str, Any]:
        # NNI's refuses, and loses count, where more trials run at a time than the population has.
        if not self.population:
            self._random_generate_individual()
        for _ in range(20):  # it often mutates a key to the value that it had
            before = self.population.copy()
            parameters = self._generate_individual(parameter_id)
            if self._is_new(parameters):
                break
            if any(one.result is None for one in before):
                self._random_generate_individual()
            else:
                self.population = before
        return parameters

    def _tell(self, parameter_id: int, parameters: dict[str, Any], value: float) -> None:
        if parameter_id in self.running_trials:  # else its end came first and replaced it
            super()._tell(parameter_id, parameters, value)

    def _replay(self, parameters: dict[str, Any], value: float) -> None:
        result = value if self.optimize_mode.value == "maximize" else -value
        unknown = [one for one in self.population if one.result is None]
        if unknown:
            self.population.remove(unknown[0])
        self.population.append(
            Individual(with_index(self._search_space, parameters), result=result)
        )

    def _reseed(self, number: int) -> None:
        random.seed(seed_after(self._seed, number))
        self.random_state.seed(seed_after(self._seed, number))
        # Those drawn at the start are under way by now, or were even tried.
        self.population = [one for one in self.population if one.result is not None]
        for _ in range(self.population_size - len(self.population)):
            self._random_generate_individual()


class GP(Robust, GPTuner):
    """NNI's ends the search at a result that is not finite; spaces of numbers only."""

    types = ("choice", "randint", *RANGES)
    numbers_only = True

    def __init__(self, optimize_mode: str = "maximize", seed: int | None = None, **kwargs: Any):
        super().__init__(optimize_mode, **kwargs)
        gp_util.minimize = minimize
        gp_util.UtilityFunction(self._utility, self._kappa, self._xi)  # raises for an unknown word
        self._seed, self._random_state = seed, np.random.RandomState(seed)
        self._gp.set_params(random_state=self._random_state)

    def _new_space(self, space: dict[str, Any]) -> None:
        # NNI's has one length scale for all keys: raw, it would not see a learning rate beside a width.
        shares = {key: {"_type": "uniform", "_value": [0.0, 1.0]} for key in space}
        super()._new_space(shares)

    def _propose(self, parameter_id: int) -> dict[str, Any]:
        # NNI's knows only trials that have told a result: it would suggest those that run, and those that
        # failed, again and again. Here they count as the worst.
        space = self._space
        known = space._params, space._target, space._cache.copy()
        if space.len() >= self._cold_start_num:
            for i in sorted(self._suggested.keys() - self._told):
                space.register(self._shares(self._suggested[i]), known[1].min())
        try:
            shares = super()._propose(parameter_id)
        finally:
            space._params, space._target, space._cache = known
        for _ in range(20):
            parameters = {k: of_share(shares[k], **spec) for k, spec in self._search_space.items()}
            if self._is_new(parameters):
                break
            shares = space.array_to_params(space.random_sample())
        return parameters

    def _shares(self, parameters: dict[str, Any]) -> dict[str, float]:
        return {key: share_of(parameters[key], **s) for key, s in self._search_space.items()}

    def _tell(self, parameter_id: int, parameters: dict[str, Any], value: float) -> None:
        super()._tell(parameter_id, self._shares(parameters), value)

    def _replay(self, parameters: dict[str, Any], value: float) -> None:
        self._tell(-1, parameters, value)

    def _reseed(self, number: int) -> None:
        self._random_state.seed(seed_after(self._seed, number))


class Metis(Robust, MetisTuner):
    """NNI's ends the search at a result that is not finite; spaces of numbers only, none of them log."""

    types = ("choice", "randint", "uniform", "quniform")
    numbers_only = True

    def __init__(self, optimize_mode: str = "maximize", seed: int | None = None, **kwargs: Any):
        super().__init__(optimize_mode, **kwargs)
        metis_library.minimize = minimize
        metis_model.create_model = metis_process
        self._seed = seed
        self._results: list[tuple[dict[str, Any], float]] = []

    def _new_space(self, space: dict[str, Any]) -> None:
        random.seed(self._seed)  # NNI's draws from both
        np.random.seed(self._seed)
        # NNI's only ever adds to these, by the place of a key.
        self.key_order, self.total_data = [], []
        self.samples_x, self.samples_y, self.samples_y_aggregation = [], [], []
        super()._new_space({key: for_metis(**spec) for key, spec in space.items()})
        results, self._results = self._results, []
        self._replay_fitting(results)

    def _tell(self, parameter_id: int, parameters: dict[str, Any], value: float) -> None:
        self._results.append((parameters, value))
        super()._tell(parameter_id, parameters, value)

    def _replay(self, parameters: dict[str, Any], value: float) -> None:
        self.total_data.append(parameters)
        self._tell(-1, parameters, value)

    def _reseed(self, number: int) -> None:
        random.seed(seed_after(self._seed, number))
        np.random.seed(seed_after(self._seed, number))


def minimize(fun: Any, x0: Any, *args: Any, **kwargs: Any) -> Any:
    """scipy's as it was when NNI was written: x0 may be (1, n) and the least value is an array."""

    def scalar(x: np.ndarray, *rest: Any) -> float:
        return float(np.ravel(fun(x, *rest))[0])

    result = scipy.optimize.minimize(scalar, np.ravel(x0), *args, **kwargs)
    result.fun = np.atleast_1d(result.fun)
    return result


def with_index(space: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
    """Parameters as Evolution keeps them, the value of a choice with its number."""
    result = {}
    for name, value in parameters.items():
        spec = space[name]
        if name == "_name" or spec["_type"] != "choice":
            result[name] = value
        elif isinstance(value, dict):
            names = [option["_name"] for option in spec["_value"]]
            index = names.index(value["_name"])
            result[name] = {"_index": index, "_value": with_index(spec["_value"][index], value)}
        else:
            result[name] = {"_index": spec["_value"].index(value), "_value": value}
    return result


def of_share(share: float, _type: str, _value: list[Any]) -> float:
    """The value of a key at a share, 0 to 1, of its range; steps are made of it by `cleaned`."""
    if _type == "choice":
        ordered = sorted(_value)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
    low, high = range_of(_type, _value)
    between = low + float(share) * (high - low)
    value = math.exp(between) if "log" in _type else between
    if _type == "randint":
        return min(max(round(value), _value[0]), _value[1] - 1)
    return min(max(value, _value[0]), _value[1])


def share_of(value: float, _type: str, _value: list[Any]) -> float:
    """Where in its range the value of a key is; of a choice the middle of its part."""
    if _type == "choice":
        return (sorted(_value).index(value) + 0.5) / len(_value)
    low, high = range_of(_type, _value)
    between = math.log(value) if "log" in _type else value
    return (between - low) / (high - low) if high > low else 0.5


def range_of(_type: str, _value: list[Any]) -> tuple[float, float]:
    """The ends of a range, in the logarithm where it is of one; the end steps are as wide as others."""
    if "log" in _type:
        return math.log(_value[0]), math.log(_value[1])
    margin = {"randint": 0.5, "quniform": _value[-1] / 2}.get(_type, 0.0)
    return _value[0] - margin, _value[1] - (_type == "randint") + margin


def for_metis(_type: str, _value: list[Any]) -> dict[str, Any]:
    """One key as NNI's Metis gets it right: with a randint it may suggest the end, which is excluded."""
    if _type == "randint":
        return {"_type": "choice", "_value": list(range(*_value))}
    if _type == "quniform":
        low, high, q = _value
        steps = range(round(low / q), round(high / q) + 1)
        return {"_type": "choice", "_value": sorted({min(max(k * q, low), high) for k in steps})}
    return {"_type": _type, "_value": sorted(_value) if _type == "choice" else _value}
