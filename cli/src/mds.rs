//! A client of the control plane that knows several addresses and finds the one that leads.
//!
//! An address that does not answer, or answers that it does not lead, makes room for the next; the list is gone
//! through until the deadline. A request that changes something is never sent twice after a connection broke
//! under it: the caller hears [`Failure::Uncertain`] instead.

use std::time::Duration;

use evolute_protocol::rpc::cluster_client::ClusterClient;
use evolute_protocol::rpc::volumes_client::VolumesClient;
use evolute_protocol::rpc::{
    AbandonImportRequest, AcceptMdsRequest, AcceptMdsResponse, BeginImportRequest, ClusterStatus,
    CreateVolumeRequest, DecideRequest, DecideResponse, Decision, DeleteVolumeRequest, ErrorWord,
    FinishImportRequest, ListVolumesRequest, RetireRequest, RetireResponse, ShowVolumeRequest, StatusRequest,
    Volume,
};
use evolute_protocol::{NotAnAddress, mds_addresses};
use tokio::time::{Instant, sleep, timeout_at};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};

use crate::failure::Failure;

/// A dead host must not eat the time of the living ones behind it in the list.
const CONNECT_MAX: Duration = Duration::from_secs(2);
/// One address that took the connection and says nothing.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// Nobody listens at any address: enough for a control plane that is just restarting, short enough for a person.
const REFUSED_MAX: Duration = Duration::from_secs(2);
const ROUND_PAUSE: Duration = Duration::from_millis(150);

/// A status of a cluster of many volumes is larger than tonic's 4 MiB.
const MESSAGE_BYTES_MAX: usize = 64 << 20;

#[derive(Debug)]
pub struct Mds {
    addresses: Vec<String>,
    timeout: Duration,
    /// The one that answered last, kept connected.
    current: Option<(usize, Channel)>,
}

/// May the request be sent again when nobody knows whether it arrived?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Repeat {
    Harmless,
    Never,
}

impl Mds {
    /// `addresses` is HOST:PORT, or several separated by commas.
    pub fn new(addresses: &str, timeout: Duration) -> Result<Self, Failure> {
        let addresses = mds_addresses(&[addresses]).map_err(|why| Failure::Usage {
            what: format!("--mds, or EVOLUTE_MDS: {why}"),
            next: Some(str::to_owned(match why {
                NotAnAddress::Nothing => {
                    "an EVOLUTE_MDS that is set and empty is an address that is none: unset it to ask 127.0.0.1:7700"
                }
                NotAnAddress::This(_) => "several are separated by commas; http:// has no place there",
            })),
        })?;
        Ok(Self { addresses, timeout, current: None })
    }

    /// The list as it was given.
    pub fn addresses(&self) -> String {
        self.addresses.join(",")
    }

    pub async fn create(&mut self, name: &str, size_bytes: u64, width: u32) -> Result<Volume, Failure> {
        let request = CreateVolumeRequest { name: name.to_owned(), size_bytes, width };
        self.call("create a volume", Repeat::Never, |channel| {
            let request = request.clone();
            async move { volumes(channel).create(request).await }
        })
        .await
    }

    /// Makes or marks the volume that an image is copied into.
    pub async fn begin_import(&mut self, request: BeginImportRequest) -> Result<Volume, Failure> {
        self.call("begin an import", Repeat::Never, |channel| {
            let request = request.clone();
            async move { volumes(channel).begin_import(request).await }
        })
        .await
    }

    /// Said twice it changes nothing.
    pub async fn finish_import(&mut self, request: FinishImportRequest) -> Result<(), Failure> {
        self.call("finish an import", Repeat::Harmless, |channel| async move {
            volumes(channel).finish_import(request).await
        })
        .await?;
        Ok(())
    }

    /// Said twice it changes nothing.
    pub async fn abandon_import(&mut self, volume_id: u64, by: &str) -> Result<(), Failure> {
        let request = AbandonImportRequest { volume_id, by: by.to_owned() };
        self.call("abandon an import", Repeat::Harmless, |channel| {
            let request = request.clone();
            async move { volumes(channel).abandon_import(request).await }
        })
        .await?;
        Ok(())
    }

    pub async fn list(&mut self) -> Result<Vec<Volume>, Failure> {
        let answer = self
            .call("list the volumes", Repeat::Harmless, |channel| async move {
                volumes(channel).list(ListVolumesRequest {}).await
            })
            .await?;
        Ok(answer.volumes)
    }

    pub async fn show(&mut self, name: &str) -> Result<Volume, Failure> {
        let request = ShowVolumeRequest { name: name.to_owned() };
        self.call("show a volume", Repeat::Harmless, |channel| {
            let request = request.clone();
            async move { volumes(channel).show(request).await }
        })
        .await
    }

    pub async fn delete(&mut self, name: &str, force: bool) -> Result<(), Failure> {
        let request = DeleteVolumeRequest { name: name.to_owned(), force };
        self.call("delete a volume", Repeat::Never, |channel| {
            let request = request.clone();
            async move { volumes(channel).delete(request).await }
        })
        .await?;
        Ok(())
    }

    pub async fn status(&mut self) -> Result<ClusterStatus, Failure> {
        self.call("show the cluster's status", Repeat::Harmless, |channel| async move {
            let client = ClusterClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
            { client }.status(StatusRequest {}).await
        })
        .await
    }

    /// Said twice it changes nothing, but for a removal, which is refused the second time.
    pub async fn decide(&mut self, chunkserver: u32, decision: Decision) -> Result<DecideResponse, Failure> {
        let request = DecideRequest { chunkserver, decision: decision.into() };
        self.call("decide about a chunkserver", Repeat::Harmless, |channel| async move {
            let client = ClusterClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
            { client }.decide(request).await
        })
        .await
    }

