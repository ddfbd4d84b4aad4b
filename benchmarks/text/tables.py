"""The text-to-image benchmark's table."""

from collections.abc import Callable

from benchmarks.results import changed, provenance
from benchmarks.text import attacks, run

# Columns of the text-to-image table, and how their figures are shown.
TEXT_COLUMNS = {
    "UA": "{:.1%}",
    "IRA": "{:.1%}",
    "CRA": "{:.1%}",
    "target prompts, other attributes": "{:.1%}",
    "FID, target prompts": "{:.1f}",
    "FID, other prompts": "{:.1f}",
    "KID, other prompts": "{:.2f}",
    run.ANCHOR_DISTANCE: "{:.1f}",
}
EARLIER_OPTIONS, EARLIER_REFERENCE = "earlier options", "earlier reference"


def text_section(records: list[dict]) -> list[str]:
    """Concepts of the text-to-image model: the base, then one row per method, for every target."""
    first = records[0]
    lines = [
        "## Concepts of a small text-to-image model",
        "",
        "`python -m benchmarks.text.run`, with `--methods`, `--concepts` and `--seeds` as the rows say: "
        f"{max(record['num_forget_images'] for record in records)} forget images with captions where a method's name "
        f"does not say otherwise, "
        f"{first['num_retained_prompts']} prompts to retain and no images of them; {first['num_target_images']} images "
        f"of held-out captions that ask for each target, several of a caption where there are fewer captions, and "
        f"{first['num_other_images']} of others; {first['sampler'].rsplit(',', 1)[0]}; "
        f"{provenance(records)}. The model, its judge and its "
        "data are in [models/dolls](models/dolls/README.md). UA: target prompts whose image does not show the target; "
        "IRA, CRA: what other prompts ask of the target's attribute, and of the others, that their images show; FID on "
        "the judge's features against real images without the target, and of target prompts' images against real ones "
        "of what is drawn instead, where the base's are its own images of the anchors' captions. Real images in place "
        "of drawn ones, as many, come out as their row says: those of what is drawn instead, in place of the target "
        "prompts' images. CPU s is one run's, replay and all, without the measurement."
        + (
            f' Rows marked "{EARLIER_REFERENCE}" are against other real images, some of the very characters that the '
            "prompts describe."
            if any("real images" not in record for record in records)
            else ""
        )
        + told_of_earlier_options(records, run.spec_of),
        "",
        "| target | method | seed | " + " | ".join(TEXT_COLUMNS) + " | CPU s | outcome |",
        "|---" * (len(TEXT_COLUMNS) + 5) + "|",
    ]
    shown = set()
    for record in sorted(records, key=lambda r: (r["concept"], r["seed"])):
        reference = [] if "real images" in record else [EARLIER_REFERENCE]
        options = [EARLIER_OPTIONS] if changed(record, run.spec_of(record["method"])) else []
        for target, figures in record["figures"].items():
            after = {column: pair[1] for column, pair in figures.items()}
            name = marked(record["method"], options + reference)
            rows = [(name, after, f"{record['cpu_seconds']:.0f}", record["status"])]
            # The base is the same for all methods, but not against other real images.
            if (group := (record["concept"], target, record["seed"], *reference)) not in shown:
                shown.add(group)
                before = {column: pair[0] for column, pair in figures.items()}
                rows.insert(0, (marked("untouched base", reference), before, "", ""))
                if not reference:
                    rows.insert(0, ("real images", record["real images"][target], "", ""))
            # A style of many values goes by its own name.
            name = target if len(target) < 30 else record["concept"]
            name += " (of two)" if len(record["figures"]) > 1 else ""
            for method, values, *cost in rows:
                cells = [form.format(values[c]) if c in values else "" for c, form in TEXT_COLUMNS.items()]
                lines.append("| " + " | ".join([name, method, str(record["seed"]), *cells, *cost]) + " |")
    return [*lines, ""]


def marked(method: str, marks: list[str]) -> str:
    return f"{method} ({', '.join(marks)})" if marks else method


def told_of_earlier_options(records: list[dict], spec_of: Callable[[str], dict]) -> str:
    if not any(changed(record, spec_of(record["method"])) for record in records):
        return ""
    return f' Rows marked "{EARLIER_OPTIONS}" were run before an option or what a method does was changed.'


def attack_section(records: list[dict]) -> list[str]:
    """Attacks on the unlearned models: how often the target is still shown, one row per model."""
    first = records[0]
    lines = [
        "## Attacks on the text-to-image model",
        "",
        "`python -m benchmarks.text.attacks`, with `--concepts` and `--methods` as the rows say: "
        f"share of {first['num_images']} images each in which the judge sees the "
        f"target; {first['sampler'].rsplit(',', 1)[0]}; "
        f"{provenance(records)}. Paraphrases are in forms that no caption has. The embedding attack moves the "
        f"embedding of every prompt by one shift, learned in {first['embedding_attack']['steps']} steps on the model's "
        f"own denoising of {first['embedding_attack']['images']} images of the target. Relearning trains the whole "
        f"network on {first['relearning']['images']} of them." + told_of_earlier_options(records, attacks.spec_of),
        "",
        "| target | method | seed | " + " | ".join(first["shown"]) + " |",
        "|---" * (len(first["shown"]) + 3) + "|",
    ]
    for record in sorted(records, key=lambda r: (r["concept"], r["seed"])):
        cells = [f"{share:.0%}" for share in record["shown"].values()]
        method = "untouched base" if record["method"] == "base" else record["method"]
        method = marked(method, [EARLIER_OPTIONS] if changed(record, attacks.spec_of(record["method"])) else [])
        lines.append("| " + " | ".join([record["concept"], method, str(record["seed"]), *cells]) + " |")
    return [*lines, ""]
