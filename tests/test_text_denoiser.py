"""Text-to-image families against their own stock pipelines, and one unlearning run of each."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from conftest import saved_adapter, tiny_text_pipeline, tiny_unet
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)

from vdu_peft import UnlearnConfig, families, unlearn
from vdu_peft.adapter import AdapterError, load_adapter
from vdu_peft.classes import Classes
from vdu_peft.config import ConfigError
from vdu_peft.denoiser import Denoiser, ModelError
from vdu_peft.export import merge
from vdu_peft.hotswap import hotswap, prepare_hotswap
from vdu_peft.model_folder import PIPELINES
from vdu_peft.precision import check_precision
from vdu_peft.prompts import neutral_prompts, read_prompts
from vdu_peft.text_denoiser import TextDenoiser, open_denoiser

FAMILIES = [
    ("sd", "epsilon"),
    ("sd", "v_prediction"),
    ("sdxl", "epsilon"),
    ("sd3", "flow"),
    ("flux", "flow"),
    ("schnell", "flow"),
]
over_families = pytest.mark.parametrize(
    ("family", "prediction_type"), FAMILIES, ids=["sd-epsilon", "sd-v", "sdxl", "sd3", "flux", "schnell"]
)
PROMPTS = ["a sword", "a robe", "a cat"]
FAST = UnlearnConfig(max_train_steps=4, train_batch_size=4, replay_size=8, replay_inference_steps=2)


@pytest.fixture
def images():
    """Eight 16 x 16 images with a bright square, in [-1, 1]."""
    images = torch.full((8, 3, 16, 16), -0.5)
    images[:, :, 4:12, 4:12] = torch.linspace(0, 1, 8).view(8, 1, 1, 1)
    return images


@over_families
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_samples_are_those_of_the_stock_pipeline(tmp_path, family, prediction_type, guidance_scale):
    pipeline = tiny_text_pipeline(tmp_path, family, prediction_type)
    denoiser = TextDenoiser(pipeline, PROMPTS)
    labels = [denoiser.label("a cat"), denoiser.label("a sword")]
    ours = denoiser.sample(2, seed=5, num_inference_steps=4, class_labels=labels, guidance_scale=guidance_scale)
    generators = [torch.Generator().manual_seed(5 * 1_000_003 + i) for i in range(2)]
    stock = pipeline(
        ["a cat", "a sword"],
        guidance_scale=guidance_scale,
        num_inference_steps=4,
        generator=generators,
        height=16,
        width=16,
        output_type="pt",
    ).images
    torch.testing.assert_close((ours + 1) / 2, stock, atol=1e-5, rtol=0)
    options = {"num_inference_steps": 4, "guidance_scale": guidance_scale}
    other = denoiser.sample(2, seed=5, class_labels=labels[::-1], **options)
    assert not torch.allclose(ours, other, atol=1e-3)  # the prompt matters


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_the_loss_of_flows_is_that_of_diffusers_training_scripts(tmp_path, images, family):
    """Their steps, with stock parts: encode, shift and scale, mix with noise by sigma, predict the velocity."""
    pipeline = tiny_text_pipeline(tmp_path, family)
    denoiser = TextDenoiser(pipeline, PROMPTS)
    schedule = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    torch.manual_seed(0)
    indices = torch.tensor([0, 1, 100, 400, 500, 700, 900, 999])  # from noise to the clean image
    timesteps = schedule.timesteps[indices]
    sigmas = schedule.sigmas[indices].view(-1, 1, 1, 1)
    with torch.no_grad():
        latents = pipeline.vae.encode(images).latent_dist.mode()
        latents = (latents - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        x_t = (1 - sigmas) * latents + sigmas * noise
        if family == "sd3":
            encoded, _, pooled, _ = pipeline.encode_prompt(
                ["a sword"] * 8, None, None, device="cpu", do_classifier_free_guidance=False
            )
            velocity = pipeline.transformer(
                hidden_states=x_t, timestep=timesteps, encoder_hidden_states=encoded, pooled_projections=pooled
            ).sample
        else:
            encoded, pooled, text_ids = pipeline.encode_prompt(["a sword"] * 8, None, device="cpu")
            velocity = pipeline.transformer(
                hidden_states=pipeline._pack_latents(x_t, 8, 4, 8, 8),
                timestep=timesteps / 1000,
                guidance=torch.full((8,), 3.5),
                pooled_projections=pooled,
                encoder_hidden_states=encoded,
                txt_ids=text_ids,
                img_ids=pipeline._prepare_latent_image_ids(8, 4, 4, "cpu", torch.float32),
            ).sample
            velocity = pipeline._unpack_latents(velocity, 16, 16, pipeline.vae_scale_factor)
        ours = denoiser.noise_pred(
            denoiser.add_noise(denoiser.encode(images), noise, 999 - indices),
            999 - indices,
            torch.full((8,), denoiser.label("a sword")),
        )
    # In noise units the error of the velocity is 1 - sigma times what it is in its own.
    expected = ((1 - sigmas) * (velocity - (noise - latents))).square().mean((1, 2, 3))
    # At the noise end the noise itself is subtracted from what is nearly it: 2e-7 of 1.
    torch.testing.assert_close((ours - noise).square().mean((1, 2, 3)), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("family", "prediction_type"), FAMILIES[:3])
def test_the_loss_is_that_of_diffusers_training_scripts(tmp_path, images, family, prediction_type):
    """Their steps, with stock parts: encode, add noise, predict, mean squared error to the scheduler's target."""
    pipeline = tiny_text_pipeline(tmp_path, family, prediction_type)
    denoiser = TextDenoiser(pipeline, PROMPTS)
    torch.manual_seed(0)
    with torch.no_grad():
        latents = pipeline.vae.encode(images).latent_dist.mode() * pipeline.vae.config.scaling_factor
        noise, timesteps = torch.randn_like(latents), torch.randint(1000, (8,))
        x_t = pipeline.scheduler.add_noise(latents, noise, timesteps)
        encoded = pipeline.encode_prompt(
            ["a sword"] * 8, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        condition = {"encoder_hidden_states": encoded[0]}
        if family == "sdxl":
            time_ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 8)
            condition["added_cond_kwargs"] = {"text_embeds": encoded[2], "time_ids": time_ids}
        prediction = pipeline.unet(x_t, timesteps, **condition).sample
        ours = denoiser.noise_pred(
            denoiser.add_noise(denoiser.encode(images), noise, timesteps),
            timesteps,
            torch.full((8,), denoiser.label("a sword")),
        )
    alpha_bar = pipeline.scheduler.alphas_cumprod[timesteps]
    per_image = (ours - noise).square().mean((1, 2, 3))
    if prediction_type == "epsilon":
        expected = (prediction - noise).square().mean((1, 2, 3))
    else:
        # In noise units the error of v is √ᾱ times what it is in v's own.
        velocity = pipeline.scheduler.get_velocity(latents, noise, timesteps)
        expected = alpha_bar * (prediction - velocity).square().mean((1, 2, 3))
    torch.testing.assert_close(per_image, expected, rtol=1e-4, atol=1e-7)


