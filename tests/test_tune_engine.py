"""Sweeps that are really computed: alone in this process, on Ray, and killed on the way."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from constellation.config import Config, override
from constellation.errors import RunError
from tests.test_tune_sweep import lines
from tests.waiting import wait_for
from tune.evaluate import RESULT, evaluate, finished
from tune.events import LOG, read_events
from tune.history import Evaluation, read_history
from tune.request import SweepRequest
from tune.run import SweepRun, alone
from tune.space import read_space
from tune.work import Work

TOKENS = 9 * 2048.0


@pytest.fixture(scope="module")
def request_of(micro: Config, micro_corpus: Path) -> SweepRequest:
    """Nine trials of up to 36 steps of 512 tokens under ASHA and TPE, the best on two seeds."""
    base = override(micro, {"train.batch": 8, "train.kernel_batch": 8, "train.checkpoint_every": 3})
    return SweepRequest(
        read_space("optim", base), base, str(micro_corpus), TOKENS, trials=9, workers=2, seeds=2, scheduler="asha",
        rungs=(1 / 9, 1 / 3, 1.0),
    )  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(request_of: SweepRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweeps") / "alone"
    alone(SweepRun(out, request_of))
    return out


def results(out: Path) -> dict[str, float]:
    """When each result was written."""
    return {path.parent.name: path.stat().st_mtime for path in out.glob(f"trials/*/{RESULT}")}


def test_the_default_is_the_plain_loop(undisturbed: Path, request_of: SweepRequest, tmp_path: Path) -> None:
    """The default's metric is what `fit` gives without any sweep."""
    from constellation.train.job import Job
    from constellation.train.loop import fit

    shared = next(path for path in (undisturbed / "shared").iterdir() if path.is_dir())
    from constellation.pipeline.prepare import open_plan

    plan, history = open_plan(shared), read_history(undisturbed)
    config = request_of.config(history.trials[0], Evaluation(0, 2))
    *_, last = fit(Job("ocean", tmp_path / "ocean", config, 36, plan.train, plan.dev))
    assert history.outcomes[Evaluation(0, 2)].metric == last.dev_bits_per_byte
    assert history.outcomes[Evaluation(0, 2)].cost.tokens == TOKENS


def test_seeds_are_paired(undisturbed: Path, request_of: SweepRequest) -> None:
    history = read_history(undisturbed)
    seeds = [e for e in history.outcomes if e.seed == 1]
    assert seeds and all(Evaluation(e.trial, e.rung, 0) in history.outcomes for e in seeds)
    configs = {request_of.config(history.trials[e.trial], e).train.seed for e in seeds}
    assert configs == {request_of.base.train.seed + 1}


def test_only_the_best_keep_their_weights(undisturbed: Path) -> None:
    history = read_history(undisturbed)
    top = sorted((o.metric, e) for e, o in history.outcomes.items() if e.rung == 2 and o.metric is not None)
    kept = {path.parent.parent.name for path in undisturbed.glob("trials/*/ocean/checkpoints")}
    assert kept == {str(e) for _, e in top[:3]}


def test_an_evaluation_that_is_stopped_goes_on_to_the_same_bits(request_of: SweepRequest, tmp_path: Path) -> None:
    from tune.work import Stopped

    one = replace(request_of, trials=1, scheduler="none", rungs=(1.0,), seeds=1)
    work = SweepRun(tmp_path / "out", one).advance()
    assert isinstance(work, Work) and work.stop is not None
    work.stop.touch()
    with pytest.raises(Stopped):
        evaluate(work)
    assert finished(work.folder) is None
    work.stop.unlink()
    stopped = evaluate(work)
    whole = evaluate(replace(work, folder=tmp_path / "whole"))
    assert stopped.metric == whole.metric and stopped.status == "done"
    (work.folder / RESULT).unlink()  # killed between the last checkpoint and the result
    assert evaluate(work).metric == pytest.approx(whole.metric, rel=1e-6)


