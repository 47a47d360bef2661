"""The sentences that every card shares: what the thing is for, what it is not for, and who has to fill which blank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

STATEMENT = "Every image is synthetic: drawn by a generative model, not taken of a patient. Not for diagnosis."

INTENDED = (
    "Research on generative models and on federated learning.",
    "Augmentation of training images for classifiers whose performance is then measured on real images.",
    "Education and demonstration, with each image named as synthetic.",
    "Development and testing of software that reads such images.",
)
OUT_OF_SCOPE = (
    "Diagnosis, triage, treatment or any other decision about a patient.",
    "A substitute for real images where a method is validated, certified or compared with a clinical standard.",
    "Estimates of how frequent a finding is: the label mix of synthetic images is chosen, not observed.",
    "A claim that nobody can be recognised in the images: see what is not known under privacy.",
    "Attempts to find out who was among the patients of the training images.",
)
ARMS = {
    "federated": "federated: each hospital trained on its own images, and a server aggregated what they sent",
    "centralized": "centralised: one training on the pooled images of all hospitals",
    "local": "local: each hospital trained a generator of its own, without the others",
    "finetuned": "federated, then trained further by each hospital on its own images",
    "coalition": "federated over some of the hospitals only",
}
OF_A_MEMBER = {  # what the counts of one hospital's own training within an arm leave out
    "local": "This is one hospital's training: its budget is its share of the arm's, which no file of this folder states.",
    "finetuned": "Rounds, bytes and time are of the training at home; the federation before it is counted in its own folder. "
    "Images are those of this hospital alone, in the federation and at home.",
}

# field, who fills it, what it says
Blank = tuple[str, str, str]
COORDINATOR, HOSPITAL, RELEASER = (
    "the coordinating institution",
    "each hospital",
    "the releasing institution",
)

CONTACT: Blank = (
    "contact",
    COORDINATOR,
    "a person and an address for questions, corrections and incidents",
)
MODEL_LICENCE: Blank = (
    "licence of the model",
    COORDINATOR,
    "the licence of the weights; the licences of the training images are listed and bind it",
)
CITATION: Blank = ("citation", COORDINATOR, "how the work is to be cited")
VALIDATION: Blank = (
    "clinical review",
    COORDINATOR,
    "whether radiologists or other specialists looked at the images, and what they found",
)
MAINTENANCE: Blank = (
    "maintenance",
    COORDINATOR,
    "who corrects errors, for how long, and how a withdrawal of consent is handled",
)
ETHICS: Blank = (
    "ethics approval",
    HOSPITAL,
    "the board, the number and the date of the approval, or why none was needed",
)
CONSENT: Blank = (
    "consent or legal basis",
    HOSPITAL,
    "the consent or the legal basis on which the images were used",
)
ACQUISITION: Blank = ("acquisition", HOSPITAL, "devices, protocols and years of the images")
POPULATION: Blank = (
    "population",
    HOSPITAL,
    "age, sex, ethnicity and setting of the patients, and who is under-represented",
)
LABELLING: Blank = (
    "labelling",
    HOSPITAL,
    "who gave the labels, from what, and with what agreement",
)
DEIDENTIFICATION: Blank = (
    "de-identification",
    HOSPITAL,
    "how the images were de-identified, and who checked it",
)
RELEASE_LICENCE: Blank = (
    "licence of this set",
    RELEASER,
    "the licence under which the synthetic images are handed on; the licences of the sources are listed and may bind it",
)
RELEASE_CONTACT: Blank = (
    "contact",
    RELEASER,
    "a person and an address for questions, corrections and incidents",
)
RELEASE_APPROVAL: Blank = (
    "approval of the release",
    RELEASER,
    "who approved the release, on which evidence of privacy",
)
RELEASE_MAINTENANCE: Blank = (
    "maintenance",
    RELEASER,
    "who corrects errors, for how long, and how a set is recalled",
)
RELEASE_DATE: Blank = ("date", RELEASER, "the date of the release")
OF_PATIENTS = (ETHICS, CONSENT, ACQUISITION, POPULATION, LABELLING, DEIDENTIFICATION)


def blanks(fields: Sequence[Blank]) -> list[dict[str, Any]]:
    """Blanks as rows {field, who, sentence, value: None}; the sentence says who has to fill what."""
    return [
        {
            "field": name,
            "who": who,
            "sentence": f"Not known to this card. To be filled by {who}: {what}.",
            "value": None,
        }
        for name, who, what in fields
    ]
