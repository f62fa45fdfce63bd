"""What is up is known from the user's own folder; what lies in a run folder is anybody's and ends nothing."""

import fcntl
import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from actors import connect, lifecycle, private
from actors import record as records
from actors.ray_head import Head
from actors.record import Record
from constellation.errors import ArtifactError, ConfigError, RunError
from constellation.storage.exclusive import exclusive, is_held


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "constellation"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def silent(text: str) -> None:
    pass


def ended(folder: Path) -> Head:
    return Head("127.0.0.1:1", socket.gethostname(), os.getpid(), 1.0, str(folder))  # this pid began at another time


# -- whose word is believed


def test_a_run_folder_cannot_name_a_folder_to_delete(run: Path, tmp_path: Path) -> None:
    dear = tmp_path / "dear"
    dear.mkdir()
    (dear / "thesis.txt").write_text("all of it")
    head = {**vars(ended(dear)), "folder": str(dear)}
    record = {"schema": 1, "name": "run", "address": "127.0.0.1:1", "head": head}
    (run / "up.json").write_text(json.dumps(record))
    assert not lifecycle.down(run, say=silent)
    records.write(run, Record("run", "127.0.0.1:1", ended(dear)))  # nor can a record: it is not marked as ours
    assert lifecycle.down(run, say=silent)
    assert (dear / "thesis.txt").read_text() == "all of it"


@pytest.mark.parametrize("name", [".lock", ".up.lock"])
@pytest.mark.parametrize("kind", ["link", "second name", "pipe", "dangling"])
def test_a_lock_that_is_no_plain_file_is_refused_and_what_it_names_is_left(run: Path, kind: str, name: str) -> None:
    dear = run.parent / "dear"
    if kind != "dangling":
        dear.write_text("all of it")
    if kind == "second name":
        os.link(dear, run / name)
    elif kind == "pipe":
        os.mkfifo(run / name)
    else:
        (run / name).symlink_to(dear)
    with pytest.raises(ConfigError, match="plain file"), exclusive(run, name=name):
        pass
    assert not lifecycle.down(run, say=silent), "its lock is elsewhere"
    assert not dear.exists() if kind == "dangling" else dear.read_text() == "all of it"
    if name == ".lock":
        with pytest.raises(ConfigError, match="plain file"):
            is_held(run)


def test_a_record_is_the_users_alone_and_comes_back(run: Path, state: Path) -> None:
    record = Record("name", "127.0.0.1:7", ended(run))
    assert records.read(run) is None
    records.write(run, record)
    assert records.read(run) == record and records.read(run.parent) is None
    os.symlink(run, run.parent / "other")
    assert records.read(run.parent / "other") == record, "the same folder by another name"
    (file,) = state.glob("*.json")
    assert stat.S_IMODE(state.stat().st_mode) == 0o700 and stat.S_IMODE(file.stat().st_mode) == 0o600
    records.remove(run)
    assert records.read(run) is None


@pytest.mark.parametrize("mode", [0o777, 0o750, 0o704])
def test_a_state_folder_or_record_that_others_may_use_is_refused(run: Path, state: Path, mode: int) -> None:
    records.write(run, Record("name", "127.0.0.1:7", None))
    (file,) = state.glob("*.json")
    file.chmod(mode & 0o666)
    with pytest.raises(ConfigError, match="not this user's alone"):
        records.read(run)
    file.chmod(0o600)
    state.chmod(mode)
    with pytest.raises(ConfigError, match="not this user's alone"):
        records.read(run)


