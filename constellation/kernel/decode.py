"""Decoding with a static KV cache, batched over requests of different lengths.

`prefill` reads the windows of B requests at once, padded on the right, and keeps their keys and
values; `step` then adds one token to every row. Row b's token t lies in column t of its row, so a
row's numbers depend on its own tokens alone. Shapes as in model.py; C columns of the cache.

Everything is fp32: a bf16 product is slower than an fp32 one on most CPUs, and kernels that stand in
for one another must agree. Two roundings would let a neighbour in the batch, or the moment of the
prefill, change the last bits of a row; on a CPU both are taken out:

- a matrix product of 1 to 3 rows rounds otherwise than one of 4 and more (MKL), so a step takes at
  least 4 rows, empty ones added, and attention takes its one query four times;
- a sum over the columns is split by their number, so columns come in blocks, the unused ones masked.

Where measured (AMD EPYC, AVX-512, MKL 2024.2, one thread, up to EXPLICIT_UP_TO columns) logits are then
bit-identical alone and in any batch, by a step and by a whole forward pass; the laws of the tests
ask only for equal tokens. `decode_naive`, a whole forward pass for every token, is the oracle.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from constellation.errors import ConfigError, RunError
from constellation.kernel.model import EXPLICIT_UP_TO, KernelLM, Rows, attend, inverse_temperature
from constellation.kernel.sample import Sampling, Settings, sample

BLOCK = 16  # columns are counted in blocks: one AVX-512 vector of float32
MIN_ROWS = 4  # of a matrix product whose rows round alike


@dataclasses.dataclass
class Cache:
    """Keys and values of `rows` requests, the longest of which holds `longest` tokens.

    There are R >= rows rows; those beyond `rows` are empty ones.
    """

    keys: list[Tensor]  # one (R, H, C, K) per layer
    values: list[Tensor]
    length_R: Tensor  # (R,) int64, tokens held
    last_R: Tensor  # (R,) int64, the newest of them
    mask_RHC: Tensor  # 0 where a token is held, else -inf; the same for every head
    coupling_C: Tensor
    rows: int
    longest: int

    def keep(self, rows: Sequence[int]) -> Cache:
        """The given rows alone, in the given order."""
        empty = max(0, min(MIN_ROWS, len(self.length_R)) - len(rows))
        index = torch.tensor([*rows, *[rows[0]] * empty], device=self.length_R.device)
        return dataclasses.replace(
            self,
            keys=[k[index] for k in self.keys],
            values=[v[index] for v in self.values],
            length_R=self.length_R[index],
            last_R=self.last_R[index],
            mask_RHC=self.mask_RHC[index],
            rows=len(rows),
        )


class Decoder:
    """The decoding side of a model; holds nothing but it, so its weights may change between turns."""

    def __init__(self, model: KernelLM):
        self.model = model
        self.device = model.embedding.weight.device
        self.context = model.config.context
        self.min_rows = MIN_ROWS if self.device.type == "cpu" else 1

    @torch.inference_mode()
    def prefill(self, windows: Sequence[Sequence[int]], room: int) -> tuple[Cache, Tensor]:
        """A cache that holds the windows with room for `room` more tokens each, and the next logits (B, V).

        Every window needs at least one token and at most context - room.
        """
        model, lengths = self.model, [len(w) for w in windows]
        if not lengths or min(lengths) < 1 or max(lengths) + room > self.context:
            raise ConfigError(
                f"windows of {min(lengths, default=0)} to {max(lengths, default=0)} tokens and room for {room}: "
                f"1 to {self.context - room} fit a context of {self.context}"
            )
        batch, length = len(windows), min(_blocks(max(lengths)), self.context)
        tokens_BT = torch.tensor([[*w, *[0] * (length - len(w))] for w in windows], device=self.device)
        cache = self._empty(windows, min(_blocks(max(lengths) + room), _blocks(self.context)))
        with torch.autocast(self.device.type, enabled=False):
            rows = model.rows(length)
            x = model.embed(tokens_BT)
            for block, keys, values in zip(model.blocks, cache.keys, cache.values):
                x = block(x, rows, functools.partial(_fill, keys, values))
            last = x.new_zeros(len(cache.length_R), x.shape[-1])
            last[:batch] = x[torch.arange(batch), cache.length_R[:batch] - 1]
            return cache, model.logits(model.norm(last))[:batch]

    def _empty(self, windows: Sequence[Sequence[int]], columns: int) -> Cache:
        lengths = [len(w) for w in windows]
        config, rows = self.model.config, max(len(lengths), self.min_rows)
        shape = (rows, config.heads, columns, config.width // config.heads)
        length_R = torch.tensor(lengths + [0] * (rows - len(lengths)), device=self.device)
        held_RC = torch.arange(columns, device=self.device) < length_R[:, None]
        return Cache(
            keys=[torch.zeros(shape, device=self.device) for _ in range(config.layers)],
            values=[torch.zeros(shape, device=self.device) for _ in range(config.layers)],
            length_R=length_R,
            last_R=torch.tensor([w[-1] for w in windows] + [0] * (rows - len(windows)), device=self.device),
            mask_RHC=torch.where(held_RC, 0.0, float("-inf"))[:, None].repeat(1, config.heads, 1),
            coupling_C=inverse_temperature(self.model.visible, self.model.beta, config.coupling_ref),
            rows=len(lengths),
            longest=max(lengths),
        )

    @torch.inference_mode()
    def step(self, cache: Cache, tokens_B: Tensor) -> Tensor:
        """The logits (B, V) after one more token in every row; the cache is changed in place."""
        model, position_R = self.model, cache.length_R
        if len(position_R) > cache.rows:
            tokens_B = F.pad(tokens_B, (0, len(position_R) - cache.rows))
        at_RH11 = position_R[:, None, None, None].expand(-1, model.config.heads, 1, 1)
        at_R11 = at_RH11[:, 0]
        rows = Rows(model.cos[at_R11], model.sin[at_R11], cache.coupling_C[at_R11, None])
        cache.mask_RHC.scatter_(2, at_RH11[..., 0], 0.0)
        cache.length_R = position_R + 1
        cache.longest += 1
        mask_RHC = cache.mask_RHC[:, :, : _blocks(cache.longest)]
        with torch.autocast(self.device.type, enabled=False):
            x = model.embed(tokens_B[:, None], cache.last_R[:, None])
            cache.last_R = tokens_B
            for block, keys, values in zip(model.blocks, cache.keys, cache.values):
                x = block(x, rows, functools.partial(_extend, keys, values, at_RH11, mask_RHC))
            return model.logits(model.norm(x[:, 0]))[: cache.rows]


def _fill(keys: Tensor, values: Tensor, q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of whole windows, whose keys and values are kept."""
    batch, _, length, _ = k_BHTK.shape
    keys[:batch, :, :length], values[:batch, :, :length] = k_BHTK, v_BHTK
    return attend(q_BHTK, k_BHTK, v_BHTK, mask)


