"""The continuous batch and its thread: what a request gets is its own affair, to the bit on a CPU."""

import dataclasses
import gc
import subprocess
import sys
import threading
import weakref
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from constellation.config import Kernel
from constellation.decoding.batch import Batch, Prefill, Writing
from constellation.decoding.compiled import available
from constellation.decoding.decode import decode_naive
from constellation.decoding.engine import Engine
from constellation.decoding.sample import Sampling
from constellation.errors import ConfigError
from tests.cases import lively_kernel

MINI = Kernel(vocab_size=300, width=32, layers=2, heads=2, hidden=40, context=48, coupling_ref=8)
NATIVE = (True, False) if available() else (False,)  # no C compiler
PATHS = {
    f"{precision}, {'C' if native else 'torch'}": {"precision": precision, "native": native}
    for precision in ("fp32", "int8")
    for native in NATIVE
}


def mini(**changes):
    return lively_kernel(dataclasses.replace(MINI, **changes))


MODEL = mini()


def window(length, seed=0):
    return torch.randint(300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def writing(tokens, count=12, room=12, taken=0, **sampling):
    sampling = Sampling(**{"max_new_tokens": 200, "logprobs": 5, **sampling})
    work = Writing(tokens=list(tokens), sampling=sampling, room=room, taken=taken,
                   take=lambda token: work.taken >= taken + count)  # fmt: skip
    return work


def reading(tokens, first=0):
    rows = []
    work = Prefill(tokens=list(tokens), first=first, emit=lambda at, logits: rows.append((at, logits.clone())))
    work.rows = rows
    return work


def drain(batch, *works):
    for work in works:
        batch.add(work)
    while not batch.idle:
        batch.step()
    for work in works:
        work.done.result()
    return works


def sent(engine, work):
    """The future of `work` itself."""
    return engine.submit([work], lambda: work)


def alone(work, **options):
    """The same request, freshly, in a batch of its own: (tokens, scores to the bit)."""
    fresh = dataclasses.replace(
        work, tokens=list(work.tokens), done=type(work.done)(), scored=[], slot=-1, start=0, fed=0
    )
    until, before = work.until, fresh.taken
    fresh.take = lambda token: fresh.taken >= before + until
    drain(Batch(MODEL, **options), fresh)
    return fresh.tokens, fresh.scored


def ask(seed, length, count, **sampling):
    work = writing(window(length, seed), count, room=20, seed=seed, **sampling)
    work.until = count
    return work


requests = st.lists(
    st.tuples(st.integers(0, 5), st.integers(1, 40), st.integers(1, 30), st.integers(0, 12)), min_size=1, max_size=9
)


@pytest.mark.parametrize("path", PATHS)
@given(asked=requests, slots=st.integers(1, 6), chunk=st.sampled_from([1, 5, 16, 64]))
@settings(deadline=None, max_examples=8)
def test_a_request_does_not_depend_on_its_neighbours_its_admission_the_chunks_or_what_was_kept(
    path, asked, slots, chunk
):
    works = [
        ask(seed, n, count, temperature=seed % 3 / 2, presence_penalty=seed % 2 / 2) for seed, n, count, _ in asked
    ]
    expected = [alone(work, **PATHS[path]) for work in works]
    batch = Batch(MODEL, slots=slots, chunk=chunk, **PATHS[path])
    later = sorted(zip([at for *_, at in asked], works), key=lambda pair: pair[0])
    step = 0
    while later or not batch.idle:
        while later and later[0][0] <= step:
            batch.add(later.pop(0)[1])
        batch.step()
        step += 1
    for work, (tokens, scores) in zip(works, expected):
        assert work.tokens == tokens
        assert work.scored == scores  # floats, compared to the bit


@pytest.mark.parametrize("native", NATIVE)
def test_logits_are_the_same_bits_read_in_one_piece_in_many_and_beside_others(native):
    tokens = window(48)
    (whole,) = drain(Batch(MODEL, chunk=64, native=native), reading(tokens))
    (pieces,) = drain(Batch(MODEL, chunk=3, native=native), reading(tokens))
    crowd = drain(
        Batch(MODEL, chunk=48, native=native), reading(window(30, 1)), reading(tokens), writing(window(9, 2))
    )[1]
    batch = Batch(MODEL, native=native)
    drain(batch, writing(tokens[:20]))
    (reused,) = drain(batch, reading(tokens, first=25))
    assert batch.reused == 20
    logits = torch.cat([rows for _, rows in whole.rows])
    for other in (pieces, crowd):
        assert torch.equal(torch.cat([rows for _, rows in other.rows]), logits)
    assert torch.equal(torch.cat([rows for _, rows in reused.rows]), logits[25:])
    torch.testing.assert_close(logits, MODEL(torch.tensor([tokens]))[0].detach(), rtol=1e-4, atol=1e-4)


def test_a_step_over_all_slots_gives_the_same_tokens():
    """What a GPU replays as a graph, without a graph."""
    works = [ask(i, length, count) for i, (length, count) in enumerate(((3, 14), (20, 5), (1, 18), (9, 9)))]
    wanted = [alone(work, native=False)[0] for work in works]
    found = drain(Batch(MODEL, slots=3, chunk=4, wide=True), *works)
    assert [work.tokens for work in found] == wanted


@pytest.mark.gpu
def test_a_graph_gives_the_tokens_of_its_step():
    model = mini().cuda()
    works = [[ask(i, length, 12) for i, length in enumerate((3, 20, 9))] for _ in range(2)]
    plain, graph = (drain(Batch(model, slots=3, wide=wide), *some) for wide, some in zip((False, True), works))
    assert [work.tokens for work in plain] == [work.tokens for work in graph]


def test_a_turn_that_comes_back_is_not_read_again():
    batch, work = Batch(MODEL), writing(window(20), 6, room=6, seed=4)
    drain(batch, work)
    read = batch.fed
    assert read == 19
    again = writing(work.tokens, 6, room=6, taken=6, seed=4)
    drain(batch, again)
    assert batch.fed == read  # its last token alone was new, which a step takes
    assert batch.reused == 25
    whole = decode_naive(MODEL, window(20), Sampling(seed=4, max_new_tokens=12))
    assert again.tokens == [*window(20), *whole]


def test_a_shared_beginning_is_copied_and_both_go_on():
    batch, prefix = Batch(MODEL, slots=3), window(24)
    first, second = (writing([*prefix, *window(5, i)], 8, room=8, seed=i) for i in (1, 2))
    drain(batch, first)
    drain(batch, second)
    assert batch.reused == 24
    assert batch.stats()["kept"] == 2
    for i, work in ((1, first), (2, second)):
        naive = decode_naive(MODEL, [*prefix, *window(5, i)], Sampling(seed=i, max_new_tokens=8))
        assert work.tokens[29:] == naive


def test_the_slot_used_longest_ago_is_given_away():
    batch = Batch(MODEL, slots=2)
    a, b, c = (writing(window(10, i), 3, room=9, seed=i) for i in range(3))
    for work in (a, b, c):
        drain(batch, work)
    before = batch.reused
    drain(batch, writing(b.tokens, 2, room=9))
    assert batch.reused == before + 12  # b is still there
    drain(batch, writing(a.tokens, 2, room=9))
    assert batch.reused == before + 12  # a is not


def test_a_long_prompt_does_not_stall_those_who_write_nor_the_prompts_behind_it():
    model = mini(context=1024)
    batch, written = Batch(model, chunk=32), []
    busy, long, short = writing(window(4), 60, room=100), writing(window(900), 4, room=8), writing(window(20, 1), 4)
    drain_first = [busy]
    for work in drain_first:
        batch.add(work)
    for _ in range(3):
        batch.step()
    batch.add(long)
    batch.add(short)
    while not batch.idle:
        before = busy.taken
        batch.step()
        if not busy.done.done():
            assert busy.taken == before + 1
        written.append((long.taken, short.taken))
    first = {name: next(i for i, pair in enumerate(written) if pair[at]) for at, name in enumerate(("long", "short"))}
    assert first["short"] <= 4
    assert first["long"] >= 900 // 32
    assert long.tokens[900:] == decode_naive(model, window(900), Sampling(max_new_tokens=4))


def test_cancelling_frees_the_slot_for_the_one_who_waits():
    batch = Batch(MODEL, slots=1)
    endless, next_one = writing(window(4), 10**6), writing(window(5), 3)
    batch.add(endless)
    batch.add(next_one)
    for _ in range(5):
        batch.step()
    assert not next_one.done.done()
    assert endless.done.cancel()
    drain(batch)
    assert next_one.done.done() and batch.stats()["active"] == 0


def test_what_is_done_is_freed_without_the_garbage_collector():
    """Else the arrays of a thousand answers wait for it."""
    batch, work = Batch(MODEL, slots=1), reading(window(9))
    kept = weakref.ref(work)
    gc.disable()
    try:
        drain(batch, work)
        del work
        assert kept() is None
    finally:
        gc.enable()


def test_an_error_of_one_request_does_not_hurt_the_others():
    def refuse(token):
        raise ValueError("mine alone")

    batch = Batch(MODEL)
    good, bad, impossible = writing(window(7), 9), writing(window(8), 9), writing([1, 2, 300])
    bias, bad.take = writing(window(3), 9, logit_bias=((300, 1.0),)), refuse
    for work in (bad, impossible, good, bias):
        batch.add(work)
    drain(batch)
    with pytest.raises(ValueError, match="mine alone"):
        bad.done.result()
    for work in (impossible, bias):
        with pytest.raises(ConfigError, match="token 300 is not in the vocabulary"):
            work.done.result()
    assert good.tokens == [*window(7), *decode_naive(MODEL, window(7), Sampling(max_new_tokens=9))]


def test_scores_are_those_of_the_whole_window_and_chosen_among_the_likeliest_by_equality():
    work = writing(window(10), 15, temperature=0, logprobs=3, repetition_penalty=1.5)
    drain(Batch(MODEL), work)
    whole = torch.log_softmax(MODEL(torch.tensor([work.tokens]))[0].detach(), -1)
    for at, (own, top) in enumerate(work.scored):
        row = whole[9 + at]
        assert own == pytest.approx(float(row[work.tokens[10 + at]]), abs=1e-4)
        assert [t for t, _ in top] == row.topk(3).indices.tolist()
    plain = writing(window(10), 15, temperature=0, logprobs=3)
    drain(Batch(MODEL), plain)
    assert all(own == top[0][1] and token == top[0][0] for (own, top), token in zip(plain.scored, plain.tokens[10:]))


# -- the thread --------------------------------------------------------------------------------------------------------


def test_many_threads_submit_at_once_and_each_gets_its_own():
    engine, found = Engine(Batch(MODEL, slots=4)), {}

    def client(i):
        work = ask(i, 5 + i, 6 + i % 5)
        found[i] = (work, sent(engine, work).result())

    threads = [threading.Thread(target=client, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, (work, result) in found.items():
        assert result is work
        assert (work.tokens, work.scored) == alone(ask(i, 5 + i, 6 + i % 5))
    assert engine.stats()["tokens"] == sum(6 + i % 5 for i in range(12))


class Held:
    """An engine of one slot whose thread is inside a step until `release()`."""

    def __init__(self):
        self.engine, self.inside, self.may_go = Engine(Batch(MODEL, slots=1)), threading.Event(), threading.Event()
        self.first = sent(self.engine, Prefill(tokens=window(4), first=3, emit=self.hold))
        self.inside.wait()

    def hold(self, at, logits):
        self.inside.set()
        self.may_go.wait()

    def release(self):
        self.may_go.set()
        self.first.result()


def test_several_works_are_one_future_and_nothing_of_it_is_done_once_it_is_cancelled():
    held = Held()
    many = [writing(window(4), 10**9), *(reading(window(9, n)) for n in range(20))]
    future = held.engine.submit(many, lambda: "never made")
    after = sent(held.engine, reading(window(5)))
    assert future.cancel()
    held.release()
    after.result()
    with pytest.raises(CancelledError):
        future.result()
    stats = held.engine.stats()
    assert (stats["tokens"], stats["prompt_tokens"], stats["queue"]) == (0, 4 + 5, 0)


def test_several_works_are_done_together_and_fail_with_the_first_error_when_all_have_ended():
    engine, works = Engine(Batch(MODEL, slots=2)), [reading(window(n)) for n in (3, 5, 7)]
    assert engine.submit(works, lambda: [len(work.rows) for work in works]).result() == [1, 1, 1]
    assert engine.submit([], lambda: "nothing to wait for").result() == "nothing to wait for"
    good = reading(window(6))
    failing = engine.submit([reading([1, 300]), good], lambda: "never made")
    with pytest.raises(ConfigError, match="token 300"):
        failing.result()
    assert good.done.done() and good.rows


def test_what_several_works_held_is_freed_with_them():
    engine, works = Engine(Batch(MODEL, slots=2)), [reading(window(n)) for n in (3, 5)]
    kept = [weakref.ref(work) for work in works]
    gc.disable()
    try:
        future = engine.submit(works, lambda made=works: len(made))
        del works
        assert future.result() == 2
        sent(engine, reading(window(4))).result()  # the thread has left the step in which they ended
        assert [one() for one in kept] == [None, None]
    finally:
        gc.enable()


def test_a_failure_of_the_device_reaches_those_who_wait_and_the_engine_goes_on():
    engine = Engine(Batch(MODEL, slots=2))
    forward, broken = engine.batch.slots.forward, iter([True])

    def fails_once(*rows):
        if next(broken, False):
            raise RuntimeError("out of memory")
        return forward(*rows)

    engine.batch.slots.forward = fails_once
    with pytest.raises(RuntimeError, match="out of memory"):
        sent(engine, writing(window(5), 3)).result()
    assert sent(engine, writing(window(5), 3)).result().taken == 3


def test_a_process_ends_cleanly_in_the_middle_of_work():
    program = """
import torch
from tests.test_engine import Batch, Engine, MODEL, sent, window, writing
future = sent(Engine(Batch(MODEL)), writing(window(4), 10**9))
future.add_done_callback(lambda f: print(f.exception()))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert (done.returncode, done.stdout) == (0, "the process ends: ask again elsewhere\n"), done.stderr


@pytest.mark.gpu
def test_a_gpu_writes_what_whole_forward_passes_write():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = mini().cuda()
    works = [writing(window(n, n), 12, temperature=0) for n in (3, 9, 17)]
    drain(Batch(model), *works)
    for n, work in zip((3, 9, 17), works):
        assert work.tokens[n:] == decode_naive(model, window(n, n), Sampling(temperature=0, max_new_tokens=12))
