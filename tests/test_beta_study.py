"""The study of beta: what it measures and fits, where the answer is known, and a whole study of a small run."""

import json
import math

import numpy as np
import pytest
import torch

from constellation.cli import run as cli
from constellation.config import Kernel
from constellation.experiments import beta_fit, beta_observables, beta_study
from constellation.experiments.beta_observables import stretched
from constellation.kernel.model import KernelLM

LENGTHS = (128, 256, 512, 1024, 2048)
X = np.log(np.array(LENGTHS) / 128)
CONFIG = Kernel(vocab_size=300, width=16, layers=1, heads=2, hidden=24, context=32)


def noisy(mean, documents=40, noise=0.01, seed=0):
    return mean * (1 + noise * np.random.default_rng(seed).standard_normal((documents, len(mean))))


def test_the_running_law_is_found_under_every_l_ref():
    found = beta_fit.fits(noisy(0.7 * (1 + 0.44 * X)), LENGTHS, 128, (10, 1024))
    low, high = found["running"]["interval"]
    assert low < 0.44 < high and high - low < 0.02 and found["running"]["R_squared"] > 0.999
    assert found["running"]["AIC"] < found["power"]["AIC"] and found["running"]["p_value"] < 1e-4
    assert abs(found["running"]["under_other_L_ref"]["1024"] - 0.44 / (1 + 0.44 * math.log(8))) < 0.01


def test_the_power_law_is_found():
    found = beta_fit.fits(noisy(0.2 * np.exp(0.3 * X)), LENGTHS, 128)
    low, high = found["power"]["interval"]
    assert low < 0.3 < high and found["power"]["AIC"] < found["running"]["AIC"]


def test_an_s_ln_l_looks_like_beta_of_a_small_l_ref_and_is_told_apart():
    """The trap: s ln L has beta 1 / ln L_ref, .434 at L_ref = 10; its own fit has as little error."""
    y = np.broadcast_to(0.43 * np.log(LENGTHS), (5, 5)).copy()
    found = beta_fit.fits(y, LENGTHS, 128, (10,))
    assert abs(found["running"]["under_other_L_ref"]["10"] - 1 / math.log(10)) < 1e-9
    assert abs(found["running"]["value"] - 1 / math.log(128)) < 1e-9 and abs(found["s_ln_L"]["value"] - 0.43) < 1e-12


@pytest.mark.parametrize("y", [np.zeros((3, 5)), np.full((3, 5), 2.0)])
def test_what_does_not_run_has_beta_zero_or_none_and_is_json(y):
    found = beta_fit.fits(y, LENGTHS, 128)
    json.dumps(found, allow_nan=False)
    assert found["running"]["value"] in (None, 0.0) and found["power"]["p_value"] is None


def test_statistics_are_those_of_scipy():
    import scipy.stats

    y = noisy(0.7 * (1 + 0.2 * X), noise=0.2)
    found, oracle = beta_fit.fits(y, LENGTHS, 128)["running"], scipy.stats.linregress(X, y.mean(0))
    assert abs(found["R_squared"] - oracle.rvalue**2) < 1e-12 and found["p_value"] == pytest.approx(oracle.pvalue)
    assert abs(found["value"] - oracle.slope / oracle.intercept) < 1e-12


def test_coupling_is_zero_without_attention_and_the_naive_mean_with_it():
    model = KernelLM(CONFIG, seed=1).eval()
    window = np.random.default_rng(0).integers(300, size=12)
    unigram = np.full(300, 1 / 300)
    j = beta_observables.coupling(model, window, unigram, draws=400, seed=0)
    assert 0 < j < math.pi

    def distances(at, token):
        changed = window.copy()
        changed[at] = token
        with torch.no_grad():
            p, q = (torch.softmax(model(torch.from_numpy(w)[None])[0].double(), -1) for w in (window, changed))
        return 2 * torch.acos((p.sqrt() * q.sqrt()).sum(-1).clamp(max=1))[at + 1 :].sum()

    pairs, total, random = 12 * 11 / 2, 0.0, np.random.default_rng(1)
    tokens = random.integers(300, size=12)
    for at in range(11):
        total += float(np.mean([distances(at, t) for t in tokens if t != window[at]]))
    assert abs(total / pairs / j - 1) < 0.15
    with torch.no_grad():
        for block in model.blocks:
            block.attention.out.weight.zero_()
        model.look_back.zero_()
    assert beta_observables.coupling(model, window, unigram, draws=5, seed=0) < 1e-6


