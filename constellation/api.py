"""The front door: train a constellation and ask it, from Python.

The command line drives the same functions, so the same prompt, settings and seed give the same tokens. torch and Ray
are imported when they are used.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from constellation.config import Config
from constellation.errors import ConfigError, DataError
from constellation.presets import preset as make_preset
from constellation.roster import OCEAN

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch.nn import Module

    from constellation.telemetry.step import Step
    from router.answer.query import Answer, Ask, Piece
    from router.answer.service import Service
    from router.decide.policy import RouteChoice

T = TypeVar("T")
AnyPath = str | os.PathLike[str]


def _on_stderr(text: str) -> None:
    print(text, file=sys.stderr)


# -- train -------------------------------------------------------------------------------------------------------------


def train(
    corpus: AnyPath | Iterable[str | bytes | os.PathLike[str]] | None,
    run: AnyPath,
    preset: str | Config | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    pretrained: AnyPath | None = None,
    embeddings: AnyPath | None = None,
    local: bool = False,
    address: str | None = None,
    say: Callable[[str], None] = _on_stderr,
) -> Iterator[Step]:
    """Train OCEAN, fit the router, branch and train the kernels, in `run`, a folder or URL; yields each training step.

    corpus     a folder or file; or texts (str, or bytes of UTF-8) and files (`pathlib.Path`), one document each; None:
               the documentation and library of this Python, or what an earlier call trained on
    preset     tiny | small | 23m | 100m, or a whole `Config`; None: small, or what an earlier call trained with
    overrides  settings by their dotted names, {"optim.lr": 2e-3}; {"heart.optim.lr": 2e-3} for one kernel alone
    pretrained a Hugging Face folder of Llama architecture, as OCEAN: its weights, its tokenizer; all tokens train the
               kernels, unless overrides give train.ocean_share. ConfigError names what a kernel has no place for
    embeddings such a folder, or a safetensors file in it: its embeddings alone, frozen, projected to kernel.width
    local      one model after another in this process, without Ray; else each in an actor, in the Ray at `address`
               ("auto", host:port), or in one of its own
    say        takes lines about what goes on

    Training goes on while steps are asked for; closing the iterator stops it. Ended at any point, even by a kill, and
    called again it goes on to the same weights; a run that is trained to its end yields nothing. ConfigError when the
    run was begun with another corpus or other settings; DataError, with the first step, when there is no text to read.
    """
    from constellation.pipeline.beginning import begun_with
    from constellation.pipeline.request import REQUEST, check_request
    from constellation.storage.mirror import resolve

    if local and address is not None:
        raise ConfigError(f"local=True and address={address!r} exclude each other: local uses no Ray")
    folder, config = resolve(os.fspath(run), say), None
    begun = (folder / REQUEST).exists()
    if preset is not None or overrides or pretrained or embeddings or not begun:
        base = preset if isinstance(preset, Config) else make_preset(preset or "small")
        config = begun_with(base, overrides or {}, folder=_path(pretrained), embeddings=_path(embeddings))
    where = Path(corpus) if isinstance(corpus, (str, os.PathLike)) else None
    check_request(folder, where, config, begun)  # told before torch and Ray are imported
    if corpus is not None and not isinstance(corpus, (str, os.PathLike)):
        where = folder.with_name(f"{folder.name}.texts.jsonl")
        _keep(corpus, where, config or Config(), begun)
    if local:
        return _in_this_process(folder, where, config, begun, say)
    from actors import launch

    return launch.train(folder, where, config, address=address, resume=begun, say=say)


def _path(given: AnyPath | None) -> Path | None:
    return None if given is None else Path(os.fspath(given))


def _in_this_process(
    run: Path, corpus: Path | None, config: Config | None, resume: bool, say: Callable[[str], None]
) -> Iterator[Step]:
    """What actors/launch.py does, one model after another."""
    from constellation.pipeline.cost import Meter
    from constellation.pipeline.home import owned
    from constellation.pipeline.prepare import fit_router, kernel_job, ocean_job, prepare, take_ocean
    from constellation.pipeline.request import open_request, request, withdrawn
    from constellation.pipeline.status import done
    from constellation.storage.exclusive import exclusive
    from constellation.train.loop import fit

    fresh = not run.exists()
    request(run, corpus, config, resume)
    with exclusive(run), owned(run, open_request(run)[1].cluster.storage_timeout_s, say) as home:
        with withdrawn(run, fresh):
            plan = prepare(run)
        home.save("data", "")
        if take_ocean(plan):
            home.save(OCEAN)
        meter = Meter(run, plan.config, say)
        if not done(plan.folder(OCEAN)):
            yield from meter.until_spent(home.saved(fit(ocean_job(plan), say=say), OCEAN))
        if meter.spent:
            return
        fit_router(plan)
        home.save("router")
        for role in plan.config.kernels:
            if not meter.spent and not done(plan.folder(role)):
                yield from meter.until_spent(home.saved(fit(kernel_job(plan, role), say=say), role))


def _keep(texts: Iterable[str | bytes | os.PathLike[str]], file: Path, config: Config, begun: bool) -> None:
    """Write `texts` to `file`, one document a line, for the run beside it; a run that is begun must have these."""
    from constellation.data.corpus import read_corpus
    from constellation.storage.atomic import write_bytes

    lines = list[str]()
    for at, text in enumerate(texts):
        if isinstance(text, os.PathLike):
            found = read_corpus(Path(text), config.data).documents
            lines += [json.dumps({"text": d.text, "metadata": {"domain": d.domain}}) for d in found]
        elif isinstance(text, (str, bytes)):
            try:
                plain = text if isinstance(text, str) else text.decode()
            except UnicodeDecodeError as error:
                raise DataError(f"corpus: text {at} is no UTF-8 at byte {error.start}") from None
            lines.append(json.dumps({"text": plain}))
        else:
            raise ConfigError(f"corpus: text {at} is of type {type(text).__name__}; give str, bytes or pathlib.Path")
    data = "".join(line + "\n" for line in lines).encode()
    if not begun:
        write_bytes(file, data)
    elif not file.exists() or file.read_bytes() != data:
        raise ConfigError(f"corpus: {file} does not hold these texts; leave the corpus out, or choose another run")


def load_kernel(run: AnyPath, role: str) -> Module:
    """The model called `role`, "ocean" or a kernel, of its newest checkpoint: (B, T) int64 tokens to (B, T, V) logits.

    In evaluation mode, on the CPU. ConfigError for an unknown role, ArtifactError when it has no checkpoint.
    """
    from constellation.pipeline.request import open_plan
    from constellation.storage.mirror import resolve
    from constellation.train.checkpoint import load_model

    plan = open_plan(resolve(os.fspath(run)))
    if role not in plan.config.models:
        raise ConfigError(f"role={role!r}: choose one of {', '.join(plan.config.models)}")
    return load_model(plan.folder(role))


# -- ask ---------------------------------------------------------------------------------------------------------------


def open(
    run: AnyPath, *, local: bool = False, address: str | None = None, say: Callable[[str], None] = _on_stderr
) -> Constellation:
    """The constellation in `run`, a folder or URL, to be asked; close it, or use it in a `with` block.

    Who answers: actors in the Ray at `address` if it is given; else the constellation of this run that is up; else, or
    if `local`, the models in this process, on as many threads of torch as the run was trained with. The tokens are the
    same. `say` takes lines such as that the run is not trained to its end. ConfigError when it is no trained run.
    """
    if local and address is not None:
        raise ConfigError("--local and --address exclude each other: --local uses no Ray")
    from constellation.pipeline.request import open_plan
    from constellation.pipeline.status import unfinished, unfinished_line
    from constellation.storage.mirror import resolve

    run = resolve(os.fspath(run), say)
    plan = open_plan(run)
    if not (plan.router / "router.json").exists():
        raise ConfigError(f"{run} is not trained yet; constellation train --run {run} --resume")
    with contextlib.ExitStack() as stack:
        kernels, is_up = _kernels(run, plan.config, local, address, say, stack)
        from constellation.pipeline.serving import service_of

        loop = _Loop()
        stack.callback(loop.close)
        left = unfinished(run, loop.run(kernels.steps()) if is_up else None)
        if left:
            say(unfinished_line(run, left))
        return Constellation(run, service_of(run, kernels), loop, left, stack.pop_all())


def _kernels(
    run: Path, config: Config, local: bool, address: str | None, say: Callable[[str], None], stack: contextlib.ExitStack
) -> tuple[Any, bool]:
    """The kernels, and whether they are those of a constellation that is up, whose steps only it knows."""
    if address is not None:
        from actors.remote import open_kernels

        return stack.enter_context(open_kernels(run, address=address, say=say)), False
    if not local:
        from actors import record as records

        record = records.read(run)
        if record is not None and (why := record.unreachable()):
            say(f"{run} was up, but {why}; answering in this process")
        elif record is not None:
            from actors.remote import kernels_of

            return stack.enter_context(kernels_of(run, record, say)), True
    import torch

    from router.answer.local import LocalKernels

    torch.set_num_threads(config.train.threads)
    return LocalKernels.from_run(run, decode=config.decode), False


class Constellation:
    """A trained run that is asked, from any thread, also inside a running event loop; `open` makes one."""

    def __init__(
        self,
        run: Path,
        service: Service,
        loop: _Loop,
        unfinished: dict[str, dict[str, int | None]],
        stack: contextlib.ExitStack,
    ):
        self.run, self.service = run, service
        self.unfinished = unfinished  # models that are used before they are trained to their end: step and steps
        self._loop, self._stack = loop, stack
        atexit.register(self.close)

    def __enter__(self) -> Constellation:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the kernels; what is under way ends."""
        atexit.unregister(self.close)
        self._stack.close()

    def __repr__(self) -> str:
        return f"Constellation({str(self.run)!r}, kernels={self.kernels})"

    @property
    def kernels(self) -> tuple[str, ...]:
        """Who can be asked by name, "ocean" among them."""
        return self.service.kernels.names

    @overload
    def generate(self, prompt: str, max_new_tokens: int = ..., temperature: float = ..., seed: int = ...,
                 mode: str = ..., **how: Any) -> Answer: ...  # fmt: skip

    @overload
    def generate(self, prompt: Sequence[str], max_new_tokens: int = ..., temperature: float = ..., seed: int = ...,
                 mode: str = ..., **how: Any) -> list[Answer]: ...  # fmt: skip

    def generate(
        self,
        prompt: str | Sequence[str],
        max_new_tokens: int = 64,
        temperature: float = 0.8,
        seed: int = 0,
        mode: str = "route",
        **how: Any,
    ) -> Answer | list[Answer]:
        """How `prompt` goes on, as `constellation generate` says it; a list of answers for a list of prompts.

        mode  "route": the kernel that the text belongs to, looked up again every W bytes; "mixture", "barycenter":
              the `top_k_kernels` (3) likeliest of them together; or the name of one kernel
        how   `top_k_kernels`, and any other setting of the sampler (constellation/decoding/sample.py) by its name:
              top_p (0.95, as on the command line), top_k, min_p, repetition_penalty, stop, logit_bias, logprobs ...
              ConfigError for one that is unknown or out of range

        Several prompts share the kernels' batches; an answer depends on its own prompt, settings and seed alone.
        """
        several = isinstance(prompt, Sequence) and not isinstance(prompt, (str, bytes))
        prompts: list[Any] = list(prompt) if several else [prompt]
        asks = [_ask(one, max_new_tokens, temperature, seed, mode, **how) for one in prompts]
        answers = self._loop.run(_answers(self.service, asks))
        return answers if several else answers[0]

    def stream(
        self,
        prompt: str,
        max_new_tokens: int = 64,
        temperature: float = 0.8,
        seed: int = 0,
        mode: str = "route",
        **how: Any,
    ) -> Stream:
        """The same answer in pieces as they come, 8 tokens or 40 ms at a time; arguments as for `generate`."""
        return Stream(self.service, self._loop, _ask(prompt, max_new_tokens, temperature, seed, mode, **how))

    @overload
    def route(self, texts: str | bytes) -> RouteChoice: ...  # type: ignore[overload-overlap]

    @overload
    def route(self, texts: Sequence[str | bytes]) -> list[RouteChoice]: ...

    def route(self, texts: str | bytes | Sequence[str | bytes]) -> RouteChoice | list[RouteChoice]:
        """Who would answer each text and why: kernel, posterior, distances. Nothing is decoded."""
        assert self.service.policy is not None
        found = self.service.policy.route([_utf8(text) for text in _several(texts)])
        return found[0] if isinstance(texts, (str, bytes)) else found

    @overload
    def score(  # type: ignore[overload-overlap]
        self, texts: str | bytes, mode: str = ..., top_k_kernels: int = ...
    ) -> NDArray[np.float64]: ...

    @overload
    def score(
        self, texts: Sequence[str | bytes], mode: str = ..., top_k_kernels: int = ...
    ) -> list[NDArray[np.float64]]: ...

    def score(
        self, texts: str | bytes | Sequence[str | bytes], mode: str = "route", top_k_kernels: int = 3
    ) -> NDArray[np.float64] | list[NDArray[np.float64]]:
        """-ln p(token | those before it) of each token of each text, nats >= 0, (tokens,), under any mode.

        The kernels in force at a token follow from the bytes before it, as in an answer and in `constellation eval`.
        """
        found = self._loop.run(_nats(self.service, _several(texts), mode, top_k_kernels, end=False))
        return found[0] if isinstance(texts, (str, bytes)) else found

    def bits_per_byte(
        self, texts: str | bytes | Sequence[str | bytes], mode: str = "route", top_k_kernels: int = 3
    ) -> float:
        """Causal bits of all texts, and of the end of each, over their UTF-8 bytes: sum of nats / (ln 2 * bytes), >= 0.

        What `constellation eval` reports, but for ids that no text holds: an answer cannot hold them either, so here
        they have no probability, and the bits are a little fewer. ConfigError when there are no bytes.
        """
        given = _several(texts)
        if not (size := sum(len(_utf8(text)) for text in given)):
            raise ConfigError("texts: at least one byte is needed to divide by")
        found = self._loop.run(_nats(self.service, given, mode, top_k_kernels, end=True))
        return float(sum(nats.sum() for nats in found) / math.log(2) / size)


