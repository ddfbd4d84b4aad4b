"""An experiment file and the runs that it stands for."""

import json
import re
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from benchmarks.bases import BASES, Base
from benchmarks.methods import METHODS, method_options

EXPERIMENTS = Path(__file__).parent / "experiments"
RESULTS = Path(__file__).parent / "results"


class ExperimentError(ValueError):
    """An experiment file that cannot be run; the message names it and the mend."""


@dataclass(frozen=True, eq=False)  # tables are keyed by the entry itself
class Entry:
    """One method with its options. Entries of one ``group`` are a grid: tables show the best of it."""

    label: str
    method: str
    sees: str  # what the method sees besides the base model, for the tables
    options: dict
    group: str


@dataclass(frozen=True)
class Run:
    """One method forgetting one class from so many images with one seed; its result is one file."""

    experiment: "Experiment"
    entry: Entry
    forget_class: int
    num_forget_images: int | None  # all that there are when None
    seed: int

    @property
    def name(self) -> str:
        several = len(self.experiment.num_forget_images) > 1
        size = f"-{self.num_forget_images or 'all'}images" if several else ""
        return f"{self.entry.label}-{self.forget_class}{size}-{self.seed}"

    @property
    def base(self) -> Base:
        return BASES[self.experiment.base]

    @property
    def base_model(self) -> str:
        """Which trained weights the run is of, the base's and, for ``retrained``, its stand-in's.

        Raises:
            BaseError: they are not there.
        """
        if self.entry.method != "retrained":
            return self.base.digest
        return self.base.digest_beside_retrained(self.forget_class)

    @property
    def spec(self) -> dict:
        """Everything that the result depends on besides the code; it is stored with the result."""
        experiment = asdict(self.experiment)
        shared = {name: experiment[name] for name in SHARED}
        method = {"label": self.entry.label, "method": self.entry.method, "options": self.entry.options}
        of_run = {name: getattr(self, name) for name in ("forget_class", "seed", "num_forget_images")}
        return {**method, **of_run, **shared}

    def result_file(self, results: Path) -> Path:
        return results / self.experiment.name / f"{self.name}.json"

    def load(self, results: Path) -> dict | None:
        """The result, or None when there is none.

        Raises:
            ExperimentError: the result is of other options than the experiment file has now.
        """
        file = self.result_file(results)
        if not file.is_file():
            return None
        record = json.loads(file.read_text())
        if record["spec"] != self.spec:
            changed = [k for k, v in self.spec.items() if record["spec"].get(k) != v]
            raise ExperimentError(f"{file}: of another {', '.join(changed)} than the experiment; remove it to run anew")
        return record


@dataclass(frozen=True)
class Relearning:
    """How an unlearned model is fine-tuned on images to see whether the class comes back.

    Attributes:
        source: ``forget``, the undesired images themselves, or ``retain``, real images of the other classes.
        num_images: how many of them.
        learning_rate: at its peak; warmup and decay are those of a run of the last of ``steps``.
        steps: after how many steps the class's share is measured, in rising order.
        num_samples: samples per measurement.
    """

    source: str
    num_images: int
    learning_rate: float
    steps: list[int]
    num_samples: int


@dataclass(frozen=True)
class Experiment:
    """Every entry forgets every class from every number of images with every seed, in the same steps at most.

    Attributes:
        base: the base model's name in ``benchmarks.bases``.
    """

    name: str
    title: str
    base: str
    forget_classes: list[int]
    seeds: list[int]
    num_samples: int
    max_train_steps: int
    train_batch_size: int
    num_forget_images: list[int | None]
    entries: list[Entry]
    relearning: list[Relearning]

    @property
    def runs(self) -> list[Run]:
        # Seed by seed, class by class: what is there of an unfinished experiment can be compared.
        of_run = product(self.seeds, self.forget_classes, self.num_forget_images, self.entries)
        return [Run(self, entry, forget_class, images, seed) for seed, forget_class, images, entry in of_run]


# Fields of an experiment that each of its results depends on.
SHARED = ("base", "num_samples", "max_train_steps", "train_batch_size", "relearning")
FIELDS = {"title", "base", "forget_classes", "seeds", "num_samples", "max_train_steps", "train_batch_size", "methods"}


def read_experiment(file: Path) -> Experiment:
    """Read and check an experiment file.

    Raises:
        ExperimentError: not there, not JSON, a field missing, unknown or out of range, a method unknown or with an
            option that it has not, or two of one label.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExperimentError(f"{file}: not a readable JSON file ({error})") from error
    optional = {"num_forget_images", "relearning"}
    if not FIELDS <= set(content) <= FIELDS | optional:
        raise ExperimentError(
            f"{file}: missing {sorted(FIELDS - set(content))}, unknown {sorted(set(content) - FIELDS - optional)}"
        )
    try:
        entries = [Entry(**{"options": {}, "group": m["label"], **m}) for m in content.pop("methods")]
        relearning = [Relearning(**options) for options in content.pop("relearning", [])]
    except (KeyError, TypeError) as error:
        raise ExperimentError(f"{file}: methods or relearning: {error}") from error
    for entry in entries:
        if not re.fullmatch(r"[a-z0-9_.]+(-[a-z0-9_.]+)*", entry.label):
            raise ExperimentError(f"{file}: label {entry.label!r} names files: lower case, digits, dots, dashes only")
        if entry.method not in METHODS:
            known = ", ".join(sorted(METHODS))
            raise ExperimentError(f"{file}: unknown method {entry.method!r}; known are {known}")
        if unknown := {*entry.options} - method_options(entry.method):
            raise ExperimentError(f"{file}: {entry.label}: {entry.method} has no option {min(unknown)!r}")
    if content["base"] not in BASES:
        raise ExperimentError(f"{file}: unknown base {content['base']!r}; known are {', '.join(sorted(BASES))}")
    _check_values(file, content, relearning)
    if len({entry.label for entry in entries}) < len(entries):
        raise ExperimentError(f"{file}: two methods have the same label")
    return Experiment(name=file.stem, entries=entries, relearning=relearning, **{"num_forget_images": [100], **content})


def _check_values(file: Path, content: dict, relearning: list[Relearning]) -> None:
    for name in ("num_samples", "max_train_steps", "train_batch_size"):
        if not _is_count(content[name]):
            raise ExperimentError(f"{file}: {name} must be a number from 1, not {content[name]!r}")
    for name, allowed in (
        ("forget_classes", lambda c: isinstance(c, int) and c >= 0),
        ("seeds", lambda seed: isinstance(seed, int) and seed >= 0),
        ("num_forget_images", lambda count: count is None or _is_count(count)),
    ):
        values = content.get(name, [100])
        if not isinstance(values, list) or not values or not all(map(allowed, values)):
            raise ExperimentError(f"{file}: {name} must be a list of numbers, not {values!r}")
    for options in relearning:
        if options.source not in ("forget", "retain"):
            raise ExperimentError(f"{file}: relearning source {options.source!r} is neither forget nor retain")
        if not _is_count(options.num_images) or sorted({*options.steps}) != options.steps:
            raise ExperimentError(f"{file}: relearning takes num_images from 1 and steps in rising order")


def _is_count(value) -> bool:
    return isinstance(value, int) and value >= 1
