//! `rewrap`: which files, what becomes of each, and what is said in the end.
//!
//! Several files at a time, each worker with a connection of its own, since most of the time goes by waiting for the disk. In a tree
//! no symlink is followed, and no path is resolved twice: everything is opened beneath the folder that the user named. How
//! a file is changed is the part of `place`.

mod place;

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fs::{self, File},
    io::{self, IoSlice},
    os::{
        fd::OwnedFd,
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use kms_envelope::{
    HEADER_LEN, Header, HeaderError, KeyId, MESSAGE_MAX, Purpose, REWRAP_LEN, STREAM_HEAD_LEN, message_len,
};
use nix::{
    dir::{Dir, Type},
    errno::Errno,
    fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2},
    sys::stat::{SFlag, fstatat},
};

use self::place::{Held, Leftover, NEW_SUFFIX, Place, SIDE_PREFIX, named_by};
use super::{
    arguments::{Global, Rewrap},
    connect,
    data::{Opening, Sealing, named_key},
    files::{Content, Destination},
    forms::{self, Source},
    key_name, options,
    ui::{Failure, Ui},
};
use crate::{Client, ContextRef, EncryptionContext, Error, Input, KeyRef, Output, Progress, Status};

/// Files that are worked on at a time: enough that the disk can take several syncs together.
const WORKERS: usize = 8;

/// Of files that are encrypted anew, which keep all cores busy by themselves.
const REENCRYPTING_WORKERS: usize = 2;

/// Bytes of a stream that are passed on at a time.
const PIECE: usize = 256 << 10;

/// What became of a file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// It is under the new version now.
    Rewrapped,
    /// It was already.
    Current,
    /// It is none of ours, or under another key.
    Skipped,
}

/// How many files came to what.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) rewrapped: u64,
    pub(super) current: u64,
    pub(super) skipped: u64,
    pub(super) failures: Vec<(PathBuf, Failure)>,
}

impl Rewrap {
    pub(super) fn run(&self, global: &Global, ui: &Ui) -> Result<ExitCode, Failure> {
        for name in self.which.key.iter().chain(&self.to) {
            let _ = key_name(name)?;
        }
        let context = self.context.read()?;
        let standard = self.paths.is_empty() || self.paths.iter().any(|path| path == "-");
        if standard && (self.paths.len() > 1 || self.recursive) {
            return Err(Failure::StandardInputAlone);
        }
        if standard && global.dry_run {
            return Err(Failure::NothingToPrevent);
        }
        let destination = match standard {
            true => Some(Destination::new(None, if self.text { Content::Text } else { Content::Binary })?),
            false => None,
        };
        let mut client = connect(global, ui)?;
        let step = Move::new(self, context, global, ui, &mut client)?;
        if let Some(destination) = destination {
            step.pass(&mut client, &destination)?;
            return Ok(ExitCode::SUCCESS);
        }
        // Each worker has its own.
        drop(client);
        let mut jobs = Jobs::default();
        for path in &self.paths {
            jobs.add(Path::new(path), self.recursive)?;
        }
        step.all(jobs)
    }
}

/// What is to be done to each ciphertext.
struct Move<'a> {
    arguments: &'a Rewrap,
    global: &'a Global,
    ui: &'a Ui,
    context: EncryptionContext,
    patience: Duration,
    /// That of `-k`, where the agent tells.
    from: Option<KeyId>,
    /// That of `--to`, where the agent tells.
    to: Option<KeyId>,
    /// Primary versions, as far as they were needed.
    primaries: Mutex<BTreeMap<KeyId, u32>>,
    /// Keys that the user did not name, and was told of.
    told: Mutex<BTreeSet<KeyId>>,
}

impl<'a> Move<'a> {
    fn new(
        arguments: &'a Rewrap,
        context: EncryptionContext,
        global: &'a Global,
        ui: &'a Ui,
        client: &mut Client,
    ) -> Result<Self, Failure> {
        let primaries = Mutex::default();
        let mut id = |name: &Option<String>| match name {
            None => Ok(None),
            Some(name) => known_id(client, name, &primaries),
        };
        let (from, to) = (id(&arguments.which.key)?, id(&arguments.to)?);
        let patience = options(global)?.timeout;
        Ok(Self { arguments, global, ui, context, patience, from, to, primaries, told: Mutex::default() })
    }

