"""Text-to-image models behind the denoiser's contract: the prompts in use are the classes.

A prompt's embedding is computed once; from then on it is a label like any other, so that forgetting under a prompt,
redirecting it to an anchor and retaining the rest is the very code that class-conditional models use.
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from torch import nn

from vdu_peft.denoiser import Denoiser, ModelError
from vdu_peft.families import FAMILIES
from vdu_peft.first_line import first_line
from vdu_peft.model_folder import PIPELINES, stored_dtype
from vdu_peft.schedule import NoiseSchedule


class TextDenoiser(Denoiser):
    """Stable Diffusion 1.x and 2.x (epsilon, v), SDXL, Stable Diffusion 3.x and Flux, on latents.

    Args:
        pipeline: a diffusers pipeline of one of :data:`~vdu_peft.families.FAMILIES`; its VAE and text encoders are
            used once for what is encoded, never trained.
        prompts: all prompts that will be asked for; the empty one, which stands for no condition, is added.
        resolution: height and width of the images; the model's own when None.

    Raises:
        ModelError: another family, a network with inputs besides the latents (inpainting, depth), or a resolution
            that the network cannot work at.
    """

    condition = "text"

    def __init__(self, pipeline: DiffusionPipeline, prompts: Sequence[str], resolution: int | None = None):
        if type(pipeline).__name__ not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise ModelError(
                f"{type(pipeline).__name__}: not a text-to-image family that is supported; known are {known}"
            )
        self.family = FAMILIES[type(pipeline).__name__]
        network, vae = getattr(pipeline, self.family.component), pipeline.vae
        latent_shape, factor = self.family.latent_shape(pipeline), pipeline.vae_scale_factor
        granularity = self.family.granularity(pipeline)
        if resolution is not None:
            if resolution < 1 or resolution % (factor * granularity):
                raise ModelError(f"resolution must be a multiple of {factor * granularity}, not {resolution}")
            latent_shape = (latent_shape[0], resolution // factor, resolution // factor)
            places = network.config.get("pos_embed_max_size")  # of Stable Diffusion 3
            if places is not None and latent_shape[1] // granularity > places:
                raise ModelError(f"resolution must be at most {places * granularity * factor}, not {resolution}")
        if latent_shape[0] != vae.config.latent_channels:
            raise ModelError(
                f"the {self.family.component} takes {latent_shape[0]} channels, the VAE gives "
                f"{vae.config.latent_channels}: inpainting and other image-conditioned models are not supported"
            )
        if getattr(vae.config, "latents_mean", None) is not None:
            raise ModelError(f"{type(pipeline).__name__}: latents with a mean of their own are not supported")
        tokens = latent_shape[1] * latent_shape[2] // granularity**2
        super().__init__(
            network,
            NoiseSchedule(pipeline.scheduler, tokens, self.family.even_sigmas, latent=True),
            image_size=(latent_shape[1] * factor, latent_shape[2] * factor),
            channels=vae.config.in_channels,
        )
        self.batch_size = 4
        self.component = self.family.component
        self.guidance_scale = self.family.guidance_scale
        self.pipeline = pipeline
        self.latent_shape = latent_shape
        self.prompts = list(dict.fromkeys([*prompts, ""]))
        self.num_classes = len(self.prompts)
        self.null_label = self.label("")
        with torch.no_grad():
            self.embeddings = self.family.encode_prompts(pipeline, self.prompts, self.image_size)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        prompts: Sequence[str],
        dtype: torch.dtype = torch.float32,
        whole: bool = False,
        resolution: int | None = None,
    ) -> "TextDenoiser":
        """Load a pipeline folder or a hub id; safetensors only, of the ``fp16`` variant where there are no others.

        Args:
            resolution: height and width of the images; the model's own when None.
            whole: to be written again: with its safety checker, which judges samples, has no part in what is learned
                and takes a gigabyte; and all but the network in the dtype it is kept in.

        Raises:
            ModelError: nothing there, no safetensors weights, or a family that is not supported.
        """
        try:
            folder = Path(name_or_path)
            if not folder.is_dir():
                folder = _download(str(name_or_path))
            kind = pipeline_kind(folder)
            checker = {"safety_checker": None, "requires_safety_checker": False}
            dtypes, variant = dtype, _variant(folder.iterdir())
            if whole and kind in FAMILIES:
                parts = {file.parent for file in folder.glob("*/*.safetensors")}
                dtypes = {part.name: stored_dtype(part, variant) for part in parts}
                dtypes |= {FAMILIES[kind].component: dtype, "default": dtype}
            pipeline = DiffusionPipeline.from_pretrained(
                str(folder),
                dtype=dtypes,
                use_safetensors=True,
                variant=variant,
                **(checker if kind == "StableDiffusionPipeline" and not whole else {}),
            )
        except (OSError, ValueError, RuntimeError, AttributeError) as error:
            message = f"{name_or_path}: cannot be loaded as a text-to-image pipeline ({first_line(error)})"
            raise ModelError(message) from error
        denoiser = cls(pipeline, prompts, resolution)
        denoiser.name = folder.resolve().name if Path(name_or_path).is_dir() else str(name_or_path)
        denoiser.stored_dtype = stored_dtype(folder / denoiser.component, variant)
        return denoiser

    def label(self, prompt: str) -> int:
        """The label that stands for a prompt.

        Raises:
            ModelError: the prompt is not among those that the denoiser was made with.
        """
        if prompt not in self.prompts:
            raise ModelError(f"prompt {prompt!r} is not among those the model was loaded with")
        return self.prompts.index(prompt)

    def _predict(self, x_t, timesteps, class_labels, model, guidance_scale: float | None = None) -> torch.Tensor:
        labels = class_labels.cpu()
        rows = {name: table[labels].to(x_t.device, self.dtype) for name, table in self.embeddings.items()}
        if not self.model.config.get("guidance_embeds"):
            guidance_scale = None
        elif guidance_scale is None:
            guidance_scale = self.guidance_scale
        return self.family.predict(model, x_t.to(self.dtype), timesteps, rows, guidance_scale).float()

    def guided_prediction(self, x_t, timesteps, class_labels, guidance_scale: float) -> torch.Tensor:
        if self.family.distilled:
            return self._predict(x_t, timesteps, class_labels, self.model, guidance_scale)
        return super().guided_prediction(x_t, timesteps, class_labels, guidance_scale)

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Latents (N, C, h, w) float32 of images in [-1, 1]: the VAE's mode, scaled as the network knows them.

        Raises:
            ModelError: the VAE gives what is not finite, as some do in float16.
        """
        with self._vae() as vae:
            # One at a time: at SDXL's size eight would take 20 GiB.
            dtype = vae.dtype
            latents = torch.cat(
                [vae.encode(x[None].to(vae.device, dtype)).latent_dist.mode().float().cpu() for x in images]
            )
        if not latents.isfinite().all():
            mend = "look whether its weights are whole" if dtype == torch.float32 else "load it in float32"
            raise ModelError(f"{self.name}: its VAE gives NaN or infinite latents in {dtype}; {mend}")
        return (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) float32 in [-1, 1] of latents."""
        with self._vae() as vae:
            latents = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)
            latents = latents.to(vae.device, vae.dtype)
            return torch.cat([vae.decode(z[None]).sample.float() for z in latents]).clamp(-1, 1)

    @contextmanager
    def _vae(self):
        """The VAE beside the network; then back where and as it was, for it is idle while the adapter learns.

        In float32 where its config asks for it (``force_upcast``): SDXL's overflows in float16.
        """
        vae = self.pipeline.vae
        home, stored = vae.device, vae.dtype
        try:
            # diffusers' own ``to`` warns of nothing whenever there is a dtype.
            yield nn.Module.to(vae, self.device, torch.float32 if vae.config.force_upcast else stored)
        finally:
            nn.Module.to(vae, home, stored)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the complete pipeline, each part in its own dtype, as safetensors.

        Raises:
            ModelError: the network carries an adapter.
        """
        self._refuse_adapted()
        self.pipeline.register_modules(**{self.component: self.model})
        self.pipeline.save_pretrained(folder, safe_serialization=True)


