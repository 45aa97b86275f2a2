"""Whole runs of main_vit.py on tiny images: what they learn, write, repeat, resume and refuse."""

import io
import json
import math
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    log_loss,
    recall_score,
    roc_auc_score,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import report_vit
import step_vit
from images_vit import decode_image
from utils_vit import TrainingState, load_checkpoint, save_checkpoint, selected_weights
from vit import build_model

CLASSES = ["cat", "dog", "eel"]
TRAIN, VAL, TEST = 30, 12, 15  # images of each class
TINY = {
    "image_size": 8, "patch_size": 4, "vt_dim": 16, "vt_depth": 1, "vt_heads": 2, "mlp_dim": 32,
    "batch_size": 16, "lr": 3e-3, "epochs": 2, "precision": "float32", "threads": 1,
}  # fmt: skip
STEPS = math.ceil(TRAIN * len(CLASSES) / TINY["batch_size"])  # per epoch
EVERYTHING_RANDOM = {
    "dropout": 0.2, "emb_dropout": 0.1, "flip": "both", "affine": 0.2,
    "moving_average_decay": 0.9, "label_smoothing": 0.1,
}  # fmt: skip
EVERY_AUGMENTATION = {
    "flip": "both", "affine": 0.2, "crop": 0.4, "color": 0.4, "randaugment": 6, "erase": 0.3,
    "mixup": 0.8, "cutmix": 1.0,
}  # fmt: skip
RunMain = Callable[..., Any]
ReadLines = Callable[[Path], list[dict[str, Any]]]


def options(parameters: dict[str, Any]) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in parameters.items()]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory, make_images: Callable[..., Path]) -> Path:
    """train/, val/ and test/ of three classes; some images lie in a wrong class, so nothing is perfect."""
    folder = tmp_path_factory.mktemp("images")
    for seed, (split, count) in enumerate({"train": TRAIN, "val": VAL, "test": TEST}.items()):
        make_images(folder / split, CLASSES, count, seed, noise=60)
        for i, (one, other) in enumerate([("cat", "dog"), ("dog", "eel"), ("cat", "eel")]):
            a, b = folder / split / one / f"{i:03d}.png", folder / split / other / f"{i:03d}.png"
            a.rename(folder / "exchange")
            b.rename(a)
            (folder / "exchange").rename(b)
    return folder


