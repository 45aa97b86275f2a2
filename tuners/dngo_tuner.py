"""NNI's DNGO (a neural network in the place of a Gaussian process) that a trial cannot end.

    tuner: {codeDirectory: tuners, className: dngo_tuner.Dngo, classArgs: {optimize_mode: maximize}}

Needs `pip install -r tuners/requirements-dngo.txt`. Snoek et al.: Scalable Bayesian Optimization Using
Deep Neural Networks, ICML 2015.
"""

from typing import Any

import numpy as np
from robust_tuner import RANGES, Robust, seed_after

try:
    from nni.algorithms.hpo import dngo_tuner as nni_dngo
except ModuleNotFoundError as error:
    raise ValueError(
        f"DNGO needs {error.name}: pip install -r tuners/requirements-dngo.txt"
    ) from None


random_config = nni_dngo._random_config


class Dngo(Robust, nni_dngo.DNGOTuner):
    """Spaces of numbers only. The model is asked from `trials_per_update` results on."""

    types = ("choice", "randint", *RANGES)
    numbers_only = True

    def __init__(
        self,
        optimize_mode: str = "maximize",
        sample_size: int = 1000,
        trials_per_update: int = 20,
        num_epochs_per_training: int = 500,
        seed: int | None = None,
    ) -> None:
        super().__init__("maximize", sample_size, trials_per_update, num_epochs_per_training)
        # NNI's would pick the least expected improvement to minimize, which is none at all.
        self._sign = 1.0 if optimize_mode == "maximize" else -1.0
        self._seed = seed
        self._values: list[float] = []
        self._failed: dict[int, int] = {}  # parameter_id -> its place among the values
        nni_dngo._random_config = self._new_config

    def _new_config(self, space: dict[str, Any], state: np.random.RandomState) -> dict[str, Any]:
        """A random candidate that was not suggested yet, where there is one: until the model is trained again
        the best of all is the same.
        """
        for _ in range(20):
            config = random_config(space, state)
            if self._is_new(config):
                break
        return config

    def _new_space(self, space: dict[str, Any]) -> None:
        # NNI's trains on the keys in order and predicts on them as they come.
        super()._new_space(dict(sorted(space.items())))
        self.random_state = np.random.RandomState(self._seed)
        self.model.rng = self.model.prior.rng = np.random.RandomState(self._seed)
        if self._seed is not None:
            np.random.seed(self._seed)  # the order of batches
            nni_dngo.torch.manual_seed(self._seed)
        # What it learned is of the keys as they were.
        known = list(zip(self.x, self._values, strict=True))
        self.x, self.y, self._values, self._model_initialized = [], [], [], False
        self._failed = {}
        self._replay_fitting([(parameters, self._sign * value) for parameters, value in known])

    def _tell(self, parameter_id: int, parameters: dict[str, Any], value: float) -> None:
        place = self._failed.pop(parameter_id, None)
        if place is not None:  # its result came after its end
            del self.x[place], self.y[place], self._values[place]
            self._failed = {i: other - (other > place) for i, other in self._failed.items()}
        # NNI's expects an improvement over 0.95, whatever the metric is: that is made the best so far.
        self._values.append(self._sign * value)
        scale = np.std(self._values) or 1.0
        self.y = [0.95 + (v - max(self._values)) / scale for v in self._values[:-1]]
        super()._tell(
            parameter_id, parameters, 0.95 + (self._values[-1] - max(self._values)) / scale
        )

    def _fail(self, parameter_id: int, parameters: dict[str, Any]) -> None:
        # Left out, it would be suggested again and again. So it counts as the worst.
        if self._values:
            self._tell(parameter_id, parameters, self._sign * min(self._values))
            self._failed[parameter_id] = len(self._values) - 1

    def _replay(self, parameters: dict[str, Any], value: float) -> None:
        self._tell(-1, parameters, value)

    def _reseed(self, number: int) -> None:
        self.random_state.seed(seed_after(self._seed, number))
