import copy
import functools
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import set_seed
from conftest import is_first, tiny_unet
from diffusers import DDPMScheduler
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn

from vdu_peft import UnlearnConfig, VDUConfig, unlearn
from vdu_peft import history as history_module
from vdu_peft import replay as replay_module
from vdu_peft import trainer as trainer_module
from vdu_peft.adapter import AdapterError, attach, posterior_size, total_kl, variational_layers
from vdu_peft.atomic_folder import FolderError
from vdu_peft.batch import BatchSource
from vdu_peft.config import ConfigError
from vdu_peft.demo import base_denoiser
from vdu_peft.denoiser import Denoiser, ModelError, image_seeds
from vdu_peft.history import collapsed, run_status, steps_to_target
from vdu_peft.learning_rate import lr_factor
from vdu_peft.likeness import forget_scorer, likeness_features, own_likeness
from vdu_peft.pixels import DataError
from vdu_peft.processes import check_processes
from vdu_peft.reached import Reached
from vdu_peft.replay import REPLAY_SEED, draw_replay, drop_forget_like, replay_seeds, thin_forget_like
from vdu_peft.strength import Strength
from vdu_peft.terms import loss_terms
from vdu_peft.trainer import UnlearnError, check_run

FAST = UnlearnConfig(max_train_steps=6, train_batch_size=4, replay_size=8, replay_inference_steps=2)
LEARNS = replace(FAST, max_train_steps=20, learning_rate=3e-2)


def weights(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **(tolerance or {"atol": 0, "rtol": 0}))


def test_only_the_adapter_changes_and_eight_images_are_enough(pipeline_folder, forget, tmp_path):
    before = Denoiser.from_pretrained(pipeline_folder).model.state_dict()
    config = replace(FAST, replay_keep_quantile=1.0)
    result = unlearn(pipeline_folder, forget, config, output_dir=tmp_path / "out")
    assert len(result.history) == 6 and result.num_replay == FAST.replay_size
    after = {name.replace(".base_layer", ""): p for name, p in result.model.get_base_model().state_dict().items()}
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert set(result.history[0]) == {"loss", "plasticity", "stability", "kl", "forget_ratio"}
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()
    assert json.loads((tmp_path / "out" / "history.json").read_text()) == result.history


def test_first_step_is_the_stated_objective(pipeline_folder, forget):
    """At a fresh deterministic adapter the model is the teacher: plasticity 1 − 1/c, stability 0, ratio 1, KL 0."""
    denoiser = Denoiser.from_pretrained(pipeline_folder)
    adapter = VDUConfig.for_model(denoiser.model, variational=False)
    first = unlearn(denoiser, forget, replace(FAST, max_train_steps=1), adapter).history[0]
    assert first["plasticity"] == pytest.approx(2 / 3, rel=1e-6) and first["forget_ratio"] == pytest.approx(1)
    assert first["stability"] == 0 and first["kl"] == 0 and first["loss"] == pytest.approx(2 / 3, rel=1e-6)


def test_the_kl_weighs_per_posterior_weight_however_many_images(pipeline_folder, forget):
    """The prior pulls alike on 8 images and on 2: K is counted by hand, rank times outputs of every layer."""
    for images in (forget, forget[:2]):
        denoiser = Denoiser.from_pretrained(pipeline_folder)
        config = replace(FAST, max_train_steps=2, kl_weight=3.0)
        result = unlearn(denoiser, images, config, replay=forget)
        means = [p for name, p in result.model.named_parameters() if "lora_B" in name]
        record = result.history[1]
        terms = record["plasticity"] + config.filled(None).stability_weight * record["stability"]
        assert record["loss"] == pytest.approx(terms + 3.0 * record["kl"] / sum(p.numel() for p in means), rel=1e-5)


@pytest.mark.parametrize("plasticity", ["hinge", "reciprocal", "elbo"])
def test_the_forget_loss_rises(pipeline_folder, forget, plasticity):
    config = replace(FAST, plasticity=plasticity, max_train_steps=25, learning_rate=2e-2, stability_weight=0.1)
    history = unlearn(pipeline_folder, forget, config).history
    assert sum(h["forget_ratio"] for h in history[-5:]) > 1.2 * sum(h["forget_ratio"] for h in history[:5])


def test_resume_gives_the_same_result(pipeline_folder, forget, tmp_path):
    config = replace(FAST, checkpointing_steps=3, random_flip=True)
    whole = unlearn(pipeline_folder, forget, config, output_dir=tmp_path / "whole")

    def interrupt(step, terms):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unlearn(pipeline_folder, forget, config, output_dir=tmp_path / "cut", callback=interrupt)
    resumed = unlearn(pipeline_folder, forget, config, output_dir=tmp_path / "cut", resume=True)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert (resumed.status, resumed.reached) == (whole.status, whole.reached)
    assert (tmp_path / "whole" / "history.json").read_text() == (tmp_path / "cut" / "history.json").read_text()


def test_resume_refuses_what_does_not_fit(pipeline_folder, forget, tmp_path):
    config = replace(FAST, checkpointing_steps=3)
    with pytest.raises(AdapterError, match="no checkpoint to resume from"):
        unlearn(pipeline_folder, forget, config, output_dir=tmp_path / "out", resume=True)
    assert not (tmp_path / "out").exists()
    unlearn(pipeline_folder, forget, config, output_dir=tmp_path / "out")
    with pytest.raises(AdapterError, match="learning_rate=0.00"):
        unlearn(pipeline_folder, forget, replace(config, learning_rate=1.0), output_dir=tmp_path / "out", resume=True)
    with pytest.raises(AdapterError, match="early_stopping=True"):  # it sets the learning rate
        changed = replace(config, early_stopping=False)
        unlearn(pipeline_folder, forget, changed, output_dir=tmp_path / "out", resume=True)
    denoiser = Denoiser.from_pretrained(pipeline_folder)
    with pytest.raises(AdapterError, match="written with r=4, not 2"):
        adapter = VDUConfig.for_model(denoiser.model, r=2)
        unlearn(denoiser, forget, config, adapter, output_dir=tmp_path / "out", resume=True)
    for option, value in (("use_rslora", True), ("alpha_pattern", {"conv_in": 400})):
        with pytest.raises(AdapterError, match=f"written with {option}="):
            adapter = VDUConfig.for_model(denoiser.model, **{option: value})
            unlearn(denoiser, forget, config, adapter, output_dir=tmp_path / "out", resume=True)
    with pytest.raises(AdapterError, match="a checkpoint of another model or adapter"):
        adapter = VDUConfig.for_model(denoiser.model, target_modules=["conv1"])
        unlearn(denoiser, forget, config, adapter, output_dir=tmp_path / "out", resume=True)
    with pytest.raises(AdapterError, match="written with forget_images"):
        unlearn(pipeline_folder, -forget, config, output_dir=tmp_path / "out", resume=True)
    other = Denoiser.from_pretrained(pipeline_folder)
    other.model.conv_in.weight.data += 0.1
    with pytest.raises(AdapterError, match="written with base_model"):
        unlearn(other, forget, config, output_dir=tmp_path / "out", resume=True)
    file = tmp_path / "out" / "checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(AdapterError, match="not a readable checkpoint"):
        unlearn(pipeline_folder, forget, config, output_dir=tmp_path / "out", resume=True)


