"""Listing, splitting, decoding, caching and batching of real image files."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import data_vit
from augment_vit import FLIPS, Augmentation
from cache_vit import DecodedImages, decode_folder
from data_vit import Split, batches, hold_out, open_data, training_batches
from demo_vit import make_digits
from folder_vit import DataError, read_image_folder
from images_vit import decode_image

REPOSITORY = Path(data_vit.__file__).parent
CPU = torch.device("cpu")
MakeImages = Callable[..., Path]


def open_small(folder: Path, **changes: object) -> data_vit.Data:
    arguments = {
        "num_classes": None, "image_size": 8, "channels": 3, "val_split": None, "seed": 0,
        "cache_dir": folder.parent / "cache", "workers": 2, "skip_broken": False,
    }  # fmt: skip
    return open_data(folder, **arguments | changes)


def counts(data: data_vit.Data) -> tuple[int, int, int | None]:
    return len(data.train), len(data.val), None if data.test is None else len(data.test)


def python(code: str, *args: object) -> subprocess.Popen:
    """A process of its own that runs `code` with the repository's modules."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


# --- the folder -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("splits", "val_split", "expected"),
    [
        ({"train": 20}, None, (36, 4, None)),
        ({"train": 20}, 0.5, (20, 20, None)),
        ({"train": 20, "test": 5}, None, (36, 4, 10)),
        ({"train": 20, "val": 3}, None, (40, 6, None)),
        ({"train": 20, "val": 3, "test": 5}, 0.2, (32, 8, 10)),  # given, it wins over val/
        ({".": 20}, None, (36, 4, None)),  # class folders directly
    ],
    ids=str,
)
def test_splits(
    splits: dict, val_split: float, expected: tuple, tmp_path: Path, make_images: MakeImages
) -> None:
    for seed, (name, count) in enumerate(splits.items()):
        make_images(tmp_path / "data" / name, ["cat", "dog"], count, seed)
    data = open_small(tmp_path / "data", val_split=val_split)
    assert counts(data) == expected
    assert data.classes == ["cat", "dog"]
    if len(data.train.pixels) == len(data.val.pixels):
        assert not set(data.train.indices) & set(data.val.indices)


def test_pixels_belong_to_their_class_in_every_split(
    tmp_path: Path, make_images: MakeImages
) -> None:
    for seed, name in enumerate(("train", "val", "test")):
        make_images(tmp_path / "data" / name, ["cat", "dog", "eel"], 4, seed)
    data = open_small(tmp_path / "data")
    for split in (data.train, data.val, data.test):
        brightest = split.pixels[split.indices].mean(axis=(2, 3)).argmax(axis=1)
        assert brightest.tolist() == split.targets[split.indices].tolist()  # cat is red = 0, ...


def test_listing_nested_hidden_and_linked(tmp_path: Path, make_images: MakeImages) -> None:
    make_images(tmp_path, ["cat", "dog"], 2)
    cat = tmp_path / "cat"
    (cat / "old").mkdir()
    (cat / "000.png").rename(cat / "old" / "A.PNG")
    (cat / ".hidden.png").write_bytes(b"")
    (cat / ".cache").mkdir()
    (cat / ".cache" / "x.png").write_bytes(b"")
    (tmp_path / ".git").mkdir()
    (tmp_path / "notes.txt").write_text("beside the classes")
    (cat / "notes.txt").write_text("")
    (cat / "README").write_text("")
    (cat / "circle").symlink_to(tmp_path / "cat", target_is_directory=True)
    make_images(tmp_path / ".elsewhere", ["cat"], 3)
    (cat / "more").symlink_to(tmp_path / ".elsewhere" / "cat", target_is_directory=True)
    images = read_image_folder(tmp_path)
    assert images.classes == ["cat", "dog"]
    assert images.names == [
        *("cat/001.png", "cat/more/000.png", "cat/more/001.png", "cat/more/002.png"),
        *("cat/old/A.PNG", "dog/000.png", "dog/001.png"),
    ]
    assert images.targets.tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert images.ignored == {".txt": 1, "README": 1}


