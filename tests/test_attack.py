"""The attack on prompt embeddings: its optimum in closed form, on every family, and nothing else is touched."""

from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_text_pipeline
from torch import nn

from vdu_peft.attack import EMBEDDING, embedding_attack, shift_embeddings
from vdu_peft.text_denoiser import TextDenoiser


class Mean(nn.Module):
    """Predicts the prompt embedding's mean for every pixel's noise, which is 0 on average: a loss of 1 + mean²."""

    config: dict = {}

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x_t, timesteps, encoder_hidden_states):
        mean = encoder_hidden_states.mean((1, 2), keepdim=True)[..., None]
        return SimpleNamespace(sample=self.gain * mean.expand_as(x_t))


def test_the_shift_is_the_one_of_least_loss(tmp_path):
    denoiser = TextDenoiser(tiny_text_pipeline(tmp_path), ["a sword"])
    denoiser.model = Mean()
    images, labels = torch.rand(4, 3, 16, 16) * 2 - 1, torch.zeros(4, dtype=torch.int64)
    denoiser.embeddings[EMBEDDING] += 1 - denoiser.embeddings[EMBEDDING][0].mean()
    shift = embedding_attack(denoiser, images, labels, steps=200, learning_rate=0.05, batch_size=32)
    assert shift.shape == denoiser.embeddings[EMBEDDING].shape[1:]
    moved = denoiser.embeddings[EMBEDDING][0] + shift
    # The noise's own mean over 32 x 256 latent values has a deviation of 0.01.
    assert abs(moved.mean().item()) < 0.03
    assert denoiser.model.gain.grad is None


def test_of_a_model_that_predicts_v_it_is_the_one_of_least_loss_on_v(tmp_path):
    """Of latents that are 1 everywhere the best constant is the mean of v, -E[sigma]; the noise has a lesser one."""
    denoiser = TextDenoiser(tiny_text_pipeline(tmp_path, prediction_type="v_prediction"), ["a sword"])
    denoiser.model = Mean()
    denoiser.encode = lambda images: torch.ones(len(images), *denoiser.latent_shape)
    images, labels = torch.zeros(4, 3, 16, 16), torch.zeros(4, dtype=torch.int64)
    shift = embedding_attack(denoiser, images, labels, steps=300, learning_rate=0.02, batch_size=64)
    sigmas, weights = denoiser.schedule.sigmas, denoiser.schedule.alphas.square()
    of_the_noise = -(weights * sigmas).sum().item() / weights.sum().item()
    found, expected = (denoiser.embeddings[EMBEDDING][0] + shift).mean().item(), -sigmas.mean().item()
    # Timesteps spread a batch's mean of sigma by 0.03.
    assert found == pytest.approx(expected, abs=0.06) and abs(of_the_noise - expected) > 0.2


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_every_family_is_attacked_and_left_as_it_was(tmp_path, family):
    denoiser = TextDenoiser(tiny_text_pipeline(tmp_path, family), ["a sword"])
    denoiser.model.requires_grad_(False)  # as the trainer leaves it
    before = {name: table.clone() for name, table in denoiser.embeddings.items()}
    weights = {name: value.clone() for name, value in denoiser.model.state_dict().items()}
    images, labels = torch.rand(2, 3, 16, 16) * 2 - 1, torch.zeros(2, dtype=torch.int64)
    options = {"steps": 2, "batch_size": 2}
    shift = embedding_attack(denoiser, images, labels, **options)
    assert torch.equal(shift, embedding_attack(denoiser, images, labels, **options)) and shift.abs().max() > 0
    assert not torch.equal(shift, embedding_attack(denoiser, images, labels, **options, seed=1))
    assert all(torch.equal(table, before[name]) for name, table in denoiser.embeddings.items())
    assert all(torch.equal(value, weights[name]) for name, value in denoiser.model.state_dict().items())
    drawn = denoiser.sample(2, seed=0, num_inference_steps=2, class_labels=[0, denoiser.null_label], guidance_scale=1)
    shift_embeddings(denoiser, 10 * torch.sign(shift))
    again = denoiser.sample(2, seed=0, num_inference_steps=2, class_labels=[0, denoiser.null_label], guidance_scale=1)
    assert torch.equal(denoiser.embeddings[EMBEDDING][0], before[EMBEDDING][0] + 10 * torch.sign(shift))
    assert not torch.equal(again[0], drawn[0]) and torch.equal(again[1], drawn[1])
