"""What was forgotten and at what cost: pure functions of features (N, F) and labels (N,)."""

import warnings

import torch


def class_shares(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Share of each class, float64 (num_classes,), summing to 1."""
    return torch.bincount(labels, minlength=num_classes).double() / len(labels)


def pul(share_before: float, share_after: float) -> float:
    """Percentage of unlearning: 100 · (before − after) / before, of the forget class's share of samples.

    100 when the class is gone, 0 when nothing changed, negative when it grew; nan if it was never drawn.
    """
    return 100 * (share_before - share_after) / share_before if share_before > 0 else float("nan")


def pul_interval(
    before: int, after: int, num_before: int, num_after: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Confidence interval of :func:`pul` from counts of forget-class samples among all drawn.

    Given their sum, ``after`` is binomial with odds (share after · num_after) / (share before · num_before) where
    shares are small (Przyborowski and Wilenski 1940), so the exact binomial interval of Clopper and Pearson serves;
    a little too wide otherwise. (nan, nan) if the class was not drawn before.
    """
    from scipy.stats import binomtest

    if before == 0:
        return float("nan"), float("nan")
    interval = binomtest(after, before + after).proportion_ci(confidence, method="exact")
    low, high = (p / (1 - p) * num_before / num_after if p < 1 else float("inf") for p in interval)
    return 100 * (1 - high), 100 * (1 - low)


def retained_distance(shares_before: torch.Tensor, shares_after: torch.Tensor, forget_class: int) -> float:
    """Total variation between the retained classes' distributions, in [0, 1]: 0 when their proportions are the same."""
    keep = torch.arange(len(shares_before)) != forget_class
    before, after = (shares[keep] / shares[keep].sum() for shares in (shares_before, shares_after))
    return (before - after).abs().sum().item() / 2


def loss_gap(losses: torch.Tensor, labels: torch.Tensor, forget_class: int) -> float:
    """Mean denoising loss of held-out forget images minus that of held-out retained ones.

    Args:
        losses: (N,), each image's, mean over elements and timesteps.
        labels: (N,).
    """
    forget = labels == forget_class
    return (losses[forget].mean() - losses[~forget].mean()).item()


def precision_recall(features: torch.Tensor, reference: torch.Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Share of samples inside the real images' manifold, and of real images inside the samples' one.

    A manifold is the union of balls around its points that reach to the ``neighbours``-th nearest other point
    (Kynkäänniemi et al. 2019).
    """
    features, reference = features.double(), reference.double()

    def radii(points: torch.Tensor) -> torch.Tensor:
        # The nearest of all is the point itself. In chunks: all distances at once would not fit for large sets.
        return torch.cat([torch.cdist(p, points).kthvalue(neighbours + 1).values for p in points.split(1000)])

    def share_inside(points: torch.Tensor, manifold: torch.Tensor) -> float:
        reach = radii(manifold)
        inside = torch.cat([(torch.cdist(p, manifold) <= reach).any(1) for p in points.split(1000)])
        return inside.double().mean().item()

    return share_inside(features, reference), share_inside(reference, features)


def kernel_distance(features: torch.Tensor, reference: torch.Tensor, seed: int = 0) -> float:
    """KID (Binkowski et al. 2018) on the given features, by torchmetrics: mean over 100 subsets of at most 100."""
    from torchmetrics.image.kid import KernelInceptionDistance

    subset_size = min(len(features), len(reference), 100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it keeps the features, which lie in memory anyway
        kid = KernelInceptionDistance(feature=_given(features), subsets=100, subset_size=subset_size)
    _update(kid, features, reference)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of the subsets
        return kid.compute()[0].item()


def frechet_distance(features: torch.Tensor, reference: torch.Tensor) -> float:
    """FID on the given features: ‖μ − μ'‖² + tr(Σ + Σ' − 2 (Σ Σ')^½), by torchmetrics.

    Heusel et al. 2017. On a small judge's features it is no FID on Inception: compare it only with itself.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    fid = FrechetInceptionDistance(feature=_given(features))
    _update(fid, features, reference)
    return fid.compute().item()


def _given(features: torch.Tensor) -> torch.nn.Module:
    """A feature extractor for torchmetrics that is given the features themselves."""
    identity = torch.nn.Identity()
    identity.num_features = features.shape[1]  # tells torchmetrics not to probe it with an image
    return identity


def _update(metric, features: torch.Tensor, reference: torch.Tensor) -> None:
    metric.set_dtype(torch.float64)
    metric.update(reference.double(), real=True)
    metric.update(features.double(), real=False)