    fn key(&self, header: &Header) -> KeyRef<'_> {
        match &self.arguments.which.key {
            Some(name) => KeyRef::Name(name),
            None => KeyRef::Id(*header.key_id.as_bytes()),
        }
    }

    fn target(&self) -> Option<KeyRef<'_>> {
        self.arguments.to.as_deref().map(KeyRef::Name)
    }

    /// An error about the key of a ciphertext, in words that name it.
    fn failed(&self, header: &Header, error: Error) -> Failure {
        match (&self.arguments.which.key, error.status()) {
            // That it is there was looked at: so it is the version that is not.
            (Some(name), Some(Status::NotFound)) if self.from.is_some() => {
                Failure::NoVersion { name: name.clone(), version: header.key_version.value() }
            }
            (Some(name), _) => Failure::of_key(name, error),
            (None, _) => Failure::of_key(&header.key_id.to_string(), error),
        }
    }

    /// Says once of each key which it is that was not named.
    fn tell(&self, client: &mut Client, header: &Header) -> Result<(), Failure> {
        if self.arguments.which.any_key && lock(&self.told).insert(header.key_id) {
            let _ = named_key(client, self.ui, header.key_id)?;
        }
        Ok(())
    }

    /// Whether this ciphertext is one to be moved; `tree`: what is not is no mistake.
    fn is_meant(&self, header: &Result<Header, HeaderError>, tree: bool) -> Result<Meant, Failure> {
        let header = match header {
            Ok(header) => header,
            Err(HeaderError::Truncated | HeaderError::NotOurs) if tree => return Ok(Meant::No),
            Err(error) => return Err(Error::from(*error).into()),
        };
        match header.purpose {
            Purpose::Message | Purpose::WrappedKey | Purpose::Stream => {}
            // Nobody can open a tag, so there is nothing to move.
            _ if tree => return Ok(Meant::No),
            Purpose::Tag => return Err(Failure::IsTag),
            other => return Err(Error::from(HeaderError::Purpose(other.number())).into()),
        }
        match self.from {
            Some(from) if from != header.key_id => match (self.to, tree) {
                (Some(to), _) if to == header.key_id => Ok(Meant::Done),
                (_, true) => Ok(Meant::No),
                (_, false) => Err(Failure::of_key(
                    self.arguments.which.key.as_deref().unwrap_or_default(),
                    Error::Refused {
                        operation: crate::Opcode::Rewrap,
                        status: Status::WrongKey,
                        retry_after: Duration::ZERO,
                    },
                )),
            },
            _ => Ok(Meant::Yes(*header)),
        }
    }

    /// Has the agent make what takes the place of a ciphertext.
    fn ask(
        &self,
        client: &mut Client,
        header: &Header,
        ciphertext: &[u8],
    ) -> Result<Option<Vec<u8>>, Failure> {
        let context = match header.purpose {
            // A stream's context is none of the agent's business here.
            Purpose::Stream => ContextRef::EMPTY,
            _ => self.context.as_ref(),
        };
        let moved = client.rewrap(self.key(header), context, ciphertext, self.target());
        moved.map(|moved| moved.replacement).map_err(|error| self.failed(header, error))
    }

    /// From standard input to standard output.
    fn pass(&self, client: &mut Client, destination: &Destination) -> Result<(), Failure> {
        let mut source = Source::open(None, self.arguments.text)?;
        let (header, mut front) = read_front(&mut source)?;
        let header = match self.is_meant(&header, false)? {
            Meant::Yes(header) => Some(header),
            Meant::Done | Meant::No => None,
        };
        if let Some(header) = header {
            self.tell(client, &header)?;
            if header.purpose != Purpose::Stream {
                front = self.whole(&front, &mut source)?;
            }
            if self.arguments.reencrypt {
                let mut pair = Pair { opening: client, sealing: &mut connect(self.global, self.ui)? };
                if !self.arguments.text {
                    return destination.fill(|output| {
                        self.reencrypt(&mut pair, &header, &front, source, output).map_err(into_client_error)
                    });
                }
                let mut new = Vec::new();
                self.reencrypt(&mut pair, &header, &front, source, Output::to_writer(&mut new))?;
                return destination.fill(|output| output.put(&forms::line(&new)));
            }
            if let Some(new) = self.ask(client, &header, &front)? {
                front = new;
            }
        }
        if self.arguments.text {
            front.extend(source.rest(&[], LINE_MAX)?.expose_secret());
            return destination.fill(|output| output.put(&forms::line(&front)));
        }
        destination.fill(|output| {
            output.write(0, &mut [IoSlice::new(&front)])?;
            let mut piece = vec![0; PIECE];
            loop {
                match source.take(&mut piece)? {
                    0 => return output.finish(),
                    got => output.write(0, &mut [IoSlice::new(piece.get(..got).unwrap_or_default())])?,
                }
            }
        })
    }

    /// The whole of what is not a stream, of which the front was read.
    fn whole(&self, front: &[u8], source: &mut Source) -> Result<Vec<u8>, Failure> {
        Ok(source.rest(front, message_len(MESSAGE_MAX))?.expose_secret().to_owned())
    }

    /// Every file; says in the end what became of them.
    fn all(&self, jobs: Jobs) -> Result<ExitCode, Failure> {
        let total = jobs.files.len();
        let run = Run {
            step: self,
            bar: self.ui.count_files(total),
            tally: Mutex::new(Tally { skipped: jobs.skipped, failures: jobs.failures, ..Tally::default() }),
            end: Mutex::new(None),
            is_over: AtomicBool::new(false),
        };
        // What others left comes first: the same file can have a second name elsewhere.
        for side in jobs.sides.iter().filter(|_| !self.global.dry_run) {
            let recovered = side.place().and_then(|place| self.recover(&place));
            if let Err(failure) = recovered {
                lock(&run.tally).failures.push((side.path(), failure));
            }
        }
        run.through(&jobs.files);
        let Run { bar, tally, end, .. } = run;
        drop(bar);
        let tally = tally.into_inner().unwrap_or_else(PoisonError::into_inner);
        self.ui.tally(&tally, self.global.dry_run)?;
        for (path, failure) in &tally.failures {
            self.ui.failure_at(path, failure);
        }
        match end.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(failure) => Err(failure),
            None if tally.failures.is_empty() => Ok(ExitCode::SUCCESS),
            None => Ok(ExitCode::FAILURE),
        }
    }

    /// The file that a side file speaks of, whatever becomes of it afterwards.
    fn recover(&self, side: &Place) -> Result<(), Failure> {
        match named_by(side)? {
            Some(place) => place.hold(self.patience)?.recover().map(|_| ()),
            None => Ok(()),
        }
    }

    /// One file.
    fn one(&self, clients: &mut Clients, job: &Job) -> Result<Outcome, Failure> {
        let place = job.place()?;
        let held = match place.hold(Duration::ZERO) {
            Err(Failure::InUse { .. }) => {
                let failed = |source| Failure::Open { path: job.path(), source };
                // Another program may hold a file of its own for as long as it runs.
                if job.in_tree() && !place.may_be_ours().map_err(failed)? {
                    return Ok(Outcome::Skipped);
                }
                place.hold(self.patience)?
            }
            held => held?,
        };
        if self.global.dry_run {
            return self.foresee(clients.opening(self)?, &held, job.in_tree());
        }
        let leftover = held.recover()?;
        let file = held.file().try_clone().map_err(Error::Input)?;
        let mut source = match Source::new(file, self.arguments.text) {
            Ok(source) => source,
            Err(Failure::NotText | Failure::LongText { .. }) if job.in_tree() => return Ok(Outcome::Skipped),
            Err(failure) => return Err(failure),
        };
        let (header, front) = read_front(&mut source)?;
        let header = match self.is_meant(&header, job.in_tree())? {
            Meant::Yes(header) => header,
            Meant::Done => return Ok(Outcome::Current),
            Meant::No => return Ok(Outcome::Skipped),
        };
        self.tell(clients.opening(self)?, &header)?;
        let whole = match header.purpose {
            Purpose::Stream => None,
            _ => Some(self.whole(&front, &mut source)?),
        };
        let ciphertext = whole.as_ref().unwrap_or(&front);
        if self.arguments.reencrypt {
            let mut pair = clients.pair(self)?;
            held.replace_whole(|file| {
                if !self.arguments.text {
                    let output = Output::to_new_file(file.try_clone().map_err(Error::Output)?);
                    return self.reencrypt(&mut pair, &header, ciphertext, source, output);
                }
                let mut new = Vec::new();
                self.reencrypt(&mut pair, &header, ciphertext, source, Output::to_writer(&mut new))?;
                put(file, &forms::line(&new))
            })?;
            if leftover == Leftover::Doubtful {
                held.drop_leftover()?;
            }
            return Ok(Outcome::Rewrapped);
        }
        let new = match self.ask(clients.opening(self)?, &header, ciphertext) {
            // Without the right to see its name only the agent can tell.
            Err(failure) if job.in_tree() && failure.status() == Some(Status::WrongKey) => {
                return Ok(Outcome::Skipped);
            }
            new => new?,
        };
        if leftover == Leftover::Doubtful {
            held.drop_leftover()?;
        }
        let Some(mut new) = new else { return Ok(Outcome::Current) };
        match (front.as_slice().try_into(), new.as_slice().try_into()) {
            (Ok(old), Ok(front)) if header.purpose == Purpose::Stream && !self.arguments.text => {
                held.replace_front(old, front)?;
            }
            _ => {
                if self.arguments.text {
                    new.extend(source.rest(&[], LINE_MAX)?.expose_secret());
                    new = forms::line(&new);
                }
                held.replace_whole(|file| put(file, &new))?;
            }
        }
        Ok(Outcome::Rewrapped)
    }

    /// What would become of a file, by what its header says.
    fn foresee(&self, client: &mut Client, held: &Held<'_>, tree: bool) -> Result<Outcome, Failure> {
        let file = held.file().try_clone().map_err(Error::Input)?;
        let mut source = Source::new(file, self.arguments.text)?;
        let mut bytes = [0; HEADER_LEN];
        let got = source.take(&mut bytes)?;
        let header = match self.is_meant(&Header::parse(bytes.get(..got).unwrap_or_default()), tree)? {
            Meant::Yes(header) => header,
            Meant::Done => return Ok(Outcome::Current),
            Meant::No => return Ok(Outcome::Skipped),
        };
        if self.arguments.reencrypt {
            return Ok(Outcome::Rewrapped);
        }
        let id = self.to.unwrap_or(header.key_id);
        let known = lock(&self.primaries).get(&id).copied();
        let primary = match known {
            Some(primary) => primary,
            None => {
                let described = client.describe(KeyRef::Id(*id.as_bytes()));
                let primary = described.map_err(|error| self.failed(&header, error))?.key.primary;
                lock(&self.primaries).insert(id, primary);
                primary
            }
        };
        match id == header.key_id && primary == header.key_version.value() {
            true => Ok(Outcome::Current),
            false => Ok(Outcome::Rewrapped),
        }
    }

    /// Decrypts and encrypts anew; of a stream `front` is what was read of it, of anything else all of it.
    fn reencrypt(
        &self,
        clients: &mut Pair<'_>,
        header: &Header,
        front: &[u8],
        mut source: Source,
        output: Output<'_>,
    ) -> Result<(), Failure> {
        let key = self.key(header);
        let target = self.target().unwrap_or(key);
        let context = self.context.as_ref();
        let failed = |error| self.failed(header, error);
        let new = match header.purpose {
            Purpose::Stream => {
                let mut head = Box::new([0; STREAM_HEAD_LEN]);
                let (known, rest) = head.split_at_mut_checked(front.len()).ok_or(Error::InvalidCiphertext)?;
                known.copy_from_slice(front);
                if source.take(rest)? < rest.len() {
                    return Err(Error::InvalidCiphertext.into());
                }
                let opening = Opening::of(clients.opening, key, context, &head).map_err(failed)?;
                let sealing = Sealing::of(clients.sealing, target, context).map_err(failed)?;
                return Ok(through(opening, sealing, source.into_input()?, output)?);
            }
            Purpose::WrappedKey => {
                let plaintext = clients.opening.unwrap(key, context, front).map_err(failed)?;
                clients.sealing.wrap(target, context, plaintext.expose_secret()).map_err(failed)?
            }
            _ => {
                let plaintext = clients.opening.decrypt(key, context, front).map_err(failed)?;
                clients.sealing.encrypt(target, context, plaintext.expose_secret()).map_err(failed)?
            }
        };
        Ok(output.put(&new)?)
    }
}

