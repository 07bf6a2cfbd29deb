"""What a run is. Every field says its unit and range; unknown keys are refused.

This module imports neither torch nor ray, so that a configuration can be read and checked anywhere at once.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from kka_ray.config.samplers import ApiSampler, Sampler, TransformersSampler, VllmSampler
from kka_ray.config.strict import NAME, TEXT, FolderOrUri, Strict, or_of_kind

SEEDS = 4_000_000
"""How many seeds a run may have: a round's, a thousand times as large, still fits 32 bits."""


def share_of(share: float, total: int) -> int:
    """So many of `total` as a share allows, whatever rounding does to the product: 0.35 of 180 are 63."""
    return int(share * total + 1e-6)


# --- data ---------------------------------------------------------------------------------------------------------


class FlowersData(Strict):
    """The built-in demo domain of procedurally drawn flowers."""

    kind: Literal["flowers"]
    normals: int = Field(2000, ge=10, description="normal images, training and validation together")
    test_normals: int = Field(600, ge=1)
    test_anomalies: int = Field(600, ge=1)
    validation: float = Field(0.2, gt=0, lt=1, description="share of the normals kept for validation")


class Cifar100Data(Strict):
    """CIFAR-100 in Parquet: one superclass is normal, every other class a test anomaly."""

    kind: Literal["cifar100"]
    path: str = Field(description="folder with train-*.parquet and test-*.parquet")
    superclass: str = "household_furniture"
    validation: int = Field(250, ge=1, description="normal train images kept for validation")


class Oxford102Data(Strict):
    """Oxford-102 flowers in Parquet: one class is normal, split by folds because it is small."""

    kind: Literal["oxford102"]
    path: str = Field(description="folder with train-*.parquet and test-*.parquet")
    label: int = Field(25, ge=0, le=101, description="normal class, from 0; 25 is the corn poppy")
    folds: int = Field(5, ge=2)
    fold: int = Field(0, ge=0, description="the fold of the normal images that is tested on")
    validation: float = Field(0.2, gt=0, lt=1)


class UcmData(Strict):
    """UC Merced land use with captions, in Parquet: split by scene, because neighbouring pictures overlap."""

    kind: Literal["ucm_captions"]
    path: str = Field(description="folder with train-*.parquet and test-*.parquet")
    labels: tuple[int, ...] = (19, 20)
    test: float = Field(0.25, gt=0, lt=1, description="share of the normal scenes that is tested on")
    validation: float = Field(0.2, gt=0, lt=1)


class MagneticTileData(Strict):
    """Magnetic tile defects in Parquet: tiles without a defect are normal, split by tile."""

    kind: Literal["magnetic_tile"]
    path: str = Field(description="folder with all-*.parquet")
    test: float = Field(0.25, gt=0, lt=1, description="share of the tiles without a defect that is tested on")
    validation: float = Field(0.15, gt=0, lt=1, description="share of them that is kept for validation")


class FolderData(Strict):
    """A folder of normal images; `test/good` and `test/<defect>` as in MVTec AD, where there are test images."""

    kind: Literal["folder"]
    path: str = Field(description="folder of normal images, directly or under train/good")
    description: str = Field(pattern=TEXT, description="what the normal images show, in a few words: 'a steel screw'")
    captions: str | None = Field(None, description="CSV with the columns file and caption; else sidecar .txt files")
    group: str | None = Field(
        None,
        description="regular expression for file names below path; what its brackets match, as in 'part(\\d+)_', "
        "names the object that is shown. Images of one either train or validate: else the threshold is one for copies",
    )
    validation: float = Field(0.2, gt=0, lt=1)
    max_pixels: int = Field(64_000_000, gt=0, description="larger images are refused before they are decoded")

    @field_validator("group")
    @classmethod
    def _names_a_group(cls, value: str | None) -> str | None:
        try:
            brackets = 1 if value is None else re.compile(value).groups
        except re.error as error:
            raise ValueError(f"{value!r} is no regular expression: {error}") from None
        if brackets != 1:
            raise ValueError(
                f"{value!r} must have one pair of brackets, around what names the object; it has {brackets}"
            )
        return value


Data = Annotated[
    FlowersData | Cifar100Data | Oxford102Data | UcmData | MagneticTileData | FolderData, Field(discriminator="kind")
]


# --- features -----------------------------------------------------------------------------------------------------