@pytest.fixture(scope="session")
def no_test(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without test/: runs are quicker."""
    folder = tmp_path_factory.mktemp("images")
    for split in ("train", "val"):
        (folder / split).symlink_to(images / split, target_is_directory=True)
    return folder


@pytest.fixture(scope="session")
def train_on(run_main: RunMain, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """train_on(folder, lr=0.1, ...) is the output folder of a tiny run that succeeded."""

    def train(folder: Path, **changes: Any) -> Path:
        output = tmp_path_factory.mktemp("run")
        parameters = {k: v for k, v in (TINY | changes).items() if v is not None}
        result = run_main("--download-dir", folder, "--model-dir", output, *options(parameters))
        assert result.status == 0, result.stderr
        assert list(result.cwd.iterdir()) == []  # nothing is written but the output folder
        return output

    return train


def state_of(output: Path, name: str = "checkpoint") -> dict[str, Any]:
    return load_checkpoint(output / f"{name}.pth.tar")


def equal(one: Any, other: Any) -> bool:
    """To the bit, through dictionaries, lists and tuples; not looking at times."""
    if isinstance(one, dict):
        keys = one.keys() - {"seconds", "images_per_second"}
        return keys == other.keys() - {"seconds", "images_per_second"} and all(
            equal(one[key], other[key]) for key in keys
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return one == other


TRAINED = ("model", "ema", "optimizer", "scaler", "step", "best", "outputs")


def assert_same_run(one: Path, other: Path, read_lines: ReadLines) -> None:
    assert read_lines(one) == read_lines(other)
    for name in ("checkpoint", "model_best"):
        a, b = state_of(one, name), state_of(other, name)
        assert [key for key in TRAINED if not equal(a[key], b[key])] == []


# --- learning, and files that agree -----------------------------------------------------------------


def test_it_learns(image_folder: Path, train_on: Callable[..., Path]) -> None:
    output = train_on(image_folder, epochs=6, lr=1e-2, batch_size=4, val_split=0.5)
    results = json.loads((output / "results.json").read_text())
    assert results["validation"]["accuracy"] >= 90
    assert results["test"]["accuracy"] >= 90


@pytest.fixture(scope="module", params=[0.0, 0.8], ids=["plain", "ema"])
def trained(request: pytest.FixtureRequest, images: Path, train_on: Callable[..., Path]) -> Path:
    return train_on(images, epochs=5, moving_average_decay=request.param)


def predict(output: Path, folder: Path, which: str = "selected") -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and targets of the files of `folder` by the best model, from the files alone."""
    saved = state_of(output, "model_best")
    a = saved["args"]
    model = build_model(
        a["arch"], image_size=a["image_size"], patch_size=a["patch_size"], channels=a["channel"],
        num_classes=a["num_classes"], dim=a["vt_dim"], depth=a["vt_depth"], heads=a["vt_heads"],
        mlp_dim=a["mlp_dim"], dim_head=a["dim_head"], pool=a.get("pool"),
    ).eval()  # fmt: skip
    model.load_state_dict(selected_weights(saved) if which == "selected" else saved[which])
    files = sorted(folder.glob("*/*.png"))
    pixels = np.stack([decode_image(file, a["image_size"], a["channel"]) for file in files])
    with torch.no_grad():
        logits = model(torch.from_numpy(pixels).float() / 127.5 - 1)
    targets = np.array([saved["classes"].index(file.parent.name) for file in files])
    return logits.double().softmax(1).numpy(), targets


def metrics_by_sklearn(probabilities: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    predicted = probabilities.argmax(1)
    return {
        "loss": log_loss(targets, probabilities),
        "accuracy": 100 * accuracy_score(targets, predicted),
        "balanced_accuracy": 100 * balanced_accuracy_score(targets, predicted),
        "auc": roc_auc_score(targets, probabilities, multi_class="ovr", average="macro"),
    }


def test_best_model_gives_the_numbers_reported(
    trained: Path, images: Path, read_lines: ReadLines
) -> None:
    results = json.loads((trained / "results.json").read_text())
    lines = read_lines(trained)
    best = max(lines, key=lambda line: (line["val_accuracy"], -line["val_loss"]))
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5]
    assert results["best_epoch"] == best["epoch"]
    assert 40 < results["validation"]["accuracy"] < 100
    probabilities, targets = predict(trained, images / "val")
    expected = metrics_by_sklearn(probabilities, targets)
    matrix = confusion_matrix(targets, probabilities.argmax(1)).tolist()
    assert results["validation_confusion_matrix"] == matrix
    assert results["validation"] == pytest.approx(expected, rel=1e-5)
    assert {f"val_{k}": v for k, v in results["validation"].items()}.items() <= best.items()
    assert state_of(trained, "model_best")["best"] | best == state_of(trained)["best"]

    expected = metrics_by_sklearn(*predict(trained, images / "test"))
    assert {name: results["test"][name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_the_test_report(trained: Path, images: Path) -> None:
    results = json.loads((trained / "results.json").read_text())
    test = results["test"]
    probabilities, targets = predict(trained, images / "test")
    predicted = probabilities.argmax(1)
    assert test["confusion_matrix"] == confusion_matrix(targets, predicted).tolist()
    recall = 100 * recall_score(targets, predicted, average=None)
    assert test["recall"] == pytest.approx(dict(zip(CLASSES, recall, strict=True)))
    n, p, z = TEST * 3, accuracy_score(targets, predicted), 1.959964
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert test["accuracy_95"] == pytest.approx([100 * (middle - half), 100 * (middle + half)])
    for name in ("auc", "balanced_accuracy"):
        low, high = test[f"{name}_95"]
        assert low <= test[name] <= high and low < high
    assert test["images"] == n
    assert results["images"] == {"train": TRAIN * 3, "val": VAL * 3, "test": n}
    assert results["classes"] == CLASSES


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_auc_and_its_error_are_those_of_sklearn_and_of_resampling(classes: int) -> None:
    generator = np.random.default_rng(classes)
    targets = np.r_[np.arange(classes), np.arange(classes), generator.integers(0, classes, 200)]
    scores = generator.normal(size=(len(targets), classes)) + 1.5 * np.eye(classes)[targets]
    probabilities = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    if classes == 2:
        probabilities = probabilities.round(1)  # many are equal
    auc = report_vit.area_under_curve(probabilities, targets)
    score = probabilities[:, 1] if classes == 2 else probabilities
    assert auc == pytest.approx(roc_auc_score(targets, score, multi_class="ovr"), rel=1e-9)

    members = [np.flatnonzero(targets == number) for number in range(classes)]
    samples = [np.concatenate([generator.choice(m, len(m)) for m in members]) for _ in range(1000)]
    resampled = [report_vit.measure(probabilities[s], targets[s])["auc"] for s in samples]
    error = report_vit.area_error(probabilities, targets)
    assert error == pytest.approx(np.std(resampled), rel=0.1)


def test_auc_of_classes_with_few_images() -> None:
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7]])
    assert report_vit.area_under_curve(probabilities, np.array([0, 1, 1])) == 1.0
    assert report_vit.area_error(probabilities, np.array([0, 1, 1])) is None
    assert report_vit.area_under_curve(probabilities, np.array([1, 1, 1])) is None
    report = report_vit.evaluation_report(probabilities, np.array([1, 1, 1]), ["cat", "dog"])
    assert report["recall"] == {"cat": None, "dog": pytest.approx(200 / 3)}
    assert report["auc"] is None and report["auc_95"] is None


def test_intervals_of_few_and_of_perfect_predictions_are_not_0_wide() -> None:
    targets = np.repeat([0, 1], 5)
    report = report_vit.evaluation_report(np.eye(2)[targets] * 0.8 + 0.1, targets, ["cat", "dog"])
    assert report["balanced_accuracy"] == 100 and report["auc"] == 1 and report["auc_95"] is None
    assert report["balanced_accuracy_95"][0] < 90 and report["balanced_accuracy_95"][1] == 100
    targets = np.array([0, 1, 2])
    report = report_vit.evaluation_report(np.eye(3)[[0, 1, 1]], targets, ["cat", "dog", "eel"])
    low, high = report["balanced_accuracy_95"]
    assert low < 50 and high > 85


