"""What tests answer with, a tokenizer, a kernel's shape, texts of three kinds, three models; and what they learn."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from constellation.config import Kernel
from constellation.coordizer.tokenizer import Tokenizer
from constellation.data.cache import build_cache
from constellation.data.corpus import Document
from constellation.kernel.model import KernelLM
from constellation.roster import OCEAN
from constellation.train import checkpoint

NAMES = ("heart", "memory", "action")
TEXTS = [f"the quick brown fox {i} jumps over the lazy dog, naïve café {i}: x = {i} + 1\n" for i in range(40)]
TOKENIZER = Tokenizer.train(TEXTS, 320)
KERNEL = Kernel(vocab_size=336, width=24, layers=2, heads=3, hidden=40, context=64, coupling_ref=8)
SILENT = [i for i in range(1, 336) if i < 16 or i >= TOKENIZER.vocab_size]  # tokens that are no text
KINDS = [[f"{a} number {i} {a}\n" * 8 for i in range(12)] for a in ("the quick brown fox", "def f(x):", "GENESIS 1:1")]
READ = [text.encode() for texts in KINDS for text in texts]  # what a router is fitted on


def random_kernel(config: Kernel = KERNEL, seed: int = 1) -> KernelLM:
    """Random, far from uniform, so that every kernel writes its own nonsense, valid UTF-8 or not."""
    made = KernelLM(config, seed=seed)
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(1.6 if weight.dim() == 2 else 1.0)
    return made


def lively_kernel(config: Kernel, gain: float = 2.0) -> KernelLM:
    """Far from uniform in every parameter, vectors too: mistakes show, and greedy tokens are no near ties."""
    made, generator = KernelLM(config, seed=1), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(gain if weight.dim() == 2 else 1.0)
            if weight.dim() == 1:  # gains, look-back, c
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return made


def models() -> dict[str, KernelLM]:
    """OCEAN and the three."""
    return {name: random_kernel(seed=i) for i, name in enumerate((OCEAN, *NAMES), 1)}


def four_words(root: Path) -> tuple[Path, Path]:
    """(train cache, dev cache) below `root` of a text of four words, which is something to learn."""
    generator = random.Random(0)
    texts = [" ".join(generator.choices(["basin", "kernel", "sphere", "root"], k=200)) for _ in range(6)]
    tokenizer = Tokenizer.train(texts, 272)
    documents = [Document(text, None, str(i), None, {}) for i, text in enumerate(texts)]
    train, dev = (build_cache(part, tokenizer, root).path for part in (documents[:4], documents[4:]))
    return train, dev


def newest(folder: Path) -> checkpoint.Checkpoint:
    """Of a model that was trained in `folder`."""
    found = checkpoint.newest(folder)
    assert found is not None
    return found


def weights(folder: Path) -> bytes:
    """The bits of the newest checkpoint."""
    return b"".join((newest(folder).path / name).read_bytes() for name in checkpoint.FILES)
