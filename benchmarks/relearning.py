"""Does the class come back? Fine-tune the unlearned model and watch the class's share."""

import copy
import math
from dataclasses import replace

from benchmarks.baselines.finetune import draw, finetune, gradients, loss
from benchmarks.bases import Base
from benchmarks.experiment import Relearning
from benchmarks.task import Task
from vdu_peft.demo import demo_samples


def relearn(task: Task, options: Relearning, forget_class: int, base: Base) -> list[float]:
    """The class's share of samples by the headline judge after each of ``options.steps`` steps on all parameters.

    nan after steps that were not reached, as the loss was not finite. The task's own model is left as it is. A model
    that never knew the class would learn it from forget images, too: what counts is the difference between methods,
    and what retained images alone bring back.
    """
    images = {"forget": task.forget, "retain": task.retain}[options.source]
    # Spread over the set, which may lie in the order of its classes.
    images = images[:: max(len(images) // options.num_images, 1)][: options.num_images]
    twin = copy.deepcopy(task.denoiser)
    twin.model.requires_grad_(True)
    # Another seed: who relearns does not have the noise and timesteps that unlearning had.
    training = replace(task, denoiser=twin, max_train_steps=max(options.steps), seed=task.seed + 104_729)
    shares = []

    def measure(step: int) -> None:
        if step in options.steps:
            labels = base.headline(base.as_judged(demo_samples(twin, options.num_samples, task.seed, None)))
            shares.append((labels == forget_class).double().mean().item())

    finetune(
        training,
        options.learning_rate,
        lambda: gradients(loss(training, draw(images, training)), training),
        callback=measure,
    )
    return shares + [math.nan] * (len(options.steps) - len(shares))
