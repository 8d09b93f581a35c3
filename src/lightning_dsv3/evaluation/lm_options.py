"""Arguments of the ``dsv3`` model and of a task's generation, checked: what cannot be is one clear error."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lm_eval.models.utils import normalize_gen_kwargs

from lightning_dsv3.config import ConfigError
from lightning_dsv3.inference import Sampling

_log = logging.getLogger(__name__)

# What torch needs to find the other ranks; torchrun and accelerate give it.
_LAUNCHER = ("RANK", "MASTER_ADDR", "MASTER_PORT")


class GenerationOptions:
    """What a task asks of generation; what is not known is an error, not ignored.

    Args:
        given: A request's ``gen_kwargs``.
        max_gen_toks: New tokens where it does not say.
        max_length: Longest text in tokens.
        end: Text of the token that ends a text. As in ``hf``, it is a stop string too.

    Raises:
        ConfigError: An option that is not known, or one that leaves no room for a prompt.
    """

    def __init__(self, given: Mapping[str, Any], *, max_gen_toks: int, max_length: int, end: str) -> None:
        options: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), default_max_gen_toks=max_gen_toks))
        self.max_new_tokens = int(options.pop("max_gen_toks"))
        if not 0 < self.max_new_tokens < max_length:
            raise ConfigError(
                f"max_gen_toks={self.max_new_tokens}: must be at least 1 and leave room for a prompt in "
                f"max_length={max_length}; give --gen_kwargs max_gen_toks=N or a larger max_length"
            )
        self.until: Sequence[str] = list(dict.fromkeys(word for word in (*options.pop("until"), end) if word))
        do_sample, temperature = options.pop("do_sample", False), options.pop("temperature", 0.0)
        top_k, top_p = options.pop("top_k", None), options.pop("top_p", 1.0)
        options.pop("max_length", None)
        if options:
            raise ConfigError(
                f"generation_kwargs: {', '.join(sorted(options))} not known to the dsv3 model; it takes until, "
                "max_gen_toks, do_sample, temperature, top_k and top_p"
            )
        self.sampling = Sampling(float(temperature) or 1.0, top_k, float(top_p)) if do_sample else None

    def seeds(self, count: int) -> list[int] | None:
        """Return a seed for each prompt, from the generator that lm-eval seeds; None where nothing is drawn."""
        if self.sampling is None:
            return None
        return torch.randint(0, 2**62, (count,)).tolist()


def chosen_device(device: str | None, world_size: int) -> torch.device:
    """Return where to compute: a GPU that is not there is the CPU, and each of several ranks has one of its own.

    Raises:
        ConfigError: A machine has more ranks than GPUs.
    """
    wanted = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if wanted.type != "cuda":
        return wanted
    count = torch.cuda.device_count()
    if world_size > 1 and count:
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        if rank >= count:
            raise ConfigError(f"LOCAL_RANK={rank}: this machine has {count} GPUs; start as many ranks, or device=cpu")
        return torch.device("cuda", rank)
    if (wanted.index or 0) >= count:
        _log.warning("device=%s is not there: running on the CPU", device)
        return torch.device("cpu")
    return wanted


def launched_ranks() -> int:
    """Return how many processes a launcher has started.

    Raises:
        ConfigError: The environment says several, and not how they find each other.
    """
    value = os.environ.get("WORLD_SIZE") or "1"
    world_size = whole_number("WORLD_SIZE", value, 1)
    missing = [name for name in _LAUNCHER if name not in os.environ]
    if world_size > 1 and missing and not torch.distributed.is_initialized():
        raise ConfigError(
            f"WORLD_SIZE={world_size} in the environment, but not {', '.join(missing)}: start the ranks with torchrun "
            "--nproc-per-node N -m lm_eval ... or accelerate launch -m lm_eval ..., or unset WORLD_SIZE"
        )
    return world_size


def most_rows(batch_size: int | str | None, max_batch_size: int | str | None) -> int | None:
    """Return the most rows of a pass; None for as many as fit the engine's budget of tokens."""
    if batch_size is None or str(batch_size).partition(":")[0] == "auto":
        return None if max_batch_size is None else whole_number("max_batch_size", max_batch_size, 1)
    return whole_number("batch_size", batch_size, 1)


def whole_number(name: str, value: int | str, least: int) -> int:
    """Return an argument as a number.

    Raises:
        ConfigError: It is none, or less than ``least``.
    """
    try:
        number = int(value)
    except ValueError:
        number = least - 1
    if number < least:
        raise ConfigError(f"{name}={value}: must be a whole number of {least} at least")
    return number


def flag(name: str, value: bool | str) -> bool:
    """Return an argument as true or false.

    Raises:
        ConfigError: It is neither.
    """
    if isinstance(value, bool):
        return value
    if str(value).lower() not in ("true", "false"):
        raise ConfigError(f"{name}={value}: must be true or false")
    return str(value).lower() == "true"
