"""Records the calls that make files durable, in order."""

import os
from pathlib import Path

import pytest


class DiskCalls:
    """The flushes and renames of this process: `("fsync", PATH)` and `("rename", OLD, NEW)`."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, ...]] = []
        fsync, rename = os.fsync, os.rename

        def record_fsync(descriptor: int) -> None:
            fsync(descriptor)
            self.calls.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))

        def record_rename(old: Path, new: Path) -> None:
            rename(old, new)
            self.calls.append(("rename", str(old), str(new)))

        patch.setattr(os, "fsync", record_fsync)
        patch.setattr(os, "rename", record_rename)

    def check_atomic(self, path: Path) -> None:
        """Check that the last time a file was written, it was flushed, then renamed, then its folder flushed."""
        renames = [call for call in self.calls if call[0] == "rename" and call[2] == str(path)]
        assert renames, (path, self.calls)
        at = self.calls.index(renames[-1])
        assert self.calls[at - 1 : at + 2] == [("fsync", renames[-1][1]), renames[-1], ("fsync", str(path.parent))]
