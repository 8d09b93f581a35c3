"""A whole run's configuration: presets < YAML < ``key=value``, merged by OmegaConf in struct mode.

    model=tiny train=cpu_demo                select presets (or give a .yaml file) per group
    study=no_aux_free                        lay a study's values over the run
    config=runs/x/config.yaml                lay a whole run's file over the presets
    resume=runs/x                            go on with a run: its file is laid over the presets as well
    model.hidden_size=320 seed=7             change anything; the order of the words does not matter
    kernels.router=torch                     force an implementation (docs/kernels.md)

Every word is checked before anything is built: an unknown key, a value of the wrong type or an impossible value is
one :class:`ConfigError` that names the key, the value and the fix.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException, ValidationError

from lightning_dsv3.config.balance import BalanceArgs, check_balance
from lightning_dsv3.config.batch_ramp import BatchRamp, BatchSizes
from lightning_dsv3.config.errors import ConfigError, did_you_mean
from lightning_dsv3.config.kernels import KernelConfig
from lightning_dsv3.config.model import DeepSeekV3Config
from lightning_dsv3.config.presets import GROUPS, read_preset, read_yaml
from lightning_dsv3.config.schedule import Mark, Schedule

LOGGERS = ("csv", "tensorboard", "wandb")
CHECKPOINTING = ("none", "block", "keep_routing")
COMPILE = ("none", "blocks", "model")
MOMENTS = ("float32", "bfloat16")
SOURCE_KINDS = ("jsonl", "parquet", "text", "hf")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as in the report, section 4.2. Weight decay leaves out norms, biases and every other vector.

    Attributes:
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay on matrices.
        moments: What both moments are kept in: ``float32`` or ``bfloat16``, the report's in its FP8 training.
    """

    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    moments: str = "float32"

    def __post_init__(self) -> None:
        if self.moments not in MOMENTS:
            raise ConfigError(f"train.optimizer.moments={self.moments!r}: {did_you_mean(self.moments, MOMENTS)}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(
                f"train.optimizer.betas={self.betas}: two numbers in [0, 1) are needed, as in [0.9, 0.95]"
            )
        if self.eps <= 0 or self.weight_decay < 0:
            raise ConfigError(
                f"train.optimizer: eps={self.eps} must be positive and weight_decay={self.weight_decay} not negative"
            )
        if self.moments == "bfloat16" and self.betas[1] >= 0.999:
            raise ConfigError(
                f"train.optimizer.betas={self.betas}: with moments=bfloat16 what a step adds to the second moment "
                "would be rounded away; take a second rate below 0.999, or moments=float32"
            )


@dataclass(frozen=True)
class ScheduleConfig:
    """What changes with the tokens seen; one block, one scale factor (report, section 4.2).

    Attributes:
        token_scale: Factor on every mark's ``until``. None fits the last mark of the learning rate to ``total_tokens``.
        learning_rate: Marks of the learning rate.
        mtp_loss_weight: Marks of the MTP loss weight lambda.
        bias_update_rate: Marks of the bias update speed gamma.
        batch_ramp: A batch that rises to ``train.batch_size``; null for ``train.batch_size`` throughout.
    """

    token_scale: float | None = None
    learning_rate: list[Mark] = field(default_factory=lambda: [Mark(1.0, 2.2e-4)])
    mtp_loss_weight: list[Mark] = field(default_factory=lambda: [Mark(1.0, 0.3)])
    bias_update_rate: list[Mark] = field(default_factory=lambda: [Mark(1.0, 1e-3)])
    batch_ramp: BatchRamp | None = None

    def __post_init__(self) -> None:
        if self.token_scale is not None and not (math.isfinite(self.token_scale) and self.token_scale > 0):
            raise ConfigError(
                f"train.schedule.token_scale={self.token_scale}: must be positive, or null to fit the run"
            )
        for name in ("learning_rate", "mtp_loss_weight", "bias_update_rate"):
            try:
                Schedule(getattr(self, name))
            except ConfigError as error:
                raise ConfigError(f"train.schedule.{name}: {error}") from error


