"""What every tuner of this folder shares: a search that neither a result nor a failure of a trial can end."""

import logging
import math
import os
import threading
from collections.abc import Hashable
from fractions import Fraction
from typing import Any

import nni
import numpy as np
import requests
from nni.common.hpo_utils import Deduplicator, format_parameters, format_search_space
from nni.common.hpo_utils.formatting import ParameterSpec
from nni.runtime.env_vars import dispatcher_env_vars
from nni.tuner import Tuner

log = logging.getLogger("nni.vit_tuners")
RANGES = ("uniform", "quniform", "loguniform", "qloguniform")
NUMBERS = (*RANGES, "normal", "qnormal", "lognormal", "qlognormal")
ENDED = {"SUCCEEDED", "FAILED", "USER_CANCELED", "SYS_CANCELED", "EARLY_STOPPED"}


class Robust(Tuner):
    """Goes before a tuner of NNI in the list of bases, or under a tuner of ours.

    NNI's dispatcher ends without a word when a tuner raises. Its engine, the methods with an underscore,
    is told one finite result or one failure of each trial that it suggested, and nothing else.
    """

    types = ("choice", "randint", *NUMBERS)  # that the engine can search
    numbers_only = False  # whether a choice must be of numbers

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # NNI reports the end of a trial from another thread than its result, in any order.
        self._lock = threading.RLock()
        self._suggested: dict[int, dict[str, Any]] = {}
        self._told: set[int] = set()
        self._ended: set[int] = set()
        self._tried: set[Hashable] = set()  # what was suggested, before a resume too
        self._search_space: dict[str, Any] = {}  # as it was given
        self._specs: dict[Any, Any] = {}  # in NNI's internal form
        self._ending: threading.Thread | None = None
        self._resumes = dispatcher_env_vars.NNI_MODE == "resume"

    # --- what NNI calls ---------------------------------------------------------------------------

    def update_search_space(self, search_space: dict[str, Any]) -> None:
        """Raises ValueError if the engine cannot search it; once trials run it keeps the old one then."""
        try:
            self._check_types(search_space)
        except ValueError as error:
            if not self._specs:
                raise
            log.error("the search space stays as it was: %s", error)
            return
        with self._lock:
            self._search_space, self._specs = search_space, formatted(search_space)
            # A trial of the space as it was, and not of this one, tells nothing any more.
            self._suggested = {i: p for i, p in self._suggested.items() if self._fits(p)}
            self._new_space(search_space)

    def _check_types(self, search_space: dict[str, Any]) -> None:
        name = type(self).__name__
        for key, spec in search_space.items():
            values = spec["_value"] if spec["_type"] == "choice" else []
            if spec["_type"] not in self.types:
                raise ValueError(f"{name} cannot search {key}: it takes {' '.join(self.types)}")
            if self.numbers_only and not all(isinstance(v, int | float) for v in values):
                raise ValueError(f"{name} cannot search {key}: it takes a choice of numbers only")

    def _fits(self, parameters: Any) -> bool:
        """Whether they are of the search space as it is now."""
        try:
            numbers = format_parameters(parameters, self._specs)
        except (KeyError, ValueError, TypeError, IndexError):
            return False
        specs = {key: self._specs[key] for key in numbers if self._specs[key].categorical}
        return all(0 <= numbers[key] < spec.size for key, spec in specs.items())  # of a randint

    def generate_parameters(self, parameter_id: int, **kwargs: Any) -> dict[str, Any]:
        """Plain Python numbers and strings. Raises nni.NoMoreTrialError where there is nothing left."""
        with self._lock:
            try:
                proposed = self._propose(parameter_id)
            except OverflowError:  # of NNI's grid, which goes out to infinity for steps of a normal
                raise nni.NoMoreTrialError("all but what is most unlikely was tried") from None
            parameters = cleaned(proposed, self._search_space)
            self._suggested[parameter_id] = parameters
            self._tried.add(frozen(parameters))
            return parameters

    def _is_new(self, proposed: Any) -> bool:
        """Whether no trial had these parameters yet: with the same seed it would give the same result."""
        return frozen(cleaned(proposed, self._search_space)) not in self._tried

    def generate_multiple_parameters(
        self, parameter_id_list: list[int], **kwargs: Any
    ) -> list[Any]:
        """As many as there are; with less than asked for the experiment is to end."""
        with self._lock:
            found = super().generate_multiple_parameters(parameter_id_list, **kwargs)
            if len(found) < len(parameter_id_list) and not (
                self._ending and self._ending.is_alive()
            ):
                self._ending = threading.Thread(target=end_when_idle, daemon=True)
                self._ending.start()
            return found

    def receive_trial_result(
        self, parameter_id: int, parameters: Any, value: Any, **kwargs: Any
    ) -> None:
        """The first finite result of a trial of ours; any other is dropped."""
        with self._lock:
            number = finite_number(value)
            if parameter_id not in self._suggested or parameter_id in self._told or number is None:
                log.warning("dropped the result %r of parameters %r", value, parameter_id)
                return
            self._told.add(parameter_id)
            self._tell(parameter_id, self._suggested[parameter_id], number)

    def trial_end(self, parameter_id: int, success: bool, **kwargs: Any) -> None:
        """A trial without a result has failed, whatever its status is."""
        with self._lock:
            if parameter_id in self._suggested and parameter_id not in self._ended:
                self._ended.add(parameter_id)
                if parameter_id in self._told:
                    self._done(parameter_id)
                else:
                    self._fail(parameter_id, self._suggested[parameter_id])

    def import_data(self, data: Any) -> None:
        """The results of before `nnictl resume`, and of trials that it let run again."""
        with self._lock:
            data = nni.load(data) if isinstance(data, str) else data
            resumes, self._resumes = self._resumes, False
            if resumes:
                data = [*data, *left_out_of_resume()]
            for trial in data:
                trial = nni.load(trial) if isinstance(trial, str) else trial
                number, parameters = finite_number(trial.get("value")), trial.get("parameter")
                known = number is not None or "under_way" in trial
                if not known or not self._fits(parameters):
                    log.warning("not imported: %r", trial)
                    continue
                self._tried.add(frozen(parameters))
                if number is not None:
                    self._replay(parameters, number)
                else:
                    self._under_way(parameters)
            if resumes:  # first of all, and not once more when trials end that go on after it
                # With random numbers that it had before, a tuner would suggest the same again.
                self._reseed(len(data))

    # --- the engine; by default the tuner of NNI that is the next base ------------------------------

    def _new_space(self, space: dict[str, Any]) -> None:
        super().update_search_space(space)

    def _propose(self, parameter_id: int) -> dict[str, Any]:
        return super().generate_parameters(parameter_id)

    def _tell(self, parameter_id: int, parameters: dict[str, Any], value: float) -> None:
        super().receive_trial_result(parameter_id, parameters, value)

    def _fail(self, parameter_id: int, parameters: dict[str, Any]) -> None:
        super().trial_end(parameter_id, False)

    def _done(self, parameter_id: int) -> None:
        super().trial_end(parameter_id, True)

    def _replay(self, parameters: dict[str, Any], value: float) -> None:
        super().import_data([{"parameter": parameters, "value": value}])

    def _replay_fitting(self, results: list[tuple[dict[str, Any], float]]) -> None:
        """Of earlier results those that fit into the search space as it is now."""
        for parameters, value in results:
            if self._fits(parameters):
                self._replay(parameters, value)

    def _under_way(self, parameters: dict[str, Any]) -> None:
        """Of a trial that goes on after a resume, and tells its result later: not to be tried again."""

    def _reseed(self, number: int) -> None:
        """Other random numbers than at the start, the same ones for the same seed and number."""


