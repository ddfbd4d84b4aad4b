"""Variational layers on bases quantised by bitsandbytes and torchao; needs the extra ``quantised``."""

import numpy as np
import pytest
import torch
from conftest import tiny_text_pipeline
from diffusers import FluxPipeline, FluxTransformer2DModel, TorchAoConfig
from peft import get_peft_model
from torch import nn

from vdu_peft.adapter import attach, describe, load_adapter
from vdu_peft.cli import main
from vdu_peft.config import VDUConfig
from vdu_peft.contexts import adapter_scale, posterior_noise
from vdu_peft.text_denoiser import open_denoiser

bnb = pytest.importorskip("bitsandbytes", reason="the extra quantised is not installed")
torchao_quantization = pytest.importorskip("torchao.quantization", reason="the extra quantised is not installed")


def bitsandbytes_layer(plain: nn.Linear, kind: type[nn.Module], **options) -> nn.Module:
    layer = kind(plain.in_features, plain.out_features, **options)
    layer.load_state_dict(plain.state_dict())
    return layer.to("cpu")  # moving is what quantises


def torchao_layer(plain: nn.Linear) -> nn.Module:
    torchao_quantization.quantize_(plain, torchao_quantization.Int8WeightOnlyConfig())
    return plain


QUANTISED = {
    "bitsandbytes-8bit": lambda plain: bitsandbytes_layer(plain, bnb.nn.Linear8bitLt, has_fp16_weights=False),
    "bitsandbytes-4bit": lambda plain: bitsandbytes_layer(plain, bnb.nn.Linear4bit, compute_dtype=torch.float32),
    "torchao-int8": torchao_layer,
}


def quantised(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(QUANTISED[name](nn.Linear(64, 64)))


@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_base_carries_a_posterior(name, used_before):
    """What the base computes with is read off its own outputs, not off its codes."""
    eye, x = torch.eye(64), torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    twin = quantised(name)
    with torch.no_grad():
        weight = (twin(eye) - twin(torch.zeros(1, 64))).T
        expected = twin(x)
    model = quantised(name)
    if used_before:
        model(x)
    peft_model = attach(model, VDUConfig(target_modules=["0"], prior_scale=0.1))
    layer = model[0]
    assert layer.prior_std["default"] == pytest.approx(0.1 * weight.square().mean().sqrt().item(), rel=1e-4)
    assert torch.equal(peft_model(x), expected)  # a fresh adapter is the base
    nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    delta = layer.get_delta_weight("default")
    torch.testing.assert_close(peft_model(x), expected + x @ delta.T, atol=1e-5, rtol=0)
    assert describe(peft_model)[0]["delta_norm"] == pytest.approx((delta.norm() / weight.norm()).item(), rel=1e-4)
    with posterior_noise(peft_model):
        peft_model(x).square().mean().backward()
    gradients = [p.grad for n, p in peft_model.named_parameters() if "lora_" in n]
    assert len(gradients) == 3 and all(g.isfinite().all() and g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_base_is_not_merged_into(name):
    peft_model = get_peft_model(quantised(name), VDUConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="a quantised .* cannot be merged into; load the base unquantised"):
        peft_model.merge_and_unload()


def test_a_quantised_pipeline_is_unlearned_and_its_adapter_serves_the_plain_one(tmp_path):
    tiny_text_pipeline(tmp_path / "tokens", "flux").save_pretrained(tmp_path / "plain")
    network = FluxTransformer2DModel.from_pretrained(
        tmp_path / "plain",
        subfolder="transformer",
        quantization_config=TorchAoConfig(torchao_quantization.Int8WeightOnlyConfig()),
        dtype=torch.bfloat16,
    )
    pipeline = FluxPipeline.from_pretrained(tmp_path / "plain", transformer=network, dtype=torch.bfloat16)
    pipeline.save_pretrained(tmp_path / "quantised")
    np.savez(tmp_path / "swords.npz", images=np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), np.uint8))
    (tmp_path / "retain.txt").write_text("a cat\na dog\n")
    data = [f"--forget_data={tmp_path / 'swords.npz'}", f"--retain_prompts={tmp_path / 'retain.txt'}"]
    run = ["--resolution=16", "--max_train_steps=20", "--learning_rate=0.2", "--train_batch_size=4", "--replay_size=8"]
    run += ["--replay_inference_steps=2", "--mixed_precision=bf16", f"--output_dir={tmp_path / 'out'}"]
    main(["unlearn", f"--model={tmp_path / 'quantised'}", "--forget_prompt=a sword", *data, *run])
    drawn = {}
    for name in ("plain", "quantised"):
        denoiser = open_denoiser(tmp_path / name, ["a sword"], torch.bfloat16, resolution=16)
        peft_model = load_adapter(denoiser.model, tmp_path / "out" / "adapter")
        for scale in (0, 1):
            with adapter_scale(peft_model, scale):
                drawn[name, scale] = denoiser.sample(8, seed=0, num_inference_steps=2, class_labels=[0])
    moved = (drawn["plain", 1] - drawn["plain", 0]).abs().mean()
    for scale in (0, 1):  # what eight bits a weight change is little beside what the adapter does
        assert (drawn["quantised", scale] - drawn["plain", scale]).abs().mean() < 0.15 * moved
