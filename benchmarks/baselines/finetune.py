"""The loop that every full-parameter baseline shares: a batch, a gradient, an Adam step."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from accelerate.utils import set_seed

from benchmarks.task import Outcome, Task
from vdu_peft.batch import draw_indices
from vdu_peft.config import UnlearnConfig
from vdu_peft.learning_rate import lr_factor
from vdu_peft.likeness import own_likeness
from vdu_peft.objective import denoising_loss
from vdu_peft.replay import draw_replay, drop_forget_like, replay_seeds

# A baseline rehearses its replay as it is, so that more of the forget class must go than from what ours holds.
FILTER_QUANTILE = 0.05

Gradients = Sequence[torch.Tensor]


class Noisy(NamedTuple):
    """Images, their noise and timesteps, and what the model sees of them."""

    images: torch.Tensor  # (b, C, H, W)
    noise: torch.Tensor  # (b, C, H, W)
    timesteps: torch.Tensor  # (b,)
    x_t: torch.Tensor  # (b, C, H, W)


def draw(images: torch.Tensor, task: Task) -> Noisy:
    """A batch of the images at uniform timesteps."""
    indices = draw_indices(len(images), task.train_batch_size)
    batch = images[indices].to(task.denoiser.device)
    noise = torch.randn_like(batch)
    timesteps = torch.randint(task.denoiser.num_train_timesteps, (len(batch),), device=batch.device)
    return Noisy(batch, noise, timesteps, task.denoiser.add_noise(batch, noise, timesteps))


def loss(task: Task, batch: Noisy, noise: torch.Tensor | None = None) -> torch.Tensor:
    """Mean denoising loss of a batch; ``noise`` is the target, the batch's own when None."""
    noise_pred = task.denoiser.noise_pred(batch.x_t, batch.timesteps)
    return denoising_loss(noise_pred, batch.noise if noise is None else noise).mean()


def parameters(task: Task) -> list[torch.nn.Parameter]:
    return list(task.denoiser.model.parameters())


def gradients(value: torch.Tensor, task: Task) -> Gradients:
    return torch.autograd.grad(value, parameters(task))


def retained(task: Task, source: str) -> torch.Tensor:
    """What a method retains by: its own ``replay``, less what looks like the forget images, or ``real`` images."""
    if source == "real":
        return task.retain
    if source != "replay":
        raise ValueError(f"retain: {source!r} is neither replay nor real")
    config = UnlearnConfig().filled(None)
    seeds = replay_seeds(task.seed, config.replay_size)
    drawn = draw_replay(task.denoiser, seeds, num_inference_steps=config.replay_inference_steps)
    likeness, scores = own_likeness(task.denoiser, task.forget, drawn, None, task.seed)
    return drop_forget_like(drawn, None, scores, likeness.threshold(FILTER_QUANTILE))[0]


def finetune(
    task: Task,
    learning_rate: float,
    gradient: Callable[[], Gradients],
    callback: Callable[[int], None] = lambda step: None,
) -> Outcome:
    """Adam on all parameters for the task's steps, along what ``gradient`` returns.

    Warmup, decay and gradient clipping are those of our own trainer.

    Stops at the first gradient that is not finite and leaves the model as it was before it.

    Args:
        callback: called after every step with the number of steps taken.
    """
    trained = parameters(task)
    optimizer = torch.optim.Adam(trained, lr=learning_rate)
    status, steps, start = "done", 0, time.process_time()
    for step in range(task.max_train_steps):
        set_seed((task.seed * 1_000_003 + step) % 2**32)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * lr_factor(step, task.max_train_steps)
        for parameter, grad in zip(trained, gradient(), strict=True):
            parameter.grad = grad
        norm = torch.nn.utils.clip_grad_norm_(trained, UnlearnConfig.max_grad_norm)
        if not torch.isfinite(norm):
            status = "not finite"
            break
        optimizer.step()
        optimizer.zero_grad()  # or they would lie beside the next ones
        steps = step + 1
        callback(steps)
    seconds = (time.process_time() - start) / max(steps, 1)
    return Outcome(status, steps, sum(p.numel() for p in trained), seconds)
