"""Kernels compiled for an H100 on machines without a GPU: the interpreter accepts what the compiler does not.

Run as a program, in a process of its own: Triton decides between interpreter and compiler when it is imported.
"""

import os
import subprocess
import sys


def compiled(program: str) -> list[str]:
    """Names of the kernels that `program`, Python source, launches; each is compiled and none runs. Raises what it raises."""
    return run_without_interpreter(f"from tests.gpu_compiler import compile_only\ncompile_only()\n{program}").split()


def run_without_interpreter(source: str) -> str:
    """What a Python program prints. Raises what it raises."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", source], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def compile_only(told=lambda name, kernel: name) -> None:
    """Make launches compile for compute capability 9.0, print what is `told` of the kernel and do nothing else."""
    from triton.runtime import driver, jit

    driver.set_active(_no_gpu())
    run = jit.JITFunction.run

    def compile_and_print(self, *args, grid, warmup, **constants):
        kernel = run(self, *args, grid=grid, warmup=True, **constants)
        assert kernel.asm["cubin"]
        print(told(self.fn.__name__, kernel))
        return kernel

    jit.JITFunction.run = compile_and_print


def record_launches() -> list[tuple[str, str, tuple[int, ...], list[int]]]:
    """Make launches compile for compute capability 9.0 and append here, instead of running: who launched ("triton", or "code" that
    was called without it), the kernel's name, its grid, and its arguments with tensors as addresses."""
    from triton.compiler import compiler
    from triton.runtime import driver

    launches = []

    class Recorder:
        """A launcher by the conventions of Triton 3.6."""

        global_scratch_size = profile_scratch_size = 0
        launch_cooperative_grid = launch_pdl = False

        def __init__(self, source, metadata):
            self.name = source.fn.fn.__name__

        def __call__(self, x, y, z, stream, function, packed_metadata, metadata, enter, leave, *arguments):
            enter(metadata)
            launches.append(("triton", self.name, (x, y, z), _addresses(arguments)))

        def launch(self, x, y, z, stream, function, cooperative, pdl, scratch, profile, packed, data, enter, leave, *arguments):
            assert scratch is profile is data is enter is leave is None
            assert packed is not None
            launches.append(("code", self.name, (x, y, z), _addresses(arguments)))

    class Utils:
        load_binary = staticmethod(lambda *_: (1, 1, 0, 0, 1024))
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": 232448})

    no_gpu = _no_gpu()
    no_gpu.launcher_cls, no_gpu.utils = Recorder, Utils
    driver.set_active(no_gpu)
    compiler.max_shared_mem = lambda device: 232448
    return launches


def _addresses(argument) -> list:
    """Numbers and addresses, in order."""
    if isinstance(argument, tuple):
        return [part for one in argument for part in _addresses(one)]
    return [argument.data_ptr() if hasattr(argument, "data_ptr") else argument]


def _no_gpu():
    """As much of a driver as compiling needs."""
    import torch
    from triton.backends.compiler import GPUTarget

    class NoGpu:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device=None):
            return 0

        def get_active_torch_device(self):
            return torch.device("cpu")

    return NoGpu()
