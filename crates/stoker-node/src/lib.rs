//! A server's agent: owns the store, its memory and its workers
