//! Many requests under way on one connection (`docs/protocol.md`, section 6): which bytes are to be sent, what becomes of those that
//! arrive, and what is left to do when the connection breaks.
//!
//! The core that pipelines and the async client share: no socket, no clock, no thread. Replies are matched by request id, in any
//! order. Whoever owns it moves the bytes, and reads and writes at a time, so that full buffers on both sides stop nobody.

use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, Instant},
};

use kms_protocol::{Bound, KeyRef, Status, Welcome, decode_fields};

use crate::{
    client::{Binding, answer_limit},
    connection::Call,
    error::{Error, ReplyError},
    operations,
    retry::{Pauses, Trouble, is_passing},
    wire::{Assembler, Outgoing, Reply, frame_max, is_repeatable},
};

/// Frames that go out in one call.
const SLICES_MAX: usize = 64;

/// Requests and replies of one client; `T` is what its owner keeps with a request.
pub(crate) struct Exchange<T> {
    assembler: Assembler,
    timeout: Duration,
    retry: Duration,
    opcodes: Vec<u16>,
    frame_max: usize,
    in_flight_max: usize,
    waiting: HashMap<u32, Waiting<T>>,
    /// Ids, in the order in which they go out.
    outbox: VecDeque<u32>,
    /// Bytes of the first frame in the outbox that are gone.
    written: usize,
    /// When that frame has to be gone as a whole.
    gone_by: Option<Instant>,
    /// Requests that are gone as a whole.
    under_way: usize,
    started: u64,
    bindings: HashMap<u32, Binding>,
    pauses: Pauses,
    over: VecDeque<Done<T>>,
}

struct Waiting<T> {
    order: u64,
    request: Outgoing,
    /// Nothing: we bind a number again on our own.
    keep: Option<T>,
    state: State,
    trouble: Trouble,
}

#[derive(Clone, Copy, PartialEq)]
enum State {
    /// Until a number that it uses is bound.
    Parked,
    Queued,
    Sent {
        until: Instant,
    },
    /// The agent was busy.
    Delayed {
        until: Instant,
    },
}

/// A request that is over.
pub(crate) struct Done<T> {
    pub(crate) keep: T,
    pub(crate) answer: Result<Call, Error>,
}

impl<T> Exchange<T> {
    pub(crate) fn new(
        welcome: &Welcome,
        timeout: Duration,
        retry: Duration,
        bindings: HashMap<u32, Binding>,
    ) -> Self {
        let mut exchange = Self {
            assembler: Assembler::new(0),
            timeout,
            retry,
            opcodes: Vec::new(),
            frame_max: 0,
            in_flight_max: 0,
            waiting: HashMap::new(),
            outbox: VecDeque::new(),
            written: 0,
            gone_by: None,
            under_way: 0,
            started: 0,
            bindings,
            pauses: Pauses::default(),
            over: VecDeque::new(),
        };
        exchange.go_by(welcome);
        exchange
    }

    //= docs/protocol.md#51-welcome
    //# A client MUST go by these numbers, not by those of this text, and MUST NOT send an opcode that is not listed.
    fn go_by(&mut self, welcome: &Welcome) {
        self.opcodes.clone_from(&welcome.opcodes);
        self.frame_max = frame_max(welcome);
        self.in_flight_max = usize::try_from(welcome.in_flight_max).unwrap_or(usize::MAX).max(1);
        self.assembler = Assembler::new(self.frame_max);
    }

    /// Takes up a request. What cannot be sent is over at once.
    pub(crate) fn start(&mut self, request: Outgoing, keep: T) {
        self.insert(request, Some(keep));
    }

    fn insert(&mut self, mut request: Outgoing, keep: Option<T>) {
        //= docs/protocol.md#6-hello-and-the-order-of-messages
        //# A request id MUST NOT be used again before its reply has come
        let id = loop {
            self.started = self.started.wrapping_add(1);
            let [.., a, b, c, d] = self.started.to_be_bytes();
            let id = u32::from_be_bytes([a, b, c, d]);
            if !self.waiting.contains_key(&id) {
                break id;
            }
        };
        request.set_id(id);
        let trouble = Trouble::new(self.retry);
        let waiting = Waiting { order: self.started, request, keep, state: State::Queued, trouble };
        self.waiting.insert(id, waiting);
        self.line_up(id);
    }

    /// A request that was over before it was one.
    pub(crate) fn refuse(&mut self, keep: T, error: Error) {
        self.over.push_back(Done { keep, answer: Err(error) });
    }

