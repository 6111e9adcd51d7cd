"""Flexible tensor preservation (paper, section 3.3): which tensors stay in memory, given the
budget. The policies, by name.

`balanced` (flexinfer.plan.locking) is our choice. The others are the paper's variants (figures 3
and 5, Algorithm 1). They lock whole weights, and keep what is not in a decoder layer (lm_head) in
memory first, as the paper does.

A policy takes the weights in order of use and the bytes for locking, and returns how many pieces of
each weight are locked.
"""

from collections.abc import Callable, Sequence

from flexinfer.plan.locking import balanced, none, spread
from flexinfer.plan.weights import Kind, Weight


def unbalanced(weights: Sequence[Weight], lock_bytes: int) -> dict[str, int]:
    """Whole leading layers (the paper's figure 3a)."""
    locked, left_bytes = _head_first(weights, lock_bytes)
    for layer in dict.fromkeys(w.layer for w in weights if w.kind != "head"):
        in_layer = [w for w in weights if w.layer == layer]
        needed = sum(w.lock_cost_bytes for w in in_layer)
        if needed > left_bytes:
            break
        left_bytes -= needed
        locked |= {w.name: len(w.pieces) for w in in_layer}
    return locked


def attention_first(weights: Sequence[Weight], lock_bytes: int) -> dict[str, int]:
    """Attention weights of all layers, smallest first, then those of the FFN."""
    locked, left_bytes = _head_first(weights, lock_bytes)
    left_bytes = _lock_roles(weights, _roles(weights, "attention"), locked, left_bytes)
    _lock_roles(weights, _roles(weights, "ffn"), locked, left_bytes)
    return locked


def ffn_first(weights: Sequence[Weight], lock_bytes: int) -> dict[str, int]:
    """FFN weights of all layers, then those of the attention."""
    locked, left_bytes = _head_first(weights, lock_bytes)
    left_bytes = _lock_roles(weights, _roles(weights, "ffn"), locked, left_bytes)
    _lock_roles(weights, _roles(weights, "attention"), locked, left_bytes)
    return locked


def algorithm1(weights: Sequence[Weight], lock_bytes: int) -> dict[str, int]:
    """The paper's Algorithm 1 as printed: FFN weights only as whole roles by its thresholds, then
    attention.

    Its 3 FFN tensors are F here, so that it speaks of models with two as well: all F from F f N + 2
    a N bytes on, else as many roles (at most F - 1) as fit, with f and a the bytes of the largest
    FFN and attention weight and N the layers.
    """
    locked, left_bytes = _head_first(weights, lock_bytes)
    ffn_roles = _roles(weights, "ffn")
    layers = len({w.layer for w in weights if w.kind != "head"})
    ffn_bytes = layers * max((w.lock_cost_bytes for w in weights if w.kind == "ffn"), default=0)
    attention_bytes = layers * max(
        (w.lock_cost_bytes for w in weights if w.kind == "attention"), default=0
    )
    if left_bytes >= len(ffn_roles) * ffn_bytes + 2 * attention_bytes:
        keep = len(ffn_roles)
    else:
        keep = min(len(ffn_roles) - 1, left_bytes // ffn_bytes) if ffn_bytes else 0
    left_bytes = _lock_roles(weights, ffn_roles[:keep], locked, left_bytes)
    _lock_roles(weights, _roles(weights, "attention"), locked, left_bytes)
    return locked


def _head_first(weights: Sequence[Weight], lock_bytes: int) -> tuple[dict[str, int], int]:
    head = [w for w in weights if w.kind == "head"]
    needed = sum(w.lock_cost_bytes for w in head)
    if needed > lock_bytes:
        return {}, lock_bytes
    return {w.name: len(w.pieces) for w in head}, lock_bytes - needed


def _roles(weights: Sequence[Weight], kind: Kind) -> list[str]:
    """The roles of a kind, smallest weight first (K and V with grouped-query attention)."""
    size_of = {w.role: w.lock_cost_bytes for w in weights if w.kind == kind}
    return sorted(size_of, key=lambda role: size_of[role])


def _lock_roles(
    weights: Sequence[Weight], roles: Sequence[str], locked: dict[str, int], left_bytes: int
) -> int:
    """Lock each role in all layers; the one that does not fit everywhere, in evenly spread layers.

    Returns what is left.
    """
    for role in roles:
        of_role = [w for w in weights if w.role == role]
        for i in spread(len(of_role)):
            if of_role[i].lock_cost_bytes <= left_bytes:
                left_bytes -= of_role[i].lock_cost_bytes
                locked[of_role[i].name] = len(of_role[i].pieces)
    return left_bytes


# By the name that `policy=` takes.
POLICIES: dict[str, Callable[[Sequence[Weight], int], dict[str, int]]] = {
    "balanced": balanced,
    "unbalanced": unbalanced,
    "attention-first": attention_first,
    "ffn-first": ffn_first,
    "algorithm1": algorithm1,
    "none": none,
}
