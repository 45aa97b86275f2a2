"""Tuners and assessors that give out training in parts or end it early: real experiments, real trials."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nni_tools import REPOSITORY, Experiment, experiment

import utils_vit

pytestmark = pytest.mark.long

TINY = (
    "--image-size 8 --patch-size 4 --vt-dim 16 --vt-depth 1 --vt-heads 2 --mlp-dim 16 "
    "--threads 1 --precision float32 --emb-dropout 0.1"
)
PATIENCE = 600  # seconds for an experiment of half a minute: other work may share the machine
# Of these values of dropout one cannot work, and ends its trial with status 2.
SPACE = {
    "lr": {"_type": "loguniform", "_value": [1e-3, 1e-1]},
    "dropout": {"_type": "choice", "_value": [0.0, 0.1, 0.2, 1.5]},
}
# Hands out rates in a fixed order and writes down what it is told.
TUNER = """
import json, os
from nni.tuner import Tuner

class Recorder(Tuner):
    def __init__(self, rates):
        self.rates = rates

    def update_search_space(self, space):
        pass

    def generate_parameters(self, parameter_id, **kwargs):
        return {"lr": self.rates[parameter_id]}

    def receive_trial_result(self, parameter_id, parameters, value, **kwargs):
        with open(os.environ["HOME"] + "/told", "a") as file:
            print(json.dumps([parameters["lr"], value["default"]]), file=file)
"""


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to the bit is what a CPU promises."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def images(tmp_path: Path, make_images: Callable[..., Path]) -> Path:
    """Two classes that are easy to tell apart, 36 training images after the split."""
    return make_images(tmp_path / "images/train", ["cat", "dog"], 20, seed=1).parent


def search(images: Path, options: str, tuner: str, class_args: dict[str, Any], **settings: Any):
    """The configuration of an experiment of tiny main_vit.py trials under a tuner of tuners/."""
    command = [
        *(sys.executable, REPOSITORY / "main_vit.py", "--request-from-nni", TINY, options),
        *("--download-dir", images, "--cache-dir", images.parent / "cache"),
    ]
    return {
        "trialCommand": " ".join(map(str, command)),
        "trialConcurrency": 2,
        "searchSpace": SPACE,
        "tuner": {
            "codeDirectory": str(REPOSITORY / "tuners"),
            "className": tuner,
            "classArgs": {"optimize_mode": "maximize", **class_args},
        },
        **settings,
    }


def log_of(running: Experiment, trial: dict[str, Any]) -> str:
    return (running.output(trial["trialJobId"]) / "trial.log").read_text()


def check_statuses(trials: list[dict[str, Any]]) -> None:
    """What cannot work has failed, the rest has not, and there is some of both."""
    for trial in trials:
        bad = trial["shown"]["parameters"]["dropout"] > 1
        assert trial["status"] == ("FAILED" if bad else "SUCCEEDED"), trial
    assert len({trial["status"] for trial in trials}) == 2, "none failed: nothing was shown"


def check_budgets(running: Experiment) -> int:
    """Every promoted trial went on from its own checkpoint; returns the epochs that were computed."""
    ended: dict[str, tuple[int, str]] = {}  # of a configuration, its last budget and trial
    computed = 0
    for trial in running.trials():
        parameters = dict(trial["shown"]["parameters"])
        budget = parameters.pop("TRIAL_BUDGET")
        if trial["status"] == "FAILED":
            continue
        before, earlier = ended.get(json.dumps(parameters), (0, ""))
        computed += budget - before
        assert (f"continued from trial {earlier}," in log_of(running, trial)) == bool(earlier)
        output = running.output(trial["trialJobId"])
        lines = (output / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == list(range(1, budget + 1))
        curve = running.get(f"metric-data/{trial['trialJobId']}?type=PERIODICAL")
        assert [metric["sequence"] for metric in curve] == list(range(budget))
        ended[json.dumps(parameters)] = budget, trial["trialJobId"]
    return computed


def repeat(running: Experiment, trial_id: str, folder: Path) -> None:
    """Runs the trial's args.yaml without a break: every weight comes out the same to the bit."""
    again = ["--config", running.output(trial_id) / "args.yaml", "--model-dir", folder]
    command = map(str, [sys.executable, REPOSITORY / "main_vit.py", *again])
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0 and "continued" not in done.stdout, done.stderr
    for name in ("checkpoint.pth.tar", "model_best.pth.tar"):
        files = running.output(trial_id) / name, folder / name
        one, other = map(utils_vit.load_checkpoint, files)
        assert one["step"] == other["step"]
        assert all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])


def test_hyperband_continues(images: Path) -> None:
    """One bracket of R 4 and eta 2, of which a trial fails: promoted trials go on from their own."""
    arguments = {"R": 4, "eta": 2, "exec_mode": "serial", "seed": 3}
    settings = search(images, "--epochs 4", "hyperband_tuner.Hyperband", arguments)
    with experiment(settings | {"maxTrialNumber": 7}, images.parent) as running:
        running.wait("DONE", PATIENCE)
        trials = running.trials()
        check_statuses(trials)
        scratch = sum(
            trial["shown"]["parameters"]["TRIAL_BUDGET"]
            for trial in trials
            if trial["status"] == "SUCCEEDED"
        )
        assert check_budgets(running) < scratch
        promoted = [t for t in trials if "continued from" in log_of(running, t)]
        repeat(running, promoted[-1]["trialJobId"], images.parent / "again")


