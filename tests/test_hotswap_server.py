"""The service over HTTP against loading each adapter anew, and in a real browser where there is one."""

import asyncio
import functools
import io
import shutil
import sys
import threading
import time
from pathlib import Path

import anyio
import httpx
import numpy as np
import pytest
import torch
from conftest import saved_adapter, tiny_text_pipeline, tiny_unet
from diffusers import DDPMScheduler
from fastapi.testclient import TestClient
from PIL import Image
from torch import nn

from vdu_peft.adapter import AdapterError, load_adapter
from vdu_peft.denoiser import Denoiser
from vdu_peft.export import export_lora
from vdu_peft.pictures import image_grid

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import hotswap_server
from hotswap_server import AdapterFolder, Service, create_app

REQUEST = {"n": 3, "seed": 5, "num_inference_steps": 4}


def denoiser():
    return Denoiser(tiny_unet(), DDPMScheduler())


@pytest.fixture
def folder(tmp_path):
    """Two adapters that fit, of ranks 2 and 4, and beside their folder one that nobody may load."""
    saved_adapter(tmp_path / "adapters" / "ones", 1, r=2)
    saved_adapter(tmp_path / "adapters" / "sevens", 2, r=4, lora_alpha=2)
    saved_adapter(tmp_path / "outside", 3, r=2)
    return tmp_path / "adapters"


@pytest.fixture
def client(folder):
    return TestClient(create_app(Service(denoiser(), AdapterFolder(folder), compile=False)))


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)), dtype=int)


def fresh(adapter: Path | None = None) -> np.ndarray:
    model = denoiser()
    if adapter:
        load_adapter(model.model, adapter)
    images = model.sample(3, seed=5, num_inference_steps=4)
    return np.asarray(image_grid(images, columns=3, scale=3), dtype=int)


def test_each_request_gets_the_adapter_it_asks_for(client, folder):
    off = fresh()
    for name in ("sevens", "ones", None, "ones", "sevens"):
        response = client.post("/generate", json={**REQUEST, "adapter": name})
        assert response.status_code == 200 and response.headers["content-type"] == "image/png"
        expected = fresh(folder / name) if name else off
        # Padding to the larger rank changes the order of sums: one grey level of 255.
        assert np.abs(pixels(response.content) - expected).max() <= 1
        assert name is None or np.abs(expected - off).max() > 10
    assert np.array_equal(
        pixels(client.post("/generate", json={**REQUEST, "adapter": "ones", "scale": 0}).content), off
    )


def test_an_adapter_that_was_written_anew_is_loaded_anew(client, folder):
    client.post("/generate", json={**REQUEST, "adapter": "ones"})
    shutil.rmtree(folder / "ones")
    saved_adapter(folder / "ones", 9, r=2)
    response = client.post("/generate", json={**REQUEST, "adapter": "ones"})
    assert np.abs(pixels(response.content) - fresh(folder / "ones")).max() <= 1


@pytest.mark.parametrize(
    "name",
    ["../outside", "..", ".", "", "/etc", "link", "weights", "config", "loop", "none", "ones/../../outside"],
)
def test_nothing_outside_the_folder_is_loaded(client, folder, name):
    outside = folder.parent / "outside"
    (folder / "link").symlink_to(outside)
    (folder / "loop").symlink_to(folder / "loop")
    for linked, file in (("weights", "adapter_model.safetensors"), ("config", "adapter_config.json")):
        shutil.copytree(outside, folder / linked)
        (folder / linked / file).unlink()
        (folder / linked / file).symlink_to(outside / file)
    (folder / "none").mkdir()  # as one that is being copied: its weights are yet to come
    shutil.copy(folder / "ones" / "adapter_config.json", folder / "none")
    response = client.post("/generate", json={**REQUEST, "adapter": name})
    assert response.status_code == 404 and "there are ones, sevens" in response.json()["detail"]
    assert client.get("/adapters").json() == ["ones", "sevens"]


def test_what_is_no_adapter_of_ours_is_left_out_and_told_once(folder, caplog):
    export_lora(folder / "ones", folder / "exported")
    shutil.copytree(folder / "ones", folder / "damaged")
    (folder / "damaged" / "adapter_config.json").write_text("{")
    client = TestClient(create_app(Service(denoiser(), AdapterFolder(folder), compile=False)))
    assert client.get("/adapters").json() == client.get("/adapters").json() == ["ones", "sevens"]
    for name in ("exported", "damaged"):
        assert client.post("/generate", json={**REQUEST, "adapter": name}).status_code == 404
    exported, damaged = sorted(caplog.messages, reverse=True)
    assert "exported" in exported and "not a VDU adapter" in exported
    assert "damaged" in damaged and "not valid JSON" in damaged


