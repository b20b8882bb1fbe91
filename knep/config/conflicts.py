"""Options that contradict each other, as data: refused when a config is composed, with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from knep.config.stages import MIXING, NO_MASKS, stages_of, without
from knep.errors import InputError
from knep.utils.batch_plan import plan_of
from knep.utils.monitors import OF_TASK, refuse_contradictory_modes, refuse_unlogged, refuse_without_validation


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
        ("ema", "swa", "soup", "greedy_soup"),
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
        ("weight", "weight_standardization", "spectral"),
        "the norm slot fixes the weights' scale, which max_norm would bound: write regularization=none",
    ),
    Conflict(
        "regularization",
        ("l1", "l2", "elastic"),
        "norm",
        ("weight", "weight_standardization", "spectral"),
        "the norm slot makes the function independent of the weights' scale, so that a penalty on it does nothing: "
        "write regularization=none",
    ),
    Conflict(
        "dropout",
        ("stochastic_depth",),
        "model",
        ("mlp", "cnn", "inception", "unet"),
        "the model has no residual branch to drop: write model=resnet, or dropout=standard",
    ),
    Conflict(
        "init",
        ("skipinit", "rezero", "layer_scale", "fixup"),
        "model",
        ("mlp", "cnn", "inception", "unet"),
        "the model has no residual branch to begin small: write model=resnet, or init=he_normal",
    ),
    Conflict(
        "init",
        ("t_fixup", "deepnorm"),
        "model",
        ("mlp", "cnn", "resnet", "inception", "unet"),
        "the model has no attention: write init=he_normal, or init=fixup for model=resnet",
    ),
    Conflict(
        "init",
        ("deepnorm",),
        "model",
        ("transformer",),
        "its norms stand before its branches: write init=t_fixup",
    ),
    Conflict(
        "init",
        ("fixup",),
        "model",
        ("transformer",),
        "it is for convolutions and linear layers: write init=t_fixup",
    ),
    Conflict(
        "init",
        ("fixup",),
        "norm",
        ("auto", "batch", "ghost_batch", "group", "instance", "layer", "rms", "weight_standardization"),
        "Fixup trains without norms: write norm=none, or init=skipinit",
    ),
    Conflict(
        "dropout",
        ("spatial", "dropblock"),
        "model",
        ("mlp", "transformer"),
        "the model has no feature maps (N, C, H, W) to drop from: write dropout=standard",
    ),
    Conflict(
        "norm",
        ("weight_standardization",),
        "model",
        ("mlp", "transformer"),
        "the model has no convolution whose filters it could standardize: write norm=layer",
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
        "finetune",
        ("full", "head", "gradual", "layerwise"),
        "trainer",
        ("fsdp",),
        "layers are frozen and thawed as whole weights, which FSDP has in shards: write trainer=ddp",
    ),
    Conflict(
        "finetune",
        ("full", "head", "gradual", "layerwise"),
        "callbacks",
        ("doctor",),
        "the doctor takes frozen layers for dead ones: write callbacks=none",
    ),
    Conflict(
        "trainer",
        ("fsdp",),
        "averaging",
        ("ema", "swa", "soup", "greedy_soup"),
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
        ("weight", "weight_standardization", "spectral"),
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


_CLASSES = ("multiclass", "segmentation", "tokens", "tagging")
_LABELS = ("binary", "multilabel")
# Losses, and the tasks whose targets they read; a task's usual one.
FITS = {
    "cross_entropy": _CLASSES,
    "logit_adjusted": ("multiclass", "segmentation", "tagging"),
    "focal": (*_CLASSES, *_LABELS),
    "poly": (*_CLASSES, *_LABELS),
    "bce": _LABELS,
    "one_vs_all": ("multiclass",),
    "asymmetric": _LABELS,
    "dice": ("segmentation",),
    **dict.fromkeys(("mse", "mae", "huber", "quantile"), ("regression",)),
}
_USUAL = dict.fromkeys(_CLASSES, "cross_entropy") | dict.fromkeys(_LABELS, "bce") | {"regression": "mse"}
_SMOOTHED = ("auto", "cross_entropy", "one_vs_all", "bce")  # losses that read labels which are smoothed
# Models that give a score for each pixel or token, and the tasks that learn one.
_DENSE = {"unet": ("segmentation",), "transformer": ("tokens", "tagging")}
_READS = {"unet": "gives a class for each pixel", "transformer": "reads tokens and gives scores for each"}
# Options that know one class for each image alone.
_WORDS = ("tokens", "tagging")
_ONE_SCORE = ("mlp", "cnn", "resnet", "inception", "torchvision", "timm")


def refuse_unfit(choices: Mapping[str, str], config: Mapping[str, Any]) -> None:
    """Raises InputError for options that cannot act on the task, with the line to write."""
    task, loss = choices.get("task", "multiclass"), choices.get("loss", "auto")
    if loss in FITS and task in _USUAL and task not in FITS[loss]:
        raise InputError(
            f"loss={loss} contradicts task={task}, whose targets it cannot read: write loss={_instead(loss, task)}"
        )
    _refuse_dense(task, choices.get("model", ""), config)
    smoothing = choices.get("regularization") == "label_smoothing"
    if smoothing and (loss not in _SMOOTHED or task == "regression"):
        what = f"task={task}" if task == "regression" else f"loss={loss}"
        raise InputError(f"regularization=label_smoothing contradicts {what}: write regularization=none")
    augment = choices.get("augment", "none")
    stages = stages_of(augment)
    mixing = next((stage for stage in stages if stage in MIXING), None)
    if mixing and loss not in ("auto", "cross_entropy", "one_vs_all"):
        other = "loss=cross_entropy, or " if task in _CLASSES else ""
        raise InputError(
            f"augment={mixing} contradicts loss={loss}, which cannot read the probabilities that it makes of labels: "
            f"write {other}{without(augment, mixing)}"
        )
    _refuse_smoothed_twice(smoothing, config.get("augment") or {})
    _refuse_other_size(choices.get("model", ""), config.get("augment") or {})
    if task not in _USUAL or task == "multiclass":
        return
    model, node = choices.get("model", ""), config.get("trainer") or {}
    masked = next((stage for stage in stages if stage in NO_MASKS), None)
    what = {"segmentation": "pixel", "tokens": "token", "tagging": "token"}.get(task)
    many = node.get("members", 1) if choices.get("averaging") != "ensemble" else "averaging=ensemble"
    unfit = {
        f"augment={mixing} mixes classes, one for each image": mixing is not None,
        f"augment={masked} changes an image and not its mask": task == "segmentation" and masked is not None,
        f"augment={stages[0]} changes images, and rows are tokens": task in _WORDS and augment != "none",
        f"scaling={choices.get('scaling')} changes pixels, and rows are tokens": task in _WORDS
        and choices.get("scaling", "none") != "none",
        f"sampling={choices.get('sampling')} draws by the class of a row": task != "binary"
        and choices.get("sampling", "none") != "none",
        "test_flip averages probabilities of one class": bool(config.get("test_flip")),
        "callbacks=doctor knows classes of images": choices.get("callbacks") == "doctor",
        f"trainer.members={many} trains members that tell classes apart": isinstance(many, int) and many > 1,
        "averaging=ensemble averages members that tell classes apart": many == "averaging=ensemble",
        f"model={model} gives one score a row for each class, and not for each {what}": what and model in _ONE_SCORE,
    }
    found = next((reason for reason, holds in unfit.items() if holds), None)
    if found is not None:
        word = found.partition(" ")[0]
        slot = word.partition("=")[0]
        remedy = {"trainer.members": "trainer.members=1", "test_flip": "test_flip=false"}.get(slot, f"{slot}=none")
        if slot == "augment" and task not in _WORDS:
            remedy = without(augment, word.partition("=")[2])
        if slot == "model":
            remedy = (
                f"model={'unet' if task == 'segmentation' else 'transformer'}, or model=import with one of your own"
            )
        raise InputError(f"task={task}: {found}: write {remedy}")


def _instead(loss: str, task: str) -> str:
    return "one_vs_all" if (loss, task) == ("bce", "multiclass") else _USUAL[task]


def _refuse_smoothed_twice(smoothing: bool, augment: Mapping[str, Any]) -> None:
    for path, node in (("augment", augment), ("augment.mixup_cutmix", augment.get("mixup_cutmix") or {})):
        if smoothing and isinstance(node, Mapping) and node.get("smoothing"):
            raise InputError(
                f"{path}.smoothing={node['smoothing']} contradicts regularization=label_smoothing, labels would be "
                f"smoothed twice: write {path}.smoothing=0"
            )


def _refuse_other_size(model: str, augment: Mapping[str, Any]) -> None:
    for path, node in [("augment", augment), *((f"augment.{k}", v) for k, v in augment.items())]:
        if model == "mlp" and isinstance(node, Mapping) and str(node.get("_target_")).endswith(".ProgressiveResize"):
            raise InputError("augment=progressive_resize contradicts model=mlp, which knows one size: write model=cnn")
        crops = isinstance(node, Mapping) and str(node.get("_target_")).endswith(".RandomResizedCrop")
        if crops and node.get("size") is not None and model == "mlp":
            raise InputError(
                f"{path}.size={node['size']} contradicts model=mlp, whose first layer knows one size: write "
                f"{path}.size=null, or model=cnn"
            )


def _refuse_dense(task: str, model: str, config: Mapping[str, Any]) -> None:
    if task in OF_TASK and task not in _DENSE.get(model, (task,)):
        raise InputError(
            f"model={model} contradicts task={task}, it {_READS[model]}: write task={_DENSE[model][0]}, or model=mlp"
        )
    if task == "tokens" and model == "transformer" and config["model"].get("causal") is False:
        raise InputError(
            "model.causal=false contradicts task=tokens, each of which it would see before it predicts it: write "
            "model.causal=true, or task=tagging"
        )


def _refuse_tuning(choices: Mapping[str, str], config: Mapping[str, Any]) -> None:
    """Weights to start from, and how they are tuned, against what else the run does to them."""
    option, strategy = choices.get("finetune", "none"), config.get("finetune") or {}
    decay = config.get("layer_decay", 1)
    if option == "layerwise" and decay != 1:
        raise InputError(
            f"finetune=layerwise contradicts layer_decay={decay}, rates would fall twice: write layer_decay=1, and "
            f"finetune.layer_decay={strategy.get('layer_decay')} a block"
        )
    runs = "_target_" in (config.get("trainer") or {})
    if not runs or not isinstance(config.get("model"), Mapping):
        return  # the module of another project or loop, which loads its weights itself
    weights, init = config["model"].get("weights"), choices.get("init", "none")
    if option != "none" and weights is None and choices.get("model") != "import":
        raise InputError(
            f"finetune={option} tunes weights that were loaded, and model.weights is null: write "
            "model.weights=outputs/<run> or a file, or finetune=none"
        )
    if weights is not None and init not in ("none", "default"):
        raise InputError(f"init={init} would draw anew what model.weights={weights} loads: write init=none")


def _refuse_lengths(trainer: Mapping[str, Any], accumulate: object) -> None:
    least, most = trainer.get("min_epochs"), trainer.get("max_epochs")
    if least and most and 0 < most < least:
        raise InputError(
            f"trainer.min_epochs={least} contradicts trainer.max_epochs={most}: write trainer.max_epochs={least}"
        )
    last = max(plan_of(accumulate))
    if most and 0 < most <= last and not trainer.get("fast_dev_run"):
        raise InputError(
            f"accumulate={accumulate} begins something in epoch {last}, which trainer.max_epochs={most} never reaches "
            f"(they count from 0): leave it out, or write trainer.max_epochs={last + 1} or more"
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
    _refuse_tuning(choices, config)
    if "model" in config:  # a whole run, not slots for the module of another project, which logs what it likes
        refuse_unlogged(config, choices.get("task", "multiclass"))
        refuse_unfit(choices, config)
    if choices.get("data") == "import" and (config.get("checkpoint") or {}).get("every") is not None:
        raise InputError(
            f"checkpoint.every={config['checkpoint']['every']} contradicts data=import, whose loaders draw an order of "
            "their own inside an epoch: write checkpoint.every=null"
        )
    refuse_contradictory_modes(config)
    refuse_without_validation(choices, config)
    decay = config["optimizer"].get("weight_decay") or 0
    if choices.get("regularization") == "weight_decay" and decay:
        raise InputError(f"regularization=weight_decay contradicts optimizer.weight_decay={decay}: {_DECAYS_BY_ITSELF}")
    if choices.get("init") == "t_fixup" and choices.get("norm", "none") != "none" and config["init"]["remove_norms"]:
        raise InputError(
            f"init=t_fixup contradicts norm={choices['norm']}, whose norms it takes out: write norm=none, or "
            "init.remove_norms=false"
        )
    members, devices = config["trainer"].get("members", 1), config["trainer"].get("devices", 1)
    if members > 1 and (choices.get("averaging") == "ensemble" or devices not in (1, "1", "auto")):
        other = "averaging=ensemble" if choices.get("averaging") == "ensemble" else f"trainer.devices={devices}"
        raise InputError(f"trainer.members={members} contradicts {other}: write trainer.members=1")
    decay = (config.get("averaging") or {}).get("decay")
    if isinstance(decay, (list, tuple)) and (config.get("guard") or {}).get("action") == "rollback":
        raise InputError(
            f"averaging.decay={list(decay)} contradicts guard=rollback, which goes back with one average: write "
            "averaging.decay=0.999, or guard=skip"
        )
    _refuse_of_optimizer(choices, config)
    _refuse_lengths(config["trainer"], config["accumulate"])
    _refuse_half(choices, config)


def _refuse_of_optimizer(choices: Mapping[str, str], config: Mapping[str, Any]) -> None:
    wrap = config["optimizer"].get("wrap")
    if wrap and choices.get("trainer") == "fsdp":
        raise InputError(
            f"optimizer.wrap={wrap} contradicts trainer=fsdp: it looks at whole tensors, and FSDP has shards, write "
            "optimizer.wrap=[] or trainer=ddp"
        )
    accumulate = config["optimizer"].get("accumulate", config["accumulate"])
    micro = (config.get("data") or {}).get("micro")
    if choices.get("optimizer") == "sam" and micro is not None:
        raise InputError(
            f"optimizer=sam contradicts data.micro={micro}: its second gradient would see one part of the batch only, "
            "write data.micro=null"
        )
    if choices.get("optimizer") == "sam" and accumulate != 1:
        raise InputError(
            f"optimizer=sam contradicts accumulate={accumulate}: its second gradient would see one micro-batch only, "
            "write accumulate=1"
        )


def _refuse_half(choices: Mapping[str, str], config: Mapping[str, Any]) -> None:
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