@pytest.mark.parametrize("refused", ["resume", "replay", "options"])
def test_a_run_that_does_not_start_leaves_the_model_as_it_was(pipeline_folder, forget, tmp_path, refused, monkeypatch):
    denoiser = Denoiser.from_pretrained(pipeline_folder)
    config = replace(FAST, checkpointing_steps=3, max_train_steps=3)
    if refused == "resume":
        unlearn(pipeline_folder, forget, replace(config, seed=1), output_dir=tmp_path)
        with pytest.raises(AdapterError, match="written with seed=1"):
            unlearn(denoiser, forget, config, output_dir=tmp_path, resume=True)
    elif refused == "options":
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(trainer_module, "run_options", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            unlearn(denoiser, forget, config)
    else:
        with pytest.raises(ModelError, match="replay_inference_steps must lie in"):
            unlearn(denoiser, forget, replace(config, replay_inference_steps=2000))
    fresh = Denoiser.from_pretrained(pipeline_folder)
    assert denoiser.model.state_dict().keys() == fresh.model.state_dict().keys()
    assert all(p.requires_grad for p in denoiser.model.parameters())
    assert len(unlearn(denoiser, forget, config).history) == 3


def test_learning_rate_rises_over_a_tenth_and_falls_to_nearly_nothing():
    factors = [lr_factor(step, 20) for step in range(20)]
    assert factors == pytest.approx([1 / 2, 1, *[n / 19 for n in range(18, 0, -1)]])
    assert lr_factor(0, 1) == 1
    # Once the target holds, to 0 in a fifth of the run.
    assert [lr_factor(step, 20, to_target=10) / factors[step] for step in range(10, 15)] == [1, 0.75, 0.5, 0.25, 0]


def test_gradient_accumulation_averages(pipeline_folder, forget):
    """Two accumulated batches at a fresh deterministic adapter: the terms are means, not sums."""
    denoiser = Denoiser.from_pretrained(pipeline_folder)
    adapter = VDUConfig.for_model(denoiser.model, variational=False)
    config = replace(FAST, max_train_steps=1, gradient_accumulation_steps=2)
    assert unlearn(denoiser, forget, config, adapter).history[0]["plasticity"] == pytest.approx(2 / 3, rel=1e-6)


def test_a_step_goes_along_the_clipped_mean_of_its_batches_gradients(pipeline_folder, forget, monkeypatch):
    """By hand, of two batches drawn as the run draws them."""
    seen, clip = {}, Accelerator.clip_grad_norm_

    def look(accelerator, parameters, max_norm):
        parameters = list(parameters)
        seen["batches"] = len(drawn)
        seen["gradient"] = torch.cat([p.grad.flatten() for p in parameters]).clone()
        seen["norm"] = clip(accelerator, parameters, max_norm)
        seen["clipped"] = torch.cat([p.grad.flatten() for p in parameters]).norm().item()
        return seen["norm"]

    drawn, draw = [], BatchSource.draw
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", look)
    monkeypatch.setattr(BatchSource, "draw", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    denoiser = Denoiser.from_pretrained(pipeline_folder)
    adapter = VDUConfig.for_model(denoiser.model, variational=False)
    config = replace(FAST, max_train_steps=1, gradient_accumulation_steps=2, kl_weight=0.5, max_grad_norm=1e-3)
    config = config.filled(None)
    unlearn(denoiser, forget, replace(config, learning_rate=1e-12), adapter)  # it stays at its start
    parameters = [p for p in denoiser.model.parameters() if p.requires_grad]
    for batch in drawn[: seen["batches"]]:  # of the step; afterwards it is looked how far the run came
        terms = loss_terms(denoiser, denoiser.model, batch, config, Accelerator())
        loss = terms["plasticity"] + config.stability_weight * terms["stability"]
        (loss / 2).backward()
    (0.5 * total_kl(denoiser.model) / posterior_size(denoiser.model)).backward()
    expected = torch.cat([p.grad.flatten() for p in parameters])
    assert seen["batches"] == 2 and not torch.equal(drawn[0].noise, drawn[1].noise)
    torch.testing.assert_close(seen["gradient"], expected, rtol=1e-3, atol=1e-5)
    assert seen["norm"] == pytest.approx(expected.norm().item(), rel=1e-3)
    assert seen["clipped"] == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("variational", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(pipeline_folder, forget, tmp_path, variational):
    for name in (False, True):
        denoiser = Denoiser.from_pretrained(pipeline_folder)
        adapter = VDUConfig.for_model(denoiser.model, variational=variational)
        config = replace(FAST, gradient_checkpointing=name)
        unlearn(denoiser, forget, config, adapter, output_dir=tmp_path / str(name))
        assert not denoiser.model.is_gradient_checkpointing  # another run may not want it
    assert_same(weights(tmp_path / "False"), weights(tmp_path / "True"), atol=1e-6, rtol=1e-5)


def test_only_plain_processes_are_joined():
    class Sharded:
        distributed_type, num_processes = DistributedType.FSDP, 2

    with pytest.raises(ConfigError, match="configured for FSDP"):
        check_processes(Sharded())


def test_gradient_checkpointing_is_refused_where_there_is_none(two_kinds):
    denoiser, forget = two_kinds
    with pytest.raises(ConfigError, match="gradient_checkpointing: a TwoKinds has none"):
        unlearn(denoiser, forget, replace(FAST, gradient_checkpointing=True), VDUConfig(target_modules=["odds"], r=1))


def test_a_run_that_breaks_off_leaves_the_model_as_it_was(pipeline_folder, forget):
    """So that it can be tried again, in the same session."""
    denoiser = Denoiser.from_pretrained(pipeline_folder)
    before = {name: p.clone() for name, p in denoiser.model.state_dict().items()}

    def fail(step, terms):
        raise torch.OutOfMemoryError

    config = replace(FAST, gradient_checkpointing=True, mixed_precision="bf16")
    denoiser.model.train()
    with pytest.raises(torch.OutOfMemoryError):
        unlearn(denoiser, forget, config, callback=fail)
    assert not denoiser.model.is_gradient_checkpointing and "forward" not in vars(denoiser.model)
    assert all(p.requires_grad for p in denoiser.model.parameters()) and denoiser.model.training
    assert_same(denoiser.model.state_dict(), before)
    unlearn(denoiser, forget, FAST)
    # A run that is refused for what the model carries leaves it that.
    carried = [name for name, module in denoiser.model.named_modules() if isinstance(module, LoraLayer)]
    with pytest.raises(ConfigError, match="carries an adapter already"):
        unlearn(denoiser, forget, FAST)
    assert carried == [name for name, module in denoiser.model.named_modules() if isinstance(module, LoraLayer)]


def test_what_was_learned_is_kept_where_it_cannot_be_written(pipeline_folder, forget, monkeypatch, tmp_path):
    """The disk is full after the last step: it can be saved elsewhere still."""

    def full(*args, **options):
        raise FolderError("no space left")

    monkeypatch.setattr(trainer_module, "save_run", full)
    denoiser = Denoiser.from_pretrained(pipeline_folder)
    with pytest.raises(FolderError):
        unlearn(denoiser, forget, replace(FAST, max_train_steps=2), output_dir=tmp_path)
    learned = [layer.lora_B["default"].weight.norm() for _, layer in variational_layers(denoiser.model)]
    assert learned and min(learned) > 0


def test_a_class_s_own_wrapped_forward_stays_as_it_is(two_kinds):
    """As diffusers' is, by a decorator that hands the LoRA scale on; accelerate would unwrap it, too."""
    denoiser, forget = two_kinds
    plain = type(denoiser.model).forward

    class Decorated(type(denoiser.model)):
        @functools.wraps(plain)
        def forward(self, *args):
            return plain(self, *args)

    denoiser.model.__class__ = Decorated
    config = replace(FAST, mixed_precision="bf16", replay_size=16)
    unlearn(denoiser, forget, config, VDUConfig(target_modules=["odds"], r=1))
    assert denoiser.model.forward.__func__ is Decorated.forward and denoiser.model.forward.__wrapped__ is plain
    assert not hasattr(denoiser.model, "_is_accelerate_prepared")


def test_the_base_s_dropout_is_off_in_the_steps(pipeline_folder, forget):
    """Else teacher and student would differ by their masks alone."""
    denoiser = Denoiser.from_pretrained(pipeline_folder)
    for module in denoiser.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    denoiser.model.train()
    adapter = VDUConfig.for_model(denoiser.model, variational=False)
    history = unlearn(denoiser, forget, replace(FAST, learning_rate=1e-9), adapter).history
    assert max(record["stability"] for record in history) < 1e-6 and denoiser.model.training


def test_bf16_autocast_trains_float32_parameters(pipeline_folder, forget):
    result = unlearn(pipeline_folder, forget, replace(FAST, mixed_precision="bf16"))
    trained = [p for p in result.model.parameters() if p.requires_grad]
    assert trained and all(p.dtype == torch.float32 for p in trained)


def test_non_finite_loss_keeps_the_last_good_adapter(pipeline_folder, forget, tmp_path):
    """The third step's forward meets an infinite weight, as an overflow would make."""
    denoiser = Denoiser.from_pretrained(pipeline_folder)

    def poison(step, terms):
        if step == 2:
            denoiser.model.conv_out.get_base_layer().bias.data.fill_(float("inf"))

    with pytest.raises(UnlearnError, match="step 3: the loss or its gradient is not finite.*last good step is in"):
        config = replace(FAST, mixed_precision="bf16")
        unlearn(denoiser, forget, config, output_dir=tmp_path / "out", callback=poison)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "out").values())
    # accelerate wraps forward for autocast: the caller's model must be given back without it.
    assert not hasattr(denoiser.model.forward, "__wrapped__")
    assert len(json.loads((tmp_path / "out" / "history.json").read_text())) == 2
    assert not any(isinstance(module, LoraLayer) for module in denoiser.model.modules())


def test_a_model_that_is_not_finite_itself_is_told_at_the_first_step(pipeline_folder, forget, tmp_path):
    """What it draws of itself to retain is not finite either, and no matter."""
    denoiser = Denoiser.from_pretrained(pipeline_folder)
    denoiser.model.conv_out.bias.data.fill_(float("inf"))
    with pytest.raises(UnlearnError, match="step 1: .*last good step is in .*Look whether the model draws images"):
        unlearn(denoiser, forget, FAST, output_dir=tmp_path / "out")
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "out").values())
    assert "| steps | 0 |" in (tmp_path / "out" / "adapter" / "README.md").read_text()


