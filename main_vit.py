"""Train a Vision Transformer on a folder of images, by itself or as a trial of an NNI experiment.

python main_vit.py --download-dir DIR        one run
nnictl create --config config.yml            a search; every trial runs this file
"""

import argparse
import gc
import io
import itertools
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from tqdm import tqdm

import augment_vit
import budget_vit
import data_vit
import distributed_vit
import files_vit
import nni_vit
import report_vit
import setup_vit
import step_vit
import utils_vit
from config_vit import UsageError, resolve, saved_parameters
from distributed_vit import RankLost
from folder_vit import DataError, ImageLost, in_one_line, printable
from options_vit import make_parser
from stop_vit import OutOfMemory, RunFailed, Stopped, StopSignals, end_by_signal
from utils_vit import CheckpointError, TrainingState

log = logging.getLogger("vit")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status. Bad input is one line on stderr and status 2."""
    argv = sys.argv[1:] if argv is None else argv
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, by a daemon say
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files can be any bytes
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if distributed_vit.world_size() > 1:
            nni_vit.end_with_parent()
            distributed_vit.start()
        leads = distributed_vit.rank() == 0
        parser = make_parser()
        command_line = parser.given(argv)
        if "check" in command_line:
            import check_vit

            if len(command_line) > 1:
                raise UsageError("--check takes no other options: they belong into trialCommand")
            return check_vit.check(command_line["check"], parser)
        # NNI is asked for parameters before anything that can fail or take long.
        trial = nni_vit.Trial(leads and "request_from_nni" in command_line)
        if trial.inside and distributed_vit.world_size() > 1:
            nni_vit.end_with_grandparent()
        args = distributed_vit.from_rank_0(lambda: resolve(parser, argv, trial.ask()))
        # By now NNI has replaced sys.stdout.
        log.handlers = [logging.StreamHandler(sys.stdout) if leads else logging.NullHandler()]
        log.handlers[0].setFormatter(OneLine())
        log.propagate = False
        logging.raiseExceptions = False  # a full disk behind stdout, or a closed pipe
        log.setLevel(logging.INFO)
        logging.getLogger("matplotlib").setLevel(logging.WARNING)  # NNI logs every library's
        with ExitStack() as until_end:
            main_worker(args, trial, until_end)
        distributed_vit.end()
        return 0
    except (UsageError, DataError, CheckpointError) as error:
        alone = isinstance(error, ImageLost)
        complain(f"error: {in_one_line(error)}", alone)
        return 2
    except (RunFailed, RankLost) as error:
        text = f"{error}; what was saved before is whole"
        complain(text, alone=isinstance(error, OutOfMemory))
        return 1
    except RuntimeError as error:  # outside of the steps, which take a batch in pieces
        if not step_vit.out_of_memory(error):
            raise
        remedy = "a smaller --batch-size or model takes less"
        complain(
            f"the device has no memory left; what was saved before is whole; {remedy}", alone=True
        )
        return 1
    except OSError as error:
        remedy = (
            "what was saved before is whole: --resume its checkpoint.pth.tar once this is cured, or start "
            "again if there is none"
        )
        complain(f"{in_one_line(error)}; {remedy}", alone=True)
        return 1
    except KeyboardInterrupt:  # before training, when there is nothing to save
        end_by_signal(signal.SIGINT)


class OneLine(logging.Formatter):
    """One printable line a record: names of folders and classes can hold anything."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def complain(text: str, alone: bool) -> None:
    """Print an error: one that every rank raises rank 0 prints, one that this rank `alone` knows of this one."""
    if alone or distributed_vit.rank() == 0:
        print(f"main_vit.py: {text}", file=sys.stderr, flush=True)
    if not alone:
        distributed_vit.wait_for_all()  # torchrun ends all when one ends: rank 0 has printed by then


