"""What a config says of each slot: knep's own configs, and those of another project, which may leave slots out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from omegaconf import DictConfig, OmegaConf

from knep.config.catalog import CONF, options
from knep.config.command_line.readers import refuse_unread_slots
from knep.config.conflicts import refuse_conflicts
from knep.config.stages import SLOT, option_of, refuse_node
from knep.errors import InputError

# What a slot is that another project's config leaves out; an update rule it has to choose.
ABSENT = {
    "augment": {"_target_": "knep.recipes.augment.none"},
    "averaging": {"_target_": "knep.recipes.averaging.none"},
    "regularization": {"_target_": "knep.recipes.regularization.Regularizer"},
    "stopping": {"_target_": "knep.recipes.stopping.none"},
} | {
    slot: {"_target_": f"knep.recipes.{slot}.none", "_partial_": True}
    for slot in ("scaling", "norm", "activation", "dropout", "init", "clip", "scheduler")
}


def resolved(cfg: DictConfig, slots: Sequence[str]) -> dict[str, Any]:
    """What another app's config has for a recipe, as plain data; the rest of it is not looked at."""
    keys = (*slots, "layer_decay", "accumulate", "trainer")
    values = {k: cfg[k] for k in keys if k in cfg}
    plain = {k: OmegaConf.to_container(v, resolve=True) if OmegaConf.is_config(v) else v for k, v in values.items()}
    refuse_unread_slots(plain)
    refuse_contradictions(plain)
    return plain


def slot_node(cfg: Mapping[str, Any], slot: str) -> dict[str, Any]:
    """The keys of a slot, or those of `none` where it is left out. Raises InputError where that cannot be."""
    node = cfg.get(slot, ABSENT.get(slot))
    if not isinstance(node, Mapping):
        found = f"{slot}={node} is no option of a slot" if slot in cfg else f"the config has no {slot}"
        remedy = "adamw" if slot == "optimizer" else "none"
        raise InputError(f"{found}: add `- {slot}: {remedy}` to its defaults, or another option")
    return dict(node)


def slots_of(choices: Mapping[str, str]) -> dict[str, str]:
    """The choices that a recipe makes for any model: without data, model and trainer, which another project owns."""
    return {group: option for group, option in choices.items() if group not in ("data", "model", "trainer", "recipe")}


def with_trainer(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with what another project need not have: the keys that contradictions are looked for in."""
    trainer = config.get("trainer") or {}
    return {"accumulate": 1, "optimizer": {}, **config, "trainer": {"precision": "32-true", **trainer}}


def refuse_contradictions(config: Mapping[str, Any]) -> None:
    """As `compose_config` does, for the slots of a config that another project composed: options by their targets."""
    refuse_node(config.get(SLOT))
    choices = {slot: option for slot, option in ((s, _option_of(s, node)) for s, node in config.items()) if option}
    refuse_conflicts(slots_of(choices), with_trainer(config))


def _option_of(slot: str, node: object) -> str | None:
    target = node.get("_target_") if isinstance(node, Mapping) else None
    stages = option_of(node) if slot == SLOT and isinstance(node, Mapping) else None
    return stages or (_targets(slot).get(target) if target else None)


@lru_cache
def _targets(slot: str) -> dict[str, str]:
    """`_target_` -> the first option of a slot that has it; nothing for what is no group."""
    nodes = {o: dict(OmegaConf.load(CONF / slot / f"{o}.yaml")) for o in reversed(options(slot))}
    return {str(node["_target_"]): option for option, node in nodes.items() if "_target_" in node}
