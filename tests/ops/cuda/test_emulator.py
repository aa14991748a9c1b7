"""The emulator that the tests of CUDA kernels rest on: conversions bit by bit, and that wrong kernels are noticed."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from ernie45.checkpoint.dtypes import convert
from tests.helpers import cuda

HEADER = """
#include "types.h"
ERNIE45_API cudaError_t ernie45_cuda_convert(const float* x, int64_t count, int dtype, void* out, cudaStream_t stream);
ERNIE45_API cudaError_t ernie45_cuda_widen(const void* x, int64_t count, int dtype, float* out, cudaStream_t stream);
ERNIE45_API cudaError_t ernie45_cuda_exchange(const float* x, int64_t kind, int* out, cudaStream_t stream);
ERNIE45_API cudaError_t ernie45_cuda_reduce(const float* x, int64_t threads, float* out, cudaStream_t stream);
ERNIE45_API cudaError_t ernie45_cuda_divide(const int* x, int64_t count, int64_t by, int* out, cudaStream_t stream);
ERNIE45_API cudaError_t ernie45_cuda_wrong(int64_t kind, float* out, cudaStream_t stream);
"""
SOURCE = r"""
#include "kernels.h"
#include "device.cuh"
using namespace ernie::cuda;
namespace {
template <typename T>
__global__ void convert_kernel(const float* x, int64_t count, T* out) {
  const int64_t i = (blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x) * 2;
  if (i + 1 < count) {
    const float pair[2] = {x[i], x[i + 1]};
    store(from_floats<T>(pair), out + i);
  } else if (i < count) {
    out[i] = from_float<T>(x[i]);
  }
}
template <typename T>
__global__ void widen_kernel(const T* x, int64_t count, float* out) {
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) out[i] = to_float(x[i]);
}
__global__ void exchange_kernel(const float* x, int64_t kind, int* out) {
  const int lane = threadIdx.x % 32;
  const int value = static_cast<int>(x[threadIdx.x]);
  int found = 0;
  if (kind == 0) found = __shfl_sync(kAllLanes, value, lane / 2);
  if (kind == 1) found = __shfl_up_sync(kAllLanes, value, 3, 16);
  if (kind == 2) found = __shfl_down_sync(kAllLanes, value, 3, 16);
  if (kind == 3) found = __shfl_xor_sync(kAllLanes, value, 5);
  if (kind == 4) found = static_cast<int>(__ballot_sync(kAllLanes, value % 3 == 0));
  if (kind == 5) found = static_cast<int>(__match_any_sync(kAllLanes, value % 3));
  if (kind == 6) found = __reduce_max_sync(kAllLanes, value);
  if (kind == 7) found = __syncthreads_count(value % 3 == 0) * 1000 + __syncthreads_count(value % 2 == 0);
  if (kind == 8) found = lane < 10 ? __reduce_add_sync(0x3ffu, value) : __reduce_add_sync(~0x3ffu, value);
  out[threadIdx.x] = found;
}
__global__ void reduce_kernel(const float* x, float* out) {
  const float value = x[threadIdx.x];
  out[2 * threadIdx.x] = block_sum(value);
  out[2 * threadIdx.x + 1] = block_max(value);
}
__global__ void divide_kernel(const int* x, int64_t count, Divisor by, int* out) {
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) out[i] = by.quotient(x[i]);
}
__global__ void wrong_kernel(int64_t kind, float* out) {
  __shared__ float shared[64];
  if (kind == 1 && threadIdx.x % 2) __syncthreads();
  if (kind == 1 && threadIdx.x % 2 == 0) __syncwarp();
  if (kind == 2 && threadIdx.x < 8) __shfl_xor_sync(kAllLanes, 1.0f, 1);
  if (kind == 3) out[0] = __shfl_xor_sync(threadIdx.x < 32 ? 0xfffffffeu : kAllLanes, 1.0f, 0);
  if (kind == 4) store(load<4>(out + 1), out + 8);
  if (kind == 5) reinterpret_cast<volatile float*>(16)[0] = 1.0f;
  if (kind == 6) out[threadIdx.x] = __shfl_sync(0x55555555u << threadIdx.x % 2, 1.0f, 0);
  if (kind == 7) {  // a barrier is missing
    shared[threadIdx.x] = static_cast<float>(threadIdx.x);
    out[threadIdx.x] = shared[63 - threadIdx.x];
    shared[threadIdx.x] = -1.0f;
  }
  if (kind == 8) out[threadIdx.x] = reinterpret_cast<float*>(dynamic_shared())[threadIdx.x];
}
}  // namespace
cudaError_t ernie45_cuda_convert(const float* x, int64_t count, int dtype, void* out, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(ceil_div(count, 512));
  if (dtype == kErnieFloat8E4M3) {
    return launch(convert_kernel<Float8>, blocks, 256, 0, stream, x, count, static_cast<Float8*>(out));
  }
  return ERNIE45_FOR_FLOAT_TYPE(dtype, launch(convert_kernel<T>, blocks, 256, 0, stream, x, count,
                                              static_cast<T*>(out)));
}
cudaError_t ernie45_cuda_widen(const void* x, int64_t count, int dtype, float* out, cudaStream_t stream) {
  if (dtype == kErnieFloat8E4M3) {
    return launch(widen_kernel<Float8>, 1, 32, 0, stream, static_cast<const Float8*>(x), count, out);
  }
  return ERNIE45_FOR_FLOAT_TYPE(dtype, launch(widen_kernel<T>, 1, 32, 0, stream, static_cast<const T*>(x), count, out));
}
cudaError_t ernie45_cuda_exchange(const float* x, int64_t kind, int* out, cudaStream_t stream) {
  return launch(exchange_kernel, 1, 64, 0, stream, x, kind, out);
}
cudaError_t ernie45_cuda_reduce(const float* x, int64_t threads, float* out, cudaStream_t stream) {
  return launch(reduce_kernel, 1, static_cast<unsigned>(threads), 0, stream, x, out);
}
cudaError_t ernie45_cuda_divide(const int* x, int64_t count, int64_t by, int* out, cudaStream_t stream) {
  return launch(divide_kernel, 1, 32, 0, stream, x, count, Divisor(by), out);
}
cudaError_t ernie45_cuda_wrong(int64_t kind, float* out, cudaStream_t stream) {
  return launch(wrong_kernel, 1, 64, 1024, stream, kind, out);
}
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> cuda.Library:
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "kernels.h").write_text(HEADER, encoding="utf-8")
    (folder / "kernels.cu").write_text(SOURCE, encoding="utf-8")
    return cuda.library_of([folder / "kernels.cu"], headers=folder)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_round_as_numpy_does(kernels: cuda.Library, dtype: str) -> None:
    x = every_upper_half()
    out = cuda.empty([x.size], dtype)
    kernels.call("ernie45_cuda_convert", cuda.device(x), x.size, out.tag, out)
    expected = convert(x, "F32", cuda.SAFETENSORS[dtype])
    numbers = ~np.isnan(x)
    np.testing.assert_array_equal(out.stored()[numbers].view(np.uint16), expected[numbers].view(np.uint16))
    assert (out.stored()[~numbers].view(np.uint16) == 0x7FFF).all()  # as CUDA has it


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_types_widen_exactly(kernels: cuda.Library, dtype: str) -> None:
    codes = np.arange(65536, dtype=np.uint16).view(cuda.STORED[dtype])
    out = cuda.empty([codes.size])
    kernels.call("ernie45_cuda_widen", cuda.Memory(codes, dtype), codes.size, cuda.DTYPES[dtype], out)
    np.testing.assert_array_equal(out.numpy(), convert(codes, cuda.SAFETENSORS[dtype], "F32"))


