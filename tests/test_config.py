"""One way to override; everything impossible is one line that names the value and the way out."""

import operator
from typing import Any

import pytest

from constellation.config import Config, difference, from_json, names, override, parse_assignments
from constellation.errors import ConfigError
from constellation.kernel.model import KernelLM, parameter_count
from constellation.optim.registry import OPTIMIZERS, PHASES, AdaptiveConfig, KroneckerSettings
from constellation.presets import PRESETS, preset, small
from constellation.roster import ROLES
from constellation.settings import leaves


def test_json_round_trip_is_the_same_config() -> None:
    config = override(preset("tiny"), {"heart.optim.lr": "1e-3", "train.seed": 7})
    assert from_json(config.to_json()) == config


@pytest.mark.parametrize("name", names())
def test_every_name_can_be_overridden_with_its_own_value(name: str) -> None:
    value = operator.attrgetter(name)(small())
    assert override(small(), {name: str(value)}) == small()


OF_OTHERS = {  # what the first release wrote beside the settings of its default optimizer
    "power": 0.5, "basin": "*basin*,*embed*", "use_exact_ng": False, "lr_ng": 0.01, "rest_optimizer": "adamw",
    "cg_iters": 8, "cg_damping": 0.001, "curvature": "ema_grad2", "exponent": 0.5, "probes": 8, "refresh": 20,
    "phase": "middle", "gate": vars(AdaptiveConfig()),
}  # fmt: skip


def test_a_file_of_the_first_release_opens_without_the_settings_of_other_optimizers() -> None:
    config = override(preset("tiny"), {"optim.momentum": 0.7, "memory.optim.name": "adamw"})
    old = config.to_json()
    old["optim"] |= OF_OTHERS
    old["roles"]["memory"] |= {"optim.power": 0.7, "optim.gate.must_pay": True}
    assert from_json(old) == config and not OF_OTHERS.keys() & config.to_json()["optim"].keys()
    gated = {**old, "optim": {**old["optim"], "name": "adaptive_mixed_qig", "lr_ng": 0.5}, "roles": {}}
    assert from_json(gated) == override(preset("tiny"), {
        "optim.name": "adaptive_mixed_qig", "optim.momentum": 0.7, "optim.lr_ng": 0.5,
    })  # fmt: skip
    with pytest.raises(ConfigError, match=r"unknown field 'optim\.curvture'"):
        from_json({"optim": {"curvture": "ema_grad2"}})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_another_optimizer_keeps_what_both_have_and_takes_its_own_defaults_else(name: str) -> None:
    mine = override(small(), {"optim.lr": 0.5, "optim.damping": 0.25, "optim.momentum": 0.125})
    kept = {"lr": 0.5, "damping": 0.25, "momentum": 0.125}
    expected = {own: kept.get(own, value) for own, value in vars(OPTIMIZERS[name].settings).items()}
    assert vars(override(mine, {"optim.name": name}).optim) == expected


def test_every_setting_says_its_meaning_and_has_a_default_in_its_range() -> None:
    for name, setting, value in leaves(Config()):
        assert setting.meaning and setting.admits(value), name


