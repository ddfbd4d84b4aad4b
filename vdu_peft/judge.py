"""Small classifiers that judge generated images: what they show, and features for FID."""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from vdu_peft.first_line import first_line
from vdu_peft.pixels import to_pixels


class JudgeError(ValueError):
    """A judge that cannot be loaded; the message names the file and the mend."""


class Judge(nn.Module):
    """Two convolutions and two linear layers for 28 x 28 grayscale images in [-1, 1].

    Dropout makes the features redundant, so that FID on them does not hang on a single unit.
    """

    num_features = 64
    image_size, channels = (28, 28), 1
    class_names = None

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(1, 16, 3)
        self.conv2 = nn.Conv2d(16, 32, 3)
        self.features_layer = nn.Linear(32 * 5 * 5, self.num_features)
        self.head = nn.Linear(self.num_features, num_classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 1, 28, 28) in [-1, 1] → (N, 64), non-negative."""
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return F.relu(self.features_layer(x.flatten(1)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (N, num_classes)."""
        return self.head(F.dropout(self.features(images), 0.5, self.training))

    @torch.no_grad()
    def judge(self, images: torch.Tensor, batch_size: int = 500) -> tuple[torch.Tensor, torch.Tensor]:
        """(features (N, 64), labels (N,) int64) of images (N, 1, 28, 28) in [-1, 1]."""
        features = torch.cat([self.features(batch) for batch in images.split(batch_size)])
        return features, self.head(features).argmax(1)

    @classmethod
    def from_file(cls, file: str | Path) -> "Judge":
        """Read safetensors weights.

        Raises:
            JudgeError: the file is missing, unreadable or of another network.
        """
        judge = cls()
        try:
            judge.load_state_dict({name: tensor.float() for name, tensor in load_file(file).items()})
        except (OSError, SafetensorError, RuntimeError) as error:
            raise JudgeError(
                f"{file}: not the weights of a judge, as examples/train_judge.py writes them ({first_line(error)})"
            ) from error
        return judge.eval()


