"""Train a Vision Transformer on a folder of images, by itself or as a trial of an NNI experiment.

python main_vit.py --download-dir DIR        one run
nnictl create --config config.yml            a search; every trial runs this file
"""

import argparse
import io
import logging
import math
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from tqdm import tqdm

import data_vit
import nni_vit
import report_vit
import setup_vit
import utils_vit
from config_vit import LEARNING_RATE, Parser, UsageError, number, resolve
from images_vit import DataError
from utils_vit import CheckpointError, RunFailed, Stopped, StopSignals, TrainingState

log = logging.getLogger("vit")


def make_parser() -> Parser:
    """The command line; every default is shown here, derived ones are filled in by `resolve`."""
    # fmt: off
    parser = Parser(
        prog="main_vit.py", description=__doc__.splitlines()[0], allow_abbrev=False,
        epilog="Values come, later over earlier, from: defaults, --config, the command line, NNI.",
    )
    positive, share = number(int, 1), number(float, 0, 1)

    add = parser.add_argument_group("data").add_argument
    add("--download-dir", type=Path, metavar="DIR", help="folder with train/ and, if there are, val/ and test/, or with class folders directly (default: the digits demo, written to ./dataset/digits)")
    add("--num-classes", type=number(int, 2), metavar="N", help="must be the number of class folders (default: that number)")
    add("-s", "--image-size", type=positive, metavar="PIXELS", help="images are resized to this square (default: 224; demo 16)")
    add("-ch", "--channel", type=int, choices=(1, 3), help="1 reads grey, 3 reads RGB (default: 3; demo 1)")
    add("--val-split", type=number(float, 0, 0.9, above=True), metavar="SHARE", help="part of train/ to select on; given, it wins over val/ (default: val/, else 0.1; demo 0.2)")
    add("--flip", choices=tuple(data_vit.FLIPS), default="none", help="random flips in training (default: %(default)s)")
    add("--affine", type=share, metavar="SHARE", default=0.0, help="random rotation, scale and shift in training; 1 is up to 45 degrees, a factor of 2 and half the side (default: %(default)s)")
    add("--skip-broken", action="store_true", help="leave out images that cannot be decoded, instead of ending")
    add("--cache-dir", type=Path, metavar="DIR", help="where decoded images are kept for later runs (default: ~/.cache/vit-nni)")
    add("--workers", type=positive, metavar="N", help="threads that decode images (default: cores)")

    add = parser.add_argument_group("model").add_argument
    add("-a", "--arch", default="vit", help="vit, or another architecture of vit-pytorch: simple_vit, deepvit, cait, ... (default: %(default)s)")
    add("-p", "--patch-size", type=positive, metavar="PIXELS", help="side of a patch (default: 16; demo 4)")
    add("-pn", "--patch-num", type=positive, metavar="N", help="patches per side: patch size = image size / N")
    add("-vd", "--vt-dim", type=positive, metavar="N", default=256, help="width of the tokens (default: %(default)s)")
    add("-d", "--vt-depth", type=positive, metavar="N", default=6, help="transformer blocks (default: %(default)s)")
    add("-vh", "--vt-heads", type=positive, metavar="N", default=8, help="attention heads (default: %(default)s)")
    add("--dim-head", type=positive, metavar="N", help="width of a head (default: vt-dim / vt-heads, rounded down)")
    add("-mlpd", "--mlp-dim", type=positive, metavar="N", default=512, help="hidden width of the feed-forward (default: %(default)s)")
    add("--pool", choices=("cls", "mean"), help="what the head reads: class token or mean of the patches (default: cls)")
    add("--dropout", type=share, metavar="SHARE", help="in attention and feed-forward (default: 0)")
    add("--emb-dropout", type=share, metavar="SHARE", help="after the position embedding (default: 0)")

    add = parser.add_argument_group("training").add_argument
    add("-e", "--epochs", type=positive, metavar="N", default=20, help="passes over the training images (default: %(default)s)")
    add("--max-steps", type=positive, metavar="N", help="end after this many optimizer steps, validate and save")
    add("-b", "--batch-size", type=positive, metavar="N", default=32, help="images per step (default: %(default)s)")
    add("--optimizer", choices=tuple(LEARNING_RATE), default="adamw", help="(default: %(default)s)")
    add("--lr", "--learning-rate", type=number(float, 0, above=True), metavar="RATE", help="peak learning rate (default: 5e-4; sgd 2e-2, rmsprop 2e-4)")
    add("--momentum", type=share, metavar="SHARE", default=0.9, help="of sgd and rmsprop (default: %(default)s)")
    add("--wd", "--weight-decay", dest="weight_decay", type=number(float, 0), metavar="RATE", help="on weight matrices only (default: 0.05 for adamw, else 1e-4)")
    add("--label-smoothing", type=share, metavar="SHARE", default=0.0, help="(default: %(default)s)")
    add("--clip-grad", type=number(float, 0), metavar="NORM", default=1.0, help="largest gradient norm, 0 for no limit (default: %(default)s)")
    add("--moving-average-decay", type=share, metavar="SHARE", default=0.0, help="EMA of the weights, then validated and saved instead; 0 for none (default: %(default)s)")
    add("--seed", type=number(int, 0, 2**63 - 1), metavar="N", default=0, help="of everything random (default: %(default)s)")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="bfloat16 is mixed precision; auto takes it where the device gains from it (default: %(default)s)")
    add("--gpu", type=number(int, 0), metavar="N", help="CUDA device (default: the first if there is one, else the CPU)")
    add("--threads", type=positive, metavar="N", help="CPU threads of the computation (default: torch's)")
    add("--metric", choices=tuple(report_vit.METRICS), default="accuracy", help="of validation: selects the best epoch, is NNI's default metric (default: %(default)s)")

    add = parser.add_argument_group("learning rate schedule").add_argument
    add("--scheduler", choices=("cosine", "step", "constant"), help="(default: step if gamma is given, else cosine)")
    add("-g", "--gamma", type=number(float, 0, 1, above=True), metavar="FACTOR", help="of the step schedule: multiplies the rate after every epoch")
    add("--warmup-epochs", type=number(float, 0), metavar="N", help="of the cosine schedule (default: a tenth of the epochs)")
    add("--dont-adjust-learning-rate", action="store_true", help="the same as --scheduler constant")

    add = parser.add_argument_group("output, resume, NNI").add_argument
    add("--model-dir", type=Path, metavar="DIR", help="output folder, under NNI its own (default: runs/<time>-<seed>)")
    add("--checkpoint-steps", type=positive, metavar="N", help="save every N steps too, not only after an epoch")
    add("--checkpoint-minutes", type=number(float, 0, above=True), metavar="T", help="save every T minutes too")
    add("--auto-resume", action="store_true", help="go on with the run that --model-dir holds, if any; always so under NNI")
    add("--resume", type=Path, metavar="FILE", help="continue the run of this checkpoint.pth.tar, in its folder")
    add("--init-from", type=Path, metavar="FILE", help="start a new run from the weights of this checkpoint")
    add("--config", type=Path, metavar="FILE", help="YAML of parameters; the args.yaml of a run repeats it")
    add("--request-from-nni", action="store_true", help="take parameters from NNI and report to it")
    add("--check", type=Path, metavar="FILE", help="check an NNI experiment (config.yml) and its search space, and end")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status. Bad input is one line on stderr and status 2."""
    argv = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files can be any bytes
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        parser = make_parser()
        command_line = parser.given(argv)
        if "check" in command_line:
            import check_vit

            return check_vit.check(command_line["check"], parser)
        # Parameters are asked for before anything that can fail or takes long.
        trial = nni_vit.Trial() if command_line.get("request_from_nni") else None
        args = resolve(parser, argv, trial.ask() if trial else None)
        # By now NNI has replaced sys.stdout.
        log.handlers, log.propagate = [logging.StreamHandler(sys.stdout)], False
        log.setLevel(logging.INFO)
        logging.getLogger("matplotlib").setLevel(logging.WARNING)  # NNI shows every library's
        main_worker(args, trial)
        return 0
    except (UsageError, DataError, CheckpointError) as error:
        print(f"main_vit.py: error: {UsageError(str(error))}", file=sys.stderr)  # one line
        return 2
    except (RunFailed, OSError) as error:
        print(f"main_vit.py: {error}; what was saved before is whole", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before training, when there is nothing to save
        utils_vit.end_by_signal(signal.SIGINT)
    return 1


def main_worker(args: argparse.Namespace, trial: nni_vit.Trial | None) -> None:
    """One run, from the images to results.json. All that is written, logged and reported is so from here."""
    device = setup_vit.choose_device(args, trial)
    output = setup_vit.output_folder(args, trial)
    data = setup_vit.open_data(args)
    state = setup_vit.make_state(args, device)
    if args.resume:
        data.notes.extend(setup_vit.continue_run(state, args.resume, data))
    elif args.init_from:
        data.notes.extend(setup_vit.start_from(state, args.init_from, data.classes))
    output.mkdir(parents=True, exist_ok=True)
    parameters = setup_vit.saved_parameters(args)
    utils_vit.replace_file(output / "args.yaml", yaml.safe_dump(parameters).encode())
    for line in report_vit.describe(args, device, data, state.model, output, state.step):
        log.info(line)

    steps_per_epoch = math.ceil(len(data.train) / args.batch_size)
    total_steps = min(args.epochs * steps_per_epoch, args.max_steps or sys.maxsize)
    if trial:
        trial.link_tensorboard()
    unfinished = state.step < total_steps or state.validated < state.step
    if not unfinished and report_vit.has_results(output, state.step):
        log.info(f"this run is finished: {output}/results.json; --epochs makes it longer")
        if trial:
            trial.finish(nni_metrics(state.best, args.metric))
        return
    # Only whole epochs that a checkpoint knows of keep their line; any other will be run again.
    whole_epochs = state.validated // steps_per_epoch * steps_per_epoch
    recorder = report_vit.Recorder(output, whole_epochs if unfinished else state.step)
    identity = {"args": parameters, "classes": data.classes, "train_images": len(data.train)}
    saver = utils_vit.Saver(output, identity, args.checkpoint_steps, args.checkpoint_minutes)
    signals = StopSignals()

    def after_step() -> None:
        if signals.received or saver.due(state.step):
            check_finite(state)  # before anything is saved
            signals.check()
            saver.save(state)

    try:
        while state.step < total_steps or state.validated < state.step:
            state.epoch = (state.step - bool(state.outputs)) // steps_per_epoch
            pieces = state.pieces
            line = {"epoch": state.epoch + 1}
            line |= train(state, data.train, args, device, total_steps, after_step)
            metrics, _, _ = validate(state, data.val, args, device, signals.check)
            line |= {f"val_{name}": value for name, value in metrics.items()}
            best = state.best and state.best[f"val_{args.metric}"]
            value = line[f"val_{args.metric}"]
            is_best = best is None or report_vit.improves(args.metric, value, best)
            state.complete_epoch(line, is_best, state.step % steps_per_epoch == 0)
            recorder.epoch(line)
            saver.save(state, is_best)
            if state.pieces > pieces:
                log.info(f"GPU memory was short: batches are now taken in {state.pieces} pieces")
            log.info(report_vit.epoch_text(line, args.epochs, is_best))
            if trial:
                trial.report(line["epoch"], nni_metrics(line, args.metric))
        results = results_of(state, data, args, device, signals.check, output)
    except Stopped:
        if state.step < total_steps or state.validated < state.step:  # else all is saved already
            saver.save(state)
        log.info(
            f"stopped at step {state.step}; continue with --resume {output}/checkpoint.pth.tar"
        )
        if trial and state.best:
            trial.finish(nni_metrics(state.best, args.metric))
        utils_vit.end_by_signal(signals.received)
    recorder.close(results)
    for line in report_vit.results_text(results, output):
        log.info(line)
    if trial:
        trial.finish(nni_metrics(state.best, args.metric))


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
    steps_per_epoch = math.ceil(len(split) / args.batch_size)
    start = state.step - state.epoch * steps_per_epoch
    batches = data_vit.training_batches(
        split, args.batch_size, device,
        flip=args.flip, affine=args.affine, seed=utils_vit.seed_for(args.seed, "epoch", state.epoch), start=start,
    )  # fmt: skip
    state.model.train()
    began, images_seen = time.perf_counter(), 0
    for images, targets in tqdm(
        batches,
        f"epoch {state.epoch + 1}",
        steps_per_epoch,
        initial=start,
        leave=False,
        disable=None,
    ):
        if state.step == total_steps:
            break
        # At the middle of the step: neither the first nor the last one is lost to a rate of 0.
        utils_vit.adjust_learning_rate(
            state.optimizer, (state.step + 0.5) / steps_per_epoch, lr=args.lr,
            epochs=args.epochs, scheduler=args.scheduler,
            gamma=args.gamma, warmup_epochs=args.warmup_epochs,
        )  # fmt: skip
        loss, logits = training_step(state, images, targets, args)
        state.outputs.append((loss, logits, targets))
        images_seen += len(targets)
        # To look at the loss is to wait for the GPU, so it is done once in a while there.
        if (device.type == "cpu" or state.step % 50 == 0) and not loss.isfinite():
            break
        after_step()
    check_finite(state)
    seconds = time.perf_counter() - began

    losses, logits, targets = zip(*state.outputs, strict=True)
    targets = torch.cat(targets)
    weights = torch.tensor([len(part) for part in logits], device=device)
    loss = (torch.stack(losses) * weights).sum().item() / len(targets)
    metrics = report_vit.measure(*to_numpy(torch.cat(logits), targets))
    return {
        "step": state.step,
        "train_loss": loss,
        **{f"train_{name}": value for name, value in metrics.items()},
        "lr": state.optimizer.param_groups[0]["lr"],
        "images_per_second": images_seen / seconds,
        "seconds": seconds,
    }


def training_step(
    state: TrainingState, images: Tensor, targets: Tensor, args: argparse.Namespace
) -> tuple[Tensor, Tensor]:
    """One optimizer step; returns the loss () and the logits (batch, classes), detached.

    A batch for which the GPU has not enough memory is taken in more and more pieces, with the same
    gradient. Raises RunFailed if a single image is too much.
    """
    while True:
        try:
            loss, logits = gradient(state, images, targets, args)
            break
        except torch.OutOfMemoryError:
            if state.pieces >= len(images):
                raise RunFailed(
                    f"a single image of {args.image_size} x {args.image_size} in {args.patch_num} x "
                    f"{args.patch_num} patches does not fit into the GPU's memory: half the "
                    "--patch-num takes a quarter, half the --vt-dim or --vt-depth takes half"
                ) from None
            state.pieces *= 2
    if args.clip_grad:
        nn.utils.clip_grad_norm_(state.model.parameters(), args.clip_grad)
    state.optimizer.step()
    state.step += 1
    if state.ema:
        state.ema.update(state.model, state.step)
    return loss, logits


def gradient(
    state: TrainingState, images: Tensor, targets: Tensor, args: argparse.Namespace
) -> tuple[Tensor, Tensor]:
    """The gradient of the mean loss, added up over `state.pieces`; returns loss and logits as above."""
    torch.manual_seed(utils_vit.seed_for(args.seed, "step", state.step))  # dropout
    state.optimizer.zero_grad()
    size = math.ceil(len(images) / state.pieces)
    loss, logits = torch.zeros((), device=images.device), []
    for part, part_targets in zip(images.split(size), targets.split(size), strict=True):
        with autocast(images.device, args.precision):
            output = state.model(part)
        part_loss = F.cross_entropy(
            output.float(), part_targets, label_smoothing=args.label_smoothing
        ) * (len(part) / len(images))
        part_loss.backward()
        loss += part_loss.detach()
        logits.append(output.detach().float())
    return loss, torch.cat(logits)


def check_finite(state: TrainingState) -> None:
    """Raises RunFailed if a loss of this epoch is not finite."""
    finite = torch.stack([loss for loss, _, _ in state.outputs]).isfinite()
    if not finite.all():
        step = state.step - len(finite) + int(finite.int().argmin()) + 1
        raise RunFailed(
            f"the loss is not finite at epoch {state.epoch + 1}, step {step}: a lower --lr may help"
        )


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
    model = state.selected_model.eval()
    logits, targets = [], []
    for images, batch_targets, _ in data_vit.batches(split, max(args.batch_size, 64), device):
        with autocast(device, args.precision):
            logits.append(model(images).float())
        targets.append(batch_targets)
        after_batch()
    loss = F.cross_entropy(torch.cat(logits), torch.cat(targets)).item()
    if not math.isfinite(loss):
        raise RunFailed(
            f"the loss on held-out images is not finite after epoch {state.epoch + 1}, "
            f"step {state.step}: a lower --lr may help"
        )
    probabilities, numbers = to_numpy(torch.cat(logits), torch.cat(targets))
    return {"loss": loss, **report_vit.measure(probabilities, numbers)}, probabilities, numbers


def results_of(
    state: TrainingState,
    data: data_vit.Data,
    args: argparse.Namespace,
    device: torch.device,
    after_batch: Callable[[], None],
    output: Path,
) -> dict[str, Any]:
    """What results.json holds: the best epoch and, read here and only here, the test images."""
    saved = utils_vit.load_checkpoint(output / "model_best.pth.tar")
    state.selected_model.load_state_dict(utils_vit.selected_weights(saved))
    test = None
    if data.test:
        metrics, probabilities, targets = validate(state, data.test, args, device, after_batch)
        test = metrics | report_vit.test_report(probabilities, targets, data.classes)
    return {
        "metric": args.metric,
        "best_epoch": state.best["epoch"],
        "validation": {k.removeprefix("val_"): v for k, v in state.best.items() if k[:4] == "val_"},
        "test": test,
        "classes": data.classes,
        "images": {"train": len(data.train), "val": len(data.val), "test": len(data.test or ())},
        "model_parameters": sum(p.numel() for p in state.model.parameters()),
        "steps": state.step,
        "device": str(device),
        "torch": torch.__version__,
    }


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision for the forward pass."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def to_numpy(logits: Tensor, targets: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (images, classes) and targets (images,) from logits."""
    return logits.double().softmax(dim=1).cpu().numpy(), targets.cpu().numpy()


def nni_metrics(line: dict[str, Any], metric: str) -> dict[str, float]:
    """What NNI is told of an epoch: the metric as "default", all of validation beside it."""
    values = {name: line[f"val_{name}"] for name in report_vit.METRICS}
    return {"default": values[metric]} | {k: v for k, v in values.items() if v is not None}


if __name__ == "__main__":
    sys.exit(main())