Engine = Literal["torch", "onnx"]
"""What runs a backbone that scores images."""


class BackboneConfig(Strict):
    """The frozen image encoder."""

    model: str = Field("builtin:efficientnet-lite0", description="builtin:, hub: or a folder (transformers)")
    image_size: int = Field(96, ge=32, le=1024, description="images are resized to this square, in pixels")
    batch: int = Field(64, ge=1)


# --- describe -----------------------------------------------------------------------------------------------------


class GuardConfig(Strict):
    """Which lines are refused before they are drawn."""

    min_words: int = Field(3, ge=1)
    max_words: int = Field(40, ge=2)
    near_duplicate: float = Field(
        0.985, gt=0, le=1, description="cosine of sentence embeddings from which a line is a copy; 1 switches it off"
    )
    subject: bool = Field(
        True,
        description="refuse a line whose subject is the normal class; off where anomalies are defects of the normal "
        "object",
    )
    subject_similarity: float = Field(
        0.62,
        gt=0,
        le=1,
        description="cosine to a name of the normal class from which a subject counts as one; 1: the names alone count",
    )
    normal_vocabulary: bool = Field(
        False, description="refuse a line all of whose words occur in the normal captions: it says nothing new"
    )


class DescribeConfig(Strict):
    """How anomalies are described."""

    sampler: Sampler = TransformersSampler()
    prompts: int = Field(16, ge=1, description="few-shot prompts, one a group of representative normals")
    examples: int = Field(5, ge=1, description="captions in a prompt")
    instruction: str | None = Field(None, description="first line of every prompt; by default made from the subject")
    contrast: str | None = Field(
        None, description="line between the examples and what the model writes, which asks for something else"
    )
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(0.95, gt=0, le=1)
    max_tokens: int = Field(40, ge=4)
    chunk: int = Field(64, ge=1, description="lines that are sampled, stored and retried together")
    guard: GuardConfig = GuardConfig()


# --- render -------------------------------------------------------------------------------------------------------


class MaskConfig(Strict):
    """A random blob within which an image-to-image edit happens: defects are local."""

    min_area: float = Field(0.05, gt=0, le=1, description="share of the image")
    max_area: float = Field(0.3, gt=0, le=1)

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> MaskConfig:
        if self.min_area > self.max_area:
            raise ValueError(f"min_area {self.min_area} is more than max_area {self.max_area}")
        return self


class MatchConfig(Strict):
    """Whether drawn images show what their texts say; see `kka_ray.render.matching`. Images that fall short after the
    last attempt are counted, and their lines teach the language model nothing."""

    least: float = Field(0.9, ge=0, le=1, description="share of other texts that must be less like the image")
    redraws: int = Field(2, ge=0, description="times that an image below is drawn again; the best is kept")


class RenderConfig(Strict):
    """How descriptions are drawn: any diffusers pipeline."""

    pipeline: str = Field("builtin:flowers", description="builtin:, hub: or a folder with a diffusers pipeline")
    mode: Literal["text2img", "img2img"] = "text2img"
    steps: int = Field(20, ge=1)
    guidance: float | None = Field(2.5, ge=0, description="classifier-free guidance; null: the pipeline's own")
    strength: float = Field(0.6, gt=0, le=1, description="img2img: 1 forgets the normal photograph")
    mask: MaskConfig | None = Field(None, description="img2img: edit within a random mask only")
    width: int | None = Field(None, ge=8, description="pixels; by default the pipeline's own")
    height: int | None = Field(None, ge=8)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    normals: int = Field(
        128, ge=0, description="normal captions that are drawn as well, to tell what is anomalous from what is drawn"
    )
    match: MatchConfig | None = Field(
        None, description="compare images with their texts; for renderers of `kka renderer train` only"
    )
    chunk: int = Field(32, ge=1, description="images that are drawn, stored and retried together")
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _image_to_image_is_whole(self) -> RenderConfig:
        if self.mode == "text2img" and self.mask is not None:
            raise ValueError("mask needs mode img2img: without a photograph there is nothing to keep outside it")
        if self.mode == "img2img" and int(self.steps * self.strength) < 1:
            raise ValueError(f"strength {self.strength} of {self.steps} steps is less than one step; raise either")
        return self


# --- judge --------------------------------------------------------------------------------------------------------