class Remembering(Robust):
    """The base of our own tuners: keeps what it was told, for a changed search space and a resume."""

    def __init__(self, optimize_mode: str, seed: int | None) -> None:
        super().__init__()
        if optimize_mode not in ("maximize", "minimize"):
            raise ValueError(f"optimize_mode is maximize or minimize, not {optimize_mode}")
        self._sign = -1.0 if optimize_mode == "maximize" else 1.0
        self._seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        # Parameters and loss, less is better; None for a trial that failed.
        self._history: list[tuple[dict[str, Any], float | None]] = []
        self._reseed(0)

    def _reseed(self, number: int) -> None:
        self._rng = np.random.default_rng([self._seed, number])

    def _new_space(self, space: dict[str, Any]) -> None:
        self._unused = Deduplicator(self._specs)
        for parameters, _ in self._known():
            self._unused.add_history(parameters)

    def _known(self) -> list[tuple[dict[Any, Any], float | None]]:
        """What fits into the search space as it is now, in NNI's internal form."""
        return [
            (format_parameters(parameters, self._specs), loss)
            for parameters, loss in self._history
            if self._fits(parameters)
        ]

    def _tell(self, parameter_id: int, parameters: dict[str, Any], value: float) -> None:
        self._history.append((parameters, self._sign * value))

    def _fail(self, parameter_id: int, parameters: dict[str, Any]) -> None:
        self._history.append((parameters, None))

    def _done(self, parameter_id: int) -> None:
        pass

    def _replay(self, parameters: dict[str, Any], value: float) -> None:
        self._under_way(parameters)
        self._tell(-1, parameters, value)

    def _under_way(self, parameters: dict[str, Any]) -> None:
        self._unused.add_history(format_parameters(parameters, self._specs))


class Spec(ParameterSpec):
    """NNI's raises KeyError for a choice inside of a choice inside of a choice."""

    def is_activated_in(self, partial_parameters: dict[Any, Any]) -> bool:
        """Whether it belongs to the options that were chosen."""
        return not self.is_nested() or partial_parameters.get(self.key[:-2]) == self.key[-2]


def formatted(space: dict[str, Any]) -> dict[Any, Spec]:
    """A search space in NNI's internal form."""
    return {key: Spec(*spec) for key, spec in format_search_space(space).items()}


