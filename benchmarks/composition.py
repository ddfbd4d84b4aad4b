"""Several digits at once: adapters put together, against learning them jointly or one after the other.

    python -m benchmarks.composition
    python -m benchmarks.composition --ways sum product --seeds 0 1 2 --jobs 2 --dry_run

Every digit's own adapter is learned first. ``sum`` (all merged by PEFT) and ``product`` (ours) put them
together; ``sequential`` learns each on the merged model of those before it; ``joint`` learns one adapter from all
images. A result that is there is not made again.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from benchmarks.bases import DEMO
from benchmarks.digits import Setting, add_arguments, base_samples, figures, learn, samples, setting_of
from benchmarks.processes import exit_code, in_processes
from benchmarks.results import StaleResultError, has_result, write_result
from benchmarks.run import environment
from vdu_peft.adapter import load_adapter
from vdu_peft.compose import compose
from vdu_peft.demo import base_denoiser

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


def single(model: nn.Module, digits: Sequence[int], setting: Setting) -> nn.Module:
    return learn(model, digits, setting.config, setting.adapter(digits[0]))


def joint(model: nn.Module, digits: Sequence[int], setting: Setting) -> nn.Module:
    return learn(model, digits, setting.config)


def sequential(model: nn.Module, digits: Sequence[int], setting: Setting) -> nn.Module:
    model = load_adapter(model, setting.adapter(digits[0])).merge_and_unload()
    for digit in digits[1:]:
        model = learn(model, [digit], setting.config)
    return model


def plain_sum(model: nn.Module, digits: Sequence[int], setting: Setting) -> nn.Module:
    peft_model = model
    names = [f"digit{digit}" for digit in digits]
    for name, digit in zip(names, digits, strict=True):
        peft_model = load_adapter(peft_model, setting.adapter(digit), name)
    return peft_model.merge_and_unload(adapter_names=names)


def product(model: nn.Module, digits: Sequence[int], setting: Setting) -> nn.Module:
    folder = setting.cache / "-".join(map(str, digits))
    compose(model, [setting.adapter(digit) for digit in digits], folder)
    return load_adapter(model, folder).merge_and_unload()


WAYS: dict[str, Callable[[nn.Module, Sequence[int], Setting], nn.Module]] = {
    "single": single,
    "sum": plain_sum,
    "product": product,
    "sequential": sequential,
    "joint": joint,
}


def measure(part: Part, setting: Setting) -> None:
    """Make one part and write its result."""
    torch.set_num_threads(setting.threads)
    denoiser = base_denoiser()
    before = base_samples(setting)
    denoiser.model = WAYS[part.way](denoiser.model, part.digits, setting)
    record = {
        "part": asdict(part),
        "base_model": DEMO.digest,
        "config": asdict(setting.config),
        "num_samples": setting.num_samples,
        "sampler": setting.sampler,
        **figures(before, samples(denoiser, setting), part.digits),
        "environment": environment(setting.commit),
    }
    write_result(result_file(part, setting), record)


def result_file(part: Part, setting: Setting) -> Path:
    return setting.results / f"{part.name}-seed{setting.config.seed}.json"


def missing(sets: Sequence[tuple[int, ...]], ways: Sequence[str], setting: Setting) -> tuple[list[Part], list[Part]]:
    """What is to be made: first the singles, which the others are put together from, and then the others."""

    def is_made(part: Part) -> bool:
        return has_result(result_file(part, setting), DEMO.digest)

    others = [part for digits in sets for way in ways if not is_made(part := Part(way, digits))]
    needed = {digit for part in others for digit in part.digits}
    singles = [Part("single", (digit,)) for digit in dict.fromkeys(digit for digits in sets for digit in digits)]
    # Adapters are not committed: a result may be there without its own.
    return [
        part
        for part in singles
        if not is_made(part) or (part.digits[0] in needed and not setting.adapter(part.digits[0]).is_dir())
    ], others


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    together = [way for way in WAYS if way != "single"]
    parser.add_argument("--ways", nargs="+", choices=together, default=together, help="how digits are put together")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of unlearning; samples have the next one")
    add_arguments(parser)
    args = parser.parse_args(argv)
    defaults = setting_of(args, NAME)
    settings = [replace(defaults, config=replace(defaults.config, seed=seed)) for seed in args.seeds]
    try:
        todo = [(setting, *missing(SETS, args.ways, setting)) for setting in settings]
    except StaleResultError as error:
        parser.error(str(error))
    failed = []
    for setting, singles, others in todo:
        if args.dry_run:
            print("".join(f"{result_file(part, setting).stem}\n" for part in [*singles, *others]), end="")
        elif singles or others:
            base_samples(setting)  # here, or every process would draw its own
            for parts in (singles, others):
                failed += in_processes(measure, [(part, setting) for part in parts], args.jobs)
    return exit_code([result_file(part, setting) for part, setting in failed])


if __name__ == "__main__":
    sys.exit(main())
