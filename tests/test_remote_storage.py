"""Runs that are kept in a store: laws on a file system, faults and whole runs against a real S3 server process."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from constellation.config import Config
from constellation.errors import ArtifactError, ConfigError, RunError
from constellation.storage import lease, mirror
from constellation.storage.mirror import Mirror
from constellation.storage.objects import Objects
from constellation.storage.uploads import uploaded

ROOT = Path(__file__).parent.parent
Files = dict[str, bytes]


class Killed(BaseException):
    """A kill: nothing of ours catches it."""


class Mortal(Objects):
    """A store whose writer is killed before write or delete number `left`; with `torn`, in the middle of a file."""

    left, torn = 10**9, False

    def _step(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed

    def put(self, name: str, data: bytes) -> None:
        self._step()
        super().put(name, data)

    def send(self, name: str, file: Path) -> None:
        if self.torn and self.left == 0:
            half = file.with_name("half")
            half.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
            super().send(name, half)
            half.unlink()
        self._step()
        super().send(name, file)

    def delete(self, name: str) -> None:
        self._step()
        super().delete(name)


@contextlib.contextmanager
def machine() -> Iterator[Path]:
    """Work as on a machine of one's own: no local folder of any run yet."""
    before, folder = os.environ["XDG_STATE_HOME"], Path(tempfile.mkdtemp(prefix="machine-"))
    os.environ["XDG_STATE_HOME"] = str(folder)
    try:
        yield folder
    finally:
        os.environ["XDG_STATE_HOME"] = before
        shutil.rmtree(folder)


@contextlib.contextmanager
def elsewhere(folder: Path) -> Iterator[None]:
    """Back on the machine that `machine` gave."""
    before = os.environ["XDG_STATE_HOME"]
    os.environ["XDG_STATE_HOME"] = str(folder)
    try:
        yield
    finally:
        os.environ["XDG_STATE_HOME"] = before


def fill(folder: Path, files: Files) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def content(folder: Path) -> Files:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def seen(url: str, part: str = "ocean") -> Files:
    """What a reader on a fresh machine finds."""
    with machine():
        reader = Mirror(url, 1.0)
        reader.pull(part)
        return content(reader.folder / part)


states = st.dictionaries(
    st.sampled_from(["checkpoints/step-1/a", "checkpoints/step-1/b", "checkpoints/step-2/a", "trace", "diag.jsonl"]),
    st.binary(max_size=6), min_size=1,
)  # fmt: skip


# -- laws, on a file system --------------------------------------------------------------------------------------------


@settings(max_examples=12)
@given(st.lists(states, min_size=2, max_size=3), st.booleans())
def test_a_reader_sees_the_last_complete_state_whatever_was_killed_when(history: list[Files], torn: bool) -> None:
    with tempfile.TemporaryDirectory() as place:
        url, left = f"file://{place}/runs/one", 0
        while True:  # a history that is killed at its first write, at its second ...
            shutil.rmtree(f"{place}/runs", ignore_errors=True)
            with machine():
                writer = Mirror(url, 1.0)
                writer.objects = store = Mortal(url, 1.0)
                writer.begin()
                store.left, store.torn, complete = left, torn, -1
                try:
                    for number, files in enumerate(history):
                        fill(writer.folder / "ocean", files)
                        writer.push("ocean")
                        complete = number
                except Killed:
                    found = seen(url)
                    allowed = [history[complete] if complete >= 0 else {}, history[complete + 1]]
                    assert found in allowed
                    store.left = 10**9  # it is started again: nothing stands in its way, and it ends as if undisturbed
                    writer.pull("ocean")
                    for files in history[complete + 1 :]:
                        fill(writer.folder / "ocean", files)
                        writer.push("ocean")
                    assert seen(url) == history[-1]
                else:
                    assert seen(url) == history[-1]
                    return
            left += 1


