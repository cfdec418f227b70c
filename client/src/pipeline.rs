//! Many operations under way on the one connection of a blocking client.
//!
//! Owns the turns in which bytes go out and come in at a time, in the thread of the caller. What goes out and what came in is the
//! business of `exchange`.

use std::{
    io::IoSlice,
    time::{Duration, Instant},
};

use kms_envelope::{ContextRef, DIGEST_LEN, INPUT_TAG_LEN, STREAM_HEAD_LEN};
use kms_protocol::KeyRef;
use nix::poll::PollFlags;

use crate::{
    client::Client,
    connection::{pause_for, receive_now, send_now, wait_for},
    error::Error,
    exchange::{Done, Exchange},
    items::{Item, Prepared, ReadItem, item_methods},
    operations,
};

/// Frames that are collected before they go out without anybody waiting for an answer.
const COLLECTED: usize = 32;

/// Operations under way on one connection, as many as the agent takes; see [`Client::pipeline`].
///
/// Each method sends, and says the number, from 0, under which [`next`](Iterator::next) will bring the result. Results come in any
/// order. With as many requests under way as the agent takes, a method waits for the result of one and keeps it; so fetch results in
/// between, or they take memory until the end. Operations go on over broken connections as [`Options::retry`](crate::Options::retry)
/// says. When a pipeline is dropped with operations under way, their results are lost and the client connects anew.
///
/// ```no_run
/// use kms_client::{Client, ContextRef, Item, KeyRef, Options};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let mut client = Client::connect(&Options::default())?;
/// let mut pipeline = client.pipeline();
/// for secret in ["first", "second", "third"] {
///     pipeline.encrypt(KeyRef::Name("backup"), ContextRef::EMPTY, secret.as_bytes());
/// }
/// for (number, result) in pipeline {
///     if let Item::Sealed(sealed) = result? {
///         println!("{number}: {} bytes", sealed.len());
///     }
/// }
/// # Ok(())
/// # }
/// ```
pub struct Pipeline<'a> {
    client: &'a mut Client,
    exchange: Exchange<Asked>,
    pushed: usize,
}

/// What is kept of a request.
struct Asked {
    number: usize,
    /// Nothing for what was never sent.
    read: Option<ReadItem>,
}

impl Client {
    /// Begins to ask for many operations at a time.
    #[must_use]
    pub fn pipeline(&mut self) -> Pipeline<'_> {
        let bindings = std::mem::take(&mut self.bindings);
        let exchange = Exchange::new(&self.connection.welcome, self.route.timeout, self.retry, bindings);
        let mut pipeline = Pipeline { client: self, exchange, pushed: 0 };
        if pipeline.client.connection.usable().is_err() {
            // Nothing was asked yet, so this only forgets which numbers are bound.
            pipeline.exchange.broke(Instant::now(), &Error::Broken, |_| true);
        }
        pipeline
    }
}

impl Pipeline<'_> {
    item_methods!();

    /// Operations whose results have not been fetched and may not have come.
    #[must_use]
    pub fn under_way(&self) -> usize {
        self.exchange.len()
    }

    fn push(&mut self, item: Result<Prepared, Error>) -> usize {
        let number = self.pushed;
        self.pushed = self.pushed.saturating_add(1);
        match item {
            Ok(Prepared { request, read, .. }) => {
                self.exchange.start(request, Asked { number, read: Some(read) });
                if self.exchange.to_send() >= COLLECTED {
                    self.turn(Duration::ZERO);
                }
                while self.exchange.is_full() {
                    self.turn(Duration::MAX);
                }
            }
            Err(error) => self.exchange.refuse(Asked { number, read: None }, error),
        }
        number
    }

    /// Moves bytes both ways once, after waiting for a chance to for `limit` at most.
    fn turn(&mut self, limit: Duration) {
        let now = Instant::now();
        let moved = match self.exchange.due(now) {
            true => Err(Error::Closed),
            false => self.connected(now).and_then(|()| self.move_bytes(now, limit)),
        };
        if let Err(error) = moved {
            self.client.connection.break_off();
            pause_for(self.exchange.broke(now, &error, |_| true));
        }
    }

    fn connected(&mut self, now: Instant) -> Result<(), Error> {
        if self.client.connection.is_inherited() {
            // The answers that are under way are our parent's; what we want of them we have to ask for ourselves.
            self.exchange.broke(now, &Error::Closed, |_| true);
        }
        if self.client.reconnect()? {
            self.exchange.reconnected(&self.client.connection.welcome);
        }
        Ok(())
    }

    fn move_bytes(&mut self, now: Instant, limit: Duration) -> Result<(), Error> {
        let socket = self.client.connection.socket();
        let due = self.exchange.wake().map_or(limit, |wake| wake.saturating_duration_since(now).min(limit));
        let ready = wait_for(socket, self.exchange.to_send() > 0, due)?;
        // What has come is taken first: an agent that cannot get rid of its answers takes no requests.
        if ready.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR)
            && let Some(got) = receive_now(socket, self.exchange.room())?
        {
            self.exchange.arrived(got, Instant::now())?;
        }
        if ready.contains(PollFlags::POLLOUT) {
            let output = self.exchange.output();
            let slices: Vec<_> = output.iter().map(|frame| IoSlice::new(frame)).collect();
            if let Some(sent) = send_now(socket, &slices)? {
                self.exchange.sent(sent, Instant::now());
            }
        }
        Ok(())
    }

    fn read(&mut self, done: Done<Asked>) -> (usize, Result<Item, Error>) {
        let Done { keep: Asked { number, read }, answer } = done;
        let item = answer.and_then(|call| {
            let accepted = call.accept()?;
            read.map_or(Err(Error::Broken), |read| Ok(read(accepted)?))
        });
        if let Err(Error::Reply(error)) = &item {
            let error = self.client.disbelieve(*error);
            self.exchange.broke(Instant::now(), &error, |_| true);
        }
        (number, item)
    }
}

impl Iterator for Pipeline<'_> {
    type Item = (usize, Result<Item, Error>);

    /// The next result; nothing when every operation had its own.
    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(done) = self.exchange.take() {
                return Some(self.read(done));
            }
            if self.exchange.len() == 0 {
                return None;
            }
            self.turn(Duration::MAX);
        }
    }
}

impl Drop for Pipeline<'_> {
    fn drop(&mut self) {
        let (bindings, busy) = self.exchange.end();
        self.client.bindings = bindings;
        if busy {
            self.client.connection.break_off();
        }
    }
}
