#!/usr/bin/env bash
# The guests' first user space: busybox, fio, mkfs and repair tools, our /init and agent, the kernel's few modules.
# Result: initramfs.cpio. Not compressed: QEMU copies it faster than an emulated CPU could unpack it.
. "$(dirname "$0")/common.sh"

tools="fio mke2fs e2fsck dumpe2fs mkfs.xfs xfs_repair blkdiscard"

# Puts a program and every shared library it is linked with into the tree, at the paths it has here.
install_program() {
    local root=$1 program=$2 file
    install -D -m 755 "$(readlink -f "$program")" "$root/usr/bin/$(basename "$program")"
    ldd "$program" | awk '$2 == "=>" && $3 ~ /^\// { print $3 } $1 ~ /^\// { print $1 }' | while read -r file; do
        [ -e "$root$file" ] || install -D -m 755 "$(readlink -f "$file")" "$root$file"
    done
}

build() {
    local out=$1 work=$2 kernel release tool path
    need busybox busybox-static fio fio mke2fs e2fsprogs mkfs.xfs xfsprogs blkdiscard util-linux cpio cpio depmod kmod
    kernel=$(folder_of kernel)
    release=$(cat "$kernel/release") || fail "the kernel comes first: make -C $here kernel"
    local root=$work/root
    mkdir -p "$root"/{bin,dev,etc,mnt,newroot,proc,run,sys,tmp,usr/bin}
    # Only the static busybox runs without libraries of its own.
    ldd "$(command -v busybox)" >/dev/null 2>&1 && fail "busybox here is not static: sudo apt-get install busybox-static"
    install -m 755 "$(command -v busybox)" "$root/bin/busybox"
    "$root/bin/busybox" --list | while read -r tool; do
        [ "$tool" = busybox ] || ln -s busybox "$root/bin/$tool"
    done
    for tool in $tools; do
        path=$(PATH=$PATH:/usr/sbin:/sbin command -v "$tool")
        say "initramfs: $path"
        install_program "$root" "$path"
    done
    # mke2fs is what mkfs.ext4 is; it takes its defaults from the name it is called by.
    ln -s mke2fs "$root/usr/bin/mkfs.ext4"
    cp /etc/mke2fs.conf "$root/etc/"
    mkdir -p "$root/lib/modules"
    cp -r "$kernel/modules/$release" "$root/lib/modules/"
    depmod -b "$root" "$release"
    install -m 755 "$here/guest/init" "$root/init"
    install -m 755 "$here/guest/agent" "$root/bin/agent"
    (cd "$root" && find . -print0 | sort -z | cpio --quiet --null --create --format=newc --owner=+0:+0) >"$out/initramfs.cpio"
}

make_result initramfs
