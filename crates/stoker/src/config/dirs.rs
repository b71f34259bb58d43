//! Where things are kept.

use std::{
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
};

use super::{ConfigError, Environment};

/// The directories of this user, by the XDG rules.
#[derive(Debug, Clone)]
pub(crate) struct Dirs {
    /// `stoker.toml` is here.
    pub(crate) config: PathBuf,
    /// Pulled models, among others.
    pub(crate) data: PathBuf,
    /// Sockets; private to the user. Short: a Unix socket's path has at most 107 bytes.
    pub(crate) runtime: PathBuf,
}

impl Dirs {
    /// # Errors
    /// [`ConfigError::NoHome`] when neither the XDG variables nor `HOME` say where.
    pub(crate) fn find(environment: &Environment) -> Result<Self, ConfigError> {
        let home = environment.get("HOME").map(PathBuf::from);
        let dir = |variable: &str, below_home: &str| {
            environment
                .get(variable)
                .map(PathBuf::from)
                .filter(|p| p.is_absolute())
                .or_else(|| home.as_ref().map(|h| h.join(below_home)))
                .map(|p| p.join("stoker"))
                .ok_or(ConfigError::NoHome)
        };
        let runtime = match (environment.get("STOKER_RUNTIME_DIR"), environment.get("XDG_RUNTIME_DIR")) {
            (Some(own), _) => PathBuf::from(own),
            (None, Some(xdg)) => Path::new(xdg).join("stoker"),
            (None, None) => PathBuf::from(format!("/tmp/stoker-{}", rustix::process::getuid().as_raw())),
        };
        Ok(Self {
            config: dir("XDG_CONFIG_HOME", ".config")?,
            data: dir("XDG_DATA_HOME", ".local/share")?,
            runtime,
        })
    }

    /// The admin API's socket.
    pub(crate) fn admin_socket(&self) -> PathBuf {
        self.runtime.join("admin.sock")
    }

    /// The socket of the process that keeps a server's memory.
    pub(crate) fn keeper_socket(&self) -> PathBuf {
        self.runtime.join("keeper.sock")
    }

    /// The socket for programs that use the node's memory; the Python package looks for it by this name.
    pub(crate) fn clients_socket(&self) -> PathBuf {
        self.runtime.join("clients.sock")
    }

    /// Makes the runtime directory, for this user alone.
    ///
    /// # Errors
    /// [`ConfigError::RuntimeDir`] when it can't be made, or belongs to somebody else (in `/tmp` anybody may have made it).
    pub(crate) fn prepare_runtime(&self) -> Result<(), ConfigError> {
        let error = |message: String| ConfigError::RuntimeDir { path: self.runtime.clone(), message };
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.runtime)
            .map_err(|e| error(e.to_string()))?;
        let found = std::fs::symlink_metadata(&self.runtime).map_err(|e| error(e.to_string()))?;
        let own = rustix::process::getuid().as_raw();
        if !found.is_dir() || found.uid() != own {
            return Err(error(format!(
                "belongs to user {} and not to {own}; set XDG_RUNTIME_DIR",
                found.uid()
            )));
        }
        if found.mode() & 0o077 != 0 {
            let private = std::os::unix::fs::PermissionsExt::from_mode(0o700);
            std::fs::set_permissions(&self.runtime, private).map_err(|e| error(e.to_string()))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xdg_before_home() {
        let dirs =
            Dirs::find(&[("HOME", "/h"), ("XDG_DATA_HOME", "/d"), ("XDG_RUNTIME_DIR", "/r")].into()).unwrap();
        assert_eq!(dirs.config, Path::new("/h/.config/stoker"));
        assert_eq!(dirs.data, Path::new("/d/stoker"));
        assert_eq!(dirs.admin_socket(), Path::new("/r/stoker/admin.sock"));
        assert!(matches!(Dirs::find(&[("PATH", "/bin")].into()), Err(ConfigError::NoHome)));
    }

    #[test]
    fn the_runtime_directory_is_private() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("run");
        std::fs::create_dir(&path).unwrap();
        let dirs = Dirs { config: "/c".into(), data: "/d".into(), runtime: path.clone() };
        dirs.prepare_runtime().unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
    }
}
