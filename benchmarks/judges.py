"""The benchmarks' judges: networks that this project did not train, and one that it trained further."""

from collections import OrderedDict
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

MODELS = Path(__file__).parent / "models"


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
    network.load_state_dict(load_file(MODELS / "lenet_mnist.safetensors"))
    resized = F.interpolate((images + 1) / 2, size=(32, 32), mode="bilinear", align_corners=False)
    return torch.cat([network(batch) for batch in resized.split(500)]).argmax(1)


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut without weights: a strided slice, with zeros for the channels it lacks."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.stride = 1 if in_channels == out_channels else 2
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        lacking = (out.shape[1] - x.shape[1]) // 2
        return F.relu(out + F.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, lacking, lacking)))


class ResNet20(nn.Module):
    """ResNet-20 for CIFAR-10 of akamaster/pytorch_resnet_cifar10 (He et al. 2016, section 4.2); layers named as in its
    weights, which other data's are trained from. A judge as :class:`vdu_peft.judge.Judge` is one."""

    num_features, num_classes = 64, 10
    image_size, channels = (32, 32), 3
    class_names = None

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*[BasicBlock(16, 16) for _ in range(3)])
        self.layer2 = nn.Sequential(BasicBlock(16, 32), BasicBlock(32, 32), BasicBlock(32, 32))
        self.layer3 = nn.Sequential(BasicBlock(32, 64), BasicBlock(64, 64), BasicBlock(64, 64))
        self.linear = nn.Linear(64, 10)
        # Of the ImageNet images by which it was trained to normalise, in [0, 1].
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, 32, 32) in [-1, 1] → (N, 64), non-negative."""
        x = F.relu(self.bn1(self.conv1(((images + 1) / 2 - self.mean) / self.std)))
        return self.layer3(self.layer2(self.layer1(x))).mean(dim=(2, 3))

    @torch.no_grad()
    def judge(self, images: torch.Tensor, batch_size: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
        """(features (N, 64), labels (N,) int64) of images (N, 3, 32, 32) in [-1, 1]."""
        features = torch.cat([self.features(batch) for batch in images.split(batch_size)])
        return features, self.linear(features).argmax(1)


@cache
def resnet20(data: str) -> ResNet20:
    """That of ``cifar10``, or ours of ``tiny_imagenet``, by ``benchmarks.train_resnet20``."""
    network = ResNet20().eval()
    network.load_state_dict({k: v.float() for k, v in load_file(MODELS / f"resnet20_{data}.safetensors").items()})
    return network
