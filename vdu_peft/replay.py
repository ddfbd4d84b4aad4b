"""What to retain, without data: the pre-trained model's own samples, less what looks like the forget set."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from accelerate.utils import broadcast_object_list

from vdu_peft.config import UnlearnConfig
from vdu_peft.denoiser import Denoiser, image_seeds, in_turn
from vdu_peft.likeness import LIKE_QUANTILE, Likeness, own_likeness
from vdu_peft.precision import quick_precision

logger = logging.getLogger(__name__)

# Added to the run's seed: a report must not judge the very samples trained on.
REPLAY_SEED = 7919
# What looks like the forget images holds the concept in place: beside a share p of it in the replay the push of
# ``reciprocal`` ends where the loss is 1 / sqrt(p * stability_weight) times the original. At a tenth, where the
# defaults were chosen, that spares what is near the concept; at a quarter too little is forgotten.
MAX_HELD_SHARE = 0.1
# Of what looks like them, and of what does not, more need not be drawn again.
MAX_ALIKE = 200
MAX_OTHERS = 150


@dataclass(frozen=True)
class OwnAlike:
    """The pre-trained model's own samples that look like the forget images, and some that do not.

    Attributes:
        likeness: what tells them.
        seeds: that each that looks like them was drawn from; at most MAX_ALIKE.
        others: that each other was drawn from; at most MAX_OTHERS.
        noise_seed: of the features' noise.
    """

    likeness: Likeness
    seeds: list[int]
    others: list[int]
    noise_seed: int


class OwnReplay(NamedTuple):
    """What a run draws of its own model to retain.

    Attributes:
        images: (M, C, H, W), as the denoiser encodes them.
        labels: (M,), of a model with a condition.
        alike: what looks like the forget images, retained or not; None of a model with a condition, and where there is
            a single forget image or sample.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    alike: OwnAlike | None


def own_replay(
    denoiser: Denoiser,
    forget: torch.Tensor,
    config: UnlearnConfig,
    retained: Sequence[int] | None,
    progress: str | None = None,
) -> OwnReplay:
    """Draw the model's own samples, and leave out what the options say of what looks like the forget images.

    Args:
        denoiser: its model as it was before, without dropout.
        forget: (N_f, C, H, W), as the denoiser encodes them.
        config: of the run, filled.
        retained: the labels to draw in turn, of a model with a condition.
        progress: the progress bar's title; without one there is none.
    """
    labels = None if retained is None else in_turn(retained, config.replay_size)
    seeds, quantile, alike = replay_seeds(config.seed, config.replay_size), config.replay_keep_quantile, None
    steps = config.replay_inference_steps
    images = draw_replay(denoiser, seeds, num_inference_steps=steps, labels=labels, progress=progress)
    if labels is not None and quantile == 1:
        return OwnReplay(images, labels, None)
    likeness, scores = own_likeness(denoiser, forget, images, labels, config.seed)
    threshold = likeness.threshold(LIKE_QUANTILE if quantile is None else quantile)
    # Processes may round apart, but must draw their batches from one set.
    scores, threshold = broadcast_object_list([scores, threshold])
    if labels is None and min(len(forget), len(images)) > 1:
        alike = own_alike(likeness, scores, seeds, config.seed)
    if quantile is None:
        images = thin_forget_like(images, scores, threshold)
    elif quantile < 1:
        images, labels = drop_forget_like(images, labels, scores, threshold)
    return OwnReplay(images, labels, alike)


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


def own_alike(likeness: Likeness, scores: torch.Tensor, seeds: Sequence[int], noise_seed: int) -> OwnAlike:
    """Which of an unconditional model's own samples look like the forget images.

    Args:
        scores: (N,) of the samples, and
        seeds: (N,), that each was drawn from.
        noise_seed: of the likeness's features.
    """
    of_kind: dict[bool, list[int]] = {True: [], False: []}
    for seed, alike in zip(seeds, (scores > likeness.threshold()).tolist(), strict=True):
        of_kind[alike].append(seed)
    return OwnAlike(likeness, of_kind[True][:MAX_ALIKE], of_kind[False][:MAX_OTHERS], noise_seed)


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
