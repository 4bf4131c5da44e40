//! Anybody can send anything, operators can mistype anything: each gets a clear answer, and the MDS goes on.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use evolute_protocol::geometry::{GIB, TIB};
use evolute_protocol::rpc::{
    AllocateSegmentRequest, AttachRequest, CreateVolumeRequest, DeleteVolumeRequest, DetachRequest,
    ErrorWord, ListVolumesRequest, MapRequest, RegisterRequest, ShowVolumeRequest,
};

use crate::support::{Mds, Process, first_registration, register, status, three_chunkservers, volumes, word};

#[tokio::test]
async fn requests_that_cannot_be_right_are_refused_by_name() {
    let mds = Mds::start().await;
    let _chunkservers = three_chunkservers(mds.address).await;
    let mut client = volumes(mds.address).await;
    let long = "x".repeat(100_000);
    for (name, size_bytes, width) in [
        ("", GIB, 0),
        ("a b", GIB, 0),
        ("../../etc", GIB, 0),
        ("ü", GIB, 0),
        ("a\nb", GIB, 0),
        (long.as_str(), GIB, 0),
        ("web", 0, 0),
        ("web", GIB + 1, 0),
        ("web", 64 * TIB + GIB, 0),
        ("web", u64::MAX, 0),
        ("web", GIB, 65),
        ("web", GIB, u32::MAX),
    ] {
        let request = CreateVolumeRequest { name: name.to_owned(), size_bytes, width };
        let refused = client.create(request).await.expect_err("refused");
        assert_eq!(ErrorWord::of(&refused), Some(ErrorWord::Invalid), "{size_bytes} {width}");
        assert!(refused.message().len() < 400, "{}", refused.message());
    }
    for name in ["", "nothing", "a b", "ü\n", long.as_str()] {
        let name = || name.to_owned();
        assert_eq!(word(client.show(ShowVolumeRequest { name: name() }).await), ErrorWord::NotFound);
        assert_eq!(
            word(client.delete(DeleteVolumeRequest { name: name(), force: true }).await),
            ErrorWord::NotFound
        );
        let attach =
            AttachRequest { name: name(), holder: "h".into(), takeover: true, ..AttachRequest::default() };
        assert_eq!(word(client.attach(attach).await), ErrorWord::NotFound);
    }
    client
        .create(CreateVolumeRequest { name: "web".into(), size_bytes: GIB, width: 0 })
        .await
        .expect("created");
    for holder in ["", "a\nb", long.as_str()] {
        let attach = AttachRequest {
            name: "web".into(),
            holder: holder.into(),
            takeover: true,
            ..AttachRequest::default()
        };
        assert_eq!(word(client.attach(attach).await), ErrorWord::Invalid);
    }
    for secret in [1, 31, 33, 4096].map(|bytes| vec![0; bytes]) {
        let attach = AttachRequest {
            name: "web".into(),
            holder: "h".into(),
            takeover: true,
            secret,
            ..AttachRequest::default()
        };
        assert_eq!(word(client.attach(attach).await), ErrorWord::Invalid);
    }
    client
        .attach(AttachRequest {
            name: "web".into(),
            holder: "h".into(),
            takeover: false,
            ..AttachRequest::default()
        })
        .await
        .expect("attached");
    for (volume_id, attachment, segment, expected) in [
        (0, 1, 0, ErrorWord::NotFound),
        (2, 1, 0, ErrorWord::NotFound),
        (u64::MAX, 1, 0, ErrorWord::NotFound),
        (1, 0, 0, ErrorWord::Invalid),
        (1, 2, 0, ErrorWord::Invalid),
        (1, u32::MAX, 0, ErrorWord::Invalid),
        (1, 1, 1, ErrorWord::Invalid),
        (1, 1, u32::MAX, ErrorWord::Invalid),
    ] {
        let request = AllocateSegmentRequest { volume_id, attachment, segment };
        assert_eq!(word(client.allocate_segment(request).await), expected, "{request:?}");
    }
    assert_eq!(word(client.map(MapRequest { volume_id: 0 }).await), ErrorWord::NotFound);
    assert_eq!(word(client.detach(DetachRequest { volume_id: 1, attachment: 9 }).await), ErrorWord::Invalid);
    assert_eq!(word(client.detach(DetachRequest { volume_id: 9, attachment: 1 }).await), ErrorWord::NotFound);
}

#[tokio::test]
async fn registrations_that_cannot_be_right_are_refused_by_name() {
    let mds = Mds::start().await;
    let good = || first_registration("z1");
    for request in [
        RegisterRequest::default(),
        RegisterRequest { address: String::new(), ..good() },
        RegisterRequest { address: "0.0.0.0:7801".into(), ..good() },
        RegisterRequest { address: "127.0.0.1:0".into(), ..good() },
        RegisterRequest { address: "127.0.0.1".into(), ..good() },
        RegisterRequest { zone: String::new(), ..good() },
        RegisterRequest { zone: "z 1".into(), ..good() },
        RegisterRequest { server: "a\u{1b}[2J".into(), ..good() },
        RegisterRequest { instance: vec![], ..good() },
        RegisterRequest { instance: vec![1; 65], ..good() },
        RegisterRequest { version: "v".repeat(65), ..good() },
    ] {
        assert_eq!(word(register(mds.address, request.clone()).await), ErrorWord::Invalid, "{request:?}");
    }
    assert_eq!(status(mds.address).await.chunkservers.len(), 0);
}

