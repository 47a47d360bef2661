"""How far each hospital's change moves the model: `federation.weights` and `federation.label_rows`.

Flower's strategies take the mean of models Y_k by `num_examples`, p_k = n_k / Σ n. A change is scaled here before they see it,
Y_k ← M + (w_k / p_k) (Y_k - M) with M the model that was sent, so that their mean is M + Σ w_k (Y_k - M):

    size    w_k = p_k             FedAvg (arXiv 1602.05629)
    root    w_k = √n_k / Σ √n     between the two
    equal   w_k = 1 / K           no hospital more than another
    sum     w_k = 1               every step of every hospital counts whole
    damped  w_k = √Σ q²           the sum, less the more hospitals share the steps; q: a hospital's share of the run's steps

The mean by size discounts a small hospital twice where it also takes fewer steps (`federation.local_images =
"proportional"`): with 71 and 26 % of the images the second moves the model by 0.26 · 0.26 against 0.71 · 0.71 of the first.
`equal` leaves the ratio of the images. `sum` adds the changes up, which is FedNova's rule (arXiv 2007.07481, eq. 6) with as
many effective steps as all hospitals took together: in the limit of short rounds the steps of pooled training, one after
the other. Long rounds overshoot under it, and so do short ones of hospitals that are alike, for Adam's steps are as long
whatever the gradient, and alike hospitals take the same ones. `damped` divides it by the root of 1 / Σ q², the
effective number of hospitals: K for K hospitals of equal steps, for whom it is the geometric mean of mean and sum, and 1 for
one. It is a rule of thumb that was measured (docs/federation.md), and it knows sizes alone: equally large hospitals are
damped whether they are alike or not, and so is what one hospital alone moves (its own label, its own institution). What is an
average already (`ema`, the generator's w_avg) is averaged by size, and by no server optimiser; under `federation.secure` as
hospitals weigh there.

`federation.label_rows`: the column of a label in the two embeddings is averaged over those alone who hold the label. Adam
moves it in one hospital as fast as in all, and a mean with those who never saw the label would shrink that to the
holders' share. Who holds it is read off the change: a column without a gradient has not moved.

Nothing more leaves a hospital for any of these: the server sees each model as it is. Under `federation.secure` it sees a sum, in
which hospitals weigh what they themselves put under the mask: their images, or 1 for `equal` and the sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from flwr.app import Message

from fedgan.config import Settings
from fedgan.runs.compatibility import SUMS
from fedgan.training.ema import AVERAGE, SOURCE
from fedgan.models.families import LABEL_EMBEDDING
from server.records import ARRAYS, METRICS, WEIGHT, to_record


def weigh(settings: Settings, replies: Sequence[Message], sent: Mapping[str, np.ndarray]) -> None:
    """Scale the changes of whole models, answers to `sent`, in place. Replies that are to count as they are stay untouched."""
    federation = settings.federation
    if federation.weights == "size" and not federation.label_rows:
        return
    models = [
        {key: array.numpy() for key, array in reply.content.array_records[ARRAYS].items()}
        for reply in replies
    ]
    rows = [key for key in sent if federation.label_rows and key.endswith(LABEL_EMBEDDING)]
    moved = {
        key: [np.asarray(model[key], np.float64) - sent[key] for model in models] for key in rows
    }
    sizes = _sizes(replies)
    by_size = shares(sizes, "size")
    weights = weights_of(settings, sizes)
    for key, before in sent.items():
        wanted = by_size if is_average(key) else weights
        factors = [np.asarray(factor) for factor in wanted / by_size]
        if key in moved:
            # an average moves towards the model that arrived in every hospital: its holders are those of what it averages
            source = SOURCE + key.removeprefix(AVERAGE)
            held = columns(moved[source if source in moved else key], wanted)
            factors = [column / share for column, share in zip(held, by_size, strict=True)]
        for model, factor in zip(models, factors, strict=True):
            if not np.all(factor == 1):  # else to the bit what the hospital sent
                model[key] = (
                    before + factor * (np.asarray(model[key], np.float64) - before)
                ).astype(np.float32)
    for reply, model in zip(replies, models, strict=True):
        reply.content[ARRAYS] = to_record(model)


def weights_of(settings: Settings, sizes: np.ndarray) -> np.ndarray:
    """The weights w (K,) of hospitals with these numbers of images; they add up to 1 but for 'sum' and 'damped'."""
    federation = settings.federation
    if federation.weights not in SUMS:
        return shares(sizes, federation.weights)
    if federation.weights == "sum":
        return np.ones(len(sizes))
    # shares of the run's steps, as fedgan/runs/budget.py deals them, and not of a round, which may be too short for all
    steps = shares(sizes, "equal" if federation.equal_steps else "size")
    return np.full(len(sizes), np.sqrt(np.sum(np.square(steps))))


def shares(sizes: np.ndarray, rule: str) -> np.ndarray:
    """Weights (K,) of a mean, by 'size', 'root' or 'equal': they add up to 1."""
    weights = {"size": sizes, "root": np.sqrt(sizes), "equal": np.ones(len(sizes))}[rule]
    return np.asarray(weights / weights.sum())


def columns(changes: Sequence[np.ndarray], weights: np.ndarray) -> list[np.ndarray]:
    """For each hospital (1, labels): the weights of a label's holders grown to the sum of all weights, 0 for the others.

    `changes`: (width, labels) each. A column that nobody moved is weighed by `weights`.
    """
    moved = np.array([np.abs(change).max(axis=0) > 0 for change in changes])
    held = moved * weights[:, None]
    total = held.sum(axis=0)
    grown = np.where(
        total > 0, held * (weights.sum() / np.where(total > 0, total, 1)), weights[:, None]
    )
    return [row[None] for row in grown]


def plain_averages(
    replies: Sequence[Message], sent: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The running averages among the arrays, averaged by size."""
    by_size, found = shares(_sizes(replies), "size"), {}
    for key in filter(is_average, sent):
        arrays = [
            np.asarray(reply.content.array_records[ARRAYS][key].numpy(), np.float64)
            for reply in replies
        ]
        found[key] = np.tensordot(by_size, np.stack(arrays), 1).astype(np.float32)
    return found


def _sizes(replies: Sequence[Message]) -> np.ndarray:
    return np.array([float(reply.content.metric_records[METRICS][WEIGHT]) for reply in replies])


def is_average(key: str) -> bool:
    """Whether an array is a running average: those of several hospitals have a mean and no sum."""
    return key.startswith(AVERAGE) or key.endswith("w_avg")
