"""One run in several processes, started by the real torchrun: on the CPU, connected by gloo."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from nni_tools import REPOSITORY, Experiment, experiment, free_port, read_config
from test_survival import TINY, differing

import data_vit
import main_vit
from check_vit.command import hides_signals
from utils_vit import load_checkpoint

TORCHRUN = [str(Path(sys.executable).parent / "torchrun")]
TWO = [*TORCHRUN, "--standalone", "--nproc-per-node", "2"]
MAIN = str(REPOSITORY / "main_vit.py")
# 33 training images in batches of 8: the last batch has one image, and the second rank none of it.
EXACT = [*TINY, "--dropout", "0", "--batch-size", "8", "--precision", "float32", "--epochs", "2"]
RunMain = Callable[..., Any]


@pytest.fixture
def images(tmp_path: Path, make_images: Callable[..., Path]) -> Path:
    """33 training images, 7 for validation: neither is a multiple of two ranks or of the batch."""
    make_images(tmp_path / "images/train", ["cat"], 17, seed=1, noise=100)
    make_images(tmp_path / "images/train", ["dog"], 16, seed=2, noise=100)
    make_images(tmp_path / "images/val", ["cat"], 4, seed=3, noise=100)
    make_images(tmp_path / "images/val", ["dog"], 3, seed=4, noise=100)
    return tmp_path / "images"


@pytest.fixture
def environment(home: Path) -> dict[str, str]:
    return {**os.environ, "HOME": str(home), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def data_options(images: Path) -> list[str]:
    options = list(EXACT)
    where = options.index("--val-split")
    del options[where : where + 2]  # there is a val/
    return ["--download-dir", str(images), *options]


def run_ranks(options: list[Any], env: dict[str, str], launcher: list[str] = TWO) -> str:
    """The output of a run that must succeed."""
    command = [*launcher, MAIN, *map(str, options)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def assert_close(one: Path, other: Path) -> None:
    """The same run but for rounding: weights, EMA, metrics; accuracies are the same number."""
    for name in ("checkpoint.pth.tar", "model_best.pth.tar"):
        a, b = load_checkpoint(one / name), load_checkpoint(other / name)
        for key in ("model", "ema", "outputs"):
            torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)
        assert [a[key] for key in ("step", "validated")] == [
            b[key] for key in ("step", "validated")
        ]
    lines = [(f / "metrics.jsonl").read_text().splitlines() for f in (one, other)]
    for a, b in zip(*(map(json.loads, part) for part in lines), strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"seconds", "images_per_second"}:
            exact = "accuracy" in key or key in ("epoch", "step", "lr", "val_auc")
            assert a[key] == b[key] if exact else a[key] == pytest.approx(b[key], rel=1e-5), key
    a, b = (json.loads((folder / "results.json").read_text()) for folder in (one, other))
    assert a["best_epoch"] == b["best_epoch"] and a["images"] == b["images"]


def test_two_ranks_give_what_one_process_gives(
    data_options: list[str], environment: dict[str, str], run_main: RunMain, tmp_path: Path
) -> None:
    """Also stopped in the middle of an epoch under two ranks and ended by one process."""
    whole, two = tmp_path / "whole", tmp_path / "two"
    assert run_main(*data_options, "--model-dir", whole).status == 0
    output = run_ranks([*data_options, "--model-dir", two, "--max-steps", 7], environment)
    assert output.count("device") == 1 and output.count("epoch   1/2") == 1  # one rank talks
    half = load_checkpoint(two / "checkpoint.pth.tar")
    assert half["step"] == 7 and half["outputs"]["sizes"].tolist() == [8, 8]
    assert run_main("--resume", two / "checkpoint.pth.tar", "--max-steps", 1000).status == 0
    assert_close(whole, two)


# Rank 1 as on another machine, with a folder of its own under the same name.
OTHER_MACHINE = """
import os, pathlib, sys
sys.path.insert(0, {repository!r})
import data_vit, main_vit
real = data_vit.open_data
if os.environ["RANK"] == "1":
    data_vit.open_data = lambda folder, **options: real(pathlib.Path({copy!r}), **options)