def test_ignored_files_are_noted(image_folder: Path) -> None:
    (image_folder / "train" / "cat" / "a.heic").write_bytes(b"")
    shutil.copyfile(image_folder / "train/cat/000.png", image_folder / "train/loose.png")
    notes = open_small(image_folder).notes
    assert any("files left out: 1 x image in no class folder, 1 x .heic" in note for note in notes)


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize(
    ("classes", "named"),
    [
        (["cat", "eel"], "it lacks dog; it also has eel"),
        (["cat", "dog", "eel"], ": it also has eel"),
    ],
)
def test_a_split_with_other_classes(
    split: str, classes: list[str], named: str, image_folder: Path, make_images: MakeImages
) -> None:
    make_images(image_folder / split, classes, 2)
    if "dog" not in classes:
        for file in (image_folder / split).glob("dog/*"):
            file.unlink()
        if (image_folder / split / "dog").exists():
            (image_folder / split / "dog").rmdir()
    with pytest.raises(DataError, match=f"{split} has other classes than train/.*{named}"):
        open_small(image_folder)


def test_folders_that_cannot_be_trained_on(tmp_path: Path, make_images: MakeImages) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        open_small(tmp_path / "nowhere")
    with pytest.raises(DataError, match="has 0 class folders"):
        open_small(tmp_path)
    make_images(tmp_path / "data", ["cat"], 2)
    with pytest.raises(DataError, match="has 1 class folders"):
        open_small(tmp_path / "data")
    (tmp_path / "data" / "dog").mkdir()
    with pytest.raises(DataError, match="dog has no images"):
        open_small(tmp_path / "data")
    (tmp_path / "data" / "dog" / "a.heic").touch()
    with pytest.raises(DataError, match="dog has no images .*, but 1 x .heic"):
        open_small(tmp_path / "data")
    (tmp_path / "data.zip").touch()
    with pytest.raises(DataError, match="data.zip is a file: unpack it"):
        open_small(tmp_path / "data.zip")
    make_images(tmp_path / "data", ["dog"], 1)
    with pytest.raises(
        DataError, match="class folder dog has 1 image that can be used; .* one each"
    ):
        open_small(tmp_path / "data")
    make_images(tmp_path / "parts", ["cat", "dog"], 2)
    (tmp_path / "parts" / "cat").rename(tmp_path / "parts" / "Training")
    (tmp_path / "parts" / "dog").rename(tmp_path / "parts" / "Testing")
    with pytest.raises(DataError, match="no train/, and Testing, Training would be classes"):
        open_small(tmp_path / "parts")
    (tmp_path / "parts" / "Training").rename(tmp_path / "parts" / "invalid")
    (tmp_path / "parts" / "Testing").rename(tmp_path / "parts" / "valid")
    assert open_small(tmp_path / "parts").classes == ["invalid", "valid"]
    make_images(tmp_path / "mixed", ["cat", "dog"], 2)
    make_images(tmp_path / "mixed" / "test", ["cat", "dog"], 2)  # of the classes beside it
    with pytest.raises(DataError, match="no train/, and test would be classes"):
        open_small(tmp_path / "mixed")
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").rename(tmp_path / "whole" / "train")  # beside no folder "valid"
    assert open_small(tmp_path / "whole").classes == ["invalid", "valid"]


@pytest.mark.parametrize("name", ["valid", "Test"])
def test_a_split_of_another_name_is_not_left_out_without_a_word(
    name: str, image_folder: Path, make_images: MakeImages
) -> None:
    make_images(image_folder / name, ["cat", "dog"], 2)
    with pytest.raises(DataError, match=f"{name} beside train/ would not be used: call it val or"):
        open_small(image_folder)


def test_folders_that_agree_in_every_name_size_and_time(image_folder: Path) -> None:
    """As train/ and test/ out of one archive of BMP files can."""
    for split, value in (("train", 10), ("test", 200)):
        for file in (image_folder / split).glob("*/*"):
            file.unlink()
        for i, name in enumerate(("cat", "dog")):
            for number in range(4):
                file = image_folder / split / name / f"{number}.bmp"
                Image.new("RGB", (8, 8), (value + i,) * 3).save(file)
                os.utime(file, (0, 0))
    data = open_small(image_folder)
    assert data.train.pixels[:].max() == 11 and data.test.pixels[:].min() == 200