/// Garbage, half a handshake, a flood, and nothing at all.
#[tokio::test]
async fn garbage_on_the_port_disturbs_nobody() {
    let mds = Mds::start().await;
    let address = mds.address;
    tokio::task::spawn_blocking(move || {
        let mut silent = Vec::new();
        let noise: Vec<u8> =
            (0..65_536_u32).map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        let huge_frame = [&preface[..], &[0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1], &noise].concat();
        let http1 = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec();
        for bytes in [noise.clone(), huge_frame, http1, preface[..10].to_vec(), Vec::new()] {
            let mut stream = TcpStream::connect(address).expect("it listens");
            stream.set_read_timeout(Some(Duration::from_millis(200))).expect("a timeout");
            // The other side may have hung up already: as it should.
            let _ = stream.write_all(&bytes);
            let _ = stream.read(&mut [0; 1024]);
            silent.push(stream);
        }
        silent
    })
    .await
    .expect("sent");
    status(mds.address).await;
}

/// What an operator sees when the start goes wrong: one line that names the matter, and exit code 1.
#[test]
fn a_start_that_cannot_work_says_why() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = |name: &str| dir.path().join(name).to_str().expect("text").to_owned();
    let write = |name: &str, text: &str| {
        std::fs::create_dir_all(Path::new(&path(name)).parent().expect("a parent")).expect("made");
        std::fs::write(path(name), text).expect("written");
    };
    write("foreign/thesis.tex", "x");
    write("chunkserver/identity", "evolute-chunkserver data directory\n");
    write("newer/identity", "evolute-mds data directory\nformat: 7\n");
    write("damaged/identity", "evolute-mds data directory\nformat: 1\ncluster: 00\ncrc32c: 00000000\n");
    write("file", "x");
    write("typing.toml", "data-dirr = 'x'");
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let taken = taken.local_addr().expect("bound").to_string();
    let free = "127.0.0.1:0".to_owned();
    for (args, expected) in [
        (vec!["--data-dir", &path("foreign"), "--listen", &free], "thesis.tex"),
        (vec!["--data-dir", &path("chunkserver"), "--listen", &free], "evolute-chunkserver"),
        (vec!["--data-dir", &path("newer"), "--listen", &free], "newer version (format 7"),
        (vec!["--data-dir", &path("damaged"), "--listen", &free], "damaged"),
        (vec!["--data-dir", &path("file"), "--listen", &free], "file"),
        (vec!["--data-dir", &path("a"), "--listen", &taken], "Address already in use"),
        (vec!["--data-dir", &path("a"), "--listen", "nowhere"], "--listen \"nowhere\""),
        (vec!["--data-dir", &path("a"), "--listen", "192.0.2.1:1"], "cannot listen on 192.0.2.1:1"),
        (vec![], "--data-dir"),
        (vec!["--config", &path("typing.toml")], "data-dirr"),
        (vec!["--config", &path("none.toml")], "none.toml"),
    ] {
        let output = Process::command(&args).stderr(Stdio::piped()).output().expect("it runs");
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {text}");
        assert!(text.contains(expected) && !text.contains("panicked"), "{args:?}: {text}");
    }
    assert!(!Path::new(&path("a")).exists(), "nothing was made for a start that failed");
}

#[tokio::test]
async fn a_directory_in_use_is_refused_and_a_stopped_one_is_free() {
    let dir = tempfile::tempdir().expect("temp dir");
    let mut first = Process::start(dir.path(), &[]).await;
    let data = dir.path().join("mds");
    let mut second = Process::command(&["--listen", "127.0.0.1:0", "--data-dir"]);
    let output = second.arg(&data).stderr(Stdio::piped()).output().expect("it runs");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains("in use by another process"), "{text}");
    status(first.address).await;

    let pid = rustix::process::Pid::from_child(&first.child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("ours");
    assert_eq!(first.child.wait().expect("it ends").code(), Some(0), "a clean stop");
    Process::start(dir.path(), &[]).await;
}

/// More than those that have not asked for anything may be (256), and fewer than descriptors.
const STRANGERS: usize = 350;

#[tokio::test]
async fn callers_that_ask_for_nothing_lock_nobody_out() {
    let mds = Mds::start().await;
    let mut before = volumes(mds.address).await;
    before.list(ListVolumesRequest::default()).await.expect("answered");
    let mut strangers = Vec::new();
    for _ in 0..STRANGERS {
        strangers.push(tokio::net::TcpStream::connect(mds.address).await.expect("connected"));
    }
    before.list(ListVolumesRequest::default()).await.expect("who was there is still");
    let mut late = volumes(mds.address).await;
    late.list(ListVolumesRequest::default()).await.expect("who comes is let in");
    // The first of them made room for the last.
    let mut words = Vec::new();
    let ended = tokio::io::AsyncReadExt::read_to_end(&mut strangers[0], &mut words);
    // Closed or reset: both are an end.
    let _ = tokio::time::timeout(Duration::from_secs(60), ended).await.expect("it was shown out");
}