class Stream(Iterator["Piece"]):
    """An answer in pieces: `for piece in stream: print(piece.text, end="")`; then `stream.answer` is all of it."""

    def __init__(self, service: Service, loop: _Loop, ask: Ask):
        self.answer: Answer | None = None  # once all pieces were read
        self._steps, self._loop = service.stream(ask), loop

    def __next__(self) -> Piece:
        from router.answer.query import Piece

        if self.answer is None:
            step = self._loop.run(_next(self._steps))
            if isinstance(step, Piece):
                return step
            self.answer = replace(step, request=0)
        raise StopIteration

    def close(self) -> None:
        """Leave an answer that is not whole: its work ends."""
        self._loop.run(self._steps.aclose())


def _ask(
    prompt: str, max_new_tokens: int, temperature: float, seed: int, mode: str, top_k_kernels: int = 3,
    telemetry: bool = False, **sampling: Any,
) -> Ask:  # fmt: skip
    from constellation.decoding.sample import Sampling
    from router.answer.query import Ask

    if not isinstance(prompt, str):
        raise ConfigError(f"prompt={prompt!r}: must be a text, or a list of texts")
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "top_p": 0.95, **sampling}
    return Ask(prompt, Sampling.from_json(settings), mode, top_k_kernels, telemetry=telemetry)


