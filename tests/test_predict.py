"""predict_vit.py on models of tiny runs: its predictions, metrics and exported files, and what it refuses."""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import images_vit
import predict_vit
from images_vit import decode_image
from setup_vit import computes_in
from utils_vit import load_checkpoint, save_checkpoint

REPOSITORY = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
CLASSES = ["cat", "dog, big", "eel"]
TINY = (
    "--image-size=8 --patch-size=4 --vt-dim=16 --vt-depth=2 --vt-heads=2 --mlp-dim=32 --epochs=4 "
    "--batch-size=16 --lr=3e-3 --threads=1"
)
RUNS = {
    "vit": "",
    "average": "--moving-average-decay=0.8 --pool=mean --precision=bfloat16",
    "grey": "--channel=1 --dropout=0.1",
    "simple_vit": "--arch=simple_vit",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, make_images: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for seed, (split, count) in enumerate({"train": 20, "val": 8, "test": 9}.items()):
        make_images(folder / split, ["cat", "dog", "eel"], count, seed, noise=60)
        (folder / split / "dog").rename(folder / split / CLASSES[1])
        one, other = folder / split / "cat" / "000.png", folder / split / "eel" / "000.png"
        one.rename(folder / "exchange")  # nothing is perfect
        other.rename(one)
        (folder / "exchange").rename(other)
    return folder


@pytest.fixture(scope="module", params=RUNS)
def model(
    request: pytest.FixtureRequest,
    images: Path,
    tmp_path_factory: pytest.TempPathFactory,
    run_main: Callable[..., Any],
) -> Path:
    """The best checkpoint of a tiny run."""
    output = tmp_path_factory.mktemp("run")
    options = (TINY + " " + RUNS[request.param]).split()
    done = run_main("--download-dir", images, "--model-dir", output, *options)
    assert done.status == 0, done.stderr
    return output / "model_best.pth.tar"


@pytest.fixture(scope="module")
def vit(images: Path, tmp_path_factory: pytest.TempPathFactory, run_main: Any) -> Path:
    output = tmp_path_factory.mktemp("run")
    assert run_main("--download-dir", images, "--model-dir", output, *TINY.split()).status == 0
    return output / "model_best.pth.tar"


def run(*args: Any) -> tuple[int, str, str]:
    """Status, output and errors of the command in this process."""
    out, err = io.TextIOWrapper(io.BytesIO(), write_through=True), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = predict_vit.main([str(arg) for arg in args])
    return status, out.buffer.getvalue().decode(errors="surrogateescape"), err.getvalue()


def lines_of(output: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(output, newline="")))


def pixels_of(files: list[Path], channels: int) -> np.ndarray:
    return np.stack([decode_image(file, 8, channels) for file in files])


def test_predictions_are_those_that_results_json_counts(model: Path, images: Path) -> None:
    status, out, err = run(model, images / "test")
    assert (status, err) == (0, "")
    lines = lines_of(out)
    files = sorted((images / "test").glob("*/*.png"))
    assert [line["image"] for line in lines] == list(map(str, files))
    matrix = np.zeros((3, 3), int)
    for line in lines:
        probabilities = [float(line[name]) for name in CLASSES]
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert line["class"] == CLASSES[int(np.argmax(probabilities))]
        true = CLASSES.index(Path(line["image"]).parent.name)
        matrix[true, CLASSES.index(line["class"])] += 1
    results = json.loads((model.parent / "results.json").read_text())
    assert matrix.tolist() == results["test"]["confusion_matrix"]
    assert 0 < results["test"]["accuracy"] < 100


def test_an_evaluation_is_what_results_json_says_of_the_test(model: Path, images: Path) -> None:
    status, out, err = run(model, "--evaluate", images / "test")
    assert (status, err) == (0, "")
    results = json.loads((model.parent / "results.json").read_text())
    report = json.loads(out)
    assert report.keys() == results["test"].keys()
    # A run in bfloat16 is evaluated in float32 by a processor without instructions for it.
    slow = not computes_in(load_checkpoint(model)["args"]["precision"], CPU)
    for name, value in results["test"].items():
        assert report[name] == (
            value
            if name == "confusion_matrix"
            else pytest.approx(value, rel=1e-2 if slow else 1e-5)
        )


