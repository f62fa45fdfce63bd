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

from constellation.config import Router as RouterConfig
from constellation.coordizer.tokenizer import Tokenizer
from constellation.errors import ArtifactError
from router.answer import count_codec
from router.answer.certificate import CertificateWriter, digest_of, replay
from router.answer.verify import told_in, verify
from router.answer.view import View
from router.decide.fisher_rao import FisherRaoRouter
from router.decide.fit import fit

NAMES = ("heart", "memory", "action")
KINDS = ("the quick brown fox", "def f(x): return", "GENESIS 1:1 In the beginning")
TEXTS = [f"{kind} {i} {kind}\n".encode() * 8 for kind in KINDS for i in range(12)]
SETTINGS = RouterConfig(bins=512, dims=8, every=32, max_prefix=256, hysteresis=0.1)
ROUTER = fit(TEXTS, SETTINGS, seed=0, names=NAMES, validation=TEXTS)


def walked(parts: list[bytes], router: FisherRaoRouter = ROUTER) -> tuple[str, list[str]]:
    """A certificate of a look after each part, and who was in force."""
    view, ledger, kernels = View(router), CertificateWriter(router, "route"), []
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
        (lambda p: p.__setitem__(0, 3), "schema 3"),
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
        (lambda p: p[4][0].__setitem__(1, 2 * 10**12), "not those of its bytes"),
        (lambda p: p[4][0].__setitem__(1, -2), "not those of its bytes"),
        (lambda p: p.__setitem__(7, 0), "none of this project"),
        (lambda p: p.__setitem__(8, None), "none of this project"),
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


@pytest.mark.parametrize("code", [2 * 10**12, 2 * 10**12 + 1, 34, 255, -1, -2])
@pytest.mark.parametrize("n", [0, 62])
def test_the_code_of_counts_is_one_that_pack_writes(code: int, n: int) -> None:
    """508 characters of a certificate made an array of 10 GB: its length was the code's, for counts of nothing."""
    with pytest.raises(ValueError, match="code"):
        count_codec.unpack(code, b"" if n == 0 else bytes(64), n, 512)
    parts = msgpack.unpackb(base64.urlsafe_b64decode(walked([b""])[0]))
    parts[4][0][1:3] = [code, b""]
    with pytest.raises(ArtifactError, match="counts at byte 0"):
        replay(base64.urlsafe_b64encode(msgpack.packb(parts)).decode(), ROUTER)


TOKENIZER = Tokenizer.train([text.decode() for text in TEXTS], 300)
PROMPT, ANSWER = KINDS[0] * 3, " def f(x): return x" * 12 + " and é."


def answered(mode: str = "route", top_k: int = 2, prompt: str = PROMPT, text: str = ANSWER) -> dict[str, Any]:
    """What `generate --json` says of `text`, looked at every 32 bytes."""
    from router.decide.mixture import weights
    from router.decide.modes import MIXED

    data, start = (prompt + text).encode(), len(prompt.encode())
    view, ledger, looks, wrote = View(ROUTER), CertificateWriter(ROUTER, mode, top_k), [], []
    seen, moves = 0, []
    for at in (start, *range(start + 16, len(data) - 8, 32)):
        view.update(data[seen:at])
        look, seen = view.decide(at, SETTINGS.hysteresis), at
        ledger.add(view)
        assert view.choice is not None
        panel = [(look.kernel, 1.0)]
        if mode in MIXED and not look.abstained:
            panel = list(weights(NAMES, view.choice.posterior, top_k))
            look = dataclasses.replace(look, kernel=max(panel, key=lambda one: one[1])[0])
        if mode == "route" and looks and looks[-1]["kernel"] != look.kernel:
            moves.append({"at_bytes": at, "source": looks[-1]["kernel"], "target": look.kernel})
        looks.append(dataclasses.asdict(look))
        wrote += [name for name, _ in panel if name not in wrote]
    ids = TOKENIZER.encode(text)
    return {"prompt": prompt, "text": text, "token_ids": ids, "mode": mode, "kernels": wrote, "looks": looks,
            "hand_offs": moves, "certificate": ledger.certificate(text, ids)}  # fmt: skip


def checked(reply: dict[str, Any]) -> list[str]:
    return [str(verify(told, ROUTER, TOKENIZER)) for told in told_in(reply, TOKENIZER)]


@pytest.mark.parametrize("mode", ["route", "mixture", "barycenter"])
@pytest.mark.parametrize("shown", [("text", "token_ids", "prompt"), ("text",), ("token_ids",), ()])
def test_an_answer_holds_however_much_of_it_is_shown(mode: str, shown: tuple[str, ...]) -> None:
    whole = answered(mode)
    kept = {name: value for name, value in whole.items() if name in (*shown, "certificate", "kernels", "looks", "mode")}
    assert len(checked(kept)) == 1
    assert len(set(whole["kernels"])) > 1 or mode == "route"