/// What is to be done with a ciphertext.
enum Meant {
    Yes(Header),
    /// It is under the key to which everything is to be moved.
    Done,
    No,
}

/// Longest rest of a ciphertext in one line.
const LINE_MAX: usize = 2 * MESSAGE_MAX;

fn put(file: &File, bytes: &[u8]) -> Result<(), Failure> {
    Ok(Output::to_new_file(file.try_clone().map_err(Error::Output)?).put(bytes)?)
}

/// The first 132 bytes, or what there is; and what the header in them says.
fn read_front(source: &mut Source) -> Result<(Result<Header, HeaderError>, Vec<u8>), Failure> {
    let mut front = vec![0; REWRAP_LEN];
    let got = source.take(&mut front)?;
    front.truncate(got);
    Ok((Header::parse(&front), front))
}

/// The id of a key, where the agent tells it.
fn known_id(
    client: &mut Client,
    name: &str,
    primaries: &Mutex<BTreeMap<KeyId, u32>>,
) -> Result<Option<KeyId>, Failure> {
    match client.describe(KeyRef::Name(name)) {
        Ok(description) => {
            let id = KeyId::from_bytes(description.key.id);
            lock(primaries).insert(id, description.key.primary);
            Ok(Some(id))
        }
        // To use a key and to see it are two rights.
        Err(Error::Refused { status: Status::Denied, .. }) => Ok(None),
        Err(error) => Err(Failure::of_key(name, error)),
    }
}

