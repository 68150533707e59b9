"""The few CUDA runtime calls a session needs: memory, copies, one stream, and work on it that is captured once and launched again.

Polygraphy finds and loads the CUDA runtime library (on Windows, in wheels, in toolkits). The calls themselves go straight
to it, because Polygraphy's own wrappers print to the terminal and report a bare status number. `polygraphy.cuda` imports
neither TensorRT, so it does not matter which of the two is installed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from gap_export.errors import MissingRequirementError, SessionError, first_line

_HOST_TO_DEVICE, _DEVICE_TO_HOST, _DEVICE_TO_DEVICE = 1, 2, 3
_ONE_THREAD = (
    1  # cudaStreamCaptureModeThreadLocal: calls of other threads are no part of a capture, nor in its way
)
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # cudaDevAttrComputeCapabilityMajor and ...Minor
_OUT_OF_MEMORY = 2
_GPU_HINT = "run it on a machine with an NVIDIA GPU and a current driver, or use the onnx target"


class Device:
    """A GPU: memory and one stream on which everything happens in order.

    Args:
        number: of several; None for the current one.
        runtime: the CUDA runtime library, where it is loaded already; by default it is looked for.

    Raises:
        MissingRequirementError: no CUDA runtime library, no driver, or no such GPU.
    """

    def __init__(self, number: int | None = None, runtime: Any = None) -> None:
        self._runtime = runtime or _load_runtime()
        self._number = number
        count = ctypes.c_int()
        status = int(self._runtime.cudaGetDeviceCount(ctypes.byref(count)))
        if status or not count.value:
            reason = self._words(status) if status else "no CUDA device is visible"
            raise MissingRequirementError(f"cannot be used: {reason}", subject="the GPU", hint=_GPU_HINT)
        if number is not None and number >= count.value:
            raise MissingRequirementError(
                f"is not there: CUDA finds {count.value}, counted from 0",
                subject=f"GPU {number}",
                hint="choose another --device",
            )
        self._select()
        stream = ctypes.c_void_p()
        self._check(self._runtime.cudaStreamCreate(ctypes.byref(stream)), "making a stream")
        self.stream = int(stream.value or 0)

    @property
    def compute_capability(self) -> str:
        """For example `8.9`."""
        index = ctypes.c_int()
        self._check(self._runtime.cudaGetDevice(ctypes.byref(index)), "asking for the device")
        parts = []
        for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
            value = ctypes.c_int()
            status = self._runtime.cudaDeviceGetAttribute(ctypes.byref(value), attribute, index)
            self._check(status, "asking for the compute capability")
            parts.append(str(value.value))
        return ".".join(parts)

    def allocate(self, nbytes: int) -> int:
        """Device memory.

        Returns:
            Its address.

        Raises:
            MissingRequirementError: not enough memory is free.
        """
        self._select()
        address = ctypes.c_void_p()
        status = int(self._runtime.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(max(nbytes, 1))))
        if status == _OUT_OF_MEMORY:
            raise MissingRequirementError(
                f"has not {nbytes / 2**20:.0f} MiB free",
                subject="the GPU's memory",
                hint="close other programs, or build with a smaller max_batch or capacity",
            )
        self._check(status, "allocating memory")
        return int(address.value or 0)

    def free(self, address: int) -> None:
        """Give device memory back."""
        self._check(self._runtime.cudaFree(ctypes.c_void_p(address)), "freeing memory")

    def clear(self, address: int, nbytes: int) -> None:
        """Fill device memory with zero bytes."""
        self._select()
        status = self._runtime.cudaMemsetAsync(
            ctypes.c_void_p(address), 0, ctypes.c_size_t(nbytes), ctypes.c_void_p(self.stream)
        )
        self._check(status, "clearing memory")

    def upload(self, address: int, array: NDArray[Any]) -> None:
        """Copy a contiguous array to the device; it may be changed as soon as this returns."""
        self._copy(address, array.ctypes.data, array.nbytes, _HOST_TO_DEVICE)

    def download(self, array: NDArray[Any], address: int) -> None:
        """Copy from the device into a contiguous array, after all work on the stream is done."""
        self._copy(array.ctypes.data, address, array.nbytes, _DEVICE_TO_HOST)
        self.synchronize()

    def copy(self, to: int, source: int, nbytes: int) -> None:
        """Copy from one place on the device to another."""
        self._copy(to, source, nbytes, _DEVICE_TO_DEVICE)

    def synchronize(self) -> None:
        """Wait until all work on the stream is done."""
        self._check(self._runtime.cudaStreamSynchronize(ctypes.c_void_p(self.stream)), "running the engine")

    def capture(self, work: Callable[[], None]) -> int:
        """Record what `work` puts on the stream as a CUDA graph. It is not executed; `launch` does that.

        Returns:
            A handle for `launch` and `forget`. It reads and writes the addresses that it was captured with.

        Raises:
            SessionError: something in it cannot be captured.
        """
        runtime, stream = self._runtime, ctypes.c_void_p(self.stream)
        graph, ready = ctypes.c_void_p(), ctypes.c_void_p()
        status = runtime.cudaStreamBeginCapture(stream, ctypes.c_int(_ONE_THREAD))
        self._check(status, "starting to capture")
        try:
            work()
        finally:  # a stream that is left capturing executes nothing any more
            status = runtime.cudaStreamEndCapture(stream, ctypes.byref(graph))
        self._check(status, "capturing")
        status = runtime.cudaGraphInstantiateWithFlags(ctypes.byref(ready), graph, ctypes.c_ulonglong(0))
        runtime.cudaGraphDestroy(graph)
        self._check(status, "preparing what was captured")
        return int(ready.value or 0)

    def launch(self, captured: int) -> None:
        """Execute what was captured, on the stream."""
        status = self._runtime.cudaGraphLaunch(ctypes.c_void_p(captured), ctypes.c_void_p(self.stream))
        self._check(status, "launching what was captured")

    def forget(self, captured: int) -> None:
        """Give a captured graph back."""
        self._runtime.cudaGraphExecDestroy(ctypes.c_void_p(captured))

    def close(self) -> None:
        """Give the stream back."""
        self._runtime.cudaStreamDestroy(ctypes.c_void_p(self.stream))

    def _select(self) -> None:
        """Make it the current one, which every thread has for itself."""
        if self._number is not None:
            self._check(self._runtime.cudaSetDevice(ctypes.c_int(self._number)), "choosing the device")

    def _copy(self, to: int, source: int, nbytes: int, kind: int) -> None:
        status = self._runtime.cudaMemcpyAsync(
            ctypes.c_void_p(to),
            ctypes.c_void_p(source),
            ctypes.c_size_t(nbytes),
            ctypes.c_int(kind),
            ctypes.c_void_p(self.stream),
        )
        self._check(status, "copying")

    def _check(self, status: int, doing: str) -> None:
        if status:
            raise SessionError(
                f"CUDA failed while {doing}: {self._words(int(status))}",
                subject="the GPU",
                hint="an earlier kernel may have failed: start a new process; if it happens again, please report this",
            )

    def _words(self, status: int) -> str:
        describe = self._runtime.cudaGetErrorString
        describe.restype = ctypes.c_char_p
        text: bytes = describe(ctypes.c_int(status))
        return f"{text.decode(errors='replace')} (CUDA error {status})"


def _load_runtime() -> Any:
    try:
        from polygraphy import cuda
        from polygraphy.logger import G_LOGGER
    except ImportError as error:
        raise MissingRequirementError(
            "is not installed", subject="polygraphy", hint="install it: pip install 'gap-export[rtx]'"
        ) from error
    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            return cuda.wrapper().handle
    except Exception as error:  # Polygraphy's exception class, or OSError from the loader
        raise MissingRequirementError(
            f"was not found: {first_line(error)}",
            subject="the CUDA runtime library (libcudart)",
            hint="install the CUDA toolkit, or pip install nvidia-cuda-runtime-cu12",
        ) from error
