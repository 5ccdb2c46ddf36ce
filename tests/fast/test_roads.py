"""The fast forms on a processor with AVX2 only, which newer ones can be told to be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

OLDER = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
TESTS = ("test_forms.py", "test_half.py", "test_int8.py")


@pytest.mark.skipif(os.environ.get("ONEDNN_MAX_CPU_ISA") == "AVX2", reason="this run is the one with AVX2 only")
@pytest.mark.skipif("AVX512" not in torch.backends.cpu.get_cpu_capability(), reason="this processor has no more")
def test_with_avx2_only():
    folder = Path(__file__).parent
    files = [str(folder / name) for name in TESTS]
    selected = "embedded_equally or close or rounding or product"
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *files, "-k", selected]
    ran = subprocess.run(command, env=os.environ | OLDER, cwd=folder.parents[1], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-1000:]
