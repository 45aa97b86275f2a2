"""Real main_vit.py trials in real experiments: crashes, stops, divergence, strangers, neighbours."""

import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import torch
from nni_tools import REPOSITORY, Experiment, experiment

import utils_vit

pytestmark = pytest.mark.slow

TINY = (
    "--image-size 8 --patch-size 4 --vt-dim 16 --vt-depth 1 --vt-heads 2 --mlp-dim 16 "
    "--threads 1 --precision float32 --dropout 0.1"
)
SPACE = {"lr": {"_type": "loguniform", "_value": [1e-4, 1e-2]}}
MAIN = [sys.executable, str(REPOSITORY / "main_vit.py")]


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to the bit is what a CPU promises."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def images(tmp_path: Path, make_images: Callable[..., Path]) -> Path:
    """Two classes that are not too easy to tell apart, 18 training images after the split."""
    make_images(tmp_path / "images/train", ["cat", "dog"], 20, seed=1, noise=100)
    make_images(tmp_path / "images/test", ["cat", "dog"], 5, seed=2, noise=100)
    return tmp_path / "images"


def search(images: Path, options: str, **settings: Any) -> dict[str, Any]:
    """The configuration of an experiment of tiny main_vit.py trials."""
    cache = images.parent / "cache"
    command = [
        *MAIN,
        "--request-from-nni",
        "--download-dir",
        str(images),
        "--cache-dir",
        str(cache),
    ]
    return {
        "trialCommand": f"{' '.join(command)} {TINY} {options}",
        "trialConcurrency": 2,
        "searchSpace": SPACE,
        "tuner": {"name": "TPE", "classArgs": {"optimize_mode": "minimize", "seed": 0}},
        **settings,
    }


def read_epochs(folder: Path) -> list[int]:
    """The epochs of metrics.jsonl, in its order."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line)["epoch"] for line in lines]


def until_midway(running: Experiment, trials: int, epochs: int = 5) -> list[dict[str, Any]]:
    """Waits for each of the trials to have some epochs behind it; returns them."""

    def midway() -> list[dict[str, Any]]:
        found = running.trials()
        done = [len(read_epochs(running.output(trial["trialJobId"]))) for trial in found]
        return found if len(done) == trials and min(done) >= epochs else []

    return running.until(midway)


def trial_processes(running: Experiment, trial_id: str) -> list[psutil.Process]:
    """The processes of one trial, whoever is their parent by now."""
    mine = []
    for process in running.processes():
        try:
            if process.environ().get("NNI_TRIAL_JOB_ID") == trial_id:
                mine.append(process)
        except psutil.Error:  # ended meanwhile
            continue
    return mine


def assert_same(one: Any, other: Any) -> None:
    """Equal in every tensor and every number, to the bit."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    else:
        assert one == other