/// From one stream into another, with nothing but a pipe in between.
fn through(
    opening: Opening<'_>,
    sealing: Sealing<'_>,
    input: Input<'_>,
    output: Output<'_>,
) -> Result<(), Error> {
    let (reader, writer) = io::pipe().map_err(Error::Output)?;
    let reader = Input::from_file(File::from(OwnedFd::from(reader)))?;
    let (opened, sealed) = thread::scope(|scope| {
        let opened = thread::Builder::new()
            .spawn_scoped(scope, move || opening.run(input, Output::to_writer(writer), &()))
            .map_err(Error::Thread);
        let sealed = sealing.run(reader, output, &());
        let opened =
            opened.and_then(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        (opened, sealed)
    });
    // Who seals sees only that the pipe has ended, and who opens only that nobody reads it.
    match (opened, sealed) {
        (_, Err(error)) => Err(error),
        // What went through the pipe is thrown away.
        (Err(Error::Released { source }), Ok(_)) => Err(*source),
        (Err(error), Ok(_)) => Err(error),
        (Ok(_), Ok(_)) => Ok(()),
    }
}

/// What a destination can be told; the name of the key is lost.
fn into_client_error(failure: Failure) -> Error {
    match failure {
        Failure::Client(error) | Failure::Key { error, .. } => error,
        _ => Error::InvalidCiphertext,
    }
}

/// The connections of one worker, made when they are needed.
#[derive(Default)]
struct Clients {
    opening: Option<Client>,
    sealing: Option<Client>,
}

/// Two, since a stream through the agent has its connection to itself.
struct Pair<'a> {
    opening: &'a mut Client,
    sealing: &'a mut Client,
}

