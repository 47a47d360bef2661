"""Settings: frozen, typed, one line of meaning for each field.

A scenario is one TOML file; every key can be set from the command line as `section.key=value`.
An unknown key or a value of the wrong kind is a `ConfigError` that names the nearest right one.
The meaning of a field (`meaning(...)`) is the documentation and the command line's help at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from fedgan.errors import ConfigError

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
T = TypeVar("T")


def meaning(
    default: T,
    text: str,
    choices: tuple[str, ...] = (),
    low: float | None = None,
    high: float | None = None,
) -> T:
    """A field with its default, its one line of meaning and the values that it may take."""
    return field(
        default=default, metadata={"meaning": text, "choices": choices, "low": low, "high": high}
    )


@dataclass(frozen=True)
class DataSettings:
    """Which images, and how they are dealt to the hospitals."""

    root: str = meaning(
        "",
        "Folder of shards (one sub-folder a hospital) or one shard; empty: phantoms are drawn for the run.",
    )
    resolution: int = meaning(
        32,
        "Side of the square images in pixels, a power of two from 16 to 1024.",
        low=16,
        high=1024,
    )
    phantoms: str = meaning(
        "lesions", "What is drawn when root is empty.", choices=("lesions", "chest")
    )
    phantom_images: int = meaning(3000, "Number of phantom images over all hospitals.", low=30)
    label_map: str = meaning(
        "",
        "Merges labels when shards are opened, e.g. 'normal=normal,*=abnormal'; empty: as they are.",
    )
    partition: str = meaning(
        "institution",
        "How images are dealt to hospitals: a shard each, or one pool re-dealt.",
        choices=("institution", "iid", "dirichlet", "quantities"),
    )
    alpha: float = meaning(
        0.5, "Concentration of the Dirichlet label skew; small is more unequal.", low=1e-3
    )
    quantities: tuple[int, ...] = meaning(
        (), "Images for each hospital when partition is 'quantities', e.g. [2000, 10000, 20000]."
    )
    seed: int = meaning(
        -1,
        "Seed of phantoms and of the dealing; -1: seed. Runs that differ in seed alone can share it.",
        low=-1,
    )


@dataclass(frozen=True)
class ModelSettings:
    """The generator family and the size of its networks."""

    family: str = meaning("stylegan2", "Generator family.", choices=FAMILIES)
    z_dim: int = meaning(128, "Dimension of the latent z.", low=1)
    w_dim: int = meaning(128, "Dimension of the intermediate latent w.", low=1)
    mapping_layers: int = meaning(
        2, "Fully connected layers of the generator's mapping network.", low=1
    )
    channel_base: int = meaning(
        2048, "Channels at resolution r are min(channel_base / r, channel_max).", low=16
    )
    channel_max: int = meaning(64, "Most channels of any layer.", low=4)
    minibatch_std_group: int = meaning(
        4, "Group size of the discriminator's minibatch-std layer; 0: no such layer.", low=0
    )
    d_channel_base: int = meaning(0, "channel_base of the discriminator; 0: channel_base.", low=0)
    d_channel_max: int = meaning(0, "channel_max of the discriminator; 0: channel_max.", low=0)
    hospitals: int = meaning(
        0,
        "Hospitals that the networks tell apart beside the labels: federation.hospitals, or 0 for none.",
        low=0,
    )


@dataclass(frozen=True)
class AugmentSettings:
    """Adaptive discriminator augmentation (arXiv 2006.06676)."""

    mode: str = meaning(
        "ada",
        "ada: p follows r_t; fixed: p stays; none: no augmentation.",
        choices=("ada", "fixed", "none"),
    )
    pipe: str = meaning(
        "bgc",
        "Transforms: b blit, g geometry, c colour, f filter, n noise, c cut-out.",
        choices=(
            "blit",
            "geom",
            "color",
            "filter",
            "noise",
            "cutout",
            "b",
            "bg",
            "bgc",
            "bgcf",
            "bgcfn",
            "bgcfnc",
        ),
    )
    p: float = meaning(0.0, "Strength at the start (ada) or throughout (fixed).", low=0.0, high=1.0)
    target: float = meaning(0.6, "The r_t that ADA aims at.", low=-1.0, high=1.0)
    interval: int = meaning(4, "Steps between two adjustments of p.", low=1)
    speed_kimg: float = meaning(
        100.0, "Images (thousands) in which p can rise from 0 to 1.", low=0.1
    )
    mirror: bool = meaning(
        False, "Show each real image flipped left to right with probability 1/2."
    )


@dataclass(frozen=True)
class TrainingSettings:
    """The one training loop, the same in every arm."""

    kimg: float = meaning(
        20.0,
        "Real images shown to discriminators, in thousands, summed over the hospitals.",
        low=0.001,
    )
    batch_size: int = meaning(16, "Real images a discriminator step.", low=1)
    generator_batch: int = meaning(0, "Images a generator step; 0: batch_size.", low=0)
    d_steps: int = meaning(1, "Discriminator steps a generator step.", low=1)
    d_accuracy: float = meaning(
        0.0,
        "The generator waits until D calls this share of its images fake, for 16 * d_steps at most; 0: no waiting.",
        low=0.0,
        high=1.0,
    )
    d_average: float = meaning(
        0.0,
        "The generator learns from an average of D with this decay a step; 0: from D.",
        low=0.0,
        high=0.9999,
    )
    learning_rate: float = meaning(
        0.0025, "Adam's learning rate for generator and discriminator.", low=0.0
    )
    sampling: str = meaning(
        "auto",
        "Real images of a step: shuffled passes, or a Poisson sample; auto: poisson with privacy, else shuffle.",
        choices=("auto", "shuffle", "poisson"),
    )
    labels: str = meaning(
        "data",
        "The generator's labels: as frequent as the hospital's own (noised by privacy.label_noise), or uniform.",
        choices=("data", "uniform"),
    )
    warm_start: str = meaning(
        "",
        "Run folder or checkpoint to begin from, made without private images; empty: from scratch.",
    )
    r1_gamma: float = meaning(
        -1.0, "Weight of R1; -1: 0.0002 * pixels / batch_size (arXiv 2006.06676).", low=-1.0
    )
    r1_interval: int = meaning(16, "Steps between two R1 regularisations.", low=1)
    path_length_weight: float = meaning(
        2.0, "Weight of path-length regularisation; 0: none.", low=0.0
    )
    path_length_interval: int = meaning(4, "Steps between two path-length regularisations.", low=1)
    style_mixing: float = meaning(
        0.9, "Probability that two latents share an image.", low=0.0, high=1.0
    )
    ema_half_life_kimg: float = meaning(
        -1.0, "Half-life of the generator's average; -1: batch_size * 10 / 32.", low=-1.0
    )
    ema_rampup: float = meaning(
        0.05, "Half-life never exceeds this share of the images seen; 0: no ramp-up.", low=0.0
    )
    proximal_mu: float = meaning(
        0.0, "Weight of the proximal term of federation.strategy = fedprox; 0: none.", low=0.0
    )
    precision: str = meaning(
        "fp32", "fp32, or bf16 activations in the convolutions.", choices=("fp32", "bf16")
    )
    device: str = meaning("auto", "auto, cpu or cuda.", choices=("auto", "cpu", "cuda"))


@dataclass(frozen=True)
class FederationSettings:
    """Who takes part, how often, and what travels."""

    hospitals: int = meaning(3, "Number of hospitals that the data is dealt to.", low=1)
    members: tuple[str, ...] = meaning((), "Names of the hospitals that take part; empty: all.")
    rounds: int = meaning(
        10,
        "Rounds; each shows training.kimg / rounds thousand images, summed over hospitals.",
        low=1,
    )
    strategy: str = meaning(
        "fedavg", "Aggregation, by the name of Flower's strategy.", choices=STRATEGIES
    )
    weights: str = meaning(
        "size",
        "Changes are averaged by images (size), their root, or equal; or added up: whole (sum), less if many (damped).",
        choices=("size", "root", "equal", "sum", "damped"),
    )
    label_rows: bool = meaning(
        False, "A label's embedding is averaged over those hospitals alone that hold the label."
    )
    control_variates: bool = meaning(
        False,
        "A hospital's steps are corrected by how its last changes differ from everybody's mean (SCAFFOLD).",
    )
    exchange: tuple[str, ...] = meaning(
        PARTS,
        "What travels; the rest stays in the hospital. Without ema the server averages the generators of its rounds.",
        choices=PARTS,
    )
    wire: str = meaning(
        "fp32",
        "Numbers that travel: fp32, or in half the bytes fp16 or bf16 (wider, coarser), which lose small steps without delta.",
        choices=("fp32", "fp16", "bf16"),
    )
    delta: bool = meaning(
        False, "A hospital answers with what its round changed instead of its model."
    )
    secure: bool = meaning(
        False,
        "The server sees the sum of what hospitals changed (SecAgg+), if it keeps to the protocol: no check of single updates.",
    )
    secure_range: float = meaning(
        4.0,
        "Under secure, most that a number may change in a round, over the largest of its array; more is cut off.",
        low=1e-3,
    )
    share_label_counts: bool = meaning(
        False,
        "Hospitals tell the server how many training images of each label they have; refused with privacy.",
    )
    local_images: str = meaning(
        "proportional",
        "Images of a round: by the hospital's size, or the same for each.",
        choices=("proportional", "equal"),
    )
    batch: str = meaning(
        "each",
        "each: a step of every hospital is batch_size; shared: batch_size is dealt over them by size.",
        choices=("each", "shared"),
    )
    threads: int = meaning(
        1,
        "CPU threads of one hospital; as many hospitals train at once as the cores hold. 0: all cores.",
        low=0,
    )
    min_hospitals: int = meaning(
        0,
        "A round goes on with the answers of so many hospitals; 0: it needs those of all that may train.",
        low=0,
    )
    join_timeout: float = meaning(60.0, "Seconds to wait for hospitals to come online.", low=1.0)
    round_timeout: float = meaning(
        86400.0,
        "Seconds after which a round goes on without late hospitals, or fails where too few have answered.",
        low=1.0,
    )
    max_update_ratio: float = meaning(
        10.0,
        "An update is rejected that is so many times as long as the round's median, for its images; 0: none is.",
        low=0.0,
    )
    max_num_examples: int = meaning(
        1_000_000, "A hospital that claims more training images is refused.", low=1
    )
    server_learning_rate: float = meaning(
        0.01, "Step of the server's optimiser (fedadam, fedyogi).", low=0.0
    )
    server_momentum: float = meaning(
        0.5, "Share of the last change that goes on (fedavgm).", low=0.0, high=0.99
    )
    trim: float = meaning(
        0.2,
        "Share cut from both ends (fedtrimmedavg); 1 / hospitals or more, else nobody is cut.",
        low=0.0,
        high=0.5,
    )
    malicious: int = meaning(0, "Number of hospitals that krum and multikrum guard against.", low=0)

    @property
    def participants(self) -> int:
        """How many hospitals train: the members that are named, or all."""
        return len(self.members) or self.hospitals

    @property
    def equal_steps(self) -> bool:
        """Whether hospitals take as many steps each, whatever their size."""
        return self.local_images == "equal" or self.batch == "shared"


@dataclass(frozen=True)
class PrivacySettings:
    """Differential privacy of the discriminator's training (DP-SGD); off unless epsilon or noise_multiplier is given."""

    epsilon: float = meaning(
        0.0,
        "Noise is chosen so that a hospital's whole run costs this epsilon; 0: see noise_multiplier.",
        low=0.0,
    )
    noise_multiplier: float = meaning(
        -1.0,
        "Noise over max_grad_norm; 0: clipping without noise, which guarantees nothing; -1: as epsilon asks.",
        low=-1.0,
    )
    delta: float = meaning(
        0.0,
        "Probability that the guarantee may fail; 0: 1 / (images or patients of the hospital).",
        low=0.0,
        high=0.5,
    )
    max_grad_norm: float = meaning(
        1.0, "Most that one unit's gradient may measure; larger ones are scaled down.", low=1e-6
    )
    unit: str = meaning(
        "image",
        "Whose presence is hidden: one image's or one patient's.",
        choices=("image", "patient"),
    )
    images_per_patient: int = meaning(
        0, "Images of a patient that one step looks at, drawn anew each time; 0: all.", low=0
    )
    max_epsilon: float = meaning(
        0.0, "A hospital stops before its ledger exceeds this, over all runs; 0: no limit.", low=0.0
    )
    noise_split: str = meaning(
        "by_size",
        "by_size: each hospital's own noise, for its number of images; equal: the noise that the smallest needs.",
        choices=("by_size", "equal"),
    )
    label_noise: float = meaning(
        0.0, "Noise on the counts of labels, released once a run; 0: none are released.", low=0.0
    )
    r_t_noise: float = meaning(
        0.0,
        "Noise on the sum of D's signs that moves ADA, accounted with the gradient; 0: not released.",
        low=0.0,
    )
    public_start: bool = meaning(
        False, "Declares that training.warm_start was trained on public images alone."
    )
    r1: bool = meaning(False, "R1 for each image, inside the clipped loss (4 to 6 times as slow).")
    chunk: int = meaning(64, "Images whose single gradients are in memory at once.", low=1)
    client_level: str = meaning(
        "none",
        "Noise that hides a whole hospital's update from the others, clipped by the server or by itself; independent of epsilon.",
        choices=("none", "server", "client"),
    )
    client_noise_multiplier: float = meaning(
        1.0, "Noise on the sum of the updates over client_clip.", low=0.0
    )
    client_clip: float = meaning(
        1.0, "Most that one hospital's update of a round may measure; larger ones shrink.", low=1e-6
    )
    client_delta: float = meaning(
        1e-5,
        "Probability that the hospitals' guarantee may fail; 1 / hospitals would promise nothing.",
        low=1e-12,
        high=0.1,
    )

    @property
    def on(self) -> bool:
        """Whether D is trained by DP-SGD."""
        return self.epsilon > 0 or self.noise_multiplier >= 0