@pytest.mark.parametrize("killed", ["machine", "manager"])
def test_a_crash_loses_nothing(
    killed: str,
    images: Path,
    run_main: Callable[..., Any],
    read_lines: Callable[[Path], list[dict[str, Any]]],
) -> None:
    """SIGKILL to everything, or to the manager alone, in the middle of two trials; `nnictl resume`."""
    epochs, folder = 40, images.parent
    options = f"--batch-size 2 --epochs {epochs} --moving-average-decay 0.9 --metric loss"
    with experiment(search(images, options, maxTrialNumber=2), folder) as running:
        before = until_midway(running, trials=2)
        ids = [trial["trialJobId"] for trial in before]
        started = {trial_id: trial_processes(running, trial_id) for trial_id in ids}
        assert all(len(processes) == 1 for processes in started.values())
        for process in running.processes():
            if killed == "machine" or process.name() == "node":
                process.kill()
        # Trials must not outlive their manager: the next one starts them again, in the same folder.
        alive = psutil.wait_procs([process for [process] in started.values()], timeout=3)[1]
        assert not alive, "trials outlive their manager"
        # Alone it would look for a manager for 10 s, and mix with the tuner of the one that follows.
        assert not psutil.wait_procs(running.processes(), timeout=3)[1], "the tuner's process"
        for trial_id in ids:
            assert utils_vit.load_checkpoint(running.output(trial_id) / "checkpoint.pth.tar")
        running.resume()
        running.wait("DONE", 120)
        assert [trial["trialJobId"] for trial in running.trials()] == ids
        for trial in running.trials():
            trial_id, output = trial["trialJobId"], running.output(trial["trialJobId"])
            assert trial["status"] == "SUCCEEDED"
            assert "resumed after step" in (output / "trial.log").read_text()
            assert read_epochs(output) == list(range(1, epochs + 1))
            curve = running.get(f"metric-data/{trial_id}?type=PERIODICAL")
            reported = [metric["sequence"] + 1 for metric in curve]
            assert len(set(reported)) == len(reported) and reported[-1] == epochs
            # Of the epoch that was saved but not reported when all ended, NNI has no point.
            assert len(set(range(1, epochs + 1)) - set(reported)) <= 1
            again = ("--config", output / "args.yaml", "--model-dir", folder / trial_id)
            assert run_main(*again).status == 0
            [final] = running.finals(trial_id)
            results = json.loads((output / "results.json").read_text())
            assert final["default"] == results["validation"]["loss"]
            assert read_lines(output) == read_lines(folder / trial_id)
            for name in ("checkpoint.pth.tar", "model_best.pth.tar"):
                one, other = map(
                    utils_vit.load_checkpoint, (output / name, folder / trial_id / name)
                )
                for part in ("model", "ema", "optimizer", "best"):
                    without_time = [
                        {k: v for k, v in state[part].items() if "second" not in str(k)}
                        for state in (one, other)
                    ]
                    assert_same(*without_time)


def seconds_to_stop(running: Experiment, trial_id: str) -> float:
    """From NNI's signal to the end of the trial's process, by the manager's log; full seconds."""
    log = running.folder / "exp" / running.id / "log/nnimanager.log"
    lines = [line for line in log.read_text().splitlines() if f"(TrialProcess.{trial_id})" in line]
    signalled = next(line for line in lines if line.endswith(" kill"))
    [ended] = [line for line in lines if "Stop exit" in line]
    assert "SIGINT" in ended, ended
    first, last = (datetime.fromisoformat(line[1:20]) for line in (signalled, ended))
    return (last - first).total_seconds()


def test_kill_and_stop_end_a_trial_with_its_checkpoint(images: Path) -> None:
    """`nnictl trial kill` for one trial, `nnictl stop` for the other: in time, resumable, none left."""
    options = "--batch-size 1 --epochs 2000"
    settings = search(images, options, maxTrialNumber=2, logLevel="trace")
    with experiment(settings, images.parent) as running:
        ids = [trial["trialJobId"] for trial in until_midway(running, trials=2)]
        killed = trial_processes(running, ids[0])
        running.nnictl("trial", "kill", running.id, "--trial_id", ids[0])
        assert not psutil.wait_procs(killed, timeout=5)[1]
        status = running.until(
            lambda: [trial["status"] for trial in running.trials() if trial["status"] != "RUNNING"]
        )
        assert status == ["USER_CANCELED"]
        assert not trial_processes(running, ids[0])
        assert trial_processes(running, ids[1])
        running.stop()  # and nothing of the experiment is left
        for trial_id in ids:
            assert seconds_to_stop(running, trial_id) <= 3
            output = running.output(trial_id)
            state = utils_vit.load_checkpoint(output / "checkpoint.pth.tar")
            assert f"stopped at step {state['step']};" in (output / "trial.log").read_text()
            assert not list(output.glob("*.tmp")) and not list(output.glob(".*.tmp"))
            copy = images.parent / f"copy-{trial_id}"
            shutil.copytree(output, copy)
            more = ["--resume", copy / "checkpoint.pth.tar", "--max-steps", str(state["step"] + 5)]
            subprocess.run([*MAIN, *more], check=True, timeout=60)
            resumed = utils_vit.load_checkpoint(copy / "checkpoint.pth.tar")
            assert resumed["step"] == state["step"] + 5
        running.resume()  # for the end of `experiment`, which stops it


