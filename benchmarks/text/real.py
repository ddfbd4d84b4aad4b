"""How far real images are from real images, on the judge's features: where no method that draws the anchor gets below.

    python -m benchmarks.text.real

Also of how few captions the target prompts' images are.
"""

import argparse
from pathlib import Path

from benchmarks.text.dolls import CONCEPTS, FOLDER, Dolls
from benchmarks.text.run import (
    NUM_OTHERS,
    NUM_TARGET,
    images_of_anchor,
    images_without,
    real_distances,
)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, default=FOLDER, help="with judge.safetensors and dolls.npz")
    dolls = Dolls(parser.parse_args(argv).model_dir)
    rows = []
    for concept, forgotten in CONCEPTS.items():
        prompts = dolls.evaluation_prompts(forgotten, NUM_TARGET, NUM_OTHERS)
        without = images_without(dolls, forgotten)
        for target, instead in zip(forgotten.targets, forgotten.instead, strict=True):
            captions = {prompt.text for prompt in prompts if target.is_asked_by(prompt)}
            distances = real_distances(dolls, without, images_of_anchor(dolls, target, instead))
            cells = [concept, f"{target.attribute} {instead!r}", str(len(captions))]
            rows.append((cells, distances))
    names = ["concept", "instead", f"captions of {NUM_TARGET} target images", *rows[0][1]]
    print("| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|")
    for cells, distances in rows:
        print("| " + " | ".join([*cells, *(f"{distance:.1f}" for distance in distances.values())]) + " |")


if __name__ == "__main__":
    main()
