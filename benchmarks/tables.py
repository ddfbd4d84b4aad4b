"""Write benchmarks/README.md and the frontier plots from the results.

python -m benchmarks.tables
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median

from benchmarks.experiment import EXPERIMENTS, RESULTS, Experiment, ExperimentError, read_experiment

# Of a grid the best is what forgets most among those that keep u-FID below this multiple of the base's FID, or, when
# none does, the one with the lowest u-FID.
USABLE_RATIO = 2.0

INTRODUCTION = """\
# Benchmarks

Written by `python -m benchmarks.tables` from `benchmarks/results/`, which `python -m benchmarks.run` fills from
`benchmarks/experiments/`. Each result tells its options, seed, commit, versions, machine and times. These are our own
figures on a small model; they reproduce no table of any paper.

Base model, images and feature network are the demo's (`vdu_peft/assets/mnist`): an unconditional MNIST DDPM of 1.8 M
parameters, 100 images of each forgotten digit. PUL is the relative drop in the share of samples that a judge calls the
digit: by LeNet-5, which we did not train, and by the demo's judge. The ratio is u-FID after unlearning (demo judge's
features, against 2,700 real test images of the other digits) over the base model's FID against all ten digits: 1 is no
loss of quality. "Least kept" is the smallest share of a retained digit after unlearning relative to before.
Precision and recall are of the samples against the same real images.
"""


def load_results(experiment: Experiment, results: Path) -> list[dict]:
    """The records of the experiment's runs that are there, in the experiment's order."""
    files = [run.result_file(results) for run in experiment.runs]
    return [json.loads(file.read_text()) for file in files if file.is_file()]


def ratio(record: dict) -> float:
    return record["report"]["u_fid_after"] / record["report"]["fid_before"]


def least_kept(record: dict) -> float:
    """Smallest share after over share before among the retained classes."""
    report = record["report"]
    pairs = zip(report["histogram_before"], report["histogram_after"], strict=True)
    return min(after / before for c, (before, after) in enumerate(pairs) if c != record["forget_class"] and before > 0)


COLUMNS: dict[str, tuple[Callable[[dict], float], str]] = {
    "PUL, LeNet": (lambda r: r["lenet"]["pul"], "{:.1f}"),
    "PUL, demo judge": (lambda r: r["report"]["pul"], "{:.1f}"),
    "u-FID": (lambda r: r["report"]["u_fid_after"], "{:.1f}"),
    "ratio": (ratio, "{:.2f}"),
    "precision": (lambda r: r["report"]["precision"], "{:.2f}"),
    "recall": (lambda r: r["report"]["recall"], "{:.2f}"),
    "least kept": (least_kept, "{:.2f}"),
}


def class_table(records: list[dict]) -> list[str]:
    """One row per run, then the mean and the worst of each column; for an experiment of one method."""
    rows = [
        "| class | seed | share before | after | " + " | ".join(COLUMNS) + " | outcome |",
        "|---" * (len(COLUMNS) + 5) + "|",
    ]
    for record in records:
        cells = [form.format(value(record)) for value, form in COLUMNS.values()]
        shares = [f"{record['lenet'][name]:.1%}" for name in ("share_before", "share_after")]
        first = [str(record["forget_class"]), str(record["seed"]), *shares]
        rows.append("| " + " | ".join([*first, *cells, record["status"]]) + " |")
    for title, pick in (("mean", lambda values, _: mean(values)), ("worst", _worst)):
        cells = [form.format(pick([value(r) for r in records], name)) for name, (value, form) in COLUMNS.items()]
        rows.append(f"| {title} | | | | " + " | ".join(cells) + " | |")
    return rows


def _worst(values: list[float], column: str) -> float:
    return max(values) if column in ("u-FID", "ratio") else min(values)


def entry_means(records: list[dict]) -> dict[str, list[dict]]:
    """Records by label, in their order."""
    by_label: dict[str, list[dict]] = {}
    for record in records:
        by_label.setdefault(record["label"], []).append(record)
    return by_label


def best_of_groups(by_label: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """Of every group of labels the best, see USABLE_RATIO."""

    def rank(records: list[dict]) -> tuple:
        worst, forgotten = mean(map(ratio, records)), mean(r["lenet"]["pul"] for r in records)
        return (True, forgotten) if worst <= USABLE_RATIO else (False, -worst)

    groups: dict[str, list[str]] = {}
    for label, records in by_label.items():
        groups.setdefault(records[0]["group"], []).append(label)
    best = [max(labels, key=lambda label: rank(by_label[label])) for labels in groups.values()]
    return {label: by_label[label] for label in best}


def method_table(by_label: dict[str, list[dict]], best: set[str]) -> list[str]:
    """One row per entry, means over its runs, the best of each grid bold."""
    rows = [
        "| entry | sees | runs | " + " | ".join(COLUMNS) + " | trained | s/step | peak MiB | outcome |",
        "|---" * (len(COLUMNS) + 7) + "|",
    ]
    for label, records in by_label.items():
        cells = [form.format(mean(value(r) for r in records)) for value, form in COLUMNS.values()]
        name = f"**{label}**" if label in best else label
        steps = [r["training_seconds"] / r["steps"] for r in records if r["steps"]]
        cost = [
            f"{records[0]['trained_parameters']:,}",
            f"{median(steps):.2f}" if steps else "",
            f"{median(r['peak_memory_mib'] for r in records):,.0f}",
            ", ".join(sorted({r["status"] for r in records})),
        ]
        rows.append("| " + " | ".join([name, records[0]["sees"], str(len(records)), *cells, *cost]) + " |")
    return rows


def frontier_plot(by_label: dict[str, list[dict]], file: Path) -> None:
    """PUL against the u-FID ratio: better is up and left."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for label, records in by_label.items():
        x, y = mean(map(ratio, records)), mean(r["lenet"]["pul"] for r in records)
        axes.plot(x, y, "o", color="tab:red" if records[0]["method"] == "vdu_peft" else "tab:blue")
        axes.annotate(label, (x, y), textcoords="offset points", xytext=(4, 3), fontsize=7)
    axes.set(xscale="log", xlabel="u-FID after / FID of the base (log)", ylabel="PUL by LeNet-5 (%)")
    figure.savefig(file, dpi=100)