def main_worker(args: argparse.Namespace, trial: nni_vit.Trial, until_end: ExitStack) -> None:
    """One run, from the images to results.json.

    Of several processes all compute the same, and rank 0 alone writes, logs and reports. No other
    process writes to the run's folder `until_end`.
    """
    args, device, output, data, state = setup_vit.set_up(args, trial, until_end)
    until_end.enter_context(files_vit.full_disk_of(output))
    # Caught from here on: while a resumed trial tells NNI its curve again, an assessor may already stop it.
    signals = StopSignals()
    leads = distributed_vit.rank() == 0
    parameters = saved_parameters(args)
    for text in report_vit.describe(args, device, data, state.model, output, state.step):
        log.info(text)

    steps_per_epoch = data.train.steps(args.batch_size)
    last_epoch = args.stop_epoch or args.epochs
    total_steps = min(last_epoch * steps_per_epoch, args.max_steps or math.inf)
    trial.link_tensorboard()

    def tell_curve(lines: list[dict[str, Any]]) -> None:
        # One of PBT starts in the middle of a training, after another trial's epochs or none.
        under_way = state.epoch_under_way(steps_per_epoch) + 1
        earlier = {line["epoch"]: report_vit.nni_metrics(line, args.metric) for line in lines}
        trial.begin_curve(under_way, earlier, lambda: signals.received)

    finished = distributed_vit.from_rank_0(lambda: report_vit.has_results(output, state.step))
    if finished and state.is_done(total_steps):
        option = "--stop-epoch" if args.stop_epoch else "--epochs"
        option = "--max-steps" if total_steps == args.max_steps else option
        log.info(f"this run is finished: {output}/results.json; {option} makes it longer")
        if trial.inside:  # it may have ended before it had told all
            tell_curve(report_vit.lines_of(output))
            trial.finish(report_vit.final_metrics(args, state.best, output))
        return
    # Only whole epochs that a checkpoint knows of keep their line; any other will be run again.
    whole_epochs = state.validated // steps_per_epoch * steps_per_epoch
    if leads:
        files_vit.replace_file(output / "args.yaml", yaml.safe_dump(parameters).encode())
        done = state.is_done(total_steps)
        recorder = report_vit.Recorder(output, state.step if done else whole_epochs)
        tell_curve(recorder.lines)
        identity = {"args": parameters} | data.identity()
        saver = utils_vit.Saver(output, identity, args.checkpoint_steps, args.checkpoint_minutes)

    def check_signals() -> None:
        [signum] = distributed_vit.all_reduce_max(signals.received)
        if signum:
            raise Stopped(signum)

    def after_step() -> None:
        due = leads and saver.due(state.step)  # by the clock of rank 0
        signum, due = distributed_vit.all_reduce_max(signals.received, int(due))
        if signum or due:
            step_vit.check_finite(state)  # before anything is saved
        if signum:
            raise Stopped(signum)
        if due and leads:
            saver.save(state)

    try:
        while not state.is_done(total_steps):
            pieces = state.pieces
            state.epoch = state.epoch_under_way(steps_per_epoch)
            line, is_best = one_epoch(
                state, data, args, device, total_steps, after_step, check_signals
            )
            if leads:
                recorder.epoch(line)
                if state.epoch == 0:
                    recorder.first_batch(next(epoch_batches(state, data.train, args, device))[0])
                saver.save(state, is_best)
            [state.pieces] = distributed_vit.all_reduce_max(state.pieces)
            if state.pieces > pieces:
                log.info(f"memory was short: batches are now taken in {state.pieces} pieces")
            log.info(report_vit.epoch_text(line, last_epoch, is_best))
            metrics = report_vit.nni_metrics(line, args.metric)
            trial.report(line["epoch"], metrics, last=state.is_done(total_steps))
        results = results_of(state, data, args, device, check_signals, output)
    except Stopped as stopped:
        if leads and not state.is_done(total_steps):
            saver.save(state)  # else all is saved already
        log.info(
            f"stopped at step {state.step}; continue with --resume {output}/checkpoint.pth.tar"
        )
        if state.best and not args.save_checkpoint_dir:  # PBT goes on from whole shares
            trial.finish(report_vit.nni_metrics(state.best, args.metric))
        end_by_signal(*stopped.args)
    if leads:
        # Before results.json, which says that all is done.
        budget_vit.leave_checkpoint(args, output)
        recorder.close(results)
    for text in report_vit.results_text(results, output):
        log.info(text)
    if trial.inside:
        trial.finish(report_vit.final_metrics(args, state.best, output))