def test_divergence_is_an_outcome(request_of: SweepRequest, tmp_path: Path) -> None:
    base = override(request_of.base, {"optim.name": "curvature_sgd", "optim.lr": 1e30, "train.clip": 1e30})
    one = replace(request_of, base=base, space=read_space("regime", base), trials=1, scheduler="none", rungs=(1.0,))
    run = SweepRun(tmp_path / "out", one)
    alone(run)
    outcome = read_history(tmp_path / "out").outcomes[Evaluation(0)]
    assert outcome.status == "failed" and "loss" in outcome.reason and outcome.cost.cpu_s > 0


def test_pbt_branches_from_its_parent(request_of: SweepRequest, tmp_path: Path) -> None:
    out = tmp_path / "out"
    alone(SweepRun(out, replace(request_of, trials=8, seeds=1, scheduler="pbt", levels=2, rungs=(0.5, 1.0))))
    history = read_history(out)
    for trial in history.trials.values():
        if trial.parent is not None:
            child, parent = (history.outcomes[Evaluation(t, r)] for t, r in ((trial.number, 1), (trial.parent, 0)))
            assert child.metric is not None and parent.metric is not None and child.metric < parent.metric
            assert child.cost.tokens == parent.cost.tokens == TOKENS / 2


@pytest.mark.ray
def test_on_ray_a_sweep_decides_as_it_does_alone(
    ray_session: None, undisturbed: Path, request_of: SweepRequest, tmp_path: Path
) -> None:
    from tune.engine import compute

    compute(SweepRun(tmp_path / "out", request_of), 2)
    assert lines(tmp_path / "out") == lines(undisturbed)
    assert read_history(tmp_path / "out").finished


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_process_that_is_killed_is_begun_again(
    ray_session: None, undisturbed: Path, request_of: SweepRequest, tmp_path: Path
) -> None:
    """Each first attempt of trial 1's evaluations kills its own process, as the kernel's OOM killer would."""
    import threading

    import psutil

    from tune.engine import compute

    out, killed = tmp_path / "out", []

    def kill() -> None:
        while not killed and not (out / "done").exists():
            for process in psutil.process_iter(["name", "cmdline"]):
                title = " ".join(process.info["cmdline"] or ())
                if "ImplicitFunc" in title and any(out.glob("trials/0001-r2-s0/ocean/checkpoints/step-*")):
                    with contextlib.suppress(psutil.Error):
                        process.kill()
                        killed.append(process.pid)
            time.sleep(0.01)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        compute(SweepRun(out, request_of), 2)
    finally:
        out.mkdir(exist_ok=True)
        (out / "done").touch()
        thread.join()
    assert killed and any(event["event"] == "lost" for event in read_events(out))
    assert lines(out) == lines(undisturbed)


@pytest.mark.ray
@pytest.mark.slow
def test_a_full_disk_ends_the_sweep_and_not_a_trial(
    ray_session: None, undisturbed: Path, request_of: SweepRequest, tmp_path: Path
) -> None:
    """A folder of trials that cannot be written: RunError; with room again it goes on to the same decisions."""
    from tune.engine import compute

    out = tmp_path / "out"
    small = Path("/dev/shm") / f"constellation-{os.getpid()}"
    if os.geteuid() or subprocess.run(["true"]).returncode:
        pytest.skip("mounting a small disk needs root")
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(small)], capture_output=True).returncode:
        small.rmdir()
        pytest.skip("no tmpfs can be mounted here")
    try:
        out.mkdir()
        (out / "trials").symlink_to(small)
        with pytest.raises(RunError, match="No space left"):
            compute(SweepRun(out, request_of), 2)
        subprocess.run(["mount", "-o", "remount,size=200m", str(small)], check=True)
        compute(SweepRun.resume(out), 2)
        assert lines(out) == lines(undisturbed)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
        small.rmdir()


