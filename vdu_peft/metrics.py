"""What was forgotten and at what cost: pure functions of features (N, F) and labels (N,)."""

import torch


def class_shares(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Share of each class, float64 (num_classes,), summing to 1."""
    return torch.bincount(labels, minlength=num_classes).double() / len(labels)


def pul(share_before: float, share_after: float) -> float:
    """Percentage of unlearning: 100 · (before − after) / before, of the forget class's share of samples.

    100 when the class is gone, 0 when nothing changed, negative when it grew; nan if it was never drawn.
    """
    return 100 * (share_before - share_after) / share_before if share_before > 0 else float("nan")


def frechet_distance(features: torch.Tensor, reference: torch.Tensor) -> float:
    """FID on the given features: ‖μ − μ'‖² + tr(Σ + Σ' − 2 (Σ Σ')^½), by torchmetrics.

    Heusel et al. 2017. On a small judge's features it is no FID on Inception: compare it only with itself.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    identity = torch.nn.Identity()
    identity.num_features = features.shape[1]  # tells torchmetrics not to probe it with an image
    fid = FrechetInceptionDistance(feature=identity)
    fid.set_dtype(torch.float64)
    fid.update(reference.double(), real=True)
    fid.update(features.double(), real=False)
    return fid.compute().item()
