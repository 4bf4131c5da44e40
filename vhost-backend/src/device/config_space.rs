//! What we say about the disk before the first request: feature bits and virtio-blk's config space.
//!
//! Limits advertised here are the ones `request.rs` enforces; the guest's driver keeps to them, so a refusal for
//! length is for drivers that do not.

use evolute_protocol::geometry::{BLOCK_BYTES, KIB, MIB, REQUEST_BYTES_MAX, SECTOR_BYTES};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};

use super::DeviceConfig;
use crate::backing::Capacity;

/// Queues we may offer. QEMU asks for one per vCPU and refuses to start if we have fewer.
pub const QUEUES_MAX: u16 = 256;
/// Entries of one ring: virtio's own limit.
pub const QUEUE_SIZE_MAX: u16 = 32768;

/// Buffers of one request. With header and status it just fits a ring of 128, QEMU's default, so it also works
/// for a driver that does not use indirect descriptors.
pub const SEGMENTS_MAX: u32 = 126;
/// Longest of those buffers, so that the largest request stays inside `REQUEST_BYTES_MAX`.
pub const SEGMENT_BYTES_MAX: u32 = 8 << 10;
/// Ranges of one discard or write-zeroes request.
pub const RANGES_MAX: u32 = 16;
/// Longest range of a discard: sixteen chunks' worth of messages, each small.
pub const DISCARD_BYTES_MAX: u64 = 256 * MIB;
/// Longest range of a write-zeroes, which without unmap may have to be written out.
pub const WRITE_ZEROES_BYTES_MAX: u64 = 64 * MIB;
/// Readahead in a Linux guest becomes twice this. More helps streams and hurts everything else.
const OPTIMAL_IO_BYTES: u64 = 128 * KIB;
/// GET_ID answers this many bytes.
pub const SERIAL_BYTES: usize = 20;

const _: () = {
    assert!(SEGMENTS_MAX as u64 * SEGMENT_BYTES_MAX as u64 <= REQUEST_BYTES_MAX);
    // A Linux guest does not accept a smaller one than its page.
    assert!(SEGMENT_BYTES_MAX as u64 >= 4 * KIB);
    assert!(DISCARD_BYTES_MAX / SECTOR_BYTES <= u32::MAX as u64);
    assert!(WRITE_ZEROES_BYTES_MAX / SECTOR_BYTES <= u32::MAX as u64);
};

/// virtio feature bits, by the numbers of the specification.
pub mod feature {
    pub const SIZE_MAX: u64 = 1 << 1;
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const VERSION_1: u64 = 1 << 32;
    /// vhost's, not virtio's: the front end wants our writes marked in its log.
    pub const LOG_ALL: u64 = super::VhostUserVirtioFeatures::LOG_ALL.bits();
    /// vhost-user's: protocol features may be negotiated, and rings start disabled.
    pub const PROTOCOL_FEATURES: u64 = super::VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
}

/// What a front end may choose from.
pub fn features_offered(config: &DeviceConfig) -> u64 {
    let always = feature::SIZE_MAX
        | feature::SEG_MAX
        | feature::BLK_SIZE
        | feature::FLUSH
        | feature::TOPOLOGY
        | feature::CONFIG_WCE
        | feature::MQ
        | feature::INDIRECT_DESC
        | feature::EVENT_IDX
        | feature::VERSION_1
        | feature::LOG_ALL
        | feature::PROTOCOL_FEATURES;
    match config.read_only {
        true => always | feature::RO,
        false => always | feature::DISCARD | feature::WRITE_ZEROES,
    }
}

/// Not offered: STATUS (the vhost crate does not parse its messages), DEVICE_STATE (we have none beyond the rings),
/// GET_VRING_BASE_INFLIGHT (a disk moves between hosts by attaching, which drains). BACKEND_REQ is there for one message: that
/// the size is known now (`sizing.rs`).
pub fn protocol_features_offered() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::LOG_SHMFD
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
}