    /// Puts a request into the outbox, or parks it until the numbers that it uses are bound.
    fn line_up(&mut self, id: u32) {
        let Some(waiting) = self.waiting.get_mut(&id) else { return };
        let operation = waiting.request.operation;
        if !self.opcodes.contains(&operation.code()) {
            let retry_after = Duration::ZERO;
            return self.fail(id, Error::Refused { operation, status: Status::Unsupported, retry_after });
        }
        if waiting.request.bytes().len() > self.frame_max {
            return self.fail(id, Error::TooLong { what: "request", max: self.frame_max });
        }
        let away = |number: &u32| self.bindings.get(number).is_some_and(|binding| !binding.here);
        let missing: Vec<u32> = waiting.request.bound.into_iter().flatten().filter(away).collect();
        if missing.is_empty() {
            waiting.state = State::Queued;
            self.outbox.push_back(id);
            return;
        }
        waiting.state = State::Parked;
        for number in missing {
            let ours = |waiting: &Waiting<T>| waiting.keep.is_none() && waiting.request.binds == Some(number);
            let Some(binding) = self.bindings.get(&number).copied() else { continue };
            if self.waiting.values().any(ours) {
                continue;
            }
            match Outgoing::new(&operations::bind(number, KeyRef::Id(binding.id)).request) {
                Ok(bind) => self.insert(bind, None),
                Err(error) => self.fail(id, error),
            }
        }
    }

    /// A request is over without an answer.
    fn fail(&mut self, id: u32, error: Error) {
        if let Some(Waiting { keep: Some(keep), .. }) = self.waiting.remove(&id) {
            self.refuse(keep, error);
        }
    }

    /// Requests that are not over.
    pub(crate) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// As many requests as an agent lets us have.
    pub(crate) fn is_full(&self) -> bool {
        self.waiting.len() >= self.in_flight_max
    }

    /// Frames that could go out now.
    pub(crate) fn to_send(&self) -> usize {
        self.outbox.len().min(self.in_flight_max.saturating_sub(self.under_way))
    }

    //= docs/protocol.md#6-hello-and-the-order-of-messages
    //# With `in_flight_max` requests without an answer, or replies that are not read, a client MUST NOT count on the agent reading on.
    /// What is to be sent next.
    pub(crate) fn output(&self) -> Vec<&[u8]> {
        let frames = self.outbox.iter().take(self.to_send().min(SLICES_MAX));
        let mut skip = self.written;
        frames
            .filter_map(|id| {
                let bytes = self.waiting.get(id)?.request.bytes();
                bytes.get(std::mem::take(&mut skip)..)
            })
            .collect()
    }

    /// `len` bytes of the output are gone.
    pub(crate) fn sent(&mut self, len: usize, now: Instant) {
        self.written = self.written.saturating_add(len);
        while let Some(waiting) = self.outbox.front().and_then(|id| self.waiting.get_mut(id)) {
            let len = waiting.request.bytes().len();
            if self.written < len {
                break;
            }
            self.written = self.written.saturating_sub(len);
            self.gone_by = None;
            let limit = answer_limit(waiting.request.operation, self.timeout);
            waiting.state = State::Sent { until: now.checked_add(limit).unwrap_or(now) };
            self.under_way = self.under_way.saturating_add(1);
            self.outbox.pop_front();
        }
        // An agent that takes a byte at a time must not renew it.
        if self.written > 0 && self.gone_by.is_none() {
            self.gone_by = now.checked_add(self.timeout);
        }
    }

    /// Where what arrives belongs.
    pub(crate) fn room(&mut self) -> &mut [u8] {
        self.assembler.room()
    }

    /// `len` bytes have arrived there; what of it is whole is taken up.
    ///
    /// # Errors
    /// What arrived is no answer to anything that was asked. The connection has to end, see [`broke`](Self::broke).
    pub(crate) fn arrived(&mut self, len: usize, now: Instant) -> Result<(), ReplyError> {
        self.assembler.filled(len);
        while let Some(frame) = self.assembler.next(&mut None)? {
            self.answered(Reply::new(frame), now)?;
        }
        Ok(())
    }

    /// The next request that is over.
    pub(crate) fn take(&mut self) -> Option<Done<T>> {
        self.over.pop_front()
    }

    fn answered(&mut self, reply: Reply, now: Instant) -> Result<(), ReplyError> {
        let id = reply.id()?;
        let waiting = self.waiting.get_mut(&id);
        let waiting = waiting.filter(|waiting| matches!(waiting.state, State::Sent { .. }));
        let waiting = waiting.ok_or(ReplyError::RequestId)?;
        let operation = waiting.request.operation;
        let answer = reply.accept(operation, id);
        self.under_way = self.under_way.saturating_sub(1);
        self.pauses.begin_anew();
        if let Err(Error::Refused { status: Status::Busy, retry_after, .. }) = &answer
            && let Some(pause) = waiting.trouble.busy(now, *retry_after)
        {
            waiting.state = State::Delayed { until: now.checked_add(pause).unwrap_or(now) };
            return Ok(());
        }
        let bound = match (waiting.request.binds, &answer) {
            (Some(number), Ok(accepted)) => {
                let Bound { id } = accepted.fields(decode_fields)?;
                if waiting.keep.is_none() && self.bindings.get(&number).is_none_or(|binding| binding.id != id)
                {
                    return Err(ReplyError::Shape);
                }
                self.bindings.insert(number, Binding { id, here: true });
                Some(number)
            }
            (number, _) => number,
        };
        let answer = answer.map(drop);
        let Some(Waiting { keep, .. }) = self.waiting.remove(&id) else { return Ok(()) };
        match (keep, answer) {
            (Some(keep), Err(Error::Reply(error))) => {
                self.refuse(keep, error.into());
                return Err(error);
            }
            (Some(keep), _) => {
                self.over.push_back(Done { keep, answer: Ok(Call { operation, id, reply }) });
            }
            (None, answer) => {
                let number = bound.unwrap_or_default();
                for id in self.parked(number) {
                    match &answer {
                        Ok(()) => self.line_up(id),
                        Err(Error::Refused { status, retry_after, .. }) => {
                            let (status, retry_after) = (*status, *retry_after);
                            let operation = self.waiting.get(&id).map_or(operation, |w| w.request.operation);
                            self.fail(id, Error::Refused { operation, status, retry_after });
                        }
                        Err(error) => self.fail(id, error.again()),
                    }
                }
            }
        }
        Ok(())
    }

