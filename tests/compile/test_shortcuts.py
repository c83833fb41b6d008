"""Shortcuts of a compilation: torch's own functions and settings come back afterwards."""

import gc

import pytest
import torch
from torch._dynamo import config as dynamo
from torch._inductor import codecache, cpu_vec_isa
from torch._inductor.exc import CppCompileError

from torchcall._compile._shortcuts import known_instructions, parallel_files, shortcuts


def _state():
    return (
        cpu_vec_isa.valid_vec_isa_list,
        codecache.CppBuilder,
        dynamo.fake_tensor_cache_enabled,
        gc.isenabled(),
    )


def test_everything_is_restored_also_after_an_error():
    before = _state()
    with shortcuts():
        assert all(a != b for a, b in zip(_state(), before, strict=True))
    assert _state() == before
    with pytest.raises(KeyError), shortcuts():
        raise KeyError
    assert _state() == before


@pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="needs AVX2")
def test_no_vector_instructions_are_tested_by_compiling(monkeypatch):
    def fail(*_):
        raise AssertionError("compiled a test")

    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", fail)
    with known_instructions():
        found = cpu_vec_isa.pick_vec_isa()
        assert found
        reported = cpu_vec_isa.x86_isa_checker()
    assert set(str(found).split()) <= set(reported)
    assert ("avx512" in str(found)) == ("avx512" in reported)


def _builder(tmp_path, name, code):
    from torch._inductor.cpp_builder import CppOptions

    source = tmp_path / f"{name}.cpp"
    source.write_text(code)
    options = CppOptions(compile_only=True)
    return codecache.CppBuilder(name, [str(source)], options, output_dir=str(tmp_path))


def test_files_are_complete_when_the_second_is(tmp_path):
    with parallel_files():
        first = _builder(tmp_path, "m.wrapper", "int one() { return 1; }")
        first.build()
        _builder(tmp_path, "m.kernel", "int two() { return 2; }").build()
        assert (tmp_path / "m.wrapper.o").stat().st_size > 0
        assert (tmp_path / "m.kernel.o").stat().st_size > 0


def test_an_error_in_the_first_file_is_raised_at_the_second(tmp_path):
    with parallel_files():
        _builder(tmp_path, "m.wrapper", "nonsense").build()
        with pytest.raises(CppCompileError, match="nonsense"):
            _builder(tmp_path, "m.kernel", "int two() { return 2; }").build()
