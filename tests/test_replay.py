"""The forget-likeness of images, from features alone."""

import torch

from vdu_peft.replay import RIDGE, forget_scores, ridge_regression


def test_forget_scores_find_the_forget_concept_among_samples():
    torch.manual_seed(0)
    concept = torch.zeros(20).index_fill(0, torch.tensor([0, 1]), 4.0)
    forget = concept + torch.randn(50, 20)
    samples = torch.randn(200, 20)
    samples[:20] += concept
    forget_score, sample_score = forget_scores(forget, samples)
    dropped = sample_score >= torch.quantile(forget_score, 0.05)
    assert dropped[:20].float().mean() >= 0.8 and dropped[20:].float().mean() <= 0.05


def test_images_of_one_kind_are_not_told_apart():
    """With ten times the features, a regression that has seen them would have every image on its own side."""
    torch.manual_seed(0)
    forget_score, sample_score = forget_scores(torch.randn(50, 2000), torch.randn(150, 2000))
    below = (sample_score < forget_score.median()).double().mean().item()
    assert abs(below - 0.5) < 0.25  # three deviations of the median's own place


def test_ridge_regression_against_its_normal_equations():
    """With the intercept as one more feature that is not penalised."""
    torch.manual_seed(0)
    features, targets, weights = torch.randn(30, 7).double(), torch.randn(30).double(), torch.rand(30).double()
    ones = torch.ones(30, 1, dtype=torch.float64)
    design, penalty = torch.cat([features, ones], 1), RIDGE * torch.eye(8, dtype=torch.float64)
    penalty[-1, -1] = 0
    weighted = (weights / weights.sum())[:, None] * design
    expected = torch.linalg.solve(design.T @ weighted + penalty, weighted.T @ targets)
    others = torch.randn(5, 7).double()
    found = ridge_regression(features, targets, weights, others)
    torch.testing.assert_close(found, others @ expected[:-1] + expected[-1], atol=1e-10, rtol=0)


def test_a_single_forget_image_is_scored_too():
    forget_score, sample_score = forget_scores(torch.ones(1, 3), torch.eye(3)[:2])
    assert forget_score.shape == (1,) and (sample_score < forget_score).all()
