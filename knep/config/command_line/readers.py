"""Every key of a config has a reader, or is refused with what to write instead."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from knep.config.catalog import CONF, GROUPS, SLOTS, TASK_SLOTS
from knep.config.command_line.signatures import OWN, takes
from knep.config.command_line.stage_keys import stage_line
from knep.config.command_line.vocabulary import line_for
from knep.config.instantiate import allowed
from knep.config.stages import SLOT, TARGET
from knep.errors import InputError

_HYDRA = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")
# Keys beside those of a slot's trick: they say how the training loop uses it.
_BESIDE = {
    "optimizer": ("accumulate", "lr_per", "wrap"),
    "scheduler": ("interval", "monitor"),
    "model": ("weights", "checkpointing"),
}
# What a run gives to a trick, over whatever the config has; and to the model.
_GIVEN = ("sample", "total_steps", "steps_per_epoch")
_OF_DATA = ("in_channels", "num_classes", "image_size")
# Flags of Lightning's Trainer that act in a run beside those of trainer/auto.yaml, each with a value of its kind.
FURTHER: dict[str, Any] = {
    "min_epochs": 1,
    "min_steps": 1,
    "overfit_batches": 0.0,
    "val_check_interval": 1.0,
    "detect_anomaly": False,
    "inference_mode": True,
    "sync_batchnorm": False,
}
# What the loss gets with each batch, and the task from data, recipe and command line.
_OF_TASK = ("output", "target", "targets", "reduction", "counts", "label_smoothing", "num_classes", "num_labels")
_OF_TASK += ("num_targets", "vocabulary", "loss", "metrics", "batch", "smoothing", "layers")
_LOADED = (*SLOTS, "loss", "finetune", "layer_decay", "accumulate", "recipe")
# Of several options with a key that another lacks, the one to name.
_USUAL = ("standard", "norm", "cosine", "batch", "ema", "early", "momentum", "adamw", "flip", "mixup", "orthogonal")
_USUAL += ("he_normal", "label_smoothing", "l2", "resnet", "image_folder", "rollback")


@lru_cache
def _yaml(path: str) -> dict[str, Any]:
    """One of knep's own option files, or nothing for a name that is none."""
    import yaml

    file = CONF / f"{path}.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8")) or {} if file.is_file() else {}


def top_level() -> set[str]:
    """The keys of a whole run."""
    return {*_yaml("train"), *GROUPS, "doctor"} - {"defaults", "hydra", "recipe"}


def refuse_unread(config: Mapping[str, Any], choices: Mapping[str, str], made: Mapping[str, Any]) -> None:
    """Raises InputError for the first key that nobody would read.

    made: what knep's own files alone compose to with the same options, whose keys need no look; {} where others are
    searched too.
    """
    for key, value in config.items():
        if key == "recipe" and isinstance(value, Mapping):  # what a file without a header is put under
            raise InputError(
                f"recipe={choices.get('recipe')} fills a group named recipe, which nothing reads: begin its file with "
                "`# @package _global_` and a defaults list, as `knep cp recipe/modern FOLDER` copies one"
            )
        if key not in top_level():
            raise InputError(no_key(key, _shown(value), config, choices))
    for section in ("checkpoint", "slurm"):
        _check_names(section, config.get(section), _yaml("train")[section], config, choices)
    if "trainer" in config:
        _check_names("trainer", config["trainer"], (*_of_trainer(), *_HYDRA), config, choices)
        _check_further(config["trainer"])
    for group in (*SLOTS, *TASK_SLOTS, "task", "data", "model", "guard", "doctor"):
        _check_slot(group, config.get(group), made.get(group), config, choices)
    for path, node in own_callbacks(config).items():
        _check_node(path, node, {}, config, choices)


def refuse_unread_slots(config: Mapping[str, Any]) -> None:
    """As `refuse_unread`, for the slots of a config that another project composed; its other keys are its own."""
    for slot in SLOTS:
        _check_slot(slot, config.get(slot), None, config, {})


