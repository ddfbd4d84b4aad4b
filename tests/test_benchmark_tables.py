"""What tables say of records."""

import math

import pytest

from benchmarks import (
    experiment_tables,
)
from benchmarks.experiment import Entry
from vdu_peft.metrics import pul_interval


def test_a_table_of_one_method_sums_up_by_number_of_forget_images():
    def record(images, pul):
        report = {"pul": pul, "u_fid_after": 1.0, "fid_before": 1.0, "kid_after": 1.0, "precision": 1.0, "recall": 1.0}
        report |= {"histogram_before": [0.5, 0.5], "histogram_after": [0.1, 0.9], "retained_distance": 0.0}
        report |= {"num_samples": 10}
        spec = {"base": "mnist", "forget_class": 0, "num_forget_images": images, "seed": 0}
        headline = {"pul": pul, "share_before": 0.5, "share_after": 0.1}
        return {"spec": spec, "report": report, "headline": headline, "status": "forgotten"}

    rows = experiment_tables.class_table([record(8, 50.0), record(8, 60.0), record(8, 61.0), record(32, 90.0)], {})
    summaries = {tuple(cell.strip() for cell in row.split("|")[1:3]): row.split("|")[7].strip() for row in rows[6:]}
    assert summaries["mean", "8"] == "57.0" and summaries["median", "8"] == "60.0"
    assert summaries["worst", "8"] == "50.0"
    assert ("mean", "32") not in summaries  # of one run there is nothing to sum up


def test_tables_take_the_best_of_a_grid():
    def best(**figures):
        found = {}
        for label, (ratio, pul) in figures.items():
            record = {"headline": {"pul": pul}, "report": {"u_fid_after": ratio, "fid_before": 1.0}}
            found[Entry(label, "siss", "", {}, "grid")] = [record]
        return [entry.label for entry in experiment_tables.best_of_groups(found)]

    assert best(weak=(1.0, 50.0), good=(1.5, 90.0), ruin=(9.0, 100.0)) == ["good"]
    assert best(bad=(5.0, 50.0), ruin=(9.0, 100.0), broken=(float("nan"), 100.0)) == ["bad"]


def test_u_fid_is_compared_with_the_base_without_the_class_and_the_retrained_model_of_the_same_base_and_class():
    def record(base, forget_class, u_fid, method="vdu_peft"):
        spec = {"base": base, "forget_class": forget_class, "method": method}
        return {"spec": spec, "report": {"u_fid_after": u_fid}}

    gold = [record("mnist", 1, 4.0, "retrained"), record("mnist", 1, 6.0, "retrained")]
    retrained = experiment_tables.retrained_u_fids(
        [*gold, record("mnist16", 1, 50.0, "retrained"), record("mnist", 1, 99.0)]
    )
    assert retrained == {("mnist", 1): 5.0, ("mnist16", 1): 50.0}
    records = [record("mnist", 1, 10.0), record("mnist", 2, 10.0)]
    value, form = experiment_tables.columns_of(records, retrained)["over retrained"]
    assert value(records[0]) == 2.0 and math.isnan(value(records[1]))
    assert experiment_tables.cell([value(r) for r in records], form) == "2.00 (of 1)"
    assert experiment_tables.cell([math.nan], form) == ""
    assert experiment_tables.cell([1.0, math.nan, 3.0], form) == "2.00 (of 2)"
    assert "over retrained" not in experiment_tables.columns_of(records[1:], retrained)
    assert "over oracle" not in experiment_tables.columns_of(records, retrained)
    records[1]["report"]["u_fid_oracle"] = 8.0
    columns = experiment_tables.columns_of(records, retrained)
    value, _ = columns["over oracle"]
    assert math.isnan(value(records[0])) and value(records[1]) == 1.25
    assert list(columns).index("ratio") + 1 == list(columns).index("over oracle")


def test_the_interval_of_several_runs_is_that_of_their_samples_together():
    def record(before, after, num_samples):
        headline = {"share_before": before / num_samples, "share_after": after / num_samples}
        return {"headline": headline, "report": {"num_samples": num_samples}}

    low, high = pul_interval(150, 7, 1500, 1500)
    assert experiment_tables.pooled_interval([record(100, 7, 1000), record(50, 0, 500)]) == f"{low:.0f} to {high:.0f}"


def test_when_half_of_the_share_is_back():
    assert experiment_tables.half_back([0.0, 0.02, 0.06, 0.2], [5, 10, 20], 0.12) == "by step 10"
    assert experiment_tables.half_back([0.0, 0.02, 0.05, 0.059], [5, 10, 20], 0.12) == "not in 20"
    assert experiment_tables.half_back([0.07, 0.0], [5], 0.12) == "by step 0"


def test_least_kept_ignores_the_forgotten_class():
    report = {"histogram_before": [0.5, 0.25, 0.25, 0.0], "histogram_after": [0.0, 0.5, 0.1, 0.4]}
    assert experiment_tables.least_kept({"spec": {"forget_class": 0}, "report": report}) == pytest.approx(0.4)
