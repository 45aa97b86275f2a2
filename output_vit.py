"""The folder of a run: which it is, whose run it holds, and that no other process writes to it."""

import argparse
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import nni_vit
import utils_vit
from config_vit import UsageError, differences, saved_parameters
from options_vit import make_parser


def output_folder(
    args: argparse.Namespace,
    trial: nni_vit.Trial,
    undecided: set[str],
    until_end: ExitStack,
) -> Path:
    """The folder that this run alone writes to, and no other process `until_end`.

    A run that it holds goes on, where that is wanted, and keeps its own of the parameters that are
    `undecided`: sets args.resume and those. Raises UsageError if the folder cannot be written, is in use,
    or holds another run.
    """
    if trial.inside:
        folder = trial.output_dir
    elif args.resume:
        folder = args.resume.parent
        if args.model_dir and args.model_dir.resolve() != folder.resolve():
            raise UsageError(
                f"--resume continues in {folder}, the folder of its checkpoint: leave --model-dir out"
            )
    elif args.model_dir:
        folder = args.model_dir
    elif args.auto_resume:
        raise UsageError("--auto-resume needs --model-dir, the folder of the run to go on with")
    else:
        folder = Path("runs", f"{time.strftime('%Y%m%d-%H%M%S')}-{args.seed}")
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError:  # TensorBoard would raise after the first epoch
        raise UsageError(
            f"output folder {folder}: its name is not UTF-8; give --model-dir another"
        ) from None
    # After the death of NNI's manager the same trial may still be saving in its earlier process.
    patience = 30 if trial.inside else 0
    try:
        if trial.inside or args.resume or args.model_dir:
            until_end.enter_context(hold_folder(folder, patience))
        else:
            folder = hold_new_folder(folder, until_end)
    except BlockingIOError:
        raise UsageError(
            f"another process is still at work in {folder}: wait for its end, or give --model-dir "
            "another folder"
        ) from None
    except OSError as error:
        raise UsageError(
            f"output folder {folder} cannot be written: {error.strerror}; give --model-dir another"
        ) from None
    checkpoint = folder / utils_vit.LAST
    kept = (folder / name for name in (utils_vit.LAST, utils_vit.PREVIOUS, utils_vit.BEST))
    if not args.resume and any(map(Path.exists, kept)):
        # `nnictl resume` starts trials in flight again, in the folder that holds their checkpoint.
        if not (trial.inside or args.auto_resume):
            raise UsageError(
                f"{folder} holds a run already: continue it with --resume {checkpoint} or "
                "--auto-resume, or give --model-dir another folder"
            )
        state = utils_vit.load_newest(checkpoint)[0]
        saved = make_parser().with_defaults(state["args"])
        args.num_classes = args.num_classes or saved["num_classes"]
        if args.warmup_epochs == args.epochs / 10:  # not given: a longer run keeps its own
            args.warmup_epochs = saved.get("warmup_epochs")
            if (args.warmup_epochs or 0) > args.epochs > state["epoch"] + 1:  # not finished either
                raise UsageError(
                    f"{folder} holds a run with a warm-up of {args.warmup_epochs:g} epochs: give --epochs "
                    "at least as many"
                )
        for name in undecided & saved.keys():  # on another machine, say, they would be others
            setattr(args, name, saved[name])
        if changes := differences(saved, saved_parameters(args)):
            raise UsageError(f"{folder} holds a run with other parameters: {changes}")
        args.resume = checkpoint
    elif not (args.resume or trial.inside) and (folder / "results.json").exists():
        raise UsageError(
            f"{folder} holds the results of a run without its checkpoints: give --model-dir another folder"
        )
    return folder


def hold_new_folder(folder: Path, until_end: ExitStack) -> Path:
    """Hold, `until_end`, the first of `folder`, `folder`-2, `folder`-3, ... that was not there.

    Raises OSError if it cannot be written.
    """
    name, number = folder.name, 1
    while True:  # a loop of the shell may start several in a second
        try:
            until_end.enter_context(hold_folder(folder, 0, new=True))
            return folder
        except FileExistsError:
            number += 1
            folder = folder.with_name(f"{name}-{number}")


@contextmanager
def hold_folder(folder: Path, seconds: float, new: bool = False) -> Iterator[None]:
    """Make `folder` and keep other processes out of it, after waiting up to `seconds` for one to leave.

    The lock ends with the process, however that ends; a folder that nothing came into is removed
    again. Raises BlockingIOError if another process stays, OSError if the folder cannot be written or, where
    a `new` one is wanted, was there.
    """
    made = new or not folder.exists()
    file, deadline = folder / ".lock", time.monotonic() + seconds
    while True:
        folder.mkdir(parents=True, exist_ok=not new)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.1)
            continue
        except OSError:  # a file system without locks, which is no reason not to train
            break
        if os.fstat(descriptor).st_nlink:
            break
        os.close(descriptor)  # whoever left has removed the file meanwhile
    try:
        yield
    finally:
        with suppress(OSError):  # read-only or gone by now
            file.unlink()
            if made:
                folder.rmdir()  # fails if there is anything in it
        os.close(descriptor)
