"""What a run starts from: its folder, device and precision, images, model, and an earlier checkpoint."""

import argparse
import itertools
import math
import os
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import budget_vit
import cache_vit
import data_vit
import demo_vit
import distributed_vit
import files_vit
import machine_vit
import nni_vit
import report_vit
import step_vit
import utils_vit
import vit
from config_vit import UsageError, model_sizes
from folder_vit import DataError
from output_vit import output_folder
from utils_vit import CheckpointError, TrainingState


def set_up(
    args: argparse.Namespace, trial: nni_vit.Trial, until_end: ExitStack
) -> tuple[argparse.Namespace, torch.device, Path, data_vit.Data, TrainingState]:
    """All that training needs; the parameters come back complete, and the same on all ranks."""
    decided_here = {"precision": "auto", "threads": None}
    undecided = {name for name, value in decided_here.items() if getattr(args, name) == value}
    concurrency = distributed_vit.from_rank_0(trial.concurrency)
    device = distributed_vit.together(lambda: choose_device(args, trial, concurrency))
    output, args = distributed_vit.from_rank_0(
        lambda: (output_folder(args, trial, undecided, until_end), args)
    )
    torch.set_num_threads(args.threads)
    data = distributed_vit.together(lambda: open_images(args, concurrency))
    everywhere = distributed_vit.all_gather((device.type, data.fingerprints))
    for rank, (kind, others) in enumerate(everywhere):
        if kind != device.type:  # they would wait for each other's messages on another device
            raise UsageError(
                f"rank {rank} computes on {kind}, rank {distributed_vit.rank()} on {device.type}: "
                "CUDA_VISIBLE_DEVICES= on all machines trains on their CPUs"
            )
        if others != data.fingerprints:  # on another machine, with a folder of its own
            raise DataError(
                f"rank {rank} has other images, by their names, than rank {distributed_vit.rank()}: "
                "give all machines the same folder, or copies of it"
            )
    notes, args = distributed_vit.from_rank_0(
        lambda: (budget_vit.continue_earlier(args, data, output), args)
    )
    state = make_state(args, device)
    if args.resume:
        saved, note = distributed_vit.from_rank_0(lambda: load_run(args.resume, data))
        state.load_state_dict(saved)
        notes += [note] if note else []
    elif args.load_checkpoint_dir:
        notes += budget_vit.continue_member(state, args, data)
    if args.init_from and not state.step:
        notes += start_from(state, args, data)
    if not computes_in(args.precision, device):  # a run from another machine, say
        remedy = "" if args.resume else ": --precision float32"  # which a resume would refuse
        notes.append(f"{args.precision} is slow here, without instructions for it{remedy}")
    # Whichever process was first on its machine has decoded the images, and says so.
    notes = dict.fromkeys(itertools.chain(*distributed_vit.all_gather(data.notes + notes)))
    return args, device, output, replace(data, notes=[*notes]), state


def choose_device(
    args: argparse.Namespace, trial: nni_vit.Trial, concurrency: int = 1
) -> torch.device:
    """The device of the run, ready to compute on: with its number of threads and its kind of algorithms.

    Sets args.threads, and args.precision where it is `auto`. `concurrency` is the number of trials at a time.
    """
    if args.threads is None:
        # In args.yaml then: sums depend, in their last bits, on how many threads share them.
        given = "OMP_NUM_THREADS" in os.environ
        args.threads = machine_vit.default_threads(
            machine_vit.usable_cores(), torch.get_num_threads(), concurrency, given
        )
    torch.set_num_threads(args.threads)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Else torch would fill new memory, which is always written before it is read.
        torch.utils.deterministic.fill_uninitialized_memory = False
    gpu = choose_gpu(args, trial)
    if gpu is None:
        device = torch.device("cpu")
        machine_vit.keep_freed_memory()
    else:
        device = torch.device("cuda", gpu)
        start_gpu(device, args.deterministic)
    if args.precision == "auto":
        args.precision = fastest_precision(device, args)
    return device


def usable_gpus() -> int:
    """The number of CUDA devices that torch can use.

    torch.cuda.device_count also counts GPUs whose driver is too old, and whole cards where MIG has split them.
    """
    return torch._C._cuda_getDeviceCount() if torch.cuda.is_available() else 0


