"""Actors: room, locks, status, training under the supervisor, answering, staying up. Faults: test_faults.py."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import constellation
from actors import connect, lifecycle
from actors import record as records
from actors.launch import summary, train
from actors.memory import check_memory, free_bytes, needed_bytes
from actors.placement import Placement, check, halves, pack
from actors.processes import of_session
from actors.ray_head import Head
from actors.specs import options_of, servers
from constellation.config import Config, override
from constellation.errors import ArtifactError, ConfigError, DataError, PlacementError, RunError
from constellation.pipeline.status import folder_status
from constellation.presets import m100
from constellation.roster import OCEAN, ROLES, root_name
from constellation.storage.exclusive import exclusive, is_held
from tests import asking
from tests.waiting import wait_for

THREE = ROLES[:3]
amounts = st.integers(0, 40).map(lambda n: n / 8)


def silent(text: str) -> None:
    pass


# -- room ----------------------------------------------------------------------------------------------------------


@given(
    st.fixed_dictionaries({"CPU": st.integers(1, 16).map(lambda n: n / 8), "GPU": amounts}),
    st.integers(1, 9),
    st.lists(st.fixed_dictionaries({"CPU": amounts, "GPU": amounts}), max_size=4),
)
def test_equal_bundles_fit_exactly_when_the_rooms_hold_that_many(bundle: dict, count: int, rooms: list[dict]) -> None:
    def held(room: dict) -> int:
        return min(int(room[kind] / amount) for kind, amount in bundle.items() if amount)

    found = pack([bundle] * count, rooms)
    assert (found is not None) == (sum(map(held, rooms)) >= count)
    if found is not None:
        assert all(found.count(i) <= held(room) for i, room in enumerate(rooms))


@given(st.fixed_dictionaries({"CPU": amounts, "GPU": st.one_of(st.sampled_from([0, 0.25, 1.0]), st.integers(2, 8))}))
def test_two_actors_share_a_bundle_in_parts_that_ray_accepts(whole: dict) -> None:
    parts = halves(whole)
    assert {kind: parts[0][kind] + parts[1][kind] for kind in whole} == whole
    assert all(part["GPU"] <= 1 or part["GPU"] == int(part["GPU"]) for part in parts)


def test_what_does_not_fit_is_told_with_both_numbers() -> None:
    with pytest.raises(PlacementError) as told:
        check([{"CPU": 0.25, "GPU": 1.0}] * 8, [{"CPU": 2.0, "GPU": 1.0}, {"CPU": 4.0, "GPU": 1.0}], "the cluster")
    text = str(told.value)
    assert "needs 8 x (CPU 0.25, GPU 1), in all CPU 2, GPU 8" in text
    assert "the cluster has CPU 6, GPU 2 on 2 nodes" in text and "cluster.gpus_per_kernel" in text


def test_an_actor_without_a_gpu_sees_none_and_one_with_a_gpu_is_left_to_ray() -> None:
    without, with_one = (options_of({"CPU": 0.25, "GPU": g}, 1, "DEFAULT") for g in (0.0, 0.5))
    assert without["runtime_env"]["env_vars"]["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in with_one["runtime_env"]["env_vars"] and with_one["num_gpus"] == 0.5


def test_serving_needs_no_more_room_than_training(micro: Config) -> None:
    room = Placement(({"CPU": 1.0, "GPU": 1.0},) * 8, None, (), own=False)
    specs = servers(room, Path("run"), micro, "somewhere")
    asked = [spec.options for spec in specs]
    assert sum(o["num_gpus"] for o in asked) == 8 and sum(o["num_cpus"] for o in asked) == 8
    assert [spec.lasting["name"] for spec in specs] == ["router", *ROLES, OCEAN]


# -- locks and addresses -------------------------------------------------------------------------------------------


HOLDER = """
import signal, sys
from pathlib import Path
from constellation.storage.exclusive import exclusive

