import math

import pytest
import torch
from conftest import is_first

from vdu_peft import VDUConfig
from vdu_peft.adapter import attach
from vdu_peft.contexts import adapter_scale
from vdu_peft.denoiser import image_seeds
from vdu_peft.strength import Strength, calibrate, scale_delta

ODDS = {"target_modules": ["odds"], "r": 1, "lora_alpha": 1}


def with_delta(denoiser, delta):
    """The denoiser with an adapter that adds ``delta`` to the log odds of its first kind, and that layer."""
    attach(denoiser.model, VDUConfig(**ODDS))
    layer = denoiser.model.odds
    layer.lora_A["default"].weight.data.fill_(1)
    layer.lora_B["default"].weight.data.fill_(delta)
    return layer


@pytest.mark.parametrize(
    ("delta", "tolerance", "scale"),
    [
        (-6.0, 0.02, 1.0),  # 0.5 % remain, few enough
        (-3.0, 0.08, 1.25),  # 9.5 %, then 4.6 %
        (-2.0, 0.0, 2.0),  # 24 %, then 15, 9.5, 5.9 and 3.6 %, and no further
        (-1.0, 0.02, 1.0),  # 54 %, of which a scale of 1.25 makes a sixth go: too little
    ],
)
def test_what_remains_is_what_the_odds_leave(two_kinds, delta, tolerance, scale):
    """A sampler moves the first kind's share from 1/2 to sigmoid(delta), and keeps the order of the noises."""
    denoiser, forget = two_kinds
    seeds = image_seeds(1, 1500)
    samples = denoiser.sample(1500, seed=seeds, num_inference_steps=50)
    with_delta(denoiser, delta)
    options = {"tolerance": tolerance, "num_inference_steps": 50, "seed": 0}
    strength = calibrate(denoiser, forget, samples, seeds, **options)
    kind = int(is_first(samples).sum())
    assert 0.5 * kind < strength.num_alike <= kind + 10
    assert strength.scale == scale
    share = 2 / (1 + math.exp(-delta * scale))
    # Three standard deviations of so many draws.
    assert abs(strength.remaining / strength.num_alike - share) < 3 * math.sqrt(share / strength.num_alike)


def test_too_few_alike_say_nothing(two_kinds):
    denoiser, forget = two_kinds
    seeds = image_seeds(3, 300)
    samples = denoiser.sample(300, seed=seeds, num_inference_steps=20)
    first = is_first(samples).nonzero().flatten().tolist()
    keep = sorted({*range(300)} - {*first[9:]})
    with_delta(denoiser, 0.0)
    options = {"tolerance": 0.0, "num_inference_steps": 20, "seed": 0}
    strength = calibrate(denoiser, forget, samples[keep], [seeds[i] for i in keep], **options)
    assert 0 < strength.num_alike < 10 and strength == Strength(1.0, strength.num_alike, strength.num_alike)
    second = sorted({*range(300)} - {*first})
    far = forget + 5  # like nothing that is drawn
    strength = calibrate(denoiser, far, samples[second], [seeds[i] for i in second], **options)
    assert strength == Strength(1.0, 0, 0)


@pytest.mark.parametrize("variational", [True, False])
def test_a_scaled_posterior_is_that_of_the_scaled_delta(unet, variational):
    attach(unet, VDUConfig.for_model(unet, variational=variational))
    layers = [m for m in unet.modules() if hasattr(m, "lora_log_std")]
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    before = [(layer.get_delta_weight("default"), layer.signal_to_noise("default")) for layer in layers]
    x, t = torch.rand(2, 1, 8, 8), torch.tensor([5, 900])
    with adapter_scale(unet, 1.5):
        scaled = unet(x, t).sample
    scale_delta(unet, 1.5)
    torch.testing.assert_close(unet(x, t).sample, scaled)
    for layer, (delta, signal_to_noise) in zip(layers, before, strict=True):
        torch.testing.assert_close(layer.get_delta_weight("default"), 1.5 * delta)
        # Unchanged: the deviations are scaled as the mean is.
        assert layer.signal_to_noise("default") == (pytest.approx(signal_to_noise) if variational else None)