def test_bohb_survives_a_resume(images: Path) -> None:
    """Trials fail, `nnictl stop` and `resume` in the middle: new brackets, nobody's id twice."""
    arguments = {"max_budget": 4, "eta": 2, "seed": 3}
    settings = search(images, "--epochs 4 --batch-size 1", "bohb_tuner.BOHB", arguments)
    with experiment(settings | {"maxTrialNumber": 9}, images.parent) as running:
        running.until(lambda: len(running.trials()) >= 5, PATIENCE)
        running.stop()
        running.resume()
        running.wait("DONE", PATIENCE)
        trials = running.trials()
        check_statuses(trials)
        ids = Counter(trial["shown"]["parameter_id"] for trial in trials)
        assert set(ids.values()) == {1}
        assert any("continued from" in log_of(running, trial) for trial in trials)


def test_pbt_goes_on_from_checkpoints(images: Path) -> None:
    """3 members, some of which fail: each step goes on from a checkpoint of the step before."""
    arguments = {"population_size": 3, "seed": 5}
    settings = search(images, "--epochs 2", "pbt_tuner.PBT", arguments, maxTrialNumber=6)
    with experiment(settings, images.parent) as running:
        running.wait("DONE", PATIENCE)
        trials = running.trials()
        check_statuses(trials)
        for trial in (trial for trial in trials if trial["status"] == "SUCCEEDED"):
            parameters = trial["shown"]["parameters"]
            step = int(Path(parameters["save_checkpoint_dir"]).name)
            load = Path(parameters["load_checkpoint_dir"])
            assert (f"continued from {load}" in log_of(running, trial)) == bool(step)
            left = Path(parameters["save_checkpoint_dir"]) / "checkpoint.pth.tar"
            state = utils_vit.load_checkpoint(left)
            assert state["args"]["stop_epoch"] == 2 * (step + 1)
            curve = running.get(f"metric-data/{trial['trialJobId']}?type=PERIODICAL")
            assert [metric["sequence"] for metric in curve] == [0, 1]  # the page crashes else
            # Of the model that is handed on, not of the best of the share.
            (final,) = running.get(f"metric-data/{trial['trialJobId']}?type=FINAL")
            assert final["data"] == curve[-1]["data"]
            assert state["args"]["lr"] == parameters["lr"]
            assert {group["lr"] for group in state["optimizer"]["param_groups"]} == {
                parameters["lr"]
            }


@pytest.mark.parametrize(
    ("name", "arguments", "rates"),
    [
        ("Medianstop", {"optimize_mode": "maximize", "start_step": 5}, [3e-3, 1e-8]),
        # One good trial: of a second one it may end a curve that cannot get better than it is. A
        # judgement takes up to a second, in which these epochs go by.
        ("Curvefitting", {"epoch_num": 100, "start_step": 10, "gap": 20}, [3e-3, 1e-8]),
    ],
    ids=["Medianstop", "Curvefitting"],
)
def test_an_assessor_ends_a_bad_trial(
    name: str, arguments: dict[str, Any], rates: list[float], images: Path
) -> None:
    """Early, canceled, resumable; the tuner has its best; the experiment's best is of a whole trial."""
    (images.parent / "recorder.py").write_text(TUNER)
    tuner = {
        "codeDirectory": str(images.parent),
        "className": "recorder.Recorder",
        "classArgs": {"rates": rates},
    }
    settings = search(images, "--epochs 100 --batch-size 2 --seed 3", "", {})
    settings |= {"tuner": tuner, "assessor": {"name": name, "classArgs": arguments}}
    settings |= {"maxTrialNumber": len(rates), "trialConcurrency": 1}
    with experiment(settings, images.parent) as running:
        running.wait("DONE", PATIENCE)
        trials = running.trials()
        statuses = [trial["status"] for trial in trials]
        assert statuses == ["SUCCEEDED"] * (len(rates) - 1) + ["USER_CANCELED"]
        stopped = trials[-1]["trialJobId"]
        output = running.output(stopped)
        state = utils_vit.load_checkpoint(output / "checkpoint.pth.tar")
        epochs = len((output / "metrics.jsonl").read_text().splitlines())
        assert 5 <= epochs < 90
        told = [
            json.loads(line) for line in (running.folder / "home/told").read_text().split("\n")[:-1]
        ]
        assert [rate for rate, _ in told] == rates
        assert told[-1][1] == state["best"]["val_accuracy"] == running.finals(stopped)[0]["default"]
        assert "finalMetricData" not in trials[-1]  # so the page's best is that of a whole trial
        more = ["--resume", output / "checkpoint.pth.tar", "--max-steps", state["step"] + 5]
        command = map(str, [sys.executable, REPOSITORY / "main_vit.py", *more])
        subprocess.run(command, check=True, timeout=60, capture_output=True)
        assert utils_vit.load_checkpoint(output / "checkpoint.pth.tar")["step"] == state["step"] + 5
