//! The models directory: what is known, aliases, pulling from the hub or a package, removal
