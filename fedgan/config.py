"""Settings: frozen, typed, one line of meaning per field.

A scenario is one TOML file; `section.key=value` on the command line overrides a key.

    settings = load_scenario("simulations/three_hospitals.toml", ["training.kimg=100"])

An unknown key or an invalid value raises `ConfigError` with the nearest valid one. The metadata of
a field (meaning, choices, range) is its documentation and the help of the command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
import sys
import tomllib
import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from fedgan.errors import ConfigError

FORMAT = 2  # of the settings that a run keeps (config.toml); a scenario needs no format
STRATEGIES = (
    "fedavg",
    "fedprox",
    "fedavgm",
    "fedadam",
    "fedyogi",
    "fedmedian",
    "fedtrimmedavg",
    "krum",
    "multikrum",
)
PARTS = ("generator", "discriminator", "ema")
FAMILIES = ("stylegan2",)
CLASSIFIERS = ("small-cnn", "resnet18", "densenet121", "efficientnet-b2")
PIPES = (
    *("blit", "geom", "color", "filter", "noise", "cutout"),
    *("b", "bg", "bgc", "bgcf", "bgcfn", "bgcfnc"),
)
# These may change in a begun run: no model, privacy cost or rule of disclosure depends on them.
CHANGEABLE = (
    "training.device",
    "federation.threads",
    "federation.wire",
    "federation.secure_range",
    "federation.join_timeout",
    "federation.round_timeout",
)
LARGEST = 2**31 - 1  # of a whole number without a bound of its own: numpy and torch hold no more
MOST_BYTES = 2**16  # of a TOML file
MOST_DOTS = 4000  # in a TOML file: tomllib needs minutes for a key of many parts
T = TypeVar("T")


def meaning(
    default: T,
    text: str,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
) -> T:
    """A field with its default, its one line of meaning, and its choices or range."""
    return field(
        default=default, metadata={"meaning": text, "choices": choices, "low": low, "high": high}
    )


@dataclass(frozen=True)
class DataSettings:
    """The images, and their partition over the hospitals."""

    root: str = meaning(
        "",
        "Folder of shards (one sub-folder per hospital), or one shard; empty: phantoms.",
    )
    resolution: int = meaning(
        32, "Side of the square images in pixels; a power of two.", low=16, high=1024
    )
    phantoms: str = meaning(
        "lesions", "Kind of procedural images when root is empty.", choices=("lesions", "chest")
    )
    phantom_images: int = meaning(
        3000, "Number of phantoms over all hospitals.", low=30, high=10_000_000
    )
    label_map: str = meaning(
        "", "Merges labels of the shards, e.g. 'normal=normal,*=abnormal'; empty: no change."
    )
    partition: str = meaning(
        "institution",
        "institution: one shard per hospital; others: all images are pooled and partitioned anew.",
        choices=("institution", "iid", "dirichlet", "quantities"),
    )
    alpha: float = meaning(
        0.5, "Concentration of the Dirichlet label skew; smaller is more unequal.", low=1e-3
    )
    quantities: tuple[int, ...] = meaning(
        (), "Images per hospital when partition is 'quantities', e.g. [2000, 10000, 20000]."
    )
    seed: int = meaning(
        -1, "Seed of phantoms and partition; -1: seed. Runs with other seeds can share it.", low=-1
    )


@dataclass(frozen=True)
class ModelSettings:
    """The generator family and the size of its networks."""

    family: str = meaning("stylegan2", "Generator family.", choices=FAMILIES)
    z_dim: int = meaning(128, "Dimension of the latent z.", low=1, high=4096)
    w_dim: int = meaning(128, "Dimension of the intermediate latent w.", low=1, high=4096)
    mapping_layers: int = meaning(
        2, "Fully connected layers of the generator's mapping network.", low=1, high=64
    )
    channel_base: int = meaning(
        2048,
        "Channels at resolution r: min(channel_base / r, channel_max).",
        low=16,
        high=2**18,
    )
    channel_max: int = meaning(64, "Maximum of channels per layer.", low=4, high=4096)
    minibatch_std_group: int = meaning(
        4, "Group size of the discriminator's minibatch-std layer; 0: no such layer.", low=0
    )
    d_channel_base: int = meaning(
        0, "channel_base of the discriminator; 0: channel_base.", low=0, high=2**18
    )
    d_channel_max: int = meaning(
        0, "channel_max of the discriminator; 0: channel_max.", low=0, high=4096
    )
    hospitals: int = meaning(
        0, "Condition networks on the hospital: federation.hospitals, or 0: on labels only.", low=0
    )


@dataclass(frozen=True)
class AugmentSettings:
    """Adaptive discriminator augmentation (ADA, arXiv 2006.06676)."""

    mode: str = meaning(
        "ada",
        "ada: p follows r_t; fixed: p stays; none: no augmentation.",
        choices=("ada", "fixed", "none"),
    )
    pipe: str = meaning(
        "bgc",
        "Transforms: b blit, g geometry, c colour, f filter, n noise, c cut-out.",
        choices=PIPES,
    )
    p: float = meaning(
        0.0, "Augmentation probability at the start (ada) or throughout (fixed).", low=0.0, high=1.0
    )
    target: float = meaning(0.6, "Target of r_t for ADA.", low=-1.0, high=1.0)
    interval: int = meaning(4, "Steps per adjustment of p.", low=1)
    speed_kimg: float = meaning(
        100.0, "Thousands of images in which p can rise from 0 to 1.", low=0.1
    )
    mirror: bool = meaning(False, "Flip real images left to right with probability 1/2.")


@dataclass(frozen=True)
class TrainingSettings:
    """The training loop, the same in every arm."""

    kimg: float = meaning(
        20.0,
        "Budget: thousands of real images seen, summed over the hospitals.",
        low=0.001,
        high=1e9,
    )
    batch_size: int = meaning(16, "Real images per discriminator step.", low=1, high=65_536)
    generator_batch: int = meaning(
        0, "Images per generator step; 0: batch_size.", low=0, high=65_536
    )
    d_steps: int = meaning(1, "Discriminator steps per generator step.", low=1, high=1000)
    d_accuracy: float = meaning(
        0.0,
        "G waits, up to 16 * d_steps, until D calls this share of its images fake; 0: never.",
        low=0.0,
        high=1.0,
    )
    d_average: float = meaning(
        0.0,
        "Decay per step of an average of D that trains the generator; 0: D itself trains it.",
        low=0.0,
        high=0.9999,
    )
    learning_rate: float = meaning(
        0.0025, "Adam's learning rate for generator and discriminator.", low=0.0, high=0.1
    )
    sampling: str = meaning(
        "auto",
        "Real batches: shuffled passes or Poisson samples; auto: poisson with privacy only.",
        choices=("auto", "shuffle", "poisson"),
    )
    labels: str = meaning(
        "data",
        "Labels of generated images: by frequency in the hospital's own data, or uniform.",
        choices=("data", "uniform"),
    )
    warm_start: str = meaning(
        "", "Run folder or checkpoint, made without private images, to start from; empty: none."
    )
    r1_gamma: float = meaning(
        -1.0, "Weight of R1; -1: 0.0002 * pixels / batch_size (arXiv 2006.06676).", low=-1.0
    )
    r1_interval: int = meaning(16, "Discriminator steps per R1 step.", low=1)
    path_length_weight: float = meaning(
        2.0, "Weight of path-length regularisation; 0: none.", low=0.0
    )
    path_length_interval: int = meaning(4, "Generator steps per path-length step.", low=1)
    style_mixing: float = meaning(
        0.9, "Probability that an image mixes the styles of two latents.", low=0.0, high=1.0
    )
    ema_half_life_kimg: float = meaning(
        -1.0, "Half-life of the generator's average in kimg; -1: batch_size * 10 / 32.", low=-1.0
    )
    ema_rampup: float = meaning(
        0.05, "Limit of the half-life as a share of the images seen; 0: no limit.", low=0.0
    )
    proximal_mu: float = meaning(
        0.0, "Weight of the proximal term of federation.strategy = fedprox; 0: none.", low=0.0
    )
    precision: str = meaning(
        "fp32", "fp32, or bf16 activations in the convolutions.", choices=("fp32", "bf16")
    )
    device: str = meaning("auto", "auto: cuda where available.", choices=("auto", "cpu", "cuda"))


@dataclass(frozen=True)
class FederationSettings:
    """Participants, rounds, aggregation and what travels."""

    hospitals: int = meaning(
        3, "Number of hospitals that the data is partitioned over.", low=1, high=1000
    )
    members: tuple[str, ...] = meaning((), "Names of the hospitals that take part; empty: all.")
    rounds: int = meaning(
        10,
        "Rounds; each shows training.kimg / rounds thousand images over all hospitals.",
        low=1,
        high=100_000,
    )
    strategy: str = meaning(
        "fedavg", "Aggregation, by the name of Flower's strategy.", choices=STRATEGIES
    )
    weights: str = meaning(
        "size",
        "Update weights: images (size), their root, equal; or a sum of changes, full or damped.",
        choices=("size", "root", "equal", "sum", "damped"),
    )
    label_rows: bool = meaning(
        False, "Average each label's embedding over the hospitals that hold the label."
    )
    control_variates: bool = meaning(
        False, "Correct each hospital's steps by its drift from the mean update (SCAFFOLD)."
    )
    exchange: tuple[str, ...] = meaning(
        PARTS,
        "Parts that travel; others stay local. Without ema the server averages the generators.",
        choices=PARTS,
    )
    wire: str = meaning(
        "fp32",
        "Number format on the wire; fp16 and bf16 halve the bytes but need delta for small steps.",
        choices=("fp32", "fp16", "bf16"),
    )
    delta: bool = meaning(False, "Hospitals send the change of a round instead of the weights.")
    secure: bool = meaning(
        False, "Secure aggregation (SecAgg+): the server sees sums; it cannot check single updates."
    )
    secure_range: float = meaning(
        4.0,
        "With secure, largest change per round over the maximum of its array; more is clipped.",
        low=1e-3,
    )
    share_label_counts: bool = meaning(
        False, "Hospitals send training images per label to the server; refused with privacy."
    )
    local_images: str = meaning(
        "proportional",
        "Images per round: proportional to the hospital's size, or equal for all.",
        choices=("proportional", "equal"),
    )
    batch: str = meaning(
        "each",
        "each: every hospital's step is batch_size; shared: batch_size is apportioned by size.",
        choices=("each", "shared"),
    )
    threads: int = meaning(
        1, "CPU threads per hospital; free cores train hospitals in parallel. 0: all cores.", low=0
    )
    min_hospitals: int = meaning(
        0, "Updates that a round needs; 0: those of all hospitals that may train.", low=0
    )
    join_timeout: float = meaning(60.0, "Seconds to wait for hospitals to connect.", low=1.0)
    round_timeout: float = meaning(
        86400.0, "Seconds per round; then it goes on without late hospitals, or fails.", low=1.0
    )
    max_update_ratio: float = meaning(
        10.0, "Reject updates this many times longer than the median per image; 0: none.", low=0.0
    )
    max_num_examples: int = meaning(
        0,
        "Refuse hospitals that report more training images; 0: more than their key allows.",
        low=0,
        high=1_000_000_000,
    )
    max_share: float = meaning(
        0.9,
        "Largest share of one of two hospitals in images and weight; s of n: s / (s + (n-1)(1-s)).",
        low=0.5,
        high=1.0,
    )
    server_learning_rate: float = meaning(
        0.01, "Learning rate of the server's optimiser (fedadam, fedyogi).", low=0.0
    )
    server_momentum: float = meaning(0.5, "Server momentum (fedavgm).", low=0.0, high=0.99)
    trim: float = meaning(
        0.2,
        "Share trimmed at both ends (fedtrimmedavg); below 1 / hospitals nothing is trimmed.",
        low=0.0,
        high=0.5,
    )
    malicious: int = meaning(0, "Malicious hospitals that krum and multikrum must tolerate.", low=0)

    @property
    def participants(self) -> int:
        """Number of hospitals that train: the named members, or all."""
        return len(self.members) or self.hospitals

    @property
    def equal_steps(self) -> bool:
        """Whether hospitals of any size take the same number of steps."""
        return self.local_images == "equal" or self.batch == "shared"


@dataclass(frozen=True)
class PrivacySettings:
    """Differential privacy of D's training (DP-SGD): on with epsilon or noise_multiplier."""

    epsilon: float = meaning(
        0.0,
        "Privacy budget ε of a hospital's whole run; sets the noise. 0: noise_multiplier.",
        low=0.0,
    )
    noise_multiplier: float = meaning(
        -1.0,
        "Noise over max_grad_norm; 0: clipping without noise (no guarantee); -1: by epsilon.",
        low=-1.0,
    )
    delta: float = meaning(
        0.0,
        "δ of the guarantee, at most 1/n of n images or patients; 0: min(1e-5, 1/(10 n)).",
        low=0.0,
        high=0.5,
    )
    max_grad_norm: float = meaning(1.0, "Clipping norm of one unit's gradient.", low=1e-3, high=1e3)
    unit: str = meaning(
        "patient",
        "Unit of privacy: one patient with all their images, or one image.",
        choices=("patient", "image"),
    )
    images_per_patient: int = meaning(
        8,
        "Most images per patient and step, drawn anew for each step; 0: all, not with privacy.",
        low=0,
        high=65_536,
    )
    max_epsilon: float = meaning(
        0.0, "Limit of a hospital's spent ε over all its runs; 0: no limit.", low=0.0
    )
    noise_split: str = meaning(
        "by_size",
        "by_size: noise by each hospital's size; equal: all use the noise of the smallest.",
        choices=("by_size", "equal"),
    )
    label_noise: float = meaning(
        0.0, "Noise on the label counts, released once per run; 0: not released.", low=0.0
    )
    r_t_noise: float = meaning(
        0.0, "Noise on the sum of D's signs that moves ADA; 0: not released.", low=0.0
    )
    public_start: bool = meaning(
        False, "Declares that training.warm_start was trained on public images only."
    )
    r1: bool = meaning(False, "R1 per image inside the clipped loss (4 to 6 times slower).")
    chunk: int = meaning(
        64, "Images whose single gradients are in memory at once.", low=1, high=65_536
    )
    client_level: str = meaning(
        "none",
        "Client-level DP: who clips each hospital's update; the server adds noise to the sum.",
        choices=("none", "server", "client"),
    )
    client_noise_multiplier: float = meaning(
        1.0, "Client-level noise on the sum of the updates, over client_clip.", low=0.0
    )
    client_clip: float = meaning(
        1.0, "Clipping norm of a hospital's update per round.", low=1e-3, high=1e3
    )
    client_delta: float = meaning(
        1e-5,
        "δ of client-level DP; at 1 / hospitals it would guarantee nothing.",
        low=1e-12,
        high=0.1,
    )

    @property
    def on(self) -> bool:
        """Whether D is trained by DP-SGD."""
        return self.epsilon > 0 or self.noise_multiplier >= 0


