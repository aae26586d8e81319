#!/usr/bin/env bash
# Starts our Ray on this node and, on rank 0, serves the model on the cluster; returns when the model answers. Run on every
# node under SkyPilot's variables, and again without harm: what runs already is left as it is.
#
# Our Ray runs beside SkyPilot's own, which holds ports 6380, 8266, 8076, 10001 and 52365: hence the numbers below. With the
# default agent port it would start, and `ray job submit` would then find no agent. Never `ray stop` here: it stops SkyPilot's
# Ray too.
set -euo pipefail
cd "$(dirname "$0")/.."
source "${VENV:-.venv}/bin/activate"
: "${MODEL:?}" "${SKYPILOT_NODE_IPS:?}" "${SKYPILOT_NODE_RANK:?}" "${SKYPILOT_NUM_NODES:?}"
port=${PORT:-8000}
nodes=($SKYPILOT_NODE_IPS)
head=${nodes[0]}
here=${nodes[$SKYPILOT_NODE_RANK]}

# A launch on a cluster that exists asks SkyPilot for no GPUs: it has those that it was made with.
gpus=${SKYPILOT_NUM_GPUS_PER_NODE:-0}
[ "$gpus" != 0 ] || gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
[ -n "${CUDA_VISIBLE_DEVICES:-}" ] || unset CUDA_VISIBLE_DEVICES

# What Serve's proxies put before themselves (serve_app/http/proxy.py).
export RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve_app.http.proxy:middlewares

runs_here() { pgrep -f "raylet .*--gcs-address=$head:6379" >/dev/null; }
answers() { ray health-check --address "$head:6379" >/dev/null 2>&1; }

# What later commands on this node need (eval.yaml, `roentgen doctor`), and this script itself when it is run again without the
# secrets or the store: what is given now wins over what was kept, but for the keys of a Ray that runs, which has handed them
# down already.
kept=~/.roentgen/env
mkdir -p ~/.roentgen
was() { [ ! -f "$kept" ] || (unset "$1"; source "$kept"; echo "${!1:-}"); }
for name in RAY_AUTH_TOKEN ROENTGEN_API_KEY; do
  if runs_here; then
    [ "${!name:-$(was $name)}" = "$(was $name)" ] || echo "$name: the Ray that runs here keeps the one it has"
    export "$name=$(was $name)"
  elif [ -z "${!name:-}" ]; then
    export "$name=$(was $name)"
  fi
done
if [ -z "${STORE:-}" ]; then
  for name in STORE AWS_ENDPOINT_URL AWS_REGION; do [ -n "${!name:-}" ] || export "$name=$(was $name)"; done
fi
# A variable that was not given is empty, which others would take for an empty secret.
for name in HF_TOKEN AWS_ENDPOINT_URL AWS_REGION; do [ -n "${!name:-}" ] || unset "$name"; done

# A bucket's keys go into a file, not into the environment of Ray: there they could never be renewed. Without any given, it is
# those that SkyPilot has put on the node, if it has; AWS's own nodes have a role instead.
export AWS_SHARED_CREDENTIALS_FILE=~/.roentgen/aws
if [ -n "${AWS_ACCESS_KEY_ID:-}" ]; then
  (
    umask 077
    {
      echo "[default]"
      for name in AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN; do
        [ -z "${!name:-}" ] || echo "${name,,} = ${!name}"
      done
    } >"$AWS_SHARED_CREDENTIALS_FILE.new"
    mv "$AWS_SHARED_CREDENTIALS_FILE.new" "$AWS_SHARED_CREDENTIALS_FILE"
  )
elif [ ! -e "$AWS_SHARED_CREDENTIALS_FILE" ]; then
  ln -sfn ~/.aws/credentials "$AWS_SHARED_CREDENTIALS_FILE"
fi
unset AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN
if [ "$SKYPILOT_NUM_NODES" -gt 1 ]; then
  : "${RAY_AUTH_TOKEN:?more than one node needs a secret that they share: --secret RAY_AUTH_TOKEN}"
  : "${ROENTGEN_API_KEY:?more than one node needs a key, since the server then listens on the network: --secret ROENTGEN_API_KEY}"
  : "${STORE:?more than one node needs a store that all can write: --env STORE=s3://BUCKET/FOLDER}"
fi
RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(python -c 'import secrets; print(secrets.token_hex(32))')}
STORE=${STORE:-~/activations}
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED=0 STORE="${STORE/#\~/$HOME}"
if [ -n "${ROENTGEN_API_KEY:-}" ]; then
  ROENTGEN_BASE_URL=$(printf "http://%s:$port/v1," "${nodes[@]}")
else
  ROENTGEN_BASE_URL=http://127.0.0.1:$port/v1
fi
export ROENTGEN_BASE_URL=${ROENTGEN_BASE_URL%,}
(
  umask 077
  for name in RAY_AUTH_MODE RAY_AUTH_TOKEN ROENTGEN_API_KEY ROENTGEN_BASE_URL STORE AWS_SHARED_CREDENTIALS_FILE \
    AWS_ENDPOINT_URL AWS_REGION; do
    [ -z "${!name:-}" ] || printf 'export %s=%q\n' "$name" "${!name}"
  done >"$kept.new"
  echo "export RAY_ADDRESS=$head:6379" >>"$kept.new"
  mv "$kept.new" "$kept"
  mkdir -p ~/.ray
  printf %s "$RAY_AUTH_TOKEN" >~/.ray/auth_token  # where `ray` looks by itself
)

unset RAY_ADDRESS  # `ray start` would take it for the Ray to join
# Ray's processes hand their environment down to replicas and jobs: the key and the addresses above reach them this way.
options=(--node-ip-address "$here" --num-gpus "$gpus" --dashboard-agent-listen-port 52366
  --min-worker-port 20000 --max-worker-port 29999 --disable-usage-stats)
# `ray start` gives up after 30 s, on a slow machine before what it started has come up: that goes on, and is waited for below.
start() { ray start "$@" "${options[@]}" || { sleep 10 && runs_here; }; }

if [ "$SKYPILOT_NODE_RANK" != 0 ]; then
  until answers; do
    [ $SECONDS -lt 900 ] ||
      { echo "$head's Ray does not answer; is RAY_AUTH_TOKEN the one in ~/.roentgen/env there?" >&2; exit 1; }
    sleep 2
  done
  runs_here || start --address "$head:6379"
  exit 0
fi
answers || start --head --port 6379 --dashboard-host 127.0.0.1 --dashboard-port 8265 --ray-client-server-port 10101
exec python -m roentgen.cloud.deploy --address "$head:6379" --nodes "$SKYPILOT_NUM_NODES" \
  --gpus-per-node "$gpus"