sys.exit(main_vit.main())
"""


@pytest.mark.slow
def test_ranks_with_other_images_are_refused(
    data_options: list[str], environment: dict[str, str], images: Path, tmp_path: Path
) -> None:
    """One that is in another class: as many, and metrics would be of one's logits and the other's targets."""
    copy, script = shutil.copytree(images, tmp_path / "copy"), tmp_path / "other_machine.py"
    script.write_text(OTHER_MACHINE.format(repository=str(REPOSITORY), copy=str(copy)))
    command = [*TWO, str(script), *data_options, "--model-dir", str(tmp_path / "run")]
    options = {"env": environment, "capture_output": True, "text": True, "timeout": 60}
    assert subprocess.run(command, **options).returncode == 0
    (copy / "val/cat/000.png").rename(copy / "val/dog/9.png")
    command[-1] += "2"
    done = subprocess.run(command, **options)
    lines = [line for line in done.stderr.splitlines() if line.startswith("main_vit.py:")]
    assert len(lines) == 1 and "rank 1 has other images" in lines[0], done.stderr
    assert done.returncode == 1 and not (tmp_path / "run2").exists()


OTHER_DEVICE = """
import os, sys
sys.path.insert(0, {repository!r})
import torch, main_vit, setup_vit
real = setup_vit.choose_device
if os.environ["RANK"] == "1":
    setup_vit.choose_device = lambda *args: real(*args) and torch.device("meta")
