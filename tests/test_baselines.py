"""The methods that ours is compared with: each against its stated loss on a network of few weights."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import set_seed
from diffusers import DDPMScheduler
from torch import nn

from benchmarks.baselines import erasediff, salun, selective_amnesia, siss, vdu
from benchmarks.baselines.finetune import draw, finetune, gradients, loss, parameters
from benchmarks.bases import DEMO
from benchmarks.experiment import EXPERIMENTS, Relearning, read_experiment
from benchmarks.methods import METHODS
from benchmarks.relearning import relearn
from benchmarks.task import Task
from vdu_peft.adapter import attach
from vdu_peft.config import UnlearnConfig, VDUConfig
from vdu_peft.denoiser import Denoiser
from vdu_peft.learning_rate import lr_factor


class Scaled(nn.Module):
    """noise_pred = w · x_t + b, one weight each per element: every gradient is known."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, 2, 2), 0.5))
        self.bias = nn.Parameter(torch.zeros(1, 2, 2))

    def forward(self, x_t, timesteps):
        return self.weight * x_t + self.bias


@pytest.fixture
def task():
    """Forget and retained images that differ, and a model that knows both."""
    denoiser = Denoiser(Scaled(), DDPMScheduler(), image_size=(2, 2), channels=1)
    noise = 0.1 * torch.randn(2, 6, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    task = Task(denoiser, noise[0] + 0.8, noise[1] - 0.2, max_train_steps=3, train_batch_size=4, seed=0)
    training = replace(task, max_train_steps=300)
    both = torch.cat([task.forget, task.retain])
    finetune(training, 1e-2, lambda: gradients(loss(training, draw(both, training)), training))
    return task


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def test_finetune_takes_adam_steps_along_the_gradient(task):
    """Adam's steps along a constant gradient are of the learning rate's size, against its sign."""
    before = flat(parameters(task)).detach().clone()
    outcome = finetune(task, 1e-2, lambda: [torch.ones(1, 2, 2), -torch.ones(1, 2, 2)])
    distance = 1e-2 * sum(lr_factor(step, 3) for step in range(3))
    torch.testing.assert_close(flat(parameters(task)) - before, torch.tensor([-distance] * 4 + [distance] * 4))
    assert outcome[:3] == ("done", 3, 8)


def test_finetune_stops_before_a_gradient_that_is_not_finite(task):
    before, calls = parameters(task)[0].detach().clone(), iter([1.0, float("nan")])
    outcome = finetune(task, 1e-2, lambda: [torch.full((1, 2, 2), next(calls)), torch.zeros(1, 2, 2)])
    assert outcome[:2] == ("not finite", 1)
    torch.testing.assert_close(parameters(task)[0], before - 0.01)


ENTRIES = {e.label: e for file in sorted(EXPERIMENTS.glob("*.json")) for e in read_experiment(file).entries}
# One entry of each kind: its others differ in strength.
NOT_TRAINED_HERE = ("vdu_peft", "retrained")
KINDS = {(e.method, e.options.get("retain", "none")): e for e in ENTRIES.values() if e.method not in NOT_TRAINED_HERE}


@pytest.mark.parametrize(("method", "retain"), sorted(KINDS))
def test_every_baseline_of_an_experiment_forgets(task, method, retain):
    """Its committed options, but steps that show: the forget loss rises, and of methods that
    retain it rises against the retained one."""
    entry = KINDS[method, retain]
    options = {**entry.options, "learning_rate": 1e-2}
    if "gamma" in options:
        # With more, or smaller deviations, the quadratic in parameter space holds so small a model where it is.
        options |= {"gamma": 1e-4} | ({"std": 0.01} if "std" in options else {})
    retains = method in ("siss", "selective_amnesia") or retain != "none"
    task = replace(task, max_train_steps=40)

    def held_out_loss():
        torch.manual_seed(1)
        forget, retain = (
            sum(loss(task, draw(images, task)).item() for _ in range(100)) for images in (task.forget, task.retain)
        )
        return forget - retain if retains else forget

    before = held_out_loss()
    outcome = METHODS[method](task, **options)
    assert outcome[:2] == ("done", 40) and held_out_loss() > before


@pytest.mark.parametrize("label", sorted(label for label, e in ENTRIES.items() if e.method == "vdu_peft"))
def test_every_run_of_ours_has_options_that_exist(label):
    options = dict(ENTRIES[label].options)
    for name in ("oracle_filter", "frozen_a"):
        options.pop(name, None)
    VDUConfig(target_modules=["x"], **options.pop("adapter", {}))
    UnlearnConfig(**options)


@pytest.mark.parametrize("frozen", [True, False])
def test_with_a_frozen_a_the_delta_stays_in_the_subspace_that_was_drawn(pipeline_folder, frozen):
    denoiser, fresh = (Denoiser.from_pretrained(pipeline_folder) for _ in range(2))
    before = denoiser.model.conv_in.weight.detach().clone()
    task = Task(denoiser, torch.rand(8, 1, 8, 8), torch.rand(8, 1, 8, 8), max_train_steps=3, train_batch_size=4, seed=0)
    METHODS["vdu_peft"](task, frozen_a=frozen, learning_rate=1e-2, replay_size=8, replay_inference_steps=2)
    set_seed(0)
    attach(fresh.model, VDUConfig.for_model(fresh.model))
    lora_A = fresh.model.conv_in.lora_A["default"].weight.detach().flatten(1)
    delta = (denoiser.model.conv_in.weight.detach() - before).flatten(1)
    outside = (delta - delta @ torch.linalg.pinv(lora_A) @ lora_A).norm() / delta.norm()
    assert outside < 1e-3 if frozen else outside > 1e-2  # float32 rounding of weights that the delta is added to


def test_salun_leaves_what_is_not_salient(task):
    before = flat(parameters(task)).detach().clone()
    torch.manual_seed(0)
    mask = flat(salun.saliency_mask(task))
    torch.manual_seed(0)
    salun.salun(task, 1e-2, retain="real")
    assert torch.equal(flat(parameters(task)) != before, mask.bool())


def test_erasediff_lowers_the_forget_loss_at_the_rate_of_eta():
    retaining, forgetting = [torch.tensor([1.0, -2.0])], [torch.tensor([1.0, 1.0])]  # they conflict
    (step,) = erasediff.constrained(retaining, forgetting, eta=0.1)
    torch.testing.assert_close(step @ forgetting[0], 0.1 * forgetting[0].square().sum())
    agreeing = [torch.tensor([3.0, 3.0])]
    torch.testing.assert_close(erasediff.constrained(agreeing, forgetting, eta=0.1), agreeing)


def test_siss_estimates_both_losses_without_bias(task):
    """The importance-weighted estimates have the mean of the plain losses; compared in standard errors."""
    torch.manual_seed(0)
    with torch.no_grad():
        mixture = torch.tensor([siss.importance_losses(task) for _ in range(2000)])
        plain = torch.tensor(
            [[loss(task, draw(images, task)) for images in (task.retain, task.forget)] for _ in range(2000)]
        )
    error = ((mixture.var(0) + plain.var(0)) / 2000).sqrt()
    assert ((mixture.mean(0) - plain.mean(0)).abs() < 4 * error).all()
    assert (mixture.mean(0) - plain.mean(0).flip(0)).abs().min() > 4 * error.max()  # and not the other way round


def test_siss_scales_the_subtracted_gradient():
    retaining, forgetting = [torch.tensor([3.0, 4.0])], [torch.tensor([0.0, 2.0])]
    torch.testing.assert_close(siss.subtracted(retaining, forgetting, 0.1), [torch.tensor([3.0, 3.5])])


def test_salun_masks_the_half_of_least_gradient(task):
    torch.manual_seed(1)
    mask = salun.saliency_mask(task)
    torch.manual_seed(0)
    total = sum(flat(gradients(loss(task, draw(task.forget, task)), task)) for _ in range(5000))
    # The order of the mean gradients' sizes over many batches; the mask, of few, must agree on the clear ones.
    order = total.abs().argsort(descending=True)
    assert flat(mask)[order[:2]].all() and not flat(mask)[order[-2:]].any() and flat(mask).sum() == 4


def test_fisher_is_the_mean_squared_gradient_of_single_images(task):
    torch.manual_seed(0)
    information = selective_amnesia.fisher(task, task.retain)
    torch.manual_seed(0)
    single = Task(task.denoiser, task.retain, task.retain, 0, 1, 0)
    weight, bias = parameters(task)
    expected = torch.zeros(8)
    for _ in range(selective_amnesia.FISHER_SAMPLES):
        batch = draw(single.retain, single)
        error = (weight * batch.x_t + bias - batch.noise)[0, 0].detach()
        # loss = mean over 4 elements of (w x + b − ε)²
        expected += flat([(error * batch.x_t[0, 0] / 2).square(), (error / 2).square()])
    torch.testing.assert_close(flat(information), expected / selective_amnesia.FISHER_SAMPLES)


def test_ewc_takes_the_gradient_of_its_stated_loss(task):
    """−ℓ(forget) + ℓ(replay) + fisher_weight Σ F (θ − θ*)² / 2 by autograd, against what Adam is given."""
    noise = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(3))
    means = [torch.full((1, 2, 2), 0.3), torch.full((1, 2, 2), -0.1)]
    information = [torch.rand(1, 2, 2), torch.rand(1, 2, 2)]
    torch.manual_seed(5)
    given = selective_amnesia.penalised(task, noise, means, information, 7.0)
    torch.manual_seed(5)
    value = loss(task, draw(noise, task)) - loss(task, draw(task.forget, task))
    quadratic = [f * (p - m).square() / 2 for f, p, m in zip(information, parameters(task), means, strict=True)]
    expected = torch.autograd.grad(value + 7.0 * sum(q.sum() for q in quadratic), parameters(task))
    torch.testing.assert_close(given, list(expected))


