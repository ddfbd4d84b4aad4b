"""The held-out loss gap against one image and one timestep at a time, and the u-FID of a removal that changes nothing
else."""

import json
import math
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_unet
from diffusers import DDPMScheduler
from PIL import Image

from vdu_peft import evaluation, metrics
from vdu_peft.demo import demo_judge
from vdu_peft.denoiser import Denoiser
from vdu_peft.evaluation import evaluate, held_out_loss_gap
from vdu_peft.metrics import loss_gap


def test_loss_gap_by_hand():
    losses, labels = torch.tensor([1.0, 3.0, 0.5, 0.7]), torch.tensor([2, 2, 0, 1])
    assert loss_gap(losses, labels, 2) == pytest.approx(2.0 - 0.6)


@pytest.mark.parametrize("num_classes", [None, 3])
def test_held_out_loss_gap_is_the_mean_over_images_and_timesteps(monkeypatch, num_classes):
    monkeypatch.setattr(evaluation, "LOSS_IMAGES", 2)
    denoiser = Denoiser(tiny_unet(num_class_embeds=num_classes), DDPMScheduler())
    denoiser.batch_size = 4
    images, labels = torch.rand(12, 1, 8, 8) * 2 - 1, torch.arange(12) % 3
    generator = torch.Generator().manual_seed(5)
    total = {True: [], False: []}
    order = torch.Generator().manual_seed(5)
    kinds = [torch.tensor(kind) for kind in ([1, 4, 7, 10], [0, 2, 3, 5, 6, 8, 9, 11])]
    rows = [int(row) for kind in kinds for row in kind[torch.randperm(len(kind), generator=order)[:2]]]
    for t in range(100, 1000, 200):
        noise = torch.randn(4, 1, 8, 8, generator=generator)
        for i, row in enumerate(rows):
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


def test_a_class_that_a_stride_would_miss_counts_in_the_loss_gap():
    """A file of ten classes in turn, of which every tenth image is of one class: all of them are in the gap."""
    denoiser, seen = Denoiser(tiny_unet(), DDPMScheduler()), []
    labels = torch.arange(1000) % 10
    images = labels.view(-1, 1, 1, 1) / 10 + torch.zeros(1000, 1, 8, 8)
    denoiser.encode = lambda images: seen.append(images) or images
    assert math.isfinite(held_out_loss_gap(denoiser, images, labels, 3, seed=0))
    counts = torch.bincount((10 * seen[0][:, 0, 0, 0]).round().long(), minlength=10)
    assert counts[3] == 50 == counts.sum() - 50 and counts.min() > 0


class Pixels:
    """A judge whose features are the pixels, and whose label is told by the first."""

    num_classes, class_names = 3, None

    def judge(self, images):
        features = images.flatten(1)
        return features, (features[:, 0] > 0).long() + (features[:, 0] > 1).long()


def test_every_figure_of_a_report_is_of_what_it_says():
    generator = torch.Generator().manual_seed(0)
    before, after, reference = (
        scale * torch.randn(count, 1, 2, 2, generator=generator) + shift
        for count, scale, shift in ((150, 1.0, 0.2), (140, 1.3, 0.0), (160, 0.8, -0.1))
    )
    labels = torch.arange(160) % 3
    report = evaluate(before, after, Pixels(), 1, reference, labels, (0.25, 0.5))
    (old, old_labels), (new, new_labels) = Pixels().judge(before), Pixels().judge(after)
    real = reference.flatten(1)
    retained = real[labels != 1]
    shares = [torch.bincount(found, minlength=3).double() / len(found) for found in (old_labels, new_labels)]
    others = [share[[0, 2]] / share[[0, 2]].sum() for share in shares]
    count, remaining = int((old_labels == 1).sum()), int((new_labels == 1).sum())
    precision, recall = metrics.precision_recall(new, retained)
    expected = {
        "forget_class": 1,
        "num_samples": 140,
        "share_before": count / 150,
        "share_after": remaining / 140,
        "pul": 100 * (1 - (remaining / 140) / (count / 150)),
        "pul_interval": metrics.pul_interval(count, remaining, 150, 140),
        "fid_before": metrics.frechet_distance(old, real),
        "u_fid_before": metrics.frechet_distance(old, retained),
        "u_fid_after": metrics.frechet_distance(new, retained),
        "u_fid_oracle": metrics.frechet_distance(old[old_labels != 1], retained),
        "kid_before": metrics.kernel_distance(old, retained),
        "kid_after": metrics.kernel_distance(new, retained),
        "precision": precision,
        "recall": recall,
        "retained_distance": 0.5 * (others[0] - others[1]).abs().sum().item(),
        "histogram_before": shares[0].tolist(),
        "histogram_after": shares[1].tolist(),
        "loss_gap_before": 0.25,
        "loss_gap_after": 0.5,
        "class_names": None,
    }
    found = asdict(report)
    assert {*found} == {*expected}
    for name, value in expected.items():
        assert found[name] == (pytest.approx(value, abs=1e-6) if isinstance(value, (float, list, tuple)) else value), (
            name
        )
    numbers = [value for value in expected.values() if isinstance(value, float)]
    assert len({round(value, 4) for value in numbers}) == len(numbers)  # none could stand in for another


def test_what_is_no_number_becomes_null_wherever_it_is(tmp_path):
    config = {"max_grad_norm": math.inf, "scales": [1.0, math.nan]}
    evaluation.write_report(tmp_path, {"config": config, "pul": math.nan}, Image.new("L", (1, 1)))
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["config"] == {"max_grad_norm": None, "scales": [1.0, None]} and written["pul"] is None