def choose_gpu(args: argparse.Namespace, trial: nni_vit.Trial) -> int | None:
    """The number of the GPU of this process, None if there is no GPU. Raises UsageError."""
    gpus, ranks = usable_gpus(), distributed_vit.world_size()
    if ranks > 1 and args.gpu is not None:
        raise UsageError("--gpu is for one process; torchrun gives each of its processes a GPU")
    if ranks > 1 and 0 < gpus < int(os.environ["LOCAL_WORLD_SIZE"]):
        raise UsageError(
            f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes, but torch sees {gpus} GPUs: "
            f"--nproc-per-node {gpus}, or CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    if args.gpu is not None:
        check_gpu(args.gpu)
        return args.gpu
    if gpus == 0:
        return None
    if ranks > 1:
        return int(os.environ["LOCAL_RANK"])
    if not trial.inside or gpus == 1:
        return 0
    return nni_vit.least_used_gpu(trial.output_dir.parent, trial.sequence_id, gpus)


def check_gpu(number: int) -> None:
    """Raises UsageError if this machine has no such GPU."""
    if number >= (gpus := usable_gpus()):
        raise UsageError(
            f"--gpu {number}: torch sees {gpus} CUDA devices here; leave --gpu out to use what there is"
        )


def start_gpu(device: torch.device, deterministic: bool = False) -> None:
    """Make it the GPU of this process. Raises UsageError if torch cannot compute on it."""
    # cuDNN's attention, which torch prefers on recent GPUs, takes a part of a second to plan each new shape.
    # The others, with warn_only, would only warn that their backward is not deterministic.
    for kernel in ("cudnn", "flash", "mem_efficient") if deterministic else ("cudnn",):
        getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(False)
    try:
        torch.cuda.set_device(device)
        torch.zeros(1, device=device).add_(1).item()
    except RuntimeError as error:  # too old for this torch, or held by another process alone
        if step_vit.out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"torch {torch.__version__} cannot compute on {device}: {reason}; CUDA_VISIBLE_DEVICES= "
            "trains on the CPU"
        ) from None


# A CPU computes a step faster in bfloat16 from 6 million of batch x patches x dim^2 on, as measured for
# dims of 32 to 256: below, casting takes longer than the smaller products save.
BFLOAT16_PAYS = 6e6


def fastest_precision(device: torch.device, args: argparse.Namespace) -> str:
    """The precision in which the device computes the steps of a run fastest."""
    if device.type == "cuda":
        # bfloat16 where it can be had: it needs no scaling of the gradient.
        return next(p for p in ("bfloat16", "float16", "float32") if computes_in(p, device))
    work = args.batch_size * args.patch_num**2 * args.vt_dim**2
    pays = computes_in("bfloat16", device) and work >= BFLOAT16_PAYS
    return "bfloat16" if pays else "float32"


# Of a GPU the compute capability, of a CPU the instructions; without them a CPU takes hundreds of times as long.
TENSOR_CORES = {"bfloat16": (8, 0), "float16": (7, 0)}
CPU_INSTRUCTIONS = {
    "bfloat16": ("avx512_bf16", "amx_bf16"),
    "float16": ("avx512_fp16", "amx_fp16"),
}


def computes_in(precision: str, device: torch.device) -> bool:
    """Whether the device has instructions for products in this precision."""
    if precision == "float32":
        return True
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= TENSOR_CORES[precision]
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in CPU_INSTRUCTIONS[precision])


