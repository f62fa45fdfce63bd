"""A topo run as it lies on disk: its images, its model, its numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from constellation.control.precision import LearnedPrecisions
from constellation.errors import ArtifactError
from constellation.topo.adaptive import Adaptive
from constellation.topo.images import Images
from constellation.topo.losses import weights_of
from constellation.topo.model import TopoEncoder
from constellation.topo.readers import read_images
from constellation.topo.request import opened
from constellation.train import checkpoint


def load(run: Path, source: str | None = None) -> tuple[TopoEncoder, Images, Tensor | None]:
    """Model of the newest whole checkpoint, the images (the run's own, or those of `source`), bias of the charts."""
    own, config = opened(run)
    images = read_images(source or own)
    s = config.topo

    def restored(found: checkpoint.Checkpoint) -> tuple[TopoEncoder, dict[str, Any]]:
        trained = found.state["kernel"]
        if trained != vars(s.model):
            raise ArtifactError(f"{found.path} is of another model than {run} asks for")
        classes = _classes(found, images)
        model = TopoEncoder(s.model, images.shape, classes, s.train.seed)
        if s.control.weights == "precision":
            model.add_module("precisions", LearnedPrecisions(("reconstruction", "vq")))
        found.restore(model)
        return model, found.parts

    found = checkpoint.use_newest(run, restored)
    if found is None:
        raise ArtifactError(f"{run} holds no checkpoint yet; go on: constellation topo train --run {run} --resume")
    model, parts = found
    adaptive = Adaptive(s, weights_of(s.loss, s.model.nuisance, s.model.texture), 1)
    adaptive.load_state(parts["adaptive"])
    return model.eval(), images, None if adaptive.bias is None else torch.tensor(adaptive.bias)


def _classes(found: checkpoint.Checkpoint, images: Images) -> int:
    """Classes the run was trained with, read off its probe."""
    from safetensors import safe_open

    with safe_open(found.path / "model.safetensors", "pt") as held:
        return int(held.get_slice("table").get_shape()[1])
