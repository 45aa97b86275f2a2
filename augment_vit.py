"""Augmentation of training images: a batch at a time, on the device that trains, its own draw for every sample.

All draws of an epoch follow from its seed, with a row for each sample: neither the batch a sample falls
into, nor the process that trains on it, nor a resume changes what it looks like. Whatever moves pixels
(affine, crop, RandAugment's rotation, shears and translations) is one matrix a sample and one bilinear
`grid_sample` a batch, in which edges are continued; colours, erasing and mixing come after it.
torchvision's transforms draw once a call and from one global generator, so they need a loop over the
samples, seeded for each; benchmarks/augment.py compares: the batch is many times as fast for small images, on
a CPU about even for large ones without affine.
"""

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FLIPS = {"none": (), "horizontal": (-1,), "vertical": (-2,), "both": (-1, -2)}


@dataclass(frozen=True)
class Augmentation:
    """What training images go through, as the options of these names say; by default nothing."""

    flip: str = "none"
    affine: float = 0.0
    crop: float = 1.0
    color: float = 0.0
    randaugment: float = 0.0
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Augmentation":
        """The augmentation that the options of a run ask for."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


def send(array: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """The array on the device, without waiting for what this computes."""
    tensor = torch.from_numpy(array) if isinstance(array, np.ndarray) else array
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# --- the draws of an epoch --------------------------------------------------------------------------


class Epoch:
    """The order of an epoch's samples and what each goes through; each array holds every sample's draws."""

    def __init__(self, augmentation: Augmentation, samples: int, size: int, seed: int) -> None:
        """Draw for `samples` images of `size` x `size` pixels; `seed` stands for the run and the epoch."""
        generator = np.random.default_rng(seed)
        self.order = generator.permutation(samples)
        self.flips = {dim: generator.random(samples) < 0.5 for dim in FLIPS[augmentation.flip]}
        self.matrices = self.factors = self.operations = self.erased = None
        moves = []  # the matrices of all that moves pixels, in order
        if limit := augmentation.affine:
            moves.append(affine_matrices(generator.uniform(-limit, limit, (samples, 4))))

        # From here on each has a generator of its own: switching one on changes no other's draws.
        def draws(purpose: str, columns: int) -> np.ndarray:
            return np.random.default_rng([seed, *purpose.encode()]).random((columns, samples))

        if augmentation.crop < 1:
            moves.append(crop_matrices(augmentation.crop, draws("crop", 4)))
        if augmentation.color:
            self.factors = 1 + augmentation.color * (2 * draws("color", 3).astype(np.float32) - 1)
        if augmentation.randaugment:
            self.level = augmentation.randaugment / 10
            which, signs = draws("randaugment", 2 * OPERATIONS_EACH).reshape(2, -1, samples)
            self.operations = (which * len(RANDAUGMENT)).astype(np.int8)  # (operations, samples)
            self.signs = np.where(signs < 0.5, -1, 1).astype(np.int8)
            negative = (self.signs < 0).astype(np.int8)
            moves.extend(operation_matrices(self.level)[self.operations, negative])
        if moves:
            self.matrices = functools.reduce(compose, moves).astype(np.float32)
        if augmentation.erase:
            chosen, *place = draws("erase", 5)
            self.erased = erased_boxes(np.stack(place), size)
            self.erased[chosen >= augmentation.erase] = 0
        self.mixes = augmentation.mixup > 0 or augmentation.cutmix > 0
        if self.mixes:
            self._draw_shares(augmentation, size, np.random.default_rng([seed, *b"mix"]))

    def _draw_shares(
        self, augmentation: Augmentation, size: int, generator: np.random.Generator
    ) -> None:
        """How each sample mixes with another: by mixup or by cutmix, evenly if both are on."""
        samples = len(self.order)
        even = generator.random(samples) < 0.5
        cut = (augmentation.cutmix > 0) & ((augmentation.mixup == 0) | even)
        own = np.empty(samples)
        for alpha, chosen in ((augmentation.mixup, ~cut), (augmentation.cutmix, cut)):
            if alpha:
                own[chosen] = generator.beta(alpha, alpha, samples)[chosen]
        middles = generator.integers(0, size, (2, samples))
        sides = np.where(cut, size * np.sqrt(1 - own), 0).astype(int)
        starts = np.clip(middles - sides // 2, 0, size)
        ends = np.clip(middles + (sides + 1) // 2, 0, size)
        self.boxes = box_rows(starts, ends)
        self.cuts = bool(cut.any())
        area = np.prod(ends - starts, axis=0)
        self.blend = np.where(cut, 1, own).astype(np.float32)  # of its own pixels, outside the box
        self.share = np.where(cut, 1 - area / size**2, own).astype(np.float32)  # of its own target

    def show(self, images: Tensor, positions: np.ndarray) -> Tensor:
        """Images uint8 (batch, channels, size, size) of the samples `positions` as this epoch has them.

        Returns float32 in [-1, 1].
        """
        device = images.device
        for dim, chosen in self.flips.items():
            rows = send(np.flatnonzero(chosen[positions]), device)
            # A choice by torch.where takes three times as long on a CPU.
            images = images.index_copy(0, rows, images.index_select(0, rows).flip(dim))
        images = to_float(images)
        if len(positions) == 0:
            return images
        if self.matrices is not None:
            images = warp(images, send(self.matrices[positions], device))
        if self.factors is not None:
            factors = send(self.factors[:, positions], device)[..., None, None, None]
            images = adjust_colors(images, *factors)
        if self.operations is not None:
            for numbers, signs in zip(self.operations, self.signs, strict=True):
                operate(images, numbers[positions], signs[positions], self.level)
        if self.erased is not None:
            images.masked_fill_(inside(self.erased[positions], images), 0.0)
        return images

    def mix(self, images: Tensor, others: Tensor, positions: np.ndarray) -> tuple[Tensor, Tensor]:
        """The images of `positions` mixed with `others`, and the share (batch, 1) of the own target.

        Mixup (Zhang et al. 2018) blends the two, cutmix (Yun et al. 2019) takes a box from the partner.
        """
        blend = send(self.blend[positions], images.device)[:, None, None, None]
        if self.cuts:
            blend = blend.masked_fill(inside(self.boxes[positions], images), 0.0)
        # Not torch.lerp: it rounds a vector and what is left over at its end differently.
        mixed = (images * blend).add_(others * (1 - blend))
        return mixed, send(self.share[positions], images.device)[:, None]


# --- where pixels come from -------------------------------------------------------------------------
# Matrices (..., 2, 3) take a place of the new image to one of the old, in [-1, 1] from edge to edge.


def compose(first: np.ndarray, then: np.ndarray) -> np.ndarray:
    """The matrices of `first` and, on what it gives, `then`."""
    both = first[..., :2] @ then
    both[..., 2] += first[..., 2]
    return both


def affine_matrices(draws: np.ndarray) -> np.ndarray:
    """Rotation, scale and shift of each image by its row of `draws` (samples, 4) in [-1, 1].

    1 stands for 45 degrees, a scale of 2 and a shift by half the side.
    """
    angle, scale = draws[:, 0] * (np.pi / 4), 2.0 ** draws[:, 1]
    cosine, sine = scale * np.cos(angle), scale * np.sin(angle)
    rows = (cosine, -sine, draws[:, 2], sine, cosine, draws[:, 3])
    return np.stack(rows, axis=1).reshape(-1, 2, 3)


def rectangles(area: np.ndarray, largest_ratio: float, draws: np.ndarray) -> np.ndarray:
    """Heights and widths (2, samples) of rectangles of `area` in the unit square.

    Their ratio is log-uniform up to `largest_ratio` either way, less where that would not fit;
    torchvision draws again there, which makes large areas rarer than asked for.
    """
    limit = np.minimum(np.log(largest_ratio), -np.log(area))
    ratio = np.exp((2 * draws - 1) * limit)
    return np.minimum(np.sqrt(area * np.stack([ratio, 1 / ratio])), 1)


def crop_matrices(smallest: float, draws: np.ndarray) -> np.ndarray:
    """Windows of `smallest` to all of the area, of ratios 3/4 to 4/3 (Szegedy et al. 2015), made full size."""
    area = smallest + (1 - smallest) * draws[0]
    sides = rectangles(area, 4 / 3, draws[1])
    matrices = np.zeros((len(area), 2, 3))
    for axis, (side, place) in enumerate(zip(sides[::-1], draws[2:], strict=True)):  # x, y
        matrices[:, axis, axis] = side
        matrices[:, axis, 2] = (2 * place - 1) * (1 - side)
    return matrices


def warp(images: Tensor, matrices: Tensor) -> Tensor:
    """Each image by its matrix (batch, 2, 3); edges are continued."""
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


# --- rectangles of pixels ---------------------------------------------------------------------------


def erased_boxes(draws: np.ndarray, size: int) -> np.ndarray:
    """Random erasing (Zhong et al. 2020): 2 to 33 % of the area, ratios up to 3.3; boxes as `inside` takes."""
    sides = size * rectangles(0.02 + 0.31 * draws[0], 3.3, draws[1])
    sides = np.clip(sides.round(), 1, size).astype(int)
    starts = (draws[2:] * (size - sides + 1)).astype(int)
    return box_rows(starts, starts + sides)


def box_rows(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """(samples, 4): first row, row after the last, first column, column after the last."""
    return np.stack([starts[0], ends[0], starts[1], ends[1]], axis=1).astype(np.int32)


def inside(boxes: np.ndarray, images: Tensor) -> Tensor:
    """Which pixels of the images lie in their boxes (batch, 4): bool (batch, 1, size, size)."""
    top, bottom, left, right = send(boxes, images.device).T[..., None]
    places = torch.arange(images.shape[-1], device=images.device)
    rows = (top <= places) & (places < bottom)
    columns = (left <= places) & (places < right)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


# --- colours ----------------------------------------------------------------------------------------
# Images are float32 in [-1, 1]. No sum that is rounded runs over pixels and no multiplication is fused
# with an addition: torch does those in another order for another batch, and shards would differ.


def to_float(images: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1.0)


def to_levels(images: Tensor) -> Tensor:
    """float32 in [-1, 1] to whole numbers from 0 to 255, still float32."""
    return images.add(1.0).mul_(127.5).round_().clamp_(0, 255)


def adjust_colors(
    images: Tensor,
    brightness: Tensor | float = 1.0,
    contrast: Tensor | float = 1.0,
    saturation: Tensor | float = 1.0,
) -> Tensor:
    """By factors (batch, 1, 1, 1), of which 1 changes nothing, as torchvision's; limited once, at the end."""
    light = images + 1
    grey = light
    if images.shape[1] == 3:
        red, green, blue = light.split(1, dim=1)
        grey = (red * 0.2989).add_(green * 0.587).add_(blue * 0.114)
    whole = grey.mul(127.5).round_()  # sums of whole numbers are exact, in any order
    mean = (whole.mean((1, 2, 3), keepdim=True, dtype=torch.float64) / 127.5).float()
    scale = brightness * contrast
    adjusted = (light * (scale * saturation)).add_(grey * (scale * (1 - saturation)))
    return adjusted.add_(mean * (brightness * (1 - contrast))).sub_(1.0).clamp_(-1, 1)


