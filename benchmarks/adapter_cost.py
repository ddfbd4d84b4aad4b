"""What an adapter costs in use, on the demo model: forward passes against the base's, a swap against sampling.

    python -m benchmarks.adapter_cost

Writes ``adapter-cost.json`` into the results. The ratios are of medians of alternating passes in one process.
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from benchmarks.experiment import RESULTS
from benchmarks.results import write_result
from benchmarks.run import code_version, environment
from vdu_peft.adapter import attach, load_adapter, save_adapter, variational_layers
from vdu_peft.config import VDUConfig
from vdu_peft.demo import SAMPLE_STEPS, base_denoiser
from vdu_peft.hotswap import hotswap, prepare_hotswap

BATCH_SIZE, NAME = 16, "adapter-cost.json"


def random_adapter(folder: Path, seed: int) -> Path:
    """An adapter of the demo model whose delta is not zero."""
    model = base_denoiser().model
    peft_model = attach(model, VDUConfig.for_model(model))
    torch.manual_seed(seed)
    for _, layer in variational_layers(peft_model):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.01)
    save_adapter(peft_model, folder)
    return folder


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def measure(repeats: int) -> dict:
    """Medians over ``repeats``, in seconds, and their ratios."""
    with tempfile.TemporaryDirectory() as folder:
        adapters = [random_adapter(Path(folder) / str(i), i) for i in range(2)]
        denoiser = base_denoiser()
        x_t = torch.randn(BATCH_SIZE, *denoiser.latent_shape, device=denoiser.device)
        timesteps = torch.full((BATCH_SIZE,), 500, device=denoiser.device)
        unmerged = load_adapter(copy.deepcopy(denoiser.model), adapters[0]).eval()
        merged = load_adapter(copy.deepcopy(denoiser.model), adapters[0]).merge_and_unload().eval()
        models = {"base": denoiser.model, "unmerged": unmerged, "merged": merged}
        times: dict[str, list[float]] = {name: [] for name in models}
        for repeat in range(repeats + 1):
            for name, model in models.items():
                spent = seconds(lambda model=model: model(x_t, timesteps))
                if repeat:  # the first warms up
                    times[name].append(spent)
        denoiser.model = unmerged
        prepare_hotswap(unmerged, max_rank=4)
        swaps = [seconds(lambda i=i: hotswap(unmerged, adapters[i % 2])) for i in range(1, repeats + 1)]
        runs = [seconds(lambda: denoiser.sample(BATCH_SIZE, seed=0)) for _ in range(min(3, repeats))]
    medians = {name: median(values) for name, values in times.items()}
    return {
        "batch_size": BATCH_SIZE,
        "repeats": repeats,
        "forward_seconds": medians,
        "unmerged_ratio": medians["unmerged"] / medians["base"],
        "merged_ratio": medians["merged"] / medians["base"],
        "swap_seconds": median(swaps),
        "sampling_seconds": median(runs),
        "sampler": f"DDIM, {SAMPLE_STEPS} steps, {BATCH_SIZE} images",
        "swap_share": median(swaps) / median(runs),
    }


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    record = {**measure(args.repeats), "environment": environment(code_version())}
    write_result(args.results_dir / NAME, record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
