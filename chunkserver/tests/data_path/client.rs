//! A client that does one thing at a time and believes nothing: it checks every answer's request number and checksums.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use bytes::{BufMut, Bytes, BytesMut};
use evolute_protocol::checksum::checksums;
use evolute_protocol::epoch::Epoch;
use evolute_protocol::id::{ChunkIndex, ChunkKey, ChunkserverId, ClusterId, CopysetId, VolumeId};
use evolute_protocol::wire::hello::{HELLO_BYTES, Hello, HelloReply, Role};
use evolute_protocol::wire::reply::{Freshness, Refusal, Reply, data_is_intact};
use evolute_protocol::wire::request::{
    AskChunkInfo, AskDigests, ChangeTag, ChunkRange, Discard, Fence, Lane, Read, ReadAtLeast, Request,
    Sequence, Write, WriteZeroes,
};
use evolute_protocol::wire::{FrameReader, RequestId};
use evolute_raft::Timing;

/// A whole block of one byte.
pub fn block(byte: u8) -> Bytes {
    Bytes::from(vec![byte; 4096])
}

/// Nobody is taken for dead, and no lease runs out, because this machine stood still for some seconds. Whoever is stopped
/// is missed by its connections, at once.
pub const TIMING: Timing = Timing { heartbeat_ms: 150, election_ms_min: 5_000, election_ms_max: 10_000 };

/// A connection after its greeting.
pub fn hello(address: SocketAddr, cluster: ClusterId, to: ChunkserverId) -> TcpStream {
    let mut socket = TcpStream::connect(address).expect("connected");
    socket.set_read_timeout(Some(Duration::from_secs(30))).expect("a socket");
    let hello = Hello { version: 1, role: Role::Client, cluster, to };
    socket.write_all(&hello.encode()).expect("sent");
    let mut answer = [0; HELLO_BYTES];
    socket.read_exact(&mut answer).expect("answered");
    assert_eq!(HelloReply::decode(&answer).expect("ours").welcome, Ok(()));
    socket
}

pub struct Client {
    socket: TcpStream,
    reader: FrameReader,
    next: u64,
    pub copyset: CopysetId,
    pub epoch: Epoch,
    volume: VolumeId,
}

impl Client {
    /// Waits for nothing.
    pub fn to(address: SocketAddr, cluster: ClusterId, to: ChunkserverId, copyset: CopysetId) -> Self {
        let socket = hello(address, cluster, to);
        let (reader, epoch, volume) = (FrameReader::default(), Epoch::default(), VolumeId(5));
        Self { socket, reader, next: 0, copyset, epoch, volume }
    }

    /// Waits until the copyset leads here.
    pub fn connect(address: SocketAddr, cluster: ClusterId, to: ChunkserverId, copyset: CopysetId) -> Self {
        let mut client = Self::to(address, cluster, to, copyset);
        client.until(|client| {
            let waiting = [Refusal::NotLeader { leader: None }, Refusal::NoSuchCopyset];
            !matches!(client.try_read(0, 512), Reply::Refused(refused)
                if waiting.contains(&refused) || matches!(refused, Refusal::NotLeader { .. }))
        });
        client
    }

