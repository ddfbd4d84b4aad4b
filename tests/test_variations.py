from dataclasses import replace

import pytest
import torch
from conftest import is_first, tiny_unet
from diffusers import DDPMScheduler

from vdu_peft import UnlearnConfig, VDUConfig, unlearn
from vdu_peft import trainer as trainer_module
from vdu_peft.batch import widest_deviation
from vdu_peft.denoiser import Denoiser
from vdu_peft.variations import variations

FAST = UnlearnConfig(max_train_steps=1, train_batch_size=4, replay_size=8, replay_inference_steps=4)


def test_each_image_in_turn_becomes_others_of_its_kind(two_kinds):
    denoiser, firsts = two_kinds
    seconds = denoiser.model.images[1:] + (firsts[:1] - denoiser.model.images[:1])
    forget, replay = torch.cat([firsts[:1], seconds, firsts[1:2]]), torch.cat([firsts, seconds.expand(20, -1, -1, -1)])
    config = replace(FAST, min_forget_images=43, replay_inference_steps=25).filled(None)
    begun, vary = [], denoiser.vary
    denoiser.vary = lambda images, timestep, **told: begun.append(timestep) or vary(images, timestep, **told)
    varied = variations(denoiser, forget, replay, config)
    lowest, highest = denoiser.schedule.deciding_timesteps(8, widest_deviation(replay))
    assert begun == [lowest + (highest - lowest) // 4] and 0 < lowest < highest < 1000
    assert torch.equal(is_first(varied), torch.tensor([True, False, True] * 14)[:40])
    assert len(varied.flatten(1).unique(dim=0)) == 40
    # What the model draws itself lies as far about its kind's image as the data do, 40 times 64 numbers; 15 per cent is
    # what 25 steps are off by.
    off = varied - torch.where(is_first(varied).view(-1, 1, 1, 1), *denoiser.model.images[:, None])
    own = denoiser.sample(40, seed=0)
    own_off = own - torch.where(is_first(own).view(-1, 1, 1, 1), *denoiser.model.images[:, None])
    assert off.std().item() == pytest.approx(own_off.std().item(), rel=0.15)


def test_from_more_noise_an_image_becomes_either_kind(two_kinds):
    """So that it is the range which keeps it."""
    denoiser, firsts = two_kinds
    kept = is_first(denoiser.vary(firsts, 960, seed=0)).float().mean()
    assert 0.2 < kept < 0.8


def test_where_the_replay_tells_no_range_nothing_is_varied(two_kinds):
    denoiser, firsts = two_kinds
    config = FAST.filled(None)
    assert len(variations(denoiser, firsts, firsts[:1], config)) == 0
    assert len(variations(denoiser, firsts, torch.zeros(4, 1, 8, 8), config)) == 0
    assert len(variations(denoiser, firsts, torch.cat([firsts, -firsts]), config)) == 80


def test_a_short_schedule_and_given_replay_are_enough(two_kinds):
    """The steps of the replay are none of the variations'."""
    _, firsts = two_kinds
    denoiser = Denoiser(tiny_unet(), DDPMScheduler(num_train_timesteps=20, beta_start=0.02, beta_end=0.6))
    result = unlearn(denoiser, firsts, replace(FAST, replay_inference_steps=25), replay=torch.cat([firsts, -firsts]))
    assert len(result.variations) == 80


def test_enough_images_are_not_varied(two_kinds):
    denoiser, firsts = two_kinds
    for enough in (0, 19, 20):
        config = replace(FAST, min_forget_images=enough).filled(None)
        assert variations(denoiser, firsts, firsts, config).shape == (0, 1, 8, 8)


@pytest.fixture
def forget_sets(monkeypatch):
    """What runs draw their forget images from."""
    made, batch_source = [], trainer_module.BatchSource
    monkeypatch.setattr(trainer_module, "BatchSource", lambda *parts: made.append(parts[0]) or batch_source(*parts))
    return made


def test_a_run_shows_its_images_and_their_variations(two_kinds, forget_sets, tmp_path):
    denoiser, firsts = two_kinds
    config, target = replace(FAST, min_forget_images=30, random_flip=True), VDUConfig(target_modules=["odds"], r=1)
    result = unlearn(denoiser, firsts, config, target, output_dir=tmp_path)
    assert result.variations.shape == (10, 1, 8, 8) and is_first(result.variations).all()
    (forget_set,) = forget_sets
    torch.testing.assert_close(forget_set.images[:20], firsts)
    assert torch.equal(forget_set.images[20:], result.variations)
    assert torch.equal(forget_set.mirrored, forget_set.images.flip(-1))
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "| forget images | 20 |" in card and "| variations of them | 10 |" in card


@pytest.mark.parametrize(
    ("num_classes", "options"),
    [(None, {"plasticity": "elbo"}), (None, {"min_forget_images": 0}), (4, {"forget_class": 1})],
)
def test_no_variations_for_the_elbo_nor_under_a_condition(num_classes, options, forget_sets, forget):
    denoiser = Denoiser(tiny_unet(num_class_embeds=num_classes), DDPMScheduler())
    assert len(unlearn(denoiser, forget, replace(FAST, **options)).variations) == 0
    assert torch.equal(forget_sets[0].images, forget)
