"""What is written for use without us, read back by the libraries that will read it."""

import json
import sys
import warnings
from itertools import combinations
from pathlib import Path

import pytest
import torch
import yaml
from conftest import saved_adapter, tiny_text_pipeline, tiny_unet
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    PNDMPipeline,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DModel,
)
from diffusers.utils import logging as diffusers_logging
from onnxruntime import InferenceSession
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.memory import LiveBytes
from vdu_peft import export
from vdu_peft.adapter import AdapterError, attach, load_adapter, save_adapter, variational_layers
from vdu_peft.atomic_folder import FolderError
from vdu_peft.card import model_card
from vdu_peft.config import ConfigError, VDUConfig
from vdu_peft.export import _check_merged_values, export_lora, merge
from vdu_peft.model_folder import stored_dtype
from vdu_peft.text_denoiser import TextDenoiser

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
INPUT = (torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 500]))


def output(folder):
    model = tiny_unet()
    load_adapter(model, folder).eval()
    with torch.no_grad():
        return model(*INPUT).sample


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_merged_weights_are_the_sum_rounded_once(tmp_path, base_dtype, dtype):
    DDPMPipeline(tiny_unet().to(base_dtype), DDPMScheduler()).save_pretrained(tmp_path / "base")
    adapter = saved_adapter(tmp_path / "adapter")
    (adapter / "README.md").write_text(model_card("adapter", "a base", {"forgotten": "swords"}))
    merge(tmp_path / "base", adapter, tmp_path / "merged", dtype)
    expected_dtype = torch.bfloat16 if dtype else base_dtype
    stored = load_file(tmp_path / "merged" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {expected_dtype}
    twin = tiny_unet().to(base_dtype).float()
    load_adapter(twin, adapter)
    for name, layer in variational_layers(twin):
        total = layer.get_base_layer().weight + layer.get_delta_weight("default")
        assert torch.equal(stored[f"{name}.weight"], total.to(expected_dtype))
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "not secure erasure" in card and str(tmp_path) not in card
    assert "license: other" in card and "| forgotten | swords |" in card
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "diffusers"


def test_a_merged_weight_beyond_the_dtype_is_refused_by_name(tmp_path):
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path / "base")
    model = tiny_unet()
    peft_model = attach(model, VDUConfig.for_model(model))
    nn.init.constant_(model.conv_out.lora_B["default"].weight, 1e7)
    save_adapter(peft_model, tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(AdapterError, match="merged into conv_out it gives weights beyond torch.float16"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "half", dtype="float16")
    assert not (tmp_path / "half").exists()


def test_merging_holds_one_layer_s_delta_beside_the_model(tmp_path):
    """Twice for a moment: PEFT multiplies it by the scaling."""
    peft_model = load_adapter(tiny_unet(), saved_adapter(tmp_path / "adapter"))
    largest = max(p.numel() for p in peft_model.parameters()) * 4
    with LiveBytes() as live:
        live.ignore(peft_model.parameters())
        _check_merged_values(peft_model, torch.float32, "adapter")
        assert largest <= live.peak <= 2.1 * largest
        live.peak = live.now
        peft_model.merge_and_unload()
        assert largest <= live.peak <= 2.1 * largest


@pytest.mark.parametrize("num_classes", [None, 3])
def test_onnxruntime_gives_what_the_merged_pipeline_gives(tmp_path, num_classes):
    model = tiny_unet(num_class_embeds=num_classes)
    DDPMPipeline(model, DDPMScheduler()).save_pretrained(tmp_path / "base")
    adapter = saved_adapter(tmp_path / "adapter", model=tiny_unet(num_class_embeds=num_classes))
    merge(tmp_path / "base", adapter, tmp_path / "merged", onnx=True)
    x_t = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))  # a batch that was not exported with
    inputs = {"sample": x_t, "timestep": torch.tensor([0, 3, 99, 500, 999])}
    if num_classes:
        inputs["class_labels"] = torch.tensor([0, 1, 2, 1, 0])
    session = InferenceSession(str(tmp_path / "merged" / "unet" / "model.onnx"))
    assert [i.name for i in session.get_inputs()] == list(inputs)
    (ours,) = session.run(["out_sample"], {name: value.numpy() for name, value in inputs.items()})
    unet = DDPMPipeline.from_pretrained(tmp_path / "merged").unet
    with torch.no_grad():
        expected = unet(*inputs.values()).sample
        untouched = model(*inputs.values()).sample
    torch.testing.assert_close(torch.from_numpy(ours), expected, atol=1e-5, rtol=0)
    assert (expected - untouched).abs().max() > 1e-3


