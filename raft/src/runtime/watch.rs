//! The latest value of something, and who waits for the next one.

use std::cell::{Cell, Ref, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

use openraft_rt::watch::{RecvError, SendError, Watch, WatchReceiver, WatchSender};
use openraft_rt::{OptionalSend, OptionalSync};

pub struct LocalWatch;

struct Shared<T> {
    value: RefCell<T>,
    version: Cell<u64>,
    senders: Cell<usize>,
    receivers: Cell<usize>,
    next_receiver: Cell<u64>,
    /// At most one per receiver, by its number.
    waiting: RefCell<Vec<(u64, Waker)>>,
}

pub struct Sender<T>(Rc<Shared<T>>);

pub struct Receiver<T> {
    shared: Rc<Shared<T>>,
    number: u64,
    seen: u64,
}

impl<T> Shared<T> {
    fn changed(&self) {
        self.version.set(self.version.get() + 1);
        self.wake_all();
    }

    fn wake_all(&self) {
        if self.waiting.borrow().is_empty() {
            return;
        }
        // Taken out first: a waker may run code that comes back here.
        for (_, waker) in self.waiting.take() {
            waker.wake();
        }
    }

    fn receiver(self: &Rc<Self>, seen: u64) -> Receiver<T> {
        let number = self.next_receiver.get();
        self.next_receiver.set(number + 1);
        self.receivers.set(self.receivers.get() + 1);
        Receiver { shared: self.clone(), number, seen }
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        self.0.senders.set(self.0.senders.get() + 1);
        Self(self.0.clone())
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        self.0.senders.set(self.0.senders.get() - 1);
        if self.0.senders.get() == 0 {
            self.0.wake_all();
        }
    }
}

impl<T> Clone for Receiver<T> {
    fn clone(&self) -> Self {
        self.shared.receiver(self.seen)
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        self.shared.receivers.set(self.shared.receivers.get() - 1);
        let mut waiting = self.shared.waiting.borrow_mut();
        if let Some(at) = waiting.iter().position(|entry| entry.0 == self.number) {
            waiting.swap_remove(at);
        }
    }
}

impl Watch for LocalWatch {
    type Sender<T: OptionalSend + OptionalSync> = Sender<T>;
    type Receiver<T: OptionalSend + OptionalSync> = Receiver<T>;
    type Ref<'a, T: OptionalSend + 'a> = Ref<'a, T>;

    fn channel<T: OptionalSend + OptionalSync>(value: T) -> (Sender<T>, Receiver<T>) {
        let shared = Rc::new(Shared {
            value: RefCell::new(value),
            version: Cell::new(0),
            senders: Cell::new(1),
            receivers: Cell::new(0),
            next_receiver: Cell::new(0),
            waiting: RefCell::default(),
        });
        let receiver = shared.receiver(0);
        (Sender(shared), receiver)
    }
}

impl<T: OptionalSend + OptionalSync> WatchSender<LocalWatch, T> for Sender<T> {
    fn send(&self, value: T) -> Result<(), SendError<T>> {
        if self.0.receivers.get() == 0 {
            return Err(SendError(value));
        }
        let old = self.0.value.replace(value);
        self.0.changed();
        drop(old);
        Ok(())
    }

    fn send_if_modified<F: FnOnce(&mut T) -> bool>(&self, modify: F) -> bool {
        let modified = modify(&mut self.0.value.borrow_mut());
        if modified {
            self.0.changed();
        }
        modified
    }

    fn borrow_watched(&self) -> Ref<'_, T> {
        self.0.value.borrow()
    }

    fn subscribe(&self) -> Receiver<T> {
        self.0.receiver(self.0.version.get())
    }
}

impl<T: OptionalSend + OptionalSync> WatchReceiver<LocalWatch, T> for Receiver<T> {
    async fn changed(&mut self) -> Result<(), RecvError> {
        poll_fn(|context| {
            if self.shared.version.get() != self.seen {
                self.seen = self.shared.version.get();
                return Poll::Ready(Ok(()));
            }
            if self.shared.senders.get() == 0 {
                return Poll::Ready(Err(RecvError(())));
            }
            let mut waiting = self.shared.waiting.borrow_mut();
            match waiting.iter_mut().find(|entry| entry.0 == self.number) {
                Some(entry) => entry.1.clone_from(context.waker()),
                None => waiting.push((self.number, context.waker().clone())),
            }
            Poll::Pending
        })
        .await
    }

    fn borrow_watched(&self) -> Ref<'_, T> {
        self.shared.value.borrow()
    }

    fn borrow_and_update(&mut self) -> Ref<'_, T> {
        self.seen = self.shared.version.get();
        self.shared.value.borrow()
    }
}
