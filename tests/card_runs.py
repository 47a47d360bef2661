"""Small artificial run folders for tests of cards and released sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedgan import files
from fedgan.config import Settings, from_dict, to_dict
from fedgan.models.stylegan2.generator import Generator
from fedgan.run_folder import RunFolder
from fedgan.training.checkpoint import save_tensors

LABELS = ("normal", "pneumonia", "covid")
SECRET = "/srv/pacs/St Elm/doe_john"
SOURCES = [
    {
        "hospital": "north",
        "source": "Frontal radiographs of a clinic",
        "licence": "CC BY 4.0",
        "content_hash": "aa11",
    },
    {"hospital": "south", "source": "doe_john.csv", "licence": "", "content_hash": "bb22"},
]


def figures_of(auc: float, weak: float = 0.83) -> dict[str, Any]:
    """Figures of classifiers as in evaluation.json; `weak` is the AUC of covid."""
    return {
        "macro_auc": auc,
        "macro_auc_ci": [auc - 0.0213, auc + 0.0187],
        "macro_auprc": auc - 0.1017,
        "macro_auprc_ci": [auc - 0.15, auc - 0.07],
        "balanced_accuracy": auc - 0.2031,
        "balanced_accuracy_ci": [auc - 0.25, auc - 0.17],
        "macro_f1": auc - 0.2177,
        "sensitivity_at_90": auc - 0.3119,
        "ece": 0.0713,
        "per_class": {
            "normal": {"auc": auc + 0.0111, "auc_ci": [auc - 0.01, auc + 0.03], "positives": 61},
            "pneumonia": {"auc": auc - 0.0123, "auc_ci": [0.49, auc + 0.02], "positives": 44},
            "covid": {"auc": weak, "auc_ci": [weak - 0.1, weak + 0.1], "positives": 7},
        },
        "per_institution": {
            "north": {"macro_auc": auc - 0.0319, "macro_auc_ci": [auc - 0.06, auc], "images": 71}
        },
    }


def evaluation() -> dict[str, Any]:
    """evaluation.json in which covid is weak and recall is below its reference."""
    return {
        "arm": "federated",
        "name": "chest",
        "round": 1,
        "images_seen": 1000,
        "wall_seconds": 61.5,
        "bytes_exchanged": 123_456_789,
        "label_names": list(LABELS),
        "psi": 0.9,
        "suite": "full",
        "utility": {
            "classifier": "small-cnn",
            "seeds": 3,
            "resampled": "patients",
            "train_images": 811,
            "synthetic_images": 642,
            "test_images": 112,
            "real": figures_of(0.9412),
            "synthetic": figures_of(0.8467, weak=0.5531),
            "majority": {"macro_auc": 0.5, "balanced_accuracy": 0.3333},
            "real_on_synthetic": {"macro_auc": 0.8811},
            "mixed": [{"share": 0.5, "macro_auc": 0.9433}, {"share": "all", "macro_auc": 0.9377}],
        },
        "fidelity": {
            "extractor": "reference classifier (small-cnn)",
            "fid": False,
            "real": "validation and test images",
            "images": 311,
            "reference_images": 155,
            "k": 5,
            "frechet": 12.345,
            "frechet_ci": [11.1, 13.7],
            "frechet_reference": 2.105,
            "recall": 0.412,
            "recall_reference": 0.733,
            "per_class": {
                "covid": {
                    "images": 31,
                    "frechet": 33.1,
                    "frechet_reference": 9.7,
                    "coverage": 0.21,
                    "coverage_reference": 0.88,
                },
            },
            "ms_ssim": {"covid": {"synthetic": 0.713, "real": 0.402}},
        },
        "label_fidelity": {"accuracy": 0.8123, "real_accuracy": 0.9017},
        "notes": [
            "Inside south no class has both positive and negative test images: its AUC is null."
        ],
    }


def hospitals() -> list[dict[str, Any]]:
    """hospitals.json of two hospitals; only north has covid."""
    return [
        {
            "name": "north",
            "counts": {
                "train": {"normal": 300, "pneumonia": 150, "covid": 57},
                "val": {},
                "test": {},
            },
            "images": {"train": 507, "val": 61, "test": 71},
            "patients": {"train": 401, "val": 49, "test": 58},
            "content_hash": "aa11",
        },
        {
            "name": "south",
            "counts": {"train": {"normal": 299, "pneumonia": 5, "covid": 0}, "val": {}, "test": {}},
            "images": {"train": 304, "val": 33, "test": 41},
            "patients": {"train": 288, "val": 30, "test": 40},
            "content_hash": "bb22",
        },
    ]


def make_run(
    path: Path, exclusive: bool = True, label_names: tuple[str, ...] = LABELS, **sections: Any
) -> RunFolder:
    """A finished run folder: an untrained generator of 16 pixels, two hospitals, an evaluation.

    `sections` are sections of the settings.
    """
    tree: dict[str, Any] = {
        "name": "chest",
        "data": {"resolution": 16, "root": SECRET, "phantoms": "chest"},
        "model": {"z_dim": 8, "w_dim": 8, "channel_base": 64, "channel_max": 8},
        "training": {"kimg": 1.0},
        "federation": {"hospitals": 2, "rounds": 1},
        "evaluation": {"features": f"{SECRET}/weights.npz"},
    }
    settings: Settings = from_dict(tree | sections)
    run = RunFolder.at(path)
    run.write_settings(settings)
    files.write_json(run.hospitals, hospitals())
    files.write_json(run.evaluation, evaluation())
    packages = {"torch": "2.15.0", "ray": None}
    environment = {
        "experiment": "0123abcd",
        "created": "2026-05-01T10:00:00+0000",
        "python": "3.11.9",
        "packages": packages,
    }
    files.write_json(run.environment, environment | {"sources": SOURCES})
    line = {"round": 1, "images_seen": 1000, "wall_seconds": 61.5, "bytes_exchanged": 123_456_789}
    files.write_text(run.metrics, "")
    generator = Generator(settings.model, 16, 1, len(label_names))
    meta = line | {
        "settings": to_dict(settings),
        "label_names": list(label_names),
        "exclusive": exclusive,
    }
    meta |= {"channels": 1, "resolution": 16}
    save_tensors(
        run.checkpoint(1),
        {f"ema/{name}": value for name, value in generator.state_dict().items()},
        meta,
    )
    return run