sys.exit(main_vit.main())
"""


@pytest.mark.slow
def test_ranks_on_other_devices_are_refused(
    data_options: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    """A GPU on one machine alone: what it sends by NCCL the other, which waits on gloo, never gets."""
    script = tmp_path / "other_machine.py"
    script.write_text(OTHER_DEVICE.format(repository=str(REPOSITORY)))
    command = [*TWO, str(script), *data_options, "--model-dir", str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    lines = [line for line in done.stderr.splitlines() if line.startswith("main_vit.py:")]
    assert len(lines) == 1 and "rank 1 computes on meta, rank 0 on cpu" in lines[0], done.stderr
    assert done.returncode == 1 and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_error_is_one_line_from_one_rank(environment: dict[str, str], tmp_path: Path) -> None:
    command = [*TWO, MAIN, "--download-dir", str(tmp_path / "nowhere")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    lines = [line for line in done.stderr.splitlines() if line.startswith("main_vit.py:")]
    assert len(lines) == 1 and "nowhere does not exist" in lines[0], done.stderr
    assert done.returncode == 1 and "exitcode  : 2" in done.stderr


def test_processes_that_cannot_connect_end_with_one_line(
    environment: dict[str, str], data_options: list[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ranks = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        done = subprocess.run(
            [sys.executable, MAIN, *data_options], capture_output=True, text=True, timeout=60,
            env=environment | ranks | place | {"TORCHELASTIC_RUN_ID": "x"},
        )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if not line.startswith("[")]  # torch's own
    assert done.returncode == 1 and len(lines) == 1, done.stderr
    assert lines[0].startswith("main_vit.py: another process of this run ended or does not answer")


@pytest.mark.slow
def test_an_image_lost_in_training_is_named_by_the_rank_that_read_it(
    environment: dict[str, str], image_folder: Path, tmp_path: Path
) -> None:
    """The other rank, which waits for its gradient, ends with it."""
    options = "--image-size 8 --patch-size 4 --vt-dim 8 --vt-depth 1 --batch-size 2 --cache off"
    folders = ["--download-dir", str(image_folder), "--model-dir", str(tmp_path / "run")]
    command = [*TWO, MAIN, *options.split(), *folders, "--epochs", "10000"]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipe) as process:
        lost = image_folder / "train/cat/000.png"
        for line in process.stdout:
            if line.startswith("epoch   1/"):
                lost.write_bytes(b"no image")
                break
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.terminate()
    said = [line for line in errors.splitlines() if line.startswith("main_vit.py:")]
    assert process.returncode == 1
    assert f"main_vit.py: error: {lost} has changed since the folder was listed" in said[0], errors


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_parts_make_the_batch(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank gets its share of every batch, and nothing twice."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    pixels = np.arange(11, dtype=np.uint8).reshape(11, 1, 1, 1)
    split = data_vit.Split(pixels, np.arange(11), np.arange(11))
    seen: list[int] = []
    for rank in range(ranks):
        monkeypatch.setenv("RANK", str(rank))
        parts = data_vit.batches(split, 4, torch.device("cpu"), rank=rank, ranks=ranks)
        for (_, targets, _), size, first in zip(parts, (4, 4, 3), (0, 4, 8), strict=True):
            expected = np.arange(first, first + size)[data_vit.share_of(size, rank, ranks)]
            assert targets.tolist() == expected.tolist()
            seen += targets.tolist()
    assert sorted(seen) == list(range(11))


def test_torchrun_lets_signals_through() -> None:
    for command in ("torchrun --standalone main_vit.py", "torchrun -m main_vit --gpu 0"):
        assert hides_signals(command) is None
    assert hides_signals("torchrun -m main_vit; echo done") == "; echo done"


# --- resumed, stopped, killed ------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_resume_two_ranks_to_the_bit(
    data_options: list[str], environment: dict[str, str], read_lines: Any, tmp_path: Path
) -> None:
    """With dropout, in the middle of an epoch."""
    options = [*data_options, "--dropout", "0.1"]
    run_ranks([*options, "--model-dir", tmp_path / "whole"], environment)
    run_ranks([*options, "--model-dir", tmp_path / "part", "--max-steps", 7], environment)
    checkpoint = tmp_path / "part/checkpoint.pth.tar"
    run_ranks(["--resume", checkpoint, "--max-steps", 1000], environment)
    assert differing(tmp_path / "whole", tmp_path / "part", read_lines) == []


@pytest.mark.slow
def test_one_process_resumed_by_two_ranks(
    data_options: list[str], environment: dict[str, str], run_main: RunMain, tmp_path: Path
) -> None:
    assert run_main(*data_options, "--model-dir", tmp_path / "whole").status == 0
    part = tmp_path / "part"
    assert run_main(*data_options, "--model-dir", part, "--max-steps", 7).status == 0
    run_ranks(["--resume", part / "checkpoint.pth.tar", "--max-steps", 1000], environment)
    assert_close(tmp_path / "whole", part)


@pytest.mark.slow
def test_two_machines(
    data_options: list[str], environment: dict[str, str], run_main: RunMain, tmp_path: Path
) -> None:
    """Two torchrun processes that find each other at an address, as on two machines."""
    assert run_main(*data_options, "--model-dir", tmp_path / "whole").status == 0
    place = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    launcher = [*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "test", *place]
    launcher += ["--local-addr", "127.0.0.1"]
    command = [*launcher, MAIN, *data_options, "--model-dir", str(tmp_path / "two")]
    with subprocess.Popen(command, env=environment) as other:
        try:
            run_ranks([*data_options, "--model-dir", tmp_path / "two"], environment, launcher)
            assert other.wait(timeout=60) == 0
        finally:
            other.kill()
    assert_close(tmp_path / "whole", tmp_path / "two")


@contextmanager
def long_run(
    options: list[str], env: dict[str, str], output: Path, *torchrun: str
) -> Iterator[tuple[subprocess.Popen, list[psutil.Process]]]:
    """torchrun and its two ranks, some epochs into a run that would take hours."""
    command = [*TWO, *torchrun, MAIN, *options, "--epochs", "100000", "--model-dir", str(output)]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        ranks: list[psutil.Process] = []
        try:
            deadline = time.monotonic() + 60
            while not (output / "previous.pth.tar").exists():
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.1)
            ranks = [p for p in psutil.Process(process.pid).children() if MAIN in p.cmdline()]
            assert len(ranks) == 2
            yield process, ranks
        finally:
            for one in (process, *ranks):
                with suppress(psutil.NoSuchProcess):
                    one.kill()


@pytest.mark.long
@pytest.mark.parametrize("target", ["torchrun", "rank 0", "rank 1"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_all_ranks_end_together(
    target: str,
    signum: signal.Signals,
    data_options: list[str],
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    """Whoever gets the signal. A checkpoint of the step, unless it was a rank that was killed."""
    output = tmp_path / "run"
    with long_run(data_options, environment, output) as (process, ranks):
        hit = process if target == "torchrun" else ranks[int(target[-1])]
        hit.send_signal(signum)
        errors = process.stderr.read()  # ends when all of them have ended
        assert process.wait(timeout=10) != 0
        # They are orphans where torchrun was killed, and whoever adopts them may bury them late.
        left = psutil.wait_procs(ranks, timeout=1)[1]
        assert not [rank for rank in left if rank.status() != psutil.STATUS_ZOMBIE]
    state = load_checkpoint(output / "checkpoint.pth.tar")
    assert not list(output.glob(".*.tmp"))
    if signum == signal.SIGKILL and target != "torchrun":
        assert "SIGKILL" in errors
        assert target == "rank 0" or "another process of this run ended" in errors
        assert state["step"] == state["validated"]
    else:
        done = state["step"] - state["validated"]
        outputs = state["outputs"]
        assert (len(outputs["sizes"]) == done) if outputs else done in (0, 5)


@pytest.mark.slow
def test_ranks_whose_torchrun_was_killed_before_they_could_know_it(
    data_options: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    """While they import torch."""
    command = [*TWO, MAIN, *data_options, "--model-dir", str(tmp_path / "run")]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while len(ranks := psutil.Process(process.pid).children()) < 2:
            assert time.monotonic() < deadline
        process.kill()
        errors = process.stderr.read()  # ends when all of them have ended
        left = psutil.wait_procs(ranks, timeout=1)[1]
        assert not [rank for rank in left if rank.status() != psutil.STATUS_ZOMBIE]
    assert errors.startswith("main_vit.py: torchrun ended"), errors
    assert not (tmp_path / "run").exists()


def tell_status(running: Experiment) -> list[str]:
    return [trial["status"] for trial in running.trials() if trial["status"] != "RUNNING"]


@pytest.mark.slow
@pytest.mark.parametrize("handled", ["by torchrun", "by Python"])
def test_nni_ends_all_ranks(
    handled: str, data_options: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    """`nnictl trial kill` and `nnictl stop`: a checkpoint, the best so far told, no process left."""
    launcher = [*TWO]
    if handled == "by Python":
        launcher += ["--signals-to-handle", "SIGTERM,SIGHUP,SIGQUIT"]
    options = [*data_options, "--epochs", "100000", "--request-from-nni"]
    config = {
        "trialCommand": " ".join([*launcher, MAIN, *options]),
        "searchSpace": {"lr": {"_type": "loguniform", "_value": [1e-4, 1e-3]}},
        "maxTrialNumber": 2,
    }
    with experiment(config, tmp_path / "nni") as running:

        def training(count: int) -> list[str]:
            ids = [trial["trialJobId"] for trial in running.trials()]
            files = [running.output(name) / "previous.pth.tar" for name in ids]
            return ids if len(ids) == count and all(file.exists() for file in files) else []

        [first] = running.until(lambda: training(1))[:1]
        started = [p for p in running.processes() if MAIN in p.cmdline()]
        assert len(started) == 3  # torchrun and its ranks
        running.nnictl("trial", "kill", running.id, "--trial_id", first)
        assert not psutil.wait_procs(started, timeout=10)[1]
        [status] = running.until(lambda: tell_status(running))
        # On a busy machine torchrun takes longer than the 5 s after which NNI kills it, and says so.
        also = {"by torchrun": "FAILED", "by Python": "USER_CANCELED"}[handled]
        assert status in ("USER_CANCELED", also)
        assert len(running.finals(first)) == 1
        [_, second] = running.until(lambda: training(2))
        running.stop()  # and nothing of the experiment is left
        for name in (first, second):
            state = load_checkpoint(running.output(name) / "checkpoint.pth.tar")
            log = (running.output(name) / "trial.log").read_text()
            assert f"stopped at step {state['step']};" in log
        running.resume()  # for the end of `experiment`, which stops it


@pytest.mark.slow
def test_ranks_do_not_outlive_the_manager(data_options: list[str], tmp_path: Path) -> None:
    """Killed for want of memory, say: `nnictl resume` would start the trial again, in the same folder."""
    options = [*data_options, "--epochs", "100000", "--request-from-nni"]
    config = {
        "trialCommand": " ".join([*TWO, MAIN, *options]),
        "searchSpace": {"lr": {"_type": "loguniform", "_value": [1e-4, 1e-3]}},
        "maxTrialNumber": 1,
    }
    with experiment(config, tmp_path / "nni") as running:
        running.until(lambda: list((tmp_path / "nni").glob("**/previous.pth.tar")))
        ranks = [p for p in running.processes() if MAIN in p.cmdline()]
        for process in running.processes():
            if process.name() == "node":
                process.kill()
        assert len(ranks) == 3 and not psutil.wait_procs(ranks, timeout=10)[1]
        assert not psutil.wait_procs(running.processes(), timeout=30)[1]
        running.resume()


@pytest.mark.slow
def test_the_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """examples/distributed: `--check` takes it; two trials succeed and report what they wrote."""
    file = REPOSITORY / "examples/distributed/config.yml"
    assert main_vit.main(["--check", str(file)]) == 0
    assert "warning" not in capsys.readouterr().out
    config = read_config(file) | {"maxTrialNumber": 2}
    config["trialCommand"] = re.sub(r"--epochs \d+", "--epochs 1", config["trialCommand"])
    with experiment(config, tmp_path / "nni") as running:
        running.wait("DONE", 180)
        for trial in running.trials():
            assert trial["status"] == "SUCCEEDED"
            [final] = running.finals(trial["trialJobId"])
            results = json.loads((running.output(trial["trialJobId"]) / "results.json").read_text())
            assert final["default"] == results["validation"]["accuracy"]
        assert not [p for p in running.processes() if "main_vit.py" in p.cmdline()]