class PretrainedJudge(nn.Module):
    """An image classifier of transformers, which sees images of any size as its own processor prepares them.

    Its features are what the linear layer reads that gives its classes, (N, F).

    Args:
        model: of ``AutoModelForImageClassification``.
        processor: its image processor.

    Raises:
        JudgeError: no linear layer gives the model's classes.
    """

    def __init__(self, model: nn.Module, processor):
        super().__init__()
        self.model, self.processor = model.float().eval(), processor
        self.num_classes = model.config.num_labels
        self.channels = getattr(model.config, "num_channels", 3)
        # ImageNet's hold synonyms, after commas; those that a config makes up say nothing.
        names = [model.config.id2label[i].split(",")[0] for i in range(self.num_classes)]
        self.class_names = None if names == [f"LABEL_{i}" for i in range(self.num_classes)] else names
        layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == self.num_classes]
        if not layers:
            raise JudgeError(f"{type(model).__name__}: no linear layer gives its {self.num_classes} classes")
        self.head = layers[-1]
        self.num_features = self.head.in_features

    @torch.no_grad()
    def judge(self, images: torch.Tensor, batch_size: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
        """(features (N, F), labels (N,) int64), both on the CPU, of images (N, C, H, W) in [-1, 1].

        C is 1, gray, or what the classifier was trained on.

        Raises:
            JudgeError: the classes are not one linear layer's output, so that what it reads would tell another story.
        """
        features, labels, passes = [], [], []
        hook = self.head.register_forward_hook(lambda _, inputs, output: passes.append((inputs[0], output)))
        batches = images.split(batch_size)
        try:
            for batch in tqdm(batches, desc="judge", leave=False, disable=len(batches) == 1):
                pixels = list(to_pixels(batch).expand(-1, self.channels, -1, -1))
                inputs = self.processor(images=pixels, input_data_format="channels_first", return_tensors="pt")
                logits = self.model(**inputs.to(self.head.weight.device)).logits
                if len(passes) != 1 or not torch.equal(passes[0][1], logits):
                    raise JudgeError(f"{type(self.model).__name__}: its classes are not one linear layer's output")
                features.append(passes.pop()[0].cpu())
                labels.append(logits.argmax(1).cpu())
        finally:
            hook.remove()
        return torch.cat(features), torch.cat(labels)

    @classmethod
    def from_pretrained(cls, name_or_path: str) -> "PretrainedJudge":
        """Of a folder or hub id, such as ``microsoft/resnet-50``; safetensors only.

        Raises:
            JudgeError: it cannot be loaded or run, or is no classifier with all its weights.
        """
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        try:
            model, loaded = AutoModelForImageClassification.from_pretrained(
                name_or_path, use_safetensors=True, output_loading_info=True
            )
            processor = AutoImageProcessor.from_pretrained(name_or_path)
            if missing := [*loaded["missing_keys"], *loaded["mismatched_keys"]]:
                raise JudgeError(f"not a trained classifier; its weights lack {missing[0]}")
            judge = cls(model, processor)
            judge.judge(torch.zeros(1, judge.channels, 32, 32))  # what cannot be judged with fails now
        except (OSError, ValueError, RuntimeError, ImportError, TypeError) as error:
            raise JudgeError(f"{name_or_path}: cannot be used as an image classifier ({first_line(error)})") from error
        return judge


def open_judge(name_or_path: str, device: torch.device) -> Judge | PretrainedJudge:
    """A judge of classes: a safetensors file of ours, else a folder or hub id of transformers.

    Args:
        device: where the latter computes; ours are small.

    Raises:
        JudgeError: it cannot be loaded.
    """
    if name_or_path.endswith(".safetensors") or Path(name_or_path).is_file():
        return Judge.from_file(name_or_path)
    return PretrainedJudge.from_pretrained(name_or_path).to(device)


# At a time: the first layer makes 32 numbers of each, in all 64 MiB.
JUDGED_PIXELS = 2**19


class AttributeJudge(nn.Module):
    """Four convolutions and a head for every attribute, for RGB images of one size in [-1, 1].

    Strides instead of pooling, and none in the first layer: attributes may be told by single pixels.

    Args:
        attributes: every attribute's values; the empty one, where there is one, stands for "none of them".
        image_size: (height, width), multiples of 8.
    """

    num_features = 64
    channels = 3

    def __init__(self, attributes: dict[str, list[str]], image_size: tuple[int, int]):
        super().__init__()
        self.attributes = {name: list(values) for name, values in attributes.items()}
        self.image_size = tuple(image_size)
        blocks = []
        for in_channels, out_channels, stride in ((3, 32, 1), (32, 64, 2), (64, 64, 2), (64, 64, 2)):
            conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
            blocks += [conv, nn.BatchNorm2d(out_channels), nn.ReLU()]
        self.convs = nn.Sequential(*blocks)
        height, width = self.image_size
        self.features_layer = nn.Linear(64 * (height // 8) * (width // 8), self.num_features)
        # By number: an attribute may be called what no module may.
        self.heads = nn.ModuleList([nn.Linear(self.num_features, len(values)) for values in attributes.values()])

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) in [-1, 1] → (N, 64), non-negative."""
        return F.relu(self.features_layer(self.convs(images).flatten(1)))

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits (N, number of its values) of every attribute."""
        features = F.dropout(self.features(images), 0.3, self.training)
        return {name: head(features) for name, head in zip(self.attributes, self.heads, strict=True)}

    @torch.no_grad()
    def judge(self, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, list[str]]]:
        """(features (N, 64), the value of every attribute, N each) of images (N, 3, H, W) in [-1, 1]."""
        at_a_time = max(1, JUDGED_PIXELS // math.prod(self.image_size))
        features = torch.cat([self.features(batch) for batch in images.split(at_a_time)])
        found = {}
        for (name, values), head in zip(self.attributes.items(), self.heads, strict=True):
            found[name] = [values[i] for i in head(features).argmax(1)]
        return features, found

    def save(self, file: str | Path, **facts: str) -> None:
        """Write float16 weights with attributes, image size and ``facts`` in the header."""
        header = {"attributes": json.dumps(self.attributes), "image_size": json.dumps(self.image_size), **facts}
        tensors = {
            name: tensor.half().contiguous() if tensor.is_floating_point() else tensor
            for name, tensor in self.state_dict().items()
        }
        save_file(tensors, file, metadata=header)

    @classmethod
    def from_file(cls, file: str | Path) -> "AttributeJudge":
        """Read what :meth:`save` wrote.

        Raises:
            JudgeError: the file is missing, unreadable or of another network.
        """
        try:
            with safe_open(file, framework="pt") as stored:
                header = stored.metadata() or {}
            judge = cls(json.loads(header["attributes"]), json.loads(header["image_size"]))
            judge.load_state_dict({name: tensor.float() for name, tensor in load_file(file).items()})
        except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as error:
            raise JudgeError(
                f"{file}: not the weights of an attribute judge, as examples/train_attribute_judge.py writes them "
                f"({first_line(error)})"
            ) from error
        return judge.eval()
