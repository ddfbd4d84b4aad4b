"""Imports run down only, and the rooms keep out of each other's business."""

import ast
from pathlib import Path

import pytest

import vdu_peft

ROOT = Path(vdu_peft.__file__).parent
ALLOWED = {
    "version": set(),
    "first_line": set(),
    "peft_range": set(),
    "posterior": set(),
    "objective": set(),
    "metrics": set(),
    "pixels": set(),
    "data": {"pixels"},
    "judge": {"first_line", "pixels"},
    "schedule": set(),
    "model_folder": {"first_line", "schedule"},
    "denoiser": {"first_line", "model_folder", "schedule"},
    "image_losses": {"denoiser", "objective"},
    "families": set(),
    "layer": {"posterior"},
    "config": {"layer"},
    "card": set(),
    "hub": {"first_line"},
    "text_denoiser": {"denoiser", "families", "first_line", "model_folder", "schedule"},
    "adapter": {"card", "config", "layer"},
    "contexts": {"adapter", "layer", "posterior"},
    "precision": {"config"},
    "processes": {"config"},
    "likeness": {"denoiser"},
    "replay": {"config", "denoiser", "likeness", "precision"},
    "strength": {"adapter", "contexts", "denoiser", "image_losses", "likeness", "replay"},
    "checkpoint": {"adapter", "config"},
    "classes": {"config", "denoiser"},
    "history": {"config"},
    "learning_rate": set(),
    "batch": {"classes", "config", "data", "denoiser"},
    "terms": {"batch", "config", "contexts", "denoiser", "objective"},
    "variations": {"batch", "config", "denoiser"},
    "run_folder": {"adapter", "card", "classes", "config", "denoiser", "history", "strength"},
    "trainer": {
        "adapter",
        "batch",
        "checkpoint",
        "classes",
        "history",
        "learning_rate",
        "config",
        "data",
        "contexts",
        "denoiser",
        "replay",
        "run_folder",
        "strength",
        "terms",
        "variations",
        "pixels",
        "precision",
        "processes",
    },
    "evaluation": {"config", "denoiser", "image_losses", "judge", "metrics", "pixels", "version"},
    "likeness_evaluation": {"config", "contexts", "denoiser", "evaluation", "likeness", "metrics"},
    "prompt_file": {"judge"},
    "text_judges": {"denoiser", "first_line", "judge", "pixels", "prompt_file"},
    "text_evaluation": {"evaluation", "metrics", "prompt_file", "text_denoiser", "text_judges"},
    "attack": {"text_denoiser"},
    "compose": {"adapter", "card", "config"},
    "hotswap": {"adapter", "config", "contexts"},
    "onnx_export": {"config", "denoiser"},
    "export": {"adapter", "card", "config", "denoiser", "onnx_export", "text_denoiser"},
    "demo": {"config", "denoiser", "evaluation", "judge", "pixels", "trainer"},
    "option_file": {"config", "first_line"},
    "options": {"config", "data", "denoiser", "export", "option_file", "precision", "version"},
    "cli_unlearn": {
        "classes",
        "config",
        "demo",
        "denoiser",
        "evaluation",
        "options",
        "precision",
        "text_denoiser",
        "trainer",
    },
    "cli_draw": {
        "adapter",
        "config",
        "contexts",
        "data",
        "denoiser",
        "evaluation",
        "export",
        "families",
        "judge",
        "likeness_evaluation",
        "options",
        "text_denoiser",
        "text_evaluation",
        "prompt_file",
        "text_judges",
    },
    "cli": {
        "adapter",
        "cli_draw",
        "cli_unlearn",
        "compose",
        "config",
        "denoiser",
        "export",
        "first_line",
        "hub",
        "judge",
        "options",
        "text_denoiser",
        "trainer",
        "pixels",
        "prompt_file",
    },
}


def imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("vdu_peft.")}
    return found


@pytest.mark.parametrize("module", sorted(f.stem for f in ROOT.glob("*.py") if not f.stem.startswith("__")))
def test_imports_run_down(module):
    assert imported(ROOT / f"{module}.py") <= ALLOWED[module]


def test_only_layer_subclasses_peft_layers():
    users = [f.stem for f in ROOT.glob("*.py") if "LoraVariant" in f.read_text()]
    assert users == ["layer"]


def test_nothing_reads_or_writes_pickle():
    for file in ROOT.glob("*.py"):
        text = file.read_text()
        assert "torch.load(" not in text and "torch.save(" not in text and "import pickle" not in text, file
