"""Run the experiments' missing runs; each writes one self-describing result.

    python -m benchmarks.run                     # every experiment
    python -m benchmarks.run mnist-digits        # one
    python -m benchmarks.run mnist-digits --jobs 2 --dry_run

A run that has its result is not run again, so an interrupted experiment goes on where it stopped. Every run is a
process of its own, so that its peak memory is its own. On two CPU cores ``--jobs 2``, one thread each, is faster in all
than one job after the other; times of a run are then those of a single thread.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch
from accelerate.utils import set_seed

from benchmarks.bases import BASES, DATA, Base, BaseError
from benchmarks.experiment import EXPERIMENTS, RESULTS, Experiment, ExperimentError, Run, read_experiment
from benchmarks.methods import METHODS
from benchmarks.processes import exit_code, in_processes
from benchmarks.relearning import relearn
from benchmarks.results import StaleResultError, has_result, kept_images, write_result
from benchmarks.task import Task
from vdu_peft.demo import SAMPLE_STEPS, demo_samples, peak_memory_mib
from vdu_peft.evaluation import evaluate, held_out_loss_gap
from vdu_peft.metrics import pul, pul_interval
from vdu_peft.pictures import labelled_grids


def run(item: Run, results: Path, data_dir: Path, threads: int, commit: str) -> None:
    """Forget, sample, judge, write the result and a picture beside it; in a process of its own."""
    torch.set_num_threads(threads)
    experiment, base = item.experiment, item.base
    denoiser, judge = base.denoiser(), base.judge()
    images = base.images(item.forget_class, item.num_forget_images, denoiser, data_dir)
    before = before_images(item, results)
    task = Task(
        denoiser,
        images.forget,
        images.retain,
        experiment.max_train_steps,
        experiment.train_batch_size,
        item.seed,
        base.retrained(item.forget_class),
        lambda images: judge.judge(base.as_judged(images))[1],
    )
    held_out = (images.reference, images.reference_labels, item.forget_class, item.seed + 1)
    gap_before = held_out_loss_gap(denoiser, *held_out)
    set_seed(item.seed)
    start = time.process_time()
    outcome = METHODS[item.entry.method](task, **item.entry.options)
    cpu_seconds, peak_mib = time.process_time() - start, peak_memory_mib()
    after = demo_samples(denoiser, experiment.num_samples, item.seed, None)
    gaps = (gap_before, held_out_loss_gap(denoiser, *held_out))
    judged_before, judged_after, reference = map(base.as_judged, (before, after, images.reference))
    report = evaluate(judged_before, judged_after, judge, item.forget_class, reference, images.reference_labels, gaps)
    record = {
        "spec": item.spec,
        "base_model": item.base_model,
        "sampler": f"DDIM, {SAMPLE_STEPS} steps, seed {item.seed + 1}",
        **outcome._asdict(),
        "cpu_seconds": cpu_seconds,
        "peak_memory_mib": peak_mib,
        "report": asdict(report),
        "headline": headline(base, judged_before, judged_after, item.forget_class),
        "relearning": [
            {**asdict(options), "shares": relearn(task, options, item.forget_class, base)}
            for options in experiment.relearning
        ],
        "environment": environment(commit),
    }
    file = item.result_file(results)
    file.parent.mkdir(parents=True, exist_ok=True)
    labelled_grids({"before": before[:50], item.name: after[:50]}).save(file.with_suffix(".png"))
    write_result(file, record)


def headline(base: Base, before: torch.Tensor, after: torch.Tensor, forget_class: int) -> dict:
    """Shares and PUL by the base's headline judge."""
    counts = [int((base.headline(images) == forget_class).sum()) for images in (before, after)]
    shares = [count / len(images) for count, images in zip(counts, (before, after), strict=True)]
    return {
        "share_before": shares[0],
        "share_after": shares[1],
        "pul": pul(*shares),
        "pul_interval": pul_interval(*counts, len(before), len(after)),
    }


def before_images(item: Run, results: Path) -> torch.Tensor:
    """The base model's samples, drawn once for all runs of the same number and seed."""
    # Another base model has other samples.
    file = results / f"before-{item.base.digest}-{item.experiment.num_samples}-{item.seed}.safetensors"
    return kept_images(
        file, lambda: demo_samples(item.base.denoiser(), item.experiment.num_samples, item.seed, "base samples")
    )


def is_missing(item: Run, results: Path) -> bool:
    """Whether it is still to be run; raises where there is a result of other options or of another base model."""
    return item.load(results) is None or not has_result(item.result_file(results), item.base_model)


def has_base(experiment: Experiment) -> bool:
    """Whether its base model is there, which not every one is before it is trained; where it is not, that is said."""
    try:
        _ = BASES[experiment.base].digest
    except BaseError as error:
        print(f"{experiment.name} is left out: {error}", file=sys.stderr)
        return False
    return True


def check_files(items: list[Run], data_dir: Path) -> None:
    """Whether the real images and retrained models that the runs need are there.

    Raises:
        BaseError: they are not.
    """
    for item in items:
        _ = item.base_model  # raises where weights are missing
        if item.base.data is not None:
            item.base.file(data_dir)


def code_version() -> str:
    """The commit, and ``-changed`` where the code that runs is not that of the commit."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", "vdu_peft", "benchmarks/*.py")
    return git("rev-parse", "--short=12", "HEAD") + ("-changed" if changed else "")


def environment(commit: str) -> dict:
    """What the figures depend on besides the experiment: commit, versions, machine."""
    return {
        "commit": commit,
        "versions": {name: metadata.version(name) for name in ("vdu-peft", "torch", "diffusers", "peft", "accelerate")},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
    }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help="experiments, by file name; all when none is given")
    parser.add_argument("--experiments_dir", type=Path, default=EXPERIMENTS)
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    parser.add_argument("--data_dir", type=Path, default=DATA, help="real images of the base models' data sets")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; the cores are shared out among them")
    parser.add_argument("--dry_run", action="store_true", help="list the missing runs and end")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, not {args.jobs}")
    names = args.names or sorted(file.stem for file in args.experiments_dir.glob("*.json"))
    try:
        experiments = [read_experiment(args.experiments_dir / f"{name}.json") for name in names]
        if not args.names:
            experiments = [experiment for experiment in experiments if has_base(experiment)]
        missing = [item for e in experiments for item in e.runs if is_missing(item, args.results_dir)]
        check_files(missing, args.data_dir)
    except (ExperimentError, StaleResultError, BaseError) as error:
        print(error, file=sys.stderr)
        return 2
    if args.dry_run:
        print("\n".join(f"{item.experiment.name}/{item.name}" for item in missing))
        return 0
    for item in missing:
        before_images(item, args.results_dir)  # here, or every process would draw its own
    # The commit is read once: what is committed while they run is not what they run.
    shared = (args.results_dir, args.data_dir, max(1, torch.get_num_threads() // args.jobs), code_version())
    failed = in_processes(run, [(item, *shared) for item in missing], args.jobs)
    return exit_code([item.result_file(args.results_dir) for item, *_ in failed])


if __name__ == "__main__":
    sys.exit(main())