def expected_of(model: Path, images: Path) -> tuple[np.ndarray, np.ndarray]:
    """The pixels of five images and their probabilities."""
    classifier = predict_vit.Classifier(model)
    files = sorted((images / "test").glob("*/*.png"))[:5]
    pixels = np.stack([decode_image(file, 8, classifier.args.channel) for file in files])
    with torch.inference_mode():
        return pixels, classifier(torch.from_numpy(pixels)).numpy()


def check_program(model: Path, images: Path, folder: Path) -> None:
    """--export model.pt2 gives the same where this project is not."""
    assert run(model, "--export", folder / "model.pt2")[0] == 0
    pixels, expected = expected_of(model, images)
    np.save(folder / "pixels.npy", pixels)
    code = """
import json, numpy, torch
extra = {"classes.json": ""}
program = torch.export.load("model.pt2", extra_files=extra).module()
pixels = torch.from_numpy(numpy.load("pixels.npy"))
found = [program(pixels[:n]).tolist() for n in (1, 5)]
print(json.dumps([json.loads(extra["classes.json"]), *found]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    classes, one, five = json.loads(done.stdout)
    assert classes == CLASSES
    assert np.allclose(five, expected, atol=1e-5)
    assert np.allclose(one, expected[:1], atol=1e-5)


def check_onnx(model: Path, images: Path, folder: Path) -> None:
    """ONNX Runtime gives the same of --export model.onnx."""
    assert run(model, "--export", folder / "model.onnx")[0] == 0
    pixels, expected = expected_of(model, images)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    for count in (1, 5):
        [found] = session.run(["probabilities"], {"pixels": pixels[:count]})
        assert np.allclose(found, expected[:count], atol=1e-5)
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == CLASSES


def test_an_exported_program(vit: Path, images: Path, tmp_path: Path) -> None:
    check_program(vit, images, tmp_path)


@pytest.mark.slow
def test_an_exported_onnx(vit: Path, images: Path, tmp_path: Path) -> None:
    check_onnx(vit, images, tmp_path)


@pytest.mark.slow
def test_other_models_are_exported(model: Path, images: Path, tmp_path: Path) -> None:
    check_program(model, images, tmp_path)
    check_onnx(model, images, tmp_path)


def test_files_that_cannot_be_decoded_are_named_and_the_others_predicted(
    vit: Path, images: Path, tmp_path: Path
) -> None:
    good = tmp_path / os.fsdecode(b"a\xff\n.png")
    shutil.copy(images / "test" / "eel" / "000.png", good)
    (tmp_path / "b.png").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("no image, and not called one")
    other = images / "test" / "cat" / "000.png"
    status, out, err = run(vit, tmp_path, tmp_path / "missing.png", other)
    assert status == 2
    assert [line["image"] for line in lines_of(out)] == [str(good), str(other)]
    assert err.splitlines() == [
        f"predict_vit.py: {tmp_path}/b.png: not an image",
        f"predict_vit.py: {tmp_path}/missing.png: No such file or directory",
    ]


@pytest.mark.slow
def test_the_commands_of_the_readme(vit: Path, images: Path, tmp_path: Path) -> None:
    lines = (REPOSITORY / "README.md").read_text().splitlines()
    commands = [line for line in lines if line.startswith("python predict_vit.py")]
    assert len(commands) == 3
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "X").symlink_to(vit.parent)
    (tmp_path / "my_images").symlink_to(images)
    (tmp_path / "folder").symlink_to(images / "test")
    shutil.copy(images / "test" / "cat" / "000.png", tmp_path / "photo.jpg")
    for command in commands:
        command = command.replace("predict_vit.py", str(REPOSITORY / "predict_vit.py"))
        env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        subprocess.run(command, shell=True, cwd=tmp_path, env=env, check=True, timeout=120)
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 1 + 1 + 27
    assert (tmp_path / "model.onnx").stat().st_size > 10_000


def test_images_are_taken_in_parts(vit: Path, images: Path, monkeypatch: Any) -> None:
    _, whole, _ = run(vit, images / "test")
    monkeypatch.setattr(predict_vit, "DECODED_AT_ONCE", 5 * 3 * 8 * 8)
    _, parts, _ = run(vit, images / "test")
    for one, other in zip(lines_of(whole), lines_of(parts), strict=True):
        assert one["image"] == other["image"]
        assert float(one["cat"]) == pytest.approx(float(other["cat"]), abs=1e-5)


@pytest.mark.parametrize(
    "args, text",
    [
        ([], "give either images, --evaluate or --export"),
        (["a.png", "--evaluate", "{images}/test"], "give either images, --evaluate or --export"),
        (["--export", "model.pth"], "neither .pt2 nor .onnx"),
        (["--export", "{tmp}/no/model.pt2"], "cannot be written: No such file or directory"),
        (["--evaluate", "{images}/none"], "does not exist"),
        (["--evaluate", "{images}/test/cat/001.png"], "is not a folder"),
        (["--evaluate", "{images}"], "it also has test, train, val (did you mean {images}/test?)"),
        (["--export", "model.pt2", "a.png"], "give either images, --evaluate or --export"),
        (["{tmp}"], "has no images"),
    ],
)
def test_wrong_use_is_one_line(
    vit: Path, images: Path, tmp_path: Path, args: list[str], text: str
) -> None:
    status, out, err = run(vit, *(arg.format(images=images, tmp=tmp_path) for arg in args))
    assert (status, out) == (2, "")
    [line] = err.splitlines()
    assert line.startswith("predict_vit.py: error: ") and text.format(images=images) in line


def test_the_table_of_odd_names(vit: Path, images: Path, tmp_path: Path) -> None:
    """Each column has a name of its own, and a line ends as Linux has it; what ends one is quoted."""
    saved = load_checkpoint(vit) | {"classes": ["class", "image", 'a\r"b,c\nd']}
    save_checkpoint(saved, False, tmp_path / "odd.pth.tar")
    photo = tmp_path / "a\rb.png"
    shutil.copy(images / "test/cat/000.png", photo)
    status, out, err = run(tmp_path / "odd.pth.tar", photo)
    assert (status, err) == (0, "") and out.endswith("\n") and not out.endswith("\r\n")
    [line] = lines_of(out)
    assert [*line] == ["image_", "class_", *saved["classes"]] and line["image_"] == str(photo)
    probabilities = {name: float(line[name]) for name in saved["classes"]}
    assert line["class_"] == max(probabilities, key=probabilities.get)
    save_checkpoint(saved | {"classes": ["image", "image_", "b"]}, False, tmp_path / "odd.pth.tar")
    _, out, _ = run(tmp_path / "odd.pth.tar", photo)
    assert [*lines_of(out)[0]] == ["image__", "class", "image", "image_", "b"]


def test_a_file_that_changes_meanwhile_is_predicted_as_it_is(
    vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is kept of it, so it need not be the one that was listed."""
    photo = tmp_path / "photo.png"
    shutil.copy(images / "test/cat/000.png", photo)
    before, real = run(vit, photo), images_vit.decode_planes

    def touching(path: Path, *shape: int) -> np.ndarray:
        os.utime(path, (1, 1))
        return real(path, *shape)

    monkeypatch.setattr(images_vit, "decode_planes", touching)
    assert run(vit, photo) == before and before[0] == 0


