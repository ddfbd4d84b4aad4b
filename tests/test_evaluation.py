"""The held-out loss gap against one image and one timestep at a time, and the u-FID of a removal that changes nothing
else."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_unet
from diffusers import DDPMScheduler

from vdu_peft import evaluation
from vdu_peft.demo import demo_judge
from vdu_peft.denoiser import Denoiser
from vdu_peft.evaluation import evaluate, held_out_loss_gap
from vdu_peft.metrics import loss_gap


def test_loss_gap_by_hand():
    losses, labels = torch.tensor([1.0, 3.0, 0.5, 0.7]), torch.tensor([2, 2, 0, 1])
    assert loss_gap(losses, labels, 2) == pytest.approx(2.0 - 0.6)


@pytest.mark.parametrize("num_classes", [None, 3])
def test_held_out_loss_gap_is_the_mean_over_images_and_timesteps(monkeypatch, num_classes):
    monkeypatch.setattr(evaluation, "LOSS_IMAGES", 6)
    denoiser = Denoiser(tiny_unet(num_class_embeds=num_classes), DDPMScheduler())
    denoiser.batch_size = 4
    images, labels = torch.rand(12, 1, 8, 8) * 2 - 1, torch.arange(12) % 3
    generator = torch.Generator().manual_seed(5)
    total = {True: [], False: []}
    for t in range(100, 1000, 200):
        noise = torch.randn(6, 1, 8, 8, generator=generator)
        for i, row in enumerate(range(0, 12, 2)):  # every other image
            x_t = DDPMScheduler().add_noise(images[row, None], noise[i, None], torch.tensor([t]))
            condition = {"class_labels": labels[row, None]} if num_classes else {}
            with torch.no_grad():
                error = F.mse_loss(denoiser.model(x_t, t, **condition).sample, noise[i, None])
            total[labels[row].item() == 1].append(error)
    expected = (torch.stack(total[True]).mean() - torch.stack(total[False]).mean()).item()
    assert held_out_loss_gap(denoiser, images, labels, 1, seed=5) == pytest.approx(expected, abs=1e-5)


def test_the_oracle_is_what_is_drawn_of_other_classes():
    judge = demo_judge()
    generator = torch.Generator().manual_seed(0)
    # Blots: of plain noise the judge sees one class alone.
    blots = F.interpolate(torch.rand(400, 1, 4, 4, generator=generator) * 2 - 1, size=(28, 28), mode="bicubic")
    before, reference = blots.clamp(-1, 1).split(200)
    labels = judge.judge(before)[1]
    forget_class = int(labels.mode().values)
    others = before[labels != forget_class]
    assert 20 < len(others) < 180
    real = reference, torch.arange(200) % 10, (0.0, 0.0)
    report = evaluate(before, others, judge, forget_class, *real)
    assert report.u_fid_oracle == pytest.approx(report.u_fid_after, rel=1e-4)  # features of batches of other sizes
    assert report.u_fid_oracle != pytest.approx(report.u_fid_before, rel=0.01)
    everything = evaluate(before[labels == forget_class], others, judge, forget_class, *real)
    assert math.isnan(everything.u_fid_oracle)