def relearning_tables(experiment: Experiment, by_label: dict[str, list[dict]]) -> list[str]:
    """One table per way of fine-tuning: the class's share of samples as it goes on, means over the runs."""
    lines = []
    for number, options in enumerate(experiment.relearning):
        lines += [
            f"Relearning: all parameters fine-tuned on {options.num_images} {options.source} images (Adam, learning "
            f"rate {options.learning_rate:g}, batch {experiment.train_batch_size}); the class's share of "
            f"{options.num_samples} samples by LeNet-5. The base model's share is "
            f"{mean(r['lenet']['share_before'] for rs in by_label.values() for r in rs):.1%}.",
            "",
            "| entry | before | " + " | ".join(f"{step} steps" for step in options.steps) + " |",
            "|---" * (len(options.steps) + 2) + "|",
        ]
        for label, records in by_label.items():
            shares = [[r["lenet"]["share_after"], *r["relearning"][number]["shares"]] for r in records]
            cells = [f"{mean(column):.1%}" for column in zip(*shares, strict=True)]
            lines.append("| " + " | ".join([label, *cells]) + " |")
        lines.append("")
    return lines


def section(experiment: Experiment, records: list[dict], folder: Path) -> list[str]:
    """One experiment: how it was run, its table, and its frontier when it compares methods."""
    environments = sorted({(r["environment"]["commit"][:12], r["environment"]["machine"]) for r in records})
    threads = sorted({r["environment"]["threads"] for r in records})
    versions = records[-1]["environment"]["versions"]
    lines = [
        f"## {experiment.title}",
        "",
        f"`python -m benchmarks.run {experiment.name}`: {len(records)} of {len(experiment.runs)} runs; seeds "
        f"{', '.join(map(str, experiment.seeds))}; {experiment.num_forget_images} forget images, at most "
        f"{experiment.max_train_steps} steps of batch {experiment.train_batch_size} + {experiment.train_batch_size}; "
        f"{experiment.num_samples} samples, {records[0]['sampler'].rsplit(',', 1)[0]}; commit "
        f"{', '.join(commit for commit, _ in environments)}; {environments[0][1]}, "
        f"{', '.join(map(str, threads))} thread(s) a run; torch {versions['torch']}, "
        f"diffusers {versions['diffusers']}.",
        "",
    ]
    by_label = entry_means(records)
    if len(experiment.entries) == 1:
        return [*lines, *class_table(records), "", *relearning_tables(experiment, by_label)]
    best = best_of_groups(by_label)
    frontier_plot(best, folder / f"{experiment.name}.png")
    lines += [
        f"Bold is the best of its grid: the highest PUL at a ratio of at most {USABLE_RATIO:g}, or else the lowest "
        "ratio. The plot shows the bold ones.",
        "",
        *method_table(by_label, set(best)),
        "",
        f"![PUL against u-FID]({experiment.name}.png)",
        "",
    ]
    return [*lines, *relearning_tables(experiment, by_label)]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments_dir", type=Path, default=EXPERIMENTS)
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    parser.add_argument("--output_dir", type=Path, default=EXPERIMENTS.parent)
    args = parser.parse_args(argv)
    lines = [INTRODUCTION]
    try:
        for file in sorted(args.experiments_dir.glob("*.json")):
            experiment = read_experiment(file)
            records = load_results(experiment, args.results_dir)
            if records:
                lines += section(experiment, records, args.output_dir)
    except ExperimentError as error:
        print(error, file=sys.stderr)
        return 2
    (args.output_dir / "README.md").write_text("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
