"""Elastic weight consolidation with generative replay, after Selective Amnesia (Heng, Soh 2023, arXiv 2305.10120).

loss = −ℓ(forget) + fisher_weight · Σ_i F_i (θ_i − θ*_i)² / 2 + ℓ(replay), F the diagonal Fisher information of the
denoising loss on the replay images. Their surrogate for the first term is a distribution under the forgotten
condition, and an unconditional model has none: the likelihood itself is lowered, as in their equation before it. F is
of a loss averaged over an image's elements at one timestep, theirs of one summed over elements and timesteps: the same
strength takes a larger ``fisher_weight`` here.
"""

import torch

from benchmarks.baselines.finetune import Gradients, draw, finetune, gradients, loss, parameters, retained
from benchmarks.task import Outcome, Task

FISHER_SAMPLES = 200


def selective_amnesia(task: Task, learning_rate: float, fisher_weight: float) -> Outcome:
    replay = retained(task, "replay")
    mean = [p.detach().clone() for p in parameters(task)]
    information = fisher(task, replay)

    return finetune(task, learning_rate, lambda: penalised(task, replay, mean, information, fisher_weight))


def penalised(
    task: Task, replay: torch.Tensor, mean: Gradients, information: Gradients, fisher_weight: float
) -> list[torch.Tensor]:
    """The gradient of the whole loss on a batch, its quadratic's in closed form."""
    terms = gradients(loss(task, draw(replay, task)) - loss(task, draw(task.forget, task)), task)
    return [
        g + fisher_weight * f * (p.detach() - m)
        for g, f, p, m in zip(terms, information, parameters(task), mean, strict=True)
    ]


def fisher(task: Task, images: torch.Tensor) -> list[torch.Tensor]:
    """Mean squared gradient of one image's loss at one timestep."""
    single = Task(task.denoiser, images, images, 0, 1, task.seed)
    total = [torch.zeros_like(p) for p in parameters(task)]
    for _ in range(FISHER_SAMPLES):
        for sum_, grad in zip(total, gradients(loss(single, draw(images, single)), task), strict=True):
            sum_.add_(grad.square() / FISHER_SAMPLES)
    return total
