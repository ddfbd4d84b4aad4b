"""The denoising network as ONNX, for runtimes without torch."""

from importlib.util import find_spec
from pathlib import Path

import torch
from diffusers import UNet2DModel
from torch import nn

from vdu_peft.config import ConfigError
from vdu_peft.denoiser import Denoiser, ModelError

# Largest difference of an output, of unit variance, from torch's: sums in float32 of another order.
TOLERANCE = 1e-3


def check_onnx(denoiser: Denoiser) -> None:
    """Before any work.

    Raises:
        ConfigError: another network than a ``UNet2DModel``, or a library is missing.
    """
    if not isinstance(denoiser.model, UNet2DModel):
        raise ConfigError(f"onnx: written of a UNet2DModel, not of a {type(denoiser.model).__name__}; leave it out")
    for library in ("onnx", "onnxruntime", "onnxscript"):
        if find_spec(library) is None:
            raise ConfigError(f"onnx: needs {library}: pip install 'vdu-peft[onnx]'")


class _Network(nn.Module):
    """Tensors in, a tensor out."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, sample, timestep, class_labels=None):
        return self.unet(sample, timestep, class_labels=class_labels, return_dict=False)[0]


@torch.no_grad()
def write_onnx(denoiser: Denoiser, file: Path) -> None:
    """Write a float32 network of any batch size and run it once by onnxruntime, beside torch.

    Its inputs are ``sample`` (N, C, H, W) float32 and ``timestep`` (N,) int64, of a class-conditional model also
    ``class_labels`` (N,) int64; its output is ``out_sample``, what the model predicts.

    Raises:
        ModelError: onnxruntime gives something else than torch.
    """
    import onnxruntime

    dtype = denoiser.dtype
    network = _Network(denoiser.model.float())
    inputs = {
        "sample": torch.randn(3, *denoiser.latent_shape, generator=torch.Generator().manual_seed(0)),
        "timestep": torch.tensor([0, denoiser.num_train_timesteps // 2, denoiser.num_train_timesteps - 1]),
    }
    if denoiser.num_classes:
        inputs["class_labels"] = torch.arange(3) % denoiser.num_classes
    inputs = {name: value.to(denoiser.device) for name, value in inputs.items()}
    expected = network(**inputs)
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        network,
        kwargs=inputs,
        f=str(file),
        dynamo=True,
        dynamic_shapes={name: {0: batch} for name in inputs},
        input_names=list(inputs),
        output_names=["out_sample"],
        external_data=sum(p.numel() for p in network.parameters()) * 4 > 2**30,  # one file holds 2 GiB at most
        verbose=False,
    )
    denoiser.model.to(dtype)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for count in (3, 1):
        given = {name: value[:count].cpu().numpy() for name, value in inputs.items()}
        difference = (torch.from_numpy(session.run(None, given)[0]) - expected[:count].cpu()).abs().max().item()
        if not difference <= TOLERANCE:
            raise ModelError(f"{file.name}: onnxruntime's output differs from torch's by {difference:.1e}")
