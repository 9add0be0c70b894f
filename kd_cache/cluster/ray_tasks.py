"""A Ray cluster that runs parts. Only here is Ray imported, and only when asked for."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from kd_cache.cluster.worker import Order, PartReport, score_part
from kd_cache.errors import KDCacheError, UsageError, shown

_ADDRESS = re.compile(r"auto|local|([^/\s:]+|\[[0-9A-Fa-f:]+\]):[0-9]{1,5}")
_OBJECTS = 80 << 20
"""Bytes of Ray's store of objects: reports are small."""

_PATIENCE = 10.0
"""Seconds for the head of a cluster to answer."""


def require_ray(address: str) -> Any:
    """Ray itself. Raises `UsageError` where it is not installed, or for an address that is none."""
    if _ADDRESS.fullmatch(address) is None:
        raise UsageError(f"--ray is {shown(address)}, expected auto, local, or host:port of a cluster's head")
    try:
        import ray
    except ImportError as error:
        raise UsageError(f"--ray needs Ray: {error}", hint="Install it: pip install 'kd-cache[ray]'.") from error
    return ray


@contextmanager
def connected(address: str) -> Iterator[Cluster]:
    """Connect to a cluster, or start one here. Raises as `require_ray`, and `KDCacheError` where none answers."""
    ray, own = require_ray(address), dict[str, Any]()
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing leaves this machine unasked
        own = {"include_dashboard": False, "object_store_memory": _OBJECTS}
    host, _, port = address.rpartition(":")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if host:  # Ray would ask for minutes
            socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()
        ray.init(address, log_to_driver=False, logging_level="ERROR", **own)
    except Exception as error:
        why = f"no Ray cluster answers at --ray {shown(address)}: {_line(error, 0)}"
        raise KDCacheError(why, hint="Start one: ray start --head, or pass --ray local.") from error
    finally:
        signal.signal(signal.SIGTERM, handler)  # Ray has taken it
    try:
        yield Cluster(ray)
    finally:
        ray.shutdown()


class Crashed(Exception):  # noqa: N818 (the driver says how often it is none)
    """The process of a part, or its machine, is gone; the text says what died."""


class Cluster:
    """A cluster that this process is connected to."""

    def __init__(self, ray: Any) -> None:
        self._ray, self._gpus = ray, 0.0
        names = ("WorkerCrashedError", "NodeDiedError", "OutOfMemoryError")
        self._crashes = tuple(getattr(ray.exceptions, name) for name in names)

    @property
    def has_gpus(self) -> bool:
        return bool(self._ray.cluster_resources().get("GPU"))

    def prepare(self, order: Order, gpus: float) -> None:
        """What `submit` starts: tasks with one CPU and so many GPUs."""
        # Ray itself would retry for ever where memory is short, and errors that stay.
        task = self._ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0, retry_exceptions=False)(score_part)
        self._start: Callable[[tuple[int, int]], Any] = partial(task.remote, order)
        self._gpus, self._order = gpus, order

    def slots(self) -> int:
        """How many parts can run at once, now."""
        has = self._ray.cluster_resources()
        return int(min(has.get("CPU", 0), has.get("GPU", 0) / self._gpus if self._gpus else float("inf")))

    def submit(self, part: tuple[int, int]) -> Any:
        """Start a part; gives a reference to it."""
        return self._start(part)

    def wait(self, running: list[Any], seconds: float) -> Sequence[Any]:
        """A reference whose part has ended, as soon as there is one; none after so long."""
        ended: Sequence[Any] = self._ray.wait(running, num_returns=1, timeout=seconds)[0]
        return ended

    def result(self, reference: Any) -> PartReport | KDCacheError:
        """What a part that has ended gave. Raises `Crashed`."""
        try:
            outcome: PartReport | KDCacheError = self._ray.get(reference)
        except self._crashes as error:
            raise Crashed(_line(error, 0)) from None
        except self._ray.exceptions.RayError as error:
            hint = "Every machine needs this version of kd-cache, and the code that --teacher and --dataset name."
            return KDCacheError(f"Ray could not run a part: {_line(error, -1)}", hint=hint)
        return outcome

    def interrupt(self) -> bool:
        """Interrupt all parts, as Ctrl-C would; whether they hear of it."""
        if self._order.proof is not None:
            self._order.proof.unlink(missing_ok=True)
        return self._order.proof is not None


def _line(error: BaseException, number: int) -> str:
    return shown((str(error).strip().splitlines() or [type(error).__name__])[number])