def test_silent_failures_are_reported(pipeline_folder, forget):
    # Enough posterior noise to raise the forget loss by itself: it must not pass for learning.
    denoiser = Denoiser.from_pretrained(pipeline_folder)
    noisy = VDUConfig.for_model(denoiser.model, init_scale=6.0)
    idle = unlearn(denoiser, forget, replace(FAST, learning_rate=1e-9, max_train_steps=30, train_batch_size=32), noisy)
    assert idle.history[0]["forget_ratio"] > 1.05
    assert idle.status == "nothing learned" and idle.failed
    config = replace(FAST, plasticity="elbo", learning_rate=0.3, stability_weight=0, max_train_steps=200)
    wrecked = unlearn(pipeline_folder, forget, config)
    assert wrecked.status == "collapsed" and wrecked.failed and len(wrecked.history) < 200


@pytest.mark.parametrize(
    "ratio, left, status",
    [
        (1.0, None, "nothing learned"),
        (1.5, None, "partly forgotten"),
        (2.5, None, "forgotten"),
        # The anchor's prediction may be as good on the forget images as their own condition's.
        (1.0, 1.0, "nothing learned"),
        (1.0, 0.8, "partly forgotten"),
        (1.0, 0.4, "forgotten"),
    ],
)
def test_status(ratio, left, status):
    history, at, config = [{"stability": 0.1}] * 30, Reached(ratio, 0.1, left), UnlearnConfig()
    assert run_status(history, at, config) == run_status(history, at, config, remaining_share=0.5) == status
    # Whatever the loss is, what the model still draws is not forgotten, and what it no longer draws is.
    learned = status != "nothing learned"
    assert run_status(history, at, config, remaining_share=0.51) == ("partly forgotten" if learned else status)
    assert run_status(history, at, config, remaining_share=0.05) == ("forgotten" if learned else status)
    assert run_status(history, at, UnlearnConfig(forget_tolerance=0.04), remaining_share=0.05) == status
    assert run_status([*history, *[{"stability": 2.0}] * 20], at, config) == "collapsed"
    assert run_status(history, Reached(ratio, 2.0, left), config) == "collapsed"
    assert run_status(history, Reached(math.nan, math.nan, left), config) == "collapsed"