class DeepSad(Strict):
    """Deep SAD on frozen backbone features, or on pixels with autoencoder pretraining.

    The defaults are for features. On pixels the authors of KKA use eta 1, not balanced, learning rate 1e-4 and 200
    epochs.
    """

    kind: Literal["deep_sad"] = "deep_sad"
    input: Literal["features", "pixels"] = "features"
    width: int | None = Field(None, ge=2, description="dimensions of the embedding; by default 16, on pixels 128")
    hidden: int = Field(256, ge=2, description="features: units of the hidden layer")
    components: int | None = Field(
        128, ge=2, description="features: principal components that are kept, whitened; null standardises all of them"
    )
    epochs: int = Field(60, ge=1)
    pretrain_epochs: int = Field(10, ge=0)
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    eta: float = Field(1.0, gt=0, description="weight of labelled anomalies")
    balanced: bool = Field(
        True,
        description="eta weighs all anomalies together against all normals, and how many there are does not move the "
        "scale of hardness; false: eta weighs each against one normal, as Deep SAD has it",
    )
    batch: int = Field(256, ge=2)


class KnnEvaluator(Strict):
    """Mean cosine distance to the nearest training normals. Learns nothing from the drawn images."""

    kind: Literal["knn"] = "knn"
    neighbours: int = Field(5, ge=1)


class FusedEvaluator(Strict):
    """Deep SAD and k-NN together: the geometric mean of their distances, on features."""

    kind: Literal["fused"] = "fused"
    deep_sad: DeepSad = DeepSad()
    knn: KnnEvaluator = KnnEvaluator()

    @model_validator(mode="after")
    def _reads_features(self) -> FusedEvaluator:
        if self.deep_sad.input == "pixels":
            raise ValueError("deep_sad.input: pixels has no k-NN beside it, which reads features; use kind: deep_sad")
        return self


Evaluator = Annotated[DeepSad | KnnEvaluator | FusedEvaluator, Field(discriminator="kind"), or_of_kind("deep_sad")]


class ConfusionConfig(Strict):
    """How drawn images are sorted into hard and easy."""

    evaluator: Evaluator = DeepSad()
    folds: int = Field(3, ge=2, description="cross-fitting: no image is judged by an evaluator that trained on it")
    drawn_normals: bool = Field(
        True, description="the drawn normal captions count as normals: half of them in training, half in validation"
    )
    rule: Literal["band", "paper"] = Field(
        "band", description="paper: hard up to the worst validation normal, easy the `paper_easy` largest scores"
    )
    lower_quantile: float = Field(0.95, ge=0, le=1, description="of validation normals: closer is normal-like")
    lower: float = Field(
        0.0, ge=0, description="lower edge of the hard band in MADs above the normal median, where the quantile is less"
    )
    upper: float = Field(5.0, gt=0, description="upper edge of the hard band, in MADs above the normal median")
    gap: float = Field(1.0, ge=0, description="easy begins this many MADs above the hard band")
    paper_easy: int = Field(100, ge=1, description="rule paper: so many images with the largest scores are easy")

    @model_validator(mode="after")
    def _band_has_width(self) -> ConfusionConfig:
        if self.lower >= self.upper:
            raise ValueError(f"lower ({self.lower:g}) must be less than upper ({self.upper:g}): nothing would be hard")
        return self


# --- prefer -------------------------------------------------------------------------------------------------------


