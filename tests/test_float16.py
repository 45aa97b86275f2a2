"""Mixed precision in float16, for GPUs without bfloat16: nothing is lost by its small range.

A CPU computes it too, slowly, so these are the lines that run on a GPU.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import main_vit
import step_vit
from config_vit import resolve
from stop_vit import RunFailed
from utils_vit import TrainingState, load_checkpoint, save_checkpoint
from vit import build_model

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(6) % 3
OPTIMIZERS = {"adam": 1e-3, "adamw": 1e-3, "sgd": 0.1, "rmsprop": 1e-3}


def fresh_state(precision: str, optimizer: str = "sgd") -> TrainingState:
    torch.manual_seed(0)
    model = build_model(
        "vit", image_size=8, patch_size=4, num_classes=3, dim=16, depth=2, heads=2, mlp_dim=32
    )
    optimizer = step_vit.make_optimizer(optimizer, model, OPTIMIZERS[optimizer], 0.1, 0.9)
    return TrainingState(model, optimizer, 0.9, precision == "float16")


def take_steps(state: TrainingState, count: int, precision: str = "float16", *options: str) -> None:
    args = resolve(main_vit.make_parser(), ["--precision", precision, *options])
    for _ in range(count):
        loss, _, _ = step_vit.training_step(state, IMAGES, TARGETS, args)
        assert loss.isfinite()


def scale_by(state: TrainingState, scale: float) -> None:
    state.scaler.load_state_dict(state.scaler.state_dict() | {"scale": scale})


def weights(state: TrainingState) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.model.state_dict().items()}


@pytest.mark.parametrize("clip", ["0", "0.1"])
def test_a_step_is_that_of_float32_to_rounding(clip: str) -> None:
    """The gradient is clipped, and applied, as large as it is, not as it was scaled for float16."""
    moved = {}
    for precision in ("float32", "float16"):
        state = fresh_state(precision)
        scale_by(state, 2.0**8)
        before = weights(state)
        take_steps(state, 1, precision, "--clip-grad", clip)
        moved[precision] = {name: value - before[name] for name, value in weights(state).items()}
    for name, distance in moved["float32"].items():
        torch.testing.assert_close(
            moved["float16"][name], distance, rtol=0.03, atol=0.03 * distance.abs().max().item()
        )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_gradient_too_large_for_float16_costs_one_step(optimizer: str) -> None:
    state, other = fresh_state("float16", optimizer), fresh_state("float16", optimizer)
    scale_by(state, 2.0**60)
    before = weights(state)
    take_steps(state, 1)
    assert state.scaler.get_scale() == 2.0**59
    assert all(torch.equal(value, before[name]) for name, value in weights(state).items())
    assert state.step == 1  # the number of a step is that of its images
    for one in (state, other):
        scale_by(one, 2.0**8)
        take_steps(one, 3)
    for name, value in weights(other).items():
        assert torch.equal(value, state.model.state_dict()[name])


def test_a_gradient_too_small_for_float16_is_kept() -> None:
    """What goes back through a last layer of small weights would be rounded to a few bits, or to 0."""

    def gradient(precision: str, scale: float) -> Tensor:
        state = fresh_state(precision)
        with torch.no_grad():
            state.model.head.weight *= 1e-4
        scale_by(state, scale)
        take_steps(state, 1, precision, "--clip-grad", "0")
        return state.model.patch_embedding.weight.grad

    exact = gradient("float32", 1)
    errors = [(gradient("float16", s) - exact).norm() / exact.norm() for s in (1, 2.0**10)]
    assert errors[0] > 0.05 and errors[1] < 0.005


def test_pieces_add_up_to_the_same_gradient() -> None:
    whole, pieces = fresh_state("float16"), fresh_state("float16")
    pieces.pieces = 3
    for state in (whole, pieces):
        scale_by(state, 2.0**8)
        take_steps(state, 1)
    torch.testing.assert_close(weights(pieces), weights(whole), rtol=0.02, atol=1e-3)


def test_the_scale_goes_through_a_checkpoint(tmp_path: Path) -> None:
    """A run that goes on takes the steps that it would have taken, and skips those it would have."""
    state, copy = fresh_state("float16"), fresh_state("float16")
    scale_by(state, 2.0**30)
    take_steps(state, 3)
    identity = {"args": {}, "classes": []}
    save_checkpoint(state.state_dict() | identity, False, tmp_path / "checkpoint.pth.tar")
    copy.load_state_dict(load_checkpoint(tmp_path / "checkpoint.pth.tar"))
    assert copy.scaler.state_dict() == state.scaler.state_dict()
    assert copy.scaler.get_scale() == 2.0**27
    for one in (state, copy):
        take_steps(one, 20)
    assert all(torch.equal(value, weights(copy)[name]) for name, value in weights(state).items())


def test_a_checkpoint_of_float32_starts_with_a_fresh_scale() -> None:
    """PBT may go on from a member that computed in it; so may older checkpoints, without a scale at all."""
    other, state = fresh_state("float32"), fresh_state("float16")
    take_steps(other, 2, "float32")
    state.load_state_dict(other.state_dict())
    assert state.scaler.get_scale() == 2.0**16
    take_steps(state, 2)
    saved = other.state_dict()
    del saved["scaler"]
    fresh_state("float32").load_state_dict(saved)


def test_a_loss_that_is_not_finite_names_the_precision() -> None:
    state = fresh_state("float16")
    state.outputs = [(torch.tensor(float("nan")), TARGETS, TARGETS)]
    with pytest.raises(RunFailed, match="a lower --lr may help, or --precision float32$"):
        step_vit.check_finite(state)
