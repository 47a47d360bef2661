"""Table of the empirical ε by canaries, beside the ledger's ε of the same training."""

from __future__ import annotations

from markupsafe import Markup

from fedgan.report.html import format as text
from fedgan.report.html.tables import Column, table
from fedgan.report.run.data import tree, trees
from fedgan.report.run.privacy.findings import Audit, name_of

COLUMNS = [
    Column("Hospital, canaries", numeric=False),
    Column("ε at least", title="Lower bound at 95 % confidence"),
    Column("Ledger's ε", title="Of the training with canaries"),
    Column("δ"),
    Column("Correct guesses"),
    Column("Canaries"),
]
MORE = (
    "One more private training of the hospital with canaries that coins include, discarded "
    "afterwards (arXiv 2305.08846). Images: scored by the discriminator. Gradients: the worst-case "
    "server, scored by the noisy gradients. Evidence, no proof: a bound above the ledger's ε shows "
    "a fault, a bound below it does not show that there is none."
)


def canary_table(audit: Audit) -> Markup:
    """One row per hospital and kind of canaries; empty without canaries."""
    rows = [
        [
            f"{name_of(entry)}, {kind}",
            text.decimal(tree(found).get("epsilon_low"), 2),
            "infinite" if entry.get("epsilon") is None else text.decimal(entry["epsilon"], 2),
            text.significant(entry.get("delta"), 3),
            f"{text.whole(tree(found).get('correct'))} of {text.whole(tree(found).get('guesses'))}",
            text.whole(tree(found).get("canaries")),
        ]
        for entry in trees(audit.content.get("canaries"))
        for kind, found in tree(entry.get("kinds")).items()
    ]
    if not rows:
        return Markup("")
    return table("Empirical ε", COLUMNS, rows, "privacy-canaries", more=MORE)
