"""The atlas, its losses, its training; each defect of the original design is a test here, or in test_control.py."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from constellation.cli import run as cli
from constellation.config import Config, override
from constellation.errors import ArtifactError, ConfigError, DataError, RunError
from constellation.topo.atlas import COLDEST, HOTTEST, Atlas, CovariantRouter, PlainRouter, turned
from constellation.topo.evaluate import evaluate, read
from constellation.topo.images import Images, Split, divided
from constellation.topo.losses import JUMPING, LABELS, LOSSES, VIEWS, Seen, jump, weights_of
from constellation.topo.model import TopoEncoder
from constellation.topo.readers import read_images
from constellation.topo.saved import load
from constellation.topo.scores import accuracy, purity, scores
from constellation.topo.settings import Adaptive as AdaptiveSettings
from constellation.topo.settings import Loss, Model, Topo
from constellation.topo.train import Training, fit
from constellation.topo.views import moved
from constellation.train import checkpoint

G = torch.Generator().manual_seed(0)
SMALL = Model(hidden=24, latent=3, charts=4, codes=5, keys=4, nuisance=2, texture=2, rank=3)
TINY = {
    "topo.model.hidden": 16, "topo.model.latent": 3, "topo.model.charts": 4, "topo.model.codes": 5,
    "topo.train.epochs": 6, "topo.train.checkpoint_every": 2, "topo.train.eval_every": 3, "topo.train.batch": 20,
}  # fmt: skip
CONTROLLED = {
    "topo.control.weights": "setpoints", "topo.control.rate": "governor", "topo.control.balance": 0.01,
    "topo.control.commitment": "balanced", "topo.model.nuisance": 2,
}  # fmt: skip


def config(**changes: object) -> Config:
    return override(Config(), {**TINY, **changes})


def noise(count: int = 120, labels: bool = True, seed: int = 0) -> Images:
    """Four blots at four places, of random size."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 4, count)
    x = 0.1 * rng.random((count, 1, 8, 8))
    for i, label in enumerate(y):
        x[i, 0, 4 * (label // 2) : 4 * (label // 2) + 3, 4 * (label % 2) : 4 * (label % 2) + 3] += rng.uniform(0.4, 0.9)
    return divided("blots", Split(x.astype(np.float32), y if labels else None))


def seen_by(model: TopoEncoder, settings: Loss, x: torch.Tensor, y: torch.Tensor | None) -> Seen:
    encoded = model.encode(x)
    drawn, back = model.decode(encoded.placed.point_BD, model.sent(encoded))
    return Seen(model, settings, x, y, encoded, drawn, back, 0.1, model.routed(moved(x)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model on scikit-learn's digits, 45 epochs, through the command line."""
    run = tmp_path_factory.mktemp("topo") / "run"
    words = ["train.epochs=45", "train.eval_every=15", "train.checkpoint_every=15"]
    assert cli(["topo", "train", "--run", str(run), "--log", "none", *words]) == 0
    return run


# -- defect 1: losses without gradient ---


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_a_gradient_in_some_parameter(name: str) -> None:
    """Routing entropy and code entropies had none in the original: their weights could not act."""
    model = TopoEncoder(SMALL, (1, 8, 8), 3, seed=1)
    settings = Loss(window_nats=math.log(4) - 0.01)
    seen = seen_by(model, settings, torch.rand(40, 1, 8, 8, generator=G), torch.randint(3, (40,), generator=G))
    loss = LOSSES[name](seen)
    assert loss.dim() == 0 and math.isfinite(float(loss.detach())) and float(loss.detach()) >= 0
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert any(g is not None and float(g.abs().max()) > 0 for g in found)


def test_what_cannot_act_is_not_weighed() -> None:
    everything = Loss(**dict.fromkeys(LOSSES, 1.0))
    assert set(weights_of(everything, 2, 2)) == set(LOSSES)
    assert "disentangle" not in weights_of(everything, 0, 2) and "rate" not in weights_of(everything, 0, 0)
    assert not set(LABELS) & set(weights_of(replace(everything, supervised=0.0), 2, 2))
    assert set(VIEWS) <= set(LOSSES)


# -- defect 3: weights in the stability signal ---


def test_the_governor_sees_the_reconstruction_alone(tmp_path: Path) -> None:
    """A lambda that grows was read as a spike in the original."""
    from constellation.topo.adaptive import Adaptive

    settings = config(**CONTROLLED).topo
    found = []
    for lam in (0.0, 1e6):
        adaptive = Adaptive(settings, weights_of(settings.loss, 2, 0), 200)
        for t in range(60):
            adaptive.weights["routing_entropy"] = lam * t
            adaptive.after_step(1.0 + 0.01 * math.sin(t), 0.01, np.ones(4))
            adaptive.after_epoch({"routing_entropy": 1.0 + lam, "diversity": 0.1, "chart_code_entropy": 0.1,
                                  "shortfall": 0.0}, (1.0, 1.0))  # fmt: skip
        assert adaptive.governor is not None
        found.append(adaptive.governor.state())
    assert found[0] == found[1]


# -- defect 5: what goes round the bottleneck ---


def test_without_channels_the_decoder_sees_chart_and_code_alone() -> None:
    """z_geo + z_tex = v exactly in the original: the unquantised point reached the decoder."""
    model = TopoEncoder(replace(SMALL, nuisance=0, texture=0), (1, 8, 8), 0, seed=0)
    x = 20 * torch.randn(300, 1, 8, 8, generator=G)  # far apart, so that several codes are chosen
    seen = model.encode(x)
    drawn, _ = model.decode(seen.placed.point_BD, model.sent(seen))
    number = seen.placed.chart_B * 5 + seen.placed.code_B
    for code in number.unique():
        same = drawn[number == code]
        torch.testing.assert_close(same, same[:1].expand_as(same), atol=1e-5, rtol=0)
    assert len(number.unique()) > 1


def test_what_channels_carry_is_charged_in_bits() -> None:
    """KL(N(m, 1) || N(0, 1)) by torch's own formula; nothing is carried at no bits."""
    model = TopoEncoder(SMALL, (1, 8, 8), 0, seed=0)
    seen = model.encode(torch.rand(30, 1, 8, 8, generator=G))
    m = torch.cat((seen.nuisance_BC, seen.texture_BC), 1)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(m, 1.0), normal(torch.zeros_like(m), 1.0)).sum(1) / math.log(2)
    torch.testing.assert_close(seen.rate_bits_B, expected, atol=1e-5, rtol=1e-4)
    silent = replace(seen, nuisance_BC=0 * seen.nuisance_BC, texture_BC=0 * seen.texture_BC)
    assert float(silent.rate_bits_B.detach().abs().max()) == 0
    first, second = (model.sent(silent, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first is not None and second is not None and torch.equal(first, second)


def test_shuffled_codes_raise_the_error_beyond_the_mean_image_s(trained: Path) -> None:
    held = json.loads((trained / "summary.json").read_text())["held"]
    assert held["mse"] < 0.55 * held["mean_mse"] < held["mean_mse"] < held["shuffled_mse"]


# -- defect 6: the jump ---


def test_jumps_beat_the_best_constant_and_compose(trained: Path) -> None:
    """The original's were constant (rank 0)."""
    held = json.loads((trained / "summary.json").read_text())["held"]
    assert held["jump_r2"] > 0.5 and held["jump_identity"] < 0.1 and held["jump_cocycle"] < 0.1
    model, images, bias = load(trained)
    r = read(model, images.test.x, bias)
    with torch.no_grad():
        model.jumps.into.zero_()
    from constellation.topo.evaluate import jumps

    assert jumps(model, r)["jump_r2"] <= 1e-6, "a constant is no better than the best constant"


def test_jumps_train_themselves_alone() -> None:
    model = TopoEncoder(SMALL, (1, 8, 8), 0, seed=0)
    loss = jump(seen_by(model, Loss(), torch.rand(JUMPING, 1, 8, 8, generator=G), None))
    loss.backward()
    moved_names = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert moved_names == {"jumps"}


# -- defect 7: gradients, temperatures, gates ---


def test_centres_codes_and_router_get_the_reconstruction_s_gradient() -> None:
    model = TopoEncoder(replace(SMALL, nuisance=0, texture=0), (1, 8, 8), 0, seed=0)
    seen = seen_by(model, Loss(), torch.rand(40, 1, 8, 8, generator=G), None)
    LOSSES["reconstruction"](seen).backward()
    for p in (model.atlas.centres, model.atlas.codes, model.router.keys, model.latent.weight):
        assert p.grad is not None and float(p.grad.abs().max()) > 0


@given(st.floats(-8, 8))
def test_a_temperature_stays_inside_its_bounds_and_keeps_a_gradient(raw: float) -> None:
    router = PlainRouter(4, 3, 4, 4).double()
    with torch.no_grad():
        router.log_temperature.fill_(raw)
    t = router.temperature
    (gradient,) = torch.autograd.grad(t, router.log_temperature)
    assert COLDEST < float(t.detach()) < HOTTEST and float(gradient) > 0


def test_routing_is_soft_at_the_start(tmp_path: Path) -> None:
    model = TopoEncoder(Model(), (1, 8, 8), 0, seed=0)
    weight = model.encode(torch.rand(50, 1, 8, 8, generator=G)).weight_BN
    assert float(weight.max(1).values.detach().mean()) < 0.5


def test_features_have_a_gradient_at_zero_and_are_linear_far_out() -> None:
    """The original's gate was dead near 0 and quadratic outside."""
    gate, x = torch.nn.GELU(), torch.tensor([0.0, 1e3, 2e3], requires_grad=True)
    (gradient,) = torch.autograd.grad(gate(x).sum(), x)
    assert gradient.tolist() == pytest.approx([0.5, 1.0, 1.0])


def test_transport_keeps_lengths_goes_back_and_is_covariant() -> None:
    router = CovariantRouter(6, 3, 5, 8).double()
    f, v = (torch.randn(20, n, dtype=torch.float64, generator=G) for n in (6, 3))
    q, angle = router.query(f), router.angles(v)
    there = turned(q, angle)
    torch.testing.assert_close(there.norm(dim=1), q.norm(dim=1))
    torch.testing.assert_close(turned(there, -angle), q)
    torch.testing.assert_close(router.angles(-v), -angle)
    scores_before = router(f, v)
    frame = torch.randn(1, 4, dtype=torch.float64, generator=G)
    with torch.no_grad():  # every key and query in another frame
        router.keys.copy_(turned(router.keys, frame.expand(5, 4)))
    back = turned(turned(q, frame.expand(20, 4)), -angle)
    torch.testing.assert_close((back @ router.keys.T) / router.temperature, scores_before)
    naive = torch.stack([torch.stack([f_q @ turned(key[None], a[None])[0] for key in router.keys])
                         for f_q, a in zip(turned(q, frame.expand(20, 4)), angle)])  # fmt: skip
    torch.testing.assert_close(naive / router.temperature, scores_before)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"route_entropy": 0.9, "usage_entropy": 0.5},
            r"H\(K\|X\) cannot exceed H\(K\); set route_entropy at most 0\.5",
        ),
        ({"route_entropy": 0.9, "usage_entropy": 0.95}, r"I\(X;K\) would be 0\.115 nats.*at most 0\.733"),
    ],
)
def test_setpoints_that_contradict_each_other_are_refused_with_the_bound(changes: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Topo(control=AdaptiveSettings(weights="setpoints", **changes)).check()
    Topo(control=AdaptiveSettings(**changes)).check()  # nobody follows them
    with pytest.raises(ConfigError, match=r"at most log N = 2\.303 nats"):
        override(Config(), {"topo.loss.window_nats": 2.5})


# -- defect 8: labels ---


def test_without_supervision_labels_change_nothing_but_the_probe(tmp_path: Path) -> None:
    images = noise()
    assert images.train.y is not None
    other = replace(images, train=replace(images.train, y=images.train.y[::-1].copy()))
    models = [Training(config(), one, tmp_path / str(i)) for i, one in enumerate((images, other))]
    for one in models:
        torch.manual_seed(0)
        for _ in range(2):
            one.pass_over()
    a, b = (one.model.state_dict() for one in models)
    differing = {name.split(".")[0] for name in a if not torch.equal(a[name], b[name])}
    assert differing == {"probe"}


def test_supervision_moves_charts_towards_classes(tmp_path: Path) -> None:
    found = {}
    for weight in (0.0, 2.0):
        run = Training(
            config(**{"topo.loss.supervised": weight, "topo.train.epochs": 15}), noise(240), tmp_path / str(weight)
        )
        for _ in range(15):
            run.pass_over()
        found[weight] = evaluate(run.model, run.images.test)["chart_accuracy"]
    assert found[2.0] > 0.9 and found[2.0] > found[0.0]


def test_scores_do_not_depend_on_names_and_chance_is_nothing() -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 5, 400)
    assert scores(np.array([3, 1, 4, 0, 2])[label], label) == pytest.approx(dict.fromkeys(scores(label, label), 1.0))
    by_chance = scores(rng.integers(0, 5, 400), label)
    assert abs(by_chance["ami"]) < 0.03 and abs(by_chance["ari"]) < 0.03 and by_chance["purity"] > 0.2
    assert accuracy(np.zeros(4, int), np.array([0, 0, 1, 2])) == 0.5 == purity(np.zeros(4, int), np.array([0, 0, 1, 2]))


# -- atlas ---


def test_points_go_to_the_nearest_code_of_their_chart() -> None:
    """Against a loop."""
    atlas = Atlas(3, 4, 2)
    v, w = torch.randn(30, 2, generator=G), torch.softmax(torch.randn(30, 3, generator=G), 1)
    placed = atlas(v, w)
    for i in range(30):
        chart = int(w[i].argmax())
        distances = (v[i] - atlas.centres[chart] - atlas.codes[chart]).square().sum(1)
        assert int(placed.chart_B[i]) == chart and int(placed.code_B[i]) == int(distances.argmin())
        torch.testing.assert_close(placed.distance_BNJ[i, chart], distances, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(placed.point_BD, placed.nearest_BD, atol=1e-5, rtol=0)
    shifted = atlas(v, w, torch.tensor([0.0, 50.0, 0.0]))
    assert (shifted.chart_B == 1).all(), "a bias acts on the choice"


def test_dead_codes_are_moved_to_points_of_their_chart_and_others_stay() -> None:
    atlas = Atlas(2, 3, 2)
    before = atlas.codes.detach().clone()
    v = torch.randn(20, 2, generator=G)
    used = torch.tensor([[10.0, 10.0, 0.0], [0.0, 5.0, 5.0]])
    chart = torch.zeros(20, dtype=torch.long)
    assert atlas.revive(used, v, chart, 0.1) == 1, "chart 1 has no point to move a code to"
    assert torch.equal(atlas.codes[0, :2], before[0, :2]) and torch.equal(atlas.codes[1], before[1])
    assert any(torch.allclose(atlas.codes[0, 2], point - atlas.centres[0]) for point in v)


def test_a_view_is_the_image_moved_a_little() -> None:
    x = torch.zeros(50, 1, 28, 28)
    x[:, :, 10:18, 10:18] = 1
    torch.manual_seed(0)
    y = moved(x)
    assert y.shape == x.shape and float(y.min()) >= 0 and float(y.max()) <= 1.0001
    assert not torch.equal(x, y) and 0.6 < float(y.sum() / x.sum()) < 1.5


# -- defect 10: training goes on to the same bits ---


def weights(run: Path) -> bytes:
    newest = checkpoint.newest(run)
    assert newest is not None
    return (newest.path / "model.safetensors").read_bytes() + (newest.path / "optim.safetensors").read_bytes()


@pytest.mark.parametrize(
    "changes", [{}, CONTROLLED, {"topo.control.weights": "precision"}], ids=["plain", "pi", "precision"]
)
def test_an_interrupted_run_goes_on_to_the_same_bits_controllers_included(changes: dict, tmp_path: Path) -> None:
    settings, images = config(**changes), noise()
    whole = list(fit(settings, images, tmp_path / "whole"))
    for epoch in fit(settings, images, tmp_path / "cut"):
        if epoch.epoch == 5:
            break
    rest = list(fit(settings, images, tmp_path / "cut"))
    assert [e.epoch for e in rest] == [5, 6] and weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert [(e.losses, e.held) for e in rest] == [(e.losses, e.held) for e in whole[4:]]
    assert not list(fit(settings, images, tmp_path / "cut")), "a finished run is done"
    lines = [json.loads(line)["epoch"] for line in (tmp_path / "cut" / "diag_steps.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4, 5, 6]


def test_a_killed_program_resumes_to_the_bits_of_one_that_was_not(tmp_path: Path) -> None:
    settings = [f"{name}={value}" for name, value in {**TINY, **CONTROLLED, "topo.train.epochs": 30}.items()]
    data = tmp_path / "blots.npz"
    images = noise(150)
    np.savez(data, x=np.concatenate([images.train.x, images.test.x]))
    command = [sys.executable, "-m", "constellation", "topo", "train", "--data", str(data), "--log", "none", *settings]
    subprocess.run([*command, "--run", str(tmp_path / "whole")], check=True, capture_output=True)
    process = subprocess.Popen([*command, "--run", str(tmp_path / "cut")], stdout=subprocess.DEVNULL)
    while not checkpoint.steps_on_disk(tmp_path / "cut"):
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert max(checkpoint.steps_on_disk(tmp_path / "cut")) < max(checkpoint.steps_on_disk(tmp_path / "whole"))
    again = [sys.executable, "-m", "constellation", "topo", "train", "--resume", "--log", "none"]
    subprocess.run([*again, "--run", str(tmp_path / "cut")], check=True, capture_output=True)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_a_damaged_checkpoint_is_named_and_the_older_one_taken(tmp_path: Path) -> None:
    images, settings = noise(), config()
    list(fit(settings, images, tmp_path / "a"))
    newest = checkpoint.newest(tmp_path / "a")
    assert newest is not None
    file = newest.path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    said: list[str] = []
    rest = list(fit(settings, images, tmp_path / "a", said.append))
    assert [e.epoch for e in rest] == [5, 6] and "checksum differs" in said[0]


# -- the command line, records, figures ---


def test_a_run_has_records_that_the_other_commands_read(trained: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli(["topo", "eval", str(trained), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    held = json.loads((trained / "summary.json").read_text())["held"]
    assert found["mse"] == pytest.approx(held["mse"], rel=1e-6) and found["accuracy"] == held["accuracy"]
    assert found["accuracy"] > 0.5 and found["images"] == 299
    out = trained / "one.png"
    assert (
        cli(["plot", str(trained), "--panel", "reconstruction", "--out", str(out)]) == 0 and out.stat().st_size > 1000
    )
    assert cli(["topo", "report", str(trained)]) == 0
    names = ["atlas", "codes", "jumps", "reconstructions", "samples", "traces"]
    assert sorted(p.stem for p in (trained / "plots").glob("*.png")) == names


def test_trackers_are_told_of_epochs(tmp_path: Path) -> None:
    from constellation.trackers.tracker import tracking

    with tracking(("tensorboard", "mlflow"), tmp_path / "run", {"a": 1}, print) as track:
        for epoch in fit(config(), noise(), tmp_path / "run"):
            track(epoch)
    assert list((tmp_path / "run" / "trackers" / "tensorboard" / "topo").glob("events*"))
    metrics = {p.name for p in (tmp_path / "run" / "trackers" / "mlflow").rglob("topo/*")}
    assert {"reconstruction", "held_mse", "lr"} <= metrics


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--data", "nowhere"], "--data nowhere: no such file or folder"),
        (["train.lr=-1"], "topo.train.lr"),
        (["model.chart=3"], "unknown setting 'topo.model.chart'; near it: topo.model.charts"),
        (["model.codes=1"], "at least 2 of each are an atlas"),
        (["model.codes=400"], "4000 codes for 1498 images"),
        (["model.keys=5"], "keys=5: an even number"),
        (["--preset", "cifar10", "model.charts=4"], None),
        (["--preset", "nothing"], "--preset nothing: choose one of digits, mnist, cifar10"),
        (["--resume"], "holds no topo run"),
        (["control.weights=setpoints", "control.route_entropy=1", "control.usage_entropy=0.2"], "cannot exceed H(K)"),
        ([f"loss.{n}=0" for n in LOSSES] + ["train.probe=false"], "every weight is 0"),
    ],
)
def test_a_wrong_request_is_one_line(words: list[str], told: str | None, tmp_path: Path, capsys) -> None:
    if told is None:
        words, told = ["model.encoder=conv", "--data", str(_odd(tmp_path))], "cannot be halved twice; use flat"
    assert cli(["topo", "train", "--run", str(tmp_path / "run"), "--log", "none", *words]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def _odd(folder: Path) -> Path:
    np.savez(folder / "odd.npz", x=np.random.default_rng(0).random((300, 7, 7)))
    return folder / "odd.npz"


def test_a_run_is_not_begun_twice_nor_with_other_images(trained: Path, tmp_path: Path, capsys) -> None:
    assert cli(["topo", "train", "--run", str(trained), "--log", "none"]) == 2
    assert "holds a topo run already; go on with --resume" in capsys.readouterr().err
    assert (
        cli(["topo", "train", "--run", str(trained), "--resume", "--log", "none", "--data", str(_odd(tmp_path))]) == 2
    )
    assert "not the images that" in capsys.readouterr().err
    assert cli(["topo", "train", "--run", str(trained), "--resume", "--log", "none", "train.lr=1e-3"]) == 2
    assert "begun with other settings" in capsys.readouterr().err
    assert cli(["topo", "eval", str(tmp_path)]) == 2 and "is no topo run" in capsys.readouterr().err
    with pytest.raises(ArtifactError, match="no topo run"):
        load(tmp_path)


def test_supervision_without_labels_and_a_loss_that_is_no_number_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs labels and there are none"):
        list(fit(config(**{"topo.loss.supervised": 1.0}), noise(labels=False), tmp_path / "a"))
    with pytest.raises(RunError, match=r"topo: loss .* at step \d+; train anew with topo\.train\.lr below 1e\+30"):
        list(fit(config(**{"topo.train.lr": 1e30, "topo.train.warmup": 0.0}), noise(), tmp_path / "b"))
    assert json.loads((tmp_path / "b" / "summary.json").read_text())["status"] == "failed"


def test_images_without_labels_are_trained_on_and_evaluated(tmp_path: Path) -> None:
    *_, last = fit(config(), noise(labels=False), tmp_path / "a")
    assert last.held is not None and "accuracy" not in last.held and last.held["mse"] > 0


def test_convolutions_and_colours(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = divided("colours", Split(rng.random((60, 3, 8, 8)).astype(np.float32), None))
    *_, last = fit(config(**{"topo.model.encoder": "conv", "topo.train.epochs": 2}), images, tmp_path / "a")
    assert math.isfinite(last.losses["reconstruction"])


@pytest.mark.slow
@pytest.mark.skipif("CONSTELLATION_MNIST" not in os.environ, reason="needs CONSTELLATION_MNIST, a folder of IDX files")
def test_mnist_is_read_and_learned(tmp_path: Path) -> None:
    images = read_images(os.environ["CONSTELLATION_MNIST"])
    assert images.shape == (1, 28, 28) and images.classes == 10
    settings = override(Config(), {"topo.train.epochs": 10, "topo.train.eval_every": 0})
    *_, last = fit(settings, images, tmp_path / "a")
    assert last.held is not None and last.held["mse"] < 0.8 * last.held["mean_mse"]
