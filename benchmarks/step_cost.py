"""What a step costs, ours beside full-parameter VDU on as many images: wall time and peak memory, by network.

    python -m benchmarks.step_cost

Each way is a run of its own real trainer in a process of its own, in float32; the images are noise, for no step is
quicker or slower for what they show. The networks but the demo's have random weights. Results that are there are not
measured again.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel, UNet2DModel

from benchmarks.baselines.finetune import finetune
from benchmarks.baselines.vdu import objective_gradient, one_variance
from benchmarks.experiment import RESULTS
from benchmarks.memory import RELEASED, Prompted, Released
from benchmarks.processes import exit_code, in_processes
from benchmarks.results import write_result
from benchmarks.run import code_version, environment
from benchmarks.task import Task
from vdu_peft.config import UnlearnConfig
from vdu_peft.demo import base_denoiser, peak_memory_mib
from vdu_peft.denoiser import Denoiser
from vdu_peft.trainer import unlearn

NAME = "step-cost"


@dataclass(frozen=True)
class Case:
    """A network, and how many forget images a step of ours shows it; as many replay images come on top."""

    title: str
    denoiser: Callable[[], Denoiser]
    train_batch_size: int


def unconditional() -> Denoiser:
    """google/ddpm-cifar10-32, by its public config."""
    network = UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        flip_sin_to_cos=False,
        freq_shift=1,
        downsample_padding=0,
    )
    return Denoiser(network, DDPMScheduler())


def text_to_image(width: int) -> Denoiser:
    """Stable Diffusion 1.5's network, which is 320 wide, on the latents of 256 x 256 images."""
    whole = RELEASED[0]
    config = {**whole.config, "block_out_channels": (width, 2 * width, 4 * width, 4 * width)}
    narrow = Released(whole.name, whole.pipeline, whole.network, config, (4, 32, 32), whole.embeddings)
    return Prompted(UNet2DConditionModel(**config), narrow)


CASES = {
    "demo": Case("the demo's, 28 px", base_denoiser, 16),
    "cifar10": Case("google/ddpm-cifar10-32's, 32 px", unconditional, 4),
    "half-stable-diffusion": Case("Stable Diffusion 1.5's at half its width, 256 px", partial(text_to_image, 160), 1),
    # At its whole width full-parameter VDU takes more than 20 GiB.
    "most-of-stable-diffusion": Case("the same at 0.8 of it", partial(text_to_image, 256), 1),
}


def measure(name: str, way: str, steps: int, file: Path, commit: str) -> None:
    """Write what the steps of a run take; the first, which warms up, does not count."""
    case = CASES[name]
    denoiser = case.denoiser()
    parameters = sum(p.numel() for p in denoiser.model.parameters())
    ends: list[float] = []
    trained = WAYS[way](denoiser, case.train_batch_size, steps, lambda *_: ends.append(time.perf_counter()))
    record = {
        "network": case.title,
        "way": way,
        "images": 2 * case.train_batch_size,
        "model_parameters": parameters,
        "trained_parameters": trained,
        "step_seconds": median(end - start for start, end in zip(ends, ends[1:], strict=False)),
        "steps": steps,
        "peak_memory_mib": peak_memory_mib(),
        "environment": environment(commit),
    }
    write_result(file, record)


def ours(denoiser: Denoiser, train_batch_size: int, steps: int, callback: Callable) -> int:
    """:func:`~vdu_peft.trainer.unlearn` on given replay; returns how many parameters it trains."""
    conditional = bool(denoiser.num_classes)
    config = UnlearnConfig(
        train_batch_size=train_batch_size,
        max_train_steps=steps,
        **({"forget_class": 0, "anchor_class": 1} if conditional else {}),
    )
    # As many as need no variations.
    forget = torch.rand(UnlearnConfig.min_forget_images, *denoiser.latent_shape) * 2 - 1
    labels = torch.ones(len(forget), dtype=torch.int64) if conditional else None
    result = unlearn(denoiser, forget, config, replay=forget, replay_labels=labels, callback=callback)
    return result.trained_parameters


def vdu(denoiser: Denoiser, train_batch_size: int, steps: int, callback: Callable) -> int:
    """The isotropic baseline on forget images alone, as many a step as ours has forget and replay images."""
    forget = torch.rand(UnlearnConfig.min_forget_images, *denoiser.latent_shape) * 2 - 1
    task = Task(denoiser, forget, forget[:0], steps, 2 * train_batch_size, seed=0)
    gradient = objective_gradient(task, gamma=0.1, variance=one_variance(task, std=1e-3))
    return finetune(task, learning_rate=1e-6, gradient=gradient, callback=callback).trained_parameters


WAYS = {"ours": ours, "vdu": vdu}


def result_file(name: str, way: str, results: Path) -> Path:
    return results / NAME / f"{name}-{way}.json"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=8, help="of each run; the median of all but the first is told")
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    files = {(name, way): result_file(name, way, args.results_dir) for name, way in product(args.networks, WAYS)}
    missing = [(*key, args.steps, file, code_version()) for key, file in files.items() if not file.is_file()]
    return exit_code([file for _, _, _, file, _ in in_processes(measure, missing, jobs=1)])


if __name__ == "__main__":
    sys.exit(main())
