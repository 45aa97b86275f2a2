"""Checkpoints, optimizers, schedules, EMA and the training state, each by itself."""

import math
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import top_k_accuracy_score
from torch import nn

import utils_vit
import vit
from step_vit import make_optimizer
from utils_vit import (
    CheckpointError,
    Ema,
    TrainingState,
    accuracy,
    adjust_learning_rate,
    load_checkpoint,
    save_checkpoint,
    seed_for,
    selected_weights,
)

REPOSITORY = Path(utils_vit.__file__).parent
EMPTY = {
    "format": 1, "model": {}, "ema": None, "optimizer": {}, "outputs": {}, "best": None, "epoch": 0,
    "step": 0, "validated": 0, "args": {}, "classes": [],
}  # fmt: skip
OPTIMIZERS = ["adam", "adamw", "sgd", "rmsprop"]


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return vit.ViT(
        image_size=8, patch_size=4, num_classes=3, dim=16, depth=1, heads=2, mlp_dim=32, dim_head=8
    )


def small_state(ema_decay: float | None = 0.9, optimizer: str = "adamw") -> TrainingState:
    model = small_model()
    return TrainingState(model, make_optimizer(optimizer, model, 1e-2, 0.1, 0.9), ema_decay)


def take_steps(state: TrainingState, count: int) -> None:
    for _ in range(count):
        torch.manual_seed(seed_for("step", state.step))
        images, targets = torch.randn(6, 3, 8, 8), torch.randint(3, (6,))
        logits = state.model(images)
        loss = nn.functional.cross_entropy(logits, targets)
        state.optimizer.zero_grad()
        loss.backward()
        state.optimizer.step()
        state.step += 1
        if state.ema:
            state.ema.update(state.step)
        state.outputs.append((loss.detach(), logits.argmax(dim=1), targets))


