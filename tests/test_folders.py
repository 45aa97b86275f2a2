"""The folders of a run: in use by another, read-only, limited, gone; each is one line and loses nothing."""

import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import main_vit
import nni_vit
import output_vit
import setup_vit
from config_vit import UsageError, resolve
from output_vit import hold_folder
from utils_vit import load_checkpoint

TINY = (
    "--image-size 8 --patch-size 4 --vt-dim 16 --vt-depth 1 --vt-heads 2 --mlp-dim 16 "
    "--threads 1 --precision float32 --batch-size 4"
)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
RunMain = Callable[..., Any]


def until_epoch(process: subprocess.Popen, epoch: int) -> None:
    """Waits for the log's line of an epoch."""
    assert any(line.startswith(f"epoch {epoch:>3}/") for line in process.stdout), process.stderr


def failure(process: subprocess.Popen) -> str:
    """The one line on stderr of a run that failed and lost nothing."""
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and stderr.count("\n") == 1, stderr
    assert "what was saved before is whole: --resume its checkpoint.pth.tar once" in stderr
    return stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_log_that_nobody_takes_ends_no_run(
    image_folder: Path, tmp_path: Path, home: Path
) -> None:
    """Its disk is full, or it went into a pipe that was closed: `| head -1`."""
    command = [sys.executable, main_vit.__file__, *TINY.split(), "--epochs", "1"]
    command += ["--download-dir", image_folder, "--model-dir", tmp_path / "run"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, env={**os.environ, "HOME": str(home)}, stdout=full, stderr=subprocess.PIPE
        )
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "run" / "results.json").exists()


@pytest.mark.slow
def test_a_run_without_stdout_and_stderr(image_folder: Path, tmp_path: Path, home: Path) -> None:
    """As a daemon has them: closed. Python gives None for such a stream."""
    argv = [*TINY.split(), "--epochs", "1", "--download-dir", image_folder]
    command = [sys.executable, main_vit.__file__, *argv, "--model-dir", tmp_path / "run"]
    closed = ["bash", "-c", '"$@" >&- 2>&-', "bash", *command]
    assert subprocess.run(closed, env={**os.environ, "HOME": str(home)}).returncode == 0
    assert (tmp_path / "run" / "results.json").exists()


# --- two processes ------------------------------------------------------------------------------------


def test_two_processes_on_one_folder(
    image_folder: Path, start_main: Callable[..., Any], run_main: RunMain, tmp_path: Path
) -> None:
    """The second is told so, whichever way it came; what a killed one held is free at once."""
    output = tmp_path / "run"
    argv = [
        "--download-dir",
        image_folder,
        *TINY.split(),
        "--epochs",
        100_000,
        "--model-dir",
        output,
    ]
    with start_main(*argv) as process:
        until_epoch(process, 2)
        for second in (argv, [*argv, "--auto-resume"], ["--resume", output / "checkpoint.pth.tar"]):
            result = run_main(*second)
            assert result.status == 2 and result.stderr.count("\n") == 1
            assert f"another process is still at work in {output}" in result.stderr
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (output / ".lock").exists()
    step = load_checkpoint(output / "checkpoint.pth.tar")["step"]
    assert run_main(*argv, "--auto-resume", "--max-steps", step + 20).status == 0
    assert load_checkpoint(output / "checkpoint.pth.tar")["step"] == step + 20
    assert not (output / ".lock").exists()


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


def test_a_trial_waits_for_its_predecessor(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, tmp_path / ".lock", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError), hold_folder(tmp_path, 0):
            pass
        began = time.monotonic()
        with hold_folder(tmp_path, 30):
            assert 0.2 < time.monotonic() - began < 15
            assert process.wait(timeout=5) == 0


def test_a_lock_that_was_removed_is_no_lock(tmp_path: Path) -> None:
    """Who opened the file before it was removed must take the new one, or a third would come in too."""
    entered = threading.Event()

    def wait() -> None:
        with hold_folder(tmp_path, 30), open(tmp_path / ".lock") as third:
            with pytest.raises(BlockingIOError):
                fcntl.flock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)
            entered.set()

    for _ in range(5):
        entered.clear()
        waiting = threading.Thread(target=wait)
        with hold_folder(tmp_path, 0):
            waiting.start()
            time.sleep(0.15)
        waiting.join()
        assert entered.is_set()


