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

# By name: importing them loads transformers, which takes seconds and says so on every command. Each with its stock
# guidance: without guidance their samples are no examples of what to retain.
FAMILIES = {"StableDiffusionPipeline": 7.5, "StableDiffusionXLPipeline": 5.0}
# Prompts that go through the text encoders at a time.
PROMPT_BATCH_SIZE = 32


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

    batch_size = 4

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
        if "beta_schedule" not in pipeline.scheduler.config or getattr(vae.config, "latents_mean", None) is not None:
            raise ModelError(
                f"{type(pipeline).__name__} with {type(pipeline.scheduler).__name__}: noise schedules without betas, "
                "and latents with a mean of their own, are not supported"
            )
        # A latent is no pixel: samplers must not clip it, whatever the scheduler's default is.
        scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
        size, factor = unet.config.sample_size, pipeline.vae_scale_factor
        height, width = (size, size) if isinstance(size, int) else size
        super().__init__(unet, scheduler, image_size=(height * factor, width * factor), channels=vae.config.in_channels)
        self.guidance_scale = FAMILIES[type(pipeline).__name__]
        self.pipeline = pipeline
        if vae.config.force_upcast:
            vae.float()  # SDXL's overflows in float16
        self.latent_shape = (unet.config.in_channels, height, width)
        self.prompts = list(dict.fromkeys([*prompts, ""]))
        self.num_classes = len(self.prompts)
        self.null_label = self.label("")
        self._embeddings = self._encode_prompts()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        prompts: Sequence[str],
        torch_dtype: torch.dtype = torch.float32,
        whole: bool = False,
    ) -> "TextDenoiser":
        """Load a pipeline folder or a hub id; safetensors only.

        Args:
            whole: with its safety checker, which judges samples, has no part in what is learned and takes a gigabyte.

        Raises:
            ModelError: nothing there, no safetensors weights, or a family that is not supported.
        """
        try:
            folder = Path(name_or_path)
            if not folder.is_dir():
                folder = Path(DiffusionPipeline.download(str(name_or_path), use_safetensors=True))
            kind = DiffusionPipeline.load_config(str(folder)).get("_class_name")
            checker = {"safety_checker": None, "requires_safety_checker": False}
            pipeline = DiffusionPipeline.from_pretrained(
                str(folder),
                torch_dtype=torch_dtype,
                use_safetensors=True,
                **(checker if kind == "StableDiffusionPipeline" and not whole else {}),
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
        xl = type(self.pipeline).__name__ == "StableDiffusionXLPipeline"
        rows = []
        for start in range(0, self.num_classes, PROMPT_BATCH_SIZE):
            encoded = self.pipeline.encode_prompt(
                self.prompts[start : start + PROMPT_BATCH_SIZE],
                device=self.pipeline.text_encoder.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
            )
            rows.append((encoded[0].cpu(), encoded[2].cpu()) if xl else (encoded[0].cpu(),))
        names = ("encoder_hidden_states", "text_embeds")
        embeddings = {name: torch.cat(parts) for name, parts in zip(names, zip(*rows, strict=True), strict=False)}
        if xl:
            if self.pipeline.config.force_zeros_for_empty_prompt:
                for table in embeddings.values():
                    table[self.null_label] = 0  # what the stock pipeline guides away from
            height, width = self.image_size
            time_ids = self.pipeline._get_add_time_ids(
                (height, width),
                (0, 0),
                (height, width),
                dtype=embeddings["text_embeds"].dtype,
                text_encoder_projection_dim=self.pipeline.text_encoder_2.config.projection_dim,
            )
            embeddings["time_ids"] = time_ids.expand(self.num_classes, -1).cpu()
        return embeddings

    def condition(self, class_labels: torch.Tensor) -> dict:
        """The UNet's keyword arguments for labels (N,) int64 of :attr:`prompts`."""
        labels = class_labels.cpu()
        rows = {name: table[labels].to(class_labels.device, self.dtype) for name, table in self._embeddings.items()}
        condition = {"encoder_hidden_states": rows.pop("encoder_hidden_states")}
        return {**condition, "added_cond_kwargs": rows} if rows else condition

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Latents (N, C, h, w) float32 of images in [-1, 1]: the VAE's mode, scaled as the UNet knows them.

        Raises:
            ModelError: the VAE gives what is not finite, as some do in float16.
        """
        vae = self.pipeline.vae.to(self.device)
        # One at a time: at SDXL's size eight would take 20 GiB.
        latents = torch.cat(
            [vae.encode(x[None].to(vae.device, vae.dtype)).latent_dist.mode().float().cpu() for x in images]
        )
        if not latents.isfinite().all():
            raise ModelError(f"{self.name}: its VAE gives NaN or infinite latents in {vae.dtype}; load it in float32")
        return latents * vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) float32 in [-1, 1] of latents."""
        vae = self.pipeline.vae.to(self.device)
        latents = (latents / vae.config.scaling_factor).to(vae.device, vae.dtype)
        return torch.cat([vae.decode(z[None]).sample.float() for z in latents]).clamp(-1, 1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the complete pipeline, all in the UNet's dtype, as safetensors."""
        self.pipeline.unet = self.model
        self.pipeline.to(dtype=self.dtype)
        self.pipeline.save_pretrained(folder, safe_serialization=True)


def open_denoiser(
    name_or_path: str | Path,
    prompts: Sequence[str] = (),
    torch_dtype: torch.dtype = torch.float32,
    whole: bool = False,
) -> Denoiser:
    """A :class:`TextDenoiser` of a text-to-image pipeline, a plain :class:`Denoiser` of anything else.

    Args:
        torch_dtype, whole: of a text-to-image pipeline, see :meth:`TextDenoiser.from_pretrained`.

    Raises:
        ModelError: as theirs, or a pipeline of another family.
    """
    try:
        kind = DiffusionPipeline.load_config(str(name_or_path)).get("_class_name")
    except (OSError, ValueError):
        kind = None  # no pipeline: a bare UNet folder, or a name whose trouble the denoiser tells better
    if kind in FAMILIES:
        return TextDenoiser.from_pretrained(name_or_path, prompts, torch_dtype, whole)
    if kind is not None and not kind.startswith(("DDPM", "DDIM")):
        known = ", ".join(["DDPMPipeline", "DDIMPipeline", *FAMILIES])
        raise ModelError(f"{name_or_path}: a {kind}, which is not supported; known are {known}")
    return Denoiser.from_pretrained(name_or_path)
