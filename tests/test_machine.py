"""What a run takes of the machine: cores and memory, as many as its container and the trials beside it leave."""

import contextlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from nni_tools import experiment
from test_data import python

import machine_vit
import main_vit
import setup_vit
from config_vit import resolve

# --- cores ------------------------------------------------------------------------------------------

V1, V2 = "4:memory:/a\n1:cpu,cpuacct:/job/one\n0::/", "0::/job/one\n"


def cgroups(folder: Path, membership: str, files: dict[str, str]) -> tuple[Path, Path]:
    """The two places that tell a process its groups and their limits."""
    (folder / "self").write_text(membership)
    for name, content in files.items():
        (folder / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "fs" / name).write_text(content)
    return folder / "fs", folder / "self"


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        (V2, {"job/one/cpu.max": "150000 100000"}, 1),
        (V2, {"job/one/cpu.max": "400000 100000", "job/cpu.max": "300000 100000"}, 3),
        (V2, {"job/one/cpu.max": "max 100000"}, 8),
        (V2, {"job/one/cpu.max": "50000 100000"}, 1),
        (V2, {"cpu.max": "200000 100000"}, 2),  # a container sees its own group as the root
        (V1, {"cpu,cpuacct/job/one/cpu.cfs_quota_us": "250000", "cpu,cpuacct/job/one/cpu.cfs_period_us": "50000"}, 5),
        (V1, {"cpu/job/cpu.cfs_quota_us": "200000\n", "cpu/job/cpu.cfs_period_us": "100000\n"}, 2),
        (V1, {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"}, 8),
        (V2, {"job/one/cpu.max": "nonsense"}, 8),
        ("", {}, 8),
    ],
)  # fmt: skip
def test_cores_of_a_cgroup(
    membership: str, files: dict, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    places = cgroups(tmp_path, membership, files)
    assert machine_vit.usable_cores(*places) == expected


@contextlib.contextmanager
def real_cgroup(controller: str, v2: dict[str, object], v1: dict[str, object]) -> Iterator[Path]:
    """A group of v2 or v1 below the root, with these limits; skips where none can be made."""
    for place in (machine_vit.CGROUPS, machine_vit.CGROUPS / controller):
        group = place / f"vit-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            limits = next((ls for ls in (v2, v1) if all((group / n).exists() for n in ls)), {})
            for name, value in limits.items():
                (group / name).write_text(str(value))
            if limits:
                yield group
                return
        finally:
            group.rmdir()
    pytest.skip(f"no cgroup with a limit of its {controller} can be made here")


def test_a_real_quota_and_a_real_affinity() -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("a single core cannot be limited")
    code = """
import os, sys, machine_vit
cores = os.sched_getaffinity(0)
os.sched_setaffinity(0, {min(cores)})
print(machine_vit.usable_cores())
os.sched_setaffinity(0, cores)
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
print(machine_vit.usable_cores())
"""
    v1 = {"cpu.cfs_period_us": 100_000, "cpu.cfs_quota_us": 150_000}
    with real_cgroup("cpu", {"cpu.max": "150000 100000"}, v1) as group:
        process = python(code, group)
        assert process.communicate(timeout=120) == ("1\n1\n", "")


@pytest.mark.parametrize(
    ("cores", "physical", "concurrency", "given", "expected"),
    [
        (2, 2, 1, False, 2), (2, 2, 2, False, 1), (2, 2, 8, False, 1), (16, 8, 2, False, 4),
        (4, 16, 2, False, 2), (8, 3, 2, True, 3), (8, 6, 2, True, 4), (1, 1, 2, True, 1),
    ],
)  # fmt: skip
def test_threads_of_a_trial(
    cores: int, physical: int, concurrency: int, given: bool, expected: int
) -> None:
    assert machine_vit.default_threads(cores, physical, concurrency, given) == expected


@pytest.mark.parametrize(
    ("options", "ranks", "expected"),
    [
        (["--threads", "1"], 1, 8),  # trials that start together wait for one that decodes
        (["--threads", "3", "--cache", "off"], 1, 3),
        (["--threads", "1", "--cache", "off"], 2, 4),  # torchrun gives each process one thread
        (["--threads", "6", "--cache", "off"], 4, 6),
        (["--threads", "1", "--cache", "off"], 16, 1),
        (["--threads", "1", "--cache", "off", "--workers", "5"], 2, 5),
    ],
)
def test_threads_that_decode(
    options: list[str], ranks: int, expected: int, image_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(machine_vit, "usable_cores", lambda: 8)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    given, decode = [], setup_vit.data_vit.decode_folder

    def noted(images: object, size: int, channels: int, cache: Path, workers: int, *rest: object):
        given.append(workers)
        return decode(images, size, channels, cache, workers, *rest)

    monkeypatch.setattr(setup_vit.data_vit, "decode_folder", noted)
    where = ["--download-dir", str(image_folder), "--cache-dir", str(tmp_path / "cache")]
    args = resolve(main_vit.make_parser(), [*where, "-s", "8", "-p", "4", *options])
    setup_vit.open_images(args)
    assert set(given) == {expected}


def test_the_number_of_threads_is_repeated(
    image_folder: Path, tmp_path: Path, run_main: Callable
) -> None:
    """args.yaml holds it, so that the same run elsewhere gives the same bits."""
    options = "-s 8 -p 4 -vd 16 -d 1 -vh 2 -mlpd 16 -e 1 --max-steps 1"
    result = run_main(
        "--download-dir", image_folder, *options.split(), "--model-dir", tmp_path / "a"
    )
    expected = machine_vit.default_threads(
        machine_vit.usable_cores(), torch.get_num_threads(), 1, "OMP_NUM_THREADS" in os.environ
    )
    assert f"CPU threads {expected}," in result.stdout
    assert f"threads: {expected}\n" in (tmp_path / "a" / "args.yaml").read_text()
    other = str(expected + 2)
    run_main(
        "--download-dir",
        image_folder,
        *options.split(),
        "--threads",
        other,
        "--model-dir",
        tmp_path / "b",
    )
    again = run_main("--config", tmp_path / "b" / "args.yaml", "--model-dir", tmp_path / "c")
    assert f"CPU threads {other}," in again.stdout


@pytest.mark.slow
def test_trials_share_the_cores(tmp_path: Path) -> None:
    """A real manager answers how many run at a time; a manager that does not is no failure."""
    (tmp_path / "trial.py").write_text("""
import os
from nni_vit import Trial
trial = Trial()
trial.ask()
seen = trial.concurrency()
channel = os.environ["NNI_TRIAL_COMMAND_CHANNEL"]
os.environ["NNI_TRIAL_COMMAND_CHANNEL"] = "http://localhost:9/env/x"
alone = trial.concurrency()
os.environ["NNI_TRIAL_COMMAND_CHANNEL"] = channel
trial.finish({"default": 10 * seen + alone})
""")
    config = {
        "trialCommand": f"{sys.executable} trial.py", "trialConcurrency": 3, "maxTrialNumber": 4,
        "searchSpace": {"a": {"_type": "uniform", "_value": [0, 1]}},
    }  # fmt: skip
    with experiment(config, tmp_path) as running:
        running.wait("DONE", 90)
        finals = [running.finals(trial["trialJobId"]) for trial in running.trials()]
        assert finals == [[{"default": 31.0}]] * 4


# --- memory -------------------------------------------------------------------------------------------

V2_STAT = "anon 700\nfile 400\ninactive_file 100\nactive_file 50\n"
V1_STAT = "inactive_file 1\nactive_file 1\ntotal_inactive_file 100\ntotal_active_file 50\n"


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        (V2, {"job/one/memory.max": "1000\n", "job/one/memory.current": "800\n", "job/one/memory.stat": V2_STAT}, 350),
        (V2, {"job/memory.max": "1000\n", "job/memory.current": "1000\n", "job/memory.stat": ""}, None),
        (V2, {"memory.max": "800\n", "memory.current": "800\n", "memory.stat": V2_STAT}, 150),
        (V2, {"memory.max": "600\n", "memory.current": "800\n", "memory.stat": V2_STAT}, 0),  # made smaller
        (V2, {"memory.max": "max\n", "memory.current": "800\n", "memory.stat": V2_STAT}, None),
        (V1, {"memory/a/memory.limit_in_bytes": "1000\n", "memory/a/memory.usage_in_bytes": "800\n",
              "memory/a/memory.stat": V1_STAT}, 350),
        (V1, {"memory/a/memory.limit_in_bytes": f"{2**63 - 4096}\n", "memory/a/memory.usage_in_bytes": "800\n",
              "memory/a/memory.stat": V1_STAT}, None),
        ("", {}, None),
    ],
)  # fmt: skip
def test_memory_of_a_cgroup(
    membership: str, files: dict, expected: int | None, tmp_path: Path
) -> None:
    places = cgroups(tmp_path, membership, files)
    available = machine_vit.available_memory(*places)
    assert available == expected if expected is not None else available > 10**6  # the machine's


