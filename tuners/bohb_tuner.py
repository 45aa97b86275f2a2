"""BOHB for NNI's `tuner: {codeDirectory: tuners, className: bohb_tuner.BOHB}`.

It needs `pip install ConfigSpace statsmodels`. NNI 3.0's own ends at the first result (it compares its
ids, which are strings, with numbers), learns from all results as if their budget were 0, and knows
neither `q` nor normal types with today's ConfigSpace.
"""

import logging
from typing import Any

import nni
import numpy as np
from advisor_guard import Channel, Guard

try:
    import ConfigSpace
    from nni.algorithms.hpo.bohb_advisor import bohb_advisor
    from nni.algorithms.hpo.bohb_advisor.config_generator import CG_BOHB
except ImportError as error:
    raise ImportError(f"{error}: pip install ConfigSpace statsmodels") from None
from nni.common.hpo_utils import deformat_parameters, format_parameters
from nni.runtime.tuner_command_channel import CommandType
from nni.utils import MetricType, OptimizeMode
from robust_tuner import finite_number, formatted, frozen, left_out_of_resume

log = logging.getLogger(f"nni.{__name__}")  # which NNI writes to dispatcher.log
BUDGET = "TRIAL_BUDGET"


class Generator(CG_BOHB):
    """NNI's model of good and bad configurations, over a space in which each key is a number.

    A key of NNI becomes a choice by index, or a share of its range (of 6 sigma for a normal) from 0 to 1,
    so that every type and nested choices are possible, whatever ConfigSpace calls them.
    """

    def __init__(self, space: dict[str, Any], seed: int | None, **options: Any) -> None:
        self.specs = formatted(space)
        self.tried: set[Any] = set()
        configspace = ConfigSpace.ConfigurationSpace(seed=seed)
        for key, spec in self.specs.items():
            if spec.categorical:
                values = ConfigSpace.CategoricalHyperparameter(str(key), list(range(spec.size)))
            else:
                values = ConfigSpace.UniformFloatHyperparameter(str(key), 0.0, 1.0)
            configspace.add(values)
        super().__init__(configspace, **options)

    def get_config(self, budget: int) -> dict[str, Any]:
        """A configuration in NNI's form, with its budget; one that was not handed out yet, if 20 draws find one."""
        for _ in range(20):
            point = super().get_config(budget)
            active: dict[Any, Any] = {}
            for key, spec in self.specs.items():
                if spec.is_activated_in(active):
                    low, high = ends(spec)
                    share = point[str(key)]
                    active[key] = (
                        int(share) if spec.categorical else low + float(share) * (high - low)
                    )
            parameters = deformat_parameters(active, self.specs)
            if frozen(parameters) not in self.tried:
                break
        self.tried.add(frozen(parameters))
        return parameters | {BUDGET: budget}

    def new_result(
        self, loss: float | None, budget: int, parameters: dict[str, Any], update_model: bool = True
    ) -> None:
        """Learn from a result; None is a failure. One of another search space is ignored."""
        try:
            active = format_parameters(parameters, self.specs)
        except (KeyError, ValueError, TypeError):
            log.warning("not of this search space: %s", parameters)
            return
        self.tried.add(frozen(parameters))  # before a resume, too
        point = {}
        for key, spec in self.specs.items():
            low, high = ends(spec)
            middle = 0 if spec.categorical else (low + high) / 2  # of options that were not chosen
            value = active.get(key, middle)
            share = value if spec.categorical else (value - low) / ((high - low) or 1)
            point[str(key)] = share if spec.categorical else float(np.clip(share, 0, 1))
        super().new_result(loss, budget, point, update_model)


def ends(spec: Any) -> tuple[float, float]:
    """Of a range, in the logarithm for the log types; of a normal all but 0.3 % of it."""
    if spec.categorical:
        return 0, spec.size
    if spec.normal_distributed:
        return spec.mu - 3 * spec.sigma, spec.mu + 3 * spec.sigma
    return spec.low, spec.high


class BOHB(Guard, bohb_advisor.BOHB, Channel):
    """Hyperband whose configurations come from a model of the results so far.

    Falkner, Klein and Hutter 2018, https://arxiv.org/abs/1807.01774. Budgets are epochs.
    """

    def __init__(
        self,
        optimize_mode: str = "maximize",
        min_budget: int = 1,
        max_budget: int = 3,
        eta: int = 3,
        min_points_in_model: int | None = None,
        top_n_percent: int = 15,
        num_samples: int = 64,
        random_fraction: float = 1 / 3,
        bandwidth_factor: float = 3,
        min_bandwidth: float = 1e-3,
        seed: int | None = None,
    ) -> None:
        if not (1 <= min_budget <= max_budget and eta >= 2):
            raise ValueError(f"1 <= min_budget {min_budget} <= max_budget {max_budget}, eta >= 2")
        super().__init__(
            optimize_mode, min_budget, max_budget, eta, min_points_in_model, top_n_percent,
            num_samples, random_fraction, bandwidth_factor, min_bandwidth,
        )  # fmt: skip
        self.prepare(bohb_advisor, seed)
        self.largest_budget = max_budget
        np.random.seed(self.seed)  # what NNI's model draws from

    def bracket_and_round(self, parameter_id: str) -> tuple[Any, int]:
        s, i, _ = parameter_id.split("_")
        return self.brackets[int(s)], int(i)

    def handle_initialize(self, data: dict[str, Any]) -> None:
        self.handle_update_search_space(data)
        self.send(CommandType.Initialized, "")

    def handle_request_trial_jobs(self, data: int) -> None:
        if not self.brackets:  # not before the results of an earlier start are imported
            self.generate_new_bracket()
        super().handle_request_trial_jobs(data)

    def handle_update_search_space(self, data: dict[str, Any]) -> None:
        self.search_space = data
        self.cg = Generator(
            data, self.seed, min_points_in_model=self.min_points_in_model,
            top_n_percent=self.top_n_percent, num_samples=self.num_samples,
            random_fraction=self.random_fraction, bandwidth_factor=self.bandwidth_factor,
            min_bandwidth=self.min_bandwidth,
        )  # fmt: skip

    def handle_report_metric_data(self, data: dict[str, Any]) -> None:
        # NNI takes the number of the report, 0 for every final result, for the budget.
        parameters = self.parameters.get(data["parameter_id"], {})
        if data["type"] == MetricType.FINAL:
            data["sequence"] = parameters.get(BUDGET)
        super().handle_report_metric_data(data)

    def handle_trial_end(self, data: dict[str, Any]) -> None:
        parameter_id = nni.load(data["hyper_params"])["parameter_id"]
        if parameter_id in self.running - self.finished:
            parameters = dict(self.parameters[parameter_id])
            budget = parameters.pop(BUDGET)
            self.cg.new_result(loss=None, budget=budget, parameters=parameters)
        super().handle_trial_end(data)

    def handle_import_data(self, data: list[dict[str, Any]]) -> None:
        """Results of before `nnictl resume`, or imported ones: the model learns from them again."""
        if self.resumes:
            self.resumes, data = False, [*data, *left_out_of_resume()]
        for entry in data:
            parameters, value = dict(entry["parameter"]), finite_number(entry["value"])
            budget = parameters.pop(BUDGET, self.max_budget)
            if value is not None:
                loss = -value if self.optimize_mode is OptimizeMode.Maximize else value
                self.cg.new_result(loss=loss, budget=budget, parameters=parameters)
