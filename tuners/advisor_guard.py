"""What NNI 3.0's Hyperband and BOHB lack to survive their trials; tuners/ has one class for each."""

import logging
import time
from types import ModuleType
from typing import Any

import nni
from nni.runtime.env_vars import dispatcher_env_vars
from nni.runtime.msg_dispatcher_base import MsgDispatcherBase
from nni.utils import MetricType
from robust_tuner import finite_number

log = logging.getLogger(f"nni.{__name__}")  # which NNI writes to dispatcher.log


class Channel(MsgDispatcherBase):
    """The end of NNI's class chain: outside of NNI, for --check and tests, it connects to nobody."""

    def __init__(self) -> None:
        inside = dispatcher_env_vars.NNI_TUNER_COMMAND_CHANNEL
        super().__init__(None if inside else "ws://_unittest_")

    def enqueue_command(self, command: Any, data: Any) -> None:
        # NNI has two threads, one for the ends of trials and one for their final results: an end that
        # comes first would promote without the result, and both change the brackets.
        self.default_command_queue.put((command, data))


class Guard:
    """To be put before NNI's class: lets through what it can take, and thins out brackets that fail.

    `running` are the parameter ids that were handed out and have not ended; "2_0_7" is bracket 2,
    round 0, configuration 7.
    """

    largest_budget = 0  # that a trial is given; --check compares it with --epochs

    def prepare(self, module: ModuleType, seed: int | None) -> None:
        """To be called when NNI's class, which is of `module`, is made; sets `self.seed`."""
        self.running: set[str] = set()
        self.finished: set[str] = set()  # with a final result
        # After `nnictl resume` trials of the earlier start run again; theirs must not be our ids.
        self.resumes = dispatcher_env_vars.NNI_MODE == "resume"
        if self.resumes:
            module._next_parameter_id = int(time.time())
            # With the same random numbers it would suggest what it did at the earlier start.
            seed = None if seed is None else (seed + module._next_parameter_id) % 2**32
        self.seed = seed

    def bracket_and_round(self, parameter_id: str) -> tuple[Any, int]:
        """The bracket, and the round in it, that a parameter id is of."""
        raise NotImplementedError

    def is_created_in_previous_exp(self, param_id: Any) -> bool:
        """Of NNI, which compares with a number and here gets strings; see `running` instead."""
        return False

    def handle_add_customized_trial(self, data: Any) -> None:
        """Trials of an earlier start, or of the page's button: they run, and are not of a bracket."""

    def _get_one_trial_job(self) -> dict[str, Any] | None:
        job = super()._get_one_trial_job()
        if job is not None:
            self.running.add(job["parameter_id"])
        return job

    def handle_report_metric_data(self, data: dict[str, Any]) -> None:
        """An intermediate or final result; ignored if it is of no running trial, or not a number."""
        parameter_id, final = data["parameter_id"], data["type"] == MetricType.FINAL
        known = parameter_id in self.running and parameter_id not in self.finished
        if not known or finite_number(data["value"]) is None:
            log.warning("ignored: %s", data)
            return
        if final:
            self.finished.add(parameter_id)
        super().handle_report_metric_data(data)

    def handle_trial_end(self, data: dict[str, Any]) -> None:
        """The end of a trial; what failed or was stopped is not promoted, and its round goes on."""
        parameter_id = nni.load(data["hyper_params"])["parameter_id"]
        if parameter_id not in self.running:
            log.warning("ignored: %s", data)
            return
        self.running.remove(parameter_id)
        bracket, i = self.bracket_and_round(parameter_id)
        candidates = bracket.configs_perf[i]
        if data["event"] != "SUCCEEDED":
            candidates.pop(parameter_id, None)
        if bracket.num_finished_configs[i] + 1 >= bracket.num_configs_to_run[i]:
            # NNI takes the best n / eta ** round of the candidates, of which there may be fewer; one at
            # least, for a round without a trial never ends.
            scale = bracket.eta**bracket.i
            bracket.n = min(max(bracket.n, scale), len(candidates) * scale)
            bracket.no_more_trial = bracket.no_more_trial or not candidates
        super().handle_trial_end(data)