def test_a_diverged_trial_fails_alone(images: Path) -> None:
    """The loss overflows after some epochs: FAILED, no NaN reaches NNI, TPE and the others go on."""
    # Each step multiplies the weights by 1 - lr * decay: -1.2 overflows in the third epoch.
    options = (
        "--optimizer sgd --lr 1e-3 --momentum 0 --clip-grad 0 --dont-adjust-learning-rate "
        "--batch-size 1 --epochs 4"
    )
    # The seed is there because TPE suggests nothing twice.
    space = {
        "weight_decay": {"_type": "choice", "_value": [1, 2200]},
        "seed": {"_type": "randint", "_value": [0, 1000]},
    }
    tuner = {"name": "TPE", "classArgs": {"optimize_mode": "maximize", "seed": 1}}
    settings = search(images, options, searchSpace=space, tuner=tuner, maxTrialNumber=4)
    with experiment(settings, images.parent) as running:
        running.wait("DONE", 120)
        trials = running.trials()
        decays = [trial["shown"]["parameters"]["weight_decay"] for trial in trials]
        assert len(set(decays)) == 2, "TPE suggests one decay only: this test has shown nothing"
        for trial, decay in zip(trials, decays, strict=True):
            output = running.output(trial["trialJobId"])
            curve = running.get(f"metric-data/{trial['trialJobId']}?type=PERIODICAL")
            finals = running.finals(trial["trialJobId"])
            if decay == 1:
                assert trial["status"] == "SUCCEEDED" and len(curve) == 4 and len(finals) == 1
            else:
                assert trial["status"] == "FAILED" and 0 < len(curve) < 4 and not finals
                [line] = (output / "trial.stderr").read_text().splitlines()
                assert "loss" in line and f"epoch {len(curve) + 1}, step" in line
                assert utils_vit.load_checkpoint(output / "model_best.pth.tar")
            for metric in curve:
                assert "NaN" not in metric["data"] and "Infinity" not in metric["data"]


@pytest.fixture(scope="module")
def stranger() -> Iterator[tuple[list[str], list[str]]]:
    """Another machine on a cable to this one: how to run a command there, and our addresses from there."""
    name, end = f"vit-{os.getpid()}", f"vit{os.getpid()}"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    try:
        ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no second network namespace here: {getattr(error, 'stderr', error)}")
    try:
        ip("link", "add", end, "type", "veth", "peer", "name", "eth0", "netns", name)
        there = ("-n", name)
        ip("address", "add", "198.18.77.1/24", "dev", end)
        ip(*there, "address", "add", "198.18.77.2/24", "dev", "eth0")
        ip("-6", "address", "add", "fd77:77::1/64", "dev", end, "nodad")
        ip(*there, "-6", "address", "add", "fd77:77::2/64", "dev", "eth0", "nodad")
        ip("link", "set", end, "up")
        ip(*there, "link", "set", "eth0", "up")
        ip(*there, "route", "add", "default", "via", "198.18.77.1")
        ip(*there, "-6", "route", "add", "default", "via", "fd77:77::1")
        yield ["ip", "netns", "exec", name], ["198.18.77.1", "fd77:77::1"]
    finally:
        ip("netns", "delete", name)  # and with it both ends of the cable


KNOCK = """
import socket, sys
for host in sys.argv[2:]:
    try:
        socket.create_connection((host, int(sys.argv[1])), timeout=2).close()
        print(host)
    except OSError:
        pass
"""


def who_answers(command: list[str], hosts: list[str], port: int) -> list[str]:
    """The addresses that accept a connection to the port, tried by a process in another place."""
    knock = [*command, sys.executable, "-c", KNOCK, str(port), *hosts]
    return subprocess.run(knock, check=True, capture_output=True, text=True).stdout.split()


def start_tensorboard(running: Experiment) -> int:
    """What the page's TensorBoard button does; the port, once it answers here."""
    body = {"trials": running.trials()[0]["trialJobId"]}
    url = f"{running.url}/api/v1/nni/tensorboard"
    port = int(requests.post(url, json=body, timeout=10).json()["port"])
    running.until(lambda: who_answers([], ["127.0.0.1"], port), 30)
    return port


