"""Spaces: the ready ones are sound, a bad one is refused with file, line and way out."""

from pathlib import Path

import pytest

from constellation.config import override
from constellation.errors import ConfigError
from constellation.presets import PRESETS, preset, small, tiny
from tune.best import write_best
from tune.cost import flops_per_token
from tune.space import read_space, ready
from tune.work import METRICS

GOOD = """\
evaluates = "model"

[settings."optim.lr"]
prior = "log"
low = 1e-3
high = 1e-2
"""


@pytest.mark.parametrize("base", PRESETS)
@pytest.mark.parametrize("name", ready())
def test_ready_spaces_are_sound(name: str, base: str) -> None:
    space = read_space(name, preset(base))
    assert space.metric in METRICS[space.evaluates] and space.about
    assert space.configure(preset(base), space.default) is not None
    for dimension in space.dimensions:
        assert dimension.reason, dimension.name


@pytest.mark.parametrize("base", ["tiny", "small"])
@pytest.mark.parametrize("name", ready())
def test_every_value_of_a_ready_space_makes_a_configuration(name: str, base: str) -> None:
    space = read_space(name, preset(base))
    for dimension in space.dimensions:
        for value in dimension.grid():
            space.configure(preset(base), {**space.default, dimension.name: value})


def test_gating_has_every_threshold() -> None:
    from dataclasses import fields

    from constellation.optim.registry import AdaptiveConfig

    names = {dimension.name for dimension in read_space("gating", small()).dimensions}
    assert names == {f"optim.gate.{field.name}" for field in fields(AdaptiveConfig)}


def test_yaml_and_tables_in_tables_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(GOOD)
    (tmp_path / "b.yaml").write_text("settings:\n  optim:\n    lr: {prior: log, low: 1e-3, high: 1e-2}\n")
    a, b = (read_space(str(tmp_path / name), small()) for name in ("a.toml", "b.yaml"))
    assert a.dimensions == b.dimensions


def test_a_proportional_setting_follows() -> None:
    space = read_space("kernel", tiny())
    for width in (32, 64, 192):
        config = space.configure(tiny(), {**space.default, "kernel.width": width})
        assert config.kernel.hidden % 8 == 0 and abs(config.kernel.hidden / width - 2.6875) < 4 / width + 1e-9