class PreferenceConfig(Strict):
    """Direct preference optimisation of the describing model."""

    beta: float = Field(0.1, gt=0)
    sft: float = Field(
        0.0,
        ge=0,
        description="weight of the chosen lines' negative log-likelihood a token, beside DPO, which by itself may make "
        "both lines of a pair less likely (Pang et al., 2024)",
    )
    reference: Literal["base", "previous"] = "base"
    rejected: tuple[Literal["easy", "normal_like", "guarded"], ...] = Field(
        ("easy",),
        description="what a hard line is preferred to: lines of easy or normal-like images, lines refused by the guard",
    )
    min_pairs: int = Field(8, ge=1, description="with fewer the round is stalled and DPO is left out")
    max_pairs: int = Field(256, ge=1)
    steps: int = Field(30, ge=1)
    batch: int = Field(16, ge=1, description="pairs a step, over all workers")
    micro_batch: int = Field(8, ge=1, description="pairs that one worker computes at once")
    learning_rate: float = Field(2e-4, gt=0)
    warmup: int = Field(5, ge=0)
    lora_rank: int = Field(8, ge=1)
    lora_alpha: int = Field(16, ge=1)
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="above 0 the model's own dropout is on as well")
    max_length: int = Field(1024, ge=16)
    dtype: Literal["float32", "bfloat16"] = "float32"
    load_in_4bit: bool = Field(False, description="quantised base model; needs CUDA and bitsandbytes")
    workers: int = Field(1, ge=1)
    sharding: Literal["none", "fsdp"] = Field(
        "none", description="fsdp: each worker holds a part of the model and not all of it; needs CUDA"
    )

    @model_validator(mode="after")
    def _learns(self) -> PreferenceConfig:
        if self.warmup >= self.steps:
            raise ValueError(f"warmup ({self.warmup}) must be less than steps ({self.steps})")
        return self

    @model_validator(mode="after")
    def _shards_can_be_made(self) -> PreferenceConfig:
        if self.sharding == "fsdp" and self.workers == 1:
            raise ValueError("sharding fsdp shares the model out among workers, and there is one: raise workers")
        if self.sharding == "fsdp" and self.load_in_4bit:
            raise ValueError("a model in 4 bits cannot be sharded: set load_in_4bit to false or sharding to none")
        return self

    @model_validator(mode="after")
    def _batch_is_shared_out(self) -> PreferenceConfig:
        at_once = self.workers * self.micro_batch
        if self.batch % at_once:
            raise ValueError(
                f"batch ({self.batch}) must be a multiple of workers x micro_batch ({self.workers} x "
                f"{self.micro_batch}): set it to {-(-self.batch // at_once) * at_once}, or lower micro_batch"
            )
        return self

    def training(self) -> dict[str, Any]:
        """What a training depends on beside its pairs, which have come of the rest."""
        return self.model_dump(mode="json", exclude={"rejected", "min_pairs", "max_pairs"})


# --- loop ---------------------------------------------------------------------------------------------------------


class LoopConfig(Strict):
    """The rounds. Round 0 is the zero-th iteration: one batch of generated anomalies, no DPO before it."""

    mode: Literal["rep", "add"] = Field("rep", description="rep: a set of fixed size; add: it grows each round")
    rounds: int = Field(2, ge=0, description="rounds after the zero-th, each preceded by DPO")
    lines: int = Field(256, ge=1, description="lines that the language model writes a round")
    budget: float = Field(0.05, gt=0, le=1, description="images kept, as a share of the normals")
    min_budget: int = Field(0, ge=0, description="images kept at least, where the share is less")


# --- detect -------------------------------------------------------------------------------------------------------


class LearnsFromAnomalies(Strict):
    """What every detector that learns from anomalies has in common."""

    anomaly_weight: float = Field(
        1.0, ge=0, description="of the anomalies as a whole, in units of what the detector gives them; 0: none"
    )


class _SimpleNet(LearnsFromAnomalies):
    """What SimpleNet has with either kind of features."""

    members: int = Field(4, ge=1, description="discriminators of whole images, each from another start, averaged")
    width: int = Field(512, ge=8, description="dimensions of the adapted feature, at most those of the feature")
    hidden: int = Field(1024, ge=8, description="hidden units of the discriminator, at most twice its width")
    shrinkage: float = Field(0.3, gt=0, le=1, description="of the whitening that the adaptor starts from")
    noise: float = Field(1.0, gt=0, description="standard deviation of the noise, adapted features near unit scale")
    margin: float = Field(0.5, gt=0)
    epochs: int = Field(15, ge=1)
    batch: int = Field(64, ge=1, description="images a step")
    patches_per_image: int = Field(8, ge=1, description="patches drawn from each normal image of a step")
    learning_rate: float = Field(1e-3, gt=0, description="for 1,000 normals or more; with fewer it falls with them")
    anomaly_patches: int = Field(8, ge=1, description="most anomalous patches of an anomaly that are negatives")
    patch_weight: float = Field(0.25, ge=0, description="of the worst patch in the score, beside 1 for the image")


class SimpleNet(_SimpleNet):
    """SimpleNet on a frozen backbone; generated anomalies are further negatives of its discriminator."""

    kind: Literal["simplenet"] = "simplenet"