def test_intervals_to_rounding() -> None:
    """What is certain has none, and no end is beyond what can be, or leaves out the value itself."""
    for targets in (np.repeat([0, 1, 2], [13, 16, 19]), np.repeat([0, 1], [200, 159])):
        classes = [str(number) for number in range(targets.max() + 1)]
        for right in (targets, (targets + 1) % len(classes)):
            probabilities = np.eye(len(classes))[right] * 0.7 + 0.1
            report = report_vit.evaluation_report(probabilities, targets, classes)
            low, high = report["accuracy_95"]
            assert 0 <= low <= report["accuracy"] <= high <= 100 and high - low > 1
            if right is targets:
                assert report["auc"] == pytest.approx(1) and report["auc_95"] is None


def test_the_interval_of_balanced_accuracy_holds_the_true_one() -> None:
    """About 95 of 100 times, with few images and recalls near 1 too."""
    generator, inside = np.random.default_rng(0), 0
    for _ in range(400):
        targets = np.repeat([0, 1, 2], [6, 10, 30])
        right = generator.random(len(targets)) < np.array([0.95, 0.8, 0.9])[targets]
        predicted = np.where(right, targets, (targets + 1) % 3)
        report = report_vit.evaluation_report(np.eye(3)[predicted], targets, ["cat", "dog", "eel"])
        low, high = report["balanced_accuracy_95"]
        inside += low <= 100 * (0.95 + 0.8 + 0.9) / 3 <= high
    assert inside / 400 >= 0.93


@pytest.mark.slow
def test_pictures_of_many_classes(
    make_images: Callable[..., Path], run_main: RunMain, tmp_path: Path
) -> None:
    """An inch or so for each of 230 classes would make a picture that Pillow takes for an attack."""
    make_images(tmp_path / "train", ["cat"], 3)
    for i in range(229):
        shutil.copytree(tmp_path / "train" / "cat", tmp_path / "train" / f"cat{i:03d}")
    shutil.copytree(tmp_path / "train", tmp_path / "test")
    where = ("--download-dir", tmp_path, "--model-dir", tmp_path / "run")
    result = run_main(*where, *options(TINY | {"epochs": 1}))
    assert (result.status, result.stderr) == (0, "")
    with Image.open(tmp_path / "run" / "confusion_matrix.png") as picture:
        assert picture.width == 3600


def test_classes_of_any_name(
    make_images: Callable[..., Path], run_main: RunMain, tmp_path: Path
) -> None:
    """A formula to matplotlib, bytes that are no text, letters that its font lacks."""
    names = ["$^$", os.fsdecode(b"caf\xe9"), "\uace0\uc591\uc774"]
    for part in ("train", "test"):
        make_images(tmp_path / part, CLASSES, 3)
        for known, name in zip(CLASSES, names, strict=True):
            (tmp_path / part / known).rename(tmp_path / part / name)
    where = ("--download-dir", tmp_path, "--model-dir", tmp_path / "run")
    result = run_main(*where, *options(TINY | {"epochs": 1}))
    assert (result.status, result.stderr) == (0, "")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["classes"] == sorted(names)


def test_ema_weights_are_the_selected_ones(trained: Path, images: Path) -> None:
    saved = state_of(trained, "model_best")
    if saved["ema"] is None:
        assert saved["args"]["moving_average_decay"] == 0
        return
    loss = json.loads((trained / "results.json").read_text())["validation"]["loss"]
    assert log_loss(*predict(trained, images / "val", "ema")[::-1]) == pytest.approx(loss, rel=1e-5)
    assert log_loss(*predict(trained, images / "val", "model")[::-1]) != pytest.approx(loss, 5e-5)


def test_curves_pictures_and_parameters(trained: Path, read_lines: ReadLines) -> None:
    events = EventAccumulator(str(trained / "tensorboard")).Reload()
    lines = read_lines(trained)
    for name in ("train_loss", "train_accuracy", "val_loss", "val_balanced_accuracy", "val_auc"):
        scalars = events.Scalars(name.replace("_", "/", 1))
        assert [s.step for s in scalars] == [1, 2, 3, 4, 5]
        assert [s.value for s in scalars] == pytest.approx([line[name] for line in lines])
    # The first batch: 16 images of 8 x 8 in two rows, augmented; these classes differ by colour.
    [first] = events.Images("train/first_batch")
    grid = np.asarray(Image.open(io.BytesIO(first.encoded_image_string)), np.int64)
    shown = grid.reshape(2, 8, 8, 8, 3).swapaxes(1, 2).reshape(16, 8, 8, 3)
    colors = {tuple(image.mean((0, 1)).argsort()) for image in shown}
    assert first.step == 1 and len(colors) > 1 and len({image.tobytes() for image in shown}) == 16
    results = json.loads((trained / "results.json").read_text())
    for part in ("validation", "test"):
        [matrix] = events.Images(f"confusion_matrix/{part}")
        assert matrix.step == results["best_epoch"] and matrix.width > 300
    assert (
        matrix.encoded_image_string
        != events.Images("confusion_matrix/validation")[0].encoded_image_string
    )
    for name in ("metrics.png", "confusion_matrix.png"):
        with Image.open(trained / name) as picture:
            assert picture.width > 300 and len(np.unique(np.asarray(picture))) > 10
    parameters = yaml.safe_load((trained / "args.yaml").read_text())
    assert parameters == state_of(trained)["args"] == state_of(trained, "model_best")["args"]
    assert parameters["patch_num"] == 2 and parameters["scheduler"] == "cosine"
    last = state_of(trained)
    assert last["step"] == 5 * STEPS == lines[-1]["step"] and last["outputs"] == {}
    assert sorted(os.listdir(trained)) == [
        *("args.yaml", "checkpoint.pth.tar", "confusion_matrix.png", "metrics.jsonl"),
        *("metrics.png", "model_best.pth.tar", "previous.pth.tar", "results.json", "tensorboard"),
    ]