def sharpen(images: Tensor, factor: Tensor) -> Tensor:
    """Away from (above 1) or towards a smoothed image, as Pillow's; the outermost pixels stay."""
    images = images.clone()
    if images.shape[-1] >= 3:
        middle = images[..., 1:-1, 1:-1]
        smooth = (F.avg_pool2d(images, 3, stride=1) * (9 / 13)).add_(middle * (4 / 13))
        middle.mul_(factor).add_(smooth * (1 - factor)).clamp_(-1, 1)
    return images


def posterize(images: Tensor, bits: int) -> Tensor:
    """Only the upper `bits` of 8."""
    step = 2 ** (8 - bits)
    return to_levels(images).div_(step).floor_().mul_(step).div_(127.5).sub_(1.0)


def solarize(images: Tensor, threshold: float) -> Tensor:
    """The negative of what is at least as bright as `threshold`, in [0, 1]."""
    return torch.where(images >= 2 * threshold - 1, -images, images)


def autocontrast(images: Tensor) -> Tensor:
    """The darkest value of each channel becomes black, the brightest white."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    flat = low == high
    stretched = (images - low).div_((high - low).masked_fill_(flat, 1.0)).mul_(2.0).sub_(1.0)
    return torch.where(flat, images, stretched)


def equalize(images: Tensor) -> Tensor:
    """Each channel's levels spread evenly, by the table that Pillow computes."""
    pixels = to_levels(images).flatten(2).long()  # (batch, channels, pixels)
    counts = pixels.new_zeros((*pixels.shape[:2], 256))
    counts.scatter_add_(2, pixels, torch.ones_like(pixels))
    brightest = counts.gather(2, pixels.amax(2, keepdim=True))
    step = (pixels.shape[2] - brightest).div_(255, rounding_mode="floor")
    below = counts.cumsum(2).sub_(counts)
    table = below.add_(step // 2).div_(step.clamp(min=1), rounding_mode="floor").clamp_(max=255)
    table = torch.where(step == 0, torch.arange(256, device=images.device), table)
    return to_float(table.gather(2, pixels).view_as(images))


# --- RandAugment ------------------------------------------------------------------------------------
# Cubuk et al. 2019: two operations for each image, each one of these with the same chance, all of one
# magnitude. They are torchvision's 14, magnitude 10 being its 30. Here the moves come before the
# colours, and shears leave the middle in place. Left out are those only timm has: Invert and
# SolarizeAdd, near to solarize at its largest.

OPERATIONS_EACH = 2
MOVES = ("identity", "rotate", "shear_x", "shear_y", "translate_x", "translate_y")
COLORS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "brightness": lambda images, factor, level: adjust_colors(images, brightness=factor),
    "contrast": lambda images, factor, level: adjust_colors(images, contrast=factor),
    "color": lambda images, factor, level: adjust_colors(images, saturation=factor),
    "sharpness": lambda images, factor, level: sharpen(images, factor),
    "posterize": lambda images, factor, level: posterize(images, 8 - round(4 * level)),
    "solarize": lambda images, factor, level: solarize(images, 1 - level),
    "autocontrast": lambda images, factor, level: autocontrast(images),
    "equalize": lambda images, factor, level: equalize(images),
}
RANDAUGMENT = (*MOVES, *COLORS)


