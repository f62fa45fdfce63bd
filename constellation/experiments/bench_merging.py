"""How fast are merges learnt and texts encoded, beside the library `tokenizers`, on the same text and one thread?"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from constellation.coordizer.merging import Merger
from constellation.coordizer.pieces import count_pieces
from constellation.coordizer.quality import encoding_speed
from constellation.coordizer.tokenizer import FIRST_MERGE, Tokenizer
from constellation.experiments.harness import described


def run(texts: Sequence[str], vocabulary: int, encode_bytes: int) -> dict[str, Any]:
    """CPU seconds of `frequency` and of the library's trainer, whether they agree, and the ratio of encoding."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    began = time.process_time()
    pieces = count_pieces(((text, 0) for text in texts), 1)
    counted = time.process_time()
    merger = Merger(pieces)
    merger.round(vocabulary - FIRST_MERGE, fewest=2)
    ours = Tokenizer(merger.named_merges())
    learnt = time.process_time()
    theirs = Tokenizer.train(texts, vocabulary)
    done = time.process_time()
    some, size = [], 0
    for text in texts:
        if size < encode_bytes:
            some.append(text)
            size += len(text)
    with tempfile.TemporaryDirectory() as folder:
        speed = encoding_speed(ours, Path(folder), some, repeats=3)
    return {
        **described(__doc__), "bytes": pieces.num_bytes, "pieces": len(pieces.texts), "vocabulary": ours.vocab_size,
        "native": merger.native, "pieces_cpu_s": counted - began, "merges_cpu_s": learnt - counted,
        "tokenizers_cpu_s": done - learnt, "ours_over_tokenizers": (learnt - began) / (done - learnt),
        "equal": ours.hash == theirs.hash, "encoding": speed, "encoded_bytes": size,
    }  # fmt: skip


def lines(result: dict[str, Any]) -> list[str]:
    """The result in words."""
    ratio, speed = result["ours_over_tokenizers"], result["encoding"]["ratio"]
    return [
        f"{result['bytes'] / 1e6:.0f} MB, {result['pieces']:,} pieces, {result['vocabulary']:,} tokens"
        + ("" if result["native"] else ", without the C library"),
        f"learning: {result['pieces_cpu_s']:.1f} + {result['merges_cpu_s']:.1f} CPU-seconds, tokenizers "
        f"{result['tokenizers_cpu_s']:.1f}: {ratio:.2f} x its time (goal < 2: {'passed' if ratio < 2 else 'missed'}); "
        + ("the same tokenizer" if result["equal"] else "ANOTHER TOKENIZER"),
        f"encoding: {speed:.2f} x its speed (goal >= 0.5: {'passed' if speed >= 0.5 else 'missed'})",
    ]
