"""Imports run down only, and the rooms keep out of each other's business."""

import ast
from pathlib import Path

import pytest

import vdu_peft

ROOT = Path(vdu_peft.__file__).parent
# From the ground up: none imports what comes later.
ALLOWED = {
    "atomic_folder": set(),
    "card": set(),
    "first_line": set(),
    "pixels": set(),
    "families": set(),
    "posterior": set(),
    "schedule": set(),
    "metrics": set(),
    "version": set(),
    "objective": set(),
    "learning_rate": set(),
    "peft_range": set(),
    "hub": {"first_line"},
    "data": {"pixels"},
    "judge": {"first_line", "pixels"},
    "pictures": {"pixels"},
    "layer": {"posterior"},
    "model_folder": {"first_line", "schedule"},
    "prompts": {"schedule"},
    "prompt_file": {"judge"},
    "config": {"layer"},
    "denoiser": {"first_line", "model_folder", "schedule"},
    "adapter": {"atomic_folder", "card", "config", "layer"},
    "option_file": {"config", "first_line"},
    "precision": {"config"},
    "processes": {"config"},
    "classes": {"config", "denoiser"},
    "features": {"denoiser"},
    "image_losses": {"denoiser", "objective"},
    "onnx_export": {"config", "denoiser"},
    "text_denoiser": {"denoiser", "families", "first_line", "model_folder", "schedule"},
    "text_judges": {"denoiser", "first_line", "judge", "pixels", "prompt_file"},
    "checkpoint": {"adapter", "config"},
    "compose": {"adapter", "atomic_folder", "card", "config"},
    "contexts": {"adapter", "layer", "posterior"},
    "acceleration": {"config", "precision", "processes"},
    "batch": {"classes", "config", "data", "denoiser"},
    "likeness": {"denoiser", "features"},
    "evaluation": {"config", "denoiser", "image_losses", "judge", "metrics", "pictures", "version"},
    "attack": {"text_denoiser"},
    "export": {"adapter", "atomic_folder", "card", "config", "denoiser", "onnx_export", "text_denoiser"},
    "hotswap": {"adapter", "config", "contexts"},
    "terms": {"batch", "config", "contexts", "denoiser", "objective"},
    "reached": {"batch", "config", "contexts", "denoiser", "objective"},
    "history": {"config", "reached"},
    "variations": {"batch", "config", "denoiser"},
    "replay": {"config", "denoiser", "likeness", "precision"},
    "likeness_evaluation": {"config", "contexts", "denoiser", "evaluation", "likeness", "metrics", "pictures"},
    "text_evaluation": {"evaluation", "metrics", "pictures", "prompt_file", "text_denoiser", "text_judges"},
    "options": {
        "atomic_folder",
        "checkpoint",
        "config",
        "data",
        "denoiser",
        "export",
        "option_file",
        "precision",
        "version",
    },
    "strength": {"adapter", "contexts", "denoiser", "image_losses", "likeness", "replay"},
    "cli_draw": {
        "adapter",
        "atomic_folder",
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
        "pictures",
        "prompt_file",
        "text_denoiser",
        "text_evaluation",
        "text_judges",
    },
    "run_folder": {"adapter", "card", "classes", "config", "denoiser", "reached", "strength"},
    "trainer": {
        "acceleration",
        "adapter",
        "batch",
        "checkpoint",
        "classes",
        "config",
        "contexts",
        "data",
        "denoiser",
        "history",
        "learning_rate",
        "pixels",
        "reached",
        "replay",
        "run_folder",
        "strength",
        "terms",
        "variations",
    },
    "demo": {"config", "denoiser", "evaluation", "history", "judge", "pixels", "trainer"},
    "cli_unlearn": {
        "classes",
        "config",
        "contexts",
        "demo",
        "denoiser",
        "evaluation",
        "first_line",
        "history",
        "options",
        "pictures",
        "precision",
        "prompts",
        "replay",
        "text_denoiser",
        "trainer",
    },
    "cli": {
        "adapter",
        "atomic_folder",
        "checkpoint",
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
        "pixels",
        "prompt_file",
        "text_denoiser",
        "trainer",
    },
}


def imported(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("vdu_peft.")}
    return found


MODULES = {file.stem: file for file in ROOT.glob("*.py") if not file.stem.startswith("__")}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_what_is_written_here(module):
    assert imported(MODULES[module]) == ALLOWED[module]


def test_imports_run_down():
    below = set()
    for module, its in ALLOWED.items():
        assert its <= below, module
        below.add(module)
    assert below == {*MODULES}


def test_only_layer_subclasses_peft_layers():
    bases = {
        (name, ast.unparse(base))
        for name, file in MODULES.items()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
        for base in node.bases
    }
    of_peft = {pair for pair in bases if pair[1].startswith("lora.") or pair[1] in ("LoraLayer", "LoraVariant")}
    assert {name for name, _ in of_peft} == {"layer"} and len(of_peft) == 3


def test_nothing_reads_or_writes_pickle():
    for file in ROOT.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert "torch.load(" not in text and "torch.save(" not in text and "import pickle" not in text, file


@pytest.mark.parametrize("module", sorted(MODULES))
def test_text_is_utf8_whatever_the_locale(module):
    """Cards and prompts are in any script."""
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("read_text", "write_text"):
            assert "encoding" in {keyword.arg for keyword in node.keywords}, ast.unparse(node)
