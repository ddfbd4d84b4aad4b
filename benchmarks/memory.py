"""How much memory a step of unlearning takes on the large models, counted without weights or a GPU.

    python -m benchmarks.memory

The real networks run a real step on fake tensors, which have shapes and lifetimes but no data; every storage is
counted while it lives. What is not counted: the allocator's fragments, the libraries' workspaces, and the CUDA context,
together about a gigabyte. VAE and text encoders are not there: they have done their work by then and are on the CPU.
Before that the VAE encodes one image at a time beside the network, which the last column counts.
"""

import argparse
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vdu_peft.adapter import attach, total_kl
from vdu_peft.batch import Batch
from vdu_peft.config import UnlearnConfig, VDUConfig
from vdu_peft.contexts import posterior_noise
from vdu_peft.denoiser import Denoiser
from vdu_peft.families import FAMILIES
from vdu_peft.terms import loss_terms

GIB = 2**30


@dataclass(frozen=True)
class Released:
    """A released network by its public config, and the shapes of what it is told of a prompt."""

    name: str
    pipeline: str
    network: type[nn.Module]
    config: dict
    latent_shape: tuple[int, int, int]
    embeddings: dict[str, tuple[int, ...]]


RELEASED = (
    Released(
        "Stable Diffusion 1.5, 512 px",
        "StableDiffusionPipeline",
        UNet2DConditionModel,
        {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        (4, 64, 64),
        {"encoder_hidden_states": (77, 768)},
    ),
    Released(
        "SDXL, 1024 px",
        "StableDiffusionXLPipeline",
        UNet2DConditionModel,
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        (4, 128, 128),
        {"encoder_hidden_states": (77, 2048), "text_embeds": (1280,), "time_ids": (6,)},
    ),
    Released(
        "Stable Diffusion 3 medium, 1024 px",
        "StableDiffusion3Pipeline",
        SD3Transformer2DModel,
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
        (16, 128, 128),
        {"encoder_hidden_states": (333, 4096), "pooled_projections": (2048,)},
    ),
    Released(
        "Flux.1 dev, 512 px",
        "FluxPipeline",
        FluxTransformer2DModel,
        {"guidance_embeds": True},
        (16, 64, 64),
        {"encoder_hidden_states": (512, 4096), "pooled_projections": (768,)},
    ),
    Released(
        "Flux.1 dev, 1024 px",
        "FluxPipeline",
        FluxTransformer2DModel,
        {"guidance_embeds": True},
        (16, 128, 128),
        {"encoder_hidden_states": (512, 4096), "pooled_projections": (768,)},
    ),
)
# Of all of them, but for the latents' channels.
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}


class Prompted(Denoiser):
    """A text-to-image network whose prompts' embeddings are given."""

    def __init__(self, model: nn.Module, released: Released):
        self.family = FAMILIES[released.pipeline]
        scheduler = FlowMatchEulerDiscreteScheduler() if self.family.component == "transformer" else DDPMScheduler()
        channels, *size = released.latent_shape
        super().__init__(model, scheduler, image_size=tuple(size), channels=channels)
        self.embeddings, self.num_classes = released.embeddings, 2

    def _predict(self, x_t, timesteps, class_labels, model):
        rows = {n: torch.zeros(len(x_t), *shape, dtype=self.dtype) for n, shape in self.embeddings.items()}
        return self.family.predict(model, x_t.to(self.dtype), timesteps, rows, self.family.guidance_scale).float()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make while they live, and their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Leave out storages that were there before, until they go: another may then have their address."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.known.add(storage._cdata)
            weakref.finalize(storage, self.known.discard, storage._cdata)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.known:
            return
        self.known.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, nbytes: int) -> None:
        self.known.discard(key)
        self.now -= nbytes


def step_bytes(released: Released, train_batch_size: int, gradient_checkpointing: bool) -> tuple[int, int, int]:
    """(bytes of the frozen bfloat16 network, of the adapter with gradients and Adam's moments, peak of a step)."""
    with torch.device("meta"):
        model = released.network(**released.config).to(torch.bfloat16).requires_grad_(False)
        attach(model, VDUConfig.for_model(model))
    if gradient_checkpointing:
        model.enable_gradient_checkpointing()
    model.train()
    denoiser = Prompted(model, released)
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:  # the noise schedule is real
        # From meta to fake tensors of a real device: attention on meta would be counted with all its weights.
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.is_meta:
                        fresh = torch.empty(tensor.shape, dtype=torch.float32 if tensor.requires_grad else tensor.dtype)
                        kept = isinstance(tensor, nn.Parameter)
                        tensors[name] = nn.Parameter(fresh, tensor.requires_grad) if kept else fresh
        frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=1e-4)
        count = 2 * train_batch_size  # forget images and as many of replay
        latents = torch.zeros(count, *denoiser.latent_shape)
        labels = torch.zeros(count, dtype=torch.int64)
        batch = Batch(latents, latents.clone(), labels + 500, labels, labels[:train_batch_size])
        accelerator = Accelerator(mixed_precision="bf16", cpu=True)
        live.peak = live.now
        with posterior_noise(model):
            terms = loss_terms(denoiser, model, batch, UnlearnConfig().filled("text"), accelerator)
            loss = terms["plasticity"] + terms["redirect"] + terms["stability"] + total_kl(model)
            loss.backward()
        optimizer.step()
        trained = sum(p.numel() * p.element_size() for p in parameters) * 4
        return frozen, trained, live.peak


def encode_bytes(latent_shape: tuple[int, int, int]) -> int:
    """Peak of the VAE while it encodes one image, its weights included; in float32, ``force_upcast``'s default."""
    channels, height, width = latent_shape
    with FakeTensorMode(), LiveBytes() as live, torch.no_grad():
        vae = AutoencoderKL(**VAE, latent_channels=channels)
        vae.encode(torch.empty(1, 3, 8 * height, 8 * width)).latent_dist.mode()
        return live.peak


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_batch_size", type=int, nargs="+", default=[1])
    args = parser.parse_args(argv)
    names = ["frozen network", "adapter, gradient, Adam", "peak of a step", "network and VAE, encoding"]
    print("| model | forget + replay images | checkpointing | " + " | ".join(names) + " |")
    print("|---" * 7 + "|")
    for released in RELEASED:
        for size in args.train_batch_size:
            for checkpointing in (True, False):
                counts = step_bytes(released, size, checkpointing)
                encoding = counts[0] + encode_bytes(released.latent_shape)
                cells = [f"{number / GIB:.2f} GiB" for number in (*counts, encoding)]
                images, yes = f"{size} + {size}", "yes" if checkpointing else "no"
                print("| " + " | ".join([released.name, images, yes, *cells]) + " |", flush=True)


if __name__ == "__main__":
    main()
