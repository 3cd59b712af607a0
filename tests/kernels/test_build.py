"""Finding a compiler, compiling once, keeping the library, choosing a backend, and checks at the border of C.

Most tests compile a stand-in of a few lines instead of the kernels, or use a script that acts like a broken compiler.
"""

import os
import shlex
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest
import torch

from chatglm import kernels
from chatglm.kernels import __main__, cpu, torch_packed
from chatglm.quantization import dequantize_weight

ROOT = Path(__file__).parents[2]
COMPILERS = cpu.find_compilers()
COMPILER = shlex.join(next(iter(COMPILERS))) if COMPILERS else ""
needs_compiler = pytest.mark.skipif(not COMPILERS, reason="no C compiler")
needs_shell = pytest.mark.skipif(os.name == "nt", reason="the stand-in compilers are shell scripts")

STAND_IN = """
#include <stdint.h>
const char *kernels_variant(void) { return "plain"; }
int kernels_set_variant(const char *name) { return name[0] != 'p'; }
int kernels_openmp(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}
void weight_pack(void) {}
void weight_unpack(void) {}
int linear(void) { return -1; }
void embedding(void) {}
void linear_back(void) {}
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Sources that compile at once, and an empty cache folder, which is returned."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "kernels.h").write_text("")
    (sources / "linear.c").write_text(STAND_IN)
    (sources / "attention.c").write_text("void attention_decode(void) {}\n")
    (sources / "layer.c").write_text(
        "void layer_start(void) {}\nvoid layer_finish(void) {}\nvoid layer_step(void) {}\n"
    )
    monkeypatch.setattr(cpu, "FOLDER", sources)
    monkeypatch.setenv("CHATGLM_KERNELS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Make a shell script the only C compiler."""

    def use(script):
        path = tmp_path / "fakecc"
        path.write_text(f"#!/bin/sh\n[ \"$1\" = --version ] && echo 'fakecc 1.0' && exit\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("CC", str(path))
        return path

    return use


# Compilers ------------------------------------------------------------------------------------------------------------


def test_without_a_compiler_the_message_says_what_to_install(stand_in, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(cpu.BuildError) as error:
        cpu.load()
    assert str(error.value) == "there is no C compiler: install gcc or clang, or name one in CC"


def test_compiler_named_in_cc_is_the_only_one(stand_in, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    with pytest.raises(cpu.BuildError) as error:
        cpu.load()
    assert str(error.value) == "the C compiler that CC names does not work: no-such-compiler -m64"


@pytest.mark.parametrize(
    ("platform", "command", "words"),
    [
        ("linux", "'/opt/my tools/gcc' -m64", ("/opt/my tools/gcc", "-m64")),
        ("win32", '"C:\\my tools\\gcc.exe" -m64', ("C:\\my tools\\gcc.exe", "-m64")),
        ("linux", 'gcc "', ()),
    ],
)
def test_cc_may_have_options_and_spaces_in_quotation_marks(monkeypatch, platform, command, words):
    monkeypatch.setattr(cpu.sys, "platform", platform)
    assert cpu._words(command) == words


@needs_shell
def test_message_has_the_line_of_the_compiler_that_names_the_error(stand_in, compiler):
    path = compiler("echo note: x >&2; echo linear.c:3:1: error: no such thing >&2; echo 1 error generated >&2; exit 1")
    with pytest.raises(cpu.BuildError) as error:
        cpu.load()
    assert str(error.value) == f"{path} failed: linear.c:3:1: error: no such thing"
    assert not stand_in.exists()


@needs_shell
def test_compiler_that_fails_without_a_word_is_reported_with_its_exit_code(stand_in, compiler):
    path = compiler("exit 7")
    with pytest.raises(cpu.BuildError, match=f"^{path} failed: exit code 7$"):
        cpu.load()


@needs_shell
def test_compiler_that_makes_no_library_is_reported(stand_in, compiler):
    path = compiler('for word; do [ "$last" = -o ] && echo rubbish > "$word"; last=$word; done')
    with pytest.raises(cpu.BuildError, match=f"^the library that {path} made does not load: "):
        cpu.load()


@needs_shell
def test_compiler_that_makes_nothing_is_reported(stand_in, compiler):
    path = compiler("exit 0")
    with pytest.raises(cpu.BuildError, match=f"^{path} made no library$"):
        cpu.load()


@needs_shell
def test_slow_compiler_is_ended_with_all_that_it_started(stand_in, compiler, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "COMPILE_SECONDS", 0.5)
    child = tmp_path / "child"
    path = compiler(f'case "$*" in *-fopenmp*) exit 1;; esac\nsleep 60 & echo $! > {child}; wait')
    started = time.monotonic()
    with pytest.raises(cpu.BuildError, match=f"^{path} was not ready after 0.5 s$"):
        cpu.load()
    assert time.monotonic() - started < 10
    with pytest.raises(ProcessLookupError):
        for _ in range(50):  # until the system has noticed its end
            os.kill(int(child.read_text()), 0)
            time.sleep(0.1)


@needs_shell
@needs_compiler
def test_compiler_without_openmp_builds_the_single_threaded_form_and_says_how_to_get_the_other(stand_in, compiler):
    compiler(
        f'case "$*" in *-fopenmp*) echo "error: unsupported option \'-fopenmp\'" >&2; exit 1;; esac\n{COMPILER} "$@"'
    )
    loaded = cpu.load()
    assert loaded.name == "C kernels, plain C, one thread"
    assert loaded.reason == f"compiled by fakecc 1.0, one thread only as it has no OpenMP: {cpu.OPENMP_ADVICE}"
    again = cpu.load()
    assert again.path == loaded.path
    assert again.reason == loaded.reason.replace("compiled by", "compiled earlier by")


@needs_shell
@needs_compiler
def test_openmp_whose_library_is_missing_at_run_time_falls_back_to_one_thread(stand_in, compiler):
    # As with MinGW whose libgomp is not on the PATH: compiling works, loading does not.
    rubbish = 'for word; do [ "$last" = -o ] && echo rubbish > "$word"; last=$word; done; exit'
    path = compiler(f'case "$*" in *-fopenmp*) {rubbish};; esac\n{COMPILER} "$@"')
    loaded = cpu.load()
    assert loaded.name == "C kernels, plain C, one thread"
    assert f", one thread only: the library that {path} made does not load: " in loaded.reason


def test_one_compiler_under_two_names_is_one(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(cpu.shutil, "which", lambda name: f"/bin/{name}")
    versions = {"gcc": "gcc (Debian) 12", "cc": "cc (Debian) 12", "clang": "clang version 14"}
    monkeypatch.setattr(cpu, "_is_apple_placeholder", lambda program: False)
    monkeypatch.setattr(cpu, "_run", lambda command, folder, seconds: versions[command[0]])
    assert list(cpu.find_compilers()) == [("gcc",), ("clang",)]


def test_openmp_on_a_mac_uses_the_library_inside_torch(monkeypatch):
    monkeypatch.setattr(cpu.sys, "platform", "darwin")
    flags = cpu._openmp_flags()
    assert flags[:2] == ["-Xpreprocessor", "-fopenmp"]
    assert str(Path(torch.__file__).parent / "lib" / "libomp.dylib") in flags


# The cache folder -----------------------------------------------------------------------------------------------------


@needs_compiler
def test_second_start_takes_the_library_of_the_first(stand_in):
    first = cpu.load()
    assert first.path.parent == stand_in and first.reason.startswith("compiled by ")
    stamp = first.path.stat().st_mtime_ns
    second = cpu.load()
    assert second.path == first.path and second.reason.startswith("compiled earlier by ")
    assert [path.name for path in stand_in.iterdir()] == [first.path.name]
    assert first.path.stat().st_mtime_ns == stamp


@needs_compiler
@pytest.mark.parametrize("damage", [b"", b"rubbish", "half"])
def test_damaged_library_is_made_again(stand_in, damage):
    path = cpu.load().path
    whole = path.read_bytes()
    path.unlink()  # loaded by this process: writing into it would be unwise
    path.write_bytes(whole[: len(whole) // 2] if damage == "half" else damage)
    repaired = cpu.load()
    assert repaired.reason.startswith("compiled by ") and repaired.path.parent == stand_in
    assert cpu.load().reason.startswith("compiled earlier by ")


@needs_compiler
def test_whole_library_that_does_not_load_is_made_again(stand_in):
    path = cpu.load().path
    path.unlink()
    prefix = path.stem.rpartition("-")[0]
    path.with_name(f"{prefix}-{cpu._digest(b'rubbish')}{path.suffix}").write_bytes(b"rubbish")
    assert cpu.load().reason.startswith("compiled by ")
    assert cpu.load().reason.startswith("compiled earlier by ")


@needs_shell
@needs_compiler
def test_changed_source_or_compiler_makes_a_library_of_its_own(stand_in, compiler, monkeypatch):
    first = cpu.load().path
    with (cpu.FOLDER / "kernels.h").open("a") as file:
        file.write("/* changed */\n")
    second = cpu.load().path
    compiler(f'{COMPILER} "$@"')
    third = cpu.load().path
    assert len({first, second, third}) == 3
    assert len({path.name.split("-")[1] for path in (first, second, third)}) == 2  # the sources
    assert len({path.name.split("-")[2] for path in (first, second, third)}) == 2  # the compiler


@needs_compiler
def test_library_made_earlier_needs_no_compiler(stand_in, monkeypatch):
    path = cpu.load().path
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    loaded = cpu.load()
    assert loaded.path == path and loaded.reason == "compiled earlier"


@needs_compiler
@pytest.mark.parametrize("trouble", ["not a folder", "full", "no home"])
def test_cache_folder_that_keeps_nothing_costs_a_compilation_at_each_start(stand_in, monkeypatch, trouble):
    if trouble == "not a folder":
        stand_in.write_text("a file")
    elif trouble == "full":

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(cpu.os, "replace", full)
    else:

        def no_home():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("CHATGLM_KERNELS_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(cpu.Path, "home", no_home)
    loaded = cpu.load()
    place = "there is no safe folder to keep them" if trouble == "no home" else f"{stand_in} cannot keep them"
    assert loaded.variant == "plain" and loaded.path is None
    assert loaded.reason.endswith(
        f", again at each start as {place}: set CHATGLM_KERNELS_CACHE to a folder of your own that can"
    )
    assert trouble != "full" or list(stand_in.iterdir()) == []  # no half file is left


@pytest.mark.skipif(os.name == "nt", reason="permissions are those of POSIX")
@needs_compiler
@pytest.mark.parametrize("trouble", ["others may write", "another user's"])
def test_nothing_is_loaded_from_a_folder_that_others_may_write_to(stand_in, monkeypatch, caplog, trouble):
    cpu.load()
    (planted,) = stand_in.iterdir()
    if trouble == "others may write":
        stand_in.chmod(0o777)
    elif os.getuid() == 0:
        os.chown(stand_in, 1, 1)
    else:
        monkeypatch.setattr(cpu.os, "getuid", lambda: stand_in.stat().st_uid + 1)
    loaded = cpu.load()
    assert loaded.path is None
    assert ", again at each start as there is no safe folder to keep them: " in loaded.reason
    assert list(stand_in.iterdir()) == [planted]
    warning = f"no compiled kernels are taken from {stand_in}: it is another user's, or others may write to it"
    assert caplog.messages == [warning]


@needs_compiler
@pytest.mark.slow
def test_processes_that_start_at_once_share_one_good_library(stand_in):
    program = f"""
import runpy
from pathlib import Path
cpu = runpy.run_path({cpu.__file__!r})  # without the package, whose import takes seconds
cpu["load"].__globals__["FOLDER"] = Path({str(cpu.FOLDER)!r})
input()  # until all have started
kernels = cpu["load"]()
assert kernels.variant == "plain"
print(kernels.path)
"""
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(command, env=environment, text=True, **pipes) for _ in range(4)]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, outputs
    paths = {Path(output.strip()) for output, _ in outputs}
    assert paths <= set(stand_in.iterdir())
    assert not list(stand_in.glob("*.tmp"))
    assert cpu.load().path in paths


@pytest.mark.parametrize(
    ("platform", "variables", "folder"),
    [
        ("linux", {"XDG_CACHE_HOME": "/xdg"}, "/xdg/chatglm"),
        ("linux", {}, "/home/me/.cache/chatglm"),
        ("darwin", {"XDG_CACHE_HOME": "/xdg"}, "/home/me/Library/Caches/chatglm"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/chatglm"),
        ("win32", {}, "/home/me/AppData/Local/chatglm"),
        ("linux", {"XDG_CACHE_HOME": "/xdg", "CHATGLM_KERNELS_CACHE": "/chosen"}, "/chosen"),
    ],
)
def test_cache_folder_is_where_the_platform_keeps_caches(monkeypatch, platform, variables, folder):
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA", "CHATGLM_KERNELS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cpu.sys, "platform", platform)
    monkeypatch.setattr(cpu.Path, "home", lambda: Path("/home/me"))
    assert cpu.cache_folder() == Path(folder)


# The command ----------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.slow
def test_import_does_nothing_and_the_command_compiles_and_says_where(stand_in):
    program = f"""
import runpy
from pathlib import Path
import chatglm.kernels.cpu, chatglm.kernels.torch_packed
print(chatglm.kernels._chosen, Path({str(stand_in)!r}).exists())
chatglm.kernels.cpu.FOLDER = Path({str(cpu.FOLDER)!r})
runpy.run_module("chatglm.kernels", run_name="__main__", alter_sys=True)  # python -m chatglm.kernels
"""
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", program]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stderr) == (0, "")
    (library,) = stand_in.iterdir()
    before, after = result.stdout.splitlines()
    assert before == "None False"
    assert after.startswith("C kernels, plain C") and f"   {library}   (compiled by " in after


def test_command_without_a_compiler_fails_with_the_reason(stand_in, monkeypatch, capsys):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert __main__.main([]) == 1
    assert capsys.readouterr() == ("", "no C kernels: the C compiler that CC names does not work: no-such-compiler\n")


@needs_compiler
def test_command_whose_library_is_not_kept_fails(stand_in, capsys):
    stand_in.write_text("a file")
    assert __main__.main([]) == 1
    assert "   not kept   (compiled by " in capsys.readouterr().out


# The choice -----------------------------------------------------------------------------------------------------------


def test_c_is_chosen_where_it_compiles_else_torch_else_nothing(monkeypatch):
    monkeypatch.setattr(torch_packed, "problem", lambda: None)
    library = type("Library", (), {"reason": "compiled"})()
    monkeypatch.setattr(cpu, "load", lambda: library)
    assert kernels.choose("auto") == (library, "compiled")
    assert kernels.choose("c") == (library, "compiled")

    def fail():
        raise cpu.BuildError("there is no C compiler")

    monkeypatch.setattr(cpu, "load", fail)
    backend, reason = kernels.choose("auto")
    assert isinstance(backend, torch_packed.TorchPacked)
    assert backend.reason == reason == "no C kernels: there is no C compiler"

    monkeypatch.setattr(torch_packed, "problem", lambda: "torch is strange")
    assert kernels.choose("auto") == (None, "no C kernels: there is no C compiler; torch is strange")


def test_environment_variable_forces_a_choice(monkeypatch):
    def unexpected():
        raise AssertionError("nothing should be compiled")

    monkeypatch.setattr(cpu, "load", unexpected)
    assert kernels.choose("none") == (None, "CHATGLM_KERNELS=none")
    monkeypatch.setattr(torch_packed, "problem", lambda: None)
    assert kernels.choose("torch")[0].reason == "CHATGLM_KERNELS=torch"


def test_choice_that_cannot_be_had_or_does_not_exist_is_an_error(stand_in, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(ValueError, match=r"^CHATGLM_KERNELS=c is not possible here: the C compiler that CC names"):
        kernels.choose("c")
    monkeypatch.setattr(torch_packed, "problem", lambda: "torch is strange")
    with pytest.raises(ValueError, match=r"^CHATGLM_KERNELS=torch is not possible here: torch is strange$"):
        kernels.choose("torch")
    with pytest.raises(ValueError, match=r"^CHATGLM_KERNELS must be auto, c, torch or none, got C$"):
        kernels.choose("C")


def test_choice_is_made_once_also_when_threads_ask_at_the_same_time(monkeypatch):
    calls = []

    def choose(setting):
        calls.append(setting)
        time.sleep(0.1)
        return None, "for a test"

    monkeypatch.setattr(kernels, "choose", choose)
    monkeypatch.setattr(kernels, "_chosen", None)
    monkeypatch.setenv("CHATGLM_KERNELS", "none")
    threads = [threading.Thread(target=kernels.cpu_backend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == ["none"]
    assert kernels.cpu_backend() is None and kernels.cpu_reason() == "for a test"


def test_wheel_carries_the_sources():
    package_data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["chatglm"]
    carried = {path.name for pattern in package_data for path in (ROOT / "chatglm").glob(pattern)}
    assert set(cpu.SOURCES) <= carried


# The border to C ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded():
    if not COMPILERS:
        pytest.skip("no C compiler")
    return cpu.load()


@pytest.fixture
def layer(loaded):
    """weight in the order of the kernels, scale, bias and the matrix they stand for, [20, 34] in 4 bits."""
    torch.manual_seed(0)
    weight, scale, bias = torch.randint(-128, 128, (20, 17), dtype=torch.int8), torch.rand(20), torch.randn(20)
    return loaded.pack(weight, 4), scale, bias, dequantize_weight(weight, scale, 4, torch.float32)


def test_any_input_layout_and_dtype_gives_the_same_product(loaded, layer):
    weight, scale, bias, matrix = layer
    x = torch.randn(34, 6).T  # not contiguous
    y = loaded.linear(x, weight, scale, bias, 4, "bf16")
    assert ((y - (x @ matrix.T + bias)).abs() <= x.abs() @ matrix.T.abs() / 256 + 1e-4).all()  # x rounds to bfloat16
    assert torch.equal(loaded.linear(x.contiguous().view(2, 3, 34), weight, scale, bias, 4, "bf16"), y.view(2, 3, 20))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        narrow, narrow_bias = x.to(dtype), bias.to(dtype)
        expected = loaded.linear(narrow.float(), weight, scale, narrow_bias.float(), 4)
        assert torch.equal(loaded.linear(narrow, weight, scale, narrow_bias, 4), expected.to(dtype))
    assert loaded.linear(x[:0], weight, scale, bias, 4).shape == (0, 20)


def test_results_do_not_depend_on_the_defaults_of_torch(loaded, layer):
    weight, scale, bias, matrix = layer
    x, ids = torch.randn(2, 34), torch.tensor([3, 0])
    query, key = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 5, 8)
    expected = loaded.linear(x, weight, scale, bias, 4), loaded.attention(query, key, key, 0.5)
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            results = loaded.linear(x, weight, scale, bias, 4), loaded.attention(query, key, key, 0.5)
            rows = loaded.embedding(ids, weight, scale, 4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(results[0], expected[0]) and torch.equal(results[1], expected[1])
    assert torch.equal(rows, matrix[ids])


def test_wrong_tensors_are_refused_before_c_sees_them(loaded, layer):
    weight, scale, bias, _ = layer
    x = torch.randn(2, 34)
    wrong = {
        "x must be [..., 34] on the CPU, got [2, 33] on cpu": (x[:, :33], weight, scale, bias, 4, "int8"),
        "x must be [..., 34] on the CPU, got [2, 34] on meta": (x.to("meta"), weight, scale, bias, 4, "int8"),
        "activations must be int8, int16 or bf16, got int4": (x, weight, scale, bias, 4, "int4"),
        "bias must be [20] on the CPU, got [19] on cpu": (x, weight, scale, bias[:19], 4, "int8"),
        "bias must be [20] on the CPU, got [20] on meta": (x, weight, scale, bias.to("meta"), 4, "int8"),
        "scales must be floats [20] on the CPU, got torch.float32 [19] on cpu": (
            *(x, weight, scale[:19], bias, 4, "int8"),
        ),
        "scales must be floats [20] on the CPU, got torch.int64 [20] on cpu": (
            *(x, weight, scale.long(), bias, 4, "int8"),
        ),
        "scales must be floats [20] on the CPU, got torch.float32 [20] on meta": (
            *(x, weight, scale.to("meta"), bias, 4, "int8"),
        ),
        "weights must be contiguous": (torch.randn(2, 32), weight[:, :16], scale, bias, 4, "int8"),
        "weights must be int8 [out, bytes] on the CPU with 4 or 8 bits, got torch.int8 [20, 17] on cpu with 2 bits": (
            *(x, weight, scale, bias, 2, "int8"),
        ),
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError) as error:
            loaded.linear(*arguments)
        assert str(error.value) == message
    with pytest.raises(ValueError, match="weights must be int8"):
        loaded.pack(weight.float(), 4)


def test_ids_beyond_the_table_are_refused(loaded, layer):
    weight, scale, _, matrix = layer
    for ids in ([20], [-1, 3]):
        with pytest.raises(IndexError, match=r"^ids must be from 0 to 19, got "):
            loaded.embedding(torch.tensor(ids), weight, scale, 4)
    ids = torch.tensor([[0, 19], [7, 7]], dtype=torch.int32)
    assert torch.equal(loaded.embedding(ids, weight, scale, 4), matrix[ids])
    assert loaded.embedding(ids[:0], weight, scale, 4).shape == (0, 2, 34)


def test_wrong_attention_inputs_are_refused(loaded):
    query, key = torch.randn(2, 3, 1, 8), torch.randn(2, 3, 5, 8)
    wrong = {
        "query must be [batch, heads, 1, head_dim]": (query.expand(2, 3, 2, 8), key, key),
        "query must be [batch, heads, 1, head_dim], key": (query, key[:, :2], key),
        "at least one position": (query, key[:, :, :0], key[:, :, :0]),
        "query must be float32": (query.half(), key, key),
        "key and value both": (query, key, key.half()),
        "tensors must be on the CPU": (query, key.to("meta"), key),
    }
    for message, tensors in wrong.items():
        with pytest.raises(ValueError) as error:
            loaded.attention(*tensors, 0.5)
        assert message in str(error.value)
    with pytest.raises(
        ValueError, match=r"mask must be bool \[2, 1, 1, 5\] on the CPU, got torch.float32 \[2, 1, 1, 5\]"
    ):
        loaded.attention(query, key, key, 0.5, torch.ones(2, 1, 1, 5))


def test_attention_reads_tensors_where_they_are(loaded):
    query, cache = torch.randn(2, 3, 1, 8), torch.randn(5, 2, 3, 10, 8).half()
    key, value = cache[1, :, :, :6], cache[3, :, :, 2:8]
    mask = torch.rand(2, 1, 1, 6) < 0.7
    mask[..., 0] = True
    y = loaded.attention(query, key, value, 0.5, mask)
    scores = (query @ key.float().transpose(2, 3) * 0.5).masked_fill(~mask, -torch.inf)
    expected = (scores.softmax(-1) @ value.float()).transpose(1, 2)
    assert y.shape == expected.shape == (2, 1, 3, 8)
    assert torch.allclose(y, expected, atol=1e-6)
    columns = query.transpose(1, 3).contiguous().transpose(1, 3)  # last stride not 1
    assert torch.equal(loaded.attention(columns, key, value, 0.5, mask.flatten(1, 2)), y)


def test_form_that_does_not_exist_is_refused(loaded):
    before = loaded.variant
    with pytest.raises(ValueError, match="no sse9 kernels"):
        loaded.variant = "sse9"
    assert loaded.variant == before
