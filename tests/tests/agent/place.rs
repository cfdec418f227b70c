//! The place of the socket: every component of the way there, what lies in its place, and others who change the way meanwhile.

use std::{
    fs::{self, File, Permissions},
    io,
    os::{
        fd::AsRawFd,
        unix::{
            fs::{FileTypeExt, MetadataExt, PermissionsExt, chown, lchown, symlink},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use kms_tests::{
    ALICE, BOB, Wire,
    agent::fresh_folder,
    as_uid,
    process::PATIENCE,
    programs::{SharedCopy, needs_root, program, tool},
    start::{Foreground, agent_command, clean, fails, is_empty},
};
use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, RenameFlags, renameat2},
    sched::{CloneFlags, unshare},
    sys::stat::{Mode, umask},
};
use tempfile::TempDir;

/// A folder of root's under `/tmp`, and an agent that runs as Alice.
struct Scene {
    agent: SharedCopy,
    folder: TempDir,
}

impl Scene {
    fn new() -> Self {
        needs_root();
        Self { agent: SharedCopy::of(&program("kms-agent"), 0o755), folder: fresh_folder(0o755) }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn make_folder(&self, name: &str, owner: u32, mode: u32) {
        let path = self.at(name);
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        chown(&path, Some(owner), Some(owner)).unwrap();
    }

    fn link(&self, name: &str, target: impl AsRef<Path>, owner: u32) {
        symlink(target, self.at(name)).unwrap();
        lchown(self.at(name), Some(owner), Some(owner)).unwrap();
    }

    /// An agent of Alice's at this path.
    fn agent(&self, path: impl AsRef<Path>) -> Command {
        let mut command = clean(self.agent.as_user(ALICE), Path::new("/"));
        command.args(["--memory", "-D", "-a"]).arg(path.as_ref());
        command
    }

    /// It serves there, and says so.
    fn serves(&self, path: impl AsRef<Path>, really: &str) {
        let agent = Foreground::start(&mut self.agent(path)).unwrap();
        assert_eq!(agent.socket, self.at(really));
        as_uid(ALICE, || Wire::connect(&agent.socket).ping().unwrap());
        let socket = fs::symlink_metadata(&agent.socket).unwrap();
        assert_eq!((socket.uid(), socket.mode() & 0o777), (ALICE, 0o600));
        agent.stop();
    }

    /// It does not start, says `said`, and leaves everything as it was.
    fn refuses(&self, path: impl AsRef<Path>, said: &str) {
        let before = tree(self.folder.path());
        let stderr = fails(&mut self.agent(path), 1);
        assert!(stderr.contains(said), "{said}: {stderr}");
        assert_eq!(tree(self.folder.path()), before, "{said}");
    }
}

/// All that is in a folder: names, inodes, modes, owners.
fn tree(folder: &Path) -> Vec<(PathBuf, u64, u32, u32)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let metadata = fs::symlink_metadata(&path).unwrap();
        if metadata.is_dir() {
            found.extend(tree(&path));
        }
        found.push((path, metadata.ino(), metadata.mode(), metadata.uid()));
    }
    found.sort();
    found
}

