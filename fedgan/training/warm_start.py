"""Beginning from a model that was trained before, on other images: phantoms or public ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fedgan.config import Settings
from fedgan.errors import CheckpointError
from fedgan.privacy.validator import check_start
from fedgan.run_folder import RunFolder
from fedgan.training.checkpoint import load_tensors, with_prefix
from fedgan.training.trainer import Trainer

LABEL_LAYER = (
    "mapping.embed.weight"  # (w_dim, label_dim): the one tensor whose shape follows the labels
)


def warm_start(trainer: Trainer, settings: Settings | None = None) -> None:
    """Take over the weights of `training.warm_start` (a run folder or a checkpoint); nothing where it is empty.

    Labels of the same name keep their embedding, others begin as the seed gives them, as do the columns of hospitals
    (`model.hospitals`), because another run's hospitals are others; sizes of the networks must agree.
    Optimisers, ADA and averages begin anew. Raises `CheckpointError` when the file is missing or made for other networks,
    `ConfigError` when privacy is on and its images are not known to be public. `settings`: of the run, where the Trainer's
    own are not (a server's has no privacy, because it sees no image).
    """
    settings = settings or trainer.settings
    if not settings.training.warm_start:
        return
    path = checkpoint_of(settings)
    tensors, meta = load_tensors(path)
    check_start(settings, path, meta)
    theirs = [str(name) for name in meta.get("label_names", [])]
    for part, module in trainer.parts.items():
        # a hospital that keeps its D sends none: the start has then none either
        given = with_prefix(tensors, f"{part}/") or (
            with_prefix(tensors, "ema/") if part == "generator" else {}
        )
        if given:
            _copy(module, given, theirs, trainer.dataset.label_names, f"{path.name}, {part}")
    if not with_prefix(tensors, "ema/"):
        trainer.ema.load_state_dict(trainer.generator.state_dict())
    if trainer.d_average is not None:
        trainer.d_average.load_state_dict(trainer.discriminator.state_dict())


def checkpoint_of(settings: Settings) -> Path:
    """The checkpoint that `training.warm_start` names. Raises `CheckpointError` where there is none."""
    path = Path(settings.training.warm_start).expanduser()
    if path.suffix == ".safetensors":
        return path
    newest = RunFolder.at(path).last_round()
    if newest is None:
        raise CheckpointError(
            f"training.warm_start = {path}: no checkpoint there; give a run folder or a .safetensors of one"
        )
    return RunFolder.at(path).checkpoint(newest)


@torch.no_grad()
def _copy(
    module: nn.Module,
    given: Mapping[str, Tensor],
    theirs: list[str],
    ours: tuple[str, ...],
    where: str,
) -> None:
    for name, own in module.state_dict().items():
        found = given.get(name)
        if name == LABEL_LAYER and found is not None and found.shape[0] == own.shape[0]:
            for column, label in enumerate(ours):
                if label in theirs:
                    own[:, column] = found[:, theirs.index(label)].to(own)
        elif found is not None and found.shape == own.shape:
            own.copy_(found)
        else:
            raise CheckpointError(
                f"training.warm_start: {where} has no '{name}' of shape {tuple(own.shape)}: its model section or channels differ"
            )