@pytest.mark.parametrize(
    ("members", "fraction", "expected"),
    [((100, 20), 0.1, (10, 2)), ((3, 2), 0.1, (1, 1)), ((10, 2), 0.9, (9, 1))],
)
def test_hold_out_is_stratified_and_seeded(
    members: tuple[int, int], fraction: float, expected: tuple[int, int]
) -> None:
    targets = np.repeat([0, 1], members)
    train, held_out = hold_out(targets, fraction, seed=1)
    assert np.bincount(targets[held_out]).tolist() == list(expected)
    assert sorted([*train, *held_out]) == list(range(len(targets)))
    again = hold_out(targets, fraction, seed=1)[1]
    assert np.array_equal(again, held_out)
    others = [hold_out(targets, fraction, seed)[1] for seed in range(2, 12)]
    assert not all(np.array_equal(other, held_out) for other in others)


def test_few_validation_images_are_pointed_out(image_folder: Path) -> None:
    assert any("validation has only 4 images" in note for note in open_small(image_folder).notes)


# --- decoding ---------------------------------------------------------------------------------------

RED, WHITE = [255, 0, 0], [255, 255, 255]
GREY_OF_RED = 76  # ITU-R 601: 0.299 * 255


def clear_16_bit() -> Image.Image:
    image = Image.fromarray(np.full((6, 6), 40_000, np.uint16))
    image.info["transparency"] = 40_000
    return image


def paletted(transparent: bool) -> Image.Image:
    image = Image.new("P", (6, 6), 1)
    image.putpalette([0, 0, 255, *RED])
    if transparent:
        image.info["transparency"] = 1
    return image


@pytest.mark.parametrize(
    ("image", "suffix", "rgb", "grey"),
    [
        (Image.new("L", (6, 6), 90), "png", [90] * 3, 90),
        (Image.new("RGB", (6, 6), "red"), "png", RED, GREY_OF_RED),
        (Image.new("RGB", (6, 6), "red"), "jpg", RED, GREY_OF_RED),
        (Image.new("RGBA", (6, 6), (255, 0, 0, 255)), "png", RED, GREY_OF_RED),
        (Image.new("RGBA", (6, 6), (255, 0, 0, 0)), "png", WHITE, 255),
        (Image.new("RGBA", (6, 6), (255, 0, 0, 128)), "png", [255, 127, 127], 165),
        (Image.new("LA", (6, 6), (90, 255)), "png", [90] * 3, 90),
        (Image.new("LA", (6, 6), (90, 0)), "png", WHITE, 255),
        (paletted(transparent=False), "png", RED, GREY_OF_RED),
        (paletted(transparent=True), "png", WHITE, 255),
        (paletted(transparent=True), "gif", WHITE, 255),
        (Image.new("CMYK", (6, 6), (0, 255, 255, 0)), "tif", RED, GREY_OF_RED),
        (Image.new("CMYK", (6, 6), (0, 255, 255, 0)), "jpg", RED, GREY_OF_RED),
        (Image.new("1", (6, 6), 1), "png", WHITE, 255),
        (Image.new("1", (6, 6), 0), "tif", [0] * 3, 0),
        (Image.fromarray(np.full((6, 6), 40_000, np.uint16)), "png", [156] * 3, 156),
        (clear_16_bit(), "png", WHITE, 255),
        (Image.fromarray(np.full((6, 6), 40_000, np.uint16)), "tif", [156] * 3, 156),
        (Image.fromarray(np.full((6, 6), 40_000, np.int32)), "tif", [156] * 3, 156),
        (Image.fromarray(np.zeros((6, 6), np.int32)), "tif", [0] * 3, 0),
    ],
    ids=lambda value: getattr(value, "mode", None) or str(value),
)
def test_decoding_every_kind_of_file(
    image: Image.Image, suffix: str, rgb: list[int], grey: int, tmp_path: Path
) -> None:
    file = tmp_path / f"image.{suffix}"
    image.save(file)
    for channels, expected in ((3, rgb), (1, [grey])):
        pixels = decode_image(file, 4, channels)
        assert pixels.dtype == np.uint8 and pixels.shape == (channels, 4, 4)
        expected = np.broadcast_to(np.array(expected)[:, None, None], pixels.shape)
        np.testing.assert_allclose(pixels, expected, atol=2)


@pytest.mark.parametrize(("low", "high"), [(-1000, 3000), (0, 2**31 - 1)])
def test_whole_numbers_of_no_known_range(low: int, high: int, tmp_path: Path) -> None:
    """Signed and 32-bit pixels, of CT for example, would become black or two-valued without a word."""
    Image.fromarray(np.linspace(low, high, 36).astype(np.int32).reshape(6, 6)).save(
        tmp_path / "image.tif"
    )
    with pytest.raises(ValueError, match="no defined range"):
        decode_image(tmp_path / "image.tif", 4, 1)


