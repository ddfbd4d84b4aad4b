"""The demo: forget one digit of the MNIST model that ships with the package, and report what it cost."""

import sys
import time
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from vdu_peft.config import UnlearnConfig, VDUConfig
from vdu_peft.denoiser import Denoiser, plain_attention_on_cpu
from vdu_peft.evaluation import Report, evaluate, held_out_loss_gap
from vdu_peft.history import loss_plot
from vdu_peft.judge import Judge
from vdu_peft.pixels import to_tensor
from vdu_peft.trainer import UnlearnResult, check_run, unlearn

SAMPLE_STEPS = 25


def assets() -> Path:
    """Folder of the demo's model, judge and images."""
    return Path(str(resources.files("vdu_peft") / "assets" / "mnist"))


def base_denoiser() -> Denoiser:
    """The demo's base model, on a GPU where there is one."""
    denoiser = Denoiser.from_pretrained(assets() / "ddpm").to_best_device()
    plain_attention_on_cpu(denoiser.model)
    return denoiser


class DemoImages(NamedTuple):
    """The demo's real images, (N, 1, 28, 28) in [-1, 1]: 100 training images per digit, 300 test images per digit."""

    forget: torch.Tensor
    retain: torch.Tensor  # of the other digits; unlearning does not see them
    reference: torch.Tensor
    reference_labels: torch.Tensor


def demo_images(forget_digit: int, denoiser: Denoiser) -> DemoImages:
    """The images of a run that forgets this digit, as the denoiser takes them."""
    arrays = np.load(assets() / "images.npz")

    def tensors(images: np.ndarray) -> torch.Tensor:
        return torch.stack([to_tensor(image, denoiser.image_size, denoiser.channels) for image in images])

    is_forget = arrays["forget_labels"] == forget_digit
    return DemoImages(
        tensors(arrays["forget_images"][is_forget]),
        tensors(arrays["forget_images"][~is_forget]),
        tensors(arrays["reference_images"]),
        torch.from_numpy(arrays["reference_labels"]),
    )


def demo_judge() -> Judge:
    return Judge.from_file(assets() / "judge.safetensors")


def demo_samples(
    denoiser: Denoiser, num_samples: int, seed: int, progress: str | None, num_inference_steps: int = SAMPLE_STEPS
) -> torch.Tensor:
    """Samples for the report of a run with this seed, of the same starting noise before and after."""
    # Evaluation's seed differs from training's.
    return denoiser.sample(num_samples, seed=seed + 1, num_inference_steps=num_inference_steps, progress=progress)


def run_demo(
    forget_digit: int,
    output_dir: Path,
    config: UnlearnConfig,
    adapter_options: dict,
    num_samples: int,
    num_inference_steps: int = SAMPLE_STEPS,
) -> tuple[UnlearnResult, Report]:
    """Unlearn a digit from its 100 images; writes adapter/, report.json and the pictures."""
    start = time.perf_counter()
    denoiser = base_denoiser()
    adapter = VDUConfig.for_model(denoiser.model, **adapter_options)
    check_run(denoiser, config, adapter, output_dir)  # not after a minute of sampling
    images = demo_images(forget_digit, denoiser)
    before = demo_samples(denoiser, num_samples, config.seed, "samples before", num_inference_steps)
    held_out = (images.reference, images.reference_labels, forget_digit, config.seed + 1)
    gap_before = held_out_loss_gap(denoiser, *held_out)
    unlearning_start = time.perf_counter()
    result = unlearn(denoiser, images.forget, config, adapter, output_dir=output_dir)
    unlearning_seconds = time.perf_counter() - unlearning_start
    after = demo_samples(denoiser, num_samples, config.seed, "samples after", num_inference_steps)

    gaps = (gap_before, held_out_loss_gap(denoiser, *held_out))
    report = evaluate(before, after, demo_judge(), forget_digit, images.reference, images.reference_labels, gaps)
    loss_plot(result.history, output_dir / "loss.png")
    model_parameters = sum(p.numel() for p in denoiser.model.parameters()) - result.trained_parameters
    report.save(
        output_dir,
        {"before": before, f"after forgetting {forget_digit}": after},
        status=result.status,
        strength=result.strength and asdict(result.strength),
        steps=len(result.history),
        forget_images=len(images.forget),
        replay_images=result.num_replay,
        trained_parameters=result.trained_parameters,
        model_parameters=model_parameters,
        adapter_bytes=(output_dir / "adapter" / "adapter_model.safetensors").stat().st_size,
        unlearning_seconds=round(unlearning_seconds, 1),
        total_seconds=round(time.perf_counter() - start, 1),
        peak_memory_mib=round(peak_memory_mib()),
        sampler=f"DDIM, {num_inference_steps} steps, seed {config.seed + 1}",
        config=asdict(config.filled(denoiser.condition)),
        adapter={"r": adapter.r, "prior_scale": adapter.prior_scale, "init_scale": adapter.init_scale},
    )
    return result, report


def peak_memory_mib() -> float:
    """Peak resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.is_file():  # on Linux, where getrusage's peak is inherited from the parent process
        fields = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        return int(fields["VmHWM"].split()[0]) / 2**10
    if sys.platform == "win32":
        import psutil  # which accelerate brings along

        return psutil.Process().memory_info().peak_wset / 2**20
    import resource  # not there on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
