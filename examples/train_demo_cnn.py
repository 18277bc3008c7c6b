"""Train the demo's small CNN from scratch on the bundled Fashion-MNIST subset; plain PyTorch throughout.

    python examples/train_demo_cnn.py --out small_cnn.safetensors

The last epoch's weights are saved: the test accuracy is printed on the way but selects nothing.
"""

import argparse
import gzip
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from reparam.demo import model as demo_model

BUNDLED = Path(demo_model.__file__).parent / "data"
BATCH_SIZE = 64
MAX_SHIFT = 2
PRINT_EVERY = 10


def read_idx(path: Path) -> torch.Tensor:
    """A gzip IDX file of unsigned bytes as a uint8 tensor; ValueError if it is not one."""
    raw = gzip.decompress(path.read_bytes())
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: not an IDX file of unsigned bytes")
    start = 4 + 4 * raw[3]
    shape = [int(size) for size in np.frombuffer(raw[4:start], dtype=">u4")]
    if len(raw) != start + math.prod(shape):
        raise ValueError(f"{path}: {len(raw)} bytes do not match the shape {shape} in its header")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy())


def load(folder: Path, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 1, 28, 28) float in [0, 1] and labels (N,) int64 of "train" or "t10k"."""
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz")
    return images.unsqueeze(1).float() / 255, labels.long()


def standardize(images: torch.Tensor) -> torch.Tensor:
    return (images - demo_model.MEAN) / demo_model.STD


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each (1, 28, 28) image of the batch mirrored with probability 1/2 and shifted by up to 2 pixels."""
    count, _, height, width = images.shape
    # Before standardization, where zero is the data set's own background.
    padded = F.pad(images, [MAX_SHIFT] * 4)
    shift = torch.randint(0, 2 * MAX_SHIFT + 1, (2, count, 1), generator=generator)
    rows = shift[0] + torch.arange(height)
    columns = shift[1] + torch.arange(width)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    item = torch.arange(count)[:, None, None]
    return padded[item, 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


@torch.no_grad()
def accuracy(net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    net.eval()
    logits: torch.Tensor = net(standardize(images))
    net.train()
    return (logits.argmax(1) == labels).float().mean().item()


def train(data: Path, epochs: int, peak_lr: float, seed: int) -> nn.Module:
    """A trained network, the same one bit for bit for the same arguments on the same machine."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    # The order of a parallel sum depends on the thread count, so more threads would give other weights.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    images, labels = load(data, "train")
    test_images, test_labels = load(data, "t10k")
    net = demo_model.small_cnn()
    steps = epochs * math.ceil(len(images) / BATCH_SIZE)
    optimizer = torch.optim.SGD(net.parameters(), lr=peak_lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_lr, steps, cycle_momentum=False)

    for epoch in range(1, epochs + 1):
        total_loss = 0.0
        for batch in torch.split(torch.randperm(len(images), generator=generator), BATCH_SIZE):
            logits = net(standardize(augment(images[batch], generator)))
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total_loss += loss.item() * len(batch)
        if epoch % PRINT_EVERY == 0 or epoch == epochs:
            test = accuracy(net, test_images, test_labels)
            print(f"epoch {epoch:3d}/{epochs}  loss {total_loss / len(images):.3f}  test accuracy {test:.1%}")
    return net.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's small CNN from scratch.")
    parser.add_argument("--data", type=Path, default=BUNDLED, help="folder of four gzip IDX files")
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--lr", type=float, default=0.1, help="peak of the one-cycle schedule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="replace an existing --out")
    args = parser.parse_args()
    # Checked before training: minutes of work must not end in a refusal.
    if args.out.suffix != ".safetensors" or not args.out.parent.is_dir():
        parser.error(f"--out {args.out}: need a .safetensors name in an existing folder")
    if args.out.exists() and not args.force:
        parser.error(f"{args.out} exists; pass --force to replace it")
    if args.epochs < 1:
        parser.error("--epochs must be at least 1")

    net = train(args.data, args.epochs, args.lr, args.seed)
    save_file(net.state_dict(), args.out, metadata={"format": "pt"})
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