async def _next(steps: Any) -> Any:
    return await anext(steps)


async def _answers(service: Service, asks: Sequence[Ask]) -> list[Answer]:
    from router.answer.concurrency import together

    found = await together([service.answer(ask) for ask in asks])
    return [replace(answer, request=at) for at, answer in enumerate(found)]


async def _nats(
    service: Service, texts: Sequence[str | bytes], mode: str, top_k: int, end: bool
) -> list[NDArray[np.float64]]:
    import numpy as np

    from router.answer.concurrency import together

    tokens = [[*service.tokenizer.encode(_utf8(text)), *[service.tokenizer.eos][: int(end)]] for text in texts]
    found = await together([service.score(one, mode, 0, top_k) for one in tokens])
    return [np.array([-token.log_prob for token in scored if token is not None]) for scored in found]


def _several(texts: str | bytes | Sequence[str | bytes]) -> list[str | bytes]:
    return [texts] if isinstance(texts, (str, bytes)) else list(texts)


def _utf8(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")


class _Loop:
    """An event loop in a thread of its own, for callers who have none, or one that they are inside of (a notebook)."""

    def __init__(self) -> None:
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._live(started)), name="ask", daemon=True)
        self._thread.start()
        started.wait()

    async def _live(self, started: threading.Event) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        started.set()
        await self._end.wait()  # then asyncio.run cancels what is under way

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` returns or raises. Whoever does not wait for it any more, by Ctrl-C, cancels it."""
        if not self._thread.is_alive():
            work.close()
            raise ConfigError("this constellation is closed; open it again")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join()
