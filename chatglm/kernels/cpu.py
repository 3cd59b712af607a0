"""The C kernels for CPUs: compiled once, kept in a cache folder, called through ctypes.

What is unusual:

* The C files are compiled on first use with the C compiler of the machine, in a few seconds. One library
  serves every processor of an architecture: the form for this one is chosen when it runs, not when it is compiled.
* The file name of a library holds hashes of the sources, of the compiler with its flags, and of the library itself: a
  changed source or compiler gives a new file, and one that was cut off or damaged is recognised before it is loaded.
* ctypes releases Python's lock during a call; a kernel uses as many threads as torch does. As with torch itself, a
  forked child of a process that has computed must call torch.set_num_threads(1) before it computes.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SOURCES = ("kernels.h", "linear.c", "attention.c", "layer.c")
FLAGS = ("-O3", "-std=gnu11", "-shared", *(() if sys.platform == "win32" else ("-fPIC",)))
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
COMPILE_SECONDS = 120  # three are usual
OPENMP_ADVICE = {
    "darwin": "brew install libomp",
    "win32": "gcc from MinGW-w64 with libgomp has it",
}.get(sys.platform, "install gcc, or for clang libomp-dev")
CACHE_ADVICE = "set CHATGLM_KERNELS_CACHE to a folder of your own that can"
OPENMP_PROBE = "#include <omp.h>\nint probe(void) {\n#pragma omp parallel\n{}\nreturn omp_get_max_threads();\n}\n"
VARIANTS = {"avx512_vnni": "AVX-512 VNNI", "avx2": "AVX2", "plain": "plain C"}
ACTIVATIONS = {"int8": 0, "bf16": 1, "int16": 2}
FLOAT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_p, _i, _n, _f = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float


class _Matrix(ctypes.Structure):
    """`Matrix` of kernels.h."""

    _fields_ = (
        ("tiles", _p), ("scale", _p), ("bias", _p), ("out_features", _n), ("in_features", _n),
        ("scale_type", _i), ("bits", _i), ("activations", _i),
    )  # fmt: skip


class _Norm(ctypes.Structure):
    """`Norm` of kernels.h."""

    _fields_ = (("weight", _p), ("bias", _p), ("epsilon", _f))


class _Layer(ctypes.Structure):
    """`Layer` of kernels.h."""

    _fields_ = (
        ("input_norm", _Norm), ("post_attention_norm", _Norm),
        ("query_key_value", _Matrix), ("dense", _Matrix), ("up", _Matrix), ("down", _Matrix),
        ("heads", _n), ("alpha", _f), ("scaling", _f),
    )  # fmt: skip


_layer_p = ctypes.POINTER(_Layer)
SIGNATURES = {
    "kernels_variant": (ctypes.c_char_p, ()),
    "kernels_set_variant": (_i, (ctypes.c_char_p,)),
    "kernels_openmp": (_i, ()),
    "weight_pack": (None, (_p, _p, _n, _n, _i, _i)),
    "weight_unpack": (None, (_p, _p, _n, _n, _i, _i)),
    "linear": (_i, (_p, _p, _p, _i, _p, _p, _n, _n, _n, _i, _i, _i)),
    "linear_back": (_i, (_p, _p, _p, _n, _n, _n, _i, _i)),
    "embedding": (None, (_p, _n, _p, _p, _i, _p, _n, _n, _i, _i)),
    "attention_decode": (None, (_p, _p, _p, _i, _p, _p, _n, _n, _n, _n, ctypes.POINTER(_n), _f, _i)),
    "layer_start": (_i, (_layer_p, _p, _p, _p, _n, _p, _p, _n, _i)),
    "layer_finish": (_i, (_layer_p, _p, _p, _p, _n, _i)),
    "layer_step": (_i, (_layer_p, _p, _p, _p, _n, _p, _p, _i, _p, ctypes.POINTER(_n), _p, _n, _n, _i)),
}
_Strides, _CacheStrides = _n * 8, _n * 6


class BuildError(OSError):
    """The C kernels cannot be had on this machine; the message is one clause that says why."""


# Compiling ------------------------------------------------------------------------------------------------------------


def load() -> "CpuKernels":
    """The kernels: from the cache folder, else compiled now, with OpenMP if a compiler has it. Raises BuildError."""
    folder = cache_folder()
    compilers = find_compilers()
    if not compilers:
        wanted = os.environ.get("CC")
        kernels = folder and _load_cached(folder, f"kernels-{_source_key()}-", "compiled earlier")
        if kernels:
            return kernels
        raise BuildError(
            f"the C compiler that CC names does not work: {wanted}"
            if wanted
            else "there is no C compiler: install gcc or clang, or name one in CC"
        )
    remark, problem = "", None
    for openmp in (True, False):
        for compiler, version in compilers.items():
            try:
                return _load_or_compile(folder, compiler, version, openmp, remark)
            except _NoOpenMPError as error:
                logger.debug("%s: no OpenMP: %s", compiler[0], error)
                remark = remark or f", one thread only as it has no OpenMP: {OPENMP_ADVICE}"
            except OSError as error:  # BuildError, or a full disk
                remark = remark or f", one thread only: {error}"
                problem = problem or error
    raise BuildError(str(problem)) from problem


class _NoOpenMPError(Exception):
    pass


def cache_folder() -> Path | None:
    """Where libraries are kept: CHATGLM_KERNELS_CACHE, else in the user's cache folder.

    None without a home, and, with a warning, where others may put a library that would then run as this user.
    """
    variable, fallback = {"win32": ("LOCALAPPDATA", "AppData/Local"), "darwin": ("", "Library/Caches")}.get(
        sys.platform, ("XDG_CACHE_HOME", ".cache")
    )
    try:
        if chosen := os.environ.get("CHATGLM_KERNELS_CACHE"):
            folder = Path(chosen).expanduser().absolute()
        else:
            folder = Path(os.environ.get(variable) or Path.home() / fallback) / "chatglm"
    except RuntimeError:  # a user without a home
        return None
    if not _is_private(folder):
        logger.warning("no compiled kernels are taken from %s: it is another user's, or others may write to it", folder)
        return None
    return folder


def _is_private(folder: Path) -> bool:
    try:
        state = folder.stat()
    except OSError:  # not there yet
        return True
    return os.name != "posix" or (state.st_uid in (0, os.getuid()) and not state.st_mode & stat.S_IWOTH)


def find_compilers() -> dict[tuple[str, ...], str]:
    """The C compilers that work, best first: command -> what it says about its version.

    CC, if set, is the only one. gcc comes first because its OpenMP shares torch's threads on Linux; with another one's,
    two sets of threads compete for the processor.
    """
    chosen = os.environ.get("CC")
    found = {}
    for name in [chosen] if chosen else ["gcc", "cc", "clang"]:
        command = _words(name)
        program = command and shutil.which(command[0])
        if not program or _is_apple_placeholder(program):
            continue
        try:
            with tempfile.TemporaryDirectory() as folder:
                version = _run((*command, "--version"), folder, 20)
        except BuildError as error:
            logger.debug("%s", error)
            continue
        # cc is gcc or clang under another name, which is the first word of what it says.
        if version.partition(" ")[2] not in [other.partition(" ")[2] for other in found.values()]:
            found[command] = version
    return found


def _words(command: str) -> tuple[str, ...]:
    """The words of a command line, also where a path in quotation marks holds spaces; none if a mark is left open."""
    try:
        if sys.platform != "win32":
            return tuple(shlex.split(command))
        return tuple(word.strip('"') for word in shlex.split(command, posix=False))  # backslashes stay
    except ValueError:
        return ()


def _is_apple_placeholder(program: str) -> bool:
    """Whether a compiler would only open a window that offers to install Apple's developer tools."""
    if sys.platform != "darwin" or not program.startswith("/usr/bin/"):
        return False
    return subprocess.run(["xcode-select", "-p"], capture_output=True).returncode != 0