def operation_matrices(level: float) -> np.ndarray:
    """(operations, 2, 2, 3): that of each operation, with its magnitude as it is and negated."""
    matrices = np.empty((len(RANDAUGMENT), 2, 2, 3))
    for negated, sign in enumerate((1, -1)):
        angle, shear = np.deg2rad(30) * level * sign, 0.3 * level * sign
        shift = 2 * 150 / 331 * level * sign
        own = matrices[:, negated]
        own[:] = np.eye(2, 3)
        own[MOVES.index("rotate"), :, :2] = [
            [np.cos(angle), -np.sin(angle)],
            [np.sin(angle), np.cos(angle)],
        ]
        own[MOVES.index("shear_x"), 0, 1] = own[MOVES.index("shear_y"), 1, 0] = shear
        own[MOVES.index("translate_x"), 0, 2] = own[MOVES.index("translate_y"), 1, 2] = shift
    return matrices


def operate(images: Tensor, numbers: np.ndarray, signs: np.ndarray, level: float) -> None:
    """Change, in place, the colours of each image by the operation that `numbers` (batch,) gives it."""
    order = np.argsort(numbers, kind="stable")
    factors = (1 + 0.9 * level * signs[order]).astype(np.float32)
    counts = np.bincount(numbers, minlength=len(RANDAUGMENT)).tolist()
    parts = (send(array, images.device).split(counts) for array in (order, factors))
    for name, rows, factor in zip(RANDAUGMENT, *parts, strict=True):
        if name in COLORS and len(rows):
            changed = COLORS[name](images[rows], factor[:, None, None, None], level)
            images.index_copy_(0, rows, changed)
