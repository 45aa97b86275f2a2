"""How near training comes to what the machine can do: data, arithmetic, and each choice of the step.

python benchmarks/limits.py [--data chest_xray]
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from harness import Parser, goals_table, image_folder, table

CONFIGURATIONS = {
    "smallest of the search space": "-s 16 -pn 2 -ch 1 -vd 32 -d 2 -vh 2 -mlpd 64 -b 32",
    "largest of the search space": "-s 16 -pn 8 -ch 1 -vd 64 -d 4 -vh 8 -mlpd 128 -b 32",
    "the original": "-s 300 -pn 10 -ch 3 -vd 256 -d 6 -vh 8 --dim-head 64 -mlpd 500 -b 16 --optimizer adam",
    "ViT-S/16 at 224": "-s 224 -p 16 -vd 384 -d 12 -vh 6 -mlpd 1536 -b 16",
}
# Where the time of an operator is counted, by a part of its name, first match.
KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn", "linear"),
    "attention": ("scaled_dot_product", "_attention_", "softmax"),
    "norms": ("layer_norm",),
    "GELU": ("gelu",),
    "copies": ("copy", "cat", "stack", "clone", "contiguous"),
    "optimizer": ("_fused_adam", "foreach", "norm"),
}


# --- what is measured -------------------------------------------------------------------------------


def make(options: str, device: str, precision: str = "auto") -> tuple[Any, argparse.Namespace]:
    """The training state of a configuration, as main_vit.py makes it, and its parameters."""
    import main_vit
    import nni_vit
    import setup_vit
    from config_vit import resolve

    argv = [*options.split(), "--num-classes", "2", "--precision", precision]
    args = resolve(main_vit.make_parser(), argv)
    chosen = setup_vit.choose_device(args, nni_vit.Trial(asked=False))
    assert chosen.type == device, "CUDA_VISIBLE_DEVICES is set before torch is imported"
    state = setup_vit.make_state(args, chosen)
    state.model.train()
    return state, args


def stepper(
    options: str, device: str, precision: str = "auto", compiled: bool = False
) -> Callable[[], None]:
    """A function that takes one training step on images in memory; compiles at its first call if told so."""
    import torch

    import step_vit

    state, args = make(options, device, precision)
    if compiled:
        state.model.forward = torch.compile(state.model.forward)
    images = torch.randn(
        args.batch_size, args.channel, args.image_size, args.image_size, device=device
    )
    targets = torch.arange(args.batch_size, device=device) % 2
    return lambda: step_vit.training_step(state, images, targets, args)


def seconds(function: Callable[[], Any], device: str) -> float:
    """Of one call, to its real end on a GPU."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - began


def median_seconds(function: Callable[[], Any], device: str, repeats: int) -> float:
    for _ in range(2):  # memory is set up, kernels are chosen
        function()
    return statistics.median(seconds(function, device) for _ in range(repeats))


def product_rate(device: str, precision: str) -> float:
    """FLOP/s of a large square matrix product, the best of some sizes."""
    import torch

    rates = []
    for side in (1024, 2048) if device == "cpu" else (4096, 8192):
        a, b = torch.randn(2, side, side, device=device, dtype=getattr(torch, precision))
        rates.append(2 * side**3 / median_seconds(lambda a=a, b=b: a @ b, device, 7))
    return max(rates)


# --- (a) data ---------------------------------------------------------------------------------------


