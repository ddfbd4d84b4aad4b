"""Swapping in a live model against loading anew, and what must not be recompiled or changed by a refusal."""

import shutil

import pytest
import torch
from conftest import saved_adapter, tiny_text_pipeline, tiny_unet
from torch import nn
from torch._dynamo.testing import CompileCounter

from vdu_peft.adapter import AdapterError, attach, load_adapter, save_adapter, variational_layers
from vdu_peft.compose import compose
from vdu_peft.config import VDUConfig
from vdu_peft.contexts import adapter_scale
from vdu_peft.export import export_lora
from vdu_peft.hotswap import hotswap, prepare_hotswap

INPUT = (torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 500]))


@pytest.fixture
def adapters(tmp_path):
    """Ranks 2, 4 and 3, and other alphas."""
    options = ({"r": 2, "lora_alpha": 6}, {"r": 4, "lora_alpha": 4}, {"r": 3, "lora_alpha": 1})
    return [saved_adapter(tmp_path / str(i), i, **o) for i, o in enumerate(options)]


def fresh(folder):
    model = tiny_unet()
    load_adapter(model, folder).eval()
    with torch.no_grad():
        return model(*INPUT).sample


def test_a_swap_on_a_compiled_model_is_a_fresh_load_and_compiles_nothing(adapters):
    torch.compiler.reset()
    peft_model = load_adapter(tiny_unet(), adapters[0]).eval()
    prepare_hotswap(peft_model, max_rank=4)
    counter = CompileCounter()
    compiled = torch.compile(peft_model, backend=counter)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*INPUT).sample, fresh(adapters[0]), atol=1e-5, rtol=0)
        compilations = counter.frame_count
        assert compilations > 0
        for folder in (adapters[1], adapters[2], adapters[0], adapters[1]):
            hotswap(compiled, folder)
            torch.testing.assert_close(compiled(*INPUT).sample, fresh(folder), atol=1e-5, rtol=0)
    assert counter.frame_count == compilations


def test_stock_pipelines_swap_exported_files_without_compiling(tmp_path):
    """diffusers' own hot-swapping, of a text-to-image pipeline, with files of other ranks and alphas."""
    torch.compiler.reset()
    generator = torch.Generator().manual_seed(0)
    latents, prompt = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    inputs, outputs = (latents, torch.tensor([5, 500]), prompt), []
    for seed, (rank, alpha) in enumerate(((2, 60), (4, 20), (3, 30))):
        unet = tiny_text_pipeline(tmp_path / "tokens").unet
        export_lora(
            saved_adapter(tmp_path / str(seed), seed, unet, r=rank, lora_alpha=alpha),
            tmp_path / f"lora-{seed}",
            "diffusers",
        )
        with torch.no_grad():
            outputs.append(unet(*inputs).sample)
    assert min((outputs[0] - other).abs().max() for other in outputs[1:]) > 0.01
    pipeline = tiny_text_pipeline(tmp_path / "tokens")
    pipeline.enable_lora_hotswap(target_rank=4)
    pipeline.load_lora_weights(tmp_path / "lora-0", adapter_name="only")
    counter = CompileCounter()
    pipeline.unet = torch.compile(pipeline.unet, backend=counter)
    with torch.no_grad():
        torch.testing.assert_close(pipeline.unet(*inputs).sample, outputs[0], atol=1e-5, rtol=0)
        compilations = counter.frame_count
        assert compilations > 0
        for i in (1, 2, 0):
            pipeline.load_lora_weights(tmp_path / f"lora-{i}", adapter_name="only", hotswap=True)
            torch.testing.assert_close(pipeline.unet(*inputs).sample, outputs[i], atol=1e-5, rtol=0)
    assert counter.frame_count == compilations


