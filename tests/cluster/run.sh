#!/usr/bin/env bash
# pytest of this folder in namespaces of its own: what it makes of network, mounts and processes ends with it.
#   bash tests/cluster/run.sh .venv/bin/python [pytest's arguments]
#   bash tests/cluster/run.sh .venv/bin/python tests/cluster/bench_nodes.py [its arguments]
# A fresh Debian needs: apt-get install util-linux iproute2 redis-server
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$1
shift

spaces=(--net --mount --uts --ipc --pid --fork --kill-child --mount-proc)
# Bridge, tmpfs and names as the tests make them, asked for once before.
try='ip link add try type bridge && mount -t tmpfs try /mnt && hostname try'
if [ "$(uname)" != Linux ] || ! command -v unshare nsenter ip > /dev/null; then
    echo "test-cluster skipped: it makes machines of Linux namespaces, by unshare, nsenter (util-linux) and ip (iproute2)"
    exit 0
elif unshare "${spaces[@]}" bash -c "$try" 2> /dev/null; then
    :
elif unshare --user --map-root-user "${spaces[@]}" bash -c "$try" 2> /dev/null; then
    spaces=(--user --map-root-user "${spaces[@]}")
else
    echo "test-cluster skipped: namespaces are not allowed here; it takes root (CAP_SYS_ADMIN, CAP_NET_ADMIN) or user namespaces"
    exit 0
fi
# A walk without it would pass without the half that loses the head.
if ! command -v redis-server > /dev/null; then
    echo "test-cluster: no redis-server, which keeps what a lost head knew: apt-get install redis-server" >&2
    exit 2
fi
run=(-m pytest -v tests/cluster)
case ${1-} in *.py) run=() ;; esac
HRNET_OWN_NAMESPACES=1 exec unshare "${spaces[@]}" "$python" -u "${run[@]}" "$@"
