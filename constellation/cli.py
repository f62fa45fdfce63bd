"""The command line: a table of strings. A command's module is imported when it is called.

Exit status: 0 done, 1 failed, 2 wrong request, 130 interrupted. An error is one line on stderr.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from typing import Any

import click

import constellation
from constellation.errors import ConstellationError

COMMANDS = {
    "demo": "train on Python's own documentation, print a sample of each kernel and the results table",
    "train": "train OCEAN, fit the router, branch and train the kernels on Ray",
    "tune": "sweep over settings; replay a sweep, report on it",
    "generate": "answer a prompt: route, decode, hand off",
    "chat": "prompt after prompt, on a terminal",
    "route": "explain who would answer each line of standard input",
    "data": "make a corpus fit for training, or say what is wrong with it: prepare, validate",
    "topo": "an atlas of charts over images: train, evaluate, report, measure",
    "eval": "causal bits per byte of every way to answer held-out text",
    "serve": "answer OpenAI clients over HTTP",
    "up": "keep a trained constellation alive on Ray",
    "status": "kernels, roles, roots, nodes, steps, loss, health",
    "down": "stop what `up` started",
    "targets": "what a Prometheus asks: Ray nodes and fronts",
    "keys": "make, list and remove API keys of the service",
    "coordizer": "learn a tokenizer with coordinates, judge tokenizers",
    "runs": "list, filter, sort, compare and diff what was trained",
    "plot": "draw the signals of runs as PNG or SVG",
    "signature": "write what tells a run's models apart, 2 to 4 KB each",
    "report": "validation report of a run: results against targets, plots, cost",
    "export": "write a plain kernel as a folder for transformers, vLLM, CTranslate2",
    "measure": "studies of a trained run, with controls: beta",
    "bench": "compare: decode | dense | modes | optim | recursion | route | serve | train | ...",
    "doctor": "check Python, torch, Ray, GPUs, disk, and run a self-test",
}


class Table(click.Group):
    """Names and one-line helps from COMMANDS; `constellation.commands.<name>` only when needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"constellation.commands.{cmd_name}").command
        command.name = cmd_name
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            raise click.UsageError(f"no command {args[0]!r}; choose one of {', '.join(COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=Table, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(constellation.__version__, prog_name="constellation")
def cli() -> None:
    """A constellation of small language models on Ray, routed by Fisher-Rao geometry."""


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    sys.exit(run(args))


def run(args: list[str] | None = None) -> int:
    # Parallelism is across models and batches; OpenMP threads on busy cores wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warnings.formatwarning = _line
    try:
        cli.main(args=args, prog_name="constellation", standalone_mode=False)
        return 0
    except click.exceptions.NoArgsIsHelpError as error:
        if error.ctx is not None and error.ctx.parent is not None:
            return _fail(f"{error.ctx.command_path}: a command is missing; see {error.ctx.command_path} --help", 2)
        click.echo(error.ctx.get_help() if error.ctx else error.format_message())
        return 0
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "constellation"
        return _fail(f"{where}: {' '.join(error.format_message().split())}; see {where} --help", error.exit_code)
    except ConstellationError as error:
        return _fail(f"constellation: {error}", error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _fail("constellation: interrupted", 130)
    except BrokenPipeError:  # the reader of our output has gone
        sys.stdout = None
        return 1


def _line(message: Warning | str, category: Any, filename: str, lineno: int, line: str | None = None) -> str:
    """A warning as the user reads it, without the line of code it came from."""
    return f"constellation: {' '.join(str(message).split())}\n"


def _fail(message: str, status: int) -> int:
    if "/constellation/runs/" in message:
        from constellation.storage.mirror import spoken

        message = spoken(message)
    click.echo(" ".join(message.split()), err=True)
    return status
