//! Memory in pages of two mebibytes where the system has them: weights and keys are read from end to end once
//! a step, and what small pages cost is in `docs/PERFORMANCE.md`.

/// Asks for huge pages where `memory` is large enough for some. It is a wish: nothing else changes.
pub fn prefer(memory: &mut [u8]) {
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 4096;
        let start = memory.as_ptr().align_offset(PAGE);
        let length = memory.len().saturating_sub(start) / PAGE * PAGE;
        if length > 0 {
            // SAFETY: whole pages of one allocation; the advice does not change what is in them. An error says that
            // the system has no huge pages.
            unsafe { libc::madvise(memory.as_mut_ptr().add(start).cast(), length, libc::MADV_HUGEPAGE) };
        }
    }
}
