"""What sets the text-to-image families apart: how they encode prompts, and what their networks are called with."""

from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from diffusers import DiffusionPipeline
from torch import nn

# Prompts that go through the text encoders at a time.
PROMPT_BATCH_SIZE = 32


class Family:
    """Stable Diffusion 1.x and 2.x.

    Attributes:
        component: the pipeline's name of the network.
        guidance_scale: the stock one: without guidance their samples are no examples of what to retain.
        distilled: the network is never asked twice; where its config has ``guidance_embeds``, it is told the guidance
            scale.
        even_sigmas: see :class:`~vdu_peft.schedule.NoiseSchedule`.
    """

    component = "unet"
    guidance_scale = 7.5
    distilled = False
    even_sigmas = False

    def latent_shape(self, pipeline: DiffusionPipeline) -> tuple[int, int, int]:
        """(C, h, w) of what is denoised, at the model's own size."""
        config = getattr(pipeline, self.component).config
        size = config.sample_size
        return (config.in_channels, *((size, size) if isinstance(size, int) else size))

    def granularity(self, pipeline: DiffusionPipeline) -> int:
        """What a latent's height and width are multiples of."""
        return 2 ** (len(pipeline.unet.config.block_out_channels) - 1)

    def encode_prompts(
        self, pipeline: DiffusionPipeline, prompts: list[str], image_size: tuple[int, int]
    ) -> dict[str, torch.Tensor]:
        """What the network is told of each prompt, by name, each (P, ...) on the CPU.

        Encoders on the CPU do it on a GPU if they fit there, for a T5 takes long on a CPU.
        """
        # As the run's Accelerator, which comes later and takes over what is started here.
        device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device
        try:
            with _moved(pipeline, device):
                parts = self._encode_all(pipeline, prompts)
        except torch.OutOfMemoryError:
            parts = self._encode_all(pipeline, prompts)
        return {name: torch.cat(tables) for name, tables in zip(self.embeddings, zip(*parts, strict=True), strict=True)}

    embeddings = ("encoder_hidden_states",)

    def _encode_all(self, pipeline, prompts: list[str]) -> list[list[torch.Tensor]]:
        """The :attr:`embeddings` of one batch of prompts after the other, on the CPU."""
        return [
            [table.cpu() for table in self._encode(pipeline, prompts[start : start + PROMPT_BATCH_SIZE])]
            for start in range(0, len(prompts), PROMPT_BATCH_SIZE)
        ]

    def _encode(self, pipeline, prompts: list[str]) -> tuple[torch.Tensor, ...]:
        """The :attr:`embeddings` of a batch of prompts."""
        return (pipeline.encode_prompt(prompts, **_once(pipeline))[0],)

    def predict(
        self, model: nn.Module, x_t: torch.Tensor, timesteps: torch.Tensor, rows: dict, guidance_scale: float | None
    ) -> torch.Tensor:
        """The network's prediction for x_t (N, C, h, w); ``rows`` are the embeddings of each image's prompt.

        ``guidance_scale`` is what a guidance-distilled network is told; None for one that takes none.
        """
        return model(x_t, timesteps, **rows).sample


class StableDiffusionXL(Family):
    """Two text encoders, and the sizes that the image is to look cropped from."""

    guidance_scale = 5.0
    embeddings = ("encoder_hidden_states", "text_embeds")

    def _encode(self, pipeline, prompts: list[str]) -> tuple[torch.Tensor, ...]:
        encoded = pipeline.encode_prompt(prompts, **_once(pipeline))
        return encoded[0], encoded[2]

    def encode_prompts(self, pipeline, prompts, image_size):
        tables = super().encode_prompts(pipeline, prompts, image_size)
        if pipeline.config.force_zeros_for_empty_prompt and "" in prompts:
            for table in tables.values():
                table[prompts.index("")] = 0  # what the stock pipeline guides away from
        time_ids = pipeline._get_add_time_ids(
            image_size,
            (0, 0),
            image_size,
            dtype=tables["text_embeds"].dtype,
            text_encoder_projection_dim=pipeline.text_encoder_2.config.projection_dim,
        )
        return {**tables, "time_ids": time_ids.expand(len(prompts), -1).cpu()}

    def predict(self, model, x_t, timesteps, rows, guidance_scale):
        added = {name: rows[name] for name in ("text_embeds", "time_ids")}
        return model(
            x_t, timesteps, encoder_hidden_states=rows["encoder_hidden_states"], added_cond_kwargs=added
        ).sample


