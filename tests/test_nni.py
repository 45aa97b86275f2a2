"""nni_vit.py and loopback.cjs against the real NNI: managers, tuners, bash and signals, no stand-ins."""

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nni_node
import psutil
import pytest
import requests
from nni_tools import REPOSITORY, Experiment, experiment, free_port
from test_survival import TINY

import nni_vit
from check_vit.command import hides_signals
from nni_vit import finite

SPACE = {"a": {"_type": "uniform", "_value": [0, 1]}}

# TPE that writes down what it is told, so that a test sees the tuner's knowledge itself.
TUNER = """
import json, os
from nni.algorithms.hpo.tpe_tuner import TpeTuner

class Recorder(TpeTuner):
    def receive_trial_result(self, parameter_id, parameters, value, **kwargs):
        with open(os.environ["HOME"] + "/told", "a") as file:
            print(json.dumps([parameters["a"], value["default"]]), file=file)
        super().receive_trial_result(parameter_id, parameters, value, **kwargs)
"""


def config(folder: Path, trial: str, **options: object) -> dict[str, object]:
    """The configuration of an experiment whose trials run the given code."""
    (folder / "trial.py").write_text(trial)
    (folder / "recorder.py").write_text(TUNER)
    tuner = {"codeDirectory": str(folder), "className": "recorder.Recorder"}
    command = f"{sys.executable} trial.py"
    return {"trialCommand": command, "searchSpace": SPACE, "tuner": tuner, **options}


def told(running: Experiment) -> list[list[float]]:
    """The pairs (parameter, result) that the tuner received."""
    return [json.loads(line) for line in (running.folder / "home/told").read_text().splitlines()]


@pytest.mark.slow
def test_each_trial_uses_what_the_page_shows(tmp_path: Path) -> None:
    """12 trials, 4 at a time, ask after 0 to 3 s; number 5 is killed before it asks."""
    trial = """
import os, random, signal, time
from nni_vit import Trial

trial = Trial()
if trial.sequence_id == 5:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(random.Random(trial.sequence_id).uniform(0, 3))
trial.finish({"default": trial.ask()["a"]})
"""
    options = {"maxTrialNumber": 12, "trialConcurrency": 4}
    with experiment(config(tmp_path, trial, **options), tmp_path, url_prefix="a/b") as running:
        running.wait("DONE", 240)
        trials = running.trials()
        assert [trial["status"] for trial in trials].count("SUCCEEDED") == 11
        swapped = 0
        for trial in (trial for trial in trials if trial["sequenceId"] != 5):
            record = json.loads((running.output(trial["trialJobId"]) / "nni.json").read_text())
            shown = trial["shown"]["parameters"]
            assert record["parameters"] == shown
            assert record["parameter_id"] == trial["shown"]["parameter_id"]
            assert running.finals(trial["trialJobId"]) == [{"default": shown["a"]}]
            swapped += record["received"]["parameters"] != shown
        assert swapped, "NNI swapped no parameters: this test has shown nothing"
        pairs = told(running)
        assert len(pairs) == 11
        assert all(parameter == result for parameter, result in pairs)


@pytest.mark.slow
def test_a_killed_trial_tells_the_tuner_its_best(tmp_path: Path) -> None:
    """`nnictl trial kill`: the status is the truth, the tuner has the value, the search goes on."""
    trial = """
import os, signal, time
from nni_vit import Trial

trial = Trial()
best = {"default": trial.ask()["a"]}
trial.report(1, best)
if trial.sequence_id == 0:
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        trial.finish(best)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
trial.finish(best)
"""
    with experiment(config(tmp_path, trial, maxTrialNumber=3), tmp_path) as running:
        running.until(lambda: running.trials() and running.get("metric-data"))
        running.nnictl("trial", "kill", running.id, "--trial_id", running.trials()[0]["trialJobId"])
        running.wait()
        trials = running.trials()
        statuses = [trial["status"] for trial in trials]
        assert statuses == ["USER_CANCELED", "SUCCEEDED", "SUCCEEDED"]
        shown = [trial["shown"]["parameters"]["a"] for trial in trials]
        assert told(running) == [[value, value] for value in shown]


