"""Turns, scores and log-probabilities of one kernel, asked by many at once."""

import dataclasses
from concurrent.futures import CancelledError

import numpy as np
import pytest
import torch

from constellation.decoding.decode import decode_naive
from constellation.decoding.sample import Sampling
from constellation.errors import ArtifactError, ConfigError
from constellation.kernel.model import KernelLM
from router.answer.packet import Packet
from router.answer.turn import Answerer
from tests.cases import KERNEL, SILENT, TEXTS, TOKENIZER, random_kernel

MODEL = random_kernel(KERNEL, 2)
BIAS = torch.zeros(336).index_fill_(0, torch.tensor(SILENT), float("-inf"))


def answerer(**options):
    return Answerer(MODEL, TOKENIZER, **options)


def packet(prompt="the quick", **sampling):
    tokens = [TOKENIZER.eos, *TOKENIZER.encode(prompt)]
    return Packet("7", "heart", tuple(tokens), Sampling(**{"max_new_tokens": 40, **sampling}))


def answered(one, of=None, budget=16):
    """All turns of a packet, each of a fresh kernel unless `of` is given."""
    scores = []
    while not one.finish:
        one = (of or answerer()).begin(one, budget).result()
        scores += one.logprobs or ()
    return one, scores


def naive(one, count):
    """By whole forward passes, of the kernel with silent tokens made impossible."""
    copy = KernelLM(KERNEL)
    copy.load_state_dict(MODEL.state_dict())
    head = copy.logits
    copy.logits = lambda hidden: head(hidden) + BIAS
    return decode_naive(copy, one.tokens, dataclasses.replace(one.sampling, max_new_tokens=count))


PENALTIES = {"presence_penalty": 1.5, "frequency_penalty": 0.5, "seed": 3, "index": 4, "ignore_eos": True}


def test_penalties_go_on_from_turn_to_turn_and_kernel_to_kernel():
    first = packet(**PENALTIES)
    done, _ = answered(first)
    assert list(done.tokens[len(first.tokens) :]) == naive(first, 40)
    assert answered(first, answerer())[0] == done
    assert answered(packet(seed=3, index=4, ignore_eos=True))[0].tokens != done.tokens


def test_penalties_count_what_has_left_the_window():
    first = packet(**{**PENALTIES, "presence_penalty": 2.0, "max_new_tokens": 150})
    done, _ = answered(first)
    assert done.position == 150
    assert len(done.tokens) >= 150
    free, _ = answered(packet(seed=3, index=4, ignore_eos=True, max_new_tokens=150))
    assert len(set(done.tokens[-150:])) > len(set(free.tokens[-150:]))


@pytest.mark.parametrize("sampling", [{"seed": 3, "repetition_penalty": 1.3}, {**PENALTIES, "logprobs": 2}])
def test_turns_of_any_length_write_the_same_and_read_the_same(sampling):
    """The window slides where the number of tokens says, not where a turn ends."""
    first = packet(
        "the lazy dog jumps over naive foxes " * 3, **{"ignore_eos": True, **sampling, "max_new_tokens": 150}
    )
    assert len(first.tokens) > 32
    told = []
    for budget in (10**9, 1, 7, 64):
        one, done, new = answerer(slots=1), first, []
        while not done.finish:
            before = done
            done = one.begin(before, budget).result()
            new += done.tokens[len(done.tokens) - (done.position - before.position) :]
        told.append((new, one.stats()["prompt_tokens"]))
    assert len(told[0][0]) == 150
    assert told == [told[0]] * 4


def test_a_stop_token_ends_the_answer_and_says_so():
    first = packet(temperature=0)
    full = naive(first, 40)
    stop = full[5]
    done, _ = answered(packet(temperature=0, stop_token_ids=(stop,)))
    assert list(done.tokens[len(first.tokens) :]) == full[: full.index(stop) + 1]
    assert (done.finish, done.ended_by_token) == ("stop", True)
    assert not answered(packet(temperature=0))[0].ended_by_token


def test_before_min_tokens_nothing_ends_the_answer():
    plain = [answered(packet(temperature=2.0, seed=i))[0] for i in range(12)]
    assert any(one.position < 30 for one in plain)
    for i in range(12):
        assert answered(packet(temperature=2.0, seed=i, min_tokens=30, stop=("e",)))[0].position >= 30


def test_an_ignored_end_of_text_is_a_token_like_any_other():
    done = [answered(packet(temperature=2.0, seed=i, ignore_eos=True))[0] for i in range(12)]
    assert all((one.position, one.finish) == (40, "length") for one in done)
    assert any(TOKENIZER.eos in one.tokens[-40:] for one in done)


def test_an_endless_run_of_ends_of_text_still_ends_a_turn():
    data = answerer().submit(packet(logit_bias=((0, 100.0),), ignore_eos=True).encode(), 8).result()
    assert Packet.decode(data).tokens[-8:] == (0,) * 8


def test_a_bias_forces_and_forbids():
    token = TOKENIZER.encode("fox")[0]
    assert set(answered(packet(logit_bias=((token, 100.0),)))[0].tokens[-40:]) == {token}
    free = answered(packet(temperature=0))[0].tokens[-40:]
    assert free[0] not in answered(packet(temperature=0, logit_bias=((free[0], -100.0),)))[0].tokens[-40:]


