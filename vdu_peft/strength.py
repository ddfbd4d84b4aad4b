"""How strongly a learned adapter acts: what looked like the forget images, drawn again from the same noise."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from vdu_peft.adapter import variational_layers
from vdu_peft.contexts import adapter_scale
from vdu_peft.denoiser import Denoiser
from vdu_peft.image_losses import image_losses
from vdu_peft.likeness import likeness_features
from vdu_peft.replay import OwnAlike, draw_replay

# Twice the delta is further than what was learned at its own scale can be trusted.
SCALES = (1.0, 1.25, 1.5, 1.75, 2.0)
# A stronger delta costs quality: it must make at least a third of what remains go. What stays either way only resembles
# the forget images.
STAYING = 2 / 3
# And it may cost so much: the pre-trained model's denoising loss, at these timesteps (of 1000), on what else is drawn,
# relative to that at the scale of 1. Of a digit that was learned from 100 images it rises by 0.8 and 1.8 % at 1.25
# and 1.5, and the u-FID hardly; of one from 8 images by 3.8 and 9.4 %, and the u-FID to 1.3 and 1.9 times what it was.
MAX_COST = 1.025
COST_TIMESTEPS = (50, 150, 300)
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
    def remaining_share(self) -> float | None:
        """None where too few are alike to tell."""
        return self.remaining / self.num_alike if self.num_alike >= MIN_ALIKE else None

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

    Scaled up only step by step of SCALES, as far as each makes a good part of what remains go, and leaves what else is
    drawn as plausible to the pre-trained model. Only samples that looked like the forget images are drawn again, from
    the noise that they came from: of a concept that makes up a tenth of all, it takes a tenth of the samples to see as
    much. An image of it that another noise has become is not seen. Where they are to be scaled others are, too.

    Args:
        denoiser: its model with the adapter active.
        tolerance: the share of them that may remain.
        max_scale: no higher one is tried.
        num_inference_steps: that ``own`` was drawn with.
        progress: whether to show progress bars.
    """

    def drawn(seeds: list[int], scale: float, title: str) -> torch.Tensor:
        with adapter_scale(denoiser.model, scale):
            title = f"{title}, scale {scale:g}" if progress else None
            return draw_replay(denoiser, seeds, num_inference_steps=num_inference_steps, progress=title)

    def at(scale: float) -> Strength:
        if not own.seeds:
            return Strength(scale, 0, 0, tolerance)
        images = drawn(own.seeds, scale, "alike")
        with adapter_scale(denoiser.model, 0):
            features = likeness_features(denoiser, images, own.noise_seed)
        return Strength(scale, len(own.seeds), int(own.likeness.still_alike(features).sum()), tolerance)

    def losses_on_others(scale: float) -> torch.Tensor:
        images = drawn(own.others, scale, "others")
        with adapter_scale(denoiser.model, 0):
            return own_losses(denoiser, images, own.noise_seed)

    best, losses = at(SCALES[0]), None
    for scale in SCALES[1:]:
        if best.enough or scale > max_scale or not own.others:
            break
        stronger = at(scale)
        if stronger.remaining > STAYING * best.remaining:
            break
        losses = losses_on_others(SCALES[0]) if losses is None else losses
        if not (losses_on_others(scale) / losses).mean() <= MAX_COST:
            break
        best = stronger
    return best


def own_losses(denoiser: Denoiser, images: torch.Tensor, seed: int) -> torch.Tensor:
    """The model's mean denoising loss on encoded images (N, C, H, W) at each of COST_TIMESTEPS, (T,) float32.

    How plausible they are to it.

    Args:
        seed: of the noise.
    """
    timesteps = [t * denoiser.num_train_timesteps // 1000 for t in COST_TIMESTEPS]
    return image_losses(denoiser, images, timesteps, seed).mean(0)


def scale_delta(model: nn.Module, scale: float, adapter_name: str = "default") -> None:
    """Multiply the adapter's posterior by ``scale``, its mean and its deviation."""
    for _, layer in variational_layers(model, adapter_name):
        layer.lora_B[adapter_name].weight.data.mul_(scale)
        if adapter_name in layer.lora_log_std:
            layer.lora_log_std[adapter_name].data.add_(math.log(scale))
