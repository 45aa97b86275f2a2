"""NNI's remote platform over a real sshd: this machine as its own worker, and a worker behind a tunnel."""

import getpass
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml
from nni_tools import REPOSITORY, experiment, free_port, read_config

import demo_vit
import utils_vit

SSHD = shutil.which("sshd") or shutil.which("/usr/sbin/sshd")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not SSHD or not shutil.which("ssh"), reason="needs sshd and ssh"),
]
EXAMPLE = REPOSITORY / "examples/remote/config.yml"
SPACE = {"lr": {"_type": "loguniform", "_value": [1e-4, 1e-2]}}
TINY = "--image-size 8 --channel 1 --patch-size 4 --vt-dim 16 --vt-depth 1 --vt-heads 2 --mlp-dim 16 --threads 1 --epochs 2"


class Worker:
    """A machine that ssh leads to, with a home of its own; `network` is a command that runs in its network."""

    def __init__(self, folder: Path, host: str, network: list[str]) -> None:
        self.home, self.host, self.network = folder / "worker", host, network
        self.port, self.user, self.key = free_port(), getpass.getuser(), folder / "key"
        self.home.mkdir()
        for key in (self.key, folder / "host_key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)]
            subprocess.run(command, check=True)
        # The home of a real user stays untouched, and no package is looked up anywhere.
        settings = f"""
            Port {self.port}
            ListenAddress {host}
            HostKey {folder / "host_key"}
            AuthorizedKeysFile {folder / "key.pub"}
            PasswordAuthentication no
            StrictModes no
            PidFile none
            Subsystem sftp internal-sftp
            SetEnv HOME={self.home} PIP_NO_INDEX=1
        """
        (folder / "sshd_config").write_text(settings)
        self.options = ["-i", str(self.key), "-o", "StrictHostKeyChecking=no"]
        self.options += ["-o", f"UserKnownHostsFile={folder / 'known'}", "-o", "LogLevel=ERROR"]

    def ssh(self, *args: str) -> list[str]:
        """An ssh command to this machine."""
        return ["ssh", *self.options, "-p", str(self.port), *args, f"{self.user}@{self.host}"]

    def machine(self) -> dict[str, Any]:
        """Its entry in machineList."""
        return {
            "host": self.host,
            "port": self.port,
            "user": self.user,
            "sshKeyFile": str(self.key),
            "pythonPath": str(Path(sys.executable).parent),
        }

    def trials(self, experiment_id: str) -> Path:
        """Where the output folders of an experiment's trials are."""
        return self.home / "nni-experiments" / experiment_id / "environments/remote-worker1/trials"

    def processes(self) -> list[psutil.Process]:
        """What runs there, but for the server itself."""
        mine = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("HOME") == str(self.home):
                    mine.append(process)
            except psutil.Error:
                continue
        return mine


@contextmanager
def worker_at(folder: Path, host: str, network: list[str]) -> Iterator[Worker]:
    """Starts the sshd of a worker; on leaving nothing of it is left."""
    worker = Worker(folder, host, network)
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    command = [*network, SSHD, "-D", "-e", "-f", str(folder / "sshd_config")]
    with open(folder / "sshd.log", "w") as log, subprocess.Popen(command, stderr=log) as sshd:
        try:
            for _ in range(50):
                if subprocess.run([*worker.ssh(), "true"], capture_output=True).returncode == 0:
                    break
                time.sleep(0.1)
            else:
                pytest.fail((folder / "sshd.log").read_text())
            yield worker
        finally:
            sshd.terminate()
            for process in worker.processes():
                process.kill()


def own_address() -> str:
    """An address of this machine that is not loopback."""
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family.name == "AF_INET" and not address.address.startswith("127."):
                return address.address
    pytest.skip("this machine has no address but loopback")


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, list[str]]]:
    """An address in a network of its own, on a cable to this machine, and a command to run things there."""
    name, end = f"vitw-{os.getpid()}", f"vitw{os.getpid()}"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    try:
        ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no second network namespace here: {getattr(error, 'stderr', error)}")
    try:
        ip("link", "add", end, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("address", "add", "198.18.78.1/24", "dev", end)
        ip("-n", name, "address", "add", "198.18.78.2/24", "dev", "eth0")
        ip("link", "set", end, "up")
        ip("-n", name, "link", "set", "eth0", "up")
        ip("-n", name, "link", "set", "lo", "up")
        yield "198.18.78.2", ["ip", "netns", "exec", name]
    finally:
        ip("netns", "delete", name)


def search(worker: Worker, images: Path, **settings: Any) -> dict[str, Any]:
    """The shipped example with small models, this worker and images that it can see."""
    config = read_config(EXAMPLE)
    del config["searchSpaceFile"]
    config["trialCommand"] += f" {TINY} --download-dir {images}"
    config["searchSpace"] = SPACE
    config["trainingService"]["machineList"] = [worker.machine()]
    return config | settings


def test_trials_on_a_worker(tmp_path: Path) -> None:
    """Three trials, two at a time: what is copied, who gets which parameters, what comes back."""
    images, host = demo_vit.make_digits(tmp_path / "digits"), own_address()
    with worker_at(tmp_path, host, []) as worker:
        config = search(worker, images, maxTrialNumber=3, nniManagerIp=host)
        with experiment(config, tmp_path, loopback=False, url_prefix="a/b") as running:
            running.wait("DONE", 240)
            trials = running.trials()
            assert [trial["status"] for trial in trials] == ["SUCCEEDED"] * 3
            for trial in trials:
                trial_id = trial["trialJobId"]
                output = worker.trials(running.id) / trial_id
                results = json.loads((output / "results.json").read_text())
                record = json.loads((output / "nni.json").read_text())
                assert record["parameters"] == trial["shown"]["parameters"]
                args = yaml.safe_load((output / "args.yaml").read_text())
                assert args["lr"] == trial["shown"]["parameters"]["lr"]
                [final] = running.finals(trial_id)
                assert final["default"] == results["validation"]["accuracy"]
                url = f"{running.url}/api/v1/nni/trial-file/{trial_id}/trial.log"
                assert "best    epoch" in requests.get(url, timeout=20).text
            # The page says where the model is, and the line of the example brings it here.
            assert trials[0]["logPath"] == f"{host}:{output_shown(running.id, trials[0])}"
            # (Its path is relative to the home of the user, which is not where this sshd's is.)
            path = f"{worker.home}/nni-experiments/{running.id}/environments/*/trials/{trial_id}"
            command = ["scp", "-q", "-r", *worker.options, "-P", str(worker.port)]
            place = f"{worker.user}@{host}:{path}"
            subprocess.run([*command, place, str(tmp_path / "brought")], check=True)
            assert utils_vit.load_checkpoint(tmp_path / "brought/model_best.pth.tar")
            copied = worker.trials(running.id).parent / "upload/trial_code"
            names = {path.name for path in copied.iterdir()}
            assert {"main_vit.py", "vit.py", "config.yml"} <= names
            assert not names & {".git", ".venv", "dataset", "dataset_real", "runs", "tests"}
            running.stop()
            assert not psutil.wait_procs(worker.processes(), timeout=15)[1], "left on the worker"
            running.resume()  # for the end of `experiment`, which stops it


def output_shown(experiment_id: str, trial: dict[str, Any]) -> str:
    """The folder of a trial on its worker, as NNI writes it."""
    folder = f"~/nni-experiments/{experiment_id}/environments/remote-worker1"
    return f"{folder}/trials/{trial['trialJobId']}"


def test_a_worker_behind_a_tunnel_and_resume(
    tmp_path: Path, elsewhere: tuple[str, list[str]]
) -> None:
    """NNI is bound to loopback, the worker reaches it through `ssh -R`; stop and resume go on with the trial."""
    images = demo_vit.make_digits(tmp_path / "digits")
    with worker_at(tmp_path, *elsewhere) as worker:
        config = search(worker, images, maxTrialNumber=1)
        config["trialCommand"] += " --epochs 400 --batch-size 8"
        assert config["nniManagerIp"] == "127.0.0.1"
        port = free_port()
        forward = f"127.0.0.1:{port}:127.0.0.1:{port}"
        with (
            subprocess.Popen(worker.ssh("-N", "-R", forward)) as tunnel,
            experiment(config, tmp_path, port=port) as running,
        ):
            trials = worker.trials(running.id)
            running.until(lambda: len(epochs(trials)) > 3, 240)
            running.stop()
            assert not psutil.wait_procs(worker.processes(), timeout=15)[1], "left on the worker"
            [output] = trials.iterdir()
            assert "stopped at step" in (output / "trial.log").read_text()
            assert utils_vit.load_checkpoint(output / "checkpoint.pth.tar")["step"]
            before = epochs(trials)
            running.resume()
            running.until(lambda: len(epochs(trials)) > len(before) + 3, 240)
            assert [trial.name for trial in trials.iterdir()] == [output.name]
            assert "resumed after step" in (output / "trial.log").read_text()
            after = epochs(trials)
            assert after[: len(before)] == before
            assert [line["epoch"] for line in after] == list(range(1, len(after) + 1))
            tunnel.terminate()


def epochs(trials: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of the only trial, once there is one."""
    lines = [file.read_text().splitlines() for file in trials.glob("*/metrics.jsonl")]
    return [json.loads(line) for line in sum(lines, [])]