def test_a_run_settles_and_stops_once_its_target_holds(pipeline_folder, forget, tmp_path, monkeypatch):
    def first_held(terms, steps=20, **options):
        earlier = [{**terms, "plasticity": 0.9}] * (steps // 20 * 30)
        return steps_to_target(
            [*earlier, *[terms] * steps, *[{**terms, "plasticity": 0.9}] * 5], UnlearnConfig(**options)
        )

    assert first_held({"plasticity": 0.04}) == 50 and first_held({"plasticity": 0.06}) is None
    assert first_held({"plasticity": 0.04}, steps=19) is None  # too few to tell
    assert first_held({"plasticity": 0.04}, early_stopping=False) is None
    assert first_held({"plasticity": 0.04}, plasticity="elbo") is None  # which has no target
    assert first_held({"plasticity": 0.04, "redirect": 0.5}) is None  # nor has a redirection
    assert collapsed([{"stability": 1.1}] * 20) and not collapsed([{"stability": 1.1}] * 19)
    # However near the target is: where nothing was learned it does not hold.
    assert first_held({"plasticity": 1 - 1 / 1.02}, forget_target=1.02) is None
    # Here it holds from the start: over the first 4 steps. A fifth of 20 is left to settle in.
    monkeypatch.setattr(history_module, "TARGET_TOLERANCE", 2.0)
    monkeypatch.setattr(history_module, "WINDOW", 4)
    config = replace(FAST, learning_rate=1e-6, max_train_steps=20, train_batch_size=2)
    result = unlearn(pipeline_folder, forget, config, output_dir=tmp_path)
    assert len(result.history) == 8
    longer = unlearn(pipeline_folder, forget, replace(config, early_stopping=False)).history
    # The same until the target held, 4 steps, and in the first of those that settle, whose rate is the same still.
    assert len(longer) == 20 and longer[:5] == result.history[:5] and longer[6] != result.history[6]
    # Cut off while it settles, a run ends as it would have.
    interrupted = {"output_dir": tmp_path / "interrupted"}

    def interrupt(step, _):
        if step == 6:
            raise KeyboardInterrupt

    config = replace(config, checkpointing_steps=1)
    with pytest.raises(KeyboardInterrupt):
        unlearn(pipeline_folder, forget, config, **interrupted, callback=interrupt)
    assert unlearn(pipeline_folder, forget, config, **interrupted, resume=True).history == result.history
    assert_same(weights(tmp_path / "interrupted"), weights(tmp_path))


def test_a_users_own_module(forget):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)

        def forward(self, x_t, t):
            return self.outer(torch.tanh(self.inner(x_t)))

    torch.manual_seed(0)
    own = Own()
    own.config = FAST  # a dataclass, no mapping
    denoiser = Denoiser(own, DDPMScheduler(), image_size=(8, 8), channels=1)
    assert len(unlearn(denoiser, forget, FAST, VDUConfig.for_model(denoiser.model, r=2)).history) == 6


def test_a_run_that_was_checked_is_the_same(pipeline_folder, forget, tmp_path):
    for name in ("unchecked", "checked"):
        denoiser = Denoiser.from_pretrained(pipeline_folder)
        adapter = VDUConfig.for_model(denoiser.model)
        if name == "checked":
            before = {n: (p.clone(), p.requires_grad) for n, p in denoiser.model.named_parameters()}
            check_run(denoiser, FAST, adapter, tmp_path)
            after = {n: (p, p.requires_grad) for n, p in denoiser.model.named_parameters()}
            assert after.keys() == before.keys() and not list(variational_layers(denoiser.model))
            assert all(torch.equal(p, before[n][0]) and grad == before[n][1] for n, (p, grad) in after.items())
        unlearn(denoiser, forget, replace(FAST, max_train_steps=2), adapter, output_dir=tmp_path / name)
    assert_same(weights(tmp_path / "unchecked"), weights(tmp_path / "checked"))
    configs = [(tmp_path / name / "adapter" / "adapter_config.json").read_text() for name in ("unchecked", "checked")]
    assert configs[0] == configs[1]