def moved(values: list[Any], i: int = 2) -> list[Any]:
    return [*values[:i], *values[i : i + 2][::-1], *values[i + 2 :]]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"text": ANSWER.replace("x", "y", 1)}, "text is not the one"),
        ({"text": ANSWER[:-1] + "!"}, "text is not the one"),  # after the last look
        ({"text": ANSWER[:-1]}, "text is not the one"),
        ({"token_ids": moved(TOKENIZER.encode(ANSWER))}, "tokens are not those"),
        ({"token_ids": TOKENIZER.encode(ANSWER)[:-1]}, "tokens are not those"),
        ({"token_ids": [10**6]}, "tokens are not those of this run"),
        ({"token_ids": "abc"}, "tokens are not those of this run"),
        ({"kernels": ["action"]}, "kernels="),
        ({"kernels": ["ocean", "heart", "memory"]}, "kernels="),
        ({"mode": "mixture"}, "mode="),
        ({"kernel": "nobody"}, "kernel="),
        ({"looks": []}, "looks"),
        ({"looks": 7}, "looks"),
        ({"hand_offs": [{"at_bytes": 1, "source": "heart", "target": "action"}]}, "hand-offs"),
        ({"prompt": PROMPT.replace("quick", "quack", 1)}, "bytes before byte"),
        ({"prompt": PROMPT + "!"}, "the prompt has"),
        ({"certificate": ""}, "named one kernel"),
        ({"certificate": 7}, "no field"),
    ],
)
def test_a_changed_answer_is_found(change: dict[str, Any], told: str) -> None:
    assert checked(answered())
    with pytest.raises(ArtifactError, match=told):
        checked({**answered(), **change})


def test_a_text_with_new_digests_is_found_by_its_counts() -> None:
    """Whoever changes text and tokens and writes their digests into the certificate still has the wrong counts."""
    text = ANSWER.replace("x", "y", 1)
    whole, ids = answered(), TOKENIZER.encode(text)
    parts = msgpack.unpackb(base64.urlsafe_b64decode(whole["certificate"]))
    parts[8:] = [digest_of(text), digest_of(ids)]
    forged = {**whole, "certificate": base64.urlsafe_b64encode(msgpack.packb(parts)).decode()}
    for shown in ({"text": text, "token_ids": ids}, {"text": text, "token_ids": None, "prompt": None}):
        with pytest.raises(ArtifactError, match="bytes before byte"):
            checked({**forged, **shown})


def test_a_certificate_of_the_first_schema_holds_as_far_as_it_says() -> None:
    whole = answered()
    parts = msgpack.unpackb(base64.urlsafe_b64decode(whole["certificate"]))
    older = base64.urlsafe_b64encode(msgpack.packb([1, *parts[1:7]])).decode()
    assert checked({**whole, "certificate": older}) == checked(whole)
    with pytest.raises(ArtifactError, match="bytes before byte"):
        checked({**whole, "certificate": older, "text": ANSWER.replace("x", "y", 1), "token_ids": None})
    with pytest.raises(ArtifactError, match="kernels="):
        checked({**whole, "certificate": older, "kernels": ["action"]})
    with pytest.raises(ArtifactError, match="do not decode"):
        checked({**whole, "certificate": older, "text": ANSWER[:-1] + "!"})


def test_every_choice_of_a_reply_is_held_against_its_own_certificate() -> None:
    one, other = answered(), answered(text=ANSWER[20:])
    story = {n: {k: w[k] for k in ("certificate", "kernels", "mode")} for n, w in (("one", one), ("other", other))}
    choices = [{"text": one["text"]}, {"message": {"content": other["text"]}, "constellation": story["other"]}]
    assert len(checked({"choices": choices, "constellation": story["one"]})) == 2
    echoed = [{"text": PROMPT + one["text"]}, choices[1]]
    assert len(checked({"choices": echoed, "constellation": story["one"]})) == 2
    for wrong in ([choices[0], {**choices[1], "message": {"content": "no"}}], [{"text": one["text"][1:]}, choices[1]]):
        with pytest.raises(ArtifactError, match="text is not the one"):
            checked({"choices": wrong, "constellation": story["one"]})
    for wrong in ({"choices": [3]}, {"choices": 3}, {}, {"constellation": 3}, {"choices": choices}):
        with pytest.raises(ArtifactError, match="no field"):
            checked(wrong)


ANYTHING = st.recursive(st.none() | st.integers() | st.text(max_size=5), st.lists, max_leaves=5)
FIELDS = st.sampled_from(["text", "token_ids", "prompt", "kernels", "looks", "hand_offs", "choices"])


@given(st.dictionaries(FIELDS, ANYTHING))
@settings(max_examples=60, deadline=None)
def test_whatever_an_answer_holds_there_is_one_line_about_it(change: dict[str, Any]) -> None:
    try:
        checked({**answered(), **change})
    except ArtifactError as error:
        assert "\n" not in str(error)


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
    for change in ({"text": answer["text"] + "."}, {"token_ids": answer["token_ids"][1:]}, {"kernels": ["heart"]}):
        refused = constellation("route", "--run", run, "--verify", "-", stdin=json.dumps({**answer, **change}))
        assert refused.returncode == 1 and refused.stderr.count("\n") == 1, change
    parts = msgpack.unpackb(base64.urlsafe_b64decode(answer["certificate"]))
    parts[4][-1][3] = (parts[4][-1][3] + 2) % 8
    forged = tmp_path / "forged"
    forged.write_text(base64.urlsafe_b64encode(msgpack.packb(parts)).decode())
    refused = constellation("route", "--run", run, "--verify", str(forged))
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1 and "its counts say" in refused.stderr
