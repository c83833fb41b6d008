"""The cache finds packages by content and ignores damaged ones."""

import contextlib
import sys
import threading

import filelock
import pytest
import reference
import torch
from energies import Soft

import torchcall
from torchcall._compile import _cache
from torchcall._compile._build import lock_of
from torchcall._compile._folder import cache_folder


def compiled(module, path, example, **options):
    return torchcall.mliap.compile(
        module, path, example=example, cutoff=options.pop("cutoff", reference.CUTOFF), **options
    )


def entries(tmp_path):
    return sorted((tmp_path / "cache").glob("*"))


def test_the_second_package_of_a_module_comes_from_the_cache(uncompiled, tmp_path, example):
    for name in ("a.pt2", "b.pt2"):
        compiled(Soft(), tmp_path / name, example, dynamic=False)
    assert len(uncompiled) == 1
    assert (tmp_path / "a.pt2").read_bytes() == (tmp_path / "b.pt2").read_bytes()
    compiled(Soft(), tmp_path / "c.pt2", example, dynamic=False, cache=False)
    assert len(uncompiled) == 2
    assert len(entries(tmp_path)) == 1


def other_weights(module):
    with torch.no_grad():
        module.weight.add_(1e-12)


CHANGES = [
    pytest.param(other_weights, {}, id="weights"),
    pytest.param(lambda m: m.register_buffer("species", torch.tensor([14])), {}, id="species"),
    pytest.param(lambda _: None, {"cutoff": 4.3}, id="the cutoff"),
    pytest.param(lambda _: None, {"dtype": "float32"}, id="the dtype"),
    pytest.param(lambda _: None, {"dynamic": True}, id="shapes"),
    pytest.param(lambda _: None, {"parallel": True}, id="parallel loops"),
]


@pytest.mark.parametrize("change, options", CHANGES)
def test_what_changes_the_package_changes_the_key(change, options, uncompiled, tmp_path, example):
    module = Soft()
    compiled(module, tmp_path / "m.pt2", example, dynamic=False)
    change(module)
    compiled(module, tmp_path / "m.pt2", example, **({"dynamic": False} | options))
    assert len(uncompiled) == 2


def test_the_number_of_threads_does_not_change_the_key(uncompiled, tmp_path, example):
    for threads in (1, 2):
        torch.set_num_threads(threads)  # a fixture restores it
        compiled(Soft(), tmp_path / "m.pt2", example, dynamic=False)
    assert len(uncompiled) == 1


def test_other_code_is_another_package(uncompiled, tmp_path, example):
    compiled(Soft(), tmp_path / "m.pt2", example, dynamic=False)
    changed = type("Soft", (Soft,), {"forward": lambda self, i: Soft.forward(self, i) * 2})
    compiled(changed(), tmp_path / "m.pt2", example, dynamic=False)
    assert len(uncompiled) == 2


def test_another_torch_or_processor_is_another_key(monkeypatch):
    metadata = {"device": "cpu", "torch": "2.13.0"}
    key = _cache.key_of(metadata, {})
    assert _cache.key_of(metadata, {}) == key
    assert _cache.key_of(metadata | {"torch": "2.13.1"}, {}) != key
    assert _cache.key_of(metadata, {"a": 1}) != key
    monkeypatch.setattr(_cache, "pick_vec_isa", lambda: "NEON")
    assert _cache.key_of(metadata, {}) != key


@pytest.mark.parametrize("damage", [b"", b"x", b"\0" * 5000], ids=["emptied", "cut", "overwritten"])
def test_a_damaged_entry_is_compiled_again(damage, uncompiled, tmp_path, example):
    compiled(Soft(), tmp_path / "m.pt2", example, dynamic=False)
    (entry,) = entries(tmp_path)
    whole = entry.read_bytes()
    entry.write_bytes(damage)
    compiled(Soft(), tmp_path / "m.pt2", example, dynamic=False)
    assert len(uncompiled) == 2
    assert (tmp_path / "m.pt2").read_bytes() == whole
    assert [e.read_bytes() for e in entries(tmp_path)] == [whole]


