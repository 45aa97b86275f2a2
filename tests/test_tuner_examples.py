"""Every example of examples/tuners as a real experiment, and our tuners when trials fail."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from nni_tools import REPOSITORY, Experiment, experiment, read_config

TRIALS = 4
EXAMPLES = sorted(REPOSITORY.glob("examples/tuners/*.yml"))
# One of each kind: an engine of its own, an advisor, checkpoints from trial to trial, an assessor.
IN_CI = ("smac", "bohb", "pbt", "halving")
# So few trials that a model would never be asked otherwise.
STARTUP = ("cold_start_num", "startup_trials", "trials_per_update")
# A trial without torch, so that many can run: every other kind of result that NNI can get wrong.
TRIAL = """
import nni
from nni_vit import Trial

trial = Trial()
parameters = trial.ask()
assert parameters["patch_num"] != 3, "3 patches do not divide 16 pixels"
trial.finish({"default": parameters["dropout"]})
if trial.sequence_id % 2:
    nni.trial.report_final_result(float("nan"))
    nni.trial.report_final_result({"accuracy": 1})
"""
OWN = {
    "tpe_tuner.Tpe": {"seed": 1},
    "anneal_tuner.Anneal": {"seed": 1},
    "smac_tuner.Smac": {"seed": 1, "startup_trials": 3},
    "nni_tuners.Evolution": {"seed": 1, "population_size": 4},
    "nni_tuners.GP": {"seed": 1, "cold_start_num": 2, "selection_num_warm_up": 100,
                      "selection_num_starting_points": 2},
    "nni_tuners.Metis": {"seed": 1, "cold_start_num": 2, "selection_num_starting_points": 2},
    "dngo_tuner.Dngo": {"seed": 1, "trials_per_update": 2, "num_epochs_per_training": 20},
    "nni_tuners.GridSearch": {},
}  # fmt: skip


def shortened(file: Path) -> dict[str, Any]:
    """The example with few trials, and few steps in each."""
    config = read_config(file)
    if "maxTrialNumber" in config:
        config["maxTrialNumber"] = min(config["maxTrialNumber"], TRIALS)
    arguments = config["tuner"].get("classArgs", {})
    arguments.update({key: 2 for key in STARTUP if key in arguments})
    # PBT counts in whole epochs.
    config["trialCommand"] += " --epochs 1" if file.stem == "pbt" else " --max-steps 5"
    return config


def results(running: Experiment, trial: dict[str, Any]) -> dict[str, Any]:
    return json.loads((running.output(trial["trialJobId"]) / "results.json").read_text())


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(file, marks=pytest.mark.slow if file.stem in IN_CI else pytest.mark.long)
        for file in EXAMPLES
    ],
    ids=lambda file: file.stem,
)
def test_example_runs_to_its_end(file: Path, tmp_path: Path) -> None:
    """Every trial succeeds or is stopped by the example's own assessor; NNI has each true result."""
    lines = file.read_text().splitlines()[:3]
    assert [line.split()[:2] for line in lines] == [
        ["#", word] for word in ("When:", "Costs:", "Needs:")
    ]
    config = shortened(file)
    with experiment(config, tmp_path) as running:
        running.wait("DONE", 300)
        trials = running.trials()
        assert 0 < len(trials) <= max(config.get("maxTrialNumber", 0), 8)
        for trial in trials:
            log = running.output(trial["trialJobId"]) / "trial.stderr"
            assert trial["status"] == "SUCCEEDED" or "assessor" in config, log.read_text()
            if trial["status"] == "SUCCEEDED":
                (final,) = running.finals(trial["trialJobId"])
                assert final["default"] == results(running, trial)["validation"]["accuracy"]


@pytest.mark.slow
def test_no_trial_is_ended_at_its_last_epoch(tmp_path: Path) -> None:
    """It is paid for by then: even where the assessor would end it there, it leaves its results."""
    config = shortened(REPOSITORY / "examples" / "tuners" / "halving.yml") | {"maxTrialNumber": 6}
    config["trialCommand"] += " --epochs 1"
    config["assessor"]["classArgs"]["first"] = 1
    with experiment(config, tmp_path) as running:
        running.wait("DONE", 300)
        assert len(running.trials()) == 6
        for trial in running.trials():
            (final,) = running.finals(trial["trialJobId"])
            assert final["default"] == results(running, trial)["validation"]["accuracy"]


@pytest.mark.long
@pytest.mark.parametrize("tuner", OWN)
def test_failing_trials_do_not_end_the_search(tuner: str, tmp_path: Path) -> None:
    """Trials with 3 patches fail, others report again and worse; the search goes on to its last one."""
    space = {
        "patch_num": {"_type": "choice", "_value": [3, 4]},
        "dropout": {"_type": "uniform", "_value": [0, 0.2]},
    }
    config = {
        "searchSpace": space,
        "trialCommand": f"{sys.executable} trial.py",
        "trialConcurrency": 3,
        "maxTrialNumber": 6,
        "tuner": {
            "codeDirectory": str(REPOSITORY / "tuners"),
            "className": tuner,
            "classArgs": {"optimize_mode": "maximize", **OWN[tuner]},
        },
    }
    (tmp_path / "trial.py").write_text(TRIAL)
    with experiment(config, tmp_path) as running:
        running.wait("DONE", 300)
        ended = {
            (trial["shown"]["parameters"]["patch_num"], trial["status"])
            for trial in running.trials()
        }
        assert len(running.trials()) == 6
        assert ended == {(3, "FAILED"), (4, "SUCCEEDED")}
        log = (tmp_path / "exp" / running.id / "log" / "dispatcher.log").read_text()
        assert not re.search(r"Traceback|ERROR", log), log


@pytest.mark.long
def test_smac_goes_on_after_a_resume(tmp_path: Path) -> None:
    """Stopped and resumed, SMAC has the earlier results and repeats none of its suggestions."""
    config = shortened(REPOSITORY / "examples" / "tuners" / "smac.yml") | {"trialConcurrency": 1}
    with experiment(config, tmp_path) as running:
        running.until(lambda: [t["status"] for t in running.trials()].count("SUCCEEDED") >= 2, 200)
        running.stop()
        running.resume()
        running.wait("DONE", 300)
        trials = running.trials()
        assert [trial["status"] for trial in trials] == ["SUCCEEDED"] * TRIALS
        shown = [json.dumps(trial["shown"]["parameters"]) for trial in trials]
        assert len(set(shown)) == TRIALS