def test_curvature_is_the_naive_quotient():
    model = KernelLM(CONFIG, seed=1)
    window = np.random.default_rng(0).integers(300, size=8)
    tokens = torch.from_numpy(window)
    params = {name: p.detach() for name, p in model.named_parameters()}

    def logits(values):
        return torch.func.functional_call(model, values, (tokens[None, :-1],))[0]

    loss = torch.nn.functional.cross_entropy(model(tokens[None, :-1])[0], tokens[1:])
    gradient = dict(zip(params, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True), strict=True))
    step = 1e-3 / math.sqrt(sum(float(g.square().sum()) for g in gradient.values()))
    ahead, behind = (logits({n: p + s * step * gradient[n] for n, p in params.items()}) for s in (1, -1))
    p, along = torch.softmax(logits(params), -1), (ahead - behind) / (2 * step)
    naive = ((p * along.square()).sum(-1) - (p * along).sum(-1).square()).mean()
    naive = float(naive) / sum(float(g.square().sum()) for g in gradient.values())
    assert abs(beta_observables.curvature(model, window) / naive - 1) < 0.02


def test_longer_tables_change_no_bit_of_what_was_there():
    model, tokens = KernelLM(CONFIG, seed=2).eval(), torch.arange(32)[None]
    longer = stretched(model, 64)
    with torch.no_grad():
        assert torch.equal(longer(tokens), model(tokens)) and longer(torch.arange(64)[None]).isfinite().all()


def arm(interval):
    law = {"value": 0.0, "interval": interval}
    return {"fits": {"coupling": {"running": law}}}


@pytest.mark.parametrize(
    ("own", "control", "passed"),
    [([0.4, 0.5], [0.0, 0.1], True), ([0.3, 0.5], [0.0, 0.1], False), ([0.4, 0.5], [0.4, 0.6], False),
     (None, [0.0, 0.1], False)],
)  # fmt: skip
def test_the_rule_needs_the_interval_and_every_control(own, control, passed):
    arms = {"trained": arm(own), **dict.fromkeys(beta_study.CONTROLS, arm(control))}
    assert beta_study.verdict(arms)["passed"] is passed
    if passed:
        assert not beta_study.verdict({k: v for k, v in arms.items() if k != "plain"})["passed"]


def test_a_whole_study_and_its_mistakes(micro_run, tmp_path, capsys):
    out = tmp_path / "beta.json"
    words = ["measure", "beta", str(micro_run), "--lengths", "16,32,64,128", "--documents", "3", "--interventions", "2"]
    assert cli([*words, "--controls", "untrained,shuffled", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert set(result["arms"]) == {"trained", "untrained", "shuffled"} and len(result["kappa_measured"]) == 4
    assert result["kappa_measured"][0] > 0 and not result["verdict"]["passed"] and "plain" in result["conclusion"]
    assert (tmp_path / "beta_coupling.png").stat().st_size > 5000 and (tmp_path / "beta_kappa.png").exists()
    again = tmp_path / "again.json"
    assert cli([*words, "--controls", "untrained,shuffled", "--out", str(again)]) == 0
    assert json.loads(again.read_text())["arms"] == result["arms"]
    capsys.readouterr()
    for wrong, said in (
        (["--lengths", "16,x,64"], "whole numbers"), (["--lengths", "16,32"], "at least three"),
        (["--lengths", "16,32,90000"], "choose shorter --lengths"), (["--kernel", "who"], "choose one of"),
        (["--controls", "who"], "--controls who"),
    ):  # fmt: skip
        assert cli(["measure", "beta", str(micro_run), *wrong]) == 2
        told = capsys.readouterr().err
        assert said in told and told.count("\n") == 1


@pytest.mark.slow
def test_controls_are_trained_as_ocean_was_and_used_again(micro_run, tmp_path):
    how = {"lengths": (16, 32, 64), "documents": 2, "draws": 1, "controls": ("plain", "beta_zero"), "work": tmp_path}
    first = beta_study.run(micro_run, **how)
    when = (tmp_path / "plain" / "summary.json").stat().st_mtime_ns
    assert beta_study.run(micro_run, **how)["arms"] == first["arms"]
    assert (tmp_path / "plain" / "summary.json").stat().st_mtime_ns == when
