"""Broken, hostile and vanishing files, full disks, kills and several users: named or survived, never silent."""

import io
import json
import logging
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import data_vit
import images_vit
from cache_vit import DecodedImages, decode_folder
from folder_vit import DataError, ImageFolder, read_image_folder
from images_vit import decode_image

REPOSITORY = Path(data_vit.__file__).parent
MakeImages = Callable[..., Path]
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, mounts a small disk")
NOBODY = 65534


def open_small(folder: Path, **changes: object) -> data_vit.Data:
    arguments = {
        "num_classes": None, "image_size": 8, "channels": 3, "val_split": None, "seed": 0,
        "cache_dir": folder.parent / "cache", "workers": 2, "skip_broken": False,
    }  # fmt: skip
    return data_vit.open_data(folder, **arguments | changes)


def decode(folder: Path, size: int = 8, channels: int = 3, workers: int = 2) -> DecodedImages:
    images = read_image_folder(folder)
    return decode_folder(images, size, channels, folder.parent / "cache", workers)


def paths_of(images: ImageFolder) -> list[Path]:
    return [images.path(i) for i in range(len(images.names))]


def broken_names(folder: Path, decoded: DecodedImages) -> dict[str, str]:
    """Name -> reason, each checked to be one line that any log can hold."""
    paths = paths_of(read_image_folder(folder))
    for reason in decoded.broken.values():
        assert reason and reason.isprintable() and len(reason) < 1000
    return {paths[i].name: reason for i, reason in decoded.broken.items()}


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.copy().save(buffer, format, **options)  # Pillow keeps a format's settings in the image
    return buffer.getvalue()


# Imports once, then runs each job (code, arguments, user, umask) of a request in a process that it
# forks; the jobs of one request run at the same time. Pillow's plug-ins are loaded while it may.
SERVER = """
import json, os, sys, traceback
from pathlib import Path
from PIL import Image
import numpy.ma  # used late, when another user may not read where it lies
from data_vit import *
Image.init()
np.random.default_rng()  # imported when it is first used
names = dict(globals())
def start(number, code, arguments, uid, umask):
    if pid := os.fork():
        return pid
    for descriptor in (1, 2):
        os.dup2(os.open(f"{sys.argv[1]}/{number}.{descriptor}", os.O_RDWR | os.O_CREAT | os.O_TRUNC), descriptor)
    status = 1
    try:
        if uid:
            os.setgroups([]); os.setgid(uid); os.setuid(uid)
        os.umask(umask)
        exec(code, names | {"arguments": arguments})
        sys.stdout.flush()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
for line in sys.stdin:
    pids = [start(number, *job) for number, job in enumerate(json.loads(line))]
    print(json.dumps([os.waitpid(pid, 0)[1] for pid in pids]), flush=True)
"""
Job = tuple[str, list, int, int]
RunJobs = Callable[..., list[str]]


@pytest.fixture(scope="module")
def run_jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunJobs]:
    """run_jobs((code, arguments, user, umask), ...) is what each wrote to stdout; stderr stays empty."""
    outputs = tmp_path_factory.mktemp("outputs")
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(outputs)],
        # glibc would keep some of what each thread has freed: what is measured is what is in use.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"},
        cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip

    def run(*jobs: Job) -> list[str]:
        process.stdin.write(json.dumps(jobs) + "\n")
        process.stdin.flush()
        statuses = json.loads(process.stdout.readline())
        errors = [(outputs / f"{i}.2").read_text() for i in range(len(jobs))]
        assert list(zip(statuses, errors, strict=True)) == [(0, "")] * len(jobs)
        return [(outputs / f"{i}.1").read_text() for i in range(len(jobs))]

    yield run
    process.stdin.close()
    assert process.wait(timeout=20) == 0


def wait_for(condition: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def folder(tmp_path: Path, make_images: MakeImages) -> Path:
    """Two classes of 5 good images each."""
    return make_images(tmp_path / "data", ["cat", "dog"], 5)


@pytest.fixture(scope="module")
def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8))


@pytest.fixture(scope="module")
def large_png() -> bytes:
    """5000 x 5000 with transparency: 100 MB decoded, and twice that while it is resized."""
    return encoded(Image.new("RGBA", (5000, 5000), (200, 60, 60, 128)), "PNG", compress_level=1)


# --- one file ---------------------------------------------------------------------------------------