def test_onnx_of_another_network_is_refused(text_pipeline, tmp_path):
    with pytest.raises(ConfigError, match="written of a UNet2DModel, not of a UNet2DConditionModel"):
        merge(*text_pipeline, tmp_path / "merged", onnx=True)
    assert not (tmp_path / "merged").exists()


def test_a_sharded_base_is_merged_whole(tmp_path):
    model = tiny_unet()
    model.save_pretrained(tmp_path / "base", max_shard_size="50KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    model.save_pretrained(tmp_path / "whole")
    adapter = saved_adapter(tmp_path / "adapter")
    weights = [merge(tmp_path / base, adapter, tmp_path / f"{base}-merged").model for base in ("base", "whole")]
    assert all(map(torch.equal, *(m.state_dict().values() for m in weights)))


def test_a_merge_that_does_not_read_back_is_refused(pipeline_folder, tmp_path, monkeypatch):
    """As when a disk returns something else than was written."""
    adapter = saved_adapter(tmp_path / "adapter")
    load = UNet2DModel.from_pretrained

    def flipped(folder, **options):
        unet = load(folder, **options)
        if "merged" in folder:
            unet.conv_in.weight.data[0, 0, 0, 0] += 1
        return unet

    monkeypatch.setattr(UNet2DModel, "from_pretrained", flipped)
    with pytest.raises(AdapterError, match=r"conv_in.weight does not read back"):
        merge(pipeline_folder, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_exported_lora_is_plain(tmp_path):
    """No warning in stock PEFT, the same output, no key or option of ours, and stock hot-swapping takes it."""
    first, second = saved_adapter(tmp_path / "first", 1), saved_adapter(tmp_path / "second", 2)
    for folder in (first, second):
        export_lora(folder, tmp_path / f"{folder.name}-lora")
    lora = tmp_path / "first-lora"
    assert not [name for name in load_file(lora / "adapter_model.safetensors") if "lora_log_std" in name]
    options = json.loads((lora / "adapter_config.json").read_text())
    assert not {"prior_scale", "init_scale", "variational"} & options.keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = PeftModel.from_pretrained(tiny_unet(), lora).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(*INPUT).sample, output(first), atol=1e-6, rtol=0)
        hotswap_adapter(model, tmp_path / "second-lora", adapter_name="default", torch_device="cpu")
        torch.testing.assert_close(model(*INPUT).sample, output(second), atol=1e-6, rtol=0)
    with pytest.raises(ConfigError, match="no adapter_config.json"):
        export_lora(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(FolderError, match="would be replaced, and .* is in it"):
        export_lora(first, first.parent)
    with pytest.raises(FolderError, match="would be replaced, and .* is in it"):
        merge("owner/name", first, first)
    (tmp_path / "lora.safetensors").write_text("a file")
    with pytest.raises(FolderError, match="lora.safetensors: exists and is not a folder"):
        export_lora(first, tmp_path / "lora.safetensors", overwrite=True)
    with pytest.raises(FolderError, match="base: exists and is not empty"):
        DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path / "base")
        export_lora(first, tmp_path / "base")
    assert (first / "adapter_model.safetensors").is_file()


@pytest.fixture
def text_pipeline(tmp_path):
    """(folder of a tiny Stable Diffusion, folder of an adapter for it with another alpha than its rank)"""
    tiny_text_pipeline(tmp_path / "tokens").save_pretrained(tmp_path / "sd")
    denoiser = TextDenoiser.from_pretrained(tmp_path / "sd", ["a cat"])
    peft_model = attach(denoiser.model, VDUConfig.for_model(denoiser.model, r=2, lora_alpha=6))
    for _, layer in variational_layers(denoiser.model):
        nn.init.normal_(layer.lora_B["default"].weight, std=0.3)
    save_adapter(peft_model, tmp_path / "adapter")
    return tmp_path / "sd", tmp_path / "adapter"


def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3 * 1_000_003)
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 16, "width": 16, "output_type": "pt"}
    return pipeline("a cat", generator=generator, **options).images


