"""Training in parts: budgets and members of a population, and the tuners that hand them out."""

import importlib
import itertools
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import advisor_guard
import pytest
import torch

import main_vit
import utils_vit
from check_vit import check
from config_vit import UsageError, resolve

# NNI's BOHB uses what ConfigSpace and statsmodels call old; that it still works is tested here.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
REPOSITORY = Path(__file__).resolve().parents[1]
TINY = [
    *("--image-size", 8, "--patch-size", 4, "--vt-dim", 16, "--vt-depth", 1, "--vt-heads", 2),
    *("--mlp-dim", 16, "--batch-size", 6, "--precision", "float32", "--dropout", 0.1),
    *("--moving-average-decay", 0.9, "--threads", 1),
]
SPACE = {
    "lr": {"_type": "loguniform", "_value": [1e-4, 1e-1]},
    "depth": {"_type": "quniform", "_value": [1, 9, 2]},
    "heads": {"_type": "randint", "_value": [1, 5]},
    "noise": {"_type": "normal", "_value": [0, 1]},
    "optimizer": {
        "_type": "choice",
        "_value": [{"_name": "sgd", "momentum": {"_type": "uniform", "_value": [0, 1]}}, {"_name": "adam"}],
    },
}  # fmt: skip
ADVISORS = [
    ("hyperband_tuner.Hyperband", {"R": 9}),
    ("hyperband_tuner.Hyperband", {"R": 9, "exec_mode": "serial"}),
    ("bohb_tuner.BOHB", {"max_budget": 9, "num_samples": 4}),
]


@pytest.fixture(autouse=True)
def as_a_trial_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to the bit is what a CPU promises; tuners/ is where NNI would find its modules."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.syspath_prepend(str(REPOSITORY / "tuners"))


def assert_same_run(one: Path, other: Path, read_lines: Callable[[Path], Any]) -> None:
    """Weights, averages, optimizer and metrics are equal to the bit."""
    assert read_lines(one) == read_lines(other)
    for name in ("checkpoint.pth.tar", "model_best.pth.tar"):
        a, b = (utils_vit.load_checkpoint(folder / name) for folder in (one, other))
        assert a["step"] == b["step"]
        for part in ("model", "ema"):
            assert all(torch.equal(a[part][key], b[part][key]) for key in a[part])
        states = [[*state["optimizer"]["state"].values()] for state in (a, b)]
        for mine, theirs in zip(*states, strict=True):
            assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.fixture
def train(image_folder: Path, tmp_path: Path, run_main: Callable[..., Any]) -> Callable[..., Any]:
    """train("a", budget, ...) is the trial of tmp_path/trials/a that NNI gave this budget, or none."""

    def run(name: str, budget: int | None, *options: Any, **parameters: Any) -> Any:
        folder = tmp_path / "trials" / name
        folder.mkdir(parents=True, exist_ok=True)
        stop = ["--stop-epoch", budget] if budget else []
        if budget:
            record = {"parameters": {"lr": 0.01, **parameters, "TRIAL_BUDGET": budget}}
            (folder / "nni.json").write_text(json.dumps(record))
        place = ["--download-dir", image_folder, "--model-dir", folder]
        return run_main(*TINY, *place, "--lr", 0.01, "--epochs", 4, *stop, *options)

    return run


def test_a_population_may_begin_with_weights(train, tmp_path: Path) -> None:
    """Its first step is from --init-from, the next from what that left."""
    assert train("weights", None, "--epochs", 1).status == 0
    best, population = tmp_path / "trials/weights/model_best.pth.tar", tmp_path / "population"
    options = ["--epochs", 1, "--init-from", best, "--load-checkpoint-dir", population]
    first = train("first", None, *options, "--save-checkpoint-dir", population)
    assert first.status == 0 and f"init-from {best}: all weights as they were" in first.stdout
    second = train("second", None, *options)
    assert "after epoch 1" in second.stdout and "init-from" not in second.stdout


