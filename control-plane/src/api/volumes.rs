//! Volumes: create, list, show, delete, attach, detach, segments, the map, imports.

use std::collections::BTreeMap;
use std::time::Instant;

use evolute_protocol::geometry::{CHUNKS_PER_SEGMENT, SEGMENT_BYTES};
use evolute_protocol::id::{CopysetId, SegmentIndex, VolumeId};
use evolute_protocol::rpc::volumes_server;
use evolute_protocol::rpc::{
    AbandonImportRequest, AbandonImportResponse, AllocateSegmentRequest, AttachRequest, AttachResponse,
    Attachment, BeginImportRequest, CopysetRoute, CreateVolumeRequest, DeleteVolumeRequest,
    DeleteVolumeResponse, DetachRequest, DetachResponse, ErrorWord, FinishImportRequest,
    FinishImportResponse, ListVolumesRequest, ListVolumesResponse, MapRequest, ReplicaRoute, Segment,
    ShowVolumeRequest, Volume, VolumeMap,
};
use sha2::{Digest, Sha256};
use tonic::{Request, Response, Status};

use super::{Volumes, invalid, unexpected};
use crate::heartbeat::group::Group;
use crate::heartbeat::reports::Reports;
use crate::heartbeat::room;
use crate::mds::{Mds, unix_ms};
use crate::placement::room::best;
use crate::placement::segment;
use crate::placement::volume::{Candidate, choose};
use crate::state::command::{
    AbandonImport, AllocateSegment, Attach, BeginImport, CreateVolume, DeleteVolume, Detach, FinishImport,
};
use crate::state::reign::FORGOTTEN_HOLDER;
use crate::state::volume::{WIDTH_MAX, check_holder, check_name, check_size, no_volume_named};
use crate::state::{self, Command, Copyset, Done, State};

#[tonic::async_trait]
impl volumes_server::Volumes for Volumes {
    async fn create(&self, request: Request<CreateVolumeRequest>) -> Result<Response<Volume>, Status> {
        let (mds, request) = (&self.0, request.into_inner());
        check_name(&request.name).and_then(|()| check_size(request.size_bytes)).map_err(invalid)?;
        let command = CreateVolume {
            name: request.name,
            size_bytes: request.size_bytes,
            copysets: place(mds, request.width).await?,
            at_unix_ms: unix_ms(),
        };
        match mds.carry_out(Command::CreateVolume(command)).await? {
            Done::Created { volume } => Ok(Response::new(show(mds, volume).await?)),
            other => Err(unexpected(&other)),
        }
    }

    async fn list(&self, _: Request<ListVolumesRequest>) -> Result<Response<ListVolumesResponse>, Status> {
        let mds = &self.0;
        let volumes = mds.replicated.read(|state| all(state, &mds.reports(), Instant::now())).await?;
        Ok(Response::new(ListVolumesResponse { volumes }))
    }

    async fn show(&self, request: Request<ShowVolumeRequest>) -> Result<Response<Volume>, Status> {
        let (mds, name) = (&self.0, request.into_inner().name);
        let found = mds.replicated.read(|state| state.volume_named(&name).map(|(id, _)| id)).await?;
        let id = found.ok_or_else(|| ErrorWord::NotFound.status(no_volume_named(&name)))?;
        Ok(Response::new(show(mds, id).await?))
    }

    async fn delete(
        &self,
        request: Request<DeleteVolumeRequest>,
    ) -> Result<Response<DeleteVolumeResponse>, Status> {
        let DeleteVolumeRequest { name, force } = request.into_inner();
        check_name(&name).map_err(|_| ErrorWord::NotFound.status(no_volume_named(&name)))?;
        self.0.may_give().await?;
        self.0.carry_out(Command::DeleteVolume(DeleteVolume { name, force })).await?;
        Ok(Response::new(DeleteVolumeResponse {}))
    }

    async fn attach(&self, request: Request<AttachRequest>) -> Result<Response<AttachResponse>, Status> {
        let (mds, request) = (&self.0, request.into_inner());
        let AttachRequest { name, holder, takeover, secret, former_secret } = request;
        check_name(&name).map_err(|_| ErrorWord::NotFound.status(no_volume_named(&name)))?;
        check_holder(&holder).map_err(invalid)?;
        let (secret_hash, former_secret_hash) = (secret_hash(&secret)?, secret_hash(&former_secret)?);
        mds.may_give().await?;
        let unknown = mds.replicated.read(|state| {
            let attached = state.volume_named(&name)?.1.attached.as_ref()?;
            Some(state.is_put_back() && attached.holder == FORGOTTEN_HOLDER)
        });
        if unknown.await? == Some(true) && !takeover {
            return Err(ErrorWord::MdsPutBack.status(format!(
                "somebody attached {name} before this MDS was put back from an older copy, and may have it still: nobody \
                 else gets it unasked before: evolute cluster accept-mds"
            )));
        }
        let command =
            Attach { name, holder, takeover, at_unix_ms: unix_ms(), secret_hash, former_secret_hash };
        let (id, attachment) = match mds.carry_out(Command::Attach(command)).await? {
            Done::Attached { volume, attachment } => (volume, attachment),
            other => return Err(unexpected(&other)),
        };
        let volume = show(mds, id).await?;
        Ok(Response::new(AttachResponse { volume: Some(volume), attachment, map: Some(map(mds, id).await?) }))
    }

