"""Metrics of balance and of language modelling, correct under any number of ranks."""

from __future__ import annotations

from lightning_dsv3.metrics.bits_per_byte import BitsPerByte
from lightning_dsv3.metrics.expert_load import ExpertLoad, ExpertSpecialization, MaxViolation
from lightning_dsv3.metrics.mtp_acceptance import MTPAcceptance

__all__ = ["BitsPerByte", "ExpertLoad", "ExpertSpecialization", "MTPAcceptance", "MaxViolation"]
