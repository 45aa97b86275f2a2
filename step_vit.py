"""One step of training: the optimizer, and the gradient of a batch, in pieces where memory is short."""

import argparse
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import distributed_vit
import utils_vit
from data_vit import share_of
from stop_vit import OutOfMemory, RunFailed
from utils_vit import TrainingState

# How CUDA, its libraries (cuBLAS on a full GPU either way) and the allocator of host memory say it; torch's
# allocator on a GPU has an exception of its own.
OUT_OF_MEMORY = (
    *("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED"),
    *("CUDNN_STATUS_ALLOC_FAILED", "DefaultCPUAllocator"),
)
TOO_LARGE = "do not fit into memory: half the --vt-dim or --vt-depth takes half or less"


def make_optimizer(
    name: str, model: nn.Module, lr: float, weight_decay: float, momentum: float
) -> torch.optim.Optimizer:
    """adam, adamw, sgd or rmsprop; weight decay on the matrices of linear and convolution layers only.

    Norms, biases, embeddings and tokens are not decayed, as in the ViT paper's successors (DeiT, timm).
    """
    matrices = {
        module.weight for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)
    }
    groups = [
        {
            "params": [p for p in model.parameters() if p in matrices],
            "weight_decay": weight_decay,
        },
        {"params": [p for p in model.parameters() if p not in matrices], "weight_decay": 0.0},
    ]
    match name:
        case "adam":
            return without_compiler(torch.optim.Adam)(groups, lr, fused=True)
        case "adamw":
            return without_compiler(torch.optim.AdamW)(groups, lr, fused=True)
        case "sgd":
            sgd = without_compiler(torch.optim.SGD)(groups, lr, momentum=momentum, fused=True)
            # If the scaler skips the first step, the fused kernel goes on from a momentum that was
            # never written (torch to 2.14 at least): it must not be the kernel that skips.
            sgd._step_supports_amp_scaling = False
            return sgd
        case "rmsprop":
            return without_compiler(torch.optim.RMSprop)(groups, lr, momentum=momentum)
    raise ValueError(f"optimizer '{name}' is not adam, adamw, sgd or rmsprop")


