"""What must not lose a run: kills, full disks, damaged and hostile checkpoints, too little GPU memory."""

import errno
import hashlib
import io
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import equal
from test_utils import EMPTY
from torch import nn

import files_vit
import machine_vit
import main_vit
import report_vit
import setup_vit
import step_vit
from config_vit import resolve
from stop_vit import RunFailed
from utils_vit import (
    CheckpointError,
    TrainingState,
    load_checkpoint,
    load_moments,
    save_checkpoint,
    sealed,
)

TINY = [
    "--image-size",
    "8",
    "--patch-size",
    "4",
    "--vt-dim",
    "16",
    "--vt-depth",
    "1",
    "--vt-heads",
    "2",
    "--mlp-dim",
    "32",
    "--batch-size",
    "2",
    "--lr",
    "3e-3",
    "--epochs",
    "3",
    "--threads",
    "1",
    "--dropout",
    "0.1",
    "--affine",
    "0.1",
    "--flip",
    "both",
    "--moving-average-decay",
    "0.9",
    "--val-split",
    "0.2",
]
RunMain = Callable[..., Any]


def differing(one: Path, other: Path, read_lines: Callable[[Path], Any]) -> list[str]:
    """What differs between the files that two runs left."""
    names = [] if read_lines(one) == read_lines(other) else ["metrics.jsonl"]
    for name in ("checkpoint.pth.tar", "model_best.pth.tar"):
        a, b = load_checkpoint(one / name), load_checkpoint(other / name)
        keys = ("model", "ema", "optimizer", "epoch", "step", "validated", "best", "outputs")
        names += [f"{name}: {key}" for key in keys if not equal(a[key], b[key])]
    results = [json.loads((folder / "results.json").read_text()) for folder in (one, other)]
    return names + (["results.json"] if results[0] != results[1] else [])


# --- checkpoints between epochs, and going on by itself ----------------------------------------------


def test_checkpoints_between_epochs_change_nothing(
    image_folder: Path, run_main: RunMain, read_lines, tmp_path: Path
) -> None:
    runs = {
        "plain": [],
        "steps": ["--checkpoint-steps", "3"],
        "time": ["--checkpoint-minutes", "1e-6"],
    }
    for name, options in runs.items():
        argv = ["--download-dir", image_folder, *TINY, *options, "--model-dir", tmp_path / name]
        assert run_main(*argv).status == 0
        previous = load_checkpoint(tmp_path / name / "previous.pth.tar")["step"]
        assert previous == {"plain": 32, "steps": 48, "time": 48}[name]  # 16 steps an epoch
        assert differing(tmp_path / "plain", tmp_path / name, read_lines) == []


def test_auto_resume(image_folder: Path, run_main: RunMain, read_lines, tmp_path: Path) -> None:
    """The same command goes on, refuses another configuration, and does nothing to a finished run."""
    folder = ["--download-dir", image_folder, *TINY, "--auto-resume", "--model-dir"]
    assert run_main(*folder, tmp_path / "whole").status == 0
    assert run_main(*folder, tmp_path / "part", "--max-steps", 20).status == 0
    result = run_main(*folder, tmp_path / "part", "--lr", 0.1, "--vt-dim", 32)
    assert result.status == 2
    assert "other parameters: dim_head 8 -> 16, lr 0.003 -> 0.1, vt_dim 16 -> 32" in result.stderr
    result = run_main(*folder, tmp_path / "part")
    assert result.status == 0 and "resumed after step 20" in result.stdout
    assert differing(tmp_path / "whole", tmp_path / "part", read_lines) == []
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "part").glob("*.*")}
    result = run_main(*folder, tmp_path / "part")
    assert result.status == 0 and "--epochs makes it longer" in result.stdout
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "part").glob("*.*")}
    assert before == after
    for said in ("epoch   4/4", "this run is finished"):  # as --resume would, and once more
        result = run_main(*folder, tmp_path / "whole", "--epochs", 4)
        assert result.status == 0 and said in result.stdout, result.stderr
    assert len(read_lines(tmp_path / "whole")) == 4


def test_auto_resume_of_a_warm_up_that_is_longer_now(
    image_folder: Path, run_main: RunMain, tmp_path: Path
) -> None:
    argv = ["--download-dir", image_folder, *TINY, "--auto-resume", "--model-dir", tmp_path / "run"]
    assert run_main(*argv, "--epochs", 100, "--max-steps", 3).status == 0
    result = run_main(*argv, "--epochs", 8)
    assert result.status == 2 and "a warm-up of 10 epochs: give --epochs at least" in result.stderr
    assert run_main(*argv, "--epochs", 100, "--max-steps", 48).status == 0
    result = run_main(*argv, "--epochs", 2)
    assert result.status == 0 and "this run is finished" in result.stdout