def test_each_broken_file_is_named(folder: Path, noise: Image.Image) -> None:
    palette = noise.convert("P")
    files = {
        "half.jpg": encoded(noise, "JPEG")[:500],
        "half.png": encoded(noise, "PNG")[:-200],
        "half.gif": encoded(palette, "GIF")[:-200],
        "half.tif": encoded(noise, "TIFF", compression="tiff_lzw")[:-600],
        "half.webp": encoded(noise, "WEBP")[:-200],
        "half.bmp": encoded(noise, "BMP")[:-200],
        "empty.png": b"",
        "zeros.jpg": bytes(3000),
        "text.jpg": b"not an image",
        "html.png": b"<!doctype html><title>404 Not Found</title>",
        "archive.png": b"PK\x03\x04" + bytes(100),
        # Pillow left to choose hands this to Ghostscript.
        "program.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n%%EOF\n",
        "flipped.png": encoded(noise, "PNG")[:100] + b"?" + encoded(noise, "PNG")[101:],
    }
    for name, content in files.items():
        (folder / "cat" / name).write_bytes(content)
    for built in (True, False):
        decoded = decode(folder)
        assert decoded.built == built
        assert set(broken_names(folder, decoded)) == set(files)
    assert broken_names(folder, decoded)["text.jpg"] == "not an image"


