"""What to retain, without data: the pre-trained model's own samples, less what looks like the forget set."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from vdu_peft.denoiser import Denoiser, image_seeds
from vdu_peft.precision import quick_precision

logger = logging.getLogger(__name__)

# Added to the run's seed: a report must not judge the very samples trained on.
REPLAY_SEED = 7919
# What looks like the forget images holds the concept in place: beside a share p of it in the replay the push of
# ``reciprocal`` ends where the loss is 1 / sqrt(p * stability_weight) times the original. At a tenth, where the
# defaults were chosen, that spares what is near the concept; at a quarter too little is forgotten.
MAX_HELD_SHARE = 0.1


def replay_seeds(seed: int, num_images: int) -> list[int]:
    """What a run of this seed draws its replay from."""
    return image_seeds(seed + REPLAY_SEED, num_images)


def draw_replay(
    denoiser: Denoiser,
    seeds: Sequence[int],
    *,
    num_inference_steps: int,
    labels: torch.Tensor | None = None,
    progress: str | None = None,
) -> torch.Tensor:
    """What the model as it stands draws from these seeds, encoded (N, C, H, W).

    In bfloat16 on a CPU that computes in it: it does not change what they show.

    Args:
        labels: (N,), of a model with a condition.
    """
    quick = quick_precision(denoiser.device) == "bf16"
    with torch.autocast("cpu", torch.bfloat16) if quick else nullcontext():
        return denoiser.sample(
            len(seeds),
            seed=seeds,
            num_inference_steps=num_inference_steps,
            class_labels=labels,
            decode=False,
            progress=progress,
        )


def drop_forget_like(
    images: torch.Tensor, labels: torch.Tensor | None, scores: torch.Tensor, threshold: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Images (M, C, H, W), M <= N, and their labels, less what looks like the forget set.

    Args:
        images: (N, C, H, W), as the denoiser encodes them.
        labels: (N,), of a model with a condition.
        scores: (N,), their forget-likeness.
        threshold: images that exceed it are dropped.
    """
    keep = ~(scores > threshold)  # what is not a number stays: the loss will tell of it
    if keep.sum() < 2:
        # Nothing but the forget concept in the samples (or too few of them): the least alike half is the best there is.
        keep = ~(scores > scores.median())
    if labels is None:
        return images[keep], None
    if left_out := len({*labels.tolist()} - {*labels[keep].tolist()}):
        logger.warning(
            "replay: all images of %d of the %d classes or prompts to retain look like the forget images and were "
            "dropped; nothing holds those in place. A larger replay_size may",
            left_out,
            len({*labels.tolist()}),
        )
    return images[keep], labels[keep]


def thin_forget_like(images: torch.Tensor, scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """Images (M, C, H, W), M <= N, of which at most MAX_HELD_SHARE look like the forget set; the first of these.

    Where more than half look like it, which is more likely for want of telling them apart, half of all stay.

    Args:
        images: (N, C, H, W), as an unconditional denoiser encodes them.
        scores: (N,), their forget-likeness.
        threshold: images that exceed it look like the forget set.
    """
    alike = scores > threshold
    others = int((~alike).sum())
    held = max(round(MAX_HELD_SHARE / (1 - MAX_HELD_SHARE) * others), -(-len(images) // 2) - others)
    return images[~alike | (alike.cumsum(0) <= held)]
