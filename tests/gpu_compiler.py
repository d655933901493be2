"""Kernels compiled for an H100 on machines without a GPU: the interpreter accepts what the compiler does not.

Run as a program, in a process of its own: Triton decides between interpreter and compiler when it is imported.
"""

import os
import subprocess
import sys


def compiled(program: str) -> list[str]:
    """Names of the kernels that `program`, Python source, launches; each is compiled and none runs. Raises what it raises."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    source = f"from tests.gpu_compiler import compile_only\ncompile_only()\n{program}"
    result = subprocess.run(
        [sys.executable, "-c", source], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.split()


def compile_only() -> None:
    """Make launches compile for compute capability 9.0, print the kernel's name and do nothing else."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit

    class NoGpu:
        """As much of a driver as compiling needs."""

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device=None):
            return 0

        def get_active_torch_device(self):
            return torch.device("cpu")

    driver.set_active(NoGpu())
    run = jit.JITFunction.run

    def compile_and_print(self, *args, grid, warmup, **constants):
        kernel = run(self, *args, grid=grid, warmup=True, **constants)
        assert kernel.asm["cubin"]
        print(self.fn.__name__)
        return kernel

    jit.JITFunction.run = compile_and_print
