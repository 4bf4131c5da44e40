//! The connection that has its turn: its messages one by one, each handed to its [`Session`].

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use vhost::vhost_user::message::FrontendReq;
use vhost::vhost_user::{BackendReqHandler, Error};

use super::callers::{Caller, Header, Said};
use super::command::Commands;
use super::lifeline::Lifeline;
use super::session::Session;
use super::sharing::HOW_TO_SHARE;
use super::sizing::{Answer, Sizing};
use super::sparingly::Sparingly;
use super::{DeviceConfig, DeviceError};

/// What the log says of them: strangers leave the owner its share.
pub struct Lines {
    pub owner: Sparingly,
    /// Whom they are about.
    pub owner_pid: Option<i32>,
    pub others: Sparingly,
}

/// See the module.
pub struct FrontEnd {
    pub caller: Caller,
    /// When it got its turn.
    pub since: Instant,
    handler: BackendReqHandler<Mutex<Session>>,
    session: Arc<Mutex<Session>>,
    line: Arc<Lifeline>,
    pub sizing: Sizing,
    is_owner: bool,
    lacks_memory: bool,
}

impl FrontEnd {
    pub fn new(
        caller: Caller,
        config: &DeviceConfig,
        commands: Commands,
        now: Instant,
    ) -> io::Result<FrontEnd> {
        let stream = caller.stream.try_clone()?;
        let line = Arc::new(Lifeline::of(stream.try_clone()?));
        let session = Session::new(config, commands, caller.peer.clone(), line.clone());
        let session = Arc::new(Mutex::new(session));
        let handler = BackendReqHandler::from_stream(stream, session.clone());
        let sizing = Sizing::new(config);
        let (is_owner, lacks_memory) = (false, false);
        Ok(FrontEnd { caller, since: now, handler, session, line, sizing, is_owner, lacks_memory })
    }

    /// It has said more than questions: the disk is its own until it leaves. Not if it wants rings to run and gives no
    /// memory for them: it has no use for the disk.
    pub fn is_owner(&self) -> bool {
        self.is_owner && !self.lacks_memory
    }

    /// Its session was ended from inside, see `lifeline.rs`.
    pub fn is_cut_off(&self) -> bool {
        self.line.has_ended()
    }

    /// Does what it has said. False: it left, or was hung up on.
    pub fn listen(&mut self, now: Instant, lines: &mut Lines) -> Result<bool, DeviceError> {
        // Not one message more of a session that has ended, whatever has arrived.
        if self.is_cut_off() {
            return Ok(false);
        }
        match self.caller.listen(now) {
            Said::Nothing | Said::Half => Ok(true),
            Said::Message(header) if is_one_of(header.request, &[FrontendReq::GET_CONFIG]) => {
                self.answer_size(header, now, lines)
            }
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

    fn answer_size(&mut self, header: Header, now: Instant, lines: &mut Lines) -> Result<bool, DeviceError> {
        let waited = self.sizing.keeps_waiting();
        let peer = &self.caller.peer;
        match self.sizing.asked(peer, now) {
            Answer::Say => return self.serve_message(header, now, lines),
            Answer::Wait if waited => {}
            Answer::Wait => self.lines(lines).tell(now, |unsaid| {
                tracing::info!(%peer, unsaid, "a front end asks for the size of a volume that is not known yet");
            }),
            // An empty answer would be the way to refuse it, and the vhost crate's front ends wait for the rest for ever.
            Answer::HangUp => {
                self.lines(lines).tell(now, |unsaid| {
                    tracing::warn!(%peer, unsaid, "hanging up on a front end: the size of its volume is not known yet");
                });
                return Ok(false);
            }
        }
        Ok(!self.caller.has_hung_up())
    }

    fn serve_message(
        &mut self,
        Header { request, needs_reply }: Header,
        now: Instant,
        lines: &mut Lines,
    ) -> Result<bool, DeviceError> {
        if is_one_of(request, &[FrontendReq::SET_BACKEND_REQ_FD]) {
            self.sizing.hear_of_channel(&self.caller.stream);
        }
        let acknowledged = needs_reply && self.session().acknowledges() && is_acknowledged(request);
        let handled = self.handler.handle_request();
        // By what it asked for, perhaps, and then the answer did not get through: `end` says why.
        if self.is_cut_off() {
            return Ok(false);
        }
        let peer = &self.caller.peer;
        match handled {
            Ok(()) => {
                if !self.is_owner && !is_question(request) {
                    self.is_owner = true;
                    if std::mem::replace(&mut lines.owner_pid, peer.pid()) != peer.pid() {
                        lines.owner.somebody_new(now);
                    }
                    lines.owner.tell(now, |unsaid| tracing::info!(unsaid, "front end connected: {peer}"));
                }
                let lacks_memory = self.session().lacks_memory();
                if lacks_memory && !self.lacks_memory {
                    lines.owner.tell(now, |unsaid| {
                        tracing::warn!(
                            unsaid,
                            "{peer} gives no guest memory for its rings, because it is not shared: the guest will hang. {HOW_TO_SHARE}"
                        );
                    });
                }
                self.lacks_memory = lacks_memory;
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
        if let Some(cause) = self.line.cause() {
            tracing::error!(%cause, "the session of {} was ended", self.caller.peer);
        }
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
    is_one_of(request, &questions)
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
    !is_one_of(request, &own_reply)
}

fn is_one_of(request: u32, messages: &[FrontendReq]) -> bool {
    messages.iter().any(|message| *message as u32 == request)
}
