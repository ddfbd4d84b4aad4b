"""Several digits at once: adapters put together, against learning them jointly or one after the other.

    python -m benchmarks.composition
    python -m benchmarks.composition --jobs 2 --dry_run

Every digit's own adapter is learned first. ``sum`` (PEFT's ``add_weighted_adapter``) and ``product`` (ours) put them
together; ``sequential`` learns each on the merged model of those before it; ``joint`` learns one adapter from all
images. A result that is there is not made again.
"""

import argparse
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import nn

from benchmarks.experiment import RESULTS
from benchmarks.judges import lenet
from benchmarks.results import kept_images, write_result
from benchmarks.run import code_version, environment
from vdu_peft.adapter import load_adapter, save_adapter
from vdu_peft.compose import compose
from vdu_peft.config import UnlearnConfig
from vdu_peft.demo import SAMPLE_STEPS, base_denoiser, demo_images, demo_judge, demo_samples
from vdu_peft.denoiser import Denoiser
from vdu_peft.metrics import class_shares, frechet_distance, pul
from vdu_peft.trainer import unlearn

NAME = "composition"
SETS = [(1, 7), (0, 4), (1, 4, 7)]


@dataclass(frozen=True)
class Part:
    """One model to make and measure."""

    way: str  # single, sum, product, sequential or joint
    digits: tuple[int, ...]

    @property
    def name(self) -> str:
        return "-".join([self.way, *map(str, self.digits)])


@dataclass(frozen=True)
class Setting:
    """What all parts share."""

    results: Path
    num_samples: int
    num_inference_steps: int
    config: UnlearnConfig
    commit: str
    threads: int

    def adapter(self, digit: int) -> Path:
        return self.results / "adapters" / str(digit)


def learn(model: nn.Module, digits: Sequence[int], setting: Setting, folder: Path | None = None) -> nn.Module:
    """The model with the digits' adapter merged in; ``folder`` gets the adapter."""
    denoiser = base_denoiser()
    denoiser.model = model
    forget = torch.cat([demo_images(digit, denoiser).forget for digit in digits])
    result = unlearn(denoiser, forget, setting.config)
    if folder is not None:
        save_adapter(result.model, folder)
    return result.model.merge_and_unload()


def single(model: nn.Module, digits: Sequence[int], setting: Setting) -> nn.Module:
    return learn(model, digits, setting, setting.adapter(digits[0]))


def joint(model: nn.Module, digits: Sequence[int], setting: Setting) -> nn.Module:
    return learn(model, digits, setting)


def sequential(model: nn.Module, digits: Sequence[int], setting: Setting) -> nn.Module:
    model = load_adapter(model, setting.adapter(digits[0])).merge_and_unload()
    for digit in digits[1:]:
        model = learn(model, [digit], setting)
    return model


def plain_sum(model: nn.Module, digits: Sequence[int], setting: Setting) -> nn.Module:
    peft_model = model
    names = [f"digit{digit}" for digit in digits]
    for name, digit in zip(names, digits, strict=True):
        peft_model = load_adapter(peft_model, setting.adapter(digit), name)
    # Concatenated factors: exactly the sum of the deltas.
    peft_model.add_weighted_adapter(names, [1.0] * len(names), "sum", combination_type="cat")
    peft_model.set_adapter("sum")
    return peft_model.merge_and_unload(adapter_names=["sum"])


def product(model: nn.Module, digits: Sequence[int], setting: Setting) -> nn.Module:
    folder = setting.results / "adapters" / "-".join(map(str, digits))
    compose(model, [setting.adapter(digit) for digit in digits], folder)
    return load_adapter(model, folder).merge_and_unload()


WAYS: dict[str, Callable[[nn.Module, Sequence[int], Setting], nn.Module]] = {
    "single": single,
    "sum": plain_sum,
    "product": product,
    "sequential": sequential,
    "joint": joint,
}


