"""Run the demo for several digits and hold it against its bars; digits that have a report already are not run again.

    python -m benchmarks.demo_digits --output_dir demo-digits --num_samples 1000

The base model's samples are the same for every digit and are drawn once. On two cores, two processes of one thread each
(``OMP_NUM_THREADS=1``, ``--digits 0 1 2 3 4`` and ``--digits 5 6 7 8 9``, after one run with ``--digits`` alone to draw
the base's samples) take three quarters of the time of one.
"""

import argparse
import json
from pathlib import Path
from statistics import mean

from safetensors.torch import load_file, save_file

from vdu_peft.config import UnlearnConfig
from vdu_peft.demo import base_denoiser, demo_samples, run_demo


def summary(reports: list[dict]) -> list[str]:
    """Markdown rows: one per digit, then the mean and the worst."""
    rows = [
        "| digit | share before | share after | PUL | base FID | u-FID after | ratio | least kept |",
        "|---" * 8 + "|",
    ]
    ratios, kept = [], []
    for report in reports:
        pairs = zip(report["histogram_before"], report["histogram_after"], strict=True)
        kept.append(min(a / b for d, (b, a) in enumerate(pairs) if d != report["forget_class"] and b > 0))
        ratios.append(report["u_fid_after"] / report["fid_before"])
        rows.append(
            f"| {report['forget_class']} | {report['share_before']:.1%} | {report['share_after']:.1%} "
            f"| {report['pul']:.1f} | {report['fid_before']:.1f} | {report['u_fid_after']:.1f} "
            f"| {ratios[-1]:.2f} | {kept[-1]:.2f} |"
        )
    puls = [report["pul"] for report in reports]
    rows.append(f"| mean | | | {mean(puls):.1f} | | | {mean(ratios):.2f} | |")
    rows.append(f"| worst | | | {min(puls):.1f} | | | {max(ratios):.2f} | {min(kept):.2f} |")
    return rows


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--digits", type=int, nargs="*", default=list(range(10)))
    parser.add_argument("--num_samples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    before_file = args.output_dir / f"before-{args.num_samples}-{args.seed}.safetensors"
    if not before_file.is_file():
        args.output_dir.mkdir(parents=True, exist_ok=True)
        before = demo_samples(base_denoiser(), args.num_samples, args.seed, "samples before")
        save_file({"images": before}, before_file)
    before = load_file(before_file)["images"]
    files = [args.output_dir / f"{d}-{args.num_samples}-{args.seed}" / "report.json" for d in args.digits]
    for digit, file in zip(args.digits, files, strict=True):
        if not file.is_file():
            run_demo(digit, file.parent, UnlearnConfig(seed=args.seed), {}, args.num_samples, before)
    if files:
        print("\n".join(summary([json.loads(file.read_text()) for file in files])))


if __name__ == "__main__":
    main()
