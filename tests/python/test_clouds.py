"""Models on Azure and on Google Cloud Storage, against servers that speak as they do (`emulators`)."""

import json

import pytest
from emulators import Azure, Gate, Google
from object_store import Proxy
from stoker_server import Server
from test_remote import ASK, FLAGS, Indexed, landed, until

CHUNK = 16 << 20


@pytest.fixture(scope="module", params=[Azure, Google], ids=["azure", "google"])
def cloud(request, gguf):
    if request.param is Azure and not Azure.there():
        pytest.skip("no Azurite: npm, with which scripts/test installs it, is missing")
    with request.param() as store:
        store.put("smol/model.gguf", gguf.read_bytes())
        yield store


def before(store, **kwargs) -> Proxy:
    """What requests go through: for Google, whoever hasn't the token stops here."""
    return Gate(store.port) if isinstance(store, Google) else Proxy(store.port)


def client(store, port, config: str = "", right: bool = True, kind=Server, **kwargs) -> Server:
    server = kind(config, FLAGS, **kwargs)
    server.environment |= store.environment(port, right)
    return server


def config(store, folder: str = "smol") -> str:
    return f'ssd = "1GiB"\n[models.far]\nsource = "{store.base}/{folder}"\ncontext = 512\n'


def test_pull_by_ranges_of_a_folder_and_of_an_object(cloud, gguf, tmp_path):
    with before(cloud) as proxy:
        server = client(cloud, proxy.port, models=tmp_path / "models")
        for name, source in (("folder", f"{cloud.base}/smol"), ("object", f"{cloud.base}/smol/model.gguf")):
            proxy.gets.clear()
            pulled = server.json("pull", name, "--source", source)
            assert pulled["bytes"] == gguf.stat().st_size and not pulled["was_here"]
            assert (tmp_path / "models" / name / "model.gguf").read_bytes() == gguf.read_bytes()
            assert server.json("verify", name)["ok"]
            assert set(range(CHUNK, gguf.stat().st_size, CHUNK)) <= set(proxy.gets), "by ranges"
        failed = server.command("pull", "none", "--source", f"{cloud.base}/nothing", check=False)
        assert failed.returncode != 0 and "no *.gguf" in failed.stderr
        failed = server.command("pull", "none", "--source", f"{cloud.base}/nothing/model.gguf", check=False)
        assert failed.returncode != 0 and "not found" in failed.stderr


def test_every_way_to_write_the_address(cloud, gguf, tmp_path):
    with before(cloud) as proxy:
        for scheme in cloud.schemes:
            server = client(cloud, proxy.port, models=tmp_path / scheme)
            address = cloud.base.replace(cloud.base.split(":")[0], scheme, 1)
            assert server.json("pull", "m", "--source", f"{address}/smol/model.gguf")["bytes"] == gguf.stat().st_size


def test_the_first_request_is_served_on_demand(cloud, gguf):
    with before(cloud) as proxy:
        with client(cloud, proxy.port, config(cloud), kind=Indexed) as server:
            listed = json.loads(server.get("/v1/models")[1])["data"]
            assert [(m["id"], m["owned_by"]) for m in listed] == [("far", f"{cloud.base}/smol")]
            assert not (server.models / "far").exists()
            proxy.gets.clear()
            status, body, _ = server.post(*ASK)
            assert status == 200, body
            until("landed", lambda: landed(server, gguf))
            assert sorted(proxy.gets) == list(range(0, gguf.stat().st_size, CHUNK)), "every chunk once"
            assert server.metric("stoker_store_read_bytes_total", tier="remote") == gguf.stat().st_size


def test_another_version_is_noticed(cloud, gguf):
    cloud.put("changing/model.gguf", gguf.read_bytes())
    with before(cloud) as proxy:
        with client(cloud, proxy.port, config(cloud, "changing"), kind=Indexed) as server:
            data = bytearray(gguf.read_bytes())
            data[-1] ^= 1
            cloud.put("changing/model.gguf", bytes(data))
            status, body, _ = server.post(*ASK)
            assert status == 503 and body["error"]["code"] == "model_changed", body
            until("indexed anew", lambda: server.post(*ASK)[0] == 200, 30)
            until("landed", lambda: (server.models / "far/model.gguf").exists())
            assert (server.models / "far/model.gguf").read_bytes() == bytes(data)


def test_refused_credentials_say_what_to_do(cloud):
    with before(cloud) as proxy:
        server = client(cloud, proxy.port, config(cloud), right=False)
        failed = server.command("pull", "mine", "--source", f"{cloud.base}/smol", check=False)
        assert failed.returncode != 0, failed.stdout
        assert "access refused" in failed.stderr and cloud.said in failed.stderr, failed.stderr
        with server:
            status, body, _ = server.post(*ASK)
            assert status != 200 and "access refused" in body["error"]["message"], body


@pytest.mark.parametrize("deed", [503, 429, "reset"])
def test_a_store_on_a_bad_day_is_asked_again(cloud, gguf, deed):
    with before(cloud) as proxy:
        again = lambda begin: len([b for b in proxy.gets if b == begin]) < 2
        proxy.misdeed = lambda number, begin: deed if begin and again(begin) else None
        with client(cloud, proxy.port, config(cloud), kind=Indexed) as server:
            status, body, _ = server.post(*ASK)
            assert status == 200, body
            until("landed", lambda: landed(server, gguf))
        assert len([begin for begin in proxy.gets if begin]) >= 2 * 5
