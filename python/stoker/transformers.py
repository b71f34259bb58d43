"""Models of Hugging Face transformers, with weights loaded by this package.

transformers makes the model itself, of the weights that it is given: so buffers, tied weights, renamed and merged
parameters and types are what its own `from_pretrained` would give, and no weight is copied.
"""

from __future__ import annotations

import os
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
    model = model_class.from_pretrained(None, config=config, state_dict=state, device_map={"": place}, **kwargs)
    # What transformers reads from the folder besides weights.
    if model.can_generate() and "generation_config" not in kwargs:
        try:
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
        except OSError:
            pass  # There is none: the configuration's own defaults, as there.
    return model


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
