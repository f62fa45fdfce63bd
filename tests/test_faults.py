"""Kill anything at any moment: the run ends with the weights, optimizer and history of a run left alone, bit for bit.

The run left alone (conftest.micro_run) is the plain loop in one process, without Ray.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from actors import launch, supervisor
from actors.launch import train
from actors.processes import of_session
from constellation.config import Config, override
from constellation.errors import ConfigError
from constellation.pipeline.status import VIEW, done, folder_status
from constellation.roster import OCEAN, ROLES
from tests.waiting import wait_for

pytestmark = pytest.mark.ray

THREE = ROLES[:3]
DRIVER = """
import json, sys
from pathlib import Path
from actors import launch, supervisor
from constellation.config import from_json

supervisor.BEAT_S = launch.VIEW_EVERY_S = 0.1  # instead of 1 s: this run is short
run, corpus, config, address, roles = json.loads(sys.argv[1])
try:
    for step in launch.train(Path(run), Path(corpus), from_json(config), address=address, num_cpus=2, roles=roles,
                             say=lambda text: print("say", text, flush=True)):
        print("step", step.role, step.step, flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(1)
"""


def assert_as_if_left_alone(run: Path, alone: Path, roles: tuple[str, ...] = THREE) -> None:
    for role in (OCEAN, *roles):
        assert done(run / role)
        mine, theirs = (sorted((r / role / "checkpoints").iterdir())[-1] for r in (run, alone))
        assert mine.name == theirs.name
        for name in ("model.safetensors", "optim.safetensors"):
            assert (mine / name).read_bytes() == (theirs / name).read_bytes(), f"{role}: {name} differs"
        with np.load(mine / "trace.npz") as a, np.load(theirs / "trace.npz") as b:
            assert a.files == b.files
            for name in a.files:
                np.testing.assert_array_equal(a[name], b[name])


def view(run: Path) -> dict[str, dict]:
    """The driver's newest view of its actors, by role."""
    with contextlib.suppress(FileNotFoundError):
        return {row["role"]: row for row in json.loads((run / VIEW).read_text())["kernels"]}
    return {}


def orphans(session: int) -> dict[int, str]:
    """What a dead driver left at work. Two agents of Ray itself try for a minute to tell their dead head of it."""
    agents = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
    return {pid: command for pid, command in of_session(session).items() if not command.startswith(agents)}


@contextlib.contextmanager
def driver(run: Path, corpus: Path, config: Config, address: str | None = None) -> Iterator[subprocess.Popen]:
    """A driver in a process and session of its own."""
    arguments = json.dumps([str(run), str(corpus), config.to_json(), address, THREE])
    process = subprocess.Popen([sys.executable, "-c", DRIVER, arguments], stdout=subprocess.PIPE, text=True,
                               start_new_session=True)  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        wait_for(lambda: not orphans(process.pid))
        for agent in of_session(process.pid):
            os.kill(agent, signal.SIGKILL)


def read_until(process: subprocess.Popen, role: str, step: int) -> None:
    """Follow the driver's output until `role` has done `step`."""
    assert process.stdout
    for line in process.stdout:
        word, _, rest = line.strip().partition(" ")
        if word == "step" and rest.split()[0] == role and int(rest.split()[1]) >= step:
            return
    pytest.fail(f"the driver ended before step {step} of {role}, exit {process.wait()}")


def test_a_killed_kernel_and_a_hanging_one_are_replaced(
    ray_session: None,
    micro_run: Path,
    micro_corpus: Path,
    micro: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "SILENCE_S", 8.0)  # instead of 30 s
    monkeypatch.setattr(supervisor, "BEAT_S", 0.1)  # instead of 1 s
    monkeypatch.setattr(launch, "VIEW_EVERY_S", 0.1)
    run, said, hit = tmp_path / "run", [], set()
    for step in train(run, micro_corpus, micro, roles=THREE, say=said.append):
        if step.role in THREE[:2] and step.role not in hit and view(run).get(step.role, {}).get("pid"):
            hit.add(step.role)
            time.sleep(random.uniform(0, 0.3))
            os.kill(view(run)[step.role]["pid"], signal.SIGKILL if step.role == THREE[0] else signal.SIGSTOP)
    assert hit == set(THREE[:2])
    assert any("process died; restarting from its last checkpoint (1 of 20)" in text for text in said), said
    assert any("no answer for 8 s; restarting" in text for text in said), said
    assert_as_if_left_alone(run, micro_run)
    assert folder_status(run).state == "stopped"  # five kernels were not asked for


def test_a_killed_driver_leaves_no_process_and_is_resumed(
    ray_session: None, micro_run: Path, micro_corpus: Path, micro: Config, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with driver(run, micro_corpus, micro) as process:
        read_until(process, *random.choice([(OCEAN, random.randint(1, 34)), (THREE[1], random.randint(1, 60))]))
        with pytest.raises(ConfigError, match="in use by process"):  # while it lives, nobody else trains this run
            list(train(run, resume=True))
        process.kill()
        process.wait()
        wait_for(lambda: not orphans(process.pid))
    list(train(run, resume=True, roles=THREE))
    assert_as_if_left_alone(run, micro_run)


def test_ctrl_c_stops_cleanly_and_resume_goes_on(
    ray_session: None, micro_run: Path, micro_corpus: Path, micro: Config, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with driver(run, micro_corpus, micro) as process:
        read_until(process, THREE[0], random.randint(1, 40))
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group, Ray's processes included
        output = process.communicate()[0]
        assert process.returncode == 1 and "interrupted" in output, output
        assert not of_session(process.pid), "a stopped driver ends all of its Ray"
        assert not list(run.rglob(".step-*")), "a torn checkpoint was left"
    status = folder_status(run)
    assert status.state == "stopped" and "--resume" in status.detail
    list(train(run, resume=True, roles=THREE))
    assert_as_if_left_alone(run, micro_run)


@pytest.mark.slow
def test_a_lost_node_is_survived(micro_run: Path, micro_corpus: Path, micro: Config, tmp_path: Path) -> None:
    """On nodes that claim a GPU each, of which every kernel gets a quarter; the device still comes from torch."""
    from ray.cluster_utils import Cluster

    fast = {
        "health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_timeout_ms": 500,
        "health_check_failure_threshold": 3,
    }  # fmt: skip
    run, small = tmp_path / "run", {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(
        initialize_head=True, head_node_args={**small, "num_cpus": 0, "num_gpus": 0, "_system_config": fast}
    )
    try:
        nodes = {node.node_id: node for node in (cluster.add_node(**small), cluster.add_node(**small))}
        quarters = override(micro, {"cluster.gpus_per_kernel": 0.25})
        with driver(run, micro_corpus, quarters, cluster.address) as process:
            read_until(process, THREE[0], random.randint(1, 40))
            wait_for(lambda: view(run).get(THREE[0], {}).get("node"))
            lost = next(n for i, n in nodes.items() if i.startswith(view(run)[THREE[0]]["node"].split()[1]))
            cluster.remove_node(lost, allow_graceful=False)
            output = process.communicate()[0]
            assert process.returncode == 0, output
            assert "restarting from its last checkpoint" in output, output
            assert "(raylet)" not in output, "standard output is for the user"
    finally:
        cluster.shutdown()
    assert_as_if_left_alone(run, micro_run)
