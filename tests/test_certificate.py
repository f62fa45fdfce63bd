"""Certificates: what an answer says of its route is what its counts give, and nothing else passes."""

import base64
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from constellation.commands.route import certificate_of
from constellation.config import Router as RouterConfig
from constellation.errors import ArtifactError
from router.certificate import Ledger, replay
from router.fit import fit
from router.route import Router
from router.view import View

NAMES = ("heart", "memory", "action")
KINDS = ("the quick brown fox", "def f(x): return", "GENESIS 1:1 In the beginning")
TEXTS = [f"{kind} {i} {kind}\n".encode() * 8 for kind in KINDS for i in range(12)]
SETTINGS = RouterConfig(bins=512, dims=8, every=32, max_prefix=256, hysteresis=0.1)
ROUTER = fit(TEXTS, SETTINGS, seed=0, names=NAMES, validation=TEXTS)


def walked(parts: list[bytes], router: Router = ROUTER) -> tuple[str, list[str]]:
    """A certificate of a look after each part, and who was in force."""
    view, ledger, kernels = View(router), Ledger(router, "route"), []
    for part in parts:
        view.update(part)
        kernels.append(view.decide(view.stream.bytes_seen, router.config.hysteresis).kernel)
        ledger.add(view)
    return ledger.certificate(), kernels


@given(st.binary(max_size=80), st.lists(st.binary(min_size=1, max_size=80), max_size=6))
@settings(max_examples=60, deadline=None)
def test_what_was_decided_is_replayed_from_the_counts_alone(first: bytes, more: list[bytes]) -> None:
    certificate, kernels = walked([first, *more])
    found = replay(certificate, ROUTER)
    assert list(found.kernels) == kernels and found.router_hash == ROUTER.hash
    assert found.at_bytes[-1] == len(first) + sum(map(len, more))


def test_a_certificate_is_small_and_does_not_hold_the_text() -> None:
    text = b"".join(TEXTS)[:2048]
    certificate, _ = walked([text[i : i + 64] for i in range(0, len(text), 64)])
    assert len(certificate) < len(text) * 3
    assert b"quick" not in base64.urlsafe_b64decode(certificate)


PARTS = [KINDS[0].encode() * 3, b" def f(x): return x" * 3, b" def f(x): return y" * 9]


def changed(change: Any) -> str:
    parts = msgpack.unpackb(base64.urlsafe_b64decode(walked(PARTS)[0]))
    change(parts)
    return base64.urlsafe_b64encode(msgpack.packb(parts)).decode()


def swap_counts(parts: list) -> None:
    other = msgpack.unpackb(base64.urlsafe_b64decode(walked([PARTS[1][: len(PARTS[0])].ljust(len(PARTS[0]), b"x")])[0]))
    parts[4][0][1:3] = other[4][0][1:3]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda p: p.__setitem__(0, 2), "schema 2"),
        (lambda p: p.__setitem__(1, "0" * 64), "another run's"),
        (lambda p: p[4][0].__setitem__(3, (p[4][0][3] + 1) % 3), "its counts say"),
        (lambda p: p[4][-1].__setitem__(3, 7), "says kernel 7"),
        (lambda p: p[4][0].__setitem__(0, p[4][0][0] + 1), "not those of its bytes"),
        (lambda p: p[4].append(p[4][-1]), "a look at byte"),
        (lambda p: p.__setitem__(4, []), "0 looks"),
        (lambda p: p.__setitem__(5, bytes([p[5][0], p[5][1], p[5][2] ^ 64, p[5][3]]) + p[5][4:]), "its z"),
        (lambda p: p.__setitem__(6, p[6][4:] + p[6][:4]), "its posterior"),
        (lambda p: p.__setitem__(6, b"\x00\x00\xc0\x7f" * 3), "its posterior"),
        (lambda p: p.pop(), "none of this project"),
        (lambda p: p[4][0].__setitem__(2, "text"), "none of this project"),
        (swap_counts, "its counts say|is not what"),
    ],
)
def test_whatever_is_changed_is_found(change: Any, told: str) -> None:
    replay(changed(lambda parts: None), ROUTER)
    with pytest.raises(ArtifactError, match=told):
        replay(changed(change), ROUTER)


@given(st.text(max_size=40))
def test_what_is_no_certificate_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match="certificate"):
        replay(text, ROUTER)


def test_a_router_that_differs_in_one_number_is_another_one() -> None:
    with pytest.raises(ArtifactError, match="another run's"):
        replay(walked(PARTS)[0], dataclasses.replace(ROUTER, log_prior=ROUTER.log_prior + 1e-9))


def test_the_certificate_of_an_answer_is_found_where_answers_have_it() -> None:
    for answer in ({"certificate": "abc"}, {"constellation": {"certificate": "abc"}, "id": "x"}):
        assert certificate_of(json.dumps(answer)) == "abc"
    assert certificate_of(" abc\n") == "abc"
    for wrong in ("{", "{}", '{"constellation": 3}'):
        with pytest.raises(ArtifactError):
            certificate_of(wrong)


def test_the_command_says_whether_an_answer_holds(micro_run: Path, tmp_path: Path) -> None:
    def constellation(*argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "constellation", *argv]
        return subprocess.run(command, input=stdin, capture_output=True, text=True)

    run = str(micro_run)
    asked = constellation("generate", "--run", run, "--prompt", "The import statement", "--local", "--json",
                          "--mode", "mixture", "--top-k-kernels", "2", "--max-new-tokens", "40")  # fmt: skip
    assert asked.returncode == 0, asked.stderr
    answer = json.loads(asked.stdout)
    assert answer["mode"] == "mixture" and any(len(look["weights"]) == 2 for look in answer["looks"])
    holds = constellation("route", "--run", run, "--verify", "-", stdin=asked.stdout)
    assert holds.returncode == 0 and holds.stdout.startswith("holds: "), holds.stderr
    parts = msgpack.unpackb(base64.urlsafe_b64decode(answer["certificate"]))
    parts[4][-1][3] = (parts[4][-1][3] + 2) % 8
    forged = tmp_path / "forged"
    forged.write_text(base64.urlsafe_b64encode(msgpack.packb(parts)).decode())
    refused = constellation("route", "--run", run, "--verify", str(forged))
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1 and "its counts say" in refused.stderr
