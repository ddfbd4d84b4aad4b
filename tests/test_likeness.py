import json

import pytest
import torch
from conftest import tiny_unet
from diffusers import DDPMScheduler
from PIL import Image
from torch import nn

from vdu_peft.adapter import attach
from vdu_peft.config import VDUConfig
from vdu_peft.denoiser import Denoiser
from vdu_peft.likeness import forget_scores
from vdu_peft.likeness_evaluation import LikenessReport, evaluate_likeness

SPREAD = 0.1


class TwoKinds(nn.Module):
    """The exact denoiser of data around two images, SPREAD about each, whose log odds are a linear layer's output."""

    def __init__(self):
        super().__init__()
        self.odds = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.odds.weight)
        images = torch.full((2, 1, 8, 8), -0.5)
        images[0, :, :, :4], images[1, :, 4:] = 0.5, 0.5
        self.register_buffer("images", images)
        self.register_buffer("alphas_cumprod", DDPMScheduler().alphas_cumprod)

    def forward(self, x_t, timesteps):
        kept = self.alphas_cumprod[timesteps.expand(len(x_t))].view(-1, 1, 1, 1, 1)
        alpha, variance = kept.sqrt(), 1 - kept + kept * SPREAD**2
        off = x_t[:, None] - alpha * self.images  # (N, 2, 1, 8, 8)
        distance = off.flatten(2).square().sum(2) / (2 * variance.flatten()[:, None])
        first = torch.sigmoid(self.odds(x_t.new_ones(len(x_t), 1)) + distance[:, 1:] - distance[:, :1])
        weights = torch.cat([first, 1 - first], dim=1).view(-1, 2, 1, 1, 1)
        return (weights * off).sum(1) * ((1 - kept).sqrt() / variance)[:, 0]


@pytest.fixture
def two_kinds():
    """The denoiser, and 20 forget images of the first kind."""
    denoiser = Denoiser(TwoKinds(), DDPMScheduler(), image_size=(8, 8), channels=1)
    noise = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return denoiser, denoiser.model.images[:1] + SPREAD * noise


def test_forget_scores_find_the_forget_concept_among_samples():
    torch.manual_seed(0)
    concept = torch.zeros(20).index_fill(0, torch.tensor([0, 1]), 4.0)
    forget = concept + torch.randn(50, 20)
    samples, others = torch.randn(200, 20), torch.randn(200, 20)
    samples[:20] += concept
    others[:20] += concept
    forget_score, sample_score, other_score = forget_scores(forget, samples, others)
    for score in (sample_score, other_score):
        dropped = score >= torch.quantile(forget_score, 0.05)
        assert dropped[:20].float().mean() >= 0.8 and dropped[20:].float().mean() <= 0.05
    # What is only scored changes no score.
    for score, alone in zip((forget_score, sample_score), forget_scores(forget, samples), strict=True):
        assert torch.equal(score, alone)
    assert torch.equal(forget_scores(forget, samples, samples)[2], sample_score)


def is_first(images):
    """Bright in the upper left, where the second kind is dark."""
    return images[:, 0, :4, :4].mean((1, 2)) > 0


@pytest.mark.parametrize("delta", [0.0, -200.0])
def test_samples_of_the_forgotten_kind_are_counted(two_kinds, delta):
    denoiser, forget = two_kinds
    attach(denoiser.model, VDUConfig(target_modules=["odds"], r=1, lora_alpha=1))
    layer = denoiser.model.odds
    layer.lora_A["default"].weight.data.fill_(1)
    layer.lora_B["default"].weight.data.fill_(delta)
    report, panels = evaluate_likeness(denoiser, forget, num_samples=60, num_inference_steps=20, seed=3)
    layer.lora_B["default"].weight.data.fill_(0)
    drawn = denoiser.sample(60, seed=3, num_inference_steps=20)
    count = int(is_first(drawn).sum())
    assert 20 < count < 40
    # About three quarters of the kind score above the lower quarter of the forget images; of the 30 others one does.
    assert 0.5 * count < 60 * report.share_before <= count + 1
    if delta == 0:
        assert report.share_after == report.share_before and report.pul == 0
    else:
        assert report.share_after <= 1 / 60 and report.pul > 90
    assert is_first(panels["adapter off"]).nonzero().flatten().tolist() == list(range(count))
    assert is_first(panels["adapter on"]).sum() == (count if delta == 0 else 0)


def test_all_classes_of_a_class_conditional_model_are_drawn_in_turn():
    denoiser = Denoiser(tiny_unet(num_class_embeds=3), DDPMScheduler())
    attach(denoiser.model, VDUConfig.for_model(denoiser.model))
    drawn = denoiser.sample(9, seed=0, num_inference_steps=4, class_labels=[0, 1, 2])
    options = {"num_samples": 9, "num_inference_steps": 4, "seed": 0}
    report, panels = evaluate_likeness(denoiser, drawn[:4], **options)
    in_order = [(drawn - image).abs().amax((1, 2, 3)).argmin().item() for image in panels["adapter on"]]
    assert sorted(in_order) == list(range(9)) and report.share_after == report.share_before
    torch.testing.assert_close(panels["adapter on"], drawn[in_order], atol=1e-5, rtol=0)


def test_a_model_that_never_drew_the_like_is_told_of(two_kinds, caplog):
    denoiser, _ = two_kinds
    elsewhere = torch.zeros(20, 1, 8, 8)
    elsewhere[:, :, :, ::2] = 0.5
    evaluate_likeness(denoiser, elsewhere, num_samples=30, num_inference_steps=10, seed=0)
    assert "0 of 30 samples of the base itself look like the forget images" in caplog.text


def test_the_report_is_written(tmp_path):
    report = LikenessReport(20, 50, 0.0, 0.0, float("nan"), (float("nan"), float("nan")))
    report.save(
        tmp_path / "report", {"forget images": torch.zeros(20, 1, 8, 8), "adapter off": torch.zeros(50, 1, 8, 8)}
    )
    written = json.loads((tmp_path / "report" / "report.json").read_text())
    assert written["pul"] is None and written["num_samples"] == 50
    # 40 of each in rows of 10, at double size.
    assert Image.open(tmp_path / "report" / "grid.png").size == (2 * 10 * 8 * 2 + 12, 4 * 8 * 2 + 24)
