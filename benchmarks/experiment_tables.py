"""An experiment's part of the tables: its runs or methods, its frontier plot, and relearning."""

import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median

from benchmarks.bases import BASES, Base
from benchmarks.experiment import Entry, Experiment
from benchmarks.results import provenance
from vdu_peft.metrics import pul_interval

# Of a grid the best is what forgets most among those that keep u-FID below this multiple of the base's FID, or, when
# none does, the one with the lowest u-FID.
USABLE_RATIO = 2.0


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
COSTS = ("u-FID", "ratio", "over oracle", "over retrained", "KID", "retained TV")
Column = tuple[Callable[[dict], float], str]


def base_of(records: list[dict]) -> Base:
    """That of an experiment's records."""
    return BASES[records[0]["spec"]["base"]]


def pul_columns(records: list[dict]) -> dict[str, Column]:
    """PUL by the headline's judge, and by the one whose features u-FID is of where that is another."""
    base = base_of(records)
    columns = {f"PUL, {base.headline_name}": (lambda r: r["headline"]["pul"], "{:.1f}")}
    if base.judge_name != base.headline_name:
        columns[f"PUL, {base.judge_name}"] = (lambda r: r["report"]["pul"], "{:.1f}")
    return columns


def columns_of(records: list[dict], retrained: dict[tuple[str, int], float]) -> dict[str, Column]:
    """PUL by each of the base's judges, COLUMNS, and u-FID over the base's own without the class and over that of the
    retrained model, where there is one for any of the records."""

    def over_oracle(record: dict) -> float:
        # Results of before it was measured have none.
        return record["report"]["u_fid_after"] / record["report"].get("u_fid_oracle", math.nan)

    def over_retrained(record: dict) -> float:
        u_fid = retrained.get((record["spec"]["base"], record["spec"]["forget_class"]), math.nan)
        return record["report"]["u_fid_after"] / u_fid

    columns = {}
    for name, column in {**pul_columns(records), **COLUMNS}.items():
        columns[name] = column
        if name == "ratio":
            for other, value in {"over oracle": over_oracle, "over retrained": over_retrained}.items():
                if not all(math.isnan(value(record)) for record in records):
                    columns[other] = value, "{:.2f}"
    return columns


def cell(values: list[float], form: str, pick: Callable[[list[float]], float] = mean) -> str:
    """One figure of several runs, of those that have it; where not all have, it says of how many."""
    known = [value for value in values if not math.isnan(value)]
    of = f" (of {len(known)})" if len(known) < len(values) else ""
    return form.format(pick(known)) + of if known else ""


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
