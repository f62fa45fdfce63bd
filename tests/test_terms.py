"""The terms that a configuration weighs: the basin head's, beta's; what cannot be a term is refused at the start."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from constellation.config import Config, override
from constellation.coordizer.tokenizer import Tokenizer
from constellation.data.cache import build_cache
from constellation.data.document import Document
from constellation.errors import ConfigError
from constellation.kernel.model import BASIN_BINS, KernelLM
from constellation.presets import tiny
from constellation.storage.atomic import read_json
from constellation.train import checkpoint
from constellation.train.basin import WINDOW, NextBasin, byte_bins, divergence, next_basins, scores
from constellation.train.job import Job
from constellation.train.loop import fit
from constellation.train.objective import Forward, Objective
from constellation.train.parts import Parts
from constellation.train.recording import Records
from constellation.train.state import TrainState
from constellation.train.terms import beta_match, objective_of

TEXTS = ["the quick brown fox jumps over the lazy dog. " * 20, "0123456789 + 42 = 17; " * 40, "ÄÖÜ — naïve café\n" * 30]
BASIN = {"kernel.basin_head": True, "train.lambda_basin": 2.0}
G = torch.Generator().manual_seed(0)


def config(**changes: object) -> Config:
    small = {
        "kernel.vocab_size": 288, "kernel.width": 16, "kernel.hidden": 24, "kernel.layers": 1, "kernel.context": 48,
        "train.precision": "fp32", "train.batch": 4, "train.sample_bytes": 0, "train.checkpoint_every": 4,
        "optim.ns_precision": "fp32",
    }  # fmt: skip
    return override(tiny(), {**small, **changes})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    tokenizer = Tokenizer.train(TEXTS, 288)
    tokenizer.save(folder / "tokenizer.json")
    documents = [Document(text) for text in TEXTS]
    (folder / "cache").symlink_to(build_cache(documents, tokenizer, folder / "caches").path)
    return folder


def job(corpus: Path, folder: Path, settings: Config, steps: int = 4) -> Job:
    return Job("ocean", folder, settings, steps, corpus / "cache", corpus / "cache", corpus / "tokenizer.json")


def test_a_basin_is_the_distribution_of_the_next_bytes(corpus: Path) -> None:
    """Against a loop over windows and bytes."""
    tokenizer, bins = Tokenizer.load(corpus / "tokenizer.json"), byte_bins(corpus / "tokenizer.json")
    targets = torch.randint(16, 288, (2, 50), generator=G)
    targets[1, -3:] = tokenizer.eos
    found, real = next_basins(targets, bins)
    for row in range(2):
        for t in range(50):
            text = b"".join(tokenizer.token_bytes[i] for i in targets[row, t : t + WINDOW].tolist())
            counts = torch.zeros(BASIN_BINS)
            for byte in text:
                counts[byte // 4] += 1
            assert bool(real[row, t]) == bool(text)
            torch.testing.assert_close(found[row, t], counts / max(1, len(text)))
    assert not real[1, -3:].any() and real[0].all()


def test_the_divergence_is_zero_for_the_truth_alone_and_its_gradient_is_b_less_p() -> None:
    p = torch.rand(5, BASIN_BINS, dtype=torch.float64, generator=G)
    p[:, ::3] = 0
    p /= p.sum(-1, keepdim=True)
    logits = torch.randn(5, BASIN_BINS, dtype=torch.float64, generator=G, requires_grad=True)
    loss = divergence(p, torch.log_softmax(logits, -1))
    assert float(loss.detach()) > 0 and float(divergence(p, p.clamp(min=1e-300).log())) == pytest.approx(0, abs=1e-12)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, (torch.softmax(logits, -1) - p).detach() / 5)
    assert float(divergence(p[:0], p[:0])) == 0


def test_what_knows_nothing_is_right_half_of_the_time_and_the_truth_always() -> None:
    p = torch.rand(400, BASIN_BINS, generator=G).pow(4)
    p /= p.sum(-1, keepdim=True)
    mean = p.mean(0).log().expand_as(p)
    assert scores(p, mean)["basin_accuracy"] == pytest.approx(0.5)  # i and its partner are compared both ways
    assert scores(p, mean)["basin_nats"] == pytest.approx(scores(p, mean)["basin_mean_nats"])
    assert scores(p, p.log())["basin_accuracy"] == 1
    alike = torch.full((10, BASIN_BINS), 1 / BASIN_BINS)
    assert scores(alike, alike.log())["basin_accuracy"] == 0.5


def test_a_basin_head_learns_and_tells_how_well(corpus: Path, tmp_path: Path) -> None:
    settings = config(**BASIN, **{"train.eval_every": 20, "optim.lr": 2e-2})
    steps = list(fit(job(corpus, tmp_path, settings, 80)))
    told = [s.measured for s in steps if s.measured and "basin_accuracy" in s.measured]
    assert len(told) == 4 and all(s.measured and "basin" in s.measured for s in steps)
    assert told[-1]["basin_nats"] < told[0]["basin_nats"] and told[-1]["basin_nats"] < told[-1]["basin_mean_nats"]
    assert told[-1]["basin_accuracy"] > 0.7
    assert checkpoint.load_model(tmp_path).config.basin_head


def test_lambdas_weigh_the_gradients_of_their_terms(corpus: Path, tmp_path: Path) -> None:
    settings = config(**BASIN, **{"train.lambda_lm": 0.5, "train.lambda_beta": 3.0, "kernel.coupling": "learned",
                                  "kernel.coupling_beta": 0.2})  # fmt: skip
    it = job(corpus, tmp_path, settings)
    objective, model = objective_of(it, None), KernelLM(settings.kernel).double()
    x, y = (torch.randint(288, (4, 48), generator=G) for _ in range(2))
    losses = objective(model, x, y, 100)
    assert list(losses) == ["cross_entropy", "basin", "beta_match"]
    assert float(losses["beta_match"]) == pytest.approx((0.2 - 0.44) ** 2)
    whole = torch.autograd.grad(objective.total(losses), model.beta)[0]
    forward = Forward(model, x, y, model.hidden(x), 100)
    basin = NextBasin(byte_bins(corpus / "tokenizer.json"))
    terms = [(0.5, torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())), (2.0, basin(forward)),
             (3.0, beta_match(forward))]  # fmt: skip
    parts = sum(weight * torch.autograd.grad(term, model.beta, retain_graph=True)[0] for weight, term in terms)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-8)


def test_a_resumed_run_with_terms_has_the_same_bits(corpus: Path, tmp_path: Path) -> None:
    settings = config(**BASIN, **{"train.eval_every": 3})
    whole = list(fit(job(corpus, tmp_path / "whole", settings, 8)))
    for step in fit(job(corpus, tmp_path / "cut", settings, 8)):
        if step.step == 6:
            break
    rest = list(fit(job(corpus, tmp_path / "cut", settings, 8)))
    assert [s.measured for s in rest] == [s.measured for s in whole[4:]]
    ours, theirs = (checkpoint.load_model(tmp_path / name).state_dict() for name in ("cut", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_default_objective_is_cross_entropy_alone(corpus: Path, tmp_path: Path) -> None:
    objective = objective_of(job(corpus, tmp_path, config()), None)
    assert list(objective.terms) == ["cross_entropy"] and objective.weights == {"cross_entropy": 1.0}


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train.lambda_phi", "kernel.phi", "train.phi_weight"])
def test_phi_is_no_setting_of_the_loss_and_the_reason_is_told(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}: phi is measured, never optimised"):
        override(tiny(), {name: 1.0})
    with pytest.raises(ConfigError, match=rf"heart\.{name}: phi is measured"):
        override(tiny(), {f"heart.{name}": 1.0})


@pytest.mark.parametrize("name", ["phi", "lambda_phi", "Phi", "collective-phi"])
def test_phi_is_no_term(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a term: phi is measured, never optimised"):
        Objective({name: beta_match}, {name: 1.0})
    Objective({"amphibian": beta_match}, {"amphibian": 1.0})


@pytest.mark.parametrize("changes", [{"kernel.basin_head": True}, {"train.lambda_basin": 1.0}])
def test_a_basin_head_and_its_weight_come_together(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="a basin head is trained by its term alone"):
        override(tiny(), changes)


def constant(forward: Forward) -> Tensor:
    return forward.hidden_BTD.detach().square().mean()


def flat(forward: Forward) -> Tensor:
    """Depends on the weights and has no gradient anywhere."""
    return (forward.hidden_BTD * 0).sum()


@pytest.mark.parametrize("term", [constant, flat])
def test_an_auxiliary_without_gradient_is_refused_at_the_start_by_name(term, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'mine' has weight 0\.5 and no gradient") as told:
        next(iter(fit(job(corpus, tmp_path, config()), objective=Objective({"mine": term}, {"mine": 0.5}))))
    assert "\n" not in str(told.value) and not list(tmp_path.glob("checkpoints/*"))
    next(iter(fit(job(corpus, tmp_path / "told", config()), objective=Objective({"mine": term}, {"mine": 0.0}))))


@pytest.mark.parametrize("coupling", ["fixed", "off", "scalable"])
def test_beta_that_is_not_learned_cannot_be_matched(coupling: str, corpus: Path, tmp_path: Path) -> None:
    settings = config(**{"train.lambda_beta": 1.5, "kernel.coupling": coupling})
    with pytest.raises(ConfigError, match=r"'beta_match' has weight 1\.5 and no gradient"):
        next(iter(fit(job(corpus, tmp_path, settings))))


def test_a_beta_that_starts_where_it_shall_be_is_a_term_all_the_same(corpus: Path, tmp_path: Path) -> None:
    """Its gradient is 0 there and nowhere else; and asking changes no bit of the run."""
    settings = config(**{"train.lambda_beta": 1.5, "kernel.coupling": "learned", "kernel.coupling_beta": 0.44})
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = job(corpus, tmp_path, settings)
    state = TrainState(one, None, print, Parts(), Records(one.config.record, one.folder))
    assert torch.equal(torch.get_rng_state(), before) and all(p.grad is None for p in state.model.parameters())
    assert math.isclose(float(state.model.beta.detach()), 0.44, rel_tol=1e-6)


def test_an_objective_that_is_given_and_weights_that_are_set_exclude_each_other(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.lambda_basin and fit\(objective=\.\.\.\) both say"):
        next(iter(fit(job(corpus, tmp_path, config(**BASIN)), objective=Objective())))
    assert not (tmp_path / "meta.json").exists() or read_json(tmp_path / "meta.json")
