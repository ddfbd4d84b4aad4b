"""The closed forms of posterior.py against dense twins: torch.distributions, explicit deltas, weight draws."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import MultivariateNormal, kl_divergence

from vdu_peft import posterior

OUT, RANK, FAN_IN = 5, 3, 7
SCALING, PRIOR_STD = 1.7, 0.3
# float64 sums of fewer than a hundred terms of order one
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def factors(*leading, seed=0, scaling=SCALING):
    """(mean, log_std, lora_A, gram), float64."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(*leading, OUT, RANK, generator=generator, dtype=torch.float64)
    log_std = 0.5 * torch.randn(*leading, OUT, RANK, generator=generator, dtype=torch.float64) - 1
    lora_A = torch.randn(*leading, RANK, FAN_IN, generator=generator, dtype=torch.float64)
    return mean, log_std, lora_A, posterior.gram_matrix(lora_A, scaling)


def dense_kl(mean, log_std, gram, prior_std):
    """Row by row: N(M_i, diag(S_i²)) against N(0, σ² G⁻¹)."""
    q = MultivariateNormal(mean, covariance_matrix=torch.diag_embed(torch.exp(2 * log_std)))
    p = MultivariateNormal(torch.zeros_like(mean), precision_matrix=gram / prior_std**2)
    return kl_divergence(q, p).sum()


def test_gram_is_the_inner_product_of_the_scaled_rows():
    _, _, lora_A, gram = factors()
    rows = SCALING * lora_A
    expected = torch.stack([torch.stack([(a * b).sum() for b in rows]) for a in rows])
    torch.testing.assert_close(gram, expected, **EXACT)