def test_an_evaluation_without_an_image_is_refused(vit: Path, images: Path, tmp_path: Path) -> None:
    shutil.copytree(images / "test", tmp_path / "test")
    (tmp_path / "test" / "cat" / "000.png").write_bytes(b"")
    status, _, err = run(vit, "--evaluate", tmp_path / "test")
    assert status == 2
    assert "1 images cannot be decoded: " in err and "cat/000.png (not an image)" in err


def test_an_evaluation_leaves_out_what_the_run_left_out(
    images: Path, tmp_path: Path, run_main: Any
) -> None:
    shutil.copytree(images, tmp_path / "images")
    for split in ("train", "test"):
        (tmp_path / "images" / split / "cat" / "001.png").write_bytes(b"no image")
    argv = ["--download-dir", tmp_path / "images", "--model-dir", tmp_path / "run", "--skip-broken"]
    assert run_main(*argv, *TINY.split()).status == 0
    status, out, err = run(
        tmp_path / "run" / "model_best.pth.tar", "--evaluate", tmp_path / "images" / "test"
    )
    assert status == 0
    assert "cat/001.png (not an image). Left out (--skip-broken)" in err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    report = json.loads(out)
    assert report["images"] == 26
    assert report["confusion_matrix"] == results["test"]["confusion_matrix"]
    assert report["loss"] == pytest.approx(results["test"]["loss"], rel=1e-5)
    for image in (tmp_path / "images" / "test" / "eel").iterdir():
        image.write_bytes(b"no image")
    status, _, err = run(
        tmp_path / "run" / "model_best.pth.tar", "--evaluate", tmp_path / "images" / "test"
    )
    assert status == 2
    assert "test/eel has no image that can be decoded: " in err and "(not an image), ..." in err
    assert len(err.splitlines()) == 1


