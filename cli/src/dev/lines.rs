//! What to paste to give a volume of a dev cluster to a guest. The forms are those that QEMU 7.2,
//! cloud-hypervisor and libvirt take; guest memory must be shared in all of them.

use std::path::Path;

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
    /// opened, and on some machines (nested, filtered) it opens and no guest ever boots.
    pub fn new(volume: &str, socket: &Path) -> Self {
        let socket = socket.display().to_string();
        // QEMU ids begin with a letter and hold letters, digits, '-', '.' and '_': a volume's name after "vol-" fits.
        let id = format!("vol-{volume}");
        Self {
            qemu: format!(
                "qemu-system-x86_64 -M q35,accel=tcg,memory-backend=mem -cpu max -smp {QUEUES} -m {MEMORY_GIB}G \\\n  \
                 -object memory-backend-memfd,id=mem,size={MEMORY_GIB}G,share=on \\\n  \
                 -chardev socket,id={id},path={},reconnect=1 \\\n  \
                 -device vhost-user-blk-pci,chardev={id},num-queues={QUEUES},queue-size=256,bootindex=1",
                comma_doubled(&socket)
            ),
            cloud_hypervisor: format!(
                "cloud-hypervisor --kernel KERNEL --cpus boot={QUEUES} --memory size={}M,shared=on \\\n  \
                 --disk vhost_user=true,socket={socket},num_queues={QUEUES},queue_size=128,id={id}",
                MEMORY_GIB * 1024
            ),
            libvirt: format!(
                "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>\n\
                 <disk type='vhostuser' device='disk' snapshot='no'>\n  \
                 <driver name='qemu' type='raw' queues='{QUEUES}' queue_size='256'/>\n  \
                 <source type='unix' path='{}'><reconnect enabled='yes' timeout='10'/></source>\n  \
                 <target dev='vda' bus='virtio'/>\n\
                 </disk>",
                xml_escaped(&socket)
            ),
        }
    }

    pub fn words(&self) -> String {
        format!(
            "QEMU (from 9.2 on: reconnect-ms=1000 instead of reconnect=1; accel=kvm is many times faster, where it works):\n{}\n\n\
             cloud-hypervisor:\n{}\n\n\
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

fn xml_escaped(path: &str) -> String {
    path.replace('&', "&amp;").replace('\'', "&apos;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::Lines;

    #[test]
    fn guest_memory_is_shared_in_every_line() {
        let lines = Lines::new("disk", Path::new("/run/it's,here/disk.sock"));
        assert!(
            lines.qemu.contains("share=on")
                && lines.qemu.contains("path=/run/it's,,here/disk.sock,reconnect=1")
        );
        assert!(lines.qemu.contains("accel=tcg,"), "works with and without a KVM that works");
        assert!(lines.cloud_hypervisor.contains("shared=on"));
        assert!(
            lines.libvirt.contains("mode='shared'")
                && lines.libvirt.contains("path='/run/it&apos;s,here/disk.sock'")
        );
    }
}
