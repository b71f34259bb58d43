import os
import pathlib

import openai
import pytest
from stoker_server import ROOT, Server

DATA = ROOT / "tests/data"


@pytest.fixture(scope="session")
def gguf() -> pathlib.Path:
    path = os.environ.get("STOKER_TEST_GGUF", str(ROOT / "target/fixtures/SmolLM2-135M-Instruct.Q4_1.gguf"))
    assert pathlib.Path(path).is_file(), f"{path} is missing: run scripts/test, which fetches it"
    return pathlib.Path(path)


@pytest.fixture(scope="session")
def server(gguf, tmp_path_factory):
    broken = tmp_path_factory.mktemp("broken")
    (broken / "bad.gguf").write_bytes(b"GGUF" + b"\xff" * 64)
    config = f"""
        [models."smollm2:135m"]
        path = "{gguf}"
        context = 2048
        [models.tiny]
        path = "{DATA}/tiny-llama"
        [models.tiny-sharded]
        path = "{DATA}/tiny-llama-bf16-sharded"
        [models.broken]
        path = "{broken}/bad.gguf"
    """
    with Server(config, ("--dram", "512MiB", "--kv", "1GiB")) as running:
        yield running


@pytest.fixture(scope="session")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120)