@dataclass(frozen=True)
class EvaluationSettings:
    """The central evaluator, which sees real test images and synthetic images only."""

    every: int = meaning(
        5, "Rounds per sample grid and Fréchet distance; 0: at the end only.", low=0
    )
    images: int = meaning(
        2000, "Synthetic images in the final evaluation.", low=16, high=10_000_000
    )
    suite: str = meaning(
        "full",
        "full: every metric; quick: classifiers (TSTR, TRTR) and distances over all images.",
        choices=("full", "quick"),
    )
    classifier: str = meaning("small-cnn", "Network of the classifiers.", choices=CLASSIFIERS)
    precision: str = meaning(
        "fp32",
        "Training of the classifiers; bf16 is faster only on CPUs with bf16 instructions.",
        choices=("fp32", "bf16"),
    )
    label_map: str = meaning(
        "", "Merges labels for the classifiers only, e.g. 'normal=normal,*=abnormal'."
    )
    seeds: int = meaning(2, "Classifier trainings with different seeds.", low=1, high=1000)
    epochs: int = meaning(
        12, "Passes per classifier over as many images as the real training split has.", low=1
    )
    bootstrap: int = meaning(
        1000, "Resamples of the test images for 95 % intervals.", low=10, high=1_000_000
    )
    features: str = meaning(
        "reference",
        "Extractor: reference (classifier of real images), or weights (.npz, .pth, .safetensors).",
    )
    neighbours: int = meaning(5, "k of precision, recall, density and coverage (PRDC).", low=1)
    root: str = meaning("", "Shards with the real images for evaluation; empty: data.root.")
    psi: float = meaning(1.0, "Truncation of the evaluated images; 1: none.", low=0.0, high=1.0)
    show_real: str = meaning(
        "phantoms",
        "Real images in the report: phantoms only; all: also those of data.root; none.",
        choices=("phantoms", "all", "none"),
    )


