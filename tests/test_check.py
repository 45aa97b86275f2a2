"""python main_vit.py --check: what is wrong with an experiment is said before its first trial."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import check_vit
import setup_vit

REPOSITORY = Path(__file__).resolve().parents[1]
TUNERS = str(REPOSITORY / "tuners")
COMMAND = "python main_vit.py --request-from-nni"


def choice(*values: Any) -> dict[str, Any]:
    return {"_type": "choice", "_value": list(values)}


def numbers(kind: str, *values: float) -> dict[str, Any]:
    return {"_type": kind, "_value": list(values)}


def own_tuner(name: str, **arguments: Any) -> dict[str, Any]:
    arguments = {"optimize_mode": "maximize", **arguments}
    return {"className": name, "codeDirectory": TUNERS, "classArgs": arguments}


# The experiment of original-readme.md; its file name differs from ours by case.
ORIGINAL_SPACE = {
    "gamma": numbers("uniform", 0.5, 0.9),
    "image_size": choice(300),
    "patch-num": choice(15, 10, 6, 5),
    "vt_dim": choice(256, 128, 64),
    "vt_depth": choice(6, 5, 4),
    "vt_heads": choice(12, 8, 6),
    "mlp_dim": choice(1000, 500, 100),
}
ORIGINAL_COMMAND = (
    "python main_vit.py --download-dir {data} -a vit --batch-size 16 --epochs 5 "
    "--request-from-nni --num-classes 2 --gpu 0 "
)


def original(data: Path) -> dict[str, Any]:
    return {
        "authorName": "nujnim",
        "experimentName": "ViT_to_nni",
        "trialConcurrency": 2,
        "maxExecDuration": "99999d",
        "maxTrialNum": 100,
        "trainingServicePlatform": "local",
        "searchSpacePath": "search_net_ViT.json",
        "useAnnotation": False,
        "tuner": {"builtinTunerName": "TPE", "classArgs": {"optimize_mode": "maximize"}},
        "trial": {
            "codeDir": str(REPOSITORY),
            "command": ORIGINAL_COMMAND.format(data=data),
            "gpuNum": 1,
        },
    }


@pytest.fixture
def check(tmp_path: Path, run_main: Callable[..., Any]) -> Callable[..., Any]:
    """check(content) or check(tuner=..., searchSpace=...) on a file in tmp_path; None leaves a key out."""

    def run(content: dict[str, Any] | None = None, **changes: Any) -> Any:
        if content is None:
            content = {
                "trialCommand": COMMAND,
                "trialCodeDirectory": str(REPOSITORY),
                "trialConcurrency": 1,
                "searchSpace": {"lr": numbers("loguniform", 1e-4, 1e-2)},
                "tuner": own_tuner("tpe_tuner.Tpe"),
                "trainingService": {"platform": "local"},
            }
        content = {k: v for k, v in {**content, **changes}.items() if v is not None}
        (tmp_path / "config.yml").write_text(yaml.safe_dump(content))
        result = run_main("--check", tmp_path / "config.yml")
        assert "Traceback" not in result.stdout + result.stderr
        assert result.stderr.count("\n") <= 1
        return result

    return run


def findings(result: Any, kind: str) -> list[str]:
    """The errors or warnings of a report, with the lines that go on with them."""
    return re.findall(rf"^{kind}: (.*(?:\n    .*)*)", result.stdout, re.MULTILINE)


# --- the original experiment ---------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path, make_images: Callable[..., Path]) -> Path:
    return make_images(tmp_path / "chest_xray", ["cat", "dog"], 2)


def write_space(folder: Path, **changes: Any) -> None:
    (folder / "search_net_ViT.json").write_text(json.dumps({**ORIGINAL_SPACE, **changes}))


def without_gpu_lines(data: Path) -> dict[str, Any]:
    content = original(data)
    del content["trial"]["gpuNum"]
    content["trial"]["command"] = content["trial"]["command"].replace("--gpu 0", "")
    return content


def test_original_experiment_passes(check, data: Path, tmp_path: Path) -> None:
    write_space(tmp_path)
    result = check(without_gpu_lines(data))
    assert result.status == 0
    assert "warning" not in result.stdout
    for name in ORIGINAL_SPACE:
        assert re.search(rf"^  {name} +ok", result.stdout, re.MULTILINE)
    assert "distinct combinations: 324, each with gamma" in result.stdout  # 4 * 3 * 3 * 3 * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="it may run where there is a GPU")
def test_original_gpu_lines_are_the_only_complaint_without_a_gpu(check, data, tmp_path) -> None:
    write_space(tmp_path)
    result = check(original(data))
    assert result.status == 2
    assert all("trialGpuNumber (gpuNum)" in text for text in findings(result, "error"))
    assert not findings(result, "warning")


def test_combinations_that_cannot_work_are_counted_and_named(check, data, tmp_path) -> None:
    write_space(tmp_path, **{"patch-num": choice(16, 15, 10, 6, 5)})
    result = check(without_gpu_lines(data))
    assert result.status == 0
    (warning,) = findings(result, "warning")
    assert warning.startswith("81 of 405 combinations cannot work\n")
    assert "81 x patch_num 16 does not divide image_size 300: use one of 1 2 3" in warning


def test_new_schema_with_its_file_and_inline(check, data, tmp_path) -> None:
    write_space(tmp_path)
    command = ORIGINAL_COMMAND.format(data=data).replace("--gpu 0", "")
    in_file = check(trialCommand=command, searchSpace=None, searchSpaceFile="search_net_ViT.json")
    inline = check(trialCommand=command, searchSpace=ORIGINAL_SPACE)
    assert in_file.status == inline.status == 0
    # json keeps the order of the keys, safe_dump sorts them
    assert sorted(in_file.stdout.splitlines()) == sorted(inline.stdout.splitlines())


@pytest.mark.parametrize(
    "file",
    [
        file.relative_to(REPOSITORY)
        for file in [REPOSITORY / "config.yml", *REPOSITORY.glob("examples/**/*.yml")]
        # Those that ask for an ssh key or a model are in test_examples.
        if file.is_file()
        and "trialConcurrency" in file.read_text()
        and not {"remote", "fine_tuning"} & {*file.parts}
    ],
    ids=str,
)
def test_shipped_experiments_pass(file: Path, run_main) -> None:
    result = run_main("--check", file, cwd=REPOSITORY)
    assert not result.stderr
    # The images and GPUs of whoever runs an example need not be here.
    ours = re.compile(r"data folder .* does not exist|(trialGpuNumber|--gpu) ")
    errors = [text for text in findings(result, "error") if not ours.search(text)]
    assert errors == findings(result, "warning") == []


# --- keys and values -----------------------------------------------------------------------------


def test_unknown_key(check) -> None:
    result = check(searchSpace={"patchnum": choice(2, 4), "lr": choice(1e-3)})
    assert result.status == 2
    assert re.search(r"^  patchnum +WRONG", result.stdout, re.MULTILINE)
    assert re.search(r"^  lr +ok", result.stdout, re.MULTILINE)
    (error,) = findings(result, "error")
    assert "unknown parameter --patchnum (did you mean --patch-num?)" in error


@pytest.mark.parametrize(
    ("key", "spec", "message"),
    [
        ("dropout", choice(0.1, 1.5), "1.5 is not at least 0 and at most 1"),
        ("dropout", numbers("uniform", 0, 2), "1.9998 is not at least 0 and at most 1"),
        ("vt_dim", choice(64, 64.5), "64.5 is not a whole number"),
        ("vt_dim", choice("wide"), "'wide'"),
        ("vt_dim", numbers("uniform", 32, 64), "is not a whole number"),
        ("vt_depth", numbers("randint", 0, 4), "0 is not at least 1"),
        ("vt_depth", numbers("quniform", 0, 4, 1), "0.0 is not at least 1"),
        ("optimizer", choice("adam", "lion"), "lion"),
        ("seed", choice([1, 2]), "single value|numbers or strings"),
        ("lr", numbers("uniform", 0.1), "must have 2 values"),
        ("lr", numbers("loguniform", 0, 1), "must have low > 0"),
        ("lr", numbers("quniform", 0.1, 1, 0), "ZeroDivisionError"),
        ("lr", numbers("gaussian", 0, 1), 'unsupported type "gaussian"'),
        ("lr", {"_type": "loguniform", "_value": ["1e-4", "1e-2"]}, "must have float values"),
        ("lr", {"_value": [1]}, 'does not have "_type"'),
        ("lr", choice(), "should not be empty"),
        ("lr", 0.1, "expect a dict"),
        ("download_dir", choice("/a"), "data folder /a does not exist"),
        ("download_dir", choice("a\0"), "argument --download-dir: a path with a null byte"),
        ("init_from", choice("/\ud800"), "a path with a character that no name can have"),
        ("init_from", choice("a\0"), "null byte"),
        ("init_from", choice("a" * 300), "File name too long"),
        ("resume", choice("a.pth.tar"), "resume belongs on the command line"),
    ],
)
def test_values_that_no_trial_could_use(check, key: str, spec: Any, message: str) -> None:
    result = check(searchSpace={key: spec})
    assert result.status == 2
    assert any(re.search(message, text) for text in findings(result, "error"))


@pytest.mark.parametrize(
    ("key", "spec"),
    [
        ("lr", numbers("uniform", 0, 1)),  # 0 itself is as good as never drawn
        ("lr", numbers("loguniform", 1e-5, 1e-2)),
        ("lr", numbers("quniform", 0.001, 0.01, 0.001)),
        ("weight_decay", numbers("lognormal", -5, 1)),
        ("weight-decay", numbers("qlognormal", 0, 1, 0.1)),
        ("vt_depth", numbers("randint", 1, 5)),
        ("vt_depth", numbers("quniform", 2, 6, 1)),
        ("vt_depth", numbers("qloguniform", 2, 6, 2)),
        ("vt_depth", numbers("qnormal", 8, 1, 1)),
        ("epochs", choice(4.0, 5)),
        ("moving_average_decay", numbers("normal", 0.5, 0.1)),
        ("batch_size", choice("16", 32)),
    ],
)
def test_every_type_of_range(check, key: str, spec: dict[str, Any]) -> None:
    result = check(searchSpace={key: spec})
    assert (result.status, findings(result, "warning")) == (0, [])


def test_a_normal_that_is_sometimes_out_of_range_is_a_warning(check) -> None:
    result = check(searchSpace={"lr": numbers("normal", 1e-3, 1e-3)})
    assert result.status == 0
    (warning,) = findings(result, "warning")
    assert "in a part of the range only" in warning and "-0.001 is not above 0" in warning


def test_combinations_of_two_keys(check) -> None:
    space = {"epochs": choice(2, 10), "warmup_epochs": numbers("uniform", 0, 5)}
    result = check(searchSpace=space)
    assert result.status == 0
    (warning,) = findings(result, "warning")
    assert warning.startswith("1 of 2 combinations work in a part of the range only")
    assert re.search(r"warmup_epochs 4.9\d* is more than epochs 2", warning)


def test_no_combination_can_work(check) -> None:
    result = check(searchSpace={"image_size": choice(300), "patch_num": choice(16, 7)})
    assert result.status == 2
    (error,) = findings(result, "error")
    assert error.startswith("2 of 2 combinations cannot work")
    assert "patch_num 16" in error and "patch_num 7" in error


@pytest.mark.slow
def test_large_spaces_are_sampled_and_messages_shortened(check) -> None:
    sizes = numbers("quniform", 20, 2000, 1)
    space = dict.fromkeys(("image_size", "patch_num", "vt_dim", "mlp_dim"), sizes)
    result = check(searchSpace=space)
    assert result.status == 0
    assert f"more than {check_vit.LIMIT:,}" in result.stdout
    assert len(result.stdout.splitlines()) < 20 and "more like it" in result.stdout


@pytest.mark.parametrize(("maximum", "expected"), [(9, []), (10, [True])])
def test_more_trials_than_combinations(check, maximum: int, expected: list[bool]) -> None:
    space = {"vt_dim": choice(32, 48, 64, 64), "vt_depth": numbers("randint", 2, 5)}
    result = check(searchSpace=space, maxTrialNumber=maximum, tuner={"name": "Random"})
    assert result.status == 0
    warnings = findings(result, "warning")
    assert ["maxTrialNumber 10 is more than the 9 distinct" in w for w in warnings] == expected


def test_nested_space_is_judged_as_the_trial_does(check) -> None:
    nested = choice({"_name": "sgd", "momentum": numbers("uniform", 0, 0.9)}, {"_name": "adam"})
    assert check(searchSpace={"optimizer": nested}).status == 0


NESTED_ERRORS = [
    ({"_type": "Choice", "_value": [0.8]}, 'unsupported type "Choice"'),
    (numbers("unifor", 0, 0.9), 'unsupported type "unifor"'),
    ({"_type": "uniform", "_value": ["0", "0.9"]}, "must have float values"),
    (0.8, "is a float, expect a dict"),
    ([0, 0.9], "is a list, expect a dict"),
]


@pytest.mark.parametrize(("spec", "message"), NESTED_ERRORS)
def test_keys_within_options_are_validated(check, spec: Any, message: str) -> None:
    deep = choice({"_name": "step", "gamma": spec}, {"_name": "cosine"})
    nested = choice({"_name": "sgd", "momentum": spec, "scheduler": deep}, {"_name": "adam"})
    result = check(searchSpace={"optimizer": nested, "lr": choice(1e-3)})
    assert result.status == 2
    assert re.search(r"^  optimizer +WRONG", result.stdout, re.MULTILINE)
    first, second = findings(result, "error")
    assert first.startswith("search space: optimizer/momentum: ") and message in first
    assert second.startswith("search space: optimizer/scheduler/gamma: ") and message in second


@pytest.mark.parametrize(
    "spec", [choice(None, 0.5), choice(0.5, None), choice(None), choice({"_name": "step"}, None)]
)
def test_null_in_a_choice_is_not_given(check, spec: dict[str, Any]) -> None:
    nested = isinstance(spec["_value"][0], dict)
    options = "--gamma 0.5" if nested else ""
    space = {"scheduler" if nested else "gamma": spec}
    result = check(searchSpace=space, trialCommand=f"{COMMAND} {options}")
    assert (result.status, findings(result, "warning")) == (0, [])


def test_trials_of_different_metrics_could_not_be_compared(check) -> None:
    result = check(searchSpace={"metric": choice("accuracy", "auc")})
    (error,) = findings(result, "error")
    assert error.startswith("trials could not be compared: metric is accuracy or auc")
    assert check(searchSpace={"metric": choice("accuracy"), "lr": choice(1e-3)}).status == 0


def test_what_can_be_told_of_the_images(check, image_folder: Path) -> None:
    """How many there are of what, and what cannot be read; they are not opened."""
    command = f"{COMMAND} --download-dir {image_folder}"
    result = check(trialCommand=command)
    counts = f"images: 40 in {image_folder}/train, 20 in {image_folder}/test; 2 classes: cat, dog\n"
    assert result.status == 0 and counts in result.stdout
    (image_folder / "train/cat/e.png").touch()
    (image_folder / "test/dog/l.png").symlink_to("nowhere")
    (error,) = findings(check(trialCommand=command), "error")
    assert error.startswith("2 images cannot be decoded: ")
    assert "cat/e.png (empty)" in error and "l.png (No such file or directory)" in error
    assert check(trialCommand=command + " --skip-broken").status == 0


@pytest.mark.parametrize("val", [False, True])
def test_trials_that_are_validated_on_other_images_are_warned_of(
    check, val: bool, image_folder: Path, make_images
) -> None:
    if val:
        make_images(image_folder / "val", ["cat", "dog"], 4)
    command = f"{COMMAND} --download-dir {image_folder}"
    result = check(trialCommand=command, searchSpace={"seed": choice(0, 1), "lr": choice(1e-3)})
    found = [text for text in findings(result, "warning") if "differ in seed" in text]
    assert (result.status, len(found)) == (0, 0 if val else 1)
    result = check(trialCommand=command, searchSpace={"val_split": choice(0.1, 0.2)})
    assert any("differ in val_split" in text for text in findings(result, "warning"))


# --- images and checkpoints ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--download-dir {tmp}/empty", "has 0 class folders"),
        ("--download-dir {tmp}/chest_xray --num-classes 3", "--num-classes is 3, but"),
        ("--download-dir {tmp}/single", "class folder cat has 1 image"),
        ("--download-dir {tmp}/split", "has other classes than train/"),
        ("--num-classes 3", "the demo has 10 classes"),
        ("--init-from {tmp}/x.pth.tar", "x.pth.tar is damaged or was not written by main_vit.py"),
    ],
)
def test_images_and_checkpoints_are_looked_at(
    check, data, make_images, tmp_path: Path, options: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.pth.tar").write_bytes(b"x" * 200)
    make_images(tmp_path / "single", ["cat", "dog"], 1)
    make_images(tmp_path / "split" / "train", ["cat", "dog"], 2)
    make_images(tmp_path / "split" / "test", ["cat", "eel"], 2)
    space = {"val_split": numbers("uniform", 0.1, 0.3), "lr": choice(1e-3, 1e-2)}
    command = f"{COMMAND} {options.format(tmp=tmp_path)}"
    result = check(trialCommand=command, searchSpace=space)
    assert result.status == 2
    (error,) = findings(result, "error")
    assert message in error


# --- without effect ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "space", "status", "message"),
    [
        ("", {"gamma": numbers("uniform", 0.5, 0.9), "scheduler": choice("cosine")}, 2,
         "gamma has no effect under the cosine schedule"),
        ("--scheduler cosine", {"gamma": numbers("uniform", 0.5, 0.9)}, 2,
         "gamma has no effect under the cosine schedule"),
        ("--dont-adjust-learning-rate", {"gamma": numbers("uniform", 0.5, 0.9)}, 2,
         "gamma has no effect under the constant schedule"),
        ("--batch-size 16", {"batch_size": choice(8, 32)}, 0,
         "batch_size 16 in trialCommand has no effect: batch_size takes its place"),
        ("--patch-size 4", {"patch-num": choice(2, 4)}, 0,
         "patch_num 2 and patch_size 4 contradict each other"),
        ("", {"momentum": choice(0.8, 0.9)}, 0, "momentum has no effect"),
        ("--model-dir x", {"lr": choice(1e-3)}, 0, "--model-dir has no effect under NNI"),
        ("", {"lr": choice(1), "learning-rate": choice(2)}, 0, "lr is set by learning-rate and by lr: where"),
        ("", {"workers": choice(1, 2)}, 0, "workers has no effect on results"),
        ("", {"arch": choice("vit", "simple_vit"), "pool": choice("cls", "mean")}, 0,
         "pool has no effect on arch simple_vit"),
    ],
)  # fmt: skip
def test_without_effect(check, options, space, status: int, message: str) -> None:
    result = check(trialCommand=f"{COMMAND} {options}", searchSpace=space)
    assert result.status == status
    (text,) = findings(result, "error" if status else "warning")
    assert message in text


def test_momentum_is_fine_where_some_trials_use_it(check) -> None:
    space = {"momentum": choice(0.8, 0.9), "optimizer": choice("adam", "sgd")}
    assert not findings(check(searchSpace=space), "warning")


def test_patches_too_large_for_the_images(check) -> None:
    """A search space for small images is valid for large ones, but its models would see next to nothing."""
    command = f"{COMMAND} --image-size"
    result = check(trialCommand=f"{command} 224", searchSpace={"patch_num": choice(2, 4)})
    [warning] = findings(result, "warning")
    assert result.status == 0 and "patches of 112 pixels a side are very large" in warning
    result = check(trialCommand=f"{command} 256", searchSpace={"patch_num": choice(4, 8)})
    assert not findings(result, "warning")


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        COMMAND,
        f"cd {REPOSITORY} && {COMMAND}",
        f"cd tests; cd .. && exec {COMMAND}",
        "A=1 OMP_NUM_THREADS=2 python -u ./main_vit.py --request-from-nni",
        "torchrun --nproc-per-node 2 --signals-to-handle SIGTERM main_vit.py --request-from-nni",
        "python -m main_vit --request-from-nni",
        "python main_vit.py --request-from-nni \\\n  --epochs 2\n",
        f'exec python "{REPOSITORY}/main_vit.py" --request-from-nni > /dev/null 2>&1',
        f"""NAME="a > b" OTHER='c < d' exec {COMMAND} > "/dev/null" """,
        "cd $PWD/tests && cd ${PWD}/.. && " + COMMAND,
        f"""echo "it's $HOME" '$'; {COMMAND} --cache-dir "$HOME/it's" --arch 'vit'""",
        f"# it's a comment; exit\n{COMMAND} --cache-dir 'a # b' --cache-dir a#b # | tee 'x",
        f"{COMMAND} --cache-dir 'a*' --cache-dir \"b?{{c,d}}\" --cache-dir \\[e]",
        f"{{ cd -P tests && cd -- ..; }} && {COMMAND}",
        f"exec {COMMAND} --cache=off>/dev/null 2>&1",
        f"exec {COMMAND} >|/dev/null --cache off",
        f"# one \\\n{COMMAND}",
        rf"""exec {COMMAND} --cache-dir "a\$b" --epochs=2>>/dev/null""",
    ],
)
def test_ways_to_run_the_trial(check, command: str) -> None:
    result = check(trialCommand=command)
    assert (result.status, findings(result, "error")) == (0, [])
    assert not findings(result, "warning")


def test_a_script_below_the_home_folder(check, home: Path) -> None:
    (home / "vit").unlink(missing_ok=True)
    (home / "vit").symlink_to(REPOSITORY)
    assert check(trialCommand="python ~/vit/main_vit.py --request-from-nni").status == 0
    result = check(trialCommand="python ~/no/main_vit.py --request-from-nni")
    assert findings(result, "error") == [f"trialCommand: {home}/no/main_vit.py does not exist"]


@pytest.mark.parametrize(
    ("command", "unclear"),
    [
        (COMMAND + " --epochs ${E:-3} --warmup-epochs 2", "epochs"),
        (COMMAND + " --epochs=$(nproc --all)", "epochs"),
        (COMMAND + ' --config "`cat file`"', "config"),
        (COMMAND + " --lr $NNI_TRIAL_JOB_ID --threads $((2 + 2))", "lr, threads"),
        ("python main_vit.py $NNI_TRIAL_JOB_ID", "a part of it"),
        ("python $NNI_TRIAL_JOB_ID/main_vit.py", "a part of it"),
        ("exec $NNI_TRIAL_JOB_ID --epochs 3", "a part of it"),
        (COMMAND + " --init-from /x/mod*.tar --cache-dir=/x/[ab]", "cache_dir, init_from"),
        (COMMAND + " --download-dir /x/img? --lr 1e-{3,4}", "download_dir, lr"),
        (COMMAND + " --seed {1..1}", "seed"),
        ("python main_v*.py --request-from-nni", "a part of it"),
        (f"cd - && {COMMAND}", "a part of it"),
        (
            f"cd $NNI_OUTPUT_DIR && python {REPOSITORY}/main_vit.py --request-from-nni",
            "a part of it",
        ),
        (f'bash -c "{COMMAND}"', "a part of it"),
        (f'bash -c "cd /x; python {REPOSITORY}/main_vit.py"', "a part of it"),
    ],
)
def test_what_only_bash_knows_is_a_warning(check, command: str, unclear: str) -> None:
    result = check(trialCommand=command)
    assert (result.status, findings(result, "error")) == (0, [])
    (warning,) = findings(result, "warning")
    assert f"what bash will put in for {unclear} cannot be judged" in warning


def test_what_only_bash_knows_makes_no_error_of_what_follows_from_it(check) -> None:
    command = f"{COMMAND} --metric $(cat metric) --epochs ${{E:-60}}"
    tuner = {"name": "TPE", "classArgs": {"optimize_mode": "minimize"}}
    result = check(trialCommand=command, searchSpace={"warmup_epochs": choice(50)}, tuner=tuner)
    assert (result.status, findings(result, "error")) == (0, [])
    warnings = findings(result, "warning")
    assert "warmup_epochs 50 is more than epochs 20" in warnings[1]
    assert check(trialCommand=command.replace("$(cat metric)", "auc"), tuner=tuner).status == 2
    assert check(trialCommand=f"{COMMAND} --epochs '$E'").status == 2  # which bash leaves as it is
    assert check(trialCommand=f"{COMMAND} --epochs $(nproc) --download-dir nowhere").status == 2


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("python main_vit.py", "lacks --request-from-nni"),
        ("python main_ViT.py --request-from-nni", "does not run main_vit.py"),
        ("cd tests && " + COMMAND, "tests/main_vit.py does not exist"),
        (f"cd nowhere && python {REPOSITORY}/main_vit.py", "nowhere does not exist"),
        ("bash setup.sh && python main_ViT.py --request-from-nni", "does not run main_vit.py"),
        (COMMAND + " --epoch 3", "unknown parameter --epoch (did you mean --epochs?)"),
        (COMMAND + " --epochs 0", "0 is not at least 1"),
        (COMMAND + " --download-dir nowhere", "nowhere does not exist"),
        (COMMAND + " --init-from nowhere.pth.tar", "nowhere.pth.tar does not exist"),
        (COMMAND + " --config nowhere.yml", "nowhere.yml cannot be read"),
        (COMMAND + " --resume x.pth.tar", "--init-from"),
        (COMMAND + " --gpu 64", "--gpu 64: torch sees"),
        (COMMAND + " --check config.yml", "--check trains nothing"),
        (COMMAND + " --download-dir $PWD/nowhere", f"{REPOSITORY}/nowhere does not exist"),
        (COMMAND + " --download-dir $UNSET_OF_TEST", "UNSET_OF_TEST does not exist"),
        (COMMAND + ' "" --bogus 3', "unknown parameter"),
        (COMMAND + " 'x", "No closing quotation"),
    ],
)
def test_commands_that_cannot_work(check, command: str, message: str) -> None:
    result = check(trialCommand=command)
    assert result.status == 2
    assert any(message in text for text in findings(result, "error"))


@pytest.mark.parametrize(
    ("launcher", "warned"),
    [
        ("torchrun", True),
        ("python -m torch.distributed.run", True),
        ("torchrun --signals-to-handle=SIGINT,SIGTERM", True),
        ("torchrun --signals_to_handle SIGTERM,SIGHUP", False),
        ("A=torchrun_of_mine python", False),
    ],
)
def test_torchrun_ends_stopped_trials_as_failed(check, launcher: str, warned: bool) -> None:
    warnings = findings(check(trialCommand=f"{launcher} {COMMAND[7:]}"), "warning")
    assert len(warnings) == warned
    assert all("give torchrun --signals-to-handle SIGTERM" in text for text in warnings)


@pytest.mark.parametrize("tail", ["| tee log.txt", "> log.txt 2>&1", "; echo done"])
def test_a_shell_that_keeps_signals(check, tail: str) -> None:
    result = check(trialCommand=f"{COMMAND} {tail}")
    assert result.status == 0
    (warning,) = findings(result, "warning")
    assert tail.split()[-1] in warning and "signal" in warning


@pytest.mark.parametrize(
    "command",
    [
        f"sh -c '{COMMAND}'",
        f'bash -c "{COMMAND}; echo"',
        "bash run.sh",
        "./run.sh",
        f'eval "{COMMAND}"',
    ],
)
def test_a_shell_within_is_not_looked_into_but_keeps_signals(check, command: str) -> None:
    result = check(trialCommand=command)
    assert (result.status, findings(result, "error")) == (0, [])
    unclear, signals = findings(result, "warning")
    assert "cannot be judged" in unclear and "keeps NNI's signal" in signals
    assert ("unless exec starts it there" in signals) == command.startswith(
        ("sh", "bash run", "./")
    )


def test_cd_alone_goes_to_the_home_folder(check, home: Path) -> None:
    for command in (f"cd && {COMMAND}", f"cd --; {COMMAND}"):
        (error,) = findings(check(trialCommand=command), "error")
        assert error == f"trialCommand: {home}/main_vit.py does not exist"


@pytest.mark.parametrize(
    ("command", "program"),
    [
        ("pyton main_vit.py --request-from-nni", "pyton"),
        ("A=1 exec /nowhere/python main_vit.py --request-from-nni", "/nowhere/python"),
        ("main_vit.py --request-from-nni", "main_vit.py"),
        ("cd tests && ../main_vit.py --request-from-nni", "../main_vit.py"),
        ("export A=1; $NOT_SET_HERE main_vit.py --request-from-nni", "$NOT_SET_HERE"),
        (f"{REPOSITORY} main_vit.py --request-from-nni", str(REPOSITORY)),
        ("py\0thon main_vit.py --request-from-nni", r"py\x00thon"),
    ],
)
def test_a_program_that_does_not_exist(check, command: str, program: str) -> None:
    (error,) = findings(check(trialCommand=command), "error")
    assert error.startswith(f"trialCommand: bash finds no program {program}: ")
    machine = {"host": "worker", "user": "me", "password": "none"}
    remote = {"platform": "remote", "machineList": [machine]}
    far = check(trialCommand=command, trainingService=remote, nniManagerIp="10.0.0.1")
    assert not findings(far, "error")


@pytest.mark.parametrize(
    "command",
    [
        "export PATH=/opt/vit/bin; pyton main_vit.py",
        "source /opt/vit/activate && pyton main_vit.py",
        "conda activate vit && pyton main_vit.py",
        "command -v pyton && pyton main_vit.py || python3 main_vit.py",
        "/opt/$NNI_TRIAL_JOB_ID/python main_vit.py",
        "if true; then python main_vit.py; fi",
        "time -p python main_vit.py",
        "exec -a vit python main_vit.py",
        "env A=1 nice python main_vit.py",
        "../*/bin/python main_vit.py",
    ],
)
def test_a_program_that_cannot_be_told_is_no_error(check, command: str) -> None:
    command = command.replace("main_vit.py", "main_vit.py --request-from-nni")
    assert not findings(check(trialCommand=command), "error")


# --- GPUs ----------------------------------------------------------------------------------------


def test_a_gpu_in_the_search_space(check, monkeypatch) -> None:
    """It is this machine's that count, but where trials run on others."""
    monkeypatch.setattr(setup_vit, "usable_gpus", lambda: 1)
    space = {"gpu": choice(0, 1)}
    (error,) = findings(check(searchSpace=space), "error")
    assert error.startswith("--gpu 1: torch sees 1 CUDA devices here")
    machine = {"host": "worker", "user": "me", "password": "none"}
    remote = {"platform": "remote", "machineList": [machine]}
    far = check(searchSpace=space, trainingService=remote, nniManagerIp="10.0.0.1")
    assert not findings(far, "error")


