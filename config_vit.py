"""From the command line, a YAML file, a checkpoint and NNI's sample to the parameters of one run."""

import argparse
import difflib
import math
import os
import sys
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import torch
import yaml

import utils_vit
import vit
from folder_vit import in_one_line

# Defaults with --download-dir, and of the demo: 8x8 pixels, grey.
PHOTOS = {"image_size": 224, "patch_size": 16, "channel": 3}
DEMO = {"image_size": 16, "patch_size": 4, "channel": 1, "val_split": 0.2}
LEARNING_RATE = {"adam": 5e-4, "adamw": 5e-4, "sgd": 2e-2, "rmsprop": 2e-4}
# About one run and its place, not about what is trained: neither in args.yaml nor sampled by NNI.
NOT_SAVED = {"config", "check", "resume", "auto_resume", "model_dir", "request_from_nni"}
# Not every architecture takes these; the default of dim_head is vt_dim / vt_heads.
ARCH_DEFAULTS = {"dim_head": None, "pool": "cls", "dropout": 0.0, "emb_dropout": 0.0}
MAY_CHANGE_ON_RESUME = {
    "epochs", "stop_epoch", "max_steps", "download_dir", "cache", "cache_dir", "cache_limit", "workers",
    "threads", "gpu", "deterministic", "checkpoint_steps", "checkpoint_minutes",
}  # fmt: skip
UNSET = object()


class UsageError(ValueError):
    """Input that this program cannot work with; the text is one line that names it and the remedy."""

    def __init__(self, text: str) -> None:
        super().__init__(in_one_line(text))


