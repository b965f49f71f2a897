#!/usr/bin/env bash
# Install what tests/slurm need: SLURM and munge, from Debian's packages. Nothing where they are there, or where they
# cannot be installed: the tests then skip, and say why.
set -euo pipefail

packages=(slurmctld slurmd slurm-client munge iproute2 util-linux)
missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f='${db:Status-Abbrev}' "$package" 2>/dev/null | grep -q '^ii' || missing+=("$package")
done
if [ ${#missing[@]} = 0 ]; then
    echo "slurm: every package is there"
    exit 0
fi
if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
    echo "slurm: ${missing[*]} missing, and no apt-get or no root to install them: the tests on a cluster are skipped"
    exit 0
fi

# No package may start a daemon: the tests start their own, in a namespace.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod +x $policy
    trap 'rm -f $policy' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
install=(apt-get install -y -qq --no-install-recommends "${missing[@]}")
if ! { apt-get update -qq && "${install[@]}"; } >/dev/null; then
    echo "slurm: ${missing[*]} could not be installed: the tests on a cluster are skipped"
fi