def test_vdu_holds_every_weight_by_its_own_variance(task):
    """One weight with hardly any variance, all others free: it alone stays."""
    tight = [torch.full_like(p, 1e6) for p in parameters(task)]
    tight[0][0, 0, 0] = 1e-12
    before = flat(parameters(task)).detach().clone()
    finetune(replace(task, max_train_steps=40), 1e-2, vdu.objective_gradient(task, 0.5, tight))
    moved = (flat(parameters(task)) - before).abs()
    assert moved[0] < 1e-3 and moved[1:].min() > 1e-2


def test_vdu_checkpoints_leave_the_model_alone_and_give_their_variance(task):
    before = flat(parameters(task)).detach().clone()
    weights = vdu.checkpoint_weights(task)
    assert torch.equal(flat(parameters(task)), before)
    stacked = torch.stack([flat(w) for w in weights])
    expected = ((stacked - stacked.mean(0)).square().sum(0) / 2).clamp_min(1e-12)
    torch.testing.assert_close(flat(vdu.variance(weights)), expected)


def test_vdu_gradient_is_that_of_the_paper_s_loss():
    weight = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    mean, variance = torch.tensor([0.1, 0.1]).double(), torch.tensor([0.5, 2.0]).double()
    ascent = -weight.square().sum()
    value = 0.7 * ascent + 0.3 * ((weight - mean).square() / (2 * variance)).sum() / 5
    expected = torch.autograd.grad(value, weight, retain_graph=True)
    given = torch.autograd.grad(ascent, weight)
    torch.testing.assert_close(tuple(vdu.weighted(given, [weight.detach()], [mean], [variance], 0.3, 5)), expected)


