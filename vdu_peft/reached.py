"""How far a run has come, on images at noise of their own: a step's batch is too few to tell, and before the step."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from vdu_peft.batch import BatchSource
from vdu_peft.config import UnlearnConfig
from vdu_peft.contexts import adapter_scale
from vdu_peft.denoiser import Denoiser
from vdu_peft.terms import loss_terms

# So many forget images are looked at, or some more. Each is compared with itself under the pre-trained model, so that
# what learned nothing is exactly where it began.
NUM_IMAGES = 64


@dataclass(frozen=True)
class Reached:
    """Where the posterior's mean is, between the pre-trained model and what was aimed at.

    Attributes:
        forget_ratio: mean over forget images of the denoising loss over the pre-trained model's: 1 is where it began.
        stability: how far the model has moved on replay images, in its own error's units: 0 is nowhere, 1 destroyed.
        redirect_left: how much of the way to the anchor's prediction is left: 1 is where it began, 0 is there. None
            where nothing is redirected.
    """

    forget_ratio: float
    stability: float
    redirect_left: float | None

    def __str__(self) -> str:
        left = "" if self.redirect_left is None else f", {self.redirect_left:.0%} of the way to the anchor left"
        return f"forget ratio {self.forget_ratio:.2f}{left}, stability {self.stability:.3f}"


@torch.no_grad()
def reached(denoiser: Denoiser, source: BatchSource, config: UnlearnConfig, accelerator: Accelerator) -> Reached:
    """Measure it, alike at each call and in all processes; leaves torch's generator where its own seeds put it."""
    sums = torch.zeros(4, device=accelerator.device)
    batches = -(-NUM_IMAGES // (config.train_batch_size * accelerator.num_processes))
    for number in range(batches):
        set_seed((config.seed * 1_000_003 - 1 - number) % 2**32)  # no step's
        batch = source.draw(accelerator)
        terms = loss_terms(denoiser, denoiser.model, batch, config, accelerator)
        sums[0] += terms["forget_ratio"]
        sums[1] += terms["stability"]
        if "redirect" in terms:
            sums[2] += terms["redirect"]
            with adapter_scale(denoiser.model, 0):
                sums[3] += loss_terms(denoiser, denoiser.model, batch, config, accelerator)["redirect"]
    ratio, stability, redirect, redirect_before = accelerator.reduce(sums, "mean").tolist()
    left = None
    if "redirect" in terms:
        # Where the model draws the same under both there is no way to go.
        left = redirect / redirect_before if redirect_before else 1.0
    return Reached(ratio / batches, stability / batches, left)
