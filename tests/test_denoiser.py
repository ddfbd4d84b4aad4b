import shutil
from dataclasses import dataclass

import httpx
import pytest
import torch
from conftest import tiny_text_pipeline, tiny_unet
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.models.attention_processor import Attention, AttnProcessor
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import save_file
from torch import nn

from vdu_peft import VDUConfig
from vdu_peft.adapter import attach
from vdu_peft.demo import assets
from vdu_peft.denoiser import Denoiser, ModelError, as_denoiser, plain_attention_on_cpu
from vdu_peft.features import network_features


def test_zero_terminal_snr_leaves_an_error_to_compare_with():
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert scheduler.alphas_cumprod[-1] == 0
    denoiser = Denoiser(tiny_unet(), scheduler)
    images, noise, timesteps = torch.ones(2, 1, 8, 8), torch.randn(2, 1, 8, 8), torch.tensor([999, 999])
    with torch.no_grad():
        error = denoiser.noise_pred(denoiser.add_noise(images, noise, timesteps), timesteps) - noise
    assert error.isfinite().all() and error.square().mean() > 0


def test_variants_beside_the_weights_do_not_count(pipeline_folder):
    save_file({"x": torch.zeros(1, dtype=torch.float16)}, pipeline_folder / "unet" / "a.fp16.safetensors")
    assert Denoiser.from_pretrained(pipeline_folder).stored_dtype == torch.float32


def test_plain_attention_is_attention():
    """The demo's network: float32's own error, since every number of its prediction is a sum of hundreds."""
    torch.manual_seed(0)
    network = Denoiser.from_pretrained(assets() / "ddpm").model
    x_t, timesteps = torch.randn(4, 1, 28, 28), torch.tensor([10, 300, 600, 990])
    with torch.no_grad():
        fused = network(x_t, timesteps).sample
        plain_attention_on_cpu(network)
        plain = network(x_t, timesteps).sample
    torch.testing.assert_close(plain, fused, atol=1e-5, rtol=0)
    assert {type(m.processor) for m in network.modules() if isinstance(m, Attention)} == {AttnProcessor}


def test_a_single_file_is_told_what_to_do(tmp_path):
    (tmp_path / "sd15.safetensors").touch()
    with pytest.raises(ModelError, match="from_single_file"):
        Denoiser.from_pretrained(tmp_path / "sd15.safetensors")


@pytest.mark.parametrize("path", ["./bse", "../bse", "bse/", "my models/bse", "bse"])
def test_a_mistyped_relative_path_is_no_such_folder(path):
    with pytest.raises(ModelError, match=f"^{path}: no such folder, and not a hub id"):
        Denoiser.from_pretrained(path)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_noise_pred_recovers_the_noise_from_a_perfect_model(prediction_type):
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 4, 1, 8, 8)
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    timesteps = torch.tensor([20, 300, 600, 900])
    target = {"epsilon": noise, "v_prediction": scheduler.get_velocity(clean, noise, timesteps), "sample": clean}

    class Perfect(nn.Module):
        def forward(self, x_t, t):
            return target[prediction_type]

    denoiser = Denoiser(Perfect(), scheduler, image_size=(8, 8), channels=1)
    x_t = denoiser.add_noise(clean, noise, timesteps)
    # Dividing by the noise level at t = 20 amplifies float32's rounding tenfold.
    torch.testing.assert_close(denoiser.noise_pred(x_t, timesteps), noise, atol=1e-5, rtol=1e-5)


def test_sampling_equals_diffusers_own_pipeline_and_does_not_hang_on_the_batch_size(unet):
    denoiser = Denoiser(unet, DDPMScheduler())
    images = denoiser.sample(3, seed=5, num_inference_steps=4, batch_size=2)
    torch.testing.assert_close(denoiser.sample(3, seed=5, num_inference_steps=4, batch_size=3), images)
    generators = [torch.Generator().manual_seed(5 * 1_000_003 + i) for i in range(3)]
    pipeline = DDIMPipeline(unet, DDIMScheduler.from_config(DDPMScheduler().config))
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline(batch_size=3, generator=generators, num_inference_steps=4, output_type="np").images
    torch.testing.assert_close((images + 1) / 2, torch.from_numpy(stock).movedim(-1, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), FlowMatchEulerDiscreteScheduler(shift=2.0)])