def samples(denoiser: Denoiser, setting: Setting) -> torch.Tensor:
    return demo_samples(denoiser, setting.num_samples, setting.config.seed, None, setting.num_inference_steps)


def base_samples(setting: Setting) -> torch.Tensor:
    """The base model's samples, drawn for the first part and kept for the others."""
    name = f"base-{setting.num_samples}-{setting.num_inference_steps}-{setting.config.seed}.safetensors"
    return kept_images(setting.results / "adapters" / name, lambda: samples(base_denoiser(), setting))


def measure(part: Part, setting: Setting) -> None:
    """Make one part and write its result."""
    torch.set_num_threads(setting.threads)
    denoiser, judge = base_denoiser(), demo_judge()
    before = base_samples(setting)
    denoiser.model = WAYS[part.way](denoiser.model, part.digits, setting)
    after = samples(denoiser, setting)
    images = demo_images(part.digits[0], denoiser)
    real, _ = judge.judge(images.reference)
    retained = real[~torch.isin(images.reference_labels, torch.tensor(part.digits))]
    (features_before, labels_before), (features_after, labels_after) = judge.judge(before), judge.judge(after)
    labels = {"demo judge": (labels_before, labels_after), "lenet": (lenet(before), lenet(after))}
    shares = {name: [class_shares(ls, 10) for ls in pair] for name, pair in labels.items()}
    record = {
        "part": asdict(part),
        "config": asdict(setting.config),
        "num_samples": setting.num_samples,
        "sampler": f"DDIM, {setting.num_inference_steps} steps, seed {setting.config.seed + 1}",
        "pul": {
            name: {str(d): pul(was[d].item(), now[d].item()) for d in part.digits}
            for name, (was, now) in shares.items()
        },
        "fid_before": frechet_distance(features_before, real),
        "u_fid_before": frechet_distance(features_before, retained),
        "u_fid_after": frechet_distance(features_after, retained),
        "environment": environment(setting.commit),
    }
    file = setting.results / f"{part.name}.json"
    write_result(file, record)


def missing(sets: Sequence[tuple[int, ...]], setting: Setting) -> tuple[list[Part], list[Part]]:
    """What is to be made: first the singles, which the others are put together from, and then the others."""

    def has_result(part: Part) -> bool:
        return (setting.results / f"{part.name}.json").is_file()

    others = [part for digits in sets for way in WAYS if way != "single" and not has_result(part := Part(way, digits))]
    needed = {digit for part in others for digit in part.digits}
    singles = [Part("single", (digit,)) for digit in dict.fromkeys(digit for digits in sets for digit in digits)]
    # Adapters are not committed: a result may be there without its own.
    return [
        part
        for part in singles
        if not has_result(part) or (part.digits[0] in needed and not setting.adapter(part.digits[0]).is_dir())
    ], others


def run_all(sets: Sequence[tuple[int, ...]], setting: Setting, jobs: int) -> None:
    setting.results.mkdir(parents=True, exist_ok=True)
    singles, others = missing(sets, setting)
    if singles or others:
        base_samples(setting)  # here, or every process would draw its own
    for parts in (singles, others):
        # A process for each: torch keeps the threads that it started with.
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
            for _ in pool.map(measure, parts, [setting] * len(parts)):
                pass


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_samples", type=int, default=1000)
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    parser.add_argument("--jobs", type=int, default=1, help="parts at a time; the cores are shared out among them")
    parser.add_argument("--dry_run", action="store_true", help="list the missing parts and end")
    args = parser.parse_args(argv)
    threads = max(1, torch.get_num_threads() // args.jobs)
    setting = Setting(args.results_dir / NAME, args.num_samples, SAMPLE_STEPS, UnlearnConfig(), code_version(), threads)
    if args.dry_run:
        singles, others = missing(SETS, setting)
        print("\n".join(part.name for part in [*singles, *others]))
    else:
        run_all(SETS, setting, args.jobs)


if __name__ == "__main__":
    main()
