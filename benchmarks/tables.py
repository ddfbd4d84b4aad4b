"""Write benchmarks/README.md and the frontier plots from the results.

python -m benchmarks.tables
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median

from benchmarks.adapter_cost import NAME as ADAPTER_COST
from benchmarks.bases import BASES, Base
from benchmarks.composition import NAME as COMPOSITION
from benchmarks.experiment import EXPERIMENTS, RESULTS, Entry, Experiment, ExperimentError, read_experiment
from benchmarks.results import provenance
from benchmarks.robustness import NAME as ROBUSTNESS
from benchmarks.text.attacks import NAME as ATTACKS
from benchmarks.text.run import NAME as TEXT
from benchmarks.text.tables import attack_section, text_section
from benchmarks.timesteps import NAME as TIMESTEPS
from vdu_peft.metrics import pul_interval

# Of a grid the best is what forgets most among those that keep u-FID below this multiple of the base's FID, or, when
# none does, the one with the lowest u-FID.
USABLE_RATIO = 2.0

INTRODUCTION = """\
# Benchmarks

Written by `python -m benchmarks.tables` from `benchmarks/results/`, which `python -m benchmarks.run` fills from
`benchmarks/experiments/`. Each result tells its options, seed, commit, versions, machine and times. These are our own
figures on small models; they reproduce no table of any paper.

Base `mnist` is the demo's model with its images (`vdu_peft/assets/mnist`): an unconditional MNIST DDPM of 1.8 M
parameters, 2,700 real test images of the other digits for u-FID. Base `mnist16` is the same network at 16 x 16, which
takes a third of the time, with all of MNIST's images; the judges see its samples and the real images at 28 x 28, by
bicubic interpolation ([models](models/README.md)). PUL is the relative drop in the share of samples that a judge calls
the digit: by LeNet-5, which we did not train, and by the demo's judge. The ratio is u-FID after unlearning (demo
judge's features) over the base model's FID against all ten digits. It counts both what is not forgotten and what
quality it cost: of digits the untouched base is near 2, a model that lost the digit and nothing else near 1. Base
`cifar10` is a small unconditional DDPM of CIFAR-10, in color at 32 x 32, so far from real images that its own ratio is
near 1; shares and features are a ResNet-20's, which we did not train, and FIDs are against 2,000 real test images.
"Least kept" is the smallest share of a retained class after unlearning relative to before. "Over retrained" is u-FID
over that of the same model trained without the class. Precision and recall are of the samples against the same real
images; retained TV is the total variation between the other classes' proportions before and after.
"""


def load_results(experiment: Experiment, results: Path) -> list[dict]:
    """The records of the experiment's runs that are there, in the experiment's order."""
    return [record for run in experiment.runs if (record := run.load(results)) is not None]


def ratio(record: dict) -> float:
    return record["report"]["u_fid_after"] / record["report"]["fid_before"]


def retrained_u_fids(records: list[dict]) -> dict[tuple[str, int], float]:
    """By base and class, the u-FID of the model that was trained without the class, mean over its runs."""
    found: dict[tuple[str, int], list[float]] = {}
    for record in records:
        if record["spec"]["method"] == "retrained":
            key = (record["spec"]["base"], record["spec"]["forget_class"])
            found.setdefault(key, []).append(record["report"]["u_fid_after"])
    return {key: mean(values) for key, values in found.items()}


def least_kept(record: dict) -> float:
    """Smallest share after over share before among the retained classes."""
    report, forgotten = record["report"], record["spec"]["forget_class"]
    pairs = zip(report["histogram_before"], report["histogram_after"], strict=True)
    return min(after / before for c, (before, after) in enumerate(pairs) if c != forgotten and before > 0)


COLUMNS: dict[str, tuple[Callable[[dict], float], str]] = {
    "u-FID": (lambda r: r["report"]["u_fid_after"], "{:.1f}"),
    "ratio": (ratio, "{:.2f}"),
    "KID": (lambda r: r["report"]["kid_after"], "{:.1f}"),
    "precision": (lambda r: r["report"]["precision"], "{:.2f}"),
    "recall": (lambda r: r["report"]["recall"], "{:.2f}"),
    "least kept": (least_kept, "{:.2f}"),
    "retained TV": (lambda r: r["report"]["retained_distance"], "{:.3f}"),
}
# Of these a higher value is the worse one.
COSTS = ("u-FID", "ratio", "over retrained", "KID", "retained TV")
Column = tuple[Callable[[dict], float], str]


def base_of(records: list[dict]) -> Base:
    """That of an experiment's records."""
    return BASES[records[0]["spec"]["base"]]