@pytest.mark.parametrize(
    ("kind", "high", "suffix"),
    [(np.uint16, 4095, "png"), (np.uint16, 255, "tif"), (np.int32, 255, "tif")],
)
def test_few_bits_in_many(kind: type, high: int, suffix: str, tmp_path: Path) -> None:
    """A scanner's 12 bits stored in 16 would become nearly black without a word; one bit more is taken."""
    pixels = np.linspace(0, high, 36).reshape(6, 6)
    Image.fromarray(pixels.astype(kind)).save(tmp_path / f"dark.{suffix}")
    with pytest.raises(ValueError, match=f"no pixel above {high:,} of 65,535"):
        decode_image(tmp_path / f"dark.{suffix}", 4, 1)
    pixels[-1, -1] = 4096
    Image.fromarray(pixels.astype(kind)).save(tmp_path / f"bright.{suffix}")
    assert decode_image(tmp_path / f"bright.{suffix}", 6, 1).max() == 4096 >> 8


@pytest.mark.parametrize("cache", ["disk", "memory", "off"])
@pytest.mark.parametrize(("bits", "told"), [(14, True), (16, False)])
def test_scans_of_few_bits_are_told_of(bits: int, told: bool, cache: str, tmp_path: Path) -> None:
    """14 bits stored in 16 leave 64 grey levels. One dark image among others is nothing to tell."""
    ramp = np.linspace(0, 2**bits - 1, 64).astype(np.uint16).reshape(8, 8)
    for name in ("cat/1", "cat/2", "dog/1", "dog/2"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ramp if name == "cat/1" else ramp // 2).save(
            tmp_path / f"images/{name}.png"
        )
    for _ in range(2):  # built, and found
        notes = open_small(tmp_path / "images", cache=cache, cache_dir=tmp_path / "cache").notes
        assert any("no pixel is brighter than 63 of 255" in note for note in notes) == told