    /// Said twice it changes nothing.
    pub async fn retire(&mut self, chunkserver: u32, retiring: bool) -> Result<RetireResponse, Failure> {
        let request = RetireRequest { chunkserver, retiring };
        self.call("retire a chunkserver", Repeat::Harmless, |channel| async move {
            let client = ClusterClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
            { client }.retire(request).await
        })
        .await
    }

    /// Said twice it changes nothing.
    pub async fn accept_mds(&mut self, go_on: bool) -> Result<AcceptMdsResponse, Failure> {
        self.call("accept an MDS", Repeat::Harmless, |channel| async move {
            ClusterClient::new(channel).accept_mds(AcceptMdsRequest { go_on }).await
        })
        .await
    }

    async fn call<T, F>(
        &mut self,
        doing: &'static str,
        repeat: Repeat,
        request: impl Fn(Channel) -> F,
    ) -> Result<T, Failure>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let begun = Instant::now();
        let deadline = begun + self.timeout;
        let first = self.current.as_ref().map_or(0, |(index, _)| *index);
        let mut last = "not asked yet".to_owned();
        loop {
            let mut everybody_refused = true;
            for turn in 0..self.addresses.len() {
                let index = (first + turn) % self.addresses.len();
                let address = self.addresses[index].clone();
                let channel = match self.connected(index, deadline).await {
                    Ok(channel) => channel,
                    Err(error) => {
                        everybody_refused &= matches!(error, ConnectError::Refused);
                        last = format!("{address}: {error}");
                        continue;
                    }
                };
                everybody_refused = false;
                let answer = timeout_at(deadline.min(Instant::now() + ANSWER_MAX), request(channel)).await;
                let status = match answer {
                    Ok(Ok(answer)) => return Ok(answer.into_inner()),
                    Ok(Err(status)) => status,
                    Err(_) => Status::new(Code::DeadlineExceeded, "no answer in time"),
                };
                self.current = None;
                match ErrorWord::of(&status) {
                    Some(ErrorWord::NotLeader | ErrorWord::Busy) => {}
                    Some(word) => {
                        return Err(Failure::Refused { word, message: status.message().to_owned() });
                    }
                    None if !is_transport(&status) => {
                        let message = format!("{} ({:?})", status.message(), status.code());
                        return Err(Failure::ControlPlane { address, message });
                    }
                    None if repeat == Repeat::Never => {
                        return Err(Failure::Uncertain { address, doing, message: describe(&status) });
                    }
                    None => {}
                }
                last = format!("{address}: {}", describe(&status));
            }
            let patience = if everybody_refused { REFUSED_MAX.min(self.timeout) } else { self.timeout };
            if begun.elapsed() + ROUND_PAUSE >= patience {
                return Err(Failure::Unreachable { addresses: self.addresses(), last });
            }
            sleep(ROUND_PAUSE).await;
        }
    }

    async fn connected(&mut self, index: usize, deadline: Instant) -> Result<Channel, ConnectError> {
        if let Some((current, channel)) = &self.current
            && *current == index
        {
            return Ok(channel.clone());
        }
        let endpoint = endpoint(&self.addresses[index]).map_err(|e| ConnectError::Failed(e.to_string()))?;
        let deadline = deadline.min(Instant::now() + CONNECT_MAX);
        let channel = match timeout_at(deadline, endpoint.connect()).await {
            Ok(Ok(channel)) => channel,
            Ok(Err(error)) => return Err(ConnectError::from(error)),
            Err(_) => return Err(ConnectError::Failed("no connection in time".to_owned())),
        };
        self.current = Some((index, channel.clone()));
        Ok(channel)
    }
}

#[derive(Debug, thiserror::Error)]
enum ConnectError {
    #[error("connection refused: nobody listens there")]
    Refused,
    #[error("{0}")]
    Failed(String),
}

impl From<tonic::transport::Error> for ConnectError {
    fn from(error: tonic::transport::Error) -> Self {
        let mut cause: &dyn std::error::Error = &error;
        while let Some(deeper) = cause.source() {
            cause = deeper;
        }
        match cause.downcast_ref::<std::io::Error>() {
            Some(io) if io.kind() == std::io::ErrorKind::ConnectionRefused => Self::Refused,
            _ => Self::Failed(cause.to_string()),
        }
    }
}

fn volumes(channel: Channel) -> VolumesClient<Channel> {
    VolumesClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX)
}

fn endpoint(address: &str) -> Result<Endpoint, Failure> {
    Endpoint::from_shared(format!("http://{address}")).map_err(|error| Failure::Usage {
        what: format!("\"{address}\" is not an address of a control plane: {error}"),
        next: None,
    })
}

/// The codes tonic makes up by itself when a connection breaks or the other end does not speak gRPC.
fn is_transport(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled | Code::DeadlineExceeded)
        || std::error::Error::source(status).is_some()
}

fn describe(status: &Status) -> String {
    let mut text = status.message().to_owned();
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        let words = error.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        cause = error.source();
    }
    if text.is_empty() { format!("{:?}", status.code()) } else { text }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::Mds;
    use crate::failure::Failure;

    #[test]
    fn an_address_that_cannot_be_one_is_named() {
        for bad in ["", ",", "host", "http://host:7700"] {
            let error = Mds::new(bad, Duration::from_secs(1)).expect_err(bad);
            assert!(matches!(error, Failure::Usage { next: Some(_), .. }), "{bad}: {error}");
        }
        let mds = Mds::new(" 10.0.0.1:7700, [::1]:7700,", Duration::from_secs(1)).expect("a list");
        assert_eq!(mds.addresses(), "10.0.0.1:7700,[::1]:7700");
    }
}
