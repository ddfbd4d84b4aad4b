"""What looks like the forget images, told without labels: by the frozen denoiser's own features."""

import torch
import torch.nn.functional as F

from vdu_peft.denoiser import Denoiser

# Where the mid block tells kinds of images apart: with less noise it sees real against generated instead.
FEATURE_TIMESTEPS = (100, 300, 500)  # of 1000
# Ridge penalty of the forget-likeness regression. With a weak one and a few dozen forget images it learns real
# against generated, and generated images of the concept pass: at 0.01 it catches 10 to 32 % of them, at 1 it
# catches 67 to 89 % (demo model, digits 1, 4, 7 and 8, 100 forget images, 256 samples).
RIDGE = 1.0


def likeness_features(
    denoiser: Denoiser, images: torch.Tensor, seed: int, class_label: int | None = None
) -> torch.Tensor:
    """(N, F) of encoded images (N, C, H, W), see :meth:`Denoiser.features`."""
    timesteps = [t * denoiser.num_train_timesteps // 1000 for t in FEATURE_TIMESTEPS]
    return denoiser.features(images, timesteps, seed=seed, class_label=class_label)


def forget_scores(forget: torch.Tensor, samples: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Forget-likeness of all sets: log-odds of a logistic regression of forget images against samples.

    The samples hold some of the forget concept themselves; the regression, being linear and penalised,
    cannot carve those few out, so they score like forget images.

    Args:
        forget: features (N_f, F).
        samples: features (N, F).
        others: features (M, F) of what the regression is not to be fitted on.

    Returns:
        scores (N_f,), (N,) and (M,), float64.
    """
    sets = [x.double() for x in (forget, samples, *others)]
    fitted = torch.cat(sets[:2])
    mean, std = fitted.mean(0), fitted.std(0).clamp_min(1e-6)
    sets = [(x - mean) / std for x in sets]
    features = torch.cat(sets[:2])
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
    return tuple((x @ weight + bias).detach() for x in sets)