def finite_number(value: Any) -> float | None:
    """The number of a result of NNI, plain or as "default" of a mapping, in JSON or not; None if there is none."""
    try:
        while isinstance(value, str):  # JSON in JSON, sometimes
            value = nni.load(value)
    except ValueError:
        return None
    value = value.get("default") if isinstance(value, dict) else value
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def cleaned(parameters: Any, space: Any) -> Any:
    """Parameters as plain Python: 0.3 for 0.1 + 0.2, an int where the steps of a q type are whole."""
    if not isinstance(parameters, dict):
        return parameters.item() if isinstance(parameters, np.generic) else parameters
    result = {}
    for name, value in parameters.items():
        spec = space.get(name) if isinstance(space, dict) else None
        kind, values = (spec["_type"], spec["_value"]) if isinstance(spec, dict) else ("", [])
        if kind == "randint":
            result[name] = int(value)
        elif kind.startswith("q"):
            result[name] = on_step(float(value), values, clip="uniform" in kind)
        else:
            chosen = value.get("_name") if isinstance(value, dict) else None
            options = (v for v in values if isinstance(v, dict) and v.get("_name") == chosen)
            result[name] = cleaned(value, next(options, None))
    return result


def on_step(value: float, values: list[float], clip: bool) -> float:
    """The multiple of q that NNI meant, in decimal; a range [low, high, q] need not begin on one."""
    low, high, q = (Fraction(str(v)) for v in values)
    exact = round(Fraction(value) / q) * q
    if clip:
        exact = min(max(exact, low), high)
    return int(exact) if q.denominator == exact.denominator == 1 else float(exact)


def seed_after(seed: int | None, number: int) -> int | None:
    """A seed for the random numbers after so many results; None is none."""
    return (
        None if seed is None else int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    )


def frozen(parameters: Any) -> Hashable:
    """Something that is equal for equal parameters: JavaScript makes 4 of 4.0 in a resume."""
    if isinstance(parameters, dict):
        return frozenset((name, frozen(value)) for name, value in parameters.items())
    return tuple(map(frozen, parameters)) if isinstance(parameters, list) else parameters


def manager() -> tuple[requests.Session, str]:
    """How NNI's manager is asked, and where its REST is; nowhere outside of NNI."""
    session = requests.Session()
    session.trust_env = False  # a proxy has no part in this
    channel = os.environ.get("NNI_TUNER_COMMAND_CHANNEL", "")
    address = channel.replace("ws://", "http://", 1).removesuffix("/tuner")
    return session, address and address + "/api/v1/nni"


def left_out_of_resume() -> list[dict[str, Any]]:
    """The trials that NNI 3.0 does not import at a resume; with None for the result if there is none.

    It leaves out what stopped trials had reached, those that failed, and those under way.
    """
    session, rest = manager()
    try:
        finals = session.get(f"{rest}/metric-data?type=FINAL", timeout=10).json()
        trials = session.get(f"{rest}/trial-jobs", timeout=10).json()
    except requests.RequestException as error:
        log.warning("what stopped trials had reached is not known any more: %s", error)
        return []
    values = {final["trialJobId"]: final["data"] for final in finals}
    found = []
    for trial in trials:
        value, under_way = values.get(trial["trialJobId"]), trial["status"] not in ENDED
        imported = trial["status"] == "SUCCEEDED" and value is not None
        if imported or not trial.get("hyperParameters"):
            continue
        parameters = nni.load(trial["hyperParameters"][0])["parameters"]
        entry = {"parameter": parameters, "value": value}
        found.append(entry | ({"under_way": True} if under_way else {}))
        log.info("known after the resume: %s", found[-1])
    return found


def end_when_idle(pause: float = 2.0) -> None:
    """Waits for the trials that are left and lets NNI call the experiment DONE.

    NNI 3.0 does so only at maxTrialNumber. With a tuner that has no more to suggest it would stay at
    TUNER_NO_MORE_TRIAL for ever, so maxTrialNumber becomes the number of trials that there were.
    """
    session, rest = manager()
    stop, idle = threading.Event(), 0
    # A trial that was handed out may not be listed yet, so it must look idle for a while.
    while idle < 3 and rest:
        stop.wait(pause)
        try:
            trials = session.get(f"{rest}/trial-jobs", timeout=10).json()
            idle = idle + 1 if all(trial["status"] in ENDED for trial in trials) else 0
            if idle == 3:
                profile = session.get(f"{rest}/experiment", timeout=10).json()
                profile["params"]["maxTrialNumber"] = len(trials)
                session.put(
                    f"{rest}/experiment?update_type=MAX_TRIAL_NUM", json=profile, timeout=10
                ).raise_for_status()
                log.info("nothing is left to try: the experiment ends after %d trials", len(trials))
        except requests.RequestException as error:  # `nnictl stop` came first, or NNI is busy
            log.warning("%s", error)
            idle = 0
