"""At which timesteps is it decided what an image shows? A model trained without a digit beside the base model.

    python -m benchmarks.timesteps --digits 1 3 --data_dir <folder of mnist.npz>

Where the two denoise the digit's images alike, unlearning has nothing to change. One result for each digit, of the base
``mnist16`` and the real test images.
"""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.bases import BASES, DATA, BaseError
from benchmarks.experiment import RESULTS
from benchmarks.results import write_result
from benchmarks.run import code_version, environment
from vdu_peft.denoiser import Denoiser
from vdu_peft.image_losses import image_losses

NAME = "timesteps"
BASE = BASES["mnist16"]
TIMESTEPS = (20, 50, 100, 150, 200, 250, 300, 400, 500, 600, 700, 800, 900)


def loss_ratio(retrained: Denoiser, base: Denoiser, images: torch.Tensor, timestep: int) -> float:
    """Mean over images of the retrained model's denoising loss relative to the base's, at the same noise."""
    losses = [image_losses(model, images, [timestep], seed=timestep) for model in (retrained, base)]
    return (losses[0] / losses[1]).mean().item()


def measure(digit: int, num_images: int, data_dir: Path, commit: str) -> dict:
    base_model = BASE.digest_beside_retrained(digit)  # first: it says what is missing
    base, retrained = BASE.denoiser(), Denoiser.from_pretrained(BASE.retrained(digit)).to_best_device()
    real = BASE.images(digit, None, base, data_dir)
    forget = real.reference[real.reference_labels == digit][:num_images]
    retain = real.reference[real.reference_labels != digit][:num_images]
    return {
        "digit": digit,
        "num_images": num_images,
        "base_model": base_model,
        "ratios": {
            str(t): {"forget": loss_ratio(retrained, base, forget, t), "retain": loss_ratio(retrained, base, retain, t)}
            for t in TIMESTEPS
        },
        "environment": environment(commit),
    }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", nargs="+", type=int, default=[1, 3], choices=range(10))
    parser.add_argument("--num_images", type=int, default=500)
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    parser.add_argument("--data_dir", type=Path, default=DATA, help="real images of the base model's data set")
    args = parser.parse_args(argv)
    try:
        for digit in args.digits:
            record = measure(digit, args.num_images, args.data_dir, code_version())
            write_result(args.results_dir / NAME / f"{digit}.json", record)
    except BaseError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
