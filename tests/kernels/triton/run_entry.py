"""Enters a launcher that Triton really compiled, with a driver that only notes what it is told.

Prints whether the direct entry tells the driver the same as Triton's own path does.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.nvidia import driver

from mogul.kernels.triton import launch, tape

DRIVER = """
#include <string.h>
char config[40]; unsigned long long given[16];
int cuGetErrorString(int r, const char **s) { *s = ""; return 0; }
int cuPointerGetAttribute(void *to, int a, unsigned long long p) { memcpy(to, &p, 8); return 0; }
int cuCtxGetCurrent(void **c) { *c = (void *)1; return 0; }
int cuDeviceGet(int *d, int o) { *d = o; return 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { *c = (void *)1; return 0; }
int cuCtxSetCurrent(void *c) { return 0; }
int cuFuncSetAttribute(void *f, int a, int v) { return 0; }
int cuLaunchKernelEx(const void *c, void *f, void **p, void **e) {
  memcpy(config, c, 28); memcpy(config + 32, (const char *)c + 32, 8); memcpy(given, &f, 8);
  for (int i = 0; i < NUM; i++) { given[1 + i] = 0; memcpy(given + 1 + i, p[i], BYTES[i]); }
  return 0;
}
"""
KINDS = {
    "plain": ({"a": "*bf16", "w": "*i64", "n": "i32", "C": "constexpr"}, (8, 8, 4)),
    "descriptor": (
        {"a": "*bf16", "d": "tensordesc<bf16[64, 64]>", "C": "constexpr"},
        (8, 8, 8, 8, 8, 8, 1, 4, 4, 8, 8),
    ),
}


def noted(library: Any) -> tuple[bytes, list[int]]:
    """Launch configuration and arguments of the last launch."""
    config = (ctypes.c_char * 40).in_dll(library, "config").raw
    return config, list((ctypes.c_ulonglong * 16).in_dll(library, "given"))


def main() -> None:
    """Kind of kernel and a folder for the library from the command line."""
    kind, folder = sys.argv[1], Path(sys.argv[2])
    signature, sizes = KINDS[kind]
    table = f"#define NUM {len(sizes)}\nstatic int BYTES[] = {{{', '.join(map(str, sizes))}}};\n"
    (folder / "driver.c").write_text(table + DRIVER)
    library = folder / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, folder / "driver.c"], check=True)
    (folder / "libcuda.so").symlink_to(library)
    told = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    driver.library_dirs, driver.libraries = (lambda: [str(folder)]), ["cuda"]
    metadata = SimpleNamespace(
        tensordesc_meta=None, num_ctas=1, launch_cooperative_grid=False, launch_pdl=True,
        global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0,
        profile_scratch_align=1,
    )  # fmt: skip
    names = list(signature)
    source = SimpleNamespace(
        constants={(2 if kind == "descriptor" else 3,): 7}, signature=signature,
        fn=SimpleNamespace(arg_names=names),
    )  # fmt: skip
    run = driver.CudaLauncher(source, metadata)
    one = launch.Launch(None, {"C": 7})
    one._run, one._compiled = run, SimpleNamespace(metadata=metadata)
    one._function, one._packed, one._tail = 0xABC, (4, 1, 1024), (7,)
    entry = one.entry()
    assert entry is not None
    a, matrix = torch.zeros(8), torch.zeros(128, 64, dtype=torch.bfloat16)
    described = launch.descriptor(matrix, [64, 64])
    plain = (a, matrix, 5) if kind == "plain" else (a, described)
    grid_and_stream = (3, 2, 1, 77)
    run(*grid_and_stream, 0xABC, (4, 1, 1024), None, None, None, *plain, 7)
    want = noted(told)
    entered = (
        [a.data_ptr(), matrix.data_ptr(), 5]
        if kind == "plain"
        else [a.data_ptr(), *tape._Descriptor(described, None).at(matrix.data_ptr())]
    )
    ctypes.memset((ctypes.c_char * 40).in_dll(told, "config"), 0, 40)
    entry.call(*grid_and_stream, *entry.fixed, *entered, *entry.tail)
    print(json.dumps({"same": noted(told) == want, "arguments": want[1][: 1 + len(sizes)]}))


if __name__ == "__main__":
    main()
