"""State dicts read from files: plain finite tensors under bare names, and a net that is given all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from kd_cache.errors import CheckpointError, listed, shown

WRAPPERS: Final = ("module.", "_orig_mod.")  # DistributedDataParallel and averaged models; torch.compile
LIGHTNING: Final = ("model.", "net.")  # the attribute a LightningModule keeps its network in
FLOATS: Final = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})
INTEGERS: Final = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool})


def fill(net: nn.Module, tensors: Mapping[str, Tensor], title: str) -> None:
    """Give the meta-device ``net`` its tensors, without a copy, after comparing every name and shape."""
    expected = net.state_dict()
    counters = {name for name in expected if is_counter(name)}
    problems = {
        "missing": [name for name in expected if name not in tensors and name not in counters],
        "unexpected": [name for name in tensors if name not in expected],
        "of another shape": [
            f"{shown(name)}: expected {list(expected[name].shape)}, found {list(tensor.shape)}"
            for name, tensor in tensors.items()
            if name in expected and name not in counters and tensor.shape != expected[name].shape
        ],
    }
    if any(problems.values()):
        raise _misfit(problems, title)
    # Inference uses no counters, so theirs are zero whether the file has them or not.
    zeros = {name: torch.zeros((), dtype=torch.int64) for name in counters}
    net.load_state_dict({**tensors, **zeros}, assign=True)


def _misfit(problems: Mapping[str, list[str]], title: str) -> CheckpointError:
    counts = ", ".join(f"{len(names)} {what}" for what, names in problems.items() if names)
    lists = "\n".join(f"{what}:\n{listed(names)}" for what, names in problems.items() if names)
    return CheckpointError(
        f"the weights do not fit {title}: {counts}\n{lists}",
        hint="Check that this is the whole checkpoint of this architecture; a partial load is never used.",
    )


def clean_tensors(
    entries: Mapping[Any, Any], known: frozenset[str], size: int, *, integers: bool = False
) -> tuple[dict[str, Tensor], list[str]]:
    """Finite float32 tensors under bare names, and what was done to the names, in words.

    ``integers``: whole numbers and truth values too, as they are; no built-in net has them.
    """
    tensors, notes = dict(entries), []
    if "n_averaged" in tensors:  # the counter of torch.optim.swa_utils.AveragedModel
        del tensors["n_averaged"]
        notes.append("counter n_averaged dropped")
    _check_tensors(tensors, size, FLOATS | INTEGERS if integers else FLOATS)
    tensors, removed = _unprefixed(tensors, known)
    notes += removed
    unused = [name for name in tensors if name.startswith("adapt_layer.")]
    if unused:
        tensors = {name: tensor for name, tensor in tensors.items() if name not in set(unused)}
        notes.append("adapt_layer.* dropped (unused at inference)")
    return _finite(tensors), notes


def _check_tensors(tensors: Mapping[Any, Any], size: int, kinds: frozenset[torch.dtype]) -> None:
    """Every value a plain dense tensor of one of these kinds, and together no larger than the file they came from."""
    wrong = [f"{shown(name)}: {what}" for name, value in tensors.items() if (what := _flaw(name, value, kinds))]
    if wrong or not tensors:
        raise CheckpointError(
            f"expected a state dict of dense float tensors, found\n{listed(wrong or ['nothing'])}",
            hint="Save model.state_dict() as {'model_state_dict': …}, or with teachers.save_checkpoint.",
        )
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if claimed > size:
        raise CheckpointError(
            f"the tensors claim {claimed} bytes, the file has {size}: some are expanded from fewer numbers",
            hint="Save the state dict of the model itself, without expand() or tied views.",
        )


def _flaw(name: object, value: object, kinds: frozenset[torch.dtype]) -> str | None:
    if not isinstance(name, str):
        return "a name that is not text"
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if type(value) not in {Tensor, nn.Parameter} or value.layout != torch.strided or value.is_quantized:
        return f"a {type(value).__name__}, {value.layout}"
    if value.device.type != "cpu":
        return f"no data ({value.device.type})"
    if not value.numel():
        return f"an empty tensor {list(value.shape)}"
    if not is_counter(name) and value.dtype not in kinds:
        return str(value.dtype).removeprefix("torch.")
    return None


def is_counter(name: str) -> bool:
    """Of batch norm; some exports have it as a float."""
    return name.rsplit(".", 1)[-1] == "num_batches_tracked"


def _unprefixed(
    tensors: dict[str, Tensor], known: frozenset[str], depth: int = 6
) -> tuple[dict[str, Tensor], list[str]]:
    """``tensors`` without the prefixes that training frameworks add, also stacked, and which were removed.

    A wrapper's prefix must lead every name. Lightning keeps losses and metrics beside the network, so of
    its prefixes it is enough that the names after them are ``known``. ``depth`` bounds what a hostile file
    can stack.
    """
    if known & tensors.keys():
        return tensors, []
    for prefix in WRAPPERS if depth else ():
        if all(name.startswith(prefix) for name in tensors):
            inner, notes = _unprefixed(under(tensors, prefix), known, depth - 1)
            return inner, [f"prefix '{prefix}' removed", *notes]
    if not depth:
        return tensors, []
    found = []
    for prefix in LIGHTNING:
        part = under(tensors, prefix)
        inner, notes = _unprefixed(part, known, depth - 1) if part else ({}, [])
        if known & inner.keys():
            beside = len(tensors) - len(part)
            left = [f"{beside} tensors beside it left out"] if beside else []
            found.append((inner, [f"prefix '{prefix}' removed", *left, *notes]))
    if len(found) > 1:
        raise CheckpointError(
            "two networks, under 'model.' and under 'net.', and nothing says which is the teacher",
            hint="Save the teacher's own state_dict() with teachers.save_checkpoint.",
        )
    return found[0] if found else (tensors, [])


def _finite(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    whole = {name for name, tensor in tensors.items() if tensor.dtype in INTEGERS and not is_counter(name)}
    full = {
        name: tensor.detach().to(tensor.dtype if name in whole else torch.float32).contiguous()
        for name, tensor in tensors.items()
    }
    bad = [name for name, tensor in full.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise CheckpointError(
            f"expected finite weights, found NaN or Inf in {len(bad)} tensors:\n{listed(bad)}",
            hint="The training diverged or the file is damaged: use an earlier checkpoint.",
        )
    return full


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