def test_processes_that_accelerate_does_not_join_are_refused(pipeline_folder, forget, monkeypatch):
    """As torchrun starts them; without a GPU, and not told to use the CPU, accelerate leaves each alone."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes were started, but accelerate joins 1.*ACCELERATE_USE_CPU"):
        unlearn(Denoiser.from_pretrained(pipeline_folder), forget, FAST)


def test_fp16_is_refused_where_it_cannot_be_had_or_resumed(pipeline_folder, forget, tmp_path):
    config = replace(FAST, mixed_precision="fp16", checkpointing_steps=1)
    with pytest.raises(AdapterError, match="resume: fp16's gradient scale is not kept in a checkpoint"):
        unlearn(pipeline_folder, forget, config, output_dir=tmp_path / "out", resume=True)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="mixed_precision fp16: needs a GPU; use bf16 or no"):
            unlearn(pipeline_folder, forget, config, output_dir=tmp_path / "out")


def test_a_tracker_that_is_not_installed_is_refused_first(pipeline_folder, forget, tmp_path):
    with pytest.raises(ConfigError, match="report_to aim: its package is not installed"):
        unlearn(pipeline_folder, forget, replace(FAST, report_to="aim"), output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_forget_images_are_refused_first(pipeline_folder, forget):
    forget[3, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="NaN"):
        unlearn(pipeline_folder, forget, FAST)
    with pytest.raises(DataError, match="expects 1 x 8 x 8"):
        unlearn(pipeline_folder, torch.zeros(8, 3, 8, 8), FAST)


CONDITIONAL = replace(FAST, forget_class=1, null_class=3)


def conditional_denoiser(num_classes=4):
    return Denoiser(tiny_unet(num_class_embeds=num_classes), DDPMScheduler())


def test_first_step_on_a_class_conditional_model_is_the_stated_objective(forget):
    """Deterministic, anchored on the very teacher under class 2: computed by hand from the same draws."""
    denoiser = conditional_denoiser()
    replay, replay_labels = torch.zeros(4, 1, 8, 8), torch.tensor([0, 3, 0, 3])  # none of the anchor
    config = replace(CONDITIONAL, null_class=None, anchor_class=2, max_train_steps=1, min_forget_timestep=0)
    set_seed(0)  # what the trainer seeds its first step with
    images = forget[torch.randperm(8)[:4]]
    torch.randperm(4)
    noise, timesteps = torch.randn(2, 4, 1, 8, 8)[0], torch.randint(1000, (4,))
    x_t = denoiser.add_noise(images, noise, timesteps)
    with torch.no_grad():
        under_forget, under_anchor = (denoiser.noise_pred(x_t, timesteps, torch.full((4,), c)) for c in (1, 2))
    # The fresh adapter predicts what the teacher does.
    error = (under_forget - under_anchor).square().mean((1, 2, 3))
    expected = (error / (under_forget - noise).square().mean((1, 2, 3))).mean().item()
    adapter = VDUConfig.for_model(denoiser.model, variational=False)
    first = unlearn(denoiser, forget, config, adapter, replay=replay, replay_labels=replay_labels).history[0]
    assert expected > 1e-3 and first["redirect"] == pytest.approx(expected, rel=1e-4)
    assert first["plasticity"] == pytest.approx(2 / 3) and first["stability"] == 0
    assert first["loss"] == pytest.approx(2 / 3 + expected, rel=1e-4)


def test_each_forget_image_is_shown_under_its_own_label(forget):
    """Seen from outside: which labels the model is asked for with which of the forget images."""
    denoiser, seen = conditional_denoiser(), set()
    levels = torch.linspace(-0.9, 0.9, 8)
    forget, labels = levels.view(8, 1, 1, 1).expand(8, 1, 8, 8), torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
    images, add_noise, predict = [], denoiser.add_noise, denoiser.noise_pred
    denoiser.add_noise = lambda x, noise, t: (images.append(x), add_noise(x, noise, t))[1]

    def noise_pred(x_t, timesteps, labels=None, **options):
        if len(x_t) == 8:  # forget and replay images, not the anchor's
            which = [levels.sub(x).abs().argmin().item() for x in images[-1][:4, 0, 0, 0]]
            seen.update(zip(which, labels[:4].tolist(), strict=True))
        return predict(x_t, timesteps, labels, **options)

    denoiser.noise_pred = noise_pred
    replay = {"replay": torch.zeros(4, 1, 8, 8), "replay_labels": torch.tensor([3, 3, 3, 3])}
    config = replace(CONDITIONAL, forget_class=None, max_train_steps=20)
    unlearn(denoiser, forget, config, forget_labels=labels, **replay)
    assert seen == {(i, label) for i in range(8) for label in (i % 2, 3)}  # its own, and the null class


def test_each_forget_image_is_redirected_to_its_own_anchor(forget):
    """Seen from outside: which labels the teacher is asked for as anchors, for which of the forget images."""
    denoiser, seen = conditional_denoiser(5), set()
    levels = torch.linspace(-0.9, 0.9, 8)
    forget, anchors = levels.view(8, 1, 1, 1).expand(8, 1, 8, 8), torch.tensor([0, 2, 3, 0, 2, 3, 0, 2])
    images, add_noise, predict, steps = [], denoiser.add_noise, denoiser.noise_pred, 0
    denoiser.add_noise = lambda x, noise, t: (images.append(x), add_noise(x, noise, t))[1]

    def count(step, terms):
        nonlocal steps
        steps = step

    def noise_pred(x_t, timesteps, labels=None, **options):
        if len(x_t) == 4 and steps < 20:  # the anchor's; afterwards it is looked how far the run came
            which = [levels.sub(x).abs().argmin().item() for x in images[-1][:4, 0, 0, 0]]
            seen.update(zip(which, labels.tolist(), strict=True))
        return predict(x_t, timesteps, labels, **options)

    denoiser.noise_pred = noise_pred
    replay = {"replay": torch.zeros(4, 1, 8, 8), "replay_labels": torch.tensor([4, 4, 4, 4])}
    config = replace(CONDITIONAL, null_class=4, max_train_steps=20)
    unlearn(denoiser, forget, config, anchor_labels=anchors, callback=count, **replay)
    assert seen == {(i, int(label)) for i, label in enumerate(anchors)}


@pytest.mark.parametrize(
    ("anchor_class", "labels", "message"),
    [
        (2, [2] * 8, "anchor_class is one for all images"),
        (None, [2] * 7, r"anchor_labels: \[7\] labels for 8 images"),
        (None, [2] * 7 + [1], "anchor_labels: 1 is the label of a forget image"),
    ],
)
def test_anchor_labels_that_do_not_fit_are_refused(forget, anchor_class, labels, message):
    with pytest.raises(ConfigError, match=message):
        config = replace(CONDITIONAL, anchor_class=anchor_class)
        unlearn(conditional_denoiser(), forget, config, anchor_labels=torch.tensor(labels))


def test_one_label_for_all_is_the_forget_class(forget):
    runs = (({"forget_class": 1}, {}), ({"forget_class": None}, {"forget_labels": torch.ones(8, dtype=torch.int64)}))
    histories = [
        unlearn(conditional_denoiser(), forget, replace(CONDITIONAL, max_train_steps=2, **c), **o).history
        for c, o in runs
    ]
    assert histories[0] == histories[1]


@pytest.mark.parametrize(
    ("forget_class", "labels", "message"),
    [
        (1, [1] * 8, "tell under which"),
        (None, [1] * 7, r"\[7\] labels for 8 images"),
        (None, [4] * 8, "must lie in 0 to 3"),
        (None, [3] * 7 + [1], "forget_labels: 3 is the null class, others are not"),
        (None, [0, 1, 2, 0, 1, 2, 0, 1], "no other class to draw instead"),
    ],
)
def test_forget_labels_that_do_not_fit_are_refused(forget, forget_class, labels, message):
    with pytest.raises(ConfigError, match=message):
        config = replace(CONDITIONAL, forget_class=forget_class)
        unlearn(conditional_denoiser(), forget, config, forget_labels=torch.tensor(labels))


def test_a_class_conditional_model_forgets_both_paths(forget):
    """The forget loss rises under the forgotten class and under none."""
    denoiser = conditional_denoiser()
    config = replace(CONDITIONAL, max_train_steps=50, train_batch_size=8, learning_rate=5e-3, stability_weight=0.1)
    result = unlearn(denoiser, forget, config)
    noise, timesteps = torch.randn(8, 1, 8, 8), torch.linspace(100, 900, 8).long()
    x_t = denoiser.add_noise(forget, noise, timesteps)
    for label in (1, 3):
        labels = torch.full((8,), label)
        with torch.no_grad():
            after = (denoiser.noise_pred(x_t, timesteps, labels) - noise).square().mean()
            with result.model.disable_adapter():
                before = (denoiser.noise_pred(x_t, timesteps, labels) - noise).square().mean()
        assert after > 1.2 * before


def test_the_null_class_is_forgotten_without_a_redirection(forget):
    denoiser, seen = conditional_denoiser(), []
    predict = denoiser.noise_pred

    def noise_pred(x_t, timesteps, labels=None, **options):
        if len(x_t) == 8 and "model" in options:
            seen.append(labels)
        return predict(x_t, timesteps, labels, **options)

    denoiser.noise_pred = noise_pred
    config = replace(CONDITIONAL, forget_class=3, max_train_steps=8, train_batch_size=4)
    replay = {"replay": torch.zeros(4, 1, 8, 8), "replay_labels": torch.tensor([0, 1, 2, 2])}
    history = unlearn(denoiser, forget, config, **replay).history
    assert not any("redirect" in record for record in history)
    labels = torch.stack(seen)
    assert {*labels[:, :4].flatten().tolist()} == {3} and {*labels[:, 4:].flatten().tolist()} == {0, 1, 2, 3}


def test_the_redirection_falls_where_classes_differ(forget):
    denoiser = conditional_denoiser()
    denoiser.model.class_embedding.weight.data.mul_(5)  # a trained model's classes are further apart than random ones
    config = replace(CONDITIONAL, anchor_class=2, null_class=None, forget_target=1.01, stability_weight=0)
    history = unlearn(denoiser, forget, replace(config, max_train_steps=40, learning_rate=2e-2)).history
    assert sum(h["redirect"] for h in history[-5:]) < 0.7 * sum(h["redirect"] for h in history[:5])


def test_forget_images_are_shown_up_to_the_noise_that_hides_what_replay_differs_in(pipeline_folder, forget, tmp_path):
    """As the card says."""
    schedule, ends = Denoiser.from_pretrained(pipeline_folder).schedule, []
    noise = schedule.sigmas / schedule.alphas
    least = int((noise < 0.34 * 8 / 16).sum())
    for contrast in (0.1, 0.9):
        replay = contrast * torch.cat([torch.ones(4, 1, 8, 8), -torch.ones(4, 1, 8, 8)])
        folder = tmp_path / str(contrast)
        unlearn(pipeline_folder, forget, replace(LEARNS, max_train_steps=1), replay=replay, output_dir=folder)
        ends.append(int((noise <= contrast * 8).sum()) - 1)  # in each of 64 elements, all as one
        assert f"| shown at timesteps | {least} to {ends[-1]} |" in (folder / "adapter" / "README.md").read_text()
    assert least < ends[0] < ends[1]


@pytest.mark.parametrize("keep_quantile", [1.0, 0.2])
def test_a_run_scales_what_it_learned_by_what_it_drew(pipeline_folder, forget, tmp_path, monkeypatch, keep_quantile):
    """Also where a part of that is not retained; and again from the last checkpoint, which is not scaled twice."""
    config = replace(LEARNS, checkpointing_steps=20, replay_keep_quantile=keep_quantile)
    unlearn(pipeline_folder, forget, config, output_dir=tmp_path / "learned")
    score, find, calls = replay_module.own_likeness, replay_module.own_alike, []
    monkeypatch.setattr(replay_module, "own_likeness", lambda *args: calls.append(args) or score(*args))
    monkeypatch.setattr(replay_module, "own_alike", lambda *args: calls.append(args) or find(*args))
    monkeypatch.setattr(
        trainer_module, "calibrate", lambda *args, **options: calls.append(options) or Strength(1.5, 40, 30, 0.025)
    )
    config = replace(config, forget_tolerance=0.3)
    result = unlearn(pipeline_folder, forget, config, output_dir=tmp_path / "scaled")
    (_, given, samples, *_), (_, scores, seeds, _), options = calls
    assert len(scores) == len(seeds) == len(samples)
    assert options["tolerance"] == 0.3 and result.strength.scale == 1.5
    assert result.alike_seeds == find(*calls[1]).seeds
    moved = sum(record["stability"] for record in result.history) / 20  # at 1 the model counts as destroyed
    assert options["max_scale"] == pytest.approx(moved**-0.5)
    denoiser = Denoiser.from_pretrained(pipeline_folder)
    drawn = denoiser.sample(8, seed=seeds, num_inference_steps=2)
    torch.testing.assert_close(samples, drawn, atol=0.05, rtol=0)  # bfloat16 where the CPU can
    assert torch.equal(given, forget)
    before, after = weights(tmp_path / "learned"), weights(tmp_path / "scaled")
    expected = {n: 1.5 * w if "lora_B" in n else w + math.log(1.5) * ("log_std" in n) for n, w in before.items()}
    assert_same(after, expected, atol=1e-6, rtol=1e-6)
    card = (tmp_path / "scaled" / "adapter" / "README.md").read_text()
    assert "of 40 own samples that looked like the forget images 30 still do, drawn again; the delta was scaled" in card
    assert result.status == "partly forgotten" and "partly forgotten" in card
    # What is tolerated is no matter of the training: the checkpoint of another run goes on to the same.
    config = replace(config, forget_tolerance=0.5)
    unlearn(pipeline_folder, forget, config, output_dir=tmp_path / "scaled", resume=True)
    assert_same(weights(tmp_path / "scaled"), after)


def test_what_looks_like_the_forget_images_is_drawn_by_the_network_alone(pipeline_folder, forget, monkeypatch):
    """Without dropout, in the base, which has none in the steps either, and in the adapter, which has its own there."""
    training = []
    draw = replay_module.draw_replay
    monkeypatch.setattr(
        replay_module, "draw_replay", lambda d, *args, **o: training.append(d.model.training) or draw(d, *args, **o)
    )
    monkeypatch.setattr(
        trainer_module,
        "calibrate",
        lambda d, *_, **__: training.append(any(m.training for m in d.model.modules())) or Strength(1.0, 40, 0, 0.025),
    )
    denoiser = Denoiser.from_pretrained(pipeline_folder)
    denoiser.model.train()
    result = unlearn(denoiser, forget, LEARNS, VDUConfig.for_model(denoiser.model, lora_dropout=0.1))
    assert training == [False, False] and all(m.training for m in result.model.modules())


def test_strength_is_not_looked_for_where_it_would_say_nothing(pipeline_folder, forget):
    learns, classes = replace(LEARNS, max_train_steps=8), {"forget_class": 1, "null_class": 3}
    for result in (
        unlearn(pipeline_folder, forget, learns, replay=torch.zeros(8, 1, 8, 8)),
        unlearn(pipeline_folder, forget[:1], learns),
        unlearn(conditional_denoiser(), forget, replace(learns, **classes)),
    ):
        assert not result.failed and result.strength is None
    failed = unlearn(pipeline_folder, forget, replace(FAST, learning_rate=1e-9))
    assert failed.failed and failed.strength is None


def test_every_class_but_the_forgotten_one_is_replayed(forget):
    denoiser, drawn = conditional_denoiser(), []
    sample = denoiser.sample
    denoiser.sample = lambda *n, **options: drawn.append(options["class_labels"].tolist()) or sample(*n, **options)
    unlearn(denoiser, forget, replace(CONDITIONAL, max_train_steps=1, replay_size=7))
    assert drawn == [[0, 2, 3, 0, 2, 3, 0]]


def test_what_is_kept_of_replay_keeps_its_labels(forget):
    denoiser, labels = conditional_denoiser(), torch.tensor([0, 2, 3] * 4)
    images = draw_replay(denoiser, range(12), num_inference_steps=2, labels=labels)
    likeness, scores = own_likeness(denoiser, forget, images, labels, 0)
    # With a condition, one regression on all of them.
    features = [likeness_features(denoiser, x, 0, class_label=0) for x in (forget, images)]
    torch.testing.assert_close([likeness.forget_scores, scores], [*map(forget_scorer(*features), features)])
    kept, kept_labels = drop_forget_like(images, labels, scores, scores.sort().values[8].item())
    places = [(images - image).abs().amax((1, 2, 3)).argmin().item() for image in kept]
    assert len(kept) == 9 and places == sorted({*places}) and torch.equal(kept_labels, labels[places])


@pytest.mark.parametrize(("can", "off"), [({}, 0), ({"avx512_bf16": True}, 0.02)], ids=["float32", "bfloat16"])
def test_replay_is_what_the_model_draws(can, off, monkeypatch):
    """In bfloat16, whose numbers are 0.004 apart near 1, to a few of those after 25 steps."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can, raising=False)
    denoiser = base_denoiser()
    images = draw_replay(denoiser, image_seeds(REPLAY_SEED, 8), num_inference_steps=25)
    error = (images - denoiser.sample(8, seed=REPLAY_SEED, num_inference_steps=25)).abs().mean((1, 2, 3))
    assert error.median() <= off and (error.median() > 0) == (off > 0)


