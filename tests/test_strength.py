import math
from dataclasses import replace

import pytest
import torch
from conftest import is_first

from vdu_peft import VDUConfig
from vdu_peft import replay as replay_module
from vdu_peft import strength as strength_module
from vdu_peft.adapter import attach
from vdu_peft.contexts import adapter_scale
from vdu_peft.denoiser import image_seeds
from vdu_peft.likeness import own_likeness
from vdu_peft.replay import own_alike
from vdu_peft.strength import Strength, calibrate, own_losses, scale_delta


def with_delta(denoiser, delta):
    """The denoiser with an adapter that adds ``delta`` to the log odds of its first kind."""
    attach(denoiser.model, VDUConfig(target_modules=["odds"], r=1, lora_alpha=1))
    layer = denoiser.model.odds
    layer.lora_A["default"].weight.data.fill_(1)
    layer.lora_B["default"].weight.data.fill_(delta)


@pytest.mark.parametrize(
    ("delta", "tolerance", "scale"),
    [
        (-6.0, 0.02, 1.0),  # 0.5 % remain, few enough
        (-3.0, 0.08, 1.25),  # 9.5 %, then 4.6 %
        (-2.0, 0.0, 2.0),  # 24 %, then 15, 9.5, 5.9 and 3.6 %, and no further
        (-1.0, 0.02, 1.0),  # 54 %, of which a scale of 1.25 makes a sixth go: too little
    ],
)
def test_what_remains_is_what_the_odds_leave(two_kinds, monkeypatch, delta, tolerance, scale):
    """A sampler moves the first kind's share from 1/2 to sigmoid(delta), and keeps the order of the noises."""
    monkeypatch.setattr(replay_module, "MAX_ALIKE", 1500)
    denoiser, forget = two_kinds
    seeds = image_seeds(1, 1500)
    samples = denoiser.sample(1500, seed=seeds, num_inference_steps=50)
    with_delta(denoiser, delta)
    with adapter_scale(denoiser.model, 0):
        own = own_alike(*own_likeness(denoiser, forget, samples, None, seed=0), seeds, noise_seed=0)
    strength = calibrate(denoiser, own, tolerance=tolerance, max_scale=2.0, num_inference_steps=50)
    kind = int(is_first(samples).sum())
    assert 0.5 * kind < strength.num_alike <= kind + 10
    assert strength.scale == scale
    share = 2 / (1 + math.exp(-delta * scale))
    # Three standard deviations of so many draws.
    assert abs(strength.remaining / strength.num_alike - share) < 3 * math.sqrt(share / strength.num_alike)


def calibrated(denoiser, own, max_scale=2.0):
    return calibrate(denoiser, own, tolerance=0.0, max_scale=max_scale, num_inference_steps=50)


def test_what_is_drawn_again_is_neither_too_few_nor_too_many(two_kinds):
    denoiser, forget = two_kinds
    seeds = image_seeds(1, 1500)
    samples = denoiser.sample(1500, seed=seeds, num_inference_steps=50)
    own = own_alike(*own_likeness(denoiser, forget, samples, None, seed=0), seeds, noise_seed=0)
    by_seed = dict(zip(seeds, is_first(samples).tolist(), strict=True))
    assert len(own.seeds) == 200 and sum(by_seed[seed] for seed in own.seeds) > 170
    with_delta(denoiser, -3.0)
    assert calibrated(denoiser, own).scale > 1.25
    # Nine say too little, even if all of them remain.
    still = is_first(denoiser.sample(200, seed=own.seeds, num_inference_steps=50)).tolist()
    remain = [seed for seed, first in zip(own.seeds, still, strict=True) if first]
    few = calibrated(denoiser, replace(own, seeds=remain[:9]))
    assert few.scale == 1 and few.remaining > 2 and "only 9 own samples" in str(few)
    none = calibrated(denoiser, replace(own, seeds=[]))
    assert none == Strength(1.0, 0, 0, 0.0) and none.enough
    # A scale that may destroy the model is not tried.
    assert calibrated(denoiser, own, max_scale=1.3).scale == 1.25
    # Of samples that are no numbers none is forgotten.
    denoiser.model.odds.lora_B["default"].weight.data.fill_(float("nan"))
    assert calibrated(denoiser, own).remaining == 200


@pytest.mark.parametrize(
    ("losses", "scale"),
    [([1.0, 1.01, 1.02], 1.5), ([1.0, 1.01, 1.03], 1.25), ([1.0, 1.03], 1.0), ([1.0, math.nan], 1.0)],
)
def test_a_delta_is_scaled_no_further_than_what_else_is_drawn_stays_plausible(two_kinds, monkeypatch, losses, scale):
    """Of what did not look like the forget images, each time what the adapter makes of it at that scale."""
    denoiser, forget = two_kinds
    seeds = image_seeds(1, 300)
    samples = denoiser.sample(300, seed=seeds, num_inference_steps=20)
    own = own_alike(*own_likeness(denoiser, forget, samples, None, seed=0), seeds, noise_seed=0)
    assert len(own.others) == 150 and {*own.others} < {*seeds} - {*own.seeds}
    with_delta(denoiser, -2.0)
    monkeypatch.setattr(strength_module, "STAYING", 0.9)  # else so few are no help from some scale on
    told, images = iter(losses), []

    def one_after_the_other(denoiser, drawn, seed):
        images.append(drawn)
        return next(told) * torch.tensor([1.0, 0.5])

    monkeypatch.setattr(strength_module, "own_losses", one_after_the_other)
    strength = calibrate(denoiser, own, tolerance=0.0, max_scale=1.5, num_inference_steps=20)
    assert strength.scale == scale and len(images) == len(losses)
    for again, at in zip(images, (1.0, 1.25, 1.5), strict=False):
        with adapter_scale(denoiser.model, at):
            expected = denoiser.sample(150, seed=own.others, num_inference_steps=20)
        torch.testing.assert_close(again, expected, atol=0.1, rtol=0)  # bfloat16 where the CPU can


def test_losses_are_the_mean_of_single_images(two_kinds):
    denoiser, _ = two_kinds
    denoiser.batch_size = 2
    images = denoiser.sample(5, seed=0, num_inference_steps=10)
    generator = torch.Generator().manual_seed(3)
    expected = []
    for t in (50, 150, 300):
        noise = torch.cat([torch.randn(n, 1, 8, 8, generator=generator) for n in (2, 2, 1)])
        each = []
        for image, eps in zip(images, noise, strict=True):
            alpha, sigma = denoiser.schedule.alphas[t], denoiser.schedule.sigmas[t]
            with torch.no_grad():
                each.append(
                    (denoiser.model((alpha * image + sigma * eps)[None], torch.tensor([t])) - eps).square().mean()
                )
        expected.append(torch.stack(each).mean())
    torch.testing.assert_close(own_losses(denoiser, images, seed=3), torch.stack(expected))


@pytest.mark.parametrize(
    ("num_alike", "remaining", "tolerance", "enough"),
    [(200, 5, 0.025, True), (200, 6, 0.025, False), (30, 2, 0.025, True), (30, 3, 0.025, False), (9, 9, 0.0, True)],
)
def test_two_may_always_remain(num_alike, remaining, tolerance, enough):
    strength = Strength(1.0, num_alike, remaining, tolerance)
    assert strength.enough == enough
    assert strength.remaining_share == (remaining / num_alike if num_alike >= 10 else None)


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
