"""Checkpoints, the training state, schedules, EMA and seeds: what a run needs beside its model."""

import copy
import hashlib
import io
import itertools
import math
import time
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from files_vit import link_or_copy, replace_file

CHECKPOINT_FORMAT = 1
# Keys of a checkpoint of any version, and their types.
CHECKPOINT_KEYS = {
    "model": dict, "ema": dict | None, "optimizer": dict, "outputs": dict | list, "best": dict | None,
    "epoch": int, "step": int, "validated": int, "args": dict, "classes": list,
}  # fmt: skip
# Not in those from before 2026-11-26, and some not in pretrained_vit.py's.
NEWER_KEYS = {
    "train_images": int, "val_images": int, "fingerprints": dict, "scaler": dict, "pieces": int
}  # fmt: skip
SEAL_LENGTH = len("sha256:") + 64
# In the folder of a run: the newest checkpoint, the one before it, and that of the best epoch.
LAST, PREVIOUS, BEST = "checkpoint.pth.tar", "previous.pth.tar", "model_best.pth.tar"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, foreign or of another model; the text is one line."""


def save_checkpoint(state: dict[str, Any], is_best: bool, filename: str | Path = LAST) -> None:
    """Write `state` to `filename`, whole or not at all; the best also to `model_best.pth.tar` beside it.

    The checkpoint that was there before stays as `previous.pth.tar`. Raises OSError (disk full,
    read-only folder); what was there before is then still whole.
    """
    filename = Path(filename)
    # torch.save into memory first: its zip writer turns a full disk into a RuntimeError without a cause.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = sealed(buffer)
    # The best first: after a crash in between, the run goes on with it, see `load_newest`.
    if is_best:
        replace_file(filename.with_name(BEST), content)
    if filename.exists():
        link_or_copy(filename, filename.with_name(PREVIOUS))
    replace_file(filename, content)


def sealed(archive: io.BytesIO) -> memoryview:
    """The zip archive of torch.save with its own SHA-256 as the comment that zip allows at its end."""
    content = archive.getbuffer()
    content[-2:] = SEAL_LENGTH.to_bytes(2, "little")  # the field for the length of the comment
    seal = b"sha256:" + hashlib.sha256(content).hexdigest().encode()
    content.release()
    archive.seek(0, io.SEEK_END)
    archive.write(seal)
    return archive.getbuffer()


def load_checkpoint(filename: str | Path) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote, on the CPU. Runs no code from the file. Raises CheckpointError."""
    try:
        content = Path(filename).read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {filename} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"checkpoint {filename} cannot be read: {error.strerror}") from None
    body, seal = memoryview(content)[:-SEAL_LENGTH], content[-SEAL_LENGTH:]
    foreign = CheckpointError(f"checkpoint {filename} is damaged or was not written by main_vit.py")
    if seal != b"sha256:" + hashlib.sha256(body).hexdigest().encode():
        raise foreign
    try:
        # Anybody can put a seal on anything, so what follows trusts nothing either.
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > len(content):
                raise foreign  # would unpack to more than it is
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
            raise foreign
        check_content(state)
        if any(
            t.numel() * t.element_size() > t.untyped_storage().nbytes() for t in tensors_in(state)
        ):
            raise foreign  # a large shape over a small storage
        weights = [w for key in ("model", "ema") for w in (state[key] or {}).values()]
        finite = all(w.isfinite().all() for w in weights)
    except Exception:  # what a hostile file makes zipfile or torch raise, and a KeyError
        raise foreign from None
    if not finite:
        raise CheckpointError(f"checkpoint {filename} holds weights that are not finite")
    return state


