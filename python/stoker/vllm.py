"""vLLM's loader of the name `stoker`: `vllm serve MODEL --load-format stoker`.

Found by vLLM itself through its `vllm.general_plugins` entry point, registered in its public loader registry; no code of
vLLM is changed.
"""

from __future__ import annotations

import json
import os
from typing import Any


def register() -> None:
    """Called by vLLM in each of its processes."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    class StokerModelLoader(BaseModelLoader):
        """Makes the model as vLLM's default loader does, and gives it tensors as they land on its device."""

        def __init__(self, load_config: Any) -> None:
            super().__init__(load_config)
            extra = dict(load_config.model_loader_extra_config or {})
            self.node = extra.pop("node", None)
            if extra:
                raise ValueError(
                    f"--model-loader-extra-config: {', '.join(sorted(extra))} mean nothing to stoker; `node` does"
                )

        def download_model(self, model_config: Any) -> None:
            if self.node is None:
                _folder(model_config, self.load_config)

        def load_weights(self, model: Any, model_config: Any) -> None:
            import stoker

            # vLLM's parameters have memory already, of this rank's part: each tensor is given up once it was copied.
            device = next(iter(model.parameters())).device
            if self.node is not None:
                sources = [model_config.model]
            else:
                # File by file: only one of them takes memory beside the parameters.
                sources = _files(_folder(model_config, self.load_config))
            tensors = (pair for source in sources for pair in stoker.iter_load(source, str(device), node=self.node))
            loaded = model.load_weights(tensors)
            expected = {name for name, _ in model.named_parameters()}
            if loaded is not None and model_config.quantization is None and expected - loaded:
                missing = sorted(expected - loaded)
                raise stoker.CheckpointError(
                    f"the checkpoint has nothing for {missing[0]} and {len(missing) - 1} other parameters",
                    tensor=missing[0],
                )

    register_model_loader("stoker")(StokerModelLoader)


def _folder(model_config: Any, load_config: Any) -> str:
    """The model's files on this machine."""
    if os.path.isdir(model_config.model):
        return str(model_config.model)
    from huggingface_hub import snapshot_download

    return str(
        snapshot_download(
            model_config.model,
            revision=model_config.revision,
            cache_dir=load_config.download_dir,
            allow_patterns=["*.safetensors", "*.json"],
        )
    )


def _files(folder: str) -> list[str]:
    """The weight files, those that the index names if there is one."""
    try:
        with open(os.path.join(folder, "model.safetensors.index.json")) as index:
            names = sorted(set(json.load(index)["weight_map"].values()))
    except FileNotFoundError:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
    return [os.path.join(folder, name) for name in names] or [folder]
