"""Serve one compiled model with whichever unlearning adapter each request asks for.

    pip install "vdu-peft[serve]"
    python examples/hotswap_server.py --model path/or/hub-id --adapters_dir adapters/

``adapters/`` holds saved adapters, one folder each; those that come later are found too, up to the largest rank that
was there at the start (or ``--max_rank``). Open http://127.0.0.1:8000 to try it, or

    curl -X POST localhost:8000/generate -H 'Content-Type: application/json' \
        -d '{"n": 16, "adapter": "ones", "scale": 1, "seed": 0}' -o images.png

Requests are served one at a time: a swap never meets a generation. Nothing outside ``--adapters_dir`` is loaded. An
adapter that a server can switch off is no erasure.
"""

import argparse
import io
import json
import logging
import threading
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field

from vdu_peft.adapter import AdapterError, load_adapter
from vdu_peft.config import ConfigError, VDUConfig
from vdu_peft.contexts import adapter_scale
from vdu_peft.denoiser import Denoiser, ModelError
from vdu_peft.hotswap import hotswap, prepare_hotswap
from vdu_peft.pictures import image_grid
from vdu_peft.text_denoiser import TextDenoiser, open_denoiser

log = logging.getLogger(__name__)


class GenerateRequest(BaseModel):
    """What to draw. ``prompt`` is for text-to-image models; no ``adapter`` is the base model."""

    model_config = ConfigDict(extra="forbid")

    n: int = Field(16, ge=1, le=64)
    prompt: str | None = Field(None, max_length=2000)
    adapter: str | None = Field(None, max_length=255)
    scale: float = Field(1.0, ge=0, le=2)
    seed: int = Field(0, ge=0, lt=2**32)
    num_inference_steps: int = Field(25, ge=1, le=250)


class AdapterFolder:
    """The adapters that may be loaded: the folders directly below one folder.

    What holds another kind of adapter, or an unreadable one, is left out, and the log tells so once.
    """

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self._left_out: set[str] = set()

    def names(self) -> list[str]:
        parts = ("adapter_config.json", "adapter_model.safetensors")  # of one that is being copied not all are there
        whole = (f for f in self.folder.iterdir() if all(self._is_file_inside(f / part) for part in parts))
        return sorted(f.name for f in whole if self._is_ours(f))

    def _is_file_inside(self, file: Path) -> bool:
        """No link leads out, be it the file or a folder above it."""
        return file.is_file() and file.resolve().is_relative_to(self.folder)

    def _is_ours(self, folder: Path) -> bool:
        try:
            VDUConfig.from_pretrained(folder)
        except (OSError, ValueError) as error:
            if folder.name not in self._left_out:
                self._left_out.add(folder.name)
                log.warning("left out: %s", error)
            return False
        return True

    def path(self, name: str) -> Path:
        """Raises KeyError unless the name is one of :meth:`names`, so that no name is ever a path."""
        if name not in self.names():
            raise KeyError(name)
        return self.folder / name


class Service:
    """One compiled model, one adapter slot in it, one request at a time.

    Raises:
        AdapterError: no adapter to start with, or one that does not fit the model.
    """

    def __init__(self, denoiser: Denoiser, adapters: AdapterFolder, max_rank: int | None = None, compile: bool = True):
        names = adapters.names()
        if not names:
            raise AdapterError(f"{adapters.folder}: no adapters there; put a saved adapter's folder in it")
        configs = [VDUConfig.from_pretrained(adapters.path(name)) for name in names]
        ranks = [rank for config in configs for rank in (config.r, *config.rank_pattern.values())]
        self.adapters, self.lock = adapters, threading.Lock()
        self.loaded: tuple[str, int] | None = None
        peft_model = load_adapter(denoiser.model, adapters.path(names[0])).eval()
        prepare_hotswap(peft_model, max_rank or max(ranks))
        self.peft_model = peft_model
        # Steps of one size at any number of images: dynamic from the start, or every new n compiles again.
        denoiser.model = torch.compile(peft_model, dynamic=True) if compile else peft_model
        self.denoiser = denoiser
        self.metrics = CollectorRegistry()
        self.images = Counter("vdu_images", "Images drawn", ["adapter"], registry=self.metrics)
        self.swap_seconds = Histogram("vdu_swap_seconds", "Time of a swap", registry=self.metrics)
        self.generate_seconds = Histogram("vdu_generate_seconds", "Time of a request's sampling", registry=self.metrics)

    def generate(self, request: GenerateRequest) -> torch.Tensor:
        """Images (n, C, H, W) in [-1, 1].

        Raises:
            KeyError: no such adapter.
            AdapterError, ConfigError: it does not fit the model; the one that was there stays.
        """
        with self.lock, torch.inference_mode():
            if request.adapter is not None:
                self._swap(request.adapter)
            options = {"seed": request.seed, "num_inference_steps": request.num_inference_steps}
            denoiser = self.denoiser
            if isinstance(denoiser, TextDenoiser):
                denoiser = TextDenoiser(denoiser.pipeline, [request.prompt or ""])
                denoiser.model = self.denoiser.model
                options["class_labels"] = [denoiser.label(request.prompt or "")]
            elif denoiser.num_classes:
                options["class_labels"] = range(denoiser.num_classes)
            scale = 0 if request.adapter is None else request.scale
            with self.generate_seconds.time(), adapter_scale(self.peft_model, scale):
                images = denoiser.sample(request.n, **options)
            self.images.labels(request.adapter or "none").inc(request.n)
            return images

    def _swap(self, name: str) -> None:
        folder = self.adapters.path(name)
        try:
            # A folder of the same name that was written anew is another adapter.
            version = (name, (folder / "adapter_model.safetensors").stat().st_mtime_ns)
            if version != self.loaded:
                with self.swap_seconds.time():
                    hotswap(self.denoiser.model, folder)
                self.loaded = version
        except (OSError, ValueError):
            self.adapters.path(name)  # one that was taken away meanwhile is no such adapter
            raise


