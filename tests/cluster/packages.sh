#!/usr/bin/env bash
# Debian's packages for the tests on several hosts, on Slurm, in a browser, in several shells and of the pages' commands.
# Needs root; changes nothing where they are there.
#   bash tests/cluster/packages.sh
set -euo pipefail

# One group a call, so that what one distribution lacks does not keep it from the others.
install() {
    if dpkg-query -W -f '${Status}\n' "$@" 2>/dev/null | grep -c '^install ok installed$' | grep -qx "$#"; then
        return
    fi
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "tests/cluster/packages.sh: root and apt-get are needed for $*; tests that need them skip" >&2
        return
    fi
    # The daemons are started by the tests, each with a configuration of its own, and never as services.
    local deny=/usr/sbin/policy-rc.d made=
    if [ ! -e "$deny" ]; then
        printf '#!/bin/sh\nexit 101\n' >"$deny"
        chmod +x "$deny"
        made=yes
    fi
    export DEBIAN_FRONTEND=noninteractive
    if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends "$@"; }; then
        echo "tests/cluster/packages.sh: $* cannot be installed; tests that need them skip" >&2
    fi
    if [ -n "$made" ]; then
        rm "$deny"
    fi
}

install iproute2 openssh-server openssh-client pdsh slurm-wlm munge
install chromium chromium-driver
install zsh fish
install curl
