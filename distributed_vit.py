"""One run in several processes under torchrun: what they tell each other. With one process all of it is free."""

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")

# A process that ended is noticed at once, by its closed connection. These are for one that is frozen
# or cut off: between steps nothing takes long, but one machine may decode images hours after another.
STEP_TIMEOUT = timedelta(minutes=10)
SET_UP_TIMEOUT = timedelta(days=1)


class RankLost(Exception):
    """Another process of this run ended, or does not answer; the text is one line."""


def world_size() -> int:
    """The number of processes of this run."""
    # Not WORLD_SIZE alone, which other launchers leave in the environment of what is no part of it.
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank() -> int:
    """The number of this process, from 0; 0 alone writes, logs and knows NNI."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def start() -> None:
    """Connect the processes, by gloo for what is on the CPU and NCCL for what is on a GPU. Raises RankLost."""
    if sys.platform == "linux" and os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine: nobody else can connect
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun serves its store before it starts us. If it is gone by now, killed say, torch would wait
        # for it until the time-out.
        store = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            socket.create_connection(store).close()
        except OSError as error:
            raise RankLost(f"torchrun ended ({error.strerror})") from None
    with _connected():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=STEP_TIMEOUT
        )


def end() -> None:
    """Disconnect; the others may still be at work."""
    if world_size() > 1:
        dist.destroy_process_group()


def wait_for_all() -> None:
    """Returns when all processes are here, or one of them is no more."""
    if dist.is_initialized():
        with suppress(RuntimeError):
            dist.barrier()


def all_reduce_max(*numbers: int) -> list[int]:
    """The largest that any process gives of each number. Raises RankLost."""
    if world_size() == 1:
        return list(numbers)
    # On the CPU also where training is on a GPU: it waits for the other processes to come as far in
    # their Python, not for the GPU to finish what it was told.
    tensor = torch.tensor(numbers)
    with _connected():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def all_reduce_sum(*tensors: Tensor) -> list[Tensor]:
    """The sum of each tensor (float32, one device) over the processes, the same to the bit on all.

    Where only some processes have something to say, zeros from the others leave it exact. All of it
    is one message. Raises RankLost.
    """
    if world_size() == 1:
        return list(tensors)
    message = torch.cat([tensor.flatten() for tensor in tensors])
    with _connected():
        dist.all_reduce(message)
    sums = message.split([tensor.numel() for tensor in tensors])
    return [total.view_as(tensor) for total, tensor in zip(sums, tensors, strict=True)]


def broadcast(*tensors: Tensor) -> None:
    """Overwrite the tensors with those of rank 0. Raises RankLost."""
    if world_size() > 1:
        with _connected():
            for tensor in tensors:
                dist.broadcast(tensor, 0)


def from_rank_0(function: Callable[[], Result]) -> Result:
    """What `function` returns on rank 0, the only one to call it; a ValueError of it is raised on all.

    Raises RankLost.
    """
    if world_size() == 1:
        return function()
    answer: list[Any] = [None, None]
    if rank() == 0:
        try:
            answer[0] = function()
        except ValueError as error:
            answer[1] = error
    with _connected():
        dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def together(function: Callable[[], Result]) -> Result:
    """What `function` returns here, once all processes are done with it; the first ValueError is raised on all.

    Raises RankLost.
    """
    if world_size() == 1:
        return function()
    result, error = None, None
    try:
        result = function()
    except ValueError as raised:
        error = raised
    for other in all_gather(error):
        if other is not None:
            raise other
    return result


def all_gather(value: Any) -> list[Any]:
    """The `value` of every process, by rank, once all have one. Raises RankLost."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with _connected():
        group = dist.new_group(timeout=SET_UP_TIMEOUT, backend="gloo")
        dist.all_gather_object(values, value, group)
    return values


@contextmanager
def _connected() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what torch makes of everything that goes wrong here
        reason = " ".join(str(error).split())[:150]
        raise RankLost(f"another process of this run ended or does not answer ({reason})") from None