def create_app(service: Service) -> FastAPI:
    """The service over HTTP."""
    app = FastAPI(title="vdu_peft adapters")
    is_text = isinstance(service.denoiser, TextDenoiser)

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError) -> Response:
        # Not FastAPI's own: that says the input back, and NaN or half a surrogate pair cannot be sent.
        detail = [{part: found[part] for part in ("type", "loc", "msg")} for found in error.errors()]
        return Response(json.dumps({"detail": detail}), status_code=422, media_type="application/json")

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return PAGE.replace("PROMPT_HIDDEN", "" if is_text else "hidden")

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok", "model": service.denoiser.name, "adapters": len(service.adapters.names())}

    @app.get("/adapters")
    async def adapters() -> list[str]:
        return service.adapters.names()

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics), media_type="text/plain; version=0.0.4")

    # Alone not async: it waits for its turn in one of a fixed number of threads. Were the others to need one, health
    # would not answer while as many requests wait.
    @app.post("/generate", response_class=Response, responses={200: {"content": {"image/png": {}}}})
    def generate(request: GenerateRequest) -> Response:
        if request.prompt is not None and not is_text:
            raise HTTPException(422, "prompt: the model is not a text-to-image model; leave it out")
        try:
            images = service.generate(request)
        except KeyError as error:
            raise HTTPException(404, f"no adapter {error}; there are {', '.join(service.adapters.names())}") from error
        except (AdapterError, ConfigError, ModelError) as error:
            raise HTTPException(422, str(error)) from error
        file = io.BytesIO()
        image_grid(images, columns=min(request.n, 8), scale=3 if images.shape[-1] <= 64 else 1).save(file, "PNG")
        return Response(file.getvalue(), media_type="image/png")

    return app


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>vdu_peft adapters</title>
<style>
  body { font: 16px system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
  form { display: flex; flex-wrap: wrap; gap: 1rem; align-items: center; }
  .images { display: flex; flex-wrap: wrap; gap: 2rem; }
  img { max-width: 100%; min-height: 2rem; }
  #error { color: #b00020; }
</style>
<h1>Before and after</h1>
<form id="form">
  <label PROMPT_HIDDEN>Prompt <input id="prompt"></label>
  <label>Adapter <select id="adapter"></select></label>
  <label>Scale <input id="scale" type="range" min="0" max="1.5" step="0.1" value="1">
    <output id="shown">1</output></label>
  <label>Seed <input id="seed" type="number" min="0" value="0"></label>
  <button>Draw</button>
</form>
<p id="error" role="alert"></p>
<div class="images">
  <figure><img id="before" alt=""><figcaption>adapter off</figcaption></figure>
  <figure><img id="after" alt=""><figcaption>adapter on</figcaption></figure>
</div>
<p>An adapter that can be switched off is not secure erasure.</p>
<script>
const $ = id => document.getElementById(id);
fetch("adapters").then(r => r.json()).then(names => names.forEach(name => $("adapter").add(new Option(name, name))));
$("scale").oninput = () => $("shown").value = $("scale").value;
async function draw(image, adapter) {
  const request = {adapter, n: 16, scale: Number($("scale").value), seed: Number($("seed").value)};
  if ($("prompt").value) request.prompt = $("prompt").value;
  const response = await fetch("generate",
    {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(request)});
  if (!response.ok) throw new Error(JSON.stringify((await response.json()).detail));
  image.src = URL.createObjectURL(await response.blob());
}
$("form").onsubmit = async event => {
  event.preventDefault();
  $("error").textContent = "";
  const button = $("form").querySelector("button");
  button.disabled = true;
  try {
    await draw($("before"), null);
    await draw($("after"), $("adapter").value);
  } catch (error) {
    $("error").textContent = error.message;
  }
  button.disabled = false;
};
</script>
</html>
"""


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="pipeline folder, UNet folder or hub id")
    parser.add_argument("--adapters_dir", type=Path, required=True, help="folder of adapters")
    parser.add_argument(
        "--max_rank", type=int, help="room for adapters that come later; the largest rank when left out"
    )
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile the model"
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args(argv)
    if not args.adapters_dir.is_dir():
        parser.error(f"--adapters_dir: {args.adapters_dir} is not a folder")
    try:
        denoiser = open_denoiser(args.model).to_best_device()
        service = Service(denoiser, AdapterFolder(args.adapters_dir), args.max_rank, args.compile)
    except ValueError as error:
        parser.error(str(error))
    uvicorn.run(create_app(service), host=args.host, port=args.port)


if __name__ == "__main__":
    main()
