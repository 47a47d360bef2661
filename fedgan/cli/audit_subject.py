"""What `fedgan audit` reads of a run: its hospitals, the model, and how each hospital trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedgan.cli import console
from fedgan.errors import CheckpointError, ConfigError, DataError

if TYPE_CHECKING:
    from fedgan.audit.subject import AuditedModel, LocalTraining
    from fedgan.config import Settings
    from fedgan.data.federation import Hospital
    from fedgan.run_folder import RunFolder


def open_run_hospitals(settings: Settings, run: RunFolder, shards: Path | None) -> list[Hospital]:
    """The hospitals as the run opened them, or those in `shards`. Raises `DataError` if absent."""
    from fedgan.data.federation import find_shards, open_hospital
    from fedgan.runs.preparation import open_prepared, shards_of

    if shards is not None:
        return [open_hospital(settings, path) for path in find_shards(shards)]
    folder = shards_of(settings, run)
    if not folder.is_dir():
        raise DataError(
            f"the hospitals' shards are no longer at {console.shown(folder)}, and their images are "
            "needed: give --shards DIR, or run this in each hospital with its own shard"
        )
    return open_prepared(settings, run)


def select_hospitals(hospitals: Sequence[Hospital], names: Sequence[str]) -> list[Hospital]:
    """The named hospitals, or all. Raises `ConfigError` for an unknown name."""
    known = [hospital.name for hospital in hospitals]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"--hospital {name}: the run has no such hospital; it has {', '.join(known)}"
            )
    return [hospital for hospital in hospitals if not names or hospital.name in names]


def load_audited_model(checkpoint: Path, settings: Settings) -> tuple[AuditedModel, dict[str, Any]]:
    """The generator of a checkpoint, its discriminator if exchanged, and the checkpoint's meta."""
    from fedgan.audit.subject import AuditedModel
    from fedgan.models.stylegan2.discriminator import Discriminator
    from fedgan.runs.evaluator import evaluation_device
    from fedgan.training.checkpoint import load_generator, load_into, load_tensors, with_prefix

    device = evaluation_device(settings)
    generator, meta = load_generator(checkpoint, device)
    discriminator = None
    if weights := with_prefix(load_tensors(checkpoint)[0], "discriminator/"):
        discriminator = Discriminator(
            settings.model, meta["resolution"], meta["channels"], len(meta["label_names"])
        )
        load_into(discriminator, weights, f"checkpoint {checkpoint}")
        if discriminator.mapping is not None:
            discriminator.mapping.hospital_condition = generator.mapping.hospital_condition
        discriminator = discriminator.eval().requires_grad_(False).to(device)
    numbers = {}
    if settings.model.hospitals and len(meta["participants"]) > 1:
        known = generator.mapping.hospital_condition.known  # hospitals with an update in the model
        numbers = {
            member["name"]: member["number"]
            for member in meta["participants"]
            if member["number"] in known
        }
    trainings = local_trainings(settings, meta)
    return AuditedModel(settings, generator, discriminator, device, numbers, trainings), meta


def local_trainings(settings: Settings, meta: Mapping[str, Any]) -> dict[str, LocalTraining]:
    """Each hospital's own training, by name, as planned when it joined the run of a checkpoint.

    Raises `CheckpointError` for a damaged list of participants.
    """
    from fedgan.audit.subject import LocalTraining
    from fedgan.runs.budget import Plan
    from fedgan.runs.participants import Participant
    from fedgan.training.checkpoint import WRONG

    try:
        plan = Plan(settings, [Participant(**row) for row in meta.get("participants", [])])
    except WRONG:
        raise CheckpointError(
            "the checkpoint's list of participants is damaged: audit another checkpoint"
        ) from None
    noise = plan.least_noise(settings, len(meta["label_names"])) if plan.participants else 0.0
    return {
        row.name: LocalTraining(
            row.number, plan.batches[row.number], plan.planned(row.number), noise
        )
        for row in plan.participants
    }
