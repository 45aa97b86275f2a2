"""What every table of figures says beside its figures."""

import os
import platform
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def hardware() -> str:
    """Processor, cores, GPU and versions, in one line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), "CPU")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{name}, {len(os.sched_getaffinity(0))} cores, {gpu}; "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
