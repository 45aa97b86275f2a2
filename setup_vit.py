"""What a run starts from: its folder, device and precision, images, model, and an earlier checkpoint."""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import data_vit
import nni_vit
import utils_vit
import vit
from config_vit import NOT_SAVED, UsageError, differences
from utils_vit import CheckpointError, TrainingState


def output_folder(args: argparse.Namespace, trial: nni_vit.Trial | None) -> Path:
    """Make the folder that this run alone writes to. Raises UsageError if it cannot be written."""
    if trial and trial.output_dir:
        folder = trial.output_dir
    elif args.resume:
        folder = args.resume.parent
        if args.model_dir and args.model_dir.resolve() != folder.resolve():
            raise UsageError(
                f"--resume continues in {folder}, the folder of its checkpoint: leave --model-dir out"
            )
    elif args.model_dir:
        folder = args.model_dir
    else:
        folder = Path("runs", f"{time.strftime('%Y%m%d-%H%M%S')}-{args.seed}")
    try:
        # Made only when the data is in order; until then its nearest parent shows if it can be.
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UsageError(
            f"output folder {folder} cannot be written: {error.strerror}; give --model-dir another"
        ) from None
    checkpoint = folder / "checkpoint.pth.tar"
    if checkpoint.exists() and not args.resume:
        # `nnictl resume` starts trials in flight again, in the folder that holds their checkpoint.
        if not (trial or args.auto_resume):
            raise UsageError(
                f"{folder} holds a run already: continue it with --resume {checkpoint} or "
                "--auto-resume, or give --model-dir another folder"
            )
        saved = utils_vit.load_newest(checkpoint)[0]["args"]
        args.num_classes = args.num_classes or saved["num_classes"]
        if changes := differences(saved, saved_parameters(args)):
            raise UsageError(f"{folder} holds a run with other parameters: {changes}")
        args.resume = checkpoint
    return folder


def choose_device(args: argparse.Namespace, trial: nni_vit.Trial | None) -> torch.device:
    """The device of the run, its number of threads, and the precision that `auto` stands for."""
    if args.threads:
        torch.set_num_threads(args.threads)
    gpus = torch.cuda.device_count()
    if gpus == 0:
        device = torch.device("cpu")
        capabilities = torch.cpu.get_capabilities()
        fast_bfloat16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    else:
        turn = nni_vit.trial_gpu(trial.sequence_id, gpus) if trial else 0
        device = torch.device("cuda", turn if args.gpu is None else args.gpu)
        fast_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
    if args.precision == "auto":
        args.precision = "bfloat16" if fast_bfloat16 else "float32"
    return device


def open_data(args: argparse.Namespace) -> data_vit.Data:
    """The images of --download-dir, or the demo."""
    data = data_vit.open_data(
        args.download_dir or data_vit.make_digits(),
        num_classes=args.num_classes,
        image_size=args.image_size,
        channels=args.channel,
        val_split=args.val_split,
        seed=args.seed,
        cache_dir=args.cache_dir or Path(os.path.expanduser("~/.cache/vit-nni")),
        workers=args.workers or len(os.sched_getaffinity(0)),
        skip_broken=args.skip_broken,
    )
    args.num_classes = len(data.classes)
    val_classes = np.unique(data.val.targets[data.val.indices])
    if args.metric == "auc" and len(val_classes) < args.num_classes:
        raise UsageError("--metric auc needs validation images of every class")
    return data


def make_state(args: argparse.Namespace, device: torch.device) -> TrainingState:
    """Model with fresh weights, optimizer and EMA from the parameters."""
    torch.manual_seed(utils_vit.seed_for(args.seed, "weights"))
    try:
        model = vit.build_model(
            args.arch, image_size=args.image_size, patch_size=args.patch_size, channels=args.channel,
            num_classes=args.num_classes, dim=args.vt_dim, depth=args.vt_depth, heads=args.vt_heads,
            mlp_dim=args.mlp_dim, dim_head=args.dim_head, pool=args.pool, dropout=args.dropout,
            emb_dropout=args.emb_dropout,
        ).to(device)  # fmt: skip
    except (RuntimeError, TypeError) as error:  # so many parameters that torch cannot hold them
        reason = str(error).splitlines()[0]
        raise UsageError(f"a model of these sizes cannot be built: {reason}") from None
    optimizer = utils_vit.make_optimizer(
        args.optimizer, model, args.lr, args.weight_decay, args.momentum
    )
    return TrainingState(model, optimizer, args.moving_average_decay)


def continue_run(state: TrainingState, file: Path, data: data_vit.Data) -> list[str]:
    """--resume: the whole state of a checkpoint; returns what the log should say of it.

    Raises CheckpointError if it is of another run.
    """
    saved, note = utils_vit.load_newest(file)
    if saved["classes"] != data.classes:
        raise CheckpointError(f"checkpoint {file} is of other classes than the data")
    if saved["train_images"] != len(data.train):
        raise CheckpointError(
            f"checkpoint {file} is of {saved['train_images']:,} training images, here are "
            f"{len(data.train):,}: --init-from starts a new run from its weights"
        )
    if saved["best"] and not file.with_name("model_best.pth.tar").exists():
        raise CheckpointError(
            f"{file.parent} has no model_best.pth.tar, which the run goes on with"
        )
    state.load_state_dict(saved)
    return [note] if note else []


def start_from(state: TrainingState, file: Path, classes: list[str]) -> list[str]:
    """--init-from: only the weights of a checkpoint; returns what the log should say of it."""
    saved = utils_vit.load_checkpoint(file)
    try:
        changes = vit.load_pretrained(
            state.model, utils_vit.selected_weights(saved), saved["classes"] == classes
        )
    except ValueError as error:
        raise CheckpointError(
            f"--init-from: {error}: give the model parameters that it was trained with"
        ) from None
    if state.ema:
        state.ema.model.load_state_dict(state.model.state_dict())
    return [f"init-from {file}: {change}" for change in changes or ["all weights as they were"]]


def saved_parameters(args: argparse.Namespace) -> dict[str, Any]:
    """What args.yaml and checkpoints hold: every parameter with an effect, as plain types."""
    values = {k: v for k, v in vars(args).items() if k not in NOT_SAVED and v is not None}
    return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}
