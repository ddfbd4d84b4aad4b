"""Text-to-image models behind the denoiser's contract: the prompts in use are the classes.

A prompt's embedding is computed once; from then on it is a label like any other, so that forgetting under a prompt,
redirecting it to an anchor and retaining the rest is the very code that class-conditional models use.
"""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import torch
from diffusers import DDPMScheduler, DiffusionPipeline

from vdu_peft.denoiser import Denoiser, ModelError, stored_dtype

# By name: importing them loads transformers, which takes seconds and says so on every command.
FAMILIES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")


def neutral_prompts() -> list[str]:
    """Prompts of everyday things, which replay draws where the user names none."""
    return read_prompts(Path(str(resources.files("vdu_peft") / "assets" / "retain_prompts.txt")))


def read_prompts(file: str | Path) -> list[str]:
    """One prompt a line; blank lines and repetitions are dropped.

    Raises:
        ModelError: the file is missing, not text, or holds no prompt.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{file}: not a readable text file of prompts, one a line ({error})") from error
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not prompts:
        raise ModelError(f"{file}: holds no prompt; write one a line")
    return prompts


class TextDenoiser(Denoiser):
    """Stable Diffusion 1.x and 2.x (epsilon, v) and SDXL, on latents.

    Args:
        pipeline: a diffusers pipeline of one of :data:`FAMILIES`; its VAE and text encoders are used once for what
            is encoded, never trained.
        prompts: all prompts that will be asked for; the empty one, which stands for no condition, is added.

    Raises:
        ModelError: another family, or a UNet with inputs besides the latents (inpainting, depth).
    """

    guidance_scale = (
        7.5  # the stock pipelines' default: without guidance their samples are no examples of what to retain
    )

    def __init__(self, pipeline: DiffusionPipeline, prompts: Sequence[str]):
        if type(pipeline).__name__ not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise ModelError(
                f"{type(pipeline).__name__}: not a text-to-image family that is supported; known are {known}"
            )
        unet, vae = pipeline.unet, pipeline.vae
        if unet.config.in_channels != vae.config.latent_channels:
            raise ModelError(
                f"the UNet takes {unet.config.in_channels} channels, the VAE gives {vae.config.latent_channels}: "
                "inpainting and other image-conditioned models are not supported"
            )
        # A latent is no pixel: samplers must not clip it, whatever the scheduler's default is.
        scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
        size, factor = unet.config.sample_size, pipeline.vae_scale_factor
        height, width = (size, size) if isinstance(size, int) else size
        super().__init__(unet, scheduler, image_size=(height * factor, width * factor), channels=vae.config.in_channels)
        self.pipeline = pipeline
        self.latent_shape = (unet.config.in_channels, height, width)
        self.prompts = list(dict.fromkeys([*prompts, ""]))
        self.num_classes = len(self.prompts)
        self.null_label = self.label("")
        self._embeddings = self._encode_prompts()

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, prompts: Sequence[str], torch_dtype: torch.dtype = torch.float32
    ) -> "TextDenoiser":
        """Load a pipeline folder or a hub id; safetensors only.

        Raises:
            ModelError: nothing there, no safetensors weights, or a family that is not supported.
        """
        try:
            folder = Path(name_or_path)
            if not folder.is_dir():
                folder = Path(DiffusionPipeline.download(str(name_or_path), use_safetensors=True))
            kind = DiffusionPipeline.load_config(str(folder)).get("_class_name")
            # The safety checker judges samples; it has no part in what is learned, and takes a gigabyte.
            checker = {"safety_checker": None, "requires_safety_checker": False}
            pipeline = DiffusionPipeline.from_pretrained(
                str(folder),
                torch_dtype=torch_dtype,
                use_safetensors=True,
                **(checker if kind == "StableDiffusionPipeline" else {}),
            )
        except (OSError, ValueError, RuntimeError, AttributeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelError(f"{name_or_path}: cannot be loaded as a text-to-image pipeline ({reason})") from error
        denoiser = cls(pipeline, prompts)
        denoiser.name = folder.resolve().name if Path(name_or_path).is_dir() else str(name_or_path)
        denoiser.stored_dtype = stored_dtype(folder / "unet")
        return denoiser

    def label(self, prompt: str) -> int:
        """The label that stands for a prompt.

        Raises:
            ModelError: the prompt is not among those that the denoiser was made with.
        """
        if prompt not in self.prompts:
            raise ModelError(f"prompt {prompt!r} is not among those the model was loaded with")
        return self.prompts.index(prompt)

    @torch.no_grad()
    def _encode_prompts(self) -> dict[str, torch.Tensor]:
        encoded = self.pipeline.encode_prompt(
            self.prompts,
            device=self.pipeline.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        embeddings = {"encoder_hidden_states": encoded[0].cpu()}
        if type(self.pipeline).__name__ == "StableDiffusionXLPipeline":
            height, width = self.image_size
            time_ids = self.pipeline._get_add_time_ids(
                (height, width),
                (0, 0),
                (height, width),
                dtype=encoded[0].dtype,
                text_encoder_projection_dim=self.pipeline.text_encoder_2.config.projection_dim,
            )
            embeddings |= {"text_embeds": encoded[2].cpu(), "time_ids": time_ids.expand(self.num_classes, -1).cpu()}
        return embeddings

    def condition(self, class_labels: torch.Tensor) -> dict:
        """The UNet's keyword arguments for labels (N,) int64 of :attr:`prompts`."""
        labels = class_labels.cpu()
        rows = {name: table[labels].to(class_labels.device, self.dtype) for name, table in self._embeddings.items()}
        condition = {"encoder_hidden_states": rows.pop("encoder_hidden_states")}
        return {**condition, "added_cond_kwargs": rows} if rows else condition

    @torch.no_grad()
    def encode(self, images: torch.Tensor, batch_size: int = 8) -> torch.Tensor:
        """Latents (N, C, h, w) float32 of images in [-1, 1]: the VAE's mode, scaled as the UNet knows them."""
        vae = self.pipeline.vae
        latents = [
            vae.encode(batch.to(vae.device, vae.dtype)).latent_dist.mode().float().cpu()
            for batch in images.split(batch_size)
        ]
        return torch.cat(latents) * vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, batch_size: int = 8) -> torch.Tensor:
        """Images (N, 3, H, W) float32 in [-1, 1] of latents."""
        vae = self.pipeline.vae
        latents = latents / vae.config.scaling_factor
        images = [vae.decode(batch.to(vae.device, vae.dtype)).sample.float() for batch in latents.split(batch_size)]
        return torch.cat(images).clamp(-1, 1)

    def to_best_device(self) -> "TextDenoiser":
        """Move UNet and VAE to a GPU where there is one; the text encoders have done their work. Returns self."""
        super().to_best_device()
        self.pipeline.vae.to(self.device)
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the complete pipeline, all in the UNet's dtype, as safetensors."""
        self.pipeline.unet = self.model
        self.pipeline.to(dtype=self.dtype)
        self.pipeline.save_pretrained(folder, safe_serialization=True)


def open_denoiser(name_or_path: str | Path, prompts: Sequence[str] = ()) -> Denoiser:
    """A :class:`TextDenoiser` of a text-to-image pipeline, a plain :class:`Denoiser` of anything else.

    Raises:
        ModelError: as theirs, or a pipeline of another family.
    """
    try:
        kind = DiffusionPipeline.load_config(str(name_or_path)).get("_class_name")
    except (OSError, ValueError):
        kind = None  # no pipeline: a bare UNet folder, or a name whose trouble the denoiser tells better
    if kind in FAMILIES:
        return TextDenoiser.from_pretrained(name_or_path, prompts)
    if kind is not None and not kind.startswith(("DDPM", "DDIM")):
        known = ", ".join(["DDPMPipeline", "DDIMPipeline", *FAMILIES])
        raise ModelError(f"{name_or_path}: a {kind}, which is not supported; known are {known}")
    return Denoiser.from_pretrained(name_or_path)
