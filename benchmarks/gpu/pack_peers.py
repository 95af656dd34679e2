"""Carry other libraries' expert layers to a GPU machine without a network, as one small archive.

Decides what of the wheels is needed (vLLM's fused_moe with two libraries, DeepGEMM, SonicMoE with
what it compiles by) and leaves out machine code for other GPUs than Hopper's: 67 MB in place of
340. `compile` builds all kernels that SonicMoE's tuner tries, on a processor, as they take minutes
at first use; their names are made of their keys' text, since pickles differ between Pythons.

    python pack_peers.py pack --out DIR                       # downloads; writes DIR/peers.tar.xz
    PYTHONPATH=... python pack_peers.py compile --out DIR     # an interpreter that has sonic-moe
    eval $(python3 pack_peers.py install --out DIR --into /tmp/peers)   # there: sets the paths

Afterwards: `bench_moe_layer.py --vllm-dir /tmp/peers/vllm`, `bench_moe_model.py --implementations
mogul,sonicmoe,deepgemm,grouped_mm`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SONIC = (
    "sonic-moe==0.1.2.post1",
    "quack-kernels==0.3.11",
    "nvidia-cutlass-dsl==4.4.2",
    "nvidia-cutlass-dsl-libs-base==4.4.2",
    "apache-tvm-ffi==0.1.15.post2",
    "torch-c-dlpack-ext==0.1.5",
)
VLLM = "vllm==0.22.1"
PLATFORMS = ("2_35", "2_31", "2_28", "2_24", "2_17")
FUSED_MOE = "vllm/model_executor/layers/fused_moe/"
DEEP_GEMM = "vllm/third_party/deep_gemm/"
LIBRARIES = ("_moe_C.abi3.so", "_C_stable_libtorch.abi3.so")
NOT_NEEDED = (
    "tvm_ffi/include/",
    "tvm_ffi/3rdparty/",
    "tvm_ffi/src/",
    "nvidia_cutlass_dsl/include/",
)
DSL = "nvidia_cutlass_dsl/python_packages"
KEYS = "hashlib.sha256(pickle.dumps(key)).hexdigest()"
TEXT_KEYS = "hashlib.sha256(repr(key).encode()).hexdigest()"
HOPPER = 90


def thin(data: bytearray) -> bytearray:
    """Zero the parts of every fat binary that are for other GPUs; zeros compress to nothing."""
    place = data.find(b"\x50\xed\x55\xba")
    while place >= 0:
        _, version, header, size = struct.unpack_from("<IHHQ", data, place)
        end = place + header + size
        if version != 1 or header != 16 or end > len(data):
            place = data.find(b"\x50\xed\x55\xba", place + 4)
            continue
        part = place + header
        while part < end:
            length, payload = struct.unpack_from("<IQ", data, part + 4)
            (architecture,) = struct.unpack_from("<I", data, part + 28)
            if architecture != HOPPER:
                data[part + length : part + length + payload] = bytes(payload)
            part += length + payload
        place = data.find(b"\x50\xed\x55\xba", end)
    return data


def download(folder: Path) -> None:
    """The wheels for Python 3.12 on x86-64, without what they depend on."""
    platforms = [f"--platform=manylinux_{version}_x86_64" for version in PLATFORMS]
    fixed = ["--no-deps", "--python-version=3.12", "--implementation=cp", "--only-binary=:all:"]
    for name in (*SONIC, VLLM):
        command = [sys.executable, "-m", "pip", "download", "-q", *fixed, *platforms]
        subprocess.run([*command, "-d", str(folder), name], check=True)


def target(name: str, *, is_vllm: bool) -> str | None:
    """Where a wheel's file goes, or None for one that is left behind."""
    if not is_vllm:
        left = name.startswith(NOT_NEEDED) or name.endswith(".a")
        return None if left else f"site/{name}"
    if name.startswith(FUSED_MOE):
        is_other = "/configs/" in name and "device_name=NVIDIA_H" not in name
        return None if is_other else "vllm/fused_moe/" + name.removeprefix(FUSED_MOE)
    if name.startswith(DEEP_GEMM):
        is_other = "/_C." in name and "cpython-312" not in name
        return None if is_other else "dg/deep_gemm/" + name.removeprefix(DEEP_GEMM)
    file = name.removeprefix("vllm/")
    return f"vllm/{file}" if file in LIBRARIES else None


def pack(wheels: Path, out: Path) -> None:
    """Unpack, thin, write the archive."""
    tree = out / "peers"
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name in (n for n in archive.namelist() if not n.endswith("/")):
                place = target(name, is_vllm=wheel.name.startswith("vllm-"))
                if place is None:
                    continue
                data = archive.read(name)
                if place.endswith(LIBRARIES):
                    data = thin(bytearray(data))
                if place.endswith("quack/cache_utils.py"):
                    data = data.replace(KEYS.encode(), TEXT_KEYS.encode())
                (tree / place).parent.mkdir(parents=True, exist_ok=True)
                (tree / place).write_bytes(data)
    with tarfile.open(out / "peers.tar.xz", "w:xz", preset=5) as archive:
        archive.add(tree, arcname=".")
    shutil.rmtree(tree)
    size = (out / "peers.tar.xz").stat().st_size
    print(f"{out / 'peers.tar.xz'}: {size / 1e6:.1f} MB")