class StableDiffusion3(Family):
    """A transformer over text and image tokens, on a rectified flow; 3 and 3.5."""

    component = "transformer"
    guidance_scale = 7.0
    embeddings = ("encoder_hidden_states", "pooled_projections")

    def granularity(self, pipeline):
        return pipeline.transformer.config.patch_size

    def _encode(self, pipeline, prompts: list[str]) -> tuple[torch.Tensor, ...]:
        encoded = pipeline.encode_prompt(prompts, None, None, **_once(pipeline))
        return encoded[0], encoded[2]

    def predict(self, model, x_t, timesteps, rows, guidance_scale):
        return model(hidden_states=x_t, timestep=timesteps, **rows).sample


class Flux(Family):
    """A transformer on packed latents; where it is guidance-distilled (dev), it is told the guidance scale."""

    component = "transformer"
    guidance_scale = 3.5
    distilled = True
    even_sigmas = True
    embeddings = ("encoder_hidden_states", "pooled_projections")

    def latent_shape(self, pipeline):
        size = pipeline.default_sample_size
        return pipeline.transformer.config.in_channels // 4, size, size

    def granularity(self, pipeline):
        return 2

    def _encode(self, pipeline, prompts: list[str]) -> tuple[torch.Tensor, ...]:
        return pipeline.encode_prompt(prompts, None, device=pipeline.text_encoder.device)[:2]

    def predict(self, model, x_t, timesteps, rows, guidance_scale):
        count, channels, height, width = x_t.shape
        # 2 x 2 latents to a token.
        tokens = nn.functional.pixel_unshuffle(x_t, 2).flatten(2).transpose(1, 2)
        places = torch.zeros(height // 2, width // 2, 3, device=x_t.device, dtype=x_t.dtype)
        places[..., 1] = torch.arange(height // 2)[:, None]
        places[..., 2] = torch.arange(width // 2)[None]
        output = model(
            hidden_states=tokens,
            timestep=timesteps.to(x_t.dtype) / 1000,
            guidance=None if guidance_scale is None else torch.full((count,), guidance_scale, device=x_t.device),
            txt_ids=torch.zeros(rows["encoder_hidden_states"].shape[1], 3, device=x_t.device, dtype=x_t.dtype),
            img_ids=places.flatten(0, 1),
            **rows,
        ).sample
        return nn.functional.pixel_shuffle(output.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


@contextmanager
def _moved(pipeline: DiffusionPipeline, device: torch.device):
    """Text encoders that are on the CPU on another device; then back."""
    encoders = [module for name, module in pipeline.components.items() if name.startswith("text_encoder") and module]
    encoders = [encoder for encoder in encoders if encoder.device.type == "cpu"]
    try:
        for encoder in encoders:
            encoder.to(device)
        yield
    finally:
        for encoder in encoders:
            encoder.to("cpu")


def _once(pipeline) -> dict:
    """Options of the pipelines' ``encode_prompt``: the prompts alone."""
    return {
        "device": pipeline.text_encoder.device,
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": False,
    }


# By name: importing the pipelines loads transformers, which takes seconds and says so on every command.
FAMILIES = {
    "StableDiffusionPipeline": Family(),
    "StableDiffusionXLPipeline": StableDiffusionXL(),
    "StableDiffusion3Pipeline": StableDiffusion3(),
    "FluxPipeline": Flux(),
}
