//! Which part of the work a sample belongs to.
//!
//! A sample in the kernel is named by what the process asked for and what that set off: any frame of the kernel's stack
//! decides, the first rule that knows one wins. A sample in a program is named by the function it was in, for stacks
//! there are seldom whole: our programs have no frame pointers. What the compiler inlined counts for the function it is
//! in, so the lines between crates are only nearly sharp.

use super::samples::{Frame, Sample};

/// In the order of the table.
pub const KERNEL: [(&str, &[&str]); 13] = [
    (
        "kernel: wake another thread",
        &["try_to_wake_up", "ttwu_", "wake_up_", "__wake_up", "ep_poll_callback"],
    ),
    ("kernel: sleep and switch", &["__schedule", "schedule", "finish_task_switch"]),
    (
        "kernel: TCP, the receiver's softirq",
        &["net_rx_action", "process_backlog", "tcp_v4_rcv", "tcp_v4_do_rcv", "__netif_receive_skb"],
    ),
    (
        "kernel: TCP send",
        &[
            "tcp_sendmsg",
            "__sys_sendto",
            "__sys_sendmsg",
            "___sys_sendmsg",
            "sock_write_iter",
            "tcp_write_xmit",
        ],
    ),
    (
        "kernel: TCP receive",
        &["tcp_recvmsg", "__sys_recvfrom", "__sys_recvmsg", "___sys_recvmsg", "sock_read_iter"],
    ),
    ("kernel: eventfd", &["eventfd_"]),
    ("kernel: epoll and poll", &["ep_", "do_epoll", "__x64_sys_epoll", "do_sys_poll", "__x64_sys_ppoll"]),
    ("kernel: futex", &["do_futex", "futex_", "__x64_sys_futex"]),
    (
        "kernel: file write and sync",
        &[
            "generic_perform_write",
            "shmem_file_write",
            "ext4_file_write",
            "iomap_",
            "blk_",
            "submit_bio",
            "io_write",
            "vfs_fsync",
            "do_pwritev",
            "vfs_write",
            "__x64_sys_pwrite64",
            "do_fsync",
        ],
    ),
    (
        "kernel: file read",
        &[
            "filemap_read",
            "shmem_file_read",
            "generic_file_read",
            "ext4_file_read",
            "io_read",
            "vfs_read",
            "do_preadv",
        ],
    ),
    ("kernel: io_uring", &["io_", "__do_sys_io_uring"]),
    ("kernel: page fault", &["asm_exc_page_fault", "exc_page_fault", "do_user_addr_fault"]),
    ("kernel: memory mapping", &["__x64_sys_madvise", "__x64_sys_munmap", "__x64_sys_mmap", "__x64_sys_brk"]),
];
const KERNEL_REST: &str = "kernel: system call entry, timers, rest";

const COPY: &str = "memcpy and the like";
const ALLOCATOR: &str = "allocator";
const CHECKSUM: &str = "checksums";
const LIBC: &str = "libc, other";
const CLOCK: &str = "clock (vdso)";
const STD: &str = "std";
const OTHER_CRATES: &str = "other crates";
const UNKNOWN: &str = "unknown";

/// Crates by what they are to us. Ours are told by their own name.
const CRATES: [(&str, &[&str]); 7] = [
    ("openraft", &["openraft", "openraft_rt", "openraft_rt_tokio", "base2histogram"]),
    (
        "tokio, mio, futures",
        &["tokio", "tokio_util", "tokio_stream", "mio", "futures_util", "futures_channel", "futures_core"],
    ),
    (CHECKSUM, &["crc_fast", "crc"]),
    ("RocksDB", &["rocksdb"]),
    (
        "gRPC",
        &["tonic", "tonic_prost", "hyper", "hyper_util", "h2", "tower", "http", "http_body_util", "prost"],
    ),
    ("bytes, smallvec", &["bytes", "smallvec"]),
    ("tracing", &["tracing", "tracing_core", "tracing_subscriber"]),
];
/// They stand for whoever uses them: the next crate in the name says who that is.
const NOBODYS: [&str; 4] = ["core", "alloc", "std", "hashbrown"];

pub fn category(sample: &Sample) -> String {
    match sample.frames.first() {
        None => UNKNOWN.to_owned(),
        Some(leaf) if leaf.in_kernel() => of_kernel(&sample.frames).to_owned(),
        Some(leaf) => of_program(leaf),
    }
}

fn of_kernel(frames: &[Frame]) -> &'static str {
    let in_kernel = || frames.iter().take_while(|frame| frame.in_kernel());
    let knows =
        |names: &[&str]| in_kernel().any(|frame| names.iter().any(|name| frame.symbol.starts_with(name)));
    KERNEL.iter().find(|(_, names)| knows(names)).map_or(KERNEL_REST, |(category, _)| category)
}

