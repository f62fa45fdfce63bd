"""The optimizer benchmark: its arithmetic against hand oracles, its tasks' laws, and a small run that is killed."""

import dataclasses
import gzip
import json
import os
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from constellation.commands import bench
from constellation.errors import ConfigError, DataError
from constellation.experiments import bench_optim, optim_problems, optim_report, optim_steps
from constellation.experiments.bench_optim import FULL, QUICK, points, rows_of, tuning
from constellation.experiments.optim_analysis import Reached, ratio, reach, z_below
from constellation.experiments.optim_goals import claims, goals
from constellation.experiments.optim_peers import ROWS, inertia, memory
from constellation.experiments.optim_tasks import TASKS, prepare
from constellation.experiments.optim_trial import Trial, perform, train
from constellation.geometry.fisher import FisherBlock, flatten
from tests.waiting import wait_for

POSITIVE = st.lists(st.floats(0.01, 100), min_size=2, max_size=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory, micro_corpus):
    folder = tmp_path_factory.mktemp("optim") / "data"
    prepare(micro_corpus, None, folder)
    return folder


# ---------------------------------------------------------------- arithmetic


def test_reach_interpolates_linearly_in_the_metric_and_in_the_logarithm_of_steps_and_seconds():
    ends = [(100, 1.0, 3.0), (200, 4.0, 1.0)]
    assert reach(ends, 2.0) == Reached(pytest.approx(100 * 2**0.5), pytest.approx(2.0))
    assert reach(ends, 1.0) == Reached(pytest.approx(200), pytest.approx(4.0))
    assert reach(ends, 0.9) is None and reach([], 1.0) is None
    assert reach(ends, 3.5) == Reached(100, 1.0, bound=True)  # already below at the shortest
    small = [(100, 1.0, 1e-2), (200, 4.0, 1e-4)]
    assert reach(small, 1e-3, log_metric=True) == Reached(pytest.approx(100 * 2**0.5), pytest.approx(2.0))


def test_reach_takes_the_run_itself_where_the_shorter_one_diverged_and_the_first_of_two_crossings():
    assert reach([(100, 1.0, None), (200, 4.0, 1.0)], 2.0) == Reached(200, 4.0)
    assert reach([(100, 1.0, None), (200, 4.0, None)], 2.0) is None
    wavy = [(1, 1.0, 5.0), (2, 2.0, 1.0), (3, 3.0, 4.0), (4, 4.0, 1.0)]
    assert reach(wavy, 3.0).steps == pytest.approx(2**0.5)


def test_ratio_of_three_seeds_is_the_hand_computed_geometric_mean_and_interval():
    e = np.e
    r = ratio([0.5, 0.5 * e, 0.5 / e])  # logs: mean ln .5, standard deviation 1
    half = np.exp(4.302652729911275 / 3**0.5)  # t of 97.5 % with 2 degrees
    assert (r.mean, r.low, r.high) == pytest.approx((0.5, 0.5 / half, 0.5 * half))
    assert str(ratio([0.5, None])) == "> 1 (1 of 2 reach it)" and str(ratio([0.5])) == "0.50"
    assert str(ratio([0.3, 0.3], bounds=1)).startswith("≤ 0.30")


@given(POSITIVE)
def test_ratio_of_inverted_roles_is_the_inverse_with_its_interval_turned_round(values):
    there, back = ratio(values), ratio([1 / v for v in values])
    assert (back.mean, back.low, back.high) == pytest.approx((1 / there.mean, 1 / there.high, 1 / there.low))


@given(POSITIVE.filter(lambda v: np.std(np.log(v)) > 1e-6), st.floats(0.1, 2))
def test_z_below_is_the_one_sided_t_test_of_the_logarithms(values, goal):
    z, p = z_below(values, goal)
    oracle = scipy.stats.ttest_1samp(np.log(values), np.log(goal), alternative="less")
    assert (z, p) == pytest.approx((-oracle.statistic, oracle.pvalue))


def test_z_below_knows_nothing_without_spread_or_with_a_seed_that_did_not_arrive():
    assert z_below([0.5], 1) is None and z_below([0.5, None, 0.4], 1) is None and z_below([0.5, 0.5], 1) is None


# ---------------------------------------------------------------- protocol