def assert_equal(one: object, other: object) -> None:
    """To the bit, through dictionaries, lists and tuples."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


# --- checkpoints ------------------------------------------------------------------------------------


def test_best_is_beside_last_and_survives_later_saves(tmp_path: Path) -> None:
    last, best = tmp_path / "checkpoint.pth.tar", tmp_path / "model_best.pth.tar"
    for step, is_best in ((1, False), (2, True), (3, False), (4, True), (5, False)):
        save_checkpoint(EMPTY | {"step": step}, is_best, last)
        assert load_checkpoint(last)["step"] == step
        assert best.exists() == (step >= 2)
        if step >= 2:
            assert load_checkpoint(best)["step"] == step - step % 2
            assert load_checkpoint(tmp_path / "previous.pth.tar")["step"] == step - 1
    assert sorted(os.listdir(tmp_path)) == [last.name, best.name, "previous.pth.tar"]


def test_a_disk_that_fills_up_keeps_the_old_file(tmp_path: Path) -> None:
    code = f"""if True:
        import resource, sys, torch
        from utils_vit import save_checkpoint
        save_checkpoint({EMPTY}, True, sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            save_checkpoint({{"weights": torch.zeros(100_000)}}, True, sys.argv[1])
        except OSError as error:
            print(error.strerror)
    """
    file = tmp_path / "checkpoint.pth.tar"
    command = [sys.executable, "-c", code, str(file)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.stdout == "File too large\n", done.stderr
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.pth.tar", "model_best.pth.tar"]
    assert load_checkpoint(file)["step"] == load_checkpoint(tmp_path / "model_best.pth.tar")["step"]


def test_a_writer_that_is_killed_keeps_the_old_file(tmp_path: Path) -> None:
    """At any time the name leads to a whole file: it is read while another process rewrites it."""
    code = f"""if True:
        import sys, torch
        from utils_vit import save_checkpoint
        weights = torch.arange(300_000)
        for step in range(1_000_000):
            news = {{"step": step, "weights": weights + step}}
            save_checkpoint({EMPTY} | news, True, sys.argv[1])
            print(step, flush=True)
    """
    file = tmp_path / "checkpoint.pth.tar"
    command = [sys.executable, "-c", code, str(file)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"0\n"
        for name in [file.name, "model_best.pth.tar"] * 15:
            state = load_checkpoint(tmp_path / name)
            assert state["weights"][0] == state["step"]
        process.kill()
    for name in (file.name, "model_best.pth.tar"):
        assert load_checkpoint(tmp_path / name)["weights"].shape == (300_000,)


class Payload:
    """What a hostile file would hold: unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


def test_load_checkpoint_refuses(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with pytest.raises(CheckpointError, match="file does not exist"):
        load_checkpoint(file)
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        load_checkpoint(tmp_path)
    save_checkpoint(EMPTY | {"weights": torch.zeros(1000)}, False, file)
    load_checkpoint(file)
    whole = file.read_bytes()
    for content in (whole[:-100], whole[:2000], b"", b"just text\n", whole.replace(b"PK", b"xx")):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged or was not written by main_vit.py"):
            load_checkpoint(file)
    lacking = [{k: v for k, v in EMPTY.items() if k != name} for name in EMPTY]
    wrong = [EMPTY | {name: "text"} for name in EMPTY]
    for foreign in ([1, 2], torch.zeros(3), EMPTY | {"format": 99}, *lacking, *wrong):
        save_checkpoint(foreign, False, file)
        with pytest.raises(CheckpointError, match="was not written by main_vit.py"):
            load_checkpoint(file)


@pytest.mark.parametrize("how", ["pickle", "torch", "old torch"])
def test_load_checkpoint_runs_no_code(how: str, tmp_path: Path) -> None:
    state = {"format": 1, "model": Payload(tmp_path / "ran")}
    if how == "pickle":
        (tmp_path / "file").write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, tmp_path / "file", _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(CheckpointError, match="damaged or was not written"):
        load_checkpoint(tmp_path / "file")
    assert not (tmp_path / "ran").exists()


# --- the training state -----------------------------------------------------------------------------


@pytest.mark.parametrize("ema_decay", [None, 0.9])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_goes_through_a_file_to_the_bit(
    optimizer: str, ema_decay: float | None, tmp_path: Path
) -> None:
    state, copy = small_state(ema_decay, optimizer), small_state(ema_decay, optimizer)
    take_steps(state, 3)
    state.best = {"epoch": 1, "val_accuracy": 50.0, "val_auc": None}
    save_checkpoint(EMPTY | state.state_dict(), False, tmp_path / "file")
    copy.load_state_dict(load_checkpoint(tmp_path / "file"))
    assert_equal(copy.state_dict(), state.state_dict())
    take_steps(state, 2)
    take_steps(copy, 2)
    assert_equal(copy.state_dict(), state.state_dict())


def test_outputs_of_many_steps_are_few_entries_of_a_file(tmp_path: Path) -> None:
    """NNI waits five seconds for a trial that it stops, and an epoch can have 40,000 steps."""
    state, copy = small_state(), small_state()
    take_steps(state, 1)
    save_checkpoint(EMPTY | state.state_dict(), False, tmp_path / "one")
    state.outputs *= 1000
    save_checkpoint(EMPTY | state.state_dict(), False, tmp_path / "thousand")
    with zipfile.ZipFile(tmp_path / "one") as one, zipfile.ZipFile(tmp_path / "thousand") as other:
        assert len(one.namelist()) == len(other.namelist())
    copy.load_state_dict(load_checkpoint(tmp_path / "thousand"))
    assert_equal(copy.outputs, state.outputs)


def test_outputs_of_an_older_checkpoint_are_understood() -> None:
    """It holds the logits where predictions are now."""
    state, copy = small_state(), small_state()
    take_steps(state, 2)
    saved = state.state_dict()
    logits = [nn.functional.one_hot(predicted, 3).float() for _, predicted, _ in state.outputs]
    saved["outputs"] = [(o[0], own, o[2]) for o, own in zip(state.outputs, logits, strict=True)]
    copy.load_state_dict(saved)
    assert_equal(copy.outputs, state.outputs)


def test_state_of_another_model_or_optimizer_is_refused() -> None:
    saved = small_state().state_dict()
    other = TrainingState(nn.Linear(3, 3), torch.optim.SGD(nn.Linear(3, 3).parameters()), None)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        other.load_state_dict(saved)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        small_state(ema_decay=0.9).load_state_dict(small_state(ema_decay=None).state_dict())


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_selected_weights_are_the_averaged_ones(ema_decay: float | None) -> None:
    state = small_state(ema_decay)
    take_steps(state, 2)
    assert_equal(selected_weights(state.state_dict()), state.selected_model.state_dict())
    assert (state.selected_model is state.model) == (ema_decay is None)
    same = torch.equal(state.selected_model.head.weight, state.model.head.weight)
    assert same == (ema_decay is None)


def test_ema_is_warmed_up_and_follows() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    nn.init.zeros_(model[0].weight)
    ema = Ema(model, decay=0.5)
    nn.init.ones_(model[0].weight)
    model[1].running_mean.fill_(7.0)
    expected = 0.0
    for step in range(1, 30):
        decay = min(0.5, (1 + step) / (10 + step))  # 2/11, 3/12, ... up to 0.5 from step 8 on
        expected = decay * expected + (1 - decay)
        ema.update(step)
        assert ema.model[0].weight.item() == pytest.approx(expected, rel=1e-6)
    assert ema.model[1].running_mean.item() == 7.0
    assert not ema.model[0].weight.requires_grad and not ema.model.training
    assert model[0].weight.requires_grad and model[0].weight.item() == 1.0


# --- optimizers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_is_on_matrices_only(name: str) -> None:
    model = small_model()
    optimizer = make_optimizer(name, model, 0.03, 0.2, 0.7)
    assert type(optimizer).__name__.lower() == name
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, others = ({names[id(p)] for p in g["params"]} for g in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    block = "transformer.layers.0"
    assert decayed == {
        *("patch_embedding.weight", "head.weight", f"{block}.0.fn.to_qkv.weight"),
        *(
            f"{block}.0.fn.to_out.weight",
            f"{block}.1.fn.net.0.weight",
            f"{block}.1.fn.net.3.weight",
        ),
    }
    assert decayed | others == set(names.values()) and not decayed & others
    assert {"cls_token", "pos_embedding", "head.bias", "patch_norm.weight"} <= others
    assert all(group["lr"] == 0.03 for group in optimizer.param_groups)
    if name in ("sgd", "rmsprop"):
        assert all(group["momentum"] == 0.7 for group in optimizer.param_groups)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_light_optimizers_are_those_of_torch_to_the_bit(name: str) -> None:
    """Over a change to a new one with the old one's state in the middle."""
    states = []
    for light in (True, False):
        model = small_model()
        optimizer = make_optimizer(name, model, 0.03, 0.2, 0.7)
        if not light:
            optimizer = type(optimizer).__base__(optimizer.param_groups)  # which hold every option
        for step in range(4):
            optimizer.zero_grad()
            torch.manual_seed(step)
            model(torch.randn(2, 3, 8, 8)).square().sum().backward()
            optimizer.step()
            if step == 1:
                saved = optimizer.state_dict()
                optimizer = type(optimizer)(optimizer.param_groups)
                optimizer.load_state_dict(saved)
        states.append((model.state_dict(), optimizer.state_dict()))
    assert_equal(*states)


def test_convolutions_are_decayed_too_and_embeddings_are_not() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Embedding(3, 4))
    decayed, others = make_optimizer("sgd", model, 0.1, 0.1, 0.9).param_groups
    assert [p.ndim for p in decayed["params"]] == [4] and len(others["params"]) == 4


def test_unknown_optimizer() -> None:
    with pytest.raises(ValueError, match="optimizer 'lion' is not adam"):
        make_optimizer("lion", small_model(), 0.1, 0.1, 0.9)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        # epoch of 10 -> part of the peak
        ({"scheduler": "step", "gamma": 0.5}, {0: 1, 0.99: 1, 1: 0.5, 1.5: 0.5, 3: 0.125}),
        ({"scheduler": "constant"}, {0: 1, 0.5: 1, 9.9: 1}),
        (
            {"scheduler": "cosine", "warmup_epochs": 2},
            {0.01: 0.005, 1: 0.5, 1.5: 0.75, 2: 1, 4: 0.853553, 6: 0.5, 10: 0, 12: 0},
        ),
        ({"scheduler": "cosine", "warmup_epochs": 0}, {0: 1, 5: 0.5, 10: 0}),
        ({"scheduler": "cosine", "warmup_epochs": 10}, {5: 0.5, 9.9: 0.99, 10: 1}),
    ],
    ids=str,
)
def test_adjust_learning_rate(schedule: dict, rates: dict[float, float]) -> None:
    optimizer = make_optimizer("sgd", small_model(), 123.0, 0.1, 0.9)
    for epoch, part in rates.items():
        rate = adjust_learning_rate(optimizer, epoch, lr=0.2, epochs=10, **schedule)
        assert rate == pytest.approx(0.2 * part, rel=1e-5, abs=1e-12)
        assert [group["lr"] for group in optimizer.param_groups] == [rate, rate]


