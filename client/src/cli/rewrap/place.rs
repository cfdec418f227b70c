//! A file that is changed where it lies: under a lock, and so that the next run can finish what a crash has cut short.
//!
//! The head of a stream is replaced in place. What is to be written goes to a side file first: the name of the file, the bytes that are
//! there, the bytes that are to be there. So a head that was written in part is made whole by the next run. Everything else is
//! replaced as a whole file. The lock is on the file itself, and both side files have names that follow from its name; whoever
//! holds the lock may remove them. Of a stream nothing behind its first 132 bytes is read.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File, Permissions, TryLockError},
    io::{self, Read},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{
            ffi::{OsStrExt, OsStringExt},
            fs::{FileExt, MetadataExt, PermissionsExt, fchown},
        },
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use kms_envelope::{Header, HeaderError, REWRAP_LEN};
use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, openat, renameat},
    poll::{PollTimeout, poll},
    sys::stat::{FileStat, Mode, fstatat},
    unistd::{UnlinkatFlags, geteuid, unlinkat},
};
use sha2::{Digest, Sha512};

use super::super::{interrupt, ui::Failure};

/// What the names of both side files begin with.
pub(super) const SIDE_PREFIX: &[u8] = b".kmsctl-rewrap-";

/// What the name of a whole new file ends with.
pub(super) const NEW_SUFFIX: &[u8] = b".new";

/// What a side file begins with.
const MAGIC: &[u8] = b"kmsctl rewrap 1\n";

/// Bytes of its check at the end.
const CHECK_LEN: usize = 32;

/// Longest name of a file, in bytes, and more than any file system takes.
const NAME_MAX: usize = 4096;

/// How often it is tried to get hold of the same name while others replace what it names.
const TRIES: usize = 100;

/// How often a lock is looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// A name in a folder, which nothing that happens to the path of the folder can turn into another.
pub(super) struct Place {
    folder: OwnedFd,
    name: OsString,
    /// As the user knows it.
    path: PathBuf,
}

impl Place {
    pub(super) fn new(folder: OwnedFd, name: OsString, path: PathBuf) -> Self {
        Self { folder, name, path }
    }

    /// The file that this path leads to, behind every symlink.
    pub(super) fn find(path: &Path) -> Result<Self, Failure> {
        let failed = |source| Failure::Open { path: path.to_owned(), source };
        let whole = fs::canonicalize(path).map_err(failed)?;
        if whole.is_dir() {
            return Err(Failure::IsFolder { path: path.to_owned() });
        }
        let (Some(folder), Some(name)) = (whole.parent(), whole.file_name()) else {
            return Err(failed(Errno::EISDIR.into()));
        };
        let folder = File::open(folder).map_err(failed)?;
        Ok(Self::new(folder.into(), name.to_owned(), path.to_owned()))
    }