def check_content(state: dict[str, Any]) -> None:
    """Raises ValueError, or what another kind of content leads to, unless all is of the kinds that a run writes."""
    kinds = CHECKPOINT_KEYS | {k: kind for k, kind in NEWER_KEYS.items() if k in state}
    args, scaler = state["args"], state.get("scaler", {})
    right = [
        *(isinstance(state[key], kind) for key, kind in kinds.items()),
        *(0 <= state[key] < 2**63 for key in ("epoch", "step", "validated")),
        *(state.get(key, 1) >= 1 for key in ("train_images", "val_images", "pieces")),
        *(isinstance(name, str) for name in (*state["classes"], *state["model"], *scaler)),
        *(isinstance(value, int | float) for value in scaler.values()),
        # As args.yaml has them: no other spelling of a name, no nested choice of NNI.
        *(name.isidentifier() for name in args),
        *(isinstance(value, str | int | float | None) for value in args.values()),
        args.get("vt_depth", 0) <= len(state["model"]),  # else so many blocks would be built
    ]
    if not all(right):
        raise ValueError


def tensors_in(content: Any) -> Iterator[Tensor]:
    """All tensors in dicts, lists and tuples within each other."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict | list | tuple):
        for part in content.values() if isinstance(content, dict) else content:
            yield from tensors_in(part)


def load_newest(filename: Path) -> tuple[dict[str, Any], Path, str | None]:
    """The state to go on from at a checkpoint, its file, and what to say if that is another.

    If one of the run's own is damaged or missing that is the one before it, or the best. Either way it
    is the best if that is of a later moment (a crash between the two writes): the run would not know of
    the epoch that it is of. Raises CheckpointError.
    """
    source, reason = filename, f"{filename} is of an earlier moment"
    try:
        state = load_checkpoint(filename)
    except CheckpointError as error:
        if filename.name not in (LAST, PREVIOUS, BEST):  # mistyped, say
            raise
        state, reason = None, str(error)
        for source in (filename.with_name(name) for name in (PREVIOUS, BEST)):
            with suppress(CheckpointError):
                state = load_checkpoint(source)
                break
        if state is None:
            raise
    file = filename.with_name(BEST)
    with suppress(CheckpointError):  # missing, or damaged, and then a better one may replace it
        best = load_checkpoint(file)
        if (best["step"], best["validated"]) > (state["step"], state["validated"]):
            state, source = best, file
    return state, source, f"{reason}: going on from {source}" if source != filename else None


def selected_weights(state: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint that were validated: the averaged ones where the run had them."""
    return state["model"] if state["ema"] is None else state["ema"]