# ---------------------------------------------------------------- SonicMoE's kernels, ahead


def products(config: Any, tensors: Any) -> Iterator[Any]:
    """All products of a layer's forward and backward with one tile, on tensors without memory."""
    import quack.gemm_interface as library

    gated, plain, dgated = (
        getattr(library, f"gemm_{kind}").fn for kind in ("gated_tuned", "tuned", "dgated_tuned")
    )
    t = tensors
    rows = {"cu_seqlens_m": t["ends"], "config": config}
    gather = {"cu_seqlens_k": t["ends"], "A_idx": t["source"], "config": config}
    up, down = t["gate_up"].permute(1, 2, 0), t["down"].permute(1, 2, 0)
    if config.tile_n % 32 == 0:
        for pre in (t["pre"], None):
            yield lambda pre=pre: gated(
                t["x"], up.permute(2, 1, 0), pre, t["act"], activation="swiglu", A_idx=t["source"],
                **rows,
            )  # fmt: skip
    yield lambda: plain(t["act"], down.permute(2, 1, 0), t["y"], **rows)
    yield lambda: plain(t["pre"], up.permute(2, 0, 1), t["y"], **rows)
    if config.tile_n != 208:  # the gathered ones refuse it
        yield lambda: dgated(
            t["x"], down.permute(2, 0, 1), t["pre"], t["pre"], t["act"], t["scale"], "swiglu",
            True, A_idx=t["source"], dynamic_scheduler=False, **rows,
        )  # fmt: skip
        yield lambda: plain(t["x"].T, t["act"], down.permute(2, 0, 1), **gather)
        yield lambda: plain(t["x"].T, t["pre"], up.permute(2, 1, 0), **gather)


def make_tensors() -> dict[str, Any]:
    """A layer's tensors; no kernel depends on the sizes."""
    import torch

    tokens, picks, experts, width, inner = 1024, 8, 128, 2048, 768
    slots = tokens * picks
    shapes: dict[str, tuple[int, ...]] = {
        "x": (tokens, width), "gate_up": (experts, 2 * inner, width),
        "down": (experts, width, inner), "pre": (slots, 2 * inner), "act": (slots, inner),
        "y": (slots, width), "scale": (slots,), "ends": (experts + 1,), "source": (slots,),
    }  # fmt: skip
    dtypes = {"scale": torch.float32, "ends": torch.int32, "source": torch.int32}
    return {
        name: torch.empty(shape, dtype=dtypes.get(name, torch.bfloat16), device="cuda")
        for name, shape in shapes.items()
    }


def compile_sonic(out: Path) -> None:
    """Every kernel into `out`/kernels.tar.xz, for any machine with the same libraries."""
    folder = out / "kernels"
    os.environ.update(QUACK_ARCH="sm_90", CUTE_DSL_ARCH="sm_90a", QUACK_CACHE_DIR=str(folder))
    import quack.cache_utils as cache
    import quack.gemm_interface as library
    from peer_sonic import is_wanted
    from torch._subclasses.fake_tensor import FakeTensorMode

    cache.COMPILE_ONLY = True
    cache._compute_source_fingerprint = lambda: "any"
    cache._key_to_hash = lambda key: hashlib.sha256(repr(key).encode()).hexdigest()
    configs = [c.kwargs["config"] for c in library.gemm_tuned.configs]
    with FakeTensorMode():
        tensors = make_tensors()
        for config in filter(is_wanted, configs):
            for call in products(config, tensors):
                try:
                    call()
                except Exception:  # the first of a process fails where there is no driver
                    call()
            done = len(list(folder.rglob("*.o")))
            print(config.tile_m, config.tile_n, config.pingpong, done, "kernels", flush=True)
    with tarfile.open(out / "kernels.tar.xz", "w:xz") as archive:
        for file in folder.rglob("*.o"):
            archive.add(file, arcname=file.name)


def install(out: Path, into: Path) -> None:
    """Unpack on the GPU machine; print the shell's exports."""
    with tarfile.open(out / "peers.tar.xz") as archive:
        archive.extractall(into, filter="data")
    paths = [into / "site", into / "site" / DSL, into / "dg"]
    sys.path[:0] = list(map(str, paths[:2]))
    if (out / "kernels.tar.xz").exists():
        import quack.cache_utils as cache

        with tarfile.open(out / "kernels.tar.xz") as archive:
            archive.extractall(into / "quack" / cache._compute_source_fingerprint(), filter="data")
    joined = ":".join([*map(str, paths), os.environ.get("PYTHONPATH", "")])
    print(f"export PYTHONPATH={joined} QUACK_CACHE_DIR={into / 'quack'}")


def main() -> None:
    """Pack, compile or install."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("pack", "compile", "install"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the archives")
    parser.add_argument("--wheels", type=Path, help="folder with the wheels (default: download)")
    parser.add_argument("--into", type=Path, default=Path("/tmp/peers"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.step == "install":
        install(args.out, args.into)
    elif args.step == "compile":
        compile_sonic(args.out)
    else:
        wheels = args.wheels or args.out / "wheels"
        if args.wheels is None:
            download(wheels)
        pack(wheels, args.out)


if __name__ == "__main__":
    main()