@pytest.mark.parametrize(("num_classes", "options", "drawn"), ((None, {}, 1024), (4, {"forget_class": 1}, 256)))
def test_replay_that_nobody_sizes_is_larger_without_a_condition(forget, num_classes, options, drawn):
    denoiser = Denoiser(tiny_unet(num_class_embeds=num_classes), DDPMScheduler())
    config = UnlearnConfig(max_train_steps=1, replay_inference_steps=1, replay_keep_quantile=1.0, **options)
    assert unlearn(denoiser, forget, config).num_replay == drawn


def test_an_unconditional_model_holds_what_it_draws_less_what_it_draws_of_the_concept_too_often(two_kinds, monkeypatch):
    denoiser, forget = two_kinds
    thin, calls = replay_module.thin_forget_like, []
    monkeypatch.setattr(
        replay_module, "thin_forget_like", lambda x, *told: calls.append((x, thin(x, *told))) or calls[-1][1]
    )
    config = replace(FAST, replay_size=400, max_train_steps=1, replay_inference_steps=20)
    for quantile in (None, 1.0):
        options = replace(config, replay_keep_quantile=quantile)
        result = unlearn(copy.deepcopy(denoiser), forget, options, VDUConfig(target_modules=["odds"], r=1))
    assert result.num_replay == 400
    drawn, held = (is_first(images) for images in calls[0])
    # About three quarters of the kind, of which a tenth of all may stay, score above a quarter of the forget images; of
    # the others hardly any does.
    assert len(calls) == 1 and drawn.sum() > 150 and held.sum() < 0.6 * drawn.sum()
    assert (~held).sum() >= 0.95 * (~drawn).sum()