# --- accuracy, seeds --------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_accuracy_equals_sklearn(classes: int) -> None:
    generator = np.random.default_rng(classes)
    logits = generator.normal(size=(200, classes)).astype(np.float32)
    targets = generator.integers(0, classes, 200)
    topk = tuple(range(1, classes + 1))
    ours = accuracy(torch.from_numpy(logits), torch.from_numpy(targets), topk)
    if classes == 2:
        expected = [
            (logits.argmax(1) == targets).mean(),
            1.0,
        ]  # scikit-learn wants one column there
    else:
        labels = range(classes)
        expected = [top_k_accuracy_score(targets, logits, k=k, labels=labels) for k in topk[:-1]]
        expected.append(1.0)
    assert ours == pytest.approx([100 * value for value in expected], rel=1e-6)
    assert accuracy(torch.from_numpy(logits), torch.from_numpy(targets)) == ours[:1]


@pytest.mark.parametrize("topk", [(3,), (1, 5), (0,), (), (-1, 1)])
def test_accuracy_refuses_what_means_nothing(topk: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="topk"):
        accuracy(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long), topk)


def test_seeds_belong_to_their_position() -> None:
    positions = [
        (seed, purpose, n) for seed in range(5) for purpose in "ab" for n in (0, 1, 10, 11)
    ]
    seeds = {seed_for(*position) for position in positions}
    assert len(seeds) == len(positions)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_for(1, "epoch", 2) == 9046112299591956150  # in every process and version
    assert math.log2(max(seeds)) > 60
