"""Configurations that are not run by other tests: ours for Kubernetes and ssh, and NNI's own with our trial."""

import json
import pickle
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from nni_tools import REPOSITORY, read_config
from PIL import Image

Run = Callable[..., Any]


def choice(*values: Any) -> dict[str, Any]:
    return {"_type": "choice", "_value": list(values)}


def uniform(low: float, high: float, kind: str = "uniform") -> dict[str, Any]:
    return {"_type": kind, "_value": [low, high]}


@pytest.mark.parametrize("name", ["kubeflow", "frameworkcontroller", "shared_storage"])
def test_kubernetes(name: str, run_main: Run) -> None:
    """NNI's own validation, and every combination of the search space; no cluster is asked."""
    file = REPOSITORY / f"examples/kubernetes/{name}.yml"
    result = run_main("--check", file)
    assert result.status == 0 and "warning" not in result.stdout, result.stdout
    assert "NOT RUN" in file.read_text()


def test_remote(run_main: Run, tmp_path: Path) -> None:
    """The shipped example, once the key that it names exists."""
    config = read_config(REPOSITORY / "examples/remote/config.yml")
    (tmp_path / "key").touch()
    for machine in config["trainingService"]["machineList"]:
        machine["sshKeyFile"] = str(tmp_path / "key")
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    result = run_main("--check", tmp_path / "config.yml")
    assert result.status == 0 and "warning" not in result.stdout, result.stdout


def test_fine_tuning(run_main: Run, image_folder: Path, tmp_path: Path) -> None:
    """The shipped example, once the model and the images that it names exist; then one of its trials."""
    sizes = ["--image-size=8", "--patch-size=4", "--vt-dim=16", "--vt-depth=1", "--vt-heads=2"]
    place = ["--download-dir", image_folder, "--model-dir", tmp_path / "run"]
    assert run_main(*sizes, *place, "--epochs", 1).status == 0
    config = read_config(REPOSITORY / "examples/fine_tuning/config.yml")
    command = config["trialCommand"].replace("/path/to/my_images", str(image_folder))
    config["trialCommand"] = command.replace("/path/to/run", f"{tmp_path}/run")
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    result = run_main("--check", tmp_path / "config.yml")
    assert result.status == 0 and "warning" not in result.stdout, result.stdout
    options = config["trialCommand"].split("--request-from-nni ")[1].split(" ")
    sample = ["--lr=1e-4", "--weight-decay=0.01", "--dropout=0.1", "--affine=0.1", "--epochs=1"]
    done = run_main(*options, *sample, "--model-dir", tmp_path / "tuned")
    assert done.status == 0 and "all weights as they were" in done.stdout, done.stderr


def test_cifar10(run_main: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten images a class in the form of the download become the folders that the example searches on."""
    download = tmp_path / "cifar10/download/cifar-10-batches-py"
    download.mkdir(parents=True)
    names = [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ]
    (download / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    for batch in ("test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        labels = [*range(10), *range(10)]
        pixels = np.repeat(np.arange(20, dtype=np.uint8)[:, None], 3 * 32 * 32, axis=1)
        (download / batch).write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    script = runpy.run_path(str(REPOSITORY / "examples/cifar10/prepare.py"))
    script["main"](tmp_path / "cifar10")
    for split, count in (("train", 10), ("test", 2)):
        assert sorted(path.name for path in (tmp_path / "cifar10" / split).iterdir()) == names
        files = sorted((tmp_path / "cifar10" / split / "frog").iterdir())
        assert len(files) == count and Image.open(files[0]).getpixel((5, 5)) == (6, 6, 6)
    config = read_config(REPOSITORY / "examples/cifar10/config.yml")
    config["trialCommand"] = config["trialCommand"].replace("dataset", str(tmp_path))
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    result = run_main("--check", tmp_path / "config.yml")
    assert result.status == 0 and "images: 100 in" in result.stdout, result.stdout


# Search spaces of NNI's documentation and examples, as they are there: what --check says of the first
# key that this project has under no name, None if all of them are options of main_vit.py.
SPACES: dict[str, tuple[dict[str, Any], str | None]] = {
    "PyTorch quickstart": (
        {
            "features": choice(128, 256, 512, 1024),
            "lr": uniform(0.0001, 0.1, "loguniform"),
            "momentum": uniform(0, 1),
        },
        "features",
    ),
    "mnist-pytorch": (
        {
            "batch_size": choice(16, 32, 64, 128),
            "hidden_size": choice(128, 256, 512, 1024),
            "lr": choice(0.0001, 0.001, 0.01, 0.1),
            "momentum": uniform(0, 1),
        },
        "hidden-size",
    ),
    "writing a trial": (
        {
            "dropout_rate": uniform(0.1, 0.5),
            "conv_size": choice(2, 3, 5, 7),
            "hidden_size": choice(124, 512, 1024),
            "batch_size": choice(50, 250, 500),
            "learning_rate": uniform(0.0001, 0.1),
        },
        "dropout-rate",
    ),
    "cifar10-pytorch": (
        {
            "lr": choice(0.1, 0.01, 0.001, 0.0001),
            "optimizer": choice("SGD", "Adadelta", "Adagrad", "Adam", "Adamax"),
            "model": choice("vgg", "resnet18", "googlenet", "densenet121"),
        },
        "model",
    ),
    # The same with the names that main_vit.py has for these things, values unchanged.
    "PyTorch quickstart, renamed": (
        {
            "mlp_dim": choice(128, 256, 512, 1024),
            "lr": uniform(0.0001, 0.1, "loguniform"),
            "momentum": uniform(0, 1),
        },
        None,
    ),
    "writing a trial, renamed": (
        {
            "dropout": uniform(0.1, 0.5),
            "patch_num": choice(2, 4, 7, 14),
            "mlp_dim": choice(124, 512, 1024),
            "batch_size": choice(50, 250, 500),
            "learning_rate": uniform(0.0001, 0.1),
        },
        None,
    ),
}


@pytest.mark.parametrize("name", SPACES)
def test_search_spaces_of_nni(name: str, run_main: Run, tmp_path: Path) -> None:
    """In the quickstart's config.yml with our trialCommand: they can run, or one line says why not."""
    space, unknown = SPACES[name]
    (tmp_path / "search_space.json").write_text(json.dumps(space))
    main = REPOSITORY / "main_vit.py"
    command = f"python3 {main} --request-from-nni --optimizer sgd --image-size 224"
    config = {
        "experimentName": "MNIST",
        "searchSpaceFile": "search_space.json",
        "trialCommand": command,
        "trialCodeDirectory": ".",
        "trialConcurrency": 2,
        "maxTrialNumber": 10,
        "tuner": {"name": "TPE", "classArgs": {"optimize_mode": "maximize"}},
        "trainingService": {"platform": "local"},
    }
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    result = run_main("--check", tmp_path / "config.yml")
    errors = [line for line in result.stdout.splitlines() if line.startswith("error:")]
    if unknown is None:
        assert result.status == 0 and not errors, result.stdout
    else:
        assert result.status == 2 and any(f"--{unknown}" in line for line in errors), result.stdout
