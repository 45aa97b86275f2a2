"""Whole runs on a GPU, where there is one: they learn, repeat and resume to the bit, and are used there."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from utils_vit import load_checkpoint

REPOSITORY = Path(__file__).resolve().parents[1]
RUN = (
    "--image-size=32 --patch-size=4 --vt-dim=64 --vt-depth=2 --vt-heads=4 --mlp-dim=128 --epochs=4 "
    "--batch-size=16 --lr=1e-3 --deterministic --checkpoint-steps=3"
)
RUNS = {
    "plain": "",
    "everything": (
        "--flip=both --affine=0.2 --crop=0.5 --color=0.3 --randaugment=5 --erase=0.2 --mixup=0.4 "
        "--cutmix=0.5 --dropout=0.1 --moving-average-decay=0.9 --cache=off"
    ),
    "mean pool, rmsprop": "--pool=mean --optimizer=rmsprop --lr=1e-4",
    "float16, sgd": "--precision=float16 --optimizer=sgd",
    "float32, sgd": "--precision=float32 --optimizer=sgd",
}
Start = Callable[..., str]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """start("main_vit.py", ...) runs it where it sees the GPUs, and returns its output."""
    env = os.environ | {"HOME": str(tmp_path_factory.mktemp("home"))}
    env["CUDA_VISIBLE_DEVICES"] = env["GPUS_OF_TESTS"]
    if env["GPUS_OF_TESTS"] == "all":
        del env["CUDA_VISIBLE_DEVICES"]

    def run(*command: Any) -> str:
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    if run("-c", "import torch; print(torch.cuda.is_available())").strip() != "True":
        pytest.skip("torch sees no GPU here")
    return run


@pytest.mark.slow
@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_a_run_on_a_gpu(
    options: str, start: Start, tmp_path: Path, make_images: Callable[..., Path]
) -> None:
    for seed, (split, count) in enumerate({"train": 30, "val": 10, "test": 10}.items()):
        make_images(tmp_path / "images" / split, ["cat", "dog", "eel"], count, seed)
    argv = ["main_vit.py", "--download-dir", tmp_path / "images", *RUN.split(), *options.split()]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert "device  CPU" not in start(*argv, "--model-dir", whole)
    start(*argv, "--model-dir", parts, "--max-steps", 8)  # within the second epoch of 6 steps
    start("main_vit.py", "--resume", parts / "checkpoint.pth.tar", "--max-steps", 24)
    for name in ("checkpoint.pth.tar", "model_best.pth.tar"):
        one, other = load_checkpoint(whole / name), load_checkpoint(parts / name)
        assert one["step"] == other["step"]
        for key, weight in one["model"].items():
            assert torch.equal(weight, other["model"][key]), key
    results = json.loads((whole / "results.json").read_text())
    assert results["device"].startswith("cuda")
    assert results["validation"]["accuracy"] > 60
    report = json.loads(
        start(
            "predict_vit.py", whole / "model_best.pth.tar", "--evaluate", tmp_path / "images/test"
        )
    )
    assert report["accuracy"] == pytest.approx(results["test"]["accuracy"], abs=3.5)  # an image
    assert report["loss"] == pytest.approx(results["test"]["loss"], abs=0.02)
