"""What one request asks of the sampler: the record, and the ranges that HTTP and the command line share with it.

The formulas are in sample.py. `Temperature` ends at 100, for the command line and HTTP alike: there logits that lie
100 nats apart are drawn with odds of e to 1, so hotter is the same draw, and every float32 stays finite.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from msgspec import Meta

from constellation.errors import ConfigError
from constellation.settings import Count, Part, Whole, check, says, unsigned

MOST_BIASES, MOST_STOP_TOKENS, MOST_LOGPROBS, MOST_TOP_K = 300, 64, 20, 2**31

Temperature = Annotated[float, Meta(ge=0, le=100), says("of the softmax; 0: greedy")]
TopK = Annotated[int, Meta(ge=0, le=MOST_TOP_K), says("likeliest tokens kept; 0: all")]
TopP = Annotated[float, Meta(gt=0, le=1), says("mass of the likeliest tokens kept; 1: all")]
MinP = Annotated[Part, says("of the likeliest token's probability, which a kept token must have; 0: all")]
RepetitionPenalty = Annotated[float, Meta(ge=0.01, le=100), says("divides the logits of tokens in the window; 1: none")]
PresencePenalty = Annotated[float, Meta(ge=-2, le=2), says("nats off every token generated before")]
FrequencyPenalty = Annotated[float, Meta(ge=-2, le=2), says("nats off a token for each time that it was generated")]
Bias = Annotated[float, Meta(ge=-100, le=100), says("nats on a token's logit")]
BasinWeight = Annotated[float, Meta(ge=0, le=10), says("of a token's affinity to the text's basin; 0: none")]
DistanceWeight = Annotated[float, Meta(ge=0, le=10), says("nats off for a radian from the last token; 0: none")]
TransitionWeight = Annotated[float, Meta(ge=0, le=10), says("of how often the token's basin follows; 0: none")]
Token = Annotated[int, unsigned(32)]
StopTokens = Annotated[tuple[Token, ...], Meta(max_length=MOST_STOP_TOKENS), says("at most 64 tokens")]
Tops = Annotated[int, Meta(ge=0, le=MOST_LOGPROBS), says("likeliest tokens told beside each new one")]
IgnoreEos = Annotated[bool, says("the end of text is a token like any other")]


@dataclass(frozen=True)
class Sampling:
    """What one request asks of the sampler."""

    temperature: Temperature = 1.0
    top_k: TopK = 0
    top_p: TopP = 1.0
    min_p: MinP = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    seed: Annotated[int, unsigned(64), says("of the random numbers")] = 0
    stop: Annotated[
        tuple[Annotated[str, Meta(min_length=1)], ...], says("texts that end the answer and are not part of it")
    ] = ()
    max_new_tokens: Annotated[Count, says("most tokens of the answer")] = 128
    presence_penalty: PresencePenalty = 0.0
    frequency_penalty: FrequencyPenalty = 0.0
    logit_bias: Annotated[
        tuple[tuple[Token, Bias], ...], Meta(max_length=MOST_BIASES), says("at most 300 pairs of a token and -100..100")
    ] = ()
    min_tokens: Annotated[Whole, says("before them no end of text and no stop; at most max_new_tokens")] = 0
    ignore_eos: IgnoreEos = False
    stop_token_ids: StopTokens = ()  # they end the answer, and their text is not part of it
    logprobs: Tops | None = None  # None: no log-probability at all
    basin_weight: BasinWeight = 0.0
    distance_weight: DistanceWeight = 0.0
    transition_weight: TransitionWeight = 0.0
    index: Annotated[int, unsigned(32), says("of the answers to one question, each with random numbers of its own")] = 0

    def __post_init__(self) -> None:
        check(self)
        if self.min_tokens > self.max_new_tokens:
            raise ConfigError(f"min_tokens={self.min_tokens}: must be at most max_new_tokens={self.max_new_tokens}")
        if len({token for token, _ in self.logit_bias}) < len(self.logit_bias):
            raise ConfigError("logit_bias: names a token twice")

    def changed(self) -> dict[str, Any]:
        """The settings that are not as by default, for `from_json`."""
        return {name: value for name, value in vars(self).items() if value != getattr(Sampling, name)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sampling:
        """The record of `changed()`, also after JSON or msgpack made lists of its tuples."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in data:
            if name not in known:
                raise ConfigError(f"unknown sampling parameter {name!r}; known: {', '.join(known)}")
        values = dict(data)
        for name in ("stop", "stop_token_ids", "logit_bias"):
            if isinstance(values.get(name), list):
                values[name] = tuple(tuple(v) if isinstance(v, list) else v for v in values[name])
        return cls(**values)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def counted(self) -> bool:
        """Whether a penalty counts the tokens that were generated."""
        return bool(self.presence_penalty or self.frequency_penalty)

    @property
    def geometric(self) -> bool:
        """Whether terms of basins.py are added to the logits."""
        return bool(self.basin_weight or self.distance_weight or self.transition_weight)

    @property
    def filtered(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def record(self) -> tuple[int, int, int, float, float, float]:
        """What a draw needs to know, a sample.RECORD."""
        return self.seed, self.index, self.top_k, self.top_p, self.min_p, self.temperature

    @property
    def penalised(self) -> bool:
        """Whether the logits are changed before the draw."""
        return bool(
            self.repetition_penalty != 1 or self.counted or self.logit_bias or self.min_tokens or self.geometric
        )
