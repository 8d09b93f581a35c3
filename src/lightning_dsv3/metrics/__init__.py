"""Metrics of balance and of language modelling, correct under any number of ranks."""

from __future__ import annotations

from lightning_dsv3.metrics.bits_per_byte import BitsPerByte
from lightning_dsv3.metrics.expert_load import ExpertLoad, ExpertSpecialization, MaxViolation

__all__ = ["BitsPerByte", "ExpertLoad", "ExpertSpecialization", "MaxViolation"]