class PixelSimpleNet(_SimpleNet):
    """SimpleNet from pixels: its features are those of an autoencoder that was trained on the normals."""

    kind: Literal["simplenet_pixels"]
    maps: int = Field(16, ge=4, multiple_of=4, description="of the first stage; the others have 2 and 4 times as many")
    code: int = Field(128, ge=1, description="dimensions of the autoencoder's code")
    encoder_epochs: int = Field(20, ge=0, description="of the autoencoder; 0 leaves its random weights")
    encoder_rate: float = Field(1e-3, gt=0, description="learning rate of the autoencoder")


class Knn(Strict):
    """Mean cosine distance to the nearest training normals. Ignores anomalies."""

    kind: Literal["knn"]
    neighbours: int = Field(5, ge=1)


class Mahalanobis(Strict):
    """Mahalanobis distance, the covariance shrunk towards its mean trace. Ignores anomalies."""

    kind: Literal["mahalanobis"]
    shrinkage: float = Field(0.1, ge=0, le=1)


class PatchCore(Strict):
    """Distance of patches to a coreset of normal ones. Ignores anomalies."""

    kind: Literal["patchcore"]
    coreset: float = Field(0.01, gt=0, le=1, description="share of the normals' patches that the memory keeps")
    projection: int = Field(64, ge=1, description="dimensions in which the coreset is chosen, at most the features'")
    candidates: int = Field(50_000, ge=1, description="random patches that it is chosen from, where there are more")
    neighbours: int = Field(9, ge=0, description="memory patches that reweight the score; 0 leaves the weight out")
    image_weight: float = Field(2.0, ge=0, description="of the whole image beside 1 for its worst patch; 0: none")
    image_neighbours: int = Field(5, ge=1, description="nearest normals that the whole image is compared with")


class Padim(Strict):
    """A Gaussian of patch features at each place. Ignores anomalies."""

    kind: Literal["padim"]
    channels: int = Field(100, ge=1, description="channels that are kept at random, at most those of the features")
    shrinkage: float = Field(0.1, ge=0, le=1, description="of the covariances, towards their mean trace")
    image_weight: float = Field(2.0, ge=0, description="of the whole image beside 1 for its worst patch; 0: none")


class LinearHead(LearnsFromAnomalies):
    """Logistic regression of normals against anomalies; alone, or fused with k-NN. Needs anomalies."""

    kind: Literal["head", "fused"]
    c: float = Field(1.0, gt=0, description="inverse strength of the regularisation")
    neighbours: int = Field(5, ge=1)


class _NetworkHead(LearnsFromAnomalies):
    """What the heads with a hidden layer share. They need anomalies."""

    fused: bool = Field(True, description="plus k-NN, each standardised on validation normals")
    neighbours: int = Field(5, ge=1)
    hidden: int = Field(128, ge=1, description="units of the hidden layer")
    epochs: int = Field(5, ge=1)
    batch: int = Field(128, ge=1, description="normals a step, and as many anomalies")
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)


class MlpHead(_NetworkHead):
    """A network with one hidden layer, normals against anomalies by cross-entropy."""

    kind: Literal["mlp_head"]


class EnergyHead(_NetworkHead):
    """A network whose energy is held low for normals and high for anomalies."""

    kind: Literal["energy_head"]
    logits: int = Field(4, ge=1, description="outputs whose negative log-sum-exp is the energy")
    normal_energy: float = Field(-3.0, description="normals are held below it")
    anomalous_energy: float = Field(3.0, description="anomalies are held above it")

    @model_validator(mode="after")
    def _energies_are_in_order(self) -> EnergyHead:
        if self.normal_energy >= self.anomalous_energy:
            raise ValueError(
                f"normal_energy {self.normal_energy} must be less than anomalous_energy {self.anomalous_energy}"
            )
        return self


class BeatGan(LearnsFromAnomalies):
    """Reconstruction from pixels, regularised by a discriminator; anomalies are to be reconstructed badly."""

    kind: Literal["beatgan"]
    maps: int = Field(16, ge=4, multiple_of=4, description="of the first stage; the others have 2 and 4 times as many")
    width: int = Field(64, ge=1, description="dimensions of the code")
    adversarial: float = Field(1.0, ge=0, description="weight of the feature matching beside the reconstruction")
    epochs: int = Field(20, ge=1)
    batch: int = Field(64, ge=1)
    learning_rate: float = Field(1e-3, gt=0)


