import math

import pytest
import torch

from vdu_peft.metrics import class_shares, frechet_distance, pul


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