#[test]
fn whoever_can_change_a_component_of_the_way_is_named() {
    let scene = Scene::new();
    scene.make_folder("good", ALICE, 0o700);
    scene.make_folder("bobs", BOB, 0o755);
    scene.make_folder("open", 0, 0o777);
    scene.make_folder("sticky", 0, 0o1777);
    scene.make_folder("group", 0, 0o775);
    for parent in ["open", "sticky", "group", "bobs"] {
        scene.make_folder(&format!("{parent}/alices"), ALICE, 0o700);
    }
    scene.make_folder("sticky/bobs", BOB, 0o755);
    scene.make_folder("sticky/bobs/alices", ALICE, 0o700);
    scene.link("sticky/bobs-link", scene.at("good"), BOB);
    scene.link("sticky/alices-link", "../good", ALICE);
    scene.link("bobs-link", "good", BOB);
    scene.link("roots-link", "good", 0);
    scene.link("link-of-links", "sticky/alices-link", 0);
    scene.link("link-to-open", "open/alices", 0);
    scene.link("link-by-bob", "sticky/bobs-link", 0);
    let at = |name: &str| scene.at(name);
    let others = |name: &str| format!("others can write to the folder {}\n", at(name).display());
    let bobs = |name: &str| format!("{} belongs to another user, uid {BOB}\n", at(name).display());

    // A folder that somebody else made before us, at the end of the way and on it.
    scene.refuses(at("bobs/s"), &bobs("bobs"));
    scene.refuses(at("sticky/bobs/s"), &bobs("sticky/bobs"));
    scene.refuses(at("bobs/alices/s"), &bobs("bobs"));
    scene.refuses(at("sticky/bobs/alices/s"), &bobs("sticky/bobs"));
    scene.refuses(at("bobs/../good/s"), &bobs("bobs"));
    // A folder in which others can exchange what we go through.
    scene.refuses(at("open/alices/s"), &others("open"));
    scene.refuses(at("group/alices/s"), &others("group"));
    scene.refuses(at("link-to-open/s"), &others("open"));
    // In a sticky one they cannot, but they can make things in it.
    scene.refuses(at("sticky/s"), &others("sticky"));
    scene.refuses("/tmp/kms-test-never.sock", "others can write to the folder /tmp\n");
    // A symlink of somebody else, as last, middle and second-hand component.
    scene.refuses(at("sticky/bobs-link/s"), &bobs("sticky/bobs-link"));
    scene.refuses(at("bobs-link/s"), &bobs("bobs-link"));
    scene.refuses(at("link-by-bob/s"), &bobs("sticky/bobs-link"));
    // What is ours or root's leads on, and the way is told without it.
    scene.serves(at("good/s"), "good/s");
    scene.serves(at("sticky/alices/s"), "sticky/alices/s");
    scene.serves(at("sticky/alices-link/s"), "good/s");
    scene.serves(at("roots-link/s"), "good/s");
    scene.serves(at("link-of-links/s"), "good/s");
    scene.serves(at("good/../sticky/./alices//s"), "sticky/alices/s");
    scene.serves(at("sticky/alices-link/../sticky/alices/s"), "sticky/alices/s");

    scene.refuses(at("good/.."), "the path names no socket");
    scene.refuses(at("good/none/s"), &format!("cannot look at {}: No such file", at("good/none").display()));
    scene.refuses(at("good/a\nb"), "the path of a socket has no control characters");
    // The folders of the user are looked at in the same way.
    for (variable, folder, said) in [
        ("XDG_RUNTIME_DIR", at("bobs"), bobs("bobs")),
        ("XDG_RUNTIME_DIR", at("open"), others("open")),
        ("XDG_RUNTIME_DIR", at("sticky"), others("sticky")),
        ("XDG_RUNTIME_DIR", at("sticky/bobs-link"), bobs("sticky/bobs-link")),
        ("TMPDIR", at("open"), others("open")),
        ("TMPDIR", at("bobs"), bobs("bobs")),
        ("TMPDIR", at("sticky/bobs-link"), bobs("sticky/bobs-link")),
    ] {
        let mut command = clean(scene.agent.as_user(ALICE), Path::new("/"));
        let before = tree(scene.folder.path());
        let stderr = fails(command.args(["--memory", "-D"]).env(variable, &folder), 1);
        assert!(stderr.contains(&said), "{variable}: {stderr}");
        assert_eq!(tree(scene.folder.path()), before);
    }
}

#[test]
fn a_way_leads_through_at_most_40_symlinks() {
    let scene = Scene::new();
    scene.make_folder("0", ALICE, 0o700);
    for link in 1..=41 {
        scene.link(&link.to_string(), (link - 1).to_string(), 0);
    }
    scene.link("loop", "loop", 0);
    scene.serves(scene.at("40/s"), "0/s");
    scene.refuses(scene.at("41/s"), "the path leads through more than 40 symlinks");
    scene.refuses(scene.at("loop/s"), "the path leads through more than 40 symlinks");
}

