#!/bin/sh
# Makes the images of seeds/images anew: every kind that qemu-img can make, small. Clusters are of
# 512 bytes where the kind allows, so that a mutation of some hundred bytes hits tables.
set -eu
cd "$(dirname "$0")/../.."
cargo build --quiet --locked --package tardigrade-fuzz --bin seeds
seeds=$(cd "${CARGO_TARGET_DIR:-target}/debug" && pwd)/seeds
to=$(pwd)/fuzz/seeds/images
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
# Names of other files in images are without a directory.
cd "$dir"

create() { # name, size, options
    qemu-img create -q -f qcow2 -o "$3" "$1" "$2"
}
io() { # name, commands...
    name=$1
    shift
    for command in "$@"; do
        qemu-io -f qcow2 -c "$command" "$name" >/dev/null
    done
}
some_data() { # name
    io "$1" "write -P 1 0 3k" "write -P 2 40k 5k" "write -z 8k 4k" "discard 41k 1k"
}
pack() {
    for name in "$@"; do "$seeds" pack "$name" "$to/$name.zst"; done
}

for compat in 0.10 1.1; do
    create "empty-$compat" 64k "compat=$compat,cluster_size=512"
    create "data-$compat" 64k "compat=$compat,cluster_size=512"
    some_data "data-$compat"
    create "snapshots-$compat" 64k "compat=$compat,cluster_size=512"
    some_data "snapshots-$compat"
    qemu-img snapshot -c one "snapshots-$compat"
    io "snapshots-$compat" "write -P 3 1k 6k"
    qemu-img snapshot -c two "snapshots-$compat"
    io "snapshots-$compat" "write -P 4 50k 2k"
    pack "empty-$compat" "data-$compat" "snapshots-$compat"
done
for bits in 1 2 4 8 32 64; do
    create "refcounts-$bits" 64k "cluster_size=512,refcount_bits=$bits"
    some_data "refcounts-$bits"
    [ "$bits" = 1 ] || qemu-img snapshot -c one "refcounts-$bits"
    io "refcounts-$bits" "write -P 3 1k 2k" || true
    pack "refcounts-$bits"
done
for size in 4k 64k 2M; do
    create "clusters-$size" 8M "cluster_size=$size"
    io "clusters-$size" "write -P 1 0 1k" "write -P 2 5M 1k" "write -z 4M 2M"
    qemu-img snapshot -c one "clusters-$size"
    pack "clusters-$size"
done
create vmstate 64k cluster_size=4k
io vmstate "write -P 1 0 3k" "write -b -P 7 64k 9k"
qemu-img snapshot -c one "vmstate"
pack vmstate

# Compressed, with data that is worth it.
yes "some text that repeats" | head -c 48k >"text"
for type in zlib zstd; do
    for size in 512 4k 64k; do
        qemu-img convert -c -O qcow2 -o "compression_type=$type,cluster_size=$size" \
            "text" "compressed-$type-$size"
        pack "compressed-$type-$size"
    done
done

# Over a backing file, larger and smaller than it.
truncate -s 96k "base"
for size in 64k 128k; do
    create "overlay-$size" "$size" "cluster_size=512,backing_file=base,backing_fmt=raw"
    some_data "overlay-$size"
    pack "overlay-$size"
done

create preallocated 16k cluster_size=512,preallocation=metadata
create lazy 64k cluster_size=512,lazy_refcounts=on
some_data lazy
create extended 256k cluster_size=16k,extended_l2=on
io extended "write -P 1 0 3k" "write -P 2 40k 5k" "write -z 8k 4k" "discard 41k 1k"
qemu-img snapshot -c one "extended"
io extended "write -P 4 1k 1k"
create bitmaps 64k cluster_size=512
qemu-img bitmap --add "bitmaps" b0
qemu-img bitmap --add -g 1024 "bitmaps" b1
some_data bitmaps
qemu-img bitmap --disable "bitmaps" b1
create data-file 64k "cluster_size=512,data_file=raw,data_file_raw=on"
some_data data-file
create huge 10T cluster_size=64k
io huge "write -P 1 0 1k" "write -P 2 9T 1k"
qemu-img snapshot -c one "huge"
pack preallocated lazy extended bitmaps data-file huge

# Marked as not closed properly: lazy refcounts that were never written.
create dirty 64k cluster_size=512,lazy_refcounts=on
qemu-io -f qcow2 -c "write -P 1 0 3k" -c "sigraise 9" "dirty" >/dev/null 2>&1 || true
pack dirty