def test_train_metrics_are_those_of_the_steps(
    no_test: Path, train_on: Callable[..., Path], read_lines: ReadLines
) -> None:
    """With a step too small to matter, training sees what validation of train/ would."""
    output = train_on(no_test, epochs=1, lr=1e-12)
    line = read_lines(output)[0]
    expected = metrics_by_sklearn(*predict(output, no_test / "train"))
    del expected["auc"]  # would need all the probabilities of an epoch
    assert {k: line[f"train_{k}"] for k in expected} == pytest.approx(expected, rel=1e-4)


def test_args_yaml_repeats_the_run(
    images: Path, train_on: Callable[..., Path], run_main: RunMain, read_lines: ReadLines
) -> None:
    for threads in (1, None):
        first = train_on(images, **EVERYTHING_RANDOM, precision="auto", threads=threads)
        again = first.with_name(first.name + "-again")
        result = run_main("--config", first / "args.yaml", "--model-dir", again)
        assert result.status == 0, result.stderr
        assert_same_run(first, again, read_lines)
        assert (first / "args.yaml").read_text() == (again / "args.yaml").read_text()
        assert (first / "results.json").read_text() == (again / "results.json").read_text()


@pytest.mark.parametrize(
    "changes",
    [
        *({"optimizer": name} for name in ("adam", "adamw", "rmsprop")),
        {"optimizer": "sgd", "lr": 5e-2},
        {"gamma": 0.8},
        {"scheduler": "constant"},
        {"warmup_epochs": 2},
        {"label_smoothing": 0.1},
        {"clip_grad": 0},
        {"clip_grad": 0.1},
        {"moving_average_decay": 0.9999},
        {"precision": "bfloat16"},
        {"precision": "float16"},
        {"dropout": 0.1, "emb_dropout": 0.1},
        {"pool": "mean"},
        {"channel": 1, "patch_size": 2},
        {"flip": "both", "affine": 0.1},
        {"crop": 0.5, "color": 0.2, "randaugment": 2, "erase": 0.25},
        {"mixup": 0.2, "label_smoothing": 0.1},
        {"cutmix": 0.2},
        *({"arch": name} for name in ("simple_vit", "deepvit", "cait", "vit_with_patch_dropout")),
        {"arch": "simple_vit_with_register_tokens", "precision": "bfloat16"},
    ],
    ids=str,
)
def test_every_way_of_training_learns(
    changes: dict[str, Any], no_test: Path, train_on: Callable[..., Path], read_lines: ReadLines
) -> None:
    lines = read_lines(train_on(no_test, epochs=5, **changes))
    losses = [line["train_loss"] for line in lines]
    assert np.mean(losses[3:]) < losses[0]
    # Grey leaves only brightness to tell the colours apart, and the norm of the patches removes it.
    assert "channel" in changes or max(line["val_accuracy"] for line in lines) > 50


@pytest.mark.parametrize("steps", [1, STEPS - 1, STEPS, STEPS + 2, 2 * STEPS + 5])
def test_max_steps_is_exact(
    steps: int, no_test: Path, train_on: Callable[..., Path], read_lines: ReadLines
) -> None:
    output = train_on(no_test, max_steps=steps)
    expected = min(steps, 2 * STEPS)
    saved, lines = state_of(output), read_lines(output)
    assert saved["step"] == json.loads((output / "results.json").read_text())["steps"] == expected
    assert {int(s["step"]) for s in saved["optimizer"]["state"].values()} == {expected}
    assert [line["step"] for line in lines] == [s for s in (STEPS, 2 * STEPS) if s < expected] + [
        expected
    ]
    assert all("val_accuracy" in line for line in lines)
    assert state_of(output, "model_best")["best"]["step"] in [line["step"] for line in lines]


