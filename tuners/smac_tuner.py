"""SMAC on SMAC3 2.x (random forest, expected improvement), since NNI's SMAC does not install any more.

    tuner: {codeDirectory: tuners, className: smac_tuner.Smac, classArgs: {optimize_mode: maximize}}

Needs `pip install -r tuners/requirements-smac.txt`. Hutter, Hoos, Leyton-Brown: Sequential Model-Based
Optimization for General Algorithm Configuration, 2011; Lindauer et al., JMLR 23 (54), 2022.
"""

import importlib.util
import math
import tempfile
import warnings
from pathlib import Path
from statistics import NormalDist
from typing import Any

from nni.algorithms.hpo.random_tuner import suggest
from nni.common.hpo_utils import deformat_parameters, format_parameters
from robust_tuner import Remembering, cleaned, frozen

TAIL = 1e-3  # of a normal, beyond which nothing is suggested
TRIES = 20  # for parameters that were not tried yet
# How hard the best point of the model is looked for; with SMAC's own sizes seconds a suggestion.
EFFORT = {"challengers": 1000, "local_search_iterations": 3, "n_steps_plateau_walk": 3}


class Smac(Remembering):
    """Every type of search space; a nested choice becomes conditions, a failed trial a crash of SMAC.

    `startup_trials` are spread over the space (a Sobol sequence) before the model is asked.
    """

    def __init__(
        self, optimize_mode: str = "maximize", seed: int | None = None, startup_trials: int = 10
    ) -> None:
        if importlib.util.find_spec("smac") is None:
            raise ValueError("SMAC is not installed: pip install -r tuners/requirements-smac.txt")
        super().__init__(optimize_mode, seed)
        self._startup_trials = startup_trials
        self._folder = tempfile.TemporaryDirectory(prefix="smac-")  # it writes even if not asked to
        self._facade: Any = None
        # By `_key` of the parameters: those of trials that run, what the present facade waits for (several
        # TrialInfo where its points are the same on the steps of a q type), and how trials ended.
        self._running: dict[Any, dict[str, Any]] = {}
        self._asked: dict[Any, list[Any]] = {}
        self._losses: dict[Any, float | None] = {}

    def _new_space(self, space: dict[str, Any]) -> None:
        super()._new_space(space)
        self._names = {key: f"p{number}" for number, key in enumerate(self._specs)}
        self._facade = None

    def _propose(self, parameter_id: int) -> dict[str, Any]:
        point = self._ask()
        if point is None:
            self._facade = None  # its generator has ended, or it does not know what is tried now
            point = suggest(self._rng, self._specs)
        # The point itself if it is new, else what is left of a grid, else NoMoreTrialError.
        parameters = deformat_parameters(self._unused(point), self._specs)
        self._running[self._key(parameters)] = parameters
        return parameters

    def _ask(self) -> dict[Any, Any] | None:
        """A point of SMAC's that was not suggested before, None if it has none."""
        # SMAC takes seconds to import, NNI waits 10 s for a tuner: not before the first suggestion.
        from smac.main.exceptions import ConfigurationSpaceExhaustedException

        for _ in range(TRIES):
            try:
                self._facade = self._facade or self._make_facade()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # means of empty slices
                    info = self._facade.ask()
            except (StopIteration, ConfigurationSpaceExhaustedException):
                return None
            point = self._point(info.config)
            key = self._key(deformat_parameters(point, self._specs))
            if key in self._losses:
                self._facade.tell(info, self._result(self._losses[key]), save=False)
                continue
            self._asked.setdefault(key, []).append(info)
            if key not in self._running:
                return point
        return None

    def _key(self, parameters: dict[str, Any]) -> Any:
        return frozen(cleaned(parameters, self._search_space))

    def _tell(self, parameter_id: int, parameters: dict[str, Any], value: float) -> None:
        if (parameters, None) in self._history:  # its end came first, and was taken for a crash
            self._history.remove((parameters, None))
            self._facade = None  # all is told again
        super()._tell(parameter_id, parameters, value)
        self._learn(parameters, self._sign * value)

    def _fail(self, parameter_id: int, parameters: dict[str, Any]) -> None:
        super()._fail(parameter_id, parameters)
        self._learn(parameters, None)

    def _under_way(self, parameters: dict[str, Any]) -> None:
        super()._under_way(parameters)
        self._running[frozen(parameters)] = parameters
        self._facade = None

    def _learn(self, parameters: dict[str, Any], loss: float | None) -> None:
        """One result, or None for a failure, to SMAC."""
        key = frozen(parameters)
        self._losses[key] = loss
        self._running.pop(key, None)
        losses = [known for _, known in self._history if known is not None]
        if len(losses) < len(self._history) and len(losses) <= 1:
            # How bad a failure is, is known from the first result on; then all are told again.
            self._facade = None
        for info in self._asked.pop(key, ()) if self._facade else ():
            self._facade.tell(info, self._result(loss), save=False)

    def _result(self, loss: float | None) -> Any:
        """A TrialValue; a failure is a crash, as far behind the worst result as that is behind the best."""
        from smac.runhistory import StatusType, TrialValue

        if loss is not None:
            return TrialValue(cost=loss)
        # Equal to the worst, a failure would look no worse than the only result there is.
        losses = [known for _, known in self._history if known is not None] or [0.0]
        cost = max(losses) + (max(losses) - min(losses) or 1.0)
        return TrialValue(cost=cost, status=StatusType.CRASHED)

    # --- SMAC's side ----------------------------------------------------------------------------

    def _make_facade(self) -> Any:
        """SMAC for the search space as it is now, told all that fits into it, ended or running."""
        from smac import HyperparameterOptimizationFacade as Facade
        from smac import Scenario
        from smac.acquisition.function import EI
        from smac.acquisition.maximizer import LocalAndSortedRandomSearch
        from smac.model.random_forest.random_forest import RandomForest
        from smac.runhistory import TrialInfo
        from smac.runhistory.encoder import RunHistoryEncoder

        known = self._known()
        scenario = Scenario(
            self._config_space(),
            deterministic=True,
            n_trials=10**6,  # NNI counts them
            seed=int(self._rng.integers(2**31)),
            output_directory=Path(self._folder.name),
        )
        facade = Facade(
            scenario,
            target_function=None,
            initial_design=Facade.get_initial_design(
                scenario, n_configs=max(0, self._startup_trials - len(known)), max_ratio=1.0
            ),
            acquisition_maximizer=LocalAndSortedRandomSearch(
                scenario.configspace, seed=scenario.seed, **EFFORT
            ),
            # As in Facade.get_model and so on, but one thread, as the cores are for the trials; without
            # the limit on leaves, for which scikit-learn would prepare 130 MB a tree; and without the
            # logarithm of results, which is infinite where the best ones are equal.
            model=RandomForest(
                scenario.configspace, ratio_features=1.0, min_samples_split=2, min_samples_leaf=1,
                max_leaf_nodes=None, seed=scenario.seed, n_jobs=1,
            ),
            acquisition_function=EI(),
            runhistory_encoder=RunHistoryEncoder(scenario),
            intensifier=Facade.get_intensifier(scenario, max_config_calls=1),
            config_selector=Facade.get_config_selector(scenario, retrain_after=1),
            overwrite=True,
            logging_level=False,
        )  # fmt: skip
        self._asked.clear()
        finite = any(loss is not None for _, loss in known)
        for point, loss in known if finite else ():  # its own trials then take the same seed
            config = self._configuration(scenario.configspace, point)
            facade.tell(TrialInfo(config, seed=0), self._result(loss), save=False)
        for key, parameters in self._running.items():
            if self._fits(parameters):
                point = format_parameters(parameters, self._specs)
                info = TrialInfo(self._configuration(scenario.configspace, point), seed=0)
                facade.runhistory.add_running_trial(info)
                self._asked[key] = [info]
        return facade

    def _config_space(self) -> Any:
        """The search space as one of ConfigSpace, with a condition for what a nested choice brings."""
        from ConfigSpace import ConfigurationSpace, EqualsCondition

        space, made = ConfigurationSpace(), {}
        for key, spec in self._specs.items():
            made[key] = hyperparameter(self._names[key], spec)
            space.add(made[key])
            if spec.is_nested():
                space.add(EqualsCondition(made[key], made[key[:-2]], key[-2]))
        return space

    def _point(self, config: Any) -> dict[Any, Any]:
        """A configuration in NNI's internal form."""
        return {
            key: to_internal(config[name], self._specs[key])
            for key, name in self._names.items()
            if name in config
        }

    def _configuration(self, space: Any, point: dict[Any, Any]) -> Any:
        """The configuration of a point that NNI had from an earlier start."""
        from ConfigSpace import Configuration

        values = {}
        for key, value in point.items():
            hyper = space[self._names[key]]
            value = from_internal(value, self._specs[key])
            lower, upper = getattr(hyper, "lower", value), getattr(hyper, "upper", value)
            values[hyper.name] = min(max(value, lower), upper)
        return Configuration(space, values=values)


