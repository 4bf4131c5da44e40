//! One front end's session: every vhost-user message and what it does.
//!
//! The socket thread runs this. It collects what the front end says about memory and rings, and hands a ring over to the
//! I/O thread once it is complete (its kick descriptor comes last); from then on it only asks.
//!
//! What always holds:
//!
//! - No message waits for the network. Only stopping a ring, pausing it, and taking memory away wait at all, for what is
//!   out, and that for a bounded time (`queues.rs`). When they are acknowledged, nothing is out.
//! - A running ring's size, addresses and base do not change. A front end that tries is refused; repeating the same
//!   addresses is not a change (QEMU does so to switch dirty logging on).
//! - A refused message changes nothing.
//!
//! Over the `vhost` crate's messages, but not its daemon, which has no in-flight region and answers GET_VRING_BASE
//! before the ring is drained. The crate does not parse SET_STATUS / GET_STATUS; we do not offer STATUS.

use std::fs::File;
use std::io;
use std::sync::Arc;

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use super::DeviceConfig;
use super::callers::Peer;
use super::command::{Command, Commands, IoThreadGone};
use super::config_space::{
    ConfigSpace, QUEUE_SIZE_MAX, feature, features_offered, protocol_features_offered,
};
use super::event::Event;
use super::inflight::InflightRegion;
use super::lifeline::Lifeline;
use super::memory::{DirtyLog, MEMORY_SLOTS_MAX, MemoryTable};
use super::queues::Setup;
use super::ring::Layout;

/// What the front end said about one ring so far.
#[derive(Debug, Default)]
struct RingConfig {
    size: u16,
    /// Descriptor table, avail ring, used ring, in the front end's own addresses.
    addresses: Option<(u64, u64, u64)>,
    base: u16,
    kick: Option<Event>,
    call: Option<Event>,
    enabled: bool,
    running: bool,
}

/// See the module.
pub struct Session {
    offered: u64,
    queues: u16,
    config_space: ConfigSpace,
    commands: Commands,
    line: Arc<Lifeline>,
    features: u64,
    protocol_features: u64,
    memory: MemoryTable,
    /// Made as the front end names them: 256 are offered, few are used.
    rings: Vec<RingConfig>,
    inflight: Option<Arc<InflightRegion>>,
    log: Option<Arc<DirtyLog>>,
}

/// The front end asked for something we do not do, or not now.
fn refuse(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::ReqHandlerError(io::Error::new(io::ErrorKind::InvalidInput, why))
}

fn gone(why: IoThreadGone) -> Error {
    Error::ReqHandlerError(io::Error::new(io::ErrorKind::BrokenPipe, why))
}

impl Session {
    pub fn new(config: &DeviceConfig, commands: Commands, front_end: Peer, line: Arc<Lifeline>) -> Session {
        Session {
            offered: features_offered(config),
            queues: config.queues,
            config_space: ConfigSpace::new(config),
            commands,
            line: line.clone(),
            features: 0,
            protocol_features: 0,
            memory: MemoryTable::new(config.require_sealed_memory, front_end, line),
            rings: Vec::new(),
            inflight: None,
            log: None,
        }
    }

    /// Whether the front end hears of a refusal. Where it does not, the only honest answer is to hang up.
    pub fn acknowledges(&self) -> bool {
        self.protocol_features & VhostUserProtocolFeatures::REPLY_ACK.bits() != 0
    }

    /// A ring is to run, and the front end has given no memory for it: QEMU gives none that it cannot share, and goes on.
    pub fn lacks_memory(&self) -> bool {
        let always_enabled = self.features & feature::PROTOCOL_FEATURES == 0;
        let is_to_run = |ring: &RingConfig| {
            ring.addresses.is_some() && ring.kick.is_some() && (ring.enabled || always_enabled)
        };
        self.memory.is_empty() && self.rings.iter().any(is_to_run)
    }

    fn ring(&mut self, index: u32) -> Result<(u16, &mut RingConfig)> {
        let index = u16::try_from(index).ok().filter(|index| *index < self.queues);
        let index = index.ok_or_else(|| refuse("no such ring"))?;
        let at = usize::from(index);
        if self.rings.len() <= at {
            self.rings.resize_with(at + 1, RingConfig::default);
        }
        Ok((index, &mut self.rings[at]))
    }