def test_learning_rates_of_the_epochs(
    no_test: Path, train_on: Callable[..., Path], read_lines: ReadLines
) -> None:
    """`lr` of a line is that of the epoch's last step."""
    output = train_on(no_test, epochs=3, gamma=0.5, lr=0.01)
    assert [line["lr"] for line in read_lines(output)] == pytest.approx([0.01, 0.005, 0.0025])
    output = train_on(no_test, epochs=4, warmup_epochs=2, lr=0.01)
    rates = [line["lr"] for line in read_lines(output)]
    assert rates == pytest.approx([0.005, 0.01, 0.005, 0.0], abs=0.002)
    assert rates[-1] > 0  # no step is taken in vain


def test_a_run_of_a_single_step_changes_the_weights(
    no_test: Path, train_on: Callable[..., Path]
) -> None:
    runs = [train_on(no_test, epochs=1, batch_size=1000, weight_decay=0, lr=lr) for lr in (1e-2, 1)]
    assert not equal(*(state_of(run)["model"] for run in runs))


def test_dropout_follows_from_seed_and_step() -> None:
    """Masks differ from step to step and from seed to seed, and a step that is repeated has the same."""
    model = build_model(
        "vit", image_size=8, patch_size=4, num_classes=3, dim=16, depth=1, heads=2, mlp_dim=32,
        dropout=0.5,
    )  # fmt: skip
    images, targets = torch.randn(8, 3, 8, 8), torch.arange(8) % 3

    def loss(seed: int, step: int) -> float:
        state = TrainingState(model, torch.optim.SGD(model.parameters(), lr=0.0), None)
        state.step = step
        args = SimpleNamespace(seed=seed, precision="float32", label_smoothing=0.0, clip_grad=0)
        return step_vit.training_step(state, images, targets, args)[0].item()

    assert loss(0, 7) == loss(0, 7)
    assert len({loss(seed, step) for seed in (0, 1) for step in (0, 1, 2)}) == 6


# --- every parameter matters ------------------------------------------------------------------------

SGD = {"optimizer": "sgd", "lr": 1e-2}
STEP = {"gamma": 0.5}


@pytest.fixture(scope="module")
def outcome(no_test: Path, train_on: Callable[..., Path]) -> Callable[..., Any]:
    """The selected weights after two epochs; runs of the same parameters are done once."""
    known: dict[str, Any] = {}

    def weights(parameters: dict[str, Any]) -> Any:
        if str(parameters) not in known:
            output = train_on(no_test, **parameters)
            known[str(parameters)] = selected_weights(state_of(output))
        return known[str(parameters)]

    return weights


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ({}, {"lr": 1e-3}),
        *(({}, {"optimizer": name}) for name in ("adam", "sgd", "rmsprop")),
        *(({}, change) for change in ({"patch_num": 4, "patch_size": None}, {"patch_size": 2})),
        *(({}, {name: 8}) for name in ("vt_dim", "mlp_dim", "dim_head_", "batch_size")),
        *(({}, {name: 3}) for name in ("vt_depth", "vt_heads", "seed", "epochs", "max_steps")),
        *(({}, {name: 0.3}) for name in ("dropout", "emb_dropout", "affine", "label_smoothing")),
        *(({}, {name: 0.3}) for name in ("crop", "color", "randaugment", "erase")),
        *(({}, {name: 0.3}) for name in ("mixup", "cutmix")),
        ({"mixup": 0.3}, {"cutmix": 0.3}),
        *(({}, {name: 0.7}) for name in ("moving_average_decay", "weight_decay", "warmup_epochs")),
        ({}, {"clip_grad": 0.1}),
        ({}, {"pool": "mean"}),
        ({}, {"channel": 1}),
        ({}, {"image_size": 12}),
        ({}, {"flip": "horizontal"}),
        ({}, {"val_split": 0.3}),
        ({}, {"precision": "bfloat16"}),
        ({}, {"gamma": 0.9}),
        ({}, {"scheduler": "constant"}),
        ({}, {"arch": "deepvit"}),
        (STEP, {"gamma": 0.9}),
        (SGD, {"momentum": 0.5}),
        (SGD, {"weight_decay": 0.1}),
    ],
    ids=str,
)
def test_parameter_changes_the_outcome(
    base: dict[str, Any], change: dict[str, Any], outcome: Callable[..., Any]
) -> None:
    change = {name.rstrip("_"): value for name, value in change.items()}
    if "dim_head" in change:
        change["dim_head"] = 4  # half of the default
    one, other = outcome(base), outcome(base | change)
    assert not all(
        name in other and value.shape == other[name].shape and torch.equal(value, other[name])
        for name, value in one.items()
    )


def test_what_does_not_belong_to_training_changes_nothing(outcome: Callable[..., Any]) -> None:
    assert equal(outcome({}), outcome({"momentum": 0.5, "workers": 1, "metric": "loss"}))


# --- selection --------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["accuracy", "balanced_accuracy", "auc", "loss"])
def test_metric_selects(
    metric: str, no_test: Path, train_on: Callable[..., Path], read_lines: ReadLines
) -> None:
    changes = {"epochs": 8, "lr": 2e-2, "scheduler": "constant", "optimizer": "rmsprop"}
    output = train_on(no_test, metric=metric, **changes)
    lines = read_lines(output)
    merits = {"loss": lambda line: -line["val_loss"]}
    for name in ("accuracy", "balanced_accuracy", "auc"):  # of equals that with the smallest loss
        merits[name] = lambda line, name=name: (line[f"val_{name}"], -line["val_loss"])
    best = {name: max(lines, key=merit)["epoch"] for name, merit in merits.items()}
    assert best["accuracy"] != best["loss"]  # else nothing is shown
    results = json.loads((output / "results.json").read_text())
    assert (results["metric"], results["best_epoch"]) == (metric, best[metric])
    assert state_of(output, "model_best")["step"] == lines[best[metric] - 1]["step"]