def own_callbacks(config: Mapping[str, Any]) -> dict[str, Any]:
    """The user's own callbacks, by where they stand in the config: one `_target_`, or several by name.

    Raises InputError for anything else.
    """
    node = config.get("callbacks")
    if node is None:
        return {}
    found = {"callbacks": node}
    if isinstance(node, Mapping) and "_target_" not in node:
        found = {f"callbacks.{name}": one for name, one in node.items()}
    for path, one in found.items():
        if not isinstance(one, Mapping) or "_target_" not in one:
            raise InputError(f"{path}={_shown(one)} builds nothing: write {path}._target_=mypkg.MyCallback")
    return found


def _check_names(
    section: str, node: Any, known: Iterable[str], config: Mapping[str, Any], choices: Mapping[str, str]
) -> None:
    for key, value in (node or {}).items():
        if key not in known:
            raise InputError(no_key(f"{section}.{key}", _shown(value), config, choices))


def _check_further(trainer: Mapping[str, Any]) -> None:
    for key, example in FURTHER.items():
        value = trainer.get(key)
        wrong = isinstance(value, bool) != isinstance(example, bool) or not isinstance(value, (bool, int, float))
        if value is not None and (wrong or (isinstance(example, int) and not isinstance(value, int)) or value < 0):
            kind = "true or false" if isinstance(example, bool) else "a number, at least 0"
            raise InputError(
                f"trainer.{key}={_shown(value)}: write {kind}, for example trainer.{key}={_shown(example)}"
            )


def _check_slot(group: str, node: object, made: object, config: Mapping[str, Any], choices: Mapping[str, str]) -> None:
    if isinstance(node, Mapping):
        _check_node(group, node, made or {}, config, choices)


def _check_node(path: str, node: object, made: object, config: Mapping[str, Any], choices: Mapping[str, str]) -> None:
    """Checks what is built by `_target_`, and the nodes in it."""
    if isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            _check_node(f"{path}[{i}]", value, {}, config, choices)
    if not isinstance(node, Mapping):
        return
    made = made if isinstance(made, Mapping) and made.get("_target_") == node.get("_target_") else {}
    new = [key for key in node if key not in made and key not in _HYDRA]
    known = _known(path, node) if new and isinstance(node.get("_target_"), str) else None
    for key in new:
        if known is not None and key not in known:
            raise InputError(no_key(f"{path}.{key}", _shown(node[key]), config, choices))
    for key, value in node.items():
        _check_node(f"{path}.{key}", value, made.get(key), config, choices)


def _of_trainer() -> tuple[str, ...]:
    return (*_yaml("trainer/auto"), "members", *FURTHER)


