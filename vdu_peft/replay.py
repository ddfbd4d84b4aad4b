"""What to retain, without data: the pre-trained model's own samples, all or less what looks like the forget set."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from vdu_peft.denoiser import Denoiser, in_turn
from vdu_peft.likeness import forget_scores, likeness_features
from vdu_peft.precision import quick_precision

logger = logging.getLogger(__name__)

# Added to the run's seed: a report must not judge the very samples trained on.
REPLAY_SEED = 7919


def generate_replay(
    denoiser: Denoiser,
    forget: torch.Tensor,
    *,
    num_images: int,
    num_inference_steps: int,
    keep_quantile: float,
    seed: int,
    class_labels: Sequence[int] = (),
    progress: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sample the model as it stands and drop, as far as is asked for, what looks like the forget set.

    Args:
        forget: (N_f, C, H, W), as the denoiser encodes them.
        num_images: how many to draw, before the filter.
        keep_quantile: drop samples whose forget score exceeds this quantile of the forget images' scores; 1 keeps all.
        seed: of the sampler and the features' noise.
        class_labels: of a class-conditional model, the classes to draw, in turn.

    Returns:
        encoded images (M, C, H, W), M <= num_images, and the labels (M,) that they were drawn under or None.
    """
    labels = in_turn(class_labels, num_images) if class_labels else None
    quick = quick_precision(denoiser.device) == "bf16"
    with torch.autocast("cpu", torch.bfloat16) if quick else nullcontext():
        images = denoiser.sample(
            num_images,
            seed=seed + REPLAY_SEED,
            num_inference_steps=num_inference_steps,
            class_labels=labels,
            decode=False,
            progress="replay" if progress else None,
        )
    if keep_quantile == 1:
        return images, labels
    class_label = class_labels[0] if class_labels else None
    forget_score, sample_score = forget_scores(
        *(likeness_features(denoiser, x, seed, class_label) for x in (forget, images))
    )
    keep = sample_score < torch.quantile(forget_score, keep_quantile)
    if keep.sum() < 2:
        # Nothing but the forget concept in the samples (or too few of them): the least alike half is the best there is.
        keep = sample_score <= sample_score.median()
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
