"""Where decoded images are kept, what of it is read when, on which device, and by how many threads."""

import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from test_data import open_small, python

import cache_vit
import data_vit
import images_vit
from cache_file_vit import CachedPixels
from cache_vit import DecodedImages, decode_folder
from data_vit import Resident, Split, batches, keep_on_device
from folder_vit import DataError, ImageLost, read_image_folder
from images_vit import decode_image

REPOSITORY = Path(data_vit.__file__).parent
CPU = torch.device("cpu")
MakeImages = Callable[..., Path]


@pytest.fixture
def folder(image_folder: Path) -> Path:
    """Two classes of 20 images each."""
    return image_folder / "train"


def decode(
    folder: Path, size: int = 8, mode: str = "disk", limit: float | None = None
) -> DecodedImages:
    cache = folder.parent / "cache"
    return decode_folder(read_image_folder(folder), size, 3, cache, 2, mode, limit)


# --- modes ------------------------------------------------------------------------------------------


def test_all_modes_give_the_same_images(folder: Path) -> None:
    (folder / "cat" / "broken.png").write_bytes(b"")
    disk = decode(folder)
    for mode in ("memory", "off"):
        cache = folder.parent / mode
        other = decode_folder(read_image_folder(folder), 8, 3, cache, 2, mode)
        assert other.file is None and not cache.exists()
        assert other.broken == disk.broken and list(other.broken) == [20]
        assert other.pixels.shape == disk.pixels.shape == (41, 3, 8, 8)
        rows = np.array([40, 3, 3, 0])
        assert np.array_equal(other.pixels[rows], disk.pixels[rows])


def test_another_pillow_decodes_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may read what this one cannot, and its pixels may be others by a grey level."""
    assert decode(folder).built and not decode(folder).built
    monkeypatch.setattr(PIL, "__version__", "13.0.0.test")
    assert decode(folder).built


@pytest.mark.parametrize("mode", cache_vit.MODES)
def test_a_run_in_each_mode(mode: str, image_folder: Path, run_main: Callable) -> None:
    """The same training to the last bit; what is kept is where it was asked for."""
    options = "-s 8 -p 4 -vd 16 -d 1 -vh 2 -mlpd 16 -e 1 --threads 1 --precision float32"
    place = image_folder.parent / mode
    for name, extra in (("a", []), ("b", ["--cache", mode])):
        argv_of_this = [
            *options.split(),
            *extra,
            "--cache-dir",
            place / name,
            "--model-dir",
            place / f"run-{name}",
        ]
        result = run_main("--download-dir", image_folder, *argv_of_this)
        assert result.status == 0, result.stderr
    weights = [
        torch.load(place / f"run-{name}" / "model_best.pth.tar", weights_only=True)["model"]
        for name in "ab"
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert (place / "b").exists() == (mode == "disk")
    assert {"disk": "decoded", "memory": "into memory (", "off": "in every epoch"}[
        mode
    ] in result.stdout


def test_off_reads_each_time_and_names_what_changed_since(folder: Path) -> None:
    """It would be trained and selected on other images than before."""
    decoded = decode(folder, mode="off")
    path, status = folder / "cat" / "001.png", (folder / "cat" / "001.png").stat()
    for content in ((folder / "dog" / "001.png").read_bytes(), b""):
        path.write_bytes(content)
        assert len(decoded.pixels[2:]) == 38
        with pytest.raises(ImageLost, match="cat/001.png has changed since the folder was listed"):
            decoded.pixels[0:3]
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ImageLost, match="001.png cannot be decoded any more: not an image"):
        decoded.pixels[1]
    path.unlink()
    with pytest.raises(ImageLost, match="001.png could be read when .* but no more: No such file"):
        decoded.pixels[1]


@pytest.mark.parametrize("mode", cache_vit.MODES)
def test_an_image_that_changes_while_all_are_decoded(
    mode: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept would stand for ever for the files as they were before."""
    real, path = images_vit.decode_planes, folder / "dog" / "005.png"
    was, status = path.read_bytes(), path.stat()

    def replacing(now: Path, *shape: int) -> np.ndarray:
        if now.name == "000.png":
            path.write_bytes((folder / "cat" / "005.png").read_bytes())
        return real(now, *shape)

    monkeypatch.setattr(images_vit, "decode_planes", replacing)
    with pytest.raises(DataError, match="dog/005.png has changed since the folder was listed"):
        decode(folder, mode=mode)
    monkeypatch.undo()
    path.write_bytes(was)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    decoded = decode(folder, mode=mode)
    assert decoded.built and np.array_equal(decoded.pixels[25], decode_image(path, 8, 3))


