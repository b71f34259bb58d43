"""Models of Hugging Face transformers, with weights loaded by this package.

transformers makes the model itself, of the weights that it is given: so buffers, tied weights, renamed and merged
parameters and types are what its own `from_pretrained` would give, and no weight is copied.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ._load import _device, load
from .errors import NotFoundError

if TYPE_CHECKING:
    import torch

# What says which files to have, not what the model is.
_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def from_pretrained(
    name_or_path: str | os.PathLike[str],
    *,
    device: str | int | torch.device = "cuda:0",
    model_class: Any = None,
    **kwargs: Any,
) -> Any:
    """The same model as `AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs)`, on `device`.

    `name_or_path`: a folder, or a model on the Hugging Face hub, whose files are fetched if they aren't in its cache.
    `model_class`: what makes it, if not the class that the configuration names. Other arguments are transformers' own.
    """
    import transformers

    if "device_map" in kwargs:
        raise TypeError("device_map: the model goes to one device; say which with device=")
    place = _device(device)
    hub = {key: kwargs.pop(key) for key in _HUB if key in kwargs}
    folder = _folder(os.fspath(name_or_path), hub)
    config = kwargs.pop("config", None)
    if config is None:
        remote = {key: kwargs[key] for key in ("trust_remote_code",) if key in kwargs}
        config = transformers.AutoConfig.from_pretrained(folder, **remote)
    model_class = model_class or _class_of(transformers, config)
    state = load(folder, place)
    with _no_warm_up():
        model = model_class.from_pretrained(None, config=config, state_dict=state, device_map={"": place}, **kwargs)
    # What transformers reads from the folder besides weights.
    if model.can_generate() and "generation_config" not in kwargs:
        model.generation_config = _generation_config(transformers, model, folder)
    return model


_WARM_UP = threading.Lock()


@contextlib.contextmanager
def _no_warm_up() -> Iterator[None]:
    """Keeps transformers from allocating device memory of the model's size before it takes the weights over: they are there
    already, so twice the memory would be needed. What it is good for is making later allocations faster."""
    from transformers import modeling_utils

    name = "caching_allocator_warmup"
    with _WARM_UP:
        warm_up = getattr(modeling_utils, name, None)
        if warm_up is not None:
            setattr(modeling_utils, name, lambda *_, **__: None)
        try:
            yield
        finally:
            if warm_up is not None:
                setattr(modeling_utils, name, warm_up)


def _generation_config(transformers: Any, model: Any, folder: str) -> Any:
    read = transformers.GenerationConfig.from_pretrained
    try:
        return read(folder)
    except OSError:
        # There is no such file. What the configuration says of it is read by version 5 here, by version 4 before.
        if not hasattr(model, "adjust_generation_fn"):
            return model.generation_config
        return read(folder, config_file_name="config.json", _from_model_config=True)


def _class_of(transformers: Any, config: Any) -> Any:
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    mapping = transformers.AutoModelForCausalLM._model_mapping
    if type(config) in mapping:
        return mapping[type(config)]
    raise NotFoundError(
        f"transformers has no class for {config.architectures or type(config).__name__}: give model_class="
    )


def _folder(name_or_path: str, hub: dict[str, Any]) -> str:
    path = os.path.expanduser(name_or_path)
    if not os.path.isdir(path):
        from huggingface_hub import snapshot_download

        sub = hub.pop("subfolder", None)
        patterns = ["*.safetensors", "*.json", "*.py"]
        path = snapshot_download(name_or_path, allow_patterns=patterns, **hub)
        return os.path.join(path, sub) if sub else path
    return os.path.join(path, hub["subfolder"]) if hub.get("subfolder") else path
