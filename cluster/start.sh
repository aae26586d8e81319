#!/usr/bin/env bash
# Starts our Ray on every node of the cluster and, on rank 0, serves the model; returns when the model answers. Run by
# cluster.yaml under SkyPilot's variables, and again without harm: what runs already is left as it is.
#
# Never `ray stop` here: it would stop SkyPilot's own Ray too.
set -euo pipefail
cd "$(dirname "$0")/.."
source .venv/bin/activate
: "${MODEL:?}" "${STORE:?}" "${SKYPILOT_NODE_IPS:?}" "${SKYPILOT_NODE_RANK:?}" "${SKYPILOT_NUM_NODES:?}"
export RAY_USAGE_STATS_ENABLED=0
# Said either way: left to itself, Ray locks a cluster whenever it finds a token in the home folder.
if [ -n "${RAY_AUTH_TOKEN:-}" ]; then export RAY_AUTH_MODE=token; else export RAY_AUTH_MODE=disabled; fi

head=$(head -n1 <<<"$SKYPILOT_NODE_IPS")
here=$(sed -n "$((SKYPILOT_NODE_RANK + 1))p" <<<"$SKYPILOT_NODE_IPS")
export RAY_ADDRESS=$head:6379
common=(--node-ip-address "$here" --num-gpus "${SKYPILOT_NUM_GPUS_PER_NODE:-0}" --dashboard-agent-listen-port 52366
  --min-worker-port 20000 --max-worker-port 29999 --disable-usage-stats)

if [ "$SKYPILOT_NODE_RANK" = 0 ]; then
  ray health-check --address "$RAY_ADDRESS" >/dev/null 2>&1 ||
    RAY_ADDRESS= ray start --head --port 6379 --dashboard-host 127.0.0.1 --dashboard-port 8265 \
      --ray-client-server-port 10101 "${common[@]}"
else
  until ray health-check --address "$RAY_ADDRESS" >/dev/null 2>&1; do sleep 2; done
  RAY_ADDRESS= ray start --address "$head:6379" "${common[@]}"
  exit 0
fi

python - "$RAY_ADDRESS" "$SKYPILOT_NUM_NODES" <<'PY'
import sys, time, ray
address, nodes = sys.argv[1], int(sys.argv[2])
ray.init(address=address, log_to_driver=False)
while (alive := sum(node["Alive"] for node in ray.nodes())) < nodes:
    print(f"{alive} of {nodes} nodes are here", flush=True)
    time.sleep(2)
PY
served() { curl -sf -H "Authorization: Bearer ${ROENTGEN_API_KEY%%,*}" http://127.0.0.1:8000/v1/models | grep -qF "\"$MODEL\""; }
export ROENTGEN_API_KEY=${ROENTGEN_API_KEY:-}
served || serve run --non-blocking --name roentgen serve_app.app:build model="$MODEL" store="${STORE/#\~/$HOME}"
until curl -sf http://127.0.0.1:8000/health; do
  curl -s http://127.0.0.1:8000/health || true
  echo
  sleep 5
done
echo "serving $MODEL on http://127.0.0.1:8000/v1"
