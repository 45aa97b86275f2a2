"""A trial that is a part of a longer training: what NNI's Hyperband, BOHB and PBT ask of one.

Hyperband and BOHB give TRIAL_BUDGET, the epoch to end after (--stop-epoch). A configuration that is
promoted comes back as another trial with a larger one, and goes on from its own checkpoint. PBT gives
load_checkpoint_dir and save_checkpoint_dir: the trial goes on from the first with its own values, for
--epochs more, and leaves its checkpoint in the second.
"""

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import distributed_vit
from config_vit import UsageError, differences, saved_parameters
from data_vit import Data
from files_vit import link_or_copy, replace_file
from options_vit import make_parser
from utils_vit import (
    BEST,
    LAST,
    CheckpointError,
    TrainingState,
    load_checkpoint,
    load_newest,
)

# What PBT may change from one share of a training to the next; the sizes of the model it may not.
PBT_MAY_CHANGE = {
    "lr", "momentum", "weight_decay", "label_smoothing", "clip_grad", "dropout", "emb_dropout",
    "batch_size", "gamma", "flip", "affine", "crop", "color", "randaugment", "erase", "mixup", "cutmix",
    "precision",  # of auto, which follows from the batch size
}  # fmt: skip


def continue_earlier(args: argparse.Namespace, data: Data, output: Path) -> list[str]:
    """Start `output` as a copy of the longest whole run of the same configuration, if there is one.

    Looks at the trials beside this one; sets args.resume, and args.stop_epoch of a trial of PBT that starts
    again; makes save_checkpoint_dir. Returns what the log should say of it. Raises
    UsageError where PBT's checkpoint could not be left at the end.
    """
    if args.save_checkpoint_dir:
        try:
            args.save_checkpoint_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"save_checkpoint_dir {args.save_checkpoint_dir} cannot be made: {error.strerror}; "
                "give another folder"
            ) from None
    if args.resume and args.load_checkpoint_dir:  # how far this trial was to go is known by now
        args.stop_epoch = load_newest(args.resume)[0]["args"]["stop_epoch"]
    if args.stop_epoch is None or args.resume:
        return []
    notes = []
    for budget, folder in sorted(same_configuration(output, args.stop_epoch), reverse=True):
        try:
            check_whole(folder, args, data)
        except CheckpointError as error:
            notes.append(f"not continued from trial {folder.name}: {error}")
            continue
        copy_run(folder, output)
        args.resume = output / LAST
        return [*notes, f"continued from trial {folder.name}, which ended after epoch {budget}"]
    return [*notes, "from the first epoch on"] if notes else []


def same_configuration(output: Path, most: int) -> Iterator[tuple[int, Path]]:
    """Budgets up to `most` and folders of the trials beside `output` that NNI gave the same values."""
    # nni.json and not args.yaml: of hundreds of trials it is read in no time.
    mine = sampled(output)
    if mine is None:
        return
    for file in output.parent.glob("*/nni.json"):
        other = sampled(file.parent)
        if other and file.parent != output and other[0] == mine[0] and other[1] <= most:
            yield other[1], file.parent


def sampled(folder: Path) -> tuple[dict[str, Any], int] | None:
    """What NNI gave a trial, without and with its budget; None if it gave no budget."""
    try:
        parameters = json.loads((folder / "nni.json").read_text())["parameters"]
        return parameters, int(parameters.pop("TRIAL_BUDGET"))
    except (OSError, ValueError, KeyError):  # outside of NNI, not asked yet, another tuner
        return None


def check_whole(folder: Path, args: argparse.Namespace, data: Data) -> None:
    """Raises CheckpointError if the run in `folder` did not end, or is not one that this one continues."""
    if not (folder / "results.json").exists():
        raise CheckpointError("it did not come to its end")
    saved = load_checkpoint(folder / LAST)
    load_checkpoint(folder / BEST)
    if saved["args"]["epochs"] != args.epochs:
        raise CheckpointError(f"it had --epochs {saved['args']['epochs']}")
    if changes := differences(make_parser().with_defaults(saved["args"]), saved_parameters(args)):
        raise CheckpointError(f"it had other parameters: {changes}")
    if others := data.mismatch(saved):
        raise CheckpointError(f"it is of {others}")


def copy_run(source: Path, target: Path) -> None:
    """Copy a whole run into an empty folder; after a crash between the last two it goes on from the best."""
    if (source / "tensorboard").exists():  # somebody may have tidied up
        shutil.copytree(source / "tensorboard", target / "tensorboard", dirs_exist_ok=True)
    for name in ("metrics.jsonl", BEST, LAST):
        replace_file(target / name, (source / name).read_bytes())


def continue_member(state: TrainingState, args: argparse.Namespace, data: Data) -> list[str]:
    """PBT: take over weights, optimizer and epoch of load_checkpoint_dir, with this trial's own values.

    Sets args.stop_epoch, --epochs further on. Returns what the log should say. Raises CheckpointError.
    """
    file = args.load_checkpoint_dir / LAST
    saved = distributed_vit.from_rank_0(lambda: load_checkpoint(file) if file.exists() else None)
    if saved is None:  # the first step of the population
        args.stop_epoch = args.epochs
        return [f"{file} does not exist: from the first epoch on"]
    if saved["classes"] != data.classes:
        raise CheckpointError(f"checkpoint {file} is of other classes than the data")
    make_parser().given_by(str(file), saved["args"])  # raises UsageError for values out of range
    if changes := differences(
        *(
            {name: p[name] for name in p.keys() - PBT_MAY_CHANGE - {"load_checkpoint_dir"}}
            for p in (make_parser().with_defaults(saved["args"]), saved_parameters(args))
        )
    ):
        raise CheckpointError(f"checkpoint {file} is of other parameters: {changes}")
    if saved.get("fingerprints", data.fingerprints).get("val") != data.fingerprints["val"]:
        raise CheckpointError(
            f"checkpoint {file} may have been trained on images that are held out now: those have "
            "changed since"
        )
    state.load_state_dict(saved)
    if args.optimizer == "rmsprop" and args.momentum:  # RMSprop makes these at its first step only
        for moments in state.optimizer.state.values():
            moments.setdefault("momentum_buffer", torch.zeros_like(moments["square_avg"]))
    its_steps = math.ceil(saved["train_images"] / saved["args"]["batch_size"])
    epoch = saved["step"] // its_steps
    # The best of this share alone: PBT compares what its members can do now, not what they once could.
    state.best, state.outputs, state.epoch = None, [], epoch
    state.step = state.validated = epoch * data.train.steps(args.batch_size)
    args.stop_epoch = epoch + args.epochs
    return [f"continued from {file} after epoch {epoch}"]


def leave_checkpoint(args: argparse.Namespace, output: Path) -> None:
    """PBT: the checkpoint for whichever trial goes on from this one; whole or not at all."""
    if args.save_checkpoint_dir:
        link_or_copy(output / LAST, args.save_checkpoint_dir / LAST)