class GenIas(LearnsFromAnomalies):
    """A classifier of pixels, against anomalies that a VAE makes of normals by perturbing their latents."""

    kind: Literal["genias"]
    maps: int = Field(16, ge=4, multiple_of=4, description="of the first stage; the others have 2 and 4 times as many")
    width: int = Field(64, ge=1, description="dimensions of the latents")
    prior: float = Field(0.5, gt=0, description="standard deviation of the latents' prior; below 1 it is compact")
    compactness: float = Field(0.01, ge=0, description="weight of the divergence from it, a mean over dimensions")
    perturbation: float = Field(0.1, ge=0, description="weight of the margins")
    least: float = Field(0.1, ge=0, description="mean squared change by a perturbation at least, pixels in -1..1")
    most: float = Field(0.2, gt=0, description="and at most")
    generator_epochs: int = Field(20, ge=1)
    epochs: int = Field(10, ge=1, description="of the classifier")
    batch: int = Field(64, ge=1)
    learning_rate: float = Field(1e-3, gt=0)

    @model_validator(mode="after")
    def _margins_are_in_order(self) -> GenIas:
        if self.least >= self.most:
            raise ValueError(f"least ({self.least}) must be less than most ({self.most})")
        return self


class _Hypersphere(Strict):
    """What Deep SVDD, Deep SAD and AE-SVDD share: the encoder and its training."""

    input: Literal["features", "pixels"] = Field("features", description="pixels: of the images at 32 px, from scratch")
    width: int | None = Field(None, ge=2, description="dimensions of the embedding; by default 512, on pixels 128")
    hidden: int = Field(1024, ge=2, description="features: units of the hidden layer")
    pretrain_epochs: int | None = Field(None, ge=0, description="of the autoencoder; by default 0, on pixels 20")
    epochs: int | None = Field(None, ge=1, description="by default 10, on pixels 30")
    learning_rate: float = Field(1e-4, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    batch: int = Field(128, ge=2)


class DeepSvdd(_Hypersphere):
    """Pulls the embeddings of normals to a centre. Ignores anomalies."""

    kind: Literal["deep_svdd"]


class DetectorDeepSad(_Hypersphere, LearnsFromAnomalies):
    """Deep SVDD that pushes anomalies away from the centre."""

    kind: Literal["deep_sad"]


class AeSvdd(_Hypersphere, LearnsFromAnomalies):
    """An autoencoder whose code is held in a sphere with a soft boundary; anomalies are held outside it."""

    kind: Literal["ae_svdd"]
    nu: float = Field(0.1, gt=0, lt=1, description="share of the normals that may lie outside the sphere")
    reconstruction: float = Field(1.0, ge=0, description="weight of the reconstruction beside that of the sphere")
    margin: float = Field(10.0, ge=0, description="anomalies are held outside (1 + margin) times the squared radius")


Detector = Annotated[
    SimpleNet
    | PixelSimpleNet
    | Knn
    | Mahalanobis
    | PatchCore
    | Padim
    | LinearHead
    | MlpHead
    | EnergyHead
    | BeatGan
    | GenIas
    | DeepSvdd
    | DetectorDeepSad
    | AeSvdd,
    Field(discriminator="kind"),
]
IGNORE_ANOMALIES = ("knn", "mahalanobis", "patchcore", "padim", "deep_svdd")
"""Kinds of detectors to which anomalies make no difference."""


class AnomalyWeights(Strict):
    """How much an anomaly counts beside the others, by the evaluator's last verdict on it, with every detector.

    Only the ratios matter. Anomalies that the evaluator never saw, such as those of the controls, count alike.
    """

    hard: float = Field(1.0, gt=0)
    between: float = Field(1.0, gt=0)
    easy: float = Field(1.0, gt=0)
    normal_like: float = Field(1.0, gt=0, description="only the zero-th set holds any")


Control = Literal[
    "noise",
    "cutpaste",
    "blur",
    "patch_shuffle",
    "patch_swap",
    "mixup",
    "perlin",
    "genias",
    "outside",
    "drawn_normals",
    "normal_views",
]
"""An anomaly set without a language model, or none with what else a detector gets beside one."""


class DetectConfig(Strict):
    """The detectors that the anomaly set is tried on, and the one that is served."""

    detectors: tuple[Detector, ...] = (SimpleNet(), Knn(kind="knn"), LinearHead(kind="fused"))
    headline: str = Field("simplenet", description="kind of the detector in the headline table and in the service")
    seeds: int = Field(3, ge=1)
    false_positive_rate: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="of new normal images at most, sets the threshold; takes 1 / rate validation normals",
    )
    controls: tuple[Control, ...] = Field(
        ("noise", "cutpaste", "drawn_normals"),
        description="anomaly sets without a language model, for comparison: as many images as the kept set has, or all "
        "drawn normals where they are fewer; normal_views: none, but the views of normals that go with them",
    )
    outside: str | None = Field(
        None, description="folder of other images, as files or train-*.parquet, for the control outside"
    )
    weights: AnomalyWeights = AnomalyWeights()
    drawn_normals: bool = Field(False, description="train with every other drawn normal as a normal")
    views: int = Field(
        0,
        ge=0,
        description="augmented views of each anomaly, and as many of normals, to learn from; 0 for none. "
        "Only where a normal image that is mirrored, turned and shifted would be normal too",
    )
    workers: int = Field(1, ge=1, description="workers of the Ray Train job that fits the detectors")
    share: Literal["fits", "steps"] = Field(
        "fits", description="what the workers share out: whole fits, or the gradient steps of each, for large sets"
    )

    @model_validator(mode="after")
    def _headline_is_there(self) -> DetectConfig:
        kinds = [d.kind for d in self.detectors]
        if self.headline not in kinds:
            raise ValueError(f"headline {self.headline!r} is not among the detectors: {', '.join(kinds)}")
        if len(set(kinds)) != len(kinds):
            raise ValueError(f"each kind of detector may appear once, got {', '.join(kinds)}")
        return self

    @model_validator(mode="after")
    def _there_are_views(self) -> DetectConfig:
        if "normal_views" in self.controls and not self.views:
            raise ValueError("the control normal_views needs views: set detect.views to 1 or more")
        return self

    @model_validator(mode="after")
    def _outside_images_are_there(self) -> DetectConfig:
        if "outside" in self.controls and self.outside is None:
            raise ValueError("the control outside needs images: set detect.outside to a folder of them")
        return self