@dataclass(frozen=True)
class EvaluationSettings:
    """The central evaluator. It sees real test images and synthetic images, no hospital's training loop."""

    every: int = meaning(
        5, "Rounds between two sample grids and Fréchet distances; 0: only at the end.", low=0
    )
    images: int = meaning(2000, "Synthetic images for the final evaluation.", low=16)
    suite: str = meaning(
        "full",
        "full: every figure; quick: classifiers on real and on synthetic images, and distances over all images.",
        choices=("full", "quick"),
    )
    classifier: str = meaning("small-cnn", "Network of the classifiers.", choices=CLASSIFIERS)
    precision: str = meaning(
        "fp32",
        "Of the classifiers' training: fp32, or bf16 (faster on a CPU with bf16 instructions, slower without).",
        choices=("fp32", "bf16"),
    )
    label_map: str = meaning(
        "", "Merges labels for the classifiers only, e.g. 'normal=normal,*=abnormal'."
    )
    seeds: int = meaning(2, "Classifier trainings with different seeds.", low=1)
    epochs: int = meaning(
        12, "Passes of a classifier over as many images as the real training split has.", low=1
    )
    bootstrap: int = meaning(1000, "Resamples of the test images for the 95 % intervals.", low=10)
    features: str = meaning(
        "reference",
        "Extractor: 'reference' (a classifier trained on real images), or a weights file: SqueezeNet (.npz), "
        "Inception-v3 or the state dict of torchxrayvision's DenseNet-121 (.pth, .safetensors).",
    )
    neighbours: int = meaning(5, "k of precision, recall, density and coverage.", low=1)
    root: str = meaning(
        "", "Shards that hold the real images for the evaluation; empty: data.root."
    )
    psi: float = meaning(
        1.0, "Truncation of the images that are evaluated; 1: none.", low=0.0, high=1.0
    )
    show_real: str = meaning(
        "phantoms",
        "Real images on the page: phantoms (drawn ones only), all (also those of data.root: see who may), none.",
        choices=("phantoms", "all", "none"),
    )


