"""How strongly a learned adapter acts: what looked like the forget images, drawn again from the same noise."""

import math
from dataclasses import dataclass

from torch import nn

from vdu_peft.adapter import variational_layers
from vdu_peft.contexts import adapter_scale
from vdu_peft.denoiser import Denoiser
from vdu_peft.likeness import likeness_features
from vdu_peft.replay import OwnAlike, draw_replay

# Twice the delta is further than what was learned at its own scale can be trusted.
SCALES = (1.0, 1.25, 1.5, 1.75, 2.0)
# A stronger delta costs quality: it must make at least a third of what remains go. What stays either way only resembles
# the forget images.
STAYING = 2 / 3
# Of fewer samples that look like the forget images nothing can be told.
MIN_ALIKE = 10
# So few that remain may be chance.
FEW = 2


@dataclass(frozen=True)
class Strength:
    """What a learned delta leaves of the forget concept.

    Attributes:
        scale: what the delta is to be multiplied by.
        num_alike: how many of the pre-trained model's own samples that look like the forget images were drawn again.
        remaining: how many of those still look like them when the adapter, at this scale, draws from the same noise.
        tolerance: the share that might.
    """

    scale: float
    num_alike: int
    remaining: int
    tolerance: float

    @property
    def remaining_share(self) -> float:
        """0 where too few are alike to tell."""
        return self.remaining / self.num_alike if self.num_alike >= MIN_ALIKE else 0.0

    @property
    def enough(self) -> bool:
        """Whether no more remain than might; also where too few are alike to tell."""
        return self.num_alike < MIN_ALIKE or self.remaining <= max(FEW, self.tolerance * self.num_alike)

    def __str__(self) -> str:
        if self.num_alike < MIN_ALIKE:
            return f"only {self.num_alike} own samples look like the forget images: too few to tell what is left"
        scaled = f"; the delta was scaled by {self.scale:g} for it" if self.scale != 1 else ""
        return (
            f"of {self.num_alike} own samples that looked like the forget images {self.remaining} still do, drawn "
            f"again{scaled}"
        )


def calibrate(
    denoiser: Denoiser,
    own: OwnAlike,
    *,
    tolerance: float,
    max_scale: float,
    num_inference_steps: int,
    progress: bool = False,
) -> Strength:
    """The scale of the delta at which few enough of what looked like the forget images still do.

    Scaled up only step by step of SCALES, as far as each makes a good part of what remains go. Only those samples are
    drawn again, from the noise that they came from: of a concept that makes up a tenth of all, it takes a tenth of the
    samples to see as much. An image of it that another noise has become is not seen.

    Args:
        denoiser: its model with the adapter active.
        tolerance: the share of them that may remain.
        max_scale: no higher one is tried.
        num_inference_steps: that ``own`` was drawn with.
        progress: whether to show progress bars.
    """

    def at(scale: float) -> Strength:
        if not own.seeds:
            return Strength(scale, 0, 0, tolerance)
        with adapter_scale(denoiser.model, scale):
            title = f"scale {scale:g}" if progress else None
            images = draw_replay(denoiser, own.seeds, num_inference_steps=num_inference_steps, progress=title)
        with adapter_scale(denoiser.model, 0):
            features = likeness_features(denoiser, images, own.noise_seed)
        return Strength(scale, len(own.seeds), int(own.likeness.still_alike(features).sum()), tolerance)

    best = at(SCALES[0])
    for scale in SCALES[1:]:
        if best.enough or scale > max_scale:
            break
        stronger = at(scale)
        if stronger.remaining > STAYING * best.remaining:
            break
        best = stronger
    return best


def scale_delta(model: nn.Module, scale: float, adapter_name: str = "default") -> None:
    """Multiply the adapter's posterior by ``scale``, its mean and its deviation."""
    for _, layer in variational_layers(model, adapter_name):
        layer.lora_B[adapter_name].weight.data.mul_(scale)
        if adapter_name in layer.lora_log_std:
            layer.lora_log_std[adapter_name].data.add_(math.log(scale))
