"""The blocks of a transformer, what each of their weight matrices is for, and the sums that a norm reads.

A block is the largest module around an attention that stands in a list of its like: nn.TransformerEncoder's layers, the
blocks of timm and torchvision, Hugging Face's of GPT-2, BERT and ViT. Queries, keys and values are told by the names
that all of these use.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from knep.errors import InputError, NoEffectError
from knep.nn.kinds import is_norm
from knep.surgery.edit import Change, describe, modules_of, refuse_hooks, replace, unfuse
from knep.surgery.graph import graph_of, is_sum, own_parts, terms
from knep.surgery.record import Pass
from knep.surgery.sample import Inputs
from knep.surgery.weights import Weight, covered

_QUERIES = ("q", "query", "q_proj", "to_q", "wq", "q_lin", "q_proj_weight")
_KEYS = ("k", "key", "k_proj", "to_k", "wk", "k_lin", "k_proj_weight")
_VALUES = ("v", "value", "v_proj", "to_v", "wv", "v_lin", "v_proj_weight")
_PACKED = ("qkv", "to_qkv", "c_attn", "in_proj", "in_proj_weight", "query_key_value", "qkv_proj", "wqkv")
_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
# Of torch's own layers, whose forwards torch.fx cannot read: the end of each branch, and the norm that reads its sum.
_TORCHS_OWN = {"dropout1": "norm1", "dropout2": "norm2", "dropout3": "norm3"}


@dataclass(frozen=True)
class Block:
    """A layer of a transformer. reads: whether it reads the output of an encoder as well, as a decoder's layer does."""

    path: str
    module: nn.Module
    reads: bool

    def holds(self, path: str) -> bool:
        return path == self.path or path.startswith(f"{self.path}.")


def blocks_of(model: nn.Module, name: str) -> list[Block]:
    """The blocks in module order. Raises NoEffectError for a model without."""
    lists = [path for path, m in model.named_modules() if isinstance(m, (nn.ModuleList, nn.ModuleDict, nn.Sequential))]
    found = Counter(entry for path in _attentions(model) if (entry := _entry(model, path, lists)))
    if not found:
        raise NoEffectError(
            f"{name} changed nothing: the model has no transformer block, an attention in a list of blocks"
        )
    return [Block(path, model.get_submodule(path), count > 1) for path, count in found.items()]


def _entry(model: nn.Module, attention: str, lists: list[str]) -> str | None:
    """The innermost entry of a list that holds the attention, and weights beside it."""
    parts = attention.split(".")
    entries = [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1) if ".".join(parts[: n - 1]) in lists]
    for entry in entries:
        weights = (p for p, m in model.get_submodule(entry).named_modules(prefix=entry) if _has_matrix(m))
        if any(not f"{path}.".startswith(f"{attention}.") for path in weights):
            return entry
    return None


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() > 1


def _attentions(model: nn.Module) -> Iterator[str]:
    """Paths of the modules that hold the queries, keys and values of an attention."""
    for path, m in model.named_modules():
        names = {name for name, _ in m.named_children()}
        apart = names & {*_QUERIES} and names & {*_KEYS} and names & {*_VALUES}
        if isinstance(m, nn.MultiheadAttention) or apart or names & {*_PACKED}:
            yield path


def _role(path: str) -> str:
    """query, key, value or packed, or "" for what is none of them."""
    last = path.rpartition(".")[2]
    kinds = {"query": _QUERIES, "key": _KEYS, "value": _VALUES, "packed": _PACKED}
    return next((kind for kind, names in kinds.items() if last in names), "")


def role_of(weight: Weight) -> str:
    """What a weight of a block is for: query, key, value, packed (all three), or "" for the rest of the block."""
    return _role(weight.name if weight.attribute != "weight" else weight.path)


def block_weights(model: nn.Module, blocks: list[Block]) -> list[tuple[Weight, Block]]:
    """Each weight matrix inside the blocks that an init draws, with its block."""
    return [(w, b) for w in covered(model) for b in blocks if b.holds(w.path)]


