"""The benchmarks as programs: one clear line for what is missing, and all of them run through."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import setup_vit

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))


def run_script(name: str, *options: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *options],
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("compare.py", ["--data", "absent"], "absent/train is not a folder"),
        ("compare.py", [], "--data"),
        ("limits.py", ["--data", "absent"], "absent/train is not a folder"),
        ("limits.py", ["--repeats", "0"], "at least 1"),
        ("startup.py", ["--data", "absent"], "absent/train is not a folder"),
        ("startup.py", ["--repeats", "0"], "at least 1"),
        ("memory.py", ["--images", "1"], "at least 20"),
        ("reading.py", [], "--data"),
        ("reading.py", ["--data", "absent"], "absent/train is not a folder"),
        ("augment.py", ["--repeats", "0"], "at least 1"),
        ("checkpoint_cost.py", ["--fast"], "--fast"),
        ("ranks.py", ["--processes", "1"], "at least 2"),
        ("search_throughput.py", ["--trials", "0"], "at least 1"),
        ("early_stopping.py", ["--epochs", "1"], "at least 2"),
        ("run_all.py", ["--data", "absent"], "absent/train is not a folder"),
        ("run_all.py", ["--out", "absent"], "absent is not a folder"),
    ],
)
@pytest.mark.slow
def test_bad_input_is_one_line(name: str, options: list[str], message: str) -> None:
    done = run_script(name, *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith(f"{name}: error: ") and done.stderr.count("\n") == 1


def test_goals_are_read_back_from_what_a_script_prints() -> None:
    from harness import goals_table, table
    from run_all import goals_of

    other = table(("what", "s"), [("a", 1)])
    goals = goals_table([("one | way", 3, 2.5, 7), ("lost", 0.9, None, 0)])
    text = f"hello\n\n{other}\n{goals}\n{other}"
    assert goals_of(text.replace("one | way", "one way")) == [("one way", 3.0, 2.5, "7")]


@pytest.fixture
def jpegs(tmp_path: Path) -> Path:
    """40 noisy grey images for training and 10 for the test, of two classes."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 5)):
        for number, name in enumerate(("dark", "light")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.normal(80 + 100 * number, 20, (48, 48)).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / split / name / f"{i}.jpg")
    return tmp_path


@pytest.mark.long
def test_every_benchmark_runs_through(jpegs: Path) -> None:
    pytest.importorskip("timm")
    (jpegs / "results").mkdir()
    options = ["--data", str(jpegs), "--fullsize", str(jpegs), "--out", str(jpegs / "results")]
    done = run_script("run_all.py", "--quick", *options, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert (jpegs / "results" / "results.png").exists()
    summary, *sections = (jpegs / "results" / "results.md").read_text().split("\n## ")
    assert len(sections) == 10
    assert not any("Not run" in text for text in sections)
    for goal in (
        "against timm's best", "against tensors in memory", "second trial", "resident memory",
        "from the cache against Pillow", "2 at a time", "early stopping",
    ):  # fmt: skip
        assert goal in summary
    has_bfloat16 = setup_vit.computes_in("bfloat16", torch.device("cpu"))
    assert (" | bfloat16 | " in sections[1]) == has_bfloat16  # in limits.py

    lines = [line for line in sections[0].splitlines() if line.startswith("|")]
    rows = {cells[1].strip(): cells[2:] for cells in (line.split("|") for line in lines)}
    # The model of the original and ours are the same; timm's lacks the two norms around the patches.
    original, timm, ours = (
        int(rows[way][0].replace(",", ""))
        for way in ("original, as it was", "timm, 2 workers", "ours, cache warm")
    )
    assert original == ours
    assert 0 <= original - timm < 0.01 * original
