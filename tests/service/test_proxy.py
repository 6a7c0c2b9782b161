"""The example of a proxy: nginx with TLS before the service, as a client sees it."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import ssl
import subprocess
import time
from pathlib import Path

import pytest

from tests.service.support import ADDRESS, Running
from tests.service.test_quotas import step

pytestmark = pytest.mark.ranks

MAIN = """
daemon off; pid {folder}/pid; error_log {folder}/error.log;
events {{}}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  include {folder}/lobra.conf;
}}
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind((ADDRESS, 0))
        return int(found.getsockname()[1])


def test_the_example_of_nginx_works(mixed: Running, project_root: Path, tmp_path: Path) -> None:
    for program in ("nginx", "openssl"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    port = free_port()
    text = (project_root / "examples/nginx/lobra.conf").read_text()
    for example, own in (
        ("127.0.0.1:8000", f"127.0.0.1:{mixed.port}"), ("listen 443", f"listen {port}"),
        ("/etc/nginx/lobra", f"{tmp_path}/lobra"),
    ):  # fmt: skip
        assert example in text
        text = text.replace(example, own)
    (tmp_path / "lobra.conf").write_text(text)
    (tmp_path / "nginx.conf").write_text(MAIN.format(folder=tmp_path))
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj",
         "/CN=lobra.example.com", "-keyout", tmp_path / "lobra.key",
         "-out", tmp_path / "lobra.crt"],
        check=True, capture_output=True,
    )  # fmt: skip
    client = mixed.client("proxied")
    model = client.new_model(client.new_session(), 0, rank=2)
    step(client, model, 1)
    trusted = ssl.create_default_context(cafile=str(tmp_path / "lobra.crt"))
    trusted.check_hostname = False
    process = subprocess.Popen(["nginx", "-c", tmp_path / "nginx.conf"], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while socket.socket().connect_ex((ADDRESS, port)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)

        def ask(method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
            connection = http.client.HTTPSConnection(ADDRESS, port, context=trusted, timeout=60)
            headers = {"X-API-Key": client.key, "Content-Type": "application/json"}
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()

        status, content = ask("POST", "/api/v1/get_info", json.dumps({"model_id": model}).encode())
        assert (status, json.loads(content)["lora_rank"]) == (200, 2)
        save = json.dumps({"model_id": model, "seq_id": 3, "path": "a"}).encode()
        client.result(json.loads(ask("POST", "/api/v1/save_weights", save)[1]))
        status, content = ask("GET", f"/api/v1/training_runs/{model}/checkpoints/weights/a/archive")
        assert (status, b"adapter_model.safetensors" in content) == (200, True)
        assert ask("GET", "/")[0] == 200
        assert ask("POST", "/api/v1/optim_step", b"0" * (33 << 20))[0] == 413
    finally:
        process.terminate()
        process.wait(20)