def test_a_record_put_together_by_hand_is_held_to_the_same_ranges() -> None:
    with pytest.raises(ConfigError, match=r"^optim\.momentum=1\.5: must be a finite number from 0 to 1"):
        Config(optim=KroneckerSettings(momentum=1.5))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optm.lr": "1"}, "optim.lr"),
        ({"lr": "1"}, "optim.lr"),
        ({"optim.lr": "fast"}, "a finite number above 0, such as 0.004 (peak learning rate)"),
        ({"optim.lr": "nan"}, "finite"),
        ({"optim.lr": "-1"}, "above 0"),
        ({"kernel.layers": "2.5"}, "whole number"),
        ({"kernel.heads": "3"}, "even"),
        ({"kernel.vocab_size": "100"}, "272"),
        ({"kernel.metric": "cosine"}, "dot, fidelity"),
        ({"train.ocean_share": "1"}, "below 1"),
        ({"train.accumulation": "3"}, "multiple"),
        ({"data.dev_fraction": "0.9"}, "0.5"),
        ({"router.min_prefix": "9999"}, "max_prefix"),
        ({"optim.name": "lion"}, "adaptive_mixed_qig"),
        ({"optim.variant": "sophia"}, "kl_shampoo"),
        ({"optim.phase": "dawn", "optim.name": "adaptive_mixed_qig"}, "early, middle, late, fine_tune"),
        ({"optim.gate.min_kapa": "3"}, "optim.gate.min_kappa_for_ng"),
        ({"optim.gate.must_pay": "perhaps", "optim.name": "adaptive_mixed_qig"}, "true or false"),
        ({"optim.gate.max_overhead": "0.5", "optim.name": "adaptive_mixed_qig"}, "above 1"),
        ({"optim.gate.min_kappa_for_ng": "-1", "optim.name": "adaptive_mixed_qig"}, "at least 0"),
        ({"optim.gate.min_kappa_for_ng": "inf", "optim.name": "adaptive_mixed_qig"}, "finite"),
        ({"optim.probes": "1", "optim.name": "curvature_sgd"}, "standard error"),
        ({"optim.cg_iters": "3"}, "kronecker_ng has no such setting; basin_ng, mixed_qig and adaptive_mixed_qig have"),
        ({"optim.phase": "early"}, "adaptive_mixed_qig has: set optim.name too"),
        ({"memory.optim.power": "1"}, "adaptive_mixed_qig have: set memory.optim.name too"),
        ({"train.tokens": "inf"}, "whole number"),
        ({"train.tokens": True}, "whole number"),
        ({"cluster.gpus_per_kernel": float("nan")}, "finite"),
        ({"heart.kernel.width": "64"}, "optim.* and train.* only"),
        ({"heart.optm.lr": "1"}, "heart.optim.lr"),
        ({"hart.optim.lr": "1"}, "unknown setting"),
    ],
)
def test_impossible_requests_name_the_value_and_the_way_out(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        override(small(), changes)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert next(iter(changes)) in str(error.value) or str(next(iter(changes.values()))) in str(error.value)


def test_overrides_are_validated_together_not_one_by_one() -> None:
    config = override(small(), {"kernel.width": 96, "kernel.heads": 6})
    assert (config.kernel.width, config.kernel.heads) == (96, 6)


def test_a_role_changes_itself_alone() -> None:
    config = override(small(), {"heart.optim.lr": 0.5, "optim.lr": 0.25})
    assert config.for_role("heart").optim.lr == 0.5
    assert {config.for_role(r).optim.lr for r in ROLES if r != "heart"} == {0.25}


def test_difference_lists_what_changed() -> None:
    assert difference(small(), override(small(), {"optim.lr": 1.0})) == {"optim.lr": (small().optim.lr, 1.0)}


@pytest.mark.parametrize("word", ["optim.lr", "=3", "optim.lr"])
def test_assignments_need_key_and_value(word: str) -> None:
    with pytest.raises(ConfigError, match="key=value"):
        parse_assignments([word])


@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_sets_its_row_and_what_is_named_beside_it_wins(phase: str) -> None:
    adaptive = override(small(), {"optim.name": "adaptive_mixed_qig"})
    gate = override(adaptive, {"optim.phase": phase}).optim.gate
    assert tuple(vars(gate).values())[:8] == PHASES[phase]
    both = override(adaptive, {"optim.gate.min_kappa_for_ng": "33", "optim.phase": phase}).optim.gate
    assert both == AdaptiveConfig(**{**vars(gate), "min_kappa_for_ng": 33.0})
    heart = override(adaptive, {"heart.optim.phase": phase, "heart.optim.gate.must_pay": "true"})
    assert heart.for_role("heart").optim.gate == AdaptiveConfig(**{**vars(gate), "must_pay": True})
    assert heart.for_role("meta").optim.gate == AdaptiveConfig()


def test_a_key_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="twice"):
        parse_assignments(["optim.lr=1", "optim.lr=2"])


SIZES = {"tiny": 41_668, "small": 725_004, "23m": 22_911_808, "100m": 100_683_408}


@pytest.mark.parametrize("name", PRESETS)
def test_the_size_table_of_the_presets(name: str) -> None:
    config = preset(name).kernel
    assert parameter_count(config) == SIZES[name]
    if SIZES[name] < 50e6:
        import torch

        with torch.device("meta"):
            assert KernelLM(config, seed=None).num_parameters() == SIZES[name]


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="tiny, small, 23m, 100m"):
        preset("huge")
