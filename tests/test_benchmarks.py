"""The baselines' mathematics on small sizes, and one small experiment from its file to its table."""

import json

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from benchmarks import experiment, run, tables
from benchmarks.baselines import erasediff, gradient_ascent, salun, selective_amnesia, siss, vdu
from benchmarks.baselines.finetune import draw, finetune, gradients, loss, parameters
from benchmarks.experiment import EXPERIMENTS, read_experiment
from benchmarks.task import Task
from vdu_peft.denoiser import Denoiser


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
    denoiser = Denoiser(Scaled(), DDPMScheduler(), image_size=(2, 2), channels=1)
    generator = torch.Generator().manual_seed(0)
    forget, retain = torch.rand(2, 6, 1, 2, 2, generator=generator) * 2 - 1
    return Task(denoiser, forget, retain, max_train_steps=3, train_batch_size=4, seed=0)


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def test_finetune_takes_adam_steps_along_the_gradient(task):
    """Adam's first steps along a constant gradient are of the learning rate's size, against its sign."""
    before = flat(parameters(task)).detach().clone()
    outcome = finetune(task, 1e-2, lambda: [torch.ones(1, 2, 2), -torch.ones(1, 2, 2)])
    torch.testing.assert_close(flat(parameters(task)) - before, torch.tensor([-0.03] * 4 + [0.03] * 4))
    assert (outcome.status, outcome.steps, outcome.trained_parameters) == ("done", 3, 8)


def test_finetune_stops_before_a_gradient_that_is_not_finite(task):
    calls = iter([1.0, float("nan")])
    outcome = finetune(task, 1e-2, lambda: [torch.full((1, 2, 2), next(calls)), torch.zeros(1, 2, 2)])
    assert (outcome.status, outcome.steps) == ("not finite", 1)
    torch.testing.assert_close(parameters(task)[0], torch.full((1, 2, 2), 0.49))


def test_gradient_ascent_raises_the_forget_loss(task):
    def held_out_loss():
        torch.manual_seed(1)
        return sum(loss(task, draw(task.forget, task)).item() for _ in range(50))

    before = held_out_loss()
    gradient_ascent.gradient_ascent(task, 1e-2)
    assert held_out_loss() > before


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
        mixture = torch.tensor([siss.importance_losses(task) for _ in range(4000)])
        plain = torch.tensor(
            [[loss(task, draw(images, task)) for images in (task.retain, task.forget)] for _ in range(4000)]
        )
    error = ((mixture.var(0) + plain.var(0)) / 4000).sqrt()
    assert ((mixture.mean(0) - plain.mean(0)).abs() < 4 * error).all()


def test_siss_scales_the_subtracted_gradient():
    retaining, forgetting = [torch.tensor([3.0, 4.0])], [torch.tensor([0.0, 2.0])]
    torch.testing.assert_close(siss.subtracted(retaining, forgetting, 0.1), [torch.tensor([3.0, 3.5])])


def test_salun_masks_the_half_of_least_gradient(task):
    mask = salun.saliency_mask(task)
    torch.manual_seed(0)
    total = sum(flat(gradients(loss(task, draw(task.forget, task)), task)) for _ in range(5000))
    # Over many batches the bias's mean gradient is nearly 0, the weight's is not: the mask must be the weights.
    assert total[:4].abs().min() > total[4:].abs().max()
    assert torch.equal(flat(mask), torch.tensor([1.0] * 4 + [0.0] * 4))


def test_fisher_is_the_mean_squared_gradient_of_single_images(task):
    torch.manual_seed(0)
    information = selective_amnesia.fisher(task, task.retain)
    torch.manual_seed(0)
    single = Task(task.denoiser, task.retain, task.retain, 0, 1, 0)
    expected = torch.zeros(8)
    for _ in range(selective_amnesia.FISHER_SAMPLES):
        batch = draw(single.retain, single)
        error = (0.5 * batch.x_t - batch.noise)[0, 0]
        # loss = mean over 4 elements of (w x + b − ε)²
        expected += flat([(error * batch.x_t[0, 0] / 2).square(), (error / 2).square()])
    torch.testing.assert_close(flat(information), expected / selective_amnesia.FISHER_SAMPLES)


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
    value = 0.7 * ascent + 0.3 * ((weight - mean).square() / (2 * variance)).sum()
    expected = torch.autograd.grad(value, weight, retain_graph=True)
    given = torch.autograd.grad(ascent, weight)
    torch.testing.assert_close(tuple(vdu.weighted(given, [weight.detach()], [mean], [variance], 0.3)), expected)