def test_a_promoted_trial_goes_on(train, tmp_path: Path, read_lines) -> None:
    """Epochs 1 to 2 in one trial and 3 to 4 in another give what 1 to 4 give; the first is as it was."""
    trials = tmp_path / "trials"
    assert train("first", 2).status == 0
    assert train("stranger", 2, "--seed", 1, seed=1).status == 0
    before = {file: file.read_bytes() for file in (trials / "first").iterdir() if file.is_file()}
    later, whole = train("later", 4), train("whole", None)
    assert "continued from trial first, which ended after epoch 2" in later.stdout
    assert "epoch   3/4" in later.stdout and "epoch   2/4" not in later.stdout
    assert "epoch   1/4" in whole.stdout
    assert_same_run(trials / "later", trials / "whole", read_lines)
    assert all(file.read_bytes() == content for file, content in before.items())
    shared = [f for f in (trials / "later").iterdir() if f.is_file() and f.stat().st_nlink > 1]
    assert not [f for f in shared if any(f.samefile(other) for other in before)]


@pytest.mark.parametrize("fault", ["damaged", "unfinished", "other epochs"])
@pytest.mark.slow
def test_from_the_start_unless_the_earlier_trial_is_whole(
    fault: str, train, tmp_path: Path, read_lines
) -> None:
    """Said in the log, and the result is the same."""
    first = tmp_path / "trials/first"
    train("first", 2, *(["--epochs", 6] if fault == "other epochs" else []))
    if fault == "damaged":
        (first / "checkpoint.pth.tar").write_bytes(b"x")
    elif fault == "unfinished":
        (first / "results.json").unlink()
    later = train("later", 4)
    assert later.status == 0
    assert "not continued from trial first: " in later.stdout and "epoch   1/4" in later.stdout
    train("whole", None)
    assert_same_run(tmp_path / "trials/later", tmp_path / "trials/whole", read_lines)


def test_members_of_a_population(train, tmp_path: Path, image_folder: Path) -> None:
    """Each goes on from the folder it is told, with its own rate and decay, and leaves its checkpoint."""
    folders = [tmp_path / "population" / str(step) for step in range(3)]
    (tmp_path / "wrong").mkdir()
    first = [
        "--epochs",
        2,
        "--save-checkpoint-dir",
        folders[0],
        "--load-checkpoint-dir",
        folders[0],
    ]
    train("first", None, *first)
    second = ["--load-checkpoint-dir", folders[0], "--save-checkpoint-dir", folders[1]]
    own = ["--lr", 0.02, "--weight-decay", 0.3, "--batch-size", 9]
    result = train("second", None, "--epochs", 2, *second, *own)
    assert "after epoch 2" in result.stdout and "epoch   4/4" in result.stdout
    states = [utils_vit.load_checkpoint(folder / "checkpoint.pth.tar") for folder in folders[:2]]
    assert [state["step"] for state in states] == [2 * 6, 4 * 4]  # of 36 images
    assert [group["weight_decay"] for group in states[1]["optimizer"]["param_groups"]] == [0.3, 0]
    assert states[1]["best"]["epoch"] in (3, 4)  # what it can do now, not what it once could
    # Killed between its last checkpoint and its end, it does not go on from what it left itself.
    (tmp_path / "trials/first/results.json").unlink()
    again = train("first", None, *first, "--auto-resume")
    assert again.status == 0 and "epoch   3" not in again.stdout
    (tmp_path / "trials/first/metrics.jsonl").unlink()  # NNI alone would be told of its last line
    assert "this run is finished" in train("first", None, *first, "--auto-resume").stdout
    assert train("third", None, "--epochs", 2, *second, "--vt-dim", 8).status == 2
    states[0]["args"]["batch_size"] = 0
    utils_vit.save_checkpoint(states[0], False, tmp_path / "wrong" / "checkpoint.pth.tar")
    result = train("wrong", None, "--epochs", 2, "--load-checkpoint-dir", tmp_path / "wrong")
    assert result.status == 2 and "batch-size: 0 is not at least 1" in result.stderr
    # Another seed may hold out images that these weights were trained on.
    result = train("fourth", None, "--epochs", 2, *second, "--seed", 7)
    assert result.status == 2 and "other parameters: seed 0 -> 7" in result.stderr
    (image_folder / "train/cat/000.png").unlink()  # draws what is held out of its class anew
    result = train("fifth", None, "--epochs", 2, *second)
    assert result.status == 2 and "images that are held out now" in result.stderr


