#!/usr/bin/env bash
# cluster.sh COMMAND...: run a command where a SLURM cluster can be started that nobody else sees.
#
# In namespaces of its own (mounts, network, processes, host name) the machine is called `login`; the nodes that the
# tests start are called node1 ... node4 and have addresses. All of it ends with the command. Where SLURM or the
# rights are missing, the command runs as it is: tests see no RETORT_CLUSTER, and skip.
set -euo pipefail

run=(unshare --mount --net --uts --pid --fork --kill-child --mount-proc)
if ! command -v slurmctld >/dev/null || ! "${run[@]}" true 2>/dev/null; then
    exec "$@"
fi

RETORT_CLUSTER=$(mktemp -d)
export RETORT_CLUSTER
trap 'rm -rf "$RETORT_CLUSTER"' EXIT

status=0
"${run[@]}" bash -euc '
    hostname login
    ip link set lo up
    mkdir -p "$RETORT_CLUSTER/etc" /etc/slurm
    mount --bind "$RETORT_CLUSTER/etc" /etc/slurm # where all commands look, whatever their environment
    echo 127.0.0.1 localhost >"$RETORT_CLUSTER/hosts"
    address=10
    for name in login node1 node2 node3 node4; do
        ip address add 10.0.0.$address/32 dev lo
        echo "10.0.0.$address $name" >>"$RETORT_CLUSTER/hosts"
        address=$((address + 1))
    done
    mount --bind "$RETORT_CLUSTER/hosts" /etc/hosts
    "$@" || exit # not exec: this shell also waits for daemons that were killed, which would stay zombies
' cluster "$@" || status=$?
exit $status
