//! The other chunkservers, as this one calls them: for Raft, for a block that cannot be read here, and for what they hold
//! of a block that can.

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use bytes::BytesMut;
use evolute_protocol::id::{ChunkserverId, CopysetId};
use evolute_protocol::wire::hello::{HELLO_BYTES, Hello, HelloReply, Role, Version};
use evolute_protocol::wire::reply::Reply;
use evolute_protocol::wire::request::Request;
use evolute_protocol::wire::{FrameReader, RequestId};
use evolute_raft::{Dial, DialFuture, LocalFuture, ProcessId};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::addresses::Addresses;
use crate::chunk_store::Identity;
use crate::copyset::repair::Neighbours;

/// Peers answer a Hello at once, or are taken for gone.
const DIAL_TIMEOUT: Duration = Duration::from_secs(2);
/// A MiB from a disk that is alive takes milliseconds.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);

/// Calls other chunkservers.
#[derive(Clone)]
pub struct Caller {
    identity: Identity,
    addresses: Addresses,
    /// A connection to each on which nothing is under way: a scrubber asks twenty times a second.
    idle: Rc<RefCell<HashMap<ChunkserverId, TcpStream>>>,
}

impl Caller {
    pub fn new(identity: Identity, addresses: Addresses) -> Self {
        Self { identity, addresses, idle: Rc::default() }
    }

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
    fn ask(
        &self,
        of: ChunkserverId,
        copyset: CopysetId,
        request: Request,
    ) -> LocalFuture<'static, Option<Reply>> {
        let (idle, calling) = (Rc::clone(&self.idle), self.call(of, Role::Client));
        Box::pin(async move {
            let asking = async {
                // It may have been closed long ago: that costs no more than a second question.
                let kept = idle.borrow_mut().remove(&of);
                if let Some(mut stream) = kept
                    && let Ok(reply) = ask(&mut stream, copyset, &request).await
                {
                    return io::Result::Ok((stream, reply));
                }
                let mut stream = calling.await?;
                let reply = ask(&mut stream, copyset, &request).await?;
                Ok((stream, reply))
            };
            match tokio::time::timeout(ASK_TIMEOUT, asking).await {
                Ok(Ok((stream, reply))) => {
                    idle.borrow_mut().insert(of, stream);
                    Some(reply)
                }
                Ok(Err(error)) => {
                    tracing::debug!(%of, %error, "a neighbour could not be asked");
                    None
                }
                Err(_) => None,
            }
        })
    }
}

/// One question, one answer, nothing behind it.
async fn ask(stream: &mut TcpStream, copyset: CopysetId, request: &Request) -> io::Result<Reply> {
    let mut out = BytesMut::new();
    let none = request.put(copyset, RequestId(1), &mut out);
    assert!(none.is_none(), "a question has no data");
    stream.write_all(&out).await?;
    let mut reader = FrameReader::default();
    loop {
        if let Some(frame) = reader.next().map_err(io::Error::other)? {
            return Reply::decode(&frame).map_err(io::Error::other);
        }
        if stream.read_buf(reader.space()).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}
