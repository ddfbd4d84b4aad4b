"""What to retain, without data: the pre-trained model's own samples, all or less what looks like the forget set."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from vdu_peft.denoiser import Denoiser, image_seeds
from vdu_peft.precision import quick_precision

logger = logging.getLogger(__name__)

# Added to the run's seed: a report must not judge the very samples trained on.
REPLAY_SEED = 7919


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
    # Without a condition, if more than half of all look like them then the forget images are hardly told from others.
    # With one, nothing but the forget concept in the samples (or too few of them). The least alike half is the best
    # there is.
    if keep.sum() < (len(images) / 2 if labels is None else 2):
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
