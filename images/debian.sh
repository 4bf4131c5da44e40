#!/usr/bin/env bash
# A bootable Debian as people run it (systemd, udev, a login on the serial console), as a raw disk image.
# Result: debian.raw, sparse, one ext4 without a partition table: root=/dev/vda. Boot it with our kernel and initramfs.
. "$(dirname "$0")/common.sh"

suite=bookworm
image_mib=512

build() {
    local out=$1 work=$2
    need mmdebstrap mmdebstrap mke2fs e2fsprogs tar tar
    say "debian: building $suite with mmdebstrap (about a minute)"
    # `essential` plus a real init: what Debian needs to boot, without apt and its lists.
    mmdebstrap --quiet --variant=essential --include=systemd-sysv,udev,e2fsprogs,procps \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='force-unsafe-io' \
        --customize-hook="copy-in $here/guest/agent $here/guest/agent.service /tmp" \
        --customize-hook="sh $here/guest/customize-debian \"\$1\"" \
        "$suite" "$work/debian.tar" ${EVOLUTE_DEBIAN_MIRROR:+"$EVOLUTE_DEBIAN_MIRROR"} >&2 ||
        fail "mmdebstrap failed, see above. Without root it needs: sudo apt-get install uidmap, and user namespaces"
    say "debian: writing the ext4 image"
    # mke2fs takes owners and devices from the tree it copies; without root fakeroot remembers them.
    local as_root=()
    if [ "$(id -u)" != 0 ]; then
        need fakeroot fakeroot
        as_root=(fakeroot)
    fi
    truncate -s ${image_mib}M "$out/debian.raw"
    "${as_root[@]}" sh -euc 'export PATH=$PATH:/usr/sbin:/sbin
        mkdir "$1/tree" && tar -C "$1/tree" --numeric-owner -xf "$1/debian.tar"
        mke2fs -q -t ext4 -L debian -d "$1/tree" "$2"' sh "$work" "$out/debian.raw" >&2
}

make_result debian
