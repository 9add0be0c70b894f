"""What a pickle would call, and how large it would make what it builds, found out without running it.

``torch.load(weights_only=True)`` keeps a pickle from running code of its own. It does not keep a few hundred bytes from
asking for all the memory or all the time there is: ``bytearray(10**10)`` is allowed, a text may be encoded as punycode
(quadratic time), a tuple that holds another one twice, 40 times over, takes days to hash, and one nested two million
deep overflows the stack of the process. So the stack machine is followed here with sizes in place of values.
"""

from __future__ import annotations

import _compat_pickle
import io
import pickletools
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

MOST_STEPS: Final = 500_000
"""Steps of the machine, and nodes that it fetches again. A tensor takes some 60, a number 1."""
MOST_DEPTH: Final = 100

_FETCH: Final = frozenset({"GET", "BINGET", "LONG_BINGET"})
_KEEP: Final = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"})
_ENCODE: Final = "_codecs.encode"


class _Item(NamedTuple):
    """A value on the stack: nodes it would have if printed, its depth, its text (of a pair: that of its last item)."""

    size: int
    depth: int
    text: str | None = None


_LEAF: Final = _Item(1, 1)


class PickleScan:
    """Follows the first ``most`` pickles in ``content``, for at most ``most_steps``.

    Attributes:
        calls: every global they name, as ``module.name``; one that is called to no good end has words added.
        whole: how many of the pickles are there to their ends.
        protocol: the highest that one of them says it has.
        excess: what is beyond all reason in them, in words, or ``None``.
    """

    def __init__(self, content: bytes, most: int, most_steps: int = MOST_STEPS) -> None:
        self.calls: set[str] = set()
        self.whole = 0
        self.protocol = 0
        self.excess: str | None = None
        self._steps = 0
        self._most_steps = most_steps
        stream = io.BytesIO(content)
        while self.whole < most and self._follow(pickletools.genops(stream)):
            self.whole += 1

    def _follow(self, steps: Iterator[tuple[Any, Any, int | None]]) -> bool:
        """One pickle to its end; False where it is cut off, damaged or beyond all reason."""
        self._stack: list[_Item] = []
        self._marks: list[int] = []
        self._memo: dict[int, _Item] = {}
        try:
            for opcode, argument, _ in steps:
                self._steps += 1
                self._step(opcode, argument)
                if self._steps > self._most_steps:
                    self.excess = f"building it takes more than {self._most_steps} steps"
                if self.excess:
                    return False
        except Exception:  # noqa: BLE001 (a damaged pickle leads to any error at all; the caller says so)
            return False
        return True

    def _step(self, opcode: Any, argument: Any) -> None:
        name = opcode.name
        if name == "PROTO":
            self.protocol = max(self.protocol, argument)
        elif name == "MARK":
            self._marks.append(len(self._stack))
        elif name in _KEEP:
            self._memo[len(self._memo) if argument is None else int(argument)] = self._stack[-1]
        elif name in _FETCH:
            item = self._memo[int(argument)]
            self._steps += item.size
            self._stack.append(item)
        elif not opcode.stack_before:
            self._stack += [self._leaf(name, argument)] * len(opcode.stack_after)
        else:
            taken = self._take(opcode)
            made = _Item(
                1 + sum(item.size for item in taken),
                1 + max((item.depth for item in taken), default=0),
                self._text(name, argument, taken),
            )
            if made.depth > MOST_DEPTH:
                self.excess = f"it is nested more than {MOST_DEPTH} levels deep"
            self._stack += [made] * len(opcode.stack_after)

    def _leaf(self, name: str, argument: Any) -> _Item:
        """A value made of nothing else: a number, a text, a name, an empty container."""
        if not isinstance(argument, str):
            return _LEAF
        return _Item(1, 1, self._called(argument.replace(" ", ".")) if name == "GLOBAL" else argument)

    def _take(self, opcode: Any) -> list[_Item]:
        """Remove what the step consumes, by `pickletools`' description of it."""
        before = opcode.stack_before
        if pickletools.markobject in before:
            start = self._marks.pop() - before.index(pickletools.markobject)
        else:
            start = len(self._stack) - len(before)
        if start < 0:
            raise IndexError("the stack is empty")
        taken = self._stack[start:]
        del self._stack[start:]
        return taken

    def _text(self, name: str, argument: Any, taken: list[_Item]) -> str | None:
        texts = [item.text for item in taken]
        if name == "INST":
            return self._called(str(argument).replace(" ", "."))
        if name == "STACK_GLOBAL":
            return self._called(".".join(map(str, texts)))
        if name == "REDUCE" and texts[0] == _ENCODE and texts[1] != "latin1":
            self._called(f"{_ENCODE} with another codec than latin1")
        if name in {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}:
            return texts[-1] if len(texts) == 2 else None
        return None

    def _called(self, name: str) -> str:
        """The name as Python 3 has it: pickles of protocol 2 use Python 2's, and readers put these in their place."""
        module, _, what = name.rpartition(".")
        module, what = _compat_pickle.NAME_MAPPING.get(
            (module, what), (_compat_pickle.IMPORT_MAPPING.get(module, module), what)
        )
        name = f"{module}.{what}"
        self.calls.add(name)
        return name


def unlisted(calls: Iterable[str], harmless: Any, allowed: Iterable[str]) -> list[str]:
    """Those calls that neither the pattern ``harmless`` nor the names ``allowed`` cover, sorted."""
    known = set(allowed)
    return sorted(name for name in calls if not harmless.fullmatch(name) and name not in known)