def hyperparameter(name: str, spec: Any) -> Any:
    """ConfigSpace's for one of NNI: a number of a choice, a count of steps, a quantile, or a value."""
    from ConfigSpace import CategoricalHyperparameter, Float, Integer

    if spec.type == "choice":
        return CategoricalHyperparameter(name, list(range(spec.size)))
    if spec.type == "randint":
        return Integer(name, (0, spec.size - 1)) if spec.size > 1 else one_value(name, 0)
    if spec.normal_distributed:
        return Float(name, (TAIL, 1 - TAIL))
    if spec.q is None:
        return Float(name, (spec.low, spec.high))
    low, high = (round(end / spec.q) for end in spec.clip)
    log = bool(spec.log_distributed and low > 0)
    return Integer(name, (low, high), log=log) if low < high else one_value(name, low)


def one_value(name: str, value: int) -> Any:
    """A hyperparameter that cannot vary."""
    from ConfigSpace import CategoricalHyperparameter

    return CategoricalHyperparameter(name, [value])


def to_internal(value: Any, spec: Any) -> float:
    """NNI's internal value (an index, or a number before exp and rounding) of ConfigSpace's."""
    if spec.categorical:
        return int(value)
    if spec.normal_distributed:
        return NormalDist(spec.mu, spec.sigma).inv_cdf(float(value))
    if spec.q is None:
        return float(value)
    number = float(value) * spec.q
    return math.log(max(number, spec.clip[0])) if spec.log_distributed else number


def from_internal(value: float, spec: Any) -> Any:
    """The reverse of `to_internal`."""
    if spec.categorical:
        return int(value)
    if spec.normal_distributed:
        return NormalDist(spec.mu, spec.sigma).cdf(value)
    if spec.q is None:
        return float(value)
    return round((math.exp(value) if spec.log_distributed else value) / spec.q)