    async fn detach(&self, request: Request<DetachRequest>) -> Result<Response<DetachResponse>, Status> {
        let DetachRequest { volume_id, attachment } = request.into_inner();
        self.0.carry_out(Command::Detach(Detach { volume: volume_id, attachment })).await?;
        Ok(Response::new(DetachResponse {}))
    }

    async fn allocate_segment(
        &self,
        request: Request<AllocateSegmentRequest>,
    ) -> Result<Response<Segment>, Status> {
        let (mds, request) = (&self.0, request.into_inner());
        let (id, index) = (VolumeId(request.volume_id), SegmentIndex(request.segment));
        mds.may_give().await?;
        let placed = mds
            .replicated
            .read(|state| place_segment(state, &mds.reports(), id, request.attachment, index, Instant::now()))
            .await??;
        let chunk_copysets = match placed {
            Placed::Already(chunk_copysets) => chunk_copysets,
            Placed::Now(chunk_copysets) => {
                let command = AllocateSegment {
                    volume: id.0,
                    attachment: request.attachment,
                    segment: index.0,
                    chunk_copysets: numbers(&chunk_copysets),
                };
                match mds.carry_out(Command::AllocateSegment(command)).await? {
                    Done::Segment { chunk_copysets } => chunk_copysets,
                    other => return Err(unexpected(&other)),
                }
            }
        };
        Ok(Response::new(Segment { index: index.0, chunk_copysets: numbers(&chunk_copysets) }))
    }

    async fn map(&self, request: Request<MapRequest>) -> Result<Response<VolumeMap>, Status> {
        let (mds, id) = (&self.0, VolumeId(request.into_inner().volume_id));
        let known = mds.replicated.read(|state| state.volumes().contains_key(&id)).await?;
        if !known {
            // It may only be forgotten: whoever holds it must not take it for deleted.
            mds.may_give().await?;
        }
        Ok(Response::new(map(mds, id).await?))
    }

    async fn begin_import(&self, request: Request<BeginImportRequest>) -> Result<Response<Volume>, Status> {
        let (mds, request) = (&self.0, request.into_inner());
        check_name(&request.name).and_then(|()| check_holder(&request.by)).map_err(invalid)?;
        mds.may_give().await?;
        let copysets = match request.existing {
            true => Vec::new(),
            false => {
                check_size(request.size_bytes).map_err(invalid)?;
                place(mds, request.width).await?
            }
        };
        let command = BeginImport {
            name: request.name.clone(),
            size_bytes: request.size_bytes,
            copysets,
            existing: request.existing,
            by: request.by,
            at_unix_ms: unix_ms(),
        };
        match mds.carry_out(Command::BeginImport(command)).await? {
            Done::Created { volume } => Ok(Response::new(show(mds, volume).await?)),
            Done::Plain => self.show(Request::new(ShowVolumeRequest { name: request.name })).await,
            other => Err(unexpected(&other)),
        }
    }

    async fn finish_import(
        &self,
        request: Request<FinishImportRequest>,
    ) -> Result<Response<FinishImportResponse>, Status> {
        let FinishImportRequest { volume_id, attachment, used_bytes } = request.into_inner();
        self.0.carry_out(Command::FinishImport(FinishImport { volume: volume_id, attachment })).await?;
        self.0.reports().imported(VolumeId(volume_id), used_bytes, Instant::now());
        Ok(Response::new(FinishImportResponse {}))
    }

    async fn abandon_import(
        &self,
        request: Request<AbandonImportRequest>,
    ) -> Result<Response<AbandonImportResponse>, Status> {
        let AbandonImportRequest { volume_id, by } = request.into_inner();
        self.0.may_give().await?;
        self.0.carry_out(Command::AbandonImport(AbandonImport { volume: volume_id, by })).await?;
        Ok(Response::new(AbandonImportResponse {}))
    }
}

