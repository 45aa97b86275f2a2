"""Use a trained model: what it says of images, how good it is on others, a file for other programs.

python predict_vit.py model_best.pth.tar photo.jpg folder > predictions.csv
python predict_vit.py model_best.pth.tar --evaluate my_images/test
python predict_vit.py model_best.pth.tar --export model.onnx
"""

import argparse
import csv
import importlib.util
import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import files_vit
import machine_vit
import report_vit
import setup_vit
import step_vit
import utils_vit
import vit
from config_vit import Parser, UsageError, expanded_path, model_sizes
from data_vit import Split, batches
from folder_vit import (
    IMAGE_EXTENSIONS,
    DataError,
    ImageFolder,
    check_classes,
    files_below,
    in_one_line,
    not_decoded,
    printable,
    read_image_folder,
    sizes_and_times,
)
from images_vit import decode_here
from options_vit import make_parser
from stop_vit import end_by_signal
from utils_vit import CheckpointError

DECODED_AT_ONCE = 2**28  # bytes


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 with a line on stderr for each bad input."""
    parser = Parser(prog="predict_vit.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    # fmt: off
    add("model", type=expanded_path, help="model_best.pth.tar of a run")
    add("images", type=expanded_path, nargs="*", default=[], help="files, and folders with images at any depth: a line of CSV for each image, with the probability of every class")
    add("--evaluate", type=expanded_path, metavar="DIR", help="folder with the class folders of the training: prints what results.json says of test/")
    add("--export", type=expanded_path, metavar="FILE", help=".pt2 (torch.export) or .onnx: writes the model, from pixels, uint8 (batch, channels, size, size), to probabilities (batch, classes)")
    # fmt: on
    try:
        args = parser.parse_intermixed_args(argv)
        if bool(args.images) + bool(args.evaluate) + bool(args.export) != 1:
            raise UsageError("give either images, --evaluate or --export")
        classifier = Classifier(args.model)
        if args.export:
            export(classifier, args.export)
        elif args.evaluate:
            print(json.dumps(evaluate(classifier, args.evaluate), indent=2))
        else:
            return print_predictions(classifier, images_of(args.images, classifier.classes))
        return 0
    except (UsageError, DataError, CheckpointError) as error:
        print(f"predict_vit.py: error: {in_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        end_by_signal(signal.SIGINT)
    except RuntimeError as error:
        if not step_vit.out_of_memory(error):
            raise
        on_gpu = torch.cuda.is_initialized()
        remedy = "CUDA_VISIBLE_DEVICES= computes on the CPU" if on_gpu else "end other programs"
        print(f"predict_vit.py: the device has no memory left: {remedy}", file=sys.stderr)
    except OSError as error:  # a folder that cannot be listed, a full disk
        print(f"predict_vit.py: {in_one_line(error)}", file=sys.stderr)
    return 1


class Classifier(nn.Module):
    """Pixels uint8 (batch, channels, size, size) -> probabilities (batch, classes), by a checkpoint's selected model.

    The pixels are those of `decode_image`, on `device`. `args` are the parameters of its run. Raises CheckpointError.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        saved = utils_vit.load_checkpoint(file)
        parser = make_parser()
        parameters = parser.given_by(str(file), saved["args"])
        self.args = argparse.Namespace(**parser.with_defaults(parameters))
        self.classes: list[str] = saved["classes"]
        self.device = torch.device("cuda", 0) if setup_vit.usable_gpus() else torch.device("cpu")
        if self.device.type == "cuda":
            setup_vit.start_gpu(self.device)
        try:
            self.model = vit.build_model(
                self.args.arch, num_classes=len(self.classes), depth=self.args.vt_depth,
                **model_sizes(self.args),
            )  # fmt: skip
            self.model.load_state_dict(utils_vit.selected_weights(saved))
        except (ValueError, RuntimeError, TypeError) as error:  # another vit-pytorch, or none, say
            raise CheckpointError(f"checkpoint {file}: {error}") from None
        self.to(self.device).eval()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels.float() / 127.5 - 1).softmax(dim=1)

    @torch.inference_mode()
    def predict(self, images: ImageFolder) -> Iterator[tuple[ImageFolder, Tensor, dict[int, str]]]:
        """The images part by part: logits (images, classes) on the CPU, and why some have none, by index.

        In the precision of the run, where this device computes in it: as its validation did.
        """
        size, channels = self.args.image_size, self.args.channel
        precision = self.args.precision
        fast = setup_vit.computes_in(precision, self.device)
        autocast = step_vit.autocast(self.device, precision if fast else "float32")
        count = max(1, DECODED_AT_ONCE // (channels * size**2))
        for first in range(0, len(images.names), count):
            part = slice(first, first + count)
            some = replace(images, names=images.names[part], targets=images.targets[part])
            shape = (len(some.names), channels, size, size)
            _, problems = sizes_and_times(some)
            decoded = decode_here(some, shape, None, machine_vit.usable_cores(), "memory", problems)
            split = Split(decoded.pixels, some.targets, np.arange(shape[0]))
            with autocast:
                logits = [
                    self.model(shown).float() for shown, *_ in batches(split, 64, self.device)
                ]
            yield some, torch.cat(logits).cpu(), decoded.broken


def images_of(paths: list[Path], classes: list[str]) -> ImageFolder:
    """The files among `paths`, and the images below the folders among them, of no known class."""
    names: list[str] = []
    for path in paths:
        if not os.path.isdir(path):  # what cannot be read either is named with the files
            names.append(str(path))
            continue
        try:
            found = [f"{path}/{name[2:]}" for name in files_below(str(path), ".")]
        except OSError as error:
            where = os.path.normpath(error.filename)
            raise DataError(f"folder {where} cannot be listed: {error.strerror}") from None
        found = [name for name in found if Path(name).suffix.lower() in IMAGE_EXTENSIONS]
        if not found:
            raise DataError(f"folder {path} has no images (*.jpg, *.png, ...)")
        names += found
    return ImageFolder(Path(), classes, names, np.zeros(len(names), np.int64))


def print_predictions(classifier: Classifier, images: ImageFolder) -> int:
    """A line of CSV for each image; returns 2 if there were some without, which stderr names.

    A column "image" or "class" has a "_" behind its name where a class has that name, or more of them.
    """
    # The names of files can be any bytes, whatever the locale.
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape", newline="")
    own = ["image", "class"]
    for i in range(len(own)):
        while own[i] in classifier.classes:
            own[i] += "_"
    print(csv_line([*own, *classifier.classes]))
    status = 0
    for part, logits, broken in classifier.predict(images):
        for i, probabilities in enumerate(logits.double().softmax(dim=1)):
            if i in broken:
                print(printable(f"predict_vit.py: {part.path(i)}: {broken[i]}"), file=sys.stderr)
                status = 2
                continue
            best = classifier.classes[int(probabilities.argmax())]
            numbers = (f"{p:.6g}" for p in probabilities.tolist())
            print(csv_line([part.path(i), best, *numbers]))
        sys.stdout.flush()
    return status


def csv_line(cells: list[Any]) -> str:
    """One line of CSV without its end: csv's own is that of Windows, with another it would quote too little."""
    line = io.StringIO()
    csv.writer(line).writerow(cells)
    return line.getvalue().removesuffix("\r\n")


def evaluate(classifier: Classifier, folder: Path) -> dict[str, object]:
    """Loss, metrics and confusion matrix of the images in the class folders of `folder`.

    Images that cannot be decoded are named, and left out if the run left them out (--skip-broken), else
    DataError is raised.
    """
    try:
        images = read_image_folder(folder, classifier.classes)
    except OSError as error:
        raise DataError(f"folder {error.filename} cannot be listed: {error.strerror}") from None
    parts: list[Tensor] = []
    broken: dict[int, str] = {}
    for _, logits, problems in classifier.predict(images):
        before = sum(map(len, parts))
        broken |= {before + i: problem for i, problem in problems.items()}
        parts.append(logits)
    if broken:
        named = not_decoded([f"{images.path(i)} ({why})" for i, why in sorted(broken.items())])
        if not classifier.args.skip_broken:
            raise DataError(f"{named}. Repair or remove them")
        check_classes(images, broken)
        print(printable(f"predict_vit.py: {named}. Left out (--skip-broken)"), file=sys.stderr)
    kept = np.delete(np.arange(len(images.names)), list(broken))
    logits, targets = torch.cat(parts)[kept], images.targets[kept]
    loss = {"loss": F.cross_entropy(logits, torch.from_numpy(targets)).item()}
    probabilities = logits.double().softmax(dim=1).numpy()
    return loss | report_vit.evaluation_report(probabilities, targets, classifier.classes)


def export(classifier: Classifier, file: Path) -> None:
    """Write the model, in float32, with its classes, for one or more images at once. Raises UsageError.

    .pt2 holds classes.json beside the program, .onnx the same text among its metadata.
    """
    kind = file.suffix.lower()
    if kind not in (".pt2", ".onnx"):
        raise UsageError(f"--export {file} is neither .pt2 nor .onnx")
    missing = [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]
    if kind == ".onnx" and missing:
        raise UsageError(f"--export {file} needs packages: pip install {' '.join(missing)}")
    classifier.cpu()  # the file may go anywhere
    size, channels = classifier.args.image_size, classifier.args.channel
    pixels = torch.zeros(2, channels, size, size, dtype=torch.uint8)
    shapes, classes = {"pixels": {0: torch.export.Dim("batch")}}, json.dumps(classifier.classes)
    try:
        program = torch.export.export(classifier, (pixels,), dynamic_shapes=shapes)
        if kind == ".pt2":
            archive = io.BytesIO()
            torch.export.save(program, archive, extra_files={"classes.json": classes})
            content = archive.getvalue()
        else:
            names = {"input_names": ["pixels"], "output_names": ["probabilities"]}
            translated = torch.onnx.export(program, dynamo=True, verbose=False, **names)
            translated.model.metadata_props["classes"] = classes
            content = translated.model_proto.SerializeToString()
    except Exception as error:  # whatever an architecture of vit-pytorch makes them raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"arch {classifier.args.arch} cannot be exported to {kind}: {reason}"
        ) from None
    try:
        files_vit.replace_file(file, content)
    except OSError as error:
        raise UsageError(f"--export {file} cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # predict_vit.py ... | head
    sys.exit(main())