@pytest.fixture
def diffusers_log(caplog):
    """The records of diffusers' loggers, which by themselves do not reach pytest's."""
    diffusers_logging.enable_propagation()
    yield caplog
    diffusers_logging.disable_propagation()


def complaints(log) -> list[str]:
    """diffusers notes of every LoRA of a network alone that it has nothing for the text encoders; that is none."""
    messages = [record.getMessage() for record in log.records if record.name.startswith("diffusers")]
    return [message for message in messages if "No LoRA keys associated to CLIPTextModel" not in message]


@pytest.mark.parametrize(
    ("family", "file_format"),
    [*((family, "diffusers") for family in ("sd", "sdxl", "sd3", "flux")), ("sd", "kohya"), ("sdxl", "kohya")],
)
def test_stock_pipelines_load_the_lora_file(tmp_path, family, file_format, diffusers_log):
    """Loaded, fused, swapped in place and unloaded by diffusers alone."""
    options = {"seed": 3, "num_inference_steps": 4, "class_labels": [0], "guidance_scale": 1}
    images = {}
    for seed, name in enumerate(("first", "second")):
        denoiser = TextDenoiser(tiny_text_pipeline(tmp_path / "tokens", family), ["a cat"])
        images["none"] = (denoiser.sample(1, **options) + 1) / 2
        saved_adapter(tmp_path / name, seed, denoiser.model, r=2, lora_alpha=60)
        images[name] = (denoiser.sample(1, **options) + 1) / 2
        export_lora(tmp_path / name, tmp_path / f"{name}-lora", file_format)
    assert min((images[a] - images[b]).abs().max() for a, b in combinations(images, 2)) > 0.01

    pipeline = tiny_text_pipeline(tmp_path / "tokens", family)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline.load_lora_weights(tmp_path / "first-lora", adapter_name="ours")
    torch.testing.assert_close(draw(pipeline), images["first"], atol=1e-4, rtol=0)
    pipeline.fuse_lora()
    torch.testing.assert_close(draw(pipeline), images["first"], atol=1e-3, rtol=0)  # W + BA added once
    pipeline.unfuse_lora()
    pipeline.load_lora_weights(tmp_path / "second-lora", adapter_name="ours", hotswap=True)
    torch.testing.assert_close(draw(pipeline), images["second"], atol=1e-3, rtol=0)
    pipeline.unload_lora_weights()
    torch.testing.assert_close(draw(pipeline), images["none"], atol=1e-3, rtol=0)
    assert not complaints(diffusers_log)


def test_a_lora_file_with_a_wrong_key_would_be_complained_of(text_pipeline, tmp_path, diffusers_log):
    """What the test above relies on."""
    export_lora(text_pipeline[1], tmp_path / "lora", "diffusers")
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    tensors = load_file(file)
    tensors["unet.nowhere.to_q.lora_A.weight"] = next(iter(tensors.values())).clone()
    save_file(tensors, file, metadata={"format": "pt"})
    StableDiffusionPipeline.from_pretrained(text_pipeline[0], safety_checker=None).load_lora_weights(tmp_path / "lora")
    (message,) = complaints(diffusers_log)
    assert "unexpected keys" in message and "nowhere" in message


def test_a_kohya_file_says_what_it_is(text_pipeline, tmp_path):
    """What WebUI and ComfyUI read before the tensors. s = 6 / 2 lies in the tensors, so alpha is the rank, not 6."""
    export_lora(text_pipeline[1], tmp_path / "lora", "kohya")
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
    tensors = load_file(file)
    ranks = {n.removesuffix(".lora_down.weight"): len(t) for n, t in tensors.items() if n.endswith("down.weight")}
    alphas = {n.removesuffix(".alpha"): t.item() for n, t in tensors.items() if n.endswith(".alpha")}
    assert metadata["ss_network_module"] == "networks.lora"
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "2"
    assert ranks and alphas == ranks and set(ranks.values()) == {2}


