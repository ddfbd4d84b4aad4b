"""How strongly a learned adapter acts: what looked like the forget images, drawn again from the same noise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vdu_peft.adapter import variational_layers
from vdu_peft.contexts import adapter_scale
from vdu_peft.denoiser import Denoiser
from vdu_peft.likeness import held_out_likeness, likeness_features
from vdu_peft.replay import draw_replay

# Twice the delta is further than what was learned at its own scale can be trusted.
SCALES = (1.0, 1.25, 1.5, 1.75, 2.0)
# A stronger delta costs quality: it must make at least a third of what remains go. What stays either way only resembles
# the forget images.
STAYING = 2 / 3
# Of fewer samples that look like the forget images, one more or less says nothing.
MIN_ALIKE = 10


@dataclass(frozen=True)
class Strength:
    """What a learned delta leaves of the forget concept.

    Attributes:
        scale: what the delta is to be multiplied by.
        num_alike: how many of the pre-trained model's samples look like the forget images.
        remaining: how many of those still do when the adapter, at this scale, draws them from the same noise.
    """

    scale: float
    num_alike: int
    remaining: int

    def __str__(self) -> str:
        return (
            f"of {self.num_alike} own samples that looked like the forget images {self.remaining} still do, drawn again"
            + (f"; the delta was scaled by {self.scale:g} for it" if self.scale != 1 else "")
        )


def calibrate(
    denoiser: Denoiser,
    forget: torch.Tensor,
    samples: torch.Tensor,
    seeds: Sequence[int],
    *,
    tolerance: float,
    num_inference_steps: int,
    seed: int,
    progress: bool = False,
) -> Strength:
    """The least scale at which what looked like the forget images no longer does.

    Only those samples are drawn again, from the noise that they came from: of a concept that makes up a tenth of all,
    it takes a tenth of the samples to see as much. An image that another noise has become is not seen.

    Args:
        denoiser: an unconditional one, its model with the adapter active.
        forget: (N_f, C, H, W), two or more, and
        samples: (N, C, H, W), the pre-trained model's own from ``seeds``, both as the denoiser encodes them.
        tolerance: the share of them that may remain.
        seed: of the features' noise.
    """
    with adapter_scale(denoiser.model, 0):
        features = [likeness_features(denoiser, x, seed) for x in (forget, samples)]
        likeness = held_out_likeness(*features)
    alike = [seeds[i] for i in likeness.alike(features[1]).nonzero().flatten().tolist()]

    def remaining(scale: float) -> int:
        if not alike:
            return 0
        with adapter_scale(denoiser.model, scale):
            title = f"scale {scale:g}" if progress else None
            images = draw_replay(denoiser, alike, num_inference_steps=num_inference_steps, progress=title)
        with adapter_scale(denoiser.model, 0):
            return int(likeness.alike(likeness_features(denoiser, images, seed)).sum())

    best = Strength(SCALES[0], len(alike), remaining(SCALES[0]))
    for scale in SCALES[1:]:
        if len(alike) < MIN_ALIKE or best.remaining <= tolerance * len(alike):
            break
        left = remaining(scale)
        if left > STAYING * best.remaining:
            break
        best = Strength(scale, len(alike), left)
    return best


def scale_delta(model: nn.Module, scale: float, adapter_name: str = "default") -> None:
    """Multiply the adapter's posterior by ``scale``, its mean and its deviation."""
    for _, layer in variational_layers(model, adapter_name):
        layer.lora_B[adapter_name].weight.data.mul_(scale)
        if adapter_name in layer.lora_log_std:
            layer.lora_log_std[adapter_name].data.add_(math.log(scale))