def test_a_run_that_does_not_start_leaves_no_folder(run_main: RunMain, tmp_path: Path) -> None:
    result = run_main("--download-dir", tmp_path / "none", "--model-dir", tmp_path / "a")
    assert result.status == 2 and not (tmp_path / "a").exists()


# --- folders that change under a run ------------------------------------------------------------------


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """mount(options ..., folder) until the end of the test."""
    mounted = []

    def call(*words: Any) -> None:
        done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mount is not permitted: {done.stderr}")
        if "remount" not in words[1]:
            mounted.append(words[-1])

    yield call
    for folder in reversed(mounted):
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.slow
@as_root
def test_a_folder_that_becomes_read_only(
    image_folder: Path, start_main: Callable[..., Any], run_main: RunMain, tmp_path: Path,
    mount: Callable[..., None],
) -> None:  # fmt: skip
    """As a file system does after an error of its disk; then as it is from the start."""
    output = tmp_path / "run"
    argv = [
        "--download-dir",
        image_folder,
        *TINY.split(),
        "--epochs",
        100_000,
        "--model-dir",
        output,
    ]
    with start_main(*argv) as process:
        until_epoch(process, 2)
        mount("-o", "bind", output, output)
        mount("-o", "remount,bind,ro", output)
        assert f"Read-only file system: '{output}" in failure(process)
    assert load_checkpoint(output / "checkpoint.pth.tar")["step"] > 0
    for more in (["--auto-resume"], ["--model-dir", output / "new"]):
        result = run_main(*argv, *more)
        assert result.status == 2 and result.stderr.count("\n") == 1
        assert "cannot be written: Read-only file system; give --model-dir" in result.stderr


@pytest.mark.slow
def test_a_folder_that_vanishes(
    image_folder: Path, start_main: Callable[..., Any], run_main: RunMain, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    argv = [
        "--download-dir",
        image_folder,
        *TINY.split(),
        "--epochs",
        100_000,
        "--model-dir",
        output,
    ]
    with start_main(*argv) as process:
        until_epoch(process, 2)
        output.rename(tmp_path / "away")
        assert f"No such file or directory: '{output}" in failure(process)
    assert not output.exists()
    (tmp_path / "away").rename(output)
    step = load_checkpoint(output / "checkpoint.pth.tar")["step"]
    assert run_main(*argv, "--auto-resume", "--max-steps", step + 1).status == 0


@pytest.mark.slow
def test_the_data_folder_vanishes_in_mid_run(
    image_folder: Path, start_main: Callable[..., Any], run_main: RunMain, tmp_path: Path, read_lines
) -> None:  # fmt: skip
    """All images, those of test/ too, are decoded and mapped by then: the run ends as it would have."""
    argv = ["--download-dir", image_folder, *TINY.split(), "--epochs", 40, "--model-dir"]
    assert run_main(*argv, tmp_path / "whole").status == 0
    with start_main(*argv, tmp_path / "run") as process:
        until_epoch(process, 1)
        shutil.rmtree(image_folder)
        _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, "")
    assert read_lines(tmp_path / "run") == read_lines(tmp_path / "whole")
    results = [(tmp_path / name / "results.json").read_text() for name in ("run", "whole")]
    assert results[0] == results[1] and '"test": {' in results[0]


def test_a_limit_on_the_size_of_files(
    image_folder: Path, run_main: RunMain, tmp_path: Path
) -> None:
    """`ulimit -f`: the kernel's signal for it would kill the process, were it not Python."""
    output = tmp_path / "run"
    argv = [
        "--download-dir",
        image_folder,
        *TINY.split(),
        "--epochs",
        4,
        "--auto-resume",
        "--model-dir",
    ]
    assert run_main(*argv, output, "--max-steps", 12).status == 0
    size = (output / "checkpoint.pth.tar").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
    try:
        result = run_main(*argv, output)
        fresh = run_main(*argv, tmp_path / "new", "--cache-dir", tmp_path / "cache", "-s", 64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert result.status == 1 and result.stderr.count("\n") == 1, result.stderr
    assert (
        "File too large: " in result.stderr and "; what was saved before is whole" in result.stderr
    )
    assert fresh.status == 2 and "cannot be kept in" in fresh.stderr, fresh.stderr
    assert "File too large" in fresh.stderr and fresh.stderr.count("\n") == 1
    assert load_checkpoint(output / "checkpoint.pth.tar")["step"] == 12
    assert not list(output.glob(".*.tmp"))
    assert run_main(*argv, output).status == 0


# --- repeatable GPU runs ------------------------------------------------------------------------------


def test_deterministic_is_set_before_cuda_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        for options, on in (([], False), (["--deterministic"], True)):
            setup_vit.choose_device(
                resolve(main_vit.make_parser(), options), nni_vit.Trial(asked=False)
            )
            assert torch.are_deterministic_algorithms_enabled() == on
            assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if on else None)
            assert not torch.cuda.is_initialized()
    finally:
        torch.use_deterministic_algorithms(False)