impl Clients {
    fn opening(&mut self, step: &Move<'_>) -> Result<&mut Client, Failure> {
        connected(&mut self.opening, step)
    }

    fn pair(&mut self, step: &Move<'_>) -> Result<Pair<'_>, Failure> {
        Ok(Pair {
            opening: connected(&mut self.opening, step)?,
            sealing: connected(&mut self.sealing, step)?,
        })
    }
}

fn connected<'a>(client: &'a mut Option<Client>, step: &Move<'_>) -> Result<&'a mut Client, Failure> {
    match client {
        Some(client) => Ok(client),
        None => Ok(client.insert(connect(step.global, step.ui)?)),
    }
}

/// Many files on their way.
struct Run<'a, 'b> {
    step: &'a Move<'b>,
    bar: super::ui::Bar,
    tally: Mutex<Tally>,
    /// Why the rest was not even tried.
    end: Mutex<Option<Failure>>,
    is_over: AtomicBool,
}

impl Run<'_, '_> {
    fn through(&self, jobs: &[Job]) {
        let most = if self.step.arguments.reencrypt { REENCRYPTING_WORKERS } else { WORKERS };
        let next = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 1..most.min(jobs.len()) {
                // Fewer threads than wanted do the same.
                let _ = thread::Builder::new().spawn_scoped(scope, || self.work(jobs, &next));
            }
            self.work(jobs, &next);
        });
    }

    fn work(&self, jobs: &[Job], next: &AtomicUsize) {
        let mut clients = Clients::default();
        while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
            if self.is_over.load(Ordering::Relaxed) {
                return;
            }
            let outcome = self.step.one(&mut clients, job);
            let mut tally = lock(&self.tally);
            match outcome {
                Ok(Outcome::Rewrapped) => tally.rewrapped = tally.rewrapped.saturating_add(1),
                Ok(Outcome::Current) => tally.current = tally.current.saturating_add(1),
                Ok(Outcome::Skipped) => tally.skipped = tally.skipped.saturating_add(1),
                // The next file would fare no better.
                Err(failure) if failure.concerns_all(self.step.arguments.which.any_key) => {
                    self.is_over.store(true, Ordering::Relaxed);
                    lock(&self.end).get_or_insert(failure);
                    return;
                }
                Err(failure) => tally.failures.push((job.path(), failure)),
            }
            drop(tally);
            self.bar.advance(1);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A file that is to be looked at.
enum Job {
    Named(PathBuf),
    Found { tree: Arc<Tree>, folder: Arc<Path>, name: OsString },
}

impl Job {
    fn in_tree(&self) -> bool {
        matches!(self, Self::Found { .. })
    }

    fn path(&self) -> PathBuf {
        match self {
            Self::Named(path) => path.clone(),
            Self::Found { tree, folder, name } => tree.path(folder).join(name),
        }
    }

    fn place(&self) -> Result<Place, Failure> {
        match self {
            Self::Named(path) => Place::find(path),
            Self::Found { tree, folder, name } => {
                let opened = tree.open(folder);
                let opened = opened.map_err(|source| Failure::Open { path: tree.path(folder), source })?;
                Ok(Place::new(opened, name.clone(), self.path()))
            }
        }
    }
}

/// A folder that the user named, beneath which everything is opened.
struct Tree {
    root: OwnedFd,
    path: PathBuf,
}

impl Tree {
    /// A folder in it, on a way without a symlink.
    fn open(&self, folder: &Path) -> io::Result<OwnedFd> {
        let how = OpenHow::new()
            .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
        // The root itself has no name of its own.
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        Ok(openat2(&self.root, folder, how)?)
    }

    fn path(&self, folder: &Path) -> PathBuf {
        match folder.as_os_str().is_empty() {
            true => self.path.clone(),
            false => self.path.join(folder),
        }
    }
}

/// All files that are to be looked at.
#[derive(Default)]
struct Jobs {
    sides: Vec<Job>,
    files: Vec<Job>,
    /// What is neither a file nor a folder.
    skipped: u64,
    failures: Vec<(PathBuf, Failure)>,
}

impl Jobs {
    fn add(&mut self, path: &Path, recursive: bool) -> Result<(), Failure> {
        if path.as_os_str().is_empty() {
            return Err(Failure::EmptyName);
        }
        let is_folder = fs::metadata(path).is_ok_and(|meta| meta.is_dir());
        if is_folder && !recursive {
            return Err(Failure::IsFolder { path: path.to_owned() });
        }
        if !is_folder {
            self.files.push(Job::Named(path.to_owned()));
            return Ok(());
        }
        let root = File::open(path).map_err(|source| Failure::Open { path: path.to_owned(), source })?;
        let tree = Arc::new(Tree { root: root.into(), path: path.to_owned() });
        let mut folders = vec![PathBuf::new()];
        while let Some(folder) = folders.pop() {
            if let Err(source) = self.add_folder(&tree, &folder, &mut folders) {
                let path = tree.path(&folder);
                self.failures.push((path.clone(), Failure::Open { path, source }));
            }
        }
        Ok(())
    }

    fn add_folder(&mut self, tree: &Arc<Tree>, folder: &Path, folders: &mut Vec<PathBuf>) -> io::Result<()> {
        let shared: Arc<Path> = folder.into();
        let mut opened = Dir::from_fd(tree.open(folder)?)?;
        let mut unknown = Vec::new();
        for entry in opened.iter() {
            let entry = entry?;
            let name = OsString::from_vec(entry.file_name().to_bytes().to_owned());
            if name == "." || name == ".." {
                continue;
            }
            match entry.file_type() {
                Some(kind) => self.add_entry(tree, &shared, name, kind, folders),
                None => unknown.push(name),
            }
        }
        // Some file systems do not say it in their listing.
        for name in unknown {
            let stat = match fstatat(&opened, name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
                Ok(stat) => stat,
                Err(Errno::ENOENT) => continue,
                Err(errno) => return Err(errno.into()),
            };
            let kind = match SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT {
                SFlag::S_IFDIR => Type::Directory,
                SFlag::S_IFREG => Type::File,
                _ => Type::Symlink,
            };
            self.add_entry(tree, &shared, name, kind, folders);
        }
        Ok(())
    }

    fn add_entry(
        &mut self,
        tree: &Arc<Tree>,
        folder: &Arc<Path>,
        name: OsString,
        kind: Type,
        folders: &mut Vec<PathBuf>,
    ) {
        match kind {
            Type::Directory => folders.push(folder.join(name)),
            Type::File => {
                let is_side = name.as_bytes().starts_with(SIDE_PREFIX);
                // What was to be a whole file is replaced with its file.
                if is_side && name.as_bytes().ends_with(NEW_SUFFIX) {
                    return;
                }
                let job = Job::Found { tree: Arc::clone(tree), folder: Arc::clone(folder), name };
                if is_side { self.sides.push(job) } else { self.files.push(job) }
            }
            // Symlinks, pipes, sockets, devices.
            _ => self.skipped = self.skipped.saturating_add(1),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_tree_is_not_left_by_any_way() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        fs::create_dir_all(root.join("in/deep")).unwrap();
        fs::create_dir(folder.path().join("outside")).unwrap();
        symlink("../outside", root.join("out")).unwrap();
        symlink("in", root.join("again")).unwrap();
        let opened = File::open(&root).unwrap();
        let tree = Tree { root: opened.into(), path: root.clone() };
        for inside in ["", "in", "in/deep"] {
            assert!(tree.open(Path::new(inside)).is_ok(), "{inside}");
        }
        // Neither what leads out, nor what was a folder when it was listed and is a symlink now.
        for outside in ["out", "again", "again/deep", "..", "../outside", "/"] {
            assert!(tree.open(Path::new(outside)).is_err(), "{outside}");
        }
        // What is found is what lies there by its own name.
        fs::write(root.join("in/deep/file"), "").unwrap();
        let mut jobs = Jobs::default();
        jobs.add(&root, true).unwrap();
        let paths: Vec<_> = jobs.files.iter().map(Job::path).collect();
        assert_eq!((paths, jobs.skipped, jobs.failures.len()), (vec![root.join("in/deep/file")], 2, 0));
    }
}