def _download(repo_id: str) -> Path:
    """A hub pipeline's files; those of the fp16 variant where there are no others."""
    try:
        return Path(DiffusionPipeline.download(repo_id, use_safetensors=True))
    except OSError as error:
        try:
            return Path(DiffusionPipeline.download(repo_id, use_safetensors=True, variant="fp16"))
        except (OSError, ValueError):
            raise error from None


def _variant(components: Iterable[Path]) -> str | None:
    """``fp16`` if one of these folders has no other weights, see the ``variant`` of diffusers."""
    for component in components:
        names = [file.name for file in component.glob("*.safetensors")]
        if names and all(".fp16" in name for name in names):
            return "fp16"
    return None


def pipeline_kind(name_or_path: str | Path) -> str | None:
    """The class name of a diffusers pipeline, folder or hub id, by its config alone.

    None for no pipeline: a bare UNet folder, or a name whose trouble the denoiser tells better.
    """
    try:
        kind = DiffusionPipeline.load_config(str(name_or_path)).get("_class_name")
    except (OSError, ValueError):
        return None
    return kind[-1] if isinstance(kind, list) else kind  # of custom code: its file, and its class


def open_denoiser(
    name_or_path: str | Path,
    prompts: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    whole: bool = False,
    resolution: int | None = None,
    guidance_scale: float | None = None,
) -> Denoiser:
    """A :class:`TextDenoiser` of a text-to-image pipeline, a plain :class:`Denoiser` of anything else.

    Args:
        dtype, whole, resolution: of a text-to-image pipeline, see :meth:`TextDenoiser.from_pretrained`.
        guidance_scale: what a text-to-image pipeline is sampled with; the stock pipeline's when None.

    Raises:
        ModelError: as theirs, a pipeline of another family, or a resolution or guidance for another kind.
    """
    if guidance_scale is not None and not 0 <= guidance_scale < math.inf:
        raise ModelError(f"guidance_scale must be a number from 0, not {guidance_scale}")
    kind = pipeline_kind(name_or_path)
    if kind in FAMILIES:
        denoiser = TextDenoiser.from_pretrained(name_or_path, prompts, dtype, whole, resolution)
        if guidance_scale is not None:
            denoiser.guidance_scale = guidance_scale
        return denoiser
    if kind is not None and kind not in PIPELINES:
        known = ", ".join([*PIPELINES, *FAMILIES])
        raise ModelError(f"{name_or_path}: a {kind}, which is not supported; known are {known}")
    denoiser = Denoiser.from_pretrained(name_or_path)  # first: a model that is not there is no matter of options
    for name, value in {"resolution": resolution, "guidance_scale": guidance_scale}.items():
        if value is not None:
            raise ModelError(f"{name}: {name_or_path} is not a text-to-image model; leave it out")
    return denoiser


