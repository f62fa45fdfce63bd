"""The machine of a sweep: what it suggests and decides is a function of request and results. No Ray here."""

import json
import math
import os
import random
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from constellation.errors import ArtifactError, ConfigError
from constellation.presets import tiny
from constellation.storage.atomic import write_json
from tune.evaluate import RESULT
from tune.events import LOG, EventLog, read_events
from tune.history import Cost, Evaluation, Outcome, Trial, read_history
from tune.race import Race, paired_interval
from tune.request import SweepRequest
from tune.run import Nothing, SweepRun
from tune.schedulers import SCHEDULERS, Asha, Hyperband, make_scheduler, rank_correlations, spearman
from tune.search import SEARCHES, make_search
from tune.space import Dimension, Space
from tune.sweep import Start, Sweep, silent
from tune.work import Work

DIMENSIONS = (
    Dimension("optim.lr", "log", 4e-3, 1e-3, 1e-1),
    Dimension("optim.momentum", "uniform", 0.9, 0.5, 0.99),
    Dimension("kernel.layers", "int", 2, 1, 4),
    Dimension("kernel.metric", "choice", "fidelity", values=("fidelity", "dot")),
)
SPACE = Space("made-up", "", "model", "dev_bits_per_byte", {}, DIMENSIONS, {})
REQUEST = SweepRequest(SPACE, tiny(), None, 1e5, trials=18, workers=3, seeds=3, search="tpe", scheduler="asha",
                       rungs=(1 / 9, 1 / 3, 1.0))  # fmt: skip


def outcome(trial: Trial, evaluation: Evaluation) -> Outcome:
    """A made-up result: a bowl in the settings, better at higher rungs; high momentum with a high rate fails."""
    lr, momentum = trial.settings["optim.lr"], trial.settings["optim.momentum"]
    if lr > 0.05 and momentum > 0.9:
        return Outcome("failed", None, "diverged", Cost(1.0, 2.0, 3.0, 4.0))
    noise = ((evaluation.trial * 7919 + evaluation.seed * 104729 + evaluation.rung) % 97) / 970
    metric = (math.log(lr) + 4.5) ** 2 + (momentum - 0.8) ** 2 + 1 / (1 + evaluation.rung) + noise
    return Outcome("done", metric, "", Cost(1.0, 2.0, 3.0, 4.0))


def simulate(sweep: Sweep) -> list[Evaluation]:
    """Feed a machine; returns the order of its starts."""
    started = []
    while action := sweep.next():
        if isinstance(action, Start):
            started.append(action.evaluation)
        else:
            sweep.tell(action.evaluation, outcome(sweep.trials[action.evaluation.trial], action.evaluation))
    return started


def lines(out: Path) -> list[dict]:
    """What decides: without notes, and of costs nothing."""
    return [
        {key: value for key, value in event.items() if key not in ("cost", "attempts")}
        for event in read_events(out)
        if event["event"] not in ("resumed", "lost")
    ]


def land(run: SweepRun, work: Work) -> None:
    evaluation = Evaluation.parse(work.evaluation)
    write_json(work.folder / RESULT, asdict(outcome(run.sweep.trials[evaluation.trial], evaluation)), sealed=True)
    run.landed(work.evaluation)


