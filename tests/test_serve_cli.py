"""constellation serve, as a user runs it: with --local, and what it refuses. With Ray: test_serve_actors.py."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from actors import record as records
from actors.processes import of_session
from constellation.errors import ConfigError
from router.http.listen import bind, url_of
from tests.waiting import wait_for


@contextmanager
def served(*argv: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of a server, and its process, which is ended if the test has not."""
    command = [sys.executable, "-m", "constellation", "serve", "--port", "0", *argv]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        try:
            line = process.stdout.readline()
            found = re.fullmatch(r"ready: (http://\S+)/v1\n", line)
            assert found, line + process.stderr.read()
            yield found[1], process
        finally:
            process.kill()


def asked(url: str, **body: Any) -> Any:
    request = urllib.request.Request(
        url, json.dumps(body).encode() if body else None, {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as response:
        return json.loads(response.read())


def test_the_local_service_gives_the_text_of_generate_and_drains_on_sigterm(micro_run: Path) -> None:
    how = ["--max-new-tokens", "60", "--temperature", "0.9", "--top-p", "0.9", "--seed", "5"]
    command = [sys.executable, "-m", "constellation", "generate", "--run", str(micro_run), "--local", "--json",
               "--prompt", "The import statement", *how]  # fmt: skip
    expected = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    with served("--run", str(micro_run), "--local") as (url, process):
        body = {"model": "constellation", "prompt": "The import statement", "max_tokens": 60, "temperature": 0.9,
                "top_p": 0.9, "seed": 5}  # fmt: skip
        assert asked(f"{url}/v1/completions", **body)["choices"][0]["text"] == expected["text"]
        assert asked(f"{url}/v1/models")["data"][0]["id"] == "constellation"
        results: list[Any] = []
        slow = threading.Thread(target=lambda: results.append(asked(f"{url}/v1/completions", **body, n=4)))
        slow.start()
        wait_for(lambda: asked(f"{url}/health")["requests"] or not slow.is_alive())
        process.send_signal(signal.SIGTERM)
        slow.join()
        assert results and len(results[0]["choices"]) == 4, "who was inside was answered"
        assert process.wait() == 0
        assert process.stderr and "ending" in process.stderr.read()


def test_on_this_machine_it_is_asked_by_its_own_names_and_logs_each_request(micro_run: Path) -> None:
    """A page whose name was made to lead here (DNS rebinding) is not answered, nor what a page may send unasked."""

    def status(url: str, data: bytes | None = None, **headers: str) -> int:
        request = urllib.request.Request(url, data, {name.replace("_", "-"): value for name, value in headers.items()})
        try:
            with urllib.request.urlopen(request) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code

    body = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    more = ("--allow-host", "Laptop.local", "--access-log")
    with served("--run", str(micro_run), "--local", *more) as (url, process):
        port = url.rpartition(":")[2]
        for host, expected in (("evil.example", 421), (f"localhost:{port}", 200), ("laptop.local", 200)):
            assert status(f"{url}/v1/models", Host=host) == expected
        asked = f"{url}/v1/completions"
        assert status(asked, body, Content_Type="text/plain", Origin="http://evil.example") == 415
        assert status(asked, body, Content_Type="application/json", X_Request_Id="mine-7") == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
        assert process.stderr
        lines = [line for line in process.stderr.read().splitlines() if '"' in line]
        assert [line.partition('" ')[2][:3] for line in lines] == ["421", "200", "200", "415", "200"]
        assert lines[-1].endswith("mine-7") and '127.0.0.1 anyone "POST /v1/completions"' in lines[-1]


def test_ctrl_c_ends_the_service_as_an_interruption(micro_run: Path) -> None:
    with served("--run", str(micro_run), "--local") as (_, process):
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
        assert process.stderr and process.stderr.read().endswith("constellation: interrupted\n")


@pytest.mark.ray
def test_on_ray_a_run_that_is_not_up_is_brought_up_and_taken_down_in_the_end(micro_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(micro_run, run)
    with served("--run", str(run)) as (url, process):
        record = records.read(run)
        assert record is not None and record.head is not None
        body = {"model": "constellation/heart", "prompt": "The import statement", "max_tokens": 20, "temperature": 0}
        assert asked(f"{url}/v1/completions", **body)["usage"]["completion_tokens"] == 20
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
    assert records.read(run) is None and not Path(record.head.folder).exists()
    wait_for(lambda: not of_session(record.head.pid))  # SIGKILL takes a moment


def refusal(*argv: str) -> str:
    found = subprocess.run([sys.executable, "-m", "constellation", "serve", *argv], capture_output=True, text=True)
    assert found.returncode == 2 and found.stdout == "", found.stderr
    assert found.stderr.count("\n") == 1, found.stderr
    return found.stderr


def test_what_cannot_be_served_is_told_in_one_line(micro_run: Path, tmp_path: Path) -> None:
    assert "is not a constellation run" in refusal("--run", str(tmp_path))
    (tmp_path / "run").mkdir()
    for name in ("constellation.json", "tokenizer.json"):
        (tmp_path / "run" / name).write_bytes((micro_run / name).read_bytes())
    assert "not trained yet; constellation train --run" in refusal("--run", str(tmp_path / "run"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"127.0.0.1:{port}" in refusal("--run", str(micro_run), "--port", port)
    assert "choose another --port or --host" in refusal("--run", str(micro_run), "--host", "256.1.1.1")
    assert "--local is one process" in refusal("--run", str(micro_run), "--local", "--fronts", "2")
    assert "nokeys" in refusal("--run", str(micro_run), "--local", "--api-key-file", str(tmp_path / "nokeys"))


@pytest.mark.skipif(not hasattr(socket, "SO_REUSEPORT"), reason="this system cannot share a port")
def test_only_those_who_agree_share_a_port() -> None:
    with bind("127.0.0.1", 0, shared=True) as first:
        port = first.getsockname()[1]
        with bind("127.0.0.1", port, shared=True) as second:
            assert second.getsockname() == first.getsockname()
        with pytest.raises(ConfigError, match="cannot listen"):
            bind("127.0.0.1", port)


def test_the_url_of_a_wildcard_is_this_machine() -> None:
    assert [url_of(h, 1) for h in ("0.0.0.0", "::", "::1", "host")] == [
        "http://127.0.0.1:1", "http://[::1]:1", "http://[::1]:1", "http://host:1",
    ]  # fmt: skip
