"""Caches the rows of prompts that vLLM finds in its prefix cache, on the host, in the worker that computed them.

vLLM reads a prompt from where it differs from earlier ones. The tokens before that pass through no module, so no tap reads
their rows. The rows are the same as when these tokens were last read. They are kept here in blocks; a block's name contains
all tokens up to its end and everything else that its rows depend on (`name_blocks`). So a block is valid wherever its keys and
values are now: neither a preemption nor the reuse of one of vLLM's blocks can make it stale.

vLLM's cache and this one may differ, because each drops what is least recently used within its own limit. Before the replica
emits a request's first token, it asks whether all rows are here (`Collector.resumed`). If not, it has the request read again
(`salts`).
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
        nbytes: size of the cache in bytes.
    """

    def __init__(self, size: int, limit: int) -> None:
        """Create an empty cache.

        Args:
            size: tokens of a block.
            limit: largest size in bytes.
        """
        self.size = size
        self.nbytes = 0
        self._limit = limit
        self._blocks: OrderedDict[bytes, dict[Tap, Tensor]] = OrderedDict()  # the first was used longest ago

    def lacks(self, name: bytes, taps: Collection[Tap]) -> set[Tap]:
        """Return the taps among `taps` that a block has no rows of."""
        return set(taps) - self._blocks.get(name, {}).keys()

    def use(self, names: Sequence[bytes], needed: Sequence[Collection[Tap]]) -> list[Rows] | None:
        """Return a sequence's blocks, which count as used now; None if one lacks rows.

        Args:
            names: names of the blocks.
            needed: per block, the taps whose rows are needed.
        """
        if any(self.lacks(name, taps) for name, taps in zip(names, needed, strict=True)):
            return None
        for name in reversed(names):
            if name in self._blocks:
                self._blocks.move_to_end(name)
        return [self._blocks.get(name, {}) for name in names]

    def add(self, name: bytes, rows: Rows) -> None:
        """Add rows of a block, in memory of their own; the least recently used blocks are dropped for them."""
        if not rows:
            return
        block = self._blocks.setdefault(name, {})
        self.nbytes += sum(values.nbytes for tap, values in rows.items() if tap not in block)
        block |= {tap: values for tap, values in rows.items() if tap not in block}
        self._blocks.move_to_end(name)
        while self.nbytes > self._limit:
            _, dropped = self._blocks.popitem(last=False)
            self.nbytes -= sum(values.nbytes for values in dropped.values())
