//! One value, once.

use std::cell::RefCell;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use openraft_rt::{Oneshot, OneshotSender, OptionalSend};

pub struct LocalOneshot;

struct Slot<T> {
    value: Option<T>,
    receiver: Option<Waker>,
    sender_gone: bool,
    receiver_gone: bool,
}

pub struct Sender<T>(Rc<RefCell<Slot<T>>>);
pub struct Receiver<T>(Rc<RefCell<Slot<T>>>);

/// The sender went away without a value.
#[derive(Debug)]
pub struct Dropped;

impl fmt::Display for Dropped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the sender was dropped")
    }
}

impl std::error::Error for Dropped {}

pub fn channel<T>() -> (Sender<T>, Receiver<T>) {
    let slot =
        Rc::new(RefCell::new(Slot { value: None, receiver: None, sender_gone: false, receiver_gone: false }));
    (Sender(slot.clone()), Receiver(slot))
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        let waker = {
            let mut slot = self.0.borrow_mut();
            slot.sender_gone = true;
            slot.receiver.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        // Dropped outside the borrow: the value may own the other end of something that comes back here.
        let value = {
            let mut slot = self.0.borrow_mut();
            slot.receiver_gone = true;
            slot.value.take()
        };
        drop(value);
    }
}

impl<T: OptionalSend> OneshotSender<T> for Sender<T> {
    fn send(self, value: T) -> Result<(), T> {
        let mut slot = self.0.borrow_mut();
        if slot.receiver_gone {
            return Err(value);
        }
        slot.value = Some(value);
        Ok(()) // dropping `self` wakes the receiver
    }
}

impl<T> Future for Receiver<T> {
    type Output = Result<T, Dropped>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut slot = self.0.borrow_mut();
        if let Some(value) = slot.value.take() {
            return Poll::Ready(Ok(value));
        }
        if slot.sender_gone {
            return Poll::Ready(Err(Dropped));
        }
        match &mut slot.receiver {
            Some(waker) => waker.clone_from(context.waker()),
            None => slot.receiver = Some(context.waker().clone()),
        }
        Poll::Pending
    }
}

impl Oneshot for LocalOneshot {
    type Sender<T: OptionalSend> = Sender<T>;
    type Receiver<T: OptionalSend> = Receiver<T>;
    type ReceiverError = Dropped;

    fn channel<T: OptionalSend>() -> (Sender<T>, Receiver<T>) {
        channel()
    }
}