def _known(path: str, node: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The keys that a node's target takes from a config; None where it takes any."""
    if path == "trainer":
        return _of_trainer()
    target = node["_target_"]
    if target == TARGET:
        return tuple(key for key in node if key not in _HYDRA)  # whose keys are stages, and looked at by their names
    if path == "guard" and isinstance(node.get("action"), str) and target.startswith("knep."):
        return tuple(_yaml(f"guard/{node['action']}"))  # one class for all of them, which reads what the action needs
    if not target.startswith(tuple(a for a in (*OWN, *allowed()) if a.endswith("."))) and target not in allowed():
        return None  # building it is refused, with the way to allow it
    found = takes(target)
    if found is None or found.more:
        return None
    names = found.names
    if path == "model":
        names = tuple(n for n in names if n not in _OF_DATA)
    elif path in ("task", *TASK_SLOTS):
        names = tuple(n for n in names if n not in _OF_TASK)
    elif node.get("_partial_") and path in SLOTS:
        names = tuple(n for n in names[1:] if n not in _GIVEN)
    beside = _BESIDE.get(path, ())
    if target.startswith("knep.recipes.scheduler.") and not target.endswith(".plateau"):
        beside = ()  # schedules of the step, which no metric moves
    return (*names, *beside)


def no_key(key: str, value: str, config: Mapping[str, Any], choices: Mapping[str, str]) -> str:
    """Why a key is refused, and what to write instead.

    value: as it was typed; config: what there is, and the option that each group has.
    """
    group, dot, rest = key.partition(".")
    if group == "model" and rest in _OF_DATA:
        return f"{key} comes from the data: leave it out"
    if dot and group == SLOT and (line := stage_line(rest, value, choices.get(SLOT, ""), _of_options(SLOT))):
        return line
    if dot and isinstance(config.get(group), Mapping):
        other = None if line_for(key, value, whole=True) else _other(group, rest, choices)
        if other:
            return f"{group}={choices[group]} has no {rest}: write {group}={other} {group}.{rest}={value}"
        said = _of_group(group, rest, value, config, choices)
    else:
        said = _of_run(key, value, config)
    return f"there is no key {key}: {said}"


def _other(group: str, key: str, choices: Mapping[str, str]) -> str | None:
    """Another option of a group that has the key: the usual one of several."""
    found = [o for o, keys in _of_options(group).items() if key in keys] if choices.get(group) else []
    usual = next((o for o in _USUAL if o in found), found[0] if found else None)
    return None if choices.get(group) in found or key in _BESIDE.get(group, ()) else usual


def _of_group(group: str, rest: str, value: str, config: Mapping[str, Any], choices: Mapping[str, str]) -> str:
    node, path, last = _innermost(group, rest, config)
    known = _known(path, node) if path == "trainer" or isinstance(node.get("_target_"), str) else None
    if known and last in known:
        return f"write +{path}.{last}={value}"  # taken, although no file has it
    exact = line_for(f"{path}.{last}", value)
    if exact:
        return exact
    own = [
        k
        for k in (*(known or ()), *_flat(node))
        if k != last and not k.startswith(f"{last}.") and k.rpartition(".")[2][:1] != "_"
    ]
    near = [k for k in difflib.get_close_matches(last, own, n=1, cutoff=0.6) if k != last]
    if near:
        return f"did you mean {path}.{near[0]}?"
    target = node.get("_target_")
    option = choices.get(group) if path == group else None
    chosen = f"{group}={option}" if option and target in (None, _yaml(f"{group}/{option}").get("_target_")) else target
    return f"{chosen or path} takes {', '.join(f'{path}.{k}' for k in dict.fromkeys(own)) or 'no keys'}"


def _innermost(group: str, rest: str, config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str, str]:
    """The deepest node of a key's path that is there, where it stands, and the key's next word in it."""
    node, path, words = config[group], group, rest.split(".")
    while len(words) > 1 and isinstance(node.get(words[0]), Mapping):
        node, path = node[words[0]], f"{path}.{words[0]}"
        words = words[1:]
    return node, path, ".".join(words)


def _of_run(key: str, value: str, config: Mapping[str, Any]) -> str:
    known = top_level() - {"doctor"}
    if key.startswith("doctor."):
        return f"write callbacks=doctor {key}={value}"
    exact = line_for(key, value) or _elsewhere(key, value)
    if exact:
        return exact
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]}?"
    last = {k.rpartition(".")[2]: k for k in _flat({k: config[k] for k in config if k in known})}
    near = difflib.get_close_matches(key.rpartition(".")[2], [k for k in last if k[0] != "_"], n=1, cutoff=0.75)
    return f"did you mean {last[near[0]]}?" if near else f"choose from {', '.join(sorted(known))}"


def _elsewhere(word: str, value: str) -> str | None:
    """The line that sets a key of some option, named without its group."""
    for group in (*SLOTS, *TASK_SLOTS, "task", "trainer", "model", "data"):
        found = [o for o, keys in _of_options(group).items() if word in keys and word not in _BESIDE.get(group, ())]
        if found:
            usual = next((o for o in _USUAL if o in found), found[0])
            return f"write {group}={usual} {group}.{word}={value}"
    return None


@lru_cache
def _of_options(group: str) -> dict[str, list[str]]:
    """Option -> the keys of its file."""
    files = sorted((CONF / group).glob("*.yaml")) if group in GROUPS and group != "recipe" else []
    return {f.stem: [k for k in _yaml(f"{group}/{f.stem}") if not k.startswith("_") and k != "defaults"] for f in files}


def _flat(node: object, prefix: str = "") -> Iterator[str]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            path = f"{prefix}.{key}" if prefix else str(key)
            yield path
            yield from _flat(value, path)


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def refuse_unloaded(key: str, line: str) -> None:
    """Raises InputError for a typed key of a run where only the slots of a recipe are read."""
    first = key.partition(".")[0]
    if first in top_level() and first not in _LOADED and key != "trainer.max_epochs":
        raise InputError(
            f"there is no key {key} in a recipe alone, which has its slots: leave out {line}, or use knep train"
        )