def pul_columns(records: list[dict]) -> dict[str, Column]:
    """PUL by the judge that we did not train, and by the one whose features u-FID is of where that is another."""
    base = base_of(records)
    columns = {f"PUL, {base.headline_name}": (lambda r: r["headline"]["pul"], "{:.1f}")}
    if base.judge_name != base.headline_name:
        columns[f"PUL, {base.judge_name}"] = (lambda r: r["report"]["pul"], "{:.1f}")
    return columns


def columns_of(records: list[dict], retrained: dict[tuple[str, int], float]) -> dict[str, Column]:
    """PUL by each of the base's judges, COLUMNS, and u-FID over that of the retrained model where there is one for any
    of the records."""
    columns = {**pul_columns(records), **COLUMNS}

    def over(record: dict) -> float:
        u_fid = retrained.get((record["spec"]["base"], record["spec"]["forget_class"]), math.nan)
        return record["report"]["u_fid_after"] / u_fid

    if all(math.isnan(over(record)) for record in records):
        return columns
    ratio_at = list(columns).index("ratio") + 1
    items = list(columns.items())
    return dict([*items[:ratio_at], ("over retrained", (over, "{:.2f}")), *items[ratio_at:]])


def cell(values: list[float], form: str, pick: Callable[[list[float]], float] = mean) -> str:
    """One figure of several runs, of those that have it."""
    known = [value for value in values if not math.isnan(value)]
    return form.format(pick(known)) if known else ""


def pooled_interval(records: list[dict]) -> str:
    """95 % interval of PUL by the headline judge over the samples of all runs together."""
    counts = [
        sum(round(record["headline"][when] * record["report"]["num_samples"]) for record in records)
        for when in ("share_before", "share_after")
    ]
    total = sum(record["report"]["num_samples"] for record in records)
    low, high = pul_interval(*counts, total, total)
    return f"{low:.0f} to {high:.0f}"


def class_table(records: list[dict], retrained: dict[tuple[str, int], float]) -> list[str]:
    """One row per run; mean, median and worst of the runs of one number of forget images, where there are several."""
    columns = columns_of(records, retrained)
    rows = [
        "| class | images | seed | share before | after | PUL interval | " + " | ".join(columns) + " | outcome |",
        "|---" * (len(columns) + 7) + "|",
    ]
    for record in records:
        spec, cells = record["spec"], [cell([value(record)], form) for value, form in columns.values()]
        shares = [f"{record['headline'][name]:.1%}" for name in ("share_before", "share_after")]
        first = [str(spec["forget_class"]), images_of(spec), str(spec["seed"]), *shares, pooled_interval([record])]
        rows.append("| " + " | ".join([*first, *cells, outcome(record)]) + " |")
    for size in dict.fromkeys(images_of(record["spec"]) for record in records):
        of_size = [record for record in records if images_of(record["spec"]) == size]
        if len(of_size) == 1:
            continue
        for title, pick in {"mean": mean, "median": median, "worst": None}.items():
            cells = [
                cell([value(r) for r in of_size], form, pick or (max if name in COSTS else min))
                for name, (value, form) in columns.items()
            ]
            interval = pooled_interval(of_size) if title == "mean" else ""
            rows.append(f"| {title} | {size} | | | | {interval} | " + " | ".join(cells) + " | |")
    return rows