def test_float8_saturates_and_rounds_to_even(kernels: cuda.Library) -> None:
    values = e4m3_values()
    positive = values[:0x7F]
    between = (positive[:-1] + positive[1:]) / 2
    x = np.concatenate([positive, between, np.nextafter(between, 0), np.nextafter(between, 500), [464, 1e30, np.inf]])
    x = np.concatenate([x, -x]).astype(np.float32)
    out = cuda.empty([x.size], "float8_e4m3fn")
    kernels.call("ernie45_cuda_convert", cuda.device(x), x.size, out.tag, out)
    nearest = np.abs(np.minimum(np.abs(x), 448)[:, None] - positive.astype(np.float64)) * 2
    nearest += np.arange(0x7F) % 2 * 1e-12  # of two as near, the even code
    np.testing.assert_array_equal(out.numpy(), nearest.argmin(axis=1) | np.signbit(x) * 0x80)

    nan = cuda.empty([3], "float8_e4m3fn")
    kernels.call("ernie45_cuda_convert", cuda.device(np.full(3, -np.nan, np.float32)), 3, nan.tag, nan)
    assert nan.numpy().tolist() == [0x7F] * 3


def test_float8_widens_exactly(kernels: cuda.Library) -> None:
    codes, out = np.arange(256, dtype=np.uint8), cuda.empty([256])
    kernels.call("ernie45_cuda_widen", cuda.Memory(codes, "float8_e4m3fn"), 256, cuda.DTYPES["float8_e4m3fn"], out)
    np.testing.assert_array_equal(out.numpy(), e4m3_values())


