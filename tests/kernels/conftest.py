"""The C kernels, as they are and in every form that this processor has."""

import pytest

from chatglm.kernels import cpu

VARIANTS = ("plain", "avx2", "avx512_vnni_float", "avx512_vnni")


@pytest.fixture(scope="module")
def library():
    """The compiled kernels; skips without a compiler."""
    try:
        return cpu.load()
    except cpu.BuildError as error:
        pytest.skip(f"no C kernels here: {error}")


@pytest.fixture(params=VARIANTS)
def backend(request, library):
    """The same, set to one form after the other."""
    before = library.variant
    try:
        library.variant = request.param
    except ValueError:
        pytest.skip(f"this processor has no {request.param}")
    yield library
    library.variant = before
