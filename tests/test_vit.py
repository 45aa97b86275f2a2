"""The model against two independent implementations of the same paper, and the choice of others."""

import functools

import pytest
import torch
from torch import Tensor
from torchvision.models import VisionTransformer
from vit_pytorch import ViT as ReferenceViT

from pretrained_vit import translated
from vit import (
    Attention,
    FeedForward,
    PreNorm,
    ViT,
    attend,
    build_model,
    load_pretrained,
    model_arguments,
    resample_pos_embedding,
)

SMALL = {
    "image_size": 16, "patch_size": 4, "channels": 3, "num_classes": 3,
    "dim": 16, "depth": 2, "heads": 2, "mlp_dim": 32,
}  # fmt: skip


def fill(model: torch.nn.Module, seed: int) -> None:
    """Random numbers of a useful size everywhere: an untouched norm or bias would hide a wrong mapping."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def from_vit_pytorch(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """vit-pytorch's names -> ours."""
    names = {
        "to_patch_embedding.1.": "patch_norm.",
        "to_patch_embedding.2.": "patch_embedding.",
        "to_patch_embedding.3.": "embedding_norm.",
        "mlp_head.": "head.",
        ".0.norm.": ".0.norm.",
        ".0.to_qkv.": ".0.fn.to_qkv.",
        ".0.to_out.0.": ".0.fn.to_out.",
        ".1.net.0.": ".1.norm.",
        ".1.net.1.": ".1.fn.net.0.",
        ".1.net.4.": ".1.fn.net.3.",
    }
    ours = {}
    for name, value in weights.items():
        old = next((old for old in names if old in name), None)
        if name in ("cls_token", "pos_embedding"):
            value = value.reshape(
                1, -1, value.shape[-1]
            )  # vit-pytorch has it with or without batch
        ours[name if old is None else name.replace(old, names[old])] = value
    return ours


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"image_size": 12, "patch_size": 3, "channels": 1, "num_classes": 2},
        {"dim_head": 7, "heads": 3},  # heads * dim_head != dim
        {"dim_head": 16, "heads": 1},  # one head as wide as the model
        {"dim_head": 8, "heads": 1},
        {"depth": 4, "dim": 24, "mlp_dim": 8, "patch_size": 16},  # a single patch
    ],
    ids=str,
)
def test_equals_vit_pytorch(pool: str, changes: dict[str, int]) -> None:
    arguments = SMALL | {"dim_head": 8, "pool": pool} | changes
    reference, model = ReferenceViT(**arguments).eval(), ViT(**arguments).eval()
    fill(reference, seed=0)
    model.load_state_dict(from_vit_pytorch(reference.state_dict()))
    images = torch.randn(5, arguments["channels"], *2 * [arguments["image_size"]])
    logits, expected = model(images), reference(images)
    torch.testing.assert_close(logits, expected, rtol=2e-5, atol=2e-5)
    logits.square().sum().backward()
    expected.square().sum().backward()
    gradients = from_vit_pytorch({n: p.grad for n, p in reference.named_parameters()})
    largest = max(gradient.abs().max() for gradient in gradients.values() if gradient.numel())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=1e-4, atol=float(1e-5 * largest), msg=name
        )
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in reference.parameters()
    )


