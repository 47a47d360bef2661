"""How far each hospital's change moves the model: `federation.weights` and `federation.label_rows`.

Flower's strategies take the mean of models Y_k by `num_examples`, p_k = n_k / Σ n. A change is
scaled here before, Y_k ← M + (w_k / p_k) (Y_k - M) with M the model that was sent, so that their
mean is M + Σ w_k (Y_k - M):

    size    w_k = p_k             FedAvg (arXiv 1602.05629)
    root    w_k = √n_k / Σ √n     between size and equal
    equal   w_k = 1 / K           the same for each hospital
    sum     w_k = 1               every step of every hospital counts fully
    damped  w_k = √Σ q²           q: a hospital's share of the run's steps

The mean by size discounts a small hospital twice where it also takes fewer steps
(`federation.local_images = "proportional"`): with 71 and 26 % of the images, the second moves the
model by 0.26 · 0.26 against 0.71 · 0.71 of the first. `equal` leaves the ratio of the images.

`sum` adds the changes up: FedNova's rule (arXiv 2007.07481, eq. 6) with the number of steps of all
hospitals together as effective steps. For short rounds it approaches the steps of pooled training,
one after the other. It overshoots in long rounds, and in short rounds of similar hospitals, because
the length of Adam's steps does not depend on the gradient's and similar hospitals take the same
steps. `damped` divides the sum by the root of 1 / Σ q², the effective number of hospitals: K for K
hospitals of equal steps (the geometric mean of mean and sum), 1 for one. This heuristic was
measured (docs/results/federation.md) and depends on sizes only: equally large hospitals are damped
equally whether they are similar or not, and so is what only one hospital moves (a label of its
own).

Running averages (`ema`, the generator's w_avg) are always averaged by size, without a server
optimiser; under `federation.secure` with the weights under the mask.

`federation.label_rows`: the column of a label in the two embeddings is averaged over the hospitals
that hold the label only. Adam moves it in one hospital as fast as in all, and a mean with hospitals
that never saw the label would shrink that to the holders' share. The change shows which hospitals
hold it: a column without a gradient has not moved.

A hospital's size n_k is its own statement: `federation.max_share` limits its share of Σ n before.

No further data leaves a hospital for any of these: the server sees each model. Under
`federation.secure` it sees a sum in which each hospital has put its weight under the mask: its
images, or 1 for `equal`, `sum` and `damped`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from flwr.app import Message, MetricRecord

from fedgan.apportion import limit_shares
from fedgan.config import Settings
from fedgan.models.families import LABEL_EMBEDDING
from fedgan.runs.compatibility import SUMS
from fedgan.training.ema import AVERAGE, SOURCE
from server.records import ARRAYS, METRICS, WEIGHT, model_of, to_record


def apply_weights(
    settings: Settings, replies: Sequence[Message], sent: Mapping[str, np.ndarray]
) -> None:
    """Scale the changes of whole models relative to `sent`, in place.

    Arrays whose factor is 1 keep their bits.
    """
    federation = settings.federation
    if federation.weights == "size" and not federation.label_rows:
        return
    models = [model_of(reply) for reply in replies]
    label_rows = [key for key in sent if federation.label_rows and key.endswith(LABEL_EMBEDDING)]
    moved = {
        key: [np.asarray(model[key], np.float64) - sent[key] for model in models]
        for key in label_rows
    }
    sizes = _sizes(replies)
    by_size = mean_weights(sizes, "size")
    weights = hospital_weights(settings, sizes)
    for key, before in sent.items():
        target = by_size if is_average(key) else weights
        factors = [np.asarray(factor) for factor in target / by_size]
        if key in moved:
            # an average moves towards the received model in every hospital: its holders are the
            # holders of what it averages
            source = SOURCE + key.removeprefix(AVERAGE)
            columns = holder_weights(moved[source if source in moved else key], target)
            factors = [column / share for column, share in zip(columns, by_size, strict=True)]
        for model, factor in zip(models, factors, strict=True):
            if not np.all(factor == 1):
                change = np.asarray(model[key], np.float64) - before
                model[key] = (before + factor * change).astype(np.float32)
    for reply, model in zip(replies, models, strict=True):
        reply.content[ARRAYS] = to_record(model)


def limit_weights(settings: Settings, replies: Sequence[Message]) -> None:
    """Reduce `num_examples`, in place, until none exceeds `federation.max_share` of the round."""
    sizes = [int(size) for size in _sizes(replies)]
    limited = limit_shares(sizes, settings.federation.max_share)
    for reply, size, limit in zip(replies, sizes, limited, strict=True):
        if limit < size:
            reply.content[METRICS] = MetricRecord({WEIGHT: limit})


def hospital_weights(settings: Settings, sizes: np.ndarray) -> np.ndarray:
    """The weights w (K,) of hospitals with `sizes` images; 'sum', 'damped': no mean."""
    federation = settings.federation
    if federation.weights not in SUMS:
        return mean_weights(sizes, federation.weights)
    if federation.weights == "sum":
        return np.ones(len(sizes))
    # shares of the run's steps (fedgan/runs/budget.py), not of one round, which may be too short
    steps = mean_weights(sizes, "equal" if federation.equal_steps else "size")
    return np.full(len(sizes), np.sqrt(np.sum(np.square(steps))))


def mean_weights(sizes: np.ndarray, rule: str) -> np.ndarray:
    """Weights (K,) of a mean, by 'size', 'root' or 'equal'; they add up to 1."""
    weights = {"size": sizes, "root": np.sqrt(sizes), "equal": np.ones(len(sizes))}[rule]
    return np.asarray(weights / weights.sum())


def holder_weights(changes: Sequence[np.ndarray], weights: np.ndarray) -> list[np.ndarray]:
    """Per hospital (1, labels): a label's weights, scaled to the sum of `weights` over its holders.

    0 for hospitals without the label. `changes`: (width, labels) each. A column that no hospital
    moved keeps `weights`.
    """
    moved = np.array([np.abs(change).max(axis=0) > 0 for change in changes])
    held = moved * weights[:, None]
    total = held.sum(axis=0)
    scaled = np.where(
        total > 0, held * (weights.sum() / np.where(total > 0, total, 1)), weights[:, None]
    )
    return [row[None] for row in scaled]


def plain_averages(
    replies: Sequence[Message], sent: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The running averages among the arrays, averaged by size."""
    by_size, found = mean_weights(_sizes(replies), "size"), {}
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
    """Whether an array is a running average: of several hospitals' it has a mean and no sum."""
    return key.startswith(AVERAGE) or key.endswith("w_avg")