def test_what_is_retired_is_deleted_one_push_later_and_what_killed_writers_left_by_a_sweep(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store/run"
    with machine():
        writer = Mirror(url, 1.0)
        writer.begin()
        held = []
        for text in (b"1", b"2", b"3"):
            fill(writer.folder / "ocean", {"a": text})
            writer.push("ocean")
            held.append(len([n for n in writer.objects.names("ocean") if "manifest" not in n]))
        assert held == [1, 2, 2]
        writer.objects.put("ocean/a@0123456789abcdef", b"left")
        writer.sweep("ocean")
        assert "ocean/a@0123456789abcdef" not in writer.objects.names("ocean")
        assert seen(url) == {"a": b"3"}


def test_a_local_folder_that_is_ahead_stays_and_one_that_is_behind_follows(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store/run"
    with machine() as first:
        here = Mirror(url, 1.0)
        here.begin()
        fill(here.folder / "ocean", {"a": b"1"})
        here.push("ocean")
        (here.folder / "ocean/a").unlink()
        (here.folder / "ocean/a").write_bytes(b"2")  # not up yet
        here.pull("ocean")
        assert content(here.folder / "ocean") == {"a": b"2"}
        with machine():
            other = Mirror(url, 1.0)
            other.pull_all()
            fill(other.folder / "ocean", {"b": b"3"})
            other.push("ocean")
        with elsewhere(first):
            with pytest.raises(RunError, match="written by another meanwhile"):
                here.push("ocean")
            here.pull("ocean")
            assert content(here.folder / "ocean") == {"b": b"3"}


@pytest.mark.parametrize("path", ["../out", "/etc/out", "a/../../out", "", "a//b"])
def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path: Path, path: str) -> None:
    url = f"file://{tmp_path}/store/run"
    Objects(url).put("ocean/manifest.json", mirror.Manifest({path: ("0" * 64, 1)}).to_bytes())
    with machine(), pytest.raises(ArtifactError, match="no name of a file of a run"):
        Mirror(url, 1.0).pull("ocean")


def test_damaged_objects_and_manifests_are_named_and_leave_no_base(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store/run"
    with machine():
        writer = Mirror(url, 1.0)
        writer.begin()
        fill(writer.folder / "ocean", {"a": b"1"})
        writer.push("ocean")
    (tmp_path / "store/run/ocean").joinpath(f"a@{'6b86b273ff34fce1'}").write_bytes(b"2")
    with pytest.raises(ArtifactError, match=r"a@6b86b273ff34fce1 is damaged"):
        seen(url)
    manifest = tmp_path / "store/run/ocean/manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"a"', b'"b"'))
    with pytest.raises(ArtifactError, match=r"manifest.json is damaged"):
        seen(url)


def test_only_a_folder_of_ones_own_state_is_a_mirror(tmp_path: Path) -> None:
    (tmp_path / "place/run").mkdir(parents=True)
    (tmp_path / "place/url.json").write_text(json.dumps({"url": "s3://evil/run"}))
    assert mirror.url_of(tmp_path / "place/run") is None
    with machine():
        one = Mirror("file:///nowhere/run")
        one.begin()
        assert mirror.url_of(one.folder) == "file:///nowhere/run"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://who:secret@bucket/run", "credentials do not belong in a URL"),
        ("nothing://bucket/run", "no scheme that is known"),
        ("adl://bucket/run", "needs a package"),
        ("s3://bucket", "a bucket and a path"),
        ("s3://bucket/run?colour=blue", "unknown .colour"),
    ],
)
def test_an_impossible_url_is_told_in_one_line(url: str, said: str) -> None:
    with machine(), pytest.raises(ConfigError, match=said) as told:
        Mirror(url)
    assert "secret" not in str(told.value) and "\n" not in str(told.value)


# -- the lease ---------------------------------------------------------------------------------------------------------


def page(**changes: Any) -> bytes:
    held = {"owner": "process 1 on there", "host": "there", "pid": 1, "born": 1.0, "nonce": "x", "since": time.time()}
    return json.dumps({**held, "time": time.time(), **changes}).encode()


def test_a_lease_refuses_a_second_driver_with_who_and_since_when(tmp_path: Path) -> None:
    objects = Objects(f"file://{tmp_path}/store/run")
    with lease.leased(objects), pytest.raises(ConfigError, match=rf"in use by process {os.getpid()} on .* since 20"):
        lease.Lease(objects).take()
    assert lease.read(objects) is None


