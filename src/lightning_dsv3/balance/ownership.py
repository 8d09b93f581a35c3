"""Who moves which bias. Two owners would double each step without a sign of it, so they are an error."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_dsv3.balance.adapter import NativeUpdater
from lightning_dsv3.balance.discovery import ObservedRouter

# Weak on both sides: neither a model nor an owner lives longer because of a claim.
_owners: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def claim_bias(router: nn.Module, owner: object, name: str = "") -> None:
    """Make ``owner`` the one that moves the bias of ``router``. Claiming again what one owns is fine.

    Args:
        router: The router module.
        owner: What moves the bias; its repr names it in errors. It is held weakly.
        name: Name of the layer, for the error.

    Raises:
        MisconfigurationException: Another living owner has claimed the bias.
    """
    current = bias_owner(router)
    if current is not None and current is not owner:
        raise MisconfigurationException(
            f"The routing bias of {name or type(router).__name__} has two owners: {current!r} and {owner!r}. "
            "Keep one of them, or give the other dry_run=True so that it only measures."
        )
    _owners[router] = weakref.ref(owner)


def release_bias(router: nn.Module, owner: object) -> None:
    """Give up the claim of ``owner``, if it has one."""
    if bias_owner(router) is owner:
        del _owners[router]


def bias_owner(router: nn.Module) -> object | None:
    """Return what moves the bias of ``router``, or None where nothing does."""
    reference = _owners.get(router)
    return None if reference is None else reference()


def native_updaters(routers: Sequence[ObservedRouter], optimizers: Sequence[Any]) -> dict[str, NativeUpdater]:
    """Return by layer name what moves biases besides any callback, such as a hook of the routers' own framework.

    Args:
        routers: Routers; those without a bias are passed over.
        optimizers: The Trainer's optimizers.
    """
    found = {}
    for router in routers:
        if router.bias_tensor is not None:
            updater = router.adapter.native_updater(router.module, router.holder, optimizers)
            if updater is not None:
                found[router.name] = updater
    return found
