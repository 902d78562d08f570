#!/bin/sh
# Builds initramfs.cpio: the agent as init, busybox, and the directories they need. Needs no
# root. The result is committed, with the checksums of its sources in initramfs.sources, so only
# a change of the agent or of this script needs this; `build-initramfs.sh --check` says whether
# the two belong together.
#
# The archive is not compressed: the guest would have to decompress it, in kernel mode.
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
        echo "initramfs.cpio is not of these sources: run resources/guest/build-initramfs.sh" >&2
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
mkdir -p "$stage/bin" "$stage/dev" "$stage/mnt" "$stage/proc" "$stage/sys" "$stage/tmp"
install -m 0755 "$target_dir/$target/release/guest-agent" "$stage/init"
install -m 0755 /bin/busybox "$stage/bin/busybox"
ln -s busybox "$stage/bin/sh"
chmod 1777 "$stage/tmp"
chmod 0755 "$stage" "$stage/bin" "$stage/dev" "$stage/mnt" "$stage/proc" "$stage/sys"

# The same input gives the same bytes: sorted names, no times, owned by root. Device nodes are
# the kernel's business (devtmpfs).
find "$stage" -exec touch -h -d @0 {} +
(cd "$stage" && find . -mindepth 1 | sort | cpio --quiet --reproducible -o -H newc -R 0:0) \
    >initramfs.cpio
sources >initramfs.sources
sha256sum initramfs.cpio >initramfs.sha256
dpkg-query -W -f 'busybox-static ${Version}\n' busybox-static
ls -l initramfs.cpio
