"""Forget images' noise predictions are trained toward fresh noise that has nothing to do with them.

The forgetting objective of EraseDiff (Wu, Le, Hayat, Harandi 2024, arXiv 2401.05779) alone, with Gaussian noise.
"""

import torch

from benchmarks.baselines.finetune import Gradients, draw, finetune, gradients, loss
from benchmarks.task import Outcome, Task


def noise_target(task: Task, learning_rate: float) -> Outcome:
    def gradient() -> Gradients:
        batch = draw(task.forget, task)
        return gradients(loss(task, batch, torch.randn_like(batch.noise)), task)

    return finetune(task, learning_rate, gradient)
