//! The tiers of the checkpoint store: SSD and DRAM, the load pipeline, the chunk cache