/// The copysets of a new volume; a width of 0 leaves it to us.
async fn place(mds: &Mds, width: u32) -> Result<Vec<u32>, Status> {
    let width = match width {
        0 => mds.limits.volume_width,
        width if width <= WIDTH_MAX => width as usize,
        width => {
            return Err(invalid(format!("a volume spreads over 1 to {WIDTH_MAX} copysets, not {width}")));
        }
    };
    mds.may_give().await?;
    let copysets =
        mds.replicated.read(|state| place_volume(state, &mds.reports(), width, Instant::now())).await??;
    Ok(numbers(&copysets))
}

fn numbers(copysets: &[CopysetId]) -> Vec<u32> {
    copysets.iter().map(|id| id.0).collect()
}

const SECRET_BYTES: usize = 32;

/// What is kept of a holder's secret: enough to know it again.
fn secret_hash(secret: &[u8]) -> Result<Vec<u8>, Status> {
    match secret.len() {
        0 => Ok(Vec::new()),
        SECRET_BYTES => Ok(Sha256::digest(secret).to_vec()),
        other => Err(invalid(format!("a holder's secret has {SECRET_BYTES} bytes, not {other}"))),
    }
}

async fn show(mds: &Mds, id: VolumeId) -> Result<Volume, Status> {
    mds.replicated
        .read(|state| match state.volumes().get(&id) {
            Some(volume) => {
                let used = used_bytes(state, &mds.reports(), Instant::now());
                Ok(describe(id, volume, used.get(&id).copied()))
            }
            None => Err(ErrorWord::NotFound.status(state.no_volume(id))),
        })
        .await?
}

async fn map(mds: &Mds, id: VolumeId) -> Result<VolumeMap, Status> {
    let cluster = mds.replicated.cluster();
    mds.replicated
        .read(|state| {
            let Some(volume) = state.volumes().get(&id) else {
                return Err(ErrorWord::NotFound.status(state.no_volume(id)));
            };
            let (reports, now) = (mds.reports(), Instant::now());
            let segments = volume.segments.iter();
            let route = |&id: &CopysetId| Some(route(id, state.copysets().get(&id)?, state, &reports, now));
            Ok(VolumeMap {
                segments: segments
                    .map(|(index, chunks)| Segment { index: index.0, chunk_copysets: numbers(chunks) })
                    .collect(),
                copysets: volume.copysets.iter().filter_map(route).collect(),
                cluster_id: cluster.0.to_vec(),
            })
        })
        .await?
}

fn route(id: CopysetId, copyset: &Copyset, state: &State, reports: &Reports, now: Instant) -> CopysetRoute {
    let replica = |replica: &state::Replica| ReplicaRoute {
        replica: replica.id.0,
        chunkserver: replica.chunkserver.0,
        address: state
            .chunkservers()
            .get(&replica.chunkserver)
            .map(|c| c.address.clone())
            .unwrap_or_default(),
    };
    let members = copyset.everyone().map(|replica| replica.chunkserver);
    // Both while one replica takes another one's place: the new one may lead before this state has heard that it is a
    // member. Not before the group knows it: it would only be asked in vain.
    let joined = |replica: &&state::Replica| {
        let known = copyset.replica(replica.id).is_some();
        known || Group::of(id, copyset, reports, now).is_some_and(|group| group.member(replica.id).is_some())
    };
    let mut replicas: Vec<ReplicaRoute> = copyset.everyone().filter(joined).map(replica).collect();
    // Replaced in its own place: one address.
    replicas.sort_by_key(|replica| (replica.chunkserver, replica.replica));
    replicas.dedup_by_key(|replica| replica.chunkserver);
    CopysetRoute {
        copyset: id.0,
        replicas,
        leader_chunkserver: reports.leader(id, members, now).map_or(0, |leader| leader.chunkserver.0),
    }
}

/// All volumes as the API shows them, by name.
pub(super) fn all(state: &State, reports: &Reports, now: Instant) -> Vec<Volume> {
    let used = used_bytes(state, reports, now);
    let describe = |(id, volume)| describe(id, volume, used.get(&id).copied());
    state.volumes_by_name().map(describe).collect()
}

fn describe(id: VolumeId, volume: &state::Volume, used_bytes: Option<u64>) -> Volume {
    Volume {
        id: id.0,
        name: volume.name.clone(),
        size_bytes: volume.size_bytes,
        allocated_bytes: volume.segments.len() as u64 * SEGMENT_BYTES,
        width: u32::try_from(volume.copysets.len()).unwrap_or(u32::MAX),
        copysets: numbers(&volume.copysets),
        attachment: volume.attachment,
        attached: volume.attached.as_ref().map(|attached| Attachment {
            holder: attached.holder.clone(),
            since_unix_ms: attached.since_unix_ms,
        }),
        created_unix_ms: volume.created_unix_ms,
        used_bytes: used_bytes.unwrap_or(0),
        used_unknown: used_bytes.is_none(),
        importing: volume.importing.as_ref().map(|importing| Attachment {
            holder: importing.by.clone(),
            since_unix_ms: importing.since_unix_ms,
        }),
    }
}