def test_scale_on_a_prepared_model_is_undone(adapters):
    peft_model = load_adapter(tiny_unet(), adapters[1]).eval()
    prepare_hotswap(peft_model, max_rank=4)
    with torch.no_grad():
        for scale in (0.5, 0):
            with adapter_scale(peft_model, scale):
                scaled = peft_model(*INPUT).sample
            assert not torch.equal(scaled, fresh(adapters[1]))
            torch.testing.assert_close(peft_model(*INPUT).sample, fresh(adapters[1]), atol=1e-5, rtol=0)
        assert torch.equal(scaled, tiny_unet()(*INPUT).sample)


def test_other_adapters_and_ranks_by_layer_are_left_alone(adapters, tmp_path):
    """A name inside another's, and a composed adapter, whose narrow layers have ranks of their own."""
    compose(tiny_unet(), [adapters[1], saved_adapter(tmp_path / "x", 9, r=6)], tmp_path / "both")
    peft_model = load_adapter(tiny_unet(), adapters[0], "one").eval()
    load_adapter(peft_model, adapters[1], "ones")
    prepare_hotswap(peft_model, max_rank=10)
    with torch.no_grad():
        hotswap(peft_model, tmp_path / "both", "one")
        torch.testing.assert_close(peft_model(*INPUT).sample, fresh(tmp_path / "both"), atol=1e-5, rtol=0)
        peft_model.set_adapter("ones")
        torch.testing.assert_close(peft_model(*INPUT).sample, fresh(adapters[1]), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_grouped_convolution(tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))

    x, outputs = torch.randn(1, 4, 5, 5), []
    for seed, rank in enumerate((2, 4)):
        model = attach(base(), VDUConfig(r=rank, lora_alpha=3, target_modules=["0"]))
        torch.manual_seed(seed)
        nn.init.normal_(model.base_model.model[0].lora_B["default"].weight)
        save_adapter(model, tmp_path / str(seed))
        outputs.append(model.eval()(x).detach())
    model = load_adapter(base(), tmp_path / "0").eval()
    prepare_hotswap(model, max_rank=8)
    for i in (1, 0):
        hotswap(model, tmp_path / str(i))
        torch.testing.assert_close(model(x), outputs[i], atol=1e-5, rtol=0)


@pytest.mark.parametrize("trouble", ["larger rank", "other layers", "damaged", "gone"])
def test_what_does_not_fit_changes_nothing(adapters, tmp_path, trouble):
    peft_model = load_adapter(tiny_unet(), adapters[0]).eval()
    prepare_hotswap(peft_model, max_rank=4)
    with torch.no_grad():
        before = peft_model(*INPUT).sample
    bad, error = tmp_path / "bad", AdapterError
    if trouble == "larger rank":
        saved_adapter(bad, 5, r=6)
    elif trouble == "other layers":
        saved_adapter(bad, 5, target_modules=["conv_in", "conv_out"])
    elif trouble == "damaged":
        shutil.copytree(adapters[1], bad)
        file = bad / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    else:
        error = ValueError
    with pytest.raises(error, match="bad"):
        hotswap(peft_model, bad)
    with torch.no_grad():
        assert torch.equal(peft_model(*INPUT).sample, before)


def test_what_cannot_be_prepared_is_refused(adapters):
    peft_model = load_adapter(tiny_unet(), adapters[1])
    with pytest.raises(AdapterError, match="has rank 4; raise it"):
        prepare_hotswap(peft_model, max_rank=3)
    with pytest.raises(AdapterError, match="call prepare_hotswap before compiling"):
        hotswap(peft_model, adapters[0])
    assert all("default" in layer.lora_log_std for _, layer in variational_layers(peft_model))
    peft_model.merge_adapter()
    with pytest.raises(AdapterError, match="merged into the base"):
        prepare_hotswap(peft_model, max_rank=4)
    peft_model.unmerge_adapter()
    prepare_hotswap(peft_model, max_rank=4)
    with pytest.raises(AdapterError, match="no adapter 'other' to take the place of"):
        hotswap(peft_model, adapters[0], adapter_name="other")
    with pytest.raises(AdapterError, match="save it before prepare_hotswap"):
        save_adapter(peft_model, adapters[0].parent / "padded")
