//! A bounded queue with many senders.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::{Rc, Weak};
use std::task::{Poll, Waker};

use openraft_rt::{Mpsc, MpscReceiver, MpscSender, MpscWeakSender, OptionalSend, SendError, TryRecvError};

pub struct LocalMpsc;

struct Queue<T> {
    items: VecDeque<T>,
    capacity: usize,
    receiver: Option<Waker>,
    receiver_alive: bool,
    senders: usize,
    /// Everybody who found the queue full; all are woken when there is room again.
    senders_waiting: Vec<Waker>,
}

pub struct Sender<T>(Rc<RefCell<Queue<T>>>);
pub struct WeakSender<T>(Weak<RefCell<Queue<T>>>);
pub struct Receiver<T>(Rc<RefCell<Queue<T>>>);

impl<T> Queue<T> {
    fn pop(&mut self) -> Option<T> {
        let item = self.items.pop_front()?;
        for waker in self.senders_waiting.drain(..) {
            waker.wake();
        }
        Some(item)
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        self.0.borrow_mut().senders += 1;
        Self(self.0.clone())
    }
}

impl<T> Clone for WeakSender<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        let mut queue = self.0.borrow_mut();
        queue.senders -= 1;
        if queue.senders == 0
            && let Some(waker) = queue.receiver.take()
        {
            waker.wake();
        }
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        // Dropped outside the borrow: an item may hold a sender of this very queue.
        let (items, waiting) = {
            let mut queue = self.0.borrow_mut();
            queue.receiver_alive = false;
            (std::mem::take(&mut queue.items), std::mem::take(&mut queue.senders_waiting))
        };
        drop(items);
        for waker in waiting {
            waker.wake();
        }
    }
}

impl Mpsc for LocalMpsc {
    type Sender<T: OptionalSend> = Sender<T>;
    type Receiver<T: OptionalSend> = Receiver<T>;
    type WeakSender<T: OptionalSend> = WeakSender<T>;

    fn channel<T: OptionalSend>(capacity: usize) -> (Sender<T>, Receiver<T>) {
        let queue = Rc::new(RefCell::new(Queue {
            items: VecDeque::new(),
            capacity,
            receiver: None,
            receiver_alive: true,
            senders: 1,
            senders_waiting: Vec::new(),
        }));
        (Sender(queue.clone()), Receiver(queue))
    }
}

impl<T: OptionalSend> MpscSender<LocalMpsc, T> for Sender<T> {
    async fn send(&self, item: T) -> Result<(), SendError<T>> {
        let mut item = Some(item);
        poll_fn(|context| {
            let mut queue = self.0.borrow_mut();
            if queue.receiver_alive && queue.items.len() >= queue.capacity {
                queue.senders_waiting.push(context.waker().clone());
                return Poll::Pending;
            }
            let item = item.take().expect("a finished send is not polled again");
            if !queue.receiver_alive {
                return Poll::Ready(Err(SendError(item)));
            }
            queue.items.push_back(item);
            if let Some(waker) = queue.receiver.take() {
                waker.wake();
            }
            Poll::Ready(Ok(()))
        })
        .await
    }

    fn downgrade(&self) -> WeakSender<T> {
        WeakSender(Rc::downgrade(&self.0))
    }
}

impl<T: OptionalSend> MpscReceiver<T> for Receiver<T> {
    async fn recv(&mut self) -> Option<T> {
        poll_fn(|context| {
            let mut queue = self.0.borrow_mut();
            if let Some(item) = queue.pop() {
                return Poll::Ready(Some(item));
            }
            if queue.senders == 0 {
                return Poll::Ready(None);
            }
            match &mut queue.receiver {
                Some(waker) => waker.clone_from(context.waker()),
                None => queue.receiver = Some(context.waker().clone()),
            }
            Poll::Pending
        })
        .await
    }

    fn try_recv(&mut self) -> Result<T, TryRecvError> {
        let mut queue = self.0.borrow_mut();
        match queue.pop() {
            Some(item) => Ok(item),
            None if queue.senders == 0 => Err(TryRecvError::Disconnected),
            None => Err(TryRecvError::Empty),
        }
    }
}

impl<T: OptionalSend> MpscWeakSender<LocalMpsc, T> for WeakSender<T> {
    fn upgrade(&self) -> Option<Sender<T>> {
        let queue = self.0.upgrade()?;
        {
            let mut inner = queue.borrow_mut();
            if inner.senders == 0 {
                return None;
            }
            inner.senders += 1;
        }
        Some(Sender(queue))
    }
}