@dataclass(frozen=True)
class NormedSum:
    """A sum of a shortcut and a branch that a norm reads: the module that ends the branch, and the norm."""

    path: str
    end: nn.Module
    norm: nn.Module


def normed_sums(model: nn.Module, block: Block, sample: Inputs | None, name: str) -> list[NormedSum]:
    """The sums of a block that norms read, in order. Raises InputError for a block with norms before its branches."""
    seen = None if sample is None else Pass(model, sample)
    found = []
    for path, module in block.module.named_modules():
        whole = f"{block.path}.{path}".rstrip(".")
        if isinstance(module, _LAYERS):
            found += _torchs_own(whole, module)
        elif any(module.children()) and type(module).forward not in (nn.Sequential.forward, nn.Module.forward):
            graph = graph_of(module, given=seen.given.get(module) if seen else None)
            found += [] if isinstance(graph, str) else _in_graph(whole, module, graph)
    if len(found) < 2:
        raise InputError(
            f"{name} is for norms behind the sums, as in BERT, and {block.path} ({type(block.module).__name__}) has "
            f"{len(found)} such sums: write init=t_fixup"
        )
    return found


def _torchs_own(path: str, layer: nn.Module) -> list[NormedSum]:
    if layer.norm_first:
        return []
    pairs = [(end, norm) for end, norm in _TORCHS_OWN.items() if hasattr(layer, norm)]
    return [NormedSum(f"{path}.{end}", getattr(layer, end), getattr(layer, norm)) for end, norm in pairs]


def _in_graph(path: str, owner: nn.Module, graph: fx.Graph) -> list[NormedSum]:
    found = []
    for node in graph.nodes:
        norms = [owner.get_submodule(str(u.target)) for u in node.users if u.op == "call_module"]
        if not is_sum(node) or len(node.users) != 1 or not norms or not is_norm(norms[0]):
            continue
        ends = [t for t in terms(node) if t.op == "call_module" and len(t.users) == 1]
        if len(ends) == 1 and own_parts(graph)[str(ends[0].target)] == 1:
            target = str(ends[0].target)
            found.append(NormedSum(f"{path}.{target}", owner.get_submodule(target), norms[0]))
    return found


def norms_in(model: nn.Module, blocks: list[Block]) -> list[tuple[str, nn.Module]]:
    """(path, norm) of the norms inside the blocks."""
    return [(path, m) for path, m in modules_of(model, nn.Module) if is_norm(m) and any(b.holds(path) for b in blocks)]


def parts_of(matrix: Tensor, role: str, transposed: bool) -> list[tuple[str, Tensor]]:
    """(role, part) of a weight, of a packed one a third each, in the order query, key, value.

    transposed: whether it is (in, out), as Hugging Face's Conv1D has it.
    """
    if role != "packed":
        return [(role, matrix)]
    return list(zip(("query", "key", "value"), torch.chunk(matrix, 3, dim=1 if transposed else 0), strict=True))


def removed_norms(model: nn.Module, blocks: list[Block]) -> list[Change]:
    """Takes the norms inside the blocks out; InputError for one with hooks."""
    changes = []
    for block in blocks:
        unfuse(block.module)
    for path, m in norms_in(model, blocks):
        refuse_hooks(path, m, "init")
        replace(model, path, nn.Identity())
        changes.append(Change(path, describe(m), "Identity(), t_fixup trains without norms"))
    return changes


def counts_of(blocks: list[Block]) -> tuple[int, int]:
    """How many blocks read no encoder, and how many do."""
    reading = sum(block.reads for block in blocks)
    return len(blocks) - reading, reading


def deepnorm_factors(reads: bool, encoder: int, decoder: int) -> tuple[float, float]:
    """(alpha, beta) of a layer, which reads the encoder or not, among so many layers of each kind."""
    if not (encoder and decoder):
        return (2 * (encoder + decoder)) ** 0.25, (8 * (encoder + decoder)) ** -0.25
    if reads:
        return (3 * decoder) ** 0.25, (12 * decoder) ** -0.25
    both = encoder**4 * decoder
    return 0.81 * both ** (1 / 16), 0.87 * both ** (-1 / 16)