def one_epoch(
    state: TrainingState,
    data: data_vit.Data,
    args: argparse.Namespace,
    device: torch.device,
    total_steps: int,
    after_step: Callable[[], None],
    after_batch: Callable[[], None],
) -> tuple[dict[str, Any], bool]:
    """Train what is left of epoch number `state.epoch` (from 0) and validate; `state` then knows the best.

    Returns the line of metrics.jsonl and whether the epoch is the best so far. One that --max-steps cut
    short is so only until there is a whole one: a run that goes on after it selects as one in one go.
    """
    line: dict[str, Any] = {"epoch": state.epoch + 1}
    line |= train(state, data.train, args, device, total_steps, after_step)
    metrics, _, _ = validate(state, data.val, args, device, after_batch)
    line |= {f"val_{name}": value for name, value in metrics.items()}
    steps_per_epoch = data.train.steps(args.batch_size)
    is_whole = state.step % steps_per_epoch == 0
    if state.best is None or state.best["step"] % steps_per_epoch:
        is_best = True
    else:
        is_best = is_whole and report_vit.improves(args.metric, line, state.best)
    state.complete_epoch(line, is_best, is_whole)
    return line, is_best


def train(
    state: TrainingState,
    split: data_vit.Split,
    args: argparse.Namespace,
    device: torch.device,
    total_steps: int,
    after_step: Callable[[], None],
) -> dict[str, float]:
    """Train what is left of epoch number `state.epoch` (from 0); returns its metrics.

    Calls `after_step` between steps. Raises RunFailed with the epoch and step if the loss is not finite.
    """
    # Once an epoch: machines of different make round differently and would drift apart.
    distributed_vit.broadcast(*state.model.state_dict().values())
    steps_per_epoch = split.steps(args.batch_size)
    start = state.step - state.epoch * steps_per_epoch
    batches = epoch_batches(state, split, args, device, start)
    batches = itertools.islice(batches, max(0, total_steps - state.step))
    state.model.train()
    began, images_seen = time.perf_counter(), 0
    for images, targets, soft in tqdm(
        batches,
        f"epoch {state.epoch + 1}",
        steps_per_epoch,
        initial=start,
        leave=False,
        disable=True if distributed_vit.rank() else None,
    ):
        # At the middle of the step: neither the first nor the last one is lost to a rate of 0.
        utils_vit.adjust_learning_rate(
            state.optimizer, (state.step + 0.5) / steps_per_epoch, lr=args.lr,
            epochs=args.epochs, scheduler=args.scheduler,
            gamma=args.gamma, warmup_epochs=args.warmup_epochs,
        )  # fmt: skip
        position = (state.step - state.epoch * steps_per_epoch) * args.batch_size
        batch_size = min(args.batch_size, len(split) - position)
        state.outputs.append(step_vit.training_step(state, images, targets, args, soft, batch_size))
        images_seen += batch_size
        # To look at the loss is to wait for the GPU, so there it is done every 50 steps only.
        if (device.type == "cpu" or state.step % 50 == 0) and not state.outputs[-1][0].isfinite():
            break
        after_step()
    step_vit.check_finite(state)
    seconds = time.perf_counter() - began

    losses, predicted, targets = zip(*state.outputs, strict=True)
    weights = torch.tensor([len(part) for part in targets], device=device)
    loss = (torch.stack(losses) * weights).sum().item() / weights.sum().item()
    numbers = (torch.cat(parts).cpu().numpy() for parts in (predicted, targets))
    metrics = report_vit.accuracies(*numbers)
    return {
        "step": state.step,
        "train_loss": loss,
        **{f"train_{name}": value for name, value in metrics.items()},
        "lr": state.optimizer.param_groups[0]["lr"],
        "images_per_second": images_seen / seconds,
        "seconds": seconds,
    }