def test_the_test_set_influences_nothing(
    images: Path, no_test: Path, train_on: Callable[..., Path], read_lines: ReadLines,
    tmp_path: Path,
) -> None:  # fmt: skip
    shutil.copytree(images, tmp_path / "other", symlinks=True)
    cat, dog = (tmp_path / "other" / "test" / name for name in ("cat", "dog"))
    cat.rename(tmp_path / "cat")
    dog.rename(cat)
    (tmp_path / "cat").rename(dog)
    outputs = [train_on(f, **EVERYTHING_RANDOM) for f in (images, no_test, tmp_path / "other")]
    assert_same_run(outputs[0], outputs[1], read_lines)
    assert_same_run(outputs[0], outputs[2], read_lines)
    tests = [json.loads((output / "results.json").read_text())["test"] for output in outputs]
    assert tests[1] is None and tests[0]["accuracy"] != tests[2]["accuracy"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch_size": 1000},
        {"moving_average_decay": 0.9},
        {"batch_size": 1000, "metric": "auc"},
    ],
    ids=str,
)
def test_a_loss_that_is_not_finite_ends_the_run(
    changes: dict[str, Any], no_test: Path, run_main: RunMain, tmp_path: Path
) -> None:
    """With one step an epoch the loss of the step is finite, that of the validation after it is not."""
    parameters = TINY | {"optimizer": "sgd", "lr": 1e30, "clip_grad": 0} | changes
    where = ("--download-dir", no_test, "--model-dir", tmp_path)
    result = run_main(*where, "--scheduler=constant", *options(parameters))
    assert result.status == 1
    assert re.fullmatch(
        r"main_vit\.py: [^\n]*not finite[^\n]* epoch 1, step \d+[^\n]*\n", result.stderr
    )
    assert (
        not (tmp_path / "results.json").exists() and not (tmp_path / "model_best.pth.tar").exists()
    )


# --- resume -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"gamma": 0.7, "optimizer": "adam"},
        {"scheduler": "constant", "optimizer": "sgd", **EVERYTHING_RANDOM},
        {"scheduler": "constant", "optimizer": "rmsprop"},
    ],
    ids=str,
)
def test_resume_with_more_epochs(
    changes: dict[str, Any], no_test: Path, train_on: Callable[..., Path], run_main: RunMain,
    read_lines: ReadLines,
) -> None:  # fmt: skip
    whole = train_on(no_test, epochs=4, **changes)
    parts = train_on(no_test, epochs=2, **changes)
    result = run_main("--resume", parts / "checkpoint.pth.tar", "--epochs", 4)
    assert result.status == 0, result.stderr
    assert f"resumed after step {2 * STEPS}" in result.stdout
    assert_same_run(whole, parts, read_lines)


def test_resume_of_a_finished_run_changes_nothing(
    images: Path, train_on: Callable[..., Path], run_main: RunMain, read_lines: ReadLines
) -> None:
    output = train_on(images)
    before = output.with_name(output.name + "-before")
    shutil.copytree(output, before)
    assert run_main("--resume", output / "checkpoint.pth.tar").status == 0
    assert_same_run(output, before, read_lines)
    assert (output / "results.json").read_text() == (before / "results.json").read_text()


