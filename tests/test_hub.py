"""Uploads through the hub's own client, to a server on this machine that speaks its protocol."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import numpy as np
import pytest
from conftest import saved_adapter

from vdu_peft.cli import main
from vdu_peft.hub import HubError, check_hub, push_to_hub


class Hub(BaseHTTPRequestHandler):
    """Of the hub's API what an upload needs; files are taken as regular ones, without LFS."""

    def do_GET(self):
        if self.headers.get("Authorization") != "Bearer hf_secret":
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/whoami-v2":
            self.answer({"type": "user", "name": "ann"})
        else:
            self.answer({"id": "ann/robes", "sha": "0" * 40, "siblings": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        path = self.path.split("?")[0]
        if path == "/api/repos/create":
            name = json.loads(body)["name"]
            asked = json.loads(body)  # older clients say private, later ones visibility
            self.server.private.append(asked.get("private") or asked.get("visibility") == "private")
            self.server.repositories.append(name)
            self.answer({"url": f"{self.server.address}/ann/{name}", "name": f"ann/{name}"})
        elif path == "/api/validate-yaml":  # the card's front matter
            self.answer({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            files = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": f, "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{self.server.address}/ann/robes/commit/0", "commitOid": "0" * 40})
        else:
            self.answer({"error": f"unknown {path}"}, 404)

    def answer(self, content: dict, status: int = 200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.repositories, server.private, server.files = [], [], {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield server
    server.shutdown()


def test_an_export_is_uploaded_whole(hub, tmp_path, capsys):
    adapter = saved_adapter(tmp_path / "adapter")
    export = ["export", f"--adapter={adapter}", f"--output_dir={tmp_path / 'robes'}", "--push_to_hub"]
    assert main(export) == 0
    assert f"uploaded to {hub.address}/ann/robes" in capsys.readouterr().out
    assert hub.repositories == ["robes"]
    written = {f.name: f.read_bytes() for f in (tmp_path / "robes").iterdir()}
    assert hub.files == written and {"README.md", "adapter_model.safetensors"} < written.keys()
    assert hub.private == [False]


def test_of_a_run_the_adapter_alone_is_uploaded(hub, pipeline_folder, tmp_path):
    """No checkpoint, and no picture of the forget images."""
    np.savez(tmp_path / "bad.npz", images=np.random.default_rng(0).integers(0, 255, (8, 8, 8), np.uint8))
    steps = ["--max_train_steps=20", "--learning_rate=3e-2", "--train_batch_size=4", "--checkpointing_steps=20"]
    steps += ["--replay_size=8", "--replay_inference_steps=2", "--push_to_hub", "--hub_private_repo"]
    out = tmp_path / "robes"
    data = [f"--model={pipeline_folder}", f"--forget_data={tmp_path / 'bad.npz'}", f"--output_dir={out}"]
    assert main(["unlearn", *data, *steps]) == 0
    assert (out / "checkpoint.safetensors").is_file() and (out / "variations.png").is_file()
    assert hub.files == {f.name: f.read_bytes() for f in (out / "adapter").iterdir()}
    assert hub.repositories == ["robes"] and hub.private == [True]


def test_who_is_not_logged_in_is_told_before_any_work(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    adapter = saved_adapter(tmp_path / "adapter")
    export = ["export", f"--adapter={adapter}", f"--output_dir={tmp_path / 'robes'}"]
    assert main([*export, "--push_to_hub"]) == 2
    assert "log in with `hf auth login`" in capsys.readouterr().err
    assert main([*export, "--hub_model_id=ann/robes"]) == 2
    assert "hub_model_id: nothing is uploaded without push_to_hub" in capsys.readouterr().err
    assert main([*export, "--hub_private_repo"]) == 2
    assert "hub_private_repo: nothing is uploaded" in capsys.readouterr().err
    assert not (tmp_path / "robes").exists() and not hub.repositories


def test_an_upload_that_is_refused_keeps_the_folder(hub, tmp_path, monkeypatch):
    assert check_hub("robes") == "ann/robes" and check_hub("team/robes") == "team/robes"
    monkeypatch.setattr(Hub, "do_POST", lambda self: self.answer({"error": "quota"}, 403))
    adapter = saved_adapter(tmp_path / "adapter")
    with pytest.raises(HubError, match="adapter is written, try `hf upload ann/robes"):
        push_to_hub(adapter, "ann/robes", private=False)
    with pytest.raises(HubError, match="hub_model_id: "):
        check_hub("a/b/c")
    assert (adapter / "adapter_model.safetensors").is_file()