def test_a_stranger_gets_no_answer(stranger: tuple[list[str], list[str]], images: Path) -> None:
    """The preload under `nnictl create`, `resume` and `view`: page and TensorBoard, IPv4 and IPv6."""
    command, hosts = stranger
    settings = search(images, "--epochs 1", maxTrialNumber=1)
    with experiment(settings, images.parent) as running:
        place = ["--port", str(running.port), "--experiment_dir", str(running.folder / "exp")]
        for start in ("create", "resume", "view"):
            if start != "create":
                running.stop()
                running.nnictl(start, running.id, *place)
            running.until(lambda: running.trials()[-1:] and running.trials()[-1].get("endTime"))
            for port in (running.port, start_tensorboard(running)):
                assert who_answers([], ["127.0.0.1"], port) == ["127.0.0.1"]
                assert who_answers(command, hosts, port) == [], start


def test_without_the_preload_a_stranger_does(
    stranger: tuple[list[str], list[str]], images: Path
) -> None:
    """The control: plain `nnictl create` is open to the network, so the test above can fail."""
    command, hosts = stranger
    settings = search(images, "--epochs 1", maxTrialNumber=1)
    with experiment(settings, images.parent, loopback=False) as running:
        running.wait()
        for port in (running.port, start_tensorboard(running)):
            assert who_answers(command, hosts, port) == hosts


def test_two_experiments_on_one_folder_and_one_cache(images: Path) -> None:
    """Both start at once, nothing decoded yet: all trials succeed, one cache is built."""
    settings = search(images, "--batch-size 4 --epochs 3", maxTrialNumber=2)
    one, two = images.parent / "one", images.parent / "two"
    with experiment(settings, one) as first, experiment(settings, two) as second:
        for running in (first, second):
            running.wait("DONE", 120)
            assert [trial["status"] for trial in running.trials()] == ["SUCCEEDED"] * 2
    cache = sorted(path.suffix for path in (images.parent / "cache").iterdir())
    assert cache.count(".npy") == 2 and ".tmp" not in cache  # train/ and test/


SEARCH_AS_USER = """
import json, sys
from pathlib import Path
from nni_tools import experiment
with experiment(json.loads(sys.argv[1]), Path(sys.argv[2])) as running:
    running.wait("DONE", 240)
    print(json.dumps([trial["status"] for trial in running.trials()]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become two other users")
def test_two_users_search_at_once(make_images: Callable[..., Path]) -> None:
    """Two accounts, an experiment of each, one data folder, one cache that both may write to, as /tmp."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    (place / "cache").mkdir()
    (place / "cache").chmod(0o1777)
    images = make_images(place / "images/train", ["cat", "dog"], 20).parent
    settings = json.dumps(search(images, "--batch-size 4 --epochs 3", maxTrialNumber=2))
    started = []
    for name in ("nobody", "daemon"):
        user = pwd.getpwnam(name)
        (place / name).mkdir()
        os.chown(place / name, user.pw_uid, user.pw_gid)
        # They may read what root may, since Python and this repository can lie anywhere, but write
        # only what is theirs.
        reading = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
        as_user = [
            "setpriv",
            f"--reuid={name}",
            f"--regid={user.pw_gid}",
            "--clear-groups",
            *reading,
        ]
        # Node looks for its files by access(2), which knows no such right.
        readable = "import nni, os, sys, torch; sys.exit(not os.access(nni.__file__, os.R_OK))"
        if subprocess.run([*as_user, sys.executable, "-c", readable]).returncode:
            shutil.rmtree(place)
            pytest.skip(f"the user {name} cannot be given the right to read this Python")
        command = [*as_user, sys.executable, "-c", SEARCH_AS_USER, settings, str(place / name)]
        started.append(
            subprocess.Popen(
                command,
                cwd=REPOSITORY / "tests",
                env=os.environ | {"USER": name},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )  # fmt: skip
        )
    try:
        ended = [process.communicate(timeout=300) for process in started]
        for output, error in ended:
            assert json.loads(output or "null") == ["SUCCEEDED"] * 2, error
        files = list((place / "cache").iterdir())
        assert sorted(path.suffix for path in files) == [".lock", ".npy"]
        assert not [path for path in files if path.stat().st_mode & 0o022]
        logs = [
            log.read_text() for log in place.glob("*/exp/[!_]*/environments/*/trials/*/trial.log")
        ]
        assert len(logs) == 4 and sum("  decoded " in log for log in logs) == 1, logs
    finally:
        for process in started:
            process.send_signal(signal.SIGINT)  # which ends its experiment too
            process.wait(timeout=60)
        shutil.rmtree(place)
