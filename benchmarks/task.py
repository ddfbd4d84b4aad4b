"""What every method is given: one base model, the forget images, and what it may retain by."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from vdu_peft.denoiser import Denoiser


@dataclass(frozen=True)
class Task:
    """One class to forget, on one base model.

    Attributes:
        denoiser: the base model; a method changes it in place.
        forget: (N_f, C, H, W) in [-1, 1], the undesired images.
        retain: (N_r, C, H, W) in [-1, 1], real images of the other classes. A method that uses them sees what ours
            may not.
        max_train_steps: optimizer steps.
        train_batch_size: forget images, and as many retained ones, per step.
        seed: of everything random.
        retrained: folder of the model trained without the class, where there is one.
        classify: labels (N,) of images (N, C, H, W) in [-1, 1], for a method that is told what no user can know.
    """

    denoiser: Denoiser
    forget: torch.Tensor
    retain: torch.Tensor
    max_train_steps: int
    train_batch_size: int
    seed: int
    retrained: Path | None = None
    classify: Callable[[torch.Tensor], torch.Tensor] | None = None


class Outcome(NamedTuple):
    """What a method tells of its run; the changed model is the task's denoiser."""

    status: str
    steps: int
    trained_parameters: int
    step_cpu_seconds: float  # CPU time of one step, without replay, Fisher information, checkpoints, calibration
    scale: float = 1.0  # what a learned delta was multiplied by in the end