def test_auto_resume_of_what_an_older_program_began(
    image_folder: Path, run_main: RunMain, tmp_path: Path
) -> None:
    """It had not all of today's options; what they would have to be is their default."""
    argv = ["--download-dir", image_folder, *TINY, "--auto-resume", "--model-dir", tmp_path]
    assert run_main(*argv, "--max-steps", 20).status == 0
    for name in ("checkpoint.pth.tar", "model_best.pth.tar"):
        saved = load_checkpoint(tmp_path / name)
        for option in ("crop", "mixup", "erase", "cache", "deterministic"):
            del saved["args"][option]
        (tmp_path / name).unlink()
        save_checkpoint(saved, False, tmp_path / name)
    result = run_main(*argv, "--crop", 0.5)
    assert result.status == 2 and "other parameters: crop 1.0 -> 0.5\n" in result.stderr
    assert run_main(*argv).status == 0


@pytest.mark.parametrize(
    ("options", "selected"),
    [("--lr=3e-3", 2), ("--lr=1e-30 --optimizer=sgd", 1)],
    ids=["falls", "stays"],
)
def test_an_epoch_cut_short_is_not_selected_when_the_run_goes_on(
    options: str, selected: int, image_folder: Path, run_main: RunMain, read_lines, tmp_path: Path
) -> None:
    """Whether the loss falls, and half an epoch is better than what there is, or what comes is no better."""
    argv = ["--download-dir", image_folder, *TINY, *options.split(), "--metric", "loss"]
    argv += ["--model-dir"]
    assert run_main(*argv, tmp_path / "whole").status == 0
    for steps, best in ((8, 1), (40, selected)):  # within the first epoch of 16, within the third
        assert run_main(*argv, tmp_path / "cut", "--auto-resume", "--max-steps", steps).status == 0
        results = json.loads((tmp_path / "cut" / "results.json").read_text())
        assert results["best_epoch"] == best
    last = tmp_path / "cut" / "checkpoint.pth.tar"
    assert run_main("--resume", last, "--max-steps", 99).status == 0
    assert differing(tmp_path / "whole", tmp_path / "cut", read_lines) == []


def test_a_best_of_another_moment_is_refused(
    image_folder: Path, run_main: RunMain, tmp_path: Path
) -> None:
    """As a copy of a folder in which a run is at work can have it."""
    argv = ["--download-dir", image_folder, *TINY, "--metric", "loss", "--model-dir", tmp_path]
    last, best = (tmp_path / name for name in ("checkpoint.pth.tar", "model_best.pth.tar"))
    assert run_main(*argv, "--max-steps", 16).status == 0
    content = best.read_bytes()
    assert run_main("--resume", last, "--max-steps", 32).status == 0
    best.write_bytes(content)
    result = run_main("--resume", last, "--max-steps", 48)
    assert result.status == 2 and "is not of epoch 2, the best that " in result.stderr
    best.unlink()
    result = run_main("--resume", last, "--max-steps", 48)
    assert result.status == 2 and "--init-from starts a new run" in result.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "val/cat/000.png").unlink(), "8 validation images, here are 7"),
        (lambda f: (f / "train/cat/000.png").unlink(), "40 training images, here are 39"),
        # As many in all, but one in another class, or another one.
        (lambda f: (f / "val/cat/000.png").rename(f / "val/dog/9.png"), "not of the same names"),
        (
            lambda f: (f / "train/cat/000.png").rename(f / "train/cat/9.png"),
            "not of the same names",
        ),
    ],
)
def test_other_images_are_refused(
    change: Callable[[Path], Any],
    message: str,
    image_folder: Path,
    run_main: RunMain,
    tmp_path: Path,
    make_images: Callable[..., Path],
) -> None:
    """A folder that has moved is the same one."""
    make_images(image_folder / "val", ["cat", "dog"], 4)
    argv = [a for a in TINY if a not in ("--val-split", "0.2")]
    checkpoint = tmp_path / "run" / "checkpoint.pth.tar"
    argv = ["--download-dir", image_folder, *argv, "--model-dir", tmp_path / "run"]
    assert run_main(*argv, "--max-steps", 9).status == 0
    moved = image_folder.rename(tmp_path / "moved")
    again = ["--resume", checkpoint, "--download-dir", moved, "--max-steps"]
    assert run_main(*again, 12).status == 0
    change(moved)
    result = run_main(*again, 99)
    assert result.status == 2 and result.stderr.count("\n") == 1
    assert f"checkpoint {checkpoint} is of " in result.stderr and message in result.stderr


def test_images_that_are_held_out_are_never_those_trained_on(
    image_folder: Path, run_main: RunMain, tmp_path: Path
) -> None:
    """A label put right draws both classes anew, though there are as many images as before."""
    argv = ["--download-dir", image_folder, *TINY, "--model-dir", tmp_path / "run"]
    assert run_main(*argv, "--max-steps", 9).status == 0
    (image_folder / "train/cat/005.png").rename(image_folder / "train/dog/m.png")
    result = run_main(*argv, "--auto-resume")
    assert result.status == 2 and "as many images, but not of the same names" in result.stderr


