"""What evaluations share is trained once, charged once, and gives the bits that each would have got alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import constellation
from constellation.config import Config, override
from constellation.pipeline.evaluation import evaluate_run
from tune.evaluate import evaluate, finished
from tune.history import Evaluation, Outcome, read_history
from tune.request import SweepRequest
from tune.run import SweepRun, alone
from tune.sharing import AFTER_BRANCH, OF_KERNELS, own_run, prepared, same_ocean, same_router
from tune.space import read_space
from tune.work import Work

KERNELS = """\
evaluates = "constellation"
metric = "routed_bits_per_byte"

[settings."train.kernel_lr_scale"]
prior = "choice"
values = [1.0, 0.25]

[settings."router.hysteresis"]
prior = "choice"
values = [0.1, 0.5]
"""
AFTER = {
    "constellation.kernels": 3, "router.dims": 8, "router.every": 32, "decode.slots": 4, "cluster.cpus_per_kernel": 0.5,
    "train.kernel_batch": 4, "train.kernel_warmup": 0.5, "train.kernel_lr_scale": 0.5, "train.decay": 0.1,
    "train.inherit_optimizer": 0, "train.threads": 2, "heart.optim.lr": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def two(micro: Config) -> Config:
    """OCEAN and two kernels, 16 steps each."""
    return override(replace(micro, roles={}), {
        "constellation.kernels": 2, "train.batch": 8, "train.kernel_batch": 8, "train.checkpoint_every": 8,
        "train.tokens": 3 * 16 * 512, "train.ocean_share": 1 / 3,
    })  # fmt: skip


def works(out: Path, request: SweepRequest) -> dict[str, Work]:
    """The works of all trials of `request`, side by side, none of them done."""
    run = SweepRun(out, replace(request, workers=request.trials))
    found = [run.advance() for _ in range(request.trials)]
    run.close()
    return {work.evaluation: work for work in found if isinstance(work, Work)}


def grid_of(space: Path | str, base: Config, corpus: Path, trials: int) -> SweepRequest:
    found = read_space(str(space), base)
    return SweepRequest(
        found, base, str(corpus), float(base.train.tokens), trials=trials, search="grid", metric=found.metric
    )


def test_what_comes_after_the_branch_point_does_not_reach_ocean(
    two: Config, micro_corpus: Path, tmp_path: Path
) -> None:
    from constellation.train.checkpoint import load_model
    from constellation.train.job import Job
    from constellation.train.loop import fit

    assert {name for name in AFTER if name.startswith("train.")} == OF_KERNELS
    assert {name.partition(".")[0] for name in AFTER} - {"train", "heart"} == set(AFTER_BRANCH) - {"preset", "roles"}
    other = override(two, AFTER)
    assert same_ocean(two, other) and not same_router(two, other)
    plan, weights = prepared(micro_corpus, two, tmp_path / "shared"), []
    for number, config in enumerate((two, other)):
        folder = tmp_path / str(number)
        for _ in fit(Job("ocean", folder, config, 4, plan.train, plan.dev)):
            pass
        weights.append(load_model(folder).state_dict())
    assert all(np.array_equal(a.numpy(), weights[1][name].numpy()) for name, a in weights[0].items())


@pytest.mark.parametrize(
    "change", [{"train.tokens": 4096}, {"optim.lr": 0.1}, {"train.seed": 1}, {"kernel.vocab_size": 300}]
)
def test_what_ocean_reads_is_not_shared(two: Config, change: dict[str, object]) -> None:
    assert not same_ocean(two, override(two, change))


def test_the_first_of_each_seed_and_rung_is_charged(two: Config, micro_corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "kernels.toml").write_text(KERNELS)
    found = works(tmp_path / "out", grid_of(tmp_path / "kernels.toml", two, micro_corpus, 4))
    assert [work.first for work in found.values()] == [True, False, False, False]
    optim = works(tmp_path / "optim", grid_of(_of_everything(tmp_path), two, micro_corpus, 3))
    assert [work.first for work in optim.values()] == [True, False, False]


def _of_everything(folder: Path) -> Path:
    file = folder / "everything.toml"
    file.write_text(KERNELS + '[settings."optim.lr"]\nprior = "choice"\nvalues = [0.004, 0.001]\n')
    return file


@pytest.mark.ray
@pytest.mark.slow
def test_a_shared_ocean_gives_the_bits_of_one_alone(
    ray_session: None, two: Config, micro_corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "kernels.toml").write_text(KERNELS)
    request = grid_of(tmp_path / "kernels.toml", two, micro_corpus, 4)
    found = works(tmp_path / "out", request)
    *_, last = found.values()
    other = _done(last)  # not the first: it trains what all share, and pays for its kernels alone
    first = _done(next(iter(found.values())))
    shared, _ = own_run(last)
    newest = "ocean/checkpoints/step-00000016/model.safetensors"
    assert all((work.folder / "run" / newest).samefile(shared / newest) for work in (last, *list(found.values())[:1]))
    assert first.cost.tokens == 3 * other.cost.tokens / 2 == request.budget
    for work, outcome in ((last, other), (next(iter(found.values())), first)):
        run = tmp_path / work.evaluation
        for _ in constellation.train(micro_corpus, run, work.config, local=True):
            pass
        assert outcome.metric == evaluate_run(run, None)["answers"]["routed"]["bits_per_byte"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_router_is_judged_over_kernels_that_are_trained_once(
    ray_session: None, two: Config, micro_corpus: Path, tmp_path: Path
) -> None:
    """The preset's router has the metric of the shared run as it is; others cost no tokens."""
    space = tmp_path / "s.toml"
    space.write_text('evaluates = "router"\nmetric = "routed_bits_per_byte"\n[settings."router.every"]\n'
                     'prior = "choice"\nvalues = [16, 64]\n')  # fmt: skip
    out = tmp_path / "out"
    alone(SweepRun(out, grid_of(space, two, micro_corpus, 2)))
    history = read_history(out)
    default, other = (history.outcomes[Evaluation(trial)] for trial in (0, 1))
    assert default.status == "done", default
    (shared,) = {path.parent for path in (out / "shared").glob("*/ocean")}
    assert default.metric == evaluate_run(shared, None)["answers"]["routed"]["bits_per_byte"]
    assert other.metric is not None and other.metric != default.metric
    assert (default.cost.tokens, other.cost.tokens) == (float(two.train.tokens), 0.0)
    assert other.cost.wall_s < default.cost.wall_s
    assert evaluate_run(out / "trials/0001-r0-s0/run", None)["answers"]["routed"]["bits_per_byte"] == other.metric


def _done(work: Work) -> Outcome:
    evaluate(work)
    outcome = finished(work.folder)
    assert outcome is not None and outcome.status == "done", outcome
    return outcome
