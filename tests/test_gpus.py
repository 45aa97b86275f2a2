"""docs/gpus.md: what NNI 3.0 does with trialGpuNumber, by its own scheduler on machines of made-up GPUs."""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import nni_node
import pytest
import torch
from nni_tools import REPOSITORY

import main_vit

NODE = Path(nni_node.__file__).parent
# The code of NNI's manager from a trial that is submitted to its process, without server and database.
# NVML's answer is the only thing that is made up.
SUBMIT = """
require("app-module-path").addPath(process.cwd());
const globals = require("common/globals").default;
const scheduler = require("common/trial_keeper/task_scheduler/scheduler");
const [folder, gpus, trials, settings] = process.argv.slice(1).map((word) => JSON.parse(word));
globals.args = { logLevel: "critical", experimentId: "experiment" };
globals.paths = { experimentRoot: folder };
globals.rest = { getFullUrl: () => "http://localhost" };
const indices = [...Array(gpus).keys()];
scheduler.UnitTestHelpers.mockGpuInfo({
  gpuNumber: gpus, gpus: indices.map((index) => ({ index })), processes: [],
});
const { V3asV1 } = require("training_service/v3/compat");
const service = new V3asV1({
  platform: "local", maxTrialNumberPerGpu: 1, useActiveGpu: true,
  trialCommand: "echo ${CUDA_VISIBLE_DEVICES-inherited} >> " + folder + "/gpus; sleep 1",
  ...settings,
});
(async () => {
  service.v3.trialKeeper.envInfo = {};
  await service.v3.trialKeeper.scheduler.start();
  service.v3.trialKeeper.registerDirectory("trial_code", folder);
  service.environments = [{ id: "local-env" }];
  service.startDeferred.resolve();
  setInterval(() => console.log("alive"), 100).unref();
  for (let i = 0; i < trials; i++) {
    console.log(`submit ${i}`);
    await service.submitTrialJob({ sequenceId: i, hyperParameters: { value: "{}", index: 0 } });
  }
})();
"""
# GPUs of the machine, trials at a time, settings: CUDA_VISIBLE_DEVICES of each; None where NNI freezes.
ROWS: list[tuple[int, int, dict[str, Any], list[str] | None]] = [
    (4, 2, {}, ["inherited", "inherited"]),
    (4, 2, {"trialGpuNumber": 0}, ["", ""]),
    (2, 2, {"trialGpuNumber": 1}, ["0", "1"]),
    (4, 2, {"trialGpuNumber": 2}, ["0,1", "2,3"]),
    (2, 4, {"trialGpuNumber": 1, "maxTrialNumberPerGpu": 2}, ["0", "0", "1", "1"]),
    (1, 2, {"trialGpuNumber": 1, "maxTrialNumberPerGpu": 2}, ["0", "0"]),
    (1, 1, {"trialGpuNumber": 1}, None),
    (4, 1, {"trialGpuNumber": 4}, None),
    (2, 3, {"trialGpuNumber": 1}, None),
]


@pytest.mark.slow
def test_gpus_of_trials(tmp_path: Path) -> None:
    """Each row of the table; a frozen manager would not even notice that a trial has ended."""
    started = []
    env = {**os.environ}
    del env["CUDA_VISIBLE_DEVICES"]  # conftest.py set it: what a trial inherits is asked here
    for number, (gpus, trials, settings, _) in enumerate(ROWS):
        folder = tmp_path / str(number)
        folder.mkdir()
        words = [json.dumps(word) for word in (str(folder), gpus, trials, settings)]
        command = [str(NODE / "node"), "-e", SUBMIT, *words]
        out = open(folder / "out", "w")  # noqa: SIM115
        # Who freezes never sleeps: the kernel ends it, also if this test is gone by then.
        command = ["/bin/bash", "-c", 'ulimit -t 5; exec "$@"', "bash", *command]
        started.append(subprocess.Popen(command, cwd=NODE, env=env, stdout=out, stderr=out))
        out.close()
    for number, (process, row) in enumerate(zip(started, ROWS, strict=True)):
        folder, expected = tmp_path / str(number), row[-1]
        status = process.wait(timeout=60)
        out = (folder / "out").read_text().splitlines()
        if expected is None:
            # It used up its time and did nothing after this trial, not even every 0.1 s.
            assert status == -signal.SIGKILL and out[-1] == f"submit {row[1] - 1}", (row, out)
        else:
            seen = (folder / "gpus").read_text().splitlines()
            assert status == 0 and sorted(seen) == expected, (row, out)


@pytest.mark.parametrize(
    "file", [*(REPOSITORY / "examples/gpus").glob("*.yml")], ids=lambda f: f.stem
)
def test_examples_of_gpus(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--check` of each on a machine with 4 GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert main_vit.main(["--check", str(file)]) == 0
    assert "warning" not in capsys.readouterr().out
