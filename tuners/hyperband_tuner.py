"""Hyperband for NNI's `tuner: {codeDirectory: tuners, className: hyperband_tuner.Hyperband}`.

NNI 3.0's own ends at the first result, since it compares its ids, which are strings, with numbers.
"""

from typing import Any

import numpy as np
from advisor_guard import Channel, Guard
from nni.algorithms.hpo import hyperband_advisor


class Hyperband(Guard, hyperband_advisor.Hyperband, Channel):
    """Successive halving in brackets (Li et al. 2018, https://arxiv.org/abs/1603.06560), seeded.

    R is the largest budget in epochs, 1/eta of the trials of a round are promoted to eta times theirs.
    """

    def __init__(
        self,
        optimize_mode: str = "maximize",
        R: int = 60,
        eta: int = 3,
        exec_mode: str = "parallelism",
        seed: int | None = None,
    ) -> None:
        if not (R >= 1 and eta >= 2):
            raise ValueError(f"R {R} must be at least 1 and eta {eta} at least 2")
        if exec_mode not in ("parallelism", "serial"):  # with another word NNI's suggests nothing
            raise ValueError(f"exec_mode is parallelism or serial, not {exec_mode}")
        super().__init__(optimize_mode, R, eta, exec_mode)
        self.prepare(hyperband_advisor, seed)
        self.largest_budget = R

    def bracket_and_round(self, parameter_id: str) -> tuple[Any, int]:
        bracket, i, _ = parameter_id.split("_")
        return self.brackets[bracket], int(i)

    def handle_update_search_space(self, data: dict[str, Any]) -> None:
        super().handle_update_search_space(data)
        self.random_state = np.random.RandomState(self.seed)