@dataclass(frozen=True)
class ComparisonSettings:
    """What `fedgan compare` compares. Every arm trains with the scenario's model, augment and training sections."""

    kind: str = meaning(
        "arms",
        "arms: ways to federate, all else equal; ablation: 'NAME < PARENT: key=value; …' may also change model, augment, "
        "training and privacy.",
        choices=("arms", "ablation"),
    )
    public: tuple[str, ...] = meaning(
        (),
        "Keys of the training on public phantoms that an ablation's arm with training.warm_start = 'public' begins from, "
        "e.g. 'training.kimg=10'; empty: the scenario's, with phantoms of another seed.",
    )
    arms: tuple[str, ...] = meaning(
        ("centralized", "federated", "local"),
        "Kinds of training: centralized, federated, local, generator-only, local-discriminators, finetuned, coalitions, or a "
        "named federation with keys of its own: 'fedadam: federation.strategy=fedadam'; 'NAME < centralized: …' is a pooled one.",
    )
    seeds: int = meaning(3, "Trainings of each arm, with the seeds seed, seed + 1, ….", low=1)
    margin: float = meaning(
        0.02, "Loss of macro AUC below which an arm counts as not inferior.", low=0.0, high=0.5
    )
    frechet: float = meaning(
        0.0,
        "Fréchet distance of 'kimg to reach'; 0: the largest final distance among the arms, so that all reach it.",
        low=0.0,
    )
    finetune_share: float = meaning(
        0.2,
        "Share of the budget that 'finetuned' trains at home, after the federation.",
        low=0.01,
        high=0.9,
    )


