import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_unet
from diffusers import DDPMScheduler

from vdu_peft import UnlearnConfig, VDUConfig
from vdu_peft.adapter import attach, variational_layers
from vdu_peft.batch import Batch
from vdu_peft.denoiser import Denoiser
from vdu_peft.terms import loss_terms


def test_images_of_the_anchor_are_redirected_but_not_pushed_away():
    """By hand: the hinge and the forget ratio are of the forget images alone, the redirection of both."""
    config = UnlearnConfig(null_class=3, plasticity="hinge", forget_target=2.0)
    denoiser = Denoiser(tiny_unet(num_class_embeds=4), DDPMScheduler())
    torch.manual_seed(0)
    images, noise, timesteps = torch.randn(8, 1, 8, 8), torch.randn(8, 1, 8, 8), torch.randint(1000, (8,))
    labels, anchors = torch.tensor([1, 1, 3, 1, 0, 2, 3, 0]), torch.tensor([0, 2, 0, 0])
    replaced = torch.tensor([False, True, False, False])
    model = attach(denoiser.model, VDUConfig.for_model(denoiser.model, variational=False))
    for _, layer in variational_layers(model):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    batch = Batch(images, noise, timesteps, labels, anchors, replaced)
    with torch.no_grad():
        terms = loss_terms(denoiser, denoiser.model, batch, config, Accelerator())
        x_t = denoiser.add_noise(images, noise, timesteps)
        predictions = denoiser.noise_pred(x_t, timesteps, labels)
        with model.disable_adapter():
            base, anchored = denoiser.noise_pred(x_t, timesteps, labels), []
            anchored = denoiser.noise_pred(x_t[:4], timesteps[:4], anchors)
    loss, base_loss = ((p - noise).square().mean((1, 2, 3)) for p in (predictions, base))
    shown = [0, 2, 3]
    hinge = sum(max(0.0, 1 - (loss[i] / (2 * base_loss[i])).item()) for i in shown) / 3
    assert terms["plasticity"].item() == pytest.approx(hinge, rel=1e-4)
    ratio = sum((loss[i] / base_loss[i]).item() for i in shown) / 3
    assert terms["forget_ratio"].item() == pytest.approx(ratio, rel=1e-4) and abs(ratio - 1) > 1e-3
    off = (predictions[:4] - anchored).square().mean((1, 2, 3)) / base_loss[:4]
    assert terms["redirect"].item() == pytest.approx(off[[0, 1, 3]].sum().item() / 4, rel=1e-4)


@pytest.mark.parametrize("plasticity", ["hinge", "reciprocal", "elbo"])
def test_terms_of_an_unconditional_model_by_hand(plasticity):
    config = UnlearnConfig(plasticity=plasticity, forget_target=2.0)
    denoiser = Denoiser(tiny_unet(), DDPMScheduler())
    torch.manual_seed(0)
    images, noise, timesteps = torch.randn(8, 1, 8, 8), torch.randn(8, 1, 8, 8), torch.randint(1000, (8,))
    model = attach(denoiser.model, VDUConfig.for_model(denoiser.model, variational=False))
    for _, layer in variational_layers(model):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    with torch.no_grad():
        terms = loss_terms(denoiser, denoiser.model, Batch(images, noise, timesteps), config, Accelerator())
        x_t = denoiser.add_noise(images, noise, timesteps)
        prediction = denoiser.noise_pred(x_t, timesteps)
        with model.disable_adapter():
            base = denoiser.noise_pred(x_t, timesteps)
    loss, base_loss = ((p - noise).square().mean((1, 2, 3)) for p in (prediction, base))
    pairs = list(zip(loss[:4].tolist(), base_loss[:4].tolist(), strict=True))  # the forget images
    expected = {
        "hinge": sum(max(0, 1 - now / (2 * before)) for now, before in pairs) / 4,
        "reciprocal": sum(max(0, before / now - 1 / 2) for now, before in pairs) / 4,
        "elbo": -sum(now for now, _ in pairs) / 4,
    }
    assert terms["plasticity"].item() == pytest.approx(expected[plasticity], rel=1e-4)
    assert len({round(value, 3) for value in expected.values()}) == 3
    assert terms["forget_ratio"].item() == pytest.approx(sum(now / before for now, before in pairs) / 4, rel=1e-4)
    moved = (prediction - base).square().mean((1, 2, 3)) / base_loss
    assert terms["stability"].item() == pytest.approx(moved[4:].mean().item(), rel=1e-4)  # the replay images
    assert {*terms} == {"plasticity", "stability", "forget_ratio"}
