"""Machines of a cluster, as far as one machine can be several: an sshd of its own, an address, a home folder.

What separates real machines is here the address (127.0.0.2 ...) and HOME. The command `ray` of such a machine adds to
`start` what keeps several Rays on one kernel apart, and its `stop` ends the Ray of this home alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PORTS = 42200  # 127.0.0.n listens at PORTS + n
ROOT = Path(__file__).parent.parent
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
VENV = Path(sys.executable).parent
RAY = """#!/bin/bash
case "$1" in
stop) exec {python} -m tests.machines {home} ;;
start) shift; set -- start --node-ip-address={address} --temp-dir={temp} --object-store-memory=100000000 \\
    --min-worker-port={low} --max-worker-port={high} --ray-client-server-port={client} {cpus} "$@" ;;
esac
exec {python} -m ray.scripts.scripts "$@"
"""
# the launcher knows port 22 alone, and ssh no other home folder than that of /etc/passwd
SSH = """#!/bin/sh
exec {ssh} -i {key} -o 'ProxyCommand={python} {relay} %h' "$@"
"""
RELAY = """
import os, socket, sys, threading
there = socket.create_connection((sys.argv[1], {ports} + int(sys.argv[1].rpartition(".")[2])))
def back():
    while piece := there.recv(65536):
        os.write(1, piece)
    os._exit(0)
threading.Thread(target=back, daemon=True).start()
while piece := os.read(0, 65536):
    there.sendall(piece)
there.shutdown(socket.SHUT_WR)
threading.Event().wait(60)
"""


@dataclass
class Machine:
    """One that is up when `boot` returns; `lose` takes its power away, all at once."""

    number: int
    folder: Path
    cpus: int | None
    sshd: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.{self.number}"

    @property
    def port(self) -> int:
        return PORTS + self.number

    @property
    def home(self) -> Path:
        return self.folder / f"home{self.number}"

    def boot(self) -> None:
        bin_ = self.home / "bin"
        bin_.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (self.home / "constellation").symlink_to(ROOT)
        low = 20000 + 400 * self.number
        temp = Path(f"/tmp/m{os.getpid()}-{self.number}")
        (bin_ / "ray").write_text(RAY.format(
            python=sys.executable, home=self.home, address=self.address, temp=temp, low=low + 2, high=low + 390,
            client=low, cpus="" if self.cpus is None else f"--num-cpus={self.cpus}",
        ))  # fmt: skip
        (bin_ / "pip").write_text("#!/bin/sh\n# everything is installed here\n")
        write_ssh(self.folder, bin_)
        for command in ("ray", "pip"):
            (bin_ / command).chmod(0o755)
        (self.home / ".bashrc").write_text(
            f"export PATH={bin_}:{VENV}:/usr/bin:/bin PYTHONPATH={ROOT} RAY_raylet_start_wait_time_s=120\n"
        )
        config = self.home / "sshd_config"
        config.write_text(
            f"Port {self.port}\nListenAddress {self.address}\nHostKey {self.folder / 'host_key'}\n"
            f"AuthorizedKeysFile {self.folder / 'key.pub'}\nStrictModes no\nUsePAM no\nPidFile none\n"
            f"PasswordAuthentication no\nPermitRootLogin prohibit-password\nMaxStartups 100\nSetEnv HOME={self.home}\n"
        )
        assert SSHD is not None
        with (self.home / "sshd.log").open("ab") as log:
            self.sshd = subprocess.Popen([SSHD, "-D", "-e", "-f", str(config)], stdout=log, stderr=log)

    def lose(self) -> None:
        if self.sshd is not None:
            self.sshd.kill()
            self.sshd.wait()
        for pid in of_home(self.home):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        self.lose()
        shutil.rmtree(f"/tmp/m{os.getpid()}-{self.number}", ignore_errors=True)


def write_ssh(folder: Path, bin_: Path) -> None:
    """A command `ssh` in `bin_` that finds these machines, with the key in `folder`."""
    relay = folder / "relay.py"
    relay.write_text(RELAY.replace("{ports}", str(PORTS)))
    bin_.mkdir(exist_ok=True)
    (bin_ / "ssh").write_text(
        SSH.format(ssh=shutil.which("ssh"), key=folder / "key", python=sys.executable, relay=relay)
    )
    (bin_ / "ssh").chmod(0o755)


def of_home(home: Path) -> list[int]:
    """Processes that live in `home`, without us and those that we came from."""
    import psutil

    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid not in own and process.environ().get("HOME") == str(home):
                found.append(process.pid)
    return found


def stop_ray(home: Path) -> None:
    """What `ray stop` does on a machine: its Ray ends, nothing else."""
    import psutil

    ended = []
    for pid in of_home(home):
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            if "ray" in " ".join(process.cmdline()):
                process.kill()
                ended.append(process)
    psutil.wait_procs(ended)


if __name__ == "__main__":
    stop_ray(Path(sys.argv[1]))