@pytest.mark.parametrize("file_format", ["diffusers", "kohya"])
def test_layers_of_several_ranks_are_loaded_at_their_strength(tmp_path, file_format):
    """As of a composition of adapters on different layers; and the card says what loads the file."""
    options = {"seed": 3, "num_inference_steps": 4, "class_labels": [0], "guidance_scale": 1}
    denoiser = TextDenoiser(tiny_text_pipeline(tmp_path / "tokens"), ["a cat"])
    untouched = (denoiser.sample(1, **options) + 1) / 2
    ranks = {"rank_pattern": {"to_q": 2, "to_k": 1}, "alpha_pattern": {"to_q": 30, "to_v": 70}}
    saved_adapter(tmp_path / "adapter", model=denoiser.model, r=3, lora_alpha=60, **ranks)
    ours = (denoiser.sample(1, **options) + 1) / 2
    assert (ours - untouched).abs().max() > 0.01
    export_lora(tmp_path / "adapter", tmp_path / "lora", file_format)
    pipeline = tiny_text_pipeline(tmp_path / "tokens")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(draw(pipeline), ours, atol=1e-4, rtol=0)
    front = yaml.safe_load((tmp_path / "lora" / "README.md").read_text().split("---")[1])
    assert front["library_name"] == "diffusers" and "lora" in front["tags"]


def test_a_merged_pipeline_keeps_each_part_s_dtype_and_no_path(tmp_path):
    pipeline = tiny_text_pipeline(tmp_path / "tokens")
    pipeline.unet.half()
    pipeline.text_encoder.bfloat16()
    pipeline.save_pretrained(tmp_path / "base")
    base = TextDenoiser.from_pretrained(tmp_path / "base", ["a cat"])
    saved_adapter(tmp_path / "adapter", model=base.model)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert [stored_dtype(tmp_path / "merged" / part) for part in ("unet", "text_encoder", "vae")] == [
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]
    for part in ("text_encoder", "vae"):
        before, after = (
            {name: t for file in (folder / part).glob("*.safetensors") for name, t in load_file(file).items()}
            for folder in (tmp_path / "base", tmp_path / "merged")
        )
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not [file for file in (tmp_path / "merged").rglob("*.json") if str(tmp_path) in file.read_text()]
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "half", dtype="bfloat16")
    parts = [stored_dtype(tmp_path / "half" / part) for part in ("unet", "text_encoder", "vae")]
    assert parts == [torch.bfloat16] * 3


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_loaded_lora_files_are_weighted_and_added(tmp_path):
    pipeline = tiny_text_pipeline(tmp_path / "tokens")
    dense = tiny_text_pipeline(tmp_path / "tokens").unet
    generator = torch.Generator().manual_seed(0)
    latents, prompt = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    inputs = (latents, torch.tensor([5, 500]), prompt)
    with torch.no_grad():
        base = pipeline.unet(*inputs).sample
        for seed, (name, weight) in enumerate({"a": 0.5, "b": 2.0}.items()):
            unet = tiny_text_pipeline(tmp_path / "tokens").unet
            adapter = saved_adapter(tmp_path / name, seed, unet, r=2 + seed, lora_alpha=20 + seed)
            for layer_name, layer in variational_layers(unet):
                dense.get_submodule(layer_name).weight += weight * layer.get_delta_weight("default")
            export_lora(adapter, tmp_path / f"{name}-lora", "diffusers")
            pipeline.load_lora_weights(tmp_path / f"{name}-lora", adapter_name=name)
        pipeline.set_adapters(["a", "b"], adapter_weights=[0.5, 2.0])
        expected = dense(*inputs).sample
        assert (expected - base).abs().max() > 0.01
        torch.testing.assert_close(pipeline.unet(*inputs).sample, expected, atol=1e-5, rtol=0)
        pipeline.set_adapters(["a", "b"], adapter_weights=[0.0, 0.0])
        torch.testing.assert_close(pipeline.unet(*inputs).sample, base, atol=1e-6, rtol=0)