@dataclass(frozen=True)
class ComparisonSettings:
    """Arms of `fedgan compare`; all use the scenario's model, augment and training sections."""

    kind: str = meaning(
        "arms",
        "arms: ways to federate; ablation: variants that may also change model, training, privacy.",
        choices=("arms", "ablation"),
    )
    public: tuple[str, ...] = meaning(
        (), "Keys of the public pre-training of ablation arms with training.warm_start = 'public'."
    )
    arms: tuple[str, ...] = meaning(
        ("centralized", "federated", "local"),
        "Arms by kind (see docs, Compare), or 'NAME: key=value; …'; ablation: 'NAME < PARENT: …'.",
    )
    seeds: int = meaning(3, "Trainings per arm, with seeds seed, seed + 1, ….", low=1, high=1000)
    margin: float = meaning(
        0.02, "Non-inferiority margin: loss of macro AUC that is tolerated.", low=0.0, high=0.5
    )
    frechet: float = meaning(
        0.0,
        "Fréchet distance of 'kimg to reach'; 0: the largest final distance of any arm.",
        low=0.0,
    )
    finetune_share: float = meaning(
        0.2,
        "Share of the budget for the local fine-tuning of the arm 'finetuned'.",
        low=0.01,
        high=0.9,
    )


@dataclass(frozen=True)
class Settings:
    """A whole scenario."""

    name: str = meaning("run", "Name of the scenario; default name of the run folder.")
    description: str = meaning("", "One sentence for the report.")
    seed: int = meaning(0, "Seed of all random numbers.", low=0)
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    federation: FederationSettings = field(default_factory=FederationSettings)
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    comparison: ComparisonSettings = field(default_factory=ComparisonSettings)

    @property
    def shows_real(self) -> bool:
        """Whether the report may show training images."""
        phantoms = not self.data.root and not self.evaluation.root
        return self.evaluation.show_real == "all" or (
            self.evaluation.show_real == "phantoms" and phantoms
        )

    @property
    def data_seed(self) -> int:
        """Seed of phantoms and partition: `data.seed`, or `seed` where that is -1."""
        return self.seed if self.data.seed < 0 else self.data.seed