@dataclass(frozen=True)
class TrainConfig:
    """How long, in what portions and with what optimizer a run trains.

    Attributes:
        total_tokens: Length of the run in tokens; the run ends at the optimizer step that reaches it.
        sequence_length: Tokens per sequence S.
        batch_size: Sequences per optimizer step, over all ranks and micro-batches; ``schedule.batch_ramp`` leads to it.
        gradient_clip_norm: Clip the gradient's global norm to this.
        validate_every_steps: Optimizer steps between validations (and checkpoints).
        activation_checkpointing: ``none``, ``block`` (blocks run again in the backward) or ``keep_routing`` (the same,
            but their chosen experts are kept).
        compile: ``none``, ``blocks`` or ``model``: what ``torch.compile`` compiles.
        optimizer: AdamW's constants.
        schedule: Learning rate, MTP weight, bias update rate and batch ramp over tokens.
    """

    total_tokens: int = 1_000_000
    sequence_length: int = 256
    batch_size: int = 8
    gradient_clip_norm: float = 1.0
    validate_every_steps: int = 100
    activation_checkpointing: str = "none"
    compile: str = "none"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        for key in ("total_tokens", "sequence_length", "batch_size", "validate_every_steps"):
            if getattr(self, key) < 1:
                raise ConfigError(f"train.{key}={getattr(self, key)}: must be 1 or more")
        for key, choices in (("activation_checkpointing", CHECKPOINTING), ("compile", COMPILE)):
            value = getattr(self, key)
            if value not in choices:
                raise ConfigError(f"train.{key}={value!r} is not one of {', '.join(choices)}")
        if "none" not in (self.activation_checkpointing, self.compile):
            raise ConfigError(
                f"train.compile={self.compile!r} with train.activation_checkpointing="
                f"{self.activation_checkpointing!r}: torch refuses to trace the counting of experts through a "
                "checkpoint; set one of the two to none"
            )
        if self.gradient_clip_norm <= 0:
            raise ConfigError(f"train.gradient_clip_norm={self.gradient_clip_norm}: must be positive")
        BatchSizes(self.batch_size, self.schedule.batch_ramp)  # refuses a ramp that does not lead to this size

    @property
    def batch_sizes(self) -> BatchSizes:
        """Sequences of every optimizer step over all ranks, with the ramp on this run's tokens."""
        ramp = self.schedule.batch_ramp
        if ramp is not None:
            ramp = dataclasses.replace(ramp, until=ramp.until * self._token_scale)
        return BatchSizes(self.batch_size, ramp, self.sequence_length)

    @property
    def max_steps(self) -> int:
        """Optimizer steps until ``total_tokens`` is reached."""
        return self.batch_sizes.num_steps(-(-self.total_tokens // self.sequence_length))

    def scheduled(self, name: str) -> Schedule:
        """Return a schedule on this run's tokens.

        Args:
            name: ``learning_rate``, ``mtp_loss_weight``, ``bias_update_rate``, or ``batch_size`` in sequences.
        """
        if name == "batch_size":
            sizes = self.batch_sizes.sizes
            # A step's tokens count as seen, so a size lasts to the beginning of the next one, inclusive.
            ends = [*list(sizes.values())[1:], sizes[self.batch_size] + self.batch_size]
            return Schedule(Mark(end * self.sequence_length, size) for size, end in zip(sizes, ends, strict=True))
        return Schedule(getattr(self.schedule, name), self._token_scale)

    @property
    def _token_scale(self) -> float:
        scale = self.schedule.token_scale
        return self.total_tokens / self.schedule.learning_rate[-1].until if scale is None else scale


@dataclass(frozen=True)
class SourceConfig:
    """Text of the user's own for one domain. What only ``hf`` has is subset, split, revision and streaming.

    Attributes:
        domain: Name of the domain, free to choose; several sources may share one.
        kind: ``jsonl`` (also .gz and .zst), ``parquet``, ``text`` (one file per document) or ``hf`` (a hub id).
        path: File, folder or pattern with ``*``, from the working directory; for ``hf`` the data set's id.
        field: Field or column that holds the text; ``text`` files have none.
        weight: Share in the training sequences, normalised over all sources; 0 leaves the source out.
        limit: Take at most so many documents; ``null`` for all.
        subset: Configuration of the data set.
        split: Split of the data set that is read (validation text is held out of it by document).
        revision: Commit or tag of the data set.
        streaming: Read the data set while it is fetched, up to ``limit``.
    """

    domain: str
    kind: str
    path: str
    field: str = "text"
    weight: float = 1.0
    limit: int | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False

    def __post_init__(self) -> None:
        place = f"data.sources ({self.domain}, {self.path})"
        for key in ("domain", "path", "field"):
            if not getattr(self, key):
                raise ConfigError(f"{place}: {key} is empty; every source needs a domain, a kind and a path")
        if self.kind not in SOURCE_KINDS:
            raise ConfigError(f"{place}: kind={self.kind!r}: {did_you_mean(self.kind, SOURCE_KINDS)}")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ConfigError(f"{place}: weight={self.weight}: must be 0 or more")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"{place}: limit={self.limit}: must be 1 or more, or null for all")
        if self.kind != "hf" and (self.subset or self.split != "train" or self.revision or self.streaming):
            raise ConfigError(f"{place}: subset, split, revision and streaming belong to kind=hf; leave them out")
        if self.streaming and self.limit is None:
            raise ConfigError(f"{place}: streaming=true needs a number of documents to take, as in limit: 100000")


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how it is mixed.

    Attributes:
        weights: Share of each domain in the training sequences; normalised over the domains that are there.
        sources: The user's own text instead of the default corpus; each source has its own weight.
        fim_rate: Share of the training documents that are read prefix, suffix, middle (the report's is 0.1).
        document_mask: Attention stays inside a document, as in the report's fine-tuning (section 5.1). Its
            pre-training packs documents without this mask (section 4.1).
        cache_dir: Folder for downloads and tokenised text; None for the user's cache folder.
        offline: Fetch nothing; use what this machine has.
        num_workers: Processes per loader; 0 loads in the training process.
        val_windows: At most so many held-out sequences per domain at each validation; 0 for all.
    """

    weights: dict[str, float] = field(
        default_factory=lambda: {"english": 0.25, "chinese": 0.25, "code": 0.25, "math": 0.25}
    )
    sources: list[SourceConfig] = field(default_factory=list)
    fim_rate: float = 0.0
    document_mask: bool = False
    cache_dir: str | None = None
    offline: bool = False
    num_workers: int = 0
    val_windows: int = 32

    def __post_init__(self) -> None:
        if self.sources and not any(source.weight for source in self.sources):
            raise ConfigError("data.sources: every weight is 0; at least one source needs a positive weight")
        if not 0 <= self.fim_rate <= 1:
            raise ConfigError(f"data.fim_rate={self.fim_rate}: is a share of the documents, from 0 to 1")
        if any(not math.isfinite(w) or w < 0 for w in self.weights.values()) or not sum(self.weights.values()) > 0:
            raise ConfigError(
                f"data.weights={dict(self.weights)}: weights must not be negative and one must be positive"
            )
        for key in ("num_workers", "val_windows"):
            if getattr(self, key) < 0:
                raise ConfigError(f"data.{key}={getattr(self, key)}: must be 0 or more")


@dataclass(frozen=True)
class RunConfig:
    """Everything that one training run needs.

    Attributes:
        name: Ends the run folder's name.
        seed: Seeds weights and the order of the data.
        runs_dir: Where run folders are made.
        resume: Run folder or checkpoint to go on from; null starts anew.
        model: The model.
        train: Length, batch, optimizer and schedules.
        data: The corpus.
        balance: Any of aux_free, sequence, batch, global_batch, v2, cv2 and z.
        balance_args: Parameters of each of them.
        kernels: Implementation of each operation, as in ``kernels.router=torch``; ``auto`` takes the best that can.
        trainer: Arguments of Lightning's Trainer, as in ``trainer.max_steps=10``.
        loggers: Any of csv, tensorboard and wandb. ``metrics.csv`` is written in any case.
    """

    name: str = "tiny"
    seed: int = 0
    runs_dir: str = "runs"
    resume: str | None = None
    model: DeepSeekV3Config = field(default_factory=DeepSeekV3Config)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    balance: list[str] = field(default_factory=lambda: ["aux_free", "sequence"])
    balance_args: BalanceArgs = field(default_factory=BalanceArgs)
    kernels: KernelConfig = field(default_factory=KernelConfig)
    trainer: dict[str, Any] = field(default_factory=dict)
    loggers: list[str] = field(default_factory=lambda: ["csv"])

    def __post_init__(self) -> None:
        for name in self.loggers:
            if name not in LOGGERS:
                raise ConfigError(f"loggers={self.loggers}: {name!r}: {did_you_mean(name, LOGGERS)}")
        check_balance(self.balance, self.balance_args, self.model)
        if "aux_free" in self.balance and not self.model.has_routing_bias:
            raise ConfigError(
                f"balance={self.balance}: aux_free moves a routing bias and "
                f"model.topk_method={self.model.topk_method!r} has none; "
                "use model.topk_method=noaux_tc or leave aux_free out"
            )
        if self.train.sequence_length <= self.model.num_nextn_predict_layers + 1:
            raise ConfigError(
                f"train.sequence_length={self.train.sequence_length}: too short for "
                f"model.num_nextn_predict_layers={self.model.num_nextn_predict_layers}; use a longer sequence"
            )
        if self.train.sequence_length > self.model.max_position_embeddings:
            raise ConfigError(
                f"train.sequence_length={self.train.sequence_length}: more than model.max_position_embeddings="
                f"{self.model.max_position_embeddings}; raise the second or lower the first"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """Return YAML that ``config=FILE`` reads back."""
        return OmegaConf.to_yaml(OmegaConf.create(self.to_dict()))


def load_run_config(words: Sequence[str] = ()) -> RunConfig:
    """Build a run's configuration from command-line words (see the module docstring).

    Args:
        words: ``key=value`` words in any order.

    Raises:
        ConfigError: A word that is not key=value, an unknown key, a wrong type or an impossible value.

    >>> load_run_config(["model.hidden_size=128", "model=tiny", "seed=3"]).model.hidden_size
    128
    """
    pairs = [_split(word) for word in words]
    selected = {"model": "tiny", "train": "cpu_demo"}
    layers: list[dict[str, Any]] = []
    overrides: list[tuple[str, str]] = []
    for key, value in pairs:
        if key == "config":
            layers.append(read_yaml(Path(value), key="config"))
        elif key == "resume" and value not in ("null", ""):
            layers += _resumed_config(Path(value))
            overrides.append((key, value))
        elif key in GROUPS:
            selected[key] = value
        else:
            overrides.append((key, value))
    study = read_preset("study", selected.pop("study")) if "study" in selected else {}
    named_model = selected["model"]
    groups = {group: read_preset(group, name) for group, name in selected.items()}

    # A frozen dataclass makes a read-only node; the merge writes, and the typed object at the end is frozen again.
    merged = OmegaConf.structured(RunConfig)
    _make_writable(merged)
    stem = Path(named_model).stem
    for origin, layer in [("preset", {"name": stem, **groups}), ("study", study), *(("config", x) for x in layers)]:
        merged = _merge(merged, layer, origin)
    for key, value in overrides:
        merged = _override(merged, key, value)
    try:
        built = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}: is not given and has no default; {_first_line(error)}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"configuration: {_first_line(error)}") from error
    assert isinstance(built, RunConfig)
    return built


def _resumed_config(path: Path) -> list[dict[str, Any]]:
    """Return the configuration beside a run's checkpoints, if there is one."""
    file = (path if path.is_dir() else path.parent.parent) / "config.yaml"
    if not file.is_file():
        return []
    values = read_yaml(file, key="resume")
    values.pop("resume", None)
    return [values]


def _split(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals or not key or key.startswith("-"):
        raise ConfigError(f"{word!r}: options are given as key=value, as in model=tiny or train.total_tokens=200000")
    return key, value


def _make_writable(node: DictConfig) -> None:
    OmegaConf.set_readonly(node, False)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            _make_writable(child)


def _merge(base: DictConfig, values: Mapping[str, Any], origin: str) -> DictConfig:
    try:
        merged = OmegaConf.merge(base, OmegaConf.create(dict(values)))
    except (ConfigKeyError, ValidationError) as error:
        raise _explain(error, base, origin) from error
    except TypeError as error:  # a list where a mapping belongs, or the other way round
        raise ConfigError(f"{origin}: {_first_line(error)}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _override(base: DictConfig, key: str, value: str) -> DictConfig:
    try:
        layer = OmegaConf.from_dotlist([f"{key}={value}"])
        merged = OmegaConf.merge(base, layer)
    except (ConfigKeyError, ValidationError) as error:
        raise _explain(error, base, f"{key}={value}") from error
    except (OmegaConfBaseException, TypeError) as error:
        raise ConfigError(f"{key}={value}: {_first_line(error)}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _explain(error: OmegaConfBaseException, base: DictConfig, origin: str) -> ConfigError:
    if error.full_key is None and error.key is None:
        return ConfigError(f"{origin}: {_first_line(error)}")
    full_key = str(error.full_key or error.key)
    if isinstance(error, ValidationError):
        return ConfigError(f"{origin}: {full_key}: {_first_line(error)}")
    parent, _, leaf = full_key.rpartition(".")
    node = OmegaConf.select(base, parent) if parent else base
    known: Iterable[str] = [str(key) for key in node] if isinstance(node, DictConfig) else []
    if isinstance(kind := error.object_type, type) and dataclasses.is_dataclass(kind):
        known = [f.name for f in dataclasses.fields(kind)]  # inside a list the path is not told
    prefix = "" if origin.partition("=")[0] == full_key else f"{full_key}: "
    return ConfigError(f"{origin}: {prefix}there is no such key; {did_you_mean(leaf, known)}")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
