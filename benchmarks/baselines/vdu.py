"""Variational Diffusion Unlearning as the paper states it: all parameters, quadratic in parameter space.

loss = (1 - gamma) · A + gamma · B / (N_forget · D), A minus the forget images' denoising loss per element,
B = Σ_i (θ_i − μ*_i)² / (2 σ*_i²) (arXiv 2510.04058). B is divided by the forget images' elements, of which A is a mean:
beside that the bare sum over all weights lets none of them move. (Our own KL is divided by its weights.) μ* is the base
model. The paper takes σ* from checkpoints of the pre-training. Ours were not kept, so they come from going on with it,
a short way, on the real images, forgotten and retained: more than our method may see.
"""

import copy
from collections.abc import Callable

import torch

from benchmarks.baselines.finetune import Gradients, draw, finetune, gradients, loss, parameters
from benchmarks.task import Outcome, Task

# Of the going on that gives σ*: three checkpoints, 50 steps apart.
CHECKPOINTS, CHECKPOINT_STEPS, CHECKPOINT_LEARNING_RATE = 3, 50, 1e-4
# A weight that stood still over the checkpoints would have infinite weight.
SMALLEST_STD = 1e-6


def objective_gradient(task: Task, gamma: float, variance: Gradients) -> Callable[[], Gradients]:
    """What a step goes along; σ*² of every weight given, or one number for all of a parameter's."""
    mean = [p.detach().clone() for p in parameters(task)]

    def gradient() -> Gradients:
        ascent = gradients(-loss(task, draw(task.forget, task)), task)
        return weighted(ascent, [p.detach() for p in parameters(task)], mean, variance, gamma, task.forget.numel())

    return gradient


def weighted(
    ascent: Gradients, weights: Gradients, mean: Gradients, variance: Gradients, gamma: float, elements: int
) -> list[torch.Tensor]:
    """(1 − gamma) ∇A + gamma ∇B / elements, the quadratic's gradient (θ − μ*) / σ*² in closed form."""
    return [
        (1 - gamma) * a + gamma / elements * (w - m) / v
        for a, w, m, v in zip(ascent, weights, mean, variance, strict=True)
    ]


def isotropic(task: Task, learning_rate: float, gamma: float, std: float) -> Outcome:
    """One σ* for every weight."""
    return finetune(task, learning_rate, objective_gradient(task, gamma, one_variance(task, std)))


def one_variance(task: Task, std: float) -> list[torch.Tensor]:
    return [torch.tensor(std**2)] * len(parameters(task))


def checkpoints(task: Task, learning_rate: float, gamma: float) -> Outcome:
    """σ*_i from checkpoints."""
    return finetune(task, learning_rate, objective_gradient(task, gamma, variance(checkpoint_weights(task))))


def checkpoint_weights(task: Task) -> list[list[torch.Tensor]]:
    """All weights at every checkpoint; the task's own model is left as it is."""
    twin = copy.deepcopy(task.denoiser)
    images = torch.cat([task.forget, task.retain])
    weights = []
    for number in range(CHECKPOINTS):
        training = Task(twin, images, images, CHECKPOINT_STEPS, task.train_batch_size, task.seed + number)
        finetune(training, CHECKPOINT_LEARNING_RATE, lambda t=training: gradients(loss(t, draw(images, t)), t))
        weights.append([p.detach().clone() for p in parameters(training)])
    return weights


def variance(weights: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Every weight's variance σ*² over the checkpoints."""
    return [torch.stack(w).var(0).clamp_min(SMALLEST_STD**2) for w in zip(*weights, strict=True)]
