"""Fetch here, compute there: a cell whose models were fetched needs no network. The hub is a server of the test."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tiny import save_tiny_model

from scspec.cells import expand
from scspec.config import load_experiment
from scspec.results import read_cell

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = "tiny/model"
PROMPT = {"question_id": "one", "category": "letters", "turns": ["Hello"]}
#: The command line in a process that ends at once, with exit code 99, where it reaches for the network.
WITHOUT_NETWORK = """
import os, sys
sys.addaudithook(lambda event, _: event in ("socket.connect", "socket.getaddrinfo") and os._exit(99))
from scspec.cli import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a hub with one model, and with files in its repository that are none of the model's."""
    folder = save_tiny_model(tmp_path_factory.mktemp("hub"))
    for name in ("README.md", "pytorch_model.bin"):
        (folder / name).write_bytes(b"not to be fetched")

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            files = sorted(folder.iterdir())
            path = self.path.partition("?")[0]
            if path == f"/api/models/{MODEL}/revision/main":
                answer = {"id": MODEL, "sha": COMMIT, "siblings": [{"rfilename": file.name} for file in files]}
                content = json.dumps(answer).encode()
            elif path == f"/api/models/{MODEL}/tree/{COMMIT}":
                kinds = [{"type": "file", "path": file.name, "oid": file.name} for file in files]
                sized = [{**kind, "size": file.stat().st_size} for kind, file in zip(kinds, files, strict=True)]
                content = json.dumps(sized).encode()
            elif path.startswith(f"/{MODEL}/resolve/{COMMIT}/") and folder / Path(path).name in files:
                content = (folder / Path(path).name).read_bytes()
            else:
                self.send_error(404)
                return
            self.send_response(200)
            for key, value in {"ETag": f'"{Path(path).name}"', "X-Repo-Commit": COMMIT}.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def fetched(hub: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], dict]:
    """The environment in which the model was fetched, and its manifest."""
    folder = tmp_path_factory.mktemp("fetched")
    here = {"HF_ENDPOINT": hub, "HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    environment = {**os.environ, **here}
    command = [sys.executable, "-m", "scspec", "models", "fetch", MODEL, "--manifest", str(folder / "manifest.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return environment, json.loads((folder / "manifest.json").read_text())


def run_cell(folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
    """Run one cell of that model where there is no network; its file is cell.parquet in `folder`."""
    (folder / "prompts.jsonl").write_text(json.dumps(PROMPT) + "\n")
    settings = {
        "pairs": {"tiny": {"target": {"model": MODEL}, "draft": {"model": MODEL}}},
        "prompt_file": str(folder / "prompts.jsonl"),
        "max_new_tokens": 4,
        "controls": {"arms": ["float_float"]},
    }
    cell = next(cell for cell in expand(load_experiment(settings))[0] if cell.arm == "float_float")
    command = [sys.executable, "-c", WITHOUT_NETWORK, "run-cell", cell.to_json()]
    command += ["--output", str(folder / "cell.parquet")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_manifest_has_a_hash_of_all_that_was_fetched(fetched: tuple[dict[str, str], dict]) -> None:
    environment, manifest = fetched
    (snapshot,) = Path(environment["HF_HUB_CACHE"]).glob(f"models--tiny--model/snapshots/{COMMIT}")
    names = sorted(file.name for file in snapshot.iterdir())
    assert list(manifest["sha256"]) == names
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(names)
    assert not {"README.md", "pytorch_model.bin"} & set(names)


def test_a_cell_of_a_fetched_model_runs_without_network(fetched: tuple[dict[str, str], dict], tmp_path: Path) -> None:
    environment, manifest = fetched
    done = run_cell(tmp_path, {**environment, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    blocks, metadata = read_cell(tmp_path / "cell.parquet")
    assert metadata["models"]["target"] == manifest
    assert set(blocks["prompt_tokens"]) == {len(["<user>", *"Hello", "<bot>"])}  # the chat template is there


def test_a_model_that_was_not_fetched_is_named_in_one_line(
    fetched: tuple[dict[str, str], dict], tmp_path: Path
) -> None:
    done = run_cell(tmp_path, {**fetched[0], "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2
    aliases = "smollm2-135m, smollm2-distilled"
    message = f"scspec: error: model '{MODEL}': not an alias ({aliases}), not a folder, and not to be had from"
    assert done.stderr.splitlines()[-1].startswith(message)
