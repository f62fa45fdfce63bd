"""What OCEAN begins with when it is not random: a pretrained Llama, or the embeddings of one. No torch but to `write`.

    begun_with   a configuration with the folder's kernel (train --from) or the embedding's vocabulary (--embeddings)
    check        every mistake in the folder, told before anything is written
    write        the tokenizer as the run's, and the weights as a checkpoint in RUN/data/pretrained, from which OCEAN
                 branches like a kernel from OCEAN; the folder is not needed again

With train.ocean_share=0, the default of --from, OCEAN is the pretrained model as it is and all tokens go to the
kernels; with a share it is trained on as any other. Embeddings are projected to kernel.width and stay as they are in
all models.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from constellation.config import Config, Kernel, override
from constellation.errors import ArtifactError, ConfigError
from constellation.kernel import llama_folder
from constellation.storage.atomic import write_json

if TYPE_CHECKING:
    from constellation.coordizer.tokenizer import Tokenizer

FREE = (
    "context",
    "basin_head",
)  # of a pretrained kernel: fewer positions are the same model, a basin head is beside it


def begun_with(
    config: Config, changes: Mapping[str, Any], *, folder: Path | None = None, embeddings: Path | None = None
) -> Config:
    """`config` with `changes` over what the pretrained model says."""
    if folder is not None and embeddings is not None:
        raise ConfigError(f"--from {folder} and --embeddings {embeddings} exclude each other: give one of them")
    said: dict[str, Any] = {}
    if folder is not None:
        said = {f"kernel.{name}": value for name, value in vars(llama_folder.read_config(_there(folder))).items()}
        said |= {"pretrained.folder": str(folder.resolve()), "train.ocean_share": 0.0}
    if embeddings is not None:
        rows, _ = _embedding_shape(_there(embeddings))
        said = {"pretrained.embeddings": str(embeddings.resolve()), "kernel.vocab_size": rows}
    return override(config, {**said, **changes})


def check(config: Config) -> None:
    """ConfigError or ArtifactError, one line, unless OCEAN of `config` can begin with what is there."""
    given = config.pretrained
    if given.folder:
        folder = _there(Path(given.folder))
        theirs = llama_folder.read_config(folder)
        llama_folder.check_weights(folder, theirs)
        _check_same_kernel(config.kernel, theirs, folder)
        tokenizer_of(config)
    elif given.embeddings:
        rows, _ = _embedding_shape(_there(Path(given.embeddings)))
        if config.kernel.vocab_size != rows:
            raise ConfigError(
                f"kernel.vocab_size={config.kernel.vocab_size}: {given.embeddings} has {rows} embeddings; leave it out"
            )
        tokenizer_of(config)


def tokenizer_of(config: Config) -> Tokenizer:
    """The tokenizer beside the pretrained weights; ConfigError where it does not fit them."""
    from constellation.coordizer.pretrained import end_of_text
    from constellation.coordizer.tokenizer import Tokenizer

    place = Path(config.pretrained.given)
    folder = place if place.is_dir() else place.parent
    file = folder / "tokenizer.json"
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ArtifactError(
            f"{file} is missing; transformers writes it: AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)"
        ) from None
    except (OSError, UnicodeError) as error:
        raise ArtifactError(f"{file}: {error}") from None
    try:
        tokenizer = Tokenizer.pretrained(text, end_of_text(folder))
    except (ConfigError, ArtifactError) as error:
        raise type(error)(f"{folder}: {error}") from None
    if tokenizer.vocab_size > config.kernel.vocab_size:
        raise ConfigError(
            f"{file} does not fit its model: it has {tokenizer.vocab_size} tokens, the model {config.kernel.vocab_size}"
        )
    return tokenizer


def folder_of(run: Path) -> Path:
    """The checkpoint that OCEAN branches from."""
    return run / "data" / "pretrained" / "checkpoints" / "step-00000000"


def write(run: Path, config: Config) -> None:
    """The run's tokenizer and what OCEAN branches from; what an earlier sitting wrote whole is kept."""
    import torch

    from constellation import optim
    from constellation.kernel.llama import load_embedding, load_llama, projected
    from constellation.kernel.model import KernelLM
    from constellation.train import checkpoint

    tokenizer_of(config).save(run / "tokenizer.json")
    target = folder_of(run)
    if (target / "state.json").exists():
        return
    if config.pretrained.folder:
        model = load_llama(Path(config.pretrained.folder), config.kernel)
    else:
        model = KernelLM(config.kernel, seed=config.train.seed)
        with torch.no_grad():
            model.embedding.weight.copy_(
                projected(load_embedding(Path(config.pretrained.embeddings)), config.kernel.width)
            )
    optimizer = optim.build(config.optim, model)
    checkpoint.save(
        target.parents[1], 0, model, optimizer, {}, tokens=0, dev_bits_per_byte=None, keep_last=1, keep_best=0
    )  # fmt: skip
    write_json(target.parents[1] / "origin.json", {"from": config.pretrained.given})


def _check_same_kernel(ours: Kernel, theirs: Kernel, folder: Path) -> None:
    if ours.context > theirs.context:
        raise ConfigError(
            f"kernel.context={ours.context}: the rotary table of {folder} ends at {theirs.context} positions"
        )
    for name, value in vars(theirs).items():
        if name not in FREE and getattr(ours, name) != value:
            raise ConfigError(f"kernel.{name}={getattr(ours, name)}: {folder} has {value}; leave it out")


def _there(path: Path) -> Path:
    if not path.exists():
        raise ConfigError(f"{path} does not exist; give a folder with config.json, safetensors and tokenizer.json")
    return path


def _embedding_shape(path: Path) -> tuple[int, int]:
    if path.is_dir():
        found = {name: shape for name, (_, shape) in llama_folder.stored(path).items()}
    else:
        found = llama_folder.stored_in(path)
    name = llama_folder.embedding_name(path, found)
    if len(found[name]) != 2:
        raise ArtifactError(f"{path}: {name} is of shape {found[name]}, a matrix is wanted")
    rows, columns = found[name]
    return rows, columns