# --- reading -------------------------------------------------------------------------------------


def load_scenario(path: str | Path, overrides: typing.Sequence[str] = ()) -> Settings:
    """Read a scenario TOML and apply `section.key=value` overrides, in order.

    Raises `ConfigError` for a missing or broken file, an unknown key, a value out of range, or the
    config.toml of a run in another format.
    """
    path = Path(path)
    try:
        tree = read_toml(path)
    except FileNotFoundError:
        raise ConfigError(
            f"no scenario at {path}: give the path of a TOML file, "
            "e.g. simulations/three_hospitals.toml"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a readable TOML file: {error}") from None
    if "format" in tree:
        check_format(tree.pop("format"), path)
    return from_dict(tree, overrides, source=str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file. Raises `OSError`, and `ValueError` for any content that is no TOML."""
    with open(path, "rb") as stream:
        data = stream.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES >> 10} KiB")
    return _parse_toml(data.decode())


def _parse_toml(text: str) -> dict[str, Any]:
    if text.count(".") > MOST_DOTS:
        raise ValueError(f"more than {MOST_DOTS} dots")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def check_format(found: object, path: Path) -> None:
    """Raise `ConfigError` unless a run's config.toml has the format of this version."""
    if found != FORMAT:
        raise ConfigError(
            f"{path} has format {_shown(found) if found else 'none'}, this version of fedgan "
            f"reads format {FORMAT}: use the version that wrote it, or start a new run"
        )


def from_dict(
    tree: dict[str, Any], overrides: typing.Sequence[str] = (), source: str = "scenario"
) -> Settings:
    """Build validated `Settings` from a nested dict (as TOML gives) and `key=value` overrides.

    Raises `ConfigError` for anything else.
    """
    if not isinstance(tree, dict):
        raise ConfigError(f"{source} holds no sections and keys of a scenario")
    settings = _build(Settings, tree, "", source)
    for override in overrides:
        settings = _override(settings, override)
    return validate(settings)


def to_dict(settings: Any) -> dict[str, Any]:
    """The nested dict that `from_dict` reads; tuples become lists."""
    return {
        item.name: to_dict(value)
        if dataclasses.is_dataclass(value)
        else list(value)
        if isinstance(value, tuple)
        else value
        for item in fields(settings)
        for value in [getattr(settings, item.name)]
    }


def flat(tree: dict[str, Any]) -> dict[str, Any]:
    """The values of a nested dict of settings, by dotted key."""
    rows: dict[str, Any] = {}
    for name, value in tree.items():
        rows |= (
            {f"{name}.{key}": item for key, item in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
    return rows


def lasting(tree: dict[str, Any]) -> dict[str, Any]:
    """The values, by dotted key, that must not change in a begun run: all but `CHANGEABLE`."""
    return {key: value for key, value in flat(tree).items() if key not in CHANGEABLE}


def settings_hash(settings: Settings) -> str:
    """SHA-256 of the lasting settings as they are read back from a file."""
    tree = lasting(to_dict(from_dict(to_dict(settings))))
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Setting:
    """One key of a scenario, for help texts and docs; `low` and `high` are inclusive."""

    key: str
    type: str
    default: Any
    choices: tuple[str, ...]
    low: float | None
    high: float | None
    meaning: str


def describe(settings_class: type = Settings, prefix: str = "") -> list[Setting]:
    """All keys, in the order of the sections and fields."""
    rows: list[Setting] = []
    hints = typing.get_type_hints(settings_class)
    for item in fields(settings_class):
        kind, data = hints[item.name], item.metadata
        if dataclasses.is_dataclass(kind):
            rows += describe(typing.cast(type, kind), f"{prefix}{item.name}.")
            continue
        names = {int: "whole number", float: "number", bool: "true or false", str: "text"}
        is_list = typing.get_origin(kind) is tuple
        name = f"list of {names[typing.get_args(kind)[0]]}s" if is_list else names[kind]
        limits = data["choices"], data["low"], data["high"]
        rows.append(Setting(prefix + item.name, name, item.default, *limits, data["meaning"]))
    return rows


def validate(settings: Settings) -> Settings:
    """Check the rules over several keys and return the settings. Raises `ConfigError`."""
    check_resolution(settings.data.resolution, "data.resolution")
    federation, batch = settings.federation, settings.training.batch_size
    group = settings.model.minibatch_std_group
    if group and batch % min(group, batch):
        raise ConfigError(
            f"training.batch_size = {batch} is no multiple of model.minibatch_std_group = {group}: "
            "change one of them"
        )
    if (
        settings.data.partition == "quantities"
        and len(settings.data.quantities) != federation.hospitals
    ):
        raise ConfigError(
            f"data.quantities has {len(settings.data.quantities)} numbers for "
            f"federation.hospitals = {federation.hospitals}: give one per hospital"
        )
    for key in ("r1_gamma", "ema_half_life_kimg"):
        value = getattr(settings.training, key)
        if -1 < value < 0:
            raise ConfigError(
                f"training.{key} = {value:g} is negative: give -1 (automatic), 0 or more"
            )
    _check_hospital_condition(settings)
    if federation.min_hospitals > federation.participants:
        raise ConfigError(
            f"federation.min_hospitals = {federation.min_hospitals}, but "
            f"{federation.participants} hospitals take part: lower it"
        )
    if not federation.exchange:
        raise ConfigError(f"federation.exchange is empty: name at least one of {', '.join(PARTS)}")
    images = settings.training.kimg * 1000 / federation.rounds
    is_shared = federation.batch == "shared"  # one batch is a step of all hospitals
    if images < batch * (1 if is_shared else federation.participants):
        each = "" if is_shared else f" for each of the {federation.participants} hospitals"
        raise ConfigError(
            f"a round would show {images:.0f} images, less than a batch of {batch}{each}: "
            "lower federation.rounds or raise training.kimg"
        )
    return settings


def _check_hospital_condition(settings: Settings) -> None:
    hospitals, federation = settings.model.hospitals, settings.federation
    if hospitals not in (0, federation.hospitals):
        raise ConfigError(
            f"model.hospitals = {hospitals}, but federation.hospitals = {federation.hospitals}: "
            "give the same number, or 0"
        )
    if hospitals and not federation.share_label_counts:
        raise ConfigError(
            "model.hospitals samples the hospital of a generated image from the hospitals' label "
            "counts: set federation.share_label_counts = true, or model.hospitals = 0"
        )
    if federation.share_label_counts and settings.privacy.client_level != "none":
        raise ConfigError(
            f"privacy.client_level = '{settings.privacy.client_level}' hides a whole hospital, and "
            "federation.share_label_counts = true reveals its label counts: set it to false, and "
            "model.hospitals, which needs the counts, to 0"
        )
    if hospitals and settings.training.labels != "data":
        raise ConfigError(
            f"training.labels = '{settings.training.labels}' generates labels that a hospital may "
            "not hold, but model.hospitals needs its own images of them: set training.labels = "
            "'data', or model.hospitals = 0"
        )


def check_resolution(resolution: int, where: str) -> None:
    """Raise `ConfigError` unless `resolution` is a power of two from 16 to 1024."""
    if not 16 <= resolution <= 1024 or resolution & (resolution - 1):
        near = 2 ** round(math.log2(min(1024, max(16, resolution))))
        raise ConfigError(
            f"{where} = {resolution} is no power of two from 16 to 1024; the nearest is {near}"
        )


def _build(kind: type, tree: dict[str, Any], prefix: str, source: str) -> Any:
    hints = typing.get_type_hints(kind)
    known = {item.name: item for item in fields(kind)}
    values = {}
    for key, value in tree.items():
        if key not in known:
            raise ConfigError(
                f"unknown key {_shown(prefix + key)} in {source}{_nearest(prefix + key)}"
            )
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise ConfigError(
                    f"'{prefix}{key}' in {source} is a section, e.g. [{key}], not a value"
                )
            values[key] = _build(typing.cast(type, hint), value, f"{prefix}{key}.", source)
        else:
            values[key] = _coerce(value, hint, known[key], prefix + key)
    return kind(**values)


def _override(settings: Settings, override: str) -> Settings:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals:
        raise ConfigError(
            f"{_shown(override)} is no setting: write key=value, e.g. training.kimg=100"
        )
    tables = {
        item.name for item in fields(Settings) if item.default_factory is not dataclasses.MISSING
    }
    section, dot, name = key.partition(".")
    if dot and section in tables:
        inner = getattr(settings, section)
        if name in {item.name for item in fields(inner)}:
            return dataclasses.replace(settings, **{section: _set(inner, name, text, key)})
    elif not dot and key not in tables and key in {item.name for item in fields(Settings)}:
        return _set(settings, key, text, key)
    raise ConfigError(f"unknown key {_shown(key)}{_nearest(key)}")


def _set(owner: T, name: str, text: str, key: str) -> T:
    hint = typing.get_type_hints(type(owner))[name]
    item = next(item for item in fields(owner) if item.name == name)  # type: ignore[arg-type]
    try:
        value = _parse_toml(f"value = {text.strip()}")["value"]
    except ValueError:
        value = text.strip()  # a bare word is a string: strategy=fedprox
    if hint is str and not isinstance(value, str):
        value = text.strip()
    if typing.get_origin(hint) is tuple and not isinstance(value, list):
        words = value if isinstance(value, str) else text
        value = [part.strip() for part in words.split(",")] if words else []
    changed = {name: _coerce(value, hint, item, key)}
    return dataclasses.replace(owner, **changed)  # type: ignore[type-var]


def _coerce(value: Any, hint: Any, item: dataclasses.Field[Any], key: str) -> Any:
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(
                f"{key} = {_shown(value)} must be a list, "
                f"e.g. {list(typing.cast(tuple[Any, ...], item.default))!r}"
            )
        inner = typing.get_args(hint)[0]
        return tuple(_scalar(part, inner, item, key) for part in value)
    return _scalar(value, hint, item, key)


def _scalar(value: Any, hint: Any, item: dataclasses.Field[Any], key: str) -> Any:
    kind = typing.get_args(hint)[0] if isinstance(hint, types.UnionType) else hint
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) <= sys.float_info.max else math.inf
    if kind is int and isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,19}", value):
        value = int(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        names = {
            int: "a whole number",
            float: "a number",
            bool: "true or false",
            str: "a text in quotes",
        }
        raise ConfigError(
            f"{key} = {_shown(value)} must be {names[kind]} ({item.metadata['meaning']})"
        )
    choices, low, high = item.metadata["choices"], item.metadata["low"], item.metadata["high"]
    if choices and value not in choices:
        raise ConfigError(
            f"{key} = {_shown(value)} must be one of {', '.join(choices)}"
            f"{_hint(str(value), list(choices))}"
        )
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{key} = {value} must be a finite number")
    if kind is int and abs(value) > LARGEST:
        low, high = -LARGEST if low is None else low, LARGEST if high is None else high
    if kind in (int, float) and not (
        (low is None or low <= value) and (high is None or value <= high)
    ):
        span = f"at least {low:.10g}" if high is None else f"from {low:.10g} to {high:.10g}"
        shown = f"{value:g}" if kind is float else _shown(value)
        raise ConfigError(f"{key} = {shown} must be {span} ({item.metadata['meaning']})")
    return value


def _shown(value: object) -> str:
    """A value in an error message, cut to 80 characters."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a huge number in a list, or a very deep list
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]}…"


def _nearest(key: str) -> str:
    names = [setting.key for setting in describe()]
    by_last = [name for name in names if name.split(".")[-1] == key.split(".")[-1]]
    return f"; did you mean '{by_last[0]}'?" if by_last else _hint(key, names)


def _hint(word: str, names: list[str]) -> str:
    near = difflib.get_close_matches(word[:80], names, n=1)
    return f"; did you mean '{near[0]}'?" if near else ""
