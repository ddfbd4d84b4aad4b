"""Train a judge that tells several attributes of an image, such as who is shown and what they hold.

    python examples/train_attribute_judge.py --train_data crawl_dolls_32.npz --output_file dolls-judge.safetensors

The .npz holds ``images`` [N, H, W, 3] uint8, ``attributes`` [N, K] strings and ``attribute_names`` [K]. The last
twentieth is held out; the judge's accuracy on it goes into the file's header.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from vdu_peft.judge import AttributeJudge
from vdu_peft.pixels import to_tensor


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_data", required=True, help=".npz with images, attributes, attribute_names")
    parser.add_argument("--output_file", type=Path, required=True)
    parser.add_argument("--num_train_epochs", type=int, default=8)
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    arrays = np.load(args.train_data, allow_pickle=False)
    size = arrays["images"].shape[1:3]
    images = torch.stack([to_tensor(image, size, 3) for image in arrays["images"]])
    columns = dict(zip(arrays["attribute_names"].tolist(), arrays["attributes"].T, strict=True))
    attributes = {name: np.unique(column).tolist() for name, column in columns.items()}
    labels = {name: torch.from_numpy(np.searchsorted(attributes[name], column)) for name, column in columns.items()}

    count = len(images) - max(len(images) // 20, 1)
    judge = AttributeJudge(attributes, size).train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=args.learning_rate)
    steps = args.num_train_epochs * (count // args.train_batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.learning_rate, total_steps=steps)
    with tqdm(total=steps, mininterval=5) as progress:
        for _ in range(args.num_train_epochs):
            for index in torch.randperm(count).split(args.train_batch_size)[: count // args.train_batch_size]:
                logits = judge(images[index])
                loss = sum(F.cross_entropy(logits[name], labels[name][index]) for name in attributes)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.update()

    judge.half().float().eval()  # as it will be stored
    _, found = judge.judge(images[count:])
    accuracy = {name: float(np.mean(np.array(found[name]) == columns[name][count:])) for name in attributes}
    print("held-out accuracy: " + ", ".join(f"{name} {value:.4f}" for name, value in accuracy.items()))
    args.output_file.parent.mkdir(parents=True, exist_ok=True)
    judge.save(args.output_file, held_out_accuracy=json.dumps(accuracy), seed=str(args.seed))


if __name__ == "__main__":
    main()