fn of_program(leaf: &Frame) -> String {
    let symbol = leaf.symbol.as_str();
    let has = |parts: &[&str]| parts.iter().any(|part| symbol.contains(part));
    let file = leaf.file.rsplit('/').next().unwrap_or_default();
    if file.contains("vdso") {
        return CLOCK.to_owned();
    }
    if file.starts_with("librocksdb") {
        return "RocksDB".to_owned();
    }
    if file.starts_with("libc.") || file.starts_with("libc-") {
        let category = if has(&["memcpy", "memmove", "memset", "memcmp"]) {
            COPY
        } else if has(&["malloc", "free", "realloc", "calloc", "unlink_chunk"]) {
            ALLOCATOR
        } else {
            LIBC
        };
        return category.to_owned();
    }
    if symbol == "[unknown]" {
        return UNKNOWN.to_owned();
    }
    match crates(symbol).find(|name| !NOBODYS.contains(name)) {
        None => STD.to_owned(),
        Some(name) if name.starts_with("evolute") || name == "vublk_bench" => format!("ours: {name}"),
        Some(name) => {
            let known = CRATES.iter().find(|(_, names)| names.contains(&name));
            known.map_or(OTHER_CRATES, |(category, _)| category).to_owned()
        }
    }
}

/// The crates a symbol names, in order: every word before a `::` that does not follow one.
fn crates(symbol: &str) -> impl Iterator<Item = &str> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    symbol.match_indices("::").filter_map(move |(at, _)| {
        let before = &symbol[..at];
        let word = &before[before.rfind(|c| !is_word(c)).map_or(0, |i| i + 1)..];
        let starts = before.len() - word.len();
        (!word.is_empty() && !before[..starts].ends_with("::")).then_some(word)
    })
}

#[cfg(test)]
mod tests {
    use super::{category, crates};
    use crate::profile::samples::{Frame, Sample};

    fn of(frames: &[(&str, &str)]) -> String {
        let frame =
            |(symbol, file): &(&str, &str)| Frame { symbol: (*symbol).to_owned(), file: (*file).to_owned() };
        category(&Sample { pid: 1, frames: frames.iter().map(frame).collect() })
    }

    #[test]
    fn a_sample_in_the_kernel_is_what_was_asked_for_and_what_that_set_off() {
        const K: &str = "[kernel.kallsyms]";
        let received =
            ["_raw_spin_unlock", "tcp_v4_rcv", "net_rx_action", "__tcp_transmit_skb", "tcp_sendmsg"];
        let chain: Vec<(&str, &str)> = received.iter().map(|name| (*name, K)).collect();
        assert_eq!(of(&chain), "kernel: TCP, the receiver's softirq");
        assert_eq!(of(&chain[3..]), "kernel: TCP send");
        let woken = [("try_to_wake_up", K), chain[1], chain[2], chain[4]];
        assert_eq!(of(&woken), "kernel: wake another thread");
        assert_eq!(of(&[("ep_send_events", K), ("do_epoll_wait", K)]), "kernel: epoll and poll");
        assert_eq!(of(&[("clear_bhb_loop", K), ("malloc", "/usr/lib/libc.so.6")]), super::KERNEL_REST);
    }

    #[test]
    fn a_sample_in_a_program_is_the_first_crate_that_is_somebodys() {
        const US: &str = "/target/release/evolute-chunkserver";
        for (symbol, file, wanted) in [
            ("tokio::runtime::task::raw::poll", US, "tokio, mio, futures"),
            ("<openraft::raft::Raft<C> as core::fmt::Debug>::fmt", US, "openraft"),
            ("core::ptr::drop_in_place<evolute_raft::log::Batch>", US, "ours: evolute_raft"),
            ("<T as core::convert::Into<U>>::into", US, "std"),
            ("crc_fast::arch::x86_64::update", US, "checksums"),
            ("serde_json::de::from_str", US, "other crates"),
            ("[unknown]", "[unknown]", "unknown"),
            ("__memmove_avx512_unaligned_erms", "/usr/lib/x86_64-linux-gnu/libc.so.6", "memcpy and the like"),
            ("cfree@GLIBC_2.2.5", "/usr/lib/x86_64-linux-gnu/libc.so.6", "allocator"),
            ("__send", "/usr/lib/x86_64-linux-gnu/libc.so.6", "libc, other"),
            ("__vdso_clock_gettime", "[vdso]", "clock (vdso)"),
        ] {
            assert_eq!(of(&[(symbol, file)]), wanted, "{symbol}");
        }
        assert_eq!(of(&[]), "unknown");
        let names: Vec<&str> = crates("<a::b<c::d> as e::f>::g::{{closure}}").collect();
        assert_eq!(names, ["a", "c", "e"]);
    }
}