    pub fn until(&mut self, mut there: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !there(self) {
            assert!(Instant::now() < deadline, "waited for half a minute");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn send(&mut self, request: &Request) -> RequestId {
        self.next += 1;
        let id = RequestId(self.next);
        let mut out = BytesMut::new();
        let payload = request.put(self.copyset, id, &mut out);
        out.put(payload.unwrap_or_default());
        self.socket.write_all(&out).expect("sent");
        id
    }

    fn receive(&mut self) -> (RequestId, Reply) {
        loop {
            if let Some(frame) = self.reader.next().expect("intact") {
                return (frame.request, Reply::decode(&frame).expect("a reply"));
            }
            let mut bytes = [0; 64 << 10];
            let n = self.socket.read(&mut bytes).expect("an answer");
            assert!(n > 0, "the chunkserver closed the connection");
            self.reader.space().put_slice(&bytes[..n]);
        }
    }

    pub fn ask(&mut self, request: &Request) -> Reply {
        let id = self.send(request);
        let (answered, reply) = self.receive();
        assert_eq!(answered, id);
        reply
    }

    pub fn chunk(&self) -> ChunkKey {
        ChunkKey { volume: self.volume, index: ChunkIndex(0) }
    }

    fn tag(&self, sequence: u64) -> ChangeTag {
        ChangeTag { epoch: self.epoch, lane: Lane(0), sequence: Sequence(sequence), floor: Sequence(1) }
    }

    fn write_request(&self, offset: u32, data: Bytes, sequence: u64) -> Write {
        let range = ChunkRange::new(offset, u32::try_from(data.len()).expect("short")).expect("a good range");
        let checksums = checksums(u64::from(offset), &data);
        Write { chunk: self.chunk(), tag: self.tag(sequence), range, checksums, data }
    }

    /// Asks so many times for the same, before any answer is taken.
    pub fn send_reads(&mut self, count: usize, offset: u32, length: u32) {
        let range = ChunkRange::new(offset, length).expect("a good range");
        let read = Request::Read(Read { chunk: self.chunk(), epoch: self.epoch, range });
        (0..count).for_each(|_| _ = self.send(&read));
    }

    /// Bytes of the chunk that a checkpoint has written.
    pub fn in_files(&mut self) -> u64 {
        let ask = Request::ChunkInfo(AskChunkInfo { chunk: self.chunk(), epoch: self.epoch });
        match self.ask(&ask) {
            Reply::Info { info, .. } => info.allocated_bytes,
            other => panic!("not told: {other:?}"),
        }
    }

    /// The next answer, whatever it is to.
    pub fn take(&mut self) -> Reply {
        self.receive().1
    }

    pub fn try_fence(&mut self, volume: VolumeId, epoch: Epoch) -> Reply {
        self.ask(&Request::Fence(Fence { volume, epoch }))
    }

    pub fn fence(&mut self, volume: VolumeId, epoch: Epoch) -> Freshness {
        let reply = self.try_fence(volume, epoch);
        self.epoch = epoch;
        done(reply)
    }

    pub fn try_write(&mut self, offset: u32, data: Bytes, sequence: u64) -> Reply {
        let write = self.write_request(offset, data, sequence);
        self.ask(&Request::Write(write))
    }

    pub fn write(&mut self, offset: u32, data: Bytes, sequence: u64) -> Freshness {
        done(self.try_write(offset, data, sequence))
    }

    pub fn try_damaged_write(&mut self, offset: u32, data: Bytes, sequence: u64) -> Reply {
        let mut write = self.write_request(offset, data, sequence);
        write.checksums[0] ^= 1;
        self.ask(&Request::Write(write))
    }

    /// `count` blocks, all sent before any answer is read.
    pub fn write_many(&mut self, count: u32) {
        let mut waiting = Vec::new();
        for n in 0..count {
            let data = block(u8::try_from(n % 251).expect("small"));
            let write = self.write_request(n * 4096, data, u64::from(n) + 1);
            waiting.push(self.send(&Request::Write(write)));
        }
        while !waiting.is_empty() {
            let (id, reply) = self.receive();
            done(reply);
            let at = waiting.iter().position(|sent| *sent == id).expect("asked, and not answered before");
            waiting.swap_remove(at);
        }
    }

    pub fn discard(&mut self, offset: u32, length: u32, sequence: u64) {
        done(self.ask(&self.discard_of(offset, length, sequence)));
    }

    pub fn write_zeroes(&mut self, offset: u32, length: u32, sequence: u64) {
        let range = ChunkRange::new(offset, length).expect("a good range");
        let zeroes = WriteZeroes { chunk: self.chunk(), tag: self.tag(sequence), range, unmap: true };
        done(self.ask(&Request::WriteZeroes(zeroes)));
    }

    pub fn try_read(&mut self, offset: u32, length: u32) -> Reply {
        let range = ChunkRange::new(offset, length).expect("a good range");
        self.ask(&Request::Read(Read { chunk: self.chunk(), epoch: self.epoch, range }))
    }

    pub fn try_read_at_least(&mut self, offset: u32, length: u32, index: u64) -> Reply {
        let range = ChunkRange::new(offset, length).expect("a good range");
        let read = Read { chunk: self.chunk(), epoch: self.epoch, range };
        self.ask(&Request::ReadAtLeast(ReadAtLeast { read, index, term: ReadAtLeast::APPLIED_ONLY }))
    }

    /// From the log, too, where that proves that it has this.
    pub fn try_read_ahead(&mut self, offset: u32, length: u32, at: Freshness) -> Reply {
        let range = ChunkRange::new(offset, length).expect("a good range");
        let read = Read { chunk: self.chunk(), epoch: self.epoch, range };
        self.ask(&Request::ReadAtLeast(ReadAtLeast { read, index: at.index, term: at.term }))
    }

    /// The checksums of whole blocks, as they are stored.
    pub fn try_digests(&mut self, offset: u32, length: u32, index: u64) -> Reply {
        let range = ChunkRange::new(offset, length).expect("a good range");
        let read = Read { chunk: self.chunk(), epoch: self.epoch, range };
        let of = ReadAtLeast { read, index, term: ReadAtLeast::APPLIED_ONLY };
        self.ask(&Request::Digests(AskDigests { of }))
    }

    /// All in one go, and waits for no answer.
    pub fn send_all(&mut self, requests: &[Request]) {
        let mut out = BytesMut::new();
        for request in requests {
            self.next += 1;
            let payload = request.put(self.copyset, RequestId(self.next), &mut out);
            out.put(payload.unwrap_or_default());
        }
        self.socket.write_all(&out).expect("sent");
    }

    pub fn write_of(&self, offset: u32, data: Bytes, sequence: u64) -> Request {
        Request::Write(self.write_request(offset, data, sequence))
    }

    pub fn discard_of(&self, offset: u32, length: u32, sequence: u64) -> Request {
        let range = ChunkRange::new(offset, length).expect("a good range");
        Request::Discard(Discard { chunk: self.chunk(), tag: self.tag(sequence), range })
    }

    pub fn read(&mut self, offset: u32, length: u32) -> Bytes {
        match self.try_read(offset, length) {
            Reply::Data { checksums, data, .. } => {
                assert!(data_is_intact(offset, length, &data[0], &checksums));
                data[0].clone()
            }
            other => panic!("no data: {other:?}"),
        }
    }

    pub fn read_fresh(&mut self, offset: u32, length: u32) -> Freshness {
        match self.try_read(offset, length) {
            Reply::Data { fresh, .. } => fresh,
            other => panic!("no data: {other:?}"),
        }
    }
}

fn done(reply: Reply) -> Freshness {
    match reply {
        Reply::Done(fresh) => fresh,
        other => panic!("not done: {other:?}"),
    }
}
