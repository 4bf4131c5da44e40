//! The real programs, which are found beside `evolute`. Where they are not built a test says so and passes (`make` builds them
//! first).

use std::path::Path;
use std::time::{Duration, Instant};

pub const EVOLUTE: &str = env!("CARGO_BIN_EXE_evolute");
/// For everything that is waited for: far more than it takes, so that only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(120);

pub fn are_built(names: &[&str]) -> bool {
    let beside = Path::new(EVOLUTE).parent().expect("a directory");
    let missing = names.iter().find(|name| !beside.join(name).exists());
    if let Some(name) = missing {
        eprintln!("skipped: {name} is not built (make build)");
    }
    missing.is_none()
}

pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