@pytest.mark.parametrize("prior_std", [0.01, 0.3, 4.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_delta_kl_is_the_kl_of_gaussian_rows(prior_std, seed):
    mean, log_std, _, gram = factors(seed=seed)
    expected = dense_kl(mean, log_std, gram, prior_std)
    torch.testing.assert_close(posterior.delta_kl(mean, log_std, gram, prior_std), expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("leading", [(2,), (2, 3)])
def test_groups_add_up(leading):
    mean, log_std, lora_A, gram = factors(*leading)
    flat = [t.flatten(0, len(leading) - 1) for t in (mean, log_std, gram)]
    for closed_form in (
        lambda m, s, g: posterior.delta_kl(m, s, g, PRIOR_STD),
        lambda m, s, g: posterior.delta_quadratic(m, g, PRIOR_STD),
    ):
        expected = sum(closed_form(m, s, g) for m, s, g in zip(*flat, strict=True))
        torch.testing.assert_close(closed_form(mean, log_std, gram), expected, **EXACT)


def test_kl_is_zero_at_the_prior():
    """With orthogonal rows of A the prior σ² G⁻¹ is diagonal, so that q can be p."""
    lengths = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    lora_A = torch.linalg.qr(torch.randn(FAN_IN, RANK, dtype=torch.float64)).Q.mT * lengths[:, None]
    gram = posterior.gram_matrix(lora_A, SCALING)
    log_std = torch.log(PRIOR_STD / gram.diagonal().sqrt()).expand(OUT, RANK)
    kl = posterior.delta_kl(torch.zeros_like(log_std), log_std, gram, PRIOR_STD)
    torch.testing.assert_close(kl, torch.zeros_like(kl), **EXACT)


@pytest.mark.parametrize("c", [1e-3, 0.5, 40.0])
def test_rescaling_the_factors_changes_nothing(c):
    """A → cA, B → B/c is the same delta, so it has the same KL, quadratic and signal-to-noise ratio."""
    mean, log_std, lora_A, gram = factors()
    there = mean / c, log_std - torch.log(torch.tensor(c, dtype=torch.float64))
    gram_there = posterior.gram_matrix(c * lora_A, SCALING)
    for here, moved in [
        (posterior.delta_kl(mean, log_std, gram, PRIOR_STD), posterior.delta_kl(*there, gram_there, PRIOR_STD)),
        (
            posterior.delta_quadratic(mean, gram, PRIOR_STD),
            posterior.delta_quadratic(there[0], gram_there, PRIOR_STD),
        ),
        (posterior.signal_to_noise(mean, log_std, gram), posterior.signal_to_noise(*there, gram_there)),
    ]:
        torch.testing.assert_close(moved, here, rtol=1e-11, atol=0)


@pytest.mark.parametrize("leading", [(), (2,)])
def test_delta_kl_gradients(leading):
    mean, log_std, lora_A, _ = (t.requires_grad_() for t in factors(*leading))

    def kl(mean, log_std, lora_A):
        return posterior.delta_kl(mean, log_std, posterior.gram_matrix(lora_A, SCALING), PRIOR_STD)

    assert torch.autograd.gradcheck(kl, (mean, log_std, lora_A))


@pytest.mark.parametrize("row", [0.0, math.inf, math.nan])
def test_of_a_gram_that_is_not_positive_definite_there_is_no_finite_kl(row):
    """A row of zeros in A, where the prior on B is improper, or an A that has run off."""
    mean, log_std, lora_A, _ = factors()
    lora_A[1] = row
    assert not posterior.delta_kl(mean, log_std, posterior.gram_matrix(lora_A, 1.0), PRIOR_STD).isfinite()


def test_delta_quadratic_is_the_squared_norm_of_the_dense_delta():
    mean, _, lora_A, gram = factors()
    delta = SCALING * mean @ lora_A
    expected = delta.square().sum() / (2 * PRIOR_STD**2)
    torch.testing.assert_close(posterior.delta_quadratic(mean, gram, PRIOR_STD), expected, **EXACT)


@pytest.mark.parametrize("leading", [(), (2,)])
def test_signal_to_noise_is_that_of_the_dense_delta(leading):
    mean, log_std, lora_A, gram = factors(*leading)
    signal = (SCALING * mean @ lora_A).square().sum()
    # Var[ΔW_ij] = s² Σ_k S_ik² A_kj²
    noise = (SCALING**2 * torch.exp(2 * log_std) @ lora_A.square()).sum()
    torch.testing.assert_close(posterior.signal_to_noise(mean, log_std, gram), signal / noise, **EXACT)


DRAWS = 20_000
# (shape of hidden, shape of B, groups)
OUTPUTS = {
    "linear": ((2, 3), (5, 3), 1),
    "tokens": ((2, 4, 3), (5, 3), 1),
    "conv": ((2, 3, 2, 2), (5, 3, 1, 1), 1),
    "grouped-conv": ((2, 4, 2, 2), (6, 2, 1, 1), 2),
}


def output(weight, hidden, groups):
    if weight.ndim == 4:
        return F.conv2d(hidden, weight, groups=groups)
    return F.linear(hidden, weight)


@pytest.mark.parametrize("draw", ["held for the batch", "for every example"])
@pytest.mark.parametrize("case", OUTPUTS)
def test_output_moments(case, draw):
    """Mean and whole covariance of B h: Σ_j S_oj² h_j(p) h_j(q) between positions, 0 between rows of B.

    Examples share a held draw; drawn for every example they are independent.
    """
    hidden_shape, weight_shape, groups = OUTPUTS[case]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(hidden_shape, generator=generator, dtype=torch.float64)
    mean = torch.randn(weight_shape, generator=generator, dtype=torch.float64)
    log_std = 0.5 * torch.randn(weight_shape, generator=generator, dtype=torch.float64)
    output_mean = output(mean, hidden, groups)
    # Each element of B alone, on unit weight: B h is linear in B, so this Jacobian gives its covariance exactly.
    units = torch.eye(mean.numel(), dtype=torch.float64).reshape(-1, *weight_shape)
    jacobian = torch.vmap(lambda unit: output(unit, hidden, groups))(units).flatten(1)  # (elements of B, outputs)
    covariance = jacobian.T @ torch.diag((2 * log_std).exp().flatten()) @ jacobian
    if draw == "held for the batch":
        many = (DRAWS, *weight_shape)
        weights = posterior.sample_weight(mean.expand(many), log_std.expand(many), generator)
        samples = torch.vmap(lambda weight: output(weight, hidden, groups))(weights)
    else:
        torch.manual_seed(0)
        samples = posterior.sampled_output(hidden.repeat(DRAWS, *[1] * (hidden.ndim - 1)), mean, log_std, groups)
        assert samples.shape == (DRAWS * len(hidden), *output_mean.shape[1:])
        example = torch.arange(len(hidden)).repeat_interleave(output_mean[0].numel())
        covariance = covariance * (example[:, None] == example)
    samples = samples.reshape(DRAWS, -1)
    # Standard errors of a Gaussian's mean and covariance; 6 of them for at most 2,304 entries is a chance of 5e-6.
    variance = covariance.diagonal()
    assert ((samples.mean(0) - output_mean.flatten()).abs() < 6 * (variance / DRAWS).sqrt()).all()
    error = ((torch.outer(variance, variance) + covariance.square()) / DRAWS).sqrt()
    assert ((samples.T.cov() - covariance).abs() < 6 * error).all()


@pytest.mark.parametrize("case", OUTPUTS)
def test_gradient_of_a_draw(case):
    hidden_shape, weight_shape, groups = OUTPUTS[case]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in (hidden_shape, weight_shape)]
    log_std = torch.randn(weight_shape, dtype=torch.float64, requires_grad=True)

    def same_draw(hidden, mean, log_std):
        torch.manual_seed(0)
        return posterior.sampled_output(hidden, mean, log_std, groups)

    assert torch.autograd.gradcheck(same_draw, (*inputs, log_std))


def test_sample_weight_follows_its_generator():
    mean, log_std, _, _ = factors()
    first, again, other = (
        posterior.sample_weight(mean, log_std, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