def test_the_files_at_the_end_come_before_results_json(
    image_folder: Path, run_main: RunMain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says that all is done; whoever is killed while the pictures are drawn draws them again."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    argv = ["--download-dir", image_folder, *TINY, "--auto-resume", "--model-dir", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr(report_vit, "draw_confusion_matrix", full)
        result = run_main(*argv)
    assert result.status == 1 and result.stderr.startswith("main_vit.py: [Errno 28] No space left")
    assert not (tmp_path / "results.json").exists()
    assert run_main(*argv).status == 0
    assert {"results.json", "metrics.png", "confusion_matrix.png"} <= {
        f.name for f in tmp_path.iterdir()
    }


def test_files_of_others_in_the_folder_stay(
    image_folder: Path, run_main: RunMain, tmp_path: Path
) -> None:
    argv = [
        "--download-dir",
        image_folder,
        *TINY,
        "--max-steps",
        3,
        "--model-dir",
        tmp_path / "run",
    ]
    (tmp_path / "run").mkdir()
    notes, results = tmp_path / "run" / ".notes.tmp", tmp_path / "run" / "results.json"
    notes.write_text("mine")
    assert run_main(*argv).status == 0
    assert notes.read_text() == "mine"
    for file in (tmp_path / "run").glob("*.pth.tar"):
        file.unlink()  # for want of space
    before = results.read_text()
    result = run_main(*argv)
    assert result.status == 2 and "holds the results of a run without" in result.stderr
    assert results.read_text() == before


def test_auto_resume_keeps_the_precision_of_another_machine(
    image_folder: Path, run_main: RunMain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [a for a in TINY if a not in ("--precision", "float32")]
    argv = ["--download-dir", image_folder, *argv, "--auto-resume", "--model-dir", tmp_path / "run"]
    for steps, precision in ((16, "float32"), (20, "bfloat16")):
        monkeypatch.setattr(setup_vit, "fastest_precision", lambda *_, answer=precision: answer)
        result = run_main(*argv, "--max-steps", steps)
        assert result.status == 0, result.stderr
        assert ", float32" in result.stdout


def test_auto_resume_keeps_the_number_of_threads(
    image_folder: Path, run_main: RunMain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another number of cores, or of trials beside it, the last bits would be others."""
    where = TINY.index("--threads")
    argv = ["--download-dir", image_folder, *TINY[:where], *TINY[where + 2 :]]
    argv += ["--auto-resume", "--model-dir", tmp_path / "run"]
    for steps, cores in ((3, 1), (6, 2)):
        monkeypatch.setattr(machine_vit, "default_threads", lambda *_, cores=cores: cores)
        result = run_main(*argv, "--max-steps", steps)
        assert result.status == 0, result.stderr
        assert "CPU threads 1," in result.stdout


@pytest.mark.parametrize("kept", [("previous", "model_best"), ("model_best",)])
def test_a_folder_whose_last_checkpoint_was_removed_still_holds_a_run(
    kept: tuple[str, ...], image_folder: Path, run_main: RunMain, tmp_path: Path
) -> None:
    """Another run there would take over the best of the first, or go on with the first."""
    argv = ["--download-dir", image_folder, *TINY, "--model-dir", tmp_path, "--epochs", "2"]
    assert run_main(*argv).status == 0
    for name in {"checkpoint", "previous"}.difference(kept):
        (tmp_path / f"{name}.pth.tar").unlink()
    result = run_main(*argv, "--lr", "0.1")
    assert result.status == 2 and "holds a run already" in result.stderr
    result = run_main(*argv, "--auto-resume")
    assert result.status == 0, result.stderr
    assert "going on from" in result.stdout and "resumed after step" in result.stdout
    assert load_checkpoint(tmp_path / "checkpoint.pth.tar")["step"] == 32


@pytest.mark.slow
def test_damaged_results_and_lines_do_not_end_a_run(
    image_folder: Path, run_main: RunMain, read_lines, tmp_path: Path
) -> None:
    argv = ["--download-dir", image_folder, *TINY, "--model-dir"]
    for name in ("whole", "edited"):
        assert run_main(*argv, tmp_path / name, "--epochs", "2").status == 0
    (tmp_path / "edited/results.json").write_bytes(b"\xff{")
    with (tmp_path / "edited/metrics.jsonl").open("ab") as file:
        file.write(b"{'epoch': 3}\n\xff}\n[3]\n")
    for name in ("whole", "edited"):
        result = run_main("--resume", tmp_path / name / "checkpoint.pth.tar", "--epochs", "3")
        assert result.status == 0, result.stderr
    assert differing(tmp_path / "whole", tmp_path / "edited", read_lines) == []


def test_tensorboard_keeps_a_curve_that_begins_later(tmp_path: Path) -> None:
    """One of PBT, killed after its last epoch: what a resume hides begins behind that."""
    names = (
        "train_loss",
        "train_accuracy",
        "val_loss",
        "val_accuracy",
        "val_balanced_accuracy",
        "val_auc",
    )
    recorder = report_vit.Recorder(tmp_path, 0)
    for epoch in (7, 8, 9):
        recorder.epoch({"epoch": epoch, "step": epoch, **dict.fromkeys(names, 0.5)})
    recorder.tensorboard.close()
    results = {"best_epoch": 8, "validation_confusion_matrix": [[1, 0], [0, 1]], "test": None}
    report_vit.Recorder(tmp_path, 9).close(results | {"classes": ["cat", "dog"]})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("val/loss")] == [7, 8, 9]


@pytest.mark.parametrize(
    ("first", "second", "line"),
    [
        (["--gamma", "0.9"], ["--epochs", "4"], "other parameters: gamma 0.9 -> None"),
        (["--max-steps", "3"], ["--max-steps", "3"], "--max-steps makes it longer"),
        (["--stop-epoch", "1"], ["--stop-epoch", "1"], "--stop-epoch makes it longer"),
    ],
)
def test_auto_resume_says_what_to_change(
    first: list[str], second: list[str], line: str, image_folder: Path, run_main: RunMain,
    tmp_path: Path,
) -> None:  # fmt: skip
    argv = ["--download-dir", image_folder, *TINY, "--auto-resume", "--model-dir", tmp_path / "run"]
    assert run_main(*argv, *first).status == 0
    result = run_main(*argv, *second)
    assert line in result.stdout + result.stderr
    assert result.status == (2 if "other" in line else 0) and result.stderr.count("\n") <= 1


def test_the_checkpoint_gone_on_from_is_kept(
    image_folder: Path, run_main: RunMain, tmp_path: Path
) -> None:
    """The first save after a fall back keeps it as the one before, not the damaged one."""
    argv = ["--download-dir", image_folder, *TINY, "--model-dir", tmp_path, "--epochs", "2"]
    assert run_main(*argv).status == 0
    last = tmp_path / "checkpoint.pth.tar"
    last.write_bytes(last.read_bytes()[:-1])
    (tmp_path / "model_best.pth.tar").write_bytes((tmp_path / "previous.pth.tar").read_bytes())
    result = run_main("--resume", last)
    assert result.status == 0 and "going on from" in result.stdout, result.stderr
    assert load_checkpoint(last)["step"] == 32
    assert load_checkpoint(tmp_path / "previous.pth.tar")["step"] == 16


def test_a_damaged_best_is_noticed_at_the_start(
    image_folder: Path, run_main: RunMain, tmp_path: Path
) -> None:
    argv = ["--download-dir", image_folder, *TINY, "--model-dir", tmp_path]
    assert run_main(*argv, "--max-steps", 20).status == 0
    (tmp_path / "model_best.pth.tar").write_bytes(b"damaged")
    result = run_main("--resume", tmp_path / "checkpoint.pth.tar")
    assert result.status == 2 and "model_best.pth.tar is damaged" in result.stderr


def test_a_run_goes_on_without_the_gpu_it_was_given(
    image_folder: Path, run_main: RunMain, tmp_path: Path
) -> None:
    argv = ["--download-dir", image_folder, *TINY, "--model-dir", tmp_path]
    assert run_main(*argv, "--max-steps", 20).status == 0
    last = tmp_path / "checkpoint.pth.tar"
    state = load_checkpoint(last)
    state["args"]["gpu"] = 7  # as checkpoints once had
    save_checkpoint(state, False, last)
    assert run_main("--resume", last, "--max-steps", 22).status == 0


@pytest.mark.parametrize("metric", ["accuracy", "loss"])  # a loss that falls: the epoch is the best
def test_killed_between_the_line_of_an_epoch_and_its_checkpoint(
    metric: str, image_folder: Path, run_main: RunMain, read_lines, tmp_path: Path
) -> None:
    """The checkpoint before the last one is of that moment: all steps taken, nothing validated."""
    argv = ["--download-dir", image_folder, *TINY, "--checkpoint-steps", "1", "--metric", metric]
    argv += ["--model-dir"]
    for name in ("whole", "killed"):
        assert run_main(*argv, tmp_path / name).status == 0
    killed = tmp_path / "killed"
    (killed / "previous.pth.tar").rename(killed / "checkpoint.pth.tar")
    saved = load_checkpoint(killed / "checkpoint.pth.tar")
    assert (saved["step"], saved["validated"], len(read_lines(killed))) == (48, 32, 3)
    assert run_main("--resume", killed / "checkpoint.pth.tar").status == 0
    assert differing(tmp_path / "whole", killed, read_lines) == []


@pytest.mark.slow
@pytest.mark.parametrize("last", ["older", pytest.param("damaged", marks=pytest.mark.slow)])
def test_killed_between_the_best_and_its_checkpoint(
    last: str, image_folder: Path, run_main: RunMain, read_lines, tmp_path: Path
) -> None:
    """The run goes on with the best, so the saved model stays the one whose number is reported."""
    argv = ["--download-dir", image_folder, *TINY, "--metric", "loss", "--model-dir"]
    for name in ("whole", "killed"):  # a loss that falls: every epoch is the best
        assert run_main(*argv, tmp_path / name).status == 0
    killed = tmp_path / "killed"
    best = load_checkpoint(killed / "model_best.pth.tar")
    assert best["step"] == 48
    (killed / "results.json").unlink()
    if last == "older":
        (killed / "previous.pth.tar").rename(killed / "checkpoint.pth.tar")
    else:
        (killed / "checkpoint.pth.tar").write_bytes(b"x")
    # Rounded otherwise, the epoch need not come out as the best once more.
    result = run_main("--resume", killed / "checkpoint.pth.tar", "--threads", 1)
    assert result.status == 0, result.stderr
    assert f"going on from {killed / 'model_best.pth.tar'}" in result.stdout
    assert "epoch   3/3" not in result.stdout
    ends = [json.loads((tmp_path / n / "results.json").read_text()) for n in ("whole", "killed")]
    assert ends[0] == ends[1] and len(read_lines(killed)) == 3


# --- files that are wrong -----------------------------------------------------------------------------


@pytest.fixture
def run_folder(image_folder: Path, run_main: RunMain, tmp_path: Path) -> Path:
    argv = ["--download-dir", image_folder, *TINY, "--model-dir", tmp_path / "run"]
    assert run_main(*argv, "--max-steps", 20, "--checkpoint-steps", 5).status == 0
    return tmp_path / "run"


def test_a_resume_of_an_earlier_moment_would_lose_the_later_one(
    run_folder: Path, run_main: RunMain
) -> None:
    before = {file: file.read_bytes() for file in run_folder.iterdir() if file.is_file()}
    result = run_main("--resume", run_folder / "previous.pth.tar", "--max-steps", 30)
    assert result.status == 2 and result.stderr.count("\n") == 1
    assert f"earlier moment than {run_folder}/checkpoint.pth.tar, which" in result.stderr
    assert before == {file: file.read_bytes() for file in run_folder.iterdir() if file.is_file()}
    (run_folder / "checkpoint.pth.tar").unlink()
    assert run_main("--resume", run_folder / "previous.pth.tar", "--max-steps", 30).status == 0


def test_a_full_disk_is_no_traceback_of_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """TensorBoard's, which prints one before the next call raises the error for us."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    line = {"epoch": 1, "step": 3, "val_loss": 0.5}
    recorder = report_vit.Recorder(tmp_path, 0)
    recorder.epoch(line)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # put back in the end
    with monkeypatch.context() as patch:
        patch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
        with pytest.raises(OSError, match="No space") as raised, files_vit.full_disk_of(tmp_path):
            recorder.epoch(line)
    assert str(tmp_path) in str(raised.value) and capfd.readouterr().err == ""


def test_every_flipped_bit_is_noticed(run_folder: Path, tmp_path: Path) -> None:
    whole = (run_folder / "checkpoint.pth.tar").read_bytes()
    rng = random.Random(0)
    positions = [0, len(whole) - 1, len(whole) - 72, *rng.sample(range(len(whole)), 300)]
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.randrange(8)
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            load_checkpoint(tmp_path / "damaged")


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    image_folder: Path, run_folder: Path, run_main: RunMain, read_lines, tmp_path: Path
) -> None:
    checkpoint = run_folder / "checkpoint.pth.tar"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    result = run_main("--resume", checkpoint, "--max-steps", 1000)
    assert result.status == 0, result.stderr
    assert "is damaged" in result.stdout and "previous.pth.tar" in result.stdout
    argv = ["--download-dir", image_folder, *TINY, "--max-steps", 1000]
    assert run_main(*argv, "--model-dir", tmp_path / "whole").status == 0
    assert differing(tmp_path / "whole", run_folder, read_lines) == []


def test_the_best_is_what_is_left_when_both_others_are_damaged(
    run_folder: Path, run_main: RunMain
) -> None:
    for name in ("checkpoint.pth.tar", "previous.pth.tar"):
        (run_folder / name).write_bytes(b"damaged")
    result = run_main("--resume", run_folder / "checkpoint.pth.tar", "--max-steps", 30)
    assert (
        result.status == 0 and f"going on from {run_folder / 'model_best.pth.tar'}" in result.stdout
    )


def test_a_mistyped_checkpoint_is_no_damaged_one(run_folder: Path, run_main: RunMain) -> None:
    before = (run_folder / "checkpoint.pth.tar").read_bytes()
    for name in ("checkpoint.pth", "args.yaml"):
        result = run_main("--resume", run_folder / name, "--max-steps", 30)
        assert result.status == 2 and f"{name} " in result.stderr
    assert (run_folder / "checkpoint.pth.tar").read_bytes() == before


def test_checkpoints_alone_can_be_gone_on_with(
    run_folder: Path, run_main: RunMain, tmp_path: Path
) -> None:
    (tmp_path / "copy").mkdir()
    for name in ("checkpoint.pth.tar", "model_best.pth.tar"):
        (tmp_path / "copy" / name).write_bytes((run_folder / name).read_bytes())
    result = run_main("--resume", tmp_path / "copy" / "checkpoint.pth.tar")
    assert result.status == 0, result.stderr


class Malice:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch malice",)


def sealed_archive(state: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return bytes(sealed(buffer))


def bomb() -> bytes:
    """A sealed archive of 2 GB of zeros in 2 MB."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"format": 1}, protocol=2))
        with archive.open("archive/data/0", "w", force_zip64=True) as file:
            for _ in range(2000):
                file.write(bytes(1_000_000))
    return bytes(sealed(buffer))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: sealed_archive(EMPTY | {"model": Malice()}), "damaged or was not written"),
        (lambda: sealed_archive(EMPTY | {"model": nn.Linear(2, 2)}), "damaged or was not"),
        pytest.param(bomb, "damaged or was not written", marks=pytest.mark.slow),
        (
            lambda: sealed_archive(EMPTY | {"model": {"w": torch.zeros(1).expand(10**12)}}),
            "damaged or was not written",
        ),
        (
            lambda: sealed_archive(EMPTY | {"model": {"w": torch.tensor([1, float("nan")])}}),
            "weights that are not finite",
        ),
        (lambda: sealed_archive(EMPTY | {"model": [1]}), "damaged or was not written"),
    ],
    ids=["code", "module", "bomb", "huge shape", "nan", "not weights"],
)
def test_a_hostile_checkpoint_with_a_right_seal(
    content: Callable[[], bytes], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(content())
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "file")
    assert not (tmp_path / "malice").exists()


WRONG_CONTENT: dict[str, Callable[[dict[str, Any]], object]] = {
    "a smaller moment": lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
    "a moment of one number": lambda s: s["optimizer"]["state"][1].update(exp_avg_sq=torch.ones(1)),
    "a moment over nothing": lambda s: s["optimizer"]["state"][0].update(
        exp_avg=torch.zeros(1).expand_as(s["optimizer"]["state"][0]["exp_avg"])
    ),
    "a moment that is text": lambda s: s["optimizer"]["state"][0].update(exp_avg="x"),
    "a moment is missing": lambda s: s["optimizer"]["state"][0].pop("exp_avg"),
    "no optimizer": lambda s: s["optimizer"].clear(),
    "a rate that is text": lambda s: s["optimizer"]["param_groups"][0].update(lr="q"),
    "outputs of other names": lambda s: s.update(outputs={"losses": 1}),
    "outputs of other lengths": lambda s: s["outputs"].update(targets=torch.tensor([0])),
    "outputs of fractions": lambda s: s["outputs"].update(targets=s["outputs"]["targets"] + 0.5),
    "outputs beyond memory": lambda s: s["outputs"].update(targets=s["outputs"]["targets"] + 2**40),
    "losses in a table": lambda s: s["outputs"].update(losses=s["outputs"]["losses"][:, None]),
    "older outputs below 0": lambda s: s.update(
        outputs=[(torch.tensor(0.5), torch.zeros(2, 2), torch.tensor([-1, 0]))]
    ),
    "outputs below 0": lambda s: s["outputs"].update(targets=s["outputs"]["targets"] - 1),
    "outputs that are numbers": lambda s: s.update(outputs=[1, 2]),
    "a best without metrics": lambda s: s.update(best={"epoch": 1}),
    "a best with more": lambda s: s["best"].update(x=torch.zeros(2)),
    "a step beyond numbers": lambda s: s.update(step=2**70),
    "no images": lambda s: s.update(train_images=0),
    "no pieces": lambda s: s.update(pieces=0),
    "classes that are numbers": lambda s: s.update(classes=[1, 2]),
    "weights without names": lambda s: s["model"].update({3: torch.zeros(1)}),
    "a scale that is text": lambda s: s["scaler"].update(scale="x"),
    "blocks by another spelling": lambda s: s["args"].update({"vt-depth": 10**7}),
    "blocks by a nested choice": lambda s: s["args"].update(
        arch={"_name": "vit", "vt_depth": 10**7}
    ),
    "images that are text": lambda s: s.update(train_images="x"),
    "no fingerprints": lambda s: s.update(fingerprints={}),
    "fingerprints that are a number": lambda s: s.update(fingerprints=3),
    "pieces that are text": lambda s: s.update(pieces="x"),
    "ten million blocks": lambda s: s["args"].update(vt_depth=10**7),
}


@pytest.fixture(scope="module")
def whole_run(
    run_main: RunMain,
    make_images: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder of a run that ended in its second epoch."""
    folder = tmp_path_factory.mktemp("whole")
    images = make_images(folder / "images", ["cat", "dog"], 20)
    argv = ["--download-dir", images, *TINY, "--max-steps", "19", "--model-dir", folder / "run"]
    assert run_main(*argv).status == 0
    return folder / "run"


@pytest.mark.parametrize("wrong", WRONG_CONTENT)
def test_a_sealed_checkpoint_of_wrong_content(
    wrong: str, whole_run: Path, run_main: RunMain, tmp_path: Path
) -> None:
    """The fused optimizers read and write whatever lies behind a moment that is too small."""
    shutil.copytree(whole_run, tmp_path / "run")
    state = load_checkpoint(whole_run / "checkpoint.pth.tar")
    WRONG_CONTENT[wrong](state)
    for file in (tmp_path / "run").glob("*.pth.tar"):
        file.write_bytes(sealed_archive(state))
    file = tmp_path / "run" / "checkpoint.pth.tar"
    result = run_main("--resume", file, "--max-steps", "21")
    [line] = result.stderr.splitlines()
    assert (result.status, line.startswith("main_vit.py: error: ")) == (2, True)
    assert "checkpoint" in line
    started = run_main(
        *("--init-from", file, "--config", whole_run / "args.yaml", "--max-steps", "1"),
        *("--model-dir", tmp_path / "new"),
    )
    assert started.status in (0, 2) and started.stderr.count("\n") <= 1
    assert "Traceback" not in started.stdout + started.stderr


def test_lines_of_metrics_that_lack_something(
    whole_run: Path, run_main: RunMain, tmp_path: Path
) -> None:
    shutil.copytree(whole_run, tmp_path / "run")
    lines = tmp_path / "run" / "metrics.jsonl"
    nan = (
        lines.read_text()
        .splitlines()[0]
        .replace('"val_accuracy": ', '"val_accuracy": -Infinity, "x": ')
    )
    lines.write_text(
        nan + '\n{"epoch": 1, "step": 2}\n{"epoch": 1, "step": "x"}\n[]\n' + lines.read_text()
    )
    result = run_main("--resume", tmp_path / "run" / "checkpoint.pth.tar", "--max-steps", "40")
    assert (result.status, result.stderr) == (0, "")
    assert [json.loads(line)["epoch"] for line in lines.read_text().splitlines()] == [1, 2, 3]


def test_the_rate_of_the_last_step_is_kept() -> None:
    """Nothing else of the options: a run that is stopped before validation tells it afterwards."""
    weight = nn.Parameter(torch.zeros(2))
    saved = torch.optim.SGD([weight], lr=0.25, momentum=0.5).state_dict()
    optimizer = torch.optim.SGD([weight], lr=0.5, momentum=0.9)
    load_moments(optimizer, saved)
    [group] = optimizer.param_groups
    assert (group["lr"], group["momentum"]) == (0.25, 0.9)


def test_the_seal_is_the_comment_of_a_whole_zip(tmp_path: Path) -> None:
    """Other tools, torch.load among them, read a sealed checkpoint as they did."""
    save_checkpoint({"format": 1, "x": torch.arange(3)}, False, tmp_path / "file")
    with zipfile.ZipFile(tmp_path / "file") as archive:
        assert archive.testzip() is None and archive.comment.startswith(b"sha256:")
    assert torch.load(tmp_path / "file", weights_only=True)["x"].tolist() == [0, 1, 2]
    content = (tmp_path / "file").read_bytes()
    assert content[-64:].decode() == hashlib.sha256(content[:-71]).hexdigest()


# --- a disk that is full ------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_loses_nothing(
    image_folder: Path, run_main: RunMain, read_lines, small_disk: Path, tmp_path: Path
) -> None:
    argv = ["--download-dir", image_folder, "--cache-dir", tmp_path / "cache", *TINY]
    output = small_disk / "run"
    assert run_main(*argv, "--model-dir", output, "--max-steps", 20, process=True).status == 0
    subprocess.run(["dd", "if=/dev/zero", f"of={small_disk}/full", "bs=4k"], capture_output=True)
    result = run_main("--resume", output / "checkpoint.pth.tar", "--max-steps", 1000, process=True)
    assert result.status in (1, 2) and "No space left on device" in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
    load_checkpoint(output / "checkpoint.pth.tar")
    (small_disk / "full").unlink()
    resumed = run_main("--resume", output / "checkpoint.pth.tar", "--max-steps", 1000, process=True)
    assert resumed.status == 0, resumed.stderr
    whole = run_main(*argv, "--model-dir", tmp_path / "whole", "--max-steps", 1000)
    assert whole.status == 0 and differing(tmp_path / "whole", output, read_lines) == []


# --- too little memory --------------------------------------------------------------------------------


class SmallMemory(nn.Module):
    """A model that there is no room for with more than `most` images at a time."""

    def __init__(self, most: int, error: Exception) -> None:
        super().__init__()
        self.most, self.error = most, error
        self.flatten, self.head = nn.Flatten(), nn.Linear(12, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) > self.most:
            raise self.error
        return self.head(self.flatten(images))


# As torch says it of a GPU, CUDA itself, a library of it, and torch of the machine.
TOO_LITTLE = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:122] . DefaultCPUAllocator: can't allocate memory"
    ),
]


