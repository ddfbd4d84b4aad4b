"""What to retain, without data: the pre-trained model's own samples, all or less what looks like the forget set."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F

from vdu_peft.denoiser import Denoiser, in_turn
from vdu_peft.precision import quick_precision

logger = logging.getLogger(__name__)

# Where the mid block tells kinds of images apart: with less noise it sees real against generated instead.
FEATURE_TIMESTEPS = (100, 300, 500)  # of 1000
# Ridge penalty of the forget-likeness regression. With a weak one and a few dozen forget images it learns real
# against generated, and generated images of the concept pass: at 0.01 it catches 10 to 32 % of them, at 1 it
# catches 67 to 89 % (demo model, digits 1, 4, 7 and 8, 100 forget images, 256 samples).
RIDGE = 1.0
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
    timesteps = [t * denoiser.num_train_timesteps // 1000 for t in FEATURE_TIMESTEPS]
    options = {"seed": seed, "class_label": class_labels[0] if class_labels else None}
    forget_score, sample_score = forget_scores(
        denoiser.features(forget, timesteps, **options), denoiser.features(images, timesteps, **options)
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


def forget_scores(forget: torch.Tensor, samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Forget-likeness of both sets: log-odds of a logistic regression of forget images against samples.

    The samples hold some of the forget concept themselves; the regression, being linear and penalised,
    cannot carve those few out, so they score like forget images.

    Args:
        forget: features (N_f, F).
        samples: features (N, F).

    Returns:
        scores (N_f,) and (N,), float64.
    """
    features = torch.cat([forget, samples]).double()
    features = (features - features.mean(0)) / features.std(0).clamp_min(1e-6)
    labels = torch.cat([torch.ones(len(forget)), torch.zeros(len(samples))]).double()
    # Both sets weigh the same whatever their sizes.
    row_weight = torch.where(labels == 1, 0.5 / len(forget), 0.5 / len(samples)).double()
    weight = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logits = features @ weight + bias
        loss = F.binary_cross_entropy_with_logits(logits, labels, weight=row_weight, reduction="sum")
        loss = loss + 0.5 * RIDGE * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    scores = (features @ weight + bias).detach()
    return scores[: len(forget)], scores[len(forget) :]
