"""The tuners of tuners/ by themselves: what they suggest, and what they are told by trials that go wrong."""

import importlib
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import nni
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

REPOSITORY = Path(__file__).resolve().parents[1]


def spec(kind: str, *values: Any) -> dict[str, Any]:
    return {"_type": kind, "_value": list(values)}


LINEAR = {
    "dropout": spec("uniform", 0, 0.5),
    "share": spec("quniform", 0, 1, 0.1),
    "heads": spec("randint", 1, 5),
    "width": spec("choice", 64, 16, 32),
    "depth": spec("quniform", 2, 6, 1),
}
NUMBERS = LINEAR | {
    "lr": spec("loguniform", 1e-5, 1e-2),
    "batch": spec("qloguniform", 2, 64, 2),
}
ALL = NUMBERS | {
    "a": spec("normal", 0, 1),
    "b": spec("qnormal", 5, 2, 1),
    "c": spec("lognormal", 0, 1),
    "d": spec("qlognormal", 1, 1, 0.5),
    "pool": spec("choice", "cls", "mean"),
    "optimizer": spec(
        "choice",
        {"_name": "sgd", "momentum": spec("quniform", 0.1, 0.9, 0.1)},
        {
            "_name": "adam",
            "momentum": spec("randint", 0, 3),
            "decay": spec("choice", {"_name": "none"}, {"_name": "some", "rate": NUMBERS["lr"]}),
        },
    ),
}
GP = {"cold_start_num": 5, "selection_num_warm_up": 100, "selection_num_starting_points": 1}
METIS = {"cold_start_num": 4, "selection_num_starting_points": 1}
DNGO = {"trials_per_update": 10, "num_epochs_per_training": 10, "sample_size": 100}
TUNERS = {  # classArgs, search space, number of suggestions
    "tpe_tuner.Tpe": ({}, ALL, 200),
    "anneal_tuner.Anneal": ({}, ALL, 200),
    "nni_tuners.Evolution": ({"population_size": 8}, ALL, 200),
    "nni_tuners.GridSearch": ({}, ALL, 200),
    "nni_tuners.GP": (GP, NUMBERS, 12),
    "nni_tuners.Metis": (METIS, LINEAR, 6),
    "dngo_tuner.Dngo": (DNGO, NUMBERS, 30),
    "smac_tuner.Smac": ({"startup_trials": 5}, ALL, 15),
}
UNUSABLE = [math.nan, math.inf, "1.0", None, {"accuracy": 1.0}, {"default": None}, True, [1]]


def make(name: str, space: dict[str, Any] | None = None, **arguments: Any) -> Any:
    """A tuner that knows its search space, seeded where it is random at all."""
    module, _, cls = name.rpartition(".")
    if cls not in ("GridSearch",):
        arguments = {"seed": 1, **TUNERS[name][0], **arguments}
    tuner = getattr(importlib.import_module(module), cls)(optimize_mode="maximize", **arguments)
    tuner.update_search_space(space or TUNERS[name][1])
    return tuner


def assert_fits(parameters: dict[str, Any], space: dict[str, Any]) -> None:
    """Every key, no other, a plain type, in range, and on its step without rounding noise."""
    assert parameters.keys() == space.keys()
    for key, value in parameters.items():
        if key == "_name":
            continue
        kind, values = space[key]["_type"], space[key]["_value"]
        if isinstance(value, dict):
            assert_fits(value, next(o for o in values if o["_name"] == value["_name"]))
        elif kind == "choice":
            assert value in values and type(value) is type(values[values.index(value)])
        elif kind == "randint":
            assert type(value) is int and values[0] <= value < values[1]
        else:
            assert type(value) in (int, float) and math.isfinite(value)
            assert "uniform" not in kind or values[0] <= value <= values[1]
            if kind.startswith("q"):
                assert len(str(value)) < 8
                assert math.isclose(value / values[2], round(value / values[2]), abs_tol=1e-6)
                assert values[2] % 1 or type(value) is int


def score(parameters: dict[str, Any]) -> float:
    """Of a made-up trial; the best have a depth of 6, a dropout of 0.15."""
    return parameters.get("depth", 0) - abs(parameters.get("dropout", 0.15) - 0.15)