def test_lanes_exchange_as_on_a_device(kernels: cuda.Library) -> None:
    x = np.random.default_rng(0).permutation(64)
    found = []
    for kind in range(9):
        out = cuda.empty([64], "int32")
        kernels.call("ernie45_cuda_exchange", cuda.device(x.astype(np.float32)), kind, out)
        found.append(out.numpy().reshape(2, 32))
    lanes, warps = np.arange(32), x.reshape(2, 32)
    np.testing.assert_array_equal(found[0], warps[:, lanes // 2])
    np.testing.assert_array_equal(found[1], warps[:, np.where(lanes % 16 < 3, lanes, lanes - 3)])
    np.testing.assert_array_equal(found[2], warps[:, np.where(lanes % 16 > 12, lanes, lanes + 3)])
    np.testing.assert_array_equal(found[3], warps[:, lanes ^ 5])
    ballot = ((warps % 3 == 0) << lanes).sum(axis=1, keepdims=True)
    np.testing.assert_array_equal(found[4].view(np.uint32), np.repeat(ballot, 32, axis=1))
    same = (warps[:, :, None] % 3 == warps[:, None] % 3) << lanes
    np.testing.assert_array_equal(found[5].view(np.uint32), same.sum(axis=2))
    np.testing.assert_array_equal(found[6], np.repeat(warps.max(axis=1, keepdims=True), 32, axis=1))
    assert (found[7] == (x % 3 == 0).sum() * 1000 + (x % 2 == 0).sum()).all()
    parts = np.where(lanes < 10, warps[:, :10].sum(axis=1)[:, None], warps[:, 10:].sum(axis=1)[:, None])
    np.testing.assert_array_equal(found[8], parts)


@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_reductions_reach_every_thread(kernels: cuda.Library, threads: int) -> None:
    x = np.random.default_rng(0).integers(-9, 9, threads).astype(np.float32)
    out = cuda.empty([threads, 2])
    kernels.call("ernie45_cuda_reduce", cuda.device(x), threads, out)
    np.testing.assert_array_equal(out.numpy(), np.tile([x.sum(), x.max()], (threads, 1)))
    x[threads // 2] = np.nan
    kernels.call("ernie45_cuda_reduce", cuda.device(x), threads, out)
    assert np.isnan(out.numpy()).all()


@pytest.mark.parametrize("by", [1, 2, 3, 7, 192, 641, 65535, 2**30 + 1, 2**31 - 1])
def test_a_divisor_divides(kernels: cuda.Library, by: int) -> None:
    edges = np.concatenate([np.arange(3), by * np.arange(1, 5), [2**31 - 1]])
    x = np.concatenate([edges - 1, edges, edges + 1])
    x = x[(x >= 0) & (x < 2**31)].astype(np.int32)
    out = cuda.empty([x.size], "int32")
    kernels.call("ernie45_cuda_divide", cuda.device(x), x.size, by, out)
    np.testing.assert_array_equal(out.numpy(), x // by)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (1, "wait for others that never come"),
        (2, "wait for others that never come"),
        (3, "the mask fffffffe does not name lane 0"),
        (4, "a misaligned access"),
        (5, "an address that is not its own"),
        (6, "lane 0, which is read, is not in the mask aaaaaaaa"),
    ],
)
def test_wrong_kernels_end_with_an_error(
    kernels: cuda.Library, capfd: pytest.CaptureFixture, kind: int, message: str
) -> None:
    for _ in range(2):  # the emulator runs on
        with pytest.raises(cuda.CudaError, match="ernie45_cuda_wrong: cudaError_t 719"):
            kernels.call("ernie45_cuda_wrong", kind, cuda.empty([64]))
        assert message in capfd.readouterr().err
    kernels.call("ernie45_cuda_wrong", 0, cuda.empty([64]))


def test_a_missing_barrier_shows(kernels: cuda.Library) -> None:
    out = cuda.empty([64])
    kernels.call("ernie45_cuda_wrong", 7, out)
    assert (out.numpy() != np.arange(63, -1, -1)).any()


def test_shared_memory_that_nobody_wrote_is_nan(kernels: cuda.Library) -> None:
    out = cuda.device(np.zeros(64, np.float32))
    kernels.call("ernie45_cuda_wrong", 8, out)
    assert np.isnan(out.numpy()).all()


def test_writing_beside_an_array_shows() -> None:
    memory = cuda.empty([4], shift=1)
    for offset in (-4, 16):
        place = ctypes.c_float.from_address(memory.data_ptr() + offset)
        before, place.value = place.value, 1.0
        with pytest.raises(AssertionError, match="was written"):
            memory.numpy()
        ctypes.memset(ctypes.addressof(place), cuda.Memory.PATTERN, 4)
        assert np.isnan(before)
    memory.numpy()


def test_arguments_are_checked(kernels: cuda.Library, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"ernie45_cuda_wrong takes \(int64_t kind, pointer out"):
        kernels.call("ernie45_cuda_wrong", 0)
    with pytest.raises(TypeError, match="kind is None, expected int64_t"):
        kernels.call("ernie45_cuda_wrong", None, cuda.empty([64]))
    with pytest.raises(TypeError, match="out is 1.0, expected a tensor or None"):
        kernels.call("ernie45_cuda_wrong", 0, 1.0)


def every_upper_half() -> np.ndarray:
    """All float32 values whose lower half is at a tie of bfloat16 or beside it, and ties of float16."""
    upper = np.arange(65536, dtype=np.uint32) << 16
    return np.concatenate([upper | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0x1000, 0x3000)]).view(np.float32)


def e4m3_values() -> np.ndarray:
    """What the 256 codes mean."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    size = np.where(exponent, np.ldexp(1 + mantissa / 8, exponent - 7), np.ldexp(mantissa / 8, -6))
    size[codes & 0x7F == 0x7F] = np.nan
    return (np.where(codes & 0x80, -1, 1) * size).astype(np.float32)