def step_with_memory_for(most: int, error: Exception = TOO_LITTLE[0]) -> TrainingState:
    args = resolve(main_vit.make_parser(), ["--precision=float32", "--label-smoothing=0.1"])
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.randn(10, 3, 2, 2, generator=generator), torch.arange(10) % 3
    torch.manual_seed(0)
    model = SmallMemory(most, error)
    state = TrainingState(model, step_vit.make_optimizer("sgd", model, 0.1, 0, 0), None)
    _, predicted, _ = step_vit.training_step(state, images, targets, args)
    assert predicted.shape == (10,)
    return state


@pytest.mark.parametrize("error", TOO_LITTLE)
@pytest.mark.parametrize(("most", "pieces"), [(9, 2), (4, 4), (1, 16)])
def test_a_batch_too_large_is_taken_in_pieces(most: int, pieces: int, error: Exception) -> None:
    whole, small = step_with_memory_for(10), step_with_memory_for(most, error)
    assert (whole.pieces, small.pieces) == (1, pieces)
    torch.testing.assert_close(small.model.state_dict(), whole.model.state_dict())
    torch.testing.assert_close(small.model.head.weight.grad, whole.model.head.weight.grad)
    saved = small.state_dict()
    whole.load_state_dict(saved)  # a run that goes on adds in the same order
    assert whole.pieces == pieces
    del saved["pieces"]  # an earlier version's
    whole.load_state_dict(saved)
    assert whole.pieces == 1


