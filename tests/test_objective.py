import pytest
import torch
from torch.nn.functional import mse_loss

from vdu_peft import objective


def test_denoising_loss_is_the_mean_squared_error_of_each_image():
    torch.manual_seed(0)
    prediction, noise = torch.randn(2, 5, 3, 4, 4)
    expected = torch.stack([mse_loss(p, n) for p, n in zip(prediction, noise, strict=True)])
    torch.testing.assert_close(objective.denoising_loss(prediction, noise), expected)


@pytest.mark.parametrize("ratio, value, slope", [(1.0, 2 / 3, -1 / 6), (2.0, 1 / 3, -1 / 6), (3.5, 0.0, 0.0)])
def test_hinge_is_linear_up_to_the_target_and_flat_beyond(ratio, value, slope):
    base = torch.tensor([2.0], dtype=torch.float64)
    loss = (ratio * base).requires_grad_()
    hinge = objective.hinge(loss, base, forget_target=3.0)
    hinge.backward()
    assert hinge.item() == pytest.approx(value) and loss.grad.item() == pytest.approx(slope)


def test_hinge_does_not_let_one_image_pay_for_another():
    base = torch.ones(2)
    assert objective.hinge(torch.tensor([1.0, 99.0]), base, 2.0).item() == pytest.approx(0.25)


@pytest.mark.parametrize("ratio", [1.0, 1.7, 2.9, 3.0, 3.5])
def test_reciprocal_pushes_less_the_further_an_image_is_and_not_past_the_target(ratio):
    base = torch.tensor([2.0], dtype=torch.float64)
    loss = (ratio * base).requires_grad_()
    reciprocal = objective.reciprocal(loss, base, forget_target=3.0)
    reciprocal.backward()
    assert reciprocal.item() == pytest.approx(max(1 / ratio - 1 / 3, 0))
    assert ratio == 3.0 or loss.grad.item() == pytest.approx(-1 / ratio**2 / 2 if ratio < 3 else 0)


def test_reciprocal_is_of_each_image():
    base = torch.tensor([1.0, 2.0, 1.0])
    assert objective.reciprocal(torch.tensor([1.0, 4.0, 99.0]), base, 4.0).item() == pytest.approx((0.75 + 0.25) / 3)


def test_elbo_is_minus_the_denoising_loss():
    assert objective.elbo(torch.tensor([1.0, 3.0])).item() == -2.0


def test_redirect_is_zero_at_the_anchor_and_counts_the_conditional_images_alone():
    torch.manual_seed(0)
    noise, base, anchor = torch.randn(3, 4, 1, 4, 4, dtype=torch.float64)
    conditional = torch.tensor([True, False, True, False])
    assert objective.redirect(anchor, base, anchor, noise, conditional).item() == 0
    # One conditional image off by the teacher's own error, an unconditional one off by any amount.
    off = anchor.clone()
    off[0] += base[0] - noise[0]
    off[1] += 100
    value = objective.redirect(off, base, anchor, noise, conditional).item()
    assert value == pytest.approx(1 / 4, rel=1e-5)


def test_stability_is_zero_for_the_teacher_and_one_when_moved_by_its_own_error():
    torch.manual_seed(0)
    noise, error = torch.randn(2, 4, 1, 4, 4, dtype=torch.float64)
    base = noise + error
    assert objective.stability(base, base, noise).item() == 0
    assert objective.stability(noise, base, noise).item() == pytest.approx(1.0, rel=1e-6)
    assert objective.stability(base + 2 * error, base, noise).item() == pytest.approx(4.0, rel=1e-6)


def test_forget_ratio():
    assert objective.forget_ratio(torch.tensor([2.0, 9.0]), torch.tensor([1.0, 3.0])).item() == 2.5
