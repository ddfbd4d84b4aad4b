"""Train the demo's judge on MNIST and pack the demo's real images.

    python examples/train_judge.py --train_data mnist.npz --output_dir vdu_peft/assets/mnist

Writes ``judge.safetensors`` (test accuracy in its header) and ``images.npz``: 100 training images per
digit for the forget set, and 300 test images per digit as the reference of u-FID.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm.auto import tqdm

from vdu_peft.judge import Judge
from vdu_peft.pixels import to_tensor


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--train_data", required=True, help=".npz with train_images, train_labels, test_images, test_labels"
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_train_epochs", type=int, default=6)
    parser.add_argument("--train_batch_size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    arrays = np.load(args.train_data)
    size, channels = (28, 28), 1
    images = torch.stack([to_tensor(i, size, channels) for i in arrays["train_images"]])
    labels = torch.from_numpy(arrays["train_labels"]).long()
    judge = Judge().train()
    steps = args.num_train_epochs * (len(images) // args.train_batch_size)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    with tqdm(total=steps, mininterval=5) as progress:
        for _ in range(args.num_train_epochs):
            order = torch.randperm(len(images))[: steps // args.num_train_epochs * args.train_batch_size]
            for index in order.split(args.train_batch_size):
                loss = F.cross_entropy(judge(images[index]), labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.update()

    judge.half().float().eval()  # as it will be stored
    test_images = torch.stack([to_tensor(i, size, channels) for i in arrays["test_images"]])
    _, predicted = judge.judge(test_images)
    accuracy = (predicted.numpy() == arrays["test_labels"]).mean()
    print(f"test accuracy {accuracy:.4f}")
    save_file(
        {name: tensor.half() for name, tensor in judge.state_dict().items()},
        args.output_dir / "judge.safetensors",
        metadata={"test_accuracy": f"{accuracy:.4f}", "seed": str(args.seed)},
    )
    forget = np.concatenate([np.flatnonzero(arrays["train_labels"] == d)[:100] for d in range(10)])
    reference = np.concatenate([np.flatnonzero(arrays["test_labels"] == d)[:300] for d in range(10)])
    np.savez_compressed(
        args.output_dir / "images.npz",
        forget_images=arrays["train_images"][forget],
        forget_labels=arrays["train_labels"][forget],
        reference_images=arrays["test_images"][reference],
        reference_labels=arrays["test_labels"][reference],
    )


if __name__ == "__main__":
    main()