def test_contents_decide_not_extensions(folder: Path, noise: Image.Image) -> None:
    formats = ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "JPEG2000")
    for i, format in enumerate(formats):
        image = noise.convert("P") if format == "GIF" else noise
        for j, extension in enumerate((".jpg", ".png", ".tif", ".tga")):
            (folder / "cat" / f"{i}{j}{extension}").write_bytes(encoded(image, format))
    (folder / "cat" / "right.TGA").write_bytes(encoded(noise, "TGA"))
    decoded = decode(folder)
    assert not decoded.broken and len(decoded.pixels) == 10 + 4 * len(formats) + 1
    names = [path.name for path in paths_of(read_image_folder(folder))]
    for i in range(len(formats)):
        rows = [decoded.pixels[names.index(n)] for n in names if n[:-4] in (f"{i}0", f"{i}2")]
        assert np.array_equal(*rows)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def bombs() -> dict[str, bytes]:
    """Files of at most 50 kB that claim 180 million to 4.3 thousand million pixels."""

    def png(side: int) -> bytes:
        header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0))
        data = png_chunk(b"IDAT", zlib.compress(bytes(10_000_000)))
        return b"\x89PNG\r\n\x1a\n" + header + data + png_chunk(b"IEND", b"")

    tags = {256: 60_000, 257: 60_000, 258: 8, 259: 5, 262: 1, 273: 8, 277: 1, 278: 60_000, 279: 9}
    tiff = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags))
    tiff += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    gif = bytearray(encoded(Image.new("P", (4, 4)), "GIF"))
    gif[6:10] = b"\xff\xff\xff\xff"
    frame = bytearray(encoded(Image.new("P", (4, 4)), "GIF"))
    at = frame.index(b",")  # a small screen, but a first frame of 65,535 x 65,535
    frame[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    jpeg = bytearray(encoded(Image.new("L", (8, 8)), "JPEG"))
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", 65_000, 65_000)
    bmp = bytearray(encoded(Image.new("RGB", (4, 4)), "BMP"))
    bmp[18:26] = struct.pack("<ii", 50_000, 50_000)
    return {
        "png.png": png(50_000),
        "tiff.tif": tiff + bytes(4),
        "gif.gif": bytes(gif),
        "frame.gif": bytes(frame),
        "jpeg.jpg": bytes(jpeg),
        "bmp.bmp": bytes(bmp),
        "ppm.ppm": b"P6 50000 50000 255 " + bytes(99),
        "limit.png": png(13_400),  # just above twice what Pillow warns of
    }


MEASURE = """
def megabytes(name):
    status = Path("/proc/self/status").read_text()
    return int(status.split(name + ":")[1].split()[0]) / 1024
folder, channels = Path(arguments[0]), arguments[1]
before = megabytes("VmRSS")
decode_folder(read_image_folder(folder), 8, channels, folder.parent / "cache", 4)
print(megabytes("VmHWM") - before)
"""


def test_bombs_are_refused_within_bounded_memory(folder: Path, run_jobs: RunJobs) -> None:
    for name, content in bombs().items():
        assert len(content) < 50_000
        (folder / "cat" / name).write_bytes(content)
    # 100 million pixels: where Pillow warns of a bomb, but decodes.
    Image.new("1", (10_000, 10_000), 1).save(folder / "dog" / "warned.png")
    (peak,) = run_jobs((MEASURE, [str(folder), 3], 0, 0o022))
    assert float(peak) < 600  # MB: 5 bytes a pixel of the largest
    decoded = decode(folder)
    assert not decoded.built
    reasons = broken_names(folder, decoded)
    assert set(reasons) == set(bombs())
    assert {n for n, reason in reasons.items() if "pixels" not in reason} == set()
    assert (decoded.pixels[-1] == 255).all()


def test_large_images_are_decoded_one_at_a_time(
    folder: Path, large_png: bytes, run_jobs: RunJobs
) -> None:
    for i in range(4):
        (folder / "cat" / f"large{i}.png").write_bytes(large_png)
    Image.new("RGB", (9000, 2000), "red").save(folder / "cat" / "wide.jpg")
    (peak,) = run_jobs((MEASURE, [str(folder), 3], 0, 0o022))
    assert float(peak) < 300  # MB; at once they would be 800
    decoded = decode(folder)
    assert not decoded.broken and not decoded.built
    np.testing.assert_allclose(decoded.pixels[5:9].mean(axis=(0, 2, 3)), [227, 157, 157], atol=1)


def test_a_file_that_is_too_long(folder: Path) -> None:
    with open(folder / "cat" / "sparse.png", "wb") as file:
        file.truncate(2**40)
    assert broken_names(folder, decode(folder)) == {"sparse.png": "file of 1,099,511,627,776 bytes"}


def test_pipes_sockets_and_devices_do_not_block(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(folder / "cat" / "pipe.png")
    (folder / "cat" / "device.png").symlink_to("/dev/zero")
    monkeypatch.chdir(folder / "cat")  # the path of a socket has at most 107 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        decoded = decode(folder)
    names = ("pipe.png", "device.png", "socket.png")
    assert broken_names(folder, decoded) == dict.fromkeys(names, "not a regular file")


@pytest.mark.parametrize("format", ["GIF", "TIFF", "WEBP", "PNG"])
def test_the_first_of_several_frames(format: str, tmp_path: Path) -> None:
    first, second = Image.new("RGB", (9, 9), "red"), Image.new("RGB", (9, 9), "blue")
    content = encoded(first, format, save_all=True, append_images=[second] * 2)
    (tmp_path / "a.gif").write_bytes(content)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames > 1
    pixels = decode_image(tmp_path / "a.gif", 4, 3)
    np.testing.assert_allclose(pixels.mean(axis=(1, 2)), [255, 0, 0], atol=3)


def remarkable(noise: Image.Image) -> dict[str, bytes]:
    """Files that make Pillow warn, Pillow log and libtiff write to stderr."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "maker" * 9, 1
    jpeg = encoded(noise, "JPEG", exif=exif)
    at = jpeg.index(b"II*\0") if b"II*\0" in jpeg else jpeg.index(b"MM\0*")
    broken_exif = jpeg[: at + 8] + b"\xff\xff" + jpeg[at + 10 :]
    tiff = bytearray(encoded(noise, "TIFF", compression="tiff_adobe_deflate"))
    tiff[len(tiff) // 2] ^= 255
    # 9 samples a pixel: logged as an error.
    samples = encoded(noise, "TIFF").replace(
        struct.pack("<HHII", 277, 3, 1, 3), struct.pack("<HHII", 277, 3, 1, 9)
    )
    apng = b"\x89PNG\r\n\x1a\n"
    whole = encoded(noise, "PNG")
    apng += whole[8:33] + png_chunk(b"acTL", struct.pack(">II", 0, 0)) + whole[33:]
    return {"exif.jpg": broken_exif, "deflate.tif": bytes(tiff), "samples.tif": samples, "a.png": apng}  # fmt: skip


def test_remarks_of_the_decoders_do_not_reach_the_log(
    folder: Path,
    noise: Image.Image,
    capfd: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
) -> None:
    for name, content in remarkable(noise).items():
        (folder / "cat" / name).write_bytes(content)
        with Image.open(io.BytesIO(content)) if name[0] in "ae" else io.BytesIO():
            pass
    assert len(recwarn.list) >= 2  # they do when Pillow is on its own
    recwarn.clear()
    level = logging.getLogger("PIL").level
    assert set(broken_names(folder, decode(folder))) == {"deflate.tif", "samples.tif"}
    assert capfd.readouterr() == ("", "")
    assert not caplog.records and not recwarn.list
    assert logging.getLogger("PIL").level == level


# --- names and links --------------------------------------------------------------------------------

NAMES = [
    "with space", "line\nfeed", "tab\tand\rreturn", "\x1b[31mred\x1b[0m", "Bär", "猫", "кошка", "قطة",
    "बिल्ली", "🐈", "a'b\"c`d$e", "%s{0}", "-rf", os.fsdecode(b"caf\xe9"), os.fsdecode(b"\xff\xfe"),
    "rtl\u202egnp", "x" * 240,
]  # fmt: skip


def test_names_of_any_bytes(folder: Path) -> None:
    good = (folder / "cat" / "000.png").read_bytes()
    for name in NAMES:
        (folder / "cat" / f"{name}.png").write_bytes(good)
        (folder / "dog" / f"{name}.png").write_bytes(b"broken")
    (folder / "cat" / os.fsdecode(b"notes.\xff\n")).write_text("")
    for built in (True, False):
        decoded = decode(folder)
        assert decoded.built == built and len(decoded.broken) == len(NAMES)
    with pytest.raises(DataError, match=f"{len(NAMES)} images cannot be decoded") as raised:
        open_small(folder)
    assert str(raised.value).isprintable()
    data = open_small(folder, skip_broken=True)
    assert len(data.train) + len(data.val) == 10 + len(NAMES)
    assert any(".\udcff\n" in note and "notes" not in note for note in data.notes)


def test_the_log_of_such_names(folder: Path, run_main: Callable[..., Any], tmp_path: Path) -> None:
    """Its lines stay lines, and a terminal obeys none of them."""
    (folder / "cat").rename(folder / "a\nfake  line\x1b[2J")
    (folder / "dog" / os.fsdecode(b"notes.\xff\n")).write_text("")
    argv = [
        "--download-dir",
        folder,
        "-s",
        8,
        "-p",
        4,
        "--vt-dim",
        16,
        "--vt-depth",
        1,
        "--max-steps",
        1,
    ]
    result = run_main(*argv, "--model-dir", tmp_path / "r\nx\x1b[31m")
    assert result.status == 0, result.stderr
    assert all(line.isprintable() for line in result.stdout.split("\n"))
    assert r"2 classes: a\nfake  line\x1b[2J, dog" in result.stdout
    assert r".\udcff\n" in result.stdout and r"r\nx\x1b[31m" in result.stdout
    result = run_main(*argv, "--model-dir", tmp_path / os.fsdecode(b"r\xff"))
    assert result.status == 2 and result.stderr.count("\n") == 1
    assert r"r\udcff: its name is not UTF-8; give --model-dir another" in result.stderr


def test_the_key_tells_such_names_apart(folder: Path) -> None:
    files = set()
    for name in (b"\xe9", b"\xe8", b"\xc3\xa9", b"\n", b"\\n"):
        file = folder / "cat" / os.fsdecode(name + b".png")
        shutil.copy2(folder / "cat" / "000.png", file)
        files.add(decode(folder).file)
        file.unlink()
    assert len(files) == 5


def test_folders_with_such_names(tmp_path: Path, make_images: MakeImages) -> None:
    folder = make_images(tmp_path / os.fsdecode(b"d\xe4ta\n"), ["cat", "dog"], 3)
    (folder / "dog").rename(folder / os.fsdecode(b"\xff\n"))
    assert len(open_small(folder).classes) == 2
    (folder / "cat" / "000.png").write_bytes(b"")
    with pytest.raises(DataError) as raised:
        open_small(folder)
    assert str(raised.value).isprintable() and r"d\udce4ta\n/cat/000.png" in str(raised.value)


def test_links(folder: Path) -> None:
    (folder / "cat" / "nowhere.png").symlink_to("gone.png")
    (folder / "cat" / "a.png").symlink_to("b.png")
    (folder / "cat" / "b.png").symlink_to("a.png")
    (folder / "cat" / "up").symlink_to("..", target_is_directory=True)
    (folder / "cat" / "self").symlink_to("self", target_is_directory=True)
    (folder / "cat" / "good.png").symlink_to(folder / "cat" / "000.png")
    assert broken_names(folder, decode(folder)) == {
        "nowhere.png": "No such file or directory",
        "a.png": "Too many levels of symbolic links",
        "b.png": "Too many levels of symbolic links",
    }


@pytest.mark.parametrize("target", ["gone", "eel"])
def test_a_class_or_split_that_is_a_link_to_nowhere(
    target: str, image_folder: Path, make_images: MakeImages
) -> None:
    """Else the run would go on without it."""
    (image_folder / "train" / "eel").symlink_to(target)
    with pytest.raises(DataError, match="train/eel is a link to nowhere.*repair or remove"):
        open_small(image_folder)
    (image_folder / "train" / "eel").unlink()
    for name in ("val", "test"):
        shutil.rmtree(image_folder / name, ignore_errors=True)
        (image_folder / name).symlink_to("/nowhere")
        with pytest.raises(DataError, match=f"{name} is a link to nowhere"):
            open_small(image_folder)
        (image_folder / name).unlink()


BUILD = """
folder = Path(arguments[0])
decode_folder(read_image_folder(folder), 8, 3, folder.parent / "cache", 2)
"""


# --- fuzz -------------------------------------------------------------------------------------------


def seed_files(noise: Image.Image) -> list[tuple[str, bytes]]:
    """Small whole files of every format, mode and compression that are to be mutated."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "maker", 6
    palette, grey, rgba = noise.convert("P"), noise.convert("L"), noise.convert("RGBA")
    files = [
        ("jpg", encoded(noise, "JPEG", exif=exif)), ("jpg", encoded(noise, "JPEG", progressive=True)),
        ("jpg", encoded(grey, "JPEG")), ("jpg", encoded(noise.convert("CMYK"), "JPEG")),
        ("png", encoded(noise, "PNG", exif=exif)), ("png", encoded(palette, "PNG", transparency=3)),
        ("png", encoded(rgba, "PNG")), ("png", encoded(noise.convert("1"), "PNG")),
        ("png", encoded(Image.fromarray(np.asarray(grey).astype(np.uint16) * 256), "PNG")),
        ("gif", encoded(palette, "GIF")),
        ("gif", encoded(palette, "GIF", save_all=True, append_images=[grey], transparency=1)),
        ("webp", encoded(noise, "WEBP")), ("webp", encoded(rgba, "WEBP", lossless=True)),
        ("webp", encoded(noise, "WEBP", save_all=True, append_images=[grey])),
        ("bmp", encoded(noise, "BMP")), ("bmp", encoded(palette, "BMP")),
        ("tif", encoded(noise, "TIFF", save_all=True, append_images=[grey])),
        ("ppm", encoded(noise, "PPM")), ("tga", encoded(noise, "TGA", compression="tga_rle")),
        ("jp2", encoded(noise, "JPEG2000")),
    ]  # fmt: skip
    for compression in ("tiff_lzw", "jpeg", "tiff_adobe_deflate", "packbits"):
        files.append(("tif", encoded(noise, "TIFF", compression=compression)))
    return [*files, ("tif", encoded(noise.convert("1"), "TIFF", compression="group4"))]


def mutate(content: bytes, generator: random.Random) -> bytes:
    """1 to 16 flips, insertions, removals, extreme numbers and truncations, headers first."""
    mutated = bytearray(content)
    for _ in range(generator.choice((1, 1, 2, 4, 16))):
        reach = len(mutated) if generator.random() < 0.6 else min(len(mutated), 100)
        i = generator.randrange(reach + 1)
        match generator.randrange(6):
            case 0 | 1 if i < len(mutated):
                mutated[i] ^= 1 << generator.randrange(8)
            case 2:
                mutated[i:i] = generator.randbytes(generator.choice((1, 2, 4, 64)))
            case 3:
                del mutated[i : i + generator.choice((1, 2, 4, 64))]
            case 4:
                extremes = (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\1\0")
                mutated[i : i + 4] = generator.choice(extremes)
            case 5 if generator.random() < 0.3:
                del mutated[i:]
    return bytes(mutated)


@pytest.mark.parametrize(
    ("count", "seed"), [(500, 1), pytest.param(6000, 2, marks=pytest.mark.slow)]
)
def test_fuzzed_files_are_decoded_or_named(
    count: int, seed: int, tmp_path: Path, noise: Image.Image, run_jobs: RunJobs
) -> None:
    generator, seeds = random.Random(seed), seed_files(noise)
    for name in ("cat", "dog"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for i in range(count):
        extension, content = seeds[i % len(seeds)]
        file = tmp_path / "data" / ("cat", "dog")[i % 2] / f"{i:05}.{extension}"
        file.write_bytes(mutate(content, generator))
    assert run_jobs((BUILD, [str(tmp_path / "data")], 0, 0o022)) == [""]  # it lived, and was quiet
    decoded = decode(tmp_path / "data")
    assert not decoded.built and decoded.pixels.shape == (count, 3, 8, 8)
    assert len(broken_names(tmp_path / "data", decoded)) == len(decoded.broken)
    assert 0.2 * count < len(decoded.broken) < 0.8 * count  # both happen often
    paths = paths_of(read_image_folder(tmp_path / "data"))
    images_vit.quiet_pillow()
    for i in range(0, count, 7):
        try:
            pixels = decode_image(paths[i], 8, 3)
        except Exception:
            assert i in decoded.broken
        else:
            assert np.array_equal(pixels, decoded.pixels[i]) and i not in decoded.broken


# --- folders ----------------------------------------------------------------------------------------


def test_one_percent_broken(tmp_path: Path, make_images: MakeImages) -> None:
    folder = make_images(tmp_path / "data", ["cat", "dog"], 200)
    broken = [folder / "cat" / "007.png", folder / "cat" / "150.png", folder / "dog" / "000.png", folder / "dog" / "199.png"]  # fmt: skip
    for file in broken:
        file.write_bytes(file.read_bytes()[:-60])
    with pytest.raises(DataError, match="^4 images cannot be decoded") as raised:
        open_small(folder)
    assert str(raised.value).count(str(folder)) == len(broken)
    assert all(str(file) in str(raised.value) for file in broken)
    data = open_small(folder, skip_broken=True)
    assert any("4 images cannot be decoded" in note for note in data.notes)
    paths = paths_of(read_image_folder(folder))
    used = {paths[i] for split in (data.train, data.val) for i in split.indices}
    assert used == set(paths) - set(broken)


@pytest.mark.parametrize("what", ["data folder", "file", "cache folder"])
def test_vanishing_while_it_is_decoded(what: str, folder: Path, large_png: bytes) -> None:
    (folder / "cat" / "0-slow.png").write_bytes(large_png)
    cache, away, errors = folder.parent / "cache", folder.parent / "away", []

    def open_it() -> None:
        with pytest.raises(DataError) as raised:
            open_small(folder, workers=1, skip_broken=True)
        errors.append(str(raised.value))

    thread = threading.Thread(target=open_it)
    thread.start()
    wait_for(lambda: list(cache.glob("*.tmp")))
    vanishing = {"data folder": folder, "file": folder / "dog" / "004.png", "cache folder": cache}
    vanishing[what].rename(away)
    thread.join()
    if what == "cache folder":
        assert "cannot be kept in" in errors[0] and "No such file or directory" in errors[0]
        shutil.rmtree(away)
    else:
        assert "could be read when the folder was listed, but no more" in errors[0]
        assert {path.suffix for path in cache.iterdir()} == {".lock"}
        away.rename(vanishing[what])  # mounted again, as it was: nothing wrong is remembered
    data = open_small(folder)
    assert len(data.train) + len(data.val) == 11


def test_files_that_vanish_after_they_were_listed(folder: Path) -> None:
    images = read_image_folder(folder)
    images.path(3).rename(folder / "away")
    decoded = decode_folder(images, 8, 3, folder.parent / "cache", 2)
    assert decoded.broken == {3: "No such file or directory"}
    (folder / "away").rename(images.path(3))
    assert not decode(folder).broken


def test_the_cache_folder_vanishes_while_it_is_used(folder: Path) -> None:
    decoded = decode(folder)
    before = decoded.pixels[:].sum(dtype=int)
    shutil.rmtree(folder.parent / "cache")
    assert decoded.pixels[:].sum(dtype=int) == before
    assert decode(folder).built


@as_root
def test_what_another_user_may_not_read(shared: Path, run_jobs: RunJobs) -> None:
    """As the user nobody: an unreadable file is named, a folder that cannot be listed ends the run."""
    folder = shared / "data"

    def broken_for(user: int) -> dict[str, str]:
        return as_users(run_jobs, folder, [(user, 0o022)])[0]["broken"]

    (folder / "cat" / "000.png").chmod(0o600)
    assert broken_for(NOBODY) == {"0": "Permission denied"}
    # Whoever may read it is not told what was true of another, nor is the user once it was repaired.
    assert broken_for(0) == {}
    (folder / "cat" / "000.png").chmod(0o644)
    assert broken_for(NOBODY) == {}
    (folder / "cat" / "deeper").mkdir()
    for place in (folder / "cat" / "deeper", folder / "cat", folder):
        place.chmod(0o700)
        (message,) = as_users(run_jobs, folder, [(NOBODY, 0o022)])
        assert message.startswith(f"data folder {folder} cannot be listed: {place}")
        assert message.endswith(": Permission denied")
        place.chmod(0o755)


# --- the cache --------------------------------------------------------------------------------------


def test_a_damaged_cache_is_noticed_and_repaired(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A row when it is read, and said so; all else at the start, where the whole is built again."""
    (folder / "cat" / "broken.png").write_bytes(b"")
    good = decode(folder)
    whole = good.file.read_bytes()
    generator = random.Random(0)
    damages = [whole[:n] for n in (0, 3, 4, 100, len(whole) // 2, len(whole) - 1)]
    damages += [b"\0" * 4, b"\0" * len(whole), b"PK\x03\x04" * 99, whole + b"\0"]
    for i in (0, 6, 20, 90, 127, *generator.sample(range(128, len(whole)), 20), len(whole) - 6):
        flipped = bytearray(whole)
        flipped[i] ^= 1 << generator.randrange(8)
        damages.append(bytes(flipped))
    pixels, rows = good.pixels[:], slice(128, 128 + good.pixels.nbytes)
    assert zlib.crc32(pixels) == zlib.crc32(whole[rows])  # as numpy would map it
    assert np.array_equal(np.load(good.file), pixels)
    healed = 0
    for damage in damages:
        good.file.unlink()
        good.file.write_bytes(damage)
        caplog.clear()
        again = decode(folder)
        only_a_row = damage[:128] == whole[:128] and damage[rows.stop :] == whole[rows.stop :]
        assert again.built != only_a_row
        assert np.array_equal(again.pixels[:], pixels)
        assert again.broken == good.broken
        assert again.file.read_bytes() == whole
        assert len(caplog.records) == only_a_row
        healed += only_a_row
    assert 5 < healed < len(damages) - 5
    caplog.clear()
    again = decode(folder)
    assert not again.built and np.array_equal(again.pixels[:], pixels) and not caplog.records


def damage_row(file: Path, row: int, length: int) -> None:
    content = bytearray(file.read_bytes())
    content[128 + row * length + 7] ^= 1
    file.write_bytes(content)


def test_a_damaged_row_is_named_once_and_right_at_every_reading(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the file cannot be repaired, since it is gone, or is another by now."""
    pixels = decode(folder).pixels[:]
    for row, what in ((4, "gone"), (3, "another")):
        decoded = decode(folder)
        damage_row(decoded.file, row, 192)
        away = decoded.file.rename(decoded.file.with_suffix(".away"))
        if what == "another":
            decoded.file.write_bytes(b"another's")
        caplog.clear()
        for _ in range(3):
            assert np.array_equal(decoded.pixels[np.array([1, row, row])], pixels[[1, row, row]])
        assert [r.message for r in caplog.records] == [
            f"the cache {decoded.file} was damaged at {folder}/cat/00{row}.png: decoded it again"
        ]
        assert what == "gone" or decoded.file.read_bytes() == b"another's"
        away.rename(decoded.file)


def test_a_cache_cut_short_while_it_is_read(folder: Path) -> None:
    """A mapped file would end the process by a signal."""
    decode(folder)
    decoded, other = decode(folder), decode(folder)
    pixels = decoded.pixels[:]
    os.truncate(decoded.file, 1000)
    # A row that another trial heals lies behind those that are gone, in whose place would be zeros.
    assert np.array_equal(other.pixels[9], pixels[9])
    assert np.array_equal(decoded.pixels[:], pixels)


def test_a_damaged_row_of_an_image_that_has_changed(folder: Path) -> None:
    decoded = decode(folder)
    damage_row(decoded.file, 0, 192)
    (folder / "cat" / "000.png").write_bytes((folder / "dog" / "000.png").read_bytes())
    with pytest.raises(DataError, match="cat/000.png has changed .*: start again"):
        decoded.pixels[:]
    assert decode(folder).built


@as_root
def test_a_full_disk(shared: Path, run_jobs: RunJobs) -> None:
    """256 kB in all; a cache of 20 images of 3 x 64 x 64 is 246 kB, and not all of it is free."""
    (shared / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(shared / "disk")]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mount is not permitted")
    folder, cache = shared / "data", shared / "disk" / "cache"

    def open_it(size: int) -> object:
        (answer,) = as_users(run_jobs, folder, [(0, 0o022, size)], cache)
        return answer

    try:
        (shared / "disk" / "others").write_bytes(bytes(40_000))
        message = open_it(64)
        assert f"and {cache} has 0.000" in message and "GB free: make room there" in message
        assert message.isprintable()
        assert {path.suffix for path in cache.iterdir()} == {".lock"}
        assert open_it(16)["built"]  # a smaller one fits
        assert len(list(cache.glob("*.npy"))) == 1
    finally:
        subprocess.run(["umount", "--lazy", str(shared / "disk")], check=True)


def test_a_killed_builder_leaves_nothing_for_long(folder: Path, large_png: bytes) -> None:
    slow = folder / "cat" / "0-slow.png"
    slow.write_bytes(large_png)
    cache = folder.parent / "cache"
    code = "import sys; from pathlib import Path; from data_vit import *; arguments = sys.argv[1:]"
    process = subprocess.Popen([sys.executable, "-c", code + BUILD, str(folder)], cwd=REPOSITORY)
    wait_for(lambda: list(cache.glob("*.tmp")))
    process.send_signal(signal.SIGSTOP)  # the leftover of a builder that lives is no leftover
    assert decode(folder, 12).built and list(cache.glob("*.tmp"))
    process.kill()
    process.wait()
    assert len(list(cache.glob("*.tmp"))) == 1 and len(list(cache.glob("*.npy"))) == 1
    slow.unlink()  # the next one may need other images or another size
    assert decode(folder).built
    assert not list(cache.glob("*.tmp"))


# --- users ------------------------------------------------------------------------------------------

OPEN = """
folder, size, cache = Path(arguments[0]), arguments[1], Path(arguments[2])
try:
    data = open_data(folder, num_classes=None, image_size=size, channels=3, val_split=None, seed=0,
        cache_dir=cache, workers=1, skip_broken=True)
    decoded = decode_folder(read_image_folder(folder), size, 3, cache, 1)
    built = any(note.startswith("decoded") for note in data.notes)
    answer = {"built": built, "sum": int(decoded.pixels[:].sum(dtype=int)), "broken": decoded.broken}
except DataError as error:
    answer = str(error)
print(json.dumps(answer))
"""


def as_users(
    run_jobs: RunJobs, folder: Path, users: list[tuple[int, ...]], cache: Path | None = None
) -> list:
    """What open_data says to each (user, umask[, image size]), all at the same time; messages are str."""
    cache = cache or folder.parent / "cache"
    jobs = [
        (OPEN, [str(folder), size, str(cache)], user, umask)
        for user, umask, size in ((*user, 8)[:3] for user in users)
    ]
    return [json.loads(line) for line in run_jobs(*jobs)]


@pytest.fixture
def shared(make_images: MakeImages) -> Iterator[Path]:
    """data/ that everybody may read and cache/ that everybody may write to, as /tmp is."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    make_images(place / "data", ["cat", "dog"], 10)
    (place / "cache").mkdir()
    (place / "cache").chmod(0o1777)
    yield place
    shutil.rmtree(place)


def writable_by_others(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.stat().st_mode & 0o022]


@as_root
def test_two_users_with_one_cache(shared: Path, run_jobs: RunJobs) -> None:
    folder, cache = shared / "data", shared / "cache"
    alice, bob = 65533, NOBODY
    (first,) = as_users(run_jobs, folder, [(alice, 0o022)])
    (second,) = as_users(run_jobs, folder, [(bob, 0o077)])
    assert first["built"] and second == first | {"built": False}

    both = as_users(run_jobs, folder, [(alice, 0o022, 64), (bob, 0o022, 64)])
    assert sorted(answer["built"] for answer in both) == [False, True]
    assert both[0]["sum"] == both[1]["sum"]

    (private,) = as_users(run_jobs, folder, [(alice, 0o077, 16)])
    (message,) = as_users(run_jobs, folder, [(bob, 0o022, 16)])
    assert private["built"] and message.isprintable()
    assert f"cannot be kept in {cache}: Permission denied" in message and "--cache-dir" in message
    assert as_users(run_jobs, folder, [(bob, 0o077, 12)])[0]["built"]  # what nobody has yet

    assert not [path for path in cache.iterdir() if path.stat().st_mode & 0o022]
    assert not list(cache.glob("*.tmp"))


@as_root
def test_leftovers_of_another_user(shared: Path, run_jobs: RunJobs) -> None:
    folder, cache = shared / "data", shared / "cache"
    as_users(run_jobs, folder, [(0, 0o022)])
    (file,) = cache.glob("*.npy")
    file.rename(file.with_suffix(".99999-0a1b2c3d.tmp"))  # of a builder that was killed
    assert as_users(run_jobs, folder, [(NOBODY, 0o022)])[0]["built"]  # it is not in the way
    assert as_users(run_jobs, folder, [(0, 0o022, 12)])[0]["built"]
    assert not list(cache.glob("*.tmp"))  # who may remove it does


@as_root
def test_a_cache_that_may_only_be_read(shared: Path, run_jobs: RunJobs) -> None:
    folder, cache = shared / "data", shared / "cache"
    as_users(run_jobs, folder, [(0, 0o022)])
    cache.chmod(0o755)
    used, message = as_users(run_jobs, folder, [(NOBODY, 0o022), (NOBODY, 0o022, 16)])
    assert used["built"] is False
    assert "Permission denied" in message and "--cache-dir" in message