def open_images(args: argparse.Namespace, concurrency: int = 1) -> data_vit.Data:
    """The images of --download-dir, or the demo, on the GPU that was chosen if they fit; sets args.num_classes.

    Raises DataError, and UsageError where --metric auc lacks a class in validation.
    """
    data = data_vit.open_data(
        args.download_dir or demo_vit.make_digits(),
        num_classes=args.num_classes,
        image_size=args.image_size,
        channels=args.channel,
        val_split=args.val_split,
        seed=args.seed,
        cache_dir=args.cache_dir or cache_vit.default_folder(),
        workers=args.workers or decoding_threads(args),
        skip_broken=args.skip_broken,
        cache=args.cache,
        cache_limit=args.cache_limit,
    )
    if torch.cuda.is_available() and args.cache != "off":  # which decodes in every epoch
        device = torch.device("cuda", torch.cuda.current_device())
        # Trials that start together see the same memory free. Where NNI gives each a GPU of its own this
        # leaves more free than it has to.
        trials = math.ceil(concurrency / usable_gpus())
        data = data_vit.keep_on_device(data, device, torch.cuda.mem_get_info(device)[0] // trials)
    args.num_classes = len(data.classes)
    val_classes = np.unique(data.val.targets[data.val.indices])
    if args.metric == "auc" and len(val_classes) < args.num_classes:
        raise UsageError("--metric auc needs validation images of every class")
    return data


def decoding_threads(args: argparse.Namespace) -> int:
    """Threads that decode images: all cores, since trials that start together wait for one that decodes.

    Without a cache each process decodes for itself.
    """
    cores = machine_vit.usable_cores()
    if args.cache != "off":
        return cores
    if distributed_vit.world_size() == 1:
        return args.threads
    # torchrun gives each of its processes one thread to compute with, too few to feed a GPU.
    return max(args.threads, cores // int(os.environ["LOCAL_WORLD_SIZE"]))


def make_state(args: argparse.Namespace, device: torch.device) -> TrainingState:
    """Model with fresh weights, optimizer and EMA from the parameters."""
    torch.manual_seed(utils_vit.seed_for(args.seed, "weights"))
    try:
        model = vit.build_model(
            args.arch, num_classes=args.num_classes, depth=args.vt_depth, **model_sizes(args)
        ).to(device)
    except (RuntimeError, TypeError) as error:  # so many parameters that torch cannot hold them
        if step_vit.out_of_memory(error):  # others may have the memory of the GPU
            raise
        reason = str(error).splitlines()[0]
        raise UsageError(f"a model of these sizes cannot be built: {reason}") from None
    if distributed_vit.world_size() > 1:
        norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        if any(isinstance(module, norms) for module in model.modules()):
            raise UsageError(
                f"arch {args.arch} has batch normalization, which would see a part of each batch in "
                "each of torchrun's processes: train it in one"
            )
    optimizer = step_vit.make_optimizer(
        args.optimizer, model, args.lr, args.weight_decay, args.momentum
    )
    return TrainingState(model, optimizer, args.moving_average_decay, args.precision == "float16")


def load_run(file: Path, data: data_vit.Data) -> tuple[dict[str, Any], str | None]:
    """--resume: the checkpoint that a run with these data goes on with, and what the log should say of it.

    If it is another than the last one it takes the place of that. Raises CheckpointError.
    """
    saved, source, note = utils_vit.load_newest(file)
    if others := data.mismatch(saved):  # it may have been trained on what it would be selected on
        raise CheckpointError(
            f"checkpoint {file} is of {others}: --init-from starts a new run from its weights"
        )
    last = file.with_name(utils_vit.LAST)
    with suppress(CheckpointError):  # missing or damaged, and then this one takes its place
        newest = utils_vit.load_checkpoint(last) if file != last else saved
        if (newest["step"], newest["validated"]) > (saved["step"], saved["validated"]):
            raise UsageError(
                f"{file.name} is of an earlier moment than {last}, which would be lost: --resume that, or "
                f"start a new run by --init-from {file}"
            )
    if saved["best"] is not None:  # better found out now than at the end
        if not report_vit.is_line(saved["best"]):
            raise CheckpointError(f"checkpoint {source} is damaged: its best epoch has no metrics")
        file_of_best = file.with_name(utils_vit.BEST)
        try:
            best = utils_vit.load_checkpoint(file_of_best)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}, and {source.name} goes on only beside it: --init-from starts a new run from "
                "its weights"
            ) from None
        if best["best"] != saved["best"]:
            raise CheckpointError(
                f"{file_of_best} is not of epoch {saved['best']['epoch']}, the best that {source} knows "
                "of: bring the files of one moment together"
            )
    if source != file and file.name == utils_vit.LAST:
        with suppress(OSError):  # else the next save would keep the damaged one as the one before
            files_vit.link_or_copy(source, file)
    return saved, note


def start_from(state: TrainingState, args: argparse.Namespace, data: data_vit.Data) -> list[str]:
    """--init-from: only the weights of a checkpoint; returns what the log should say of it."""
    file = args.init_from

    def load() -> tuple[dict[str, Any], list[str], str, dict[str, Tensor]]:
        saved = utils_vit.load_checkpoint(file)
        held_out = saved.get("fingerprints", data.fingerprints).get("val")
        return saved["args"], saved["classes"], held_out, utils_vit.selected_weights(saved)

    saved_args, saved_classes, held_out, weights = distributed_vit.from_rank_0(load)
    try:
        # With another one weights can have the same shapes.
        for name in ("arch", "vt_heads", "dim_head", "pool"):
            own, other = getattr(args, name), saved_args.get(name)
            if own != other:
                raise ValueError(f"{name} is {own} here and {other} in the checkpoint")
        changes = vit.load_pretrained(state.model, weights, saved_classes == data.classes)
    except ValueError as error:
        raise CheckpointError(
            f"--init-from: {error}: give the parameters that its model was trained with, as --config "
            f"{file.with_name('args.yaml')} does"
        ) from None
    if state.ema:
        state.ema.model.load_state_dict(state.model.state_dict())
    own_folder = None if args.download_dir is None else str(args.download_dir)
    if saved_args.get("download_dir") == own_folder and held_out != data.fingerprints["val"]:
        changes.append(
            "it may have been trained on images that are held out now, and validation look too good: "
            "keep --seed, --val-split and the images, or make a val/"
        )
    return [f"init-from {file}: {change}" for change in changes or ["all weights as they were"]]
