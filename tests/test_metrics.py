import math

import pytest
import torch

from vdu_peft.metrics import (
    class_shares,
    frechet_distance,
    kernel_distance,
    precision_recall,
    pul,
    pul_interval,
    retained_distance,
)


def test_shares_count_classes_that_were_never_drawn():
    assert class_shares(torch.tensor([0, 0, 2, 2]), 4).tolist() == [0.5, 0, 0.5, 0]


def test_pul():
    assert pul(0.2, 0.05) == pytest.approx(75)
    assert pul(0.2, 0.3) == pytest.approx(-50)
    assert math.isnan(pul(0.0, 0.1))


def test_frechet_distance_is_the_closed_form_for_commuting_covariances():
    torch.manual_seed(0)
    x = torch.randn(4000, 3, dtype=torch.float64)
    # For y = s x + m with one scale s: ‖μ − μ'‖² + (1 − s)² tr Σ, exactly, whatever the sample.
    shift, scale = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), 1.7
    y = scale * x + shift
    mean, covariance = x.mean(0), x.T.cov()
    expected = ((scale - 1) * mean + shift).square().sum() + (1 - scale) ** 2 * covariance.trace()
    assert frechet_distance(y, x) == pytest.approx(expected.item(), rel=1e-6)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)


def test_pul_interval_covers_as_often_as_it_says():
    """Exact coverage over all pairs of counts, weighted by their binomial probabilities: at least 95 %."""
    num, share_before, share_after = 200, 0.1, 0.02
    counts = torch.arange(num + 1).double()
    before, after = (torch.distributions.Binomial(num, p).log_prob(counts).exp() for p in (share_before, share_after))
    truth = pul(share_before, share_after)
    covered = 0.0
    for b in range(1, 60):  # what is beyond has a probability of 1e-13
        for a in range(25):
            low, high = pul_interval(b, a, num, num)
            assert low <= pul(b / num, a / num) <= high
            covered += (before[b] * after[a]).item() * (low <= truth <= high)
    assert 0.95 <= covered < 0.995
    assert pul_interval(50, 0, 1000, 1000)[1] == 100
    # Half as many samples after, half as many of the class: the same share, so the interval lies around 0.
    low, high = pul_interval(400, 200, 2000, 1000)
    assert low < 0 < high and abs(low + high) / 2 < 3
    assert all(math.isnan(bound) for bound in (*pul_interval(0, 0, 10, 10), *pul_interval(0, 3, 10, 10)))


def test_retained_distance_does_not_see_the_forgotten_class():
    before = torch.tensor([0.5, 0.25, 0.25])
    assert retained_distance(before, torch.tensor([0.0, 0.5, 0.5]), 0) == pytest.approx(0)
    assert retained_distance(before, torch.tensor([0.4, 0.6, 0.0]), 0) == pytest.approx(0.5)


def test_precision_and_recall_by_brute_force():
    torch.manual_seed(0)
    samples, real = torch.randn(30, 2), 0.7 * torch.randn(40, 2) + 0.5

    def inside(points, manifold):
        count = 0
        for point in points:
            for i, centre in enumerate(manifold):
                others = sorted((centre - m).norm().item() for j, m in enumerate(manifold) if j != i)
                if (point - centre).norm().item() <= others[2]:
                    count += 1
                    break
        return count / len(points)

    assert precision_recall(samples, real) == (inside(samples, real), inside(real, samples))
    # Two modes of four drawn: all that is drawn is real, and half of what is real is drawn.
    modes = torch.cat([torch.randn(50, 2) + 100 * i for i in range(4)])
    assert precision_recall(modes[:100], modes) == (1, 0.5)


def test_kernel_distance_is_the_unbiased_estimate():
    """Of sets that are one subset: mean of k over distinct pairs within each, less twice that between."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 3).double(), torch.randn(20, 3).double() + 1

    def kernel(a, b):
        return (a @ b.T / 3 + 1) ** 3

    off_diagonal = ~torch.eye(20, dtype=torch.bool)
    expected = kernel(x, x)[off_diagonal].mean() + kernel(y, y)[off_diagonal].mean() - 2 * kernel(x, y).mean()
    assert kernel_distance(x, y) == pytest.approx(expected.item(), rel=1e-6)