@pytest.mark.parametrize("size", [(40, 8), (8, 40)])
def test_non_square_images_are_squeezed(size: tuple[int, int], tmp_path: Path) -> None:
    image = Image.new("L", size, 0)
    image.paste(200, (size[0] // 2, 0, *size))  # the right half
    image.save(tmp_path / "a.png")
    pixels = decode_image(tmp_path / "a.png", 8, 1)[0]
    assert (pixels[:, :3] < 10).all() and (pixels[:, 5:] > 190).all()


@pytest.mark.parametrize(
    ("orientation", "bright"),  # an image whose top half is bright, and where that half belongs
    [
        (1, np.s_[:3]), (2, np.s_[:3]), (3, np.s_[5:]), (4, np.s_[5:]),
        (5, np.s_[:, :3]), (6, np.s_[:, 5:]), (7, np.s_[:, 5:]), (8, np.s_[:, :3]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_rotation(orientation: int, bright: tuple, suffix: str, tmp_path: Path) -> None:
    image = Image.new("L", (64, 32), 0)
    image.paste(255, (0, 0, 64, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"a.{suffix}", exif=exif)
    pixels = decode_image(tmp_path / f"a.{suffix}", 8, 1)[0]
    assert (pixels[bright] > 240).all()
    assert pixels.mean() == pytest.approx(127.5, abs=5)


def test_exif_with_a_tag_of_a_wrong_type(tmp_path: Path) -> None:
    """Any other program shows such a photo; Pillow cannot write its tags back."""
    text = b"II*\0" + (8).to_bytes(4, "little") + (2).to_bytes(2, "little")
    for tag, kind, count, value in ((0x0100, 12, 1, 8), (0x0112, 3, 1, 6)):
        text += b"".join(n.to_bytes(2, "little") for n in (tag, kind))
        text += b"".join(n.to_bytes(4, "little") for n in (count, value))
    image = Image.new("L", (64, 32), 0)
    image.paste(255, (0, 0, 64, 16))
    image.save(tmp_path / "a.jpg", exif=b"Exif\0\0" + text + bytes(4))
    assert (decode_image(tmp_path / "a.jpg", 8, 1)[0][:, 5:] > 240).all()


def test_a_large_photo_keeps_its_content(tmp_path: Path) -> None:
    """JPEGs are decoded at a fraction of their size; the result is that of the whole image."""
    x = np.linspace(0, 255, 512)
    image = Image.fromarray(np.broadcast_to(x, (512, 512)).astype(np.uint8)).convert("RGB")
    image.save(tmp_path / "a.jpg", quality=95)
    image.save(tmp_path / "a.png")
    jpg, png = (decode_image(tmp_path / f"a.{s}", 16, 3).astype(int) for s in ("jpg", "png"))
    assert abs(jpg - png).max() <= 4


def break_images(folder: Path) -> list[str]:
    """Adds four broken images to the class cat; returns their names."""
    whole = (folder / "cat" / "000.png").read_bytes()
    (folder / "cat" / "empty.png").write_bytes(b"")
    (folder / "cat" / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "cat" / "text.jpg").write_text("not an image")
    (folder / "cat" / "nowhere.png").symlink_to(folder / "nowhere.png")
    return ["empty.png", "half.png", "text.jpg", "nowhere.png"]


def test_broken_images_are_named_or_skipped(image_folder: Path) -> None:
    names = break_images(image_folder / "train")
    Image.fromarray(np.ones((4, 4), np.float32)).save(image_folder / "test" / "dog" / "float.tif")
    for _ in range(2):  # from the files and from the cache
        with pytest.raises(DataError, match="5 images cannot be decoded.*--skip-broken") as raised:
            open_small(image_folder)
        assert all(name in str(raised.value) for name in [*names, "float.tif"])
        assert "\n" not in str(raised.value)
    data = open_small(image_folder, skip_broken=True, val_split=0.5)
    assert counts(data) == (20, 20, 20)
    assert any("5 images cannot be decoded" in note and names[0] in note for note in data.notes)
    for split in (data.train, data.val, data.test):
        assert (split.pixels[split.indices].mean(axis=(1, 2, 3)) > 60).all()  # none is left empty


def test_many_broken_images_are_counted(image_folder: Path) -> None:
    for i in range(7):
        (image_folder / "train" / "cat" / f"broken{i}.png").write_bytes(b"")
    with pytest.raises(DataError, match="7 images cannot be decoded.*broken4.*; and 2 more"):
        open_small(image_folder)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_of_which_nothing_is_left(
    split: str, image_folder: Path, make_images: MakeImages
) -> None:
    make_images(image_folder / "val", ["cat", "dog"], 3)
    for file in (image_folder / split).glob("*/*.png"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match=split):
        open_small(image_folder, skip_broken=True)


def test_a_class_of_which_nothing_is_left(image_folder: Path) -> None:
    for file in (image_folder / "train" / "cat").glob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match="cat"):
        open_small(image_folder, skip_broken=True)


# --- the cache --------------------------------------------------------------------------------------


def decode_small(folder: Path, size: int = 8, channels: int = 3) -> DecodedImages:
    return decode_folder(read_image_folder(folder), size, channels, folder.parent / "cache", 2)


def test_cache_is_reused_and_each_size_and_channel_has_its_own(image_folder: Path) -> None:
    folder = image_folder / "train"
    first, second = decode_small(folder), decode_small(folder)
    assert (first.built, second.built) == (True, False)
    assert np.array_equal(first.pixels[:], second.pixels[:])
    others = [decode_small(folder, 12), decode_small(folder, 8, 1)]
    assert [other.built for other in others] == [True, True]
    assert len({first.file, second.file, *(other.file for other in others)}) == 3
    assert not decode_small(folder).built
    assert not list(first.file.parent.glob("*.tmp"))


@pytest.mark.parametrize(
    "change", ["content", "same size", "time", "add", "remove", "rename", "broken"]
)
def test_cache_follows_the_folder(change: str, image_folder: Path) -> None:
    folder = image_folder / "train"
    before = decode_small(folder)
    image = folder / "cat" / "000.png"
    match change:
        case "content":
            Image.new("RGB", (12, 12), "white").save(image)
        case "same size":  # the time alone tells
            content = bytearray(image.read_bytes())
            content[-20] ^= 1
            image.write_bytes(content)
        case "time":
            os.utime(image, ns=(0, image.stat().st_mtime_ns + 1))
        case "add":
            Image.new("RGB", (12, 12), "white").save(folder / "cat" / "zzz.png")
        case "remove":
            image.unlink()
        case "rename":
            image.rename(folder / "dog" / "zzz.png")
        case "broken":
            image.write_bytes(b"")
    after = decode_small(folder)
    assert after.built and after.file != before.file
    images = read_image_folder(folder)
    for i in range(len(images.names)):
        if i not in after.broken:
            assert np.array_equal(after.pixels[i], decode_image(images.path(i), 8, 3))
    assert (0 in after.broken) == (change in ("broken", "same size"))


def test_any_time_that_a_file_can_have(image_folder: Path) -> None:
    for number, seconds in enumerate((-(2**31), 13_569_465_600)):  # 1901, 2400
        os.utime(image_folder / "train" / "cat" / f"{number:03}.png", (seconds, seconds))
    assert decode_small(image_folder / "train").built
    assert not decode_small(image_folder / "train").built


def test_a_lack_of_memory_is_not_the_images_fault(image_folder: Path) -> None:
    """Nothing is kept of it, and the next run has all images."""
    folder = image_folder / "train"
    Image.new("RGBA", (6000, 6000), "red").save(folder / "cat" / "large.png", compress_level=1)
    code = """if True:
        import resource, sys
        from pathlib import Path
        from cache_vit import decode_folder
        from folder_vit import DataError, read_image_folder
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**27,) * 2)  # the image takes 144 MB
        try:
            decode_folder(read_image_folder(Path(sys.argv[1])), 8, 3, Path(sys.argv[2]), 1)
        except DataError as error:
            print(error)
    """
    output, _ = python(code, folder, folder.parent / "cache").communicate(timeout=60)
    assert "large.png takes more memory to decode than there is" in output
    assert not list((folder.parent / "cache").glob("*.npy"))
    assert not decode_small(folder).broken


def test_eight_processes_build_a_cold_cache_once(image_folder: Path) -> None:
    code = """if True:
        import sys, time
        from pathlib import Path
        from cache_vit import decode_folder
        from folder_vit import read_image_folder
        folder, start = Path(sys.argv[1]), float(sys.argv[2])
        images = read_image_folder(folder)
        print("ready", flush=True)
        sys.stdin.readline()
        decoded = decode_folder(images, 64, 3, folder.parent / "cache", 1)
        print(decoded.built, int(decoded.pixels[:].sum(dtype=int)), decoded.file)
    """
    command = [sys.executable, "-c", code, str(image_folder / "train"), "0"]
    all_8 = [
        subprocess.Popen(
            command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(8)
    ]
    assert [process.stdout.readline() for process in all_8] == ["ready\n"] * 8
    for process in all_8:  # all have imported everything: now at once
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=60)[0].split(maxsplit=1) for process in all_8]
    assert sorted(built for built, _ in answers) == ["False"] * 7 + ["True"]
    assert len({pixels_and_file for _, pixels_and_file in answers}) == 1


def test_cache_folder_that_cannot_be_one(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be kept in .*file/cache.*--cache-dir"):
        open_small(image_folder, cache_dir=tmp_path / "file" / "cache")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_cache_folder_without_permission(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(DataError, match="locked.*--cache-dir"):
        open_small(image_folder, cache_dir=tmp_path / "locked")


def test_disk_full(image_folder: Path, tmp_path: Path) -> None:
    """The largest file that the process may write is smaller than the cache."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # 40 images of 3 x 16 x 16: 30,848
    try:
        with pytest.raises(DataError, match="cannot be kept in .*cache: File too large.*room"):
            open_small(image_folder, image_size=16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "cache").glob("*.tmp"))
    assert counts(open_small(image_folder, image_size=16)) == (36, 4, 20)


def test_a_damaged_cache_file_is_built_again(image_folder: Path) -> None:
    """What a crash of the machine can leave behind."""
    before = decode_small(image_folder / "train")
    before.file.write_bytes(before.file.read_bytes()[:1000])
    after = decode_small(image_folder / "train")
    assert np.array_equal(after.pixels[0], decode_image(image_folder / "train/cat/000.png", 8, 3))


# --- the demo ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_digits_written_by_two_processes_at_once(tmp_path: Path) -> None:
    code = """if True:
        import sys
        from pathlib import Path
        from demo_vit import make_digits
        print(make_digits(Path(sys.argv[1])))
    """
    both = [python(code, tmp_path / "dataset" / "digits") for _ in range(2)]
    folder = make_digits(tmp_path / "dataset" / "digits")  # and this one is the third
    for process in both:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert out.strip() == str(folder)
    assert [path.name for path in (tmp_path / "dataset").iterdir()] == ["digits"]

    digits = load_digits()
    files = {int(path.stem): path for path in folder.glob("*/*/*.png")}
    assert len(files) == len(list(folder.rglob("*.png"))) == 1797
    for index, path in list(files.items())[::100]:
        assert path.parent.name == str(digits.target[index])
        pixels = np.asarray(Image.open(path)) * (16 / 255)
        np.testing.assert_allclose(pixels, digits.images[index], atol=0.05)
    for number in range(10):
        parts = [len(list((folder / part / str(number)).iterdir())) for part in ("train", "test")]
        assert parts[1] == round(0.2 * sum(parts))


# --- batches ----------------------------------------------------------------------------------------


@pytest.fixture
def split() -> Split:
    """13 images of 30, every one different from all others, and from itself when flipped."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (30, 1, 4, 4), np.uint8)
    targets = np.arange(30) % 3
    return Split(pixels, targets, np.arange(2, 28, 2))


def rows(split: Split, images: torch.Tensor, dims: tuple[int, ...] = ()) -> list[int]:
    """Which rows of `split.pixels` these are, when flipped along `dims`."""
    pixels = images.flip(dims).add(1).mul(127.5).round().to(torch.uint8).numpy()
    return [
        next((i for i, own in enumerate(split.pixels) if np.array_equal(own, image)), -1)
        for image in pixels
    ]


@pytest.mark.parametrize("batch_size", [1, 4, 13, 50])
def test_batches_show_every_image_once(batch_size: int, split: Split) -> None:
    seen = []
    for images, targets, positions in batches(split, batch_size, CPU):
        assert images.dtype == torch.float32 and images.abs().max() <= 1
        assert rows(split, images) == split.indices[positions].tolist()
        assert targets.tolist() == split.targets[split.indices[positions]].tolist()
        seen += rows(split, images)
    assert seen == split.indices.tolist()


def test_pixels_are_scaled_to_minus_one_to_one() -> None:
    pixels = np.array([0, 255, 51], np.uint8).reshape(3, 1, 1, 1)
    split = Split(pixels, np.zeros(3, np.int64), np.arange(3))
    images, _, _ = next(batches(split, 3, CPU))
    torch.testing.assert_close(images.flatten(), torch.tensor([-1.0, 1.0, -0.6]))


@pytest.mark.parametrize("flip", list(FLIPS))
def test_an_epoch_shows_every_image_once(flip: str, split: Split) -> None:
    dims = FLIPS[flip]
    epoch = list(training_batches(split, 4, CPU, Augmentation(flip), num_classes=3, seed=5))
    assert [len(targets) for _, targets, _ in epoch] == [4, 4, 4, 1]
    images, targets = (torch.cat(part) for part in list(zip(*epoch, strict=True))[:2])
    ways = {(): rows(split, images)} | {(d,): rows(split, images, (d,)) for d in dims}
    if len(dims) == 2:
        ways[dims] = rows(split, images, dims)
    found = [[row for row in image if row >= 0] for image in zip(*ways.values(), strict=True)]
    assert all(len(image) == 1 for image in found)
    order = [image[0] for image in found]
    assert sorted(order) == split.indices.tolist() and order != sorted(order)
    assert targets.tolist() == split.targets[order].tolist()
    for way in ways.values():  # each way of flipping happens, and none of them always
        assert any(row >= 0 for row in way)
        assert len(ways) == 1 or any(row < 0 for row in way)


@pytest.mark.parametrize("affine", [0.0, 0.4])
def test_epochs_follow_from_their_seed(affine: float, split: Split) -> None:
    def epoch(seed: int, start: int = 0) -> list[torch.Tensor]:
        iterator = training_batches(
            split, 4, CPU, Augmentation("both", affine), num_classes=3, seed=seed, start=start
        )
        return [part for batch in iterator for part in batch[:2]]

    def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
        return len(a) == len(b) and all(map(torch.equal, a, b))

    whole = epoch(1)
    assert equal(whole, epoch(1))
    assert not equal(whole, epoch(2))
    for start in range(5):  # resumed in its middle it goes on with the same images
        assert equal(whole[2 * start :], epoch(1, start))


def test_open_data_notes_are_lines(image_folder: Path) -> None:
    notes = open_small(image_folder).notes
    assert sum("decoded" in note for note in notes) == 2  # train/ and test/
    again = open_small(image_folder).notes
    assert not any("decoded" in note for note in again)
    assert sum("from the cache" in note and " MB)" in note for note in again) == 2
    assert "\n" not in json.dumps(notes).replace("\\n", "\n")
