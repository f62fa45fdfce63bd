"""The kernels of a run: names and roots follow from their number, and a run of any number does all that eight do."""

from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

import constellation
from constellation import roster
from constellation.cli import run as cli
from constellation.config import Config, override
from constellation.errors import ConfigError
from constellation.geometry import e8
from constellation.pipeline.serving import application
from constellation.pipeline.status import finished, folder_status
from constellation.roster import OCEAN, ROLES
from router.answer.local import LocalKernels


def test_roles_are_the_simple_roots_in_order() -> None:
    assert [roster.root_index(role) for role in ROLES] == list(e8.simple_indices())
    assert roster.names(8) == ROLES


def test_every_kernel_has_a_root_of_its_own_and_more_kernels_keep_those_of_fewer() -> None:
    most = roster.names(240)
    assert {roster.root_index(name) for name in most} == set(range(240))
    assert all(roster.names(count) == most[:count] for count in (2, 8, 24, 239))


def test_roots_and_heights_are_those_of_e8() -> None:
    assert [roster.root(i) for i in range(240)] == [tuple(root) for root in e8.roots().tolist()]
    coefficients = e8.roots() @ np.linalg.inv(e8.simple_roots())
    assert [roster.height(i) for i in range(240)] == coefficients.sum(1).round().astype(int).tolist()


def test_kernels_beyond_the_eight_say_their_root_lowest_first() -> None:
    beyond = roster.names(240)[8:]
    assert all(name == f"root{roster.root_index(name)}" for name in beyond)
    heights = [roster.height(roster.root_index(name)) for name in beyond]
    assert heights[:112] == sorted(heights[:112]) and min(heights[:112]) == 2 and max(heights) == 29
    assert heights[112:] == sorted(heights[112:], reverse=True) and heights[112] == -1


@pytest.mark.parametrize("count", [-1, 0, 1, 241, 10**9])
def test_a_number_of_kernels_that_cannot_be_is_refused(count: int) -> None:
    with pytest.raises(ConfigError, match=f"constellation.kernels={count}"):
        override(Config(), {"constellation.kernels": count})


@pytest.mark.parametrize(
    "alias, role",
    [("Mnemosyne", "memory"), ("Apollo", "prediction"), ("Lightning", "perception"), ("Chronos", "integration")],
)
def test_names_of_the_original_design_are_understood(alias: str, role: str) -> None:
    assert roster.root_index(alias) == roster.root_index(role) == roster.root_index(role.upper())


@pytest.mark.parametrize("name", ["zeus", "root240", "root02", "root0", "ocean"])
def test_an_unknown_kernel_is_refused_with_the_known_ones(name: str) -> None:
    assert not roster.is_kernel(name)
    with pytest.raises(ConfigError, match=rf"'{name}'.*heart.*mnemosyne"):
        roster.root_index(name)


def test_a_kernel_of_its_own_settings_may_be_any_of_the_roster() -> None:
    config = override(Config(), {"constellation.kernels": 24, "root4.optim.lr": "1e-3"})
    assert config.for_role("root4").optim.lr == 1e-3 and config.for_role("heart").optim.lr == config.optim.lr
    assert config.kernels == roster.names(24) and config.models == ("ocean", *roster.names(24))
    with pytest.raises(ConfigError, match="root4"):
        override(Config(), {"root4.optim.lr": "1e-3"})


@pytest.mark.parametrize("kernels", [2, 24])
def test_as_many_kernels_train_resume_route_answer_serve_and_export(
    kernels: int, micro: Config, micro_corpus: Path, tmp_path: Path
) -> None:
    """The whole of a constellation in this process, stopped once on the way."""
    names, run = roster.names(kernels), tmp_path / "run"
    config = override(Config(), {
        **{f"kernel.{name}": value for name, value in vars(micro.kernel).items()},
        "constellation.kernels": kernels, "kernel.metric": "dot", "kernel.coupling": "off", "kernel.look_back": 0,
        "train.tokens": 80_000, "train.ocean_share": 0.3, "train.batch": 32, "train.kernel_batch": 16,
        "train.eval_bytes": 2048, "train.sample_bytes": 0, "router.dims": 16, "router.max_prefix": 512,
    })  # fmt: skip
    steps = constellation.train(micro_corpus, run, config, local=True)
    stopped = next(step for step in steps if step.role == names[1])
    steps.close()
    assert stopped.step == 1 and {k.role: k.state for k in folder_status(run).kernels}[names[1]] != "done"
    trained = {step.role for step in constellation.train(None, run, local=True)}
    assert trained == set(names[1:]) and finished(run)

    found = folder_status(run)
    assert [kernel.role for kernel in found.kernels] == [OCEAN, *names]
    assert {k.role: k.root for k in found.kernels[1:]} == {
        name: roster.root_name(roster.root(roster.root_index(name))) for name in names
    }
    with constellation.open(run) as made:
        assert made.kernels == (OCEAN, *names)
        (choice,) = made.route([b"An assignment statement evaluates the expression list and assigns the object."])
        assert choice.kernel in (OCEAN, *names) and len(choice.posterior) == kernels
        for mode in ("route", "mixture", names[-1]):
            assert len(made.generate("The import statement", max_new_tokens=20, mode=mode).token_ids) <= 20
        nats = [made.bits_per_byte(["A complex number"], mode=mode) for mode in ("route", "barycenter", names[-1])]
        assert np.isfinite(nats).all()
    client = TestClient(application(run, LocalKernels.from_run(run)), base_url="http://localhost")
    listed = client.get("/v1/models").json()["data"]
    assert [one["id"].rpartition("/")[2] for one in listed][-kernels:] == list(names)
    asked = {"model": f"constellation/{names[-1]}", "prompt": "x", "max_tokens": 3, "seed": 1}
    assert client.post("/v1/completions", json=asked).status_code == 200
    places = client.get("/page/map.json").json()["kernels"]
    assert [place["root"] for place in places] == [roster.root_index(name) for name in names]
    assert cli(["export", "--run", str(run), "--kernel", names[-1], "--out", str(tmp_path / "hf")]) == 0
    assert (tmp_path / "hf" / "model.safetensors").exists()