def _openmp_flags() -> list[str]:
    if sys.platform != "darwin":
        return ["-fopenmp"]
    # Apple's clang has no OpenMP library. The one inside torch must serve: a second copy would end the process.
    library = Path(torch.__file__).parent / "lib" / "libomp.dylib"
    headers = [f"-I{root}/opt/libomp/include" for root in ("/opt/homebrew", "/usr/local")]
    return ["-Xpreprocessor", "-fopenmp", *headers, str(library), f"-Wl,-rpath,{library.parent}"]


def _source_key() -> str:
    sources = [(FOLDER / name).read_bytes() for name in SOURCES]
    return _digest(f"{sys.platform} {platform.machine()}".encode(), *sources)


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _load_or_compile(folder, compiler, version, openmp, remark) -> "CpuKernels":
    flags = [*FLAGS, *(_openmp_flags() if openmp else [])]
    prefix = f"kernels-{_source_key()}-{_digest(version.encode(), ' '.join(flags).encode())}-"
    title = version.splitlines()[0] if version else compiler[0]
    kernels = folder and _load_cached(folder, prefix, f"compiled earlier by {title}{remark}")
    if kernels:
        return kernels
    # Compiled elsewhere, so that the cache folder never holds half a library; after loading, the copy may go.
    with tempfile.TemporaryDirectory(prefix="chatglm-kernels-", ignore_cleanup_errors=True) as temporary:
        if openmp:
            try:
                probe = Path(temporary, "probe.c")
                probe.write_text(OPENMP_PROBE)
                _run((*compiler, str(probe), "-o", str(Path(temporary, "probe" + SUFFIX)), *flags), temporary, 60)
            except BuildError as error:
                raise _NoOpenMPError(str(error)) from error
        logger.info("compiling the CPU kernels with %s", title)
        library = Path(temporary, "kernels" + SUFFIX)
        sources = [str(FOLDER / name) for name in SOURCES if name.endswith(".c")]
        _run((*compiler, *sources, "-o", str(library), *flags, "-lm"), temporary, COMPILE_SECONDS)
        if not library.exists():
            raise BuildError(f"{compiler[0]} made no library")
        name = f"{prefix}{_digest(library.read_bytes())}{SUFFIX}"
        try:
            kept = _keep(library, folder, name)
            return CpuKernels(kept, f"compiled by {title}{remark}", kept)
        except OSError as error:  # not writable, full, or programs may not run from there
            logger.debug("cannot keep the compiled kernels in %s: %s", folder, error)
            place = f"{folder} cannot keep them" if folder else "there is no safe folder to keep them"
            remark += f", again at each start as {place}: {CACHE_ADVICE}"
        try:
            return CpuKernels(library, f"compiled by {title}{remark}", None)
        except OSError as error:
            raise BuildError(f"the library that {compiler[0]} made does not load: {_clause(str(error))}") from error


