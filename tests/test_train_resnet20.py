import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks import train_resnet20
from benchmarks.judges import ResNet20, resnet20
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


def test_it_is_trained_from_cifar_10_s_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(train_resnet20, "train", lambda network, *_: network.eval())
    arrays = {"train_images": np.zeros((2, 32, 32, 3), np.uint8), "train_labels": np.arange(2)}
    arrays |= {"test_images": arrays["train_images"], "test_labels": arrays["train_labels"]}
    np.savez(tmp_path / "data.npz", **arrays)
    train_resnet20.main([f"--train_data={tmp_path / 'data.npz'}", f"--output_file={tmp_path / 'judge.safetensors'}"])
    written, start = load_file(tmp_path / "judge.safetensors"), resnet20("cifar10").state_dict()
    assert written.keys() == start.keys() and all(torch.equal(written[n].float(), start[n].float()) for n in start)


@pytest.mark.parametrize(
    ("changed", "output_file", "message"),
    [
        ({"train_labels": None}, "judge.safetensors", "has no train_labels"),
        ({"train_labels": np.full(2, 10)}, "judge.safetensors", "more than 10 classes"),
        ({}, "nowhere/judge.safetensors", "nowhere: no such folder"),
    ],
)
def test_what_it_cannot_train_on_or_write_to_is_told_first(changed, output_file, message, tmp_path, capsys):
    arrays = {f"{part}_{kind}": np.zeros(2, np.int64) for part in ("train", "test") for kind in ("images", "labels")}
    arrays = {name: array for name, array in (arrays | changed).items() if array is not None}
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(SystemExit):
        train_resnet20.main([f"--train_data={tmp_path / 'data.npz'}", f"--output_file={tmp_path / output_file}"])
    assert message in capsys.readouterr().err


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