def outcome(record: dict) -> str:
    """The run's status, and what its delta was scaled by in the end if it was."""
    scale = record.get("scale", 1.0)  # results from before there was one were not scaled
    return record["status"] + (f", scaled by {scale:g}" if scale != 1 else "")


def images_of(spec: dict) -> str:
    """How many forget images a run had."""
    return str(spec["num_forget_images"] or "all")


def by_entry(entries: list[Entry], records: list[dict]) -> dict[Entry, list[dict]]:
    """Each entry's records; entries without any are left out."""
    found = {entry: [r for r in records if r["spec"]["label"] == entry.label] for entry in entries}
    return {entry: records for entry, records in found.items() if records}


def best_of_groups(found: dict[Entry, list[dict]]) -> dict[Entry, list[dict]]:
    """Of every group of entries the best, see USABLE_RATIO."""

    def rank(entry: Entry) -> tuple:
        worst, forgotten = mean(map(ratio, found[entry])), mean(r["headline"]["pul"] for r in found[entry])
        if not math.isfinite(worst):
            return False, -math.inf
        return (True, forgotten) if worst <= USABLE_RATIO else (False, -worst)

    groups: dict[str, list[Entry]] = {}
    for entry in found:
        groups.setdefault(entry.group, []).append(entry)
    best = [max(entries, key=rank) for entries in groups.values()]
    return {entry: found[entry] for entry in best}


def method_table(
    found: dict[Entry, list[dict]], best: set[Entry], retrained: dict[tuple[str, int], float]
) -> list[str]:
    """The untouched base, then one row per entry, means over its runs, the best of each grid bold."""
    every = [record for records in found.values() for record in records]
    columns = columns_of(every, retrained)
    names = ["entry", "sees", "runs", *columns, "PUL interval", "trained", "CPU s/step", "CPU s", "MiB", "outcome"]
    rows = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    u_fid, start = untouched_base(found)
    untouched = [*["0.0"] * len(pul_columns(every)), f"{u_fid:.1f}", f"{start:.2f}"]
    rows.append(f"| untouched base | | | {' | '.join(untouched)}" + " |" * (len(names) - 2 - len(untouched)))
    for entry, records in found.items():
        cells = [cell([value(r) for r in records], form) for value, form in columns.values()]
        name = f"**{entry.label}**" if entry in best else entry.label
        cost = [
            pooled_interval(records),
            f"{records[0]['trained_parameters']:,}",
            f"{median(r['step_cpu_seconds'] for r in records):.2f}",
            f"{median(r['cpu_seconds'] for r in records):,.0f}",
            f"{median(r['peak_memory_mib'] for r in records):,.0f}",
            ", ".join(sorted({outcome(r) for r in records})),
        ]
        rows.append("| " + " | ".join([name, entry.sees, str(len(records)), *cells, *cost]) + " |")
    return rows


def untouched_base(found: dict[Entry, list[dict]]) -> tuple[float, float]:
    """(u-FID, ratio) of the base, which is the same in all records of a class."""
    reports = [record["report"] for records in found.values() for record in records]
    return mean(r["u_fid_before"] for r in reports), mean(r["u_fid_before"] / r["fid_before"] for r in reports)