@pytest.mark.parametrize(
    ("signum", "changes"),
    [
        pytest.param(signal.SIGINT, {"batch_size": 2, "epochs": 6}, marks=pytest.mark.slow),
        pytest.param(
            signal.SIGTERM,
            {"batch_size": 2, "epochs": 6, "gamma": 0.9, "optimizer": "rmsprop"},
            marks=pytest.mark.slow,
        ),
        (
            signal.SIGINT,
            EVERY_AUGMENTATION | {"batch_size": 2, "epochs": 6, "precision": "bfloat16"},
        ),
        pytest.param(
            signal.SIGHUP,
            {"batch_size": 2, "epochs": 6, "precision": "float16"},
            marks=pytest.mark.slow,
        ),
        pytest.param(  # all steps of the epoch are done
            signal.SIGTERM, {"batch_size": 1000, "epochs": 30}, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_stopped_and_resumed_equals_uninterrupted(
    signum: int, changes: dict[str, Any], images: Path, start_main: Callable[..., Any],
    run_main: RunMain, train_on: Callable[..., Path], read_lines: ReadLines, tmp_path: Path,
) -> None:  # fmt: skip
    run = EVERYTHING_RANDOM | changes
    whole = train_on(images, **run)
    where = ("--download-dir", images, "--model-dir", tmp_path)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests under nohup would hand it on
    with start_main(*where, *options(TINY | run)) as process:
        signal.signal(signal.SIGHUP, hangup)
        next(line for line in process.stdout if line.startswith("epoch   2/"))
        time.sleep(0.03)
        process.send_signal(signum)
        stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (-signum, "")
    assert "stopped at step" in stdout and str(tmp_path / "checkpoint.pth.tar") in stdout
    assert state_of(tmp_path)["outputs"]  # in the middle of an epoch
    assert not (tmp_path / "results.json").exists()
    time.sleep(1)  # TensorBoard orders its files by the second they were begun in
    result = run_main("--resume", tmp_path / "checkpoint.pth.tar")
    assert result.status == 0, result.stderr
    assert_same_run(whole, tmp_path, read_lines)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [s.step for s in events.Scalars("val/loss")] == list(range(1, run["epochs"] + 1))
    assert (whole / "results.json").read_text() == (tmp_path / "results.json").read_text()


@pytest.mark.slow
def test_a_terminal_that_closes_leaves_what_nohup_started(
    images: Path, start_main: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which a process inherits
    try:
        with start_main("--download-dir", images, *options(TINY | {"epochs": 3})) as process:
            next(line for line in process.stdout if line.startswith("epoch   1/"))
            process.send_signal(signal.SIGHUP)
            stdout, _ = process.communicate(timeout=30)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert process.returncode == 0 and "stopped" not in stdout


@pytest.mark.slow
def test_stopped_while_testing(
    images: Path, start_main: Callable[..., Any], run_main: RunMain, tmp_path: Path
) -> None:
    shutil.copytree(images, tmp_path / "data")
    for i in range(1500):  # so many that the signal arrives among them
        (tmp_path / "data" / "test" / "cat" / f"link{i}.png").symlink_to(
            images / "test/cat/009.png"
        )
    where = ("--download-dir", tmp_path / "data", "--model-dir", tmp_path / "run")
    with start_main(*where, *options(TINY | {"epochs": 1, "vt_depth": 6})) as process:
        next(line for line in process.stdout if line.startswith("epoch   1/1"))
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (-signal.SIGTERM, "")
    assert run_main("--resume", tmp_path / "run" / "checkpoint.pth.tar").status == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["test"]["images"] == 3 * TEST + 1500


def test_resume_with_more_steps(
    no_test: Path, train_on: Callable[..., Path], run_main: RunMain, read_lines: ReadLines
) -> None:
    """A run that --max-steps ended within an epoch goes on from there."""
    whole, part = train_on(no_test), train_on(no_test, max_steps=STEPS + 2)
    result = run_main("--resume", part / "checkpoint.pth.tar", "--max-steps", 2 * STEPS)
    assert result.status == 0, result.stderr
    one, other = state_of(whole), state_of(part)
    assert all(equal(one[key], other[key]) for key in ("model", "optimizer", "step"))
    assert read_lines(part)[-1]["val_loss"] == read_lines(whole)[-1]["val_loss"]
    assert [line["epoch"] for line in read_lines(part)] == [1, 2]


def test_resume_with_fewer_steps_than_were_taken(
    no_test: Path, train_on: Callable[..., Path], run_main: RunMain, read_lines: ReadLines
) -> None:
    part = train_on(no_test, max_steps=STEPS + 5)
    (part / "results.json").unlink()
    saved = torch.load(part / "checkpoint.pth.tar", weights_only=True)
    saved["validated"] = STEPS  # as if a signal had ended it there
    save_checkpoint(saved, False, part / "checkpoint.pth.tar")
    result = run_main("--resume", part / "checkpoint.pth.tar", "--max-steps", STEPS + 2)
    assert result.status == 0, result.stderr
    assert read_lines(part)[-1]["step"] == state_of(part)["step"] == STEPS + 5


def test_resume_stays_in_its_folder(
    no_test: Path, train_on: Callable[..., Path], run_main: RunMain, tmp_path: Path
) -> None:
    """Its best epoch so far is there; and another folder may hold another run."""
    output = train_on(no_test)
    where = ("--resume", output / "checkpoint.pth.tar", "--epochs", 3, "--model-dir")
    result = run_main(*where, tmp_path / "other")
    assert result.status == 2 and "leave --model-dir out" in result.stderr
    assert not list(tmp_path.glob("other/*")) and state_of(output)["step"] == 2 * STEPS
    assert run_main(*where, output).status == 0  # its own may be named


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--lr", 0.1], "lr 0.003 -> 0.1"),
        (["--vt-depth", 2], "vt_depth 1 -> 2"),
        (["--seed", 5, "--batch-size", 3], "batch_size 16 -> 3, seed 0 -> 5"),
        (["--init-from", "x"], "give one of them"),
    ],
    ids=str,
)
def test_resume_with_other_parameters_is_refused(
    given: list, message: str, trained: Path, run_main: RunMain
) -> None:
    result = run_main("--resume", trained / "checkpoint.pth.tar", *given)
    assert result.status == 2 and message in result.stderr
    assert result.stderr.count("\n") == 1


def test_resume_with_the_same_parameters_is_not_refused(trained: Path, run_main: RunMain) -> None:
    where = ("--resume", trained / "checkpoint.pth.tar", "--config", trained / "args.yaml")
    assert run_main(*where, "--lr", TINY["lr"]).status == 0


@pytest.mark.parametrize("option", ["--resume", "--init-from"])
@pytest.mark.parametrize("content", [None, b"not a checkpoint", "foreign"])
def test_missing_and_foreign_checkpoints_are_refused(
    option: str, content: bytes | str | None, no_test: Path, run_main: RunMain, tmp_path: Path
) -> None:
    file = tmp_path / "some.pth.tar"
    if content == "foreign":
        torch.save({"state_dict": {}, "epoch": 3}, file)
    elif content:
        file.write_bytes(content)
    where = ("--download-dir", no_test, "--model-dir", tmp_path / "run")
    result = run_main(option, file, *where, *options(TINY))
    assert result.status == 2 and str(file) in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.glob("run/*.pth.tar"))


@pytest.fixture
def other_classes(tmp_path: Path, make_images: Callable[..., Path]) -> Path:
    return make_images(tmp_path / "two", ["cat", "eel"], 10)


def test_resume_on_other_classes_is_refused(
    trained: Path, other_classes: Path, run_main: RunMain
) -> None:
    before = (trained / "args.yaml").read_text()
    where = ("--resume", trained / "checkpoint.pth.tar", "--download-dir", other_classes)
    result = run_main(*where, "--epochs", 9)
    assert result.status == 2 and "classes" in result.stderr
    assert result.stderr.count("\n") == 1
    assert (trained / "args.yaml").read_text() == before


# --- fine-tuning, and folders that are taken --------------------------------------------------------


def test_init_from_takes_the_selected_weights(
    trained: Path, images: Path, train_on: Callable[..., Path]
) -> None:
    """After a step too small to matter the numbers are those of the model it came from."""
    started = trained / "model_best.pth.tar"
    output = train_on(images, init_from=started, max_steps=1, lr=1e-12, moving_average_decay=0.5)
    one, other = (json.loads((f / "results.json").read_text()) for f in (trained, output))
    assert other["validation"] == pytest.approx(one["validation"], rel=1e-5)
    assert other["best_epoch"] == 1 and other["steps"] == 1  # but it is a new run
    assert yaml.safe_load((output / "args.yaml").read_text())["init_from"] == str(started)


def test_init_from_says_when_validation_may_look_too_good(
    images: Path, run_main: RunMain, tmp_path: Path
) -> None:
    """Another seed or share holds out other images, which the earlier model may have been trained on."""
    where = ["--download-dir", images]
    first = TINY | {"val_split": 0.2, "epochs": 1, "model_dir": tmp_path / "first"}
    assert run_main(*where, *options(first)).status == 0
    more = first | {"init_from": tmp_path / "first/model_best.pth.tar"}
    for i, (changes, told) in enumerate(
        [({"lr": 1e-4}, False), ({"seed": 1}, True), ({"val_split": 0.3}, True)]
    ):
        result = run_main(*where, *options(more | changes | {"model_dir": tmp_path / str(i)}))
        assert result.status == 0, result.stderr
        assert ("trained on images that are held out now" in result.stdout) is told, changes


def test_init_from_for_other_classes_and_image_size(
    trained: Path, other_classes: Path, run_main: RunMain, tmp_path: Path
) -> None:
    where = ("--download-dir", other_classes, "--model-dir", tmp_path / "run")
    parameters = TINY | {
        "image_size": 16,
        "max_steps": 1,
        "lr": 1e-12,
        "init_from": trained / "model_best.pth.tar",
    }
    result = run_main(*where, *options(parameters))
    assert result.status == 0, result.stderr
    assert "head.weight is fresh" in result.stdout
    assert "pos_embedding is resampled to 17 tokens" in result.stdout
    old = selected_weights(state_of(trained, "model_best"))
    new = state_of(tmp_path / "run")["model"]
    assert new["head.weight"].shape == (2, 16) and new["pos_embedding"].shape == (1, 17, 16)
    body = [name for name in old if name.startswith("transformer.")]
    assert body and all(torch.allclose(old[name], new[name], atol=1e-6) for name in body)


@pytest.mark.parametrize(
    "changes",
    [{"vt_dim": 8}, {"vt_depth": 2}, {"pool": "mean"}, {"arch": "simple_vit"}, {"vt_heads": 4}],
    ids=str,
)
def test_init_from_another_model_is_refused(
    changes: dict[str, Any], trained: Path, no_test: Path, run_main: RunMain, tmp_path: Path
) -> None:
    where = ("--download-dir", no_test, "--model-dir", tmp_path)
    parameters = TINY | changes | {"init_from": trained / "checkpoint.pth.tar"}
    result = run_main(*where, *options(parameters))
    assert result.status == 2 and "--init-from" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_folder_that_holds_a_run_is_refused(
    trained: Path, no_test: Path, run_main: RunMain
) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in trained.iterdir()}
    where = ("--download-dir", no_test, "--model-dir", trained)
    result = run_main(*where, *options(TINY))
    assert result.status == 2 and "holds a run already" in result.stderr
    assert before == {file.name: file.stat().st_mtime_ns for file in trained.iterdir()}
