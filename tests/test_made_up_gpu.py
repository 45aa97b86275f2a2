"""What a step does on a GPU, on one that torch only makes up: no operand lies elsewhere, nothing waits for it.

torch's fake tensors have a device and shapes but no memory; an operator whose operands lie on different
devices raises as on a real GPU. They take no part in a backward pass, whose gradients are made up here.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data_vit
import main_vit
import setup_vit
import step_vit
import vit
from config_vit import resolve

GPU = torch.device("cuda", 0)
IMAGES, CLASSES = 40, 3
OPTIONS = (
    "-s 32 -p 8 -vd 64 -d 2 -vh 4 -mlpd 128 -b 16 --num-classes 3 --threads 1 --precision bfloat16"
)
RUNS = {
    "plain": "",
    "everything": (
        "--flip both --affine 0.2 --crop 0.5 --color 0.3 --randaugment 5 --erase 0.2 --mixup 0.4 "
        "--cutmix 0.5 --dropout 0.1 --emb-dropout 0.1 --moving-average-decay 0.9 --clip-grad 1 "
        "--label-smoothing 0.1 --optimizer adamw"
    ),
    "grey, mean pool, rmsprop": "-ch 1 --color 0.3 --randaugment 9 --pool mean --optimizer rmsprop",
    "float16": "--precision float16",
    "float32": "--precision float32",
    "cait": "-a cait -ch 3",
}


class NothingWaits(TorchDispatchMode):
    """Raises where the CPU wants to know what the GPU has computed."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        from_gpu = any(map(on_gpu, tree_leaves((args, kwargs))))
        known_here = any(
            isinstance(value, Tensor | int | float) and not on_gpu(value)
            for value in tree_leaves(out)
        )
        assert not (from_gpu and known_here), f"{func} waits for the GPU"
        return out


def on_gpu(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device == GPU


@pytest.fixture
def made_up_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models are built on it, batches sent to it; autocast and the scaler believe in it."""
    build_model, fetch = vit.build_model, data_vit.fetch

    def build(*args: Any, **kwargs: Any) -> nn.Module:
        with unset_fake_temporarily():
            model = build_model(*args, **kwargs)
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty(weight.shape, device=GPU)))
            for name, table in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty_like(table, device=GPU))
        model.to = lambda device: model
        return model

    def fetch_here(split: data_vit.Split, positions: np.ndarray, _: torch.device) -> Any:
        rows, images = fetch(split, positions, torch.device("cpu"))
        return rows, mode.from_tensor(images)

    monkeypatch.setattr(vit, "build_model", build)
    monkeypatch.setattr(data_vit, "fetch", fetch_here)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: mode.from_tensor(tensor))
        yield


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("resident", [True, False], ids=["kept there", "sent each time"])
@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_an_epoch(
    options: str, resident: bool, made_up_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = resolve(main_vit.make_parser(), [*OPTIONS.split(), *options.split()])
    state = setup_vit.make_state(args, GPU)
    assert state.scaler.is_enabled() == (args.precision == "float16")

    def backward(loss: Tensor) -> None:
        assert on_gpu(loss) and loss.requires_grad
        for weight in state.parameters:
            weight.grad = torch.empty_like(weight)

    monkeypatch.setattr(Tensor, "backward", backward)
    pixels = np.zeros((IMAGES, args.channel, args.image_size, args.image_size), np.uint8)
    kept = data_vit.Resident(pixels, GPU) if resident else pixels
    split = data_vit.Split(kept, np.arange(IMAGES) % CLASSES, np.arange(IMAGES))
    logits = torch.empty(IMAGES, CLASSES, device=GPU)
    with NothingWaits():
        state.model.train()
        for images, targets, soft in main_vit.epoch_batches(state, split, args, GPU):
            outputs = step_vit.training_step(state, images, targets, args, soft, len(images))
            assert all(map(on_gpu, (images, *outputs)))
        state.selected_model.eval()
        with torch.no_grad():
            for images, _, positions in data_vit.batches(split, 16, GPU):
                logits[positions[0] : positions[-1] + 1] = step_vit.logits_of(state, images, args)
    assert state.step == 3


def test_that_waiting_is_seen(made_up_gpu: None) -> None:
    number = torch.ones(3, device=GPU)
    for wait in (number.cpu, number.sum().item, number.nonzero, number.tolist):
        with pytest.raises((AssertionError, RuntimeError)), NothingWaits():
            wait()
    with pytest.raises(RuntimeError, match="same device"):
        number + torch.ones(3)
