"""The command line is the contract: its options, where values come from, and its errors."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import config_vit
import main_vit
from config_vit import UsageError, resolve

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = [
    *("--image-size", "8", "--patch-size", "4", "--vt-dim", "8"),
    *("--vt-depth", "1", "--vt-heads", "2", "--mlp-dim", "8"),
]
ORIGINAL = (
    "--download-dir DIR -a vit --batch-size 16 --epochs 5 --request-from-nni "
    "--num-classes 2 --gpu 0"
)

# Frozen: names and letters are what command lines, YAML files and search spaces out there hold.
OPTIONS = {
    "data": [
        "--download-dir", "--num-classes", "-s --image-size", "-ch --channel", "--val-split",
        "--flip", "--affine", "--crop", "--color", "--randaugment", "--erase", "--mixup", "--cutmix",
        "--skip-broken", "--cache-dir", "--cache", "--cache-limit", "--workers",
    ],
    "model": [
        "-a --arch", "-p --patch-size", "-pn --patch-num", "-vd --vt-dim", "-d --vt-depth",
        "-vh --vt-heads", "--dim-head", "-mlpd --mlp-dim", "--pool", "--dropout", "--emb-dropout",
    ],
    "training": [
        "-e --epochs", "--TRIAL-BUDGET --stop-epoch", "--max-steps", "-b --batch-size", "--optimizer", "--lr --learning-rate",
        "--momentum", "--wd --weight-decay", "--label-smoothing", "--clip-grad",
        "--moving-average-decay", "--seed", "--precision", "--deterministic", "--gpu", "--threads",
        "--metric",
    ],
    "learning rate schedule": [
        "--scheduler", "-g --gamma", "--warmup-epochs", "--dont-adjust-learning-rate",
    ],
    "output, resume, NNI": [
        "--model-dir", "--checkpoint-steps", "--checkpoint-minutes", "--auto-resume", "--resume",
        "--init-from", "--load-checkpoint-dir", "--save-checkpoint-dir", "--config", "--request-from-nni", "--check",
    ],
}  # fmt: skip


def parameters(*argv: str, sample: dict[str, Any] | None = None) -> Any:
    """What a run would use."""
    return resolve(main_vit.make_parser(), list(argv), sample)


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """config("lr: 0.1") is ("--config", FILE) with that in the file."""

    def write(text: str) -> tuple[str, str]:
        (tmp_path / "parameters.yaml").write_text(text)
        return "--config", str(tmp_path / "parameters.yaml")

    return write


# --- options and --help --------------------------------------------------------------------------


def test_options_are_frozen() -> None:
    groups = {
        group.title: [" ".join(action.option_strings) for action in group._group_actions]
        for group in main_vit.make_parser()._action_groups
        if group.title not in ("options", "positional arguments")
    }
    assert groups == OPTIONS


def test_help_fits_the_eye(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = main_vit.make_parser().format_help()
    assert max(map(len, text.splitlines())) <= 100
    for group, options in OPTIONS.items():
        assert f"\n{group}:\n" in text
        for option in options:
            letter, _, name = option.rpartition(" ")
            assert re.search(rf"^  ({letter} .*)?{name}\b", text, re.MULTILINE), option


def test_help_exits_at_once(run_main) -> None:
    result = run_main("--help", process=True)
    assert (result.status, result.stderr) == (0, "")
    assert "usage: main_vit.py" in result.stdout


def test_command_line_of_the_original() -> None:
    assert main_vit.make_parser().given(ORIGINAL.split()) == {
        "download_dir": Path("DIR"), "arch": "vit", "batch_size": 16, "epochs": 5,
        "request_from_nni": True, "num_classes": 2, "gpu": 0,
    }  # fmt: skip


def test_letters_mean_what_they_meant() -> None:
    letters = "-a vit -b 8 -e 3 -g 0.5 -s 60 -pn 6 -vd 32 -d 2 -vh 4 -mlpd 64 -ch 3"
    args = parameters(*letters.split())
    expected = {
        "arch": "vit", "batch_size": 8, "epochs": 3, "gamma": 0.5, "image_size": 60, "patch_num": 6,
        "vt_dim": 32, "vt_depth": 2, "vt_heads": 4, "mlp_dim": 64, "channel": 3,
    }  # fmt: skip
    assert vars(args).items() >= expected.items()
    assert parameters("-s", "60", "-p", "12").patch_size == 12


def test_every_key_of_the_original_search_space_arrives() -> None:
    sample = {
        "gamma": 0.7, "image_size": 300, "patch-num": 15, "vt_dim": 128, "vt_depth": 5,
        "vt_heads": 12, "mlp_dim": 500,
    }  # fmt: skip
    args = parameters("-a", "vit", "--batch-size", "16", sample=sample)
    expected = {key.replace("-", "_"): value for key, value in sample.items()}
    assert vars(args).items() >= expected.items()
    assert (args.patch_size, args.scheduler) == (20, "step")


# --- where values come from ----------------------------------------------------------------------


def test_precedence(config) -> None:
    names = ("batch_size", "vt_dim", "vt_depth", "mlp_dim")
    defaults = parameters()
    file = config("vt_dim: 1\nvt_depth: 1\nmlp_dim: 1\n")
    args = parameters(*file, "--vt-depth", "2", "--mlp-dim", "2", sample={"mlp_dim": 3, "lr": None})
    assert [getattr(args, name) for name in names] == [defaults.batch_size, 1, 2, 3]


@pytest.mark.parametrize("name", ["vt_dim", "vt-dim"])
def test_hyphen_and_underscore_are_the_same(name: str, config) -> None:
    assert parameters(sample={name: 7}).vt_dim == 7
    assert parameters(*config(f"{name}: 7")).vt_dim == 7


def test_values_from_yaml(config) -> None:
    text = "lr: 1e-3\nepochs: 4.0\nskip_broken: true\ndont-adjust-learning-rate: no\nvt_dim: null\n"
    args = parameters(*config(text))
    assert (args.lr, args.epochs, args.skip_broken, args.scheduler) == (1e-3, 4, True, "cosine")
    assert isinstance(args.epochs, int) and args.vt_dim == parameters().vt_dim


def test_off_is_a_word_and_not_a_truth_value(config) -> None:
    parser = main_vit.make_parser()
    assert resolve(parser, [*config("cache: off")]).cache == "off"
    assert resolve(parser, [], {"cache": False}).cache == "off"  # of a search space in YAML


def test_whole_numbers() -> None:
    epochs = parameters(sample={"epochs": 4.0}).epochs  # NNI's quniform gives floats
    assert epochs == 4 and isinstance(epochs, int)
    with pytest.raises(UsageError, match=r"4\.5 is not a whole number"):
        parameters(sample={"epochs": 4.5})


def test_small_numbers_keep_their_digits() -> None:
    for value in (0.30000000000000004, 1.2345e-07):
        assert parameters(sample={"lr": value}).lr == value


def test_unknown_parameter_names_the_valid_ones(config) -> None:
    not_sampled = {"--config", "--check", "--resume", "--auto-resume", "--model-dir"}
    not_sampled |= {"--request-from-nni"}
    for call, left_out in (
        (lambda: parameters("--patch-nums", "3"), set()),
        (lambda: parameters(sample={"patch-nums": 3}), not_sampled),
        (lambda: parameters(*config("patch_nums: 3")), not_sampled),
    ):
        with pytest.raises(UsageError) as caught:
            call()
        text = str(caught.value)
        assert "unknown parameter --patch-nums (did you mean --patch-num?)" in text
        names = {option.split()[-1] for options in OPTIONS.values() for option in options}
        assert names - left_out <= {*text.split()} and not left_out & {*text.split()}
        assert "\n" not in text


@pytest.mark.parametrize("name", ["config", "check", "resume", "model_dir", "request_from_nni"])
def test_what_belongs_on_the_command_line(name: str, config) -> None:
    with pytest.raises(UsageError, match=f"{name} belongs on the command line"):
        parameters(sample={name: True if name == "request_from_nni" else "x"})
    with pytest.raises(UsageError, match=f"{name} belongs on the command line"):
        parameters(*config(f"{name}: {'true' if name == 'request_from_nni' else 'x'}"))


# --- what follows from what ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "size", "number"),
    [
        ("", 4, 4),  # the demo
        ("--download-dir d", 16, 14),
        ("--image-size 300 --patch-num 15", 20, 15),
        ("--image-size 300 --patch-size 50", 50, 6),
        ("--image-size 300 --patch-size 50 --patch-num 6", 50, 6),
    ],
)
def test_patches(argv: str, size: int, number: int) -> None:
    args = parameters(*argv.split())
    assert (args.patch_size, args.patch_num) == (size, number)


def test_a_later_source_may_say_patches_the_other_way(config) -> None:
    args = parameters(*config("patch_size: 8"), "--image-size", "64", sample={"patch_num": 4})
    assert (args.patch_size, args.patch_num) == (16, 4)


@pytest.mark.parametrize(
    ("argv", "scheduler", "gamma", "warmup"),
    [
        ("--epochs 30", "cosine", None, 3),
        ("--gamma 0.9", "step", 0.9, None),
        ("--gamma 0.9 --scheduler step", "step", 0.9, None),
        ("--scheduler constant", "constant", None, None),
        ("--dont-adjust-learning-rate", "constant", None, None),
        ("--warmup-epochs 0", "cosine", None, 0),
    ],
)
def test_schedules(argv: str, scheduler: str, gamma: float | None, warmup: float | None) -> None:
    args = parameters(*argv.split())
    assert (args.scheduler, args.gamma, args.warmup_epochs) == (scheduler, gamma, warmup)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--image-size 300 --patch-num 16", "patch_num 16 does not divide image_size 300"),
        ("--image-size 300 --patch-size 16", "patch_size 16 does not divide image_size 300"),
        ("--image-size 300 --patch-size 50 --patch-num 5", "contradict each other"),
        ("--gamma 0.9 --scheduler cosine", "gamma has no effect under the cosine schedule"),
        ("--gamma 0.9 --dont-adjust-learning-rate", "gamma has no effect under the constant"),
        ("--gamma 0.9 --warmup-epochs 1", "warmup_epochs has no effect under the step schedule"),
        ("--scheduler step", "--scheduler step needs --gamma"),
        ("--scheduler cosine --dont-adjust-learning-rate", "contradicts --scheduler cosine"),
        ("--epochs 2 --warmup-epochs 3", "warmup_epochs 3 is more than epochs 2"),
        ("--arch simple_vit --pool mean", "pool has no effect on arch simple_vit"),
        ("--arch resnet50", "arch 'resnet50' is neither vit nor"),
    ],
)
def test_contradictions_and_what_has_no_effect(argv: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        parameters(*argv.split())
    assert "\n" not in str(caught.value)


def test_momentum_for_adam_is_fine() -> None:
    assert parameters("--optimizer", "adam", sample={"momentum": 0.8}).momentum == 0.8


@pytest.mark.parametrize(
    "option",
    [
        "--epochs 0", "--epochs -1", "--epochs many", "--epochs inf", "--epochs nan", "--epochs",
        "--batch-size 0", "--num-classes 1", "--image-size 0", "--channel 2", "--val-split 0",
        "--val-split 1", "--lr 0", "--lr nan", "--gamma 0", "--gamma 1.1", "--dropout 1.5",
        "--momentum -0.1", "--weight-decay -1", "--label-smoothing 2", "--optimizer lion",
        "--moving-average-decay 1", "--seed -1", "--pool max", "--precision half", "--metric f1",
        "--scheduler linear", "--flip up", "--workers 0", "--clip-grad inf", "--gpu -1",
        "--epoch 3", "epochs",
    ],
)  # fmt: skip
def test_values_out_of_range(option: str) -> None:
    with pytest.raises(UsageError) as caught:
        parameters(*option.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [[1, 2], {"a": 1}])
def test_values_that_are_not_single(value: Any, config) -> None:
    with pytest.raises(UsageError, match="epochs is .* not a single value"):
        parameters(sample={"epochs": value})
    with pytest.raises(UsageError, match="epochs is .* not a single value"):
        parameters(*config(yaml.safe_dump({"epochs": value})))


# --- args.yaml -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        "",
        "--gamma 0.9 --optimizer sgd --moving-average-decay 0.9",
        "--dont-adjust-learning-rate --flip horizontal",
        "--arch simple_vit --warmup-epochs 0.5 --channel 3",
        "--download-dir d --image-size 60 --patch-num 6 --weight-decay 1e-7",
    ],
)
def test_saved_parameters_repeat_the_run(argv: str, tmp_path: Path) -> None:
    args = parameters(*argv.split())
    saved = config_vit.saved_parameters(args)
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(saved))
    again = parameters("--config", str(tmp_path / "args.yaml"))
    assert vars(again) | {"config": None} == vars(args)


@pytest.mark.parametrize(
    "argv",
    [
        "--gamma 0.9", "--scheduler constant", "--dont-adjust-learning-rate", "--epochs 1",
        "--arch local_vit", "--image-size 32",
    ],
)  # fmt: skip
def test_a_repeated_run_may_differ_in_one_parameter(argv: str, config) -> None:
    saved = yaml.safe_dump(config_vit.saved_parameters(parameters()))
    name, *values = argv.split()
    args = vars(parameters(*config(saved), name, *values))
    assert str(args[name[2:].replace("-", "_")]) == "".join(values or ["True"])


def test_args_yaml_of_a_run_repeats_it(image_folder: Path, run_main, read_lines, tmp_path) -> None:
    argv = ["--download-dir", image_folder, *TINY, "--max-steps", 2, "--seed", 5, "--gamma", 0.9]
    assert run_main(*argv, "--model-dir", tmp_path / "a").status == 0
    again = run_main("--config", tmp_path / "a" / "args.yaml", "--model-dir", tmp_path / "b")
    assert (again.status, again.stderr) == (0, "")
    texts = [(tmp_path / name / "args.yaml").read_text() for name in "ab"]
    assert texts[0] == texts[1]
    assert yaml.safe_load(texts[0])["patch_num"] == 2
    assert read_lines(tmp_path / "a") == read_lines(tmp_path / "b")


def test_args_yaml_of_a_run_on_other_images(
    image_folder: Path, make_images, run_main, tmp_path: Path
) -> None:
    """How many classes there are follows from the folder."""
    other = make_images(tmp_path / "other", ["cat", "dog", "eel"], 20)
    argv = [*TINY, "--max-steps", 1, "--model-dir"]
    assert run_main("--download-dir", image_folder, *argv, tmp_path / "a").status == 0
    again = ["--config", tmp_path / "a" / "args.yaml", "--download-dir", other]
    result = run_main(*again, "--model-dir", tmp_path / "b")
    assert result.status == 0 and "3 classes" in result.stdout, result.stderr


def test_what_follows_from_a_changed_parameter_of_args_yaml(tmp_path: Path) -> None:
    """A value that was a default follows; one that somebody chose stays."""
    file = tmp_path / "args.yaml"
    given = {"epochs": 3, "optimizer": "adamw", "vt_dim": 256, "vt_heads": 8}
    file.write_text(yaml.safe_dump(config_vit.saved_parameters(resolve_of(**given))))
    again = resolve_of(config=file, optimizer="sgd", vt_dim=64, epochs=100)
    assert (again.lr, again.weight_decay, again.dim_head, again.warmup_epochs) == (
        0.02,
        1e-4,
        8,
        10,
    )
    chosen = {"lr": 0.1, "weight_decay": 0.2, "dim_head": 5, "warmup_epochs": 1}
    file.write_text(yaml.safe_dump(config_vit.saved_parameters(resolve_of(**given, **chosen))))
    again = resolve_of(config=file, optimizer="sgd", vt_dim=64, epochs=100)
    assert {name: getattr(again, name) for name in chosen} == chosen
    file.write_text(yaml.safe_dump({"epochs": 27, "stop_epoch": 9}))  # Hyperband's, of a part
    assert resolve_of(config=file, epochs=5).stop_epoch is None
    assert resolve_of(config=file, epochs=10).stop_epoch == 9
    chosen = {"weight_decay": 1e-4, "dim_head": 1, "warmup_epochs": 0}  # and nothing else
    file.write_text(yaml.safe_dump(chosen))
    again = resolve_of(config=file, optimizer="adamw", vt_dim=64, epochs=100)
    assert {name: getattr(again, name) for name in chosen} == chosen


def resolve_of(**given: Any) -> Any:
    return resolve(
        main_vit.make_parser(), [f"--{k.replace('_', '-')}={v}" for k, v in given.items()]
    )


def test_sizes_that_an_architecture_refuses() -> None:
    with pytest.raises(UsageError, match="arch simple_vit cannot be built: .*multiple of 4"):
        resolve_of(arch="simple_vit", vt_dim=30, vt_heads=2)
    assert resolve_of(arch="simple_vit", vt_dim=32, vt_heads=2).vt_dim == 32
    # The second computes in one precision only.
    for arch in ("na_vit_nested_tensor", "normalized_vit"):
        with pytest.raises(UsageError, match=f"arch '{arch}' is neither"):
            resolve_of(arch=arch)


@pytest.mark.parametrize("option", ["--resume", "--model-dir", "--config", "--cache-dir"])
def test_a_variable_that_is_not_set_is_no_path(option: str, run_main) -> None:
    result = run_main(option, "")
    assert result.status == 2 and result.stderr.endswith(f"argument {option}: an empty path\n")
    assert not list(result.cwd.iterdir())


def test_a_null_byte_is_no_path(tmp_path: Path) -> None:
    (tmp_path / "args.yaml").write_text('cache_dir: "a\\0b"')
    with pytest.raises(UsageError, match="argument --cache-dir: a path with a null byte"):
        resolve_of(config=tmp_path / "args.yaml")


def test_every_path_may_begin_at_home(home: Path, image_folder: Path, run_main) -> None:
    argv = [*TINY, "--download-dir", image_folder, "--epochs", 1, "--model-dir=~/a run"]
    result = run_main(*argv)
    assert result.status == 0 and not list(result.cwd.iterdir())
    assert run_main("--resume=~/a run/checkpoint.pth.tar", "--epochs", 2).status == 0
    assert run_main("--config=~/a run/args.yaml").status == 0
    assert (home / "a run" / "results.json").exists()


def test_auto_resume_needs_a_folder(run_main) -> None:
    result = run_main(*TINY, "--auto-resume")
    assert result.status == 2 and "--auto-resume needs --model-dir" in result.stderr


@pytest.mark.parametrize(
    "size", [4_000_000, 700_000_000]
)  # the second of more bytes than a file can have
def test_images_too_large_for_any_memory(size: int, image_folder: Path, run_main) -> None:
    argv = ["--download-dir", image_folder, "--image-size", size, "--patch-num", 2]
    result = run_main(*argv)
    assert result.status == 2 and "GB free: make room" in result.stderr, result.stderr
    assert result.stderr.count("\n") == 1


# --- errors: one line on stderr, exit status 2, before anything is written -----------------------


def error_cases(images: Path, folder: Path) -> dict[str, tuple[list[Any], str]]:
    """Every mistake of the issue, as arguments and what its line must say."""
    (folder / "empty").mkdir()
    (folder / "one" / "cat").mkdir(parents=True)
    (folder / "hollow" / "cat").mkdir(parents=True)
    (folder / "hollow" / "dog").mkdir()
    (folder / "file").write_text("not a folder")
    (folder / "list.yaml").write_text("- lr\n")
    (folder / "broken.yaml").write_text("lr: [")
    (folder / "used").mkdir()
    (folder / "used" / "checkpoint.pth.tar").write_text("no checkpoint")
    data = ["--download-dir", images, *TINY]
    return {
        "wrong path": (["--download-dir", folder / "nowhere"], "nowhere does not exist"),
        "a file for a folder": (["--download-dir", folder / "file"], "file"),
        "empty folder": (["--download-dir", folder / "empty"], "has 0 class folders"),
        "one class only": (["--download-dir", folder / "one"], "has 1 class folders"),
        "class without images": (["--download-dir", folder / "hollow"], "has no images"),
        "class count": ([*data, "--num-classes", 3], "has 2 class folders (cat, dog)"),
        "no such GPU": ([*data, "--gpu", 64], "--gpu 64: torch sees"),
        "unknown parameter": ([*data, "--lrate", 1], "unknown parameter --lrate"),
        "out of range": ([*data, "--dropout", 1.5], "1.5 is not at least 0 and at most 1"),
        "short name": ([*data, "--lrr", 1], "--lrr (did you mean --lr?)"),
        "capitals": ([*data, "--LR", 1], "--LR (did you mean --lr?)"),
        "check": ([*data, "--check", "x.yml"], "--check takes no other options"),
        "patches": ([*data, "--patch-num", 3], "3 does not divide image_size 8"),
        "unwritable output": ([*data, "--model-dir", folder / "file" / "x"], "cannot be written"),
        "used output": ([*data, "--model-dir", folder / "used"], "holds a run already"),
        "config is missing": ([*data, "--config", folder / "no.yaml"], "cannot be read"),
        "config is no mapping": ([*data, "--config", folder / "list.yaml"], "not a mapping"),
        "config is an experiment": (
            [*data, "--config", REPOSITORY / "config.yml"],
            "nnictl create",
        ),
        "config is no YAML": ([*data, "--config", folder / "broken.yaml"], "is not YAML"),
        "resume is missing": ([*data, "--resume", folder / "no.pth.tar"], "no.pth.tar"),
        "resume is foreign": ([*data, "--resume", folder / "used" / "checkpoint.pth.tar"], "used"),
        "init-from is missing": ([*data, "--init-from", folder / "no.pth.tar"], "no.pth.tar"),
        "init-from is foreign": ([*data, "--init-from", folder / "file"], "file"),
    }


CASES = [
    "wrong path", "a file for a folder", "empty folder", "one class only", "class without images",
    "class count", "no such GPU", "unknown parameter", "out of range", "patches", "short name", "check",
    "unwritable output", "used output", "config is missing", "config is no mapping",
    "config is no YAML", "config is an experiment", "resume is missing", "resume is foreign", "init-from is missing",
    "init-from is foreign",
]  # fmt: skip


def assert_one_line(result: Any, message: str) -> None:
    assert result.status == 2
    assert result.stderr.startswith("main_vit.py: error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("name", CASES)
def test_errors_are_one_line(name: str, image_folder: Path, tmp_path: Path, run_main) -> None:
    argv, message = error_cases(image_folder, tmp_path)[name]
    assert_one_line(run_main(*argv), message)


@pytest.mark.parametrize(
    "name", ["wrong path", "class count", "unknown parameter", "unwritable output"]
)
def test_errors_of_a_process(name: str, image_folder: Path, tmp_path: Path, run_main) -> None:
    argv, message = error_cases(image_folder, tmp_path)[name]
    assert_one_line(run_main(*argv, process=True), message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU 0 here")
def test_a_gpu_whose_driver_is_too_old_is_none(
    image_folder: Path, run_main, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch counts it all the same."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run_main("--download-dir", image_folder, *TINY, "--max-steps", 1)
    assert result.status == 0 and "device  CPU" in result.stdout


@pytest.mark.parametrize("has", [False, True])
def test_bfloat16_without_instructions_for_it(
    has: bool, image_folder: Path, run_main, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was begun on another machine says why it crawls."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has})
    argv = ["--download-dir", image_folder, *TINY, "--max-steps", 1]
    result = run_main(*argv, "--precision", "bfloat16")
    assert result.status == 0 and ("bfloat16 is slow here" in result.stdout) is not has
    checkpoint = result.cwd / next(result.cwd.glob("runs/*/checkpoint.pth.tar"))
    result = run_main("--resume", checkpoint, "--max-steps", 2)
    assert ("for it\n" in result.stdout) is not has  # --precision float32 would be refused here
    result = run_main(*argv)
    assert ("bfloat16" if has else "float32") in result.stdout
    assert "slow here" not in result.stdout


def test_gpu_0_without_cuda(image_folder: Path, run_main) -> None:
    result = run_main("--download-dir", image_folder, *TINY, "--gpu", 0, process=True)
    assert_one_line(result, "--gpu 0: torch sees 0 CUDA devices here; leave --gpu out")


@pytest.mark.parametrize("name", ["wrong path", "class count", "patches", "no such GPU"])
def test_errors_leave_no_output_behind(name, image_folder, tmp_path, run_main) -> None:
    argv, _ = error_cases(image_folder, tmp_path)[name]
    result = run_main(*argv)
    assert not [path for path in result.cwd.rglob("*") if path.is_file()]


# --- without NNI ---------------------------------------------------------------------------------


def python(code: str, cwd: Path, home: Path) -> str:
    """What a fresh interpreter prints to stdout; it must end well and say nothing on stderr."""
    env = {**os.environ, "HOME": str(home), "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_import_has_no_side_effects(tmp_path: Path, home: Path) -> None:
    code = """