BAD = {
    "empty": ("", r"s\.toml: empty"),
    "no settings": ('evaluates = "model"\n', r"s\.toml:\d+: nothing to search"),
    "syntax": ("[settings\n", r"s\.toml: .*line 1"),
    "twice": (GOOD + '[settings."optim.lr"]\nprior = "log"\n', r"s\.toml: .*line"),
    "unknown key": ("colour = 1\n" + GOOD, r"s\.toml:1: unknown key 'colour'"),
    "unknown setting": (GOOD.replace("optim.lr", "optim.rl"), r"s\.toml:3: unknown setting 'optim.rl'; near it"),
    "another optimizer's": (GOOD.replace("optim.lr", "optim.gate.max_overhead"), r"s\.toml:3: .*optim.name too"),
    "unknown prior": (GOOD.replace('"log"', '"normal"'), r"s\.toml:3: .*prior = 'normal'"),
    "no low": (GOOD.replace("low = 1e-3\n", ""), r"s\.toml:3: optim.lr: low is missing"),
    "upside down": (GOOD.replace("1e-3", "1e-1"), r"s\.toml:3: .*must be below"),
    "zero under log": (GOOD.replace("1e-3", "0.0"), r"s\.toml:3: .*low=0.0 must be"),
    "infinite": (GOOD.replace("1e-2", "inf"), r"s\.toml:3: .*high=inf must be"),
    "text": (GOOD.replace("1e-3", '"much"'), r"s\.toml:3: .*low='much' must be"),
    "truth": (GOOD.replace("1e-3", "true"), r"s\.toml:3: .*low=True must be"),
    "outside": (
        '[settings."train.warmup"]\nprior = "uniform"\nlow = 0.0\nhigh = 1.5\n',
        r"s\.toml:1: train.warmup: high=1.5 must be a finite number",
    ),
    "int for a float": (GOOD.replace('"log"', '"int"'), r"s\.toml:3: .*use uniform, log or choice"),
    "float for an int": (
        '[settings."kernel.layers"]\nprior = "uniform"\nlow = 1\nhigh = 3\n', r"s\.toml:1: .*use int or choice",
    ),
    "range of words": (
        '[settings."kernel.metric"]\nprior = "uniform"\nlow = 1\nhigh = 3\n', r"s\.toml:1: .*use choice",
    ),
    "no values": ('[settings."kernel.metric"]\nprior = "choice"\n', r"s\.toml:1: .*values = \[...\] is wanted"),
    "unknown value": (
        '[settings."kernel.metric"]\nprior = "choice"\nvalues = ["dot", "cross"]\n', r"s\.toml:1: .*one of dot, fid",
    ),
    "value twice": (
        '[settings."kernel.layers"]\nprior = "choice"\nvalues = [2, 3, 2]\n', r"s\.toml:1: .*2 stands twice",
    ),
    "values of a range": (GOOD + "values = [1]\n", r"s\.toml:3: .*'values' does not belong"),
    "not a table": ("[settings]\n\"optim.lr\" = 3\n", r"s\.toml:2: .*a table is wanted"),
    "fixed too": ('[fixed]\n"optim.lr" = 1e-3\n' + GOOD.replace("evaluates", "#"), r"s\.toml:2: .*keep one"),
    "bad fixed": ('[fixed]\n"optim.name" = "sgd"\n' + GOOD.replace("evaluates", "#"), r"s\.toml:2: .*optim.name='sgd'"),
    "evaluates": (GOOD.replace('"model"', '"universe"'), r"s\.toml:1: .*choose one of model"),
    "follows nothing": (
        GOOD + '[proportional."kernel.hidden"]\nof = "kernel.width"\ntimes = 3\n', r"s\.toml:7: .*not among",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_space_is_refused_with_its_line(case: str, tmp_path: Path) -> None:
    text, told = BAD[case]
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(ConfigError, match=told) as found:
        read_space(str(tmp_path / "s.toml"), small())
    assert "\n" not in str(found.value)


def test_yaml_with_a_key_twice_is_refused(tmp_path: Path) -> None:
    entry = "  optim.lr: {prior: log, low: 0.001, high: 0.01}\n"
    (tmp_path / "s.yaml").write_text("settings:\n" + entry + entry)
    with pytest.raises(ConfigError, match=r"optim.lr stands twice \(at line 3\)"):
        read_space(str(tmp_path / "s.yaml"), small())


def test_a_space_that_is_nowhere_lists_the_ready_ones() -> None:
    with pytest.raises(ConfigError, match="gating, kernel, optim"):
        read_space("nowhere", small())


def test_the_winner_is_a_preset(tmp_path: Path) -> None:
    config = override(tiny(), {
        "optim.name": "adaptive_mixed_qig", "optim.gate.must_pay": True, "optim.lr": 0.0123, "kernel.metric": "dot",
        "heart.optim.lr": 0.5,
    })  # fmt: skip
    assert preset(str(write_best(tmp_path, config, "two\nlines"))) == config


@pytest.mark.parametrize(
    "text,told",
    [("[", "best.toml"), ('preset = "giant"\n', "one of tiny"), ('preset = "tiny"\n[settings]\n"a.b" = 1\n', "a.b")],
)
def test_a_bad_preset_file_is_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "best.toml").write_text(text)
    with pytest.raises(ConfigError, match=told):
        preset(str(tmp_path / "best.toml"))


def test_a_loop_costs_what_it_computes() -> None:
    looped = override(preset("small"), {"kernel.layers": 3, "kernel.prelude": 1, "kernel.coda": 1, "kernel.loops": 3})
    untied = override(preset("small"), {"kernel.layers": 5})
    assert flops_per_token(looped.kernel) == flops_per_token(untied.kernel)
    shared = override(preset("small"), {"kernel.kv_heads": 1})
    assert flops_per_token(shared.kernel) < flops_per_token(preset("small").kernel)
