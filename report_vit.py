"""What a run measured and where it is written: metrics, results.json, TensorBoard, the two pictures."""

import io
import json
import math
import os
import threading
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from data_vit import Data
from files_vit import json_object, replace_file
from folder_vit import printable

# Direction in which a metric improves; accuracies are in percent, AUC in 0 to 1.
METRICS = {"accuracy": "max", "balanced_accuracy": "max", "auc": "max", "loss": "min"}
Z_95 = 1.959964  # a normal distribution has 95 % within so many standard deviations


def improves(metric: str, line: dict[str, Any], best: dict[str, Any]) -> bool:
    """Whether an epoch is better than the best before: by `metric` and, where that is the same, by the loss."""
    sign = 1 if METRICS[metric] == "max" else -1
    merit, most = ((sign * x[f"val_{metric}"], -x["val_loss"]) for x in (line, best))
    return merit > most


def accuracies(predicted: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Accuracy and balanced accuracy, in percent, of class numbers (images,) against (images,)."""
    images = np.bincount(targets)
    hits = np.bincount(targets[predicted == targets], minlength=len(images))
    present = images > 0
    return {
        "accuracy": 100 * float(hits.sum() / images.sum()),
        "balanced_accuracy": 100 * float(np.mean(hits[present] / images[present])),
    }


def measure(probabilities: np.ndarray, targets: np.ndarray) -> dict[str, float | None]:
    """The `accuracies` and AUC of (images, classes) against (images,).

    AUC is macro one-vs-rest beyond two classes, and None where a class has no image.
    """
    auc = area_under_curve(probabilities, targets)
    return accuracies(probabilities.argmax(axis=1), targets) | {"auc": auc}


def area_under_curve(probabilities: np.ndarray, targets: np.ndarray) -> float | None:
    """AUC, the mean of the classes, each against the rest; None if a class has no image."""
    if np.bincount(targets, minlength=probabilities.shape[1]).min() == 0:
        return None
    areas = []
    for number, scores in enumerate(probabilities.T):
        own = targets == number
        areas.append(_share_below(scores[own], scores[~own]).mean())
    return float(np.mean(areas))


def area_error(probabilities: np.ndarray, targets: np.ndarray) -> float | None:
    """Standard error of `area_under_curve`; None if a class has less than two images.

    That of DeLong et al. (1988, https://doi.org/10.2307/2531595): how much what each image adds to the
    area varies within its class. Takes three times as long as the area.
    """
    count = np.bincount(targets, minlength=probabilities.shape[1])
    if count.min() < 2:
        return None
    parts = np.zeros(len(targets))  # what an image adds to the sum of the areas
    for number, scores in enumerate(probabilities.T):
        own = targets == number
        parts[own] += _share_below(scores[own], scores[~own]) / count[number]
        parts[~own] -= _share_below(scores[~own], scores[own]) / (len(targets) - count[number])
    variances = [n * parts[targets == i].var(ddof=1) for i, n in enumerate(count)]
    return float(np.sqrt(sum(variances))) / len(count)


def _share_below(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each score the share of `others` that is lower; of equal ones a half."""
    others = np.sort(others)
    ends = (np.searchsorted(others, scores, side) for side in ("left", "right"))
    return sum(ends) / (2 * len(others))


def confusion_matrix(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Counts (true class, predicted class) of (images, classes) against (images,)."""
    matrix = np.zeros((probabilities.shape[1],) * 2, int)
    np.add.at(matrix, (targets, probabilities.argmax(axis=1)), 1)
    return matrix


def evaluation_report(
    probabilities: np.ndarray, targets: np.ndarray, classes: list[str]
) -> dict[str, Any]:
    """The metrics of `measure` with 95 % intervals, recall per class and the confusion matrix.

    The interval of the accuracy is Wilson's (1927, https://doi.org/10.2307/2276774); the others are
    normal, with the standard error of binomial recalls, two right and two wrong added to each (Agresti and
    Coull 1998, https://doi.org/10.2307/2685469), and with DeLong's, where that is not 0.
    """
    report: dict[str, Any] = measure(probabilities, targets)
    matrix = confusion_matrix(probabilities, targets)
    images = matrix.sum(axis=1)
    present = images > 0
    recall = matrix.diagonal() / np.maximum(images, 1)

    n, share = len(targets), report["accuracy"] / 100
    middle = (share + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
    half = Z_95 * math.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n**2)) / (1 + Z_95**2 / n)
    # By rounding it could leave out 0 or 100 %, or go beyond.
    low, high = max(0.0, min(middle - half, share)), min(1.0, max(middle + half, share))
    report["accuracy_95"] = [100 * low, 100 * high]
    counted = images[present] + 4
    share = (matrix.diagonal()[present] + 2) / counted
    variances = share * (1 - share) / counted
    error = 100 * math.sqrt(variances.sum()) / int(present.sum())
    report["balanced_accuracy_95"] = _interval(report["balanced_accuracy"], error, 100)
    error = area_error(probabilities, targets)
    certain = error is None or error < 1e-9  # of an area of 1 rounding leaves 1e-17
    report["auc_95"] = None if certain else _interval(report["auc"], error, 1)

    report["recall"] = {
        name: 100 * float(recall[i]) if present[i] else None for i, name in enumerate(classes)
    }
    report["confusion_matrix"] = matrix.tolist()
    report["images"] = n
    return report


def _interval(value: float, error: float, largest: float) -> list[float]:
    return [max(0.0, value - Z_95 * error), min(largest, value + Z_95 * error)]


def describe(
    args: Any, device: torch.device, data: Data, model: torch.nn.Module, output: Path, step: int
) -> list[str]:
    """The first lines of a log: device, images, model, folder."""
    name = "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    source = args.download_dir or "the digits demo (--download-dir for your own images)"
    counts = f"{len(data.train):,} to train, {len(data.val):,} to validate"
    counts += f", {len(data.test):,} to test" if data.test else ", no test/"
    names = ", ".join(data.classes[:10]) + (", ..." if len(data.classes) > 10 else "")
    parameters = sum(p.numel() for p in model.parameters())
    return [
        f"device  {name}, CPU threads {torch.get_num_threads()}, {args.precision}",
        f"data    {source}: {counts}; {len(data.classes)} classes: {names}",
        *(f"        {note}" for note in data.notes),
        f"model   {args.arch}, image {args.image_size} x {args.image_size} x {args.channel} in "
        f"{args.patch_num} x {args.patch_num} patches, {parameters:,} parameters",
        f"output  {output}",
        *([f"resumed after step {step}"] if step else []),
    ]


def epoch_text(line: dict[str, Any], epochs: int, is_best: bool) -> str:
    """One line of the log for one epoch."""
    auc = "" if line["val_auc"] is None else f", auc {line['val_auc']:.4f}"
    return (
        f"epoch {line['epoch']:>3}/{epochs}  "
        f"train loss {line['train_loss']:.4f}, accuracy {line['train_accuracy']:.2f} %  "
        f"val loss {line['val_loss']:.4f}, accuracy {line['val_accuracy']:.2f} %, "
        f"balanced {line['val_balanced_accuracy']:.2f} %{auc}  "
        f"lr {line['lr']:.2e}  {line['images_per_second']:,.0f} images/s  {line['seconds']:.1f} s"
        + ("  best" if is_best else "")
    )


def final_metrics(args: Any, best: dict[str, Any], output: Path) -> dict[str, float]:
    """The final metrics for NNI: the best epoch's; under PBT the last one's, which the next trial goes on from."""
    line = lines_of(output)[-1] if args.save_checkpoint_dir else best
    return nni_metrics(line, args.metric)


def nni_metrics(line: dict[str, Any], metric: str) -> dict[str, float]:
    """What NNI is told of an epoch: the metric as "default", all of validation beside it."""
    values = {name: line[f"val_{name}"] for name in METRICS}
    return {"default": values[metric]} | {k: v for k, v in values.items() if v is not None}


def results_text(results: dict[str, Any], output: Path) -> list[str]:
    """The last lines of a log: the best epoch, the test, the files."""
    metric, test, best = results["metric"], results["test"], results["validation"]
    beside = "" if metric == "accuracy" else f", {metric} {best[metric]:.4f}"
    lines = [
        f"best    epoch {results['best_epoch']}, selected by {metric}: "
        f"validation accuracy {best['accuracy']:.2f} %{beside}"
    ]
    if test:
        low, high = test["accuracy_95"]
        auc = "" if test["auc"] is None else f", auc {test['auc']:.4f}"
        lines.append(
            f"test    accuracy {test['accuracy']:.2f} % (95 % interval {low:.1f} to {high:.1f}, "
            f"{test['images']:,} images), balanced {test['balanced_accuracy']:.2f} %{auc}"
        )
    return [
        *lines,
        f"files   {output}: model_best.pth.tar, results.json, metrics.png, tensorboard/",
    ]


def has_results(folder: Path, steps: int) -> bool:
    """Whether results.json is that of a run of so many steps; a run made longer has an older one."""
    file = folder / "results.json"
    return file.exists() and json_object(file.read_bytes()).get("steps") == steps


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; what a crash or somebody's hand made of one is left out."""
    file = folder / "metrics.jsonl"
    text = file.read_bytes() if file.exists() else b""
    return [line for line in map(json_object, text.splitlines()) if is_line(line)]


def is_line(line: dict[str, Any]) -> bool:
    """Whether it has what is read of an epoch's line, all of it numbers; AUC is None where a class has no image."""
    numbers = {
        name for name, v in line.items() if isinstance(v, int | float) and -1e300 < v < 1e300
    }
    counts = ("epoch", "step")
    needed = {*counts, "train_loss", "train_accuracy", *(f"val_{name}" for name in METRICS)}
    if line.get("val_auc", 0) is None:
        numbers.add("val_auc")
    whole = needed <= numbers == line.keys()
    return whole and all(isinstance(line[n], int) and 0 <= line[n] < 2**63 for n in counts)


class Recorder:
    """The files of one run that are not checkpoints: metrics.jsonl, tensorboard/, results.json, pictures."""

    def __init__(self, folder: Path, step: int) -> None:
        """Goes on after optimizer step `step`: lines of later ones, which will be run again, are dropped."""
        self.folder = folder
        self.file = folder / "metrics.jsonl"
        self.lines = [line for line in lines_of(folder) if line["step"] <= step]
        replace_file(self.file, "".join(json.dumps(line) + "\n" for line in self.lines).encode())
        self.tensorboard: Any = None

    def epoch(self, line: dict[str, Any]) -> None:
        """Append the metrics of one epoch, {"epoch": 1, "train_loss": ..., "val_accuracy": ..., ...}."""
        self.lines.append(line)
        with open(self.file, "a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())  # the checkpoint that follows says that this line is there
        events = self._events(line["epoch"])
        for name, value in line.items():
            if value is not None and name not in ("epoch", "step"):
                part, _, metric = name.partition("_")  # of one part of the data, or of the run
                tag = f"{part}/{metric}" if part in ("train", "val") else f"run/{name}"
                events.add_scalar(tag, value, line["epoch"])
        events.flush()

    def first_batch(self, images: torch.Tensor) -> None:
        """Show images (batch, channels, size, size) in [-1, 1] in TensorBoard, as the model sees them."""
        if not len(images):  # a batch can be smaller than the number of processes
            return
        shown = (images[:16].cpu() + 1) / 2
        self._events(1).add_images("train/first_batch", shown.clamp(0, 1), 1)

    def close(self, results: dict[str, Any]) -> None:
        """Draw metrics.png and the confusion matrices of validation and test; then write results.json.

        Both matrices go to TensorBoard; that of the test, if there was one, to confusion_matrix.png too.
        results.json says that all is there, so it comes last.
        """
        from PIL import Image

        draw_metrics(self.lines, results["best_epoch"], self.folder / "metrics.png")
        # Epochs of PBT do not begin with 1; there are none where only checkpoints were copied here.
        events = self._events(max((line["epoch"] for line in self.lines), default=0) + 1)
        matrices = {"validation": results["validation_confusion_matrix"]}
        if results["test"] is not None:
            matrices["test"] = results["test"]["confusion_matrix"]
        for name, matrix in matrices.items():
            drawing = io.BytesIO()
            draw_confusion_matrix(np.array(matrix), results["classes"], f"{name} images", drawing)
            picture = np.array(Image.open(drawing).convert("RGB"))
            tag = f"confusion_matrix/{name}"
            events.add_image(tag, picture, results["best_epoch"], dataformats="HWC")
            if name == "test":
                (self.folder / "confusion_matrix.png").write_bytes(drawing.getvalue())
        events.close()
        replace_file(self.folder / "results.json", (json.dumps(results, indent=2) + "\n").encode())

    def _events(self, epoch: int) -> Any:
        """TensorBoard's writer; what an earlier start wrote of `epoch` and later ones is hidden."""
        if self.tensorboard is None:
            # Takes long, so not before the first step.
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = without_os_errors
            self.tensorboard = SummaryWriter(str(self.folder / "tensorboard"), purge_step=epoch)
        return self.tensorboard


def without_os_errors(failure: threading.ExceptHookArgs) -> None:
    """A full disk is no traceback of TensorBoard's thread: its next call raises the same, in ours."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


def draw_metrics(lines: list[dict[str, Any]], best_epoch: int, file: Path) -> None:
    """Loss and accuracy of training and validation by epoch, the best epoch marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    epochs = [line["epoch"] for line in lines]
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for part, label in (("train", "training"), ("val", "validation")):
            values = [line[f"{part}_{name}"] for line in lines]
            axes.plot(epochs, values, marker=".", label=label)
        axes.axvline(best_epoch, color="grey", linestyle=":", label=f"best epoch, {best_epoch}")
        axes.set(xlabel="epoch", ylabel=name + (" (%)" if name == "accuracy" else ""))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    figure.savefig(file, dpi=120)


def draw_confusion_matrix(
    matrix: np.ndarray, classes: list[str], title: str, file: BinaryIO
) -> None:
    """Counts of (true class, predicted class), shaded by the share of the true class, as PNG."""
    from matplotlib.figure import Figure

    # Folders can have any names: bytes, formulas to matplotlib, letters that its font lacks.
    names = [printable(name) for name in classes]
    names = [name if len(name) <= 40 else f"{name[:20]} ... {name[-15:]}" for name in names]
    has_names = len(classes) <= 100  # beyond that they would not be legible
    room = 0.08 * max(map(len, names)) if has_names else 0
    side = min(max(3.5, 0.5 * len(classes) + 1.5 + room), 30)  # inches
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(classes) <= 30:  # nor would the numbers
        for (row, column), count in np.ndenumerate(matrix):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=color)
    if has_names:
        names = [name.replace("$", r"\$") for name in names]
        ticks = range(len(classes))
        axes.set_xticks(ticks, names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(ticks, names)
    axes.set(xlabel="predicted", ylabel="true", title=title)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure.savefig(file, dpi=120)