def _keep(library: Path, folder: Path | None, name: str) -> Path:
    """Copy a library into the cache folder; other processes see all of it or nothing. Raises OSError."""
    if folder is None:
        raise FileNotFoundError("no cache folder")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(library.read_bytes())
        os.chmod(temporary, 0o755)
        os.replace(temporary, folder / name)
    except OSError:
        os.unlink(temporary)
        raise
    return folder / name


def _load_cached(folder: Path, prefix: str, reason: str) -> "CpuKernels | None":
    for path in sorted(folder.glob(f"{prefix}*{SUFFIX}")):
        try:
            if path.stem.endswith("-" + _digest(path.read_bytes())):
                return CpuKernels(path, reason, path)
        except OSError as error:
            logger.debug("%s does not load: %s", path, error)
    return None


def _run(command, folder: str, seconds: float) -> str:
    """What a program prints. Raises BuildError if it fails or takes longer than seconds; it leaves nothing running."""
    log = Path(folder, "output.txt")
    with log.open("wb") as output:  # a file, not a pipe: what a killed compiler has started may hold a pipe open
        try:
            process = subprocess.Popen(
                command,
                env={**os.environ, "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise BuildError(f"{command[0]} does not start: {error}") from error
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise BuildError(f"{command[0]} was not ready after {seconds} s") from None
        finally:
            if process.poll() is None:
                if hasattr(os, "killpg"):
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
                process.wait()
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    if process.returncode:
        logger.debug("%s\n%s", shlex.join(command), text)
        raise BuildError(f"{command[0]} failed: {_clause(text) or f'exit code {process.returncode}'}")
    return text


def _clause(text: str) -> str:
    """The first line of a compiler's output that names an error, without folders, at most 200 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "")
    return line.replace(f"{FOLDER}{os.sep}", "")[:200]


# Calling --------------------------------------------------------------------------------------------------------------


class CpuKernels:
    """A loaded library. Tensors are on the CPU; results are new tensors without gradients.

    name     what it is: "C kernels, AVX-512 VNNI"
    reason   why it was taken, one clause
    path     the library in the cache folder, None if it could not be kept

    Weights in the methods below are int8 [out, in * bits // 8] with bits 4 or 8, in the order that `pack` gives them,
    and scales are [out], read as they are in float16 and float32. Wrong shapes, dtypes and devices raise ValueError.
    """

    def __init__(self, library: Path, reason: str, path: Path | None):
        """Load a library. Raises OSError if it does not load or is not ours."""
        # winmode 0: Windows then looks for the OpenMP library of the compiler on the PATH.
        self.library = ctypes.CDLL(str(library), winmode=0)
        try:
            for name, (result, arguments) in SIGNATURES.items():
                function = getattr(self.library, name)
                function.restype, function.argtypes = result, arguments
        except AttributeError as error:
            raise OSError(f"{library} is not a library of these kernels") from error
        self._linear, self._attention = self.library.linear, self.library.attention_decode
        self.reason, self.path = reason, path

    @property
    def name(self) -> str:
        return f"C kernels, {VARIANTS[self.variant]}" + ("" if self.library.kernels_openmp() else ", one thread")

    @property
    def variant(self) -> str:
        """The form of the kernels for this processor: "avx512_vnni", "avx2" or "plain"; tests may set a lower one."""
        return self.library.kernels_variant().decode()

    @variant.setter
    def variant(self, name: str) -> None:
        if self.library.kernels_set_variant(name.encode()):
            raise ValueError(f"this processor has no {name} kernels, or there is no such form")

    def supports(self, out_features: int, in_features: int, bits: int) -> bool:
        """Whether these kernels can multiply by such a matrix."""
        return bits == 8 or (bits == 4 and in_features % 2 == 0)

    def pack(self, weight: torch.Tensor, bits: int) -> torch.Tensor:
        """Published bytes int8 [out, in * bits // 8] in the order of the kernels, same shape."""
        return self._reorder(self.library.weight_pack, weight, bits)

    def unpack(self, packed: torch.Tensor, bits: int) -> torch.Tensor:
        """The published bytes again, exactly."""
        return self._reorder(self.library.weight_unpack, packed, bits)

    def _reorder(self, function, weight, bits):
        columns = _columns(weight, bits)
        result = torch.empty_like(weight, requires_grad=False)
        function(weight.data_ptr(), result.data_ptr(), weight.shape[0], columns, bits, torch.get_num_threads())
        return result

    def linear(
        self,
        x: torch.Tensor,
        packed: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        bits: int,
        activations: str = "int8",
    ) -> torch.Tensor:
        """x [..., in] times the dequantised matrix, plus bias [out]: [..., out] in the dtype of x, computed in float32.

        activations   "int8": x is rounded to 8 bits in groups of 128 columns; "int16": to 15; "bf16": to bfloat16
        """
        # A model calls this some hundred times per token: every torch operation here costs a microsecond each time.
        scale, bias = _operands(packed, scale, bias, bits, activations)
        columns = packed.shape[1] * 8 // bits
        out = packed.shape[0]
        shape = x.shape
        if not shape or shape[-1] != columns or not x.is_cpu:
            raise ValueError(f"x must be [..., {columns}] on the CPU, got {list(shape)} on {x.device}")
        values = _float32(x)
        y = values.new_empty(*shape[:-1], out)
        rows = y.numel() // out if out else 0
        failed = self._linear(
            values.data_ptr(),
            packed.data_ptr(),
            scale.data_ptr(),
            FLOAT_TYPES[scale.dtype],
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            rows,
            columns,
            out,
            bits,
            ACTIVATIONS[activations],
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"no memory to multiply {rows} rows of {columns} values")
        return y if x.dtype is torch.float32 else y.to(x.dtype)

    def linear_back(self, grad: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
        """grad [..., out] times the dequantised matrix, [..., in]: what `linear` gives back to its x.

        The result has the dtype of grad; grad times scale is rounded to bfloat16, sums are float32.
        """
        columns, out = _columns(packed, bits), packed.shape[0]
        if not grad.dim() or grad.shape[-1] != out or not grad.is_cpu:
            raise ValueError(f"grad must be [..., {out}] on the CPU, got {list(grad.shape)} on {grad.device}")
        values = (_float32(grad) * _scale(scale, out)).contiguous()
        y = values.new_empty(*grad.shape[:-1], columns)
        rows = y.numel() // columns if columns else 0
        if self.library.linear_back(
            values.data_ptr(),
            packed.data_ptr(),
            y.data_ptr(),
            rows,
            columns,
            out,
            bits,
            torch.get_num_threads(),
        ):
            raise MemoryError(f"no memory to multiply {rows} rows of {out} values")
        return y.to(grad.dtype)

    def layer(self, norms, matrices, num_heads: int, alpha: float, scaling: float) -> "CpuLayer":
        """One layer of the network, see CpuLayer.

        norms      input norm and the one behind the attention: weight and bias, float32 [hidden_size], and epsilon
        matrices   query_key_value, dense, and the two of the MLP: each what `linear` takes beside x
        alpha      factor of both residuals; scaling is that of the attention scores
        """
        return CpuLayer(self.library, norms, matrices, num_heads, alpha, scaling)

    def embedding(self, ids: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
        """Rows ids [...] (int64 or int32) of the dequantised matrix: float32 [..., in]. Raises IndexError beyond it."""
        columns = _columns(packed, bits)
        scale = _scale(scale, packed.shape[0])
        ids = ids.to("cpu", torch.int64).contiguous()
        y = torch.empty(*ids.shape, columns, dtype=torch.float32, device="cpu")
        if ids.numel():
            lowest, highest = (int(value) for value in torch.aminmax(ids))
            if lowest < 0 or highest >= packed.shape[0]:
                raise IndexError(f"ids must be from 0 to {packed.shape[0] - 1}, got {lowest} to {highest}")
            self.library.embedding(
                ids.data_ptr(),
                ids.numel(),
                packed.data_ptr(),
                scale.data_ptr(),
                FLOAT_TYPES[scale.dtype],
                y.data_ptr(),
                packed.shape[0],
                columns,
                bits,
                torch.get_num_threads(),
            )
        return y

    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """softmax(query . key * scaling) . value for one query per head: float32 [batch, 1, heads, head_dim].

        query        float32 [batch, heads, 1, head_dim]
        key, value   [batch, heads, kv_len, head_dim], float32, float16 or bfloat16, read where they are
        mask         bool [batch, 1, 1, kv_len] or [batch, 1, kv_len], True = visible; None = all
        """
        batch, heads, queries, dim = query.shape
        length = key.shape[2]
        if queries != 1 or key.shape != (batch, heads, length, dim) or value.shape != key.shape or not length:
            raise ValueError(
                f"query must be [batch, heads, 1, head_dim], key and value the same with at least one position, got "
                f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
            )
        if query.dtype is not torch.float32 or key.dtype not in FLOAT_TYPES or value.dtype is not key.dtype:
            raise ValueError(
                f"query must be float32, key and value both float32, float16 or bfloat16, got {query.dtype}, "
                f"{key.dtype} and {value.dtype}"
            )
        if not (query.is_cpu and key.is_cpu and value.is_cpu):
            raise ValueError(f"tensors must be on the CPU, got {query.device}, {key.device} and {value.device}")
        query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
        mask = _visible(mask, batch, length)
        q, k, v = query.stride(), key.stride(), value.stride()
        y = torch.empty(batch, 1, heads, dim, dtype=torch.float32, device="cpu")
        self._attention(
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            FLOAT_TYPES[key.dtype],
            None if mask is None else mask.data_ptr(),
            y.data_ptr(),
            batch,
            heads,
            length,
            dim,
            _Strides(q[0], q[1], k[0], k[1], k[2], v[0], v[1], v[2]),
            scaling,
            torch.get_num_threads(),
        )
        return y


class CpuLayer:
    """One layer of the network, computed by the kernels: whole for one token, around its attention for a prompt.

    It holds addresses, not the tensors: who uses it sees to it that they are still alive and the same.
    """

    def __init__(self, library, norms, matrices, num_heads: int, alpha: float, scaling: float):
        """Arguments as in `CpuKernels.layer`. Raises ValueError for tensors that do not fit each other."""
        query_key_value, dense, up, down = (_matrix(operands) for operands in matrices)
        width, inner = dense.out_features, up.out_features
        shapes = [(matrix.out_features, matrix.in_features) for matrix in (query_key_value, dense, up, down)]
        if shapes != [(3 * dense.in_features, width), (width, dense.in_features), (inner, width), (width, inner)] or (
            dense.in_features % num_heads
        ):
            raise ValueError(f"matrices of {num_heads} heads do not fit each other: {shapes}")
        norms = [_norm(norm, width) for norm in norms]
        self._layer = _Layer(*norms, query_key_value, dense, up, down, num_heads, alpha, scaling)
        self._library = library
        self._width, self._attended_width = width, dense.in_features
        self._heads, self._head_dim = num_heads, dense.in_features // num_heads

    def start(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The normalised x, and its queries, keys and values, of which the first two are rotated.

        x          float32 [batch, seq_len, hidden_size]
        cos, sin   float32 [batch, 1, seq_len, streams, head_dim // streams], see apply_rotary in the model

        Returns float32 [batch, seq_len, hidden_size] and [batch, seq_len, num_heads, 3, head_dim].
        """
        x, cos, sin, rows = self._inputs(x, cos, sin)
        normed, mixed = torch.empty_like(x), x.new_empty(*x.shape[:-1], self._heads, 3, self._head_dim)
        pointers = x.data_ptr(), cos.data_ptr(), sin.data_ptr(), cos.shape[-1], normed.data_ptr(), mixed.data_ptr()
        self._call(self._library.layer_start, *pointers, rows)
        return normed, mixed

    def finish(self, attended: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """The output of the layer, float32 [batch, seq_len, hidden_size].

        attended   float32 [batch, seq_len, num_heads * head_dim], what the attention gave
        normed     as `start` gave it; what is returned is written over it
        """
        rows = _rows(attended, self._attended_width)
        if _rows(normed, self._width) != rows or not normed.is_contiguous():
            raise ValueError(f"normed must be as start gave it, for {rows} rows, got {list(normed.shape)}")
        attended = attended.contiguous()
        self._call(self._library.layer_finish, attended.data_ptr(), normed.data_ptr(), normed.data_ptr(), rows)
        return normed

    def step(self, x, cos, sin, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The output of the layer for one new token of each sequence, float32 [batch, 1, hidden_size].

        x, cos, sin    as in `start`, seq_len 1
        keys, values   [batch, heads, kv_len, head_dim] as in `CpuKernels.attention`; the last position is written
        mask           as there
        """
        x, cos, sin, rows = self._inputs(x, cos, sin)
        shape = keys.shape
        expected = (rows, self._heads, shape[2] if keys.dim() == 4 else 1, self._head_dim)
        if x.shape[1] != 1 or shape != expected or values.shape != shape or not shape[2]:
            raise ValueError(
                f"keys and values must be [{rows}, {self._heads}, kv_len, {self._head_dim}] for states "
                f"{list(x.shape)} of one token, got {list(shape)} and {list(values.shape)}"
            )
        k, v = keys.stride(), values.stride()
        if keys.dtype not in FLOAT_TYPES or values.dtype is not keys.dtype or (k[3], v[3]) != (1, 1):
            raise ValueError(f"keys and values must have one float dtype, got {keys.dtype} and {values.dtype}")
        if not (keys.is_cpu and values.is_cpu):
            raise ValueError(f"keys and values must be on the CPU, got {keys.device} and {values.device}")
        mask = _visible(mask, rows, shape[2])
        y = torch.empty_like(x)
        self._call(
            self._library.layer_step,
            x.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            cos.shape[-1],
            keys.data_ptr(),
            values.data_ptr(),
            FLOAT_TYPES[keys.dtype],
            None if mask is None else mask.data_ptr(),
            _CacheStrides(k[0], k[1], k[2], v[0], v[1], v[2]),
            y.data_ptr(),
            rows,
            shape[2],
        )
        return y

    def _inputs(self, x, cos, sin):
        rows = _rows(x, self._width)
        shape = cos.shape
        fits = cos.dim() == 5 and (shape[0], shape[2], shape[3] * shape[4]) == (*x.shape[:2], self._head_dim)
        if not fits or shape[4] % 2:
            raise ValueError(
                f"cos and sin must be [{x.shape[0]}, 1, {x.shape[1]}, streams, part] with an even part and streams * "
                f"part = {self._head_dim}, got {list(shape)}"
            )
        if sin.shape != shape or shape[1] != 1 or not (cos.is_cpu and sin.is_cpu):
            raise ValueError(f"cos and sin must be alike and on the CPU, got {list(shape)} and {list(sin.shape)}")
        return _float32(x), _float32(cos), _float32(sin), rows

    def _call(self, function, *arguments):
        if function(self._layer, *arguments, torch.get_num_threads()):
            raise MemoryError(f"no memory for the states of a layer of width {self._width}")


def _columns(weight: torch.Tensor, bits: int) -> int:
    """The width of the matrix that stored bytes stand for. Raises ValueError if they are not what the kernels read."""
    if bits not in (4, 8) or weight.dtype is not torch.int8 or weight.dim() != 2 or not weight.is_cpu:
        raise ValueError(
            f"weights must be int8 [out, bytes] on the CPU with 4 or 8 bits, got {weight.dtype} {list(weight.shape)} "
            f"on {weight.device} with {bits} bits"
        )
    if not weight.is_contiguous():
        raise ValueError("weights must be contiguous")
    return weight.shape[1] * 8 // bits


def _operands(packed, scale, bias, bits, activations):
    """Scales and bias of a matrix as the kernels read them. Raises ValueError for what `linear` does not take."""
    out = packed.shape[0]
    _columns(packed, bits)
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations must be int8, int16 or bf16, got {activations}")
    if bias is not None:
        if bias.shape != (out,) or not bias.is_cpu:
            raise ValueError(f"bias must be [{out}] on the CPU, got {list(bias.shape)} on {bias.device}")
        bias = _float32(bias)
    return _scale(scale, out), bias


def _matrix(operands) -> _Matrix:
    """The matrix for the kernels, which will read the tensors where they are now."""
    packed, given_scale, given_bias, bits, activations = operands
    scale, bias = _operands(packed, given_scale, given_bias, bits, activations)
    if scale is not given_scale or bias is not given_bias:
        raise ValueError("the kernels of a layer read scales in float16 or float32 and biases in float32, contiguous")
    return _Matrix(
        packed.data_ptr(),
        scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        packed.shape[0],
        packed.shape[1] * 8 // bits,
        FLOAT_TYPES[scale.dtype],
        bits,
        ACTIVATIONS[activations],
    )


def _norm(norm, width: int) -> _Norm:
    weight, bias, epsilon = norm
    for tensor in (weight, bias):
        if tensor.shape != (width,) or tensor.dtype is not torch.float32 or not tensor.is_cpu or tensor.stride(0) != 1:
            raise ValueError(
                f"a norm must have contiguous float32 [{width}] on the CPU, got {tensor.dtype} {list(tensor.shape)} on "
                f"{tensor.device}"
            )
    return _Norm(weight.data_ptr(), bias.data_ptr(), epsilon)


def _rows(x: torch.Tensor, width: int) -> int:
    if x.dim() != 3 or x.shape[2] != width or x.dtype is not torch.float32 or not x.is_cpu:
        raise ValueError(
            f"states must be float32 [batch, seq_len, {width}] on the CPU, got {x.dtype} {list(x.shape)} on {x.device}"
        )
    return x.numel() // width


def _visible(mask: torch.Tensor | None, batch: int, length: int) -> torch.Tensor | None:
    """A mask as the kernels read it."""
    if mask is None:
        return None
    if mask.dtype is not torch.bool or not mask.is_cpu or mask.numel() != batch * length:
        raise ValueError(f"mask must be bool [{batch}, 1, 1, {length}] on the CPU, got {mask.dtype} {list(mask.shape)}")
    return mask.contiguous()


def _scale(scale: torch.Tensor, out: int) -> torch.Tensor:
    """Scales as the kernels read them: contiguous float16 or float32."""
    if scale.shape != (out,) or not scale.is_floating_point() or not scale.is_cpu:
        raise ValueError(
            f"scales must be floats [{out}] on the CPU, got {scale.dtype} {list(scale.shape)} on {scale.device}"
        )
    return scale if scale.dtype is torch.float16 and scale.is_contiguous() else _float32(scale)


def _float32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype is torch.float32 and x.is_contiguous() else x.to(torch.float32).contiguous()
