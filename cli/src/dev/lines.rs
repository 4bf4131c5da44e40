//! What to paste to give a volume of a dev cluster to a guest. The forms are those that QEMU 7.2,
//! cloud-hypervisor and libvirt take; guest memory must be shared in all of them.

use std::path::Path;

use evolute_daemon::shell::quoted;
use serde::Serialize;

/// As many queues as the guest has CPUs is what every hypervisor assumes.
const QUEUES: u32 = 2;
const MEMORY_GIB: u32 = 2;

/// How three hypervisors attach one socket.
#[derive(Debug, Clone, Serialize)]
pub struct Lines {
    pub qemu: String,
    pub cloud_hypervisor: String,
    pub libvirt: String,
}

impl Lines {
    /// The QEMU line takes the accelerator that works everywhere: `kvm:tcg` falls back only when /dev/kvm cannot be
    /// opened, and on some machines (nested, filtered) it opens and no guest ever boots. `number` counts the disks of the
    /// cluster from 0: several of them are pasted into one guest.
    pub fn new(number: usize, volume: &str, socket: &Path) -> Self {
        let socket = socket.display().to_string();
        // QEMU ids begin with a letter and hold letters, digits, '-', '.' and '_': a volume's name after "vol-" fits.
        let id = format!("vol-{volume}");
        Self {
            qemu: format!(
                "qemu-system-x86_64 -M q35,accel=tcg,memory-backend=mem -cpu max -smp {QUEUES} -m {MEMORY_GIB}G \\\n  \
                 -object memory-backend-memfd,id=mem,size={MEMORY_GIB}G,share=on \\\n  \
                 -chardev socket,id={id},path={},reconnect=1 \\\n  \
                 -device vhost-user-blk-pci,chardev={id},num-queues={QUEUES},queue-size=256,bootindex={}",
                quoted(&comma_doubled(&socket)),
                number + 1
            ),
            cloud_hypervisor: format!(
                "cloud-hypervisor --kernel KERNEL --cpus boot={QUEUES} --memory size={}M,shared=on \\\n  \
                 --disk vhost_user=true,socket={},num_queues={QUEUES},queue_size=128,id={id}",
                MEMORY_GIB * 1024,
                quoted(&socket)
            ),
            libvirt: format!(
                "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>\n\
                 <disk type='vhostuser' device='disk' snapshot='no'>\n  \
                 <driver name='qemu' type='raw' queues='{QUEUES}' queue_size='256'/>\n  \
                 <source type='unix' path='{}'><reconnect enabled='yes' timeout='1'/></source>\n  \
                 <target dev='{}' bus='virtio'/>\n\
                 </disk>",
                xml_escaped(&socket),
                device_name(number)
            ),
        }
    }

    pub fn words(&self) -> String {
        format!(
            "QEMU (from 9.2 on: reconnect-ms=1000 instead of reconnect=1; accel=kvm is many times faster, where it works):\n{}\n\n\
             cloud-hypervisor (it ignores readonly= and serial= here: give them to evolute-vhost; num_queues at most the boot CPUs; a \
             backend that is away for a minute ends the disk):\n{}\n\n\
             libvirt (memoryBacking under <domain>, disk under <devices>):\n{}",
            indented(&self.qemu),
            indented(&self.cloud_hypervisor),
            indented(&self.libvirt)
        )
    }
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
}

/// QEMU separates options by commas; one inside a value is written twice.
fn comma_doubled(path: &str) -> String {
    path.replace(',', ",,")
}

/// vda, …, vdz, vdaa, …
fn device_name(number: usize) -> String {
    let mut letters = Vec::new();
    let mut left = number + 1;
    while left > 0 {
        letters.push(char::from(b'a' + u8::try_from((left - 1) % 26).expect("a letter")));
        left = (left - 1) / 26;
    }
    format!("vd{}", letters.into_iter().rev().collect::<String>())
}

fn xml_escaped(path: &str) -> String {
    path.replace('&', "&amp;").replace('\'', "&apos;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::Lines;

    #[test]
    fn guest_memory_is_shared_in_every_line() {
        let lines = Lines::new(0, "disk", Path::new("/run/it's,here/disk.sock"));
        assert!(
            lines.qemu.contains("share=on")
                && lines.qemu.contains(r"path='/run/it'\''s,,here/disk.sock',reconnect=1")
        );
        assert!(lines.qemu.contains("accel=tcg,"), "works with and without a KVM that works");
        assert!(lines.cloud_hypervisor.contains("shared=on"));
        assert!(
            lines.libvirt.contains("mode='shared'")
                && lines.libvirt.contains("path='/run/it&apos;s,here/disk.sock'")
        );
    }

    #[test]
    fn several_disks_go_into_one_guest_and_a_backend_that_restarts_is_back_within_a_second() {
        let of = |number| Lines::new(number, "disk", Path::new("/run/a b/disk.sock"));
        for (number, name) in [(0, "vda"), (1, "vdb"), (25, "vdz"), (26, "vdaa"), (51, "vdaz"), (52, "vdba")]
        {
            let lines = of(number);
            assert!(lines.libvirt.contains(&format!("<target dev='{name}' ")), "{}", lines.libvirt);
            assert!(lines.qemu.ends_with(&format!("bootindex={}", number + 1)), "{}", lines.qemu);
            assert!(lines.libvirt.contains("<reconnect enabled='yes' timeout='1'/>"));
            assert!(
                lines.cloud_hypervisor.contains("socket='/run/a b/disk.sock',"),
                "{}",
                lines.cloud_hypervisor
            );
        }
    }
}