GPU_CASES = [
    # GPUs here, trialGpuNumber, trainingService, --gpu, errors, warnings
    (0, None, {}, "", 0, 0),
    (0, None, {}, "--gpu 0", 1, 0),
    (1, None, {}, "--gpu 0", 0, 0),
    (1, 0, {}, "", 0, 1),
    (1, 0, {}, "--gpu 0", 1, 0),
    (1, 1, {"useActiveGpu": False}, "", 1, 0),
    (1, 1, {}, "", 2, 0),
    (2, 1, {}, "", 1, 0),
    (2, 1, {"useActiveGpu": False}, "", 0, 0),
    (1, 1, {"useActiveGpu": True, "maxTrialNumberPerGpu": 2}, "", 0, 0),
    (0, 1, {"useActiveGpu": True, "maxTrialNumberPerGpu": 2}, "", 1, 0),
]


@pytest.mark.parametrize("old", [False, True], ids=["new schema", "old schema"])
@pytest.mark.parametrize(("gpus", "number", "service", "option", "errors", "warnings"), GPU_CASES)
def test_gpu_numbers(
    check, monkeypatch, tmp_path, gpus, number, service, option, errors, warnings, old: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(setup_vit, "usable_gpus", lambda: gpus)
    command = f"{COMMAND} {option}"
    if old:
        write_space(tmp_path)
        content = original(tmp_path)
        trial = {"codeDir": str(REPOSITORY), "command": command, "gpuNum": number}
        local = {k.replace("Number", "Num"): v for k, v in service.items()}
        result = check(content, trial=trial, localConfig=local, maxTrialNum=None)
    else:
        service = {"platform": "local", **service}
        result = check(trialCommand=command, trialGpuNumber=number, trainingService=service)
    assert len(findings(result, "error")) == errors
    assert len(findings(result, "warning")) == warnings
    assert result.status == (2 if errors else 0)


@pytest.mark.parametrize(
    ("gpus", "number", "concurrency", "service", "freezes"),
    [
        (2, 1, 2, {}, False),
        (2, 1, 3, {}, True),
        (4, 2, 3, {}, True),
        (2, 1, 4, {"maxTrialNumberPerGpu": 2}, False),
        (4, 1, 3, {"gpuIndices": [0]}, True),
    ],
)
def test_more_trials_at_a_time_than_gpus_have_room_for(
    check, monkeypatch, gpus: int, number: int, concurrency: int, service: dict, freezes: bool
) -> None:
    """The rows of docs/gpus.md."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    service = {"platform": "local", "useActiveGpu": True, **service}
    result = check(trialGpuNumber=number, trialConcurrency=concurrency, trainingService=service)
    assert ["freezes" in text for text in findings(result, "error")] == [True] * freezes


# --- tuner and assessor --------------------------------------------------------------------------

WORST = "prefer the worst models"


@pytest.mark.parametrize(
    ("tuner", "metric", "message"),
    [
        ({"name": "tpe"}, "accuracy", WORST),  # it minimises by default
        ({"name": "TPE", "classArgs": {"optimize_mode": "minimize"}}, "auc", WORST),
        ({"name": "TPE", "classArgs": {"optimize_mode": "maximize"}}, "loss", WORST),
        ({"name": "TPE", "classArgs": {"optimize_mode": "minimize"}}, "loss", None),
        ({"name": "Evolution"}, "accuracy", "className: nni_tuners.Evolution"),
        ({"className": "nni_tuners.Evolution", "codeDirectory": TUNERS}, "accuracy", None),
        ({"className": "nni_tuners.Evolution", "codeDirectory": TUNERS}, "loss", WORST),
        ({"name": "Random"}, "loss", None),
        ({"name": "GridSearch"}, "accuracy", None),
        ({"name": "TPE", "classArgs": {"optimise_mode": "maximize"}}, "accuracy", "optimise_mode"),
        ({"name": "TPE", "classArgs": {"optimize_mode": "max"}}, "accuracy", "'max' is not a valid"),
        ({"name": "Tpee"}, "accuracy", "NNI has no tuner of this name; it has PPO SMAC TPE"),
        ({"name": "Medianstop"}, "accuracy", "NNI has no tuner of this name"),
        ({"name": "Metis"}, "accuracy", "className: nni_tuners.Metis"),
        ({"name": "GPTuner"}, "accuracy", "className: nni_tuners.GP"),
        ({"name": "Anneal"}, "accuracy", "className: anneal_tuner.Anneal"),
        ({"name": "SMAC"}, "accuracy", "className: smac_tuner.Smac"),
        ({"name": "PBT"}, "accuracy", "className: pbt_tuner.PBT"),
        ({"name": "PBTTuner"}, "accuracy", "className: pbt_tuner.PBT"),
        ({"className": "nni_tuners.Metis", "codeDirectory": str(REPOSITORY / "tuners")}, "accuracy",
         "Metis cannot search lr: it takes choice randint uniform quniform"),
        ({"name": "Hyperband"}, "accuracy", "issue 5263"),
        ({"className": "x.Y", "codeDirectory": str(REPOSITORY)}, "accuracy", "No module named 'x'"),
        ({"className": "x.Y", "codeDirectory": "/nowhere"}, "accuracy", "is not a directory"),
    ],
)  # fmt: skip
def test_tuner(check, tuner: dict[str, Any], metric: str, message: str | None) -> None:
    result = check(tuner=tuner, trialCommand=f"{COMMAND} --metric {metric}")
    assert result.status == (2 if message else 0)
    assert (message or "") in result.stdout + result.stderr
    assert len(findings(result, "error")) + len(result.stderr.splitlines()) == bool(message)


def test_metric_of_the_config_file_of_the_trial(check, tmp_path: Path) -> None:
    (tmp_path / "trial.yaml").write_text("metric: loss")
    result = check(trialCommand=f"{COMMAND} --config {tmp_path}/trial.yaml")
    assert result.status == 2 and "worst models by loss" in result.stdout


def test_a_far_machine_need_not_have_our_files(check) -> None:
    machine = {"host": "worker", "user": "me", "password": "none"}
    result = check(
        trainingService={"platform": "remote", "machineList": [machine]},
        nniManagerIp="10.0.0.1",
        trialGpuNumber=1,
        trialCommand=f"{COMMAND} --download-dir /on/the/worker --gpu 0",
    )
    assert (result.status, findings(result, "warning")) == (0, [])


@pytest.mark.parametrize(
    ("assessor", "metric", "message"),
    [
        ({"name": "Medianstop", "classArgs": {"start_step": 2}}, "accuracy", None),
        ({"name": "Medianstop"}, "loss", WORST),
        ({"name": "Curvefitting", "classArgs": {"epochs": 9}}, "accuracy", "'epochs'"),
        ({"name": "Curvefitting", "classArgs": {"epoch_num": 9}}, "accuracy", None),
        ({"name": "Curvefitting", "classArgs": {"epoch_num": 9}}, "loss", "end the best trials"),
        ({"name": "Medianstopp"}, "accuracy", "no assessor of this name"),
        (
            {"name": "Medianstop", "classArgs": {"start_step": "3"}},
            "accuracy",
            "TypeError: '<' not",
        ),
        ({"className": "tpe_tuner.Tpe", "codeDirectory": TUNERS}, "accuracy", "not an Assessor"),
        ({"className": "halving_assessor.Halving", "codeDirectory": TUNERS}, "accuracy", None),
    ],
)
def test_assessor(check, assessor: dict[str, Any], metric: str, message: str | None) -> None:
    mode = "minimize" if metric == "loss" else "maximize"
    result = check(
        assessor=assessor,
        tuner={"name": "TPE", "classArgs": {"optimize_mode": mode}},
        trialCommand=f"{COMMAND} --metric {metric}",
    )
    assert result.status == (2 if message else 0)
    errors = findings(result, "error")
    assert len(errors) == bool(message) and all(message in text for text in errors)


CURVEFITTING, MEDIANSTOP = {"name": "curvefitting"}, {"name": "Medianstop"}


@pytest.mark.parametrize(
    ("assessor", "options", "messages"),
    [
        (CURVEFITTING, "", []),  # 20 is the default of both
        (CURVEFITTING, "--epochs 30", ["epoch_num 20 is not the 30 epochs of the trials"]),
        (CURVEFITTING, "--epochs $(nproc)", []),
        (CURVEFITTING | {"classArgs": {"epoch_num": 6}}, "--epochs 6", ["before epoch 6"]),
        (CURVEFITTING | {"classArgs": {"epoch_num": 7}}, "--epochs 7", []),
        (MEDIANSTOP | {"classArgs": {"start_step": 5}}, "--epochs 5", ["before epoch 5"]),
        (MEDIANSTOP | {"classArgs": {"start_step": 5}}, "--epochs 6", []),
        (MEDIANSTOP | {"classArgs": {"start_step": 50}}, "--config $(cat x)", []),
        (own_tuner("halving_assessor.Halving", first=9), "--epochs 4", ["before epoch 9"]),
        (own_tuner("halving_assessor.Halving", first=3), "--epochs 4", []),
    ],
)
def test_an_assessor_that_would_do_nothing(
    check, assessor: dict[str, Any], options: str, messages: list[str]
) -> None:
    result = check(assessor=assessor, trialCommand=f"{COMMAND} {options}")
    assert (result.status, findings(result, "error")) == (0, [])
    found = [text for text in findings(result, "warning") if text.startswith("assessor")]
    assert len(found) == len(messages)
    assert all(message in text for message, text in zip(messages, found, strict=True))


def test_trials_of_several_lengths_beside_an_assessor(check) -> None:
    space = {"epochs": choice(10, 20)}
    (warning,) = findings(check(assessor=CURVEFITTING, searchSpace=space), "warning")
    assert "epoch_num 20 is not the 10, 20 epochs of the trials" in warning
    longest = MEDIANSTOP | {"classArgs": {"start_step": 15}}
    assert not findings(check(assessor=longest, searchSpace=space), "warning")


@pytest.mark.parametrize(
    ("maximum", "arguments", "warns"),
    [(19, {}, True), (20, {}, False), (None, {}, False), (7, {"population_size": 4}, True)],
)
def test_a_population_of_one_step(check, maximum: int | None, arguments: dict, warns: bool) -> None:
    tuner = own_tuner("pbt_tuner.PBT", **arguments)
    result = check(tuner=tuner, maxTrialNumber=maximum)
    assert (result.status, len(findings(result, "warning"))) == (0, warns)
    assert (f"maxTrialNumber {maximum} is less than two steps" in result.stdout) == warns


def test_a_population_on_several_machines_needs_a_folder_of_all(check) -> None:
    machine = {"host": "worker", "user": "me", "password": "none"}
    far = {
        "trainingService": {"platform": "remote", "machineList": [machine, machine]},
        "nniManagerIp": "10.0.0.1",
    }
    (error,) = findings(check(tuner=own_tuner("pbt_tuner.PBT"), **far), "error")
    assert "all_checkpoint_dir" in error
    shared = own_tuner("pbt_tuner.PBT", all_checkpoint_dir="/mnt/all")
    assert not findings(check(tuner=shared, **far), "error")
    assert not findings(check(tuner=own_tuner("pbt_tuner.PBT")), "error")


NNI_TPE = {"name": "TPE", "classArgs": {"optimize_mode": "maximize"}}


def startup(tuner: dict[str, Any], number: Any) -> dict[str, Any]:
    arguments = {**tuner["classArgs"], "tpe_args": {"n_startup_jobs": number}}
    return {**tuner, "classArgs": arguments}


@pytest.mark.parametrize(
    ("tuner", "maximum", "random"),
    [
        (own_tuner("tpe_tuner.Tpe"), 10, 10),
        (own_tuner("tpe_tuner.Tpe"), 11, None),
        (own_tuner("tpe_tuner.Tpe"), None, None),
        (startup(own_tuner("tpe_tuner.Tpe"), 30), 30, 30),
        (startup(own_tuner("tpe_tuner.Tpe"), 3), 6, None),
        (NNI_TPE, 20, 20),
        (NNI_TPE, 21, None),
    ],
)
def test_a_search_that_is_random_to_its_end(check, tuner, maximum, random: int | None) -> None:
    result = check(tuner=tuner, maxTrialNumber=maximum)
    found = findings(result, "warning")
    assert (result.status, len(found)) == (0, random is not None)
    assert all(f"draws the first {random} trials at random" in text for text in found)


def test_nni_s_tpe_walks_a_grid_where_all_keys_are_choices(check) -> None:
    space = {"vt_dim": choice(32, 64, 96), "vt_depth": numbers("randint", 1, 9)}
    (warning,) = findings(check(tuner=NNI_TPE, searchSpace=space, maxTrialNumber=21), "warning")
    assert "grid" in warning and "className: tpe_tuner.Tpe" in warning
    (warning,) = findings(check(tuner=NNI_TPE, searchSpace=space, maxTrialNumber=20), "warning")
    assert "grid" not in warning
    assert not findings(check(searchSpace=space, maxTrialNumber=21), "warning")
    space["lr"] = numbers("loguniform", 1e-4, 1e-2)
    assert not findings(check(tuner=NNI_TPE, searchSpace=space, maxTrialNumber=21), "warning")


@pytest.mark.parametrize(
    ("tuner", "space", "message"),
    [
        (
            startup(NNI_TPE, 1),
            {"vt_dim": choice(32, 64)},
            "n_startup_jobs 1 does not go with gamma",
        ),
        (startup(NNI_TPE, 1), {"lr": numbers("uniform", 0, 1)}, None),
        (startup(NNI_TPE, 2), {"vt_dim": choice(32, 64)}, None),
        (startup(NNI_TPE, "x"), {"vt_dim": choice(32, 64)}, "TypeError"),
        (
            startup(own_tuner("tpe_tuner.Tpe"), 1),
            {"lr": choice(1)},
            "n_startup_jobs 1 does not go with",
        ),
        (own_tuner("hyperband_tuner.Hyperband", exec_mode="x"), {"lr": choice(1)}, "exec_mode is"),
        (own_tuner("nni_tuners.GP", utility="x"), {"lr": choice(1)}, "utility function x"),
    ],
)
def test_arguments_that_would_end_the_search(check, tuner, space, message: str | None) -> None:
    errors = findings(check(tuner=tuner, searchSpace=space), "error")
    assert len(errors) == bool(message) and all(message in text for text in errors)


@pytest.mark.parametrize("epochs", [(3, 9), (9, 3)])
def test_every_sample_is_tried_with_the_largest_budget(check, epochs: tuple[int, int]) -> None:
    tuner = {"codeDirectory": TUNERS, "className": "hyperband_tuner.Hyperband"}
    tuner["classArgs"] = {"optimize_mode": "maximize", "R": 9}
    result = check(tuner=tuner, searchSpace={"epochs": choice(*epochs)})
    assert result.status == 2
    (error,) = findings(result, "error")
    assert "stop_epoch (TRIAL_BUDGET) 9 is more than epochs 3" in error
    tuner["classArgs"]["R"] = 3
    result = check(tuner=tuner, searchSpace={"epochs": choice(*epochs)})
    (warning,) = findings(result, "warning")
    assert result.status == 0 and "largest budget 3 is less than epochs 9" in warning


def test_the_folder_of_our_tuners_is_told_from_where_the_file_is(check, tmp_path: Path) -> None:
    (error,) = findings(check(tuner={"name": "SMAC"}), "error")
    folder = re.search(r"codeDirectory: (\S+)", error)[1]
    assert (tmp_path / folder).samefile(TUNERS)


@pytest.mark.parametrize(
    ("tuner", "message"),
    [("hyperband_tuner.Hyperband", "NNI ignores one"), ("pbt_tuner.PBT", "PBT needs every trial")],
)
def test_no_assessor_beside_a_tuner_that_ends_trials_itself(
    check, tuner: str, message: str
) -> None:
    folder = str(REPOSITORY / "tuners")
    arguments = {"R": 3} if "Hyperband" in tuner else {"population_size": 2}
    arguments["optimize_mode"] = "maximize"
    result = check(
        assessor={"name": "Medianstop", "classArgs": {"start_step": 2}},
        tuner={"codeDirectory": folder, "className": tuner, "classArgs": arguments},
        trialCommand=f"{COMMAND} --epochs 3",
    )
    assert result.status == 2
    assert any(message in text for text in findings(result, "error"))


@pytest.mark.parametrize(
    ("tuner", "instead"),
    [
        ("Random", "tpe_tuner.Tpe"),
        ("TPE", "tpe_tuner.Tpe"),
        ("GridSearch", "nni_tuners.GridSearch"),
    ],
)
def test_a_choice_inside_of_choices_is_refused_for_nni_s_own(
    check, tuner: str, instead: str
) -> None:
    """They end at the first sample that lacks the outer one; one sample alone tells it by chance."""
    scheduler = choice(
        {"_name": "step", "gamma": numbers("uniform", 0.5, 0.9)}, {"_name": "cosine"}
    )
    optimizer = choice({"_name": "adamw"}, {"_name": "sgd", "scheduler": scheduler})
    arguments = {} if tuner == "Random" else {"optimize_mode": "maximize"}
    changes = {"searchSpace": {"optimizer": optimizer}, "maxTrialNumber": 9}
    result = check(tuner={"name": tuner, "classArgs": arguments}, **changes)
    (error,) = findings(result, "error")
    assert f"className: {instead}" in error and "optimizer/scheduler/gamma" in error
    ours = {
        "className": instead,
        "codeDirectory": TUNERS,
        "classArgs": {"optimize_mode": "maximize"},
    }
    assert not findings(check(tuner=ours, **changes), "error")


OWN_BATCH = {"className": "nni_tuners.Batch", "codeDirectory": TUNERS}


@pytest.mark.parametrize("tuner", [{"name": "BatchTuner"}, OWN_BATCH], ids=["NNI's", "ours"])
def test_batch_tuner_hands_out_whole_samples(check, tuner: dict[str, Any]) -> None:
    samples = [{"lr": 0.001, "vt_dim": 32}, {"lr": 0.01, "patch_num": 5}]
    space = {"all": choice(*samples)}
    result = check(tuner=tuner, searchSpace=space, maxTrialNumber=2)
    assert result.status == 0
    (warning,) = findings(result, "warning")
    assert "1 of 2 combinations cannot work" in warning and "patch_num 5" in warning
    assert check(tuner=tuner).status == 2
    assert check(tuner=tuner, searchSpace={"all": choice()}).status == 2


def test_nni_would_never_be_done_with_a_finite_search(check) -> None:
    space = {"vt_dim": choice(32, 64)}
    result = check(tuner={"name": "GridSearch"}, searchSpace=space)
    assert result.status == 0 and "never call the experiment done" in result.stdout
    ours = {"className": "nni_tuners.GridSearch", "codeDirectory": str(REPOSITORY / "tuners")}
    assert not findings(check(tuner=ours, searchSpace=space), "warning")


def test_own_tuner(check, tmp_path: Path) -> None:
    code = (
        "from nni.algorithms.hpo.random_tuner import RandomTuner\n"
        "class Mine(RandomTuner):\n"
        "    def __init__(self, optimize_mode='minimize'):\n"
        "        super().__init__()\n"
    )
    (tmp_path / "own_tuner_of_test.py").write_text(code)
    own = {"className": "own_tuner_of_test.Mine", "codeDirectory": "."}
    result = check(tuner=own)
    assert result.status == 2 and "lacks optimize_mode" in result.stdout
    assert check(tuner=own | {"classArgs": {"optimize_mode": "maximize"}}).status == 0


# --- files that NNI would not take ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"authorName": "me"}, "authorname"),
        ({"trialConcurrency": 0}, "trial_concurrency > 0"),
        ({"trialConcurrency": None}, "trial_concurrency is not set"),
        ({"trialConcurency": 1}, "did you mean trialConcurrency?"),
        ({"authorName": "me"}, "older keys need"),
        ({"trainingService": {"platform": "local", "activeGpu": 1}}, "mean useActiveGpu?"),
        ({"maxExperimentDuration": "7 days"}, "30m, 12h or 7d"),
        ({"trialCommand": None}, "trial_command"),
        ({"tuner": None}, "tuner must be set"),
        ({"useAnnotation": True, "searchSpace": None}, "useAnnotation ended"),
        ({"searchSpace": None}, "search_space and search_space_file must be set one"),
        ({"searchSpace": {}}, "no keys"),
        ({"searchSpace": [1]}, "no keys"),
        ({"searchSpace": None, "searchSpaceFile": "missing.json"}, "missing.json cannot be read"),
        ({"searchSpace": None, "searchSpaceFile": "broken.json"}, "broken.json is not JSON"),
        ({"trialCodeDirectory": "missing"}, "missing"),
        ({"trainingService": {"platform": "cloud"}}, "unknown platform"),
        ({"trainingService": None}, "trainingService is missing"),
        ({"trainingService": [{"platform": "local"}]}, "trainingService is missing, a list"),
        ({"trainingServicePlatform": "local", "trial": 3}, "config.yml"),
    ],
)
def test_invalid_experiments_are_one_line(check, tmp_path, changes, message: str) -> None:
    (tmp_path / "broken.json").write_text('{"lr": [')
    result = check(**changes)
    assert (result.status, result.stdout) == (2, "")
    assert message in result.stderr and result.stderr.startswith("main_vit.py: error: ")


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [", "\0", ""])
def test_files_that_are_no_experiment(run_main, tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yml").write_text(content)
    result = run_main("--check", tmp_path / "config.yml")
    assert (result.status, result.stdout, result.stderr.count("\n")) == (2, "", 1)


def test_missing_file(run_main, tmp_path: Path) -> None:
    result = run_main("--check", tmp_path / "config.yml")
    assert (result.status, result.stderr.count("\n")) == (2, 1)
    assert "No such file" in result.stderr


def test_old_keys_that_nni_drops_are_pointed_out(check, data, tmp_path) -> None:
    write_space(tmp_path)
    result = check(without_gpu_lines(data), maxTrialNums=10)
    assert result.status == 0
    (warning,) = findings(result, "warning")
    assert "maxTrialNums" in warning


def test_repeated_keys_are_named(check, tmp_path: Path) -> None:
    (tmp_path / "space.json").write_text(
        '{\n\t"lr": {"_type": "choice", "_value": [1]},'
        '\n\t"lr": {"_type": "choice", "_value": [0.1], "_value": [0.01]}\n}'
    )
    result = check(searchSpace=None, searchSpaceFile="space.json")
    assert result.status == 0
    names = [re.match(r"space.json has (\w+) 2 times", w)[1] for w in findings(result, "warning")]
    assert names == ["lr", "_value"]


def test_repeated_keys_of_the_experiment_are_named(check, run_main, tmp_path: Path) -> None:
    check()
    with (tmp_path / "config.yml").open("a") as file:
        file.write("trialConcurrency: 2\n")
    result = run_main("--check", tmp_path / "config.yml")
    (warning,) = findings(result, "warning")
    assert warning.startswith("config.yml has trialConcurrency 2 times")
    assert result.status == 0 and "2 at a time" in result.stdout


@pytest.mark.slow
def test_nothing_of_nni_is_printed_and_nothing_is_written(tmp_path: Path, run_main) -> None:
    result = run_main("--check", REPOSITORY / "config.yml", process=True)
    assert (result.status, result.stderr) == (0, "")
    assert not list(result.cwd.iterdir())


@pytest.mark.parametrize("options", [["--check", "config.yml"], ["--check=config.yml"]])
def test_a_report_of_which_not_all_is_read(options: list[str]) -> None:
    command = [sys.executable, "main_vit.py", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=REPOSITORY, **pipes) as process:
        process.stdout.close()
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (-signal.SIGPIPE, b"")
