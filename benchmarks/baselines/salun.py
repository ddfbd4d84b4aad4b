"""Ascent on the weights that matter most to the forget images: SalUn (Fan et al. 2024, arXiv 2310.12508).

The paper's generator unlearning trains a forgotten condition toward another one's prediction, which an unconditional
model has not; this is its ascent variant. The mask is the half of all weights with the largest gradient of the forget
loss at the base model. ``retain`` adds the denoising loss of retained images: ``none``, the model's own ``replay``, or
``real`` ones.
"""

import torch

from benchmarks.baselines.finetune import Gradients, draw, finetune, gradients, loss, parameters, retained
from benchmarks.task import Outcome, Task

MASK_BATCHES = 20


def salun(task: Task, learning_rate: float, retain: str) -> Outcome:
    images = None if retain == "none" else retained(task, retain)
    mask = saliency_mask(task)

    def gradient() -> Gradients:
        value = -loss(task, draw(task.forget, task))
        if images is not None:
            value = value + loss(task, draw(images, task))
        return [g * m for g, m in zip(gradients(value, task), mask, strict=True)]

    return finetune(task, learning_rate, gradient)


def saliency_mask(task: Task) -> list[torch.Tensor]:
    """1 where the magnitude of the summed gradient is above the median of all weights', else 0."""
    total = [torch.zeros_like(p) for p in parameters(task)]
    for _ in range(MASK_BATCHES):
        for sum_, grad in zip(total, gradients(loss(task, draw(task.forget, task)), task), strict=True):
            sum_.add_(grad)
    threshold = torch.cat([t.abs().flatten() for t in total]).median()
    return [(t.abs() > threshold).to(t.dtype) for t in total]