@pytest.mark.parametrize(
    ("alike", "kept"),
    [
        ([0] * 18 + [1] * 2, [*range(20)]),  # a tenth
        ([1] * 6 + [0] * 18, [0, 1, *range(6, 24)]),  # a quarter, of which a tenth of what is held is kept
        ([1] * 14 + [0] * 6, [*range(4), *range(14, 20)]),  # half of all
        ([1], [0]),
    ],
)
def test_a_tenth_of_the_replay_may_look_like_the_forget_images(alike, kept):
    images = torch.arange(float(len(alike))).reshape(-1, 1, 1, 1)
    assert thin_forget_like(images, torch.tensor(alike).double(), 0.5).flatten().tolist() == kept


def test_replay_sizes():
    assert UnlearnConfig().filled(None).replay_size == 1024
    assert UnlearnConfig().filled("class").replay_size == 256
    assert UnlearnConfig(replay_size=8, replay_keep_quantile=0.5).filled(None).replay_size == 8


def test_a_condition_decides_how_hard_the_forget_images_are_pushed_unless_that_is_asked_for():
    def push(config):
        return config.plasticity, config.stability_weight, config.learning_rate

    pushes = [push(UnlearnConfig().filled(condition)) for condition in (None, "class", "text")]
    assert pushes == [("reciprocal", 1.75, 3e-3), ("hinge", 1.0, 3e-3), ("hinge", 16.0, 1e-4)]
    asked = UnlearnConfig(plasticity="elbo", stability_weight=0.0, learning_rate=1e-2)
    assert all(push(asked.filled(condition)) == ("elbo", 0.0, 1e-2) for condition in (None, "class", "text"))


def test_classes_without_a_replay_image_are_told_of(caplog):
    """Three images for three classes, of which one looks like the forget images."""
    scores, drawn, labels = torch.tensor([0.0, 2.0, 0.5]), torch.rand(3, 1, 8, 8), torch.tensor([0, 2, 3])
    images, labels = drop_forget_like(drawn, labels, scores, 1.0)
    assert len(images) == 2 and labels.tolist() == [0, 3]
    assert "all images of 1 of the 3 classes" in caplog.text


def test_what_cannot_be_told_is_kept():
    images = torch.arange(7.0).reshape(7, 1, 1, 1)
    for scores, threshold in ((torch.arange(7.0), math.nan), (torch.full((7,), math.nan), 0.5)):
        assert len(thin_forget_like(images, scores, threshold)) == len(images)
        assert len(drop_forget_like(images, None, scores, threshold)[0]) == len(images)


def test_few_replay_images_or_forget_images_are_enough(pipeline_folder, forget):
    """Fewer than the regressions have folds, or one, of which nothing can be held out."""
    for options, images in (({"replay_size": 1}, forget), ({"replay_size": 3}, forget[:2]), ({}, forget[:1])):
        config = replace(FAST, max_train_steps=1, **options)
        assert 1 <= unlearn(pipeline_folder, images, config).num_replay <= config.replay_size


