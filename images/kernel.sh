#!/usr/bin/env bash
# Debian's cloud kernel: the package downloaded and unpacked, never installed.
# Result: vmlinuz, release (its version), modules/ (the few the guests load, with what those depend on).
. "$(dirname "$0")/common.sh"

# The disk, the two file systems, and crc32c for both of them.
modules="virtio_pci virtio_blk ext4 xfs crc32c_generic crc32c_intel"

build() {
    local out=$1 work=$2 package release path
    need apt-get apt apt-cache apt dpkg-deb dpkg depmod kmod modprobe kmod
    package=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | awk '/Depends: linux-image-/ { print $2; exit }')
    [ -n "$package" ] || fail "apt knows no linux-image-cloud-amd64. Debian's package lists are needed: sudo apt-get update"
    say "kernel: downloading $package"
    (cd "$work" && apt-get -qq -o APT::Sandbox::User=root download "$package" >&2) ||
        fail "could not download $package. If its version is gone from the mirror: sudo apt-get update"
    say "kernel: unpacking it"
    dpkg-deb -x "$work/$package"_*.deb "$work/root"
    release=$(cd "$work/root/lib/modules" && echo *)
    depmod -b "$work/root" "$release"
    cp "$work/root/boot/vmlinuz-$release" "$out/vmlinuz"
    echo "$release" >"$out/release"
    # shellcheck disable=SC2086 # a list of words on purpose
    modprobe -d "$work/root" -S "$release" --show-depends --all $modules | awk '$1 == "insmod" { print $2 }' |
        sort -u | while read -r path; do
        install -D -m 644 "$path" "$out/modules/${path#"$work/root/lib/modules/"}"
    done
    cp "$work/root/lib/modules/$release"/modules.{order,builtin,builtin.modinfo} "$out/modules/$release/"
}

make_result kernel