@pytest.mark.parametrize("top", [0, 1, 20])
def test_each_new_token_comes_with_its_log_probability_and_the_likeliest(top):
    first = packet(seed=8, logprobs=top, ignore_eos=True)
    done, scores = answered(first)
    read = torch.tensor([done.tokens])
    exact = torch.log_softmax(MODEL(read)[0].detach() + BIAS, -1)
    assert len(scores) == 40
    begin = len(done.tokens) - 40
    for at, (own, best) in enumerate(scores):
        row = exact[begin + at - 1]
        assert own == pytest.approx(float(row[done.tokens[begin + at]]), abs=1e-4)
        assert [t for t, _ in best] == row.topk(top).indices.tolist()
    assert answered(packet(seed=8, ignore_eos=True))[0].logprobs is None


# -- scores ------------------------------------------------------------------------------------------------------------


def test_scores_of_a_text_are_those_of_whole_forward_passes():
    windows = [[TOKENIZER.eos, *TOKENIZER.encode(text)] for text in TEXTS[:5]]
    for tail in (None, 1, 3):
        for window, found in zip(windows, answerer(slots=2).submit_score(windows, 4, tail).result()):
            exact = torch.log_softmax(MODEL(torch.tensor([window]))[0].detach() + BIAS, -1)
            first = len(window) - (tail or len(window) - 1)
            assert len(found) == len(window) - first
            for at, (own, best) in enumerate(found, first):
                assert own == pytest.approx(float(exact[at - 1, window[at]]), abs=1e-4)
                assert [t for t, _ in best] == exact[at - 1].topk(4).indices.tolist()


def test_a_greedy_text_is_greedy_by_equality():
    done, _ = answered(packet(temperature=0, max_new_tokens=20))
    (found,) = answerer().submit_score([done.tokens], 1, 20).result()
    assert all(own == best[0][1] for own, best in found)


def test_log_probs_are_aligned_at_the_end_and_the_same_whatever_is_read_beside():
    windows = [list(range(20, 20 + n)) for n in (1, 3, 30, 64, 80)]
    one = answerer()
    found = one.submit_log_probs(windows, 5).result()
    assert (found.shape, found.dtype) == ((5, 5, 336), np.float32)
    for window, rows in zip(windows, found):
        assert np.array_equal(answerer().submit_log_probs([window], 5).result()[0], rows)
        exact = torch.log_softmax(MODEL(torch.tensor([window[-64:]]))[0].detach() + BIAS, -1)[-5:].numpy()
        assert np.allclose(np.exp(rows[-len(exact) :]), np.exp(exact), atol=1e-5)
        assert (rows[: -len(exact)] == -np.inf).all()


def test_answers_to_one_prompt_read_it_once():
    one, prompt = answerer(), TOKENIZER.encode(TEXTS[0])[:12]
    one.submit_score([[0, *prompt, a, b] for a, b in ((40, 50), (60, 70), (80, 90))], 0, 2).result()
    first = one.stats()["prompt_tokens"]
    one.submit_score([[0, *prompt, a, b] for a, b in ((41, 51), (61, 71), (81, 91))], 0, 2).result()
    assert one.stats()["prompt_tokens"] - first == 3 * 2


@pytest.mark.parametrize(
    ("window", "tail"), [([5], None), ([], None), ([5, 6], 2), ([5, 6], 0), (list(range(16, 82)), 3)]
)
def test_a_window_that_cannot_be_scored_is_refused(window, tail):
    with pytest.raises(ConfigError, match="window of"):
        answerer().submit_score([window], 0, tail).result()


# -- many at once ------------------------------------------------------------------------------------------------------


def test_submitted_turns_equal_those_taken_alone():
    one = answerer(slots=3)
    packets = [packet("the lazy dog " * n, seed=n, temperature=n % 3 / 2, logprobs=2).encode() for n in range(1, 9)]
    futures = [one.submit(data, 16) for data in packets]
    assert [f.result() for f in futures] == [answerer().submit(data, 16).result() for data in packets]
    done = packet(max_new_tokens=1)
    finished = one.submit(done.encode(), 16).result()
    assert one.submit(finished, 16).result() == finished


def test_a_cancelled_turn_frees_its_slot_and_the_next_one_is_taken():
    one = answerer(slots=1)
    endless = dataclasses.replace(packet(max_new_tokens=10**9, ignore_eos=True), request="gone")
    first, second = one.submit(endless.encode(), 10**9), one.submit(packet().encode(), 16)
    assert first.cancel()
    with pytest.raises(CancelledError):
        first.result()
    assert Packet.decode(second.result()).position > 0
    assert one.submit(endless.encode(), 10**9).cancel()
    assert one.submit(packet().encode(), 16).result() == second.result()


def test_a_packet_that_is_wrong_fails_alone():
    one = answerer()
    with pytest.raises(ArtifactError):
        one.submit(b"no packet", 16)
    bad, good = packet(stop_token_ids=(400,)), packet()
    futures = [one.submit(p.encode(), 16) for p in (bad, good)]
    with pytest.raises(ConfigError, match="token 400"):
        futures[0].result()
    assert futures[1].result()


def test_stats_say_what_the_slots_do():
    one = answerer(slots=2)
    for turn in [one.submit(packet(seed=i).encode(), 16) for i in range(3)]:
        turn.result()
    stats = one.stats()
    assert (stats["slots"], stats["active"], stats["queue"], stats["kept"]) == (2, 0, 0, 2)
    assert 1 < stats["occupancy"] <= 2
