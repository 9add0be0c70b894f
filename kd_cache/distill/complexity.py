"""How large a net is: parameters, their bytes, and multiply-accumulates (MACs) of one clip.

Counted as the field's challenge of small models does, whose tool counts as torchinfo does: a convolution
has its parameters times its output's positions, the bias included; every other layer its parameters, once per call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any, Final

import torch
from torch import Tensor, nn

from kd_cache.errors import TeacherError
from kd_cache.score.factory import users_code

BYTES: Final[Mapping[str, int]] = {"fp32": 4, "fp16": 2, "int8": 1}
"""Of a parameter, by what it is stored as."""


@dataclass(frozen=True)
class Limits:
    """What a net may have at most."""

    memory: int
    macs: int


LIMITS: Final[Mapping[str, Limits]] = {"dcase": Limits(128_000, 30_000_000)}
"""128 kB of parameters and 30 M MACs for a clip of a second: the challenge's task 1, 2022 to 2025."""


@dataclass(frozen=True)
class Complexity:
    """Of one clip ``[T, F]``. Buffers, as the statistics of batch norm are, do not count."""

    shape: tuple[int, ...]
    parameters: int
    macs: int

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of the parameters, by what they are stored as."""
        return {dtype: self.parameters * size for dtype, size in BYTES.items()}

    def beyond(self, limits: Limits, dtype: str) -> list[str]:
        """What is above the limits, in words."""
        found = []
        if self.memory[dtype] > limits.memory:
            found.append(f"{self.memory[dtype]:,} bytes of parameters as {dtype}, above {limits.memory:,}")
        if self.macs > limits.macs:
            found.append(f"{self.macs:,} MACs, above {limits.macs:,}")
        return found

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "shape": list(self.shape), "bytes": self.memory}


def complexity(net: nn.Module, shape: tuple[int, ...]) -> Complexity:
    """Count ``net``, which is called once with zeros ``[1, T, F]`` in evaluation mode. Raises `TeacherError`."""
    counted: list[int] = []

    def count(layer: nn.Module, given: Any, output: Any) -> None:
        own = sum(parameter.numel() for parameter in layer.parameters(recurse=False))
        is_convolution = isinstance(layer, nn.modules.conv._ConvNd) and isinstance(output, Tensor)
        counted.append(own * (prod(output.shape[2:]) if is_convolution else 1))

    was_training = net.training
    hooks = [layer.register_forward_hook(count) for layer in net.modules()]
    try:
        failed = f"it cannot be called with features [1, {', '.join(map(str, shape))}]"
        with users_code(lambda why: TeacherError(f"{failed}: {why}")), torch.inference_mode():
            net.eval()(torch.zeros(1, *shape))
    finally:
        net.train(was_training)
        for hook in hooks:
            hook.remove()
    return Complexity(shape, sum(parameter.numel() for parameter in net.parameters()), sum(counted))