def data_share(
    data: Path | None, configuration: str, device: str, repeats: int, steps: int
) -> tuple[float, float, float]:
    """Images/s of `main_vit.train` on real images and on tensors in memory, and the first over the second.

    They take turns of a few steps; the ratio is the median of those of neighbours, which a busy machine
    slows alike.
    """
    import torch

    import data_vit
    import main_vit
    import setup_vit

    options = f"{CONFIGURATIONS[configuration]} --download-dir {data}" if data else ""
    state, args = make(options, device)
    with tempfile.TemporaryDirectory() as cache:
        args.cache_dir = Path(cache)
        found = setup_vit.open_images(args)  # and keeps the file open
    target_device = next(state.model.parameters()).device
    steps = min(steps, len(found.train) // args.batch_size)
    # Of images without colour both have one channel.
    shape = (args.batch_size, *found.train.pixels.shape[1:])
    images = torch.rand(shape, device=target_device) * 2 - 1
    targets = torch.arange(args.batch_size, device=target_device) % args.num_classes

    def in_memory(*_: Any, **__: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor, None]]:
        return ((images, targets, None) for _ in range(steps))

    rates: dict[str, list[float]] = {"real": [], "memory": []}
    for i in range(repeats + 1):
        for name in rates:
            state.step, state.outputs = 0, []
            synthetic = patch.object(data_vit, "training_batches", in_memory)
            with synthetic if name == "memory" else contextlib.nullcontext():
                line = main_vit.train(state, found.train, args, target_device, steps, lambda: None)
            if i:  # the first one sets up memory
                rates[name].append(line["images_per_second"])
    ratio = statistics.median(real / memory for real, memory in zip(*rates.values(), strict=True))
    return *(statistics.median(values) for values in rates.values()), ratio


# --- (b) arithmetic ---------------------------------------------------------------------------------


def kind_of(operator: str) -> str:
    for kind, parts in KINDS.items():
        if any(part in operator for part in parts):
            return kind
    return "other"


def time_by_kind(
    step: Callable[[], None], device: str, repeats: int
) -> tuple[dict[str, float], float]:
    """Share of a step's time by kind of operator, of its own time without what it calls; the sum in seconds."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities) as profiler:
        for _ in range(repeats):
            step()
    times: Counter[str] = Counter()
    for event in profiler.key_averages():
        if event.device_type != DeviceType.CPU:  # a kernel, whose time its operator has too
            continue
        own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        times[kind_of(event.key)] += own
    shares = {kind: times[kind] / times.total() for kind in (*KINDS, "other")}
    return shares, times.total() / 1e6 / repeats


def arithmetic(
    device: str, precisions: list[str], repeats: int, names: list[str]
) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Of every configuration and precision, the row of the table of rates and that of the profile."""
    from torch.utils.flop_counter import FlopCounterMode

    for precision in precisions:
        for name in names:
            step = stepper(CONFIGURATIONS[name], device, precision)
            with FlopCounterMode(display=False) as counter:
                step()
            flops = counter.get_total_flops()
            took = median_seconds(step, device, repeats)
            limit = product_rate(device, precision)  # in the same minute: a machine can be shared
            shares, computing = time_by_kind(step, device, 3)
            busy = (
                took if device == "cpu" else computing
            )  # a GPU may wait for what starts its kernels
            batch = int(CONFIGURATIONS[name].split("-b ")[1].split()[0])
            products = flops / (busy * (shares["products"] + shares["attention"]))
            yield (
                (
                    name, precision, f"{flops / batch / 1e9:.4f}", f"{1000 * took:.1f}",
                    f"{batch / took:.0f}", f"{flops / took / 1e9:.0f}", f"{limit / 1e9:.0f}",
                    f"{flops / took / limit:.1%}", f"{products / limit:.1%}",
                ),
                (name, precision, *(f"{share:.0%}" for share in shares.values())),
            )  # fmt: skip


# --- (c) choices ------------------------------------------------------------------------------------


def plain_attention(query: Any, key: Any, value: Any, dropout: float) -> Any:
    """Three lines in place of a fused kernel."""
    import torch.nn.functional as F

    weights = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    return F.dropout(weights.softmax(dim=-1), dropout) @ value


def fused_attention(query: Any, key: Any, value: Any, dropout: float) -> Any:
    """torch's own choice among its kernels."""
    import torch.nn.functional as F

    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)