@dataclass(frozen=True)
class Settings:
    """A whole scenario."""

    name: str = meaning("run", "Name of the scenario; the run folder's default name.")
    description: str = meaning("", "One sentence for the report.")
    seed: int = meaning(0, "Seed of everything random.", low=0)
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
        """Whether pictures of training images may be written for the page."""
        drawn = not self.data.root and not self.evaluation.root
        return self.evaluation.show_real == "all" or (
            self.evaluation.show_real == "phantoms" and drawn
        )

    @property
    def data_seed(self) -> int:
        """Seed of phantoms and of the dealing: `data.seed`, or `seed` where that is -1."""
        return self.seed if self.data.seed < 0 else self.data.seed


# --- reading -------------------------------------------------------------------------------------


def load_scenario(path: str | Path, overrides: typing.Sequence[str] = ()) -> Settings:
    """Read a scenario TOML and apply `section.key=value` overrides, in order.

    Raises `ConfigError` for a missing or broken file, an unknown key, or a value out of range.
    """
    path = Path(path)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"no scenario at {path}: give the path of a TOML file, e.g. simulations/three_hospitals.toml"
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} is not a readable TOML file: {error}") from None
    return from_dict(tree, overrides, source=str(path))


def from_dict(
    tree: dict[str, Any], overrides: typing.Sequence[str] = (), source: str = "scenario"
) -> Settings:
    """Build validated `Settings` from a nested dict (as TOML gives) and `key=value` overrides."""
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
    """Check what one field alone cannot show; return the settings. Raises `ConfigError`."""
    check_resolution(settings.data.resolution, "data.resolution")
    federation, batch = settings.federation, settings.training.batch_size
    group = settings.model.minibatch_std_group
    if group and batch % min(group, batch):
        raise ConfigError(
            f"training.batch_size = {batch} is no multiple of model.minibatch_std_group = {group}: change one of them"
        )
    if (
        settings.data.partition == "quantities"
        and len(settings.data.quantities) != federation.hospitals
    ):
        raise ConfigError(
            f"data.quantities has {len(settings.data.quantities)} numbers for federation.hospitals = {federation.hospitals}: "
            "give one a hospital"
        )
    for key in ("r1_gamma", "ema_half_life_kimg"):
        if -1 < getattr(settings.training, key) < 0:
            raise ConfigError(
                f"training.{key} = {getattr(settings.training, key):g} is negative: give -1 (automatic), 0 or more"
            )
    _check_institutions(settings)
    if federation.min_hospitals > federation.participants:
        raise ConfigError(
            f"federation.min_hospitals = {federation.min_hospitals}, but {federation.participants} take part: lower it"
        )
    if not federation.exchange:
        raise ConfigError(f"federation.exchange is empty: name at least one of {', '.join(PARTS)}")
    images = settings.training.kimg * 1000 / federation.rounds
    shared = federation.batch == "shared"  # then one batch is a step of all hospitals
    if images < batch * (1 if shared else federation.participants):
        whose = "" if shared else f" for each of the {federation.participants} hospitals"
        raise ConfigError(
            f"a round would show {images:.0f} images, less than a batch of {batch}{whose}: "
            "lower federation.rounds or raise training.kimg"
        )
    return settings


