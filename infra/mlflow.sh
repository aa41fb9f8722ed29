#!/usr/bin/env bash
# MLflow's tracking server and model registry, with SQLite and all artifacts in one folder.
#   bash infra/mlflow.sh FOLDER                 in the foreground: a terminal, systemd, a container
#   bash infra/mlflow.sh --background FOLDER    detached, log in FOLDER/server.log; does nothing if one already answers
# MLFLOW_HOST (127.0.0.1) and MLFLOW_PORT (5000) say where it listens. It asks nobody for a password: whoever reaches the
# port can change the registry. MLFLOW_BACKEND_STORE_URI names a database instead of the SQLite file. Where machines are
# called by names or public addresses, MLFLOW_SERVER_ALLOWED_HOSTS lists them (default: localhost and private addresses).
set -euo pipefail

detach=""
if [ "${1:-}" = "--background" ]; then detach=1; shift; fi
[ $# -eq 1 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mkdir -p "$1/artifacts"
folder=$(cd "$1" && pwd)
host=${MLFLOW_HOST:-127.0.0.1}
port=${MLFLOW_PORT:-5000}

# MLflow's job runner (seven processes for evaluating LLMs) stays out.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=${MLFLOW_SERVER_ENABLE_JOB_EXECUTION:-false}
# One worker process: SQLite takes one writer, and on a network filesystem its locks are not to be trusted between more.
serve=(mlflow server --host "$host" --port "$port" --workers 1
    --backend-store-uri "${MLFLOW_BACKEND_STORE_URI:-sqlite:///$folder/mlflow.db}"
    --artifacts-destination "$folder/artifacts")
[ -n "$detach" ] || exec "${serve[@]}"

alive() { python3 -c "import urllib.request as u; u.urlopen('http://127.0.0.1:$port/health', timeout=2)" 2>/dev/null; }
if alive; then echo "MLflow already answers on port $port"; exit 0; fi
setsid nohup "${serve[@]}" > "$folder/server.log" 2>&1 < /dev/null &
for _ in $(seq 120); do
    if alive; then echo "MLflow listens on $host:$port, process $!, files in $folder"; exit 0; fi
    kill -0 $! 2>/dev/null || break
    sleep 1
done
echo "MLflow did not start; the end of $folder/server.log:" >&2
tail -n 20 "$folder/server.log" >&2
exit 1
