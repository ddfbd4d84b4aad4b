import json

import pytest
import torch
from conftest import is_first, tiny_unet
from diffusers import DDPMScheduler
from PIL import Image

from vdu_peft import likeness_evaluation
from vdu_peft import strength as strength_module
from vdu_peft.adapter import attach
from vdu_peft.config import VDUConfig
from vdu_peft.denoiser import Denoiser, image_seeds
from vdu_peft.features import network_features
from vdu_peft.likeness import Likeness, forget_scorer, held_out_likeness
from vdu_peft.likeness_evaluation import LikenessReport, evaluate_likeness
from vdu_peft.replay import OwnAlike
from vdu_peft.strength import calibrate


def test_forget_scores_find_the_forget_concept_among_samples():
    torch.manual_seed(0)
    concept = torch.zeros(20).index_fill(0, torch.tensor([0, 1]), 4.0)
    forget = concept + torch.randn(50, 20)
    samples, others = torch.randn(200, 20), torch.randn(200, 20)
    samples[:20] += concept
    others[:20] += concept
    scorer = forget_scorer(forget, samples)
    for scored in (samples, others):
        dropped = scorer(scored) >= torch.quantile(scorer(forget), 0.05)
        assert dropped[:20].float().mean() >= 0.8 and dropped[20:].float().mean() <= 0.05


def test_likeness_is_told_from_forget_images_that_it_has_not_seen():
    """Of as many features as images, any two sets can be told apart; what is seen of a new one is chance."""
    torch.manual_seed(0)
    forget, samples, others = torch.randn(50, 200), torch.randn(50, 200), torch.randn(4000, 200)
    seen = forget_scorer(forget, samples)
    assert (seen(others) > torch.quantile(seen(forget), 0.25)).float().mean() < 0.2
    likeness, _ = held_out_likeness(forget, samples)
    assert 0.6 < likeness.alike(others).float().mean() < 0.9  # three quarters, as of the forget images themselves
    by_hand = []
    for fold in range(5):
        held_out = torch.arange(50) % 5 == fold
        by_hand.append(forget_scorer(forget[~held_out], samples[~held_out])(others))
    torch.testing.assert_close(likeness.scorer(others), sum(by_hand) / 5)


def test_samples_are_found_as_often_as_their_like():
    """By a scorer that is fitted on them they would not be: it takes them for what forget images are not."""
    torch.manual_seed(0)
    concept = torch.zeros(400).index_fill(0, torch.arange(40), 0.7)
    forget, samples, others = concept + torch.randn(100, 400), torch.randn(250, 400), torch.randn(250, 400)
    samples[:100] += concept
    others[:100] += concept
    likeness, scores = held_out_likeness(forget, samples)
    alike = scores > likeness.threshold()
    assert abs(alike[:100].float().mean() - likeness.alike(others)[:100].float().mean()) < 0.15
    scorer = forget_scorer(forget, samples)
    assert (scorer(samples)[:100] > likeness.threshold()).float().mean() < alike[:100].float().mean() - 0.2


def test_what_is_no_number_is_not_taken_for_forgotten():
    likeness = Likeness(lambda x: x[:, 0].double(), torch.tensor([0.5, 0.5]).double())
    assert likeness.alike(torch.tensor([[0.4], [0.6], [float("nan")]])).tolist() == [False, True, True]


@pytest.mark.parametrize(("lowest", "expected"), [(0.5, [False, True, True]), (-0.5, [True, True, True])])
def test_what_is_drawn_less_plainly_is_still_there(lowest, expected):
    """Still alike: above half of the log-odds that a plain one exceeds, where those are positive."""
    likeness = Likeness(lambda x: x[:, 0].double(), torch.tensor([lowest, lowest]).double())
    assert likeness.still_alike(torch.tensor([[0.2], [0.3], [float("nan")]])).tolist() == expected
    assert likeness.still_alike(torch.tensor([[-0.4], [-0.6]])).tolist() == [lowest < 0, False]
    plain, less, other, less_still = 0.6, 0.3, -0.6, -0.3
    before = torch.tensor([plain, plain, plain, less, other, plain])[:, None]
    after = torch.tensor([plain, less, other, less, plain, less_still])[:, None]
    if lowest > 0:  # a less plain one counts where a plain one was
        assert likeness.left(before, after).tolist() == [True, True, False, False, True, False]
    else:
        assert likeness.left(before, after).tolist() == [True, True, False, True, True, True]


def test_what_an_adapter_leaves_less_plain_is_counted(two_kinds, monkeypatch):
    """By a likeness to which the second kind, which the adapter draws in place of the first, is a less plain first."""
    denoiser, forget = two_kinds
    attach(denoiser.model, VDUConfig(target_modules=["odds"], r=1, lora_alpha=1))
    layer = denoiser.model.odds
    layer.lora_A["default"].weight.data.fill_(1)
    layer.lora_B["default"].weight.data.fill_(-200)

    def likeness(second: float) -> Likeness:
        return Likeness(lambda x: torch.where(x[:, 0] > 0, 1.0, second).double(), torch.full((2,), 0.9).double())

    def corner(denoiser, images, *_):
        return images[:, 0, :4, :4].mean((1, 2))[:, None]

    monkeypatch.setattr(likeness_evaluation, "likeness_features", corner)
    monkeypatch.setattr(strength_module, "likeness_features", corner)
    for second, all_left in ((0.6, True), (0.3, False)):
        monkeypatch.setattr(likeness_evaluation, "held_out_likeness", lambda *_, s=second: (likeness(s), None))
        report, _ = evaluate_likeness(denoiser, forget, num_samples=60, num_inference_steps=20, seed=3)
        assert report.share_before > 0.3
        assert report.share_after == (report.share_before if all_left else 0)
        own = OwnAlike(likeness(second), image_seeds(3, 40), [], noise_seed=0)
        left = calibrate(denoiser, own, tolerance=0.0, max_scale=1.0, num_inference_steps=20)
        assert left.remaining == (40 if all_left else 0)


@pytest.mark.parametrize("num_classes", [None, 3])
def test_features_are_means_of_quarters_or_under_a_label_of_the_whole(num_classes):
    denoiser = Denoiser(tiny_unet(num_class_embeds=num_classes), DDPMScheduler())
    images = torch.rand(3, 1, 8, 8) * 2 - 1
    maps = []
    hook = denoiser.model.mid_block.register_forward_hook(lambda _, __, out: maps.append(out))
    features = network_features(denoiser, images, [100, 500], seed=0, class_label=num_classes and 1)
    hook.remove()
    expected = []
    for out in maps:  # (3, 16, 4, 4)
        blocks = out.reshape(3, 16, 2, 2, 2, 2).mean((3, 5))
        expected.append(blocks.flatten(1) if num_classes is None else out.mean((2, 3)))
    assert len(maps) == 2 and features.shape == (3, 2 * 16 * (4 if num_classes is None else 1))
    torch.testing.assert_close(features, torch.cat(expected, dim=1))


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
