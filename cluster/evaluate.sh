#!/usr/bin/env bash
# Runs an evaluation's driver on the head, with $EVAL as its options; on the other nodes it does nothing.
set -euo pipefail
[ "${SKYPILOT_NODE_RANK:-0}" = 0 ] || exit 0
cd "$(dirname "$0")/.."
source "${VENV:-.venv}/bin/activate"
[ -f ~/.roentgen/env ] || { echo "nothing was started here: launch cluster.yaml first" >&2; exit 2; }
source ~/.roentgen/env
eval "options=(${EVAL:-})"  # words as a shell reads them: --problems 'my file.jsonl'
exec python -m eval_jobs "${options[@]}"
