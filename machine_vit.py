"""What this process may use of the machine, cores and memory: in a container less than there is."""

import ctypes
import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def usable_cores(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """Cores that this process may use: its affinity, and the CPU quota of its cgroups, v1 or v2."""
    quotas = map(_cpu_quota, limiting("cpu", cgroups, membership))
    return max(1, int(min([len(os.sched_getaffinity(0)), *quotas])))


def default_threads(cores: int, physical: int, concurrency: int, given: bool) -> int:
    """This trial's share of the `cores`; `physical` is torch's count of them.

    Where OMP_NUM_THREADS was `given`, which torch takes for its count, it is what each trial may have.
    """
    share = min(physical, cores // concurrency) if given else min(physical, cores) // concurrency
    return max(1, share)


def available_memory(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """Bytes that this process can take before the machine swaps or its cgroup runs out of memory."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    rooms = map(_free_memory, limiting("memory", cgroups, membership))
    return max(0, min([free, *rooms]))


def limiting(controller: str, cgroups: Path, membership: Path) -> Iterator[Path]:
    """The folders of the cgroups that may limit this process: of v2, and of the controller's v1."""
    lines = membership.read_text().splitlines() if membership.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers == "":
            places = (cgroups, cgroups / "unified")
        elif controller in controllers.split(","):
            places = (cgroups / controller, cgroups / controllers)
        else:
            continue
        # Every group above limits too. Within a container the path may be that of the host.
        parts = Path(path).parts[1:]
        for place in places:
            for depth in range(len(parts) + 1):
                yield place.joinpath(*parts[:depth])


def _cpu_quota(group: Path) -> float:
    """Cores' worth of time that a cgroup gives its processes."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu.cfs_period_us").read_text()
        return math.inf if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError):  # no such group
        return math.inf


def _free_memory(group: Path) -> float:
    """Bytes that a cgroup has left for its processes; pages of files are given back when asked for."""
    try:
        if (group / "memory.max").exists():
            limit, used, prefix = "memory.max", "memory.current", ""
        else:
            limit, used, prefix = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        lines = (group / "memory.stat").read_text().splitlines()
        counts = {name: int(count) for name, count in map(str.split, lines)}
        files = counts[f"{prefix}inactive_file"] + counts[f"{prefix}active_file"]
        return int((group / limit).read_text()) - int((group / used).read_text()) + files
    except (OSError, ValueError, KeyError):  # no such group, or the limit is "max"
        return math.inf


def keep_freed_memory() -> None:
    """Let glibc keep the memory of tensors that are freed, for the next step to use.

    By default it gives large blocks back to the kernel, which clears each of their pages anew in every
    step: 5 to 15 % of its time. See mallopt(3).
    """
    trim_threshold, mmap_max = -1, -4
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # musl and macOS have none
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_max, 0)
