"""A model's denoising losses on given images, for whatever compares them with another's or with other images'."""

from collections.abc import Sequence

import torch

from vdu_peft.denoiser import Denoiser
from vdu_peft.objective import denoising_loss


@torch.no_grad()
def image_losses(
    denoiser: Denoiser,
    images: torch.Tensor,
    timesteps: Sequence[int],
    seed: int,
    class_labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each image's denoising loss at each timestep: (N, T) float32 on the CPU, mean over elements.

    Args:
        images: (N, C, H, W), as the denoiser encodes them.
        seed: of the noise, which is the same for the same seed, so that two models' losses differ by the models alone.
        class_labels: (N,), of a model with a condition.
    """
    generator = torch.Generator().manual_seed(seed)
    losses = torch.empty(len(images), len(timesteps))
    for column, t in enumerate(timesteps):
        noise = torch.randn(images.shape, generator=generator)
        for rows in torch.arange(len(images)).split(denoiser.batch_size):
            steps = torch.full((len(rows),), t)
            x_t = denoiser.add_noise(images[rows], noise[rows], steps).to(denoiser.device)
            condition = None if class_labels is None else class_labels[rows].to(denoiser.device)
            noise_pred = denoiser.noise_pred(x_t, steps.to(denoiser.device), condition).cpu()
            losses[rows, column] = denoising_loss(noise_pred, noise[rows])
    return losses