def test_an_architecture_that_cannot_be_exported_is_one_line(
    images: Path, tmp_path: Path, run_main: Any
) -> None:
    argv = ["--download-dir", images, "--model-dir", tmp_path, "--arch", "na_vit"]
    assert run_main(*argv, *TINY.split()).status == 0
    status, _, err = run(tmp_path / "model_best.pth.tar", "--export", tmp_path / "model.pt2")
    assert status == 2
    assert err.startswith("predict_vit.py: error: arch na_vit cannot be exported to .pt2: ")
    assert len(err.splitlines()) == 1 and not (tmp_path / "model.pt2").exists()


@pytest.mark.slow
def test_ctrl_c_ends_quietly(vit: Path) -> None:
    # As Python raises it; a process started in the background would ignore the signal itself.
    code = f"""
import images_vit
import predict_vit
def interrupted(*_):
    raise KeyboardInterrupt
predict_vit.Classifier.predict = interrupted
predict_vit.main([{str(vit)!r}, "photo.jpg"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGINT
    assert done.stderr == ""


def test_the_python_of_the_readme(vit: Path, images: Path) -> None:
    photo = images / "test" / "cat" / "001.png"
    text = (REPOSITORY / "README.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = code.replace("runs/X/model_best.pth.tar", str(vit)).replace("photo.jpg", str(photo))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    [line] = lines_of(run(vit, photo)[1])
    expected = {name: pytest.approx(float(line[name]), abs=1e-5) for name in CLASSES}
    assert eval(done.stdout) == expected


def test_a_damaged_model_is_one_line(vit: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "model_best.pth.tar"
    damaged.write_bytes(vit.read_bytes()[:-100])
    forged = tmp_path / "forged.pth.tar"
    save_checkpoint(load_checkpoint(vit) | {"args": {"arch": "vit"}}, False, forged)
    for file, text in (
        (forged, f"checkpoint {forged}: "),
        (damaged, "is damaged"),
        (tmp_path, "Is a directory"),
        ("none", "not exist"),
    ):
        status, _, err = run(file, "photo.jpg")
        assert status == 2
        [line] = err.splitlines()
        assert text in line


@pytest.mark.parametrize(
    ("text", "on_gpu", "remedy"),
    [
        ("CUDA out of memory", True, "CUDA_VISIBLE_DEVICES= computes on the CPU"),
        ("DefaultCPUAllocator: can't allocate memory", False, "end other programs"),
    ],
)
def test_too_little_memory_is_one_line(
    text: str, on_gpu: bool, remedy: str, vit: Path, images: Path, monkeypatch: Any
) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError(text) if not on_gpu else torch.OutOfMemoryError(text)

    monkeypatch.setattr(predict_vit, "batches", full)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: on_gpu)
    status, _, err = run(vit, images / "test")
    assert status == 1
    assert err == f"predict_vit.py: the device has no memory left: {remedy}\n"


def test_weights_of_another_model_are_one_line(vit: Path, tmp_path: Path) -> None:
    saved = load_checkpoint(vit)
    del saved["model"]["head.bias"]
    save_checkpoint(saved, False, tmp_path / "other.pth.tar")
    status, _, err = run(tmp_path / "other.pth.tar", "photo.jpg")
    assert status == 2
    [line] = err.splitlines()
    assert 'Missing key(s) in state_dict: "head.bias"' in line
