import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks import train_resnet20
from benchmarks.judges import ResNet20
from vdu_peft.pixels import to_tensor


def test_a_judge_learns_its_classes_and_tells_its_accuracy(tmp_path):
    """Dark and bright images, with noise: which is which CIFAR-10's classes do not say."""
    rng = np.random.default_rng(0)
    labels = np.arange(96) % 2
    images = (60 + 120 * labels[:, None, None, None] + rng.normal(0, 20, (96, 32, 32, 3))).clip(0, 255).astype(np.uint8)
    data, file = tmp_path / "data.npz", tmp_path / "judge.safetensors"
    parts = {"train_images": images[:64], "train_labels": labels[:64]}
    np.savez(data, **parts, test_images=images[64:], test_labels=labels[64:])
    options = [f"--train_data={data}", f"--output_file={file}", "--num_train_epochs=8", "--train_batch_size=16"]
    train_resnet20.main(options)

    judge = ResNet20().eval()
    judge.load_state_dict({name: tensor.float() for name, tensor in load_file(file).items()})
    test_images = torch.stack([to_tensor(image, (32, 32), 3) for image in images[64:]])
    accuracy = (judge.judge(test_images)[1].numpy() == labels[64:]).mean()
    with safe_open(file, "pt") as stored:
        assert stored.metadata()["test_accuracy"] == f"{accuracy:.4f}"
    assert accuracy > 0.9
    with pytest.raises(SystemExit):
        train_resnet20.main(["--train_data=nowhere.npz", f"--output_file={file}"])


def test_shifted_images_are_crops_of_the_padded_ones_mirrored_or_not():
    torch.manual_seed(0)
    images = torch.rand(8, 3, 6, 6)
    padded = F.pad(images, [4] * 4, mode="replicate")
    found = set()
    for image, crops in zip(train_resnet20.shifted(images), padded.unfold(2, 6, 1).unfold(3, 6, 1), strict=True):
        places = crops.permute(1, 2, 0, 3, 4)  # (9, 9, 3, 6, 6)
        for mirrored in (False, True):
            same = (places == (image.flip(-1) if mirrored else image)).flatten(2).all(2)
            found |= {(mirrored, *place) for place in same.nonzero().tolist()}
    assert len(found) == 8 and {mirrored for mirrored, *_ in found} == {False, True}
