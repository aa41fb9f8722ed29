#!/usr/bin/env bash
# From COCO to a pose over HTTP on a running cluster: five jobs, each of which can be run again.
#   bash infra/walkthrough.sh photo.jpg '[[x, y, width, height]]'
# The photograph lies here, with a box around each person; everything else on the cluster, under DATA (coco/ is yours).
# Wants the tunnel of docs/cluster.md (ports 8265 and 8000) and the token in ~/.ray/auth_token.
set -euo pipefail

PHOTO=${1:?a photograph with people}
BOXES=${2:?their boxes as JSON, [[x, y, width, height]]}
DATA=${DATA:-/mnt/hrnet}                  # on the shared filesystem, an absolute path
CONFIG=${CONFIG:-w32_256x192}
NAME=${NAME:-$CONFIG}                     # of the run: the same name goes on where it stopped
WORKERS=${WORKERS:-4}
GPU=${GPU-use-gpu}                        # GPU= for a cluster without
PORT=${PORT:-8000}                        # of the endpoint
export RAY_AUTH_MODE=token
export RAY_API_SERVER_ADDRESS=${RAY_API_SERVER_ADDRESS:-http://127.0.0.1:8265}

job() { echo "\$ hrnet $*"; ray job submit -- hrnet "$@"; }

job preprocess "$CONFIG" --data.root "$DATA/coco" --data.shards "$DATA/shards"

job train "$CONFIG" --data.shards "$DATA/shards" --run.name "$NAME" --run.storage "$DATA/runs" \
    --train.num-workers "$WORKERS" ${GPU:+--train.$GPU}

job evaluate "$DATA/runs/$NAME/best" "$DATA/coco" --out "$DATA/runs/$NAME/evaluation" ${GPU:+--evaluate.$GPU}

job promote

# A key for whoever asks, made once; nodes read it from the shared folder.
KEYS=$DATA/keys
test -f "$KEYS" || (umask 077 && echo "walkthrough $(openssl rand -hex 24)" > "$KEYS")

# All interfaces: HAProxy of one node talks to the replicas of others. Only SSH comes in from outside the cluster.
job deploy models:/hrnet-pose@champion --run.storage "$DATA/runs" --serve.host 0.0.0.0 --serve.port "$PORT" \
    --serve.keys "$KEYS" ${GPU:+--serve.$GPU}

curl --silent --show-error --fail-with-body -H "Authorization: Bearer $(cut -d' ' -f2 "$KEYS")" \
    -F "image=@$PHOTO" -F "boxes=$BOXES" "http://127.0.0.1:$PORT/v1/poses"
echo