    fn stopped_ring(&mut self, index: u32) -> Result<(u16, &mut RingConfig)> {
        match self.ring(index)? {
            (_, ring) if ring.running => Err(refuse("the ring is running")),
            found => Ok(found),
        }
    }

    fn any_running(&self) -> bool {
        self.rings.iter().any(|ring| ring.running)
    }

    fn logging(&self) -> Option<Arc<DirtyLog>> {
        self.log.clone().filter(|_| self.features & feature::LOG_ALL != 0)
    }

    /// Hands the ring to the I/O thread if nothing is missing.
    fn start_if_complete(&mut self, index: u16) -> Result<()> {
        let ring = &self.rings[usize::from(index)];
        let (false, Some((descriptors, avail, used)), Some(_)) = (ring.running, ring.addresses, &ring.kick)
        else {
            return Ok(());
        };
        if ring.size == 0 || self.memory.is_empty() {
            return Ok(());
        }
        let to_guest =
            |addr| self.memory.to_guest(addr).ok_or_else(|| refuse("the ring is not in guest memory"));
        let layout = Layout {
            size: ring.size,
            descriptors: to_guest(descriptors)?,
            avail: to_guest(avail)?,
            used: to_guest(used)?,
        };
        // Without protocol features there is no message to enable a ring: it starts enabled.
        let enabled = ring.enabled || self.features & feature::PROTOCOL_FEATURES == 0;
        let memory = self.memory.snapshot();
        let (event_idx, inflight) = (self.features & feature::EVENT_IDX != 0, self.inflight.clone());
        let ring = &mut self.rings[usize::from(index)];
        let setup = Box::new(Setup {
            layout,
            base: ring.base,
            event_idx,
            enabled,
            call: ring.call.take(),
            memory,
            inflight,
            line: self.line.clone(),
        });
        let kick = ring.kick.take().expect("looked above");
        self.commands
            .ask(|reply| Command::Start { index, setup, kick, reply })
            .map_err(gone)?
            .map_err(refuse)?;
        self.rings[usize::from(index)].running = true;
        Ok(())
    }

    /// The table changed: running rings follow before the front end goes on.
    fn tell_memory(&self, takes_away: bool) -> Result<()> {
        if self.any_running() {
            let memory = self.memory.snapshot();
            self.commands.ask(|reply| Command::Memory { memory, takes_away, reply }).map_err(gone)?;
        }
        Ok(())
    }

    fn tell_log(&self) -> Result<()> {
        let log = self.logging();
        self.commands.ask(|reply| Command::Log { log, reply }).map_err(gone)
    }

