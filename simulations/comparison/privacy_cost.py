"""What an arm cost in privacy: read from the ledgers of its hospitals, for its own run alone.

All arms of a comparison train on the same shards, so their ledgers add up: that sum is what holds for the patients, and it is
there too. What a rung of an ablation costs by itself is the ε of its own entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedgan.data.federation import Hospital
from fedgan.errors import DataError, FederationError
from fedgan.privacy.accounting import epsilon_of
from fedgan.privacy.ledger import NAME as LEDGER
from fedgan.privacy.ledger import Ledger
from fedgan.runs.preparation import experiment_of
from simulations.comparison.arm import Arm, Job


def spent(arm: Arm, hospitals: Sequence[Hospital]) -> dict[str, Any] | None:
    """{"hospitals": [{name, epsilon, delta, noise_multiplier, sample_rate, steps, ledger_epsilon, unknown}]}; None: no privacy.

    `epsilon` is this run's alone, `ledger_epsilon` that of all runs on the shard until now; None is infinite. `unknown`: the
    ledger has no entry of this run, or cannot be read.
    """
    if not any(job.settings.privacy.on for job in arm.jobs):
        return None
    rows = [
        _of_hospital(job, hospital)
        for job in arm.jobs
        for hospital in hospitals
        if hospital.name in (job.members or arm.members)
    ]
    return {"hospitals": rows}


def _of_hospital(job: Job, hospital: Hospital) -> dict[str, Any]:
    row: dict[str, Any] = {"name": hospital.name, "unknown": True}
    row |= dict.fromkeys(
        ("epsilon", "delta", "noise_multiplier", "sample_rate", "steps", "ledger_epsilon")
    )
    try:
        ledger = Ledger((hospital.shard_path or job.run.hospital_state(hospital.name)) / LEDGER)
        entries = ledger.entries()
        experiment = experiment_of(job.run)
    except (DataError, FederationError):
        return row
    own = [entry for entry in entries if entry.run == experiment]
    if not own:
        return row
    delta, last = own[-1].delta, own[-1]
    return row | {
        "unknown": False,
        "epsilon": _finite(epsilon_of([entry.mechanism for entry in own], delta)),
        "delta": delta,
        "noise_multiplier": last.noise_multiplier,
        "sample_rate": last.sample_rate,
        "steps": sum(entry.steps for entry in own if entry.kind == last.kind),
        "ledger_epsilon": _finite(ledger.epsilon(delta)),
    }


def _finite(value: float) -> float | None:
    return value if value != float("inf") else None
