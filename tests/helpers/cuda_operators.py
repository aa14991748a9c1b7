"""The operators on the GPU, compiled for the host: Paddle's bindings over the emulated kernels, for tensors on the CPU.

With them the bindings, their gradients and the choice of an implementation are tested as they are, without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import paddle
import pytest

from ernie45.ops import build, custom, gpu, make, toolchain
from tests.helpers import cuda

FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-w")


@functools.cache
def loaded() -> custom.Loaded:
    """The library, built and registered once for a test session. Skips without a compiler."""
    try:
        compiler = toolchain.find_compiler()
    except toolchain.BuildError as error:
        pytest.skip(str(error))
    kernels = cuda.compiled(sorted(cuda.HEADERS.glob("[!.]*.cu")))
    target = make.cache_folder() / "emulated" / f"operators-{make.hash_of([*map(str, kernels), _key(compiler)])}.so"
    if not target.exists():
        make.make(_recipe(compiler, kernels), target)
    operators = paddle.utils.cpp_extension.load_op_meta_info_and_register_op(str(target))
    return custom.Loaded(None, target, tuple(operators))


@contextlib.contextmanager
def on_this_cpu(library: custom.Loaded) -> Iterator[None]:
    """Inside, tensors on the CPU are taken for tensors on a GPU, whose operators this library has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "on_gpu", lambda x: isinstance(x, paddle.Tensor))
        patch.setattr(gpu, "_has_cuda", True)
        patch.setattr(gpu, "_loaded", library)
        patch.setattr(custom, "usable", lambda *tensors: False)
        yield


def _recipe(compiler: toolchain.Compiler, kernels: list[Path]) -> make.Recipe:
    files = tuple(make.files_in(build.SOURCES / "cuda_bindings", "*.cpp"))
    includes = [f"-I{cuda.EMULATOR}", *(f"-isystem{folder}" for folder in toolchain.include_folders())]
    unit = make.Unit("emulated_bindings", files, (*compiler.command, *FLAGS, *includes))
    folders = {f"-Wl,-rpath,{path.parent}" for path in kernels}
    return make.Recipe(
        what="emulated CUDA operators",
        duration="20 s",
        sources=build.SOURCES,
        units=(unit,),
        link=(*compiler.command, "-shared"),
        libraries=(*map(str, kernels), *sorted(folders), *toolchain.paddle_libraries()),
        key=_key(compiler),
        facts={},
    )


def _key(compiler: toolchain.Compiler) -> str:
    files = [*make.files_in(build.SOURCES / "cuda_bindings", "*.cpp", "*.h"), build.SOURCES / "bindings" / "shapes.h"]
    versions = [*build.runtime_versions(), paddle.__file__, compiler.version, *FLAGS]
    return make.key_of(versions, build.SOURCES, files)
