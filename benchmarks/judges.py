"""A judge of MNIST samples that this project did not train."""

from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

WEIGHTS = Path(__file__).parent / "models" / "lenet_mnist.safetensors"


class LeNet5(nn.Module):
    """LeNet-5 of csinva/gan-vae-pretrained-pytorch; layers named as in its weights."""

    def __init__(self):
        super().__init__()
        self.convnet = nn.Sequential(
            OrderedDict(
                c1=nn.Conv2d(1, 6, 5),
                relu1=nn.ReLU(),
                s2=nn.MaxPool2d(2),
                c3=nn.Conv2d(6, 16, 5),
                relu3=nn.ReLU(),
                s4=nn.MaxPool2d(2),
                c5=nn.Conv2d(16, 120, 5),
                relu5=nn.ReLU(),
            )
        )
        self.fc = nn.Sequential(OrderedDict(f6=nn.Linear(120, 84), relu6=nn.ReLU(), f7=nn.Linear(84, 10)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (N, 10) of images (N, 1, 32, 32) in [0, 1]."""
        return self.fc(self.convnet(images).flatten(1))


@torch.no_grad()
def lenet(images: torch.Tensor) -> torch.Tensor:
    """Digits (N,) int64 of images (N, 1, 28, 28) in [-1, 1]."""
    network = LeNet5().eval()
    network.load_state_dict(load_file(WEIGHTS))
    resized = F.interpolate((images + 1) / 2, size=(32, 32), mode="bilinear", align_corners=False)
    return torch.cat([network(batch) for batch in resized.split(500)]).argmax(1)
