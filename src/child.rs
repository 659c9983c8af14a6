//! Processes that we start: they end when we do, however we end.

use std::{io, os::unix::process::CommandExt, process::Command};

/// The process is told to end (`SIGTERM`) when the thread that starts it is gone, be it killed. Told, not killed: a
/// store first writes what it still has in memory, and a script ends what it has started.
pub fn die_with_us(command: &mut Command) {
    let parent = std::process::id();
    // SAFETY: between fork and exec only async-signal-safe calls are made.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) != 0 {
                return Err(io::Error::last_os_error());
            }
            // The parent may have died before the line above.
            if libc::getppid().unsigned_abs() != parent {
                libc::_exit(1);
            }
            Ok(())
        });
    }
}
