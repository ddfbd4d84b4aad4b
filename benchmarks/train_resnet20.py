"""Train the judge of a data set that has none: ResNet-20, from its CIFAR-10 weights on, on all training images.

    python -m benchmarks.train_resnet20 --train_data tinyimagenet64_10class.npz \\
        --output_file benchmarks/models/resnet20_tiny_imagenet.safetensors

Mirrored and shifted by up to 4 pixels at random. Prints its accuracy on the test images, which it never saw, and keeps
that in the file's header.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm.auto import tqdm

from benchmarks.judges import ResNet20, resnet20
from vdu_peft.pixels import to_tensor

MAX_SHIFT = 4
ARRAYS = {"train_images", "train_labels", "test_images", "test_labels"}


def shifted(images: torch.Tensor) -> torch.Tensor:
    """Images (N, C, H, W), each mirrored or not and shifted by up to MAX_SHIFT pixels, by the edge's own colors."""
    height, width = images.shape[-2:]
    padded = F.pad(images, [MAX_SHIFT] * 4, mode="replicate")
    tops, lefts = torch.randint(2 * MAX_SHIFT + 1, (2, len(images))).tolist()
    crops = [x[:, top : top + height, left : left + width] for x, top, left in zip(padded, tops, lefts, strict=True)]
    mirrored = torch.rand(len(images)) < 0.5
    return torch.stack([x.flip(-1) if flip else x for x, flip in zip(crops, mirrored.tolist(), strict=True)])


def train(network: ResNet20, images: torch.Tensor, labels: torch.Tensor, epochs: int, batch_size: int) -> None:
    """By AdamW with one cycle of the learning rate, in place; images (N, 3, 32, 32) in [-1, 1], labels (N,)."""
    network.train()
    steps = epochs * -(-len(images) // batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    with tqdm(total=steps, mininterval=5) as progress:
        for _ in range(epochs):
            for index in torch.randperm(len(images)).split(batch_size):
                logits = network.linear(network.features(shifted(images[index])))
                loss = F.cross_entropy(logits, labels[index], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.update()
                progress.set_postfix(loss=f"{loss.item():.3f}")
    network.eval()


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--train_data",
        type=Path,
        required=True,
        help=".npz with train_images, train_labels, test_images, test_labels, of ten classes",
    )
    parser.add_argument("--output_file", type=Path, required=True)
    parser.add_argument("--num_train_epochs", type=int, default=40)
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not args.train_data.is_file():
        parser.error(f"{args.train_data}: not there")
    if not args.output_file.parent.is_dir():
        parser.error(f"{args.output_file.parent}: no such folder")
    arrays = np.load(args.train_data)
    if missing := sorted(ARRAYS - {*arrays}):
        parser.error(f"{args.train_data}: has no {', '.join(missing)}")
    if arrays["train_labels"].max() >= ResNet20.num_classes:
        parser.error(f"{args.train_data}: has more than {ResNet20.num_classes} classes")
    torch.manual_seed(args.seed)
    train_images, test_images = (
        torch.stack([to_tensor(image, ResNet20.image_size, ResNet20.channels) for image in arrays[name]])
        for name in ("train_images", "test_images")
    )
    train_labels, test_labels = (torch.from_numpy(arrays[name]).long() for name in ("train_labels", "test_labels"))

    network = ResNet20()
    network.load_state_dict(resnet20("cifar10").state_dict())
    train(network, train_images, train_labels, args.num_train_epochs, args.train_batch_size)
    weights = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in network.state_dict().items()
    }
    network.load_state_dict(weights)  # as they will be stored
    _, predicted = network.judge(test_images)
    accuracy = (predicted == test_labels).double().mean().item()
    print(f"test accuracy {accuracy:.4f} on {len(test_labels)} images")
    save_file(weights, args.output_file, metadata={"test_accuracy": f"{accuracy:.4f}", "seed": str(args.seed)})


if __name__ == "__main__":
    main()
