"""A run that answers: its kernels in this process or on Ray, its router, its tokenizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from constellation.commands.options import Settings
from constellation.errors import ConfigError

if TYPE_CHECKING:
    from router.answer.session import Answer, Chunk, Request


class Answering:
    """`with Answering(run, local, address) as c: for piece in c.ask(prompt, settings, mode): ...`

    Who answers: actors in the Ray at `address`, if it is given; else the constellation of this run that is up; else,
    or if `local`, the models in this process. The tokens are the same.
    """

    def __init__(self, run: Path, local: bool, address: str | None):
        if local and address:
            raise ConfigError("--local and --address exclude each other: --local uses no Ray")
        self.run, self.local, self.address = run, local, address

    def __enter__(self) -> Answering:
        from constellation.pipeline.request import open_plan
        from constellation.pipeline.status import unfinished, unfinished_line

        plan = open_plan(self.run)
        if not (plan.router / "router.json").exists():
            raise ConfigError(f"{self.run} is not trained yet; constellation train --run {self.run} --resume")
        from constellation.coordizer.tokenizer import Tokenizer
        from router.decide.fisher_rao import Router

        self.config = plan.config
        self.router, self.tokenizer = Router.load(plan.router), Tokenizer.load(plan.tokenizer)
        with contextlib.ExitStack() as stack:
            self.kernels, used = self._open(stack)
            self.unfinished = unfinished(self.run, used)
            if self.unfinished:
                _say(unfinished_line(self.run, self.unfinished))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def _open(self, stack: contextlib.ExitStack) -> tuple[Any, dict[str, int] | None]:
        """The kernels, and the step of each if those are not their newest checkpoints."""
        if self.address is not None:
            from actors.remote import open_kernels

            return stack.enter_context(open_kernels(self.run, address=self.address, say=_say)), None
        from actors import record as records

        record = None if self.local else records.read(self.run)
        if record is not None and (why := record.unreachable()):
            _say(f"{self.run} was up, but {why}; answering in this process")
        elif record is not None:
            from actors.remote import kernels_of

            kernels = stack.enter_context(kernels_of(self.run, record, _say))
            return kernels, kernels.steps()
        import torch

        from router.answer.local import LocalKernels

        torch.set_num_threads(self.config.train.threads)
        return LocalKernels.from_run(self.run, decode=self.config.decode), None

    def ask(self, prompt: str, settings: Settings, mode: str, top_k: int = 3) -> Iterator[Chunk | Answer]:
        """Chunks as they come, the Answer last."""
        from router.answer.session import Request

        return self.ask_all([Request(prompt, settings.sampling(), mode, top_k)])

    def ask_all(self, requests: list[Request]) -> Iterator[Chunk | Answer]:
        from router.answer.session import generate

        return generate(self.router, self.kernels, self.tokenizer, requests, self.config)


def _say(text: str) -> None:
    click.echo(text, err=True)