def killed_and_resumed(out: Path, command: list[str], kills: list[int], timeout: float = 300) -> None:
    """Start the driver, SIGKILL it when its log has so many lines, resume; so many times, then to the end."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    for wanted in [*kills, None]:
        there = (out / LOG).exists()
        driver = subprocess.Popen(
            [*command, *(["--resume"] if there else [])], env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True, text=True,
        )  # fmt: skip
        if wanted is None:
            told, _ = driver.communicate(timeout=timeout)
            assert driver.returncode == 0, told
            return
        before = results(out)
        wait_for(lambda: driver.poll() is not None or _length(out) >= wanted)  # noqa: B023
        if driver.poll() is None:
            os.kill(driver.pid, signal.SIGKILL)
        driver.communicate()
        after = results(out)
        assert before.items() <= after.items()


def _length(out: Path) -> int:
    try:
        return (out / LOG).read_bytes().count(b"\n")
    except OSError:
        return 0


def command_of(out: Path, corpus: Path, trials: int, base: dict[str, object], tokens: float = TOKENS) -> list[str]:
    return [
        sys.executable, "-m", "constellation", "tune", "--space", "optim", "--corpus", str(corpus), "--out", str(out),
        "--preset", "tiny", "--trials", str(trials), "--scheduler", "asha", "--search", "tpe", "--budget",
        str(tokens), "--jobs", "2", *(f"{name}={value}" for name, value in base.items()),
    ]  # fmt: skip


MICRO = {
    "kernel.vocab_size": 288, "train.batch": 8, "train.checkpoint_every": 3, "train.eval_bytes": 2048,
    "train.sample_bytes": 0, "train.precision": "fp32", "optim.ns_precision": "fp32",
}  # fmt: skip


def expected(out: Path, there: Path) -> list[dict]:
    """What the sweep in `there` was asked for, computed alone in `out`."""
    from tune.run import recorded_request

    alone(SweepRun(out, recorded_request(there)))
    return lines(out)


@pytest.mark.ray
@pytest.mark.slow
def test_a_driver_that_is_killed_goes_on_as_if_it_had_not_been(micro_corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed_and_resumed(out, command_of(out, micro_corpus, 9, MICRO), [9, 21])
    assert sum(event["event"] == "resumed" for event in read_events(out)) == 2
    assert lines(out) == expected(tmp_path / "alone", out)
    assert json.loads((out / LOG).read_text().splitlines()[-1])["event"] == "finished" and (out / "best.toml").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_that_is_lost_costs_no_trial(micro_corpus: Path, tmp_path: Path) -> None:
    """One of two nodes, each with room for one evaluation: what ran there is begun again on the other."""
    import psutil
    from ray.cluster_utils import Cluster

    fast = {
        "health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_timeout_ms": 500,
        "health_check_failure_threshold": 3,
    }  # fmt: skip
    out, small = tmp_path / "out", {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "num_cpus": 0, "_system_config": fast})
    try:
        lost, _ = cluster.add_node(**small), cluster.add_node(**small)
        whole = {**MICRO, "cluster.cpus_per_kernel": 1.0}
        command = [*command_of(out, micro_corpus, 9, whole, 20 * TOKENS), "--address", cluster.address]
        driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

        def both_at_work() -> bool:
            begun = {path.parents[2].name for path in out.glob("trials/*/ocean/checkpoints/step-*")}
            return len(begun - set(results(out))) == 2

        wait_for(lambda: driver.poll() is not None or both_at_work())
        raylet = psutil.Process(lost.all_processes["raylet"][0].process.pid)
        for process in [*raylet.children(recursive=True), raylet]:  # as a machine that is switched off
            process.kill()
        cluster.remove_node(lost, allow_graceful=False)
        told, _ = driver.communicate()
        assert driver.returncode == 0 and "Traceback" not in told, told
    finally:
        cluster.shutdown()
    assert any(event["event"] == "lost" for event in read_events(out))
    assert lines(out) == expected(tmp_path / "alone", out)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_driver_that_is_killed_twenty_times_goes_on(micro_corpus: Path, tmp_path: Path) -> None:
    import random

    out = tmp_path / "out"
    kills = sorted(random.Random(0).sample(range(3, 90), 20))
    killed_and_resumed(out, command_of(out, micro_corpus, 24, MICRO), kills)
    assert lines(out) == expected(tmp_path / "alone", out)


@pytest.mark.ray
@pytest.mark.slow
def test_ctrl_c_stops_with_checkpoints(micro_corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [*command_of(out, micro_corpus, 9, MICRO)]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: driver.poll() is not None or _length(out) > 8)
    driver.send_signal(signal.SIGINT)
    told, _ = driver.communicate(timeout=120)
    assert driver.returncode == 130 and "--resume" in told and "Traceback" not in told, told
    killed_and_resumed(out, command, [])
    assert lines(out) == expected(tmp_path / "alone", out)