    /// Gets hold of what is there, and waits at most so long while another run holds it.
    pub(super) fn hold(&self, patience: Duration) -> Result<Held<'_>, Failure> {
        let failed = |source| Failure::Open { path: self.path.clone(), source };
        for _ in 0..TRIES {
            // Something that blocks when it is opened, as a pipe, must not.
            let file = self.open(&self.name, OFlag::O_RDONLY | OFlag::O_NONBLOCK).map_err(failed)?;
            let meta = file.metadata().map_err(failed)?;
            if !meta.is_file() {
                return Err(Failure::NotAFile { path: self.path.clone() });
            }
            self.lock(&file, patience)?;
            // Whoever held the lock before may have put another file in its place.
            match self.look(&self.name).map_err(failed)? {
                Some(now) if is_same(&meta, &now) => return Ok(Held { place: self, file, meta }),
                Some(_) => {}
                None => return Err(failed(Errno::ENOENT.into())),
            }
        }
        Err(Failure::Changing { path: self.path.clone() })
    }

    /// Whether it begins as a ciphertext does, as far as can be told without a lock.
    pub(super) fn may_be_ours(&self) -> io::Result<bool> {
        let file = self.open(&self.name, OFlag::O_RDONLY | OFlag::O_NONBLOCK)?;
        let mut front = [0; REWRAP_LEN];
        let got = if file.metadata()?.is_file() { read_front(&file, &mut front)? } else { 0 };
        let header = Header::parse(front.get(..got).unwrap_or_default());
        Ok(!matches!(header, Err(HeaderError::Truncated | HeaderError::NotOurs)))
    }

    fn lock(&self, file: &File, patience: Duration) -> Result<(), Failure> {
        let start = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(()),
                Err(TryLockError::WouldBlock) if start.elapsed() < patience => {
                    let _ = poll(&mut [], PollTimeout::try_from(LOOK_AGAIN).unwrap_or(PollTimeout::ZERO));
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(Failure::InUse { path: self.path.clone() });
                }
                Err(TryLockError::Error(source)) => {
                    return Err(Failure::Open { path: self.path.clone(), source });
                }
            }
        }
    }

    fn open(&self, name: &OsStr, flags: OFlag) -> io::Result<File> {
        let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
        Ok(File::from(openat(&self.folder, name, flags, Mode::S_IRUSR | Mode::S_IWUSR)?))
    }

    fn look(&self, name: &OsStr) -> io::Result<Option<FileStat>> {
        match fstatat(&self.folder, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// It need not be there.
    fn remove(&self, name: &OsStr) -> io::Result<()> {
        match unlinkat(&self.folder, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn sync_folder(&self) -> io::Result<()> {
        File::from(self.folder.as_fd().try_clone_to_owned()?).sync_all()
    }

    /// The names of its side files: of fixed length, since its own name may be as long as a name can be.
    fn side_names(&self) -> (OsString, OsString) {
        let hash = Sha512::digest(self.name.as_bytes());
        let digits = hash.iter().take(16).map(|byte| format!("{byte:02x}")).collect::<String>();
        let side = [SIDE_PREFIX, digits.as_bytes()].concat();
        let new = [side.as_slice(), NEW_SUFFIX].concat();
        (OsString::from_vec(side), OsString::from_vec(new))
    }

    fn beside(&self, name: &OsStr) -> PathBuf {
        self.path.with_file_name(name)
    }
}

fn is_same(meta: &fs::Metadata, stat: &FileStat) -> bool {
    (meta.dev(), meta.ino()) == (stat.st_dev, stat.st_ino)
}

/// A file that nobody else changes, as far as they respect its lock.
pub(super) struct Held<'a> {
    place: &'a Place,
    file: File,
    meta: fs::Metadata,
}

/// What a change that was cut short has left.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Leftover {
    /// Nothing, or it is done now.
    None,
    /// A side file that fits neither what was nor what was to be: it is of use only if what is there does not open.
    Doubtful,
}

impl Held<'_> {
    /// From the start on.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Finishes a change that was cut short.
    pub(super) fn recover(&self) -> Result<Leftover, Failure> {
        let (name, _) = self.place.side_names();
        let failed = |source| Failure::Create { path: self.place.path.clone(), source };
        let Some(side) = Side::read(self.place, &name, Some(&self.meta))? else { return Ok(Leftover::None) };
        // Cut short before anything else was written.
        let Some(side) = side.filter(|side| side.name == self.place.name) else {
            self.place.remove(&name).map_err(failed)?;
            return Ok(Leftover::None);
        };
        let mut now = [0; REWRAP_LEN];
        let got = read_front(&self.file, &mut now).map_err(failed)?;
        let mixed = || {
            let mut bytes = now.iter().zip(side.old.iter().zip(&side.new));
            got == REWRAP_LEN && bytes.all(|(now, (old, new))| now == old || now == new)
        };
        if now == side.old {
            self.place.remove(&name).map_err(failed)?;
        } else if mixed() {
            let finish = || write_front(&self.writable()?, &side.new).and_then(|()| self.place.remove(&name));
            interrupt::without(finish).map_err(failed)?;
        } else {
            return Ok(Leftover::Doubtful);
        }
        Ok(Leftover::None)
    }

    /// What is there opens, so a doubtful side file belongs to another day.
    pub(super) fn drop_leftover(&self) -> Result<(), Failure> {
        let (name, _) = self.place.side_names();
        self.place.remove(&name).map_err(|source| Failure::Create { path: self.place.path.clone(), source })
    }

    /// Replaces the first 132 bytes, which must still be `old`, and nothing else.
    pub(super) fn replace_front(
        &self,
        old: &[u8; REWRAP_LEN],
        new: &[u8; REWRAP_LEN],
    ) -> Result<(), Failure> {
        let failed = |source| Failure::Create { path: self.place.path.clone(), source };
        let (name, _) = self.place.side_names();
        let side = Side { name: self.place.name.clone(), old: *old, new: *new };
        let change = || {
            // Before there is a side file: what cannot be written gets none.
            let target = self.writable()?;
            let file = self.place.open(&name, OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL)?;
            let written = file.write_all_at(&side.to_bytes(), 0).and_then(|()| file.sync_all());
            let written = written.and_then(|()| self.place.sync_folder());
            match written.and_then(|()| self.is_still(old)) {
                Ok(true) => {}
                other => {
                    self.place.remove(&name)?;
                    return other;
                }
            }
            // From here on the side file stays until the new bytes are on the disk.
            write_front(&target, new)?;
            self.place.remove(&name)?;
            Ok(true)
        };
        match interrupt::without(change).map_err(failed)? {
            true => Ok(()),
            false => Err(Failure::Changing { path: self.place.path.clone() }),
        }
    }

    /// The same file, to be written to.
    fn writable(&self) -> io::Result<File> {
        let file = self.place.open(&self.place.name, OFlag::O_WRONLY)?;
        let meta = file.metadata()?;
        match (meta.dev(), meta.ino()) == (self.meta.dev(), self.meta.ino()) {
            true => Ok(file),
            false => Err(Errno::ESTALE.into()),
        }
    }

    /// Whether it still has its name, and begins as it did.
    fn is_still(&self, old: &[u8; REWRAP_LEN]) -> io::Result<bool> {
        let mut now = [0; REWRAP_LEN];
        let _ = read_front(&self.file, &mut now)?;
        let there = self.place.look(&self.place.name)?;
        Ok(now == *old && there.is_some_and(|stat| is_same(&self.meta, &stat)))
    }

    /// Replaces the whole file by what `write` puts into a new one, with the owner and mode of the old one.
    pub(super) fn replace_whole(
        &self,
        write: impl FnOnce(&File) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let failed = |source| Failure::Create { path: self.place.path.clone(), source };
        let (_, name) = self.place.side_names();
        let path = self.place.beside(&name);
        let create = || {
            // Of a run that was cut short: whoever else could need it would hold the lock.
            self.place.remove(&name)?;
            let file = self.place.open(&name, OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL)?;
            Ok((file, path.clone()))
        };
        let file = interrupt::remove_at_end(create).map_err(failed)?;
        let whole = write(&file).and_then(|()| {
            self.keep_rights(&file).and_then(|()| file.sync_all()).map_err(failed)?;
            match self.place.look(&self.place.name).map_err(failed)? {
                Some(now) if is_same(&self.meta, &now) => Ok(()),
                _ => Err(Failure::Changing { path: self.place.path.clone() }),
            }
        });
        interrupt::finish(&path, || match whole {
            Ok(()) => renameat(
                &self.place.folder,
                name.as_os_str(),
                &self.place.folder,
                self.place.name.as_os_str(),
            )
            .map_err(|errno| failed(errno.into())),
            Err(failure) => {
                let _ = self.place.remove(&name);
                Err(failure)
            }
        })?;
        self.place.sync_folder().map_err(failed)
    }

    /// What it was to others it stays. Who may not give a file away keeps it.
    fn keep_rights(&self, file: &File) -> io::Result<()> {
        match fchown(file, Some(self.meta.uid()), Some(self.meta.gid())) {
            Ok(()) => {}
            Err(error)
                if error.kind() == io::ErrorKind::PermissionDenied
                    && self.meta.uid() == geteuid().as_raw() => {}
            Err(error) => return Err(error),
        }
        file.set_permissions(Permissions::from_mode(self.meta.mode() & 0o777))
    }
}

