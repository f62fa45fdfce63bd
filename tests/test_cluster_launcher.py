"""deploy/onprem/cluster.yaml brought up by `ray up` over a real sshd: one head and two workers, each a Ray node.

make test-cluster       needs sshd and rsync: apt-get install openssh-server rsync
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from getpass import getuser
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.machines import ROOT, SSHD, VENV, Machine, write_ssh
from tests.waiting import wait_for

pytestmark = pytest.mark.cluster
ADDRESS = "127.0.0.2:26379"  # "auto" would find any Ray of this machine, somebody else's too
SETTINGS = (
    "train.tokens=400000 train.ocean_share=0.1 train.batch=8 train.eval_bytes=2048 train.sample_bytes=0 "
    "train.checkpoint_every=10 cluster.cpus_per_kernel=0.25 kernel.vocab_size=288 router.dims=16 "
    "router.max_prefix=512 cluster.placement_timeout_s=300"
)


@dataclass
class Launched:
    """A cluster that `ray up` has brought up."""

    file: Path
    folder: Path
    environment: dict[str, str]
    machines: list[Machine]

    def ray(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ray.scripts.scripts", words[0], str(self.file), *words[1:]]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True)

    def told(self, *words: str) -> str:
        done = self.ray(*words)
        assert done.returncode == 0, f"{words}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def execute(self, command: str) -> str:
        return self.told("exec", command)

    def workers(self) -> int:
        """Nodes beside the head that are alive."""
        script = f"import ray;ray.init('{ADDRESS}');print('alive',sum(node['Alive'] for node in ray.nodes()))"
        done = self.ray("exec", f'RAY_AUTH_MODE=token python -c "{script}"')
        found = re.search(r"^alive (\d+)", done.stdout, re.M)
        return int(found[1]) - 1 if found else 0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    if SSHD is None or not shutil.which("rsync"):
        pytest.skip("no sshd or no rsync: apt-get install openssh-server rsync")
    folder = Path(tmp_path_factory.mktemp("c"))
    for key in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    write_ssh(folder, folder / "bin")
    here = folder / "here"
    (here / ".ray").mkdir(parents=True)
    (here / ".ray" / "auth_token").write_text("fedcba9876543210" * 4)
    machines = [Machine(number, folder, None if number == 2 else 2) for number in (2, 3, 4)]
    config: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "onprem" / "cluster.yaml").read_text())
    head, *workers = machines
    config["cluster_name"] = f"constellation-{os.getpid()}"
    config["provider"].update(head_ip=head.address, worker_ips=[worker.address for worker in workers])
    config["auth"] = {"ssh_user": getuser(), "ssh_private_key": str(folder / "key")}
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        config[key] = [command.replace("6379", ADDRESS.partition(":")[2]) for command in config[key]]
    file = folder / "cluster.yaml"
    file.write_text(yaml.safe_dump(config))
    environment = {
        **os.environ, "HOME": str(here), "PATH": f"{folder}/bin:{VENV}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_UP_enable_autoscaler_v2": "0",
    }  # fmt: skip
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        environment.pop(name, None)
    found = Launched(file, folder, environment, machines)
    for machine in machines:
        machine.boot()
    try:
        found.told("up", "--yes", "--no-config-cache")
        wait_for(lambda: found.workers() == 2)
        yield found
    finally:
        with contextlib.suppress(AssertionError):
            found.told("down", "--yes")
        for machine in machines:
            machine.end()


def test_it_trains_loses_a_worker_gets_it_back_answers_and_goes(cluster: Launched, micro_corpus: Path) -> None:
    run = cluster.folder / "run"
    train = f"constellation train --preset tiny --corpus {micro_corpus} --run {run} --address {ADDRESS} {SETTINGS}"
    said: list[str] = []
    driver = threading.Thread(target=lambda: said.append(cluster.execute(train)), daemon=True)
    driver.start()
    wait_for(lambda: list(run.glob("heart/checkpoints/step-*")) or not driver.is_alive())
    assert driver.is_alive(), said
    told = json.loads(re.search(r"^{.*}$", cluster.execute(f"constellation status --json --run {run}"), re.M)[0])  # type: ignore[index]
    assert told["state"] == "training"
    lost = cluster.machines[1]
    assert any(kernel["node"] and kernel["node"].startswith("127.0.0.") for kernel in told["kernels"])
    lost.lose()
    driver.join()
    assert said, "training went on to its end"

    from constellation.pipeline.status import finished

    assert finished(run)
    lost.boot()
    wait_for(lambda: cluster.workers() == 2)

    cluster.execute(f"constellation up --run {run} --address {ADDRESS}")
    answer = cluster.execute(
        f"constellation generate --run {run} --prompt 'The import statement' --address {ADDRESS} "
        "--max-new-tokens 20 --json"
    )
    local = subprocess.run(
        [sys.executable, "-m", "constellation", "generate", "--run", str(run), "--prompt", "The import statement",
         "--local", "--max-new-tokens", "20", "--json"], capture_output=True, text=True, check=True,
        env=cluster.environment,
    )  # fmt: skip
    text = json.loads(local.stdout.strip().splitlines()[-1])["text"]
    assert json.dumps(text)[1:-1] in answer, "the tokens are those of one process"
    cluster.execute(f"constellation down --run {run}")
    cluster.told("down", "--yes")
    time.sleep(1)
    assert cluster.workers() == 0