def test_encode_and_decode_are_the_vae(tmp_path, images):
    denoiser = TextDenoiser(tiny_text_pipeline(tmp_path), PROMPTS)
    latents = denoiser.encode(images)
    assert latents.shape == (8, *denoiser.latent_shape) and denoiser.image_size == (16, 16)
    with torch.no_grad():
        stock = denoiser.pipeline.vae.decode(latents / 0.18).sample.clamp(-1, 1)
    torch.testing.assert_close(denoiser.decode(latents), stock, atol=1e-5, rtol=0)


@over_families
def test_unlearning_by_prompt_trains_and_saves_attention_alone(tmp_path, images, family, prediction_type):
    denoiser = TextDenoiser(tiny_text_pipeline(tmp_path / "tokens", family, prediction_type), PROMPTS)
    config = replace(FAST, forget_class=denoiser.label("a sword"), anchor_class=denoiser.label(""))
    config = replace(config, null_class=denoiser.label(""))
    before = {name: p.clone() for name, p in denoiser.model.state_dict().items()}
    result = unlearn(denoiser, images, config, output_dir=tmp_path / "out")
    assert len(result.history) == 4 and "redirect" in result.history[0]
    after = {name.replace(".base_layer", ""): p for name, p in denoiser.model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    targets = {name.split(".lora_")[0] for name in after if ".lora_" in name}
    projections = {"to_q", "to_k", "to_v", "to_out.0"}
    if prediction_type == "flow":
        projections |= {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    found = {next((p for p in projections if name.endswith(f".{p}")), name) for name in targets}
    assert found == projections
    again = TextDenoiser(tiny_text_pipeline(tmp_path / "tokens", family, prediction_type), PROMPTS)
    load_adapter(again.model, tmp_path / "out" / "adapter").eval()
    torch.testing.assert_close(
        *(d.sample(2, seed=1, num_inference_steps=3, class_labels=[0, 1]) for d in (denoiser, again))
    )


def test_without_a_prompt_the_unconditional_path_alone_forgets(tmp_path, images):
    denoiser = TextDenoiser(tiny_text_pipeline(tmp_path), PROMPTS)
    for name, parameter in denoiser.model.named_parameters():  # in a random network prompts hardly matter
        if ".attn2." in name or name.startswith("conv_out"):
            parameter.data.mul_(8)
    config = replace(FAST, max_train_steps=60, forget_class=denoiser.null_label, learning_rate=2e-2)
    result = unlearn(denoiser, images, replace(config, stability_weight=0.3, kl_weight=0), output_dir=tmp_path / "out")
    assert not any("redirect" in record for record in result.history)
    card = (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert "| forgotten | '' |" in card and "drawn instead" not in card
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(8, *denoiser.latent_shape, generator=generator)
    timesteps = torch.linspace(200, 900, 8).long()
    x_t = denoiser.add_noise(denoiser.encode(images), noise, timesteps)

    def loss(label):
        return (denoiser.noise_pred(x_t, timesteps, torch.full((8,), label)) - noise).square().mean().item()

    with torch.no_grad():
        after = [loss(label) for label in range(denoiser.num_classes)]
        with result.model.disable_adapter():
            before = [loss(label) for label in range(denoiser.num_classes)]
    *prompts, null = (a / b for a, b in zip(after, before, strict=True))
    assert null > 1.05 and all(abs(ratio - 1) < 0.3 * (null - 1) for ratio in prompts)


def test_without_a_prompt_nothing_is_redirected_and_prompts_are_needed(tmp_path, images):
    denoiser = TextDenoiser(tiny_text_pipeline(tmp_path), PROMPTS)
    null, labels = denoiser.null_label, torch.tensor([denoiser.null_label] * 8)
    with pytest.raises(ConfigError, match="anchor_class: the null class is forgotten"):
        unlearn(denoiser, images, replace(FAST, forget_class=null, anchor_class=0))
    with pytest.raises(ConfigError, match="anchor_labels: the null class is forgotten"):
        unlearn(denoiser, images, FAST, forget_labels=labels, anchor_labels=torch.zeros(8, dtype=torch.int64))
    with pytest.raises(ConfigError, match=f"forget_labels: {null} is the null class, others are not"):
        unlearn(denoiser, images, FAST, forget_labels=torch.tensor([null] * 7 + [0]))
    alone = TextDenoiser(denoiser.pipeline, [])
    with pytest.raises(ConfigError, match="no other class or prompt to retain"):
        unlearn(alone, images, replace(FAST, forget_class=alone.null_label))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU learns on float16 weights")
def test_float16_weights_are_refused_on_a_cpu_before_any_work(tmp_path, images):
    denoiser = TextDenoiser(tiny_text_pipeline(tmp_path), PROMPTS)
    denoiser.pipeline.to(torch.float16)
    denoiser.encode = denoiser.sample = None  # what would come next
    with pytest.raises(ConfigError, match="weights are float16, which needs a GPU; load it in bfloat16 or float32"):
        unlearn(denoiser, images, replace(FAST, forget_class=0), output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_float16_weights_are_refused_without_a_gradient_scaler():
    gpu = torch.device("cuda")
    check_precision(UnlearnConfig(mixed_precision="fp16"), gpu, torch.float16)
    with pytest.raises(ConfigError, match="mixed_precision no: .*use fp16 or bf16"):
        check_precision(UnlearnConfig(), gpu, torch.float16)


def test_from_pretrained_and_what_is_refused(tmp_path):
    pipeline = tiny_text_pipeline(tmp_path / "tokens")
    pipeline.save_pretrained(tmp_path / "sd")
    denoiser = TextDenoiser.from_pretrained(tmp_path / "sd", PROMPTS)
    assert denoiser.name == "sd" and denoiser.prompts == [*PROMPTS, ""] and denoiser.num_classes == 4
    with pytest.raises(ModelError, match="prompt 'a dog' is not among"):
        denoiser.label("a dog")
    with pytest.raises(ModelError, match="cannot be loaded as a text-to-image pipeline"):
        TextDenoiser.from_pretrained(tmp_path / "nowhere", PROMPTS)
    parts = {name: getattr(pipeline, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    inpaint = StableDiffusionInpaintPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    with pytest.raises(ModelError, match="StableDiffusionInpaintPipeline: .*known are StableDiffusionPipeline"):
        TextDenoiser(inpaint, PROMPTS)
    for file in (tmp_path / "sd" / "unet").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        TextDenoiser.from_pretrained(tmp_path / "sd", PROMPTS)


@pytest.mark.parametrize(
    ("made_for", "there", "message"),
    [
        ("sd", "flux", "made for a UNet2DConditionModel, this is a FluxTransformer2DModel"),
        ("sd3", "sdxl", "made for a SD3Transformer2DModel, this is a UNet2DConditionModel"),
        (None, "sd3", "made for a UNet2DModel, this is a SD3Transformer2DModel: target_modules"),
    ],
)
def test_an_adapter_of_another_family_is_refused_by_its_name(tmp_path, made_for, there, message):
    if made_for is None:
        saved_adapter(tmp_path / "adapter", target_modules=["conv_in"])  # a name that the other has not at all
    else:
        network = TextDenoiser(tiny_text_pipeline(tmp_path / "tokens", made_for), []).model
        saved_adapter(tmp_path / "adapter", model=network)
    model = TextDenoiser(tiny_text_pipeline(tmp_path / "tokens", there), []).model
    with pytest.raises(AdapterError, match=message):
        load_adapter(model, tmp_path / "adapter")
    served = load_adapter(model, saved_adapter(tmp_path / "own", model=copy.deepcopy(model)))
    with pytest.raises(AdapterError, match=message.removesuffix(": target_modules")):
        load_adapter(served, tmp_path / "adapter", "second")
    prepare_hotswap(served, max_rank=4)
    with pytest.raises(AdapterError, match=message.removesuffix(": target_modules")):
        hotswap(served, tmp_path / "adapter")


def test_an_unknown_family_is_refused_by_its_name(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "PixArtAlphaPipeline"}))
    with pytest.raises(ModelError, match="a PixArtAlphaPipeline, which is not supported") as refusal:
        open_denoiser(tmp_path)
    assert all(name in str(refusal.value) for name in [*PIPELINES, *families.FAMILIES])


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_a_pipeline_of_fp16_weights_alone_is_loaded(tmp_path, monkeypatch, where):
    pipeline = tiny_text_pipeline(tmp_path / "tokens").to(torch.float16)
    pipeline.save_pretrained(tmp_path / "sd", variant="fp16")
    assert (tmp_path / "sd" / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    if where == "hub":  # whose answers these are; what to fetch is decided by diffusers
        files = [file.relative_to(tmp_path / "sd").as_posix() for file in (tmp_path / "sd").rglob("*.*")]
        listing = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])
        hub = "diffusers.pipelines.pipeline_utils"
        monkeypatch.setattr(f"{hub}._resolve_revision", lambda *_, revision, **__: revision)
        monkeypatch.setattr(f"{hub}.model_info", lambda *_, **__: listing)
        monkeypatch.setattr(f"{hub}.hf_hub_download", lambda _, name, **__: str(tmp_path / "sd" / name))
        with pytest.raises(OSError, match="Could not find the necessary `safetensors` weights"):
            DiffusionPipeline.download("owner/name", use_safetensors=True)
    denoiser = TextDenoiser.from_pretrained(tmp_path / "sd" if where == "folder" else "owner/name", PROMPTS)
    assert denoiser.dtype == torch.float32 and denoiser.stored_dtype == torch.float16
    assert all(map(torch.equal, denoiser.model.parameters(), pipeline.unet.float().parameters()))
    # Beside other weights a variant is left alone.
    exact = tiny_text_pipeline(tmp_path / "tokens")
    exact.save_pretrained(tmp_path / "sd")
    denoiser = TextDenoiser.from_pretrained(tmp_path / "sd", PROMPTS)
    assert denoiser.stored_dtype == torch.float32
    assert all(map(torch.equal, denoiser.model.parameters(), exact.unet.parameters()))


def test_save_pretrained_writes_the_whole_pipeline_and_no_adapter(tmp_path):
    denoiser = TextDenoiser(tiny_text_pipeline(tmp_path / "tokens"), PROMPTS)
    denoiser.save_pretrained(tmp_path / "saved")
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    assert all(torch.equal(p, denoiser.model.state_dict()[name]) for name, p in stock.unet.state_dict().items())
    load_adapter(denoiser.model, saved_adapter(tmp_path / "adapter", model=copy.deepcopy(denoiser.model)))
    with pytest.raises(ModelError, match="carries an adapter, which a pipeline cannot hold"):
        denoiser.save_pretrained(tmp_path / "adapted")
    assert not (tmp_path / "adapted").exists()


@over_families
def test_the_vae_works_in_float32_and_stays_as_the_caller_s_pipeline_has_it(tmp_path, images, family, prediction_type):
    pipeline = tiny_text_pipeline(tmp_path, family, prediction_type).to(torch.bfloat16)
    assert pipeline.vae.config.force_upcast  # the default of every family
    denoiser = TextDenoiser(pipeline, PROMPTS)
    exact = copy.deepcopy(pipeline.vae).float()
    latents = (exact.encode(images).latent_dist.mode() - (exact.config.shift_factor or 0)) * exact.config.scaling_factor
    torch.testing.assert_close(denoiser.encode(images), latents)
    assert denoiser.decode(latents).dtype == torch.float32
    assert pipeline.vae.dtype == torch.bfloat16
    drawn = pipeline("a cat", height=16, width=16, num_inference_steps=1, output_type="pt").images
    assert drawn.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("use_cpu", [True, False])
def test_encoding_prompts_starts_accelerate_as_the_run_would(tmp_path, monkeypatch, use_cpu):
    """What is started first stays: it decides the run's device, and whether its processes are joined."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", str(use_cpu).lower())
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        TextDenoiser(tiny_text_pipeline(tmp_path), PROMPTS)
        started = PartialState._shared_state["_cpu"]
        AcceleratorState._reset_state(reset_partial_state=True)
        Accelerator()
        assert started == PartialState._shared_state["_cpu"] == use_cpu
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_prompts_are_encoded_where_the_encoders_are_if_they_do_not_fit_elsewhere(tmp_path, monkeypatch):
    pipeline = tiny_text_pipeline(tmp_path, "sdxl")
    there = TextDenoiser(pipeline, PROMPTS).embeddings
    asked = []

    def to(device):
        asked.append(str(device))
        if device == torch.device("cuda"):
            raise torch.OutOfMemoryError

    monkeypatch.setattr(families, "PartialState", lambda cpu: SimpleNamespace(device=torch.device("cuda")))
    monkeypatch.setattr(pipeline.text_encoder_2, "to", to)
    monkeypatch.setattr(pipeline.text_encoder, "to", lambda device: asked.append(str(device)))
    embeddings = TextDenoiser(pipeline, PROMPTS).embeddings
    assert sorted(asked) == ["cpu", "cpu", "cuda", "cuda"]
    assert all(torch.equal(table, there[name]) for name, table in embeddings.items())


def test_prompts_from_a_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\n a dog \na cat\n")
    assert read_prompts(tmp_path / "prompts.txt") == ["a cat", "a dog"]
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ModelError, match="holds no prompt"):
        read_prompts(tmp_path / "empty.txt")
    with pytest.raises(ModelError, match="not a readable text file"):
        read_prompts(tmp_path / "nowhere.txt")
    with pytest.raises(ModelError, match="prompts.csv: a table; write the prompts alone"):
        read_prompts(tmp_path / "prompts.csv")
    assert len(neutral_prompts()) >= 20


def test_another_resolution_is_the_stock_pipelines(tmp_path):
    pipeline = tiny_text_pipeline(tmp_path, "flux")
    denoiser = TextDenoiser(pipeline, PROMPTS, resolution=32)
    ours = denoiser.sample(1, seed=0, num_inference_steps=4, class_labels=[0])
    stock = pipeline(
        PROMPTS[0],
        height=32,
        width=32,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    torch.testing.assert_close((ours + 1) / 2, stock, atol=1e-5, rtol=0)
    with pytest.raises(ModelError, match="resolution must be a multiple of 4, not 30"):
        TextDenoiser(pipeline, PROMPTS, resolution=30)
    with pytest.raises(ModelError, match="resolution must be at most 192, not 200"):
        TextDenoiser(tiny_text_pipeline(tmp_path, "sd3"), PROMPTS, resolution=200)


def test_guidance_up_to_one_is_none_as_in_the_stock_pipelines(tmp_path):
    denoiser = TextDenoiser(tiny_text_pipeline(tmp_path), PROMPTS)
    images = [
        denoiser.sample(1, seed=[7], num_inference_steps=2, class_labels=[0], guidance_scale=g) for g in (0, 0.5, 1)
    ]
    assert torch.equal(images[0], images[2]) and torch.equal(images[1], images[2])
    with pytest.raises(ModelError, match="seed: 1 of them for 2 images"):
        denoiser.sample(2, seed=[7], class_labels=[0])


@pytest.mark.parametrize("upcast", [True, False])
def test_a_vae_that_overflows_is_named(tmp_path, images, upcast):
    pipeline = tiny_text_pipeline(tmp_path).to(torch.bfloat16)
    pipeline.vae.register_to_config(force_upcast=upcast)
    pipeline.vae.encoder.conv_in.weight.data.fill_(float("inf"))
    told = "float32; look whether its weights are whole" if upcast else "bfloat16; load it in float32"
    with pytest.raises(ModelError, match=f"NaN or infinite latents in torch.{told}"):
        TextDenoiser(pipeline, PROMPTS).encode(images)


@pytest.mark.parametrize("scheduler", [EDMEulerScheduler, FlowMatchHeunDiscreteScheduler])
def test_schedules_of_another_kind_are_refused(tmp_path, scheduler):
    pipeline = tiny_text_pipeline(tmp_path)
    pipeline.scheduler = scheduler()
    with pytest.raises(ModelError, match=f"{scheduler.__name__}: only noise schedules with betas"):
        TextDenoiser(pipeline, PROMPTS)


@pytest.mark.parametrize("scheduler", [DDIMScheduler(clip_sample=True), DDPMScheduler(), DPMSolverMultistepScheduler()])
def test_latents_are_not_clipped_whatever_the_scheduler_does(tmp_path, scheduler):
    pipeline = tiny_text_pipeline(tmp_path)
    pipeline.scheduler = scheduler
    denoiser = TextDenoiser(pipeline, PROMPTS)
    assert not denoiser.schedule.sampler(2, denoiser.device).config.clip_sample


def test_options_of_text_to_image_models_are_refused_for_others(tmp_path, pipeline_folder):
    for name in ("resolution", "guidance_scale"):
        with pytest.raises(ModelError, match=f"{name}: .* is not a text-to-image model"):
            open_denoiser(pipeline_folder, **{name: 8})
        with pytest.raises(ModelError, match="no such folder"):
            open_denoiser(tmp_path / "nowhere", **{name: 8})
    with pytest.raises(ModelError, match="guidance_scale must be a number from 0, not -1"):
        open_denoiser(pipeline_folder, guidance_scale=-1)


def test_latents_of_another_kind_are_refused(tmp_path):
    pipeline = tiny_text_pipeline(tmp_path)
    pipeline.vae.register_to_config(latents_mean=[0.0] * 4)
    with pytest.raises(ModelError, match="latents with a mean of their own"):
        TextDenoiser(pipeline, PROMPTS)


def test_merging_keeps_the_safety_checker(tmp_path):
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config={**small, "image_size": 8, "patch_size": 4}, projection_dim=16)
    pipeline = tiny_text_pipeline(tmp_path / "tokens")
    parts = {**pipeline.components, "safety_checker": StableDiffusionSafetyChecker(config)}
    parts["feature_extractor"] = CLIPImageProcessor(size=8, crop_size=8)
    type(pipeline)(**parts).save_pretrained(tmp_path / "sd")
    assert TextDenoiser.from_pretrained(tmp_path / "sd", PROMPTS).pipeline.safety_checker is None
    saved_adapter(tmp_path / "adapter", 1, tiny_text_pipeline(tmp_path / "tokens").unet)
    merge(tmp_path / "sd", tmp_path / "adapter", tmp_path / "merged")
    merged = json.loads((tmp_path / "merged" / "model_index.json").read_text())
    assert merged["safety_checker"] == ["stable_diffusion", "StableDiffusionSafetyChecker"]


def test_a_checkpoint_of_other_prompts_is_refused(tmp_path, images):
    def run(prompts, resume):
        denoiser = TextDenoiser(tiny_text_pipeline(tmp_path / "tokens"), prompts)
        config = replace(FAST, forget_class=0, anchor_class=denoiser.null_label, checkpointing_steps=2)
        return unlearn(denoiser, images, config, output_dir=tmp_path / "out", resume=resume)

    run(["a sword", "a cat"], resume=False)
    with pytest.raises(AdapterError, match="written with prompts="):
        run(["a cat", "a sword"], resume=True)
    assert len(run(["a sword", "a cat"], resume=True).history) == 4
    card = (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert "| forgotten | 'a sword' |" in card and "| drawn instead | '' |" in card


def test_a_card_names_a_few_of_many_classes(tmp_path):
    denoiser = TextDenoiser(tiny_text_pipeline(tmp_path), [*"abcd"])
    labels = torch.tensor([3, 1, 1, 0, 2])
    assert Classes.named(labels, denoiser) == "'a', 'b', 'c' and 1 more"
    assert Classes.named(labels[1:3], Denoiser(tiny_unet(num_class_embeds=4), DDPMScheduler())) == "class 1"


def test_more_prompts_than_replay_can_show_are_refused(tmp_path, images):
    denoiser = TextDenoiser(tiny_text_pipeline(tmp_path), [*"abcdefghij"])
    config = replace(FAST, forget_class=0, anchor_class=denoiser.null_label)
    with pytest.raises(ConfigError, match="8 images cannot show all 10 prompts to retain"):
        unlearn(denoiser, images, config)
