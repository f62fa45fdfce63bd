"""Continuous batching: which rows of which requests the next forward pass holds.

A request is given a slot (slots.py) when one is free. Each `step` is one forward pass of

    one row of every request whose window is read but for its last token, which gives its next logits, and
    at most `chunk` rows (by default what takes about ten milliseconds) of windows that are still being read, shared
    out evenly and in turn,

so a long prompt neither stalls those who write nor the prompts behind it, and rows leave as soon as they are done.
A slot keeps its keys and values afterwards: a request whose window begins with the same tokens goes on behind them, in
the same slot when it extends all of them, else in a copy. The slot used longest ago is given away first.

Law: what a request gets does not depend on its neighbours, on when it came, on `chunk`, or on what was kept, on a CPU
to the bit. One thread may use a `Batch` (engine.py gives it one).
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from constellation.decoding.basins import Basins, check
from constellation.decoding.compiled import available
from constellation.decoding.graph import Graph, Wide
from constellation.decoding.native import NativeSlots, Panels, Panels8, draw, suits
from constellation.decoding.packed import Packed
from constellation.decoding.sample import RECORD, RowSettings, Sampling, TokenScore, penalised, sample, scored
from constellation.decoding.slots import BLOCK, Run, Slots
from constellation.errors import ConfigError, RunError
from constellation.kernel.model import KernelLM, multiplications

WORTH_A_COPY = 4  # tokens: fewer are read anew in less time than their keys and values are copied
PIECE_WORK = 400_000_000  # multiply-adds of a pass that reads: about ten milliseconds of one core


@dataclasses.dataclass(eq=False, kw_only=True)
class Work:
    """A request in the engine, of either kind below. `done` ends with it or its error; to cancel it frees the slot.

    `done` does not point back, so what a request holds is freed with it and waits for no garbage collector.
    """

    tokens: list[int]  # the last ones of which are the window
    done: Future[None] = dataclasses.field(default_factory=Future)
    slot: int = -1
    start: int = 0  # of the window in `tokens`
    fed: int = 0  # tokens of the window whose keys and values are held

    @property
    def window(self) -> int:
        """Tokens of the window."""
        return len(self.tokens) - self.start


@dataclasses.dataclass(eq=False, kw_only=True)
class Writing(Work):
    """Sample token after token until `take(token)` says that it is done.

    A window that would outgrow the context begins `room` tokens later, as often as it takes, and is read anew: where
    it begins follows from the number of tokens, however many turns they were written in, and it never slides in
    between. `room = 1` is the sliding window of `decode_naive`.
    """

    sampling: Sampling
    room: int
    take: Callable[[int], bool]
    taken: int = 0  # tokens sampled so far, here or elsewhere: the counter of the random numbers
    scored: list[TokenScore] = dataclasses.field(default_factory=list)  # of the tokens sampled here, if asked for


@dataclasses.dataclass(eq=False, kw_only=True)
class Prefill(Work):
    """Hand the logits (M, V) of some rows to `emit(first, logits)`, for all positions from `first` on, in order."""

    first: int
    emit: Callable[[int, Tensor], None]


class Batch:
    """The requests of one model under way at once, at most `slots`; others wait in order."""

    def __init__(
        self, model: KernelLM, *, slots: int = 32, chunk: int | None = None, precision: str = "fp32",
        bias_V: Tensor | None = None, ends: Sequence[int] = (), wide: bool | None = None, native: bool | None = None,
        basins: Basins | None = None,
    ):  # fmt: skip
        if chunk is None:
            chunk = min(max(PIECE_WORK // multiplications(model.config), 64), 512)
        if slots < 1 or chunk < 1:
            raise ConfigError(f"slots={slots}, chunk={chunk}: both must be at least 1")
        on_gpu = model.embedding.weight.device.type == "cuda"
        wide = on_gpu if wide is None else wide
        if native is None:
            native = not wide and suits(model) and available()
        product = {"fp32": Panels, "int8": Panels8}.get(precision) if native else None
        self.packed = Packed(model, precision, bias_V, product)
        self.slots = NativeSlots(self.packed, slots) if native else Slots(self.packed, slots, spare=wide)
        self.chunk, self.ends, self.basins = chunk, tuple(ends), basins
        with torch.inference_mode():
            self._wide = (Graph if on_gpu else Wide)(self.slots) if wide else None
        self.context = self.packed.context
        self._waiting: deque[Work] = deque()
        self._reading: deque[Work] = deque()  # windows being read
        self._writing: list[Writing] = []  # read but for the last token, by slot
        self._owner: list[Work | None] = [None] * slots
        self._held = np.zeros((slots, self.context), np.int32)  # tokens whose keys and values a slot holds
        self._length = np.zeros(slots, np.int64)  # how many
        self._used = np.zeros(slots, np.int64)  # when last
        # the next row of the request that writes in each slot: token, token before, position, slot
        self._next_4S = np.zeros((4, slots), np.int64)
        self._next_4S[3] = np.arange(slots)
        self._at: NDArray[np.int64] | None = None  # slots of those who write; None: to be found anew
        self._records = np.zeros(slots, RECORD)  # how each who writes draws
        self._left = False  # somebody's future was cancelled
        self._settings: tuple[list[Writing], RowSettings] | None = None
        self._seen_SV: Tensor | None = None
        self._counts_SV: Tensor | None = None
        self.steps = self.sampled = self.fed = self.reused = 0

    # -- coming and going ----------------------------------------------------------------------------------------------

    def add(self, work: Work) -> None:
        """Queue a request; one that is impossible gets its error at once."""
        try:
            self._check(work)
        except ConfigError as error:
            _fail(work, error)
        else:
            self._waiting.append(work)
            work.done.add_done_callback(self._note)

    def _note(self, done: Future[Any]) -> None:
        if done.cancelled():
            self._left = True

    def _check(self, work: Work) -> None:
        if not work.tokens:
            raise ConfigError("a window needs at least one token")
        outside = [t for t in work.tokens if not 0 <= t < self.packed.vocabulary]
        if isinstance(work, Writing):
            check(work.sampling, self.basins)
            if not 1 <= work.room <= self.context:
                raise ConfigError(f"room={work.room}: 1 to {self.context} tokens fit a context of {self.context}")
            chosen = [t for t, _ in work.sampling.logit_bias] + list(work.sampling.stop_token_ids)
            outside += [t for t in chosen if t >= self.packed.vocabulary]
        elif len(work.tokens) > self.context:
            raise ConfigError(f"a window of {len(work.tokens)} tokens: a context of {self.context} holds no more")
        if outside:
            raise ConfigError(f"token {outside[0]} is not in the vocabulary, 0..{self.packed.vocabulary - 1}")

    def fail(self, error: BaseException) -> None:
        """Everything under way gets `error`; what the slots hold is forgotten."""
        for work in [w for w in (*self._waiting, *self._owner) if w is not None]:
            self._leave(work)
            _fail(work, error)
        self.forget()

    def forget(self) -> None:
        """Keep nothing of what the free slots hold."""
        self._length[[owner is None for owner in self._owner]] = 0

    @property
    def idle(self) -> bool:
        return not (self._waiting or self._reading or self._writing)

    def stats(self) -> dict[str, Any]:
        active = len(self._reading) + len(self._writing)
        return {
            "slots": self.slots.count,
            "active": active,
            "kept": int((self._length > 0).sum()) - active,
            "queue": len(self._waiting),
            "steps": self.steps,
            "tokens": self.sampled,
            "prompt_tokens": self.fed,
            "reused_tokens": self.reused,
            "occupancy": self.sampled / self.steps if self.steps else 0.0,
            "native": isinstance(self.slots, NativeSlots),
        }

    def _admit(self) -> None:
        if self._left:
            self._left = False
            for work in [w for w in (*self._waiting, *self._owner) if w is not None and w.done.cancelled()]:
                self._leave(work)
        while self._waiting and None in self._owner:
            work = self._waiting.popleft()
            if isinstance(work, Writing):
                work.start = slid(len(work.tokens), self.context, work.room)
            work.slot, work.fed = self._place(work)
            self.reused += work.fed
            self._owner[work.slot] = work
            self._length[work.slot] = work.fed
            self._begin(work)

    def _place(self, work: Work) -> tuple[int, int]:
        """The slot for a request and how many tokens of its window are held there."""
        most = work.first if isinstance(work, Prefill) else work.window - 1
        same = self._held[:, :most] == np.array(work.tokens[work.start : work.start + most], np.int32)
        shared = np.minimum(np.where(same.all(1), most, same.argmin(1)) if most else 0, self._length)
        free = np.array([owner is None for owner in self._owner])
        best = int(shared.argmax())
        whole = free & (shared == shared[best]) & (self._length == shared)  # of them the window begins with all
        if shared[best] and whole.any():
            return int(whole.argmax()), int(shared[best])
        age = np.where(self._length > 0, self._used, -1)
        slot = int(np.where(free, age, np.iinfo(np.int64).max).argmin())
        if slot != best:
            if shared[best] < WORTH_A_COPY:
                return slot, 0
            self.slots.copy(best, slot, int(shared[best]))
            self._held[slot, : shared[best]] = self._held[best, : shared[best]]
        return slot, int(shared[best])

    def _begin(self, work: Work) -> None:
        """Read the window of `work` from where it is held."""
        if isinstance(work, Writing):
            self._mark(work)
            if work.fed == work.window - 1:
                self._write_from_here(work)
                return
        self._reading.append(work)

    def _write_from_here(self, work: Writing) -> None:
        """The window is read but for its last token."""
        self._writing.append(work)
        self._writing.sort(key=lambda w: w.slot)
        self._at = None
        before = work.tokens[-2] if work.fed else self.packed.vocabulary
        self._next_4S[:3, work.slot] = work.tokens[-1], before, work.fed
        self._records[work.slot] = work.sampling.record

    def _leave(self, work: Work) -> None:
        for group in (self._waiting, self._reading, self._writing):
            if work in group:
                group.remove(work)  # type: ignore[arg-type]
                self._at = None
        if work.slot >= 0 and self._owner[work.slot] is work:
            self._owner[work.slot] = None
            self._used[work.slot] = self.steps

    def _finish(self, work: Work) -> None:
        self._leave(work)
        if work.done.set_running_or_notify_cancel():
            work.done.set_result(None)

    # -- a step --------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One forward pass, and what follows from it."""
        kind = self.packed.device.type
        if torch.is_inference_mode_enabled() and not torch.is_autocast_enabled(kind):  # in an engine's thread
            self._step()
            return
        with torch.inference_mode(), torch.autocast(kind, enabled=False):
            self._step()

    def _step(self) -> None:
        self._admit()
        writing = list(self._writing)
        reading = self._pieces() if self._reading else []
        if not writing and not reading:
            return
        self.steps += 1
        logits_NV, at = None, len(writing)
        if writing and self._wide is not None:
            logits_NV, at = self._step_wide(writing, self._wide), 0
        x_ND = self._forward(writing[:at], reading) if at or reading else torch.empty(0)
        for work, position, count in reading:
            self._read(work, position, x_ND[at : at + count])
            at += count
        if writing:
            self._write(writing, self.slots.logits(x_ND[: len(writing)]) if logits_NV is None else logits_NV)

    def _step_wide(self, writing: Sequence[Writing], wide: Wide) -> Tensor:
        """The same by a pass over all slots, which a GPU replays as one graph."""
        tokens, before, at, slots = self._next_rows(writing).tolist()
        return wide(tokens, before, at, slots)

    def _next_rows(self, writing: Sequence[Writing]) -> NDArray[np.int64]:
        """The rows (4, N) of those who write, which are noted as held."""
        if self._at is None:
            self._at = np.array([w.slot for w in writing], np.int64)
        at = self._at
        rows_4N = self._next_4S[:, at]
        self._held[at, rows_4N[2]] = rows_4N[0]
        self._length[at] = rows_4N[2] + 1
        for work in writing:
            work.fed += 1
        return rows_4N

    def _pieces(self) -> list[tuple[Work, int, int]]:
        """(request, position, rows) of the windows that are read in this step."""
        found: list[tuple[Work, int, int]] = []
        left, share = self.chunk, max(BLOCK, -(-self.chunk // max(1, len(self._reading))))
        for work in list(self._reading):
            count = min(share, left, self._until(work) - work.fed)
            if count > 0:
                found.append((work, work.fed, count))
                left -= count
        if left == 0:
            self._reading.rotate(-len(found))
        return found

    def _until(self, work: Work) -> int:
        """Tokens of the window that are read before the first step; a request that writes steps with the last one."""
        return work.window - isinstance(work, Writing)

    def _forward(self, writing: Sequence[Writing], reading: Sequence[tuple[Work, int, int]]) -> Tensor:
        """The last layer's output of a row of each who writes and of the pieces that are read."""
        rows = self._next_rows(writing) if writing else np.empty((4, 0), np.int64)
        if reading:
            rows = np.concatenate((rows, *(self._piece_rows(*piece) for piece in reading)), axis=1)
        runs = [] if isinstance(self.slots, NativeSlots) else self._runs(rows[:, : len(writing)], reading)
        return self.slots.forward(torch.from_numpy(rows), runs)

    def _piece_rows(self, work: Work, position: int, count: int) -> NDArray[np.int64]:
        """The rows (4, count) of a piece of a window, which are noted as held."""
        at = work.start + position
        rows = np.empty((4, count), np.int64)
        rows[0] = work.tokens[at : at + count]
        rows[1, 0] = work.tokens[at - 1] if position else self.packed.vocabulary
        rows[1, 1:] = rows[0, :-1]
        rows[2] = np.arange(position, position + count)
        rows[3] = work.slot
        self._held[work.slot, position : position + count] = rows[0]
        self._length[work.slot] = work.fed = position + count
        return rows

    def _runs(self, rows_4N: NDArray[np.int64], reading: Sequence[tuple[Work, int, int]]) -> list[Run]:
        """How torch's operations see them: neighbours that write make one run, a piece is one."""
        runs: list[Run] = []
        for i, (position, slot) in enumerate(rows_4N[2:].T.tolist()):
            last, columns = runs[-1] if runs else None, self._columns(position + 1)
            if last and last.slot + last.count == slot:
                runs[-1] = Run(last.first, last.count + 1, last.slot, True, max(last.columns, columns))
            else:
                runs.append(Run(i, 1, slot, True, columns))
        first = rows_4N.shape[1]
        for work, position, count in reading:
            runs.append(Run(first, count, work.slot, False, self._columns(position + count)))
            first += count
        return runs

    def _columns(self, length: int) -> int:
        return -(-length // BLOCK) * BLOCK

    def _read(self, work: Work, position: int, x_ND: Tensor) -> None:
        self.fed += len(x_ND)
        if isinstance(work, Prefill) and position + len(x_ND) > work.first:
            wanted = max(position, work.first)
            try:
                work.emit(wanted, self.slots.logits(x_ND[wanted - position :]))
            except Exception as error:
                self._leave(work)
                _fail(work, error)
                return
        if work.fed == self._until(work):
            self._reading.remove(work)
            if isinstance(work, Writing):
                self._write_from_here(work)
            else:
                self._finish(work)

    def _write(self, writing: list[Writing], logits_NV: Tensor) -> None:
        tokens = self._sample(writing, logits_NV)
        at = [w.slot for w in writing]
        self._add_marks(at, tokens)
        self._next_4S[1, at] = self._next_4S[0, at]
        self._next_4S[0, at] = tokens
        self._next_4S[2, at] += 1
        log_p_NV = None
        if any(w.sampling.logprobs is not None for w in writing):
            log_p_NV = torch.log_softmax(logits_NV, -1)
        for i, (work, token) in enumerate(zip(writing, tokens, strict=True)):
            if token < 0:
                self._leave(work)
                self._length[work.slot] = 0
                _fail(work, RunError("a kernel's logits are not finite: its training diverged; lower optim.lr "
                                     "and train anew"))  # fmt: skip
                continue
            if work.sampling.logprobs is not None and log_p_NV is not None:
                work.scored += scored(log_p_NV[i : i + 1], [token], work.sampling.logprobs)
            work.tokens.append(token)
            work.taken += 1
            self.sampled += 1
            try:
                done = work.take(token)
            except Exception as error:
                self._leave(work)
                _fail(work, error)
                continue
            if done:
                self._finish(work)
            elif work.window > self.context:
                self._slide(work)

    def _slide(self, work: Writing) -> None:
        """Give the request room again."""
        work.start, work.fed = slid(len(work.tokens), self.context, work.room), 0
        self._length[work.slot] = 0
        self._writing.remove(work)
        self._at = None
        self._begin(work)

    # -- sampling ------------------------------------------------------------------------------------------------------

    def _sample(self, writing: list[Writing], logits_NV: Tensor) -> list[int]:
        """The next token of each, -1 where the logits are not finite."""
        slots, taken = [w.slot for w in writing], [w.taken for w in writing]
        native = isinstance(self.slots, NativeSlots)
        if native and not any(w.sampling.penalised for w in writing):
            return draw(logits_NV, self._records[slots], taken)
        if self._settings is None or self._settings[0] != writing:
            self._settings = (writing, RowSettings([w.sampling for w in writing], self.packed.device, self.ends))
        settings = self._settings[1]
        seen_NV = self._seen_SV[slots] if settings.penalised and self._seen_SV is not None else None
        counts_NV = self._counts_SV[slots] if settings.counted and self._counts_SV is not None else None
        terms_NV = self._terms(writing, logits_NV)
        if native:
            told = penalised(logits_NV, settings, np.array(taken), seen_NV, counts_NV, terms_NV)
            return draw(told, settings.records, taken)
        finite_N = logits_NV.amax(-1).isfinite()  # -inf must not come; the largest is no such
        tokens_N = sample(logits_NV.where(finite_N[:, None], 0.0), settings, taken, seen_NV, counts_NV, terms_NV)
        chosen: list[int] = tokens_N.where(finite_N, -1).tolist()
        return chosen

    def _terms(self, writing: list[Writing], logits_NV: Tensor) -> Tensor | None:
        """What basins add to the logits of those who ask for it; None where nobody does."""
        if self.basins is None or not any(w.sampling.geometric for w in writing):
            return None
        size = logits_NV.shape[1]
        return torch.stack([self.basins.terms(w.tokens, w.sampling, size) for w in writing]).to(logits_NV)

    def _mark(self, work: Writing) -> None:
        """Which tokens the window holds, and how often each was generated, if the request has a penalty on them."""
        shape, device = (self.slots.count, self.packed.vocabulary), self.packed.device
        if work.sampling.repetition_penalty != 1:
            if self._seen_SV is None:
                self._seen_SV = torch.zeros(shape, dtype=torch.bool, device=device)
            self._seen_SV[work.slot] = False
            self._seen_SV[work.slot, work.tokens[work.start :]] = True
        if work.sampling.counted:
            if self._counts_SV is None:
                self._counts_SV = torch.zeros(shape, device=device)
            generated = torch.tensor(work.tokens[-work.taken :] if work.taken else [], dtype=torch.int64, device=device)
            self._counts_SV[work.slot] = torch.bincount(generated, minlength=shape[1])

    def _add_marks(self, slots: list[int], tokens: list[int]) -> None:
        if self._seen_SV is not None:
            self._seen_SV[slots, tokens] = True
        if self._counts_SV is not None:
            self._counts_SV[slots, tokens] += 1


def slid(length: int, context: int, room: int) -> int:
    """Where the window of `length` tokens begins: the first multiple of `room` with at most `context` behind it."""
    return max(0, -(-(length - context) // room) * room)


def _fail(work: Work, error: BaseException) -> None:
    if work.done.set_running_or_notify_cancel():
        work.done.set_exception(error)