def test_classes_that_do_not_fit_the_model_are_refused(pipeline_folder, forget):
    with pytest.raises(ConfigError, match="forget_class: the model is class-conditional"):
        unlearn(conditional_denoiser(), forget, FAST)
    with pytest.raises(ConfigError, match="forget_class: the model is unconditional"):
        unlearn(pipeline_folder, forget, CONDITIONAL)
    with pytest.raises(ConfigError, match="null_class must lie in 0 to 2, not 3"):
        unlearn(conditional_denoiser(3), forget, CONDITIONAL)
    with pytest.raises(ConfigError, match="no other class to draw instead"):
        unlearn(conditional_denoiser(2), forget, replace(CONDITIONAL, null_class=0))
    with pytest.raises(ConfigError, match="cannot be its own"):
        replace(CONDITIONAL, anchor_class=1)
    with pytest.raises(ConfigError, match="anchor_class: plasticity elbo"):
        replace(CONDITIONAL, anchor_class=2, plasticity="elbo")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "which need one for every replay image"),
        (torch.tensor([0, 2]), r"\[2\] labels for 4 images"),
        (torch.tensor([0, 2, 4, 0]), "must lie in 0 to 3"),
    ],
    ids=["none", "few", "out of range"],
)
def test_replay_labels_that_do_not_fit_are_refused_before_anything(forget, labels, message):
    denoiser = conditional_denoiser()
    with pytest.raises(ConfigError, match=message):
        unlearn(denoiser, forget, CONDITIONAL, replay=torch.zeros(4, 1, 8, 8), replay_labels=labels)
    with pytest.raises(ConfigError, match="pass both or neither"):
        unlearn(denoiser, forget, CONDITIONAL, replay_labels=torch.tensor([0]))
    assert not list(variational_layers(denoiser.model))


def test_forget_images_are_noised_as_asked_for(pipeline_folder, forget):
    """Seen from outside: the model's timesteps of the first half of each training batch."""
    seen = []
    denoiser = Denoiser.from_pretrained(pipeline_folder)
    add_noise = denoiser.add_noise
    denoiser.add_noise = lambda images, noise, t: (seen.append(t), add_noise(images, noise, t))[1]
    config = replace(FAST, min_forget_timestep=700, max_forget_timestep=800, max_train_steps=30)
    unlearn(denoiser, forget, config, replay=torch.zeros(4, 1, 8, 8))
    drawn = torch.stack(seen)[:, :4]
    assert 700 <= drawn.min() < 705 and 795 <= drawn.max() < 800


def test_two_processes_equal_one(pipeline_folder, forget, tmp_path):
    """Two CPU processes of batch 2 against `accelerate launch` of one with batch 4, deterministic adapter.

    accelerate launches several CPU processes through MPI only, so torchrun, which it uses for GPUs, starts the two.
    """
    np.savez(tmp_path / "forget.npz", images=forget.movedim(1, -1).numpy())
    common = ["-m", "vdu_peft", "unlearn", f"--model={pipeline_folder}", f"--forget_data={tmp_path / 'forget.npz'}"]
    common += ["--no-variational", "--max_train_steps=5", "--replay_size=8", "--replay_inference_steps=2"]
    common += ["--learning_rate=0.03", "--report_to=tensorboard"]  # to learn enough to be looked at in the end
    one = ["accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1", "--mixed_precision=no"]
    one += ["--dynamo_backend=no", *common, "--train_batch_size=4", f"--output_dir={tmp_path / '1'}"]
    two = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    two += [*common, "--train_batch_size=2", f"--output_dir={tmp_path / '2'}"]
    came = []
    for command in (one, two):
        run = subprocess.run(
            [sys.executable, "-m", *command],
            capture_output=True,
            text=True,
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        )
        assert run.stdout.count("after 5 steps") == run.stdout.count("own samples") == 1, run.stderr
        came.append(re.search("forget ratio .*, stability [0-9.]+", run.stdout)[0])
    assert came[0] == came[1]  # as told, to the second and third digit
    # The halves of a batch are added in another order, and Adam divides what is near 0 by itself.
    first, second = (json.loads((tmp_path / name / "history.json").read_text()) for name in "12")
    for one_process, two_processes in zip(first, second, strict=True):
        assert one_process == pytest.approx(two_processes, rel=1e-3, abs=1e-6)
    assert_same(weights(tmp_path / "1"), weights(tmp_path / "2"), atol=1e-3, rtol=0)


@pytest.mark.parametrize("quantile", [None, 0.5])
def test_what_looks_like_the_forget_images_is_not_held_under_a_condition(two_kinds, quantile):
    """By hand, at the default quantile and at another."""
    denoiser, forget = two_kinds
    plain = type(denoiser.model).forward

    class Labelled(type(denoiser.model)):
        def forward(self, x_t, timesteps, class_labels=None):
            return plain(self, x_t, timesteps)

    denoiser.model.__class__, denoiser.num_classes = Labelled, 2
    config = UnlearnConfig(replay_size=60, replay_inference_steps=20, replay_keep_quantile=quantile)
    images, labels, alike = replay_module.own_replay(denoiser, forget, config.filled("class"), [0, 1])
    drawn_labels = torch.arange(60) % 2
    drawn = draw_replay(denoiser, replay_seeds(0, 60), num_inference_steps=20, labels=drawn_labels)
    likeness, scores = own_likeness(denoiser, forget, drawn, drawn_labels, 0)
    expected = drop_forget_like(drawn, drawn_labels, scores, likeness.threshold(0.05 if quantile is None else quantile))
    assert torch.equal(images, expected[0]) and torch.equal(labels, expected[1]) and alike is None
    assert is_first(images).float().mean() < is_first(drawn).float().mean()


def test_processes_draw_one_set_of_batches_and_posterior_noise_of_their_own(monkeypatch):
    drawn, noise = {0: [], 1: []}, {0: [], 1: []}
    denoiser = Denoiser(tiny_unet(), DDPMScheduler())
    attach(denoiser.model, VDUConfig.for_model(denoiser.model))

    class Joined:
        num_processes = 2

        def __init__(self, index):
            self.process_index = index

        def backward(self, loss):
            pass

    class Source:
        def draw(self, accelerator):
            drawn[accelerator.process_index].append(torch.rand(3))

    def terms(denoiser, network, batch, config, accelerator):
        noise[accelerator.process_index].append(torch.rand(3))
        return {"plasticity": torch.zeros(()), "stability": torch.zeros(())}

    monkeypatch.setattr(trainer_module, "loss_terms", terms)
    config = replace(FAST, gradient_accumulation_steps=3).filled(None)
    for index in (0, 1):
        torch.manual_seed(7)
        trainer_module._gradient(denoiser, denoiser.model, Source(), config, 1, Joined(index))
    assert len(drawn[0]) == 3 and all(map(torch.equal, drawn[0], drawn[1]))
    assert len(noise[0]) == 3 and not any(map(torch.equal, noise[0], noise[1]))
