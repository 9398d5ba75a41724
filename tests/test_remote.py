"""Object stores, web servers and hubs as sources: the same plans and bytes as from disk, and each byte fetched once."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
from remote import COMMIT, SECRET, Hub, Request, Store, Web, ranged
from safetensors.numpy import save_file

import streamconv
from streamconv.cli import main
from streamconv.errors import CheckpointError, ConversionError, UsageError
from streamconv.execution import memory
from streamconv.running import items, run
from streamconv.storage import distant, hub, objects
from streamconv.storage import web as connections


def model(directory: Path, tensors: int = 8, elements: int = 100_000, shards: int = 3) -> Path:
    """A sharded model with an index, and what lies beside it."""
    directory.mkdir(parents=True)
    generator = numpy.random.default_rng(0)
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        values = {
            f"layers.{i}.weight": generator.standard_normal((elements // 100, 100), dtype="f4")
            for i in range(shard, tensors, shards)
        }
        save_file(values, directory / name)
        weight_map |= dict.fromkeys(values, name)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (directory / "config.json").write_text("{}")
    (directory / "tokenizer.json").write_text('{"a": 1}')
    return directory


def files(directory: Path) -> dict[str, bytes]:
    return {
        each.relative_to(directory).as_posix(): each.read_bytes()
        for each in sorted(directory.rglob("*"))
        if each.is_file() and each.name != "conversion.json"
    }


def test_a_conversion_from_a_store_is_the_one_from_disk(store: Store, tmp_path: Path) -> None:
    source = model(tmp_path / "model")
    place = store.upload(source, "one/model")
    store.proxy.reset()
    for number, arguments in enumerate(({}, {"dtype": "BF16"}, {"to": "torch", "max_shard": "1MB"})):
        here, there = tmp_path / f"here{number}", tmp_path / f"there{number}"
        streamconv.convert(source, here, workers=1, **arguments)
        store.proxy.reset()
        streamconv.convert(place, there, workers=1, **arguments)
        assert files(here) == files(there)
        # Each byte once, but for the first pages of each file.
        whole = sum(file.stat().st_size for file in source.iterdir())
        assert whole * 0.98 < store.proxy.sent("one/model") < whole + 4 * (64 << 10)
        assert not streamconv.verify(place, there, **arguments).problems


def test_workers_in_other_processes_open_the_same(store: Store, tmp_path: Path) -> None:
    source = model(tmp_path / "model")
    place = store.upload(source, "workers/model")
    streamconv.convert(source, tmp_path / "here", workers=1)
    streamconv.convert(place, tmp_path / "there", workers=2, engine="local")
    assert files(tmp_path / "here") == files(tmp_path / "there")


def test_a_look_fetches_headers_alone(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = model(tmp_path / "model", tensors=6, elements=2_000_000)
    place = store.upload(source, "large/model")
    store.proxy.reset()
    assert main(["inspect", place]) == 0
    assert "layers.{0..5}.weight" in capsys.readouterr().out
    whole = sum(file.stat().st_size for file in source.iterdir())
    assert store.proxy.sent() < 0.02 * whole
    assert len(store.proxy.requests) < 30


def test_what_is_beside_and_like_and_merged_comes_from_a_store(store: Store, tmp_path: Path) -> None:
    source = model(tmp_path / "model")
    (tmp_path / "other.json").write_text('{"model_type": "x"}')
    place = store.upload(source, "like/model")
    config = store.upload(tmp_path / "other.json", "like/other.json")
    streamconv.convert(source, tmp_path / "here", config=tmp_path / "other.json", workers=1)
    streamconv.convert(place, tmp_path / "there", config=config, workers=1)
    assert files(tmp_path / "here") == files(tmp_path / "there")
    assert b"model_type" in files(tmp_path / "there")["config.json"]
    assert main(["diff", place, str(tmp_path / "there")]) == 0


def test_one_file_of_a_store(store: Store, tmp_path: Path) -> None:
    source = model(tmp_path / "model", shards=1)
    (file,) = source.glob("*.safetensors")
    place = store.upload(file, "single/a b#c?d%20é.safetensors")
    store.put("single/config.json", b"{}")
    streamconv.convert(place, tmp_path / "out", workers=1)
    assert (tmp_path / "out" / "config.json").read_text() == "{}"
    assert not streamconv.verify(place, tmp_path / "out").problems


def test_a_source_that_changes_is_an_error(store: Store, tmp_path: Path) -> None:
    source = model(tmp_path / "model")
    place = store.upload(source, "changing/model")
    plan = streamconv.plan(place)
    shard = "model-00002-of-00003.safetensors"
    data = (source / shard).read_bytes()
    store.put(f"changing/model/{shard}", data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="the source changed"):
        run.run(plan, tmp_path / "out", budget=memory.budget(64 << 20, 1))

    def change(request: Request, _: int) -> str | None:
        """Another object, as soon as bytes of tensors are asked for."""
        found = ranged(request)
        if found and found[0] > 100_000 and shard in request.path:
            store.proxy.fault = None
            store.put(f"changing/model/{shard}", data)
        return None

    store.proxy.fault = change
    with pytest.raises(ConversionError, match="another object by now"):
        streamconv.convert(place, tmp_path / "out2", workers=1)
    assert not (tmp_path / "out2" / "model.safetensors.index.json").exists()


def test_no_secret_is_written_anywhere(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = store.upload(model(tmp_path / "model"), "secret/model")
    assert main([place, str(tmp_path / "out"), "--debug"]) == 0
    monkeypatch.setattr(objects, "_RETRIES", {"max_retries": 0})
    objects._client.cache_clear()
    for fault in ("500", "403"):
        store.proxy.fault = lambda request, _, fault=fault: fault if ranged(request) else None
        assert main([place, str(tmp_path / "out2"), "--debug"]) != 0
    kept = [each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()]
    said = capsys.readouterr()
    assert any(b"s3://bucket/secret/model" in each for each in kept)
    assert not any(SECRET.encode() in each for each in (*kept, said.out.encode(), said.err.encode()))


def test_what_cannot_be_named_is_refused(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*words: str) -> str:
        assert main([*words]) == 2
        return capsys.readouterr().err

    place = store.upload(model(tmp_path / "model"), "names/model")
    assert "cannot be written to" in refused(str(tmp_path / "model"), "s3://bucket/out")
    assert "no such file or directory" in refused(f"{place}/none", "out")
    assert "NoSuchBucket" in refused("s3://nobucket/x", "out")
    assert "BUCKET" in refused("s3://", "out")
    store.put("names/model/../../etc/passwd", b"x")
    store.put("names/bad/../model.safetensors", b"x")
    assert "path" in refused("s3://bucket/names/bad", "out")
    store.put("names/back/a\\..\\b.safetensors", b"x")
    assert "no path can name" in refused("s3://bucket/names/back", "out")
    monkeypatch.setitem(sys.modules, "obstore", None)
    objects._obstore.cache_clear()
    objects._client.cache_clear()
    assert "pip install 'streamconv[remote]'" in refused(place, "out")
    objects._obstore.cache_clear()


FAULTS = {
    "500": lambda request, number: "500" if number % 3 == 0 else None,
    "503": lambda request, number: "503" if number % 3 == 0 else None,
    "reset": lambda request, number: "reset" if ranged(request) and number % 3 == 0 else None,
    "truncated": lambda request, number: "truncated" if ranged(request) and number % 3 == 0 else None,
    "slow": lambda request, number: "slow" if number % 2 else None,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_passes_is_tried_again(store: Store, tmp_path: Path, fault: str) -> None:
    source = model(tmp_path / "model")
    place = store.upload(source, f"faults/{fault}")
    streamconv.convert(source, tmp_path / "here", workers=1)
    store.proxy.fault = FAULTS[fault]
    streamconv.convert(place, tmp_path / "there", workers=1)
    assert files(tmp_path / "here") == files(tmp_path / "there")


@pytest.mark.parametrize("fault", ["500", "503", "reset", "truncated", "403"])
def test_what_stays_ends_the_run_which_goes_on(
    store: Store, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_RETRIES", {"max_retries": 1})
    monkeypatch.setattr(items, "_BATCH_BYTES", 1 << 20)
    source = model(tmp_path / "model", tensors=4, elements=1_000_000, shards=4)
    place = store.upload(source, "stays")
    streamconv.convert(source, tmp_path / "here", workers=1, memory_budget="16MiB")
    last = "model-00004-of-00004"
    store.proxy.fault = lambda request, _: (
        fault if last in request.path and (ranged(request) or (0,))[0] > 100_000 else None
    )
    with pytest.raises(ConversionError) as caught:
        streamconv.convert(place, tmp_path / "there", workers=1, memory_budget="16MiB")
    assert last in str(caught.value) and "layers.3" in str(caught.value)
    store.proxy.reset()
    result = streamconv.convert(place, tmp_path / "there", workers=1, memory_budget="16MiB")
    assert files(tmp_path / "here") == files(tmp_path / "there")
    assert result.bytes_resumed > 0


# ---------------------------------------------------------------------------------- web servers


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(distant, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    distant.SEEN.clear()
    server = Web()
    yield server
    server.close()
    connections.close()


def served(web: Web, directory: Path, above: str) -> str:
    web.files |= {
        f"/{above}/{file.relative_to(directory).as_posix()}": file.read_bytes()
        for file in directory.rglob("*")
        if file.is_file()
    }
    return f"{web.address}/{above}"


@pytest.mark.parametrize("fault", ["", "500", "503", "reset", "truncated"])
def test_a_web_server_with_pages_of_links(web: Web, tmp_path: Path, fault: str) -> None:
    source = model(tmp_path / "model")
    place = served(web, source, "a/model")
    streamconv.convert(source, tmp_path / "here", workers=1)
    web.fault = lambda request, number: (
        fault if number % 3 == 0 and (fault[:1] == "5" or ranged(request)) else None
    )
    streamconv.convert(place, tmp_path / "there", workers=1)
    assert files(tmp_path / "here") == files(tmp_path / "there")
    whole = sum(file.stat().st_size for file in source.iterdir())
    assert web.sent() < whole + 4 * (64 << 10)
    web.fault = None
    assert not streamconv.verify(place, tmp_path / "there").problems


def test_one_file_of_a_web_server(web: Web, tmp_path: Path) -> None:
    source = model(tmp_path / "model", shards=1)
    (file,) = source.glob("*.safetensors")
    web.files = {"/model.safetensors": file.read_bytes(), "/config.json": b"{}"}
    streamconv.convert(f"{web.address}/model.safetensors", tmp_path / "out", workers=1)
    assert not streamconv.verify(f"{web.address}/model.safetensors", tmp_path / "out").problems


def test_what_a_web_server_may_not_do(web: Web, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(place: str) -> str:
        assert main(["inspect", place]) == 2
        return capsys.readouterr().err

    served(web, model(tmp_path / "model", shards=1), "m")
    web.moved = {
        "/file": "file:///etc/passwd",
        "/link": "http://169.254.169.254/latest/meta-data",
        "/loop": "/loop",
    }
    assert "from http: to file:" in refused(f"{web.address}/file")
    said = refused(f"{web.address}/link")
    assert "link-local" in said or "no answer from 169.254.169.254" in said
    assert "redirects more than" in refused(f"{web.address}/loop")
    for secret in (f"http://user:{SECRET}@127.0.0.1/x", f"http://127.0.0.1/x?signature={SECRET}"):
        said = refused(secret)
        assert "nothing else" in said and SECRET not in said
    assert "no such file" in refused(f"{web.address}/none")

    def change(request: Request, _: int) -> str | None:
        found = ranged(request)
        if found and found[1] - found[0] > 100_000:
            name = request.path
            web.files[name] = web.files[name][:-1] + b"\0"
        return None

    web.fault = change
    assert main([f"{web.address}/m", str(tmp_path / "out")]) == 1
    assert "another file by now" in capsys.readouterr().err


# ---------------------------------------------------------------------------------- hubs


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of Hugging Face's libraries, with nothing else of the user's."""
    monkeypatch.setattr(distant, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    hub._commit.cache_clear()
    hub._tree.cache_clear()
    yield tmp_path / "hf" / "hub"
    connections.close()


def test_a_model_of_a_hub(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = model(tmp_path / "model")
    streamconv.convert(source, tmp_path / "here", workers=1)
    server = Hub(source, uses=3, private=True)
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.chdir(tmp_path)
    try:
        for number, name in enumerate(("hf://owner/repo", "owner/repo", f"hf://owner/repo@{COMMIT}")):
            there = tmp_path / f"there{number}"
            streamconv.convert(name, there, workers=1, memory_budget="4MiB")
            assert files(tmp_path / "here") == files(there)
            assert not any(
                SECRET.encode() in each.read_bytes() for each in there.rglob("*") if each.is_file()
            )
        assert not streamconv.verify("owner/repo", there).problems
        assert f"hf://owner/repo@{COMMIT}" in (there / ".streamconv" / "conversion.json").read_text()
        server.store.requests.clear()
        streamconv.convert("owner/repo", tmp_path / "processes", workers=2, engine="local")
        assert files(tmp_path / "here") == files(tmp_path / "processes")
        # The addresses expired several times; a token went to the hub, and nowhere else.
        assert server.given > 10
        assert not any("authorization" in each.headers for each in server.store.requests)
        whole = sum(file.stat().st_size for file in source.iterdir())
        assert server.store.sent() < whole + 4 * (64 << 10)
    finally:
        server.close()


def test_a_model_of_the_cache_needs_no_network(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = model(tmp_path / "model")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    hub._library.cache_clear()
    monkeypatch.chdir(tmp_path)
    directory = cache / "models--owner--repo"
    snapshot = directory / "snapshots" / COMMIT
    shutil.copytree(source, snapshot)
    (directory / "refs").mkdir()
    (directory / "refs" / "main").write_text(COMMIT)
    streamconv.convert(source, tmp_path / "here", workers=1)
    for number, name in enumerate(("owner/repo", "hf://owner/repo", f"hf://owner/repo@{COMMIT}", directory)):
        streamconv.convert(name, tmp_path / f"there{number}", workers=1)
        assert files(tmp_path / "here") == files(tmp_path / f"there{number}")
    (snapshot / "model-00002-of-00003.safetensors").unlink()
    assert main(["inspect", "owner/repo"]) == 2  # what is not whole is the hub's
    assert "pip install 'streamconv[hub]'" in capsys.readouterr().err
    hub._library.cache_clear()


@pytest.mark.parametrize(
    ("there", "words"),
    [
        ("file:///etc/passwd", "from http: to file:"),
        ("http://169.254.169.254/x", "169.254.169.254|link-local"),
    ],
)
def test_where_a_hub_may_not_lead(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, there: str, words: str
) -> None:
    monkeypatch.setattr(hub.web, "TIMEOUT", 0.5)
    server = Hub(model(tmp_path / "model"))
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    try:
        for name in server.models:
            server.moved[f"/owner/repo/resolve/{COMMIT}/{name}"] = there
        with pytest.raises(CheckpointError, match=words):
            streamconv.open("hf://owner/repo")
        with pytest.raises(UsageError, match="no such model"):
            streamconv.open("hf://owner/other")
        with pytest.raises(UsageError, match="no name on a hub"):
            streamconv.open("hf://owner")
        server.models["../../etc/passwd"] = b""
        hub._tree.cache_clear()
        with pytest.raises(CheckpointError, match="no path can name"):
            streamconv.open("hf://owner/repo")
    finally:
        server.close()


def test_what_was_copied_to_a_store_is_verified_there(store: Store, tmp_path: Path) -> None:
    source = model(tmp_path / "model")
    streamconv.convert(source, tmp_path / "out", dtype="BF16", checksum=True, workers=1)
    place = store.upload(tmp_path / "out", "copied/out")
    there = store.upload(source, "copied/model")
    assert main(["verify", place]) == 0
    assert main(["verify", there, place, "--dtype", "BF16"]) == 0
    assert main(["diff", str(tmp_path / "out"), place]) == 0
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    data = shard.read_bytes()
    store.put(f"copied/out/{shard.name}", data[:-1] + bytes([data[-1] ^ 1]))
    assert main(["verify", place]) == 1
    assert main(["verify", there, place, "--dtype", "BF16"]) == 1


@pytest.mark.parametrize("fault", ["500", "503", "truncated"])
def test_what_passes_at_a_hub_is_tried_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    source = model(tmp_path / "model")
    streamconv.convert(source, tmp_path / "here", workers=1)
    server = Hub(source)
    server.fault = lambda _, number: fault if number % 4 == 0 and fault[0] == "5" else None
    server.store.fault = lambda _, number: fault if number % 3 == 0 else None
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    try:
        streamconv.convert("hf://owner/repo", tmp_path / "there", workers=1)
    finally:
        server.close()
    assert files(tmp_path / "here") == files(tmp_path / "there")


def test_nothing_of_a_store_is_deleted(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = store.upload(model(tmp_path / "model"), "kept/model")
    assert main([place, str(tmp_path / "out"), "--delete-source", "--yes"]) == 2
    assert "nothing can be deleted in its storage" in capsys.readouterr().err
    assert all(each.method in ("GET", "HEAD") for each in store.proxy.requests)
