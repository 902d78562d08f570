#!/bin/sh
# Makes sure that what building, testing and the demo need is there. As root on Debian it installs
# what is missing; otherwise it says exactly what to install.
#
#   setup.sh build    what cargo needs
#   setup.sh demo     and what the demo needs
#   setup.sh test     and what the tests need
#   setup.sh bench    and what the benchmark compares with
set -eu
cd "$(dirname "$0")/.."
goal=${1:-test}

missing=""
need() { # command, Debian package
    command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}

if ! command -v cargo >/dev/null 2>&1; then
    echo "setup: Rust is missing. Install it with rustup, then run this again." >&2
    exit 1
fi
need cc build-essential
case $goal in demo | test | bench) need qemu-img qemu-utils ;; esac
case $goal in
test)
    need qemu-io qemu-utils
    need nbdcopy libnbd-bin
    need nbdsh python3-libnbd
    need iasl acpica-tools
    need python3 python3
    python3 -c 'import venv, ensurepip' 2>/dev/null || missing="$missing python3-venv"
    ;;
esac

if [ -n "$missing" ]; then
    missing=$(printf '%s\n' $missing | sort -u | tr '\n' ' ')
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        echo "setup: installing $missing"
        apt-get update -qq
        # shellcheck disable=SC2086 # a list of names
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
    else
        echo "setup: please install: $missing" >&2
        echo "setup: on Debian or Ubuntu: sudo apt-get install $missing" >&2
        exit 1
    fi
fi

# A stock QMP client for the tests, in a directory of its own.
if [ "$goal" = test ] && ! .venv/bin/python -c 'import qemu.qmp' 2>/dev/null; then
    echo "setup: installing the Python QMP client into .venv"
    python3 -m venv .venv
    .venv/bin/pip install --quiet --disable-pip-version-check -r tests/python/requirements.txt
fi

if [ "$goal" = bench ] && ! command -v qemu-system-x86_64 >/dev/null 2>&1; then
    if [ "$(id -u)" = 0 ] && [ -f /etc/apt/sources.list.d/debian.sources ]; then
        # QEMU 10 is in the backports of Debian 12: the archive that is configured already, in
        # another suite. The release's own QEMU would replace a newer qemu-utils.
        . /etc/os-release
        awk -v suite="$VERSION_CODENAME-backports" \
            'BEGIN { RS = ""; ORS = "\n\n" } NR == 1 { sub(/Suites:[^\n]*/, "Suites: " suite); print }' \
            /etc/apt/sources.list.d/debian.sources >/etc/apt/sources.list.d/debian-backports.sources
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            -t "$VERSION_CODENAME-backports" qemu-system-x86 qemu-utils >/dev/null
    else
        echo "setup: QEMU is compared with only if qemu-system-x86_64 is installed" >&2
    fi
fi

if [ ! -e /dev/kvm ]; then
    echo "setup: there is no /dev/kvm here: guests cannot run, and tests that need one are skipped" >&2
elif [ ! -r /dev/kvm ] || [ ! -w /dev/kvm ]; then
    echo "setup: /dev/kvm may not be opened by this user: sudo usermod -aG kvm $(id -un), then log in again" >&2
    exit 1
fi
