"""Real, small NNI experiments for tests: each in its own folder and home, stopped by its id at the end."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import requests
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
NNICTL = Path(sys.executable).parent / "nnictl"


def free_port() -> int:
    """A TCP port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Experiment:
    """One experiment of NNI, seen through nnictl and the manager's REST."""

    def __init__(self, folder: Path, port: int, url_prefix: str, loopback: bool) -> None:
        self.folder, self.port = folder, port
        self.id = ""
        self.url = f"http://127.0.0.1:{port}" + (f"/{url_prefix}" if url_prefix else "")
        # A home of its own keeps ~/nni-experiments, and its list of experiments, to this test.
        self.env = {**os.environ, "HOME": str(folder / "home")}
        self.env["PATH"] = f"{NNICTL.parent}{os.pathsep}{os.environ['PATH']}"
        paths = [str(REPOSITORY), os.environ.get("PYTHONPATH")]
        self.env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        self.env["no_proxy"] = "localhost,127.0.0.1"
        if loopback:
            self.env["NODE_OPTIONS"] = f'--require="{REPOSITORY / "loopback.cjs"}"'

    def nnictl(self, *args: str) -> str:
        """The output of one nnictl command, which must succeed."""
        output = self._nnictl(*args)
        for _ in range(2):
            if args[0] in ("create", "resume", "view") and self._started_too_slowly(output):
                for process in self.processes():
                    process.kill()
                output = self._nnictl(*args)
        assert "ERROR" not in output, output
        return output

    def _nnictl(self, *args: str) -> str:
        command = [sys.executable, str(NNICTL), *args]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=90)
        output = done.stdout + done.stderr
        return output if done.returncode == 0 else f"{output}ERROR: status {done.returncode}"

    def _started_too_slowly(self, output: str) -> bool:
        """Whether NNI gave up on a machine that was too busy for its patience with its own parts."""
        # With the web server, whose answers it asks for early, and with the tuner.
        if "Expecting value: line 1" in output or "Max retries exceeded" in output:
            return True
        if "ERROR" in output:
            return False
        state = self.until(
            lambda: (now := self.get("check-status"))["status"] != "INITIALIZED" and now
        )
        return any("Tuner did not connect" in error for error in state["errors"])

    def get(self, path: str) -> Any:
        """The JSON that the manager answers at /api/v1/nni/PATH."""
        answer = requests.get(f"{self.url}/api/v1/nni/{path}", timeout=10)
        answer.raise_for_status()
        return answer.json()

    def trials(self) -> list[dict[str, Any]]:
        """The trials that the page shows, by sequence number, with `shown` the sampled parameters."""
        trials = sorted(self.get("trial-jobs"), key=lambda trial: trial["sequenceId"])
        for trial in trials:
            trial["shown"] = json.loads(trial["hyperParameters"][0])
        return trials

    def finals(self, trial_id: str) -> list[Any]:
        """The final results that the manager has stored for a trial."""
        metrics = self.get(f"metric-data/{trial_id}?type=FINAL")
        return [json.loads(json.loads(metric["data"])) for metric in metrics]

    def output(self, trial_id: str) -> Path:
        """The NNI_OUTPUT_DIR of a trial."""
        return self.folder / "exp" / self.id / "environments" / "local-env" / "trials" / trial_id

    def wait(self, status: str = "DONE", timeout: float = 120) -> None:
        """Waits for the experiment to reach a status."""
        self.until(lambda: self.get("check-status")["status"] == status, timeout)

    def until(self, condition: Callable[[], Any], timeout: float = 120) -> Any:
        """Waits for a condition to hold and returns its value."""
        deadline = time.monotonic() + timeout
        while not (value := condition()):
            if time.monotonic() > deadline:
                state = self.get("check-status"), [trial["status"] for trial in self.trials()]
                raise AssertionError(f"waited {timeout} s in vain: {state}")
            time.sleep(0.3)
        return value

    def stop(self) -> None:
        """Stops the experiment; nothing of it may be left running."""
        self.nnictl("stop", self.id)
        left = psutil.wait_procs(self.processes(), timeout=15)[1]
        assert not left, f"left running: {[process.cmdline() for process in left]}"

    def resume(self) -> None:
        """Starts a stopped experiment again, on the same port; `nnictl resume` knows no url prefix."""
        self.url = f"http://127.0.0.1:{self.port}"
        directory = str(self.folder / "exp")
        self.nnictl("resume", self.id, "--port", str(self.port), "--experiment_dir", directory)

    def processes(self) -> list[psutil.Process]:
        """What runs with this experiment's home: manager, dispatcher, trials, TensorBoard."""
        mine = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("HOME") == self.env["HOME"]:
                    mine.append(process)
            except psutil.Error:
                continue
        return mine


def read_config(file: Path) -> dict[str, Any]:
    """An experiment of this repository as it can stand in any folder: its paths are absolute."""
    config = yaml.safe_load(file.read_text())
    for part, key in (
        (config, "trialCodeDirectory"),
        (config, "searchSpaceFile"),
        (config["tuner"], "codeDirectory"),
        (config.get("assessor", {}), "codeDirectory"),
    ):
        if key in part:
            part[key] = str((file.parent / part[key]).resolve())
    return config


@contextmanager
def experiment(
    config: dict[str, Any],
    folder: Path,
    loopback: bool = True,
    url_prefix: str = "",
    port: int | None = None,
) -> Iterator[Experiment]:
    """Runs config (trialCommand, searchSpace, ...) in folder; on leaving nothing of it is left."""
    defaults = {
        "trialConcurrency": 1,
        "trialCodeDirectory": str(folder),
        "experimentWorkingDirectory": str(folder / "exp"),
        "tuner": {"name": "Random"},
        "trainingService": {"platform": "local"},
    }
    (folder / "home").mkdir(parents=True, exist_ok=True)
    (folder / "config.yml").write_text(yaml.safe_dump({**defaults, **config}))
    running = Experiment(folder, port or free_port(), url_prefix, loopback)
    create = ["create", "--config", str(folder / "config.yml"), "--port", str(running.port)]
    try:
        output = running.nnictl(*create, *(["--url_prefix", url_prefix] if url_prefix else []))
        running.id = re.search(r"ID: +\S*?(\w{8})\b", output).group(1)
        yield running
        running.stop()
    finally:
        # By process and not by nnictl: also after a failed assertion or a start that went wrong.
        for process in running.processes():
            process.kill()