def _extend(
    keys_RHCK: Tensor, values_RHCK: Tensor, at_RH11: Tensor, mask_RHC: Tensor, q: Tensor, k: Tensor, v: Tensor, _: None
) -> Tensor:
    """Attention of one token a row, q, k and v (R, H, 1, K), to all that is kept and to itself."""
    keys_RHCK.scatter_(2, at_RH11.expand_as(k), k)
    values_RHCK.scatter_(2, at_RH11.expand_as(v), v)
    columns = mask_RHC.shape[2]
    keys, values = keys_RHCK[:, :, :columns], values_RHCK[:, :, :columns]
    if q.device.type != "cpu" or columns > EXPLICIT_UP_TO:
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask_RHC[:, :, None], scale=1.0)
    # the products of `attend`, of four equal rows; not baddbmm, which loops over small matrices
    four, keys, values = q.repeat(1, 1, MIN_ROWS, 1).flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1)
    logits = torch.bmm(four, keys.transpose(1, 2)).add_(mask_RHC.flatten(0, 1)[:, None])
    return torch.bmm(torch.softmax(logits, -1), values)[:, :1].unflatten(0, q.shape[:2])


def _blocks(columns: int) -> int:
    return -(-columns // BLOCK) * BLOCK


@dataclasses.dataclass
class Decoding:
    """One request being decoded: `tokens` and `taken` grow."""

    tokens: list[int]  # the prompt, at least one token, and what follows it
    sampling: Sampling
    taken: int = 0  # tokens sampled so far, here or elsewhere: the counter of the random numbers


def decode(
    decoder: Decoder,
    requests: Sequence[Decoding],
    room: int,
    take: Callable[[int, int], bool],
    bias_V: Tensor | None = None,
) -> None:
    """Sample token after token for every request until `take(request, token)` says that it is done.

    Every `room` tokens the windows are cut to the last context - room + 1 tokens and read anew, so a
    window never slides in between, and `room = 1` is the sliding window of `decode_naive`. `bias_V` is
    added to all logits: -inf for tokens that must not come. Rows that are done leave the batch when
    they are half of it.
    """
    open_rows = list(range(len(requests)))
    while open_rows:
        rows = list(open_rows)
        windows = [requests[i].tokens[-(decoder.context - room + 1) :] for i in rows]
        cache, logits_BV = decoder.prefill(windows, room - 1)
        if not bool(torch.isfinite(logits_BV).all()):
            raise RunError("a kernel's logits are not finite: its training diverged; lower optim.lr and train anew")
        settings = Settings([requests[i].sampling for i in rows], decoder.device)
        seen_BV = _seen(windows, logits_BV) if settings.penalised else None
        for left in reversed(range(room)):
            if bias_V is not None:
                logits_BV = logits_BV + bias_V
            tokens_B = sample(logits_BV, settings, [requests[i].taken for i in rows], seen_BV)
            for i, token in zip(rows, tokens_B.tolist()):
                if i in open_rows:
                    requests[i].tokens.append(token)
                    requests[i].taken += 1
                    if take(i, token):
                        open_rows.remove(i)
            if not open_rows or not left:
                break
            if seen_BV is not None:
                seen_BV.scatter_(1, tokens_B[:, None], True)
            if 2 * len(open_rows) <= len(rows):
                kept = [at for at, i in enumerate(rows) if i in open_rows]
                rows, cache, tokens_B = list(open_rows), cache.keep(kept), tokens_B[kept]
                settings = Settings([requests[i].sampling for i in rows], decoder.device)
                seen_BV = None if seen_BV is None else seen_BV[kept]
            logits_BV = decoder.step(cache, tokens_B)


def generate(model: KernelLM, windows: Sequence[Sequence[int]], samplings: Sequence[Sampling]) -> list[list[int]]:
    """`max_new_tokens` tokens after each window, whatever they are: no end of text, no stop."""
    requests = [Decoding(list(w), s) for w, s in zip(windows, samplings, strict=True)]
    longest = max(s.max_new_tokens for s in samplings)
    room = min(longest, max(1, model.config.context // 2))
    decode(Decoder(model), requests, room, lambda i, token: requests[i].taken == samplings[i].max_new_tokens)
    return [request.tokens[len(w) :] for request, w in zip(requests, windows)]


def _seen(windows: Sequence[Sequence[int]], logits_BV: Tensor) -> Tensor:
    """Which tokens each window holds, (B, V) bool."""
    seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
    row = torch.repeat_interleave(torch.arange(len(windows)), torch.tensor([len(w) for w in windows]))
    seen_BV[row.to(seen_BV.device), torch.tensor([t for w in windows for t in w], device=seen_BV.device)] = True
    return seen_BV


@torch.inference_mode()
def decode_naive(model: KernelLM, window: Sequence[int], sampling: Sampling, taken: int = 0) -> list[int]:
    """`max_new_tokens` tokens after `window`, each from a whole forward pass over the last `context`: the oracle."""
    tokens, settings = list(window), Settings([sampling], model.embedding.weight.device)
    for position in range(taken, taken + sampling.max_new_tokens):
        read = tokens[-model.config.context :]
        logits = model(torch.tensor([read], device=model.embedding.weight.device))[:, -1]
        tokens.append(int(sample(logits, settings, [position], _seen([read], logits))))
    return tokens[len(window) :]
