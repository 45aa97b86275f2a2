"""`main_vit.py --check config.yml`: could this NNI experiment run, and would it search what it says?"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import data_vit
import setup_vit
import utils_vit
from budget_vit import PBT_MAY_CHANGE
from check_vit.command import hides_signals, known_arguments, no_program, trial_call
from check_vit.experiment import Findings, load_experiment, quiet
from check_vit.space import (
    LIMIT,
    Sample,
    Variants,
    attempt,
    batch_samples,
    error_text,
    samples_of,
    spec_errors,
    values_text,
)
from check_vit.tuner import check_algorithm, check_assessor, check_tuner, is_batch
from config_vit import Parser, UsageError, resolve
from folder_vit import DataError, in_one_line, not_decoded, printable, sizes_and_times
from utils_vit import CheckpointError

SHOWN = 5  # messages of a kind that are printed
TORCHRUN = re.compile(r"(^|[\s/;&|(])torchrun\s|\s-m\s*torch\.distributed\.run\s")
LARGE_PATCH = 64  # pixels a side, of which a model sees little more than their mean
# Change how fast a trial is, not what it finds.
NO_RESULT = {"workers", "threads", "cache", "cache_dir", "cache_limit"}
# Tell which images and checkpoints a run reads; "" is any parameter.
ABOUT_FILES = {"", "config", "download_dir", "num_classes", "val_split", "init_from"}


def check(file: Path, parser: Parser) -> int:
    """Print what an NNI experiment would do and what is wrong with it.

    Returns 0 if it can run, else 2. Raises UsageError if NNI would not take the file.
    """
    found = Findings()
    config = load_experiment(file, found)
    tuner, space, maximum = config.tuner, config.search_space, config.max_trial_number
    limit = f"{maximum or 'any number of'} trials, {config.trial_concurrency} at a time"
    print(f"{file}: {tuner.name or tuner.class_name}, {limit}")
    if is_batch(tuner):
        keys, samples, all_of_them = {}, batch_samples(space), True
    else:
        keys = read_space(space, parser, found)
        samples, all_of_them = samples_of({key: space[key] for key in keys})
    count_trials(samples, all_of_them, maximum, found)
    if (tuner.name or "").lower() in ("batch", "batchtuner", "gridsearch") and not maximum:
        found.warnings.append(
            f"tuner {tuner.name} lacks a maxTrialNumber: NNI would never call the experiment done"
        )

    service, metric = config.training_service, "accuracy"
    good: list[tuple[Sample, Any]] = []
    judged, unclear = found, set()
    try:
        call = trial_call(service.trial_command, Path(service.trial_code_directory))
        folder, (argv, unclear) = call.folder, known_arguments(call.argv, parser)
        if service.platform == "local":
            found.errors += no_program(call)
        with quiet():
            given = parser.given(argv)
        if unclear:
            names = ", ".join(sorted(name or "a part of it" for name in unclear))
            found.warnings.append(
                f"trialCommand: what bash will put in for {names} cannot be judged; the rest was, with the "
                "defaults in its place"
            )
        if "" in unclear:
            given["request_from_nni"] = True  # it may be there
        # What the defaults cannot do, bash's values may: what would be errors are warnings.
        if unclear - NO_RESULT:
            judged = Findings(errors=found.warnings, warnings=found.warnings)
        check_command(config, given, parser, found)
        check_overridden(keys, given, found)
        with working_folder(folder):
            good = try_samples(samples, parser, argv, judged)
            runs = [run for _, run in good]
            place = judged if unclear & ABOUT_FILES else found
            check_runs(runs, keys, service, place)
        metric = runs[0].metric if runs else given.get("metric", metric)
        if unclear & {"", "metric", "config"}:
            metric = given.get("metric")
    except UsageError as error:
        found.errors.append(f"trialCommand: {error}")
    except SystemExit:
        found.errors.append("trialCommand: --help ends every trial at once")
    added: Sample = {}
    if is_batch(tuner) or len(keys) == len(space):
        made = check_algorithm("tuner", tuner, space, metric, parser, found.errors)
        if made:
            added = made.added
            check_tuner(config, made, found)
        if added and not found.errors:
            with working_folder(folder):
                check_added(added, [sample for sample, _ in good], keys, parser, argv, judged)
    if config.assessor:
        made = check_algorithm("assessor", config.assessor, space, metric, parser, found.errors)
        if made and not unclear & {"", "config", "epochs"}:
            check_assessor(config.assessor, made, {run.epochs for _, run in good}, found)
        if "TRIAL_BUDGET" in added:
            found.errors.append("assessor: NNI ignores one beside this tuner: leave it out")
        elif "load_checkpoint_dir" in added:
            found.errors.append("assessor: PBT needs every trial to come to its end: leave it out")

    report(file, found)
    return 2 if found.errors else 0


def report(file: Path, found: Findings) -> None:
    """Print what was found, and what follows from it."""
    for text in found.warnings:
        print(f"warning: {text}")
    for text in found.errors:
        print(f"error: {text}")
    print(f"{file} {'cannot run as it should' if found.errors else 'can run'}")


def shortened(texts: list[str]) -> list[str]:
    """The first few, and how many are left out."""
    return texts[:SHOWN] + [f"... and {len(texts) - SHOWN:,} more like it"] * (len(texts) > SHOWN)


# --- the search space ----------------------------------------------------------------------------


def read_space(space: dict[str, Any], parser: Parser, found: Findings) -> dict[str, set[str]]:
    """Print every key and whether main_vit.py takes it; the parameters that each good one sets."""
    keys, width = {}, max(len(str(name)) for name in space)
    for name, spec in space.items():
        errors = [*spec_errors(str(name), spec)]
        try:
            if not errors:
                samples, _ = samples_of({name: spec})
                good, bad, partly = attempt(samples, lambda s: parser.given_by("search space", s))
                if good:
                    keys[name] = set().union(*good)
                # A normal may reach too far, which `try_samples` counts; other ranges must be valid.
                errors = shortened([*bad]) + ([] if "normal" in spec["_type"] else [*partly])
        except Exception as error:  # NNI trusts what it reads
            errors = [f"search space: {name}: {error_text(error)}"]
        print(f"  {name!s:{width}}  {'WRONG' if errors else 'ok   '}  {values_text(spec)}")
        found.errors += errors
    return keys


def count_trials(
    samples: list[Variants], all_of_them: bool, maximum: int | None, found: Findings
) -> None:
    """Print the number of distinct combinations; a warning if there are more trials than that."""
    text = (
        f"{len(samples):,}" if all_of_them else f"more than {LIMIT:,}, of which as many are tried"
    )
    several = [(variants[0], variants[-1]) for variants in samples if len(variants) > 1]
    ranges = {name for first, last in several for name in first if first[name] != last.get(name)}
    if ranges:
        text += f", each with {' '.join(sorted(ranges))} near both ends of the range and between"
    print(f"distinct combinations: {text}")
    if all_of_them and not ranges and not found.errors and (maximum or 0) > len(samples):
        found.warnings.append(
            f"maxTrialNumber {maximum} is more than the {text} distinct combinations: trials would "
            "repeat, or the search would stop early"
        )


# --- the trials ----------------------------------------------------------------------------------


@contextlib.contextmanager
def working_folder(folder: Path) -> Iterator[None]:
    """Paths are relative to `folder`, as they are for the trial."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def check_command(config: Any, given: dict[str, Any], parser: Parser, found: Findings) -> None:
    """What the options of the trialCommand and NNI do to each other."""
    service = config.training_service
    if "resume" in given:
        raise UsageError("--resume continues one run as it was; to start from it use --init-from")
    if "check" in given:
        raise UsageError("--check trains nothing: leave it out")
    if "model_dir" in given:
        found.warnings.append(
            "--model-dir has no effect under NNI, which has a folder for each trial"
        )
    if not given.get("request_from_nni"):
        found.errors.append(
            "trialCommand lacks --request-from-nni: trials would not ask for values"
        )
    if hiding := hides_signals(service.trial_command):
        script = re.match(r"\S*sh\b", hiding)
        note = (
            "unless exec starts it there" if script else "NNI keeps a log of every trial without it"
        )
        found.warnings.append(
            f"trialCommand: {hiding!r} keeps NNI's signal from a trial that is stopped: it could "
            f"not save, and would go on running ({note})"
        )
    handled = re.search(r"--signals[-_]to[-_]handle[\s=]+(\S+)", service.trial_command)
    if TORCHRUN.search(service.trial_command) and (not handled or "SIGINT" in handled[1]):
        found.warnings.append(
            "trialCommand: when NNI stops a trial torchrun ends it as FAILED, not as USER_CANCELED: give torchrun "
            "--signals-to-handle SIGTERM,SIGHUP,SIGQUIT, which leaves NNI's SIGINT to Python"
        )
    if service.platform != "local":
        return
    number, gpus = service.trial_gpu_number, torch.cuda.device_count()
    if number == 0:
        text = (
            "trialGpuNumber (gpuNum) 0 hides the GPU from trials: leave it out to use what is there"
        )
        (found.errors if "gpu" in given else found.warnings).append(text)
    elif number and number >= gpus * service.max_trial_number_per_gpu:  # NNI's test, one too strict
        found.errors.append(
            f"trialGpuNumber (gpuNum) {number} does not work in NNI 3.0 on a machine with {gpus} GPUs "
            "(with one it freezes): leave it out to use what is there"
        )
    elif number:
        usable, shared = len(service.gpu_indices or range(gpus)), service.max_trial_number_per_gpu
        at_once = min(config.trial_concurrency, config.max_trial_number or sys.maxsize)
        if at_once > (room := usable * shared // number):
            found.errors.append(
                f"trialConcurrency {at_once}: {usable} GPUs have room for {room} trials at a time, and "
                "NNI 3.0 freezes when one more asks for a GPU"
            )


def check_overridden(keys: dict[str, set[str]], given: dict[str, Any], found: Findings) -> None:
    """Options and keys that a key of the search space leaves without effect."""
    setters: dict[str, str] = {}
    for name, parameters in keys.items():
        for parameter in sorted(parameters):
            if parameter in setters:
                found.warnings.append(
                    f"{parameter} is set by {setters[parameter]} and by {name}: where a sample has both, "
                    f"the later one, {name}, counts"
                )
            setters[parameter] = name
            if parameter in given:
                found.warnings.append(
                    f"{parameter} {given[parameter]} in trialCommand has no effect: "
                    f"{name} takes its place"
                )
        if parameters and parameters <= NO_RESULT:
            found.warnings.append(f"{name} has no effect on results, only on time")


def try_samples(
    samples: list[Variants], parser: Parser, argv: list[str], found: Findings
) -> list[tuple[Sample, Any]]:
    """Samples that can work, with all parameters of their runs; those that cannot go to `found`."""
    good, failing, partly = attempt(samples, lambda sample: (sample, resolve(parser, argv, sample)))
    for counter, verb in ((failing, "cannot work"), (partly, "work in a part of the range only")):
        if counter:
            lines = [f"{count:,} x {text}" for text, count in counter.most_common()]
            head = f"{sum(counter.values()):,} of {len(samples):,} combinations {verb}"
            text = "\n    ".join([head, *shortened(lines)]).replace("NNI's sample: ", "")
            (found.warnings if good else found.errors).append(text)
    return good


def check_runs(runs: list[Any], keys: dict[str, set[str]], service: Any, found: Findings) -> None:
    """What the parameters of the runs tell beyond being valid."""
    if service.platform == "local":
        found.errors += shortened(local_errors(runs, gpus=service.trial_gpu_number is None))
    if len(metrics := sorted({run.metric for run in runs})) > 1:
        found.errors.append(
            f"trials could not be compared: metric is {' or '.join(metrics)}: give one in trialCommand"
        )
    searched = set().union(*keys.values())
    parts = [n for n in ("download_dir", "val_split") if len({getattr(run, n) for run in runs}) > 1]
    if len({run.seed for run in runs}) > 1 and any(map(holds_out, runs)):
        parts.append("seed")
    if parts:
        found.warnings.append(
            f"trials that differ in {', '.join(parts)} are validated on other images, and the best may have "
            "had the easiest: give it in trialCommand, or the images a val/"
        )
    if coarse := sorted({run.patch_size for run in runs if run.patch_size > LARGE_PATCH}):
        found.warnings.append(
            f"patches of {', '.join(map(str, coarse))} pixels a side are very large, most ViTs have 8 to 32: "
            "give a larger patch_num"
        )
    if runs and "momentum" in searched and not {"sgd", "rmsprop"} & {r.optimizer for r in runs}:
        found.warnings.append("momentum has no effect: no trial has optimizer sgd or rmsprop")


def holds_out(run: Any) -> bool:
    """Whether the images that a run is validated on are drawn, by its seed."""
    folder = run.download_dir
    return bool(run.val_split or folder is None or not os.path.isdir(os.path.join(folder, "val")))


def local_errors(runs: list[Any], gpus: bool) -> list[str]:
    """What is wrong with the images, as far as their folders tell, the checkpoints and `gpus` of the runs."""
    folders = {
        (run.download_dir, run.num_classes, bool(run.val_split), run.skip_broken) for run in runs
    }
    files = {run.init_from for run in runs} - {None}
    looks = [(check_images, folder) for folder in sorted(folders, key=str)]
    looks += [(utils_vit.load_checkpoint, (file,)) for file in sorted(files)]
    looks += [(setup_vit.check_gpu, (n,)) for n in sorted({r.gpu for r in runs} - {None}) if gpus]
    errors = {}  # in order, each once
    for look, arguments in looks:
        try:
            look(*arguments)
        except (DataError, CheckpointError, UsageError) as error:
            errors[in_one_line(error)] = None
    return [*errors]


def check_images(
    download_dir: Path | None, num_classes: int | None, val_split: bool, skip_broken: bool
) -> None:
    """Lists the images as a run does, without opening them, and says what is there. Raises DataError."""
    if download_dir is None:
        if num_classes not in (None, 10):
            raise DataError(f"--num-classes is {num_classes}, but the demo has 10 classes")
        return
    folders = data_vit.read_splits(download_dir, num_classes, val_split)
    train = folders["train"]
    counts = (f"{len(images.names):,} in {images.folder}" for images in folders.values())
    names = ", ".join(train.classes[:10]) + ", ..." * (len(train.classes) > 10)
    print(printable(f"images: {', '.join(counts)}; {len(train.classes)} classes: {names}"))
    if "val" not in folders:
        data_vit.hold_out(train.targets, 0.1, 0, train.classes)
    if not skip_broken:
        broken = []
        for images in folders.values():
            stats, problems = sizes_and_times(images)
            problems = {int(row): "empty" for row in np.flatnonzero(stats[:, 0] == 0)} | problems
            broken += [f"{images.path(i)} ({why})" for i, why in sorted(problems.items())]
        if broken:
            raise DataError(not_decoded(broken))


def check_added(
    added: Sample,
    samples: list[Sample],
    keys: dict[str, set[str]],
    parser: Parser,
    argv: list[str],
    found: Findings,
) -> None:
    """What becomes of the runs with the parameters that the tuner adds: budgets, folders of PBT."""
    runs, failing, _ = attempt(
        [(sample,) for sample in samples], lambda sample: resolve(parser, argv, sample | added)
    )
    found.errors += shortened([text.replace("NNI's sample", "the tuner") for text in failing])
    cut = [run for run in runs if run.stop_epoch and run.stop_epoch < run.epochs]
    if cut:
        epochs = max(run.epochs for run in cut)
        found.warnings.append(
            f"the tuner's largest budget {cut[0].stop_epoch} is less than epochs {epochs}: such a "
            "trial would not come to the end of its learning rate schedule"
        )
    if any(run.load_checkpoint_dir for run in runs):
        for name in sorted(name for name, sets in keys.items() if not sets <= PBT_MAY_CHANGE):
            found.errors.append(f"PBT changes values within a training, where {name} cannot change")
