"""What the processes of one run cost each other: one message a step against DistributedDataParallel's buckets.

python benchmarks/ranks.py

The same model, batch and optimizer both ways, in turn; medians over the rounds. It starts its processes itself.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import Parser, table
from timed import hardware

import distributed_vit
import main_vit
import nni_vit
import setup_vit
import step_vit
from config_vit import resolve
from data_vit import share_of

MODEL = "--vt-dim 256 --vt-depth 6 --mlp-dim 500 --batch-size 8"
STEPS = 5  # of a round


def measure(rounds: int) -> None:
    """One process's part; the first prints."""
    distributed_vit.start()
    args = resolve(main_vit.make_parser(), ["--num-classes=10", *MODEL.split()])
    device = setup_vit.choose_device(args, nni_vit.Trial(asked=False))
    part = share_of(args.batch_size, distributed_vit.rank(), distributed_vit.world_size())
    size = part.stop - part.start
    images = torch.randn(size, args.channel, args.image_size, args.image_size, device=device)
    targets = torch.arange(size, device=device) % args.num_classes
    ours, theirs = setup_vit.make_state(args, device), setup_vit.make_state(args, device)
    parallel = torch.nn.parallel.DistributedDataParallel(theirs.model, gradient_as_bucket_view=True)

    def one_message() -> None:
        step_vit.training_step(ours, images, targets, args, None, args.batch_size)
        distributed_vit.all_reduce_max(0, 0)  # the signals and the clock of main_vit.py

    def buckets() -> None:
        theirs.optimizer.zero_grad()
        with step_vit.autocast(device, args.precision):
            output = parallel(images)
        F.cross_entropy(output.float(), targets).backward()
        torch.nn.utils.clip_grad_norm_(theirs.model.parameters(), args.clip_grad)
        theirs.optimizer.step()

    ways: dict[str, Callable[[], None]] = {"one message": one_message, "DDP": buckets}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, step in ways.items():
            distributed_vit.wait_for_all()
            began = time.perf_counter()
            for _ in range(STEPS):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append((time.perf_counter() - began) / STEPS)
    began = time.perf_counter()
    for _ in range(200):
        distributed_vit.all_reduce_max(0, 0)
    agreement = (time.perf_counter() - began) / 200
    if distributed_vit.rank() == 0:
        count = sum(p.numel() for p in ours.model.parameters())
        print(
            f"{hardware()}\n\n{distributed_vit.world_size()} processes, {count:,} parameters, "
            f"{rounds} rounds of {STEPS} steps\n"
        )
        rows = [(n, f"{1000 * statistics.median(v[1:]):.2f}") for n, v in seconds.items()]
        rows.append(("agreement, in 'one message' of every step", f"{1000 * agreement:.3f}"))
        print(table(("way", "a step, ms"), rows))
    distributed_vit.end()


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="ranks.py", description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one round")
    args = parser.parse_args(argv)
    if args.processes < 2 or args.rounds < 1:
        parser.error("--processes is at least 2, --rounds at least 1")
    if distributed_vit.world_size() == 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        torchrun += ["--nproc-per-node", str(args.processes), __file__, *argv]
        os.execv(sys.executable, torchrun)
    measure(1 if args.quick else args.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
