"""Criteria of the evidence, and what neither the guarantee nor the audit protects.

The three criteria are those of Opinion 05/2014 of the Article 29 Working Party (WP216), the
predecessor of the European Data Protection Board.
"""

from __future__ import annotations

from fedgan.report.html.format import number
from fedgan.report.run.data import RunData, dig
from fedgan.report.run.privacy.guarantee import has_client_level_guarantee

CRITERIA = {
    "singling-out": (
        "Singling out",
        "Does a synthetic image, or the generator itself, show the image of one patient?",
        "Copies, memorised images and the projection gap test whether one record can be isolated. "
        "A copy is a synthetic image as near to a training image as real images almost never are. "
        "A memorised image is a training image that such a copy repeats. A projection gap means "
        "that the generator reproduces training images more exactly than images it never saw.",
    ),
    "linkability": (
        "Linkability",
        "Can somebody who holds a real image link it to the released images?",
        "Nearest neighbours and membership by distance use nothing but a real image and the "
        "synthetic ones. They test whether the release is nearer to the patients of the training "
        "images than to other patients of the same hospital.",
    ),
    "inference": (
        "Inference",
        "Can something be inferred about a patient: here, membership in the training images?",
        "The other membership attacks infer one attribute from the model: being a patient of this "
        "hospital. What is true of all such patients is learned on purpose, and no figure counts "
        "it as a leak. The inference of other attributes was not tested.",
    ),
}

COMMAND = "fedgan audit RUN"
NO_AUDIT = "No audit was run: no search for copies, no membership attack, no projection."
UNREADABLE = "audit.json is damaged: the results of the audit are unknown and are no evidence."
LIMIT = (
    "This is evidence about the attacks that were run. It does not prove that other attacks would "
    "find nothing."
)


def not_protected(run: RunData, counts: bool = True) -> list[str]:
    """What neither the guarantee nor the audit covers, most serious first.

    `counts`: whether the same document shows exact counts of images.
    """
    settings = run.settings
    privacy, found = settings.privacy, []
    guaranteed = privacy.on and privacy.noise_multiplier != 0
    if not guaranteed and has_client_level_guarantee(run):
        found.append(
            "An image or a patient, against the server: the server receives the update of each "
            "hospital without noise, and the hospitals did not clip gradients. Against others, "
            "they are protected only as part of their hospital, at the ε of client-level DP."
        )
    elif not guaranteed:
        found.append(
            "The generator, the discriminator and all generated images: there is no guarantee, "
            "only the figures of the attacks that were run."
        )
    found += [
        "Figures measured on real validation and test images, and the classifiers and feature "
        "extractors trained on real images to measure them: they are computed without noise.",
        "The number of images of each hospital: it determines weights, budgets, the sampling rate "
        "and δ."
        + (" The counts of images, patients and classes stated here are exact." if counts else ""),
        "The time that a hospital takes for a round, which the server can measure: it varies with "
        "the number of images in its samples."
        if privacy.on
        else "The time that a hospital takes for a round: it depends on its number of images and "
        "on its machine.",
    ]
    if guaranteed:
        found.append(
            "Anything that was trained on these images without privacy: no ledger records it. What "
            "was trained on another machine: its register knows it, and not this one."
        )
        found.append(
            "Settings chosen after looking at earlier private runs: the ledger counts those runs, "
            "but not what their figures on real images revealed to the person who chose."
        )
        if privacy.unit == "image":
            found.append(
                "A patient with several images: ε holds for one image. For k images of one "
                "patient it is up to k times as large, and δ grows faster than that."
                + (_images_per_patient(run) if counts else "")
            )
        if settings.training.warm_start and privacy.public_start:
            found.append(
                "The training images of the model that this run started from: they were declared "
                "public, and nobody checked that."
            )
    found.append(
        "A patient of two hospitals: the privacy costs of the hospitals add up, and no hospital "
        "has the ledger of another."
        if guaranteed
        else "A patient of two hospitals: an audit examines each hospital separately."
    )
    found.append(
        "What images show about a whole group of patients: a model is trained to learn that, "
        "whether or not one of them is among the training images."
    )
    return found


def _images_per_patient(run: RunData) -> str:
    """The mean number of training images per patient, where both are known and differ."""
    means = []
    for row in run.hospitals:
        images, patients = (
            number(dig(row, "images", "train")),
            number(dig(row, "patients", "train")),
        )
        if images and patients and images > patients:
            means.append(f"{row.get('name', 'unnamed')} {images / patients:.1f}")
    return f" Mean number of training images per patient: {', '.join(means)}." if means else ""
