//! The inference worker process: the protocol around stoker-engine
