"""Gradient ascent on the forget images' denoising loss, all parameters: the plainest unlearning there is.

Golatkar, Achille, Soatto 2020 ("NegGrad"), with the diffusion ELBO for the likelihood.
"""

from benchmarks.baselines.finetune import draw, finetune, gradients, loss
from benchmarks.task import Outcome, Task


def gradient_ascent(task: Task, learning_rate: float) -> Outcome:
    return finetune(task, learning_rate, lambda: gradients(-loss(task, draw(task.forget, task)), task))
