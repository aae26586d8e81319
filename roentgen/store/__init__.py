"""The activation store: ragged rollouts of many writers, appended without coordination, opened without this package.

    STORE/<session_id>/
      session.json                 identity only: name, schema version, created; made if absent, never changed
      shards/<ulid>.safetensors    tensors, one per key, rows of all the shard's rollouts back to back
      index/<ulid>.parquet         one row per rollout; written last, so its presence means "committed"
      labels/<ulid>.parquet        labels that came later, one row per rollout

`schema` defines what the files hold, `shards`, `index` and `labels` read and write them, and `places` puts bytes on a disk or
into a bucket. `writer` groups rollouts and commits them. `reader` opens a session, and `activations` reads its rows lazily.
`merging` makes large shards of small ones and removes unused files; `locks` keeps a session from being deleted while it is
written. `quantization` makes int8 rows and reads them, `batches` gives rows in random order. `files` lists, reads and packs a
session's files, `pulling` copies them here, `sessions` summarizes, verifies and deletes sessions, and `exports` converts them.
docs/store.md describes the format for readers in other languages.
"""

from roentgen.store.activations import Activations, RolloutRows
from roentgen.store.locks import SessionBusyError
from roentgen.store.reader import Session
from roentgen.store.schema import (
    CaptureSpec,
    NonFiniteRowsError,
    Receipt,
    Rollout,
    SessionNotFoundError,
    StoreError,
)
from roentgen.store.sessions import SessionSummary, VerifyReport, list_sessions, verify
from roentgen.store.writer import StoreWriter

__all__ = [
    "Activations",
    "CaptureSpec",
    "NonFiniteRowsError",
    "Receipt",
    "Rollout",
    "RolloutRows",
    "Session",
    "SessionBusyError",
    "SessionNotFoundError",
    "SessionSummary",
    "StoreError",
    "StoreWriter",
    "VerifyReport",
    "list_sessions",
    "verify",
]
