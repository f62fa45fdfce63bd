"""API keys: only the hash is kept, a key opens exactly its own door, a file that cannot be trusted opens none."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import stat
from pathlib import Path

import pytest

from constellation.cli import run
from constellation.errors import ArtifactError, ConfigError
from router.http import keys
from router.http.keys import Keys, Limits


def test_a_key_is_found_by_its_owner_and_stands_in_no_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    ada, bob = keys.add(path, "ada", Limits(60, 10_000, 4), now=1.0), keys.add(path, "bob")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ada not in path.read_text() and hashlib.sha256(ada.encode()).hexdigest() in path.read_text()
    doors = Keys(path)
    found = doors.find(f"Bearer {ada}")
    assert found is not None and (found.name, found.limits, found.created) == ("ada", Limits(60, 10_000, 4), 1)
    assert (other := doors.find(f"bearer  {bob} ")) is not None and other.name == "bob"
    assert other.sha256 not in repr(other)


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Bearer ck-", "Basic {key}", "{key}", "Bearer {key}x"]
)
def test_anything_else_is_nobody(tmp_path: Path, header: str | None) -> None:
    path = tmp_path / "keys.json"
    key = keys.add(path, "ada")
    assert Keys(path).find(header and header.format(key=key)) is None


@pytest.mark.parametrize("header", [None, "", "Bearer ", "Bearer whatever"])
def test_without_a_file_everyone_is_anyone(header: str | None) -> None:
    assert Keys(None).find(header) == keys.ANYONE
    limited = Keys(None, Limits(requests_per_minute=3)).find(header)
    assert limited is not None and limited.limits == Limits(requests_per_minute=3)


def test_a_key_holds_256_random_bits(tmp_path: Path) -> None:
    made = {keys.add(tmp_path / "keys.json", f"k{i}") for i in range(8)}
    assert len(made) == 8 and all(len(key) == len(keys.PREFIX) + 43 for key in made)  # 43 digits of base 64


def test_a_removed_key_is_refused_by_a_service_that_runs(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    ada, bob = keys.add(path, "ada"), keys.add(path, "bob")
    doors = Keys(path)
    assert doors.find(f"Bearer {ada}")
    keys.remove(path, "ada")
    assert doors.find(f"Bearer {ada}") is None and doors.find(f"Bearer {bob}")
    carol = keys.add(path, "carol")
    assert doors.find(f"Bearer {carol}")


def test_a_service_whose_file_was_damaged_lets_nobody_in_and_does_not_tell_where_it_lies(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    ada = keys.add(path, "ada")
    doors = Keys(path)
    path.write_text("{")
    for _ in range(2):  # not only at the first look
        with pytest.raises(ArtifactError) as caught:
            doors.find(f"Bearer {ada}")
        assert str(tmp_path) not in str(caught.value)
    path.unlink()
    with pytest.raises(ArtifactError):
        doors.find(f"Bearer {ada}")


GOOD = {"name": "ada", "sha256": "0" * 64, "created": 1}


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "null", "{}", '{"schema": 2, "keys": []}', '{"schema": 1}', '{"schema": 1, "keys": [1]}',
        json.dumps({"schema": 1, "keys": [GOOD, GOOD]}),
        *(json.dumps({"schema": 1, "keys": [{**GOOD, **wrong}]}) for wrong in (
            {"sha256": "0" * 63}, {"sha256": 1}, {"name": ""}, {"name": "a\nb"}, {"created": None}, {"more": 1},
            {"concurrent": 0}, {"requests_per_minute": 0.5}, {"tokens_per_minute": True}, {"metrics": 1},
            {"created": float("inf")}, {"created": 1.5}, {"created": 10**18}, {"created": -1}, {"created": True},
        )),
        json.dumps({"schema": 1, "keys": [GOOD]}).replace("1}]", "1e400}]"), '{"schema": 1, "keys": ' + "[" * 100_000,
        json.dumps({"schema": 1, "keys": [GOOD]}).replace("1}]", "9" * 5000 + "}]"), '{"a":' * 100_000,
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_clear_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises((ArtifactError, ConfigError)) as caught:
        Keys(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, 0o602])
def test_a_file_that_others_can_open_is_refused_with_the_way_out(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "keys.json"
    keys.add(path, "ada")
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"mode {mode:04o}.*chmod 600"):
        Keys(path)


@pytest.mark.parametrize("name", ["", "a b", "a\n", "ä", "x" * 65])
def test_a_name_is_short_and_plain(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError):
        keys.add(tmp_path / "keys.json", name)
    assert not list(tmp_path.iterdir())


def test_impossible_changes_leave_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    with pytest.raises(ConfigError):
        Keys(path)
    with pytest.raises(ConfigError):
        keys.remove(path, "ada")
    keys.add(path, "ada")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="remove it first"):
        keys.add(path, "ada")
    with pytest.raises(ConfigError, match="holds ada"):
        keys.remove(path, "bob")
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["keys.json"]


def _add(path: Path, name: str) -> None:
    keys.add(path, name)


def test_writers_at_once_lose_no_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    writers = [multiprocessing.get_context("fork").Process(target=_add, args=(path, f"k{i}")) for i in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert {key.name for key in keys.read(path)} == {f"k{i}" for i in range(8)}


def test_the_command_prints_a_key_once_lists_and_removes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from constellation.commands.keys import command

    def call(*words: str) -> str:
        command.main(args=[*words, "--file", str(tmp_path / "keys.json")], standalone_mode=False)
        return capsys.readouterr().out

    assert "metrics" in (call("add", "--name", "prom", "--metrics") and call("list"))
    assert Keys(tmp_path / "keys.json").find("Bearer none") is None and call("remove", "--name", "prom") == ""
    key = call("add", "--name", "ada", "--concurrent", "2").strip()
    assert Keys(tmp_path / "keys.json").find(f"Bearer {key}")
    assert "ada" in (shown := call("list")) and "concurrent 2" in shown and key not in shown
    listed = json.loads(call("list", "--json"))
    assert [(row["name"], row["concurrent"]) for row in listed] == [("ada", 2)] and "sha256" not in listed[0]
    assert call("remove", "--name", "ada") == "" and call("list", "--json").strip() == "[]"


@pytest.mark.parametrize("words", [["list"], ["remove", "--name", "x"], ["add"], ["add", "--name", ""], ["nope"]])
def test_a_wrong_request_is_one_line_and_status_2(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["keys", *words, "--file", str(tmp_path / "keys.json")]) == 2
    assert len(capfd.readouterr().err.splitlines()) == 1
