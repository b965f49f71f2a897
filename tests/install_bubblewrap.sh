#!/usr/bin/env bash
# Install what runs a model's code: bubblewrap, from Debian's packages. Nothing where it is there, or where it cannot be
# installed: the tests of it then skip, and say why.
set -euo pipefail

if command -v bwrap >/dev/null; then
    echo "bubblewrap: it is there"
    exit 0
fi
if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
    echo "bubblewrap: missing, and no apt-get or no root to install it: the tests of it are skipped"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends bubblewrap; } >/dev/null; then
    echo "bubblewrap: it could not be installed: the tests of it are skipped"
fi