def test_an_image_too_large_ends_the_run() -> None:
    with pytest.raises(
        RunFailed, match="a single image of 16 x 16 in 4 x 4 patches and its model do not fit"
    ):
        step_with_memory_for(0)
    with pytest.raises(RuntimeError, match="another"):
        step_with_memory_for(0, RuntimeError("another"))


def test_weights_that_are_not_finite_are_not_saved() -> None:
    """The loss before them was finite: it is that of the step that made them so."""
    state = step_with_memory_for(10)
    args = resolve(main_vit.make_parser(), ["--precision=float32"])
    batch = torch.randn(10, 3, 2, 2), torch.arange(10) % 3
    state.outputs.append(step_vit.training_step(state, *batch, args))
    step_vit.check_finite(state)
    state.parameters[0].register_hook(lambda gradient: gradient * math.inf)
    state.outputs.append(step_vit.training_step(state, *batch, args))
    assert torch.stack([loss for loss, _, _ in state.outputs]).isfinite().all()
    with pytest.raises(RunFailed, match="the loss is not finite at epoch 1, step 3"):
        step_vit.check_finite(state)


@pytest.mark.parametrize("error", TOO_LITTLE)
def test_memory_that_is_short_beside_the_steps_ends_the_run(
    error: Exception, run_main: RunMain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a batch takes before its step, say."""

    def worker(*args: Any) -> None:
        raise error

    monkeypatch.setattr(main_vit, "main_worker", worker)
    result = run_main(*TINY)
    assert result.status == 1 and result.stderr.count("\n") == 1
    assert "no memory left; what was saved before is whole" in result.stderr
    assert "a smaller --batch-size" in result.stderr


def test_validation_is_taken_in_pieces_too() -> None:
    args = resolve(main_vit.make_parser(), ["--precision=float32"])
    images = torch.randn(10, 3, 2, 2)
    model = SmallMemory(3, TOO_LITTLE[0])
    state = TrainingState(model, step_vit.make_optimizer("sgd", model, 0.1, 0, 0), 0.9)
    expected = model.head(model.flatten(images))
    torch.testing.assert_close(step_vit.logits_of(state, images, args), expected)
    assert state.pieces == 4
    state.ema.model.most = 0
    with pytest.raises(RunFailed, match="a single image"):
        step_vit.logits_of(state, images, args)


def test_no_memory_for_the_optimizer_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its moments are taken at the first step; to repeat that in pieces would not make room."""

    def step(self: torch.optim.SGD) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    with pytest.raises(RunFailed, match="the model and the moments of adamw do not fit"):
        step_with_memory_for(10)


# --- kills --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_random_moments(
    image_folder: Path, run_main: RunMain, home: Path, read_lines, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """SIGKILL again and again, mostly while a checkpoint is written: nothing is lost."""
    monkeypatch.syspath_prepend(Path(main_vit.__file__).parent / "benchmarks")
    from kill_runs import kill_until_done

    argv = ["--download-dir", str(image_folder), *TINY, "--checkpoint-steps", "1", "--auto-resume"]
    argv += ["--epochs", "12"]
    assert run_main(*argv, "--model-dir", tmp_path / "whole").status == 0
    kills = runs = 0
    while kills < 12:
        runs += 1
        output = tmp_path / f"killed{runs}"
        kills += kill_until_done(
            [*argv, "--model-dir", str(output)], output, runs, {"HOME": str(home)}
        )
        assert differing(tmp_path / "whole", output, read_lines) == []
        assert not list(output.glob(".*.tmp"))


def test_sigterm_before_training_is_not_a_traceback(image_folder: Path, start_main) -> None:
    with start_main("--download-dir", image_folder, *TINY) as process:
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == -signal.SIGTERM
