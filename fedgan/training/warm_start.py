"""Warm start: initialise the networks from a model that was trained on other images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fedgan.config import Settings
from fedgan.errors import CheckpointError
from fedgan.models.families import LABEL_EMBEDDING
from fedgan.privacy.validator import check_start
from fedgan.run_folder import RunFolder
from fedgan.training.checkpoint import WRONG, load_tensors, with_prefix
from fedgan.training.trainer import Trainer


def warm_start(trainer: Trainer, settings: Settings | None = None) -> None:
    """Load the weights of `training.warm_start`, a run folder or a checkpoint, if it is set.

    Labels of the same name keep their embedding; other labels, and the columns of hospitals
    (`model.hospitals`), keep their initialisation. Optimisers, ADA and averages start anew.
    `settings`: of the run, where the Trainer's own differ (a server's have no privacy, because it
    sees no image).

    Raises `CheckpointError` for a missing file or other networks, `ConfigError` with privacy on and
    images that are not known to be public.
    """
    settings = settings or trainer.settings
    if not settings.training.warm_start:
        return
    path = checkpoint_of(settings)
    tensors, meta = load_tensors(path)
    try:
        check_start(settings, path, meta)
        source_labels = [str(name) for name in meta.get("label_names", [])]
    except WRONG:
        raise CheckpointError(
            f"training.warm_start: {path.with_suffix('.json')} is damaged: use another checkpoint"
        ) from None
    for part, network in trainer.parts.items():
        # A run whose hospitals keep their D has none to start from.
        weights = with_prefix(tensors, f"{part}/")
        if part == "generator":
            weights = weights or with_prefix(tensors, "ema/")
        if weights:
            where = f"{path.name}, {part}"
            _copy(network, weights, source_labels, trainer.dataset.label_names, where)
    if not with_prefix(tensors, "ema/"):
        trainer.ema.load_state_dict(trainer.parts["generator"].state_dict())
    trainer.step.reset_averages()


def checkpoint_of(settings: Settings) -> Path:
    """The checkpoint of `training.warm_start`. Raises `CheckpointError` where there is none."""
    path = Path(settings.training.warm_start).expanduser()
    if path.suffix == ".safetensors":
        return path
    newest = RunFolder.at(path).last_round()
    if newest is None:
        raise CheckpointError(
            f"training.warm_start = {path}: no checkpoint there; "
            "give a run folder or one of its .safetensors"
        )
    return RunFolder.at(path).checkpoint(newest)


@torch.no_grad()
def _copy(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    source_labels: Sequence[str],
    labels: Sequence[str],
    where: str,
) -> None:
    """Copy `weights` by name, the label embedding by label; `CheckpointError` on a mismatch."""
    for name, own in network.state_dict().items():
        found = weights.get(name)
        if name == LABEL_EMBEDDING and found is not None and found.shape[0] == own.shape[0]:
            for column, label in enumerate(labels):
                if label in source_labels:
                    own[:, column] = found[:, source_labels.index(label)].to(own)
        elif found is not None and found.shape == own.shape:
            own.copy_(found)
        else:
            raise CheckpointError(
                f"training.warm_start: {where} has no '{name}' of shape {tuple(own.shape)}: "
                "its model section or channels differ"
            )
