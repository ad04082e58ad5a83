#!/bin/sh
# Makes the sample images of catalog.toml in DIR with qemu: disks/make.sh DIR
# Identities and times differ from run to run; the disks in the images do not.
set -eu

[ $# -eq 1 ] || { echo "usage: $0 DIR" >&2; exit 2; }
mkdir -p "$1"
cd "$1"

vhdx() { # NAME SIZE OPTIONS
    rm -f "$1"
    qemu-img create -q -f vhdx -o "$3" "$1" "$2"
}
put() { # NAME QEMU-IO-COMMAND...
    image=$1
    shift
    for command; do
        qemu-io -f vhdx -c "$command" "$image" > /dev/null
    done
}

# Small blocks, all in state ZERO where nothing was written.
vhdx dynamic-1m.vhdx 20M subformat=dynamic,block_size=1M
put dynamic-1m.vhdx 'write -P 0x11 0 64k' 'write -P 0x22 7M 2M' 'write -P 0x33 20967424 4k'

# Longer than a chunk: a bitmap entry stands between blocks 127 and 128.
vhdx dynamic-32m-5g.vhdx 5G subformat=dynamic,block_size=32M,block_state_zero=off
put dynamic-32m-5g.vhdx 'write -P 0x44 4294963200 8k'

# A fixed disk that takes no space until it is written; its last block is short.
vhdx fixed-2m.vhdx 5M subformat=fixed,block_size=2M
put fixed-2m.vhdx 'write -P 0x55 1M 3M'

# The disk's bytes and nothing else.
rm -f plain.raw
qemu-img create -q -f raw plain.raw 3M
qemu-io -f raw -c 'write -P 0x88 1M 12k' plain.raw > /dev/null
