"""The rows of prompts that vLLM finds in its prefix cache, kept on the host by the worker that has computed them.

vLLM reads a prompt from where it differs from earlier ones. The tokens before that pass through no module, so no tap shows
their rows. They are what they were when these tokens were last read, and are kept here in blocks, each named by all tokens up
to its end and by whatever else its rows depend on (`name_blocks`). So a block is right wherever its keys and values lie by now:
neither a preemption nor a block of vLLM's that holds another prompt meanwhile can make it stale.

What vLLM finds and what is here may differ, since both forget what has not been used for longest, each by its own bound. The
replica asks before it tells anybody of a request's first token (`Collector.resumed`), and has a request whose rows are gone
read again (`salts`).
"""

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from serve_app.capture.structure import Tap

Rows = Mapping[Tap, Float[Tensor, "rows ..."]]


class PrefixRows:
    """Blocks of rows by name.

    Attributes:
        size: tokens of a block.
        nbytes: what they take.
    """

    def __init__(self, size: int, limit: int) -> None:
        """Begin empty.

        Args:
            size: tokens of a block.
            limit: bytes that may be held.
        """
        self.size = size
        self.nbytes = 0
        self._limit = limit
        self._blocks: OrderedDict[bytes, dict[Tap, Tensor]] = OrderedDict()  # the first was used longest ago

    def lacks(self, name: bytes, taps: Collection[Tap]) -> set[Tap]:
        """Return where a block has no rows, of some places."""
        return set(taps) - self._blocks.get(name, {}).keys()

    def use(self, names: Sequence[bytes], needed: Sequence[Collection[Tap]]) -> list[Rows] | None:
        """Return a sequence's blocks, which count as used now; None if one lacks rows.

        Args:
            names: of the blocks.
            needed: per block, where rows are needed.
        """
        if any(self.lacks(name, taps) for name, taps in zip(names, needed, strict=True)):
            return None
        for name in reversed(names):
            if name in self._blocks:
                self._blocks.move_to_end(name)
        return [self._blocks.get(name, {}) for name in names]

    def add(self, name: bytes, rows: Rows) -> None:
        """Take rows of a block, which own their memory; what was used longest ago goes for them."""
        if not rows:
            return
        block = self._blocks.setdefault(name, {})
        self.nbytes += sum(values.nbytes for tap, values in rows.items() if tap not in block)
        block |= {tap: values for tap, values in rows.items() if tap not in block}
        self._blocks.move_to_end(name)
        while self.nbytes > self._limit:
            _, dropped = self._blocks.popitem(last=False)
            self.nbytes -= sum(values.nbytes for values in dropped.values())
