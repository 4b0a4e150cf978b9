"""Kinds of GPU work, by names that profilers give, and the sums over them."""

from __future__ import annotations

import pytest
import torch

from svdit.runtime.gpu_profile import REST, GpuProfile, kind_of, profile_gpu

NAMES = {
    "void svdit::sm90_sparse_attention<svdit::Sm90Config<__nv_bfloat16, 64> >(svdit::Sm90Params)": "attention",
    "Memcpy HtoD (Pinned -> Device)": "copies between host and GPU",
    "Memcpy DtoD (Device -> Device)": "copies on the GPU",
    "Memset (Device)": "copies on the GPU",
    "nvjet_sm90_tst_128x256_64x4_1x2_h_bz_coopA_TNT": "products",
    "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16>": "products",
    "void onnxruntime::cuda::cuApplyLayerNorm<float, float, float, true>": "normalisation and softmax",
    "void onnxruntime::cuda::Transpose4DKernelParallelizeMultipleElements<2>": "transposes",
    "void onnxruntime::cuda::_UnaryElementWise<float, __nv_bfloat16, onnxruntime::cuda::OP_Cast<float>>": "casts",
    "void onnxruntime::cuda::_BinaryElementWise<float, onnxruntime::cuda::OP_Mul<float>>": REST,
}


@pytest.mark.parametrize("name", NAMES)
def test_kind(name):
    assert kind_of(name) == NAMES[name]


def test_sums():
    names = list(NAMES)
    found = GpuProfile(dict.fromkeys(names, 250.0), dict.fromkeys(names, 3), {"cudaStreamSynchronize": 26})
    assert found.total == 2500 and found.of("copies on the GPU") == 500 and found.count("attention") == 3
    figures = found.to_json()
    assert figures["gpu_ms"] == 2.5 and figures["attention_share"] == 0.1
    assert figures["kinds"]["products"] == [0.5, 6] and figures["waits"] == {"cudaStreamSynchronize": 26}
    assert sum(ms for ms, _ in figures["kinds"].values()) == figures["gpu_ms"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernels_and_waits_are_counted():
    """Three products and one read of the result: the read is the only wait."""
    a = torch.ones(512, 512, device="cuda", dtype=torch.bfloat16)
    (a @ a).sum().item()
    found = profile_gpu(lambda: [float((a @ a)[0, 0]) for _ in range(3)])
    assert found.count("products") == 3 and found.count("copies between host and GPU") == 3
    assert sum(found.waits.values()) == 3
