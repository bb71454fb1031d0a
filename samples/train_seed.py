"""Train the sample network on MNIST and write model.pt.

    python samples/train_seed.py --root DATA      # DATA/MNIST/raw holds the four MNIST files

Same seed, same versions, same machine: same bytes.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from seed_network import seed_network
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.datasets import MNIST

MEAN, STD = 0.1307, 0.3081
BATCH = 128
PROGRESS = Console(stderr=True)


def mnist_tensors(root: Path, *, train: bool) -> tuple[Tensor, Tensor]:
    """Normalised images (N, 1, 28, 28) and labels (N,), the whole set at once."""
    dataset = MNIST(str(root), train=train, download=False)
    images = dataset.data.unsqueeze(1).float().div(255).sub(MEAN).div(STD)
    return images, dataset.targets


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    order: torch.Generator,
    title: str,
) -> None:
    """One pass over the images in a seeded random order."""
    model.train()
    batches = torch.randperm(len(images), generator=order).split(BATCH)
    for batch in track(batches, title, console=PROGRESS, transient=True, disable=not PROGRESS.is_terminal):
        optimizer.zero_grad()
        F.nll_loss(model(images[batch]), labels[batch]).backward()
        optimizer.step()


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The fraction of images classified correctly, in eval mode."""
    model.eval()
    pairs = zip(images.split(1000), labels.split(1000), strict=True)
    hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in pairs)
    return hits / len(labels)


def save_module(model: nn.Module, path: Path) -> None:
    """Write the whole module, in eval mode, without gradients.

    Saved through memory, because `torch.save` writes the file's own name into the archive.
    """
    model.zero_grad(set_to_none=True)
    archive = io.BytesIO()
    torch.save(model.eval(), archive)
    path.write_bytes(archive.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder that holds MNIST/raw")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("model.pt"))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    order = torch.Generator().manual_seed(options.seed)
    model = seed_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images, labels = mnist_tensors(options.root, train=True)
    held_out = mnist_tensors(options.root, train=False)

    for epoch in range(1, options.epochs + 1):
        train_epoch(model, optimizer, images, labels, order, f"epoch {epoch}/{options.epochs}")
        print(f"epoch {epoch}: {accuracy(model, *held_out):.2%} of the test images", flush=True)
    save_module(model, options.output)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