def test_every_committed_experiment_is_readable():
    files = sorted(EXPERIMENTS.glob("*.json"))
    assert files
    for file in files:
        assert read_experiment(file).runs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"title": None}, "missing"),
        ({"extra": 1}, "unknown"),
        ({"methods": [{"label": "a", "method": "none", "sees": ""}]}, "unknown method"),
        ({"methods": [{"label": "a/b", "method": "siss", "sees": ""}]}, "label"),
        ({"methods": [{"label": "a", "method": "siss", "sees": ""}] * 2}, "same label"),
    ],
)
def test_bad_experiment_is_one_clear_error(tmp_path, capsys, change, message):
    content = {**json.loads((EXPERIMENTS / "mnist-digits.json").read_text()), **change}
    file = tmp_path / "bad.json"
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    assert run.main(["bad", f"--experiments_dir={tmp_path}"]) == 2
    assert message in capsys.readouterr().err


def test_small_experiment_runs_once_and_becomes_a_table(tmp_path, capsys):
    content = {
        "title": "A small experiment",
        "forget_classes": [1],
        "seeds": [0],
        "num_samples": 20,
        "max_train_steps": 2,
        "train_batch_size": 2,
        "relearning": [
            {"source": "retain", "num_images": 9, "learning_rate": 1e-5, "steps": [1, 2], "num_samples": 10}
        ],
        "methods": [
            {"label": "ours", "method": "vdu_peft", "sees": "forget images", "options": {"replay_size": 4}},
            {
                "label": "ascent",
                "method": "gradient_ascent",
                "sees": "forget images",
                "options": {"learning_rate": 1e-6},
            },
        ],
    }
    (tmp_path / "small.json").write_text(json.dumps(content))
    folders = [f"--experiments_dir={tmp_path}", f"--results_dir={tmp_path / 'results'}"]
    assert run.main(["small", "--dry-run", *folders]) == 0
    assert capsys.readouterr().out.split() == ["small/ours-1-0", "small/ascent-1-0"]
    assert run.main(["small", "--jobs=2", *folders]) == 0
    files = sorted((tmp_path / "results" / "small").glob("*.json"))
    assert [file.stem for file in files] == ["ascent-1-0", "ours-1-0"]
    times = [file.stat().st_mtime_ns for file in files]
    assert run.main(["small", *folders]) == 0  # nothing is missing
    assert [file.stat().st_mtime_ns for file in files] == times
    record = json.loads(files[0].read_text())
    assert record["steps"] == 2 and record["trained_parameters"] == 1_805_121
    assert record["peak_memory_mib"] > 100
    assert sum(record["report"]["histogram_after"]) == pytest.approx(1)
    assert len(record["environment"]["commit"]) >= 40

    assert tables.main([*folders, f"--output_dir={tmp_path}"]) == 0
    text = (tmp_path / "README.md").read_text()
    assert "2 of 2 runs" in text and "| **ascent** |" in text
    assert "| ours | " in text.partition("Relearning")[2]
    assert (tmp_path / "small.png").is_file()


def test_tables_take_the_best_of_a_grid():
    def record(label, ratio, pul):
        return {
            "label": label,
            "group": "grid",
            "lenet": {"pul": pul},
            "report": {"u_fid_after": ratio, "fid_before": 1.0},
        }

    def best(*records):
        return list(tables.best_of_groups({r["label"]: [r] for r in records}))

    assert best(record("weak", 1.0, 50.0), record("good", 1.5, 90.0), record("ruin", 9.0, 100.0)) == ["good"]
    assert best(record("bad", 5.0, 50.0), record("ruin", 9.0, 100.0)) == ["bad"]


def test_least_kept_ignores_the_forgotten_class():
    report = {"histogram_before": [0.5, 0.25, 0.25, 0.0], "histogram_after": [0.0, 0.5, 0.1, 0.4]}
    assert tables.least_kept({"forget_class": 0, "report": report}) == pytest.approx(0.4)
    assert experiment.RESULTS.name == "results"