@pytest.mark.parametrize(("timestep", "steps"), [(0, 1), (39, 1), (479, 12), (480, 13), (999, 25)])
def test_an_image_is_drawn_again_from_its_noise(scheduler, timestep, steps):
    """By a network that takes every noise for one on a gray image, and so draws that, from however much noise."""
    seen = []

    class Gray(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, x_t, told):
            seen.append((x_t, told))
            schedule = denoiser.schedule
            at = (schedule.network_timesteps - told[0]).abs().argmin()
            alpha, sigma = schedule.alphas[at], schedule.sigmas[at]
            noise = (x_t - alpha * 0.5) / sigma
            return noise - 0.5 if schedule.prediction_type == "flow" else noise

    denoiser = Denoiser(Gray(), scheduler, image_size=(8, 8), channels=1)
    denoiser.batch_size = 2
    images = torch.linspace(-1, 1, 3).view(3, 1, 1, 1).expand(3, 1, 8, 8)
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    drawn = denoiser.vary(images, timestep, seed=7)
    schedule, sampler = denoiser.schedule, denoiser.schedule.sampler(25, denoiser.device)
    begun = sampler.timesteps[25 - len(seen) // 2]
    assert len(seen) % 2 == 0 and seen[0][1][0] == begun  # two batches
    assert begun <= schedule.network_timesteps[timestep] or len(seen) == 2
    if len(seen) < 2 * 25:
        assert sampler.timesteps[24 - len(seen) // 2] > schedule.network_timesteps[timestep]
    if schedule.prediction_type == "flow":
        sampler.set_begin_index(25 - len(seen) // 2)
        expected = sampler.scale_noise(images[:2], begun[None], noise[:2])
    else:
        assert len(seen) == 2 * steps
        expected = sampler.add_noise(images[:2], noise[:2], begun[None])
    torch.testing.assert_close(seen[0][0], expected)
    # A flow's sampler steps between the timesteps, of which the network here takes the nearest one's noise level.
    torch.testing.assert_close(drawn, torch.full((3, 1, 8, 8), 0.5), atol=2e-3, rtol=0)


def test_class_labels_reach_a_conditional_unet():
    denoiser = Denoiser(tiny_unet(num_class_embeds=3), DDPMScheduler())
    x_t, t = torch.randn(2, 1, 8, 8), torch.tensor([10, 10])
    first, second = (denoiser.noise_pred(x_t, t, class_labels=torch.full((2,), c)) for c in (0, 1))
    assert denoiser.num_classes == 3 and not torch.equal(first, second)


def test_learned_variance_is_left_alone():
    class Twice(nn.Module):
        def forward(self, x_t, t):
            return torch.cat([x_t, 0 * x_t], dim=1)

    denoiser = Denoiser(Twice(), DDPMScheduler(), image_size=(8, 8), channels=1)
    x_t = torch.randn(2, 1, 8, 8)
    assert torch.equal(denoiser.noise_pred(x_t, torch.tensor([1, 2])), x_t)


def test_from_pretrained_reads_pipeline_and_bare_unet_alike(pipeline_folder):
    pipeline, bare = Denoiser.from_pretrained(pipeline_folder), Denoiser.from_pretrained(pipeline_folder / "unet")
    x_t, t = torch.randn(2, 1, 8, 8), torch.tensor([10, 900])
    assert torch.equal(pipeline.noise_pred(x_t, t), bare.noise_pred(x_t, t))
    stock = DDPMPipeline.from_pretrained(pipeline_folder)
    assert torch.equal(as_denoiser(stock).noise_pred(x_t, t), stock.unet(x_t, t).sample)


def test_a_scheduler_beside_a_bare_unet_is_read(tmp_path, unet):
    unet.save_pretrained(tmp_path)
    DDPMScheduler(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2").save_pretrained(tmp_path)
    denoiser = Denoiser.from_pretrained(tmp_path)
    assert denoiser.prediction_type == "v_prediction"
    assert denoiser.scheduler.config.beta_schedule == "squaredcos_cap_v2"


def test_the_unet_folder_of_a_pipeline_has_the_pipeline_s_scheduler(tmp_path, unet, monkeypatch):
    scheduler = DDPMScheduler(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path / "unet")
    for folder in (tmp_path / "unet", "."):
        denoiser = Denoiser.from_pretrained(folder)
        assert denoiser.prediction_type == "v_prediction"
        assert denoiser.scheduler.config.beta_schedule == "squaredcos_cap_v2"


def test_what_is_assumed_without_a_scheduler_is_said(tmp_path, unet, pipeline_folder, caplog):
    Denoiser.from_pretrained(pipeline_folder)
    assert not caplog.records
    unet.save_pretrained(tmp_path / "bare")
    assert Denoiser.from_pretrained(tmp_path / "bare").prediction_type == "epsilon"
    assert "bare: no scheduler_config.json there; taken to predict the noise (epsilon)" in caplog.text


def test_a_config_of_a_user_s_own_kind_is_not_read():
    @dataclass
    class Config:
        sample_size: int = 8

    model = nn.Conv2d(1, 1, 3, padding=1)
    model.config = Config()
    denoiser = Denoiser(model, DDPMScheduler(), image_size=(8, 4), channels=1)
    assert denoiser.latent_shape == (1, 8, 4) and denoiser.num_classes is None
    with pytest.raises(ModelError, match="pass image_size and channels"):
        Denoiser(model, DDPMScheduler())


def test_sampling_keeps_no_graph(unet):
    """Of all steps of all images it would fill any memory."""
    assert all(p.requires_grad for p in unet.parameters())
    denoiser = Denoiser(unet, DDPMScheduler())
    images = denoiser.sample(2, seed=0, num_inference_steps=2)
    assert not images.requires_grad and not network_features(denoiser, images, [10], seed=0).requires_grad


@pytest.mark.parametrize("num_images", [0, -1])
def test_no_image_to_draw(unet, num_images):
    with pytest.raises(ModelError, match=f"num_images must be at least 1, not {num_images}"):
        Denoiser(unet, DDPMScheduler()).sample(num_images, seed=0)


def test_seeds_have_a_range(unet):
    denoiser = Denoiser(unet, DDPMScheduler())
    for seed in (-1, 20240101123456, [2**64]):
        with pytest.raises(ModelError, match="seed: must lie in 0 to"):
            denoiser.sample(1, seed=seed, num_inference_steps=1)


def test_a_flow_is_read_back_as_a_flow(tmp_path):
    denoiser = Denoiser(tiny_unet(), FlowMatchEulerDiscreteScheduler(shift=2.0))
    denoiser.save_pretrained(tmp_path / "flow")
    again = Denoiser.from_pretrained(tmp_path / "flow")
    assert again.prediction_type == "flow" and again.scheduler.config.shift == 2.0
    torch.testing.assert_close(*(d.sample(1, seed=0, num_inference_steps=3) for d in (denoiser, again)))
    with pytest.raises(ModelError, match="EDMEulerScheduler: only noise schedules with betas"):
        Denoiser(tiny_unet(), EDMEulerScheduler())


def test_of_a_hub_model_weights_are_fetched_when_its_configs_are_right(pipeline_folder, tmp_path, monkeypatch):
    asked = []

    def fetch(repo_id, allow_patterns):
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    folder = pipeline_folder
    assert Denoiser.from_pretrained("owner/ddpm").name == "owner/ddpm"
    assert asked == [["*.json"], ["*.json", "*.safetensors"]]
    folder = tmp_path / "sd"
    tiny_text_pipeline(tmp_path / "tokens").save_pretrained(folder)
    with pytest.raises(ModelError, match="holds a UNet2DConditionModel, .* goes with prompts"):
        Denoiser.from_pretrained("owner/sd")
    assert asked[2:] == [["*.json"]]


def test_of_a_gated_model_it_is_said_what_to_do(monkeypatch):
    response = httpx.Response(403, request=httpx.Request("GET", "https://hub"))

    def refuse(*_, **__):
        raise GatedRepoError("403 Client Error", response=response)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ModelError, match="owner/gated: its owner gates it; accept its terms on the hub, then log in"):
        Denoiser.from_pretrained("owner/gated")


def test_an_adapter_is_not_written_into_a_pipeline(unet, tmp_path):
    denoiser = Denoiser(unet, DDPMScheduler())
    attach(unet, VDUConfig.for_model(unet))
    with pytest.raises(ModelError, match="carries an adapter, which a pipeline cannot hold"):
        denoiser.save_pretrained(tmp_path / "adapted")


def test_bad_models_are_named(pipeline_folder, tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        Denoiser.from_pretrained(tmp_path / "nowhere")
    weights = next((pipeline_folder / "unet").glob("*.safetensors"))
    pickled = tmp_path / "pickled"
    shutil.copytree(pipeline_folder, pickled)
    (pickled / "unet" / weights.name).rename(pickled / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match="pickle is never read"):
        Denoiser.from_pretrained(pickled)
    weights.unlink()
    with pytest.raises(ModelError, match="no weights"):
        Denoiser.from_pretrained(pipeline_folder)
    (pipeline_folder / "unet" / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(ModelError, match="UNet2DConditionModel, expected a UNet2DModel"):
        Denoiser.from_pretrained(pipeline_folder)
    with pytest.raises(ModelError, match="pass image_size and channels"):
        Denoiser(nn.Identity(), DDPMScheduler())
    with pytest.raises(ModelError, match="prediction_type 'flow'"):
        Denoiser(nn.Identity(), DDPMScheduler(prediction_type="flow"), (8, 8), 1)