#[test]
fn nothing_of_anybody_elses_is_taken_away() {
    let scene = Scene::new();
    scene.make_folder("good", ALICE, 0o700);
    let path = scene.at("good/s");
    let foreign = "there is something that is not a stale socket of ours";
    // Hard links: of a socket that is served, of a dead one of ours, of a dead one of Bob's.
    let elsewhere = scene.at("elsewhere");
    let listener = UnixListener::bind(&elsewhere).unwrap();
    chown(&elsewhere, Some(ALICE), None).unwrap();
    fs::hard_link(&elsewhere, &path).unwrap();
    scene.refuses(&path, "an agent serves this socket already");
    drop(listener);
    scene.serves(&path, "good/s");
    assert!(fs::symlink_metadata(&elsewhere).unwrap().file_type().is_socket(), "its other name stays");
    chown(&elsewhere, Some(BOB), None).unwrap();
    fs::hard_link(&elsewhere, &path).unwrap();
    scene.refuses(&path, foreign);
    fs::remove_file(&path).unwrap();
    // The lock file as a link to what is Bob's, as a FIFO and as a folder.
    let lock = scene.at("good/s.lock");
    let precious = scene.at("precious");
    fs::write(&precious, "precious").unwrap();
    fs::set_permissions(&precious, Permissions::from_mode(0o666)).unwrap();
    chown(&precious, Some(BOB), None).unwrap();
    fs::hard_link(&precious, &lock).unwrap();
    scene.refuses(&path, foreign);
    fs::remove_file(&lock).unwrap();
    symlink(&precious, &lock).unwrap();
    scene.refuses(&path, "Too many levels of symbolic links");
    fs::remove_file(&lock).unwrap();
    nix::unistd::mkfifo(&lock, Mode::from_bits_truncate(0o666)).unwrap();
    chown(&lock, Some(ALICE), None).unwrap();
    scene.refuses(&path, foreign);
    fs::remove_file(&lock).unwrap();
    scene.make_folder("good/s.lock", ALICE, 0o700);
    scene.refuses(&path, "Is a directory");
    assert_eq!(fs::read_to_string(&precious).unwrap(), "precious");
}

#[test]
fn a_working_folder_that_is_gone_stops_only_a_relative_path() {
    let folder = fresh_folder(0o700);
    let gone = |path: &str| {
        let mut command = clean(tool("sh"), folder.path());
        let script = r#"mkdir gone && cd gone && rmdir ../gone && exec "$AGENT" --memory -D -a "$P""#;
        command.args(["-c", script]).env("AGENT", program("kms-agent")).env("P", path);
        command
    };
    let stderr = fails(&mut gone("s"), 1);
    assert!(stderr.contains("s: a relative path, and the working directory cannot be had"), "{stderr}");
    let path = folder.path().join("s");
    Foreground::start(&mut gone(path.to_str().unwrap())).unwrap().stop();
    // Where it is there, it is walked like every other.
    let agent =
        Foreground::start(&mut agent_command(folder.path(), &["--memory", "-D", "-a", "./s"])).unwrap();
    assert_eq!(agent.socket, path);
    agent.stop();
}

#[test]
fn in_a_user_namespace_root_is_not_to_be_seen_and_trusted_on_the_way_only() {
    let scene = Scene::new();
    scene.make_folder("good", ALICE, 0o700);
    scene.make_folder("bobs", BOB, 0o755);
    let inside = |path: PathBuf| {
        let mut command = tool("setpriv");
        command.args([format!("--reuid={ALICE}"), format!("--regid={ALICE}"), "--clear-groups".to_owned()]);
        command.arg(tool("unshare").get_program()).args(["--user", "--map-current-user"]);
        command.arg(scene.agent.path()).args(["--memory", "-D", "-a"]).arg(path);
        clean(command, Path::new("/"))
    };
    let agent = Foreground::start(&mut inside(scene.at("good/s"))).unwrap();
    as_uid(ALICE, || Wire::connect(&agent.socket).ping().unwrap());
    agent.stop();
    let stderr = fails(&mut inside(scene.at("bobs/s")), 1);
    assert!(stderr.contains("bobs belongs to another user, uid 65534"), "{stderr}");
}