def test_relearning_that_breaks_off_says_so(task):
    """Weights that are not finite: no step is reached."""
    task.denoiser.model.weight.data[:] = float("nan")
    shares = relearn(task, Relearning("retain", 3, 1e-4, [1, 2], 2), 0, DEMO)
    assert len(shares) == 2 and all(map(math.isnan, shares))


class Point(nn.Module):
    """The exact denoiser of data that are one image, which it learns."""

    def __init__(self):
        super().__init__()
        self.image = nn.Parameter(torch.full((1, 2, 2), -0.2))
        self.register_buffer("kept", DDPMScheduler().alphas_cumprod)

    def forward(self, x_t, timesteps):
        kept = self.kept[timesteps].view(-1, 1, 1, 1)
        return (x_t - kept.sqrt() * self.image) / (1 - kept).sqrt()


@pytest.mark.parametrize(("source", "shares"), [("forget", [0, 1]), ("retain", [0, 0])])
def test_a_class_comes_back_from_its_own_images_alone(source, shares):
    task = Task(Denoiser(Point(), DDPMScheduler(), (2, 2), 1), torch.ones(6, 1, 2, 2), -torch.ones(6, 1, 2, 2), 3, 4, 0)
    base = SimpleNamespace(headline=lambda images: (images.mean((1, 2, 3)) > 0).long(), as_judged=lambda images: images)
    before = task.denoiser.model.image.detach().clone()
    assert relearn(task, Relearning(source, 3, 0.05, [1, 60], 4), 1, base) == shares
    assert torch.equal(task.denoiser.model.image, before)
