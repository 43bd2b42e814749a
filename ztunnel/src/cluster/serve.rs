//! The agent's end of the CNI plugin's socket: one request a connection, one answer, the end.
//!
//! The socket appears by rename, so a plugin finds either the one before or this one, and a successor takes the place
//! without a gap; only root may connect. What a plugin sends is bounded in length and time, how many are served at a time
//! is bounded, and each gets an answer before it stops waiting.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use crate::base::drain::Drained;
use crate::cni::wire::{self, Answer, DEADLINE, MESSAGE_MAX, Refusal, Request, TRY_AGAIN_LATER};

/// Connections at a time: after a reboot a kubelet starts all pods of its node, some 250.
const AT_ONCE: usize = 256;
/// How long a plugin may take for its request, or for reading the answer; it has the one ready when it connects.
const TALK: Duration = Duration::from_secs(5);
/// Before the next try to accept, when the system has no descriptor left.
const RETRY: Duration = Duration::from_millis(100);

/// Opens the socket at `path`, in the place of whatever is there.
///
/// # Errors
/// What the system says.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    let folder = path.parent().unwrap_or_else(|| Path::new("/"));
    fs::create_dir_all(folder).map_err(named)?;
    // Short, because the name of a socket has at most 107 bytes.
    let new = folder.join(format!(".c{}", std::process::id()));
    let _ = fs::remove_file(&new);
    let listener = UnixListener::bind(&new).map_err(named)?;
    fs::set_permissions(&new, Permissions::from_mode(0o600)).map_err(named)?;
    fs::rename(&new, path).map_err(named)?;
    Ok(listener)
}

/// Serves plugins by `answer` until `stop` drains.
pub async fn serve<A, F>(listener: UnixListener, answer: A, stop: Drained)
where
    A: Fn(Request) -> F + Clone + Send + 'static,
    F: Future<Output = Answer> + Send + 'static,
{
    let slots = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.draining() => return,
        };
        match accepted {
            Ok((stream, _)) => {
                let answer = answer.clone();
                tokio::spawn(async move {
                    if let Err(error) = talk(stream, answer).await {
                        tracing::debug!(%error, "a CNI plugin did not take its answer");
                    }
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "the CNI plugin's socket takes nobody for a moment");
                sleep(RETRY).await;
            }
        }
    }
}

async fn talk<A, F>(mut stream: UnixStream, answer: A) -> io::Result<()>
where
    A: Fn(Request) -> F,
    F: Future<Output = Answer>,
{
    let mut line = Vec::new();
    let (reader, mut writer) = stream.split();
    // One byte more than may be, so that too long is told from long.
    let mut reader = BufReader::new(reader.take(MESSAGE_MAX as u64 + 1));
    let late = |_| io::Error::from(io::ErrorKind::TimedOut);
    timeout(TALK, reader.read_until(b'\n', &mut line)).await.map_err(late).flatten()?;
    if line.is_empty() {
        return Ok(());
    }
    let answered = match Request::decode(&line) {
        Ok(request) => {
            let what = format!("{:?} of {}/{}", request.command, request.pod_namespace, request.pod_name);
            timeout(DEADLINE, answer(request)).await.unwrap_or_else(|_| {
                let why = format!("the agent was not done with {what} within {} s", DEADLINE.as_secs());
                Err(Refusal::new(TRY_AGAIN_LATER, why))
            })
        }
        Err(refusal) => Err(refusal),
    };
    timeout(TALK, writer.write_all(&wire::encode(&answered))).await.map_err(late).flatten()?;
    timeout(TALK, writer.shutdown()).await.map_err(late).flatten()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::Path;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::UnixStream;

    use super::{bind, serve};
    use crate::base::drain::{Phase, drain};
    use crate::cni::wire::{self, Command, Done, MESSAGE_MAX, Refusal, Request};

    async fn ask(path: &Path, line: &[u8]) -> wire::Answer {
        let mut stream = UnixStream::connect(path).await.unwrap();
        // It may be refused, and the connection closed, before all of it is written.
        let _ = stream.write_all(line).await;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        wire::decode(&answer).unwrap()
    }

    #[tokio::test]
    async fn each_request_gets_its_answer_and_nonsense_a_refusal() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/cni.sock");
        let (stop, watch) = drain();
        let answer = |request: Request| async move {
            match request.command {
                Command::Status => Ok(Done { enrolled: false }),
                _ => Err(Refusal::new(50, "no")),
            }
        };
        let first = tokio::spawn(serve(bind(&path).unwrap(), answer, watch.clone()));
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let status = Request::of(Command::Status).encode().unwrap();
        assert_eq!(ask(&path, &status).await, Ok(Done { enrolled: false }));
        let gc = Request::of(Command::Gc).encode().unwrap();
        assert_eq!(ask(&path, &gc).await.unwrap_err().code, 50);
        assert_eq!(ask(&path, b"nonsense\n").await.unwrap_err().code, wire::CANNOT_DECODE);
        assert_eq!(ask(&path, &vec![b'a'; MESSAGE_MAX + 1]).await.unwrap_err().code, wire::CANNOT_DECODE);
        // A successor takes the place while the first one still serves.
        let second = tokio::spawn(serve(bind(&path).unwrap(), answer, watch));
        assert_eq!(ask(&path, &status).await, Ok(Done { enrolled: false }));
        stop.advance(Phase::Draining);
        first.await.unwrap();
        second.await.unwrap();
    }
}
