#!/usr/bin/env bash
# Install from Debian's packages what some tests use: bubblewrap, which runs a model's code, and Chromium, in which the
# report is looked at. Nothing where they are there, or where they cannot be installed: those tests then skip, and say why;
# with RETORT_REQUIRE=bubblewrap in the environment, as in CI, one fails in place of those that bubblewrap is missing for.
set -euo pipefail

missing=()
command -v bwrap >/dev/null || missing+=(bubblewrap)
command -v chromium >/dev/null || command -v google-chrome >/dev/null || missing+=(chromium)
if [ ${#missing[@]} = 0 ]; then
    echo "bubblewrap and chromium: they are there"
    exit 0
fi
if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
    echo "${missing[*]}: missing, and no apt-get or no root to install it: its tests are skipped"
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >/dev/null; then
    echo "${missing[*]}: could not be installed: its tests are skipped"
fi
