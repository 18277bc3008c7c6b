"""The one-hidden-layer ReLU network of the GmP paper's regression experiments.

Source: Chen & Ge, "Neural Characteristic Activation Value Analysis for Improved ReLU Network Feature Learning"
(arXiv 2305.15912), section 5 "UCI Regression": one hidden layer of 100 units. `mlp(inputs=1)` is the paper's 1D Levy
network, `mlp(inputs=2, hidden=10)` its 2D banana classifier.
"""

import torch
from torch import nn


class MLP(nn.Module):
    """Linear, ReLU, Linear: hidden·(inputs + 1) + outputs·(hidden + 1) parameters, 1,501 by default.

    Input: (N, inputs) float, features standardized by the caller.
    Output: (N, outputs), the targets themselves: no output nonlinearity.
    torch.fx traces it.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, hidden)
        self.relu = nn.ReLU()
        self.output = nn.Linear(hidden, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        targets: torch.Tensor = self.output(self.relu(self.hidden(x)))
        return targets


def mlp(inputs: int = 13, hidden: int = 100, outputs: int = 1) -> MLP:
    """A freshly initialized `MLP`; the default takes the 13 features of Boston housing."""
    return MLP(inputs, hidden, outputs)