def test_every_row_is_tuned_on_the_same_points_and_gets_its_budget():
    task = TASKS["char"]
    by = {row: list(tuning(task, row, FULL, "")) for row in rows_of(task, FULL)}
    assert len(by.pop("adamw")) == 20
    assert {len(trials) for trials in by.values()} == {15}
    units = {tuple((round(t.lr / ROWS[row].lr, 9), t.knob) for t in trials) for row, trials in by.items()}
    assert len(units) == 1
    low, high = task.span
    assert all(low <= u <= high and 0 <= knob <= 1 for u, knob in next(iter(units)))
    assert {t.study for t in by["muon"]} == {0, 1, 2} and len({t.knob for t in by["muon"]}) == 15
    assert {t.steps for t in by["muon"]} == {110}
    chosen = {row: {"lr": 1e-3, "knob": 0.5} for row in by}
    runs = bench_optim.confirmation(task, chosen, FULL, "")
    assert {t.seed for t in runs} == {1, 2, 3, 4, 5}  # neither the tuning seed nor the one looked at beforehand
    assert {t.seed for t in by["muon"]} == {bench_optim.TUNING_SEED}
    assert points(5, 0) == points(7, 0)[:5] != points(5, 1)


def test_every_named_row_exists_and_the_baseline_comes_first():
    for task in TASKS.values():
        assert task.rows[0] == "adamw" and set(task.rows) <= set(ROWS) and task.rungs[-1] == 1.0
    assert (memory(0), memory(1)) == pytest.approx((0.9, 0.999))
    assert (inertia(0), inertia(1)) == pytest.approx((1 - 1 / 5, 1 - 1 / 30))


def test_an_unknown_task_or_optimizer_is_refused_with_the_choices():
    with pytest.raises(ConfigError, match="--tasks nonsense: choose from char"):
        bench_optim.check(dataclasses.replace(QUICK, tasks=("nonsense",)))
    with pytest.raises(ConfigError, match="--optimizers sgd: choose from adamw"):
        bench_optim.check(dataclasses.replace(QUICK, rows=("sgd",)))


# ---------------------------------------------------------------- tasks


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_a_function_of_its_seed(name, data):
    one, two, other = (TASKS[name].build(data, seed) for seed in (3, 3, 4))

    def loss(problem):
        x, y = problem.batch(5)
        return float(problem.loss(problem.outputs(x), y).detach()) + float(x.double().sum())

    assert loss(one) == loss(two) != loss(other)
    assert one.metric() == two.metric() != other.metric()