def _check_institutions(settings: Settings) -> None:
    known, federation = settings.model.hospitals, settings.federation
    if known not in (0, federation.hospitals):
        raise ConfigError(
            f"model.hospitals = {known}, but federation.hospitals = {federation.hospitals}: give the same number, or 0"
        )
    if known and not federation.share_label_counts:
        raise ConfigError(
            "model.hospitals draws each generated image from one of the hospitals that hold its label, by their shares: "
            "set federation.share_label_counts = true, which tells the server how many images of each label a hospital has, or "
            "model.hospitals = 0"
        )
    if federation.share_label_counts and settings.privacy.client_level != "none":
        raise ConfigError(
            f"privacy.client_level = '{settings.privacy.client_level}' hides a whole hospital, and federation.share_label_counts = true "
            "tells how many images of each label it has: set it to false, and model.hospitals, which draws by the counts, to 0"
        )
    if known and settings.training.labels != "data":
        raise ConfigError(
            f"training.labels = '{settings.training.labels}' asks for labels that a hospital may not hold, and "
            "model.hospitals for its own images of them: leave training.labels = 'data', or model.hospitals = 0"
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
            raise ConfigError(f"unknown key '{prefix}{key}' in {source}{_nearest(prefix + key)}")
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
        raise ConfigError(f"'{override}' is no setting: write key=value, e.g. training.kimg=100")
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
    raise ConfigError(f"unknown key '{key}'{_nearest(key)}")


def _set(owner: T, name: str, text: str, key: str) -> T:
    hint = typing.get_type_hints(type(owner))[name]
    item = next(item for item in fields(owner) if item.name == name)  # type: ignore[arg-type]
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string: strategy=fedprox
    if hint is str and not isinstance(value, str):
        value = text.strip()
    if typing.get_origin(hint) is tuple and not isinstance(value, list):
        value = [part.strip() for part in str(value).split(",")] if value != "" else []
    return dataclasses.replace(owner, **{name: _coerce(value, hint, item, key)})  # type: ignore[type-var]


def _coerce(value: Any, hint: Any, item: dataclasses.Field[Any], key: str) -> Any:
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(
                f"{key} = {value!r} must be a list, e.g. {list(typing.cast(tuple[Any, ...], item.default))!r}"
            )
        inner = typing.get_args(hint)[0]
        return tuple(_scalar(part, inner, item, key) for part in value)
    return _scalar(value, hint, item, key)


def _scalar(value: Any, hint: Any, item: dataclasses.Field[Any], key: str) -> Any:
    kind = typing.get_args(hint)[0] if isinstance(hint, types.UnionType) else hint
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is int and isinstance(value, str) and value.lstrip("-").isdigit():
        value = int(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        names = {
            int: "a whole number",
            float: "a number",
            bool: "true or false",
            str: "a text in quotes",
        }
        raise ConfigError(f"{key} = {value!r} must be {names[kind]} ({item.metadata['meaning']})")
    choices, low, high = item.metadata["choices"], item.metadata["low"], item.metadata["high"]
    if choices and value not in choices:
        raise ConfigError(
            f"{key} = '{value}' must be one of {', '.join(choices)}{_hint(str(value), list(choices))}"
        )
    if kind in (int, float):
        if not math.isfinite(value):
            raise ConfigError(f"{key} = {value} must be a finite number")
        if (low is not None and value < low) or (high is not None and value > high):
            span = f"at least {low:g}" if high is None else f"from {low:g} to {high:g}"
            raise ConfigError(f"{key} = {value:g} must be {span} ({item.metadata['meaning']})")
    return value


def _nearest(key: str) -> str:
    names = [setting.key for setting in describe()]
    by_last = [name for name in names if name.split(".")[-1] == key.split(".")[-1]]
    return f"; did you mean '{by_last[0]}'?" if by_last else _hint(key, names)


def _hint(word: str, names: list[str]) -> str:
    near = difflib.get_close_matches(word, names, n=1)
    return f"; did you mean '{near[0]}'?" if near else ""
