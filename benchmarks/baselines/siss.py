"""Subtracted importance-sampled scores: SISS (Alberti, Hasanaliyev, Shah, Ermon 2025, arXiv 2503.01034).

One noisy image m, drawn from the even mixture of a retained image's and a forget image's noised distributions, serves
both losses by importance weights. The forget loss is subtracted, its gradient scaled in every step to ``forget_share``
of the retained one's norm (theirs is tuned to about a tenth). It sees real retained images: the upper reference.
"""

import torch

from benchmarks.baselines.finetune import Gradients, draw, finetune, gradients, parameters
from benchmarks.task import Outcome, Task
from vdu_peft.objective import denoising_loss


def siss(task: Task, learning_rate: float, forget_share: float) -> Outcome:
    def gradient() -> Gradients:
        retain_loss, forget_loss = importance_losses(task)
        retaining = torch.autograd.grad(retain_loss, parameters(task), retain_graph=True)
        return subtracted(retaining, gradients(forget_loss, task), forget_share)

    return finetune(task, learning_rate, gradient)


def importance_losses(task: Task) -> tuple[torch.Tensor, torch.Tensor]:
    """Unbiased estimates of the retained and the forget images' denoising loss, from one mixture sample each."""
    retain = draw(task.retain, task)
    forget_images = draw(task.forget, task).images
    alpha_bar = task.denoiser.scheduler.alphas_cumprod.to(retain.images.device)[retain.timesteps]
    scale, std = (v.view(-1, 1, 1, 1) for v in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))
    from_retain = (torch.rand(len(alpha_bar), device=std.device) < 0.5).view(-1, 1, 1, 1)
    chosen = torch.where(from_retain, retain.images, forget_images)
    mixed = task.denoiser.add_noise(chosen, retain.noise, retain.timesteps)
    noises = [(mixed - scale * images) / std for images in (retain.images, forget_images)]
    # q(m|x) ∝ exp(−‖m − √ᾱ x‖² / 2σ²) = exp(−‖noise‖² / 2)
    log_density = torch.stack([-noise.square().flatten(1).sum(1) / 2 for noise in noises])
    weights = 2 * log_density.softmax(0)  # q_i / (½ q_retain + ½ q_forget)
    noise_pred = task.denoiser.noise_pred(mixed, retain.timesteps)
    losses = [(w * denoising_loss(noise_pred, noise)).mean() for w, noise in zip(weights, noises, strict=True)]
    return losses[0], losses[1]


def subtracted(retaining: Gradients, forgetting: Gradients, forget_share: float) -> Gradients:
    norms = [sum(g.square().sum() for g in grads).sqrt() for grads in (retaining, forgetting)]
    scale = forget_share * norms[0] / norms[1].clamp_min(1e-12)
    return [r - scale * f for r, f in zip(retaining, forgetting, strict=True)]