/// Onto the disk.
fn write_front(file: &File, bytes: &[u8; REWRAP_LEN]) -> io::Result<()> {
    file.write_all_at(bytes, 0)?;
    file.sync_data()
}

fn read_front(file: &File, front: &mut [u8; REWRAP_LEN]) -> io::Result<usize> {
    let mut got = 0_usize;
    while let Some(room) = front.get_mut(got..).filter(|room| !room.is_empty()) {
        match file.read_at(room, u64::try_from(got).unwrap_or(u64::MAX)) {
            Ok(0) => break,
            Ok(read) => got = got.saturating_add(read),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(got)
}

/// What a change in place is about to do.
struct Side {
    name: OsString,
    old: [u8; REWRAP_LEN],
    new: [u8; REWRAP_LEN],
}

impl Side {
    /// Nothing when there is no side file, nothing in it when it is not whole.
    #[expect(clippy::option_option, reason = "both are different answers")]
    fn read(place: &Place, name: &OsStr, of: Option<&fs::Metadata>) -> Result<Option<Option<Self>>, Failure> {
        let path = place.beside(name);
        let file = match place.open(name, OFlag::O_RDONLY | OFlag::O_NONBLOCK) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(Failure::Open { path, source }),
        };
        let failed = |source| Failure::Open { path: path.clone(), source };
        let meta = file.metadata().map_err(failed)?;
        // Where others can make files, one of theirs must not tell what to write.
        let ours = meta.uid() == geteuid().as_raw() || of.is_some_and(|of| of.uid() == meta.uid());
        if !meta.is_file() || !ours {
            return Err(Failure::ForeignSideFile { path });
        }
        let most = MAGIC.len().saturating_add(NAME_MAX).saturating_add(2 * REWRAP_LEN + CHECK_LEN);
        let mut bytes = Vec::new();
        let limit = u64::try_from(most).unwrap_or(u64::MAX);
        let _ = file.take(limit).read_to_end(&mut bytes).map_err(failed)?;
        Ok(Some(Self::parse(&bytes)))
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = [MAGIC, &self.old, &self.new, self.name.as_bytes()].concat();
        let hash = Sha512::digest(&bytes);
        bytes.extend(hash.iter().take(CHECK_LEN));
        bytes
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let (content, check) = bytes.split_last_chunk::<CHECK_LEN>()?;
        if !Sha512::digest(content).iter().take(CHECK_LEN).eq(check) {
            return None;
        }
        let (old, rest) = content.strip_prefix(MAGIC)?.split_first_chunk()?;
        let (new, name) = rest.split_first_chunk()?;
        Some(Self { name: OsStr::from_bytes(name).to_owned(), old: *old, new: *new })
    }
}

/// The place of the file that a side file in the same folder speaks of; nothing when it is not there any more or not whole.
pub(super) fn named_by(side: &Place) -> Result<Option<Place>, Failure> {
    let failed = |source| Failure::Open { path: side.path.clone(), source };
    let owner = side.look(&side.name).map_err(failed)?;
    let Some(Some(found)) = Side::read(side, &side.name, None).or_else(|failure| match owner {
        // Of another user, as their file may be; that is looked at when the file is known.
        Some(_) if matches!(failure, Failure::ForeignSideFile { .. }) => Ok(None),
        _ => Err(failure),
    })?
    else {
        return Ok(None);
    };
    let folder = side.folder.try_clone().map_err(failed)?;
    let path = side.path.with_file_name(&found.name);
    if found.name.as_bytes().contains(&b'/') || found.name.is_empty() {
        return Ok(None);
    }
    let place = Place::new(folder, found.name, path);
    match place.look(&place.name).map_err(failed)? {
        Some(_) => Ok(Some(place)),
        None => Err(Failure::LostFile { side: side.path.clone(), file: place.path }),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const OLD: [u8; REWRAP_LEN] = [1; REWRAP_LEN];
    const NEW: [u8; REWRAP_LEN] = [2; REWRAP_LEN];
    const NOW: Duration = Duration::ZERO;

    struct Scene {
        folder: tempfile::TempDir,
        place: Place,
    }

    impl Scene {
        fn new(front: &[u8]) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("file");
            fs::write(&path, [front, b"body"].concat()).unwrap();
            Self { place: Place::find(&path).unwrap(), folder }
        }

        fn put_side(&self, bytes: &[u8]) {
            let (name, _) = self.place.side_names();
            fs::write(self.folder.path().join(name), bytes).unwrap();
        }

        fn content(&self) -> Vec<u8> {
            fs::read(self.folder.path().join("file")).unwrap()
        }

        fn names(&self) -> usize {
            fs::read_dir(self.folder.path()).unwrap().count()
        }
    }

    fn side() -> Side {
        Side { name: "file".into(), old: OLD, new: NEW }
    }

    #[test]
    fn only_the_front_is_replaced_and_nothing_stays_beside_it() {
        let scene = Scene::new(&OLD);
        scene.place.hold(NOW).unwrap().replace_front(&OLD, &NEW).unwrap();
        assert_eq!(scene.content(), [&NEW[..], b"body"].concat());
        assert_eq!(scene.names(), 1);
        // Somebody who respects no lock was faster.
        assert!(matches!(
            scene.place.hold(NOW).unwrap().replace_front(&OLD, &NEW),
            Err(Failure::Changing { .. })
        ));
        assert_eq!(scene.names(), 1);
    }

    #[test]
    fn a_file_that_cannot_be_written_gets_no_side_file() {
        let scene = Scene::new(&OLD);
        let held = scene.place.hold(NOW).unwrap();
        let path = scene.folder.path().join("file");
        fs::remove_file(&path).unwrap();
        fs::write(&path, OLD).unwrap();
        assert!(matches!(held.replace_front(&OLD, &NEW), Err(Failure::Create { .. })));
        assert_eq!((scene.names(), scene.content()), (1, OLD.to_vec()));
    }

    #[test]
    fn a_front_that_was_written_in_part_is_made_whole() {
        for cut in 0..=REWRAP_LEN {
            let scene = Scene::new(&[&NEW[..cut], &OLD[cut..]].concat());
            scene.put_side(&side().to_bytes());
            assert!(scene.place.hold(NOW).unwrap().recover().unwrap() == Leftover::None);
            let expected = if cut == 0 { OLD } else { NEW };
            assert_eq!(scene.content(), [&expected[..], b"body"].concat(), "{cut}");
            assert_eq!(scene.names(), 1);
        }
    }

    #[test]
    fn a_side_file_that_is_not_whole_has_changed_nothing_yet() {
        let whole = side().to_bytes();
        for cut in 0..whole.len() {
            let scene = Scene::new(&OLD);
            scene.put_side(&whole[..cut]);
            assert!(scene.place.hold(NOW).unwrap().recover().unwrap() == Leftover::None);
            assert_eq!(scene.content(), [&OLD[..], b"body"].concat());
            assert_eq!(scene.names(), 1);
        }
    }

    #[test]
    fn a_side_file_of_another_content_is_left_until_that_is_known_to_open() {
        let scene = Scene::new(&[3; REWRAP_LEN]);
        scene.put_side(&side().to_bytes());
        let held = scene.place.hold(NOW).unwrap();
        assert!(held.recover().unwrap() == Leftover::Doubtful);
        assert_eq!((scene.names(), &scene.content()[..3]), (2, &[3; 3][..]));
        held.drop_leftover().unwrap();
        assert_eq!(scene.names(), 1);
    }

    #[test]
    fn a_side_file_leads_to_its_file_and_nowhere_else() {
        let scene = Scene::new(&OLD);
        scene.put_side(&side().to_bytes());
        let (name, _) = scene.place.side_names();
        let find = || Place::find(&scene.folder.path().join(&name)).unwrap();
        assert_eq!(named_by(&find()).unwrap().unwrap().name, "file");
        fs::remove_file(scene.folder.path().join("file")).unwrap();
        assert!(matches!(named_by(&find()), Err(Failure::LostFile { .. })));
        for name in ["../file", "", "a/b"] {
            scene.put_side(&Side { name: name.into(), ..side() }.to_bytes());
            assert!(named_by(&find()).unwrap().is_none(), "{name}");
        }
    }

    #[test]
    fn one_at_a_time() {
        let scene = Scene::new(&OLD);
        let held = scene.place.hold(NOW).unwrap();
        let again = Place::find(&scene.folder.path().join("file")).unwrap();
        assert!(matches!(again.hold(Duration::from_millis(20)), Err(Failure::InUse { .. })));
        held.replace_whole(|file| file.write_all_at(b"other", 0).map_err(Failure::Print)).unwrap();
        drop(held);
        assert!(again.hold(NOW).is_ok());
        assert_eq!(scene.content(), b"other");
        assert_eq!(scene.names(), 1);
    }

    #[test]
    fn a_whole_file_keeps_its_rights_and_stays_after_a_failure() {
        let scene = Scene::new(&OLD);
        let path = scene.folder.path().join("file");
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        let held = scene.place.hold(NOW).unwrap();
        assert!(held.replace_whole(|_| Err(Failure::NotText)).is_err());
        assert_eq!((scene.names(), scene.content().len()), (1, REWRAP_LEN + 4));
        held.replace_whole(|file| file.write_all_at(b"other", 0).map_err(Failure::Print)).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o640);
        // It is another file now, and who held the old one must not put anything in the place of the new one.
        assert!(matches!(held.replace_whole(|_| Ok(())), Err(Failure::Changing { .. })));
        assert_eq!((scene.names(), scene.content().as_slice()), (1, &b"other"[..]));
    }

    #[test]
    fn what_is_no_regular_file_is_not_opened() {
        let folder = tempfile::tempdir().unwrap();
        nix::unistd::mkfifo(&folder.path().join("pipe"), Mode::S_IRWXU).unwrap();
        symlink("pipe", folder.path().join("link")).unwrap();
        let place = Place::find(&folder.path().join("pipe")).unwrap();
        assert!(matches!(place.hold(NOW), Err(Failure::NotAFile { .. })));
        assert!(matches!(Place::find(folder.path()), Err(Failure::IsFolder { .. })));
        let directly = Place::new(File::open(folder.path()).unwrap().into(), "link".into(), "link".into());
        assert!(matches!(directly.hold(NOW), Err(Failure::Open { .. })));
    }
}
