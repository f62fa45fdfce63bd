"""One turn of one kernel: packets in, the same packets some bytes of text further out.

A turn has no memory. The kernel reads the token window of each packet anew and decodes until a
packet has `budget_bytes` new bytes, a stop text, the end of the text or its last token. So a turn may
be repeated, a packet may be answered by any process that holds the same weights, and a request that
goes to another kernel and comes back continues as if it had never left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from constellation.coordizer.tokenizer import Tokenizer
from constellation.errors import ArtifactError
from constellation.kernel.decode import Decoder, Decoding, decode
from constellation.kernel.model import KernelLM
from router.packet import Packet


class Answerer:
    """A kernel that takes turns."""

    def __init__(self, model: KernelLM, tokenizer: Tokenizer):
        vocabulary = model.config.vocab_size
        if tokenizer.vocab_size > vocabulary:
            raise ArtifactError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the kernel's vocabulary {vocabulary}: not of one run"
            )
        self.decoder, self.tokenizer = Decoder(model), tokenizer
        silent = [t for t in range(vocabulary) if not tokenizer.token_bytes[t : t + 1] or not tokenizer.token_bytes[t]]
        silent.remove(tokenizer.eos)
        self.bias_V = torch.zeros(vocabulary, device=self.decoder.device)
        self.bias_V[silent] = float("-inf")  # reserved tokens and ids without a token: no text holds them

    def turn(self, packets: Sequence[bytes], budget_bytes: int) -> list[bytes]:
        """The packets after one turn; one that is finished comes back as it is."""
        context = self.decoder.context
        rows = [_Row(Packet.decode(data), context, self.tokenizer) for data in packets]
        going = [row for row in rows if not row.packet.finish]
        room = max(1, min(budget_bytes, context // 4))  # the same for every packet: neighbours change nothing
        decode(
            self.decoder,
            [row.decoding for row in going],
            room,
            lambda i, t: going[i].take(t, budget_bytes),
            self.bias_V,
        )
        return [row.result().encode() for row in rows]

    @torch.inference_mode()
    def bits(self, packet: bytes, count: int) -> float:
        """Bits this kernel needs for the last `count` tokens of the packet's window, given those before them."""
        tokens = Packet.decode(packet).tokens[-self.decoder.context :]
        read = torch.tensor([tokens], device=self.decoder.device)
        log_p: Tensor = torch.log_softmax(self.decoder.model(read)[0, :-1] + self.bias_V, -1)
        nats = -log_p.gather(1, read[0, 1:, None])[-count:].sum()
        return float(nats) / 0.6931471805599453


class _Row:
    """One packet during a turn."""

    def __init__(self, packet: Packet, context: int, tokenizer: Tokenizer):
        self.packet, self.tokenizer = packet, tokenizer
        self.decoding = Decoding(list(packet.tokens[-context:]), packet.sampling, packet.position)
        self.stops = [s.encode("utf-8", "surrogatepass") for s in packet.sampling.stop]
        self.longest = max(map(len, self.stops), default=1)
        self.tail, self.num_bytes, self.finish = packet.pending, 0, packet.finish

    def take(self, token: int, budget_bytes: int) -> bool:
        """Whether the turn of this packet ends with `token`."""
        new = self.tokenizer.token_bytes[token]
        self.num_bytes += len(new)
        text = self.tail + new
        self.tail = text[len(text) - min(len(text), self.longest - 1) :]
        if token == self.tokenizer.eos:
            self.finish = "eos"
        elif any(stop in text for stop in self.stops):
            self.finish = "stop"
        elif self.decoding.taken >= self.packet.sampling.max_new_tokens:
            self.finish = "length"
        return bool(self.finish) or self.num_bytes >= budget_bytes

    def result(self) -> Packet:
        if self.packet.finish:
            return self.packet
        return dataclasses.replace(
            self.packet,
            tokens=tuple(self.decoding.tokens),
            position=self.decoding.taken,
            pending=self.tail,
            finish=self.finish,
        )