def test_a_member_may_get_the_first_momentum(train, tmp_path: Path) -> None:
    """torch's rmsprop makes the buffers of a momentum at its first step only, and fails for want of them later."""
    folder = tmp_path / "population"
    share = ["--epochs", 1, "--optimizer", "rmsprop", "--load-checkpoint-dir", folder]
    first = train("first", None, *share, "--momentum", 0, "--save-checkpoint-dir", folder)
    second = train("second", None, *share, "--momentum", 0.9)
    assert (first.status, second.status) == (0, 0), second.stderr
    assert "continued from" in second.stdout


@pytest.mark.parametrize("precisions", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_member_may_get_another_precision(
    precisions: tuple[str, str], train, tmp_path: Path
) -> None:
    """That of auto follows from the batch size, which PBT may change."""
    folder = tmp_path / "population"
    share = ["--epochs", 1, "--load-checkpoint-dir", folder, "--save-checkpoint-dir", folder]
    for name, precision in zip(("first", "second"), precisions, strict=True):
        result = train(name, None, *share, "--precision", precision)
        assert result.status == 0, result.stderr
    assert "continued from" in result.stdout


def test_a_member_that_could_leave_no_checkpoint(train, tmp_path: Path) -> None:
    """Is told so before it trains, not after."""
    (tmp_path / "file").touch()
    result = train("first", None, "--save-checkpoint-dir", tmp_path / "file" / "0")
    assert result.status == 2 and "epoch" not in result.stdout
    assert f"save_checkpoint_dir {tmp_path}/file/0 cannot be made: Not a directory" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--epochs 9 --stop-epoch 27", "give --epochs the largest budget"),
        ("--load-checkpoint-dir x --scheduler cosine", "without an end for a cosine"),
        ("--load-checkpoint-dir x --max-steps 9", "max_steps contradicts"),
    ],
)
def test_budgets_that_cannot_be(options: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(main_vit.make_parser(), options.split())


def test_what_nni_gives() -> None:
    """Names of NNI as they stand; without a word on it, the rate is constant under PBT."""
    args = resolve(main_vit.make_parser(), ["--epochs", "9"], {"TRIAL_BUDGET": 3})
    assert (args.stop_epoch, args.epochs, args.scheduler) == (3, 9, "cosine")
    args = resolve(main_vit.make_parser(), [], {"load_checkpoint_dir": "x"})
    assert args.scheduler == "constant"


# --- the tuners ----------------------------------------------------------------------------------


def make(tuner: str, **arguments: Any) -> Any:
    """A tuner of tuners/, by its className, whose commands to NNI's manager are kept in `sent`."""
    module, _, name = tuner.partition(".")
    base = getattr(importlib.import_module(module), name)

    class Kept(base):
        def send(self, command: Any, data: str) -> None:
            if command.name == "NewTrialJob":
                self.sent.append(json.loads(data))

    advisor = Kept(**arguments)
    advisor.sent = []
    advisor.handle_initialize(SPACE)
    advisor.handle_request_trial_jobs(2)
    return advisor


def run_trials(advisor: Any, count: int, failing: float = 0) -> Iterator[tuple[dict, bool]]:
    """Trials, some of which fail, some after a final result, with odd messages of others in between."""
    rng = random.Random(0)
    for number in range(count):
        assert advisor.sent, f"no trial is left after {number}"
        job = advisor.sent.pop(0)
        value = {"default": -abs(job["parameters"]["lr"] - 0.01)}
        succeeds = rng.random() >= failing
        finals = [value] * rng.choice([1, 2]) if succeeds or rng.random() < 0.5 else []
        for final in [float("nan"), "text", None, *finals]:
            for parameter_id in ("9-9_9_9", None, 7, job["parameter_id"]):
                report = {"parameter_id": parameter_id, "value": json.dumps(final)}
                report |= {"type": "FINAL", "sequence": 0, "trial_job_id": f"trial{number}"}
                advisor.handle_report_metric_data(report)
        end = {"event": "SUCCEEDED" if succeeds else "FAILED", "trial_job_id": f"trial{number}"}
        for _ in range(2):
            advisor.handle_trial_end(end | {"hyper_params": json.dumps(job)})
        advisor.handle_request_trial_jobs(1)
        yield job, succeeds


@pytest.mark.parametrize("failing", [0, 0.4, 0.7, 0.9, 1])
@pytest.mark.parametrize(("tuner", "arguments"), ADVISORS)
def test_a_bracket_survives_its_trials(tuner: str, arguments: dict, failing: float) -> None:
    """There is always a next trial, and what is promoted has succeeded in the round before."""
    succeeded: set[str] = set()
    budgets = Counter()
    for job, succeeds in run_trials(make(tuner, seed=1, **arguments), 40, failing):
        parameters = dict(job["parameters"])
        budgets[parameters.pop("TRIAL_BUDGET")] += 1
        bracket_round = int(job["parameter_id"].split("_")[1])
        assert not bracket_round or json.dumps(parameters) in succeeded
        if succeeds:
            succeeded.add(json.dumps(parameters))
        assert 1 <= parameters["depth"] <= 9 and parameters["heads"] in (1, 2, 3, 4)
        optimizer = parameters["optimizer"]
        assert ("momentum" in optimizer) == (optimizer["_name"] == "sgd")
    assert set(budgets) == {1, 3, 9}
    if not failing and arguments.get("exec_mode") != "serial":
        assert budgets[1] > budgets[9]


@pytest.mark.parametrize("tuner", ["hyperband_tuner.Hyperband", "bohb_tuner.BOHB"])
def test_two_of_a_first_round_are_left(tuner: str) -> None:
    """One of them comes to the full budget, and the next bracket begins."""
    name = "R" if "Hyperband" in tuner else "max_budget"
    advisor, budgets = make(tuner, seed=0, **{name: 9}), Counter()
    for number in range(40):
        assert advisor.sent, f"no trial is left after {number}"
        job = advisor.sent.pop(0)
        first = job["parameter_id"].split("_")[1] == "0"
        fails = number < 9 and first and number >= 2
        budgets[job["parameters"]["TRIAL_BUDGET"]] += 1
        if not fails:
            report = {"parameter_id": job["parameter_id"], "value": json.dumps(number)}
            report |= {"type": "FINAL", "sequence": 0, "trial_job_id": f"trial{number}"}
            advisor.handle_report_metric_data(report)
        end = {"event": "FAILED" if fails else "SUCCEEDED", "trial_job_id": f"trial{number}"}
        advisor.handle_trial_end(end | {"hyper_params": json.dumps(job)})
        advisor.handle_request_trial_jobs(1)
    assert budgets[9] >= 1, budgets


@pytest.mark.parametrize(("tuner", "arguments"), ADVISORS)
def test_a_seed_repeats_the_trials(tuner: str, arguments: dict) -> None:
    runs = [
        [job["parameters"] for job, _ in run_trials(make(tuner, seed=3, **arguments), 20)]
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(("tuner", "arguments"), ADVISORS)
def test_a_resume_draws_other_configurations(
    tuner: str, arguments: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the seed of the start it would spend trials on what is known."""
    before = [job["parameters"] for job in make(tuner, seed=3, **arguments).sent]
    resumed = advisor_guard.dispatcher_env_vars._replace(NNI_MODE="resume")
    monkeypatch.setattr(advisor_guard, "dispatcher_env_vars", resumed)
    after = [job["parameters"] for job in make(tuner, seed=3, **arguments).sent]
    assert len(before) == len(after) == 2
    assert not [parameters for parameters in after if parameters in before]


def test_bohb_searches_a_choice_inside_of_choices() -> None:
    """NNI's own form of a search space raises KeyError where the choice around it was not drawn."""
    from bohb_tuner import Generator

    def choice(*options: dict[str, Any]) -> dict[str, Any]:
        return {"_type": "choice", "_value": list(options)}

    decay = choice({"_name": "none"}, {"_name": "some", "rate": SPACE["lr"]})
    space = {"optimizer": choice({"_name": "sgd"}, {"_name": "adam", "decay": decay})}
    generator = Generator(
        space, 1, min_points_in_model=None, top_n_percent=15, num_samples=4,
        random_fraction=1, bandwidth_factor=3, min_bandwidth=1e-3,
    )  # fmt: skip
    names = set()
    for loss in range(20):
        parameters = generator.get_config(1)
        generator.new_result(loss, parameters.pop("TRIAL_BUDGET"), parameters)
        optimizer = parameters["optimizer"]
        names.add((optimizer["_name"], optimizer.get("decay", {}).get("_name")))
    assert names == {("sgd", None), ("adam", "none"), ("adam", "some")}
    assert len(generator.configs[1]) == 20


@pytest.mark.parametrize("random_fraction", [0.3, 1])
def test_bohb_draws_no_configuration_twice(random_fraction: float) -> None:
    """NNI's fills whole brackets with one of choices: its halving then compares nothing."""
    from bohb_tuner import Generator

    space = {name: {"_type": "choice", "_value": [*range(6)]} for name in ("a", "b", "c")}
    generator = Generator(
        space, 1, min_points_in_model=None, top_n_percent=15, num_samples=4,
        random_fraction=random_fraction, bandwidth_factor=3, min_bandwidth=1e-3,
    )  # fmt: skip
    seen = set()
    if random_fraction == 1:  # results of before a resume
        seen = {values for values in itertools.product(range(6), repeat=3) if sum(values) % 2}
        for values in seen:
            generator.new_result(0, 1, dict(zip(space, values, strict=True)))
    known = len(seen)
    for _ in range(60):  # of 216, or of the 108 that are left
        parameters = generator.get_config(1)
        budget = parameters.pop("TRIAL_BUDGET")
        seen.add(tuple(parameters.values()))
        generator.new_result(sum(parameters.values()), budget, parameters)
    assert len(seen) == known + 60


def test_bohb_learns_by_budget() -> None:
    """NNI's own files all under budget 0; a failure counts as the worst; resumed results count too."""
    advisor = make("bohb_tuner.BOHB", seed=1, max_budget=9)
    assert all(succeeds for _, succeeds in run_trials(advisor, 22))
    assert {budget: len(points) for budget, points in advisor.cg.configs.items()} == {
        1: 9,
        3: 8,
        9: 5,
    }
    entry = {"parameter": {**advisor.sent[0]["parameters"], "TRIAL_BUDGET": 9}}
    results = [{"default": 0.5}, json.dumps({"default": 0.5}), None, float("nan")]
    advisor.handle_import_data([entry | {"value": value} for value in results])
    assert len(advisor.cg.configs[9]) == 7
    worst = make("bohb_tuner.BOHB", seed=1, max_budget=9)
    outcomes = [succeeds for _, succeeds in run_trials(worst, 9, 0.5)]
    assert len(worst.cg.losses[1]) == len(outcomes)
    assert worst.cg.losses[1].count(float("inf")) <= outcomes.count(False)
    assert float("inf") in worst.cg.losses[1]


@pytest.mark.parametrize("failing", [0, 0.5, 1])
def test_a_population_survives_its_trials(failing: float, tmp_path: Path) -> None:
    """Only checkpoints that a trial left are gone on from, and the worst take over a better one's."""
    module = importlib.import_module("pbt_tuner")
    arguments = {"all_checkpoint_dir": str(tmp_path), "population_size": 4, "fraction": 0.25}
    tuner = module.PBT(seed=1, **arguments)
    space = {
        "lr": {"_type": "loguniform", "_value": [1e-4, 1]},
        "flip": {"_type": "choice", "_value": ["none", "both"]},
    }
    tuner.update_search_space(space)
    rng, queue, left, done = random.Random(0), [], set(), []

    def ask(first: int, count: int) -> None:
        ids = list(range(first, first + count))
        new = tuner.generate_multiple_parameters(ids, st_callback=lambda *job: queue.append(job))
        queue.extend(zip(ids, new, strict=False))

    ask(0, 2)
    for number in range(24):
        assert queue, f"no trial is left after {number}"
        parameter_id, parameters = queue.pop(0)
        step = int(Path(parameters["save_checkpoint_dir"]).name)
        assert 1e-4 <= parameters["lr"] <= 1
        load = parameters["load_checkpoint_dir"]
        assert load in left or step == 0 or failing, "of a trial that left nothing"
        if rng.random() >= failing:
            left.add(parameters["save_checkpoint_dir"])
            tuner.receive_trial_result(parameter_id, parameters, {"default": parameters["lr"]})
            done.append((parameters, parameters["lr"]))
        for value in ({"default": float("nan")}, "text", 0.5):
            tuner.receive_trial_result(parameter_id if value != 0.5 else 999, parameters, value)
        tuner.trial_end(parameter_id, rng.random() > failing)
        ask(number + 2, 1)
    assert step == 5
    if not failing:
        assert {load for (p, _) in done[4:8] if (load := p["load_checkpoint_dir"])} < left
        resumed = module.PBT(seed=1, **arguments)
        resumed.update_search_space(space)
        for folder in left:
            Path(folder).mkdir(parents=True)
        data = [{"parameter": p, "value": {"default": value}} for p, value in done[:-2]]
        resumed.import_data(data)
        assert resumed.epoch == 5
        assert all(m.hyper_parameters["load_checkpoint_dir"] in left for m in resumed.population)


def test_a_population_resumes_beside_a_result_without_a_number(tmp_path: Path) -> None:
    """Such an entry counts as a member that failed; a plain 0 is a result like any other."""
    from pbt_tuner import PBT

    tuner = PBT(all_checkpoint_dir=str(tmp_path), population_size=2, seed=0)
    tuner.update_search_space({"lr": {"_type": "uniform", "_value": [0.1, 0.2]}})
    entries = []
    for member, value in enumerate([{"loss": 1.0}, 0]):
        folder = Path(tuner.population[member].checkpoint_dir) / "0"
        folder.mkdir(parents=True)
        entries.append(
            {"parameter": {"lr": 0.15, "save_checkpoint_dir": str(folder)}, "value": value}
        )
    tuner.import_data(entries)
    assert tuner.epoch == 1
    left = entries[1]["parameter"]["save_checkpoint_dir"]  # both go on from the one with a result
    assert {trial.hyper_parameters["load_checkpoint_dir"] for trial in tuner.population} == {left}


def test_a_population_of_which_no_share_is_replaced(tmp_path: Path) -> None:
    """With `fraction: 0` every member goes on by itself, but for one that failed."""
    module = importlib.import_module("pbt_tuner")
    tuner = module.PBT(
        seed=1, all_checkpoint_dir=str(tmp_path), population_size=3, fraction=0, factor=0
    )
    tuner.update_search_space({"lr": SPACE["lr"]})

    def step(first: int, *values: float | None) -> list[dict[str, Any]]:
        ids = list(range(first, first + 3))
        trials = tuner.generate_multiple_parameters(ids, st_callback=None)
        for parameter_id, parameters, value in zip(ids, trials, values, strict=True):
            if value is not None:
                tuner.receive_trial_result(parameter_id, parameters, {"default": value})
            tuner.trial_end(parameter_id, value is not None)
        return trials

    def came_from(trials: list[dict[str, Any]]) -> set[tuple[str, float]]:
        return {(trial["load_checkpoint_dir"], trial["lr"]) for trial in trials}

    def left(trials: list[dict[str, Any]]) -> set[tuple[str, float]]:
        return {(trial["save_checkpoint_dir"], trial["lr"]) for trial in trials}

    first = step(0, 1, 2, 3)
    second = step(3, 3, None, 2)
    assert came_from(second) == left(first)
    third = step(6, 1, 1, 1)
    kept = [second[0], second[2]]
    assert came_from(third) >= left(kept)
    loaded = [trial["load_checkpoint_dir"] for trial in third]
    assert loaded.count(second[0]["save_checkpoint_dir"]) == 2
    assert len({trial["save_checkpoint_dir"] for trial in third}) == 3


def test_a_seed_repeats_a_population(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New values too; of two experiments that were given one folder each has its own in it."""
    module, runs = importlib.import_module("pbt_tuner"), []
    for experiment in ("one", "two"):
        monkeypatch.setenv("NNI_CHECKPOINT_DIRECTORY", f"/home/nni/{experiment}/checkpoint")
        tuner = module.PBT(
            seed=1, all_checkpoint_dir=str(tmp_path), population_size=4, fraction=0.5
        )
        tuner.update_search_space({"lr": SPACE["lr"], "noise": SPACE["noise"]})
        seen = []
        for first in range(0, 24, 4):
            ids = [*range(first, first + 4)]
            trials = tuner.generate_multiple_parameters(ids, st_callback=None)
            for i, parameters in zip(ids, trials, strict=True):
                place = Path(parameters.pop("save_checkpoint_dir"))
                assert place.is_relative_to(tmp_path / experiment)
                seen.append(parameters["lr"])
                tuner.receive_trial_result(i, parameters, {"default": parameters["lr"]})
        runs.append(seen)
    assert runs[0] == runs[1] and len(set(runs[0])) > 5


def test_a_population_under_way_keeps_its_search_space(tmp_path: Path) -> None:
    """A choice without the value that a member has ended the tuner at the next step."""
    population = {"all_checkpoint_dir": str(tmp_path), "population_size": 4, "seed": 1}
    tuner = importlib.import_module("pbt_tuner").PBT(**population)
    sizes = [16, 32, 64]
    tuner.update_search_space({"batch_size": {"_type": "choice", "_value": sizes}})
    jobs = [(i, tuner.generate_parameters(i)) for i in range(4)]
    tuner.update_search_space({"batch_size": {"_type": "choice", "_value": [8]}})
    for number, parameters in jobs:
        tuner.receive_trial_result(number, parameters, {"default": number})
        tuner.trial_end(number, True)
    assert all(tuner.generate_parameters(4 + i)["batch_size"] in sizes for i in range(4))


def test_a_population_of_other_values_than_numbers_is_refused() -> None:
    tuner = importlib.import_module("pbt_tuner").PBT(all_checkpoint_dir="x")
    with pytest.raises(ValueError, match="nested choice optimizer"):
        tuner.update_search_space(SPACE)


# --- --check -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("hyperband", "R: 9 ", "R: 27 ", "27 is more than epochs 9"),
        ("hyperband", "R: 9 ", "R: 3 ", "largest budget 3 is less than epochs 9"),
        ("bohb", "max_budget: 9", "max_budget: 10", "10 is more than epochs 9"),
        ("bohb", "eta: 3", "eta: 1", "eta >= 2"),
        ("pbt", "affine: {_type: uniform, _value: [0.0, 0.3]}", "vt_dim: {_type: choice, _value: [16, 32]}", "vt_dim cannot change"),
        ("pbt", "--epochs 3", "--epochs 3 --warmup-epochs 1", "warmup_epochs has no effect"),
    ],
)  # fmt: skip
def test_check_of_budgets(
    name: str, old: str, new: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    text = (REPOSITORY / f"examples/tuners/{name}.yml").read_text()
    assert old in text
    text = text.replace(old, new).replace("../..", str(REPOSITORY))
    (tmp_path / "config.yml").write_text(text)
    status = check(tmp_path / "config.yml", main_vit.make_parser())
    output = capsys.readouterr().out
    assert message in output and status == (2 if "error: " in output else 0)


def test_check_names_the_installation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in [*sys.modules]:
        if name.startswith(("bohb_tuner", "nni.algorithms.hpo.bohb_advisor")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "statsmodels", None)
    monkeypatch.setitem(sys.modules, "statsmodels.api", None)
    assert check(REPOSITORY / "examples/tuners/bohb.yml", main_vit.make_parser()) == 2
    assert "pip install ConfigSpace statsmodels" in capsys.readouterr().out