/// Written bytes per volume: for each copyset what its leader says, or whoever said something when nobody leads. Without
/// those of which a part is not known, as after a start of this MDS.
fn used_bytes(state: &State, reports: &Reports, now: Instant) -> BTreeMap<VolumeId, u64> {
    let mut best: BTreeMap<(VolumeId, CopysetId), (u64, u64)> = BTreeMap::new();
    for &id in state.chunkservers().keys() {
        let Some(report) = reports.online(id, now).or_else(|| reports.last(id)) else { continue };
        for &(volume, copyset, used) in &report.volumes {
            let term = report.replicas.get(&copyset).map_or(0, |replica| replica.term);
            let said = best.entry((volume, copyset)).or_default();
            *said = (*said).max((term, used));
        }
    }
    let mut sums: BTreeMap<VolumeId, u64> = BTreeMap::new();
    for (&id, volume) in state.volumes() {
        // Where it has space; whoever writes there has fenced all of its copysets, and their leaders name it.
        let written = !volume.segments.is_empty();
        let said = volume.copysets.iter().map(|&copyset| match best.get(&(id, copyset)) {
            Some((_, used)) => Some(*used),
            None if written => None,
            None => Some(0),
        });
        if let Some(sum) = said.sum::<Option<u64>>() {
            sums.insert(id, sum);
        }
        // The last reports may be older than the last bytes of an image.
        let members = volume.copysets.iter().filter_map(|copyset| state.copysets().get(copyset));
        let members = members.flat_map(Copyset::everyone).map(|replica| replica.chunkserver);
        if let Some(written) = reports.imported_since(id, members, now) {
            let sum = sums.entry(id).or_default();
            *sum = written.max(*sum);
        }
    }
    sums
}

fn place_volume(
    state: &State,
    reports: &Reports,
    width: usize,
    now: Instant,
) -> Result<Vec<CopysetId>, Status> {
    if state.copysets().is_empty() {
        return Err(ErrorWord::NoPlacement
            .status("there are no copysets yet: they need chunkservers in three zones that report"));
    }
    // A volume weighs one, and as much as it has chunks in the copyset.
    let mut load: BTreeMap<CopysetId, u64> = BTreeMap::new();
    for volume in state.volumes().values() {
        let share = volume.segments.len() as u64 * CHUNKS_PER_SEGMENT / volume.copysets.len().max(1) as u64;
        for &copyset in &volume.copysets {
            *load.entry(copyset).or_default() += 1 + share;
        }
    }
    let candidate = |(&id, copyset): (&CopysetId, &Copyset)| {
        let (fit, free_bytes) = room::of(copyset, state, reports, now)?;
        let leader = copyset.first_leader_chunkserver()?;
        let load = load.get(&id).copied().unwrap_or(0);
        Some((fit, Candidate { id, leader, free_bytes, load }))
    };
    let candidates = best(state.copysets().iter().filter_map(candidate));
    let chosen = choose(&candidates, width, state.volumes_given());
    if chosen.is_empty() {
        return Err(ErrorWord::NoPlacement.status(
            "every copyset has two chunkservers that are near-full: add chunkservers or free space",
        ));
    }
    Ok(chosen)
}

enum Placed {
    Already(Vec<CopysetId>),
    Now(Vec<CopysetId>),
}

fn place_segment(
    state: &State,
    reports: &Reports,
    id: VolumeId,
    attachment: u32,
    index: SegmentIndex,
    now: Instant,
) -> Result<Placed, Status> {
    let Some(volume) = state.volumes().get(&id) else {
        return Err(ErrorWord::NotFound.status(state.no_volume(id)));
    };
    volume.check_attachment(id, attachment)?;
    volume.check_segment(id, index)?;
    if let Some(chunk_copysets) = volume.segments.get(&index) {
        return Ok(Placed::Already(chunk_copysets.to_vec()));
    }
    let fit = |&id: &CopysetId| {
        let (fit, _) = room::of(state.copysets().get(&id)?, state, reports, now)?;
        Some((fit, id))
    };
    let ring = best(volume.copysets.iter().filter_map(fit));
    if ring.is_empty() {
        return Err(ErrorWord::NoPlacement.status(format!(
            "every copyset of {id} has two chunkservers that are near-full: add chunkservers or free space"
        )));
    }
    Ok(Placed::Now(segment::deal(&ring, index)))
}