def test_a_lease_of_another_machine_holds_until_it_is_stale(tmp_path: Path) -> None:
    objects = Objects(f"file://{tmp_path}/store/run")
    objects.put(lease.NAME, page())
    with pytest.raises(ConfigError, match="process 1 on there"):
        lease.Lease(objects).take()
    for left in (page(time=time.time() - 2 * lease.STALE_S), page(host=socket.gethostname(), pid=2**22 + 1), b"{"):
        objects.put(lease.NAME, left)
        with lease.leased(objects) as held:
            held.check()


def test_of_drivers_that_begin_at_once_one_gets_it(tmp_path: Path) -> None:
    url, got, lost, gate = f"file://{tmp_path}/store/run", list[Any](), list[Any](), threading.Barrier(4)

    def drive() -> None:
        mine = lease.Lease(Objects(url))
        gate.wait()
        try:
            mine.take()
            got.append(mine)
        except (ConfigError, RunError) as error:
            lost.append(error)

    threads = [threading.Thread(target=drive) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) <= 1 and len(got) + len(lost) == 4
    for one in got:
        one.release()


# -- steps are reported in order, once they are up ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Told:
    step: int
    checkpoint: str | None


def test_a_step_is_reported_when_its_checkpoint_is_in_the_store_and_in_order(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store/run"
    with machine():
        writer = Mirror(url, 1.0)
        writer.begin()

        def steps() -> Iterator[Told]:
            for n in range(1, 10):
                fill(writer.folder / "ocean", {"step": str(n).encode()}) if n % 3 == 0 else None
                yield Told(n, f"step-{n}" if n % 3 == 0 else None)

        reported = []
        for told in uploaded(steps(), writer, "ocean"):
            reported.append(told.step)
            if told.checkpoint:
                assert int(seen(url)["step"]) >= told.step
        assert reported == list(range(1, 10))


def test_a_store_that_stays_away_ends_the_run_and_leaves_the_folder(tmp_path: Path) -> None:
    url, store = f"file://{tmp_path}/store/run", tmp_path / "store"
    said: list[str] = []
    with machine():
        writer = Mirror(url, 0.5, said.append)
        writer.begin()
        store.write_text("a file where a folder is wanted")

        def steps() -> Iterator[Told]:
            fill(writer.folder / "ocean", {"a": b"1"})
            yield Told(1, "step-1")

        with pytest.raises(RunError, match=r"tried for 0.5 s .*--resume goes on"):
            list(uploaded(steps(), writer, "ocean"))
        assert content(writer.folder) == {"ocean/a": b"1"} and len(said) <= 2
        store.unlink()
        writer.push("ocean")
        assert seen(url) == {"a": b"1"}


# -- a real S3 server, and a line to it that breaks --------------------------------------------------------------------

ANSWERS = {  # of a proxy that does not ask the server
    "full": ("507 Insufficient Storage", "InsufficientStorage"),
    "busy": ("503 Slow Down", "SlowDown"),
    "stranger": ("403 Forbidden", "InvalidAccessKeyId"),
}


class Line(socketserver.ThreadingTCPServer):
    """A proxy to the server at `port` that does what `fault` says to the next `left` pieces of requests."""

    allow_reuse_address, daemon_threads = True, True

    def __init__(self, port: int):
        super().__init__(("127.0.0.1", 0), Pump)
        self.port, self.fault, self.left = port, "", 0
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def breaks(self, fault: str, pieces: int = 10**9) -> None:
        self.fault, self.left = fault, pieces

    def hit(self) -> str:
        self.left -= 1
        return self.fault if self.left >= 0 else ""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Pump(socketserver.BaseRequestHandler):
    server: Line

    def handle(self) -> None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.server.port)) as behind:
            threading.Thread(target=self._back, args=(behind,), daemon=True).start()
            while data := self.request.recv(1 << 16):
                fault = self.server.hit()
                if fault == "refused":
                    return
                if fault == "half-written":
                    behind.sendall(data[: len(data) // 2])
                    return
                if fault in ANSWERS:
                    status, code = ANSWERS[fault]
                    body = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>"
                    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}"
                    self.request.sendall(f"{head}\r\nConnection: close\r\n\r\n{body}".encode())
                    return
                if fault == "slow":
                    time.sleep(0.5)
                behind.sendall(data)

    def _back(self, behind: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := behind.recv(1 << 16):
                self.request.sendall(data)
        with contextlib.suppress(OSError):
            self.request.shutdown(socket.SHUT_RDWR)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def s3() -> Iterator[int]:
    """The port of moto's S3 server, a process of its own, with the bucket "bucket"; we are told how to reach it."""
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("flask") is None:
        pytest.skip("needs moto: pip install 'moto[s3]' flask flask-cors")
    port = free_port()
    ours = {
        "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true", "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }  # fmt: skip
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        waits_for(lambda: socket.create_connection(("127.0.0.1", port), 1).close() is None)
        from pyarrow.fs import S3FileSystem

        S3FileSystem(
            endpoint_override=f"127.0.0.1:{port}", scheme="http", allow_bucket_creation=True
        ).create_dir("bucket")  # fmt: skip
        yield port
    finally:
        server.terminate()
        server.wait()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def waits_for(met: Callable[[], bool], patience_s: float = 120.0) -> None:
    until = time.monotonic() + patience_s
    while True:
        with contextlib.suppress(OSError):
            if met():
                return
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.1)


@pytest.fixture
def line(s3: int) -> Iterator[Line]:
    with Line(s3) as proxy:
        yield proxy
        proxy.shutdown()


def through(line: Line, name: str) -> str:
    return f"s3://bucket/{name}?endpoint_override={line.endpoint.removeprefix('http://')}&scheme=http"


@pytest.mark.parametrize("fault", ["refused", "slow", "half-written", "full", "busy"])
def test_a_fault_that_passes_is_waited_for_and_said_once(line: Line, fault: str) -> None:
    url, said = through(line, f"passing-{fault}"), list[str]()
    with machine():
        writer = Mirror(url, 30.0, said.append)
        writer.begin()
        fill(writer.folder / "ocean", {"a": os.urandom(300_000), "b": b"2"})
        line.breaks(fault, 4)
        writer.push("ocean")
        assert seen(url) == content(writer.folder / "ocean")
        assert len(said) <= 3 and all("trying again" in text for text in said)


@pytest.mark.parametrize("fault", ["refused", "half-written", "full", "busy", "stranger"])
def test_a_fault_that_stays_ends_in_one_line_and_the_state_before_is_whole(line: Line, fault: str) -> None:
    url = through(line, f"staying-{fault}")
    with machine():
        writer = Mirror(url, 1.0)
        writer.begin()
        fill(writer.folder / "ocean", {"a": b"1"})
        writer.push("ocean")
        fill(writer.folder / "ocean", {"a": b"2", "b": os.urandom(300_000)})
        line.breaks(fault)
        with pytest.raises(ConfigError if fault == "stranger" else RunError) as told:
            writer.push("ocean")
        assert "\n" not in str(told.value) and "testing" not in str(told.value)
        line.breaks("")
        assert seen(url) == {"a": b"1"}
        writer.push("ocean")
        assert seen(url) == content(writer.folder / "ocean")


def test_a_missing_bucket_is_told_before_anything_is_done(s3: int) -> None:
    with machine(), pytest.raises(ConfigError, match="no bucket nobodys; make it first"):
        mirror.resolve("s3://nobodys/run")


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nano() -> Config:
    """OCEAN and two kernels, some 15 steps each."""
    from constellation.config import override
    from constellation.presets import tiny

    return override(tiny(), {
        "constellation.kernels": 2, "kernel.vocab_size": 288, "train.tokens": 24_000, "train.ocean_share": 0.34,
        "train.batch": 8, "train.kernel_batch": 8, "train.checkpoint_every": 4, "train.eval_bytes": 1024,
        "train.sample_bytes": 0, "train.precision": "fp32", "optim.ns_precision": "fp32", "train.ocean_threads": 1,
        "router.dims": 8, "router.max_prefix": 256, "cluster.storage_timeout_s": 30,
    })  # fmt: skip


@pytest.fixture(scope="module")
def alone(nano: Config, micro_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in a plain folder, undisturbed."""
    import constellation

    run = tmp_path_factory.mktemp("alone") / "run"
    for _ in constellation.train(micro_corpus, run, nano, local=True):
        pass
    return run


def weights(run: Path) -> Files:
    """The bits of every model's last checkpoint."""
    return {
        role: max((run / role / "checkpoints").glob("step-*")).joinpath("model.safetensors").read_bytes()
        for role in ("ocean", "heart", "perception")
    }


TRAIN = """
import json, sys
from pathlib import Path
import constellation
from constellation.config import from_json
for step in constellation.train(Path(sys.argv[1]), sys.argv[2], from_json(json.loads(sys.argv[3])), local=True):
    print(step.role, step.step, step.checkpoint, flush=True)
"""


def cli(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "constellation", *words], capture_output=True, text=True, cwd=ROOT)


def test_a_run_at_a_url_is_killed_goes_on_elsewhere_and_ends_in_the_same_bits(
    s3: int, nano: Config, alone: Path, micro_corpus: Path
) -> None:
    import constellation

    url = "s3://bucket/runs/killed"
    with machine():
        words = [sys.executable, "-c", TRAIN, str(micro_corpus), url, json.dumps(nano.to_json())]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
            assert process.stdout is not None
            saved: list[list[str]] = []
            for row in process.stdout:
                role, _, checkpoint = row.split()
                if checkpoint != "None":
                    saved.append(row.split())
                if role == "heart" and checkpoint != "None":
                    process.kill()
                    break
        assert process.returncode == -signal.SIGKILL
        assert saved[-1][0] == "heart"
        with machine():  # what was reported as saved is there for everybody
            assert (mirror.resolve(url) / saved[-1][0] / "checkpoints" / saved[-1][2] / "state.json").exists()
            told = json.loads(cli("status", "--run", url, "--json").stdout)
            assert {k["role"]: k["state"] for k in told["kernels"]}["ocean"] == "done"
            assert told["state"] == "stopped"
            Objects(url).put(lease.NAME, page())  # a driver of another machine
            refused = cli("train", "--run", url, "--resume")
            assert refused.returncode == 2 and "in use by process 1 on there since" in refused.stderr
            assert json.loads(cli("status", "--run", url, "--json").stdout)["state"] == "training"
            Objects(url).delete(lease.NAME)
    with machine():
        for _ in constellation.train(None, url, local=True):
            pass
        assert weights(mirror.resolve(url)) == weights(alone)
    with machine():
        assert json.loads(cli("status", "--run", url, "--json").stdout)["state"] == "finished"
        assert list(constellation.train(None, url, local=True)) == []
        asked = ("generate", "--prompt", "The import", "--json", "--max-new-tokens", "8", "--seed", "3")
        found, wanted = (json.loads(cli(*asked, "--run", run).stdout) for run in (url, str(alone)))
        assert found["token_ids"] == wanted["token_ids"]
        answer = cli("train", "--run", url)
        assert answer.returncode == 2 and "exists already" in answer.stderr and answer.stderr.count("\n") == 1
        listed, ours = (json.loads(cli("runs", place, "--json").stdout) for place in (url, str(alone)))
        told = ("run", "status", "steps", "tokens", "last_loss_nats")
        assert [[row[name] for name in told] for row in listed] == [[row[name] for name in told] for row in ours]
        assert json.loads(cli("runs", "s3://bucket/runs", "--json").stdout)[0]["run"] == "killed/heart"
        assert "written into a folder" in cli("runs", url, "--write").stderr


@pytest.mark.ray
@pytest.mark.slow
def test_actors_train_a_run_at_a_url_to_the_same_bits(s3: int, nano: Config, alone: Path, micro_corpus: Path) -> None:
    """Through a Ray of the command's own, whose actors know who may ask the store from its environment."""
    from constellation.config import difference
    from constellation.presets import tiny

    url = "s3://bucket/runs/actors"
    changes = [f"{name}={now}" for name, (_, now) in difference(tiny(), nano).items()]
    with machine():
        done = cli("train", "--run", url, "--corpus", str(micro_corpus), "--preset", "tiny", *changes)
        assert done.returncode == 0, done.stderr
        with machine():
            assert weights(mirror.resolve(url)) == weights(alone)