@pytest.mark.slow
def test_a_curve_told_at_once_never_shows_a_hole(tmp_path: Path) -> None:
    """NNI stores the results of one moment in any order, and its page is empty where one is missing."""
    trial = """
from nni_vit import Trial

trial = Trial()
best = {"default": trial.ask()["a"]}
trial.report(2, best)
trial.begin_curve(401, {epoch: best for epoch in range(1, 401)}, lambda: False)
trial.finish(best)
"""
    with experiment(config(tmp_path, trial, maxTrialNumber=1), tmp_path) as running:
        longest = 0
        while running.get("check-status")["status"] != "DONE":
            for one in running.trials():
                curve = running.get(f"metric-data/{one['trialJobId']}?type=PERIODICAL")
                epochs = sorted(metric["sequence"] for metric in curve)
                if len(epochs) > 1:  # from then on the one that was there too early has its place
                    assert epochs == list(range(len(epochs)))
                    longest = len(epochs)
        assert longest == 400


@pytest.mark.slow
def test_stop_and_resume_give_one_final_result(tmp_path: Path) -> None:
    """Trial 0 is stopped after its final result, trial 1 before, and reports into the void."""
    trial = """
import time
from nni_vit import Trial

trial = Trial()
metrics = {"default": trial.ask()["a"]}
again = (trial.output_dir / "started").exists()
if trial.sequence_id == 0:
    print("finish:", trial.finish(metrics))
(trial.output_dir / "started").touch()
try:
    while not again:
        trial.report(1, metrics)
        time.sleep(0.5)
    trial.report(50, metrics)
finally:
    print("finish:", trial.finish(metrics))
"""
    options = {"maxTrialNumber": 2, "trialConcurrency": 2}
    with experiment(config(tmp_path, trial, **options), tmp_path) as running:
        running.until(
            lambda: (
                [(running.output(t["trialJobId"]) / "started").exists() for t in running.trials()]
                == [True, True]
            )
        )
        before = running.trials()
        running.stop()
        logs = [running.output(trial["trialJobId"]) / "trial.log" for trial in before]
        assert all("manager is out of reach" in log.read_text() for log in logs)
        running.resume()
        running.wait()
        after = running.trials()
        assert [trial["status"] for trial in after] == ["SUCCEEDED", "SUCCEEDED"]
        for old, new, log in zip(before, after, logs, strict=True):
            parameters = old["shown"]["parameters"]
            assert (
                new["trialJobId"] == old["trialJobId"] and new["shown"]["parameters"] == parameters
            )
            assert running.finals(new["trialJobId"]) == [{"default": parameters["a"]}]
            assert log.read_text().count("finish: True") == 1
            curve = running.get(f"metric-data/{new['trialJobId']}?type=PERIODICAL")
            assert curve[-1]["sequence"] == 49  # the curve goes on where the trial does


def answers(host: str, port: int) -> bool:
    """Whether somebody listens there."""
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError:
        return False
    return True