@pytest.mark.parametrize("name", TASKS)
def test_the_gradient_of_a_task_is_that_of_its_named_likelihood(name, data):
    """What the exact optimizers are told about the loss is true of it."""
    problem = TASKS[name].build(data, 0)
    params = list(problem.model.parameters())
    x, y = problem.batch(0)
    problem.loss(problem.outputs(x), y).backward()
    block = FisherBlock(
        problem.rows(x), params, likelihood=problem.likelihood, targets=problem.targets(y),
        reduction="sum" if problem.likelihood == "gaussian" else "mean",
    )  # fmt: skip
    wanted = flatten([p.grad for p in params])
    assert (block.gradient() - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("name", ["rosenbrock", "poisson"])
def test_a_known_jacobian_is_the_graphs(name, data):
    problem = TASKS[name].build(data, 1)
    x, _ = problem.batch(0)
    params = list(problem.model.parameters())
    known = problem.jacobian()
    for row in (0, len(known) // 2, len(known) - 1):
        grads = torch.autograd.grad(problem.outputs(x)[row, 0], params)
        assert (flatten(grads) - known[row, 0]).abs().max() <= 1e-12 * known.abs().max()


def test_poissons_laplacian_is_the_trace_of_the_hessian_and_its_solution_has_no_residual():
    model = optim_problems.Poisson(0)
    point = model.points[:1]
    u = lambda z: optim_problems._field(*model.layers, z)[0][0]  # noqa: E731
    hessian = torch.autograd.functional.hessian(u, point)[0, :, 0]
    forward = float(optim_problems._field(*model.layers, point)[1][0].detach())
    assert forward == pytest.approx(float(hessian.trace()), rel=1e-10)
    exact = lambda z: optim_problems.solution(z)[0]  # noqa: E731
    laplace = torch.autograd.functional.hessian(exact, point)[0, :, 0].trace()
    assert float(laplace) == pytest.approx(-2 * np.pi**2 * float(exact(point)), rel=1e-10)
    assert optim_problems.solution(model.points[model.INSIDE :]).abs().max() < 1e-15  # the edge


def test_the_valley_ends_at_ones():
    valley = optim_problems.Valley(0)
    with torch.no_grad():
        valley.x.fill_(1.0)
    assert float(valley(torch.zeros(1)).detach().norm()) == 0


def test_the_logistic_task_is_as_ill_conditioned_as_it_says_and_its_optimum_is_one(data):
    x, y, optimum = optim_problems.logistic_data(0)
    eigenvalues = torch.linalg.eigvalsh(x.T @ x)
    assert eigenvalues[-1] / eigenvalues[0] > 5e5
    w = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([w], max_iter=3000, history_size=50, tolerance_grad=1e-14, line_search_fn="strong_wolfe")

    def closure():
        search.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(x @ w, y.double())
        loss.backward()
        return loss

    search.step(closure)
    assert optimum <= float(closure().detach()) < optimum + 1e-3


def test_idx_images_are_read_and_a_foreign_file_is_refused(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 4), dtype=np.uint8)
    file = tmp_path / "a-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(struct.pack(">IIII", 2051, 12, 2, 2) + pixels.tobytes()))
    first, held = optim_problems.read_digits(tmp_path)
    assert first.shape == (10, 4) and held.shape == (2, 4)
    wanted = sorted(map(tuple, (pixels / 255 > 0.5).astype(np.float32)))
    assert sorted(map(tuple, np.concatenate([first, held]))) == wanted
    file.write_bytes(gzip.compress(b"\0" * 40))
    with pytest.raises(DataError, match="not an IDX file"):
        optim_problems.read_digits(tmp_path)


# ---------------------------------------------------------------- runs


def test_a_trial_is_the_plain_loop_of_its_schedule(data):
    trial = Trial("digits", "adamw", "run", 2, 3e-3, 0.5, 20, curve=True)
    found = train(trial, TASKS["digits"], data)
    problem = TASKS["digits"].build(data, 2)
    optimizer = torch.optim.AdamW(problem.model.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    losses = []
    for step in range(20):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / (0.05 * 20), 1 - step / 20)
        x, y = problem.batch(step)
        loss = problem.loss(problem.outputs(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert found["metric"] == problem.metric() and found["outcome"] == "done" and found["done"] == 20
    assert [value for _, value in found["train"]] == pytest.approx(losses, abs=1e-6)
    assert found["curve"][0][0] == 0 and found["curve"][-1][2] == found["metric"]


def test_divergence_and_refusal_are_outcomes_and_only_a_bug_is_tried_again(data, tmp_path):
    wild = perform(Trial("rosenbrock", "adamw", "tune", 0, 1e200, 0.5, 20), data, tmp_path)
    assert wild["outcome"] == "diverged" and wild["metric"] is None
    refused = perform(Trial("logistic", "hybrid_exact", "tune", 0, 1e-3, 0.5, 4), data, tmp_path)
    assert refused["outcome"] == "failed" and "basin" in refused["reason"]
    trial = Trial("logistic", "adamw", "tune", 0, 1e-2, 0.5, 4)
    done = perform(trial, data, tmp_path)
    file = tmp_path / trial.file
    file.write_text(json.dumps({**done, "metric": 7.0}))
    assert perform(trial, data, tmp_path)["metric"] == 7.0  # what is done is done
    file.write_text(json.dumps({**done, "metric": None, "outcome": "error", "reason": "a bug"}))
    assert perform(trial, data, tmp_path)["metric"] == done["metric"]


def test_a_trial_limited_by_seconds_ends_after_them_whatever_its_steps_take(data):
    found = train(Trial("poisson", "adamw", "run", 0, 1e-3, 0.5, 0, seconds=0.3, curve=True), TASKS["poisson"], data)
    assert found["curve"][-2][1] < 0.3 <= found["cpu_s"] and found["done"] >= 1 and found["outcome"] == "done"


def test_products_of_all_four_kinds_agree_with_matrices_made_otherwise():
    errors = optim_steps.products(seed=3)
    assert set(errors) == {"exact", "sampled", "empirical", "hessian"} and max(errors.values()) < 1e-12


# ---------------------------------------------------------------- the report


def runs_of(row, metrics_by_rung, cpu_per_step, seeds):
    return [
        {
            "row": row, "seed": s, "rung": rung, "steps": round(220 * rung), "done": round(220 * rung), "curve": [],
            "metric": m + 0.01 * s, "cpu_s": 220 * rung * cpu_per_step * (1 + 0.01 * s),
        }
        for s in range(seeds)
        for rung, m in metrics_by_rung.items()
    ]  # fmt: skip


def result_of(*, ours_at, task="char", row="kron_soap", seeds=5):
    """AdamW ends at 2.0; `row` gets there in the part `ours_at` of the steps, each 1.1 times as long; Muon in 0.5."""
    runs = runs_of("adamw", {0.45: 2.6, 1.0: 2.0}, 0.02, seeds)
    runs += runs_of(row, {ours_at: 2.0, 1.0: 1.5}, 0.022, seeds) + runs_of("muon", {0.5: 2.0, 1.0: 1.7}, 0.024, seeds)
    for i, run in enumerate(runs):  # some spread between seeds
        run["metric"] -= 0.003 * (i % 3) if run["row"] != "adamw" and run["rung"] == 1.0 else 0.0
    rows = ("adamw", row, "muon")
    tuned = [{"row": r, "metric": 2.0, "study": 0, "lr": 4e-3, "knob": 0.5} for r in rows]
    part = {"tuning": tuned, "chosen": {t["row"]: t for t in tuned}, "runs": runs}
    costs = {"0.1 M": {"parameters": 1, "rows": {"qig_diagonal": {"ratio": 0.9, "ms": 1.0}, "muon": {"failed": "x"}}}}
    return {
        "profile": {"seeds": seeds, "scale": 1.0, "name": "test"}, "tasks": {task: part}, "cpu_s": 1,
        "steps": {"products": {"exact": 1e-16}, "step_costs": {"cpu": costs}}, "versions": {"torch": "2"},
        "machine": {"processor": "p", "cores": 2, "workers": 2}, "corpus": "embedded", "digits": "load_digits",
    }  # fmt: skip


@settings(deadline=None, max_examples=15)
@given(st.floats(0.31, 0.9))
def test_the_summary_finds_the_ratio_that_was_put_in(part):
    result = result_of(ours_at=part)
    rows = optim_report.analyse(result)["summary"]["char"]["rows"]
    shortest = round(220 * part) / 220  # the crossing is at the shortest run itself
    assert rows["kron_soap"]["steps"]["mean"] == pytest.approx(shortest)
    assert rows["kron_soap"]["cpu"]["mean"] == pytest.approx(1.1 * part, rel=1e-6)
    assert rows["adamw"]["steps"]["mean"] == rows["adamw"]["cpu"]["mean"] == 1
    assert rows["kron_soap"]["step_cost"]["mean"] == pytest.approx(1.1, rel=0.01)


def test_goals_are_passed_missed_or_not_measured():
    def verdicts(result):
        return {g["goal"]: g["verdict"] for g in optim_report.analyse(result)["goals"]}

    good, bad = verdicts(result_of(ours_at=0.4)), verdicts(result_of(ours_at=0.6))
    assert good["char: cpu to tuned AdamW's loss"] == "missed"  # all seeds alike: no p-value, hence no claim
    assert good["char: steps against the best of SOAP, Muon, HeavyBall"] == "passed"
    assert bad["char: steps to tuned AdamW's loss"] == "missed"
    assert bad["char: cpu against the best of SOAP, Muon, HeavyBall"] == "missed"
    assert good["product error, all four kinds"] == "passed"
    assert good["qig_diagonal: step against AdamW(fused), CPU"] == "passed"
    assert good["qig_diagonal: step against AdamW(fused), CUDA"] == "not measured"
    result = result_of(ours_at=0.4)
    for run in result["tasks"]["char"]["runs"]:  # now with spread
        if run["row"] == "kron_soap":
            run["cpu_s"] *= 1 + 0.02 * run["seed"]
            run["done"] += run["seed"]
    spread = {g["goal"]: g["verdict"] for g in optim_report.analyse(result)["goals"]}
    assert spread["char: steps to tuned AdamW's loss"] == spread["char: cpu to tuned AdamW's loss"] == "passed"


def test_a_row_that_does_not_arrive_is_said_to_be_above_one_and_a_lost_one_says_why():
    result = result_of(ours_at=0.5)
    for run in result["tasks"]["char"]["runs"]:
        if run["row"] == "kron_soap" and run["seed"] == 1:
            run["metric"] = 3.0
    result["tasks"]["char"]["chosen"]["muon"] = None
    result["tasks"]["char"]["tuning"][2] |= {"metric": None, "reason": "singular factors"}
    result |= optim_report.analyse(result)
    text = optim_report.markdown(result)
    assert (
        "> 1 (4 of 5 reach it)" in text
        and "singular factors" in text
        and "diverged or failed" in text + (optim_report.readme_table(result))
    )


def test_the_seeds_claims_stand_beside_what_was_measured():
    measured = optim_report.analyse(result_of(ours_at=0.8, task="basin", row="qig_diagonal"))["claims"]
    by = {c["row"]: c for c in measured}
    assert (by["QIGDiagonalNG"]["claimed_convergence"], by["QIGDiagonalNG"]["convergence"]) == (
        "+15% faster",
        "+25% faster",
    )
    assert by["QIGDiagonalNG"]["speed"] == "0.91x" and by["AdaptiveMixedQIG"]["convergence"] == "not measured"
    assert claims({"summary": {}})[0]["speed"] == "not measured" and goals  # nothing run, nothing claimed


def test_readmes_table_is_rewritten_between_its_markers_and_only_there(tmp_path):
    result = result_of(ours_at=0.4)
    result |= optim_report.analyse(result)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- optim -->\nold\n<!-- /optim -->\nafter\n")
    optim_report.rewrite(readme, result)
    once = readme.read_text()
    assert once.startswith("before\n<!-- optim -->\n") and once.endswith("<!-- /optim -->\nafter\n")
    assert "\nold\n" not in once and "| kron_soap | ours |" in once and "+15% faster" in once
    optim_report.rewrite(readme, result)
    assert readme.read_text() == once
    readme.write_text("no markers")
    with pytest.raises(ConfigError, match="<!-- optim -->"):
        optim_report.rewrite(readme, result)


# ---------------------------------------------------------------- end to end


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was_and_its_table_is_made_again_from_the_raw_result(tmp_path, micro_corpus):
    pytest.importorskip("sklearn")
    pytest.importorskip("heavyball")
    pytest.importorskip("matplotlib")
    work, out = tmp_path / "work", tmp_path / "optim.json"
    command = [
        sys.executable, "-m", "constellation", "bench", "optim", "--work", str(work), "--corpus", str(micro_corpus),
        "--tasks", "digits", "--optimizers", "adamw,diagonal", "--scale", "0.1", "--workers", "1",
        "--out", str(out),
    ]  # fmt: skip
    first = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    trials = work / "trials"
    wait_for(lambda: len(list(trials.glob("*.json"))) >= 3 or first.poll() is not None)
    assert first.poll() is None
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    kept = {f.name: f.stat().st_mtime_ns for f in trials.glob("*.json")}
    assert not out.exists()
    second = subprocess.run(command, capture_output=True, text=True, check=True)
    assert all((trials / name).stat().st_mtime_ns == at for name, at in kept.items())
    result = json.loads(out.read_text())
    assert set(result["summary"]) == {"digits"}
    assert {t["row"] for t in result["tasks"]["digits"]["runs"]} == {"adamw", "diagonal"}
    assert len(list(trials.glob("*.json"))) == sum(
        len(part["tuning"]) + len(part["runs"]) for part in result["tasks"].values()
    )
    assert "CPU-minutes expected" in second.stdout and "## Goals" in second.stdout
    assert out.with_suffix(".md").exists() and (tmp_path / "optim_digits.png").read_bytes()[:4] == b"\x89PNG"
    readme = tmp_path / "README.md"
    readme.write_text("<!-- optim -->\n<!-- /optim -->\n")
    again = CliRunner().invoke(bench.command, ["optim", "--table", str(out), "--readme", str(readme)])
    assert again.exit_code == 0, again.output
    assert "| adamw | torch AdamW(fused) |" in readme.read_text()
