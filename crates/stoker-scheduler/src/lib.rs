//! Pure policies: start estimates, placement, eviction, residency; state and time are arguments
