"""The text-to-image benchmark's table."""

# Columns of the text-to-image table, and how their figures are shown.
TEXT_COLUMNS = {
    "UA": "{:.1%}",
    "IRA": "{:.1%}",
    "CRA": "{:.1%}",
    "target prompts, other attributes": "{:.1%}",
    "FID, target prompts": "{:.1f}",
    "FID, other prompts": "{:.1f}",
}


def text_section(records: list[dict]) -> list[str]:
    """Concepts of the text-to-image model: the base, then one row per method, for every target."""
    environments = sorted({(r["environment"]["commit"], r["environment"]["machine"]) for r in records})
    first = records[0]
    lines = [
        "## Concepts of a small text-to-image model",
        "",
        f"`python -m benchmarks.text.run`: {first['num_forget_images']} forget images with captions, "
        f"{first['num_retained_prompts']} prompts to retain and no images of them; {first['num_target_images']} images "
        f"of held-out captions that ask for each target, several of a caption where there are fewer captions, and "
        f"{first['num_other_images']} of others; {first['sampler'].rsplit(',', 1)[0]}; "
        f"commit {', '.join(commit for commit, _ in environments)}; {environments[0][1]}. The model, its judge and its "
        "data are in [models/dolls](models/dolls/README.md). UA: target prompts whose image does not show the target; "
        "IRA, CRA: what other prompts ask of the target's attribute, and of the others, that their images show; FID on "
        "the judge's features against real images without the target. CPU s is one run's, replay and all, without the "
        "measurement.",
        "",
        "| target | method | seed | " + " | ".join(TEXT_COLUMNS) + " | CPU s | outcome |",
        "|---" * (len(TEXT_COLUMNS) + 5) + "|",
    ]
    shown = set()
    for record in sorted(records, key=lambda r: (r["concept"], r["seed"])):
        for target, figures in record["figures"].items():
            rows = [(record["method"], "after", f"{record['cpu_seconds']:.0f}", record["status"])]
            if (record["concept"], target, record["seed"]) not in shown:
                shown.add((record["concept"], target, record["seed"]))
                rows.insert(0, ("untouched base", "before", "", ""))
            # A style of many values goes by its own name.
            name = target if len(target) < 30 else record["concept"]
            name += " (of two)" if len(record["figures"]) > 1 else ""
            for method, when, *cost in rows:
                pairs = {column: pair[when == "after"] for column, pair in figures.items()}
                cells = [form.format(pairs[column]) if column in pairs else "" for column, form in TEXT_COLUMNS.items()]
                lines.append("| " + " | ".join([name, method, str(record["seed"]), *cells, *cost]) + " |")
    return [*lines, ""]
