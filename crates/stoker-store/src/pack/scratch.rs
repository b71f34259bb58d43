//! The folder that a packed model grows in: hidden, beside where it lands, one process's at a time.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};

use super::{PackError, sync};

/// Removed unless it lands. The lock is on the directory itself, and goes with the process.
#[derive(Debug)]
pub(super) struct Scratch {
    path: PathBuf,
    output: PathBuf,
    landed: bool,
    _lock: File,
}

// === impl Scratch ===

impl Scratch {
    /// Beside `output`, so that a rename can land it. What a process that died left there is removed.
    pub(super) fn create(output: &Path) -> Result<Self, PackError> {
        let exists = || PackError::Exists { path: output.to_owned() };
        let (Some(parent), Some(name)) = (output.parent(), output.file_name()) else { return Err(exists()) };
        if fs::symlink_metadata(output).is_ok() {
            return Err(exists());
        }
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(".packing");
        let path = parent.join(hidden);
        loop {
            let made = match fs::create_dir(&path) {
                Ok(()) => true,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
                Err(error) => return Err(PackError::io(&path)(error)),
            };
            let lock = match File::open(&path) {
                Ok(lock) => lock,
                // Another process has landed or removed it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(PackError::io(&path)(error)),
            };
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    return Err(PackError::Busy { path: output.to_owned() });
                }
                Err(error) => return Err(PackError::io(&path)(error.into())),
            }
            // Whether what is locked is still what is there.
            let inode = lock.metadata().map_err(PackError::io(&path))?.ino();
            if fs::symlink_metadata(&path).is_ok_and(|now| now.ino() == inode) {
                if made {
                    return Ok(Self { path, output: output.to_owned(), landed: false, _lock: lock });
                }
                tracing::info!(path = %path.display(), "removing what a pack that was killed left");
                fs::remove_dir_all(&path).map_err(PackError::io(&path))?;
            }
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes it appear where it was asked for, durably.
    pub(super) fn land(mut self) -> Result<(), PackError> {
        sync(&self.path)?;
        match renameat_with(CWD, &self.path, CWD, &self.output, RenameFlags::NOREPLACE) {
            Ok(()) => {}
            Err(rustix::io::Errno::EXIST) => return Err(PackError::Exists { path: self.output.clone() }),
            // Some network file systems know no flags. A plain rename replaces nothing but an empty directory.
            Err(rustix::io::Errno::INVAL) => {
                fs::rename(&self.path, &self.output).map_err(PackError::io(&self.output))?;
            }
            Err(error) => return Err(PackError::io(&self.output)(error.into())),
        }
        self.landed = true;
        self.output.parent().map_or(Ok(()), sync)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.landed
            && let Err(error) = fs::remove_dir_all(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "an unfinished pack could not be removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_process_at_a_time_and_the_next_takes_over_what_a_dead_one_left() {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("out");
        let first = Scratch::create(&output).unwrap();
        let error = Scratch::create(&output).unwrap_err();
        assert!(matches!(error, PackError::Busy { .. }), "{error}");
        fs::write(first.path().join("half"), b"x").unwrap();
        let path = first.path().to_owned();
        drop(first);
        assert!(!path.exists());

        // As a killed process leaves it: there, and nobody's.
        fs::create_dir(&path).unwrap();
        fs::write(path.join("half"), b"x").unwrap();
        let second = Scratch::create(&output).unwrap();
        assert_eq!(fs::read_dir(second.path()).unwrap().count(), 0);
        second.land().unwrap();
        assert!(output.is_dir() && !path.exists());
    }

    #[test]
    fn what_appears_meanwhile_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("out");
        let scratch = Scratch::create(&output).unwrap();
        fs::create_dir(&output).unwrap();
        assert!(matches!(scratch.land(), Err(PackError::Exists { .. })));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "only what appeared");
        assert!(matches!(Scratch::create(&output), Err(PackError::Exists { .. })));
        assert!(matches!(Scratch::create(Path::new("/")), Err(PackError::Exists { .. })));
    }
}