def test_attention_that_is_left_out_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's always; fused kernels repeat only when nothing may merely warn. Here there is no GPU."""
    monkeypatch.setattr(setup_vit, "usable_gpus", lambda: 1)
    kernels = torch.backends.cuda
    enabled = lambda: [  # noqa: E731
        kernels.flash_sdp_enabled(), kernels.mem_efficient_sdp_enabled(), kernels.cudnn_sdp_enabled(),
    ]  # fmt: skip
    before = enabled()
    try:
        for options, expected in (([], [*before[:2], False]), (["--deterministic"], [False] * 3)):
            with pytest.raises(UsageError, match="cannot compute on cuda:0: "):
                setup_vit.choose_device(
                    resolve(main_vit.make_parser(), options), nni_vit.Trial(asked=False)
                )
            assert enabled() == expected
    finally:
        torch.use_deterministic_algorithms(False)
        for name, on in zip(("flash", "mem_efficient", "cudnn"), before, strict=True):
            getattr(kernels, f"enable_{name}_sdp")(on)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (["-pn", "2", "--vt-dim", "32"], "float32"),  # the smallest of the search space
        (["-pn", "8", "--vt-dim", "64"], "bfloat16"),  # the largest
        (["-pn", "8", "--vt-dim", "64", "-b", "16"], "float32"),
    ],
)
def test_a_small_model_is_float32_on_a_cpu(
    sizes: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where bfloat16 gains nothing; the machine of the test may have none, and may have a GPU."""
    monkeypatch.setattr(setup_vit, "usable_gpus", lambda: 0)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    args = resolve(main_vit.make_parser(), ["-s", "16", "-b", "32", *sizes])
    setup_vit.choose_device(args, nni_vit.Trial(asked=False))
    assert args.precision == expected


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((6, 1), "float32"), ((7, 5), "float16"), ((8, 6), "bfloat16"), ((9, 0), "bfloat16")],
    ids=["Pascal", "Turing", "Ampere", "Hopper"],
)
def test_precision_on_a_gpu(
    capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the size of the model."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    args = resolve(main_vit.make_parser(), ["-s", "16", "-pn", "2", "--vt-dim", "32"])
    assert setup_vit.fastest_precision(torch.device("cuda"), args) == expected


def test_runs_that_start_in_one_second_have_folders_of_their_own(
    image_folder: Path, run_main: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the one before is at work or has ended."""
    monkeypatch.setattr(output_vit.time, "strftime", lambda _: "now")
    argv = ["--download-dir", image_folder, *TINY.split(), "--max-steps", 1]
    first = run_main(*argv)
    with hold_folder(first.cwd / "runs/now-0-2", 0):
        second = run_main(*argv, cwd=first.cwd)
        runs = {folder.name for folder in (first.cwd / "runs").iterdir()}
    assert (first.status, second.status) == (0, 0)
    assert runs == {"now-0", "now-0-2", "now-0-3"}


def test_trials_share_the_memory_of_their_gpu(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that start together see the same memory free; each takes up to a half of its part."""
    parts = []
    monkeypatch.setattr(setup_vit, "usable_gpus", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (600, 1000))
    monkeypatch.setattr(
        setup_vit.data_vit, "keep_on_device", lambda data, device, free: parts.append(free) or data
    )
    argv = ["--download-dir", str(image_folder), "-s", "8", "-p", "4"]
    args = resolve(main_vit.make_parser(), [*argv, "--cache-dir", str(tmp_path / "cache")])
    for concurrency in (1, 2, 3, 6):
        setup_vit.open_images(args, concurrency)
    setup_vit.open_images(args)
    assert parts == [600, 600, 300, 200, 600]
