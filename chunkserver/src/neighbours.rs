//! The other chunkservers, as this one calls them: for Raft, and for a block that cannot be read here.

use std::future::Future;
use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use evolute_protocol::id::{ChunkserverId, CopysetId};
use evolute_protocol::wire::hello::{HELLO_BYTES, Hello, HelloReply, Role, Version};
use evolute_protocol::wire::reply::{Freshness, Reply, data_is_intact};
use evolute_protocol::wire::request::{ReadAtLeast, Request};
use evolute_protocol::wire::{FrameReader, RequestId};
use evolute_raft::{Dial, DialFuture, LocalFuture, ProcessId};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::addresses::Addresses;
use crate::chunk_store::Identity;
use crate::copyset::repair::Neighbours;

/// Peers answer a Hello at once, or are taken for gone.
const DIAL_TIMEOUT: Duration = Duration::from_secs(2);
/// A block from a disk that is alive takes milliseconds.
const READ_TIMEOUT: Duration = Duration::from_secs(2);

/// Calls other chunkservers.
#[derive(Clone)]
pub struct Caller {
    pub identity: Identity,
    pub addresses: Addresses,
}

impl Caller {
    fn call(
        &self,
        to: ChunkserverId,
        role: Role,
    ) -> impl Future<Output = io::Result<TcpStream>> + use<> + 'static {
        let address = self.addresses.get(to);
        let hello = Hello { version: Version::V1 as u16, role, cluster: self.identity.cluster, to };
        async move {
            let address =
                address.ok_or_else(|| io::Error::other(format!("the address of {to} is not known yet")))?;
            tokio::time::timeout(DIAL_TIMEOUT, greet(&address, hello)).await?
        }
    }
}

impl Dial for Caller {
    fn dial(&self, to: ProcessId) -> DialFuture {
        let to = ChunkserverId(u32::try_from(to.0).expect("made from a chunkserver id"));
        Box::pin(self.call(to, Role::Peer { chunkserver: self.identity.chunkserver }))
    }
}

async fn greet(address: &str, hello: Hello) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    stream.write_all(&hello.encode()).await?;
    let mut bytes = [0; HELLO_BYTES];
    stream.read_exact(&mut bytes).await?;
    let reply = HelloReply::decode(&bytes).map_err(io::Error::other)?;
    reply.welcome.map_err(io::Error::other)?;
    Ok(stream)
}

impl Neighbours for Caller {
    fn read(
        &self,
        of: ChunkserverId,
        copyset: CopysetId,
        ask: ReadAtLeast,
    ) -> LocalFuture<'static, Option<(Freshness, Bytes)>> {
        let calling = self.call(of, Role::Client);
        Box::pin(async move {
            let reading = async move { read(calling.await?, copyset, ask).await };
            match tokio::time::timeout(READ_TIMEOUT, reading).await {
                Ok(Ok(answer)) => answer,
                Ok(Err(error)) => {
                    tracing::info!(%of, %error, "a neighbour could not be asked for a block");
                    None
                }
                Err(_) => None,
            }
        })
    }
}

/// One question on a connection of its own: this is rare.
async fn read(
    mut stream: TcpStream,
    copyset: CopysetId,
    ask: ReadAtLeast,
) -> io::Result<Option<(Freshness, Bytes)>> {
    let mut out = BytesMut::new();
    let none = Request::ReadAtLeast(ask).put(copyset, RequestId(1), &mut out);
    assert!(none.is_none(), "a question has no data");
    stream.write_all(&out).await?;
    let mut reader = FrameReader::default();
    let frame = loop {
        if let Some(frame) = reader.next().map_err(io::Error::other)? {
            break frame;
        }
        if stream.read_buf(reader.space()).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    };
    let (offset, length) = (ask.read.range.offset(), ask.read.range.length());
    Ok(match Reply::decode(&frame).map_err(io::Error::other)? {
        Reply::Data { fresh, checksums, data } => {
            let data = data.into_iter().next().unwrap_or_default();
            data_is_intact(offset, length, &data, &checksums).then_some((fresh, data))
        }
        Reply::Done(_) | Reply::Info { .. } | Reply::Refused(_) => None,
    })
}
