//! The connection that has its turn: its messages one by one, each handed to its [`Session`].

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use vhost::vhost_user::message::FrontendReq;
use vhost::vhost_user::{BackendReqHandler, Error};

use super::callers::{Caller, Header, Said};
use super::command::Commands;
use super::session::Session;
use super::sparingly::Sparingly;
use super::{DeviceConfig, DeviceError};

/// What the log says of them: strangers leave the owner its share.
pub struct Lines {
    pub owner: Sparingly,
    pub others: Sparingly,
}

/// See the module.
pub struct FrontEnd {
    pub caller: Caller,
    /// When it got its turn.
    pub since: Instant,
    handler: BackendReqHandler<Mutex<Session>>,
    session: Arc<Mutex<Session>>,
    is_owner: bool,
}

impl FrontEnd {
    pub fn new(
        caller: Caller,
        config: &DeviceConfig,
        commands: Commands,
        now: Instant,
    ) -> io::Result<FrontEnd> {
        let stream = caller.stream.try_clone()?;
        let session = Arc::new(Mutex::new(Session::new(config, commands)));
        let handler = BackendReqHandler::from_stream(stream, session.clone());
        Ok(FrontEnd { caller, since: now, handler, session, is_owner: false })
    }

    /// It has said more than questions: the disk is its own until it leaves.
    pub fn is_owner(&self) -> bool {
        self.is_owner
    }

    /// Does what it has said. False: it left, or was hung up on.
    pub fn listen(&mut self, now: Instant, lines: &mut Lines) -> Result<bool, DeviceError> {
        match self.caller.listen(now) {
            Said::Nothing | Said::Half => Ok(true),
            Said::Message(header) => self.serve_message(header, now, lines),
            Said::Goodbye => {
                if self.is_owner {
                    let peer = &self.caller.peer;
                    lines.owner.tell(now, |unsaid| tracing::info!(unsaid, "front end disconnected: {peer}"));
                }
                Ok(false)
            }
        }
    }

    fn serve_message(
        &mut self,
        Header { request, needs_reply }: Header,
        now: Instant,
        lines: &mut Lines,
    ) -> Result<bool, DeviceError> {
        let acknowledged = needs_reply && self.session().acknowledges() && is_acknowledged(request);
        let handled = self.handler.handle_request();
        let peer = &self.caller.peer;
        match handled {
            Ok(()) => {
                if !self.is_owner && !is_question(request) {
                    self.is_owner = true;
                    lines.owner.tell(now, |unsaid| tracing::info!(unsaid, "front end connected: {peer}"));
                }
                Ok(true)
            }
            Err(Error::ReqHandlerError(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
                Err(DeviceError::IoThreadEnded)
            }
            Err(Error::ReqHandlerError(error)) if acknowledged => {
                self.lines(lines).tell(now, |unsaid| {
                    tracing::warn!(%error, request, %peer, unsaid, "a vhost-user message was refused");
                });
                Ok(true)
            }
            // Nobody told the front end, so it would go on believing that it was done.
            Err(error) => {
                self.lines(lines).tell(now, |unsaid| {
                    tracing::warn!(%error, request, %peer, unsaid, "hanging up on a front end");
                });
                Ok(false)
            }
        }
    }

    fn lines<'a>(&self, lines: &'a mut Lines) -> &'a mut Sparingly {
        if self.is_owner { &mut lines.owner } else { &mut lines.others }
    }

    /// All rings end, and nothing of its memory stays mapped.
    pub fn end(self) -> Result<(), DeviceError> {
        self.session().end().map_err(|_| DeviceError::IoThreadEnded)
    }

    fn session(&self) -> MutexGuard<'_, Session> {
        self.session.lock().expect("one thread, and it does not panic")
    }
}

/// Whether a message changes nothing of the disk, so that whoever says it need not be its owner.
fn is_question(request: u32) -> bool {
    let questions = [
        FrontendReq::GET_FEATURES,
        FrontendReq::GET_PROTOCOL_FEATURES,
        FrontendReq::SET_PROTOCOL_FEATURES,
        FrontendReq::GET_QUEUE_NUM,
        FrontendReq::GET_MAX_MEM_SLOTS,
        FrontendReq::GET_CONFIG,
    ];
    questions.iter().any(|question| *question as u32 == request)
}

/// Whether the crate answers a refusal of this message with an acknowledgement that says so. Messages with a reply
/// of their own get none when they are refused.
fn is_acknowledged(request: u32) -> bool {
    let own_reply = [
        FrontendReq::GET_FEATURES,
        FrontendReq::GET_PROTOCOL_FEATURES,
        FrontendReq::GET_QUEUE_NUM,
        FrontendReq::GET_VRING_BASE,
        FrontendReq::GET_CONFIG,
        FrontendReq::GET_INFLIGHT_FD,
        FrontendReq::GET_MAX_MEM_SLOTS,
        FrontendReq::SET_LOG_BASE,
        FrontendReq::GET_SHMEM_CONFIG,
    ];
    !own_reply.iter().any(|own| *own as u32 == request)
}
