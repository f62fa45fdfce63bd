"""The life of a query: its laws, with small kernels and policies that hand off often."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from constellation.config import Config
from constellation.config import Router as RouterConfig
from constellation.decoding.decode import decode_naive
from constellation.decoding.sample import Sampling
from constellation.errors import ArtifactError, ConfigError
from constellation.kernel.model import KernelLM
from constellation.roster import OCEAN
from constellation.train import checkpoint
from router.answer.local import LocalKernels
from router.answer.packet import Packet
from router.answer.query import Ask, HandOff
from router.answer.service import Service
from router.answer.text import ShownText
from router.answer.turn import Answerer
from router.answer.verify import ShownAnswer, verify
from router.answer.view import WholeText
from router.decide.fit import fit
from router.decide.policy import RouteChoice, looks
from tests.asking import streams, untimed
from tests.cases import KERNEL, NAMES, TEXTS, TOKENIZER, models, random_kernel

EVERY = 16
CONFIG = Config(kernel=KERNEL, router=RouterConfig(every=EVERY, hysteresis=0.2))


def model(seed, **changes):
    return random_kernel(dataclasses.replace(KERNEL, **changes), seed)


MODELS = models()


def local(models=None):
    return LocalKernels(models or MODELS, TOKENIZER)


class ByteSums:
    """A policy of an arbitrary but causal kind: the sum of the last bytes says who is likeliest."""

    def __init__(self, names=NAMES, min_bytes=3, span=24):
        self.names, self.min_bytes, self.span = tuple(names), min_bytes, span

    def route(self, texts):
        out = []
        for text in texts:
            score = np.array([np.sin((1 + sum(text[-self.span :])) * (1 + NAMES.index(n))) for n in self.names])
            p = (np.exp(2 * score) / np.exp(2 * score).sum()).astype(np.float32)
            short = len(text) < self.min_bytes
            index = -1 if short else int(p.argmax())
            nowhere = np.full(len(p), np.nan, np.float32)
            reason = "too short" if short else ""
            name = OCEAN if short else self.names[index]
            none = np.zeros(0, np.float32)
            out.append(
                RouteChoice(name, index, p, none, nowhere, max(0, len(text) - 2), short, reason, (), (), "sums", 0.0)
            )
        return out

    def trajectories(self, texts, every):
        raise NotImplementedError("a session looks at one text at a time")


POLICY = ByteSums()


def answers(requests, policy=POLICY, kernels=None, config=CONFIG):
    return run(requests, policy, kernels, config)[1]


def run(requests, policy=POLICY, kernels=None, config=CONFIG):
    """The streamed text of every request, and its answer."""
    found = streams(Service(config, policy, TOKENIZER, kernels or local()), requests)
    return ["".join(piece.text for piece in pieces) for pieces, _ in found], [answer for _, answer in found]


def ask(prompt, mode="route", **sampling):
    return Ask(prompt, Sampling(**{"max_new_tokens": 50, **sampling}), mode)


REQUESTS = [
    ask("the quick brown fox", seed=1),
    ask("", seed=2),
    ask("naïve café: " * 12, seed=3, top_p=0.9, temperature=1.4),
    ask("x = 1 + 1\n", temperature=0, max_new_tokens=33),
    ask("dog", mode="memory", seed=5, repetition_penalty=1.3),
    ask("over the lazy", mode=OCEAN, seed=6, max_new_tokens=7),
]


# -- one kernel, many kernels, batches ---------------------------------------------------------------------------------


def test_a_constellation_of_one_kernel_is_that_kernel_alone():
    policy = ByteSums(["heart"], min_bytes=0)
    kernels = local({"heart": MODELS["heart"], OCEAN: MODELS[OCEAN]})
    for s in ({"seed": 1}, {"temperature": 0}, {"seed": 3, "top_k": 20}):
        (routed,) = answers([ask("the quick", **s)], policy, kernels)
        (alone,) = answers([ask("the quick", mode="heart", **s)], None)
        assert untimed(routed, looks=(), mode="") == untimed(alone, mode="")
        assert routed.kernels == ("heart",)
        assert len(routed.looks) > 2


def test_a_kernel_alone_writes_what_whole_forward_passes_write():
    window = [TOKENIZER.eos, *TOKENIZER.encode("the quick")]
    for seed in range(3):
        s = Sampling(seed=seed, max_new_tokens=49 - len(window))  # so many fit before a window has to be cut
        silent = [i for i in range(336) if i and (i >= TOKENIZER.vocab_size or not TOKENIZER.token_bytes[i])]
        naive = decode_naive(_without(MODELS["heart"], silent), window, s)
        (answer,) = answers([Ask("the quick", s, "heart")], None)
        ended = naive.index(0) + 1 if 0 in naive else len(naive)
        assert list(answer.token_ids) == naive[:ended]


def _without(kernel, tokens):
    """The kernel with some tokens made impossible."""
    bias = torch.zeros(336).index_fill_(0, torch.tensor(tokens), float("-inf"))
    copy = KernelLM(kernel.config)
    copy.load_state_dict(kernel.state_dict())
    head = copy.logits
    copy.logits = lambda hidden: head(hidden) + bias
    return copy


def test_a_batch_of_requests_equals_each_alone():
    together = run(REQUESTS)
    for i, request in enumerate(REQUESTS):
        text, (answer,) = run([request])
        assert text[0] == together[0][i]
        assert untimed(answer) == untimed(together[1][i])


def test_permuting_the_kernels_changes_nothing():
    expected = [untimed(a) for a in answers(REQUESTS)]
    assert any(a.hand_offs for a in expected)
    for names in itertools.permutations(NAMES):
        kernels = local({name: MODELS[name] for name in (*names, OCEAN)})
        assert [untimed(a) for a in answers(REQUESTS, ByteSums(names), kernels)] == expected


def test_a_seed_fixes_the_answer_and_another_one_changes_it():
    a, b, c = (answers([ask("the quick brown", seed=s)])[0] for s in (7, 7, 8))
    assert untimed(a) == untimed(b)
    assert a.text != c.text


# -- turns and packets ------------------------------------------------------------------------------------------------


def turn(kernel, packet, budget=EVERY):
    return local().answerer(kernel).submit(packet, budget).result()


def first_packet(prompt="the quick brown fox", kernel="heart", **sampling):
    tokens = [TOKENIZER.eos, *TOKENIZER.encode(prompt)]
    return Packet("7", kernel, tuple(tokens), Sampling(**{"max_new_tokens": 200, **sampling})).encode()


def moved(packet, kernel):
    return dataclasses.replace(Packet.decode(packet), kernel=kernel).encode()


def test_a_request_that_went_away_and_came_back_goes_on_as_if_it_had_never_left():
    stayed = away = first_packet(seed=4, top_p=0.95)
    for _ in range(4):
        stayed = turn("heart", stayed)
        there = moved(moved(away, "memory"), "action")
        away = turn("heart", moved(there, "heart"))
        assert away == stayed


def test_a_turn_may_be_repeated_and_taken_by_another_process():
    packet = first_packet(seed=4)
    shared = local().answerer("heart")
    for _ in range(4):
        after = shared.submit(packet, EVERY).result()
        assert shared.submit(packet, EVERY).result() == after == turn("heart", packet)
        packet = after


def test_a_turn_takes_the_text_its_budget_further_and_no_token_more():
    packet = first_packet(seed=5)
    for budget in (1, 5, 16, 60):
        before, after = Packet.decode(packet), Packet.decode(turn("heart", packet, budget))
        sizes = [len(TOKENIZER.token_bytes[t]) for t in after.tokens[len(before.tokens) :]]
        assert not after.finish
        assert sum(sizes[:-1]) < budget <= sum(sizes)
        assert after.position == len(sizes)


def test_a_window_longer_than_the_context_is_cut_and_no_new_token_lost():
    packet = first_packet("the quick brown fox " * 40, seed=4)
    after = Packet.decode(turn("heart", packet, 400))
    assert 64 < after.position <= len(after.tokens) < after.position + 16  # more than a window in one turn


def test_a_finished_packet_stays_as_it_is():
    done = turn("heart", first_packet(seed=4, max_new_tokens=3))
    assert Packet.decode(done).finish == "length"
    assert turn("heart", done) == done


def test_neighbours_in_a_turn_change_nothing():
    packets = [first_packet("the lazy dog " * n, seed=n, temperature=n % 3 / 2) for n in range(1, 7)]
    shared = local().answerer("heart")
    turns = [shared.submit(packet, EVERY) for packet in packets]
    assert [one.result() for one in turns] == [turn("heart", p) for p in packets]


class Wire(LocalKernels):
    """Kernels behind a wire: what crosses it is looked at."""

    def __init__(self):
        super().__init__(MODELS, TOKENIZER)
        self.seen = []

    async def turn(self, kernel, packet, budget_bytes, ear=None):
        assert packet.kernel == kernel
        after = await super().turn(kernel, Packet.decode(packet.encode()), budget_bytes, ear)
        self.seen += [packet.encode(), after.encode()]
        return Packet.decode(after.encode())


def test_packets_survive_the_wire_at_every_turn_and_stay_small():
    wire = Wire()
    expected = answers(REQUESTS)
    assert [untimed(a) for a in answers(REQUESTS, kernels=wire)] == [untimed(a) for a in expected]
    assert len(wire.seen) > 20
    for data in wire.seen:
        packet = Packet.decode(data)
        assert packet.encode() == data
        assert len(data) <= 4096 + 5 * len(packet.tokens)


# -- the text ----------------------------------------------------------------------------------------------------------


def test_streamed_chunks_are_the_answer_and_the_answer_is_its_tokens():
    streamed, done = run(REQUESTS)
    assert any("\ufffd" in text for text in streamed), "no invalid bytes: nothing was tested"
    for text, answer, request in zip(streamed, done, REQUESTS):
        assert text == answer.text == TOKENIZER.decode(answer.token_ids).decode("utf-8", "replace")
        assert answer.completion_tokens == len(answer.token_ids)
        assert answer.prompt_tokens == len(TOKENIZER.encode(request.prompt))
        assert answer.seconds_per_token * answer.completion_tokens == pytest.approx(answer.seconds)


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 63, 64, 65, 130])
def test_max_new_tokens_is_exact(count):
    (answer,) = answers([ask("the", max_new_tokens=count, seed=1, top_k=40, ignore_eos=True)])
    assert answer.finish_reason == "length"
    assert len(answer.token_ids) == count


def test_an_answer_ends_at_the_end_of_the_text():
    requests = [ask("the", temperature=2.0, seed=i, max_new_tokens=150) for i in range(8)]
    ended = [a for a in answers(requests) if a.finish_reason == "eos"]
    assert ended
    for answer in ended:
        assert answer.token_ids.index(TOKENIZER.eos) == len(answer.token_ids) - 1
        assert answer.text == TOKENIZER.decode(answer.token_ids).decode("utf-8", "replace")


def test_reserved_tokens_and_ids_without_a_token_never_come():
    assert TOKENIZER.vocab_size < KERNEL.vocab_size
    done = answers([ask("the", temperature=3.0, seed=i, max_new_tokens=150) for i in range(4)])
    ids = {t for a in done for t in a.token_ids}
    assert len(ids) > 100
    assert not ids & {*range(1, 16), *range(TOKENIZER.vocab_size, KERNEL.vocab_size)}


@pytest.mark.parametrize("length", [1, 2, 5, 9])
def test_a_stop_text_ends_the_answer_wherever_it_lies(length):
    base = ask("the quick brown fox", seed=11, max_new_tokens=120, ignore_eos=True)
    (full,) = answers([base])
    words = sorted({full.text[i : i + length] for i in range(0, len(full.text) - length, 3)} - {""})
    stops = [w for w in words if "\ufffd" not in w]
    assert len(stops) >= 3
    requests = [dataclasses.replace(base, sampling=dataclasses.replace(base.sampling, stop=("zq#", w))) for w in stops]
    streamed, done = run(requests)
    for stop, text, answer in zip(stops, streamed, done):
        assert answer.finish_reason == "stop"
        assert text == answer.text == full.text[: full.text.index(stop)]
        assert answer.token_ids == full.token_ids[: len(answer.token_ids)]
        written = TOKENIZER.decode(answer.token_ids)
        assert stop.encode() in written
        assert stop.encode() not in TOKENIZER.decode(answer.token_ids[:-1])


def test_a_stop_text_of_the_prompt_does_not_stop_the_answer():
    base = ask("fox", seed=11)
    stop = dataclasses.replace(
        base, sampling=dataclasses.replace(base.sampling, stop=("fox" + answers([base])[0].text[:2],))
    )
    assert untimed(answers([stop])[0]) == untimed(answers([base])[0])


pieces = st.lists(st.one_of(st.binary(max_size=4), st.sampled_from(["ab", "é", "abcab", "€uro"]).map(str.encode)))


@given(pieces, st.lists(st.sampled_from(["ab", "abc", "bca", "é", "€u", "aab"]), max_size=3))
@settings(max_examples=300)
def test_shown_text_is_the_decoding_up_to_the_first_stop_and_never_taken_back(parts, stop):
    shown, text, data = ShownText(stop), "", b"".join(parts)
    ends = [data.find(s.encode()) for s in stop if s.encode() in data]
    expected = data[: min(ends, default=len(data))].decode("utf-8", "replace")
    so_far = b""
    for i, part in enumerate(parts):
        so_far += part
        last = i == len(parts) - 1 or any(s.encode() in so_far for s in stop)  # a turn ends with its stop
        text += shown.feed(part, last)
        assert expected.startswith(text)
        for s in map(str.encode, [] if last else stop):
            for n in range(1, len(s)):
                if so_far.endswith(s[:n]):  # the stop may be completed next: nothing of it has been shown
                    assert (so_far[:-n].decode("utf-8", "replace")).startswith(text)
        if last:
            break
    assert text == (expected if parts else "")


def test_half_a_character_waits_for_its_other_half():
    shown = ShownText()
    assert [shown.feed(bytes([b]), False) for b in "a€b".encode()] == ["a", "", "", "€", "b"]
    assert shown.feed(b"\xe2\x82", False) == ""
    assert shown.feed(b"", True) == "\ufffd"


# -- who answers -------------------------------------------------------------------------------------------------------


def test_every_w_bytes_there_is_a_look_and_a_hand_off_is_a_change_of_kernel():
    done = answers(REQUESTS[:4])
    assert sum(len(a.hand_offs) for a in done) > 5
    for answer, request in zip(done, REQUESTS):
        at = [look.at_bytes for look in answer.looks]
        assert at[0] == len(request.prompt.encode())
        longest = max(map(len, TOKENIZER.token_bytes))
        assert all(EVERY <= b - a < EVERY + longest for a, b in itertools.pairwise(at))
        assert at[-1] + EVERY + longest > at[0] + len(TOKENIZER.decode(answer.token_ids))
        changes = [
            (b.at_bytes, a.kernel, b.kernel) for a, b in itertools.pairwise(answer.looks) if a.kernel != b.kernel
        ]
        assert [(h.at_bytes, h.source, h.target) for h in answer.hand_offs] == changes
        assert set(answer.kernels) == {look.kernel for look in answer.looks}


def test_an_empty_prompt_goes_to_the_generalist_first():
    (answer,) = answers([ask("", seed=2)])
    first = answer.looks[0]
    assert (first.at_bytes, first.kernel, first.abstained, first.reason) == (0, OCEAN, True, "too short")
    assert answer.prompt_tokens == 0
    assert answer.text


def test_hysteresis_keeps_a_kernel():
    def never_leaves(hysteresis):
        config = dataclasses.replace(CONFIG, router=RouterConfig(every=EVERY, hysteresis=hysteresis))
        return answers(REQUESTS[2:4], config=config)

    assert all(not a.hand_offs for a in never_leaves(100.0))
    assert sum(len(a.hand_offs) for a in never_leaves(1e-9)) >= sum(len(a.hand_offs) for a in never_leaves(0.5)) > 0


def test_bits_lost_are_those_of_the_target_minus_those_of_the_source():
    request = ask("the quick brown fox", seed=1, max_new_tokens=30)
    (plain,), (answer,) = answers([request]), answers([dataclasses.replace(request, measure=True)])
    assert answer.hand_offs
    assert untimed(answer, hand_offs=()) == untimed(plain, hand_offs=())
    assert all(isinstance(h, HandOff) and np.isfinite(h.bits_lost) for h in answer.hand_offs)
    hand_off, ids = answer.hand_offs[0], [0, *TOKENIZER.encode(request.prompt), *answer.token_ids]
    sizes = np.cumsum([len(TOKENIZER.token_bytes[t]) for t in ids])
    after = [look.at_bytes for look in answer.looks if look.at_bytes > hand_off.at_bytes][:1]
    begin = int(np.searchsorted(sizes, hand_off.at_bytes, side="right"))
    end = int(np.searchsorted(sizes, after[0], side="left")) + 1 if after else len(ids)
    assert end <= 64
    bias = torch.zeros(336)
    bias[[i for i in range(1, 336) if i < 16 or i >= TOKENIZER.vocab_size]] = float("-inf")
    bits = {}
    for name in (hand_off.source, hand_off.target):
        log_p = torch.log_softmax(MODELS[name](torch.tensor([ids[:end]]))[0].detach() + bias, -1)
        bits[name] = -sum(log_p[i - 1, ids[i]].item() for i in range(begin, end)) / np.log(2)
    assert hand_off.bits_lost == pytest.approx(bits[hand_off.target] - bits[hand_off.source], rel=1e-4)


def test_the_fitted_router_answers_and_its_stream_is_the_whole_text():
    texts = [
        (a + b).encode() * 20 for a in TEXTS[:6] for b in ("def f(x): return x\n", "GENESIS 1:1 In the beginning ")
    ]
    settings = RouterConfig(bins=512, dims=8, every=EVERY, max_prefix=256, hysteresis=CONFIG.router.hysteresis)
    router = fit(texts, settings, seed=0, names=NAMES, validation=texts)
    requests = [ask("the quick brown fox jumps", seed=1), ask("def f(x): return", seed=2)]
    done = answers(requests, router)
    assert [untimed(a) for a in answers(requests, _Unstreamed(router))] == [untimed(a, certificate="") for a in done]
    for request, answer in zip(requests, done, strict=True):
        story = json.loads(json.dumps(answer.to_json()))
        verify(ShownAnswer(story, answer.text, list(answer.token_ids), request.prompt.encode()), router, TOKENIZER)
    assert done[0].looks[0].distance_rad > 0
    assert len(done[0].looks) >= len(looks(len(done[0].text), EVERY))


class _Unstreamed:
    """The same router, without its stream."""

    def __init__(self, router):
        self.names, self.route, self.trajectories = router.names, router.route, router.trajectories


def test_a_text_read_anew_is_what_the_policy_says_of_all_of_it():
    whole = WholeText(POLICY)
    for part in (b"ab", b"", b"cdefgh"):
        whole.update(part)
    assert whole.choice().posterior.tolist() == POLICY.route([b"abcdefgh"])[0].posterior.tolist()


@pytest.mark.parametrize(
    ("policy", "request_", "wanted"),
    [
        (POLICY, ask("x", mode="hart"), "'hart'.*route, mixture, barycenter, phi, ocean, heart"),
        (None, ask("x"), "needs a fitted router"),
        (POLICY, ask("x"), "may choose 'action'"),
    ],
)
def test_an_impossible_request_is_refused_before_anything_is_decoded(policy, request_, wanted):
    with pytest.raises(ConfigError, match=wanted):
        kernels = local({name: MODELS[name] for name in (OCEAN, "heart", "memory")})
        Service(CONFIG, policy, TOKENIZER, kernels).check(request_)


# -- the kernels of this process ---------------------------------------------------------------------------------------


def test_a_kernel_is_loaded_when_it_is_asked_for():
    kernels = local({name: (lambda name=name: MODELS[name]) for name in MODELS})
    assert kernels.loaded == ()
    answers([ask("x", mode="memory")], None, kernels)
    assert kernels.loaded == ("memory",)
    with pytest.raises(ConfigError, match="'nobody'"):
        kernels.answerer("nobody")


def test_kernels_come_from_a_run_folder(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    for name in (OCEAN, "memory"):
        optimizer = torch.optim.AdamW(MODELS[name].parameters())
        rest = {"tokens": 0, "dev_bits_per_byte": None, "keep_last": 1, "keep_best": 0}
        checkpoint.save(tmp_path / name, 3, MODELS[name], optimizer, {"step": np.zeros(1)}, **rest)
    kernels = LocalKernels.from_run(tmp_path)
    assert kernels.names == (OCEAN, "memory")
    assert kernels.loaded == ()
    request = ask("the quick", mode="memory", seed=3)
    assert untimed(answers([request], None, kernels)[0]) == untimed(answers([request], None)[0])


def test_a_kernel_of_another_run_is_refused():
    with pytest.raises(ArtifactError, match="not of one run"):
        Answerer(model(1, vocab_size=300), TOKENIZER)
