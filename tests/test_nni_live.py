"""A search that nnictl changes while it runs; and a search from Python."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from nni_tools import NNICTL, REPOSITORY, Experiment, experiment, free_port, read_config

import demo_vit
import utils_vit

TINY = (
    "--image-size 8 --channel 1 --patch-size 4 --vt-dim 16 --vt-depth 1 --vt-heads 2 --mlp-dim 16"
)
GRID_SEARCH = "nni_tuners.GridSearch"
LONG = "--threads 1 --batch-size 2 --epochs 2000"


def space(low: float, high: float) -> dict[str, Any]:
    return {"lr": {"_type": "loguniform", "_value": [low, high]}}


@contextmanager
def endless(
    folder: Path, make_images: Callable[..., Path], **settings: Any
) -> Iterator[Experiment]:
    """An experiment of trials that last until somebody ends them, one at a time, three in all."""
    make_images(folder / "images/train", ["cat", "dog"], 20, seed=1, noise=100)
    command = f"{sys.executable} {REPOSITORY / 'main_vit.py'} --request-from-nni {TINY} {LONG}"
    command += f" --download-dir {folder / 'images'} --cache-dir {folder / 'cache'}"
    config = read_config(REPOSITORY / "config.yml")
    del config["searchSpaceFile"], config["trialConcurrency"]
    config |= {"trialCommand": command, "searchSpace": space(1e-4, 1e-3), "maxTrialNumber": 3}
    config |= settings
    with experiment(config, folder) as running:
        yield running


def training(running: Experiment, count: int) -> list[dict[str, Any]]:
    """Waits until exactly so many trials run, each with an epoch behind it; returns these."""

    def found() -> list[dict[str, Any]]:
        trials = [trial for trial in running.trials() if trial["status"] == "RUNNING"]
        files = [running.output(trial["trialJobId"]) / "metrics.jsonl" for trial in trials]
        done = [file.exists() and file.read_text().count("\n") for file in files]
        return trials if len(trials) == count and all(done) else []

    return running.until(found, 120)


def assert_whole(running: Experiment, trial_id: str) -> None:
    """The trial has ended with its checkpoint; no process and no half of a file of it is left."""
    ended = running.until(
        lambda: [t for t in running.trials() if t["trialJobId"] == trial_id and t.get("endTime")]
    )
    assert ended[0]["status"] == "USER_CANCELED"
    assert not [p for p in trial_processes(running) if p == trial_id]
    output = running.output(trial_id)
    state = utils_vit.load_checkpoint(output / "checkpoint.pth.tar")
    assert f"stopped at step {state['step']};" in (output / "trial.log").read_text()
    assert not [path for path in output.iterdir() if path.name.endswith(".tmp")]
    # What it had reached is told all the same.
    [final] = running.until(lambda: running.finals(trial_id))
    assert final["default"] == state["best"]["val_accuracy"]


def trial_processes(running: Experiment) -> list[str]:
    """The trials of all processes that belong to one."""
    trials = []
    for process in running.processes():
        try:
            trials.append(process.environ().get("NNI_TRIAL_JOB_ID", ""))
        except psutil.Error:
            continue
    return trials


@pytest.mark.slow
def test_nnictl_changes_a_running_search(tmp_path: Path, make_images: Callable[..., Path]) -> None:
    """`nnictl update` of everything, `trial kill`, `stop`, `view`, `resume`, in this order."""
    with endless(tmp_path, make_images) as running:
        change_by_nnictl(running, tmp_path)


def change_by_nnictl(running: Experiment, tmp_path: Path) -> None:
    [first] = training(running, 1)
    (tmp_path / "space.json").write_text(json.dumps(space(1e-2, 2e-2)))
    running.nnictl("update", "searchspace", running.id, "--filename", str(tmp_path / "space.json"))
    running.nnictl("update", "duration", running.id, "--value", "2h")
    running.nnictl("update", "trialnum", running.id, "--value", "4")
    running.nnictl("update", "concurrency", running.id, "--value", "2")
    assert training(running, 2)[0]["trialJobId"] == first["trialJobId"]  # goes on meanwhile
    profile = running.get("experiment")["params"]
    assert profile["maxTrialNumber"] == 4 and profile["trialConcurrency"] == 2
    assert profile["maxExperimentDuration"] in (7200, "7200s", "2h")

    running.nnictl("trial", "kill", running.id, "--trial_id", first["trialJobId"])
    assert_whole(running, first["trialJobId"])
    before = training(running, 2)  # another one has taken its place
    # One sample is drawn ahead, from the search space as it was.
    assert 1e-2 <= before[-1]["shown"]["parameters"]["lr"] <= 2e-2

    running.stop()  # and nothing is left running
    steps, epochs = {}, {}
    for trial in before:
        output = running.output(trial["trialJobId"])
        saved = utils_vit.load_checkpoint(output / "checkpoint.pth.tar")
        steps[trial["trialJobId"]] = saved["step"]
        epochs[trial["trialJobId"]] = (output / "metrics.jsonl").read_text().count("\n")
    place = ["--port", str(running.port), "--experiment_dir", str(running.folder / "exp")]
    running.nnictl("view", running.id, *place)
    assert len(running.trials()) == 3 and not any(trial_processes(running))
    running.stop()

    running.resume()
    after = training(running, 2)
    assert [trial["trialJobId"] for trial in after] == list(steps)
    for trial_id, step in steps.items():
        log, deadline = running.output(trial_id) / "trial.log", time.monotonic() + 60
        while f"resumed after step {step}" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        # What was reported while NNI ended is reported again: its page cannot show a curve with a hole.
        # (An epoch takes milliseconds here, and NNI may store two results the wrong way round.)
        running.until(
            functools.partial(curve_is_whole, running, trial_id, epochs[trial_id] + 1), 30
        )
        assert "manager is out of reach" in log.read_text(), "nothing was lost: nothing was shown"
    profile = running.get("experiment")["params"]
    assert profile["maxTrialNumber"] == 4 and profile["trialConcurrency"] == 2


def curve_is_whole(running: Experiment, trial_id: str, length: int) -> bool:
    """Whether NNI knows at least so many epochs of the trial, and all up to its last."""
    curve = running.get(f"metric-data/{trial_id}?type=PERIODICAL")
    known = sorted(metric["sequence"] for metric in curve)
    return len(known) >= length and known == list(range(len(known)))


RATES = [1e-4, 2e-4, 3e-4, 4e-4]
CHOICES = {"lr": {"_type": "choice", "_value": RATES}}
COMBINATIONS = {"runs": {"_type": "choice", "_value": [{"lr": rate} for rate in RATES]}}
SEEDED = {"optimize_mode": "maximize", "seed": 1}


@pytest.mark.parametrize(
    "tuner, arguments, search_space",
    [
        pytest.param(GRID_SEARCH, {}, CHOICES, marks=pytest.mark.slow),
        pytest.param("nni_tuners.Batch", {}, COMBINATIONS, marks=pytest.mark.long),
        *(
            pytest.param(tuner, SEEDED | more, space(1e-4, 1e-3), marks=pytest.mark.long)
            for tuner, more in {
                "tpe_tuner.Tpe": {},
                "anneal_tuner.Anneal": {},
                "nni_tuners.Evolution": {"population_size": 4},
                "smac_tuner.Smac": {"startup_trials": 3},
            }.items()
        ),
    ],
)
def test_a_resume_brings_back_what_stopped_trials_reached(
    tuner: str,
    arguments: dict[str, Any],
    search_space: dict[str, Any],
    tmp_path: Path,
    make_images: Callable[..., Path],
) -> None:
    """NNI leaves them out; what they tried would be tried once more. One is killed while it resumes."""
    settings: dict[str, Any] = {
        "searchSpace": search_space,
        "tuner": {
            "codeDirectory": str(REPOSITORY / "tuners"),
            "className": tuner,
            "classArgs": arguments,
        },
        "maxTrialNumber": len(RATES),
    }
    tried = []
    with endless(tmp_path, make_images, **settings) as running:
        for _ in RATES:
            [trial] = training(running, 1)
            tried.append(trial["shown"]["parameters"]["lr"])
            if len(tried) == 2:
                running.stop()
                train_alone(running, trial["trialJobId"], 300)
                running.resume()
                log = running.output(trial["trialJobId"]) / "trial.log"
                running.until(lambda log=log: "resumed after step" in log.read_text(), 120)
            running.nnictl("trial", "kill", running.id, "--trial_id", trial["trialJobId"])
            assert_whole(running, trial["trialJobId"])
        log = running.folder / "exp" / running.id / "log" / "dispatcher.log"
        assert log.read_text().count("known after the resume") >= 2
    assert len(set(tried)) == len(RATES)
    if not arguments:  # a list that is gone through
        assert sorted(tried) == RATES


def train_alone(running: Experiment, trial_id: str, epochs: int) -> None:
    """Continue the run by hand: under NNI again, it tells of so many epochs before it trains."""
    output = running.output(trial_id)
    before = (output / "metrics.jsonl").read_text().count("\n")
    command = [sys.executable, REPOSITORY / "main_vit.py", "--resume", output / utils_vit.LAST]
    with subprocess.Popen(command, env=running.env, stdout=subprocess.DEVNULL) as run:
        try:
            while (output / "metrics.jsonl").read_text().count("\n") < before + epochs:
                assert run.poll() is None
                time.sleep(0.3)
        finally:
            run.terminate()
    assert run.returncode == -signal.SIGTERM


@pytest.mark.long
def test_a_search_from_python(tmp_path: Path) -> None:
    """examples/experiment.py with two small trials: prints the best and leaves nothing running."""
    images = demo_vit.make_digits(tmp_path / "digits")
    options = f"--epochs 1 --image-size 16 --channel 1 --download-dir {images}"
    code = f"import experiment; experiment.search({options!r}, 2, {free_port()})"
    env = {**os.environ, "HOME": str(tmp_path / "home"), "no_proxy": "localhost,127.0.0.1"}
    env["PATH"] = f"{NNICTL.parent}{os.pathsep}{os.environ['PATH']}"
    (tmp_path / "home").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY / "examples",
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    trial_id, shown = re.search(r"best: trial (\w+), ([\d.]+) %", done.stdout).groups()
    finals = {}
    for file in (tmp_path / "home/nni-experiments").glob("*/environments/*/trials/*/results.json"):
        finals[file.parent.name] = json.loads(file.read_text())["validation"]["accuracy"]
    assert len(finals) == 2 and f"{max(finals.values()):.2f}" == shown
    assert finals[trial_id] == max(finals.values())
    left = [
        p
        for p in psutil.process_iter(["environ"])
        if (p.info["environ"] or {}).get("HOME") == env["HOME"]
    ]
    assert not left
