"""A ViT that torchvision has weights of, trained on ImageNet, as a model of this project to start from.

python pretrained_vit.py vit_b_32 runs/vit_b_32
python main_vit.py --init-from runs/vit_b_32/model_best.pth.tar --config runs/vit_b_32/args.yaml --download-dir DIR
"""

import pickle
import signal
import sys
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
import torchvision
import yaml
from torch import Tensor, nn

import files_vit
import setup_vit
import utils_vit
from config_vit import Parser, UsageError, expanded_path, resolve, saved_parameters
from folder_vit import in_one_line
from options_vit import make_parser
from stop_vit import end_by_signal

MODELS = ("vit_b_32", "vit_b_16", "vit_l_32", "vit_l_16")
# torchvision's names -> ours. Rows of the projection in are all of q, all of k, all of v, as ours.
NAMES = {
    "class_token": "cls_token",
    "encoder.pos_embedding": "pos_embedding",
    "conv_proj.": "patch_embedding.",
    "encoder.layers.encoder_layer_": "transformer.layers.",
    "encoder.ln.": "transformer.norm.",
    "heads.head.": "head.",
    ".ln_1.": ".0.norm.",
    ".self_attention.in_proj_": ".0.fn.to_qkv.",
    ".self_attention.out_proj.": ".0.fn.to_out.",
    ".ln_2.": ".1.norm.",
    ".mlp.": ".1.fn.net.",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status, 2 with a line on stderr for bad input."""
    parser = Parser(
        prog="pretrained_vit.py", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("model", choices=MODELS, help="which, by torchvision's name")
    parser.add_argument(
        "folder", type=expanded_path, help="where model_best.pth.tar and args.yaml go"
    )
    try:
        args = parser.parse_args(argv)
        if any((args.folder / name).exists() for name in (utils_vit.LAST, utils_vit.BEST)):
            raise UsageError(f"{args.folder} holds a model already: give another folder")
        checkpoint = checkpoint_of(args.model)
        args.folder.mkdir(parents=True, exist_ok=True)
        # A run from here computes in what is fastest where it runs, and may be one of PBT without a schedule.
        own = {"precision", "scheduler", "warmup_epochs"}
        parameters = {k: v for k, v in checkpoint["args"].items() if k not in own}
        files_vit.replace_file(args.folder / "args.yaml", yaml.safe_dump(parameters).encode())
        utils_vit.save_checkpoint(checkpoint, False, args.folder / utils_vit.BEST)
    except UsageError as error:
        print(f"pretrained_vit.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a folder that cannot be written, a full disk
        print(f"pretrained_vit.py: {in_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        end_by_signal(signal.SIGINT)
    print(f"{args.folder}: {utils_vit.BEST}, args.yaml")
    return 0


def checkpoint_of(name: str) -> dict[str, Any]:
    """The model as a run would have left it, with the classes of ImageNet. Raises UsageError."""
    weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    with torch.device("meta"):
        network = torchvision.models.get_model(name)
    fill(network, weights.url)
    options = (
        f"--arch vit_torchvision --image-size {network.image_size} --patch-size {network.patch_size} "
        f"--channel 3 --vt-dim {network.hidden_dim} --vt-depth {len(network.encoder.layers)} "
        f"--vt-heads {network.encoder.layers[0].num_heads} --mlp-dim {network.mlp_dim} "
        f"--num-classes {network.num_classes} "
        "--precision float32 --lr 5e-5 --epochs 10"  # to go on from here is to change less
    )
    args = resolve(make_parser(), options.split())
    args.val_split = None  # that of the demo, which would win over val/
    state = setup_vit.make_state(args, torch.device("cpu"))
    transforms = weights.transforms()
    ours = translated(network.state_dict(), transforms.mean, transforms.std)
    classes = weights.meta["categories"]
    order = sorted(range(len(classes)), key=classes.__getitem__)  # as the folders of images
    state.model.load_state_dict(ours | {n: ours[n][order] for n in ("head.weight", "head.bias")})
    identity = {"args": saved_parameters(args), "classes": [classes[i] for i in order]}
    return state.state_dict() | identity


def fill(network: nn.Module, url: str) -> None:
    """Give the network the weights that torchvision keeps there, by way of torch's cache. Raises UsageError."""
    file = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    by_hand = f"try again, or bring it to {file} in another way"
    try:
        weights = torch.hub.load_state_dict_from_url(
            url, map_location="cpu", check_hash=True, weights_only=True
        )
        network.load_state_dict(weights, assign=True)  # knows the names of its older versions
    except (OSError, HTTPException) as error:
        raise UsageError(f"{url} cannot be downloaded: {error}; {by_hand}") from None
    except (RuntimeError, EOFError, pickle.UnpicklingError, TypeError):
        if not file.exists():  # torch has compared what came with its checksum
            raise UsageError(f"what came from {url} is not whole: {by_hand}") from None
        raise UsageError(f"{file} is damaged: remove it, to download it again") from None


def translated(
    weights: dict[str, Tensor], mean: list[float], std: list[float]
) -> dict[str, Tensor]:
    """torchvision's weights as ours: the same function, of pixels in [-1, 1].

    `mean` and `std` (channels,) are what its images, in [0, 1], are normalized by; both go into the
    embedding of the patches.
    """
    ours = {}
    for name, value in weights.items():
        for theirs, own in NAMES.items():
            name = name.replace(theirs, own)
        ours[name] = value
    kernel = ours["patch_embedding.weight"].double()  # (dim, channels, patch_size, patch_size)
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (mean, std))
    shift = ((0.5 - mean) / std)[:, None, None] * kernel
    bias = ours["patch_embedding.bias"] + shift.sum((1, 2, 3))
    kernel = kernel / (2 * std)[:, None, None]
    # (dim, channels, p, p) -> (dim, p * p * channels)
    ours["patch_embedding.weight"] = kernel.permute(0, 2, 3, 1).flatten(1).float()
    ours["patch_embedding.bias"] = bias.float()
    return ours


if __name__ == "__main__":
    sys.exit(main())
