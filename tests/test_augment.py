"""Augmentation: each operation against Pillow, torchvision or its definition; the draws; shards; soft targets."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as torchvision

import main_vit
import step_vit
from augment_vit import (
    COLORS,
    FLIPS,
    MOVES,
    RANDAUGMENT,
    Augmentation,
    Epoch,
    adjust_colors,
    affine_matrices,
    autocontrast,
    crop_matrices,
    equalize,
    operate,
    operation_matrices,
    posterize,
    sharpen,
    solarize,
    warp,
)
from config_vit import resolve
from data_vit import Split, batches, training_batches
from utils_vit import TrainingState

CPU = torch.device("cpu")
ALL: dict[str, Any] = {
    "flip": "both", "affine": 0.2, "crop": 0.3, "color": 0.4, "randaugment": 9, "erase": 0.5,
    "mixup": 0.8, "cutmix": 1.0,
}  # fmt: skip


def make_split(count: int = 43, size: int = 9, channels: int = 3, seed: int = 0) -> Split:
    """Smooth images, of three classes, all different; not every row belongs to the split."""
    generator = np.random.default_rng(seed)
    small = torch.from_numpy(generator.integers(0, 256, (count + 2, channels, 3, 3), np.uint8))
    pixels = F.interpolate(small.float(), size, mode="bilinear").round().byte().numpy()
    return Split(pixels, np.arange(count + 2) % 3, np.arange(1, count + 1))


def epoch_of(
    split: Split, batch_size: int = 8, seed: int = 5, **options: Any
) -> list[torch.Tensor]:
    """Images, targets and, if any, soft targets of an epoch; `rank` and `ranks` are taken too."""
    shard = {name: options.pop(name) for name in ("rank", "ranks", "start") if name in options}
    augmentation = Augmentation(**options)
    parts = training_batches(
        split, batch_size, CPU, augmentation, num_classes=3, seed=seed, **shard
    )
    columns = zip(*parts, strict=True)
    return [torch.cat(part) for part in columns if part[0] is not None]


def by_sample(split: Split, **options: Any) -> tuple[torch.Tensor, Epoch]:
    """The images in the order of the split, and the draws behind them."""
    epoch = Epoch(Augmentation(**options), len(split), split.pixels.shape[-1], 5)
    return epoch_of(split, **options)[0][np.argsort(epoch.order)], epoch


# --- the draws --------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [0.0, 0.3])
@pytest.mark.parametrize("flip", ["none", "both"])
def test_flips_and_affine_are_to_the_bit_what_they_say(flip: str, affine: float) -> None:
    """A loop of their definitions."""
    split, batch_size = make_split(), 8
    generator = np.random.default_rng(5)
    order = generator.permutation(len(split))
    flipped = {dim: generator.random(len(split)) < 0.5 for dim in FLIPS[flip]}
    turn, scale, *shift = generator.uniform(-affine, affine, (len(split), 4)).T
    cosine, sine = (2**scale * f(turn * (np.pi / 4)) for f in (np.cos, np.sin))
    matrices = np.array([[cosine, -sine, shift[0]], [sine, cosine, shift[1]]], np.float32)
    before = []
    for first in range(0, len(order), batch_size):
        positions = order[first : first + batch_size]
        images = torch.from_numpy(split.pixels[split.indices[positions]])
        images = images.float().div_(127.5).sub_(1.0)
        for dim, chosen in flipped.items():
            mask = torch.from_numpy(chosen[positions])
            images = torch.where(mask[:, None, None, None], images.flip(dim), images)
        if affine:
            own = torch.from_numpy(matrices[..., positions]).permute(2, 0, 1)
            grid = F.affine_grid(own, list(images.shape), align_corners=False)
            images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        before.append(images)
    images, targets = epoch_of(split, batch_size, flip=flip, affine=affine)
    assert torch.equal(images, torch.cat(before))
    assert targets.tolist() == split.targets[split.indices[order]].tolist()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("ranks", [2, 3, 11])
def test_shards_together_are_the_batches(ranks: int, channels: int) -> None:
    """To the bit, also where a part is empty: 43 images in batches of 8 leave 3 for 11 processes."""
    split = make_split(channels=channels)
    for options in ({}, {"affine": 1.0, "flip": "both"}, {"mixup": 0.3}, ALL):
        augmentation = Augmentation(**options)

        def shard(start: int = 0, augmentation: Augmentation = augmentation, **rank: int) -> list:
            return list(
                training_batches(
                    split, 8, CPU, augmentation, num_classes=3, seed=5, start=start, **rank
                )
            )

        whole = shard()
        shards = [shard(rank=rank, ranks=ranks) for rank in range(ranks)]
        for batch, *parts in zip(whole, *shards, strict=True):
            assert max(len(p[0]) for p in parts) - min(len(p[0]) for p in parts) <= 1
            for one, *others in zip(batch, *parts, strict=True):
                assert one is None or torch.equal(one, torch.cat(others))
        for one, other in zip(whole[3:], shard(start=3), strict=True):  # resumed in the middle
            assert all(a is b or torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("ranks", [1, 2, 5, 50])
def test_shards_of_evaluation_are_the_split(ranks: int) -> None:
    split = make_split()
    whole = list(batches(split, 4, CPU))
    parts = [list(batches(split, 4, CPU, rank, ranks)) for rank in range(ranks)]
    for batch, *shares in zip(whole, *parts, strict=True):  # as many for each, if some are empty
        assert np.array_equal(np.concatenate([share[2] for share in shares]), batch[2])
        assert torch.equal(torch.cat([share[0] for share in shares]), batch[0])
    assert np.array_equal(np.concatenate([batch[2] for batch in whole]), np.arange(len(split)))


def test_the_batch_does_not_matter() -> None:
    split = make_split()
    for one, other in zip(epoch_of(split, 2, **ALL), epoch_of(split, 7, **ALL), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("option", [name for name in ALL if name != "flip"])
def test_samples_and_epochs_differ_and_options_do_not_touch_each_other(option: str) -> None:
    split = make_split(40, 12)
    same = Split(np.repeat(split.pixels[:1], 42, axis=0), split.targets, split.indices)
    value = {"erase": 1.0}.get(option, ALL[option])
    # Mixing equal images shows nothing.
    shown = epoch_of(split if option in ("mixup", "cutmix") else same, **{option: value})[0]
    distinct = len(np.unique(shown.numpy().reshape(40, -1), axis=0))
    assert distinct >= (20 if option == "randaugment" else 38)  # a quarter of 14 x 14 x signs
    other = epoch_of(same, seed=6, **{option: value})[0]
    assert not torch.equal(shown, other)
    one, both = (
        Epoch(Augmentation(**options), 40, 12, 5).__dict__ for options in ({option: value}, ALL)
    )
    names = {"color": ["factors"], "randaugment": ["operations", "signs"]}.get(option, [])
    assert all(np.array_equal(one[name], both[name]) for name in names)
    assert np.array_equal(one["order"], both["order"])


# --- where pixels come from -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draws", "expected"),
    [
        ([0, 0, 0, 0], np.s_[3:5, 3:5]),  # nothing moves
        ([0, -1, 0, 0], np.s_[2:6, 2:6]),  # twice as large
        ([0, 0, 0.5, 0], np.s_[3:5, 1:3]),  # a quarter of the side to the left
        ([0, 0, 0, -0.5], np.s_[5:7, 3:5]),  # and down
    ],
    ids=str,
)
def test_affine_moves_what_it_says(draws: list[float], expected: tuple) -> None:
    images = torch.full((1, 3, 8, 8), -1.0)
    images[..., 3:5, 3:5] = 1.0
    moved = warp(images, torch.tensor(affine_matrices(np.array([draws])), dtype=torch.float32))
    bright = torch.full((8, 8), False)
    bright[expected] = True
    assert ((moved > 0) == bright).all()


def test_affine_rotates_by_up_to_45_degrees() -> None:
    rows, columns = torch.meshgrid(torch.arange(33) - 16, torch.arange(33) - 16, indexing="ij")
    images = (2.0 * (columns.abs() < 2) - 1)[None, None]  # a vertical bar
    matrix = torch.tensor(affine_matrices(np.array([[1, 0, 0, 0]])), dtype=torch.float32)
    moved = warp(images, matrix)[0, 0] > 0
    inside = (rows.abs() < 11) & (columns.abs() < 11)
    distance = torch.minimum((rows - columns).abs(), (rows + columns).abs())
    assert (distance[moved & inside] <= 3).all() and moved[inside].sum() > 40


@pytest.mark.parametrize("smallest", [0.08, 0.6, 1e-300])
def test_crops_stay_inside_and_their_areas_are_even(smallest: float) -> None:
    matrices = crop_matrices(smallest, np.random.default_rng(0).random((4, 20_000)))
    width, height = matrices[:, 0, 0], matrices[:, 1, 1]
    assert (matrices[:, 0, 1] == 0).all() and (matrices[:, 1, 0] == 0).all()
    assert (np.abs(matrices[:, 0, 2]) + width <= 1 + 1e-12).all()
    assert (np.abs(matrices[:, 1, 2]) + height <= 1 + 1e-12).all()
    area = (width * height - smallest) / (1 - smallest)
    assert np.abs(np.sort(area) - np.linspace(0, 1, len(area))).max() < 0.02  # Kolmogorov-Smirnov
    ratio = np.log(width / height)[width * height < 0.7]
    assert np.abs(ratio).max() <= np.log(4 / 3) + 1e-9 and abs(ratio.mean()) < 0.01
    assert ratio.std() == pytest.approx(np.log(4 / 3) / np.sqrt(3), rel=0.03)
    free = matrices[:, 0, 2] / (1 - width)
    assert abs(free.mean()) < 0.02 and free.std() == pytest.approx(1 / np.sqrt(3), rel=0.03)


def test_a_crop_is_a_window_made_full_size() -> None:
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    matrix = torch.tensor([[[0.5, 0, 0.25], [0, 0.75, -0.25]]])  # columns 6 to 13, rows 0 to 11
    window = F.interpolate(images[:, :, 0:12, 6:14], 16, mode="bilinear")
    cropped = warp(images, matrix)
    torch.testing.assert_close(cropped[..., 1:-1, 1:-1], window[..., 1:-1, 1:-1])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("level", [0.3, 1.0])
@pytest.mark.parametrize("name", MOVES)
def test_moves_are_those_of_torchvision(name: str, level: float, sign: int) -> None:
    """Where torchvision, which fills with black, has the inside of the image."""
    images = F.interpolate(torch.rand(1, 3, 5, 5) * 0.8 + 0.1, 32, mode="bilinear")
    shear = float(np.rad2deg(np.arctan(0.3 * level * sign)))
    how = {
        "rotate": {"angle": 30.0 * level * sign},
        "shear_x": {"shear": [shear, 0.0]},
        "shear_y": {"shear": [0.0, shear]},
        "translate_x": {"translate": [150 / 331 * 32 * level * sign, 0.0]},
        "translate_y": {"translate": [0.0, 150 / 331 * 32 * level * sign]},
    }.get(name, {})
    how = {"angle": 0.0, "translate": [0.0, 0.0], "scale": 1.0, "shear": [0.0, 0.0]} | how
    matrix = operation_matrices(level)[RANDAUGMENT.index(name)]
    moved = [warp(images, torch.from_numpy(m[None]).float()) for m in matrix]
    bilinear = InterpolationMode.BILINEAR
    expected, covered = (
        torchvision.affine(x, interpolation=bilinear, **how) for x in (images, images * 0 + 1)
    )
    mask = covered > 0.999
    assert mask.float().mean() > 0.4
    # Each sign is as likely: which of both is the positive one says nothing.
    errors = [(m - expected)[mask].abs().max().item() for m in moved]
    assert min(errors) < 2e-3
    assert name == "identity" or max(errors) > 0.02


# --- colours ----------------------------------------------------------------------------------------

PILLOW = {
    "brightness": lambda image, f: ImageEnhance.Brightness(image).enhance(f),
    "contrast": lambda image, f: ImageEnhance.Contrast(image).enhance(f),
    "color": lambda image, f: ImageEnhance.Color(image).enhance(f),
    "sharpness": lambda image, f: ImageEnhance.Sharpness(image).enhance(f),
    "posterize": lambda image, f: ImageOps.posterize(image, 8 - round(4 * abs(f - 1) / 0.9)),
    "solarize": lambda image, f: ImageOps.solarize(image, int(255 * (1 - abs(f - 1) / 0.9)) + 1),
    "autocontrast": lambda image, f: ImageOps.autocontrast(image),
    "equalize": lambda image, f: ImageOps.equalize(image),
}
TORCHVISION = {
    "brightness": torchvision.adjust_brightness,
    "contrast": torchvision.adjust_contrast,
    "color": torchvision.adjust_saturation,
    "sharpness": torchvision.adjust_sharpness,
    "posterize": lambda image, f: torchvision.posterize(image, 8 - round(4 * abs(f - 1) / 0.9)),
    "solarize": lambda image, f: torchvision.solarize(image, 255 * (1 - abs(f - 1) / 0.9)),
    "autocontrast": lambda image, f: torchvision.autocontrast(image),
    "equalize": lambda image, f: torchvision.equalize(image),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("level", [0.3, 0.9])  # thresholds between two levels
@pytest.mark.parametrize("name", COLORS)
def test_colours_are_those_of_pillow_and_torchvision(
    name: str, level: float, channels: int
) -> None:
    """Within rounding: both round to whole levels between, ours does not."""
    pixels = make_split(6, 24, channels).pixels
    signs = np.array([1, -1] * 4)
    images = torch.from_numpy(pixels).float() / 127.5 - 1
    operate(images, np.full(len(pixels), RANDAUGMENT.index(name)), signs, level)
    found = ((images + 1) * 127.5).numpy()
    for image, own, sign in zip(pixels, found, signs, strict=True):
        factor = 1 + 0.9 * level * float(sign)
        as_pillow = Image.fromarray(image[0] if channels == 1 else image.transpose(1, 2, 0))
        by_pillow = np.asarray(PILLOW[name](as_pillow, factor), np.float32)
        by_pillow = by_pillow.reshape(24, 24, channels).transpose(2, 0, 1)
        by_torchvision = TORCHVISION[name](torch.from_numpy(image), factor).numpy()
        assert np.abs(own - by_pillow).max() <= 2.1
        assert np.abs(own - by_torchvision.astype(np.float32)).max() <= 2.1
    assert (np.abs(found - pixels).max() > 0.5) == ((name, channels) != ("color", 1))


def test_colour_factors_together_are_torchvisions_one_after_the_other() -> None:
    """Where nothing gets too bright in between."""
    images = torch.rand(4, 3, 16, 16) * 0.4 + 0.2
    factors = torch.tensor([[1.2, 0.7, 1.5, 1], [0.8, 1.1, 0.5, 1], [0.3, 1.3, 1.6, 1]])
    found = adjust_colors(images * 2 - 1, *factors[..., None, None, None])
    for image, own, (b, c, s) in zip(images, found, factors.T.tolist(), strict=True):
        expected = torchvision.adjust_brightness(image, b)
        expected = torchvision.adjust_contrast(expected, c)
        expected = torchvision.adjust_saturation(expected, s)
        torch.testing.assert_close((own + 1) / 2, expected, atol=2e-3, rtol=0)
    torch.testing.assert_close(found[3], images[3] * 2 - 1)


def test_flat_and_tiny_images_go_through_every_colour() -> None:
    for size in (1, 2, 3):
        for value in (-1.0, 0.2, 1.0):
            images = torch.full((2, 3, size, size), value)
            factor = torch.tensor([0.1, 1.9])[:, None, None, None]
            for change in (autocontrast, equalize, lambda x: sharpen(x, factor)):  # noqa: B023
                torch.testing.assert_close(change(images), images, atol=1 / 255, rtol=0)
            assert posterize(images, 4).isfinite().all() and solarize(images, 0).abs().max() <= 1


def test_operations_are_drawn_evenly() -> None:
    epoch = Epoch(Augmentation(randaugment=5), 28_000, 8, 0)
    for numbers, signs in zip(epoch.operations, epoch.signs, strict=True):
        counts = np.bincount(numbers, minlength=14)
        assert len(counts) == len(RANDAUGMENT) == 14 and np.abs(counts - 2000).max() < 200
        assert abs(signs.mean()) < 0.03
    equal = (epoch.operations[0] == epoch.operations[1]).mean()
    assert equal == pytest.approx(1 / 14, abs=0.01)


# --- erasing and mixing -----------------------------------------------------------------------------


def test_erased_is_a_rectangle_of_the_share_it_says() -> None:
    split = make_split(600, 24)
    before, _ = by_sample(split)
    after, epoch = by_sample(split, erase=0.25)
    areas = []
    for one, other, (top, bottom, left, right) in zip(before, after, epoch.erased, strict=True):
        box = torch.zeros(24, 24, dtype=torch.bool)
        box[top:bottom, left:right] = True
        assert torch.equal(other, one.masked_fill(box, 0.0))
        if box.any():
            areas.append(box.float().mean().item())
            assert 1 / 3.9 <= (bottom - top) / (right - left) <= 3.9  # 3.3 before whole pixels
    assert len(areas) / 600 == pytest.approx(0.25, abs=0.06)
    assert (
        min(areas) > 0.01 and max(areas) < 0.37 and np.mean(areas) == pytest.approx(0.175, abs=0.03)
    )


@pytest.mark.parametrize(
    "options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}]
)
def test_mixed_images_and_their_soft_targets(options: dict[str, float]) -> None:
    """Against what the same epoch shows without mixing, each sample with the next of the epoch."""
    split, others = make_split(300, 11), {"crop": 0.5, "color": 0.2, "flip": "both"}
    shown, _ = by_sample(split, **others)
    mixed, epoch = by_sample(split, **others, **options)
    _, hard, soft = epoch_of(split, **others, **options)
    back = np.argsort(epoch.order)
    hard, soft = hard[back], soft[back]
    partners = np.roll(epoch.order, -1)[back]  # the next of the epoch
    assert hard.tolist() == soft.argmax(1).tolist()  # what a perfect model would say
    targets = split.targets[split.indices]
    torch.testing.assert_close(soft.sum(1), torch.ones(300))
    kinds = []
    for i, j in enumerate(partners):
        own, other = shown[i], shown[j]
        of_own = (mixed[i] == own).all(0)
        of_other = (mixed[i] == other).all(0)
        expected = torch.zeros(3)
        if (of_own | of_other).all():
            kinds.append("cut")
            share = of_own.float().mean()
            rows, columns = (~of_own).any(1).sum(), (~of_own).any(0).sum()
            assert rows * columns == (~of_own).sum()  # a box
        else:
            kinds.append("blend")
            share = ((mixed[i] - other) * (own - other)).sum() / (own - other).square().sum()
            torch.testing.assert_close(
                mixed[i], share * own + (1 - share) * other, atol=1e-5, rtol=0
            )
        expected[targets[i]] += share
        expected[targets[j]] += 1 - share
        torch.testing.assert_close(soft[i], expected, atol=1e-5, rtol=0)
    cut = kinds.count("cut") / len(kinds)
    expected_cut = 0.5 if len(options) == 2 else float("cutmix" in options)
    assert cut == pytest.approx(expected_cut, abs=0.1)


def test_shares_follow_the_beta_distribution() -> None:
    epoch = Epoch(Augmentation(mixup=0.3), 20_000, 8, 0)
    assert epoch.share.mean() == pytest.approx(0.5, abs=0.01)
    assert epoch.share.var() == pytest.approx(1 / (4 * (2 * 0.3 + 1)), rel=0.03)


def test_the_only_image_is_its_own_partner() -> None:
    images, _, soft = epoch_of(make_split(1), mixup=1.0, cutmix=1.0)
    torch.testing.assert_close(images, epoch_of(make_split(1))[0])
    torch.testing.assert_close(soft.amax(1), torch.ones(1))


@pytest.mark.parametrize("pieces", [1, 3])
def test_loss_and_gradient_of_soft_targets(pieces: int) -> None:
    args = resolve(main_vit.make_parser(), ["--precision=float32", "--label-smoothing=0.1"])
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(10, 1, 2, 2, generator=generator)
    soft = torch.rand(10, 3, generator=generator).softmax(1)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    state = TrainingState(model, torch.optim.SGD(model.parameters(), lr=0.0), None)
    state.pieces = pieces
    loss, _ = step_vit.gradient(state, images, soft, args, len(images))
    expected = -((0.9 * soft + 0.1 / 3) * model(images).log_softmax(1)).sum(1).mean()
    (weight,) = torch.autograd.grad(expected, model[1].weight)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(model[1].weight.grad, weight)


# --- anything at all --------------------------------------------------------------------------------


def numbers(low: float, high: float, **options: bool) -> st.SearchStrategy[float]:
    return st.sampled_from([low, high]) | st.floats(low, high, **options)


@settings(max_examples=60, deadline=None)
@given(
    options=st.fixed_dictionaries(
        {
            "flip": st.sampled_from(list(FLIPS)),
            "crop": numbers(5e-324, 1.0),
            "mixup": numbers(0.0, 100.0),
            "cutmix": numbers(0.0, 100.0),
            "randaugment": numbers(0.0, 10.0),
            **{name: numbers(0.0, 1.0) for name in ("affine", "color", "erase")},
        }
    ),
    size=st.integers(1, 9),
    channels=st.sampled_from([1, 3]),
    count=st.integers(1, 9),
    seed=st.integers(0, 2**63 - 1),
    flat=st.booleans(),
)
def test_whatever_is_given_the_images_are_images(
    options: dict, size: int, channels: int, count: int, seed: int, flat: bool
) -> None:
    split = make_split(count, size, channels)
    if flat:
        split.pixels[:] = seed % 256
    images, targets, *soft = epoch_of(split, 4, seed, **options)
    assert images.shape == (count, channels, size, size) and images.dtype == torch.float32
    assert images.isfinite().all() and images.abs().max() <= 1 + 1e-6
    assert len(soft) == (options["mixup"] > 0 or options["cutmix"] > 0)
    if soft:
        assert soft[0].min() >= 0
        torch.testing.assert_close(soft[0].sum(1), torch.ones(count))
