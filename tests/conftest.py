"""Tiny models and images that several test files share."""

import json
import os

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from vdu_peft.adapter import attach, save_adapter, variational_layers
from vdu_peft.config import VDUConfig
from vdu_peft.denoiser import Denoiser

# Every worker of pytest-xdist has its share of the cores, and so have the processes that its tests start; where it can,
# as its own: Linux at times keeps two busy processes on one core and leaves another idle.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
THREADS = max(1, len(CORES) // WORKERS)
os.environ["OMP_NUM_THREADS"] = str(THREADS)
if hasattr(os, "sched_setaffinity") and len(CORES) >= WORKERS > 1:
    os.sched_setaffinity(0, CORES[int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) :: WORKERS])
torch.set_num_threads(THREADS)
# Of the images of each of TwoKinds.
SPREAD = 0.1


def tiny_unet(channels: int = 1, **options) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        **options,
    ).eval()


@pytest.fixture
def unet() -> UNet2DModel:
    return tiny_unet()


@pytest.fixture
def pipeline_folder(tmp_path, unet):
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def forget() -> torch.Tensor:
    """Eight bright squares on black, (8, 1, 8, 8)."""
    images = torch.full((8, 1, 8, 8), -1.0)
    images[:, :, 2:6, 2:6] = 1.0
    return images


def saved_adapter(folder, seed: int = 1, model=None, **options):
    """The folder of an adapter whose mean delta is not zero, of :func:`tiny_unet` or of ``model`` (which gets it)."""
    model = model or tiny_unet()
    peft_model = attach(model, VDUConfig.for_model(model, **options))
    torch.manual_seed(seed)
    for _, layer in variational_layers(model):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    save_adapter(peft_model, folder)
    return folder


def tiny_tokenizer(folder) -> CLIPTokenizer:
    """Letters alone, no merges."""
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def tiny_t5() -> tuple[T5Tokenizer, T5EncoderModel]:
    """Letters alone."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)
    config = T5Config(
        vocab_size=len(pieces),
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    return tokenizer, T5EncoderModel(config).eval()


def tiny_text_parts(folder, latent_channels: int, **vae_options) -> dict:
    """VAE for 16 x 16 images and 8 x 8 latents, CLIP's tokenizer and text encoder."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(folder)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.18,
        **vae_options,
    )
    return {"vae": vae.eval(), "tokenizer": tokenizer}


def tiny_text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=16,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )


def tiny_flow_pipeline(folder, family: str = "sd3"):
    """A random StableDiffusion3Pipeline (``sd3``) or FluxPipeline (``flux``, ``schnell``) for 16 x 16 images."""
    parts = tiny_text_parts(folder, 4, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False)
    config = tiny_text_config(parts["tokenizer"])
    t5_tokenizer, t5 = tiny_t5()
    if family == "sd3":
        parts["transformer"] = SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            out_channels=4,
        ).eval()
        parts |= {"text_encoder": CLIPTextModelWithProjection(config).eval()}
        parts |= {"text_encoder_2": CLIPTextModelWithProjection(config).eval(), "tokenizer_2": parts["tokenizer"]}
        parts |= {"text_encoder_3": t5, "tokenizer_3": t5_tokenizer}
        parts["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=3.0)
        # Its text encoders' embeddings are laid side by side, and T5's are wider.
        parts["text_encoder_3"] = T5EncoderModel(T5Config(**{**t5.config.to_dict(), "d_model": 32})).eval()
        pipeline = StableDiffusion3Pipeline(**parts)
    else:
        parts["transformer"] = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=family == "flux",
            axes_dims_rope=(4, 4, 8),
        ).eval()
        parts |= {"text_encoder": CLIPTextModel(config).eval(), "text_encoder_2": t5, "tokenizer_2": t5_tokenizer}
        dev = {"shift": 3.0, "use_dynamic_shifting": True}
        scheduler = FlowMatchEulerDiscreteScheduler(**(dev if family == "flux" else {}))
        pipeline = FluxPipeline(scheduler=scheduler, **parts)
        pipeline.default_sample_size = 8
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_text_pipeline(folder, family: str = "sd", prediction_type: str = "epsilon"):
    """A random pipeline for 16 x 16 images: ``sd``, ``sdxl``, or one of :func:`tiny_flow_pipeline`'s."""
    if family in ("sd3", "flux", "schnell"):
        return tiny_flow_pipeline(folder, family)
    parts = tiny_text_parts(folder, 4)
    tokenizer, text_config = parts["tokenizer"], tiny_text_config(parts["tokenizer"])
    xl = family == "sdxl"
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32 if xl else 16,
        attention_head_dim=4,
        norm_num_groups=4,
        **(
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 6 * 8 + 16,
            }
            if xl
            else {}
        ),
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    parts |= {"unet": unet.eval(), "scheduler": scheduler}
    parts["text_encoder"] = CLIPTextModel(text_config).eval()
    if xl:
        parts |= {"tokenizer_2": tokenizer, "text_encoder_2": CLIPTextModelWithProjection(text_config).eval()}
        pipeline = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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


def is_first(images):
    """Bright in the upper left, where the second kind is dark."""
    return images[:, 0, :4, :4].mean((1, 2)) > 0
