"""Where tests run our Triton kernels: on a GPU, or in Triton's interpreter where there is none.

Import this module before anything imports Triton: a kernel is interpreted or compiled as was asked for when it was
defined.
"""

import importlib
import os

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
compiled_only = pytest.mark.skipif(DEVICE.type == "cpu", reason="Triton's interpreter cannot do it; needs a GPU")

if DEVICE.type == "cpu":
    # For the modules imported here alone: processes that tests start must not inherit it.
    os.environ["TRITON_INTERPRET"] = "1"
    for module in (
        "triton.experimental.gluon",
        "sampler_service.slot_kernels",
        "service_common.blake3_kernels",
        "trainer_service.lora.grouped",
        "trainer_service.megatron.kernels",
    ):
        importlib.import_module(module)
    del os.environ["TRITON_INTERPRET"]