with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    signal.pause()
"""


def test_a_folder_has_one_writer_until_that_one_ends_or_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout and holder.stdout.readline()
        assert is_held(tmp_path)
        with pytest.raises(ConfigError, match=f"in use by process {holder.pid} "), exclusive(tmp_path):
            pass
        holder.kill()
        with exclusive(tmp_path, wait_s=math.inf):
            pass
    assert not is_held(tmp_path)


@pytest.mark.parametrize("address", ["nowhere", "host:port", "ray://host:10001", "10.0.0.1"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="host:port or auto"):
        connect.find(address)


def test_a_closed_port_and_a_port_of_somebody_else_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "ANSWER_S", 1.0)
    monkeypatch.setattr(connect, "_authenticate", lambda mode, token: None)  # this process may have a Ray already
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(ConfigError, match="no Ray at"):
            connect.answer(f"127.0.0.1:{closed.getsockname()[1]}")
        closed.listen()
        with pytest.raises(ConfigError, match="is not a Ray, or hangs"):
            connect.answer(f"127.0.0.1:{closed.getsockname()[1]}")


# -- status from the folder ----------------------------------------------------------------------------------------


def test_a_root_has_a_name_in_the_standard_basis() -> None:
    from constellation.geometry import e8

    names = [root_name(root) for root in e8.roots().tolist()]
    assert len(set(names)) == 240
    assert root_name(e8.simple_roots()[1].tolist()) == "e1 + e2"
    assert root_name([0, -1, 0, 0, 0, 0, 0, 1]) == "-e2 + e8"


def test_the_folder_alone_tells_what_became_of_a_run(micro_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(micro_run, run)
    whole = folder_status(run)
    assert whole.state == "finished" and [k.role for k in whole.kernels] == [OCEAN, *ROLES]
    assert all(k.state == "done" and k.step == k.steps and k.loss_nats and k.health == "ok" for k in whole.kernels)
    assert len({k.root for k in whole.kernels if k.role != OCEAN}) == 8
    assert [row["status"] for row in summary(run)["models"]] == ["done"] * 9

    last = run / ROLES[2]
    shutil.rmtree(sorted((last / "checkpoints").iterdir())[-1])
    with (last / "diag_steps.jsonl").open("a") as log:
        log.write('{"role": "torn by a ki')
    stopped = folder_status(run)
    assert stopped.state == "stopped" and "--resume" in stopped.detail
    assert {k.role for k in stopped.kernels if k.state == "stopped"} == {ROLES[2]}

    page = json.loads((last / "summary.json").read_text())
    (last / "summary.json").write_text(json.dumps({**page, "status": "failed", "failure": "loss nan at step 7"}))
    assert folder_status(run).state == "failed" and folder_status(run).detail == "loss nan at step 7"

    with exclusive(run):
        assert folder_status(run).state == "training"
    assert json.loads(json.dumps(folder_status(run).to_json()))["state"] == "failed"


# -- the driver refuses ------------------------------------------------------------------------------------------


def test_a_run_that_is_there_is_not_trained_over_and_a_finished_one_is_left(micro_run: Path, micro: Config) -> None:
    before = {p: p.stat().st_mtime_ns for p in micro_run.rglob("*")}
    with pytest.raises(ConfigError, match="--resume, or choose another --run"):
        list(train(micro_run, None, micro))
    said: list[str] = []
    assert list(train(micro_run, resume=True, say=said.append)) == []
    assert "trained to its end already" in said[0]
    assert before == {p: p.stat().st_mtime_ns for p in micro_run.rglob("*")}


def test_a_machine_too_small_is_told_at_once_and_nothing_is_written(
    micro: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.launch.inside", lambda: False)  # as in a fresh process, without the session's Ray
    (tmp_path / "empty").mkdir()  # a corpus that could not be read: it is not read before
    with pytest.raises(PlacementError, match=r"needs 1 x \(CPU 0\.25, GPU 4\).*GPU 4; this machine has CPU \d+, GPU"):
        list(train(tmp_path / "run", tmp_path / "empty", override(micro, {"cluster.gpus_per_kernel": 4})))
    assert not (tmp_path / "run").exists()


def test_a_machine_with_too_little_memory_is_told_what_training_takes(micro: Config) -> None:
    needed = needed_bytes(micro, 8)
    check_memory(micro, 8, needed)
    with pytest.raises(
        PlacementError, match=r"training 8 kernels of the preset tiny takes at least (.*) of memory, 1\.0 GiB"
    ):
        check_memory(micro, 8, 2**30)
    assert needed_bytes(m100(), 8) > needed_bytes(micro, 8) > needed_bytes(micro, 1) > 2**30
    assert 2**28 < free_bytes() < 2**50


def test_a_request_that_cannot_be_met_leaves_no_folder(micro: Config, micro_corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError):
        list(train(tmp_path / "run", tmp_path / "empty", micro, say=silent))
    assert not (tmp_path / "run").exists()


def test_only_a_trained_run_is_served_and_only_the_cluster_part_may_change(micro_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(micro_run, run)
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        lifecycle.up(run, changes={"optim.lr": 1})
    shutil.rmtree(run / ROLES[4] / "checkpoints")
    with pytest.raises(ConfigError, match=f"{ROLES[4]} not trained yet"):
        lifecycle.up(run)
    assert not lifecycle.down(run, say=silent) and records.read(run) is None


# -- with Ray ------------------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_a_cluster_too_small_and_a_busy_one_are_told(
    ray_session: None, micro: Config, micro_corpus: Path, tmp_path: Path
) -> None:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    with pytest.raises(PlacementError, match=r"needs 8 x .*the cluster has CPU 4, GPU 0; lower"):
        list(train(tmp_path / "run", micro_corpus, override(micro, {"cluster.cpus_per_kernel": 1})))
    with pytest.raises(ConfigError, match="connected to the Ray at"):
        list(train(tmp_path / "run", micro_corpus, micro, address="127.0.0.1:1"))
    assert not (tmp_path / "run").exists()

    hog = placement_group([{"CPU": 3.5}])
    ray.get(hog.ready())
    said: list[str] = []
    try:
        impatient = override(micro, {"cluster.placement_timeout_s": 1})
        with pytest.raises(PlacementError, match=r"no room within 1 s.*has CPU 4, GPU 0, free CPU 0\.5"):
            list(train(tmp_path / "busy", micro_corpus, impatient, say=said.append))
    finally:
        remove_placement_group(hog)


@pytest.mark.ray
def test_a_run_in_a_group_around_it_equals_the_plain_loop_and_takes_no_other_room(
    ray_session: None, micro_run: Path, micro_corpus: Path, micro: Config, tmp_path: Path
) -> None:
    """As a Tune trial does: the driver sits in the first bundle, its kernels in the others."""
    import ray
    from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    def trial(run: Path) -> tuple[list[Any], int]:
        steps = list(train(run, micro_corpus, micro, roles=THREE, say=silent))
        return steps, len([g for g in placement_group_table().values() if g["state"] == "CREATED"])

    group = placement_group([{"CPU": 0.5}, *[{"CPU": 0.25}] * 3])
    ray.get(group.ready())
    strategy = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
    try:
        ran = ray.remote(trial).options(num_cpus=0.5, scheduling_strategy=strategy).remote(tmp_path / "run")
        steps, groups = ray.get(ran)
    finally:
        remove_placement_group(group)
    assert groups == 1
    for role in (OCEAN, *THREE):
        planned = next(k.steps for k in folder_status(micro_run).kernels if k.role == role)
        assert [s.step for s in steps if s.role == role] == list(range(1, planned + 1))  # each once, in order
        mine, theirs = (r / role / "checkpoints" / f"step-{planned:08d}" for r in (tmp_path / "run", micro_run))
        assert (mine / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()


@pytest.mark.ray
def test_a_diverging_run_fails_with_its_reason_and_is_not_tried_again(
    ray_session: None, micro_corpus: Path, micro: Config, tmp_path: Path
) -> None:
    said: list[str] = []
    with pytest.raises(RunError, match=r"loss nan|norm nan|norm inf"):
        list(train(tmp_path / "run", micro_corpus, override(micro, {"optim.lr": 1e30}), say=said.append))
    assert not any("restarting" in text for text in said)
    assert folder_status(tmp_path / "run").state == "failed"


@pytest.mark.ray
def test_an_actor_does_one_thing_at_a_time(ray_session: None, micro_run: Path, tmp_path: Path) -> None:
    import ray

    from actors.kernel_actor import KernelActor
    from constellation.pipeline.prepare import ocean_job, open_plan

    job = dataclasses.replace(ocean_job(open_plan(micro_run)), folder=tmp_path / "twice")
    actor = KernelActor.options(num_cpus=0.25).remote(OCEAN)
    ray.get([actor.train.remote(job) for _ in range(3)])
    with pytest.raises(ConfigError, match="one thing at a time"):
        ray.get(actor.train.remote(dataclasses.replace(job, folder=tmp_path / "other")))
    with pytest.raises(ConfigError, match="it answers when it serves"):
        ray.get(actor.turn.remote([], 64))
    seen: list[int] = []
    while True:
        report = ray.get(actor.report.remote(seen[-1] if seen else 0, 1.0))
        again = ray.get(actor.report.remote(seen[-1] if seen else 0))
        assert again.steps[: len(report.steps)] == report.steps  # a lost answer is asked for again
        seen += [step.step for step in report.steps]
        if report.state == "done":
            break
    assert seen == list(range(1, job.steps + 1)) and report.checkpoint == f"step-{job.steps:08d}"
    other = dataclasses.replace(job, folder=tmp_path / "other")
    ray.get([actor.train.remote(other) for _ in range(2)])  # the next one, in the same process
    wait_for(lambda: ray.get(actor.report.remote(0, 1.0)).state == "done")
    assert [step.step for step in ray.get(actor.report.remote(0)).steps] == seen
    assert_same_models(tmp_path / "twice", tmp_path / "other")
    ray.kill(actor)


def assert_same_models(a: Path, b: Path) -> None:
    for name in ("model.safetensors", "optim.safetensors"):
        one, two = (sorted((folder / "checkpoints").iterdir())[-1] / name for folder in (a, b))
        assert one.read_bytes() == two.read_bytes(), name


@pytest.mark.ray
def test_the_driver_tells_of_a_damaged_checkpoint_and_the_older_one_ends_in_the_same_bits(
    ray_session: None, micro_run: Path, tmp_path: Path
) -> None:
    from constellation.pipeline.prepare import kernel_job, open_plan
    from constellation.train.loop import fit

    run = tmp_path / "run"
    shutil.copytree(micro_run, run)
    folder = run / ROLES[0] / "checkpoints"
    shutil.rmtree(folder.parent)
    job = kernel_job(open_plan(run), ROLES[0])
    for _ in fit(dataclasses.replace(job, config=override(job.config, {"train.keep_last": 3}))):
        pass
    older, newest, last = sorted(folder.iterdir())[-3:]
    shutil.rmtree(last)
    state = (newest / "state.json").read_text()
    (newest / "state.json").write_text(state.replace('"lr": ', '"lr": 1', 1))
    said: list[str] = []
    steps = [step.step for step in train(run, resume=True, roles=ROLES[:1], say=said.append)]
    assert steps[0] == int(older.name[-8:]) + 1
    (told,) = [line for line in said if "damaged" in line]
    assert told.startswith(f"{ROLES[0]}: {newest}/state.json is damaged") and "\n" not in told
    for name in ("model.safetensors", "optim.safetensors"):
        assert (last / name).read_bytes() == (micro_run / ROLES[0] / "checkpoints" / last.name / name).read_bytes()


def answers(kernels: Any, run: Path, between: Callable[[], None] = lambda: None) -> list[Any]:
    from constellation.decoding.sample import Sampling
    from constellation.pipeline.serving import service_of
    from router.answer.query import Answer, Ask

    how = Sampling(temperature=0.9, top_p=0.95, seed=7, max_new_tokens=120)
    asks = [Ask("The import statement binds", how), Ask("Operators: << and", how), Ask("x", how, OCEAN)]
    service = service_of(run, kernels)

    async def one(ask: Ask) -> Any:
        async for step in service.stream(ask):
            if isinstance(step, Answer):
                return asking.untimed(step)
            between()

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*map(one, asks))

    return asyncio.run(all_of_them())


@pytest.mark.ray
def test_local_and_ray_answers_are_equal_even_if_an_actor_is_killed_on_the_way(
    ray_session: None, micro_run: Path, micro: Config
) -> None:
    from actors.remote import open_kernels
    from router.answer.local import LocalKernels

    local = answers(LocalKernels.from_run(micro_run), micro_run)
    assert len(local) == 3 and all(answer.completion_tokens for answer in local)
    with open_kernels(micro_run, say=silent) as kernels:
        assert answers(kernels, micro_run) == local
        import ray

        victims = [ray.get(actor.report.remote(0)).pid for actor in kernels._actors.values()]

        def kill_one() -> None:
            if victims:
                os.kill(victims.pop(), signal.SIGKILL)

        assert answers(kernels, micro_run, between=kill_one) == local


@pytest.mark.ray
def test_a_damaged_model_is_told_and_not_waited_for(ray_session: None, micro_run: Path, tmp_path: Path) -> None:
    from actors.remote import open_kernels

    run = tmp_path / "run"
    shutil.copytree(micro_run, run)
    for file in (run / OCEAN).rglob("model.safetensors"):
        file.write_bytes(b"\0" + file.read_bytes()[1:])
    said: list[str] = []
    with pytest.raises(ArtifactError, match="checksum"), open_kernels(run, say=said.append) as kernels:
        asyncio.run(kernels.bits(OCEAN, b"", 1))
    assert not any("restarting" in text for text in said)


@pytest.mark.ray
def test_a_constellation_stays_up_heals_and_goes_down(
    ray_session: None, micro_run: Path, unique: str, tmp_path: Path
) -> None:
    import ray
    from ray.util.placement_group import placement_group_table

    from actors.remote import RayKernels, open_kernels
    from actors.supervisor_actor import namespace_of
    from constellation.pipeline.status import newest_step
    from router.answer.local import LocalKernels
    from router.decide.fisher_rao import FisherRaoRouter

    run = tmp_path / "run"
    shutil.copytree(micro_run, run)
    local = answers(LocalKernels.from_run(run), run)
    texts = [b"def f(x): return x", b"An assignment statement evaluates"]
    status = lifecycle.up(run, name=unique, say=silent)
    assert status.state == "up" and status.name == unique
    assert [k.role for k in status.kernels] == ["supervisor", "router", *ROLES, OCEAN]
    assert all(k.state == "serving" and k.health == "ok" and k.node for k in status.kernels)
    said: list[str] = []
    assert lifecycle.up(run, say=said.append).name == unique and "is up already" in said[0]
    prompts, how = ["The import statement binds", "x"], {"seed": 7, "temperature": 0.9, "max_new_tokens": 120}
    with constellation.open(run, say=said.append) as asked:
        kernels = asked.service.kernels
        assert isinstance(kernels, RayKernels) and not asked.unfinished, "who is up is asked"
        assert asyncio.run(kernels.steps()) == {role: newest_step(run / role) for role in (OCEAN, *ROLES)}
        on_ray = [asking.untimed(answer) for answer in asked.generate(prompts, **how)]
        stream = asked.stream(prompts[0], **how)
        assert "".join(piece.text for piece in stream) == on_ray[0].text
    with constellation.open(run, local=True) as asked:
        assert isinstance(asked.service.kernels, LocalKernels)
        assert [asking.untimed(answer) for answer in asked.generate(prompts, **how)] == on_ray
    with open_kernels(run, say=silent) as kernels:
        assert answers(kernels, run) == local
        assert [c.to_json() for c in asyncio.run(kernels.route(texts))] == [
            c.to_json() for c in FisherRaoRouter.load(run / "router").route(texts)
        ]
    command = [sys.executable, "-m", "constellation", "route", "--run", str(run), "--json", "--address"]
    asked_by_hand = [*command, status.address or ""]
    printed = subprocess.run(asked_by_hand, input=b"\n".join(texts), capture_output=True, check=True).stdout
    assert [json.loads(line) for line in printed.splitlines()] == [
        c.to_json(ROLES) for c in FisherRaoRouter.load(run / "router").route(texts)
    ]
    heal(run, {k.role: k.pid for k in status.kernels}, killed=("supervisor", ROLES[0]))
    endless, ended = asked_for_ever(run), []
    next(endless)
    asker = threading.Thread(target=lambda: ended.append(failure(endless)))
    asker.start()
    assert lifecycle.down(run, say=silent)
    asker.join()
    assert len(ended) == 1 and isinstance(ended[0], RunError) and "was taken down meanwhile" in str(ended[0])
    assert not lifecycle.down(run, say=silent)
    assert lifecycle.status(run).state == "finished"
    assert not any(a["namespace"] == namespace_of(unique) for a in ray.util.list_named_actors(all_namespaces=True))
    groups = [g["state"] for g in placement_group_table().values() if g["name"] == namespace_of(unique)]
    assert set(groups) == {"REMOVED"}


@pytest.mark.ray
@pytest.mark.slow  # `serve` of a run that is not up does the same by default: test_serve_cli.py
def test_up_without_a_cluster_starts_a_ray_that_outlives_it_and_down_ends_all_of_it(
    micro_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(micro_run, run)
    done = subprocess.run([sys.executable, "-c", UP_AND_DOWN, str(run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    leader = done.stdout.split("leader ")[1].split()[0]
    wait_for(lambda: not of_session(int(leader)))  # SIGKILL takes a moment


def asked_for_ever(run: Path) -> Iterator[None]:
    """Questions to the constellation that is up, one after another."""
    from actors.remote import kernels_of

    record = records.read(run)
    assert record is not None
    with kernels_of(run, record, silent) as kernels:
        while True:
            asyncio.run(kernels.route([b"def f(x): return x"]))
            yield


def failure(work: Iterator[None]) -> Exception | None:
    try:
        for _ in work:
            pass
    except Exception as error:
        return error
    return None


def heal(run: Path, before: dict[str, int], killed: tuple[str, ...]) -> None:
    """Kill some, wait until the constellation is up again, and see that the others never went away.

    Ray restarts the supervisor; it finds the others by name and replaces the one that is missing.
    """
    for role in killed:
        os.kill(before[role], signal.SIGKILL)
    after: dict[str, int | None] = {}

    def healed() -> bool:
        now = lifecycle.status(run)
        after.update({k.role: k.pid for k in now.kernels})
        return now.state == "up" and all(after[role] not in (None, before[role]) for role in killed)

    wait_for(healed)
    assert {r: p for r, p in after.items() if r not in killed} == {r: p for r, p in before.items() if r not in killed}


UP_AND_DOWN = """
import sys
from pathlib import Path
from actors import lifecycle, record as records

