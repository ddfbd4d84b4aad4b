"""Prompts to retain, and what shall be drawn in place of a concept within prompts."""

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from vdu_peft.schedule import ModelError


def neutral_prompts() -> list[str]:
    """Prompts of everyday things, which replay draws where the user names none."""
    return read_prompts(Path(str(resources.files("vdu_peft") / "assets" / "retain_prompts.txt")))


def read_prompts(file: str | Path) -> list[str]:
    """One prompt a line; blank lines and repetitions are dropped.

    Raises:
        ModelError: the file is missing, not text, a table, or holds no prompt.
    """
    if Path(file).suffix.lower() == ".csv":
        raise ModelError(f"{file}: a table; write the prompts alone, one a line, in a .txt file")
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{file}: not a readable text file of prompts, one a line ({error})") from error
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not prompts:
        raise ModelError(f"{file}: holds no prompt; write one a line")
    return prompts


def anchor_prompts(prompts: Sequence[str], concepts: Sequence[str], anchors: Sequence[str] = ()) -> list[str]:
    """Each prompt with other words in place of the concepts', which are looked for one after the other.

    Whole words only: "sword" is not in "two swords".

    Args:
        anchors: words for each concept, or one for all; none leaves the concepts' words out.

    Raises:
        ModelError: a prompt that holds no concept, a concept of no words, or neither one anchor nor one for each.
    """
    if not all(concept.strip() for concept in concepts):
        raise ModelError("forget_concept: must be words of the captions, not an empty text")
    if len(anchors) not in (0, 1, len(concepts)):
        raise ModelError(f"anchor_concept: {len(anchors)} for {len(concepts)} of forget_concept; give one, or one each")
    instead = list(anchors or [""])
    if len(instead) == 1:
        instead *= len(concepts)
    patterns, results = [_whole_words(concept) for concept in concepts], []
    for prompt in prompts:
        result = prompt
        # Through marks: an anchor may hold the words of a concept that is yet to come.
        for i, pattern in enumerate(patterns):
            result = re.sub(pattern, f"\0{i}\0", result)
        for i, anchor in enumerate(instead):
            result = result.replace(f"\0{i}\0", anchor)
        if result == prompt:
            raise ModelError(
                f"forget_concept: none of it is in the caption {prompt!r} (in small or capital letters as there); take "
                "that image out"
            )
        results.append(" ".join(result.split()))
    return results


def holding(prompts: Sequence[str], concepts: Sequence[str]) -> list[str]:
    """Those of the prompts that hold words of a concept, in small or capital letters and whatever stands around."""
    patterns = [_whole_words(words) for concept in concepts if (words := concept.strip(" ,.;:"))]
    return [prompt for prompt in prompts if any(re.search(pattern, prompt, re.IGNORECASE) for pattern in patterns)]


def _whole_words(text: str) -> str:
    """A pattern for the text where no word goes on at its ends."""
    start, end = (r"\b" if re.match(r"\w", letter) else "" for letter in (text[0], text[-1]))
    return f"{start}{re.escape(text)}{end}"
