"""Unlearn in a network of your own: any module that maps (x_t, t) to noise, with a diffusers scheduler for its betas.

python examples/own_module.py --output_dir own-module
"""

import argparse
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from torch import nn

from vdu_peft import Denoiser, UnlearnConfig, UnlearnResult, VDUConfig, unlearn


class TinyDenoiser(nn.Module):
    """A convolutional denoiser of 8 x 8 grayscale images."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.embed = nn.Linear(1, width)
        self.inner = nn.Conv2d(1, width, 3, padding=1)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.outer = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.inner(x_t) + self.embed(t[:, None] / 1000)[:, :, None, None])
        return self.outer(torch.relu(self.middle(hidden)))


def stripes(count: int, vertical: bool) -> torch.Tensor:
    """(count, 1, 8, 8) images of stripes at random phases."""
    ramp = torch.arange(8) + torch.randint(4, (count, 1))
    lines = torch.where(ramp % 4 < 2, 1.0, -1.0)[:, None, None, :].expand(count, 1, 8, 8)
    return lines if vertical else lines.mT


def main(argv=None) -> UnlearnResult:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--pretrain_steps", type=int, default=600)
    parser.add_argument("--max_train_steps", type=int, default=400)
    args = parser.parse_args(argv)
    torch.manual_seed(0)

    denoiser = Denoiser(TinyDenoiser(), DDPMScheduler(), image_size=(8, 8), channels=1)
    optimizer = torch.optim.Adam(denoiser.model.parameters(), lr=3e-3)
    for _ in range(args.pretrain_steps):
        clean = torch.cat([stripes(32, True), stripes(32, False)])
        noise, timesteps = torch.randn_like(clean), torch.randint(1000, (64,))
        loss = (denoiser.noise_pred(denoiser.add_noise(clean, noise, timesteps), timesteps) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    adapter = VDUConfig.for_model(denoiser.model)
    config = UnlearnConfig(max_train_steps=args.max_train_steps, replay_size=64)
    result = unlearn(denoiser, stripes(20, vertical=True), config, adapter, output_dir=args.output_dir)
    print(f"{result.status}: {result.reached}")
    return result


if __name__ == "__main__":
    main()