def test_where_nothing_can_be_written_nothing_is_up_and_up_says_so(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert records.read(run) is None
    with pytest.raises(ConfigError, match="set XDG_STATE_HOME"), records.locked(run):
        pass


def test_a_record_behind_a_link_is_refused(run: Path, state: Path) -> None:
    records.write(run, Record("name", "127.0.0.1:7", None))
    (file,) = state.glob("*.json")
    file.rename(run / "theirs")
    file.symlink_to(run / "theirs")
    with pytest.raises(ConfigError, match="not this user's alone"):
        records.read(run)


FOREIGN_HEADS = [f'{{"schema": 2, "name": "x", "address": "y", "head": {h}, "ending": false}}' for h in ('{"a": 1}', 3)]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema": 2}', '{"schema": 1}', "[" * 100_000, *FOREIGN_HEADS])
def test_a_damaged_record_is_one_line(run: Path, state: Path, text: str) -> None:
    records.write(run, Record("name", "127.0.0.1:7", None))
    (file,) = state.glob("*.json")
    file.write_text(text)
    for ask in (records.read, lifecycle.down):
        with pytest.raises(ArtifactError, match="is damaged") as told:
            ask(run)
        assert "\n" not in str(told.value)


def test_what_another_machine_holds_is_told_and_left(run: Path) -> None:
    record = Record("name", "127.0.0.1:1", Head("127.0.0.1:1", "elsewhere", 1, 1.0, "/nowhere"))
    records.write(run, record)
    assert "up on elsewhere" in record.unreachable()
    with pytest.raises(ConfigError, match="up on elsewhere"):
        lifecycle.down(run, say=silent)
    assert records.read(run) == record


def test_whoever_is_connected_hears_that_it_is_taken_down(run: Path) -> None:
    record = Record("name", "127.0.0.1:1", None)
    records.write(run, record)
    with records.in_use(run, record), records.in_use(run, record):
        records.check_up(run, record)
    with records.ended(run, record):
        assert records.read(run) == Record("name", "127.0.0.1:1", None, ending=True)
        with pytest.raises(RunError, match="taken down"):
            records.check_up(run, record)
    with pytest.raises(RunError, match="taken down"), records.in_use(run, record):
        pass


# -- folders of our own


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A short folder for Ray's."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield Path(folder)  # type: ignore[misc]


def test_only_a_folder_with_the_mark_is_removed(place: Path) -> None:
    folder, mark = private.make()
    assert folder.parent == place and stat.S_IMODE(folder.stat().st_mode) == 0o700
    (folder / "ray" / "session").mkdir(parents=True)
    (place / "dear").mkdir()
    (folder / "link").symlink_to(place / "dear")
    other = place / f"{folder.name[:-8]}unmarked"
    other.mkdir(mode=0o700)
    link = place / f"{folder.name[:-8]}link"
    link.symlink_to(folder)
    for path in (other, link, place / "dear", place / "absent"):
        private.remove(path)
    assert folder.exists() and other.exists() and (place / "dear").exists()
    private.remove(folder)
    os.close(mark)
    assert not folder.exists() and (place / "dear").exists()


def test_what_a_killed_process_left_is_removed_by_the_next_and_what_is_in_use_is_left(place: Path) -> None:
    first, mark = private.make()
    second, other = private.make()
    assert first.exists(), "it is in use"
    os.close(mark)  # as the end of its process does
    third, last = private.make()
    assert not first.exists() and second.exists() and third.exists()
    for descriptor in (other, last):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def test_a_place_where_others_could_rename_or_too_deep_for_sockets_is_told(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.chmod(0o777)
    with pytest.raises(ConfigError, match="sticky"):
        private.make()
    place.chmod(0o700)
    (place / ("deep" * 20)).mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(place / ("deep" * 20)))
    with pytest.raises(ConfigError, match="too long"):
        private.make()
    assert not any((place / ("deep" * 20)).iterdir())
    monkeypatch.setenv("RAY_TMPDIR", str(place / "absent"))
    with pytest.raises(ConfigError, match="no folder for Ray"):
        private.make()


@pytest.mark.ray
def test_an_embedded_ray_writes_where_nobody_else_may(ray_session: None) -> None:
    import ray

    session = Path(ray._private.worker._global_node.get_session_dir_path())
    assert any(private.is_ours(folder) for folder in session.parents), session
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_an_open_ray_has_to_be_asked_for_on_the_command_line(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    monkeypatch.setattr(connect, "inside", lambda: False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(ConfigError, match="RAY_AUTH_MODE=disabled"), connect.connected():
        pass
    with pytest.raises(ConfigError, match="RAY_AUTH_MODE=disabled"):
        from actors.ray_head import start_head

        start_head(2)
    new = run.parent / "new"
    command = [sys.executable, "-m", "constellation", "train", "--run", str(new), "--preset", "tiny"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 2 and "--ray-auth disabled" in found.stderr and found.stderr.count("\n") == 1
    assert not new.exists(), "told before any work is done"


JOINED = """
import os, socket
from actors import connect
from constellation.errors import ConfigError

connect.ANSWER_S = 0.2
with socket.create_server(("127.0.0.1", 0)) as nobody:
    try:
        connect.answer(f"127.0.0.1:{nobody.getsockname()[1]}")
    except ConfigError as error:
        print(error)
print(os.environ.get("RAY_AUTH_MODE"), flush=True)
os._exit(0)  # Ray's client goes on trying
"""


def test_how_one_cluster_was_looked_at_is_not_inherited() -> None:
    """Whatever a process started after it had looked at a Ray without a token would have had an open Ray."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    found = subprocess.run([sys.executable, "-c", JOINED], env=outside, capture_output=True, text=True)
    told, mode = found.stdout.splitlines()
    assert "is not a Ray, or hangs" in told and mode == "None"


WITH_THE_TOKEN_AT_HOME = """
import os, socket
from actors import connect
from constellation.errors import ConfigError

connect.ANSWER_S = 0.2
with socket.create_server(("127.0.0.1", 0)) as nobody, connect._environment():
    try:
        connect._answer(f"127.0.0.1:{nobody.getsockname()[1]}", None)
    except ConfigError:
        pass
    from ray._raylet import AuthenticationTokenLoader
    print(os.environ["RAY_AUTH_MODE"], AuthenticationTokenLoader.instance().get_token_for_http_header(), flush=True)
os._exit(0)  # Ray's client goes on trying
"""


def test_a_cluster_is_shown_the_token_of_the_home_folder(tmp_path: Path) -> None:
    """Where `ray up` puts it: on every machine of a cluster."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0123456789abcdef" * 4)
    home = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    command = [sys.executable, "-c", WITH_THE_TOKEN_AT_HOME]
    found = subprocess.run(command, env={**home, "HOME": str(tmp_path)}, capture_output=True, text=True)
    assert found.stdout.startswith("token ") and "0123456789abcdef" * 4 in found.stdout, found.stderr
