"""Ray's autoscaler (v2) with the node types of cluster.yaml and its own provider of pretended machines: what it starts
are Ray nodes of this machine that say they have 48 CPUs and 4 GPUs.

    make test-cluster

`ray.cluster_utils.AutoscalingCluster` does the same and begins with `ray stop --force`, which ends every Ray of this
user; hence the head is started here.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors import lifecycle
from actors.connect import connected
from actors.launch import train
from actors.processes import of_session
from constellation.config import Config, override
from constellation.errors import PlacementError
from constellation.roster import ROLES
from tests.test_faults import THREE, assert_as_if_left_alone
from tests.waiting import wait_for

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parent.parent
GPU = {"cluster.gpus_per_kernel": 1, "cluster.cpus_per_kernel": 1, "cluster.placement_timeout_s": 600}


@dataclass
class Growing:
    """A Ray head whose autoscaler adds nodes and takes them away."""

    address: str
    session: int

    def raylets(self) -> list[int]:
        """Processes of the nodes with GPUs that are there."""
        found = of_session(self.session)
        return [pid for pid, command in found.items() if "/raylet" in command.split(" ")[0] and "GPU,4" in command]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Growing]:
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
    from ray.autoscaler._private.util import prepare_config
    from ray.util import get_node_ip_address

    config: dict[str, Any] = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    types = config["available_node_types"]
    types["ray.head.default"] = {**types.pop(config["head_node_type"]), "node_config": {}, "max_workers": 0}
    config["head_node_type"] = "ray.head.default"  # as the provider calls it
    types["gpu"]["node_config"] = {}
    config["provider"] = {
        "type": "external",  # "fake_multinode" wants a file that Ray's wheel is without
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "launch_multiple": True, "head_node_id": FAKE_HEAD_NODE_ID,
    }  # fmt: skip
    config["idle_timeout_minutes"] = 0.1
    for which in ("setup", "head_setup", "worker_setup", "initialization", "head_start_ray", "worker_start_ray"):
        config[f"{which}_commands"] = []
    config["file_mounts"] = {}
    folder = tmp_path_factory.mktemp("a")
    token, port, temp = "0f1e2d3c4b5a6978" * 4, free_port(), f"/tmp/grow-{os.getpid()}"
    config["provider"]["gcs_address"] = f"{get_node_ip_address()}:{port}"
    (folder / "autoscaling.yaml").write_text(json.dumps(config))
    here = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    environment = {
        **os.environ, **here, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT),
        "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "RAY_raylet_start_wait_time_s": "120",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}",
        f"--autoscaling-config={folder / 'autoscaling.yaml'}", "--num-cpus=0", "--num-gpus=0",
        '--resources={"autoscaling":1}', "--include-dashboard=false", "--object-store-memory=100000000",
        f"--ray-client-server-port={free_port()}", f"--temp-dir={temp}", "--disable-usage-stats",
    ]  # fmt: skip
    with (folder / "start.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    before = {name: os.environ.get(name) for name in here}
    os.environ.update(here)
    where = Path(temp) / "ray_current_cluster"
    try:
        wait_for(lambda: where.exists() or process.poll() is not None)
        assert process.poll() is None, (folder / "start.log").read_text()
        wait_for(where.read_text)
        yield Growing(where.read_text().strip(), process.pid)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        process.terminate()
        process.wait()
        for pid in of_session(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(temp, ignore_errors=True)


def test_a_node_type_that_never_comes_ends_in_one_line_within_the_timeout(
    growing: Growing, micro: Config, micro_corpus: Path, tmp_path: Path
) -> None:
    """No node of cluster.yaml has eight GPUs for one kernel."""
    config = override(micro, {**GPU, "cluster.gpus_per_kernel": 8, "cluster.placement_timeout_s": 12})
    said: list[str] = []
    with pytest.raises(PlacementError) as told:
        list(train(tmp_path / "run", micro_corpus, config, address=growing.address, roles=THREE, say=said.append))
    assert "no room within 12 s" in str(told.value) and "GPU 24" in str(told.value) and "\n" not in str(told.value)
    assert any(line.startswith("waiting for room") for line in said)


def test_a_spot_machine_taken_back_in_the_middle_of_training_costs_nothing(
    growing: Growing, micro: Config, micro_corpus: Path, micro_run: Path, tmp_path: Path
) -> None:
    """The empty cluster grows, loses its machine, gets another, and ends in the weights of a run left alone."""
    run, taken = tmp_path / "run", threading.Event()
    said: list[str] = []
    assert growing.raylets() == []

    def spot() -> None:
        wait_for(lambda: any((run / role / "checkpoints").is_dir() for role in THREE))
        for pid in growing.raylets():
            os.kill(pid, signal.SIGKILL)
        taken.set()

    thief = threading.Thread(target=spot, daemon=True)
    thief.start()
    config = override(micro, GPU)
    for _ in train(run, micro_corpus, config, address=growing.address, roles=THREE, say=said.append):
        pass
    assert taken.is_set() and any("restarting from its last checkpoint" in line for line in said), said
    assert_as_if_left_alone(run, micro_run)
    wait_for(lambda: not growing.raylets())


def test_an_empty_cluster_grows_for_a_constellation_and_shrinks_when_it_is_down(
    growing: Growing, micro_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(micro_run, run)
    wait_for(lambda: not growing.raylets())
    status = lifecycle.up(run, address=growing.address, changes=GPU, say=lambda text: None)
    assert status.state == "up" and {kernel.role for kernel in status.kernels} >= set(ROLES)
    assert len(growing.raylets()) == 2, "two machines of four GPUs"
    with connected(growing.address):
        import ray

        assert ray.cluster_resources()["GPU"] == 8
    lifecycle.down(run, say=lambda text: None)
    wait_for(lambda: not growing.raylets())
