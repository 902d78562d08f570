#!/bin/sh
# Builds tiny.bzImage, the kernel of the test and demo guest, from Debian's linux-source-6.1
# package, tiny.config and patches/. Takes a few minutes; the result is committed, so only a
# change of the configuration or the patch needs this.
#
# BUILD_DIR   where the source is unpacked and built (default: build/ beside this script)
# JOBS        parallel compiler jobs (default: the number of CPUs)
set -eu

here=$(cd "$(dirname "$0")" && pwd)
build=${BUILD_DIR:-$here/build}
jobs=${JOBS:-$(nproc)}

# The exact source of the committed kernel. A newer point release builds as well, but then
# README.md must name it.
source_package=linux-source-6.1
source_version=6.1.192-2
tools="bc bison cpio flex gcc kmod libc6-dev libelf-dev make patch xz-utils zstd"

install_what_is_missing() {
    missing=
    for package in $tools "$source_package"; do
        status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
        [ "$status" = installed ] || missing="$missing $package"
    done
    [ -n "$missing" ] || return 0
    if [ "$(id -u)" != 0 ]; then
        echo "build-kernel.sh: please install as root: apt-get install$missing" >&2
        exit 1
    fi
    apt-get update
    # Prefer the pinned source; when the archive has moved on, take its current one.
    case "$missing" in
    *"$source_package"*)
        apt-get install -y --no-install-recommends "$source_package=$source_version" ||
            apt-get install -y --no-install-recommends "$source_package"
        ;;
    esac
    # shellcheck disable=SC2086 # a list of package names
    apt-get install -y --no-install-recommends $tools
}

install_what_is_missing
have=$(dpkg-query -W -f '${Version}' "$source_package")
if [ "$have" != "$source_version" ]; then
    echo "build-kernel.sh: building from $source_package $have, not $source_version" >&2
fi

tree=$build/$source_package
rm -rf "$tree"
mkdir -p "$build"
tar -C "$build" -xf "/usr/src/$source_package.tar.xz"
for patch in "$here"/patches/*.patch; do
    patch -d "$tree" -p1 <"$patch"
done

# Nothing of the build machine or the moment ends up in the image.
export KBUILD_BUILD_USER=builder KBUILD_BUILD_HOST=guest KBUILD_BUILD_VERSION=1
export KBUILD_BUILD_TIMESTAMP='2026-01-01 00:00:00 UTC'
export LC_ALL=C TZ=UTC

cp "$here/tiny.config" "$tree/.config"
make -C "$tree" olddefconfig
make -C "$tree" -j "$jobs" bzImage
# Every option of tiny.config must have survived: one dropped by a changed dependency would
# otherwise go unnoticed.
while read -r line; do
    grep -qxF "$line" "$tree/.config" || {
        echo "build-kernel.sh: lost option: $line" >&2
        exit 1
    }
done <"$here/tiny.config"
install -m 0644 "$tree/arch/x86/boot/bzImage" "$here/tiny.bzImage"
cd "$here"
sha256sum build-kernel.sh patches/*.patch tiny.config >kernel.sources
sha256sum tiny.bzImage >kernel.sha256
ls -l "$here/tiny.bzImage"