def without_compiler(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """`kind` without its ties to torch.compile, whose import takes a second of every run."""
    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    methods["step"] = torch.no_grad()(inspect.unwrap(kind.step))
    return type(kind.__name__, (kind,), methods)


def training_step(
    state: TrainingState,
    images: Tensor,
    targets: Tensor,
    args: argparse.Namespace,
    soft: Tensor | None = None,
    batch_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One optimizer step; returns the loss (), the predicted classes (batch,) and the targets (batch,).

    The loss is against `targets` (batch,) or, where given, the probabilities `soft` (batch, classes).
    Of several processes each gives its part of the batch, `batch_size` is that of all parts, and what
    is returned is of all of them. A batch for which the GPU does not have enough memory is taken in more and
    more pieces, with the same gradient: each process for itself, before any waits for another. Raises
    OutOfMemory if a single image or the optimizer is too much, and RankLost.
    """
    labels = targets if soft is None else soft
    batch_size = batch_size or len(images)
    loss, predicted = in_pieces(
        state, args, len(images), lambda: gradient(state, images, labels, args, batch_size)
    )
    if distributed_vit.world_size() > 1:
        loss, predicted, targets = of_all_ranks(
            state.parameters, loss, predicted, targets, batch_size
        )
    state.scaler.unscale_(state.optimizer)
    if args.clip_grad:
        nn.utils.clip_grad_norm_(state.parameters, args.clip_grad)
    try:
        state.scaler.step(state.optimizer)
    except torch.OutOfMemoryError:  # its moments, at the first step: smaller pieces would not help
        raise OutOfMemory(f"the model and the moments of {args.optimizer} {TOO_LARGE}") from None
    state.scaler.update()
    state.step += 1
    if state.ema:
        state.ema.update(state.step)
    return loss, predicted, targets


def logits_of(state: TrainingState, images: Tensor, args: argparse.Namespace) -> Tensor:
    """Logits (batch, classes) of the selected model, in pieces where memory is short, as in training."""

    def forward() -> Tensor:
        parts = images.split(math.ceil(len(images) / state.pieces))
        with autocast(images.device, args.precision):
            return torch.cat([state.selected_model(part).float() for part in parts])

    return in_pieces(state, args, len(images), forward)


def in_pieces(
    state: TrainingState, args: argparse.Namespace, images: int, work: Callable[[], Any]
) -> Any:
    """What `work` returns, which takes `images` in `state.pieces`: as many as memory asks for.

    Raises OutOfMemory if a single image is too much.
    """
    while True:
        try:
            return work()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if state.pieces >= images:
                raise OutOfMemory(
                    f"a single image of {args.image_size} x {args.image_size} in {args.patch_num} x "
                    f"{args.patch_num} patches and its model {TOO_LARGE}, half the --patch-num a quarter"
                ) from None
            state.pieces *= 2
        if torch.cuda.is_initialized():  # cuBLAS takes its memory beside what torch keeps
            torch.cuda.empty_cache()


def out_of_memory(error: RuntimeError) -> bool:
    """Whether the device, or a CPU, had too little memory."""
    known = any(text in str(error) for text in OUT_OF_MEMORY)
    return known or isinstance(error, torch.OutOfMemoryError)


def gradient(
    state: TrainingState,
    images: Tensor,
    targets: Tensor,
    args: argparse.Namespace,
    batch_size: int,
) -> tuple[Tensor, Tensor]:
    """The gradient of the mean loss, added up over `state.pieces`; returns loss and predicted classes of this part.

    In float16 it is as many times as large as `state.scaler` says. `targets` are numbers (batch,) or
    probabilities (batch, classes).
    """
    ranks, rank = distributed_vit.world_size(), distributed_vit.rank()
    position = ("step", state.step, rank) if ranks > 1 else ("step", state.step)
    seed_dropout(images.device, utils_vit.seed_for(args.seed, *position))
    state.optimizer.zero_grad()
    if not len(images):
        # A short batch can leave a process without images. It adds a gradient of zero, to the same
        # parameters as the others.
        empty = images.new_zeros(1, *images.shape[1:])
        with autocast(images.device, args.precision):
            output = state.model(empty).float()
        (output.sum() * 0).backward()
        return output.new_zeros(()), output[:0].argmax(dim=1)
    size = math.ceil(len(images) / state.pieces)
    loss, predicted = torch.zeros((), device=images.device), []
    for part, part_targets in zip(images.split(size), targets.split(size), strict=True):
        with autocast(images.device, args.precision):
            output = state.model(part)
        part_loss = F.cross_entropy(
            output.float(), part_targets, label_smoothing=args.label_smoothing
        ) * (len(part) / batch_size)
        state.scaler.scale(part_loss).backward()
        loss += part_loss.detach()
        predicted.append(output.argmax(dim=1))
    return loss, torch.cat(predicted)


def of_all_ranks(
    parameters: list[nn.Parameter],
    loss: Tensor,
    predicted: Tensor,
    targets: Tensor,
    batch_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Make the gradient that of the whole batch; loss, predictions, targets of the whole, on every rank.

    One message for the gradient and what metrics need: every rank then knows what one process would,
    so checkpoints are the same whatever the number of ranks. Raises RankLost.
    """
    parameters = [p for p in parameters if p.grad is not None]
    own = share_of(batch_size, distributed_vit.rank(), distributed_vit.world_size())
    numbers = loss.new_zeros(2, batch_size)  # class numbers, exact up to 2^24
    numbers[:, own] = torch.stack([predicted, targets]).to(loss.dtype)
    gradients = [p.grad for p in parameters]
    *gradients, loss, numbers = distributed_vit.all_reduce_sum(*gradients, loss, numbers)
    for parameter, total in zip(parameters, gradients, strict=True):
        parameter.grad = total
    predicted, targets = numbers.long()
    return loss.clone(), predicted, targets  # a view would keep the whole message


def seed_dropout(device: torch.device, seed: int) -> None:
    """Seed the random numbers that a forward pass on this device draws."""
    # torch.manual_seed also notes a stack trace for GPUs not in use: 0.7 ms, a step may take 10.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def check_finite(state: TrainingState) -> None:
    """Raises RunFailed if a loss of this epoch, or a weight after its last step, is not finite."""
    finite = torch.stack([loss for loss, _, _ in state.outputs]).isfinite()
    if not torch.stack([weight.isfinite().all() for weight in state.parameters]).all():
        finite[-1] = False
    if not finite.all():
        step = state.step - len(finite) + int(finite.int().argmin()) + 1
        raise RunFailed(
            f"the loss is not finite at epoch {state.epoch + 1}, step {step}: {cure(state)}"
        )


def cure(state: TrainingState) -> str:
    """What to do about a loss that is not finite."""
    text = "a lower --lr may help"
    return f"{text}, or --precision float32" if state.scaler.is_enabled() else text


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision for the forward pass."""
    return torch.autocast(device.type, getattr(torch, precision), precision != "float32")