def choices(
    device: str, precisions: list[str], repeats: int, name: str, compiled: bool
) -> list[tuple[str, ...]]:
    """A row for each variant of the step of one configuration; the first is the step as it is."""
    import torch

    import vit

    options = CONFIGURATIONS[name]
    as_it_is = stepper(options, device)
    variants: dict[str, Callable[[], None]] = {"as it is": as_it_is}
    for precision in precisions:
        variants[precision] = stepper(options, device, precision)
    for title, attend in (("plain attention", plain_attention), ("SDPA", fused_attention)):

        def with_attention(attend: Any = attend) -> None:
            with patch.object(vit, "attend", attend):
                as_it_is()

        variants[title] = with_attention
    start = torch.optim.Adam.__init__
    unfused = patch.object(
        torch.optim.Adam, "__init__", lambda *a, **k: start(*a, **{**k, "fused": None})
    )
    with unfused:
        variants["optimizer not fused"] = stepper(options, device)

    compile_seconds, failure = 0.0, "not tried"
    if compiled:
        step = stepper(options, device, compiled=True)
        try:
            compile_seconds = seconds(step, device)
            variants["torch.compile"] = step
        except RuntimeError as error:  # no compiler on this machine, say
            failure = f"failed: {str(error).splitlines()[0]}"

    times: dict[str, list[float]] = {title: [] for title in variants}
    for _ in range(repeats + 1):
        for title, step in variants.items():
            times[title].append(seconds(step, device))
    medians = {title: statistics.median(values[1:]) for title, values in times.items()}
    eager = medians["as it is"]
    rows = [(t, f"{1000 * m:.1f}", f"{eager / m:.2f}", "") for t, m in medians.items()]
    if "torch.compile" not in medians:
        rows.append(("torch.compile", "-", "-", failure))
    else:
        gain = eager - medians["torch.compile"]
        spent = compile_seconds - medians["torch.compile"]
        when = f"after {spent / gain:,.0f} steps" if gain > 0.02 * eager else "never"
        rows[-1] = (*rows[-1][:3], f"compiles for {spent:.0f} s, earned back {when}")
    return rows


# --- the tables -------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    # fmt: off
    parser = Parser(prog="limits.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=image_folder, metavar="DIR", help="with train/ and test/ (default: the digits demo)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    add("--repeats", type=int, default=7, help="(default: %(default)s)")
    add("--threads", type=int, help="(default: torch's)")
    add("--quick", action="store_true", help="small models only, twice")
    # fmt: on
    args = parser.parse_args(argv)
    if min(args.repeats, args.threads or 1) < 1:
        parser.error("--repeats and --threads are at least 1")
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch
    from timed import hardware

    from setup_vit import computes_in

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if args.quick:
        args.repeats = 2
    if args.threads:
        torch.set_num_threads(args.threads)
    names = [*CONFIGURATIONS]
    names = names[:2] if args.quick else names
    # Without instructions for it a CPU is a hundred times slower in bfloat16: nothing to compare.
    precisions = ["float32"] + ["bfloat16"] * computes_in("bfloat16", torch.device(args.device))
    print(f"{hardware()}, threads: {torch.get_num_threads()}, {args.device}\n")

    rates, profiles = zip(*arithmetic(args.device, precisions, args.repeats, names), strict=True)
    head = (
        *("configuration", "precision", "GFLOP/image", "step, ms", "images/s", "GFLOP/s"),
        *("large product, GFLOP/s", "share", "share within its products"),
    )
    print(table(head, rates))
    print("Where the time of these steps goes (torch.profiler, own time of the operators):\n")
    print(table(("configuration", "precision", *KINDS, "other"), profiles))

    of_choices = names[-1] if args.quick else "the original"
    _, chosen = make(CONFIGURATIONS[of_choices], args.device)
    print(f"Choices of the step, {of_choices}, alternately ({chosen.precision} as it is):\n")
    rows = choices(args.device, precisions, args.repeats, of_choices, not args.quick)
    print(table(("step", "ms", "speed against the step as it is", ""), rows))

    turns = 4 * args.repeats
    real, memory, ratio = data_share(args.data, of_choices, args.device, turns, 10)
    print(f"Training on real images {real:.1f} images/s, on tensors in memory {memory:.1f}.\n")
    what = f"images/s of real training against tensors in memory ({args.device})"
    print(goals_table([(what, 0.95, ratio, turns)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
