//! Inference: model families, row-invariant kernels, paged KV cache, continuous batching, sampling
