"""What the benchmarks of single digits share: the demo model's adapters and samples, made once, and their figures."""

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn

from benchmarks.bases import DEMO
from benchmarks.experiment import RESULTS
from benchmarks.judges import lenet
from benchmarks.results import kept_images
from benchmarks.run import code_version
from vdu_peft.adapter import save_adapter
from vdu_peft.config import UnlearnConfig
from vdu_peft.demo import SAMPLE_STEPS, base_denoiser, demo_images, demo_judge, demo_samples
from vdu_peft.denoiser import Denoiser, best_device
from vdu_peft.metrics import class_shares, frechet_distance, pul
from vdu_peft.precision import quick_precision
from vdu_peft.trainer import unlearn


@dataclass(frozen=True)
class Setting:
    """What all parts of a benchmark share."""

    results: Path
    num_samples: int
    num_inference_steps: int
    config: UnlearnConfig
    commit: str
    threads: int

    @property
    def cache(self) -> Path:
        """Of adapters and samples, shared between benchmarks; another base model or other options have another."""
        key = hashlib.sha256((DEMO.digest + repr(self.config)).encode()).hexdigest()[:8]
        return self.results.parent / "digits-cache" / key

    @property
    def sampler(self) -> str:
        return f"DDIM, {self.num_inference_steps} steps, seed {self.config.seed + 1}"

    def adapter(self, digit: int) -> Path:
        return self.cache / str(digit)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num_samples", type=int, default=1000)
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    parser.add_argument("--jobs", type=int, default=1, help="parts at a time; the cores are shared out among them")
    parser.add_argument("--dry_run", action="store_true", help="list what is missing and end")


def setting_of(args: argparse.Namespace, name: str) -> Setting:
    """The demo's defaults, measured as the arguments tell."""
    threads = max(1, torch.get_num_threads() // args.jobs)
    config = UnlearnConfig(mixed_precision=quick_precision(best_device()))  # as the demo
    config = config.filled(None)  # so that results and the cache's key tell what None stands for
    return Setting(args.results_dir / name, args.num_samples, SAMPLE_STEPS, config, code_version(), threads)


def learn(model: nn.Module, digits: Sequence[int], config: UnlearnConfig, folder: Path | None = None) -> nn.Module:
    """The model with the digits' adapter merged in; ``folder`` gets the adapter, and the commit that learned it."""
    denoiser = base_denoiser()
    denoiser.model = model
    forget = torch.cat([demo_images(digit, denoiser).forget for digit in digits])
    result = unlearn(denoiser, forget, config)
    if folder is not None:
        save_adapter(result.model, folder)
        (folder / "commit").write_text(code_version())
    return result.model.merge_and_unload()


def samples(denoiser: Denoiser, setting: Setting) -> torch.Tensor:
    return demo_samples(denoiser, setting.num_samples, setting.config.seed, None, setting.num_inference_steps)


def base_samples(setting: Setting) -> torch.Tensor:
    """The base model's samples, drawn for the first who asks and kept for the others."""
    name = f"base-{setting.num_samples}-{setting.num_inference_steps}.safetensors"
    return kept_images(setting.cache / name, lambda: samples(base_denoiser(), setting))


@cache
def real_features() -> tuple[torch.Tensor, torch.Tensor]:
    """The demo judge's features of the real test images of all digits (N, F), and their labels (N,)."""
    images = demo_images(0, base_denoiser())
    return demo_judge().judge(images.reference)[0], images.reference_labels


def figures(before: torch.Tensor, after: torch.Tensor, digits: Sequence[int]) -> dict:
    """How far the digits are forgotten, and the distance to real images of the others.

    Args:
        before, after: samples of the base and of the unlearned model, (N, 1, 28, 28) in [-1, 1].
    """
    judge, (real, real_labels) = demo_judge(), real_features()
    retained = real[~torch.isin(real_labels, torch.tensor(digits))]
    (features_before, labels_before), (features_after, labels_after) = judge.judge(before), judge.judge(after)
    labels = {"demo judge": (labels_before, labels_after), "lenet": (lenet(before), lenet(after))}
    shares = {name: [class_shares(ls, 10) for ls in pair] for name, pair in labels.items()}
    return {
        "pul": {
            name: {str(d): pul(was[d].item(), now[d].item()) for d in digits} for name, (was, now) in shares.items()
        },
        "fid_before": frechet_distance(features_before, real),
        "u_fid_before": frechet_distance(features_before, retained),
        "u_fid_after": frechet_distance(features_after, retained),
    }
