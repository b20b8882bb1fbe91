"""Options that contradict each other, as data: refused when a config is composed, with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from knep.errors import InputError
from knep.utils.monitors import refuse_contradictory_modes, refuse_unlogged, refuse_without_validation


@dataclass(frozen=True)
class Conflict:
    """Each of `options` of `slot` against each of `others` of `other`; "*" in `others` is all but `none`."""

    slot: str
    options: tuple[str, ...]
    other: str
    others: tuple[str, ...]
    reason: str


_DECAYS_BY_ITSELF = "the optimizer decays the weights already: write optimizer.weight_decay=0, or regularization=none"

CONFLICTS = (
    Conflict(
        "optimizer",
        ("schedule_free",),
        "scheduler",
        ("*",),
        "schedule-free replaces the schedule by averaging (Defazio et al. 2024): write scheduler=none",
    ),
    Conflict(
        "optimizer",
        ("schedule_free",),
        "averaging",
        ("ema", "swa", "soup"),
        "schedule-free evaluates at an average already: write averaging=none",
    ),
    Conflict(
        "averaging",
        ("swa",),
        "scheduler",
        ("plateau",),
        "plateau watches the averaged model, which hides the plateau it waits for: write scheduler=constant",
    ),
    Conflict(
        "averaging",
        ("ensemble",),
        "trainer",
        ("fsdp",),
        "the members of an ensemble are trained one after another on whole copies: write trainer=ddp",
    ),
    Conflict(
        "regularization",
        ("max_norm",),
        "norm",
        ("weight", "spectral"),
        "the norm slot fixes the weights' scale, which max_norm would bound: write regularization=none",
    ),
    Conflict(
        "regularization",
        ("l1", "l2", "elastic"),
        "norm",
        ("weight", "spectral"),
        "the norm slot makes the function independent of the weights' scale, so that a penalty on it does nothing: "
        "write regularization=none",
    ),
    Conflict(
        "dropout",
        ("stochastic_depth",),
        "model",
        ("mlp", "cnn", "inception"),
        "the model has no residual branch to drop: write model=resnet, or dropout=standard",
    ),
    Conflict(
        "dropout",
        ("spatial", "dropblock"),
        "model",
        ("mlp",),
        "the model has no feature maps (N, C, H, W) to drop from: write dropout=standard",
    ),
    Conflict(
        "norm",
        ("instance",),
        "model",
        ("mlp",),
        "a fully connected signal has one value per channel, which instance norm would turn to 0: write norm=layer",
    ),
    Conflict(
        "trainer",
        ("fsdp",),
        "callbacks",
        ("doctor",),
        "the doctor looks at whole weights, which FSDP has in shards: write trainer=ddp",
    ),
    Conflict(
        "trainer",
        ("fsdp",),
        "averaging",
        ("ema", "swa", "soup"),
        "averages need whole weights, which FSDP has in shards: write trainer=ddp",
    ),
    Conflict(
        "trainer",
        ("fsdp",),
        "optimizer",
        ("schedule_free",),
        "its average is validated and saved as whole weights, which FSDP has in shards: write trainer=ddp",
    ),
    Conflict(
        "trainer",
        ("fsdp",),
        "optimizer",
        ("muon", "soap", "shampoo", "lamb", "sam", "normalized_sgd"),
        "the update needs whole matrices or norms, which FSDP has in shards: write trainer=ddp",
    ),
    Conflict(
        "trainer",
        ("fsdp",),
        "clip",
        ("norm", "adaptive", "normalize"),
        "the norm of a gradient needs all shards: write clip=value",
    ),
    Conflict(
        "trainer",
        ("fsdp",),
        "norm",
        ("weight", "spectral"),
        "reparametrised weights cannot be sharded: write trainer=ddp",
    ),
    Conflict(
        "trainer",
        ("fsdp",),
        "regularization",
        ("max_norm",),
        "a unit's weights lie on several devices: write trainer=ddp",
    ),
)


def find_conflict(choices: Mapping[str, str]) -> str | None:
    """One line that names the first two contradicting options among `choices` (group -> option), and the remedy."""
    for c in CONFLICTS:
        other = choices.get(c.other, "none")
        if choices.get(c.slot) in c.options and (other in c.others or ("*" in c.others and other != "none")):
            return f"{c.slot}={choices[c.slot]} contradicts {c.other}={other}: {c.reason}"
    return None


def refuse_conflicts(choices: Mapping[str, str], config: Mapping[str, Any]) -> None:
    """Raises InputError for contradicting options, or for contradicting values of two options."""
    conflict = find_conflict(choices)
    if conflict:
        raise InputError(conflict)
    if "model" in config:  # a whole run, not slots for the module of another project, which logs what it likes
        refuse_unlogged(config)
    refuse_contradictory_modes(config)
    refuse_without_validation(choices, config)
    decay = config["optimizer"].get("weight_decay") or 0
    if choices.get("regularization") == "weight_decay" and decay:
        raise InputError(f"regularization=weight_decay contradicts optimizer.weight_decay={decay}: {_DECAYS_BY_ITSELF}")
    members, devices = config["trainer"].get("members", 1), config["trainer"].get("devices", 1)
    if members > 1 and (choices.get("averaging") == "ensemble" or devices not in (1, "1", "auto")):
        other = "averaging=ensemble" if choices.get("averaging") == "ensemble" else f"trainer.devices={devices}"
        raise InputError(f"trainer.members={members} contradicts {other}: write trainer.members=1")
    accumulate = config["optimizer"].get("accumulate", config["accumulate"])
    if choices.get("optimizer") == "sam" and accumulate != 1:
        raise InputError(
            f"optimizer=sam contradicts accumulate={accumulate}: its second gradient would see one micro-batch only, "
            "write accumulate=1"
        )
    least, most = config["trainer"].get("min_epochs"), config["trainer"].get("max_epochs")
    if least and most and 0 < most < least:
        raise InputError(
            f"trainer.min_epochs={least} contradicts trainer.max_epochs={most}: write trainer.max_epochs={least}"
        )
    precise = f"trainer.precision={config['trainer']['precision']}"
    half, clip = str(config["trainer"]["precision"]).startswith("16"), choices.get("clip", "none")
    if half and clip != "none" and config["optimizer"].get("fused"):
        raise InputError(
            f"{precise} contradicts clip={clip} with a fused optimizer: gradients would be clipped "
            "before their loss scale is taken out, write optimizer.fused=false or trainer.precision=bf16-mixed"
        )
    if half and choices.get("optimizer") == "sam":
        raise InputError(
            f"{precise} contradicts optimizer=sam: its second pass would see no loss scale, "
            "write trainer.precision=bf16-mixed"
        )
