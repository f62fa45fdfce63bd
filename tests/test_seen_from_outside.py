"""What others see of a constellation: Ray's job server, its dashboard's lists, a real Prometheus, the Grafana panels.

One Ray head with its dashboard, ten more processes than the others' Ray: hence slow.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from constellation.roster import OCEAN, ROLES
from tests.waiting import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parent.parent
TARGETS = (sys.executable, "-m", "constellation", "targets")
PANELS = json.loads((ROOT / "deploy" / "grafana" / "constellation.json").read_text())["panels"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ray_command(*words: str) -> list[str]:
    return [sys.executable, "-m", "ray.scripts.scripts", *words]


@dataclass
class Dashboard:
    """A Ray head with its dashboard, and how programs reach it."""

    address: str
    url: str
    environment: dict[str, str]
    folder: Path

    def ask(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    folder = Path(tmp_path_factory.mktemp("d"))
    token = folder / "token"
    token.write_text("0123456789abcdef" * 4)
    port, dashboard = free_port(), free_port()
    environment = {
        **os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": "120", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    command = ray_command(
        "start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=4",
        f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", "--object-store-memory=100000000",
        f"--ray-client-server-port={free_port()}", f"--temp-dir=/tmp/seen-{os.getpid()}", "--disable-usage-stats",
    )  # fmt: skip
    with (folder / "start.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    found = Dashboard(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", environment, folder)
    try:
        first = ray_command("job", "submit", "--address", found.url, "--", "true")  # until somebody takes a job
        wait_for(lambda: subprocess.run(first, env=environment, capture_output=True).returncode == 0)
        yield found
    finally:
        from actors.processes import of_session

        process.terminate()
        process.wait()
        for pid in of_session(process.pid):
            os.kill(pid, 9)
        shutil.rmtree(f"/tmp/seen-{os.getpid()}", ignore_errors=True)


@pytest.fixture(scope="module")
def job(head: Dashboard, prometheus: str, micro_corpus: Path) -> Path:
    """The run that `ray job submit` has trained."""
    run = head.folder / "submitted"
    changes = ["train.tokens=200000", "train.ocean_share=0.2", "train.batch=8", "train.eval_bytes=2048",
               "train.sample_bytes=0", "train.checkpoint_every=10", "cluster.cpus_per_kernel=0.25",
               "kernel.vocab_size=288", "router.dims=16", "router.max_prefix=512"]  # fmt: skip
    told = head.ask(
        *ray_command("job", "submit", "--address", head.url, "--submission-id", "trained", "--"), "constellation",
        "train", "--preset", "tiny", "--corpus", str(micro_corpus), "--run", str(run), *changes,
    )  # fmt: skip
    assert "succeeded" in told
    return run


def test_a_submitted_job_trains_in_the_ray_that_it_was_submitted_to(head: Dashboard, job: Path) -> None:
    from constellation.pipeline.status import finished

    assert finished(job)
    jobs = head.ask(*ray_command("job", "list", "--address", head.url))
    assert "SUCCEEDED" in jobs and "constellation train" in jobs


@pytest.fixture(scope="module")
def service(head: Dashboard, job: Path) -> Iterator[str]:
    """The URL of two fronts on one port, in the same Ray."""
    log = head.folder / "serve.log"
    command = [sys.executable, "-m", "constellation", "serve", "--run", str(job), "--address", head.address,
               "--port", "0", "--fronts", "2"]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=head.environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: "ready: " in log.read_text() or process.poll() is not None)
        yield re.findall(r"ready: (\S+)", log.read_text())[0]
    finally:
        process.terminate()
        process.wait()


def test_actors_and_placement_groups_say_what_they_are(head: Dashboard, service: str, job: Path) -> None:
    listed = head.ask(*ray_command("list", "actors", "--address", head.url, "--detail", "--format=json", "--limit=500"))
    actors = json.loads(listed)
    shown = {actor["repr_name"] for actor in actors if actor["state"] == "ALIVE"}
    assert shown >= {OCEAN, *ROLES, "router", "supervisor of submitted", "front of submitted"}
    assert all(actor["name"] for actor in actors if actor["state"] == "ALIVE" and "Mailbox" in actor["class_name"])
    groups = json.loads(head.ask(*ray_command("list", "placement-groups", "--address", head.url, "--format=json")))
    names = {group["name"]: group["state"] for group in groups}
    assert names["constellation.submitted"] == "CREATED"
    assert any(name.startswith("train submitted ") for name, state in names.items() if state == "REMOVED")


@pytest.fixture(scope="module")
def prometheus(head: Dashboard) -> Iterator[str]:
    """The URL of a Prometheus that runs by deploy/grafana/prometheus.yml on what `constellation targets` names.

    It is there before the job, for gauges go with the process that told them.
    """
    if not shutil.which("prometheus"):
        yield ""
        return
    folder = head.folder / "prometheus"
    folder.mkdir()
    head.ask(*TARGETS, "--address", head.address, "--out", str(folder / "targets.json"))
    config = yaml.safe_load((ROOT / "deploy" / "grafana" / "prometheus.yml").read_text())
    config["global"]["scrape_interval"] = "1s"  # the test would wait ten times as long
    config["scrape_configs"][0]["file_sd_configs"][0]["refresh_interval"] = "1s"
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    at = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
               f"--web.listen-address={at}"]  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield f"http://{at}"
    finally:
        process.terminate()
        process.wait()


def query(prometheus: str, expression: str) -> list[dict[str, Any]]:
    """What a panel would draw of the last half hour: rows with "values"."""
    if not prometheus:
        pytest.skip("no prometheus on the PATH: apt-get install prometheus")
    now = time.time()
    asked = urllib.parse.urlencode({"query": expression, "start": now - 1800, "end": now, "step": 2})
    url = f"{prometheus}/api/v1/query_range?{asked}"
    try:
        with urllib.request.urlopen(url) as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    except urllib.error.HTTPError as error:
        if error.code == 503:
            return []  # it is still starting
        raise AssertionError(f"{expression}: {error.read().decode()}") from None
    except OSError:
        return []  # it is still starting
    return found


def ask(url: str, text: str) -> None:
    body = json.dumps({"model": "constellation", "prompt": text, "max_tokens": 24, "stream": True}).encode()
    request = urllib.request.Request(f"{url}/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        assert answer.read().rstrip().endswith(b"[DONE]")


def test_every_front_and_node_is_asked(head: Dashboard, prometheus: str, service: str, job: Path) -> None:
    out = head.folder / "targets.json"
    head.ask(*TARGETS, "--run", str(job), "--out", str(out))
    groups = json.loads(out.read_text())
    if prometheus:
        os.replace(out, head.folder / "prometheus" / "targets.json")
    wanted = {target for group in groups for target in group["targets"]}
    assert len(groups) == 3 and len(wanted) == 3, "a node and two fronts, each at a port of its own"
    wait_for(lambda: {row["metric"]["instance"] for row in query(prometheus, "up == 1")} == wanted)
    assert {row["metric"]["job"] for row in query(prometheus, "up")} == {"ray", "constellation-front"}


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_query_of_the_dashboard_returns_numbers(panel: dict[str, Any], prometheus: str, service: str) -> None:
    for target in panel["targets"]:
        expression = target["expr"].replace("$__rate_interval", "1m").replace("$run", ".*")

        def numbers(expression: str = expression) -> bool:
            if "constellation_" in expression and "ray_" not in expression:
                ask(service, "The import statement")
            return any(value != "NaN" for row in query(prometheus, expression) for _, value in row["values"])

        wait_for(numbers)
        labels = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        assert all(labels <= set(row["metric"]) for row in query(prometheus, expression))