# --- where it runs ------------------------------------------------------------------------------------------------


class RuntimeEnv(Strict):
    """What a stage's processes have beside what their node has (Ray's runtime environment)."""

    env_vars: dict[str, str] = Field({}, description="environment variables; kept with the run, so never a secret")
    pip: tuple[str, ...] = Field((), description="packages that Ray installs for these processes alone")


class PoolConfig(Strict):
    """A pool of actors: how many, and what each takes."""

    workers: int = Field(1, ge=1)
    max_workers: int | None = Field(
        None, ge=1, description="so many while many chunks wait and there is room; by default `workers`"
    )
    cpus: float = Field(0.5, ge=0, description="logical CPUs of an actor; 0 for a GPU actor on a full machine")
    gpus: float = Field(0, ge=0, description="GPUs of an actor, fractions allowed")
    threads: int = Field(1, ge=1, description="threads that an actor computes with; part of the store's keys")
    runtime_env: RuntimeEnv = RuntimeEnv()

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> PoolConfig:
        if self.max_workers is not None and self.max_workers < self.workers:
            raise ValueError(f"max_workers ({self.max_workers}) is less than workers ({self.workers})")
        return self


class ClusterConfig(Strict):
    """The Ray cluster and the shares of it."""

    address: str | None = Field(None, description="null starts a local cluster; auto or ray://HOST:PORT joins one")
    allow_unauthenticated: bool = Field(
        False, description="join the cluster at `address` even if it asks for no token and runs anybody's code"
    )
    mode: Literal["disjoint", "colocated"] = Field(
        "disjoint",
        description="disjoint: samplers, renderers and training have places of their own; colocated: they take turns",
    )
    device: Literal["auto", "cpu"] = Field(
        "auto", description="auto: who has a GPU computes on it; cpu: on the CPU all the same, to try a plan out"
    )
    samplers: PoolConfig = PoolConfig()
    renderers: PoolConfig = PoolConfig()
    train_cpus: float = Field(1, ge=0, description="logical CPUs of a Ray Train worker")
    train_gpus: float = Field(0, ge=0)
    train_threads: int = Field(2, ge=1)
    train_runtime_env: RuntimeEnv = RuntimeEnv()
    driver_threads: int = Field(
        2, ge=1, description="threads that the driver computes with (features, verdicts); part of the store's keys"
    )
    in_flight: int = Field(2, ge=1, description="chunks a worker may have waiting")
    max_restarts: int = Field(
        3,
        ge=0,
        description="times that a Ray Train job is started again; and how many workers of a pool may die one after the "
        "other as they start, or do nothing but fail (chunk_attempts more)",
    )
    start_timeout: float = Field(
        1800, gt=0, description="seconds that a pool may be without a worker that is ready, or a job without its places"
    )
    chunk_timeout: float = Field(
        900, gt=0, description="seconds of work after which a chunk counts as hung; waiting for another trial is none"
    )
    chunk_attempts: int = Field(
        2, ge=1, description="times that a chunk may fail before the rows at fault are looked for"
    )
    max_failed_share: float = Field(
        0.2, ge=0, le=1, description="of a round's lines, or of its images, that may fail; more end the run"
    )
    max_failed_rows: int | None = Field(None, ge=0, description="the same as a number, where that is less")

    def refuse_shared_gpus(self, workers: int, who: str, key: str) -> None:
        """Raises ValueError if workers of a training, whose number is the setting `key`, might share a GPU."""
        if 0 < self.train_gpus < 1 and workers > 1 and self.device == "auto":
            raise ValueError(
                f"{workers} {who} of {self.train_gpus:g} GPU each may share a GPU, which NCCL refuses: set "
                f"cluster.train_gpus=1 or {key}=1"
            )