@pytest.mark.parametrize("changes", [{}, {"heads": 4, "patch_size": 8, "depth": 1}], ids=str)
def test_equals_torchvision(changes: dict[str, int]) -> None:
    a = SMALL | changes
    reference = VisionTransformer(
        a["image_size"], a["patch_size"], a["depth"], a["heads"], a["dim"], a["mlp_dim"],
        num_classes=a["num_classes"],
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
    ).eval()  # fmt: skip
    fill(reference, seed=1)
    model = build_model("vit_torchvision", **a, dim_head=a["dim"] // a["heads"]).eval()
    halves = [0.5] * 3  # what both then take as normalized
    model.load_state_dict(translated(reference.state_dict(), halves, halves))
    images = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(model(images), reference(images), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("shape", [(2, 2, 17, 8), (1, 3, 5, 64)])
def test_attention_in_bfloat16_on_the_cpu(shape: tuple[int, ...]) -> None:
    query, key, value = (torch.randn(shape).bfloat16() for _ in range(3))
    expected = attend(query.float(), key.float(), value.float(), 0.0)
    # bfloat16 has 8 significant bits; the weights add up to 1 and values are about 3 at most.
    torch.testing.assert_close(attend(query, key, value, 0.0).float(), expected, rtol=0, atol=0.03)


def test_the_last_block_computes_what_is_read() -> None:
    model = ViT(**SMALL)
    seen, products = [], []
    for attention, feed_forward in model.transformer.layers:
        attention.fn.to_qkv.register_forward_hook(lambda *_: products.append("of all tokens"))
        attention.fn.to_out.register_forward_hook(
            lambda _, inputs, __: seen.append(inputs[0].shape)
        )
        feed_forward.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    model(torch.randn(5, 3, 16, 16))
    assert [shape[1] for shape in seen] == [17, 17, 1, 1] and len(products) == 1
    assert model(torch.randn(0, 3, 16, 16)).shape == (0, 3)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("queries", [1, 2, 9])
def test_attention_of_the_first_tokens(queries: int, bias: bool) -> None:
    """The same as that of all, with its gradients, and the same draws of dropout."""
    module = Attention(dim=12, heads=3, dim_head=5, dropout=0.4, qkv_bias=bias)
    fill(module, seed=2)
    x = torch.randn(4, 9, 12, requires_grad=True)
    found = []
    for dropout in (0.0, 0.4):
        if dropout and queries < 9:
            continue  # fewer draws
        module.dropout = dropout
        for of in (module.of_all, lambda x: module.of_first(x, queries)):
            torch.manual_seed(0)
            module.zero_grad()
            x.grad = None
            out = of(x)[:, :queries]
            out.square().sum().backward()
            found.append([out, x.grad, *(p.grad for p in module.to_qkv.parameters())])
    for expected, given in zip(found[::2], found[1::2], strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


def test_autocast_agrees_with_float32() -> None:
    model, images = ViT(**SMALL).eval(), torch.randn(8, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    assert logits.dtype == torch.float32  # in 8 bits those of two classes would often be equal
    torch.testing.assert_close(logits, model(images), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_acts_on_the_attention_weights(dtype: torch.dtype) -> None:
    """With values of 1 the output is the sum of the weights: 1, unless some of them are dropped."""
    query, key = torch.randn(2, 2, 4, 50, 8).to(dtype)
    value = torch.ones(2, 4, 50, 8, dtype=dtype)
    kept, dropped = attend(query, key, value, 0.0).float(), attend(query, key, value, 0.5).float()
    torch.testing.assert_close(kept, torch.ones_like(kept), rtol=0, atol=0.02)
    assert dropped.std() > 0.05
    assert abs(dropped.mean().item() - 1) < 0.1  # what is kept is scaled up


@pytest.mark.parametrize("which", ["dropout", "emb_dropout"])
def test_dropout_only_in_training(which: str) -> None:
    model, images = ViT(**SMALL, **{which: 0.5}), torch.randn(2, 3, 16, 16)
    assert not torch.equal(model.train()(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


def test_attention_alone_has_dropout() -> None:
    attention, x = Attention(16, 2, 8, dropout=0.5), torch.randn(2, 5, 16)
    attention.out_dropout.p = 0.0
    assert not torch.equal(attention.train()(x), attention(x))
    assert torch.equal(attention.eval()(x), attention(x))


def test_pre_norm_and_feed_forward() -> None:
    layer, x = PreNorm(16, FeedForward(16, 32)), torch.randn(2, 5, 16)
    assert layer(x).shape == x.shape
    torch.testing.assert_close(layer(3 * x + 2), layer(x), rtol=1e-3, atol=1e-4)  # normalised first


@pytest.mark.parametrize(
    ("change", "message"),
    [({"image_size": 15}, "15 is not a multiple"), ({"pool": "max"}, "'max', not cls or mean")],
)
def test_bad_arguments(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViT(**SMALL | change)


@pytest.mark.parametrize(("channels", "image_size"), [(3, 16), (1, 8)])
@pytest.mark.parametrize(
    "arch",
    [
        *("vit", "simple_vit", "deepvit", "vit_for_small_dataset", "cait", "parallel_vit"),
        *("local_vit", "simple_vit_with_register_tokens", "vit_with_patch_dropout"),
    ],
)
def test_other_architectures(arch: str, channels: int, image_size: int) -> None:
    """As `make_state` of main_vit.py builds them."""
    if arch == "cait" and channels == 1 and "channels" not in model_arguments(arch):
        pytest.skip("vit-pytorch's CaiT reads RGB only")
    arguments = SMALL | {"channels": channels, "image_size": image_size}
    optional = {"dim_head": 8, "pool": "cls", "dropout": 0.1, "emb_dropout": 0.1}
    arguments |= {k: v for k, v in optional.items() if k in model_arguments(arch)}
    model = build_model(arch, **arguments)
    # What `.to(device)` does not move would be sent to a GPU in every forward pass.
    assert not [t for m in model.modules() for t in vars(m).values() if isinstance(t, torch.Tensor)]
    logits = model(torch.randn(2, channels, image_size, image_size))
    assert logits.shape == (2, SMALL["num_classes"])
    logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("arch", ["vitt", "../vit", "efficient", "mae", "vit_3d", "nest", "vaat"])
def test_unknown_architecture(arch: str) -> None:
    """No such module, or one that takes other arguments, or one that lacks a package here."""
    with pytest.raises(ValueError, match=f"arch '{arch}'"):
        model_arguments(arch)


# --- weights of another run -------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize(("old", "new"), [(4, 8), (8, 4), (3, 5), (1, 3)])
def test_resample_pos_embedding(old: int, new: int, prefix: int) -> None:
    """A plane stays the same plane away from the borders, rows and columns in place, the token as it is."""
    grid = torch.arange(old) + 0.5
    rows, columns = torch.meshgrid(grid / old, grid / old, indexing="ij")
    embedding = torch.stack((rows, columns), dim=-1).reshape(1, old**2, 2)
    token = torch.full((1, prefix, 2), 7.0)
    resampled = resample_pos_embedding(torch.cat((token, embedding), 1), new**2 + prefix)
    assert resampled.shape == (1, new**2 + prefix, 2)
    assert torch.equal(resampled[:, :prefix], token)
    if old >= 3:
        rows, columns = resampled[0, prefix:].unflatten(0, (new, new)).unbind(-1)
        expected = (torch.arange(new) + 0.5) / new
        torch.testing.assert_close(rows[:, 0], expected, rtol=0, atol=0.06)
        torch.testing.assert_close(columns[0], expected, rtol=0, atol=0.06)


def test_load_pretrained_takes_all_of_the_same_model() -> None:
    source, target = ViT(**SMALL), ViT(**SMALL)
    assert load_pretrained(target, source.state_dict(), same_classes=True) == []
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(target(images), source(images))


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_load_pretrained_for_other_classes_and_image_size(pool: str) -> None:
    source = ViT(**SMALL, pool=pool)
    target = ViT(**SMALL | {"num_classes": 5, "image_size": 32}, pool=pool)
    head = target.head.weight.clone()
    changes = load_pretrained(target, source.state_dict(), same_classes=False)
    assert [change.split()[0] for change in changes] == [
        *("pos_embedding", "head.weight", "head.bias")
    ]
    assert torch.equal(target.head.weight, head)
    assert torch.equal(target.cls_token, source.cls_token)
    for name, value in target.transformer.state_dict().items():
        assert torch.equal(value, source.transformer.state_dict()[name])
    assert target(torch.randn(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize(
    "arch", ["simple_vit", "deepvit", "parallel_vit", "vit_with_patch_dropout", "cait"]
)
def test_load_pretrained_of_other_architectures(arch: str) -> None:
    arguments = {k: v for k, v in SMALL.items() if k in model_arguments(arch)}
    source = build_model(arch, **arguments)
    target = build_model(arch, **arguments | {"num_classes": 5, "image_size": 32})
    changes = load_pretrained(target, source.state_dict(), same_classes=False)
    assert any("fresh" in change for change in changes)
    assert target(torch.randn(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize(
    "change", [{"dim": 32}, {"depth": 3}, {"depth": 1}, {"channels": 1}], ids=str
)
def test_load_pretrained_refuses_other_models(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="in the checkpoint"):
        load_pretrained(ViT(**SMALL | change), ViT(**SMALL).state_dict(), same_classes=True)