def test_a_text_pipeline_is_merged_whole(text_pipeline, tmp_path):
    base, adapter = text_pipeline
    merge(base, adapter, tmp_path / "first").save_pretrained(tmp_path / "merged")  # what is returned is whole, too
    denoiser = TextDenoiser.from_pretrained(base, ["a cat"])
    load_adapter(denoiser.model, adapter)
    ours = (denoiser.sample(1, seed=3, num_inference_steps=4, class_labels=[0], guidance_scale=1) + 1) / 2
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "merged", safety_checker=None)
    torch.testing.assert_close(draw(pipeline), ours, atol=1e-3, rtol=0)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_transformers_are_merged_too_and_have_no_kohya_file(tmp_path, family):
    tiny_text_pipeline(tmp_path / "tokens", family).save_pretrained(tmp_path / "base")
    denoiser = TextDenoiser.from_pretrained(tmp_path / "base", ["a cat"], resolution=16)
    options = {"seed": 3, "num_inference_steps": 4, "class_labels": [0], "guidance_scale": 1}
    untouched = denoiser.sample(1, **options)
    saved_adapter(tmp_path / "adapter", model=denoiser.model, r=2, lora_alpha=60)
    ours = (denoiser.sample(1, **options) + 1) / 2
    assert (ours - (untouched + 1) / 2).abs().max() > 0.01
    with pytest.raises(ConfigError, match="whose layers have other names there; use format diffusers"):
        export_lora(tmp_path / "adapter", tmp_path / "kohya", "kohya")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(draw(merged), ours, atol=1e-3, rtol=0)  # W + BA added once


@pytest.mark.parametrize("file_format", ["peft", "diffusers", "kohya"])
def test_an_export_that_is_not_what_was_written_is_refused(tmp_path, monkeypatch, file_format):
    """As by a disk that lies: one value of one tensor."""
    adapter = saved_adapter(tmp_path / "adapter", model=tiny_text_pipeline(tmp_path / "tokens").unet)

    def lying_save_file(tensors, *args, **kwargs):
        name = next(name for name in tensors if "alpha" not in name)
        save_file({**tensors, name: tensors[name] + 1e-3}, *args, **kwargs)

    monkeypatch.setattr(export, "save_file", lying_save_file)
    with pytest.raises(AdapterError, match="does not read back as it was written"):
        export_lora(adapter, tmp_path / "lora", file_format)
    assert not (tmp_path / "lora").exists()


def test_lora_files_are_for_text_to_image_models(tmp_path):
    adapter = saved_adapter(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="UNet2DModel, which no pipeline loads LoRA files for"):
        export_lora(adapter, tmp_path / "lora", "kohya")
    with pytest.raises(ConfigError, match="format must be one of"):
        export_lora(adapter, tmp_path / "lora", "pickle")
    assert not (tmp_path / "lora").exists()


def test_card_links_hub_ids_alone():
    def front(base_model):
        return yaml.safe_load(model_card("adapter", base_model, {"steps": 3}).split("---")[1])

    assert front("google/ddpm-cifar10-32")["base_model"] == "google/ddpm-cifar10-32"
    assert "base_model" not in front("my-model") and front("my-model")["library_name"] == "peft"
    assert "| steps | 3 |" in model_card("adapter", "my-model", {"steps": 3})


def test_a_saved_adapter_has_a_card_without_a_path(tmp_path):
    card = (saved_adapter(tmp_path / "adapter") / "README.md").read_text()
    assert "A removable adapter is not secure erasure" in card and str(tmp_path) not in card
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "peft"


def test_merge_and_export_example(pipeline_folder, tmp_path):
    import merge_and_export

    command = [
        f"--model={pipeline_folder}",
        f"--adapter={saved_adapter(tmp_path / 'adapter')}",
        "--num_inference_steps=3",
    ]
    difference = merge_and_export.main([*command, f"--output_dir={tmp_path / 'release'}"])
    assert difference < 1e-4  # W + BA added once against two products: float32 rounding over three steps
    assert UNet2DModel.from_pretrained(tmp_path / "release" / "pipeline" / "unet").config.sample_size == 8


@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [
        (DDIMPipeline, DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False, set_alpha_to_one=False)),
        (PNDMPipeline, PNDMScheduler(skip_prk_steps=True, steps_offset=1)),
        (DDPMPipeline, DDIMScheduler(steps_offset=1)),
    ],
    ids=["DDIM", "PNDM", "DDPM with a DDIM scheduler"],
)
def test_a_merged_model_is_sampled_as_its_base(tmp_path, unet, kind, scheduler):
    kind(unet, scheduler).save_pretrained(tmp_path / "base")
    merge(tmp_path / "base", saved_adapter(tmp_path / "adapter"), tmp_path / "merged")
    base, merged = (DiffusionPipeline.from_pretrained(tmp_path / name) for name in ("base", "merged"))
    assert type(merged) is type(base) is kind
    assert type(merged.scheduler) is type(base.scheduler) is type(scheduler)
    assert dict(merged.scheduler.config) == dict(base.scheduler.config)
