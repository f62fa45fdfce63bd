"""A run that answers: its kernels on Ray or in this process, its router, its tokenizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from constellation.commands.options import Settings
from constellation.errors import ConfigError

if TYPE_CHECKING:
    from router.session import Answer, Chunk, Request


class Answering:
    """`with Answering(run, local, address) as c: for piece in c.ask(prompt, settings, mode): ...`"""

    def __init__(self, run: Path, local: bool, address: str | None):
        if local and address:
            raise ConfigError("--local and --address exclude each other: --local uses no Ray")
        self.run, self.local, self.address = run, local, address
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Answering:
        from actors.plan import open_plan
        from constellation.coordizer.tokenizer import Tokenizer
        from router.route import Router

        plan = open_plan(self.run)
        self.config = plan.config
        if not (plan.router / "segments.json").exists():
            raise ConfigError(f"{self.run} is not trained yet; constellation train --run {self.run} --resume")
        self.router, self.tokenizer = Router.load(plan.router), Tokenizer.load(plan.tokenizer)
        self.kernels = self._stack.enter_context(self._open())
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def _open(self) -> contextlib.AbstractContextManager[Any]:
        if self.local:
            import torch

            from router.local import LocalKernels

            torch.set_num_threads(self.config.train.threads)
            return contextlib.nullcontext(LocalKernels.from_run(self.run, decode=self.config.decode))
        from actors.remote import open_kernels

        return open_kernels(self.run, address=self.address, say=lambda text: click.echo(text, err=True))

    def ask(self, prompt: str, settings: Settings, mode: str, top_k: int = 3) -> Iterator[Chunk | Answer]:
        """Chunks as they come, the Answer last."""
        from router.session import Request

        return self.ask_all([Request(prompt, settings.sampling(), mode, top_k)])

    def ask_all(self, requests: list[Request]) -> Iterator[Chunk | Answer]:
        from router.session import generate

        return generate(self.router, self.kernels, self.tokenizer, requests, self.config)
