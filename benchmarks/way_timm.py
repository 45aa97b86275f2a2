"""One trial in timm's way, after its train.py: create_dataset, create_loader with prefetcher, amp, fused Adam.

No augmentation, no mixup, no EMA: as the others. The loop is that of timm's train.py less what it
logs; the model is timm's VisionTransformer with heads as wide as the original's.
"""

import argparse
import contextlib
import json
import time
from pathlib import Path

import torch
from timm.data import create_dataset, create_loader
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2


def make_model(size: dict[str, int], classes: int) -> VisionTransformer:
    """timm's ViT with the original's sizes; equal parameters but for the two norms around the patches."""
    model = VisionTransformer(
        img_size=size["image_size"], patch_size=size["image_size"] // size["patch_num"],
        num_classes=classes, embed_dim=size["dim"], depth=size["depth"], num_heads=size["heads"],
        mlp_ratio=size["mlp_dim"] / size["dim"], qkv_bias=False,
    )  # fmt: skip
    for block in model.blocks:  # its constructor knows only heads of dim / heads
        block.attn = Attention(
            size["dim"], size["heads"], attn_head_dim=size["dim_head"], qkv_bias=False
        )
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="with train/ and val/")
    parser.add_argument("--model", type=json.loads, required=True, help="sizes, as JSON")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--amp", choices=("bfloat16", "float16"), help="mixed precision")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one an epoch")
    args = parser.parse_args()
    size, device = args.model, torch.device(args.device)

    torch.manual_seed(0)
    loaders = {}
    for split in ("train", "val"):
        dataset = create_dataset("", root=args.data, split=split)
        loaders[split] = create_loader(
            dataset, (3, size["image_size"], size["image_size"]), size["batch_size"],
            is_training=split == "train", no_aug=True, hflip=0.0, color_jitter=0.0,
            interpolation="bilinear", crop_pct=1.0, crop_mode="squash", mean=(0.5,) * 3,
            std=(0.5,) * 3, num_workers=args.workers, device=device, use_prefetcher=True,
            pin_memory=device.type != "cpu", persistent_workers=args.workers > 0,
        )  # fmt: skip
    classes = len({target for _, target in dataset.reader})
    model = make_model(size, classes).to(device)
    optimizer = create_optimizer_v2(model, opt="adam", lr=args.lr, fused=True)
    criterion = torch.nn.CrossEntropyLoss()
    compiled = torch.compile(model) if args.compile else model
    amp = contextlib.nullcontext()
    if args.amp:
        amp = torch.autocast(device.type, getattr(torch, args.amp))
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "float16")

    for _ in range(args.epochs):
        began, seen = time.perf_counter(), 0
        model.train()
        for images, targets in loaders["train"]:
            with amp:
                loss = criterion(compiled(images), targets)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            seen += len(targets)
        if device.type == "cuda":
            torch.cuda.synchronize()
        trained = time.perf_counter()
        model.eval()
        correct = total = 0
        with torch.no_grad(), amp:
            for images, targets in loaders["val"]:
                correct += (compiled(images).argmax(1) == targets).sum().item()
                total += len(targets)
        line = {
            "images_per_second": seen / (trained - began),
            "accuracy": 100 * correct / total,
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        with args.out.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