def test_memory_that_there_is_not(folder: Path) -> None:
    with pytest.raises(
        DataError, match="--cache memory: .* take 12,000,000.00 GB, and .* GB are free"
    ):
        decode(folder, size=10**7, mode="memory")


def test_other_warnings_stay_while_images_are_decoded(
    folder: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Two threads read where images are mixed; none may silence what the program says."""
    decoded = decode(folder, mode="off")
    readers = [threading.Thread(target=lambda: decoded.pixels[0:30]) for _ in range(2)]
    for reader in readers:
        reader.start()
    while any(reader.is_alive() for reader in readers):
        warnings.warn(f"{len(recwarn.list)}", stacklevel=1)
        time.sleep(0.001)
    assert [str(w.message) for w in recwarn.list] == [str(i) for i in range(len(recwarn.list))]
    assert recwarn.list


# --- the limit, the list ----------------------------------------------------------------------------


def sizes(folder: Path) -> set[int]:
    """The image sizes that the cache holds."""
    return {
        np.load(file, mmap_mode="r").shape[2] for file in (folder.parent / "cache").glob("*.npy")
    }


def test_the_least_recently_used_makes_room(folder: Path) -> None:
    row = 40 * 3 * 8 * 8  # bytes; 16 pixels of the side take 4 of it, 24 take 9, 32 take 16
    files = {size: decode(folder, size).file for size in (8, 16, 24)}
    for age, size in enumerate((16, 8, 24)):
        os.utime(files[size], (0, age))
    decode(folder, 16)  # and now it was used last
    assert decode(folder, 32, limit=26.5 * row).built
    assert sizes(folder) == {16, 32}
    assert not decode(folder, 32, limit=26.5 * row).built


def test_what_a_run_has_open_stays(folder: Path) -> None:
    row = 40 * 3 * 8 * 8
    code = """
import sys
import threading
from pathlib import Path
from cache_vit import decode_folder
from folder_vit import read_image_folder
folder = Path(sys.argv[1])
decoded = decode_folder(read_image_folder(folder), 16, 3, folder.parent / "cache", 1)
print("open", flush=True)
sys.stdin.read()
print(int(decoded.pixels[:].sum(dtype=int)))
"""
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(
            DataError, match=r"take .* GB beside the .* GB that runs have open, and"
        ):
            decode(folder, 24, limit=12 * row)
        assert sizes(folder) == {16}
        assert cache_vit.main(["clear", "--cache-dir", str(folder.parent / "cache")]) == 1
        other.communicate(timeout=30)
    assert decode(folder, 24, limit=12 * row).built  # it has ended
    assert sizes(folder) == {24}


def test_more_than_the_limit_alone(folder: Path) -> None:
    decode(folder, 8)
    message = "take 3.09e-05 GB, and --cache-limit is 2e-05: raise it, or --cache off"
    with pytest.raises(DataError, match=message):
        decode(folder, 16, limit=2e4)
    assert sizes(folder) == {8}  # nothing was removed in vain
    assert not list((folder.parent / "cache").glob("*.tmp"))


def test_list_and_clear(folder: Path, capsys: pytest.CaptureFixture) -> None:
    cache = folder.parent / "cache"
    assert cache_vit.main(["--cache-dir", str(cache)]) == 2
    assert capsys.readouterr().err == f"cache_vit.py: error: cache folder {cache} does not exist\n"
    cache.mkdir()
    with pytest.raises(SystemExit, match="2"):  # a variable that is not set is not all
        cache_vit.main(["clear", "", "--cache-dir", str(cache)])
    assert capsys.readouterr().err.endswith("argument NAME: an empty name\n")
    assert cache_vit.main(["--cache-dir", str(cache)]) == 0
    assert capsys.readouterr().out == ""
    names = [decode(folder, size).file.stem for size in (8, 16)]
    (cache / f"{'ab' * 16}.npy").write_bytes(b"of another version")
    assert cache_vit.main(["--cache-dir", str(cache)]) == 0
    lines = sorted(capsys.readouterr().out.splitlines(), key=lambda line: line.split()[-5:])
    listed = {line[:8]: line for line in lines}
    assert f"40 images 8 x 8 x 3 of {folder}" in listed[names[0][:8]]
    assert f"0.0 MB  40 images 16 x 16 x 3 of {folder}" in listed[names[1][:8]]
    assert time.strftime("%Y-%m-%d") in listed[names[0][:8]]
    assert any(line.endswith("damaged or of another version") for line in lines) and len(lines) == 3

    assert cache_vit.main(["clear", names[0][:8], "nothing", "--cache-dir", str(cache)]) == 1
    assert capsys.readouterr().err == f"cache_vit.py: {cache} has no nothing\n"
    assert {file.stem for file in cache.glob("*.npy")} == {names[1], "ab" * 16}
    command = [sys.executable, REPOSITORY / "cache_vit.py", "clear", "--cache-dir", cache]
    assert subprocess.run(command, capture_output=True, text=True).stdout.count("removed") == 2
    assert not list(cache.glob("*.npy"))


def test_clear_removes_all_whoever_reads_what_it_says(tmp_path: Path) -> None:
    for number in range(300):
        (tmp_path / f"{number:032x}.npy").write_bytes(b"of another version")
    command = (
        f"{sys.executable} -u {REPOSITORY}/cache_vit.py clear --cache-dir {tmp_path} | head -1"
    )
    said = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert said.stdout.count("removed") == 1 and not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_list_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / f"{0:032x}.npy").write_bytes(b"of another version")
    command = [sys.executable, REPOSITORY / "cache_vit.py", "--cache-dir", tmp_path]
    with open("/dev/full", "w") as full:
        said = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    expected = "cache_vit.py: the list cannot be written: No space left on device\n"
    assert (said.returncode, said.stderr) == (1, expected)


def test_list_and_clear_go_on_past_a_file_that_cannot_be_read(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    cache = folder.parent / "cache"
    name = decode(folder).file.stem[:8]
    gone = cache / f"{'0e' * 16}.npy"
    gone.symlink_to("nowhere")
    assert cache_vit.main(["--cache-dir", str(cache)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "0e0e0e0e  cannot be read: No such file or directory" and second.startswith(
        name
    )
    assert cache_vit.main(["clear", "--cache-dir", str(cache)]) == 1
    assert list(cache.glob("*.npy")) == [gone]


def test_files_of_others_stay(folder: Path) -> None:
    """A cache folder may be one that other programs use too."""
    cache = folder.parent / "cache"
    cache.mkdir()
    others = {cache / name for name in ("report.tmp", "features.npy", f"{'ab' * 16}.json")}
    for file in others:
        file.write_bytes(bytes(10**6))
    decode(folder, limit=1e5)
    decode(folder, 16, limit=1e5)
    assert cache_vit.main(["clear", "--cache-dir", str(cache)]) == 0
    assert {file for file in cache.iterdir() if file.suffix != ".lock"} == others


@pytest.mark.parametrize("limit", [None, 1e4], ids=["no limit", "limit"])
def test_what_a_killed_builder_leaves(limit: float | None, folder: Path) -> None:
    """The one that waited for it removes it first; else `clear` does."""
    cache = folder.parent / "cache"
    cache.mkdir()
    file = cache_vit.place_of(read_image_folder(folder), 8, 3, cache)[0]
    with cache_vit._locked(file.with_suffix(".lock")):
        waiting = threading.Thread(target=decode, args=(folder,), kwargs={"limit": limit})
        waiting.start()
        time.sleep(0.5)  # it has looked for leftovers by now, and waits
        file.with_suffix(".999-0a1b2c3d.tmp").write_bytes(bytes(9000))
    waiting.join()
    assert file.exists() and not list(cache.glob("*.tmp"))
    file.with_suffix(".999-0a1b2c3d.tmp").write_bytes(bytes(9000))
    assert cache_vit.main(["clear", "--cache-dir", str(cache)]) == 0
    assert {left.suffix for left in cache.iterdir()} == {".lock"}


def test_a_folder_of_its_own_is_private(folder: Path) -> None:
    decode(folder)
    assert (folder.parent / "cache").stat().st_mode & 0o777 == 0o700


# --- reading ----------------------------------------------------------------------------------------


def test_a_large_cache_is_not_read_at_the_start(folder: Path) -> None:
    """Nor does a reader keep what it has read: its memory is that of a batch."""
    code = """
import sys
from pathlib import Path
import numpy as np
from cache_vit import decode_folder
from folder_vit import read_image_folder
def counter(file, name):
    return int(Path(f"/proc/self/{file}").read_text().split(name + ":")[1].split()[0])
folder = Path(sys.argv[1])
images = read_image_folder(folder)
read, resident = counter("io", "rchar"), counter("status", "VmRSS")
decoded = decode_folder(images, 1000, 3, folder.parent / "cache", 1)
print(decoded.built, counter("io", "rchar") - read)
for i in range(40):
    decoded.pixels[np.array([i])]
print((counter("status", "VmHWM") - resident) / 1000)
"""
    for built in ("True", "False"):
        process = python(code, folder)
        (first, resident), errors = (text.splitlines() for text in process.communicate(timeout=60))
        assert not errors and first.split()[0] == built
    assert int(first.split()[1]) < 100_000  # bytes of 120 MB
    assert float(resident) < 40  # MB


def test_the_kernel_reads_the_next_batch_ahead(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the CPU computes one; no thread takes time from those that do."""
    data = open_small(folder.parent)
    events: list[tuple[str, list[int]]] = []

    def record(name: str) -> None:
        method = getattr(CachedPixels, name)

        def recorded(self: CachedPixels, rows: np.ndarray, *out: np.ndarray) -> None:
            assert threading.current_thread() is threading.main_thread()
            events.append((name, rows.tolist()))
            method(self, rows, *out)

        monkeypatch.setattr(CachedPixels, name, recorded)

    record("will_read")
    record("read")
    shown = batches(data.train, 16, CPU)
    parts = [data.train.indices[i : i + 16].tolist() for i in (0, 16, 32)]
    for number in range(3):
        next(shown)
        expected = [("will_read", part) for part in parts[number + 1 : number + 2]]
        assert events == [*expected, ("read", parts[number])]
        events.clear()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_images_kept_on_a_device_are_read_once(device: str, folder: Path) -> None:
    data = open_small(folder.parent)
    once = keep_on_device(data, torch.device(device), 10**9)
    assert once.train.pixels is once.val.pixels and once.test is data.test
    assert once.train.pixels.tensor.device.type == device
    assert len(once.train) == len(data.train) == 36
    expected = list(batches(data.train, 8, CPU))
    reads, read = [], data.train.pixels.read
    data.train.pixels.read = lambda rows, out: reads.extend(rows.tolist()) or read(rows, out)
    for _ in range(2):
        own = batches(once.train, 8, torch.device(device))
        for (images, targets, _), (own_images, own_targets, _) in zip(expected, own, strict=True):
            assert own_images.shape == images.shape and own_images.device.type == device
            if device == "cpu":
                assert torch.equal(own_images, images) and torch.equal(own_targets, targets)
    assert sorted(reads) == data.train.indices.tolist()  # once each, and none of validation


def test_images_that_another_trial_left_no_memory_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials that start together see the same memory free; they stay in the host's then."""
    data = open_small(folder.parent)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(data_vit, "Resident", full)
    assert keep_on_device(data, CPU, 10**9) is data


@pytest.mark.parametrize(
    ("train", "val", "free", "kept"),
    [
        (40, 40, 160, True),
        (40, 41, 161, False),
        (40, None, 80, True),
        (40, None, 79, False),
        (10, None, 0, False),
    ],
)
def test_what_fits_half_of_the_free_memory_is_kept(
    train: int, val: int | None, free: int, kept: bool
) -> None:
    """`val` None: it is a part of the same images."""
    pixels = [np.zeros((n, 1, 1, 1), np.uint8) for n in (train, val or 1)]
    splits = [Split(p, np.zeros(1, np.int64), np.zeros(1, np.int64)) for p in pixels]
    data = data_vit.Data(["a", "b"], splits[0], splits[1] if val else splits[0], splits[0], [], {})
    kept_data = keep_on_device(data, CPU, free)
    assert (
        isinstance(kept_data.train.pixels, Resident)
        == isinstance(kept_data.val.pixels, Resident)
        == kept
    )
    assert kept_data.test.pixels is pixels[0]


def test_batches_are_decoded_one_ahead_and_errors_come_through(folder: Path) -> None:
    decoded = decode(folder, mode="off")
    reads = []
    read = decoded.pixels.read

    def noted(rows: np.ndarray, out: np.ndarray) -> None:
        reads.append(rows.tolist())
        if 5 in rows:
            raise DataError("five")
        read(rows, out)

    decoded.pixels.read = noted
    split = Split(decoded.pixels, np.zeros(40, np.int64), np.arange(40))
    iterator = batches(split, 2, CPU)
    next(iterator)
    wait_until = time.monotonic() + 10
    while len(reads) < 2 and time.monotonic() < wait_until:
        time.sleep(0.001)
    assert reads == [[0, 1], [2, 3]]
    next(iterator)
    with pytest.raises(DataError, match="five"):
        next(iterator)


def test_decoded_rows_are_those_of_their_files(folder: Path) -> None:
    images = read_image_folder(folder)
    decoded = decode(folder)
    for i in (0, 19, 20, 39):
        assert np.array_equal(decoded.pixels[i], decode_image(images.path(i), 8, 3))
    assert np.array_equal(decoded.pixels[2:5], decoded.pixels[np.array([2, 3, 4])])
    with pytest.raises(IndexError):
        decoded.pixels[40]


# --- what a run loads -------------------------------------------------------------------------------

LATE = {"matplotlib", "sklearn", "scipy", "pandas", "tensorboard", "torchvision", "nni", "requests"}
LATE |= {"vit_pytorch", "check_vit", "torch._dynamo"}


def test_what_is_loaded_when(image_folder: Path, home: Path) -> None:
    """Nothing of LATE to read the command line, nor before the first step; then what is used."""
    code = f"""
import sys
import threading
import main_vit, step_vit
loaded = lambda: sorted({LATE} & sys.modules.keys())
main_vit.resolve(main_vit.make_parser(), ["--lr", "0.1"])
print(loaded())
step = step_vit.training_step
def first_step(*args):
    if args[0].step == 0:
        print(loaded())
    return step(*args)
step_vit.training_step = first_step
main_vit.main(sys.argv[1:])
print(loaded())
"""
    argv = [
        "-s",
        "8",
        "-p",
        "4",
        "-vd",
        "16",
        "-d",
        "1",
        "-vh",
        "2",
        "-mlpd",
        "16",
        "-e",
        "1",
        "--threads",
        "1",
    ]
    process = subprocess.run(
        [sys.executable, "-c", code, "--download-dir", str(image_folder), *argv],
        cwd=image_folder, env={**os.environ, "HOME": str(home), "PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    lists = [line for line in process.stdout.splitlines() if line.startswith("[")]
    assert lists[:2] == ["[]", "[]"], process.stderr
    assert not any(
        name in lists[2] for name in ("'nni'", "scipy", "requests", "vit_pytorch", "check_vit")
    )