def open_network(name_or_path: str | Path) -> tuple[nn.Module, str]:
    """(the network that is adapted, the model's name): of a text-to-image pipeline it alone, in the dtype it is kept
    in, which of a large one is a small part of what :func:`open_denoiser` takes.

    Raises:
        ModelError: as :func:`open_denoiser`.
    """
    kind = pipeline_kind(name_or_path)
    if kind not in FAMILIES:
        denoiser = open_denoiser(name_or_path)
        return denoiser.model, denoiser.name
    component, local = FAMILIES[kind].component, Path(name_or_path).is_dir()
    try:
        patterns = ["*.json", f"{component}/*.safetensors"]
        folder = Path(name_or_path) if local else Path(snapshot_download(str(name_or_path), allow_patterns=patterns))
        class_name = DiffusionPipeline.load_config(str(folder))[component][-1]
        if not any((folder / component).glob("*.safetensors")):
            raise OSError(f"no .safetensors file in {component}")
        variant = _variant([folder / component])
        network = getattr(diffusers, class_name).from_pretrained(
            str(folder / component),
            dtype=stored_dtype(folder / component, variant),
            use_safetensors=True,
            variant=variant,
        )
    except (OSError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        message = f"{name_or_path}: cannot be loaded as a text-to-image pipeline ({first_line(error)})"
        raise ModelError(message) from error
    return network.eval(), folder.resolve().name if local else str(name_or_path)
