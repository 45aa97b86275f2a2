"""Images without colour: one channel is kept for all of them, and stands for as many in the model."""

import json
import os
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import images_vit
from cache_vit import MODES, decode_folder
from folder_vit import DataError, read_image_folder
from images_vit import DecodedImages, decode_image, decode_planes
from vit import ViT, build_model

RUN = [
    *("--image-size=8", "--patch-size=4", "--vt-dim=16", "--vt-depth=1", "--vt-heads=2", "--mlp-dim=16"),
    *("--epochs=2", "--threads=1", "--precision=float32", "--lr=3e-3"),
]  # fmt: skip
EVERY_AUGMENTATION = [
    *("--flip=both", "--affine=0.2", "--crop=0.4", "--color=0.4", "--randaugment=6", "--erase=0.3"),
    *("--mixup=0.8", "--cutmix=1"),
]
# How files store what has no colour.
STORED = {
    "L": "png", "RGB": "png", "1": "png", "P": "png", "LA": "png", "RGBA": "png", "I;16": "png",
    "CMYK": "tif", "YCbCr": "jpg", "LAB": "tif",
}  # fmt: skip


def as_stored(pixels: np.ndarray, mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(pixels.astype(np.uint16) * 256)
    image = Image.fromarray(pixels)
    if mode == "LAB":
        neutral = Image.new("L", image.size, 128)  # whose RGB is rounded to equal channels at these
        return Image.merge("LAB", (image.point(lambda v: 60 if v < 120 else 180), neutral, neutral))
    if mode == "LA":
        image.putalpha(Image.fromarray(pixels[::-1].copy()))
        return image
    return image.convert(mode) if mode == "P" else image.convert("RGB").convert(mode)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """train/ with two classes of 27 images, dark and light, in every kind of file, and test/ with 10."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 27), ("test", 10)):
        for level, name in ((60, "dark"), (180, "light")):
            place = tmp_path / "images" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = generator.normal(level, 30, (40, 24)).clip(0, 255).astype(np.uint8)
                mode, suffix = [*STORED.items()][i % len(STORED)]
                as_stored(pixels, mode).save(place / f"{i:02}-{mode.replace(';', '')}.{suffix}")
    return tmp_path / "images"


def decode(folder: Path, mode: str = "disk", channels: int = 3) -> DecodedImages:
    cache = folder.parents[1] / "cache"
    return decode_folder(read_image_folder(folder), 8, channels, cache, 2, mode)


def assert_same_images(folder: Path, decoded: DecodedImages) -> None:
    images = read_image_folder(folder)
    for i in {*range(len(images.names))} - {*decoded.broken}:
        expected = decode_image(images.path(i), 8, 3)
        assert np.array_equal(np.broadcast_to(decoded.pixels[i], (3, 8, 8)), expected)


@pytest.mark.parametrize("mode", MODES)
def test_one_channel_is_kept_of_grey_images(mode: str, folder: Path) -> None:
    decoded = decode(folder / "train", mode)
    assert decoded.pixels.shape == (54, 1, 8, 8) and decoded.pixels.nbytes == 54 * 64
    assert_same_images(folder / "train", decoded)
    if mode == "memory":
        assert decoded.pixels.flags.c_contiguous and decoded.pixels.base is None
    if mode == "disk":
        array = np.load(decoded.file, mmap_mode="r")
        assert np.array_equal(array, decoded.pixels[:])
        again = decode(folder / "train")
        assert not again.built and np.array_equal(again.pixels[:], array)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stored", ["RGB", "RGBA", "P"])
def test_a_single_colour_is_enough_for_all_channels(mode: str, stored: str, folder: Path) -> None:
    """Even the last image, and of that one pixel; broken ones are black."""
    image = Image.new("RGB", (12, 12), "white")
    image.putpixel((11, 11), (255, 255, 0))
    image.convert(stored).save(folder / "train" / "light" / "zzz.png")
    (folder / "train" / "dark" / "0.png").write_bytes(b"")
    decoded = decode(folder / "train", mode)
    assert decoded.pixels.shape == (56, 3, 8, 8) and list(decoded.broken) == [0]
    assert_same_images(folder / "train", decoded)
    if mode == "disk":
        assert not decoded.pixels[0].any()
        rows = np.load(decoded.file)
        assert [zlib.crc32(row) for row in rows] == decoded.pixels.checksums.tolist()


@pytest.mark.parametrize("row", [0, 63, 64, 127, 128, 199])
def test_colour_is_seen_in_every_row(row: int, tmp_path: Path) -> None:
    image = Image.new("RGB", (30, 200), "gray")
    image.save(tmp_path / "grey.png")
    image.putpixel((29, row), (128, 128, 129))
    image.save(tmp_path / "coloured.png")
    shapes = [len(decode_planes(tmp_path / f"{name}.png", 8, 3)) for name in ("grey", "coloured")]
    assert shapes == [1, 3]


def test_an_image_that_gets_colour_ends_a_run_that_decodes_again(folder: Path) -> None:
    decoded = decode(folder / "train", "off")
    path = read_image_folder(folder / "train").path(5)
    Image.new("RGB", (12, 12), "red").save(path, format="PNG")
    with pytest.raises(DataError, match=f"{path.name} has changed since the folder was listed"):
        decoded.pixels[5]


def test_colour_in_a_file_that_looks_the_same_from_outside(tmp_path: Path) -> None:
    for name in ("dark", "light"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), "gray").save(tmp_path / name / "0.bmp")
    decoded, path = decode(tmp_path, "off"), tmp_path / "dark" / "0.bmp"
    status = path.stat()
    Image.new("RGB", (8, 8), "red").save(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    with pytest.raises(DataError, match="0.bmp has got colour since the folder was listed"):
        decoded.pixels[0]


def test_the_cache_of_grey_images_mends_itself(folder: Path) -> None:
    (folder / "train" / "dark" / "0.png").write_bytes(b"")
    first = decode(folder / "train")
    assert list(first.broken) == [0] and not first.pixels[0].any()
    expected = first.pixels[:]
    for row in (0, 3, 54):
        with open(first.file, "r+b") as file:
            file.seek(128 + row * 64 + 5)
            file.write(b"\x07\x09")
    assert not np.array_equal(np.load(first.file), expected)
    assert np.array_equal(decode(folder / "train").pixels[:], expected)
    assert np.array_equal(np.load(first.file), expected)


@pytest.mark.parametrize("patch_norm", [True, False])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_one_channel_stands_for_three_equal_ones(patch_norm: bool, precision: torch.dtype) -> None:
    torch.manual_seed(0)
    model = ViT(
        image_size=16, patch_size=4, num_classes=3, dim=16, depth=2, heads=2, mlp_dim=32,
        patch_norm=patch_norm,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    images = torch.rand(4, 1, 16, 16) * 2 - 1
    answers = []
    for shown in (images, images.expand(-1, 3, -1, -1), images.repeat(1, 3, 1, 1)):
        model.zero_grad()
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            logits = model(shown)
        logits.float().square().sum().backward()
        answers.append([logits.float(), *(p.grad.clone() for p in model.parameters())])
    tolerance = 1e-4 if precision == torch.float32 else 0.1
    one, *others = ([part / part.abs().max() for part in answer] for answer in answers)
    for other in others:
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("arch", ["vit", "simple_vit", "cait", "local_vit", "parallel_vit"])
def test_every_architecture_takes_one_channel_for_all(arch: str) -> None:
    model = build_model(
        arch, image_size=16, patch_size=4, num_classes=3, dim=16, depth=1, heads=2, mlp_dim=32
    ).eval()
    images = torch.rand(4, 1, 16, 16)
    expected = model(images.repeat(1, 3, 1, 1))
    torch.testing.assert_close(model(images), expected)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(images), model(images))


def lines_of(run: Path) -> list[dict[str, float]]:
    """The numbers of metrics.jsonl and results.json that do not depend on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines.append(json.loads((run / "results.json").read_text())["test"])
    return [
        {k: v for k, v in line.items() if isinstance(v, float) and "second" not in k}
        for line in lines
    ]


@pytest.mark.parametrize(
    ("extra", "modes"), [(EVERY_AUGMENTATION, MODES), (["--arch=simple_vit"], ("disk",))], ids=str
)
def test_a_run_is_what_it_would_be_of_three_channels(
    extra: list[str],
    modes: tuple[str, ...],
    folder: Path,
    run_main: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = {}
    for name in (*modes, "colour"):
        if name == "colour":
            monkeypatch.setattr(images_vit, "is_grey", lambda image: False)
        cache = ["--cache", "disk" if name == "colour" else name, "--cache-dir", folder / name]
        place = folder.parent / f"run-{name}"
        result = run_main("--download-dir", folder, "--model-dir", place, *RUN, *extra, *cache)
        assert result.status == 0, result.stderr
        assert (", grey)" in result.stdout) == (name in ("disk", "memory"))
        runs[name] = lines_of(place)
    assert all(runs[mode] == runs["disk"] for mode in modes)
    for one, three in zip(runs["disk"], runs["colour"], strict=True):
        assert one == pytest.approx(three, rel=2e-3)