class Ema:
    """Exponential moving average of a model's weights, in `self.model`.

    The decay is warmed up as (1 + n) / (10 + n) (TensorFlow's ExponentialMovingAverage), so that a
    short run is not left with its initial weights.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        # Listed once: to walk two models takes longer than to average them.
        self.parameters = [list(m.parameters()) for m in (self.model, model)]
        self.buffers = [list(m.buffers()) for m in (self.model, model)]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights of the model after optimizer step number `step` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(*self.parameters, 1 - decay)  # as torch.optim.swa_utils does
        for average, value in zip(*self.buffers, strict=True):
            average.copy_(value)


class TrainingState:
    """Everything that a resumed run needs; what `state_dict` writes is what `load_state_dict` reads.

    Random numbers are not in it: they follow from (seed, epoch, sample) and (seed, step), see `seed_for`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema_decay: float,
        float16: bool = False,
    ) -> None:
        self.model = model
        self.parameters = list(model.parameters())  # listed once: to walk a model takes 0.1 ms
        self.optimizer = optimizer
        self.ema = Ema(model, ema_decay) if ema_decay else None
        # Small gradients would be 0 in float16 (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740).
        self.scaler = torch.amp.GradScaler(self.parameters[0].device.type, enabled=float16)
        self.epoch = 0  # the epoch under way
        self.step = 0  # optimizer steps taken
        self.validated = 0  # the step after which validation came last
        self.best: dict[str, Any] | None = None  # the metrics line of the best epoch
        self.pieces = 1  # parts that a batch is taken in, for want of memory
        # Of each step of the epoch under way: loss, predicted classes (batch,), targets (batch,).
        self.outputs: list[tuple[Tensor, Tensor, Tensor]] = []

    def epoch_under_way(self, steps_per_epoch: int) -> int:
        """Number (from 0) of the epoch to go on with: the one whose outputs are there, else the next."""
        return (self.step - bool(self.outputs)) // steps_per_epoch

    def is_done(self, total_steps: int) -> bool:
        """Whether all steps are taken, and validated."""
        return self.step >= total_steps and self.validated >= self.step

    def complete_epoch(self, line: dict[str, Any], is_best: bool, is_whole: bool) -> None:
        """Note that the epoch was validated with the metrics `line`; a whole one leaves no outputs."""
        if is_best:
            self.best = line
        self.validated = self.step
        if is_whole:
            self.outputs = []

    @property
    def selected_model(self) -> nn.Module:
        """The model that is validated, saved as the best and used afterwards."""
        return self.model if self.ema is None else self.ema.model

    def state_dict(self) -> dict[str, Any]:
        return {
            "format": CHECKPOINT_FORMAT,
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "validated": self.validated,
            "best": self.best,
            "pieces": self.pieces,
            "outputs": packed(self.outputs),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint of the same configuration. Raises CheckpointError if it is another."""
        try:
            self.model.load_state_dict(state["model"])
            if self.ema is not None:
                self.ema.model.load_state_dict(state["ema"])
            load_moments(self.optimizer, state["optimizer"])
            if state.get("scaler"):  # empty under other precisions, which one of PBT may go on from
                self.scaler.load_state_dict(state["scaler"])
            device = self.parameters[0].device
            outputs = [*unpacked(state["outputs"])]
            check_outputs(outputs)
            self.outputs = [tuple(t.to(device) for t in step) for step in outputs]
        except Exception as error:  # whatever content of other kinds and shapes leads to
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise CheckpointError(f"the checkpoint does not fit this model: {reason}") from None
        self.epoch, self.step, self.validated = state["epoch"], state["step"], state["validated"]
        self.best = state["best"]
        # With another number, sums would be taken in another order.
        self.pieces = state.get("pieces", 1)


# What the optimizer's step takes for granted of a parameter that it has stepped before.
MOMENTS = {
    "Adam": ("step", "exp_avg", "exp_avg_sq"), "AdamW": ("step", "exp_avg", "exp_avg_sq"),
    "RMSprop": ("step", "square_avg"), "SGD": (),
}  # fmt: skip


def load_moments(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Take over what `optimizer.state_dict()` gave: the moments, each of its parameter's shape, and the rate.

    Its other options are the run's own. The fused kernels would read and write beyond smaller moments.
    """
    own = optimizer.state_dict()
    own["state"] = {}
    for group, other in zip(own["param_groups"], saved["param_groups"], strict=True):
        group["lr"] = float(other["lr"])
    parameters = itertools.chain(*(group["params"] for group in optimizer.param_groups))
    for number, parameter in enumerate(parameters):  # as state_dict numbers them
        if not (moments := saved["state"].get(number)):
            continue
        if missing := {*MOMENTS[type(optimizer).__name__]} - moments.keys():
            raise ValueError(f"moments lack {', '.join(sorted(missing))}")
        own["state"][number] = new = {}
        for name, value in moments.items():
            new[name] = torch.empty(()) if name == "step" else torch.empty_like(parameter)
            if value.shape != new[name].shape:
                raise ValueError(f"{name} is {[*value.shape]}, its weight {[*parameter.shape]}")
            new[name].copy_(value)
    optimizer.load_state_dict(own)


def packed(outputs: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
    """The outputs of an epoch's steps as four tensors: three for each step would take seconds to save."""
    if not outputs:
        return {}
    losses, predicted, targets = zip(*outputs, strict=True)
    sizes = torch.tensor([len(part) for part in targets])
    parts = {"predicted": torch.cat(predicted), "targets": torch.cat(targets), "sizes": sizes}
    return {"losses": torch.stack(losses), **parts}


def unpacked(
    outputs: dict[str, Tensor] | list[tuple[Tensor, Tensor, Tensor]],
) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    """What `packed` packed; of checkpoints from before 2026-11-26 a list with logits (batch, classes)."""
    if isinstance(outputs, list):
        return [(loss, logits.argmax(dim=1), targets) for loss, logits, targets in outputs]
    if not outputs:
        return []
    sizes = outputs["sizes"].tolist()
    parts = (outputs[name].split(sizes) for name in ("predicted", "targets"))
    return zip(outputs["losses"], *parts, strict=True)


def check_outputs(outputs: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Raises ValueError unless each step has a loss () and as many predicted classes as targets (batch,)."""
    for loss, predicted, targets in outputs:
        kinds = {part.dtype for part in (predicted, targets)}
        shapes = {part.shape for part in (predicted, targets)}
        if loss.shape != () or shapes != {(len(targets),)} or kinds != {torch.int64}:
            raise ValueError("the outputs of a step are of other shapes")
        low, high = torch.stack([predicted, targets]).aminmax()
        if not (loss.is_floating_point() and low >= 0 and high < 2**24):
            raise ValueError("the outputs of a step are no loss and class numbers")


class Saver:
    """Writes the checkpoints of one run, after every epoch and every `steps` or `minutes` between."""

    def __init__(
        self, folder: Path, identity: dict[str, Any], steps: int | None, minutes: float | None
    ) -> None:
        self.file = folder / LAST
        self.identity = identity  # what a checkpoint says of its run beside the state
        self.steps, self.seconds = steps, minutes and minutes * 60
        self.saved_at = time.monotonic()
        for name in (LAST, PREVIOUS, BEST, "args.yaml", "metrics.jsonl", "results.json"):
            # Of a run that was killed while it wrote.
            (folder / f".{name}.tmp").unlink(missing_ok=True)

    def due(self, step: int) -> bool:
        """Whether it is time for a checkpoint between two epochs."""
        if self.steps and step % self.steps == 0:
            return True
        return bool(self.seconds) and time.monotonic() - self.saved_at >= self.seconds

    def save(self, state: TrainingState, is_best: bool = False) -> None:
        """Raises OSError; the checkpoints that were there before are then whole."""
        save_checkpoint(state.state_dict() | self.identity, is_best, self.file)
        self.saved_at = time.monotonic()


def adjust_learning_rate(
    optimizer: torch.optim.Optimizer,
    epoch: float,
    *,
    lr: float,
    epochs: float,
    scheduler: str,
    gamma: float | None = None,
    warmup_epochs: float | None = None,
) -> float:
    """Set and return the learning rate at the fractional `epoch` (from 0) of a run of `epochs` epochs.

    "step": lr * gamma^(whole epochs); "cosine": linear warm-up, then half a cosine down to 0
    (Loshchilov and Hutter 2017, https://arxiv.org/abs/1608.03983); "constant": lr.
    """
    if scheduler == "step":
        value = lr * gamma ** int(epoch)
    elif scheduler == "cosine" and epoch < warmup_epochs:
        value = lr * epoch / warmup_epochs
    elif scheduler == "cosine":
        progress = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-9)
        value = lr * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    else:
        value = lr
    for group in optimizer.param_groups:
        group["lr"] = value
    return value


def accuracy(output: Tensor, target: Tensor, topk: Iterable[int] = (1,)) -> list[float]:
    """Top-k accuracies in percent of logits (batch, classes) against targets (batch,).

    k beyond the number of classes raises ValueError, since it would always be 100 %.
    """
    topk = tuple(topk)
    if not topk or min(topk) < 1 or max(topk) > output.shape[1]:
        raise ValueError(f"topk {topk} does not lie within 1 to {output.shape[1]} classes")
    predicted = output.topk(max(topk), dim=1).indices  # (batch, max k), best first
    correct = predicted == target[:, None]
    return [100 * correct[:, :k].any(dim=1).float().mean().item() for k in topk]


def seed_for(*position: int | str) -> int:
    """A 63-bit seed from (run seed, purpose, epoch or step): the same position, the same numbers."""
    digest = hashlib.blake2b(repr(position).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