/// Exchanges two names as fast as it can, as Bob, until `done`; counts the exchanges that the kernel allowed and all that it tried.
fn exchange(a: &Path, b: &Path, done: &AtomicBool, flips: &AtomicU64, tries: &AtomicU64) {
    as_uid(BOB, || {
        while !done.load(Relaxed) {
            let flipped = renameat2(AT_FDCWD, a, AT_FDCWD, b, RenameFlags::RENAME_EXCHANGE);
            tries.fetch_add(1, Relaxed);
            match flipped {
                Ok(()) => _ = flips.fetch_add(1, Relaxed),
                Err(Errno::EPERM | Errno::EACCES) => {}
                Err(errno) => panic!("{errno}"),
            }
        }
    });
}

/// What an agent without the walk does: a look at the folder, then the bind.
fn bind_after_a_look(path: &Path) -> io::Result<()> {
    let found = fs::metadata(path.parent().unwrap())?;
    if found.uid() == ALICE && found.mode() & 0o022 == 0 {
        UnixListener::bind(path)?;
    }
    Ok(())
}

/// A folder by whatever name it has.
fn held(folder: &File) -> PathBuf {
    format!("/proc/self/fd/{}", folder.as_raw_fd()).into()
}

/// Alice's agent starts again and again while Bob changes the way as fast as he can: it serves in the good place, or not at all.
#[test]
fn a_way_that_changes_meanwhile_leads_to_the_good_place_or_nowhere() {
    let scene = Scene::new();
    scene.make_folder("good", ALICE, 0o700);
    // Everybody may exchange names here; here only their owners may; and here a link of Bob's is in the way.
    scene.make_folder("open", 0, 0o777);
    scene.make_folder("open/way", ALICE, 0o700);
    scene.make_folder("open/bad", BOB, 0o777);
    scene.make_folder("sticky", 0, 0o1777);
    scene.make_folder("sticky/way", ALICE, 0o700);
    scene.make_folder("sticky/bad", BOB, 0o777);
    scene.make_folder("links", 0, 0o1777);
    scene.make_folder("links/bad", BOB, 0o777);
    scene.link("links/way", scene.at("good"), BOB);
    scene.link("links/other", "bad", BOB);

    let mut all_tries = 0;
    for (parent, other, serves, flips_there) in
        [("open", "bad", false, true), ("sticky", "bad", true, false), ("links", "other", false, true)]
    {
        let (done, flips, tries) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
        let way = scene.at(parent).join("way");
        let socket = way.join("s");
        // Past the links: where `fs.protected_symlinks` is set, root follows none of Bob's here either.
        let led_to =
            |path: PathBuf| fs::read_link(&path).map_or(path.clone(), |to| scene.at(parent).join(to));
        let open = |path: PathBuf| File::open(led_to(path)).unwrap();
        let (good, bad) = (open(way.clone()), open(scene.at(parent).join(other)));
        thread::scope(|scope| {
            scope.spawn(|| exchange(&way, &scene.at(parent).join(other), &done, &flips, &tries));
            // The end of this test is the end of the flips, also when it fails.
            let _end = Ends(&done);
            let deadline = Instant::now() + PATIENCE;
            let mut starts = 0;
            while starts < 40 || tries.load(Relaxed) < 50_000 {
                assert!(Instant::now() < deadline, "{starts} starts, {} tries", tries.load(Relaxed));
                starts += 1;
                match Foreground::start(&mut scene.agent(&socket)) {
                    Ok(agent) => {
                        assert!(serves, "{parent}");
                        assert_eq!(agent.socket, socket);
                        assert_eq!(fs::metadata(&way).unwrap().uid(), ALICE);
                        agent.stop();
                    }
                    Err(stderr) => {
                        assert!(!serves, "{parent}: {stderr}");
                        let said =
                            if parent == "open" { "others can write to" } else { "belongs to another user" };
                        assert!(stderr.contains(said), "{parent}: {stderr}");
                    }
                }
            }
            if parent == "open" {
                assert!(is_empty(&held(&good)) && is_empty(&held(&bad)));
                // The control: who looks and then binds comes to be in Bob's folder.
                as_uid(ALICE, || {
                    while is_empty(&held(&bad)) {
                        assert!(Instant::now() < deadline, "who only looks was never led away");
                        let _ = bind_after_a_look(&socket);
                        let _ = fs::remove_file(held(&good).join("s"));
                    }
                });
            }
        });
        assert_eq!(flips.load(Relaxed) > 0, flips_there, "{parent}: {flips:?} of {tries:?}");
        all_tries += tries.load(Relaxed);
    }
    assert!(all_tries >= 100_000, "{all_tries}");
    for folder in ["sticky/way", "sticky/bad", "links/bad", "good"] {
        assert!(is_empty(&scene.at(folder)), "{folder}");
    }
}

struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// Connects as Bob as fast as it can until `done`; how often he was let in, and how often he tried.
fn knock(path: &Path, done: &AtomicBool) -> (u64, u64) {
    as_uid(BOB, || {
        let (mut accepted, mut tries) = (0, 0);
        while !done.load(Relaxed) {
            tries += 1;
            accepted += u64::from(UnixStream::connect(path).is_ok());
        }
        (accepted, tries)
    })
}

/// No start has a moment in which another user could connect, whatever the umask of who started it.
#[test]
fn nobody_else_gets_in_between_bind_and_ready() {
    needs_root();
    // Bob can reach the folder; it is the mode of the socket alone that keeps him out.
    let folder = fresh_folder(0o755);
    let path = folder.path().join("s");
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let knocking = scope.spawn(|| knock(&path, &done));
        let _end = Ends(&done);
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut starts = 0;
        while starts < 1000 && Instant::now() < deadline {
            let mut command = clean(tool("sh"), folder.path());
            command
                .args(["-c", r#"umask 0; exec "$AGENT" --memory -D -a s"#])
                .env("AGENT", program("kms-agent"));
            Foreground::start(&mut command).unwrap().stop();
            starts += 1;
        }
        done.store(true, Relaxed);
        let (accepted, tries) = knocking.join().unwrap();
        assert!(starts >= 20 && tries > 1000, "{starts} starts, {tries} tries");
        assert_eq!(accepted, 0, "of {tries} in {starts} starts");
        println!("{starts} starts, {tries} tries");
    });
    // The control: bind, then chmod.
    let done = AtomicBool::new(false);
    let control = || {
        thread::scope(|scope| {
            let knocking = scope.spawn(|| knock(&path, &done));
            let _end = Ends(&done);
            // Of this thread alone.
            unshare(CloneFlags::CLONE_FS).unwrap();
            umask(Mode::empty());
            let deadline = Instant::now() + PATIENCE;
            let mut caught = false;
            while !caught && Instant::now() < deadline {
                let listener = UnixListener::bind(&path).unwrap();
                fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
                listener.set_nonblocking(true).unwrap();
                caught = listener.accept().is_ok();
                fs::remove_file(&path).unwrap();
            }
            done.store(true, Relaxed);
            knocking.join().unwrap();
            caught
        })
    };
    let caught = thread::scope(|scope| scope.spawn(control).join().unwrap());
    assert!(caught, "who binds first and closes then is caught");
}

#[test]
fn the_mode_of_the_socket_is_set_before_it_is_there() {
    let folder = fresh_folder(0o700);
    let trace = folder.path().join("trace");
    let mut command = clean(tool("strace"), folder.path());
    command.arg("-f").arg("-o").arg(&trace).arg("-etrace=umask,bind,listen,chmod,fchmod,fchmodat,chown");
    command.arg(program("kms-agent")).args(["--memory", "-D", "-a", "s"]);
    Foreground::start(&mut command).unwrap().stop();
    let trace = fs::read_to_string(&trace).unwrap();
    let calls: Vec<&str> =
        trace.lines().filter_map(|line| line.split_once(' ')).map(|(_, call)| call.trim()).collect();
    let bind = calls.iter().position(|call| call.starts_with("bind(")).unwrap();
    assert!(calls[bind - 1].starts_with("umask(0177)"), "{trace}");
    assert!(calls[bind + 1].starts_with("umask("), "{trace}");
    assert!(calls[bind + 2].starts_with("listen("), "{trace}");
    assert!(!calls.iter().any(|call| call.starts_with("chmod") || call.starts_with("fchmod")), "{trace}");
}
