"""Vision Transformer (Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929), top to bottom as in its figure 1.

With the same weights its logits equal those of vit-pytorch's `ViT`; `qkv_bias`, `norm_eps` and
`patch_norm` make the same file express torchvision's and timm's. `build_model` also builds the other
architectures of the vit-pytorch package that take the same arguments.
"""

import functools
import importlib
import inspect
import pkgutil

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PreNorm(nn.Module):
    """Layer norm before the layer `fn`: x -> fn(norm(x)); shapes are those of `fn`."""

    def __init__(self, dim: int, fn: nn.Module, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.fn = fn

    def forward(self, x: Tensor, *args: int) -> Tensor:
        return self.fn(self.norm(x), *args)


class FeedForward(nn.Module):
    """Two linear layers with GELU between: (batch, tokens, dim) -> the same."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dim, hidden_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden_dim, dim),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Attention(nn.Module):
    """Multi-head self-attention: (batch, tokens, dim) -> (batch, queries, dim).

    Only the first `queries` tokens (default: all) are queries; keys and values come from all tokens.
    `dropout` is on weights and output.
    """

    def __init__(
        self, dim: int, heads: int, dim_head: int, dropout: float = 0.0, qkv_bias: bool = False
    ) -> None:
        super().__init__()
        inner_dim = heads * dim_head
        self.heads = heads
        self.dropout = dropout
        self.to_qkv = nn.Linear(dim, 3 * inner_dim, bias=qkv_bias)
        # One head as wide as the model needs no projection back (as in vit-pytorch).
        one_full_head = heads == 1 and dim_head == dim
        self.to_out = nn.Identity() if one_full_head else nn.Linear(inner_dim, dim)
        self.out_dropout = nn.Dropout(0.0 if one_full_head else dropout)

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        out = self.of_all(x) if queries is None else self.of_first(x, queries)
        return self.out_dropout(self.to_out(out))

    def of_all(self, x: Tensor) -> Tensor:
        """What every token takes from all: (batch, tokens, dim) -> (batch, tokens, heads * dim_head)."""
        # (batch, tokens, heads * dim_head) -> (batch, heads, tokens, dim_head)
        heads = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.to_qkv(x).chunk(3, dim=-1)
        )
        out = attend(*heads, self.dropout if self.training else 0.0)
        return out.transpose(1, 2).flatten(2)

    def of_first(self, x: Tensor, queries: int) -> Tensor:
        """What the first tokens take: (batch, tokens, dim) -> (batch, queries, heads * dim_head).

        Keys and values of all tokens would be most of the work: q (W_k x) is computed as (q W_k) x, and
        W_v stands before the sum over tokens in the same way.
        """
        batch, shape = x.shape[0], (3, self.heads, -1)  # len(x) is a constant to torch.export
        query_weight, key_weight, value_weight = self.to_qkv.weight.unflatten(0, shape)
        query = x[:, :queries].flatten(0, 1) @ query_weight.mT  # (heads, batch * queries, dim_head)
        if self.to_qkv.bias is not None:
            # That of the keys adds the same to all tokens, which softmax takes away.
            query_bias, _, value_bias = self.to_qkv.bias.unflatten(0, (*shape, 1)).mT
            query = query + query_bias
        asked = regroup(query @ key_weight, batch, queries)  # (batch, heads * queries, dim)
        scale = key_weight.shape[1] ** -0.5
        weights = torch.baddbmm(x.new_zeros(1), asked, x.mT, beta=0, alpha=scale).softmax(dim=-1)
        weights = F.dropout(weights, self.dropout, self.training)
        taken = regroup(weights @ x, self.heads, queries)  # (heads, batch * queries, dim)
        out = taken @ value_weight.mT
        if self.to_qkv.bias is not None:  # as often as the weights add up to, 1 without dropout
            sums = weights.sum(dim=-1, keepdim=True)
            out = out + regroup(sums, self.heads, queries) * value_bias
        return out.unflatten(1, (batch, queries)).permute(1, 2, 0, 3).flatten(2)


def regroup(x: Tensor, groups: int, inner: int) -> Tensor:
    """(outer, groups * inner, dim) -> (groups, outer * inner, dim)."""
    return x.unflatten(1, (groups, inner)).transpose(0, 1).flatten(1, 2)


FEW_TOKENS = 128


def attend(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """softmax(query key^T / sqrt(dim_head)) value; all (batch, heads, tokens, dim_head)."""
    few = key.shape[-2] <= FEW_TOKENS or query.dtype == torch.bfloat16
    if query.device.type == "cpu" and few:
        # Here torch's fused kernel is slower than these lines: in bfloat16 a whole step takes 1.5 to 3
        # times as long with it, in float32 the attention to few tokens up to 1.9 times.
        batch, scale = query.shape[:2], query.shape[-1] ** -0.5
        query, key, value = (t.flatten(0, 1) for t in (query, key, value))
        ignored = query.new_zeros(1)  # beta is 0
        weights = torch.baddbmm(ignored, query, key.mT, beta=0, alpha=scale).softmax(dim=-1)
        return torch.bmm(F.dropout(weights, dropout), value).unflatten(0, batch)
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)


class Transformer(nn.Module):
    """`depth` blocks of attention and feed-forward with residuals, then a norm.

    (batch, tokens, dim) -> (batch, read, dim): `read` says how many of the first tokens are wanted, all
    by default. The last block computes no others.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        dim_head: int,
        mlp_dim: int,
        dropout: float = 0.0,
        qkv_bias: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(depth):
            attention = Attention(dim, heads, dim_head, dropout, qkv_bias)
            feed_forward = FeedForward(dim, mlp_dim, dropout)
            self.layers.append(
                nn.ModuleList(
                    [PreNorm(dim, attention, norm_eps), PreNorm(dim, feed_forward, norm_eps)]
                )
            )
        self.norm = nn.LayerNorm(dim, eps=norm_eps)

    def forward(self, x: Tensor, read: int | None = None) -> Tensor:
        last = len(self.layers) - 1
        for i, (attention, feed_forward) in enumerate(self.layers):
            queries = read if i == last else None
            x = x[:, :queries] + attention(x, queries)
            x = x + feed_forward(x)
        return self.norm(x)


class ViT(nn.Module):
    """Images (batch, channels, image_size, image_size) -> logits (batch, num_classes).

    One channel (batch, 1, image_size, image_size) stands for as many equal ones: images without colour
    take a third of the embedding's arithmetic. `pool` "cls" reads the class token; "mean" averages the
    patch tokens and has no class token.
    Raises ValueError when `image_size` is not a multiple of `patch_size` or `pool` is another word.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        num_classes: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        pool: str = "cls",
        channels: int = 3,
        dim_head: int = 64,
        dropout: float = 0.0,
        emb_dropout: float = 0.0,
        qkv_bias: bool = False,
        norm_eps: float = 1e-5,
        patch_norm: bool = True,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(
                f"image_size {image_size} is not a multiple of patch_size {patch_size}"
            )
        if pool not in ("cls", "mean"):
            raise ValueError(f"pool is '{pool}', not cls or mean")
        self.patch_size = patch_size
        self.pool = pool
        patch_dim = channels * patch_size**2
        num_patches = (image_size // patch_size) ** 2

        # The patches are embedded by one matrix product, not by a strided convolution.
        self.patch_norm = nn.LayerNorm(patch_dim, eps=norm_eps) if patch_norm else nn.Identity()
        self.patch_embedding = nn.Linear(patch_dim, dim)
        self.embedding_norm = nn.LayerNorm(dim, eps=norm_eps) if patch_norm else nn.Identity()

        cls_tokens = 1 if pool == "cls" else 0
        self.cls_token = nn.Parameter(torch.empty(1, cls_tokens, dim))
        self.pos_embedding = nn.Parameter(torch.empty(1, cls_tokens + num_patches, dim))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embedding, std=0.02)
        self.dropout = nn.Dropout(emb_dropout)

        self.transformer = Transformer(
            dim, depth, heads, dim_head, mlp_dim, dropout, qkv_bias, norm_eps
        )
        self.head = nn.Linear(dim, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        if images.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            # To a quarter of a grey level or less; the norm that comes next is float32 on a GPU.
            images = images.to(torch.get_autocast_dtype("cpu"))
        embedded = self.embedding_norm(self.embed(self.patches(images)))
        cls_token = self.cls_token.expand(images.shape[0], -1, -1)
        x = torch.cat((cls_token, embedded), dim=1) + self.pos_embedding  # (batch, tokens, dim)
        x = self.dropout(x.to(embedded.dtype))
        x = self.transformer(x, read=1 if self.pool == "cls" else None)
        x = x.mean(dim=1)  # of one token: of the class token alone
        if torch.is_autocast_enabled(x.device.type):  # logits of 8 bits would tie
            with torch.autocast(x.device.type, enabled=False):
                return self.head(x.float())
        return self.head(x)

    def embed(self, patches: Tensor) -> Tensor:
        """(batch, patches, patch_size * patch_size * channels, or of one) -> (batch, patches, dim)."""
        norm, linear = self.patch_norm, self.patch_embedding
        weight, bias = linear.weight, linear.bias
        if isinstance(norm, nn.LayerNorm):
            # Its scale and shift go into the weights, which are smaller than the patches: these need
            # no gradient then.
            bias = torch.addmv(bias, weight, norm.bias)
            weight = weight * norm.weight
            patches = F.layer_norm(patches, patches.shape[-1:], eps=norm.eps)
        if patches.shape[-1] == self.patch_size**2 < weight.shape[-1]:
            # One channel stands for all; their common norm is its own.
            channels = weight.unflatten(-1, (patches.shape[-1], -1)).unbind(dim=-1)
            weight = functools.reduce(torch.add, channels)  # twice as fast as their torch.sum
        return F.linear(patches, weight, bias)

    def patches(self, images: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, patches, patch_size * patch_size * channels)."""
        batch, channels, height, width = images.shape
        p = self.patch_size
        x = images.view(batch, channels, height // p, p, width // p, p)
        x = x.permute(0, 2, 4, 3, 5, 1)  # (batch, rows, columns, p, p, channels)
        return x.reshape(batch, (height // p) * (width // p), p * p * channels)


def resample_pos_embedding(pos_embedding: Tensor, tokens: int) -> Tensor:
    """Position embedding (..., old tokens, dim) -> (..., tokens, dim), bicubic.

    The prefix (class token) is what a square grid of patches leaves over, and stays as it is.
    """
    old_tokens, dim = pos_embedding.shape[-2:]
    old_side, new_side = int(old_tokens**0.5), int(tokens**0.5)
    flat = pos_embedding.reshape(old_tokens, dim)
    prefix, grid = flat.split((old_tokens - old_side**2, old_side**2))
    grid = grid.T.reshape(1, dim, old_side, old_side)
    grid = F.interpolate(grid, (new_side, new_side), mode="bicubic", antialias=True)
    flat = torch.cat((prefix, grid.reshape(dim, new_side**2).T))
    return flat.reshape(*pos_embedding.shape[:-2], -1, dim)


HEADS = {"head", "mlp_head", "linear_head", "to_pred"}  # ours and those of vit-pytorch


def load_pretrained(model: nn.Module, weights: dict[str, Tensor], same_classes: bool) -> list[str]:
    """Copy the weights of another run into `model`; returns a line for each that was not copied as it was.

    For other classes the head stays fresh; for another image size the position embedding is resampled.
    Raises ValueError if any other weight is missing, left over or of another shape.
    """
    changes, own = [], model.state_dict()
    for name, value in own.items():
        old = weights.get(name)
        if name.split(".")[0] in HEADS and not same_classes:
            changes.append(f"{name} is fresh, the classes are others")
            continue
        if name == "pos_embedding" and old is not None and old.shape != value.shape:
            old = resample_pos_embedding(old, value.shape[-2])
            changes.append(f"{name} is resampled to {value.shape[-2]} tokens")
        if old is None or old.shape != value.shape:
            there = "missing" if old is None else f"{list(old.shape)}"
            raise ValueError(f"{name} is {list(value.shape)} here and {there} in the checkpoint")
        own[name] = old
    surplus = [name for name in weights if name not in own and name.split(".")[0] not in HEADS]
    if surplus:
        raise ValueError(f"{surplus[0]} and others are in the checkpoint and not here")
    model.load_state_dict(own)
    return changes


# What every architecture must take; cait wants the depth of its class-attention stage beside it.
REQUIRED = {"image_size", "patch_size", "num_classes", "dim", "depth", "heads", "mlp_dim"}
EXTRA_ARGUMENTS = {
    "cait": {"cls_depth": 2},
    "vit_torchvision": {"qkv_bias": True, "norm_eps": 1e-6, "patch_norm": False},
}


@functools.cache
def model_class(arch: str) -> type[nn.Module]:
    """The class behind the name: "vit" and "vit_torchvision" are `ViT` above, others modules of vit-pytorch.

    Raises ValueError when there is none that takes the arguments of `ViT` and gives logits.
    """
    if arch in ("vit", "vit_torchvision"):
        return ViT
    import vit_pytorch  # takes 2 s, so only when one of its architectures is wanted

    if arch in {module.name for module in pkgutil.iter_modules(vit_pytorch.__path__)}:
        try:
            module = importlib.import_module(f"vit_pytorch.{arch}")
        except ImportError as error:
            raise ValueError(f"arch '{arch}' needs what is not installed: {error}") from None
        for candidate in vars(module).values():
            own = inspect.isclass(candidate) and candidate.__module__ == module.__name__
            if own and _takes_vit_arguments(candidate, arch) and _gives_logits(candidate, arch):
                return candidate
    raise ValueError(
        f"arch '{arch}' is neither vit nor vit_torchvision nor a module of vit-pytorch like them "
        "(simple_vit, deepvit, vit_for_small_dataset, cait, parallel_vit, local_vit, "
        "simple_vit_with_register_tokens, vit_with_patch_dropout, ...)"
    )


def _takes_vit_arguments(candidate: type, arch: str) -> bool:
    parameters = inspect.signature(candidate).parameters
    obligatory = {name for name, p in parameters.items() if p.default is inspect.Parameter.empty}
    known = REQUIRED | EXTRA_ARGUMENTS.get(arch, {}).keys()
    return parameters.keys() >= REQUIRED and obligatory <= known


@torch.no_grad()
def _gives_logits(candidate: type, arch: str) -> bool:
    """Some modules take the arguments but have no head, return a tuple or want lists of images."""
    try:
        with torch.random.fork_rng(devices=[]):
            model = _construct(
                candidate, arch, image_size=16, patch_size=4, num_classes=3, dim=16, depth=1,
                heads=2, mlp_dim=16,
            )  # fmt: skip
            images = torch.zeros(2, 3, 16, 16)
            with torch.autocast("cpu", torch.bfloat16):  # as a run may compute; some cannot
                shapes = [model.train(mode)(images).shape for mode in (True, False)]
            return shapes == [(2, 3), (2, 3)]
    except Exception:  # whatever it raises, it does not stand in for ViT
        return False


def model_arguments(arch: str) -> set[str]:
    """Names of the arguments that the architecture takes (some know no pool, some no dropout)."""
    return set(inspect.signature(model_class(arch)).parameters)


def build_model(arch: str, **arguments: int | float | str) -> nn.Module:
    """A model with fresh weights from the arguments of `ViT`; what `arch` does not take is left out."""
    accepted = model_arguments(arch)
    arguments = {name: value for name, value in arguments.items() if name in accepted}
    return _construct(model_class(arch), arch, **arguments)


def _construct(cls: type[nn.Module], arch: str, **arguments: int | float | str) -> nn.Module:
    model = cls(**arguments, **EXTRA_ARGUMENTS.get(arch, {}))
    if cls is not ViT:  # which takes one channel for all as it is
        channels = arguments.get("channels", 3)
        model.register_forward_pre_hook(functools.partial(to_channels, channels))
    for name, table in [*vars(model).items()]:
        if isinstance(table, Tensor):  # simple_vit would send it to a GPU in every pass
            delattr(model, name)
            model.register_buffer(name, table, persistent=False)
    if arch == "local_vit":
        for _, feed_forward in model.transformer.layers:
            net = feed_forward.fn.fn.net
            net[0] = ChannelNorm(net[0])
    return model


def to_channels(channels: int, _: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """The images with one channel that stands for all repeated, without a copy."""
    return inputs[0].expand(-1, channels, -1, -1)


class ChannelNorm(nn.Module):
    """Layer norm over the channels of (batch, channels, height, width).

    vit-pytorch's local_vit (to 1.26 at least) gives such a tensor to a norm of the last axis, which raises.
    """

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)