import logging, signal, sys, torch
before = signal.getsignal(signal.SIGINT), torch.get_num_threads(), torch.random.initial_seed()
sys.argv = ["main_vit.py", "--no-such-option"]
import main_vit
import setup_vit
after = signal.getsignal(signal.SIGINT), torch.get_num_threads(), torch.random.initial_seed()
assert before == after
assert not logging.getLogger().handlers
assert not {"nni", "vit_pytorch", "check_vit"} & sys.modules.keys()
"""
    assert python(code, tmp_path, home) == ""
    assert not list(tmp_path.iterdir())


def test_one_run_needs_no_nni(image_folder: Path, tmp_path: Path, home: Path) -> None:
    argv = ["--download-dir", str(image_folder), *TINY, "--max-steps", "1", "--model-dir", "out"]
    code = f"""
import sys
sys.modules["nni"] = None  # an import of it would fail
import main_vit
import setup_vit
status = main_vit.main({argv})
print("nni:", [name for name in sys.modules if name.startswith("nni.")], status)
"""
    output = python(code, tmp_path, home)
    assert output.endswith("nni: [] 0\n")
    assert (tmp_path / "out" / "model_best.pth.tar").is_file()


def test_a_nested_choice_gives_its_parameters() -> None:
    """NNI's {"_name": ...} sample, at any depth."""
    inner = {"_name": "step", "gamma": 0.5}
    sample = {"optimizer": {"_name": "sgd", "momentum": 0.5, "scheduler": inner}}
    args = main_vit.resolve(main_vit.make_parser(), [], sample)
    assert (args.optimizer, args.momentum, args.scheduler, args.gamma) == ("sgd", 0.5, "step", 0.5)


def test_the_validation_of_a_config_holds_for_other_images_unless_it_is_the_demos(
    tmp_path: Path,
) -> None:
    file, parser = tmp_path / "args.yaml", main_vit.make_parser()
    for content, expected in (
        ("val_split: 0.4", 0.4),
        ("{image_size: 16, patch_size: 4, channel: 1, val_split: 0.2}", None),
    ):
        file.write_text(content)
        args = resolve(parser, ["--config", str(file), "--download-dir", str(tmp_path)])
        assert args.val_split == expected