@pytest.mark.parametrize("blocked", [True, False], ids=["waiting", "just too late"])
def test_another_process_s_package_is_taken(blocked, uncompiled, tmp_path, example, monkeypatch):
    import torchcall._compile._run as run

    compiled(Soft(), tmp_path / "a.pt2", example, dynamic=False)
    (entry,) = entries(tmp_path)
    whole = entry.read_bytes()
    entry.unlink()

    class OthersLock:
        def acquire(self, *, blocking=True):
            if blocked and not blocking:
                raise filelock.Timeout("lock")
            entry.write_bytes(whole)  # the other process is done
            return contextlib.nullcontext()

    monkeypatch.setattr(run, "lock_of", lambda _: OthersLock())
    compiled(Soft(), tmp_path / "b.pt2", example, dynamic=False)
    assert len(uncompiled) == 1
    assert (tmp_path / "b.pt2").read_bytes() == whole


@pytest.mark.usefixtures("uncompiled")
def test_one_process_at_a_time_builds_a_model(tmp_path, example, monkeypatch):
    import torchcall._compile._run as run

    own, contents = run.build, []

    def build(name, program, path, metadata, configs, derivative):
        contents.append(metadata["content"])
        with pytest.raises(filelock.Timeout):
            lock_of(contents[0]).acquire(blocking=False)
        own(name, program, path, metadata, configs, derivative)

    monkeypatch.setattr(run, "build", build)
    compiled(Soft(), tmp_path / "m.pt2", example, dynamic=False)
    with lock_of(*contents).acquire(blocking=False):  # free again
        pass


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    cache, out = cache_folder(), tmp_path / "out"
    for folder in (cache, out):
        folder.mkdir()
    left = [cache / f".{name}-0123456789abcdef.pt2" for name in ("new", "k" * 40)]
    others = [cache / "kept-0123456789abcdef.pt2", out / ".n-0123456789abcdef.pt2"]
    for file in (*left, *others, out / ".m-0123456789abcdef.pt2"):
        file.touch()
    with _cache.temporary_beside(cache / "new.pt2") as first:
        assert not any(file.exists() for file in left)
        first.write_bytes(b"in use")
        with _cache.temporary_beside(cache / "new.pt2") as second:
            assert first.read_bytes() == b"in use"
            assert first != second
    with _cache.temporary_beside(out / "m.pt2") as third:
        assert sorted(out.iterdir()) == sorted([third, others[1]])
    assert sorted([*cache.iterdir(), *out.iterdir()]) == sorted(others)


def test_an_entry_that_does_not_load_is_compiled_again(uncompiled, tmp_path, example, monkeypatch):
    import torchcall._compile._run as run

    compiled(Soft(), tmp_path / "m.pt2", example, dynamic=False)
    load, calls = run.aoti_load_package, []

    def failing_once(path):
        calls.append(path)
        if len(calls) == 1:
            raise RuntimeError("not for this machine")
        return load(path)

    monkeypatch.setattr(run, "aoti_load_package", failing_once)
    compiled(Soft(), tmp_path / "m.pt2", example, dynamic=False)
    assert len(uncompiled) == 2


@pytest.mark.parametrize("kind", ["a file", "under a file"])
def test_compilation_works_without_a_writable_cache(
    kind, uncompiled, tmp_path, example, monkeypatch
):
    (tmp_path / "file").touch()
    place = tmp_path / "file" if kind == "a file" else tmp_path / "file" / "cache"
    monkeypatch.setenv("TORCHCALL_CACHE", str(place))
    for _ in range(2):
        assert compiled(Soft(), tmp_path / "m.pt2", example, dynamic=False).exists()
    assert len(uncompiled) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="the folders are Linux's")
@pytest.mark.parametrize("variable, folder", [("HOME", ".cache"), ("XDG_CACHE_HOME", "")])
def test_the_cache_is_in_the_users_cache_folder_by_default(variable, folder, monkeypatch, tmp_path):
    for name in ("TORCHCALL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    assert cache_folder() == tmp_path / folder / "torchcall" / "packages"


def test_concurrent_readers_see_complete_entries(tmp_path):
    sources = [tmp_path / f"{k}.pt2" for k in range(3)]
    for k, source in enumerate(sources):
        source.write_bytes(bytes([k]) * 500_000)

    def write(source):
        for _ in range(10):
            _cache.store("k" * 64, source)

    writers = [threading.Thread(target=write, args=(source,)) for source in sources]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers) or not seen:
        if _cache.find("k" * 64, tmp_path / "copy"):
            data = (tmp_path / "copy").read_bytes()
            assert len(data) == 500_000
            assert len(set(data)) == 1
            seen.add(data[0])
    assert len(entries(tmp_path)) == 3