    /// Those that wait for this number to be bound, in their order.
    fn parked(&self, number: u32) -> Vec<u32> {
        self.in_order(|waiting| {
            waiting.state == State::Parked && waiting.request.bound.contains(&Some(number))
        })
    }

    fn in_order(&self, which: impl Fn(&Waiting<T>) -> bool) -> Vec<u32> {
        let found = self.waiting.iter().filter(|(_, waiting)| which(waiting));
        let mut found: Vec<_> = found.map(|(id, waiting)| (waiting.order, *id)).collect();
        found.sort_unstable();
        found.into_iter().map(|(_, id)| id).collect()
    }

    /// When something is to be done although nothing arrives.
    pub(crate) fn wake(&self) -> Option<Instant> {
        let times = self.waiting.values().filter_map(|waiting| match waiting.state {
            State::Sent { until } | State::Delayed { until } => Some(until),
            State::Parked | State::Queued => None,
        });
        times.chain(self.gone_by).min()
    }

    /// Does what has become due. True: an answer is overdue, or the agent does not take a request; that one is over, and the connection
    /// has to end.
    pub(crate) fn due(&mut self, now: Instant) -> bool {
        for id in self.in_order(|waiting| matches!(waiting.state, State::Delayed { until } if until <= now)) {
            self.line_up(id);
        }
        let late = self.in_order(|waiting| matches!(waiting.state, State::Sent { until } if until <= now));
        let stuck = self.gone_by.is_some_and(|until| until <= now);
        if let Some(id) = self.outbox.front().copied().filter(|_| stuck) {
            self.fail(id, Error::Timeout { limit: self.timeout });
        }
        for id in &late {
            let operation = self.waiting.get(id).map(|waiting| waiting.request.operation);
            let limit = operation.map_or(self.timeout, |operation| answer_limit(operation, self.timeout));
            self.fail(*id, Error::Timeout { limit });
        }
        stuck || !late.is_empty()
    }

    //= docs/protocol.md#tokens
    //# So a client whose connection broke connects anew and sends the same bytes again.
    /// The connection is gone, or could not be made. Says after which pause it is to be made anew; requests that cannot be repeated,
    /// that nobody waits for any more, or whose patience is at its end are over.
    pub(crate) fn broke(&mut self, now: Instant, error: &Error, is_wanted: impl Fn(&T) -> bool) -> Duration {
        self.assembler = Assembler::new(self.frame_max);
        self.outbox.clear();
        self.written = 0;
        self.gone_by = None;
        self.under_way = 0;
        self.bindings.values_mut().for_each(|binding| binding.here = false);
        let pause = self.pauses.next();
        for id in self.in_order(|_| true) {
            let Some(waiting) = self.waiting.get_mut(&id) else { continue };
            if !waiting.keep.as_ref().is_some_and(&is_wanted) {
                self.waiting.remove(&id);
                continue;
            }
            let sent = matches!(waiting.state, State::Sent { .. });
            let again = is_passing(error) && (!sent || is_repeatable(waiting.request.operation));
            match again.then(|| waiting.trouble.lost(now, pause)).flatten() {
                Some(_) if matches!(waiting.state, State::Delayed { .. }) => {}
                Some(_) => waiting.state = State::Queued,
                None => self.fail(id, error.again()),
            }
        }
        // Nobody is left to pause for.
        if self.waiting.is_empty() { Duration::ZERO } else { pause }
    }

    /// There is a new connection: everything that is left goes out on it, in the old order.
    pub(crate) fn reconnected(&mut self, welcome: &Welcome) {
        self.go_by(welcome);
        self.outbox.clear();
        for id in self.in_order(|waiting| matches!(waiting.state, State::Queued | State::Parked)) {
            self.line_up(id);
        }
    }

    /// The numbers, and whether the connection is in the middle of something.
    pub(crate) fn end(&mut self) -> (HashMap<u32, Binding>, bool) {
        let busy = self.under_way > 0 || self.written > 0 || !self.assembler.is_between_frames();
        (std::mem::take(&mut self.bindings), busy)
    }
}
