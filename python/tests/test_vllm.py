"""vLLM's loader against vLLM's interface, of which `vllm` here has what the loader uses (vLLM itself is gigabytes)."""

import importlib.metadata
import sys
import types

import pytest
import stoker
from conftest import bytes_of


class BaseModelLoader:
    """As `vllm.model_executor.model_loader.base_loader`."""

    def __init__(self, load_config):
        self.load_config = load_config


class Parameter:
    device = "cpu"


class Model:
    def __init__(self, names):
        self.names, self.given = names, {}

    def parameters(self):
        return iter([Parameter()])

    def named_parameters(self):
        return [(name, Parameter()) for name in self.names]

    def load_weights(self, weights):
        for name, tensor in weights:
            self.given[name] = bytes_of(tensor)
        return set(self.given)


@pytest.fixture
def registry(monkeypatch):
    found = {}

    def register_model_loader(load_format):
        def wrap(kind):
            assert issubclass(kind, BaseModelLoader)
            found[load_format] = kind
            return kind

        return wrap

    model_loader = types.ModuleType("vllm.model_executor.model_loader")
    model_loader.register_model_loader = register_model_loader
    base = types.ModuleType("vllm.model_executor.model_loader.base_loader")
    base.BaseModelLoader = BaseModelLoader
    for name in ("vllm", "vllm.model_executor"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, model_loader.__name__, model_loader)
    monkeypatch.setitem(sys.modules, base.__name__, base)
    return found


def test_the_plugin_registers_and_loads(registry, large):
    folder, tensors = large
    (entry,) = [e for e in importlib.metadata.entry_points(group="vllm.general_plugins") if e.name == "stoker"]
    entry.load()()
    load_config = types.SimpleNamespace(model_loader_extra_config={}, download_dir=None)
    loader = registry["stoker"](load_config)
    config = types.SimpleNamespace(model=str(folder), revision=None, quantization=None)
    loader.download_model(config)
    model = Model(tensors)
    loader.load_weights(model, config)
    assert model.given == {name: data for name, (_, _, data) in tensors.items()}
    with pytest.raises(stoker.CheckpointError, match="nothing for extra.weight"):
        loader.load_weights(Model([*tensors, "extra.weight"]), config)
    with pytest.raises(ValueError, match="threads"):
        registry["stoker"](types.SimpleNamespace(model_loader_extra_config={"threads": 4}, download_dir=None))
