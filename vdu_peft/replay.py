"""What to retain, without data: the pre-trained model's own samples, less those that look like the forget set."""

import logging
from collections.abc import Sequence

import torch

from vdu_peft.denoiser import Denoiser, in_turn

logger = logging.getLogger(__name__)

# Low noise and coarse places tell kinds of images apart best: the area under the curve, mean over ten digits with 100
# forget images and 256 samples, is 0.982 on the demo's model. (Channel means at 100, 300 and 500: 0.966, and a third
# more of the other digits dropped.)
FEATURE_TIMESTEPS = (50, 100, 200)  # of 1000
# Ridge penalty of the forget-likeness regression, whose features have unit length on average.
RIDGE = 0.01
# Each image is scored by a regression that has not seen it: with more features than images those that have been seen
# lie on their own side, whatever they show.
FOLDS = 5
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
    """Sample the model as it stands and drop what looks like the forget set.

    Args:
        forget: (N_f, C, H, W), as the denoiser encodes them.
        num_images: how many to draw, before the filter.
        keep_quantile: drop samples whose forget score exceeds this quantile of the forget images' scores.
        seed: of the sampler and the features' noise.
        class_labels: of a class-conditional model, the classes to draw, in turn.

    Returns:
        encoded images (M, C, H, W), M <= num_images, and the labels (M,) that they were drawn under or None.
    """
    labels = in_turn(class_labels, num_images) if class_labels else None
    images = denoiser.sample(
        num_images,
        seed=seed + REPLAY_SEED,
        num_inference_steps=num_inference_steps,
        class_labels=labels,
        decode=False,
        progress="replay" if progress else None,
    )
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
    """Forget-likeness of both sets: Fisher's discriminant of forget images against samples, each image left out once.

    The samples hold some of the forget concept themselves; the regression, being linear and penalised,
    cannot carve those few out, so they score like forget images.

    Args:
        forget: features (N_f, F).
        samples: features (N, F).

    Returns:
        scores (N_f,) and (N,), float64.
    """
    features = torch.cat([forget, samples]).double()
    features = (features - features.mean(0)) / features.std(0).clamp_min(1e-6) / features.shape[1] ** 0.5
    sizes = len(forget), len(samples)
    labels = torch.cat([torch.ones(sizes[0]), -torch.ones(sizes[1])]).double()
    # Both sets weigh the same whatever their sizes.
    weights = torch.cat([torch.full((size,), 0.5 / size) for size in sizes]).double()
    folds = min(FOLDS, *sizes)
    fold = torch.cat([torch.arange(size) % folds for size in sizes])
    scores = torch.empty_like(labels)
    for k in range(folds):
        seen = (fold != k) if folds > 1 else torch.ones_like(fold, dtype=torch.bool)
        scores[fold == k] = ridge_regression(features[seen], labels[seen], weights[seen], features[fold == k])
    return scores[: sizes[0]], scores[sizes[0] :]


def ridge_regression(
    features: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, others: torch.Tensor
) -> torch.Tensor:
    """The weighted ridge regression of ``targets`` (N,) on ``features`` (N, F), predicting for ``others`` (M, F): (M,).

    Solved among the images, which are fewer than the features.
    """
    weights = weights / weights.sum()
    mean, mean_target = weights @ features, weights @ targets
    roots = weights.sqrt()
    centred = (features - mean) * roots[:, None]
    gram = centred @ centred.T
    dual = torch.linalg.solve(gram + RIDGE * torch.eye(len(gram), dtype=gram.dtype), (targets - mean_target) * roots)
    return (others - mean) @ (centred.T @ dual) + mean_target