def compute(run: SweepRun, order: random.Random, most: float = math.inf) -> int:
    """Begin what `run` says and let it end in the given order; returns how many ended, `most` at the most."""
    going: list[Work] = []
    ended = 0
    while True:
        work = run.advance()
        if isinstance(work, Work):
            going.append(work)
        elif work is Nothing.FINISHED:
            run.close()
            return ended
        else:
            if ended >= most:
                run.close()
                return ended
            land(run, going.pop(order.randrange(len(going))))
            ended += 1


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "undisturbed"
    compute(SweepRun(out, REQUEST), random.Random(0))
    return out


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32))
def test_any_order_of_real_ends_gives_the_same_log(
    undisturbed: Path, tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    out = tmp_path_factory.mktemp("sweep") / "other"
    compute(SweepRun(out, REQUEST), random.Random(seed))
    assert lines(out) == lines(undisturbed)


@settings(max_examples=15)
@given(data=st.data())
def test_resumed_from_any_byte_of_its_log_it_decides_the_same(
    undisturbed: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = (undisturbed / LOG).read_bytes()
    first = whole.index(b"\n") + 1
    out = tmp_path_factory.mktemp("sweep") / "cut"
    out.mkdir()
    (out / LOG).write_bytes(whole[: data.draw(st.integers(first, len(whole)), label="bytes")])
    told = sum(event["event"] == "ended" for event in read_events(out))
    ended = compute(SweepRun.resume(out), random.Random(1))
    assert lines(out) == lines(undisturbed)
    assert ended == sum(event["event"] == "ended" for event in read_events(undisturbed)) - told  # none again


def test_results_that_came_but_were_not_told_are_used(tmp_path: Path, undisturbed: Path) -> None:
    out = tmp_path / "out"
    before = compute(SweepRun(out, REQUEST), random.Random(3), most=7)
    assert len(list(out.glob(f"trials/*/{RESULT}"))) == before
    after = compute(SweepRun.resume(out), random.Random(4))
    assert before + after == len(list(out.glob(f"trials/*/{RESULT}")))
    assert lines(out) == lines(undisturbed)


def test_a_log_that_this_sweep_would_not_write_is_told(tmp_path: Path, undisturbed: Path) -> None:
    kept = (undisturbed / LOG).read_text().splitlines(keepends=True)
    at = next(n for n, line in enumerate(kept) if json.loads(line).get("trial") == 3)
    event = json.loads(kept[at])
    event["settings"]["optim.lr"] *= 2
    kept[at] = json.dumps(event) + "\n"
    (tmp_path / LOG).write_text("".join(kept))
    with pytest.raises(ArtifactError, match=rf"{LOG}:{at + 1}: the log says suggested settings="):
        compute(SweepRun.resume(tmp_path), random.Random(0))


def test_a_lost_evaluation_is_begun_three_times_and_then_failed(tmp_path: Path) -> None:
    run = SweepRun(tmp_path, replace(REQUEST, trials=1, scheduler="none", rungs=(1.0,), seeds=1, search="random"))
    for _ in range(3):
        work = run.advance()
        assert isinstance(work, Work) and work.evaluation == "0000-r0-s0"
        run.landed(work.evaluation, "its node was lost")
    assert run.advance() is Nothing.FINISHED
    run.close()
    told = read_history(tmp_path).outcomes[Evaluation(0)]
    assert told.status == "failed" and told.attempts == 3 and "its node was lost" in told.reason
    assert [e["attempt"] for e in read_events(tmp_path) if e["event"] == "lost"] == [1, 2, 3]
    assert run.sweep.winner is None


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("search", SEARCHES)
def test_twice_the_same_and_every_setting_in_its_range(search: str, scheduler: str) -> None:
    def once() -> tuple[Sweep, list[Evaluation]]:
        made = make_search(search, SPACE, 5), make_scheduler(scheduler, SPACE, 18, 5)
        sweep = Sweep(*made, trials=18, workers=4, duration=lambda t, e, share: share)
        return sweep, simulate(sweep)

    (a, order), (b, again) = once(), once()
    assert order == again and a.trials == b.trials and a.winner == b.winner
    assert len(set(order)) == len(order)
    assert a.trials[0] == Trial(0, SPACE.default, "default")
    assert Evaluation(0, a.top) in order  # the default is seen at the full budget
    for trial in list(a.trials.values())[1:]:
        assert all(d.admits(trial.settings[d.name]) for d in DIMENSIONS), trial
        assert trial.origin in (search, "pbt")


def test_what_is_suggested_depends_on_the_seed() -> None:
    for search in ("random", "tpe", "cmaes"):
        a, b = make_search(search, SPACE, 0), make_search(search, SPACE, 1)
        assert a.suggest(0) == b.suggest(0)
        assert a.suggest(1) != b.suggest(1)


def test_tpe_does_better_than_random_on_a_bowl() -> None:
    def best(search: str, seed: int) -> float:
        made = make_search(search, SPACE, seed), make_scheduler("none", SPACE, 60)
        sweep = Sweep(*made, trials=60, workers=2, duration=lambda t, e, share: share)
        simulate(sweep)
        assert sweep.winner is not None
        return outcome(sweep.trials[sweep.winner], Evaluation(0)).metric or math.inf

    assert sum(best("tpe", s) for s in range(3)) < sum(best("random", s) for s in range(3))


@given(u=st.floats(0, 1, exclude_max=True))
def test_a_quantile_of_a_prior_is_admitted(u: float) -> None:
    for dimension in DIMENSIONS:
        assert dimension.admits(dimension.at(u))


@given(metrics=st.lists(st.one_of(st.just(math.inf), st.floats(0, 1)), min_size=1, max_size=30), eta=st.integers(2, 4))
def test_asha_promotes_as_the_naive_rule_does(metrics: list[float], eta: int) -> None:
    """After each result: from the highest rung down, the best one among the first 1/eta that was not promoted."""
    rungs = (1 / eta**2, 1 / eta, 1.0)
    asha = Asha(rungs, eta)
    told: dict[int, dict[int, float]] = {0: {}, 1: {}, 2: {}}
    promoted: dict[int, list[int]] = {0: [], 1: []}

    def tell(trial: int, rung: int, metric: float) -> None:
        told[rung][trial] = metric
        asha.told(Trial(trial, {}, ""), Evaluation(trial, rung), metric)

    def expected() -> Evaluation | None:
        for rung in (1, 0):
            ranked = sorted(told[rung], key=lambda t: (told[rung][t], t))
            for trial in ranked[: len(ranked) // eta]:
                if trial not in promoted[rung] and told[rung][trial] < math.inf:
                    promoted[rung].append(trial)
                    return Evaluation(trial, rung + 1)
        return None

    for trial, metric in enumerate(metrics):
        tell(trial, 0, metric)
        while True:
            found, wanted = asha.promote(), expected()
            assert (found and found[0]) == wanted
            if wanted is None:
                break
            tell(wanted.trial, wanted.rung, metrics[wanted.trial])


def test_hyperband_spreads_its_trials_over_brackets() -> None:
    hyperband = Hyperband((1 / 9, 1 / 3, 1.0), 3)
    search = make_search("random", SPACE)
    firsts = [hyperband.suggest(n, search).rung for n in range(60)]  # type: ignore[union-attr]
    weights = [9 / 3, 3 / 2, 1]
    for rung, weight in enumerate(weights):
        assert abs(firsts.count(rung) - 60 * weight / sum(weights)) <= 1


def test_pbt_goes_on_from_the_generation_before() -> None:
    scheduler = make_scheduler("pbt", SPACE, 24)
    sweep = Sweep(make_search("random", SPACE), scheduler, trials=24, workers=3, duration=lambda t, e, share: share)
    started = simulate(sweep)
    at = {e.trial: e.rung for e in started if (e.trial, e.rung) != (0, sweep.top)}
    for trial in sweep.trials.values():
        if at[trial.number]:
            assert trial.parent is not None and at[trial.parent] == at[trial.number] - 1
            lineage, share = trial, 0.0
            while True:
                share += sweep.share(lineage, Evaluation(lineage.number, at[lineage.number]))
                if lineage.parent is None:
                    break
                lineage = sweep.trials[lineage.parent]
            assert share == pytest.approx(scheduler.rungs[at[trial.number]])
    moved = [t for t in sweep.trials.values() if t.parent is not None and t.settings != sweep.trials[t.parent].settings]
    assert len(moved) == 2 * (8 // 4)  # a quarter of each generation after the first


def test_virtual_time_is_that_of_a_naive_schedule() -> None:
    """Whoever is free first takes the next: with three workers the k-th end is the least of the three queues."""
    sweep = Sweep(
        make_search("random", SPACE), make_scheduler("none", SPACE, 20), trials=20, workers=3,
        duration=lambda t, e, share: 1.0 + t.number % 4,
    )  # fmt: skip
    simulate(sweep)
    free = [0.0, 0.0, 0.0]
    for number in range(20):
        free.sort()
        free[0] += 1.0 + number % 4
    assert sweep.clock == max(free)


def test_a_race_drops_who_is_beaten_on_the_same_seeds() -> None:
    race = Race(0, seeds=4)
    left_out = dict(race.begin({0: 2.0, 1: 1.0, 2: 1.01, 3: 1.5, 4: 1.6, 5: 1.7, 6: 1.8}))
    assert set(left_out) == {5, 6}  # four finalists, the default beside them
    assert {e.trial for e in race.next_round()} == {0, 1, 2, 3, 4}
    for trial, metric in {0: 2.1, 1: 1.1, 2: 1.09, 3: math.inf, 4: 1.3}.items():
        race.told(Evaluation(trial, 0, 1), metric)
    gone = {trial: decision for trial, decision, _ in race.judge()}
    assert gone == {0: "beaten", 3: "stop"}  # 0 is +1.0 twice; 2 is +0.01 and -0.01; 4 is +0.6, +0.2
    assert [e.trial for e in race.next_round()] == [1, 2, 4] and race.seed == 2


def test_a_paired_interval_is_students() -> None:
    from scipy import stats

    values = [0.1, 0.3, -0.05, 0.2]
    mean, low, high = paired_interval(values)
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 3, loc=mean, scale=stats.sem(values)))
    assert paired_interval([0.5]) == (0.5, -math.inf, math.inf)


def test_rank_correlation_is_scipys_and_rungs_that_do_not_correlate_are_told(tmp_path: Path) -> None:
    from scipy import stats

    draw = random.Random(0)
    pairs = [(draw.random(), draw.random()) for _ in range(12)]
    assert spearman(pairs)[0] == pytest.approx(stats.spearmanr(*zip(*pairs, strict=True)).statistic)
    log = EventLog(tmp_path)
    log.append("begun", schema=1, request={"rungs": [0.5, 1.0]})
    for trial, metrics in enumerate(pairs):
        for rung, metric in enumerate(metrics):
            log.append("ended", evaluation=f"{trial:04d}-r{rung}-s0", clock=1.0, status="done", metric=metric,
                       reason="", cost={}, attempts=1)  # fmt: skip
    log.close()
    assert "does not tell who is better" in rank_correlations(read_history(tmp_path))[0]


def test_the_request_survives_its_log() -> None:
    data = json.loads(json.dumps(REQUEST.to_json()))
    assert SweepRequest.from_json(data) == REQUEST
    with pytest.raises(ArtifactError, match="damaged"):
        SweepRequest.from_json({**data, "space": 3})


@pytest.mark.parametrize("scheduler,trials", [("asha", 8), ("hyperband", 8), ("pbt", 11), ("pbt", 13)])
def test_too_few_trials_for_a_scheduler_are_refused(scheduler: str, trials: int) -> None:
    with pytest.raises(ConfigError, match=f"--trials {trials}"):
        make_scheduler(scheduler, SPACE, trials)


def test_telling_what_nobody_waits_for_is_refused() -> None:
    sweep = REQUEST.sweep()
    assert isinstance(sweep.next(), Start)
    with pytest.raises(ValueError, match="does not wait"):
        sweep.tell(Evaluation(7), Outcome("done", 1.0))


def test_two_thousand_trials_need_little_memory() -> None:
    tracemalloc.start()
    sweep = Sweep(
        make_search("random", SPACE), make_scheduler("asha", SPACE, 2000), trials=2000, workers=8,
        duration=lambda t, e, share: share, emit=silent,
    )  # fmt: skip
    simulate(sweep)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(sweep.trials) == 2000 and peak < 20e6  # bytes


def test_a_full_disk_leaves_a_whole_log(tmp_path: Path) -> None:
    """The log may not grow beyond a limit: what was written before is whole, and the sweep goes on from it."""
    import resource
    import signal

    run = SweepRun(tmp_path / "out", REQUEST)
    size = (tmp_path / "out" / LOG).stat().st_size
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 3000, before[1]))
    try:
        with pytest.raises(OSError):
            compute(run, random.Random(0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    run.close()
    assert (tmp_path / "out" / LOG).read_bytes().endswith(b"\n")
    assert os.path.getsize(tmp_path / "out" / LOG) <= size + 3000
    compute(SweepRun.resume(tmp_path / "out"), random.Random(0))
    assert read_history(tmp_path / "out").finished