def frontier_plot(found: dict[Entry, list[dict]], file: Path) -> None:
    """PUL against the u-FID ratio: better is up and left; the base itself is where all begin."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    _, start = untouched_base(found)
    judge = base_of(next(iter(found.values()))).headline_name
    points = [(0.0, start, "untouched base", "tab:gray")]
    for entry, records in found.items():
        color = "tab:red" if entry.method == "vdu_peft" else "tab:blue"
        points.append((mean(r["headline"]["pul"] for r in records), mean(map(ratio, records)), entry.label, color))
    # Names in a column beside the plot, in the order of their points: beside those they cover each other.
    for place, (y, x, label, color) in enumerate(sorted(points)):
        axes.plot(x, y, "o", color=color)
        axes.annotate(
            label,
            (x, y),
            xytext=(1.03, (place + 0.5) / len(points)),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "color": "0.75", "linewidth": 0.6, "shrinkB": 3, "relpos": (0, 0.5)},
        )
    axes.set(xscale="log", xlabel="u-FID after / FID of the base (log)", ylabel=f"PUL by {judge} (%)")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    figure.savefig(file, dpi=100)


def relearning_tables(experiment: Experiment, found: dict[Entry, list[dict]]) -> list[str]:
    """One table per way of fine-tuning: the class's share of samples as it goes on, means over the runs."""
    lines = []
    judge = base_of(next(iter(found.values()))).headline_name
    base_share = mean(r["headline"]["share_before"] for records in found.values() for r in records)
    for number, options in enumerate(experiment.relearning):
        lines += [
            f"Relearning: all parameters fine-tuned on {options.num_images} {options.source} images (Adam, learning "
            f"rate {options.learning_rate:g} at its peak, with warmup and decay over {options.steps[-1]} steps, batch "
            f"{experiment.train_batch_size}); the class's share of "
            f"{options.num_samples} samples by {judge}. The base model's share is "
            f"{base_share:.1%}.",
            "",
            "| entry | before | " + " | ".join(f"{step} steps" for step in options.steps) + " | half of it back |",
            "|---" * (len(options.steps) + 3) + "|",
        ]
        for entry, records in found.items():
            shares = [[r["headline"]["share_after"], *r["relearning"][number]["shares"]] for r in records]
            means = [mean(column) for column in zip(*shares, strict=True)]
            cells = ["not finite" if math.isnan(share) else f"{share:.1%}" for share in means]
            lines.append("| " + " | ".join([entry.label, *cells, half_back(means, options.steps, base_share)]) + " |")
        lines.append("")
    return lines


def half_back(shares: list[float], steps: list[int], base_share: float) -> str:
    """The first of the steps after which the class has half of its share in the base's samples again."""
    for step, share in zip([0, *steps], shares, strict=True):
        if share >= base_share / 2:
            return f"by step {step}"
    return f"not in {steps[-1]}"


def section(
    experiment: Experiment, records: list[dict], folder: Path, retrained: dict[tuple[str, int], float]
) -> list[str]:
    """One experiment: how it was run, its table, and its frontier when it compares methods."""
    threads = sorted({r["environment"]["threads"] for r in records})
    versions = records[-1]["environment"]["versions"]
    lines = [
        f"## {experiment.title}",
        "",
        f"`python -m benchmarks.run {experiment.name}`: base `{experiment.base}`, {len(records)} of "
        f"{len(experiment.runs)} runs; seeds {', '.join(map(str, experiment.seeds))}; "
        f"{' or '.join(str(n or 'all') for n in experiment.num_forget_images)} forget images, at most "
        f"{experiment.max_train_steps} steps of batch {experiment.train_batch_size} + {experiment.train_batch_size}; "
        f"{experiment.num_samples} samples, {records[0]['sampler'].rsplit(',', 1)[0]}; {provenance(records)}, "
        f"{', '.join(map(str, threads))} thread(s) a run; torch {versions['torch']}, "
        f"diffusers {versions['diffusers']}.",
        "",
    ]
    found = by_entry(experiment.entries, records)
    if len(experiment.entries) == 1:
        return [*lines, *class_table(records, retrained), "", *relearning_tables(experiment, found)]
    best = best_of_groups(found)
    frontier_plot(best, folder / f"{experiment.name}.png")
    lines += [
        f"Bold is the best of its grid: the highest PUL at a ratio of at most {USABLE_RATIO:g}, or else the lowest "
        "ratio. The plot shows the bold ones.",
        "",
        *method_table(found, set(best), retrained),
        "",
        f"![PUL against u-FID]({experiment.name}.png)",
        "",
    ]
    return [*lines, *relearning_tables(experiment, found)]


