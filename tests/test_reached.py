"""How far a run has come: nowhere is exactly nowhere, and elsewhere is what many draws say."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_unet
from diffusers import DDPMScheduler

from vdu_peft import UnlearnConfig, VDUConfig, unlearn
from vdu_peft import reached as reached_module
from vdu_peft.adapter import attach, variational_layers
from vdu_peft.batch import BatchSource
from vdu_peft.classes import run_classes
from vdu_peft.contexts import adapter_scale
from vdu_peft.data import ImageDataset
from vdu_peft.denoiser import Denoiser
from vdu_peft.reached import Reached, reached

CONFIG = UnlearnConfig(
    max_train_steps=40, train_batch_size=4, learning_rate=2e-2, forget_class=1, anchor_class=2, null_class=3
)
REPLAY = {"replay": torch.zeros(4, 1, 8, 8), "replay_labels": torch.tensor([3, 3, 3, 3])}  # none of an anchor


@pytest.fixture
def denoiser():
    made = Denoiser(tiny_unet(num_class_embeds=4), DDPMScheduler())
    made.model.class_embedding.weight.data.mul_(5)  # a trained model's classes are further apart than random ones
    return made


def attached(denoiser):
    """Its network with a fresh adapter, which changes nothing."""
    attach(denoiser.model, VDUConfig.for_model(denoiser.model))
    return denoiser.model


def measured(denoiser, forget, config):
    classes = run_classes(denoiser, config, None, len(forget), None, draws_replay=False)
    source = BatchSource(ImageDataset(forget), *REPLAY.values(), classes, config, (200, 1000), 1000)
    return reached(denoiser, source, config.filled(denoiser.condition), Accelerator())


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_a_run_that_learns_nothing_is_where_it_began_whatever_its_batches(denoiser, forget, batch_size):
    """The posterior's noise and the batches' luck, which raise and lower a history's terms, have no part in it."""
    config = replace(CONFIG, learning_rate=1e-12, max_train_steps=3, train_batch_size=batch_size)
    result = unlearn(denoiser, forget, config, VDUConfig.for_model(denoiser.model, init_scale=6.0), **REPLAY)
    assert result.reached.forget_ratio == pytest.approx(1, abs=1e-5)
    assert result.reached.redirect_left == pytest.approx(1, abs=1e-5)
    assert result.reached.stability == pytest.approx(0, abs=1e-5)
    assert result.status == "nothing learned"


def test_it_is_what_many_draws_say(denoiser, forget):
    config = replace(CONFIG, forget_target=1.01, stability_weight=0.0)
    result = unlearn(denoiser, forget, config, **REPLAY)
    torch.manual_seed(1)
    images, noise = forget.repeat(250, 1, 1, 1), torch.randn(2000, 1, 8, 8)
    timesteps = torch.randint(200, 1000, (2000,))
    x_t = denoiser.add_noise(images, noise, timesteps)

    def predicted(label, scale):
        with torch.no_grad(), adapter_scale(denoiser.model, scale):
            return denoiser.noise_pred(x_t, timesteps, torch.as_tensor(label).expand(2000))

    def error(first, second):
        return (first - second).square().mean((1, 2, 3))

    anchor, base = predicted(2, 0), error(predicted(1, 0), noise)
    left = (error(predicted(1, 1), anchor) / base).mean() / (error(predicted(1, 0), anchor) / base).mean()
    ratio = sum((error(predicted(c, 1), noise) / error(predicted(c, 0), noise)).mean() for c in (1, 3)) / 2
    images, labels = torch.zeros(2000, 1, 8, 8), 3
    timesteps = torch.randint(1000, (2000,))
    x_t = denoiser.add_noise(images, noise, timesteps)
    moved = (error(predicted(labels, 1), predicted(labels, 0)) / error(predicted(labels, 0), noise)).mean()
    assert left < 0.8 and ratio > 1.005 and moved > 0.01
    assert measured(denoiser, forget, config) == result.reached  # alike at each call
    # Of 64 images, half of them under the null class, which is not redirected.
    assert result.reached.redirect_left == pytest.approx(left.item(), rel=0.1)
    assert result.reached.forget_ratio == pytest.approx(ratio.item(), rel=0.1)
    assert result.reached.stability == pytest.approx(moved.item(), rel=0.2)  # of few of which it is large


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_where_both_draw_the_same_there_is_no_way_to_go(denoiser, forget, batch_size):
    """Whatever the kernels' rounding, which goes by how many are in a batch."""
    denoiser.model.class_embedding.weight.data.zero_()
    config = replace(CONFIG, max_train_steps=1, train_batch_size=batch_size)
    assert unlearn(denoiser, forget, config, **REPLAY).reached.redirect_left == 1


@pytest.mark.parametrize("share, left", [(0.0, 1.0), (0.5, 0.25), (1.0, 0.0)])
@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, anchor_class=None)])
def test_of_several_anchors_the_way_ends_at_their_mean(denoiser, forget, monkeypatch, config, share, left):
    """A model that predicts, under the forgotten class, so much of the way to what it best can."""
    predict, layer = denoiser.noise_pred, next(layer for _, layer in variational_layers(attached(denoiser)))
    anchors = [0, 2] if config.anchor_class is None else [2]

    def noise_pred(x_t, timesteps, labels):
        base = predict(x_t, timesteps, labels)
        if layer.disable_adapters:
            return base
        mean = sum(predict(x_t, timesteps, torch.full_like(labels, label)) for label in anchors) / len(anchors)
        return torch.where((labels == 1).view(-1, 1, 1, 1), base + share * (mean - base), base)

    monkeypatch.setattr(denoiser, "noise_pred", noise_pred)
    # Exact of one anchor; of several in the mean, over four hundred images here.
    monkeypatch.setattr(reached_module, "NUM_IMAGES", 400)
    tolerance = 1e-5 if len(anchors) == 1 else 0.1
    assert measured(denoiser, forget, config).redirect_left == pytest.approx(left, abs=tolerance)


@pytest.mark.parametrize("learning_rate", [10.0, 1e30])
def test_what_the_last_step_destroys_is_found(denoiser, forget, learning_rate):
    """A step's own terms are of before it."""
    config = replace(CONFIG, max_train_steps=1, learning_rate=learning_rate)
    result = unlearn(denoiser, forget, config, **REPLAY)
    assert result.history[0]["stability"] < 0.1 and result.status == "collapsed"


def test_it_reads_as_a_sentence():
    assert str(Reached(1.234, 0.01, None)) == "forget ratio 1.23, stability 0.010"
    assert str(Reached(1.0, 0.0, 0.25)) == "forget ratio 1.00, 25% of the way to the anchor left, stability 0.000"
