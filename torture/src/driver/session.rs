//! One connection: the handshake in QEMU's order, and the in-flight region that outlives it.

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

use super::DriverError;
use super::device::{Geometry, feature};
use super::memory::GuestMemory;
use super::ring::Ring;

/// A server may be stopped in the middle of the handshake, and QEMU would wait. Longer than any pause we make.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);
/// The configuration space up to `write_zeroes_may_unmap`.
const CONFIG_BYTES: u32 = 60;

/// What a server needs to finish what its predecessor began. Made by the first server, kept by us.
pub struct Inflight {
    what: VhostUserInflight,
    file: File,
}

pub struct Session {
    /// Dropped, the connection closes.
    _vhost: Frontend,
    stream: UnixStream,
    pub features: u64,
    pub geometry: Geometry,
}

impl Session {
    pub fn connect(
        socket: &Path,
        memory: &GuestMemory,
        rings: &mut [Ring],
        inflight: &mut Option<Inflight>,
    ) -> Result<Self, DriverError> {
        let connecting = |source| DriverError::Connect { socket: socket.to_owned(), source };
        let stream = UnixStream::connect(socket).map_err(connecting)?;
        stream.set_read_timeout(Some(ANSWER_WITHIN)).map_err(connecting)?;
        stream.set_write_timeout(Some(ANSWER_WITHIN)).map_err(connecting)?;
        let watched = stream.try_clone().map_err(connecting)?;
        let mut vhost = Frontend::from_stream(stream, rings.len() as u64);
        let gone = |doing| move |source| DriverError::Gone { doing, source };

        let offered = vhost.get_features().map_err(gone("GET_FEATURES"))?;
        if offered & feature::PROTOCOL == 0 {
            return Err(DriverError::Lacks("VHOST_USER_F_PROTOCOL_FEATURES"));
        }
        let protocol = vhost.get_protocol_features().map_err(gone("GET_PROTOCOL_FEATURES"))?;
        let protocol = protocol
            & (VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::CONFIG
                | VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::INFLIGHT_SHMFD);
        vhost.set_protocol_features(protocol).map_err(gone("SET_PROTOCOL_FEATURES"))?;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            vhost.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        vhost.set_owner().map_err(gone("SET_OWNER"))?;
        let (_, config) = vhost
            .get_config(0, CONFIG_BYTES, VhostUserConfigFlags::empty(), &[0; CONFIG_BYTES as usize])
            .map_err(gone("GET_CONFIG"))?;
        let geometry = Geometry::parse(&config, offered);
        if usize::from(geometry.queues) < rings.len() {
            return Err(DriverError::Lacks("as many queues as asked for"));
        }

        if protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
            if inflight.is_none() {
                let queues = u16::try_from(rings.len()).expect("few queues");
                let asked = VhostUserInflight::new(0, 0, queues, rings[0].size);
                let (what, file) = vhost.get_inflight_fd(&asked).map_err(gone("GET_INFLIGHT_FD"))?;
                *inflight = Some(Inflight { what, file });
            }
            let kept = inflight.as_ref().expect("just made, or made before");
            vhost.set_inflight_fd(&kept.what, kept.file.as_raw_fd()).map_err(gone("SET_INFLIGHT_FD"))?;
        }
        let features = offered & feature::WANTED;
        vhost.set_features(features).map_err(gone("SET_FEATURES"))?;
        vhost.set_mem_table(&memory.regions()).map_err(gone("SET_MEM_TABLE"))?;
        for (index, ring) in rings.iter_mut().enumerate() {
            ring.set_event_idx(features & feature::EVENT_IDX != 0);
            // A kick from before is of no server any more; a new one is kicked at once, as QEMU does.
            ring.kick = eventfd()?;
            ring.kick.write(1).expect("a new eventfd");
            vhost.set_vring_num(index, ring.size).map_err(gone("SET_VRING_NUM"))?;
            vhost.set_vring_base(index, ring.used_index(memory)).map_err(gone("SET_VRING_BASE"))?;
            let places = VringConfigData {
                queue_max_size: ring.size,
                queue_size: ring.size,
                flags: 0,
                desc_table_addr: memory.front_end_address(ring.descriptors_at()),
                used_ring_addr: memory.front_end_address(ring.used_at()),
                avail_ring_addr: memory.front_end_address(ring.avail_at()),
                log_addr: None,
            };
            vhost.set_vring_addr(index, &places).map_err(gone("SET_VRING_ADDR"))?;
            vhost.set_vring_kick(index, &ring.kick).map_err(gone("SET_VRING_KICK"))?;
            vhost.set_vring_call(index, &ring.call).map_err(gone("SET_VRING_CALL"))?;
        }
        for index in 0..rings.len() {
            vhost.set_vring_enable(index, true).map_err(gone("SET_VRING_ENABLE"))?;
        }
        Ok(Self { _vhost: vhost, stream: watched, features, geometry })
    }

    pub fn stream(&self) -> BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.stream)
    }

    /// The server closed the connection, or died.
    pub fn is_gone(&self) -> bool {
        let mut polled = [PollFd::new(&self.stream, PollFlags::RDHUP)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let _ = poll(&mut polled, Some(&now));
        polled[0].revents().intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR)
    }
}

pub fn eventfd() -> Result<EventFd, DriverError> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(DriverError::Memory)
}