def run(tuner: Any, count: int, first: int = 0) -> list[dict[str, Any]]:
    """Asks and tells as NNI does, and as it must not: every third trial goes wrong in another way."""
    suggested = []
    for number in range(first, first + count):
        (parameters,) = tuner.generate_multiple_parameters([number])
        suggested.append(parameters)
        good = number % 3 or not number
        value = {"default": score(parameters)} if good else UNUSABLE[number // 3 % len(UNUSABLE)]
        if number % 7 == 5:
            tuner.trial_end(number, False)  # its result comes later, or after a failure
        tuner.receive_trial_result(number, parameters, value)
        tuner.receive_trial_result(number, parameters, {"default": 1e9})
        tuner.receive_trial_result(10**6, parameters, 1.0)
        for _ in range(2):
            tuner.trial_end(number, success=number % 2 == 0)
        tuner.trial_end(10**6, True)
    return suggested


@pytest.mark.parametrize("name", TUNERS)
def test_suggestions_fit_whatever_trials_do_and_repeat_with_the_seed(name: str) -> None:
    _, space, count = TUNERS[name]
    suggested = run(make(name), count)
    for parameters in suggested:
        assert_fits(parameters, space)
    again = min(count, 40)
    assert run(make(name), again) == suggested[:again]


@pytest.mark.long
def test_smac_suggests_200() -> None:
    for parameters in run(make("smac_tuner.Smac"), 200):
        assert_fits(parameters, ALL)


@pytest.fixture
def resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As NNI starts a tuner at `nnictl resume`, here without a manager that could be asked."""
    import robust_tuner

    env = robust_tuner.dispatcher_env_vars._replace(NNI_MODE="resume")
    monkeypatch.setattr(robust_tuner, "dispatcher_env_vars", env)
    monkeypatch.delenv("NNI_TUNER_COMMAND_CHANNEL", raising=False)


@pytest.mark.parametrize("name", TUNERS)
def test_a_resume_brings_the_results_back(name: str, resumed: None) -> None:
    """`nnictl resume` makes a new tuner and imports what JavaScript has kept; it goes on from there."""
    space, count = TUNERS[name][1], min(TUNERS[name][2], 20)
    before = run(make(name), count)
    # JavaScript knows no 4.0; a result that is not one and an older search space are among them.
    kept = [{"parameter": p, "value": {"default": score(p)}} for p in before]
    kept += [{"parameter": before[0], "value": "nan"}, {"parameter": {"old": 1}, "value": 1}]
    tuner = make(name)
    tuner.import_data(json.loads(json.dumps(kept).replace(".0,", ",")))
    after = run(tuner, 3, first=count)
    for parameters in after:
        assert_fits(parameters, space)
        assert parameters not in before


@pytest.mark.parametrize("name", ["tpe_tuner.Tpe", "anneal_tuner.Anneal", "nni_tuners.Evolution"])
def test_no_resume_repeats_a_suggestion(name: str, resumed: None) -> None:
    """Before the first result, with trials in flight, with failures alone, and once more after all that."""
    space = {"lr": spec("loguniform", 1e-5, 1)}
    tuner = make(name, space)
    suggested = [tuner.generate_parameters(number) for number in range(3)]

    def resume(results: int, failures: int = 0) -> Any:
        """Of so many trials there are results, the last ones failed, the others are in flight."""
        in_flight = suggested[results : len(suggested) - failures]
        trials = [{"parameter": p, "value": score(p)} for p in suggested[:results]]
        trials += [{"parameter": p, "value": None, "under_way": True} for p in in_flight]
        trials += [{"parameter": p, "value": None} for p in suggested[len(suggested) - failures :]]
        tuner = make(name, space)
        tuner.import_data(trials)
        return tuner

    def ask(tuner: Any, first: int) -> None:
        suggested.extend(tuner.generate_parameters(number) for number in (first, first + 1))
        assert len({p["lr"] for p in suggested}) == len(suggested)

    ask(resume(0, failures=3), 3)
    tuner = resume(0)
    ask(tuner, 5)
    # NNI brings the result of a trial in flight as data to import, while others are asked for.
    for parameters in suggested[:2]:
        tuner.import_data([{"parameter": parameters, "value": 1}])
    ask(tuner, 7)
    ask(resume(2), 9)


SMALLER = LINEAR | {"dropout": spec("uniform", 0, 0.01), "width": spec("choice", 32, 64)}
CHANGES = {
    "smaller": SMALLER,
    "another order": dict(reversed(LINEAR.items())) | {"wd": spec("uniform", 0, 1)},
    "other keys": {k: v for k, v in LINEAR.items() if k != "share"} | {"wd": spec("uniform", 0, 1)},
    "higher numbers": LINEAR | {"heads": spec("randint", 3, 9)},
    "fewer numbers": LINEAR | {"heads": spec("randint", 1, 3)},
}


QUICK = ("Tpe", "Anneal", "Evolution", "GridSearch")
ALL_TUNERS = [
    pytest.param(name, marks=() if name.endswith(QUICK) else pytest.mark.slow) for name in TUNERS
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ALL_TUNERS)
def test_the_search_space_may_change_while_trials_run(name: str, change: str) -> None:
    """`nnictl update searchspace`, or the page: one trial is of the space as it was when it ends."""
    tuner, count = make(name, LINEAR), min(TUNERS[name][2], 12)
    run(tuner, count)
    running = [(number, tuner.generate_parameters(number)) for number in (100, 101)]
    tuner.update_search_space(CHANGES[change])
    for number, parameters in running:
        tuner.receive_trial_result(number, parameters, 1.0)
        tuner.trial_end(number, True)
    for parameters in run(tuner, count, first=200):
        assert_fits(parameters, CHANGES[change])


@pytest.mark.parametrize("ends", [True, False], ids=["failed", "running"])
def test_tpe_repeats_nothing_after_a_changed_search_space(ends: bool) -> None:
    space = {"a": spec("choice", 1, 2, 3), "b": spec("randint", 0, 4)}
    tuner, suggested = make("tpe_tuner.Tpe", space), []
    for number in range(12):
        if number == 6:
            tuner.update_search_space(space)
        suggested.append(tuple(tuner.generate_parameters(number).values()))
        if ends:
            tuner.trial_end(number, False)
    assert len(set(suggested)) == 12
    with pytest.raises(nni.NoMoreTrialError):
        tuner.generate_parameters(12)


def test_dngo_takes_a_late_result_for_the_failure_that_it_took_it_for() -> None:
    tuner = make("dngo_tuner.Dngo", FAILING)
    for number in range(4):
        tuner.receive_trial_result(number, tuner.generate_parameters(number), number)
    for number in (4, 5, 6):
        tuner.generate_parameters(number)
        tuner.trial_end(number, False)
    assert tuner._values == [0, 1, 2, 3, 0, 0, 0]
    for number in (5, 4):
        tuner.receive_trial_result(number, None, 10 * number)
    assert tuner._values == [0, 1, 2, 3, 0, 50, 40] and len(tuner.x) == len(tuner.y) == 7


def test_a_search_space_that_cannot_be_searched_leaves_the_old_one() -> None:
    tuner = make("nni_tuners.Metis", LINEAR)
    tuner.update_search_space({"lr": spec("loguniform", 1e-4, 1)})
    assert_fits(tuner.generate_parameters(0), LINEAR)


def test_tpe_knows_the_values_of_a_choice_by_themselves_not_by_their_place() -> None:
    names = ["adam", "adamw", "sgd"]
    tuner = make("tpe_tuner.Tpe", {"optimizer": spec("choice", *names), "x": spec("uniform", 0, 1)})
    for number in range(30):
        parameters = tuner.generate_parameters(number)
        tuner.receive_trial_result(number, parameters, float(parameters["optimizer"] == "sgd"))
    space = {"optimizer": spec("choice", *reversed(names)), "x": spec("uniform", 0, 1)}
    tuner.update_search_space(space)
    suggested = [tuner.generate_parameters(number)["optimizer"] for number in range(100, 120)]
    assert suggested.count("sgd") > 10


@pytest.mark.slow
def test_smac_takes_no_success_for_a_crash() -> None:
    """NNI tells the end of a trial by another thread than its result."""
    tuner = make("smac_tuner.Smac", LINEAR)
    for number, value in enumerate([0.5, 0.6, 0.55, 0.99]):
        parameters = tuner.generate_parameters(number)
        if value == 0.99:
            tuner.trial_end(number, True)
        tuner.receive_trial_result(number, parameters, value)
    tuner.generate_parameters(4)
    known = sorted(value.cost for value in tuner._facade.runhistory.values() if value.status == 1)
    assert known == [-0.99, -0.6, -0.55, -0.5]
    assert not [value for value in tuner._facade.runhistory.values() if value.status == 2]


@pytest.mark.parametrize("name", ["tpe_tuner.Tpe", "anneal_tuner.Anneal", "smac_tuner.Smac"])
@pytest.mark.slow
def test_it_learns(name: str) -> None:
    """Half of the last suggestions are near the optimum; of those of chance a fifth, 12 of 60 +- 3, is."""
    space = {"dropout": spec("uniform", 0, 1), "pool": spec("choice", "cls", "mean")}
    last = []
    for seed in (
        1,
        2,
        3,
    ):  # SMAC does not repeat itself to the last suggestion on another processor
        tuner = make(name, space, seed=seed)
        for number in range(50):
            parameters = tuner.generate_parameters(number)
            value = -abs(parameters["dropout"] - 0.3) - (parameters["pool"] == "mean")
            tuner.receive_trial_result(number, parameters, value)
            last += [parameters] if number >= 30 else []
    near = [p for p in last if abs(p["dropout"] - 0.3) < 0.2 and p["pool"] == "cls"]
    assert len(near) >= 30, last


def test_tpe_searches_choices() -> None:
    """NNI's own is worse than chance there: its best candidate is known soon, and it walks a grid instead."""
    space = {
        "lr": spec("choice", 1e-4, 3e-4, 1e-3, 3e-3),
        "batch": spec("choice", 16, 32, 64),
        "depth": spec("randint", 1, 7),
        "width": spec("choice", 64, 128, 256, 512),
    }
    middle = {"lr": 1e-3, "batch": 32, "depth": 4, "width": 256}
    values = {key: [*range(1, 7)] if key == "depth" else s["_value"] for key, s in space.items()}

    def distance(parameters: dict[str, Any]) -> int:
        return sum(abs(v.index(parameters[k]) - v.index(middle[k])) for k, v in values.items())

    frozen = importlib.import_module("robust_tuner").frozen
    found = []
    for seed in range(5):
        tuner, tried = make("tpe_tuner.Tpe", space, seed=seed), []
        for number in range(100):
            tried.append(tuner.generate_parameters(number))
            tuner.receive_trial_result(number, None, -distance(tried[-1]))
            tuner.trial_end(number, True)
        assert len({frozen(p) for p in tried}) == 100
        found += map(distance, tried[50:])
    assert np.mean(found) < 3.9  # of those of chance 4.4 +- 0.1


def test_tpe_learns_within_the_shipped_search() -> None:
    """NNI's own first 20 trials are random, which are all that there are."""
    space = json.loads((REPOSITORY / "search_net_ViT.json").read_text())
    suggested = []
    for best in (0, 1):
        tuner = make("tpe_tuner.Tpe", space)
        suggested.append([])
        for number in range(20):
            suggested[-1].append(parameters := tuner.generate_parameters(number))
            tuner.receive_trial_result(number, None, abs(best - parameters["dropout"]))
    same = [one == other for one, other in zip(*suggested, strict=True)]
    assert same == [True] * 10 + [False] * 10


@pytest.mark.parametrize(("first", "gamma"), [(1, 0.25), (5, 2), (5, 0)])
def test_tpe_needs_some_results(first: int, gamma: float) -> None:
    """With fewer NNI's raises at its first suggestion of its own, which ends the search."""
    with pytest.raises(ValueError, match="n_startup_jobs . does not go with gamma"):
        make("tpe_tuner.Tpe", tpe_args={"n_startup_jobs": first, "gamma": gamma})
    if not gamma:
        return
    tuner = make("tpe_tuner.Tpe", tpe_args={"n_startup_jobs": first + 1, "gamma": gamma})
    for number in range(first + 4):
        tuner.receive_trial_result(number, tuner.generate_parameters(number), number)


FAILING = {"dim": spec("choice", 32, 48, 64), "depth": spec("quniform", 1, 3, 1)} | {
    "lr": spec("loguniform", 5e-4, 1e-2)
}


@pytest.mark.parametrize(
    ("name", "most"), [("nni_tuners.GP", 5), ("dngo_tuner.Dngo", 14), ("tpe_tuner.Tpe", 10)]
)
def test_what_fails_is_left_alone(name: str, most: int) -> None:
    """The best of a trend has no memory for it; of chance a ninth fails. NNI's GP and DNGO repeat it for ever."""
    failed = []
    for seed in (1, 2, 3):
        tuner = make(name, FAILING, seed=seed)
        failed.append(0)
        for number in range(30):
            p = tuner.generate_parameters(number)
            fails = p["dim"] == 64 and p["depth"] == 3
            if not fails:
                tuner.receive_trial_result(number, p, p["dim"] / 8 + p["depth"])
            tuner.trial_end(number, not fails)
            failed[-1] += fails
    assert sum(failed) <= 3 * most, failed


def test_gp_suggests_another_trial_to_each_that_runs() -> None:
    tuner = make("nni_tuners.GP", FAILING)
    for number in range(0, 24, 4):
        four = tuner.generate_multiple_parameters([*range(number, number + 4)])
        if number > 4:
            rates = [p["lr"] for p in four]
            assert len({(p["dim"], p["depth"], round(p["lr"], 4)) for p in four}) >= 3, four
            assert max(rates) / min(rates) > 1.05
        for i, p in enumerate(four):
            tuner.receive_trial_result(number + i, p, p["dim"] / 8 - math.log(p["lr"]) ** 2)
            tuner.trial_end(number + i, True)


def test_gp_sees_a_learning_rate_beside_a_width() -> None:
    """Of the last suggestions most are near the optimum, of those of chance a quarter of the range is."""
    space = {"lr": spec("loguniform", 1e-4, 1e-2), "width": spec("choice", 32, 48, 64)}
    near = []
    for seed in (1, 2, 3):
        tuner = make("nni_tuners.GP", space, seed=seed)
        for number in range(20):
            lr = tuner.generate_parameters(number)["lr"]
            distance = abs(math.log(lr / 1e-3))
            tuner.receive_trial_result(number, None, -(distance**2))
            near += [distance < 0.6] if number >= 10 else []
    assert sum(near) >= 18, near


@pytest.mark.parametrize(
    "key", [spec("uniform", 1, 3), spec("loguniform", 1e-4, 1), spec("choice", 5, 1, 9),
            spec("randint", -1, 4), spec("quniform", 1, 4, 1), spec("qloguniform", 2, 64, 2)]
)  # fmt: skip
def test_every_step_has_an_equal_share_for_gp(key: dict[str, Any]) -> None:
    tuners, robust = map(importlib.import_module, ("nni_tuners", "robust_tuner"))
    shares = np.linspace(0, 1, 1201)[:-1] + 1 / 2400
    values = [robust.cleaned({"k": tuners.of_share(s, **key)}, {"k": key})["k"] for s in shares]
    if key["_type"] in ("choice", "randint", "quniform"):
        assert set(Counter(values).values()) == {1200 // len(set(values))}
        assert min(values) == min(key["_value"][:2] if key["_type"] != "choice" else key["_value"])
    back = [tuners.of_share(tuners.share_of(v, **key), **key) for v in values]
    assert back == pytest.approx(values)


def test_anneal_comes_to_every_step() -> None:
    """Also when its neighbourhood is less than one, where another key matters more at first."""
    space = {"lr": spec("loguniform", 1e-5, 1), "depth": spec("quniform", 1, 4, 1)}
    for seed in range(10):
        tuner, depths = make("anneal_tuner.Anneal", space, seed=seed), []
        for number in range(100):
            parameters = tuner.generate_parameters(number)
            depths.append(parameters["depth"])
            value = -abs(math.log(parameters["lr"] / 1e-2)) - 0.1 * abs(parameters["depth"] - 4)
            tuner.receive_trial_result(number, parameters, value)
        assert len(set(depths[30:])) > 1 and 4 in depths, (seed, depths)


@pytest.mark.parametrize("name", ["nni_tuners.Evolution", "dngo_tuner.Dngo", "nni_tuners.GP"])
def test_no_trial_is_suggested_twice(name: str) -> None:
    space = {"heads": spec("choice", 1, 2, 4), "depth": spec("quniform", 1, 6, 1)}
    space |= {"width": spec("choice", 16, 32, 48, 64)}
    tuner, seen = make(name, space), []
    frozen = importlib.import_module("robust_tuner").frozen
    for number in range(60):  # of 72
        seen.append(frozen(tuner.generate_parameters(number)))
        tuner.receive_trial_result(number, None, number % 7)
        tuner.trial_end(number, True)
    assert len(set(seen)) >= 55  # of the last ones most are known


@pytest.mark.slow
def test_smac_is_told_failures_as_crashes() -> None:
    """A key whose one value always fails is left alone, and the runhistory says why."""
    from smac.runhistory import StatusType

    space = {"width": spec("choice", 1, 2), "dropout": spec("uniform", 0, 1)}
    later = []
    for seed in (1, 2, 3, 4):  # SMAC does not repeat itself to the last suggestion
        tuner, widths = make("smac_tuner.Smac", space, seed=seed), []
        for number in range(25):
            parameters = tuner.generate_parameters(number)
            widths.append(parameters["width"])
            if parameters["width"] == 1:
                tuner.receive_trial_result(number, parameters, {"default": parameters["dropout"]})
            tuner.trial_end(number, parameters["width"] == 1)
        trials = list(tuner._facade.runhistory.values())
        crashed = [trial for trial in trials if trial.status == StatusType.CRASHED]
        assert len(crashed) == widths.count(2) > 0
        later += widths[10:]
    assert later.count(1) >= 34, later  # of 60, where chance has 30; 42 or so were seen


def told_to_smac(tuner: Any) -> list[tuple[dict[str, Any], str, float]]:
    """Parameters, status and value of all trials that SMAC itself knows."""
    from nni.common.hpo_utils import deformat_parameters

    history, trials = tuner._facade.runhistory, []
    for key, trial in history.items():
        point = tuner._point(history.get_config(key.config_id))
        trials.append((deformat_parameters(point, tuner._specs), trial.status.name, -trial.cost))
    return trials


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_smac_learns_results_after_a_resume_for_what_was_tried(seed: int) -> None:
    """Two trials go on after it; what comes next is told for itself and not for one of these."""
    space = {"a": spec("choice", 10, 20, 30), "b": spec("choice", 1, 2)}
    under_way = [{"a": 10, "b": 1}, {"a": 30, "b": 1}]
    tuner, ended = make("smac_tuner.Smac", space, seed=seed), []
    tuner.import_data([{"parameter": p, "value": None, "under_way": True} for p in under_way])
    for number in range(3):
        parameters = tuner.generate_parameters(number)
        assert parameters not in under_way
        ended.append((parameters, "SUCCESS", parameters["a"] + parameters["b"]))
        tuner.receive_trial_result(number, parameters, ended[-1][2])
        told = told_to_smac(tuner)
        assert [trial for trial in told if trial[1] != "RUNNING"] == ended
        assert all(any(p == trial[0] for trial in told) for p in under_way)
    # NNI brings the result of such a trial as data to import.
    tuner.import_data([{"parameter": under_way[0], "value": 11}])
    parameters = tuner.generate_parameters(3)
    tuner.receive_trial_result(3, parameters, 0)
    ended += [(under_way[0], "SUCCESS", 11), (parameters, "SUCCESS", 0)]
    told = [trial for trial in told_to_smac(tuner) if trial[1] != "RUNNING"]
    assert sorted(told, key=lambda trial: trial[2]) == sorted(ended, key=lambda trial: trial[2])


@pytest.mark.slow
def test_smac_waits_for_trials_that_run() -> None:
    """Its points on one step of a q type are one trial: all get to know how that ends, and not before."""
    tuner = make("smac_tuner.Smac", {"x": spec("qnormal", 5, 1, 1)}, startup_trials=10)
    running = [tuner.generate_parameters(number) for number in range(4)]
    told = told_to_smac(tuner)
    assert {status for _, status, _ in told} == {"RUNNING"}
    assert len(told) > 4, "no two on one step: another seed is to be taken"
    for number, parameters in enumerate(running):
        if number < 3:
            tuner.receive_trial_result(number, parameters, number)
        tuner.trial_end(number, number < 3)
    ends = [("SUCCESS", 0.0), ("SUCCESS", 1.0), ("SUCCESS", 2.0), ("CRASHED", -2.0)]
    assert [trial[1:] for trial in told_to_smac(tuner)] == [
        ends[running.index(parameters)] for parameters, _, _ in told
    ]


@pytest.mark.slow
def test_smac_made_anew_is_told_of_trials_that_run() -> None:
    """As after a failure before the first results: those that run meanwhile are not forgotten."""
    space = {"width": spec("choice", 1, 2, 3), "depth": spec("quniform", 1, 9, 1)}
    tuner = make("smac_tuner.Smac", space)
    running = [tuner.generate_parameters(number) for number in range(4)]
    tuner.trial_end(0, False)
    running.append(tuner.generate_parameters(4))
    assert running[0] not in running[1:]
    for number in (1, 2, 3, 4):
        tuner.receive_trial_result(number, running[number], number)
        running.append(tuner.generate_parameters(number + 4))
    told = {value: p for p, status, value in told_to_smac(tuner) if status == "SUCCESS"}
    assert told == {number: running[number] for number in (1, 2, 3, 4)}


def test_nobody_waits_for_smac_at_the_start() -> None:
    """NNI gives a tuner 10 s to connect: to make it imports nothing of SMAC; not installed, it says so."""
    code = (
        "import sys; sys.path.append('tuners'); import smac_tuner; smac_tuner.Smac()\n"
        "assert 'smac' not in sys.modules; sys.modules['smac'] = None\n"
        "try: smac_tuner.Smac()\n"
        "except ValueError as error: print(error)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert "pip install -r tuners/requirements-smac.txt" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "name", ["nni_tuners.GridSearch", "anneal_tuner.Anneal", "smac_tuner.Smac"]
)
def test_every_combination_once_and_then_no_more(name: str, monkeypatch) -> None:
    monkeypatch.delenv("NNI_TUNER_COMMAND_CHANNEL", raising=False)
    space = {"width": spec("choice", 16, 32), "depth": spec("quniform", 1, 3, 1)}
    tuner, suggested = make(name, space), []
    for number in range(6):
        suggested += tuner.generate_multiple_parameters([number])
        tuner.receive_trial_result(number, suggested[-1], {"default": score(suggested[-1])})
    assert len({json.dumps(p, sort_keys=True) for p in suggested}) == 6
    assert tuner.generate_multiple_parameters([6, 7]) == []
    # Four of them before a resume: two are left.
    tuner = make(name, space)
    tuner.import_data([{"parameter": p, "value": score(p)} for p in suggested[:4]])
    rest = tuner.generate_multiple_parameters([0, 1, 2])
    assert sorted(map(str, rest)) == sorted(map(str, suggested[4:]))


@pytest.mark.parametrize(
    "name",
    ["tpe_tuner.Tpe", "anneal_tuner.Anneal", "nni_tuners.GridSearch",
     pytest.param("smac_tuner.Smac", marks=pytest.mark.slow)],
)  # fmt: skip
def test_steps_of_a_normal_come_to_an_end(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NNI's grid goes out to infinity for them, and its OverflowError would end the search silently."""
    monkeypatch.delenv("NNI_TUNER_COMMAND_CHANNEL", raising=False)
    tuner, found = make(name, {"x": spec("qnormal", 5, 1, 1)}), []
    for number in range(60):
        suggested = tuner.generate_multiple_parameters([number])
        if not suggested:
            break
        found.append(suggested[0]["x"])
        tuner.receive_trial_result(number, suggested[0], float(number))
    assert len(found) == len(set(found)) >= 12
    assert not suggested or name == "tpe_tuner.Tpe"  # whose draws go out as far as they are good


def test_a_resumed_batch_runs_each_combination_once(resumed: None) -> None:
    """Of four, the second has ended and the third runs again by NNI itself."""
    from nni_tuners import Batch

    combinations = [{"lr": 0.1 * k, "vt_dim": 8 * k} for k in range(1, 5)]
    space = {"all": spec("choice", *combinations)}
    tuner = Batch()
    tuner.update_search_space(space)
    tuner.import_data(
        [
            {"parameter": combinations[1], "value": {"default": 0.5}},
            {"parameter": combinations[2], "value": None, "under_way": True},
        ]
    )
    assert tuner.generate_multiple_parameters([3]) == combinations[:1]
    tuner.receive_trial_result(3, combinations[0], 0.7)
    tuner.trial_end(3, True)
    tuner.import_data([{"parameter": combinations[2], "value": 0.6}])
    assert tuner.generate_multiple_parameters([4, 5]) == combinations[3:]


def test_a_changed_batch_runs_what_is_new() -> None:
    """`nnictl update searchspace`; what is no list of samples leaves the old one."""
    from nni_tuners import Batch

    combinations = [{"lr": 0.1}, {"lr": 0.2}, {"lr": 0.3}]
    tuner = Batch()
    tuner.update_search_space({"all": spec("choice", *combinations[1:])})
    tuner.generate_parameters(0)
    tuner.update_search_space({"all": spec("choice", *combinations), "more": spec("choice", 1)})
    tuner.update_search_space({"all": spec("choice", 1, 2)})
    assert tuner.generate_parameters(1) == combinations[2]
    tuner.update_search_space({"all": spec("choice", *combinations)})
    assert tuner.generate_multiple_parameters([2, 3]) == combinations[:1]


@pytest.mark.parametrize(
    ("name", "space", "message"),
    [
        ("nni_tuners.Metis", {"lr": spec("loguniform", 1e-5, 1)}, "Metis cannot search lr"),
        ("nni_tuners.GP", {"pool": spec("choice", "cls")}, "a choice of numbers only"),
        ("dngo_tuner.Dngo", {"x": spec("normal", 0, 1)}, "Dngo cannot search x: it takes choice"),
    ],
)
def test_what_a_tuner_cannot_search_is_said(name: str, space: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(name, space)


numbers = st.integers(1, 50)
specs = st.one_of(
    st.builds(lambda low, size: spec("uniform", low, low + size), numbers, numbers),
    st.builds(lambda low, size: spec("loguniform", low / 10, low + size), numbers, numbers),
    st.builds(lambda low, size, q: spec("quniform", low, low + size, q / 4), *[numbers] * 3),
    st.builds(lambda mu, sigma: spec("normal", mu, sigma), numbers, numbers),
    st.builds(lambda low, size: spec("randint", low, low + size), numbers, numbers),
    st.lists(st.sampled_from([1, 2.5, "a", "b"]), min_size=1, unique=True).map(
        lambda values: spec("choice", *values)
    ),
)
spaces = st.dictionaries(st.sampled_from("abcd"), specs, min_size=1).flatmap(
    lambda inner: st.dictionaries(st.sampled_from("efgh"), specs, min_size=1).map(
        lambda outer: (
            outer | {"nested": spec("choice", {"_name": "none"}, {"_name": "some", **inner})}
        )
    )
)
values = st.one_of(st.sampled_from(UNUSABLE), st.floats(), st.integers())
events = st.lists(
    st.tuples(st.sampled_from(["ask", "ask", "tell", "end"]), st.integers(0, 12), values)
)


@pytest.mark.parametrize(
    "name",
    ["tpe_tuner.Tpe", "anneal_tuner.Anneal", "nni_tuners.Evolution", "nni_tuners.GridSearch"],
)
@given(space=spaces, events=events)
@settings(max_examples=40, deadline=None)
def test_no_order_of_events_ends_a_tuner(name: str, space: Any, events: Any) -> None:
    tuner = make(name, space)
    for kind, number, value in events:
        if kind == "ask":
            for parameters in tuner.generate_multiple_parameters([number]):
                outer = {k: v for k, v in parameters.items() if k != "nested"}
                assert outer.keys() == space.keys() - {"nested"}
                json.dumps(parameters, allow_nan=False)
        elif kind == "tell":
            tuner.receive_trial_result(number, {}, value)
        else:
            tuner.trial_end(number, bool(value))


def test_halving_keeps_the_best_third_of_a_rung() -> None:
    """Compared at equal epochs, ended trials too; nobody is judged between rungs or before three came."""
    from halving_assessor import Halving
    from nni.assessor import AssessResult

    assessor = Halving(first=2, eta=3)

    def goes_on(trial: str, *values: float) -> bool:
        history = [{"default": value, "loss": 1.0} for value in values]
        return assessor.assess_trial(trial, history) is AssessResult.Good

    assert goes_on("a", 50) and goes_on("a", 50, 60) and goes_on("a", 50, 60, 10)
    assert goes_on("b", 1, 2), "two cannot be divided into thirds"
    assert not goes_on("c", 58, 59)
    assert goes_on("d", 70, 0), "its best so far counts"
    assert goes_on("e", 70, 1), "equal to the last that goes on"
    assert not goes_on("f", 60, 65, 99), "two epochs that NNI tells at once: at the rung it had 65"
    # The next rung: only those that came so far.
    assert goes_on("a", 50, 60, 10, 10, 10, 10) and goes_on("d", 70, 0, 0, 0, 0, 71)
    assert not goes_on("e", 70, 1, 1, 1, 1, 70)

    assessor = Halving("minimize", first=1, eta=2)
    assert [assessor.assess_trial(name, [value]).value for name, value in zip("abc", (3, 2, 4), strict=True)] == [True, True, False]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"optimize_mode": "best"}, "best"), ({"first": 0}, "first"), ({"eta": 1}, "eta")],
)
def test_halving_refuses(arguments: dict[str, Any], message: str) -> None:
    from halving_assessor import Halving

    with pytest.raises(ValueError, match=message):
        Halving(**arguments)