    /// The front end left or starts anew: all rings end, nothing of its memory stays mapped.
    pub fn end(&mut self) -> std::result::Result<(), IoThreadGone> {
        self.commands.ask(|reply| Command::Abandon { reply })?;
        self.rings.clear();
        self.inflight = None;
        self.log = None;
        Ok(())
    }
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    /// Deprecated by the specification, which lets back ends ignore it: front ends meant different things.
    fn reset_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        let inflight = self.inflight.take();
        self.end().map_err(gone)?;
        // After the rings: what they had in flight belongs to a life that is over.
        if let Some(region) = inflight {
            region.forget();
        }
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offered)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.offered != 0 {
            return Err(refuse("features we did not offer"));
        }
        if self.any_running() && (features ^ self.features) & !feature::LOG_ALL != 0 {
            return Err(refuse("features cannot change while rings run"));
        }
        let logged = self.features & feature::LOG_ALL;
        self.features = features;
        if features & feature::LOG_ALL != logged {
            self.tell_log()?;
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let takes_away = self.memory.replace(regions, files).map_err(refuse)?;
        self.tell_memory(takes_away)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num).ok().filter(|size| *size <= QUEUE_SIZE_MAX && size.is_power_of_two());
        let size = size.ok_or_else(|| refuse("a ring's size is a power of two up to 32768"))?;
        self.stopped_ring(index)?.1.size = size;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        // The flag and the address for logging say what we know: the used ring is logged where it is.
        let addresses = Some((descriptor, available, used));
        let (_, ring) = self.ring(index)?;
        if ring.running && ring.addresses != addresses {
            return Err(refuse("the ring is running"));
        }
        ring.addresses = addresses;
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| refuse("an index has 16 bits"))?;
        self.stopped_ring(index)?.1.base = base;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let (queue, ring) = self.ring(index)?;
        if ring.running {
            let base = self.commands.ask(|reply| Command::Stop { index: queue, reply }).map_err(gone)?;
            let (_, ring) = self.ring(index)?;
            ring.base = base;
            ring.running = false;
        }
        let (_, ring) = self.ring(index)?;
        // It starts again with a new kick.
        ring.kick = None;
        ring.call = None;
        Ok(VhostUserVringState::new(index, ring.base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, kick: Option<File>) -> Result<()> {
        let kick = kick.ok_or_else(|| refuse("a ring without kicks would have to be polled"))?;
        let kick = Event::new(kick).map_err(refuse)?;
        let (index, ring) = self.ring(index.into())?;
        if ring.running {
            return self
                .commands
                .ask(|reply| Command::Kick { index, kick, reply })
                .map_err(gone)?
                .map_err(refuse);
        }
        ring.kick = Some(kick);
        self.start_if_complete(index)
    }

    fn set_vring_call(&mut self, index: u8, call: Option<File>) -> Result<()> {
        let call = call.map(Event::with_room).transpose().map_err(refuse)?;
        let (index, ring) = self.ring(index.into())?;
        if ring.running {
            return self.commands.tell(Command::Call { index, call }).map_err(gone);
        }
        ring.call = call;
        Ok(())
    }

    /// We have nothing to say there: a broken ring shows in our traces.
    fn set_vring_err(&mut self, index: u8, err: Option<File>) -> Result<()> {
        err.map(Event::new).transpose().map_err(refuse)?;
        self.ring(index.into()).map(|_| ())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(protocol_features_offered())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let offered = protocol_features_offered() | VhostUserProtocolFeatures::REPLY_ACK;
        if features & !offered.bits() != 0 {
            return Err(refuse("protocol features we did not offer"));
        }
        self.protocol_features = features;
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.queues.into())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let (index, ring) = self.ring(index)?;
        ring.enabled = enable;
        if ring.running {
            // What we acknowledge is so: a front end goes on to what a ring that still takes must not see. To
            // cloud-hypervisor the acknowledgement is all of a pause: it takes a snapshot next.
            let asked = match enable {
                true => self.commands.ask(|reply| Command::Enable { index, reply }),
                false => self.commands.ask(|reply| Command::Pause { index, reply }),
            };
            return asked.map_err(gone);
        }
        self.start_if_complete(index)
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        Ok(self.config_space.read(offset, size))
    }

    fn set_config(&mut self, offset: u32, value: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        match self.config_space.write(offset, value) {
            true => Ok(()),
            false => Err(refuse("only the write-cache byte may be written")),
        }
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Result<()> {
        Err(refuse("a disk has no display"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(refuse("a disk shares no objects"))
    }

    fn get_inflight_fd(&mut self, wanted: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let (queues, queue_size) = (wanted.num_queues, wanted.queue_size);
        if queues > self.queues || queue_size > QUEUE_SIZE_MAX {
            return Err(refuse("more queues or longer rings than we offer"));
        }
        let (file, len) = InflightRegion::create(queues, queue_size).map_err(refuse)?;
        Ok((VhostUserInflight::new(len, 0, queues, queue_size), file))
    }

    fn set_inflight_fd(&mut self, given: &VhostUserInflight, file: File) -> Result<()> {
        if self.any_running() {
            return Err(refuse("the region cannot change while rings run"));
        }
        if given.num_queues > self.queues || given.queue_size > QUEUE_SIZE_MAX {
            return Err(refuse("more queues or longer rings than we offer"));
        }
        let region = InflightRegion::map(
            file,
            given.mmap_offset,
            given.mmap_size,
            given.num_queues,
            given.queue_size,
            &self.line,
        )
        .map_err(refuse)?;
        let region = Arc::new(region);
        self.commands.tell(Command::Inflight(region.clone())).map_err(gone)?;
        self.inflight = Some(region);
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MEMORY_SLOTS_MAX as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<u64>> {
        self.memory.add(region, file).map_err(refuse)?;
        self.tell_memory(false)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.memory.remove(region).map_err(refuse)?;
        self.tell_memory(true)
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        Err(refuse("a disk has no state beyond its rings"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(refuse("a disk has no state beyond its rings"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(refuse("a disk has no shared memory regions"))
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        let log = DirtyLog::map(file, log.mmap_offset, log.mmap_size, &self.line).map_err(refuse)?;
        self.log = Some(Arc::new(log));
        match self.features & feature::LOG_ALL {
            0 => Ok(()),
            _ => self.tell_log(),
        }
    }
}
