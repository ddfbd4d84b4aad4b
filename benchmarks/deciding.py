"""Up to how much noise does an image keep its class? Noised to a timestep, and drawn again by the base model.

    python -m benchmarks.deciding --base cifar10 --classes 4 8 --data_dir <folder of cifar10_1k_per_class.npz>

Beside it, the timesteps at which a run shows its forget images by default. One result for each base and class; of
forget images as runs have them, by the headline's judge.
"""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.bases import BASES, DATA, Base, BaseError
from benchmarks.experiment import RESULTS
from benchmarks.results import write_result
from benchmarks.run import code_version, environment
from vdu_peft.batch import SPREAD_IMAGES, forget_timesteps, widest_deviation
from vdu_peft.config import UnlearnConfig
from vdu_peft.demo import SAMPLE_STEPS
from vdu_peft.replay import draw_replay, replay_seeds

NAME = "deciding"
# Every so many of the sampler's steps an image is noised to where that step starts.
EVERY = 2


def measure(base: Base, forget_class: int, own: torch.Tensor, data_dir: Path) -> dict:
    """One class's result.

    Args:
        own: the base model's samples, as its denoiser encodes them.
    """
    denoiser = base.denoiser()
    images = base.images(forget_class, 100, denoiser, data_dir).forget

    def share(images: torch.Tensor) -> float:
        return (base.headline(base.as_judged(images)) == forget_class).double().mean().item()

    config = UnlearnConfig().filled(None)
    timesteps = denoiser.schedule.sampler(SAMPLE_STEPS, denoiser.device).timesteps.tolist()[::-EVERY]
    kept = {t: denoiser.vary(images, t, seed=0, num_inference_steps=SAMPLE_STEPS) for t in timesteps}
    return {
        "deviation": widest_deviation(own),
        "shown_at": forget_timesteps(config, denoiser, own, conditional=False),
        "base_share": share(denoiser.decode(own)),
        "kept": {timestep: share(denoiser.decode(drawn)) for timestep, drawn in kept.items()},
    }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=sorted(BASES), default="mnist16")
    parser.add_argument("--classes", nargs="+", type=int, default=[1, 3], choices=range(10))
    parser.add_argument("--num_samples", type=int, default=SPREAD_IMAGES, help="of the base model's own")
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    parser.add_argument("--data_dir", type=Path, default=DATA, help="real images of the base model's data set")
    args = parser.parse_args(argv)
    base = BASES[args.base]
    try:
        if base.data is not None:
            base.file(args.data_dir)
        denoiser, seeds = base.denoiser(), replay_seeds(0, args.num_samples)
        own = draw_replay(denoiser, seeds, num_inference_steps=SAMPLE_STEPS, progress="own samples")
        for forget_class in args.classes:
            record = {
                "base": args.base,
                "base_model": base.digest,
                "class": forget_class,
                "num_samples": args.num_samples,
                "sampler": f"DDIM, {SAMPLE_STEPS} steps",
                **measure(base, forget_class, own, args.data_dir),
                "environment": environment(code_version()),
            }
            write_result(args.results_dir / NAME / f"{args.base}-{forget_class}.json", record)
    except BaseError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