def epoch_batches(
    state: TrainingState,
    split: data_vit.Split,
    args: argparse.Namespace,
    device: torch.device,
    start: int = 0,
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """The batches of epoch number `state.epoch` from batch `start` on, the same whenever asked for."""
    return data_vit.training_batches(
        split, args.batch_size, device, augment_vit.Augmentation.of(args), num_classes=args.num_classes,
        seed=utils_vit.seed_for(args.seed, "epoch", state.epoch), start=start,
        rank=distributed_vit.rank(), ranks=distributed_vit.world_size(),
    )  # fmt: skip


@torch.no_grad()
def validate(
    state: TrainingState,
    split: data_vit.Split,
    args: argparse.Namespace,
    device: torch.device,
    after_batch: Callable[[], None],
) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """Every image of the split once, through the selected weights; calls `after_batch` between batches.

    Returns the metrics, the probabilities (images, classes) and the targets (images,).
    """
    state.selected_model.eval()
    logits = torch.zeros(len(split), args.num_classes, device=device)
    for images, _, positions in data_vit.batches(
        split, max(args.batch_size, 64), device,
        rank=distributed_vit.rank(), ranks=distributed_vit.world_size(),
    ):  # fmt: skip
        if len(images):
            logits[positions[0] : positions[-1] + 1] = step_vit.logits_of(state, images, args)
        after_batch()
    [logits] = distributed_vit.all_reduce_sum(logits)  # each row is zero on all ranks but one
    targets = split.targets[split.indices]
    loss = F.cross_entropy(logits, torch.from_numpy(targets).to(device)).item()
    if not math.isfinite(loss):
        raise RunFailed(
            f"the loss on held-out images is not finite after epoch {state.epoch + 1}, "
            f"step {state.step}: {step_vit.cure(state)}"
        )
    probabilities = logits.cpu().double().softmax(dim=1).numpy()
    return {"loss": loss, **report_vit.measure(probabilities, targets)}, probabilities, targets


def results_of(
    state: TrainingState,
    data: data_vit.Data,
    args: argparse.Namespace,
    device: torch.device,
    after_batch: Callable[[], None],
    output: Path,
) -> dict[str, Any]:
    """What results.json holds: the best epoch and, read here and only here, the test images."""
    best = output / utils_vit.BEST
    state.selected_model.load_state_dict(
        distributed_vit.from_rank_0(
            lambda: utils_vit.selected_weights(utils_vit.load_checkpoint(best))
        )
    )
    _, *held_out = validate(state, data.val, args, device, after_batch)
    test = None
    if data.test:
        metrics, probabilities, targets = validate(state, data.test, args, device, after_batch)
        test = metrics | report_vit.evaluation_report(probabilities, targets, data.classes)
    return {
        "metric": args.metric,
        "best_epoch": state.best["epoch"],
        "validation": {k.removeprefix("val_"): v for k, v in state.best.items() if k[:4] == "val_"},
        "validation_confusion_matrix": report_vit.confusion_matrix(*held_out).tolist(),
        "test": test,
        "classes": data.classes,
        "images": {"train": len(data.train), "val": len(data.val), "test": len(data.test or ())},
        "model_parameters": sum(p.numel() for p in state.model.parameters()),
        "steps": state.step,
        "device": str(device),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    if any(word.partition("=")[0] == "--check" for word in sys.argv):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # main_vit.py --check config.yml | head
    status = main()
    gc.freeze()  # else Python looks through all objects of torch once more at its end: half a second
    sys.exit(status)
