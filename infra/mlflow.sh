#!/usr/bin/env bash
# MLflow's tracking server and model registry: SQLite and all artifacts in one folder, or a database, a bucket and users.
#   bash infra/mlflow.sh FOLDER                 in the foreground: a terminal, systemd, a container
#   bash infra/mlflow.sh --background FOLDER    detached, log in FOLDER/server.log; does nothing if one already answers
#   bash infra/mlflow.sh --upgrade FOLDER       its tables, after MLflow was upgraded; with no server running on them
# By environment:
#   MLFLOW_HOST (127.0.0.1), MLFLOW_PORT (5000)     where it listens
#   MLFLOW_BACKEND_STORE_URI                        a database in place of FOLDER/mlflow.db: postgresql+psycopg2://...
#   MLFLOW_ARTIFACTS                                a bucket in place of FOLDER/artifacts: s3://... (the usual credentials)
#   MLFLOW_AUTH_ADMIN_PASSWORD                      asks for a user and password; this is admin's, the first time.
#       Then MLFLOW_FLASK_SERVER_SECRET_KEY too: any long random text, the same at every start.
#   MLFLOW_SERVER_ALLOWED_HOSTS                     names by which it is called (default: localhost, private addresses)
# Without a password it asks nobody: whoever reaches the port can change the registry.
set -euo pipefail

action=serve
case "${1:-}" in
    --background) action=background; shift ;;
    --upgrade) action=upgrade; shift ;;
esac
[ $# -eq 1 ] || { sed -n '2,15s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mkdir -p "$1/artifacts"
folder=$(cd "$1" && pwd)
host=${MLFLOW_HOST:-127.0.0.1}
port=${MLFLOW_PORT:-5000}
database=${MLFLOW_BACKEND_STORE_URI:-sqlite:///$folder/mlflow.db}
# By variable, not by flag: a flag with a password in it can be read in the list of processes.
export MLFLOW_BACKEND_STORE_URI=$database

if [ "$action" = upgrade ]; then
    # `mlflow db upgrade` takes the address, and a password in it, by its command line only.
    python3 -c 'import os; from mlflow.db import upgrade; upgrade.callback(os.environ["MLFLOW_BACKEND_STORE_URI"])'
    echo "the tables fit MLflow $(python3 -c 'import mlflow; print(mlflow.__version__)')"
    exit
fi

# MLflow's job runner (seven processes for evaluating LLMs) stays out.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=${MLFLOW_SERVER_ENABLE_JOB_EXECUTION:-false}
# One worker process: SQLite takes one writer, and on a network filesystem its locks are not to be trusted between more.
workers=1
case "$database" in sqlite:*) ;; *) workers=${MLFLOW_WORKERS:-2} ;; esac
serve=(mlflow server --host "$host" --port "$port" --workers "$workers"
    --artifacts-destination "${MLFLOW_ARTIFACTS:-$folder/artifacts}")

if [ -n "${MLFLOW_AUTH_ADMIN_PASSWORD:-}" ]; then
    : "${MLFLOW_FLASK_SERVER_SECRET_KEY:?is needed with MLFLOW_AUTH_ADMIN_PASSWORD: any long random text, the same at every start}"
    python3 -c 'import flask_wtf' 2>/dev/null || { echo "users take Flask-WTF: pip install 'hrnet-ray[mlflow-server]'" >&2; exit 2; }
    export MLFLOW_AUTH_ADMIN_USERNAME=${MLFLOW_AUTH_ADMIN_USERNAME:-admin} MLFLOW_AUTH_CONFIG_PATH=$folder/users.ini
    users=$database
    case "$database" in sqlite:*)  # with hashes of passwords in it: SQLite would make it for all to read
        users=sqlite:///$folder/users.db
        (umask 077 && : >> "$folder/users.db" && chmod 600 "$folder/users.db") ;;
    esac
    # Every user reads; who makes a run or a model may change it, and so may admin. % is configparser's own.
    (umask 077 && printf '[mlflow]\ndefault_permission = READ\ndatabase_uri = %s\n' "${users//%/%%}" \
        > "$MLFLOW_AUTH_CONFIG_PATH")
    serve+=(--app-name basic-auth)
fi
[ "$action" = background ] || exec "${serve[@]}"

# Where it listens: on one address of the machine 127.0.0.1 is not served.
case "$host" in 0.0.0.0 | ::) ask=127.0.0.1 ;; *:*) ask="[$host]" ;; *) ask=$host ;; esac
alive() { python3 -c "import urllib.request as u; u.build_opener(u.ProxyHandler({})).open('http://$ask:$port/health', timeout=2)" 2>/dev/null; }
if alive; then echo "MLflow already answers on $ask:$port"; exit 0; fi
setsid nohup "${serve[@]}" > "$folder/server.log" 2>&1 < /dev/null &
for _ in $(seq 120); do
    if alive; then echo "MLflow listens on $host:$port, process $!, files in $folder"; exit 0; fi
    kill -0 $! 2>/dev/null || break
    sleep 1
done
echo "MLflow did not start; the end of $folder/server.log:" >&2
tail -n 20 "$folder/server.log" >&2
exit 1
