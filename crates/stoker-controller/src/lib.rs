//! Decides which models are resident where: demand, residency policy loop, instances