@pytest.mark.parametrize("gone", [".", "adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_is_taken_away_during_a_request_is_no_such_adapter(folder, gone):
    class TakenAway(AdapterFolder):
        def path(self, name):
            path = super().path(name)
            shutil.rmtree(path) if gone == "." else (path / gone).unlink()
            return path

    service = Service(denoiser(), AdapterFolder(folder), compile=False)
    service.adapters = TakenAway(folder)
    response = TestClient(create_app(service)).post("/generate", json={**REQUEST, "adapter": "ones"})
    assert response.status_code == 404 and response.json()["detail"] == "no adapter 'ones'; there are sevens"


@pytest.mark.parametrize(
    "change", [{"n": 0}, {"n": 65}, {"scale": -1}, {"seed": -1}, {"prompt": "a cat"}, {"adaptor": "ones"}]
)
def test_bad_requests_are_refused(client, change):
    assert client.post("/generate", json={**REQUEST, **change}).status_code == 422


@pytest.mark.parametrize(
    "content", ['{"scale": NaN}', '{"scale": Infinity}', '{"seed": NaN}', '{"none": NaN}', r'{"\ud800": 1}']
)
def test_what_json_cannot_say_back_is_refused_too(client, content):
    response = client.post("/generate", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 422 and response.json()["detail"][0]["msg"]


def test_an_adapter_that_does_not_fit_is_refused_and_the_one_there_stays(client, folder):
    before = client.post("/generate", json={**REQUEST, "adapter": "ones"}).content
    saved_adapter(folder / "large", 4, r=8)
    response = client.post("/generate", json={**REQUEST, "adapter": "large"})
    assert response.status_code == 422 and "there is room for" in response.json()["detail"]
    assert client.post("/generate", json={**REQUEST, "adapter": "ones"}).content == before


def test_requests_at_once_do_not_meet(client, folder):
    expected = {name: fresh(folder / name) for name in ("ones", "sevens")}
    wrong = []

    def ask(name):
        for _ in range(5):
            content = client.post("/generate", json={**REQUEST, "adapter": name}).content
            if np.abs(pixels(content) - expected[name]).max() > 1:
                wrong.append(name)

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("ones", "sevens") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_health_answers_while_every_thread_waits_for_its_turn(folder):
    service = Service(denoiser(), AdapterFolder(folder), compile=False)

    async def ask():
        threads = anyio.to_thread.current_default_thread_limiter()
        threads.total_tokens = 2  # 40 otherwise
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            with service.lock:
                drawing = [asyncio.create_task(client.post("/generate", json=REQUEST)) for _ in range(3)]
                while threads.available_tokens:
                    await asyncio.sleep(0.01)
                paths = ("/health", "/metrics", "/adapters", "/")
                answers = [await asyncio.wait_for(client.get(path), timeout=30) for path in paths]
            return answers + await asyncio.gather(*drawing)

    assert [response.status_code for response in asyncio.run(ask())] == [200] * 7


def test_health_and_metrics(client):
    client.post("/generate", json={**REQUEST, "adapter": "ones"})
    client.post("/generate", json={**REQUEST, "adapter": "ones"})
    client.post("/generate", json=REQUEST)
    assert client.get("/health").json() == {"status": "ok", "model": "UNet2DModel", "adapters": 2}
    metrics = client.get("/metrics").text
    assert 'vdu_images_total{adapter="ones"} 6.0' in metrics and 'vdu_images_total{adapter="none"} 3.0' in metrics
    assert "vdu_swap_seconds_count 1.0" in metrics and "vdu_generate_seconds_count 3.0" in metrics


class OneConvolution(nn.Module):
    """The smallest denoiser: a UNet's tracing takes half a minute."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x_t, timesteps):
        return self.layer(x_t)


def test_a_compiled_model_serves_any_adapter_without_compiling_again(tmp_path, monkeypatch):
    from torch._dynamo.testing import CompileCounter

    saved_adapter(tmp_path / "adapters" / "ones", 1, OneConvolution(), r=2)
    saved_adapter(tmp_path / "adapters" / "sevens", 2, OneConvolution(), r=4, lora_alpha=2)
    torch.compiler.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    tiny = Denoiser(OneConvolution(), DDPMScheduler(), image_size=(8, 8), channels=1)
    client = TestClient(create_app(Service(tiny, AdapterFolder(tmp_path / "adapters"))))

    def images(**change):
        response = client.post("/generate", json={**REQUEST, **change})
        assert response.status_code == 200
        return response.content

    drawn = {adapter: images(adapter=adapter) for adapter in ("ones", None)}  # these two are two programs
    compiled = counter.frame_count
    assert compiled > 0
    changes = [{"adapter": "sevens"}, {}, {"adapter": "ones", "scale": 0.5}, {"adapter": "sevens", "n": 5}]
    assert len({*drawn.values(), *(images(**change) for change in changes)}) == 5  # the base's twice
    assert images(adapter="ones") == drawn["ones"]
    assert counter.frame_count == compiled


def test_text_to_image(tmp_path):
    from vdu_peft.text_denoiser import TextDenoiser

    saved_adapter(tmp_path / "adapters" / "cats", 1, tiny_text_pipeline(tmp_path / "tokenizer").unet)
    text = TextDenoiser(tiny_text_pipeline(tmp_path / "tokenizer"), [""])
    client = TestClient(create_app(Service(text, AdapterFolder(tmp_path / "adapters"), compile=False)))
    contents = {
        client.post("/generate", json={"n": 1, "num_inference_steps": 2, "prompt": prompt, "adapter": adapter}).content
        for prompt in ("a cat", "a dog")
        for adapter in ("cats", None)
    }
    assert len(contents) == 4


def test_nothing_to_serve_is_an_error(tmp_path, capsys):
    with pytest.raises(AdapterError, match="no adapters there"):
        Service(denoiser(), AdapterFolder(tmp_path))
    with pytest.raises(SystemExit):
        hotswap_server.main([f"--model={tmp_path}", f"--adapters_dir={tmp_path / 'none'}"])
    assert "is not a folder" in capsys.readouterr().err


@pytest.fixture
def browser():
    selenium = pytest.importorskip("selenium.webdriver")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("no chromium and chromedriver on this machine")
    options = selenium.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield driver
    driver.quit()


@pytest.fixture
def address(folder):
    import uvicorn

    app = create_app(Service(denoiser(), AdapterFolder(folder), compile=False))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


# Resolves to the RGB values of the two images, once both are other files than when it was called last.
PIXELS = """
const done = arguments[0], images = ["before", "after"].map(id => document.getElementById(id));
const poll = () => {
  if (!images.every(image => image.naturalWidth && image.complete && image.src !== image.seen))
    return setTimeout(poll, 20);
  done(images.map(image => {
    const canvas = document.createElement("canvas"), context = canvas.getContext("2d");
    [canvas.width, canvas.height, image.seen] = [image.naturalWidth, image.naturalHeight, image.src];
    context.drawImage(image, 0, 0);
    return [...context.getImageData(0, 0, canvas.width, canvas.height).data].filter((_, i) => i % 4 < 3);
  }));
};
poll();
"""


def test_the_page_draws_before_and_after(browser, address):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select, WebDriverWait

    browser.get(address)
    wait = WebDriverWait(browser, 60)
    wait.until(lambda b: len(b.find_elements(By.CSS_SELECTOR, "#adapter option")) == 2)
    Select(browser.find_element(By.ID, "adapter")).select_by_visible_text("sevens")
    assert not browser.find_element(By.ID, "prompt").is_displayed()
    browser.set_script_timeout(60)
    slider, shown = browser.find_element(By.ID, "scale"), browser.find_element(By.ID, "shown")
    drawn = {}
    for key, scale in ((None, "1"), (Keys.HOME, "0"), (Keys.END, "1.5")):
        if key:
            slider.send_keys(key)
        assert shown.text == scale
        browser.find_element(By.TAG_NAME, "button").click()
        before, after = browser.execute_async_script(PIXELS)
        drawn[scale] = before, after
        assert len(after) == (2 * 8 * 3) * (8 * 8 * 3) * 3  # two rows of 8 images, 8 x 8 at three times the size, RGB
        wait.until(lambda b: b.find_element(By.TAG_NAME, "button").is_enabled())
    (off, one), (off_at_0, zero), (off_at_more, more) = drawn.values()
    assert off == off_at_0 == off_at_more == zero
    assert off != one != more != off
    assert browser.find_element(By.ID, "error").text == ""
    # What the server refuses, the page shows.
    seed = browser.find_element(By.ID, "seed")
    browser.execute_script("arguments[0].removeAttribute('min'); arguments[0].value = -1", seed)
    browser.find_element(By.TAG_NAME, "button").click()
    wait.until(lambda b: "greater than or equal" in b.find_element(By.ID, "error").text)
