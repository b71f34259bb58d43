"""This package beside every peer: `BENCH_PLUGIN=python/bench_plugin.py bench/peers/loaders_gpu.py`."""

import stoker


def load(files, device):
    return stoker.load(list(files), device=device)


def iterate(files, device):
    return dict(stoker.iter_load(list(files), device=device))


def load_file(files, device):
    from stoker.safetensors import load_file

    tensors = {}
    for file in files:
        tensors.update(load_file(file, device=device))
    return tensors


LOADERS = {"stoker": load, "stoker-iter": iterate, "stoker-load_file": load_file}
