"""Write benchmarks/README.md and its plots from the results.

python -m benchmarks.tables
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from benchmarks.adapter_cost import NAME as ADAPTER_COST
from benchmarks.composition import NAME as COMPOSITION
from benchmarks.deciding import NAME as DECIDING
from benchmarks.experiment import EXPERIMENTS, RESULTS, ExperimentError, read_experiment
from benchmarks.experiment_tables import load_results, retrained_u_fids, section
from benchmarks.results import provenance
from benchmarks.robustness import NAME as ROBUSTNESS
from benchmarks.step_cost import NAME as STEP_COST
from benchmarks.text.attacks import NAME as ATTACKS
from benchmarks.text.run import NAME as TEXT
from benchmarks.text.tables import attack_section, text_section
from benchmarks.timesteps import NAME as TIMESTEPS

INTRODUCTION = """\
# Benchmarks

Written by `python -m benchmarks.tables` from `benchmarks/results/`, which `python -m benchmarks.run` fills from
`benchmarks/experiments/`. Each result tells its options, seed, commit, versions, machine and times. These are our own
figures on small models; they reproduce no table of any paper. [Findings](FINDINGS.md) says what they show, with the
targets that were set, met or missed.

Base `mnist` is the demo's model with its images (`vdu_peft/assets/mnist`): an unconditional MNIST DDPM of 1.8 M
parameters, 2,700 real test images of the other digits for u-FID. Base `mnist16` is the same network at 16 x 16, which
takes a third of the time, with all of MNIST's images; the judges see its samples and the real images at 28 x 28, by
bicubic interpolation ([models](models/README.md)). PUL is the relative drop in the share of samples that a judge calls
the digit: by LeNet-5, which we did not train, and by the demo's judge. The ratio is u-FID after unlearning (demo
judge's features) over the base model's FID against all ten digits. It counts both what is not forgotten and what
quality it cost: of digits the untouched base is near 2, a model that lost the digit and nothing else near 1. Base
`cifar10` is a small unconditional DDPM of CIFAR-10, in color at 32 x 32, so far from real images that its own ratio is
near 1; shares and features are a ResNet-20's, which we did not train, and FIDs are against 2,000 real test images. Base
`tiny-imagenet` is that model trained on with ten classes of tiny ImageNet at 32 x 32, and no better; its judge, right
on 91.8 % of the validation images, is ours, and learned from the training images that are forgotten, too. FIDs there
are against the 450 validation images of the other classes.
"Least kept" is the smallest share of a retained class after unlearning relative to before. "Over oracle" is u-FID over
that of the base's own samples without those that the judge takes for the class, which is what a removal would have that
changes nothing else (fewer samples make the latter larger by 1 or 2 %). "Over retrained" is u-FID over that of the same
model trained without the class. Precision and recall are of the samples against the same real images; retained TV is
the total variation between the other classes' proportions before and after.
"""


def adapter_cost_section(record: dict) -> list[str]:
    """What an adapter costs in use."""
    environment, forward = record["environment"], record["forward_seconds"]
    return [
        "## What an adapter costs in use",
        "",
        f"`python -m benchmarks.adapter_cost --repeats {record['repeats']}`: the demo model with rank 4 on all layers, "
        f"batch {record['batch_size']}, medians; commit {environment['commit']}; {environment['machine']}, "
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


def step_cost_section(records: list[dict]) -> list[str]:
    """A step of ours beside one of full-parameter VDU: a row for each network of which both are there."""
    networks: dict[str, dict[str, dict]] = {}
    for record in records:
        networks.setdefault(record["network"], {})[record["way"]] = record
    lines = [
        "## What a step costs",
        "",
        f"`python -m benchmarks.step_cost`: a step of ours, with its teacher, beside one of VDU on all parameters "
        f"(isotropic prior) on as many images, ours half forget and half replay, VDU's all forget; float32, medians of "
        f"{records[0]['steps'] - 1} steps, peaks of a process each; {provenance(records)}. The networks are trained "
        "(the demo's) or random.",
        "",
        "| network | parameters | trained by ours | images | s, VDU | s, ours | ours over VDU | MiB, VDU | MiB, ours "
        "| ours over VDU |",
        "|---" * 10 + "|",
    ]
    both = [(title, ways) for title, ways in networks.items() if len(ways) == 2]
    for title, ways in sorted(both, key=lambda item: item[1]["ours"]["model_parameters"]):
        ours, vdu = ways["ours"], ways["vdu"]
        cells = [title, f"{ours['model_parameters']:,}", f"{ours['trained_parameters']:,}", str(ours["images"])]
        for name, form in (("step_seconds", ".2f"), ("peak_memory_mib", ",.0f")):
            cells += [f"{vdu[name]:{form}}", f"{ours[name]:{form}}", f"{ours[name] / vdu[name]:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def composition_section(records: list[dict]) -> list[str]:
    """Several digits at once: one row per way and set of digits, the mean over seeds."""
    first = records[0]
    rows: dict[tuple, dict[int, dict]] = {}
    for record in records:
        part = record["part"]
        key = (len(part["digits"]), tuple(part["digits"]), part["way"])
        rows.setdefault(key, {})[record["config"]["seed"]] = record
    seeds_run = sorted({record["config"]["seed"] for record in records})
    replay, plasticity = (
        " or ".join(map(str, sorted({r["config"][name] for r in records}))) for name in ("replay_size", "plasticity")
    )
    lines = [
        "## Several digits at once",
        "",
        f"`python -m benchmarks.composition --seeds {' '.join(map(str, seeds_run))}`: the defaults of one digit for "
        f"every adapter, as they were at that commit, by {plasticity} with {replay} replay images; "
        f"{first['num_samples']} samples, {first['sampler'].rpartition(', ')[0]}, the seed "
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
    digits = " ".join(str(record["digit"]) for record in records)
    lines = [
        "## The adapter scaled, and merged into fewer bits",
        "",
        f"`python -m benchmarks.robustness --digits {digits} --num_samples {first['num_samples']}`: "
        f"the defaults of one digit, seed {first['config']['seed']}; {first['sampler']}; {provenance(records)}. "
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
        f"{records[0]['num_images']} each; {provenance(records)}. From these comes the least timestep at which forget "
        "images are shown by default (`vdu_peft/schedule.py`).",
        "",
        "| timestep | " + " | ".join(f"{d}, its images | {d}, the others" for d in digits) + " |",
        "|---" * (1 + 2 * len(digits)) + "|",
    ]
    for timestep in records[0]["ratios"]:
        ratios = [record["ratios"][timestep][kind] for record in records for kind in ("forget", "retain")]
        lines.append(f"| {timestep} | " + " | ".join(f"{value:.2f}" for value in ratios) + " |")
    return [*lines, ""]


def deciding_section(records: list[dict]) -> list[str]:
    """How long an image keeps its class in noise, and where forget images are shown."""
    first = records[0]
    lines = [
        "## Up to how much noise an image keeps its class",
        "",
        "`python -m benchmarks.deciding`, with `--base` and `--classes` as the rows say: "
        "the share of 100 forget images that are of their "
        "class still, by LeNet-5 or ResNet-20, noised to a timestep and drawn again from there by the base "
        f"model; {first['sampler']}; {provenance(records)}. Forget images are shown by default up to where the noise "
        f"is as large as what {first['num_samples']} of the model's own samples differ in most, the deviation. Own is "
        "the class's share of these.",
        "",
        "| base | class | own | deviation | shown at | " + " | ".join(first["kept"]) + " |",
        "|---" * (5 + len(first["kept"])) + "|",
    ]
    for record in records:
        span = f"{record['shown_at'][0]} to {record['shown_at'][1] - 1}"
        cells = [
            record["base"],
            str(record["class"]),
            f"{record['base_share']:.0%}",
            f"{record['deviation']:.1f}",
            span,
        ]
        lines.append("| " + " | ".join([*cells, *(f"{share:.0%}" for share in record["kept"].values())]) + " |")
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
        STEP_COST: step_cost_section,
        COMPOSITION: composition_section,
        ROBUSTNESS: lambda records: robustness_section(records, args.output_dir),
        TIMESTEPS: timesteps_section,
        DECIDING: deciding_section,
        TEXT: text_section,
        ATTACKS: attack_section,
    }
    for name, write in sections.items():
        records = [json.loads(file.read_text()) for file in sorted((args.results_dir / name).glob("*.json"))]
        if records:
            lines += write(records)
    (args.output_dir / "README.md").write_text("\n".join(lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