def upgrades(port: int, headers: dict[str, str]) -> bool:
    """Whether NNI takes a WebSocket of a trial."""
    lines = ["GET /env/x HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    lines += ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
    lines += ["Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "", ""]
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall("\r\n".join(lines).encode())
        return client.recv(12) == b"HTTP/1.1 101"


@pytest.mark.slow
def test_page_and_tensorboard_are_for_this_machine_only(tmp_path: Path) -> None:
    """Every other address of this machine refuses; TensorBoard serves the curves of the trial."""
    trial = """
from torch.utils.tensorboard import SummaryWriter
from nni_vit import Trial

trial = Trial()
metrics = {"default": trial.ask()["a"]}
trial.link_tensorboard()
with SummaryWriter(trial.output_dir / "tensorboard") as writer:
    writer.add_scalar("accuracy", 0.5, 1)
trial.finish(metrics)
"""
    families = (socket.AF_INET, socket.AF_INET6)
    others = {"127.0.0.2"}  # answered by whoever listens on every interface, network or none
    for interface in psutil.net_if_addrs().values():
        others |= {address.address for address in interface if address.family in families}
    others.remove("127.0.0.1")
    folder = tmp_path / "a space"
    folder.mkdir()
    with experiment(config(folder, trial, maxTrialNumber=1), folder) as running:
        running.wait()
        body = {"trials": running.trials()[0]["trialJobId"]}
        task = requests.post(f"{running.url}/api/v1/nni/tensorboard", json=body, timeout=10).json()
        tensorboard = int(task["port"])
        running.until(lambda: answers("127.0.0.1", tensorboard), 30)
        assert not [host for host in others if answers(host, running.port)]
        assert not [host for host in others if answers(host, tensorboard)]
        tags = f"http://127.0.0.1:{tensorboard}/data/plugin/scalars/tags"
        curves = running.until(lambda: requests.get(tags, timeout=10).json(), 30)
        assert [list(curve) for curve in curves.values()] == [["accuracy"]]
        # A page of another site asks by its own name, given this address, or says where it is from.
        own, other = f"localhost:{running.port}", f"else.example:{running.port}"
        for headers, allowed in [
            ({"Host": own}, True), ({"Host": own, "Origin": f"http://{own}"}, True),
            ({"Host": other}, False), ({"Host": own, "Origin": f"http://{other}"}, False),
        ]:  # fmt: skip
            got = requests.get(f"{running.url}/api/v1/nni/trial-jobs", headers=headers, timeout=10)
            assert got.status_code == (200 if allowed else 403), headers
            assert upgrades(running.port, headers) == allowed, headers


def test_loopback_in_a_folder_with_a_space(tmp_path: Path) -> None:
    """The README's way to write NODE_OPTIONS, and each way to say where to listen."""
    folder = tmp_path / "a space"
    folder.mkdir()
    shutil.copy(REPOSITORY / "loopback.cjs", folder)
    node = Path(nni_node.__file__).parent / "node"
    show = """
const show = (...where) => {
  const server = require("net").createServer();
  server.listen(...where, () => { console.log(server.address().address); server.close(); });
};
show(0); show({ port: 0 }); show(0, "127.0.0.3"); show({ port: 0, host: "127.0.0.3" });
"""
    bash = f"""NODE_OPTIONS="--require=\\"$PWD/loopback.cjs\\"" '{node}' -e '{show}'"""
    done = subprocess.run(["/bin/bash", "-c", bash], cwd=folder, capture_output=True, text=True)
    assert sorted(done.stdout.split()) == ["127.0.0.1"] * 2 + ["127.0.0.3"] * 2, done.stderr


COMMANDS = {  # trialCommand: what keeps the signal from Python
    "python x.py": None,
    "A=1 python x.py": None,
    "cd . && python x.py": None,
    "export A=1; python x.py": None,
    "export A=1\npython x.py": None,
    "python x.py;": None,
    'python x.py "a;b|c>d" a\\;b': None,
    "python x.py --x $(echo 1 | cat)": None,
    "python x.py \\\n  --x 1": None,
    "env A=1 nice python x.py": None,
    "cd . > cd.log && python x.py": None,
    "exec python x.py > log 2>&1": None,
    "exec python x.py > >(tee log)": None,
    "python x.py > log": "> log",
    "python x.py 2>&1": "2>&1",
    "python x.py 2>&1 | tee log": "2>&1 | tee log",
    "exec python x.py | tee log": "| tee log",
    "python x.py; echo": "; echo",
    "python x.py\necho": "\necho",
    "python x.py && echo": "&& echo",
    "python x.py || true": "|| true",
    "python x.py &": "&",
    "(python x.py)": "(python x.py)",
    "{ python x.py; }": "; }",
    "time python x.py": "time python x.py",
    "trap 'echo bye' EXIT; python x.py": "trap 'echo bye' EXIT; python x.py",
    "flock lock python x.py": "flock lock python x.py",
    "flock --no-fork lock python x.py": None,
    "cd . && bash run.sh": "bash run.sh",
    "bash run.sh": "bash run.sh",
    "./run.sh": "./run.sh",
    "env A=1 bash run.sh": "bash run.sh",
    ". ./run.sh": "./run.sh",
    "exec bash run.sh": "bash run.sh",
    'bash -c "python x.py"': None,
    "exec /bin/bash -ec 'cd . && python x.py'": None,
    'bash -c "python x.py; echo \\"done\\""': '; echo "done"',
    'bash -c "exec python x.py > log" > log': "> log",
    "sh -c 'python x.py; echo'": "sh -c 'python x.py; echo'",
    'eval "python x.py"': 'eval "python x.py"',
}


def test_hides_signals_says_what_bash_does(tmp_path: Path) -> None:
    """Each command is run as NNI runs it, and its bash gets the SIGINT that NNI sends."""
    listener = """
import pathlib, signal, sys, time

def stop(*_):
    pathlib.Path("signal").touch()
    sys.exit()

signal.signal(signal.SIGINT, stop)
pathlib.Path("ready").touch()
time.sleep(20)
"""
    started: list[subprocess.Popen[bytes]] = []
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for number, command in enumerate(COMMANDS):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "x.py").write_text(listener)
        (folder / "run.sh").write_text("#!/bin/bash\npython x.py\necho done\n")
        (folder / "run.sh").chmod(0o755)
        bash = ["/bin/bash", "-c", command]
        started.append(subprocess.Popen(bash, cwd=folder, env=env, stdin=subprocess.DEVNULL))
    try:
        deadline = time.monotonic() + 20
        while len(list(tmp_path.glob("*/ready"))) < len(COMMANDS):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        for process in started:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        time.sleep(1)
        for number, (command, hiding) in enumerate(COMMANDS.items()):
            assert hides_signals(command) == hiding, command
            assert (tmp_path / str(number) / "signal").exists() == (hiding is None), command
    finally:
        for process in psutil.process_iter(["cwd"]):
            if process.info["cwd"] and Path(process.info["cwd"]).parent == tmp_path:
                process.kill()


def test_metrics_are_finite_and_have_a_default() -> None:
    """What NNI may be told, and what may never reach it."""
    metrics = {"default": 1, "loss": float("inf"), "auc": float("nan"), "balanced": 0.5}
    assert finite(metrics) == {"default": 1.0, "balanced": 0.5}
    for broken in ({}, {"accuracy": 1.0}, {"default": float("nan")}, {"default": float("inf")}):
        with pytest.raises(ValueError, match="default"):
            finite(broken)


def test_trial_without_nni() -> None:
    """No manager: no parameters, reports to nowhere, and NNI is not even imported."""
    code = """
import sys
from nni_vit import Trial

trial = Trial()
assert trial.ask() == {} and trial.output_dir is None
trial.report(1, {"default": 1.0})
trial.link_tensorboard()
assert not trial.finish({"default": 1.0})
assert "nni" not in sys.modules
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NNI_")}
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=clean, check=True)


def test_request_from_nni_outside_nni_does_not_go_on_by_itself(
    image_folder: Path, run_main: Callable[..., Any], tmp_path: Path
) -> None:
    argv = ["--download-dir", image_folder, *TINY, "--request-from-nni", "--max-steps", "1"]
    assert run_main(*argv, "--model-dir", tmp_path / "run").status == 0
    result = run_main(*argv, "--model-dir", tmp_path / "run")
    assert result.status == 2 and "holds a run already" in result.stderr


def trial_without_manager(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """The output folder and the environment of a trial whose manager does not answer."""
    output = tmp_path / "exp/environments/local-env/trials/abc"
    output.mkdir(parents=True)
    return output, {
        **os.environ,
        "NNI_PLATFORM": "local",
        "NNI_TRIAL_COMMAND_CHANNEL": f"http://localhost:{free_port()}/env/local-env/abc",
        "NNI_OUTPUT_DIR": str(output),
        "NNI_SYS_DIR": str(output),
        "NNI_TRIAL_JOB_ID": "abc",
        "NNI_EXP_ID": "exp",
        "NNI_TRIAL_SEQ_ID": "3",
    }


def test_a_trial_whose_search_was_stopped_before_it_asked(tmp_path: Path) -> None:
    _, env = trial_without_manager(tmp_path)
    command = [sys.executable, "main_vit.py", "--request-from-nni"]
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "main_vit.py: error: NNI's manager is out of reach, was the search stopped? `nnictl resume`"
    )
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_link_and_memory_of_a_final_result(tmp_path: Path) -> None:
    """Two starts in one folder: the link stands, a delivered result is not delivered again."""
    output, env = trial_without_manager(tmp_path)
    (output / "nni.json").write_text(json.dumps({"final": {"default": 1.0}}))
    code = """
from nni_vit import Trial

trial = Trial()
trial.link_tensorboard()
assert not trial.finish({"default": 2.0})
"""
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=env, check=True)
    assert (tmp_path / "exp/trials/abc/output").resolve() == output.resolve()


@pytest.mark.slow
def test_a_trial_that_ended_before_it_had_told_all(tmp_path: Path, image_folder: Path) -> None:
    """Its last epoch and its best go out once its results are written; started again, it tells what is missing."""
    record = {"parameter_id": 7, "parameter_source": "algorithm", "parameters": {}}
    (tmp_path / "parameter.cfg").write_text(json.dumps(record))
    env = {
        **os.environ,
        "NNI_PLATFORM": "kubeflow",
        "NNI_OUTPUT_DIR": str(tmp_path / "output"),
        "NNI_SYS_DIR": str(tmp_path),
        "NNI_TRIAL_JOB_ID": "abc",
        "NNI_EXP_ID": "exp",
        "NNI_TRIAL_SEQ_ID": "3",
    }
    command = [sys.executable, "main_vit.py", "--request-from-nni", *TINY]
    command += ["--download-dir", image_folder, "--epochs", "2"]

    def told() -> tuple[str, list[str]]:
        done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout, re.findall(r'"type": "(\w+)"', done.stdout)

    everything = ["PERIODICAL", "PERIODICAL", "FINAL"]
    output, types = told()
    assert types == everything
    before, _, _ = output.partition("best    epoch")  # the results
    assert before.count("PERIODICAL") == 1
    record = json.loads((tmp_path / "output/nni.json").read_text())
    del record["final"]  # as if it had been killed before
    (tmp_path / "output/nni.json").write_text(json.dumps(record))
    output, types = told()
    assert "this run is finished" in output and types == everything


@pytest.mark.slow
def test_a_trial_in_kubernetes(tmp_path: Path) -> None:
    """NNI's older platforms have no channel but files and lines of output: it asks and reports there."""
    record = {"parameter_id": 7, "parameter_source": "algorithm", "parameters": {"a": 0.5}}
    (tmp_path / "parameter.cfg").write_text(json.dumps(record))
    code = """
from nni_vit import Trial

trial = Trial()
metrics = {"default": trial.ask()["a"]}
trial.link_tensorboard()
trial.report(1, metrics)
trial.report(2, metrics, last=True)  # an assessor may end the trial for it
print("results are written")
assert trial.finish(metrics) and not trial.finish(metrics)
"""
    env = {
        **os.environ,
        "NNI_PLATFORM": "kubeflow",
        "NNI_OUTPUT_DIR": str(tmp_path / "output"),
        "NNI_SYS_DIR": str(tmp_path),
        "NNI_TRIAL_JOB_ID": "abc",
        "NNI_EXP_ID": "exp",
        "NNI_TRIAL_SEQ_ID": "3",
    }
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sent = re.findall(r"NNISDK_MEb'(.*)'", done.stdout)
    assert done.stdout.partition("results are written")[0].count("NNISDK_MEb") == 1
    metrics = [json.loads(line) for line in sent]
    assert [metric["type"] for metric in metrics] == ["PERIODICAL", "PERIODICAL", "FINAL"]
    for metric in metrics:
        assert metric["parameter_id"] == 7 and json.loads(metric["value"]) == {"default": 0.5}
    assert json.loads((tmp_path / "output/nni.json").read_text())["parameters"] == {"a": 0.5}


def test_a_trial_takes_the_gpu_that_the_fewest_compute_on(tmp_path: Path) -> None:
    """One that was killed counts no more."""
    code = "import pathlib, sys, nni_vit; first = int(sys.argv[1]); "
    code += (
        "print(nni_vit.least_used_gpu(pathlib.Path(sys.argv[2]), first, 3), flush=True); input()"
    )
    trials: list[subprocess.Popen[str]] = []
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}

    def start(sequence_id: int) -> str:
        command = [sys.executable, "-c", code, str(sequence_id), tmp_path]
        trials.append(subprocess.Popen(command, cwd=REPOSITORY, **pipes))
        return trials[-1].stdout.readline().strip()

    try:
        assert [start(number) for number in range(5)] == ["0", "1", "2", "0", "1"]
        trials[1].kill()  # GPU 1 has one left, as 2 has, and 0 has two
        trials[1].wait()
        assert [start(number) for number in (9, 10)] == ["1", "2"]  # two on each
        for number in (0, 2, 4):  # the first of GPU 0, the first of 2, one of 1
            trials[number].kill()
            trials[number].wait()
        assert [start(number) for number in (12, 13, 14)] == ["0", "1", "2"]
        assert len([*tmp_path.glob(".gpu?-*.lock")]) == 6  # one of each that runs
    finally:
        for process in trials:
            process.kill()
            process.communicate()


def test_without_locks_trials_take_the_gpus_by_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(nni_vit.fcntl, "flock", no_locks)
    assert [nni_vit.least_used_gpu(tmp_path, n, 4) for n in range(6)] == [0, 1, 2, 3, 0, 1]
