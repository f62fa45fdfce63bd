"""What a user has, as hashes and texts, to hold two versions of this project against each other bit for bit.

    python -m tests.record before.json                 # in the old checkout
    python -m tests.record after.json before.json      # in the new one: prints every difference, status 1 if any

A tiny run is trained through the command line; then every array of it, the answers of every mode (tokens, log
probabilities, certificates), the decisions, the scores, the OpenAPI document and every `--help` are taken down.
Numbers of different processors differ in their last bits: compare on one machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

COMMAND = (sys.executable, "-m", "constellation")
SETTINGS = ("train.sample_bytes=0", "train.precision=fp32", "optim.ns_precision=fp32")
MODES = ("route", "mixture", "barycenter", "ocean", "heart", "integration")
PROMPTS = ("The import statement", "def add(a, b):\n    return", "A complex number is")
VOLATILE = {"created", "seconds", "seconds_per_token", "request", "run", "system_fingerprint", "usage_seconds"}

IDS = ("cmpl-", "chatcmpl-", "decision-")  # a new one for every request


def run(*words: str, text: str | None = None) -> str:
    done = subprocess.run([*COMMAND, *words], input=text, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: status {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def helps() -> dict[str, str]:
    """Command line -> its --help, of all commands and their commands."""
    found: dict[str, str] = {}

    def visit(words: tuple[str, ...]) -> None:
        page = found[" ".join(words)] = run(*words, "--help")
        _, _, commands = page.partition("\nCommands:\n")
        for name in re.findall(r"^  (\w[\w-]*)", commands, re.MULTILINE):
            visit((*words, name))

    visit(())
    return found


def arrays(folder: Path) -> dict[str, str]:
    """File -> sha256 of every array that a run consists of."""
    kept = (".safetensors", ".npz", ".npy", ".bin")
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in kept or path.parent.name == "router"]
    found = {}
    for path in files:
        if path.is_file() and path.name != "trace.npz":  # a trace holds seconds
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def steady(value: Any) -> Any:
    """`value` without what differs from call to call."""
    if isinstance(value, dict):
        kept = {key: own for key, own in value.items() if key not in VOLATILE and not str(own).startswith(IDS)}
        return {key: steady(own) for key, own in kept.items()}
    return [steady(own) for own in value] if isinstance(value, list) else value


@contextlib.contextmanager
def service(folder: Path) -> Iterator[str]:
    command = [*COMMAND, "serve", "--run", str(folder), "--local", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert process.stdout is not None
            seen = ""
            for line in process.stdout:
                seen += line
                if url := re.search(r"http://[\d.]+:\d+", line):
                    break
            else:
                raise SystemExit(f"serve ended: {seen}")
            yield url[0]
        finally:
            process.terminate()
            process.communicate()


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        text = reply.read().decode()
    return steady(json.loads(text)) if not text.startswith("data:") else text


def replies(url: str) -> dict[str, Any]:
    found: dict[str, Any] = {"openapi": ask(f"{url}/openapi.json"), "models": ask(f"{url}/v1/models")}
    for mode in MODES:
        body = {"mode": mode, "prompt": PROMPTS[0], "max_tokens": 60, "seed": 7, "logprobs": 2}
        found[f"completions {mode}"] = ask(f"{url}/v1/completions", {**body, "return_token_ids": True})
        asked = {"mode": mode, "prompt": PROMPTS[0], "answers": [" binds", " is"]}
        found[f"decisions {mode}"] = ask(f"{url}/v1/decisions", asked)
    chat = {"messages": [{"role": "user", "content": PROMPTS[1]}], "max_tokens": 40, "seed": 3}
    found["chat"] = ask(f"{url}/v1/chat/completions", chat)
    found["tokenize"] = ask(f"{url}/tokenize", {"prompt": PROMPTS[2]})
    found["echo"] = ask(f"{url}/v1/completions", {"prompt": PROMPTS[2], "max_tokens": 0, "echo": True, "logprobs": 1})
    return found


def record() -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="constellation-record-") as folder:
        made = Path(folder) / "run"
        run("train", "--run", str(made), "--preset", "tiny", *SETTINGS)
        found: dict[str, Any] = {"help": helps(), "arrays": arrays(made)}
        for mode in MODES:
            how = ("--max-new-tokens", "150", "--seed", "5", "--mode", mode, "--local", "--json")
            for prompt in PROMPTS:
                told = json.loads(run("generate", "--run", str(made), "--prompt", prompt, *how))
                found[f"generate {mode} {prompt!r}"] = steady(told)
        lines = run("route", "--run", str(made), "--json", text="\n".join(p.replace("\n", " ") for p in PROMPTS))
        found["route"] = [json.loads(line) for line in lines.splitlines()]
        found["eval"] = steady(json.loads(run("eval", "--run", str(made), "--json")))
        with service(made) as url:
            found["http"] = replies(url)
        return found


def differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if key not in old or key not in new:
                yield f"{where}/{key}: only in the {'old' if key in old else 'new'} one"
            else:
                yield from differences(old[key], new[key], f"{where}/{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, (a, b) in enumerate(zip(old, new)):
            yield from differences(a, b, f"{where}/{i}")
    elif old != new:
        yield f"{where}: {str(old)[:300]!r} -> {str(new)[:300]!r}"


def main() -> int:
    out, *before = map(Path, sys.argv[1:])
    found = record()
    out.write_text(json.dumps(found, indent=1, sort_keys=True))
    changed = list(differences(json.loads(before[0].read_text()), found)) if before else []
    print("\n".join(changed) or f"{out}: no difference" if before else f"{out}: recorded")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
