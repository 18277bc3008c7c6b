"""Train a converted model in a loop of your own. All that differs from a plain model: its parameter groups.

    python examples/hand_written_loop.py --steps 60

A CNN with random weights is brought into GmP with mean normalization in place of its batch norms, trained on the bundled
Fashion-MNIST subset, and folded back into plain convolutions that compute the same.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import reparam
from reparam.demo.model import small_cnn
from reparam.layers import init_model
from reparam.training.data.loader import prepare
from reparam.training.data.loading import load_data
from reparam.training.groups import make_groups
from reparam.training.recipe import Recipe

BUNDLED = Path(reparam.__file__).parent / "demo" / "data"
BATCH_SIZE = 100


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    logits = torch.cat([model.eval()(part) for part in torch.split(images, 250)])
    return float((logits.argmax(1) == labels).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a converted model in a loop of your own.")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps")
    steps = parser.parse_args().steps

    data = load_data(str(BUNDLED))
    splits = [split.take(range(len(split))) for split in (data.train, data.validation)]
    (images, labels), test = [(prepare(x, data.mean, data.std), y) for x, y in splits]

    torch.manual_seed(0)
    batches = torch.split(images, 250)
    # The running means of mean normalization come from data, so that in evaluation mode nothing changes.
    model = reparam.convert(
        small_cnn(), to="gmp", fold_bn=True, mean_norm=True, momentum=0.1, calibrate=batches
    )
    init_model(model.train(), "data", batches)  # a model that is trained already goes without
    print(f"accuracy {accuracy(model, *test):.1%}")

    # An angle is no weight: it wants a smaller rate under SGD, and no weight decay. One group a kind:
    groups = make_groups(model, Recipe(optimizer="sgd", lr=0.1, weight_decay=5e-4))
    for group in groups:
        print(f"{group['kind']:8} {sum(p.numel() for p in group['params']):6} numbers, lr {group['lr']:g}")
    optimizer = torch.optim.SGD(groups, momentum=0.9)

    generator = torch.Generator().manual_seed(0)
    model.train()
    for step in range(1, steps + 1):
        chosen = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % 20 == 0 or step == steps:
            print(f"step {step}/{steps}  loss {loss.item():.3f}")
    print(f"accuracy {accuracy(model, *test):.1%}")

    folded = reparam.fold(model.eval())
    with torch.no_grad():
        difference = float((folded(test[0]) - model(test[0])).abs().max())
    print(f"folded into {type(folded).__name__}: largest difference of an output {difference:.1e}")


if __name__ == "__main__":
    main()
