"""The kernels of a run: names and roots follow from their number, and a run of any number does all that eight do."""

import numpy as np
import pytest

from constellation import roster
from constellation.config import Config, override
from constellation.errors import ConfigError
from constellation.geometry import e8
from constellation.roster import ROLES


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
