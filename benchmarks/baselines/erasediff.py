"""Forgetting as the constraint of retaining: EraseDiff (Wu, Le, Hayat, Harandi 2024, arXiv 2401.05779).

min ℓ(retain) subject to the forget loss f = ‖ε_θ(x_t) − ε'‖², ε' noise that has nothing to do with x_t, being at its
minimum. First-order, as in the bilevel method it builds on (Liu et al. 2022): the step is ∇ℓ + λ ∇f with
λ = max(0, eta − ⟨∇ℓ, ∇f⟩ / ‖∇f‖²), which lowers f at the rate of eta at least. Adam takes the step. ε' is uniform on
[0, 1], as theirs; x_t keeps its own Gaussian noise.
"""

import torch

from benchmarks.baselines.finetune import Gradients, draw, finetune, gradients, loss, retained
from benchmarks.task import Outcome, Task


def erasediff(task: Task, learning_rate: float, eta: float, retain: str) -> Outcome:
    images = retained(task, retain)

    def gradient() -> Gradients:
        forget = draw(task.forget, task)
        forgetting = gradients(loss(task, forget, torch.rand_like(forget.noise)), task)
        retaining = gradients(loss(task, draw(images, task)), task)
        return constrained(retaining, forgetting, eta)

    return finetune(task, learning_rate, gradient)


def constrained(retaining: Gradients, forgetting: Gradients, eta: float) -> Gradients:
    """∇ℓ + λ ∇f."""
    dot = sum((r * f).sum() for r, f in zip(retaining, forgetting, strict=True))
    square = sum(f.square().sum() for f in forgetting)
    weight = (eta - dot / square).clamp_min(0)
    return [r + weight * f for r, f in zip(retaining, forgetting, strict=True)]
