r"""The Gaussian posterior over the low-rank factor B, and its prior on the weight delta.

An adapted layer adds :math:`\Delta W = s\,B A` with a deterministic ``lora_A`` (r x in) and
:math:`q(B) = \prod_{ij} N(M_{ij}, S_{ij}^2)` (out x r). Given A, the delta is Gaussian, so every
quantity here is a closed form. Tensors in, tensors out: no module is seen.

Shapes: ``mean`` and ``log_std`` are (..., out, r), ``gram`` is (..., r, r), where the leading
dimensions are the groups of a grouped convolution. KLs are in nats, summed over the layer.
"""

import math

import torch


def gram_matrix(lora_A: torch.Tensor, scaling: float) -> torch.Tensor:
    """G = s² A Aᵀ.

    Args:
        lora_A: (..., r, in), in = in_channels x kernel elements for a convolution.
        scaling: s = lora_alpha / r.

    Returns:
        (..., r, r), symmetric positive definite when A has full row rank.
    """
    return scaling**2 * lora_A @ lora_A.mT


def delta_quadratic(mean: torch.Tensor, gram: torch.Tensor, prior_std: float) -> torch.Tensor:
    """‖s M A‖² / (2σ²): minus the log prior density of the mean delta up to a constant, in nats.

    It is all that is left of the KL for a deterministic adapter.
    """
    return (mean.mT @ mean * gram).sum() / (2 * prior_std**2)


def delta_kl(mean: torch.Tensor, log_std: torch.Tensor, gram: torch.Tensor, prior_std: float) -> torch.Tensor:
    r"""KL(q(ΔW) ‖ N(0, σ² I) on the row space of A), in nats, summed over the layer.

    The prior sits on the delta, so in terms of B it is p(B_i) = N(0, σ² G⁻¹) for every output row i:
    rescaling A → cA, B → B/c moves no weight out of its sight. With the row's covariance diag(S_i²):

        KL = ½ Σ_i [ (tr(G diag(S_i²)) + M_iᵀ G M_i)/σ² − r + r ln σ² − ln det G − Σ_j ln S_ij² ]

    Args:
        mean: M, (..., out, r).
        log_std: ln S, (..., out, r).
        gram: G, (..., r, r).
        prior_std: σ, the prior standard deviation of one element of the delta.

    Returns:
        a scalar; NaN where G is not positive definite: of an A with a row too many, or one that has run off.
    """
    # tr(G diag(S_i²)) + M_iᵀ G M_i, summed over the rows, is <E[BᵀB], G>. In few operations: every layer has its KL in
    # every step, and their number is what it costs.
    second_moment = mean.mT @ mean + torch.diag_embed((2 * log_std).exp().sum(-2))
    quadratic = (second_moment * gram).sum() / (2 * prior_std**2)
    # With A short of full row rank the prior on B is improper; the layers refuse a rank above A's columns.
    factor, failed = torch.linalg.cholesky_ex(gram)  # without an error, and so without waiting for the device
    half_log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1).masked_fill(failed > 0, math.nan).sum()
    constant = mean.numel() * (math.log(prior_std) - 0.5)
    return quadratic - mean.shape[-2] * half_log_det - log_std.sum() + constant


def sample_weight(mean: torch.Tensor, log_std: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """One draw of B ~ q(B), same shape as ``mean``."""
    noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
    return mean + log_std.exp() * noise


def sampled_output(hidden: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor, groups: int = 1) -> torch.Tensor:
    """B h with a draw of B ~ q(B) of its own for every example of the batch.

    Independent between examples, as in the local reparameterisation (Kingma, Salimans, Welling 2015) and in flipout
    (Wen et al. 2018), so that a batch averages the noise; but within an example all positions (pixels, tokens)
    share the draw, as they do under one weight: the joint distribution is exact. B has r columns only, so the
    draws are small, where a noise value for every output element took as long as the rest of the layer.

    Args:
        hidden: h = A x, (batch, ..., r) for a linear layer, or (batch, r, height, width) for a convolution; the
            first dimension is taken for the batch.
        mean: M, (out, r) or (out, r / groups, 1, 1).
        log_std: ln S, as ``mean``.
        groups: groups of the convolution.

    Returns:
        (batch, ..., out) or (batch, out, height, width).
    """
    batch = len(hidden)
    flat = mean.flatten(1)
    weight = torch.addcmul(
        flat, log_std.flatten(1).exp(), torch.randn(batch, *flat.shape, dtype=flat.dtype, device=flat.device)
    )
    if mean.ndim == 4:
        output = weight.unflatten(1, (groups, -1)) @ hidden.flatten(2).unflatten(1, (groups, -1))
        return output.reshape(batch, -1, *hidden.shape[2:])
    return (hidden.reshape(batch, -1, hidden.shape[-1]) @ weight.mT).reshape(*hidden.shape[:-1], -1)


def signal_to_noise(mean: torch.Tensor, log_std: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """E‖signal‖² / E‖noise‖² of the delta: tr(M G Mᵀ) / Σ_i tr(G diag(S_i²)); a scalar, no unit."""
    signal = 2 * delta_quadratic(mean, gram, 1.0)
    noise = (torch.exp(2 * log_std) * gram.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)).sum()
    return signal / noise