class Parser(argparse.ArgumentParser):
    """argparse, but errors are raised as UsageError; that for an unknown option names the nearest known one."""

    def error(self, message: str) -> None:
        raise UsageError(message)

    def given(self, argv: list[str]) -> dict[str, Any]:
        """Only what `argv` really gives, by destination."""
        unset = argparse.Namespace(**{action.dest: UNSET for action in self._actions})
        values, unknown = self.parse_known_args(argv, unset)
        if unknown:
            raise self.unknown(unknown[0].split("=")[0])
        given = {k: v for k, v in vars(values).items() if v is not UNSET and k != "help"}
        for name in (k for k, v in given.items() if isinstance(v, list)):
            raise UsageError(f"{name} lacks a value")  # what argparse makes of --lr=--
        return given

    def with_defaults(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """`parameters`, and the defaults of all others, which a checkpoint of an older version lacks, say."""
        defaults = {action.dest: action.default for action in self._actions}
        del defaults["help"]
        return defaults | parameters

    def unknown(self, name: str, left_out: Set[str] = frozenset()) -> UsageError:
        """The error for an option that does not exist; it offers none that is `left_out`."""
        options = [a.option_strings for a in self._actions if a.dest not in left_out]
        valid = sorted(strings[-1] for strings in options if strings)
        known = [o for strings in options for o in strings if len(o) > 2]
        near = difflib.get_close_matches(name.lower(), known, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return UsageError(f"unknown parameter {name}{hint}; valid ones: {' '.join(valid)}")

    def given_by(self, source: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """What a mapping gives, from YAML or NNI; `-` and `_` are the same in a name.

        A nested choice of NNI, {"optimizer": {"_name": "sgd", "momentum": 0.9}}, gives both parameters.
        """
        argv, switched_off, elsewhere = [], {}, NOT_SAVED | {"help"}
        try:
            for name, value in flattened(parameters):
                option = "--" + str(name).replace("_", "-")
                action = self._option_string_actions.get(option)
                if action is None:
                    raise self.unknown(option, elsewhere)
                if action.dest in elsewhere:
                    raise UsageError(f"{name} belongs on the command line")
                if isinstance(value, dict | list):
                    kind = "mapping" if isinstance(value, dict) else "list"
                    raise UsageError(f"{name} is a {kind}, not a single value")
                if value is False and "off" in (action.choices or ()):
                    value = "off"  # as YAML reads the word
                if value is False and action.nargs == 0:
                    switched_off[action.dest] = False
                elif value is not None:
                    switch = value is True and action.nargs == 0
                    argv.append(option if switch else f"{option}={value}")
            return self.given(argv) | switched_off
        # Beside UsageError: a number of too many digits for Python, a YAML mapping that holds itself.
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{source}: {error}") from None


def flattened(parameters: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values, a nested choice as its name and what it brings along."""
    for name, value in parameters.items():
        if isinstance(value, dict) and "_name" in value:
            yield name, value["_name"]
            yield from flattened({k: v for k, v in value.items() if k != "_name"})
        else:
            yield name, value


def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Any:
    """An argparse type: an int or float from `low` (or `above` it) to `high`; 4.0 is the int 4."""
    largest = min(high, 2**63 - 1 if kind is int else sys.float_info.max)  # that torch can take

    def convert(text: str) -> float:
        value = float(text) if kind is float or not text.isdecimal() else int(text)
        bounds = f"{'above' if above else 'at least'} {low}" + (
            f" and at most {largest}" if high < math.inf or value > largest else ""
        )
        if kind is int and value != value // 1:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number")
        if not (low < value if above else low <= value) or not value <= largest:
            raise argparse.ArgumentTypeError(f"{text} is not {bounds}")
        return kind(value)

    convert.__name__ = {int: "whole number", float: "number"}[kind]  # argparse's word in its errors
    return convert


def expanded_path(text: str) -> Path:
    """An argparse type: `~` is the home of the user."""
    if not text:  # a variable of the shell that is not set; Path makes the working directory of it
        raise argparse.ArgumentTypeError("an empty path")
    try:
        if b"\0" in os.fsencode(text):
            raise argparse.ArgumentTypeError("a path with a null byte")
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("a path with a character that no name can have") from None
    # Path's own raises where there is no such user, or no home.
    return Path(os.path.expanduser(text))


def resolve(
    parser: Parser, argv: list[str], sample: dict[str, Any] | None = None
) -> argparse.Namespace:
    """All parameters of a run from the command line, its --config and --resume, and NNI's `sample`.

    Reads no data. Raises UsageError, or CheckpointError for --resume.
    """
    given = parser.given(argv)
    if sample:
        given |= parser.given_by("NNI's sample", sample)
    if "config" in given:
        content = read_yaml(given["config"])
        if "trialCommand" in content:
            raise UsageError(
                f"{given['config']} is an experiment: nnictl create --config starts it, --check looks it "
                "through; --config here takes the args.yaml of a run"
            )
        parameters = parser.given_by(str(given["config"]), content)
        given = what_still_holds(parameters, given) | given
    if "resume" in given:
        given = continue_given(parser, given)
    args = argparse.Namespace(**parser.with_defaults(given))
    derive(args, given)
    return args


def what_still_holds(file: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The parameters of --config, less those that the command line or NNI makes void.

    An args.yaml is complete, with all that followed from its own values; a change to one of these
    should not be an error that asks for changes to others.
    """
    void: set[str] = set()
    schedule = {"gamma", "scheduler", "dont_adjust_learning_rate"}
    if given.keys() & schedule:
        void |= schedule | {"warmup_epochs"}
    for name in ("warmup_epochs", "stop_epoch"):
        if file.get(name, 0) > given.get("epochs", math.inf):
            void.add(name)
    patch = {"patch_size", "patch_num"}
    if given.keys() & patch:
        void |= patch
    elif "image_size" in given and patch <= file.keys():
        void.add("patch_num")
    if "download_dir" in given:
        void.add("num_classes")
        # The demo's own would win over val/.
        if "download_dir" not in file and DEMO.items() <= file.items():
            void.add("val_split")
    # A value that followed from others in the file follows from what these are now.
    followed = {
        "lr": (["optimizer"], LEARNING_RATE.get),
        "weight_decay": (["optimizer"], default_weight_decay),
        "dim_head": (["vt_dim", "vt_heads"], lambda dim, heads: max(1, dim // heads)),
        "warmup_epochs": (["epochs"], lambda epochs: epochs / 10),
    }
    for name, (parents, value) in followed.items():
        known = file.keys() >= set(parents) and given.keys() & parents
        if known and file.get(name) == value(*(file[parent] for parent in parents)):
            void.add(name)
    if "arch" in given:
        void |= ARCH_DEFAULTS.keys() - arch_arguments(given["arch"])
    return {name: value for name, value in file.items() if name not in void}


def arch_arguments(arch: str) -> set[str]:
    """What the architecture takes. Raises UsageError if there is no such architecture."""
    try:
        return vit.model_arguments(arch)
    except ValueError as error:
        raise UsageError(str(error)) from None


def default_weight_decay(optimizer: str) -> float:
    """Larger for adamw, where it acts beside the gradient and not within it."""
    return 0.05 if optimizer == "adamw" else 1e-4


def read_yaml(file: Path) -> dict[str, Any]:
    """A mapping from a YAML file. Raises UsageError."""
    try:
        content = yaml.safe_load(file.read_text())
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}") from None
    except Exception as error:  # PyYAML's, and those of Python's types that it lets out
        raise UsageError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{file} is not a mapping of parameter names to values")
    return content


def continue_given(parser: Parser, given: dict[str, Any]) -> dict[str, Any]:
    """What --resume continues: the parameters of the checkpoint, and those given that may change."""
    state, _, _ = utils_vit.load_newest(given["resume"])
    if not state["step"] and "train_images" not in state:  # of pretrained_vit.py
        raise UsageError(f"{given['resume']} is of no run: --init-from starts one from its weights")
    saved = parser.given_by(str(given["resume"]), state["args"])
    if "init_from" in given:
        given["init_from"] = given["init_from"].absolute()
    if given.get("init_from") not in (None, saved.get("init_from")):
        raise UsageError("--resume continues a run and --init-from starts one: give one of them")
    saved.pop("gpu", None)  # checkpoints from before 2026-11-26 have it
    known = parser.with_defaults(saved)
    changes = differences(known, known | given)
    if changes:
        raise UsageError(
            f"--resume continues a run with its own parameters, but given were: {changes}; "
            "--init-from starts a new run from its weights"
        )
    return saved | given


def differences(saved: dict[str, Any], now: dict[str, Any]) -> str:
    """The parameters that may not change within a run and do, as "lr 0.1 -> 0.2, ..."."""
    names = sorted((saved.keys() | now.keys()) - NOT_SAVED - MAY_CHANGE_ON_RESUME)
    return ", ".join(
        f"{k} {saved.get(k)} -> {now.get(k)}" for k in names if saved.get(k) != now.get(k)
    )


def derive(args: argparse.Namespace, given: dict[str, Any]) -> None:
    """Fill in what follows from other parameters; what has no effect becomes None, or an error if given."""
    for name, value in (PHOTOS if args.download_dir else DEMO).items():
        if getattr(args, name) is None and not (name == "patch_size" and args.patch_num):
            setattr(args, name, value)
    divide_patches(args)

    if args.dont_adjust_learning_rate:
        if args.scheduler not in (None, "constant"):
            raise UsageError(
                f"--dont-adjust-learning-rate contradicts --scheduler {args.scheduler}"
            )
        args.scheduler = "constant"
    elif args.scheduler is None and args.gamma is not None:
        args.scheduler = "step"
    elif args.scheduler is None:  # PBT changes the rate itself, from share to share
        args.scheduler = "constant" if args.load_checkpoint_dir else "cosine"
    if args.scheduler == "step" and args.gamma is None:
        raise UsageError("--scheduler step needs --gamma")
    if args.scheduler == "cosine" and args.warmup_epochs is None:
        args.warmup_epochs = args.epochs / 10
    for name, schedule in (("gamma", "step"), ("warmup_epochs", "cosine")):
        if name in given and args.scheduler != schedule:
            raise UsageError(
                f"{name} has no effect under the {args.scheduler} schedule: leave it out"
            )
    if (args.warmup_epochs or 0) > args.epochs:
        raise UsageError(
            f"warmup_epochs {args.warmup_epochs:g} is more than epochs {args.epochs}: give --epochs at "
            f"least {math.ceil(args.warmup_epochs)}"
        )

    check_budget(args)

    if args.lr is None:
        args.lr = LEARNING_RATE[args.optimizer]
    if args.weight_decay is None:
        args.weight_decay = default_weight_decay(args.optimizer)
    if args.moving_average_decay == 1:
        raise UsageError("moving_average_decay 1 would keep the initial weights: give less than 1")

    accepted = arch_arguments(args.arch)
    if "channels" not in accepted and args.channel != 3:
        raise UsageError(f"arch {args.arch} reads RGB only: --channel 3")
    for name, value in ARCH_DEFAULTS.items():
        if name not in accepted and name in given:
            raise UsageError(f"{name} has no effect on arch {args.arch}: leave it out")
        if name in accepted and getattr(args, name) is None:
            width = max(1, args.vt_dim // args.vt_heads)
            setattr(args, name, width if name == "dim_head" else value)
    if args.arch != "vit":
        check_model(args)

    for name, value in vars(args).items():
        # args.yaml may be used from elsewhere.
        if isinstance(value, Path) and name not in NOT_SAVED:
            setattr(args, name, value.absolute())


def check_budget(args: argparse.Namespace) -> None:
    """What a tuner that gives out training in parts may ask for. Raises UsageError."""
    if args.load_checkpoint_dir:
        if args.scheduler == "cosine":
            raise UsageError(
                "load_checkpoint_dir (PBT) goes on for --epochs again and again, without an end for a "
                "cosine to fall to: leave --scheduler and --warmup-epochs out"
            )
        if args.max_steps:
            raise UsageError("max_steps contradicts load_checkpoint_dir (PBT): give --epochs")
    elif args.stop_epoch and args.stop_epoch > args.epochs:
        raise UsageError(
            f"stop_epoch (TRIAL_BUDGET) {args.stop_epoch} is more than epochs {args.epochs}: "
            "give --epochs the largest budget, which the learning rate schedule is made for"
        )


def model_sizes(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `vit.build_model` that are parameters, less the depth."""
    return {
        "image_size": args.image_size, "patch_size": args.patch_size, "channels": args.channel,
        "dim": args.vt_dim, "heads": args.vt_heads, "mlp_dim": args.mlp_dim,
        "dim_head": args.dim_head, "pool": args.pool, "dropout": args.dropout,
        "emb_dropout": args.emb_dropout,
    }  # fmt: skip


def check_model(args: argparse.Namespace) -> None:
    """Raises UsageError for sizes that an architecture of vit-pytorch does not take."""
    try:
        with torch.device("meta"):
            vit.build_model(args.arch, num_classes=2, depth=1, **model_sizes(args))
    except AssertionError as error:
        raise UsageError(f"arch {args.arch} cannot be built: {error or 'other sizes'}") from None
    except Exception:  # something that this device lacks, say
        return


def divide_patches(args: argparse.Namespace) -> None:
    """patch_size = image_size / patch_num, whole."""
    size = args.image_size
    for name in ("patch_num", "patch_size"):
        if (value := getattr(args, name)) is not None and size % value:
            # Not up to the size itself, which may be mistyped by any number of digits.
            fitting = " ".join(str(n) for n in range(1, min(size, 2048) + 1) if size % n == 0)
            raise UsageError(
                f"{name} {value} does not divide image_size {size}: use one of {fitting}"
            )
    if args.patch_num is None:
        args.patch_num = size // args.patch_size
    elif args.patch_size is None:
        args.patch_size = size // args.patch_num
    if args.patch_num * args.patch_size != size:
        raise UsageError(
            f"patch_num {args.patch_num} and patch_size {args.patch_size} contradict each other "
            f"for image_size {size}: give one of them"
        )


def saved_parameters(args: argparse.Namespace) -> dict[str, Any]:
    """What args.yaml and checkpoints hold: every parameter with an effect, as plain types."""
    # A run that is repeated must not write where the first one did, and may have other GPUs.
    left_out = NOT_SAVED | {"save_checkpoint_dir", "gpu"}
    values = {k: v for k, v in vars(args).items() if k not in left_out and v is not None}
    return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}
