"""Statements shared by the cards: intended use, out-of-scope use, arms, and blanks to fill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

STATEMENT = (
    "Every image is synthetic: made by a generative model, not taken of a patient. Not for "
    "diagnosis."
)

INTENDED = (
    "Research on generative models and on federated learning.",
    "Augmentation of the training images of classifiers that are then tested on real images.",
    "Education and demonstration, with each image labelled as synthetic.",
    "Development and testing of software that reads such images.",
)
OUT_OF_SCOPE = (
    "Diagnosis, triage, treatment or any other decision about a patient.",
    "A substitute for real images when a method is validated, certified or compared with a "
    "clinical standard.",
    "Estimates of the frequency of a finding: the label mix of synthetic images is chosen, not "
    "observed.",
    "A claim that nobody can be recognised in the images: see 'Not known' under Privacy.",
    "Attempts to identify patients of the training images.",
)
ARMS = {
    "federated": "federated: hospitals train on their own images, a server aggregates the updates",
    "centralized": "centralised: one training on the pooled images of all hospitals",
    "local": "local: each hospital trains its own generator, without the others",
    "finetuned": "federated, then fine-tuned by each hospital on its own images",
    "coalition": "federated over a subset of the hospitals",
}
MEMBER_NOTES = {  # what the counts of one hospital's own training within an arm leave out
    "local": "This is the training of one hospital: its budget is its share of the budget of the "
    "arm, which no file in this folder states.",
    "finetuned": "Rounds, bytes and time cover the fine-tuning only; the folder of the federation "
    "counts the training before it. Images seen are those of this hospital alone, in the "
    "federation and in the fine-tuning.",
}

# field, who fills it, what to state
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
    "the licence of the weights; the listed licences of the training images restrict it",
)
CITATION: Blank = ("citation", COORDINATOR, "how to cite this work")
VALIDATION: Blank = (
    "clinical review",
    COORDINATOR,
    "whether radiologists or other specialists reviewed the images, and their findings",
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
    "who assigned the labels, from which source, and with what agreement",
)
DEIDENTIFICATION: Blank = (
    "de-identification",
    HOSPITAL,
    "how the images were de-identified, and who checked it",
)
RELEASE_LICENCE: Blank = (
    "licence of this set",
    RELEASER,
    "the licence of the released synthetic images; the listed licences of the sources may "
    "restrict it",
)
RELEASE_CONTACT: Blank = (
    "contact",
    RELEASER,
    "a person and an address for questions, corrections and incidents",
)
RELEASE_APPROVAL: Blank = (
    "approval of the release",
    RELEASER,
    "who approved the release, on what privacy evidence",
)
RELEASE_MAINTENANCE: Blank = (
    "maintenance",
    RELEASER,
    "who corrects errors, for how long, and how a set is recalled",
)
RELEASE_DATE: Blank = ("date", RELEASER, "the date of the release")
PATIENT_BLANKS = (ETHICS, CONSENT, ACQUISITION, POPULATION, LABELLING, DEIDENTIFICATION)


def blanks(fields: Sequence[Blank]) -> list[dict[str, Any]]:
    """Blanks as rows {field, who, sentence, value: None}; the sentence states who fills what."""
    return [
        {
            "field": name,
            "who": who,
            "sentence": f"Not known. To be filled in by {who}: {what}.",
            "value": None,
        }
        for name, who, what in fields
    ]
