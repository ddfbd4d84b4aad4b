"""Prompt files of the field → prompts with their seeds, guidance and what an image of them is to show."""

import csv
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vdu_peft.judge import AttributeJudge

logger = logging.getLogger(__name__)

# What prompt files of the field call them: I2P, UnlearnDiffAtk, ESD.
SEED_COLUMNS = ("seed", "sd_seed", "evaluation_seed")
GUIDANCE_COLUMNS = ("guidance_scale", "guidance", "sd_guidance_scale", "evaluation_guidance")
SIZE_COLUMNS = ("sd_image_height", "sd_image_width")


class PromptFileError(ValueError):
    """A prompt file that cannot be used; the message names it and the mend."""


@dataclass(frozen=True)
class Target:
    """What was forgotten: an attribute's values, as ``weapon=sword`` or ``clothes=red robe,blue robe``."""

    attribute: str
    values: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Raises PromptFileError when it is not of the form attribute=value,value."""
        attribute, _, values = text.partition("=")
        target = cls(attribute.strip(), tuple(value.strip() for value in values.split(",") if value.strip()))
        if not target.attribute or not target.values:
            raise PromptFileError(f"forget_attribute: {text!r} is not of the form attribute=value,value")
        return target

    def is_asked_by(self, prompt: "EvaluationPrompt") -> bool:
        return prompt.attributes.get(self.attribute) in self.values


@dataclass(frozen=True)
class EvaluationPrompt:
    """A row of a prompt file.

    Attributes:
        text: the prompt.
        seed: of its image, as of the stock pipeline's generator; None for one of the run's own, see :func:`seeded`.
        guidance_scale: None for the stock pipeline's.
        attributes: what the prompt asks of each of the judge's attributes; the empty value asks nothing.
        size: (height, width) that the file names; images are the model's size, and :func:`check_sizes` tells of others.
    """

    text: str
    seed: int | None = None
    guidance_scale: float | None = None
    attributes: dict[str, str] = field(default_factory=dict)
    size: tuple[float, float] | None = None


def read_prompt_file(file: str | Path, judge: AttributeJudge | None, target: Target | None) -> list[EvaluationPrompt]:
    """Rows of a CSV with a ``prompt`` column; a seed, a guidance scale and the judge's attributes where it has them.

    Raises:
        PromptFileError: not readable, without prompts, a row without one, a value that the judge does not know, or no
            target prompt.
    """
    try:
        with Path(file).open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, skipinitialspace=True)
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PromptFileError(f"{file}: not a readable CSV file ({error})") from error
    if not rows or "prompt" not in rows[0]:
        raise PromptFileError(f"{file}: no rows with a column 'prompt'")
    known = judge.attributes if judge else {}
    prompts = []
    for line, row in enumerate(rows, start=2):
        text = (row["prompt"] or "").strip()
        if not text:
            raise PromptFileError(f"{file}, line {line}: the prompt is empty; take the row out")
        attributes = {name: (row.get(name) or "").strip() for name in known}
        for name, value in attributes.items():
            if value and value not in known[name]:
                raise PromptFileError(
                    f"{file}, line {line}: the judge knows no {name} {value!r}; it knows {', '.join(known[name])}, and "
                    "an empty field asks nothing"
                )
        try:
            seed, guidance = _number(row, SEED_COLUMNS, int), _number(row, GUIDANCE_COLUMNS, float)
            size = tuple(_number(row, (column,), float) for column in SIZE_COLUMNS)
            if seed is not None and not 0 <= seed < 2**64:
                raise ValueError(f"a seed lies in 0 to 2**64 - 1, not {seed}")
            if guidance is not None and not 0 <= guidance < math.inf:
                raise ValueError(f"a guidance scale is a number from 0, not {guidance}")
        except ValueError as error:
            raise PromptFileError(f"{file}, line {line}: {error}") from error
        prompts.append(EvaluationPrompt(text, seed, guidance, attributes, None if None in size else size))
    if target is not None:
        unknown = {*target.values} - {*known.get(target.attribute, [])}
        if target.attribute not in known or unknown:
            if target.attribute in known:
                what, values = f"{target.attribute} {min(unknown)!r}", known[target.attribute]
            else:
                what, values = target.attribute, known
            raise PromptFileError(f"forget_attribute: the judge knows no {what}; it knows {', '.join(values)}")
        if not any(map(target.is_asked_by, prompts)):
            raise PromptFileError(
                f"{file}: no prompt asks for {target.attribute} {' or '.join(target.values)}; say in a column "
                f"{target.attribute!r} what each asks for"
            )
    return prompts


def _number(row: dict[str, str], columns: Sequence[str], kind: type):
    value = next((row[name] for name in columns if row.get(name)), None)
    return None if value is None else kind(value)


def check_sizes(prompts: Sequence[EvaluationPrompt], image_size: tuple[int, int]) -> None:
    """Warn of prompts whose file names another size than ``image_size`` (height, width), in which all are drawn."""
    others = [prompt.size for prompt in prompts if prompt.size is not None and prompt.size != image_size]
    if others:
        height, width = others[0]
        logger.warning(
            "prompts: %d of %d name another size than %d x %d, such as %g x %g; all are drawn in %d x %d. "
            "Figures of other sizes are not to be compared with these.",
            *(len(others), len(prompts), *image_size, height, width, *image_size),
        )


def seeded(prompts: Sequence[EvaluationPrompt], seed: int) -> list[EvaluationPrompt]:
    """The prompts, those without a seed of their own with one of the run's ``seed`` and their place."""
    return [
        replace(prompt, seed=seed * 1_000_003 + i) if prompt.seed is None else prompt
        for i, prompt in enumerate(prompts)
    ]
