#!/bin/sh
# Builds agent.cpio, the agent as init and the directories it needs, and initramfs.cpio, the same
# with busybox. Needs no root. The results are committed, with the checksums of their sources in
# initramfs.sources, so only a change of the agent or of this script needs this;
# `build-initramfs.sh --check` says whether they belong together.
#
# The archives are not compressed: the guest would have to decompress them, in kernel mode.
#
# CARGO_TARGET_DIR   where the agent is built (default: agent/target)
set -eu

here=$(cd "$(dirname "$0")" && pwd)
cd "$here"
target=x86_64-unknown-linux-gnu
export LC_ALL=C TZ=UTC

sources() {
    {
        find agent/src -type f
        echo agent/Cargo.toml agent/Cargo.lock agent/.cargo/config.toml build-initramfs.sh |
            tr ' ' '\n'
    } | sort | xargs sha256sum
}

if [ "${1:-}" = --check ]; then
    sources | diff initramfs.sources - >&2 && sha256sum --check --quiet initramfs.sha256 || {
        echo "the archives are not of these sources: run resources/guest/build-initramfs.sh" >&2
        exit 1
    }
    exit 0
fi

missing=
command -v cpio >/dev/null || missing="$missing cpio"
[ "$(dpkg-query -W -f '${db:Status-Status}' busybox-static 2>/dev/null || true)" = installed ] ||
    missing="$missing busybox-static"
if [ -n "$missing" ]; then
    if [ "$(id -u)" != 0 ]; then
        echo "build-initramfs.sh: please install as root: apt-get install$missing" >&2
        exit 1
    fi
    apt-get update
    # shellcheck disable=SC2086 # a list of package names
    apt-get install -y --no-install-recommends $missing
fi

# The flags are in agent/.cargo/config.toml; the environment must not replace them.
target_dir=${CARGO_TARGET_DIR:-$here/agent/target}
(cd agent && env -u RUSTFLAGS -u CARGO_ENCODED_RUSTFLAGS CARGO_TARGET_DIR="$target_dir" \
    cargo build --release --locked --target "$target")

stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT

# The same input gives the same bytes: sorted names, no times, owned by root. Device nodes are
# the kernel's business (devtmpfs).
archive() {
    find "$stage" -exec touch -h -d @0 {} +
    (cd "$stage" && find . -mindepth 1 | sort | cpio --quiet --reproducible -o -H newc -R 0:0)
}

umask 022
chmod 0755 "$stage"
mkdir "$stage/bin" "$stage/dev" "$stage/mnt" "$stage/proc" "$stage/sys" "$stage/tmp"
chmod 1777 "$stage/tmp"
install -m 0755 "$target_dir/$target/release/guest-agent" "$stage/init"
archive >agent.cpio
install -m 0755 /bin/busybox "$stage/bin/busybox"
ln -s busybox "$stage/bin/sh"
archive >initramfs.cpio

sources >initramfs.sources
sha256sum agent.cpio initramfs.cpio >initramfs.sha256
dpkg-query -W -f 'busybox-static ${Version}\n' busybox-static
ls -l agent.cpio initramfs.cpio
