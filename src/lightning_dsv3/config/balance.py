"""How the load of experts is balanced: ``balance=[...]`` names methods, ``balance_args.<method>.*`` their parameters.

Each is alone or together with others; the report has ``[aux_free, sequence]``. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_dsv3.config.errors import ConfigError, did_you_mean
from lightning_dsv3.config.model import DeepSeekV3Config

BALANCE_METHODS = ("aux_free", "sequence", "batch", "global_batch", "v2", "cv2", "z")
SELECTIONS = ("unbiased", "executed")
BIAS_RULES = ("sign", "proportional", "centred")


@dataclass(frozen=True)
class AuxFreeArgs:
    """Auxiliary-loss-free balancing: a bias that ``AuxFreeBalanceCallback`` moves.

    Attributes:
        update_rate: Replaces the schedule's bias_update_rate by a constant.
        rule: ``sign`` (the report's, rate 0.001), ``proportional`` (for softmax affinities, rate 0.01) or ``centred``.
    """

    update_rate: float | None = None
    rule: str = "sign"

    def __post_init__(self) -> None:
        if self.rule not in BIAS_RULES:
            raise ConfigError(f"balance_args.aux_free.rule={self.rule!r} is not one of {', '.join(BIAS_RULES)}")


@dataclass(frozen=True)
class AuxLossArgs:
    """A balance loss: its strength alpha, and whether f_i counts the un-biased top-K (report) or the executed one."""

    alpha: float = 1e-4
    selection: str = "unbiased"

    def __post_init__(self) -> None:
        _check_alpha(self, "alpha")
        _check_selection(self.selection)


@dataclass(frozen=True)
class V2Args:
    """DeepSeek-V2's three losses; groups of experts (``model.n_group``) are its devices.

    The strengths are V2's. V2-Lite, on one device, has expert_alpha 0.001 and the other two 0.

    Attributes:
        expert_alpha: Strength alpha_1 of the expert-level loss.
        device_alpha: Strength alpha_2 of the device-level loss.
        communication_alpha: Strength alpha_3 of the communication loss.
        selection: ``executed``, the experts that a token uses, as in V2, or ``unbiased``.
    """

    expert_alpha: float = 0.003
    device_alpha: float = 0.05
    communication_alpha: float = 0.02
    selection: str = "executed"

    def __post_init__(self) -> None:
        _check_alpha(self, "expert_alpha", "device_alpha", "communication_alpha")
        _check_selection(self.selection)


@dataclass(frozen=True)
class AlphaArgs:
    """A loss with nothing but a strength alpha."""

    alpha: float

    def __post_init__(self) -> None:
        _check_alpha(self, "alpha")


@dataclass(frozen=True)
class BalanceArgs:
    """Parameters of each balance method."""

    aux_free: AuxFreeArgs = field(default_factory=AuxFreeArgs)
    sequence: AuxLossArgs = field(default_factory=AuxLossArgs)
    # The report gives batch-wise balance no coefficient (4.5.3); 1e-3 is the field's usual strength.
    batch: AuxLossArgs = field(default_factory=lambda: AuxLossArgs(alpha=1e-3))
    global_batch: AuxLossArgs = field(default_factory=lambda: AuxLossArgs(alpha=1e-3))
    v2: V2Args = field(default_factory=V2Args)
    # Our choice, as today's models have none.
    cv2: AlphaArgs = field(default_factory=lambda: AlphaArgs(0.01))
    z: AlphaArgs = field(default_factory=lambda: AlphaArgs(1e-3))  # ST-MoE's

    @classmethod
    def of(cls, values: BalanceArgs | Mapping[str, Mapping[str, Any]] | None) -> BalanceArgs:
        """Return the parameters with those of ``values`` in the place of defaults.

        Raises:
            ConfigError: An unknown method or parameter, or an impossible value.

        >>> BalanceArgs.of({"batch": {"selection": "executed"}}).batch
        AuxLossArgs(alpha=0.001, selection='executed')
        """
        if isinstance(values, BalanceArgs):
            return values
        default = cls()
        try:
            changed = {
                name: dataclasses.replace(getattr(default, name), **dict(args)) for name, args in (values or {}).items()
            }
        except (AttributeError, TypeError) as error:
            raise ConfigError(
                f"balance_args={values!r}: {error}; known methods: {', '.join(BALANCE_METHODS)}"
            ) from error
        return dataclasses.replace(default, **changed)


def check_balance(methods: Sequence[str], args: BalanceArgs, model: DeepSeekV3Config) -> None:
    """Refuse methods that do not exist, or that can do nothing in ``model``.

    Raises:
        ConfigError: With the key, the value and what to do.
    """
    for name in methods:
        if name not in BALANCE_METHODS:
            raise ConfigError(f"balance={list(methods)}: {name!r}: {did_you_mean(name, BALANCE_METHODS)}")
    groups = expert_groups(model)[0]
    if "v2" in methods and groups == 1 and (args.v2.device_alpha or args.v2.communication_alpha):
        raise ConfigError(
            f"balance={list(methods)}: v2 balances groups of experts, and the model has one (model.n_group="
            f"{model.n_group}, topk_method={model.topk_method}); take more groups, or V2-Lite's strengths: "
            "balance_args.v2.expert_alpha=0.001 balance_args.v2.device_alpha=0 balance_args.v2.communication_alpha=0"
        )
    if "cv2" in methods and model.num_experts_per_tok == 1 and model.norm_topk_prob:
        raise ConfigError(
            f"balance={list(methods)}: cv2 evens out gate values, and with model.num_experts_per_tok=1 and "
            "model.norm_topk_prob=true all of them are 1; use model.norm_topk_prob=false or another method"
        )


def expert_groups(model: DeepSeekV3Config) -> tuple[int, int]:
    """Return the groups that experts are chosen by, and how many of them a token may use."""
    return (1, 1) if model.topk_method == "greedy" else (model.n_group, model.topk_group)


def _check_alpha(args: Any, *keys: str) -> None:
    for key in keys:
        value = getattr(args, key)
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"balance_args.*.{key}={value}: must be 0 or more")


def _check_selection(selection: str) -> None:
    if selection not in SELECTIONS:
        raise ConfigError(f"balance_args.*.selection={selection!r} is not one of {', '.join(SELECTIONS)}")
