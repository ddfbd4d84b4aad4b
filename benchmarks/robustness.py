"""How far does forgetting reach? The adapter at other scales than 1, and merged into weights of fewer bits.

    python -m benchmarks.robustness --jobs 2

Learns the digit's adapter, or takes the one that ``benchmarks.composition`` has learned with the same options. One
result for each digit; digits that have one are not measured again.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from benchmarks.bases import DEMO
from benchmarks.digits import Setting, add_arguments, base_samples, figures, learn, samples, setting_of
from benchmarks.processes import exit_code, in_processes
from benchmarks.results import StaleResultError, has_result, write_result
from benchmarks.run import environment
from vdu_peft.adapter import load_adapter
from vdu_peft.contexts import adapter_scale
from vdu_peft.demo import base_denoiser

NAME = "robustness"
SCALES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def rounded_to_int8(weight: torch.Tensor) -> torch.Tensor:
    """The nearest of 255 values, symmetric and scaled by output channel: int8 weights, computed with in float32."""
    step = weight.abs().flatten(1).amax(1).clamp_min(torch.finfo(weight.dtype).tiny) / 127
    zero = torch.zeros_like(step, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, step, zero, 0, -127, 127)


ROUNDINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "float16": lambda weight: weight.half().float(),
    "int8": rounded_to_int8,
}


def rounded(model: nn.Module, rounding: str) -> nn.Module:
    """The model with the weights of its linear and convolution layers rounded, in place."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.weight.data = ROUNDINGS[rounding](module.weight.data)
    return model


def measure(digit: int, setting: Setting) -> None:
    """All states of one digit's model; writes its result."""
    torch.set_num_threads(setting.threads)
    if not setting.adapter(digit).is_dir():
        learn(base_denoiser().model, [digit], setting.config, setting.adapter(digit))
    before = base_samples(setting)
    denoiser = base_denoiser()
    base = denoiser.model
    states = {}
    for rounding in ROUNDINGS:
        denoiser.model = rounded(base_denoiser().model, rounding)
        states[f"base, {rounding}"] = figures(before, samples(denoiser, setting), [digit])
        merged = load_adapter(base_denoiser().model, setting.adapter(digit)).merge_and_unload()
        denoiser.model = rounded(merged, rounding)
        states[f"merged, {rounding}"] = figures(before, samples(denoiser, setting), [digit])
    denoiser.model = load_adapter(base, setting.adapter(digit)).get_base_model()
    for scale in SCALES:
        with adapter_scale(denoiser.model, scale):
            states[f"scale {scale:g}"] = figures(before, samples(denoiser, setting), [digit])
    record = {
        "digit": digit,
        "base_model": DEMO.digest,
        "config": asdict(setting.config),
        "num_samples": setting.num_samples,
        "sampler": setting.sampler,
        "states": states,
        "adapter_commit": (setting.adapter(digit) / "commit").read_text(),
        "environment": environment(setting.commit),
    }
    write_result(result_file(digit, setting.results), record)


def result_file(digit: int, results: Path) -> Path:
    return results / f"{digit}.json"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", nargs="+", type=int, default=[1, 7], choices=range(10))
    add_arguments(parser)
    args = parser.parse_args(argv)
    setting = setting_of(args, NAME)
    try:
        missing = [digit for digit in args.digits if not has_result(result_file(digit, setting.results), DEMO.digest)]
    except StaleResultError as error:
        parser.error(str(error))
    if args.dry_run:
        print("\n".join(map(str, missing)))
    elif missing:
        base_samples(setting)  # here, or every process would draw its own
        failed = in_processes(measure, [(digit, setting) for digit in missing], args.jobs)
        return exit_code([result_file(digit, setting.results) for digit, _ in failed])
    return 0


if __name__ == "__main__":
    sys.exit(main())
