"""The activation store: rollouts of different lengths, appended by many writers without coordination, readable without this
package.

    STORE/<session_id>/
      session.json                 identity: name, schema version, creation time; written once
      shards/<ulid>.safetensors    one tensor per key, with the rows of all rollouts of the shard concatenated
      index/<ulid>.parquet         one row per rollout; written last, so a rollout is committed if an index lists it
      labels/<ulid>.parquet        labels added later, one row per rollout

`schema` defines the contents of the files; `shards`, `index` and `labels` read and write them; `storage_backends` stores
bytes on a disk or in a bucket. `writer` groups rollouts and commits them. `reader` opens a session, and `activations` reads
its rows lazily. `merging` combines small shards into large ones and removes unused files; `locks` prevents deletion of a
session that is being written. `quantization` converts rows to int8 and back, and `batches` yields rows in random order.
`files` lists, reads and archives a session's files, `pulling` downloads them, `sessions` summarizes, verifies and deletes
sessions, and `exports` converts them to other formats. docs/store.md specifies the file formats for readers in other
languages.
"""

from roentgen.store.activations import Activations, RolloutRows
from roentgen.store.locks import SessionBusyError
from roentgen.store.reader import Session
from roentgen.store.schema import (
    CapturedRollout,
    CaptureSpec,
    NonFiniteRowsError,
    Receipt,
    SessionNotFoundError,
    StoreError,
)
from roentgen.store.sessions import SessionSummary, VerifyReport, list_sessions, verify
from roentgen.store.writer import StoreWriter

__all__ = [
    "Activations",
    "CaptureSpec",
    "CapturedRollout",
    "NonFiniteRowsError",
    "Receipt",
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
