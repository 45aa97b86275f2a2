"""One trial in the original's way, without NNI: Pillow and torchvision in a DataLoader, float32, vit-pytorch.

As in the original design: every image is decoded again in every epoch, Adam, evaluation on the
held-out images after every epoch. Its timer stands where a trial's would: nothing is left out.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from vit_pytorch import ViT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="with train/ and val/")
    parser.add_argument("--model", type=json.loads, required=True, help="sizes, as JSON")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--workers", type=int, default=0, help="0, the original: in this process")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one an epoch")
    args = parser.parse_args()
    size = args.model

    torch.manual_seed(0)
    transform = transforms.Compose([
        transforms.Resize((size["image_size"], size["image_size"])),
        transforms.ToTensor(),
        transforms.Normalize([0.5] * 3, [0.5] * 3),
    ])  # fmt: skip
    loaders = {
        split: DataLoader(
            datasets.ImageFolder(args.data / split, transform),
            batch_size=size["batch_size"],
            shuffle=split == "train",
            num_workers=args.workers,
            persistent_workers=args.workers > 0,
            pin_memory=args.device != "cpu",
        )
        for split in ("train", "val")
    }
    model = ViT(
        image_size=size["image_size"], patch_size=size["image_size"] // size["patch_num"],
        num_classes=len(loaders["train"].dataset.classes), dim=size["dim"], depth=size["depth"],
        heads=size["heads"], dim_head=size["dim_head"], mlp_dim=size["mlp_dim"],
    ).to(args.device)  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)

    for _ in range(args.epochs):
        began, seen = time.perf_counter(), 0
        model.train()
        for images, targets in loaders["train"]:
            images, targets = images.to(args.device), targets.to(args.device)
            loss = F.cross_entropy(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen += len(targets)
            loss.item()  # the original logged every step
        trained = time.perf_counter()
        model.eval()
        correct = total = 0
        with torch.no_grad():
            for images, targets in loaders["val"]:
                predicted = model(images.to(args.device)).argmax(1).cpu()
                correct += (predicted == targets).sum().item()
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
