"""A small classifier that judges generated images: class probabilities, and features for FID."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn


class JudgeError(ValueError):
    """A judge that cannot be loaded; the message names the file and the mend."""


class Judge(nn.Module):
    """Two convolutions and two linear layers for 28 x 28 grayscale images in [-1, 1].

    Dropout makes the features redundant, so that FID on them does not hang on a single unit.
    """

    num_features = 64
    image_size, channels = (28, 28), 1

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3)
        self.conv2 = nn.Conv2d(16, 32, 3)
        self.features_layer = nn.Linear(32 * 5 * 5, self.num_features)
        self.head = nn.Linear(self.num_features, num_classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 1, 28, 28) in [-1, 1] → (N, 64), non-negative."""
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return F.relu(self.features_layer(x.flatten(1)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (N, num_classes)."""
        return self.head(F.dropout(self.features(images), 0.5, self.training))

    @torch.no_grad()
    def judge(self, images: torch.Tensor, batch_size: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
        """(features (N, 64), labels (N,) int64) of images (N, 1, 28, 28) in [-1, 1]."""
        features = torch.cat([self.features(batch) for batch in images.split(batch_size)])
        return features, self.head(features).argmax(1)

    @classmethod
    def from_file(cls, file: str | Path) -> "Judge":
        """Read safetensors weights.

        Raises:
            JudgeError: the file is missing, unreadable or of another network.
        """
        judge = cls()
        try:
            judge.load_state_dict({name: tensor.float() for name, tensor in load_file(file).items()})
        except (OSError, SafetensorError, RuntimeError) as error:
            raise JudgeError(f"{file}: not the weights of a judge ({str(error).splitlines()[0]})") from error
        return judge.eval()