def adapter_cost_section(record: dict) -> list[str]:
    """What an adapter costs in use."""
    environment, forward = record["environment"], record["forward_seconds"]
    return [
        "## What an adapter costs in use",
        "",
        f"`python -m benchmarks.adapter_cost`: the demo model with rank 4 on all layers, batch {record['batch_size']}, "
        f"medians of {record['repeats']}; commit {environment['commit']}; {environment['machine']}, "
        f"{environment['threads']} thread(s); torch {environment['versions']['torch']}.",
        "",
        "| forward pass | seconds | over the base |",
        "|---|---|---|",
        f"| base | {forward['base']:.3f} | 1.00 |",
        f"| adapter | {forward['unmerged']:.3f} | {record['unmerged_ratio']:.2f} |",
        f"| merged | {forward['merged']:.3f} | {record['merged_ratio']:.2f} |",
        "",
        f"A swap takes {record['swap_seconds'] * 1000:.0f} ms, {record['swap_share']:.2%} of one sampling run "
        f"({record['sampler']}, {record['sampling_seconds']:.1f} s).",
        "",
    ]


def composition_section(records: list[dict]) -> list[str]:
    """Several digits at once: one row per way and set of digits, the mean over seeds."""
    first = records[0]
    rows: dict[tuple, dict[int, dict]] = {}
    for record in records:
        part = record["part"]
        key = (len(part["digits"]), tuple(part["digits"]), part["way"])
        rows.setdefault(key, {})[record["config"]["seed"]] = record
    replay, plasticity = (
        " or ".join(map(str, sorted({r["config"][name] for r in records}))) for name in ("replay_size", "plasticity")
    )
    lines = [
        "## Several digits at once",
        "",
        f"`python -m benchmarks.composition`: the defaults of one digit for every adapter, by {plasticity} with "
        f"{replay} replay images; {first['num_samples']} samples, {first['sampler'].rpartition(', ')[0]}, the seed "
        f"after unlearning's; {provenance(records)}. PUL by the demo's judge and by LeNet-5, of each digit in turn; "
        "u-FID against real images of the digits that are left; the ratio is over the best of the single digits' own "
        "u-FIDs of the same seed. Means over the seeds, and by the demo's judge each seed's own in brackets.",
        "",
        "| digits | way | seeds | PUL, demo judge | PUL, LeNet-5 | u-FID before | after | ratio |",
        "|---" * 8 + "|",
    ]
    for (_, digits, way), by_seed in sorted(rows.items()):
        seeds = sorted(by_seed)
        puls = {
            judge: [[by_seed[s]["pul"][judge][str(d)] for s in seeds] for d in digits]
            for judge in ("demo judge", "lenet")
        }
        singles = {s: [rows[1, (d,), "single"][s]["u_fid_after"] for d in digits] for s in seeds}
        fids = [[by_seed[s][name] for s in seeds] for name in ("u_fid_before", "u_fid_after")]
        ratios = [by_seed[s]["u_fid_after"] / min(singles[s]) for s in seeds]
        cells = [
            ", ".join(map(str, digits)),
            way,
            ", ".join(map(str, seeds)),
            ", ".join(_with_each(values, ".1f") for values in puls["demo judge"]),
            ", ".join(f"{mean(values):.1f}" for values in puls["lenet"]),
            *(f"{mean(values):.1f}" for values in fids),
            _with_each(ratios, ".2f"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _with_each(values: Sequence[float], form: str) -> str:
    """The mean, and behind it in brackets the values where there are several."""
    each = f" ({' '.join(f'{value:{form}}' for value in values)})" if len(values) > 1 else ""
    return f"{mean(values):{form}}{each}"


def robustness_section(records: list[dict], folder: Path) -> list[str]:
    """The adapter at other scales and in fewer bits: a table, and what the scale does in a plot."""
    first = records[0]
    judges = {"demo judge": "PUL, demo judge", "lenet": "PUL, LeNet-5"}
    digits = [record["digit"] for record in records]
    lines = [
        "## The adapter scaled, and merged into fewer bits",
        "",
        f"`python -m benchmarks.robustness --digits {' '.join(map(str, digits))}`: the defaults of one digit, seed "
        f"{first['config']['seed']}; {first['num_samples']} samples, {first['sampler']}; {provenance(records)}. "
        "Rounded are the weights of all linear and convolution layers (int8: symmetric, by output channel) after "
        "merging, computed in float32. All figures are against the base in float32, whose scale is 0.",
        "",
        "| digit | model | " + " | ".join(judges.values()) + " | u-FID | ratio |",
        "|---" * 6 + "|",
    ]
    for record in records:
        for name, state in record["states"].items():
            digit, u_fid = str(record["digit"]), state["u_fid_after"]
            puls = [f"{state['pul'][judge][digit]:.1f}" for judge in judges]
            cells = [digit, name, *puls, f"{u_fid:.1f}", f"{u_fid / state['fid_before']:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
    scale_plot(records, folder / "scale.png")
    return [*lines, "", "![PUL and u-FID over the adapter's scale](scale.png)", ""]


def scale_plot(records: list[dict], file: Path) -> None:
    """PUL and the u-FID ratio over the adapter's scale, one line for each digit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for record in records:
        states = {float(name[6:]): s for name, s in record["states"].items() if name.startswith("scale ")}
        digit, base = str(record["digit"]), next(iter(states.values()))
        puls = [0.0, *(state["pul"]["lenet"][digit] for state in states.values())]
        fids = [base["u_fid_before"], *(state["u_fid_after"] for state in states.values())]
        left.plot([0, *states], puls, "o-", label=f"forget {digit}")
        right.plot([0, *states], [fid / base["fid_before"] for fid in fids], "o-")
    left.set(xlabel="adapter scale", ylabel="PUL by LeNet-5 (%)")
    right.set(xlabel="adapter scale", ylabel="u-FID / FID of the base")
    left.legend()
    figure.savefig(file, dpi=100)


def timesteps_section(records: list[dict]) -> list[str]:
    """The denoising loss of models that never saw a digit, over the base model's, by timestep."""
    digits = [str(record["digit"]) for record in records]
    lines = [
        "## Where it is decided what an image shows",
        "",
        f"`python -m benchmarks.timesteps --digits {' '.join(digits)}`: the denoising loss of a model trained without "
        "the digit relative to the base model's, mean over real test images of the digit and of the others, "
        f"{records[0]['num_images']} each; {provenance(records)}. From these come the timesteps at which forget images "
        "are shown by default (`vdu_peft/schedule.py`).",
        "",
        "| timestep | " + " | ".join(f"{d}, its images | {d}, the others" for d in digits) + " |",
        "|---" * (1 + 2 * len(digits)) + "|",
    ]
    for timestep in records[0]["ratios"]:
        ratios = [record["ratios"][timestep][kind] for record in records for kind in ("forget", "retain")]
        lines.append(f"| {timestep} | " + " | ".join(f"{value:.2f}" for value in ratios) + " |")
    return [*lines, ""]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments_dir", type=Path, default=EXPERIMENTS)
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    parser.add_argument("--output_dir", type=Path, default=EXPERIMENTS.parent)
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    lines = [INTRODUCTION]
    try:
        experiments = [read_experiment(file) for file in sorted(args.experiments_dir.glob("*.json"))]
        loaded = [(experiment, load_results(experiment, args.results_dir)) for experiment in experiments]
        retrained = retrained_u_fids([record for _, records in loaded for record in records])
        for experiment, records in loaded:
            if records:
                lines += section(experiment, records, args.output_dir, retrained)
    except ExperimentError as error:
        print(error, file=sys.stderr)
        return 2
    cost = args.results_dir / ADAPTER_COST
    if cost.is_file():
        lines += adapter_cost_section(json.loads(cost.read_text()))
    sections = {
        COMPOSITION: composition_section,
        ROBUSTNESS: lambda records: robustness_section(records, args.output_dir),
        TIMESTEPS: timesteps_section,
        TEXT: text_section,
        ATTACKS: attack_section,
    }
    for name, write in sections.items():
        records = [json.loads(file.read_text()) for file in sorted((args.results_dir / name).glob("*.json"))]
        if records:
            lines += write(records)
    (args.output_dir / "README.md").write_text("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
