"""The deep Q-network for Atari games, the reinforcement learning network of the weight normalization paper.

Source: Mnih et al. 2015, "Human-level control through deep reinforcement learning", Methods, "Model architecture";
Salimans & Kingma 2016, figure 5 (Space Invaders).
"""

import torch
from torch import nn


class DQN(nn.Module):
    """Three strided convolutions, one dense layer, one value for each action.

    Input: (N, 4, 84, 84) float, the last four preprocessed frames in [0, 1].
    Output: (N, actions) action values Q(s, a), unbounded.
    Parameters: 1,684,128 and 513 an action, 1,687,206 by default.
    torch.fx traces it.
    """

    def __init__(self, actions: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 32, kernel_size=8, stride=4)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(32, 64, kernel_size=4, stride=2)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(64, 64, kernel_size=3, stride=1)
        self.relu3 = nn.ReLU()
        self.hidden = nn.Linear(64 * 7 * 7, 512)
        self.relu4 = nn.ReLU()
        self.values = nn.Linear(512, actions)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        x = self.relu1(self.conv1(frames))  # (N, 32, 20, 20)
        x = self.relu2(self.conv2(x))  # (N, 64, 9, 9)
        x = self.relu3(self.conv3(x))  # (N, 64, 7, 7)
        x = self.relu4(self.hidden(x.flatten(1)))
        values: torch.Tensor = self.values(x)
        return values


def dqn(actions: int = 6) -> DQN:
    """A freshly initialized `DQN`; Space Invaders has 6 actions, the full Atari set 18."""
    return DQN(actions)