class TrackingConfig(Strict):
    """Where MLflow keeps the results."""

    uri: str | None = Field(None, description="null: a SQLite file beside the runs, for one machine only")
    experiment: str = "kka"

    @field_validator("uri")
    @classmethod
    def _has_no_password(cls, value: str | None) -> str | None:
        if value and re.search(r"//[^/@]*:[^/@]*@", value):
            raise ValueError(
                "it holds a password, and a run's configuration is kept with its results. Set MLFLOW_TRACKING_USERNAME "
                "and MLFLOW_TRACKING_PASSWORD where the run starts, for a PostgreSQL database PGPASSWORD"
            )
        return value


class StoreConfig(Strict):
    """Where stage outputs are kept: a folder or any fsspec URI."""

    uri: FolderOrUri = "runs/store"


class RunConfig(Strict):
    """A whole run."""

    name: str = Field(pattern=NAME, description="names the run's folder")
    seed: int = Field(0, ge=0, lt=SEEDS, description="of everything that is drawn at random")
    data: Data
    backbone: BackboneConfig = BackboneConfig()
    describe: DescribeConfig = DescribeConfig()
    render: RenderConfig = RenderConfig()
    confusion: ConfusionConfig = ConfusionConfig()
    preference: PreferenceConfig = PreferenceConfig()
    loop: LoopConfig = LoopConfig()
    detect: DetectConfig = DetectConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()
    store: StoreConfig = StoreConfig()
    output: FolderOrUri = Field("runs", description="folder of the runs, or any fsspec URI; this one's is OUTPUT/NAME")

    @model_validator(mode="after")
    def _results_can_be_tracked(self) -> RunConfig:
        if "://" in self.output and self.tracking.uri is None:
            raise ValueError(
                f"output is the URI {self.output}, beside which MLflow's file cannot lie: name a tracking server or a "
                "file, as in tracking.uri=http://HOST:5000 or tracking.uri=sqlite:////shared/mlflow.db"
            )
        return self

    @model_validator(mode="after")
    def _drawn_normals_are_there(self) -> RunConfig:
        if self.render.normals == 0 and (self.detect.drawn_normals or "drawn_normals" in self.detect.controls):
            raise ValueError(
                "detect asks for drawn normals, but render.normals is 0: set it to 64 or more, or leave drawn_normals "
                "out of detect"
            )
        return self

    @model_validator(mode="after")
    def _training_has_whole_gpus(self) -> RunConfig:
        self.cluster.refuse_shared_gpus(self.preference.workers, "DPO workers", "preference.workers")
        return self

    @model_validator(mode="after")
    def _sampler_fits(self) -> RunConfig:
        sampler, pool = self.describe.sampler, self.cluster.samplers
        if isinstance(sampler, ApiSampler):
            sampler.check(self.loop.rounds, pool.max_workers or pool.workers)
        if isinstance(sampler, VllmSampler):
            sampler.check(pool.gpus, self.preference.lora_rank)
        return self