run = Path(sys.argv[1])
status = lifecycle.up(run)
head = records.read(run).head
print("leader", head.pid, flush=True)
assert status.state == "up" and head.alive() and status.address.startswith("127.0.0.1:"), status
assert head.token.stat().st_mode & 0o77 == 0 and Path(head.folder).stat().st_mode & 0o77 == 0
assert lifecycle.status(run).state == "up"
assert lifecycle.down(run) and not lifecycle.down(run)
assert not head.alive() and not Path(head.folder).exists() and lifecycle.status(run).state == "finished"
"""


def test_a_record_of_a_ray_that_is_gone_is_seen_through(
    micro_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "_authenticate", lambda mode, token: None)  # this process may have a Ray already
    run = tmp_path / "run"
    shutil.copytree(micro_run, run)
    pid = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True).stdout
    here, gone = socket.gethostname(), str(run / "gone")
    ended = {"address": "127.0.0.1:1", "host": here, "pid": int(pid), "started": 1.0, "folder": gone}
    for head, why in (
        (ended, "its Ray has ended"),
        ({**ended, "pid": os.getpid()}, "its Ray has ended"),  # the number belongs to another process now
        ({**ended, "host": "elsewhere"}, "it is up on elsewhere"),
        (None, "no Ray at 127.0.0.1:1"),
    ):
        records.write(run, records.Record("run", "127.0.0.1:1", head and Head(**head)))
        status = lifecycle.status(run)
        assert status.state == "finished" and why in status.detail
    said: list[str] = []
    assert lifecycle.down(run, say=said.append) and "forgotten" in said[0]
    assert not lifecycle.down(run, say=silent)
