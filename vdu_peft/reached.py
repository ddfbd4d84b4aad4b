"""How far a run has come, on images at noise of their own: a step's batch is too few to tell, and before the step."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from vdu_peft import objective
from vdu_peft.batch import BatchSource
from vdu_peft.config import UnlearnConfig
from vdu_peft.contexts import adapter_scale
from vdu_peft.denoiser import Denoiser

# So many forget images are looked at, or some more. Each is compared with itself under the pre-trained model, so that
# what learned nothing is exactly where it began.
NUM_IMAGES = 64


@dataclass(frozen=True)
class Reached:
    """Where the posterior's mean is, between the pre-trained model and what was aimed at.

    Attributes:
        forget_ratio: mean over forget images of the denoising loss over the pre-trained model's: 1 is where it began.
        stability: how far the model has moved on replay images, in its own error's units: 0 is nowhere, 1 destroyed.
        redirect_left: how much of the squared way to the anchor's prediction is left: 1 is where it began, 0 is there;
            of several anchors, to the mean of their predictions. None where nothing is redirected.
    """

    forget_ratio: float
    stability: float
    redirect_left: float | None

    def __str__(self) -> str:
        left = "" if self.redirect_left is None else f", {self.redirect_left:.0%} of the way to the anchor left"
        return f"forget ratio {self.forget_ratio:.2f}{left}, stability {self.stability:.3f}"


@torch.no_grad()
def reached(
    denoiser: Denoiser, source: BatchSource, config: UnlearnConfig, accelerator: Accelerator, progress: bool = False
) -> Reached:
    """Measure it, alike at each call and in all processes; leaves torch's generator where its own seeds put it."""
    batches = -(-NUM_IMAGES // (config.train_batch_size * accelerator.num_processes))
    sums = torch.zeros(4, device=accelerator.device)
    for number in tqdm(range(batches), desc="looking how far it came", leave=False, disable=not progress):
        set_seed((config.seed * 1_000_003 - 1 - number) % 2**32)  # no step's
        sums += torch.stack(_of_batch(denoiser, source, config, accelerator))
    ratio, stability, way, whole_way = accelerator.reduce(sums, "mean").tolist()
    left = None
    if source.redirects:
        # Where the model draws the same under both there is no way to go.
        left = max(way, 0.0) / whole_way if whole_way > 0 else 1.0
    return Reached(ratio / batches, stability / batches, left)


def _of_batch(
    denoiser: Denoiser, source: BatchSource, config: UnlearnConfig, accelerator: Accelerator
) -> tuple[torch.Tensor, ...]:
    """Forget ratio, stability, and the squared way to the anchor from here and from the pre-trained model."""
    images, noise, timesteps, labels, anchors, replaced = source.draw(accelerator)
    half = len(images) // 2
    x_t = denoiser.add_noise(images, noise, timesteps)

    def predicted(rows: slice, under: torch.Tensor | None, scale: float) -> torch.Tensor:
        # As many at a time in each: of other numbers a kernel may round apart.
        with adapter_scale(denoiser.model, scale), accelerator.autocast():
            return denoiser.noise_pred(x_t[rows], timesteps[rows], None if under is None else under[rows]).float()

    forget, held = slice(half), slice(half, None)
    now, before = predicted(forget, labels, 1), predicted(forget, labels, 0)
    loss, base_loss = (objective.denoising_loss(pred, noise[:half]) for pred in (now, before))
    told = slice(None) if replaced is None else ~replaced
    ratio = objective.forget_ratio(loss[told], base_loss[told])
    stability = objective.stability(predicted(held, labels, 1), predicted(held, labels, 0), noise[half:])
    if anchors is None:
        return ratio, stability, torch.zeros_like(ratio), torch.zeros_like(ratio)
    anchor = other = predicted(forget, anchors, 0)
    choices = source.classes.anchors
    if choices.shape[1] > 1:
        # One of several at random has their mean for its best prediction. To that the squared way is the product of
        # those to two independent ones, in the mean. Of several all images have the same.
        drawn = choices[0, torch.randint(choices.shape[1], (half,))].to(anchors.device)
        other = predicted(forget, torch.where(replaced, anchors, drawn), 0)
    conditional = labels[:half] != (-1 if config.null_class is None else config.null_class)
    ways = [(conditional * ((p - anchor) * (p - other)).flatten(1).mean(1) / base_loss).mean() for p in (now, before)]
    return ratio, stability, *ways
