"""Plasticity and stability terms: tensors in, tensors out.

``loss`` arguments are per-image denoising losses ‖ε_θ(x_t) − ε‖², (N,), averaged over elements;
``base_loss`` is the same under the pre-trained model, at the same noise and timestep. Terms are means
over the batch. The pre-trained model is the same module with its adapter off.
"""

import torch


def denoising_loss(noise_pred: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Per-image ‖ε_θ − ε‖², mean over elements: (N, ...) → (N,), float32."""
    return (noise_pred.float() - noise.float()).square().flatten(1).mean(1)


def hinge(loss: torch.Tensor, base_loss: torch.Tensor, forget_target: float) -> torch.Tensor:
    """Bounded plasticity: mean of max(0, 1 − ℓ_θ / (c · ℓ_θ*)).

    Pushes until an image's forget loss is ``forget_target`` = c times the original, and no further:
    unbounded ascent destroys the model before or as it forgets. A scalar in [0, 1).
    """
    return (1 - loss / (forget_target * base_loss)).clamp_min(0).mean()


def reciprocal(loss: torch.Tensor, base_loss: torch.Tensor, forget_target: float) -> torch.Tensor:
    """Bounded plasticity that lets go: mean of max(0, ℓ_θ* / ℓ_θ − 1/c).

    At c it ends as the hinge does, and before it pushes with a force of (ℓ_θ* / ℓ_θ)²: nine times less at 3 times the
    original loss than at its start. So it stops where stability resists, beside what is like the forgotten, and goes
    on where nothing does: a model that never saw a class has 2.5 times the loss on one unlike all others, 1.4 times
    on one that is easily confused (``benchmarks.timesteps``), and no one c fits both. A scalar from 0, below 1 while
    the loss is no lower than the original.
    """
    return (base_loss / loss - 1 / forget_target).clamp_min(0).mean()


def elbo(loss: torch.Tensor) -> torch.Tensor:
    """The paper's plasticity inducer (VDU, arXiv 2510.04058): minus the denoising loss, unbounded below.

    It stands for E_q[log p(D_f | θ)] with the likelihood replaced by its diffusion ELBO, unweighted
    over timesteps (Ho et al. 2020, eq. 14).
    """
    return -loss.mean()


def redirect(
    noise_pred: torch.Tensor,
    base_noise_pred: torch.Tensor,
    anchor_noise_pred: torch.Tensor,
    noise: torch.Tensor,
    conditional: torch.Tensor,
) -> torch.Tensor:
    """Where a conditional model goes instead: mean of ‖ε_θ − ε*_a‖² / ‖ε*_f − ε‖².

    ε*_a is the pre-trained model's prediction under the anchor, ε*_f that under the forgotten condition (concept
    ablation, Kumari et al. 2023, here on real forget images and on the model's own of the anchor). The hinge alone
    says only where not to go, and leaves noise under the forgotten condition. Past the anchor, away from ε*_f as
    ESD's target is (Gandikota et al. 2023), conditions that are near the forgotten one are lost with it.
    Predictions and noise (N, ...); ``conditional`` (N,) bool tells which images are shown under the forgotten
    condition, the others count 0. A scalar >= 0, in units of the pre-trained model's own error.
    """
    off = denoising_loss(noise_pred, anchor_noise_pred)
    return (conditional * off / denoising_loss(base_noise_pred, noise)).mean()


def stability(noise_pred: torch.Tensor, base_noise_pred: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Function-space stability on replay images: mean of ‖ε_θ − ε_θ*‖² / ‖ε_θ* − ε‖².

    Relative to the pre-trained model's own error, so that all timesteps count alike and 1 means that the
    model has moved by as much as it was wrong. Both predictions (N, ...); a scalar >= 0.
    """
    moved = denoising_loss(noise_pred, base_noise_pred)
    return (moved / denoising_loss(base_noise_pred, noise)).mean()


def forget_ratio(loss: torch.Tensor, base_loss: torch.Tensor) -> torch.Tensor:
    """Mean over images of ℓ_θ / ℓ_θ*: 1 is the pre-trained model, bounded plasticity aims at ``forget_target``."""
    return (loss / base_loss).mean()
