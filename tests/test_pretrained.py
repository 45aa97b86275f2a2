"""A ViT of torchvision as a model of this project: the same function, and a start for other images."""

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torchvision.models import VisionTransformer

import predict_vit
import pretrained_vit
from predict_vit import Classifier
from utils_vit import load_checkpoint

Run = Callable[..., Any]
MODEL = "vit_b_32"
WEIGHTS = torchvision.models.get_model_weights(MODEL).IMAGENET1K_V1


def in_old_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names that the files of torchvision have, which are older than its model."""
    names = {".mlp.0.": ".mlp.linear_1.", ".mlp.3.": ".mlp.linear_2."}
    old = {}
    for name, value in weights.items():
        for new, other in names.items():
            name = name.replace(new, other)
        old[name] = value
    return old


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch keeps what it has downloaded; the name of the model stands for a small one of its kind."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(
        torchvision.models,
        "get_model",
        lambda name: VisionTransformer(32, 8, 2, num_heads=2, hidden_dim=24, mlp_dim=40),
    )
    file = tmp_path / "torch/hub/checkpoints" / Path(WEIGHTS.url).name
    file.parent.mkdir(parents=True)
    return file


@pytest.fixture
def network(hub: Path) -> VisionTransformer:
    """Random weights everywhere: an untouched norm or bias would hide a wrong name."""
    network = torchvision.models.get_model(MODEL).eval()
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape))
    torch.save(in_old_names(network.state_dict()), hub)
    return network


def test_the_same_function(network: VisionTransformer, tmp_path: Path) -> None:
    assert pretrained_vit.main([MODEL, str(tmp_path / "new")]) == 0
    classifier = Classifier(tmp_path / "new/model_best.pth.tar")
    pixels = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    transforms = WEIGHTS.transforms()
    mean, std = (torch.tensor(v)[:, None, None] for v in (transforms.mean, transforms.std))
    with torch.inference_mode():
        expected = network((pixels / 255 - mean) / std)
        categories = WEIGHTS.meta["categories"]  # not in the order of a folder's classes
        expected = expected[:, [categories.index(name) for name in classifier.classes]]
        logits = classifier.model(pixels / 127.5 - 1)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert len({*classifier.classes}) == 1000 and "tabby" in classifier.classes


def test_to_predict_with(
    network: VisionTransformer,
    tmp_path: Path,
    image_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert pretrained_vit.main([MODEL, str(tmp_path / "new")]) == 0
    capsys.readouterr()
    assert predict_vit.main([str(tmp_path / "new/model_best.pth.tar"), str(image_folder)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert "tench" in head and lines


def test_to_start_from(
    network: VisionTransformer, tmp_path: Path, run_main: Run, image_folder: Path
) -> None:
    assert pretrained_vit.main([MODEL, str(tmp_path / "new")]) == 0
    start = [
        "--init-from",
        tmp_path / "new/model_best.pth.tar",
        "--config",
        tmp_path / "new/args.yaml",
    ]
    run = [*start, "--download-dir", image_folder, "--max-steps", 2, "--lr", "1e-9", "--epochs", 1]
    done = run_main(*run, "--model-dir", tmp_path / "run")
    assert done.status == 0, done.stderr
    assert "head.weight is fresh, the classes are others" in done.stdout
    old, tuned = (
        load_checkpoint(tmp_path / f"{name}/model_best.pth.tar") for name in ("new", "run")
    )
    for name, weight in old["model"].items():
        if not name.startswith("head."):
            torch.testing.assert_close(tuned["model"][name], weight, rtol=0, atol=1e-6, msg=name)
    assert "val_split" not in tuned["args"] and tuned["args"]["precision"] != "auto"
    assert "precision" not in (tmp_path / "new/args.yaml").read_text()
    larger = run_main(*run, "--image-size", 64, "--model-dir", tmp_path / "larger")
    assert larger.status == 0 and "pos_embedding is resampled to 65 tokens" in larger.stdout


def test_to_be_used_elsewhere(
    network: VisionTransformer, tmp_path: Path, run_main: Run, image_folder: Path
) -> None:
    """Exported, its classes in the order of a folder's, and not taken for a run to go on with."""
    assert pretrained_vit.main([MODEL, str(tmp_path / "new")]) == 0
    model = str(tmp_path / "new/model_best.pth.tar")
    assert predict_vit.main([model, "--export", str(tmp_path / "model.pt2")]) == 0
    classes = Classifier(Path(model)).classes
    assert classes == sorted(classes)
    for data in (["--download-dir", image_folder], []):
        result = run_main("--resume", model, *data)
        assert result.status == 2 and result.stderr.count("\n") == 1
        assert "is of no run: --init-from" in result.stderr
    left = {file.name for file in (tmp_path / "new").iterdir()}
    assert left == {"args.yaml", "model_best.pth.tar"}


@pytest.mark.parametrize(
    "sent", [b"HTTP/1.0 200 OK\r\n\r\n<html>a proxy", b"nothing of HTTP\r\n", b""]
)
def test_a_download_that_breaks(
    sent: bytes, hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(10000)
                connection.sendall(sent)

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/{hub.name}"
        monkeypatch.setattr(type(WEIGHTS), "url", url, raising=False)
        assert pretrained_vit.main([MODEL, str(tmp_path / "new")]) == 2
        thread.join()
    text = capsys.readouterr().err.splitlines()[-1]
    assert text.startswith("pretrained_vit.py: error: ")
    assert f"try again, or bring it to {hub} in another way" in text
    assert not (tmp_path / "new").exists()


def test_what_goes_wrong(hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*argv: str | Path) -> str:
        assert pretrained_vit.main([*map(str, argv)]) == 2
        text = capsys.readouterr().err
        assert text.startswith("pretrained_vit.py: error: ") and text.count("\n") == 1
        return text

    assert "invalid choice: 'vit_b_33'" in error("vit_b_33", tmp_path / "new")
    hub.write_bytes(b"no weights")
    assert f"{hub} is damaged: remove it" in error(MODEL, tmp_path / "new")
    torch.save({"weight": torch.zeros(3)}, hub)
    assert f"{hub} is damaged" in error(MODEL, tmp_path / "new")
    (tmp_path / "new").mkdir()
    (tmp_path / "new/model_best.pth.tar").touch()
    assert "holds a model already" in error(MODEL, tmp_path / "new")


def test_without_a_network(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(WEIGHTS), "url", "http://127.0.0.1:9/" + hub.name, raising=False)
    assert pretrained_vit.main([MODEL, str(tmp_path / "new")]) == 2
    text = capsys.readouterr().err.splitlines()[-1]
    assert "cannot be downloaded" in text and f"bring it to {hub}" in text