const CAPACITY_AT: usize = 0;
const SIZE_MAX_AT: usize = 8;
const SEG_MAX_AT: usize = 12;
const BLK_SIZE_AT: usize = 20;
const PHYSICAL_BLOCK_EXP_AT: usize = 24;
const MIN_IO_SIZE_AT: usize = 26;
const OPT_IO_SIZE_AT: usize = 28;
const WRITEBACK_AT: usize = 32;
const NUM_QUEUES_AT: usize = 34;
const MAX_DISCARD_SECTORS_AT: usize = 36;
const MAX_DISCARD_SEG_AT: usize = 40;
const DISCARD_SECTOR_ALIGNMENT_AT: usize = 44;
const MAX_WRITE_ZEROES_SECTORS_AT: usize = 48;
const MAX_WRITE_ZEROES_SEG_AT: usize = 52;
const WRITE_ZEROES_MAY_UNMAP_AT: usize = 56;
const CONFIG_BYTES: usize = 60;

/// cloud-hypervisor before v51 asks at this offset, where PCI keeps the device's part; the specification says 0.
const LEGACY_OFFSET: u32 = 0x100;

/// virtio-blk's config space.
#[derive(Debug)]
pub struct ConfigSpace {
    capacity: Capacity,
    bytes: [u8; CONFIG_BYTES],
}

impl ConfigSpace {
    pub fn new(config: &DeviceConfig) -> ConfigSpace {
        let mut space = ConfigSpace { capacity: config.capacity.clone(), bytes: [0; CONFIG_BYTES] };
        let block_sectors = BLOCK_BYTES / SECTOR_BYTES;
        space.put(SIZE_MAX_AT, &SEGMENT_BYTES_MAX.to_le_bytes());
        space.put(SEG_MAX_AT, &SEGMENTS_MAX.to_le_bytes());
        space.put(BLK_SIZE_AT, &u32::try_from(SECTOR_BYTES).expect("512").to_le_bytes());
        space.put(PHYSICAL_BLOCK_EXP_AT, &[u8::try_from(block_sectors.ilog2()).expect("3")]);
        space.put(MIN_IO_SIZE_AT, &u16::try_from(block_sectors).expect("8").to_le_bytes());
        space.put(OPT_IO_SIZE_AT, &sectors32(OPTIMAL_IO_BYTES).to_le_bytes());
        space.put(WRITEBACK_AT, &[1]);
        space.put(NUM_QUEUES_AT, &config.queues.to_le_bytes());
        if !config.read_only {
            space.put(MAX_DISCARD_SECTORS_AT, &sectors32(DISCARD_BYTES_MAX).to_le_bytes());
            space.put(MAX_DISCARD_SEG_AT, &RANGES_MAX.to_le_bytes());
            space.put(DISCARD_SECTOR_ALIGNMENT_AT, &sectors32(BLOCK_BYTES).to_le_bytes());
            space.put(MAX_WRITE_ZEROES_SECTORS_AT, &sectors32(WRITE_ZEROES_BYTES_MAX).to_le_bytes());
            space.put(MAX_WRITE_ZEROES_SEG_AT, &RANGES_MAX.to_le_bytes());
            space.put(WRITE_ZEROES_MAY_UNMAP_AT, &[1]);
        }
        space
    }

    fn put(&mut self, at: usize, value: &[u8]) {
        self.bytes[at..at + value.len()].copy_from_slice(value);
    }

    /// Any range, zeroes beyond what we know: front ends of all ages ask for structures of their own length.
    pub fn read(&self, offset: u32, len: u32) -> Vec<u8> {
        let offset = (if offset >= LEGACY_OFFSET { offset - LEGACY_OFFSET } else { offset }) as usize;
        let sectors = self.capacity.get().unwrap_or(0) / SECTOR_BYTES;
        let mut bytes = self.bytes;
        bytes[CAPACITY_AT..SIZE_MAX_AT].copy_from_slice(&sectors.to_le_bytes());
        (offset..offset + len as usize).map(|at| bytes.get(at).copied().unwrap_or(0)).collect()
    }

    /// Only the write-cache byte is the guest's to change, and it changes nothing: an acked write is durable in
    /// either mode. False: refused.
    pub fn write(&mut self, offset: u32, value: &[u8]) -> bool {
        let offset = if offset >= LEGACY_OFFSET { offset - LEGACY_OFFSET } else { offset } as usize;
        match (offset, value) {
            (WRITEBACK_AT, [mode @ (0 | 1)]) => {
                self.bytes[WRITEBACK_AT] = *mode;
                true
            }
            _ => false,
        }
    }
}

/// A constant of this module in sectors.
fn sectors32(bytes: u64) -> u32 {
    u32::try_from(bytes / SECTOR_BYTES).expect("asserted above")
}
