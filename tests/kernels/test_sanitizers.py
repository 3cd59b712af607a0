"""The C kernels read and write inside their buffers only, without undefined behaviour, and are right on odd shapes."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from chatglm.kernels import cpu

DRIVER = Path(__file__).parent / "sanitize_driver.c"


def build(folder, *flags):
    """The driver with the kernels in one program; skips without a compiler that can do the flags."""
    compilers = cpu.find_compilers()
    if not compilers:
        pytest.skip("no C compiler")
    program = folder / "driver"
    sources = [cpu.FOLDER / name for name in cpu.SOURCES if name.endswith(".c")]
    command = [*next(iter(compilers)), "-std=gnu11", "-O1", "-g", "-w", f"-I{cpu.FOLDER}", *flags]
    empty = folder / "empty.c"
    empty.write_text("int main(void) { return 0; }\n")
    if subprocess.run([*command, empty, "-o", program], capture_output=True).returncode:
        pytest.skip(f"the C compiler cannot do {' '.join(flags)}")
    subprocess.run([*command, *sources, DRIVER, "-o", program, "-lm"], check=True)
    return program


def run(command, **environment):
    """The variants that ran; the test fails with the output of a run that failed."""
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.split()


@pytest.mark.slow
def test_every_form_is_clean_under_address_and_undefined_behaviour_sanitizers(tmp_path):
    program = build(tmp_path, "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fopenmp")
    # Threads that wait asleep: otherwise they take the processor from those that work.
    variants = run([program, "plain", "avx2", "avx512_vnni_float", "avx512_vnni"], OMP_WAIT_POLICY="passive")
    assert variants[0] == "plain"  # the others as far as this processor has them


@pytest.mark.slow
def test_forms_that_valgrind_can_run_are_clean_under_it(tmp_path):
    if not shutil.which("valgrind"):
        pytest.skip("no valgrind")
    program = build(tmp_path)
    # Valgrind does not know AVX-512, and takes OpenMP's threads for a leak.
    command = ["valgrind", "--quiet", "--error-exitcode=9", "--leak-check=full", program, "plain", "avx2"]
    assert "plain" in run(command)