def test_images_that_a_container_has_no_memory_for(image_folder: Path, tmp_path: Path) -> None:
    """One line, instead of an end by the kernel half way."""
    limit = 2**30
    code = """
import os, sys, machine_vit, main_vit
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
print(machine_vit.available_memory())
sys.exit(main_vit.main(sys.argv[2:]))
"""
    options = ["--download-dir", image_folder, "--cache", "memory", "-s", "6000", "-p", "4"]
    with real_cgroup("memory", {"memory.max": limit}, {"memory.limit_in_bytes": limit}) as group:
        process = python(code, group, *options, "--model-dir", tmp_path / "run")
        output, errors = process.communicate(timeout=120)
    assert 0 < int(output) <= limit
    assert process.returncode == 2, errors
    assert re.search(r"error: --cache memory: .* take 4.32 GB, and [01]\.\d\d GB are free", errors)


FAULTS = """
import resource, sys
import torch, machine_vit
if sys.argv[1] == "kept":
    machine_vit.keep_freed_memory()
def step():
    tensors = [torch.ones(10_000_000) for _ in range(3)]
    del tensors
for _ in range(10):  # the heap finds its size
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.slow
def test_memory_is_kept_from_step_to_step() -> None:
    faults = {
        way: int(
            subprocess.run(
                [sys.executable, "-c", FAULTS, way],
                cwd=Path(machine_vit.__file__).parent, capture_output=True, text=True, check=True,
            ).stdout
        )
        for way in ("kept", "returned")
    }  # fmt: skip
    assert faults["kept"] < 1000 < faults["returned"], faults
