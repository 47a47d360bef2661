"""The sentences of the privacy page: which evidence stands under which head, and what nothing here protects.

The three heads are those of Opinion 05/2014 of the Article 29 Working Party (WP216), the predecessor of the European
Data Protection Board.
"""

from __future__ import annotations

from fedgan.report.html.format import number
from fedgan.report.run.data import RunData, dig
from fedgan.report.run.privacy.guarantee import hides_hospitals, is_dealt

HEADS = {
    "singling-out": (
        "Singling out",
        "Does a synthetic image, or the generator itself, show one patient's image?",
        "Copies, memorised images and the projection gap stand here because each asks whether one record can be isolated: a "
        "synthetic image that lies as near to a training image as real images hardly ever do, a training image that such a "
        "copy repeats, and training images that the generator can redraw more exactly than images it never saw.",
    ),
    "linkability": (
        "Linkability",
        "Can somebody who holds a real image link it with what was released?",
        "Nearest neighbours and membership by distance stand here because they use nothing but a real image and the synthetic "
        "ones: is the release nearer to the patients it was made from than to other patients of the same hospital?",
    ),
    "inference": (
        "Inference",
        "Can something be deduced of a patient: here, that they were among the training images?",
        "The other membership attacks stand here because having been a patient of this hospital is an attribute that they "
        "deduce from the model. What is true of all such patients is learned on purpose, and no figure counts it as a leak. "
        "The deduction of other attributes was not tried.",
    ),
}

COMMAND = "fedgan audit RUN"
NO_AUDIT = "No audit was run: no search for copies, no membership attack, no projection."
UNREADABLE = (
    "audit.json is damaged: what the audit found is not known, and without it nothing is evidence."
)
LIMIT = "This is evidence about the attacks that were tried, and no proof that another one would find nothing."


def not_protected(run: RunData, counts: bool = True) -> list[str]:
    """What neither the guarantee nor the audit covers, the gravest first; `counts`: whether counts stand on the same page."""
    settings = run.settings
    privacy, found = settings.privacy, []
    counted = "neither those runs nor " if is_dealt(settings) else "those runs, but not "
    guaranteed = privacy.on and privacy.noise_multiplier != 0
    if not guaranteed and hides_hospitals(run):
        found.append(
            "An image or a patient, from the server: it sees each hospital's update without noise, and no gradient was clipped "
            "in the hospital. From others they are hidden only as part of their hospital, at the ε of whole hospitals."
        )
    elif not guaranteed:
        found.append(
            "The generator, the discriminator and every image drawn from them: there is no guarantee at all, only the attacks "
            "that were tried, with the figures that they gave."
        )
    found += [
        "Figures measured on real validation and test images, and the classifiers and feature extractors trained on real images "
        "to measure them: they are computed without noise.",
        "The number of images of each hospital: it sets weights, budgets, the sampling rate and δ."
        + (" The counts of images, patients and classes on this page are exact." if counts else ""),
        "How long a hospital takes for a round, which the server can clock: it varies with the number of images in its samples."
        if privacy.on
        else "How long a hospital takes for a round: it tells of its number of images and of its machine.",
    ]
    if guaranteed:
        found.append(
            "Whatever was trained on these images without privacy: no ledger knows of it."
            + (
                " Nor does one of other runs: these hospitals were dealt for this run."
                if is_dealt(settings)
                else ""
            )
        )
        found.append(
            f"Settings that were chosen by looking at earlier private runs: the ledger counts {counted}what their figures on "
            "real images told whoever chose."
        )
        if privacy.unit == "image":
            found.append(
                "A patient with several images: ε is of one image. With k images of one patient it is up to k times as large, "
                f"and δ grows faster than that.{_images_a_patient(run) if counts else ''}"
            )
        if settings.training.warm_start and privacy.public_start:
            found.append(
                "The images behind the model that training began with: they were declared public, which nobody checked."
            )
    found.append(
        "A patient who is in two hospitals: what each hospital spends adds up for them, and no hospital knows of the other's."
        if guaranteed
        else "A patient who is in two hospitals: an audit looks at each hospital by itself."
    )
    found.append(
        "What images tell of a whole group of patients: a model is made to learn that, whether or not one of them is among them."
    )
    return found


def _images_a_patient(run: RunData) -> str:
    """The mean number of training images a patient, by hospital, where both are known and differ."""
    means = []
    for row in run.hospitals:
        images, patients = (
            number(dig(row, "images", "train")),
            number(dig(row, "patients", "train")),
        )
        if images and patients and images > patients:
            means.append(f"{row.get('name', 'unnamed')} {images / patients:.1f}")
    return f" Mean number of training images a patient: {', '.join(means)}." if means else ""
