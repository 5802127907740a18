"""A file imports only from lower floors; intrinsics stand only in the vocabulary headers."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "llmfp4_kernels"
FLOORS = [
    {"errors"},
    {"formats"},
    {"packed", "encode"},
    {"reference", "native", "problem", "epilogue"},
    {"layout"},
    {"backends"},
    {"registry"},
    {"ops"},
    {"nn"},
    {"embedding", "gated"},
    {"quantizer"},
    {"integrations"},
    {"evaluate", "evaluate_embeddings", "environment"},
    {"commands"},
    {"tuning"},
    {"cli"},
    {"__main__", "__init__"},
]
FLOOR_OF = {name: height for height, names in enumerate(FLOORS) for name in names}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path):
    """Parts of the package that a file imports at its top level."""
    depth = len(path.relative_to(PACKAGE).parts)
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            yield from [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    own = FLOOR_OF[part_of(path)]
    for part in imported_parts(path):
        assert FLOOR_OF[part] < own, f"{path.name} on floor {own} imports {part} on floor {FLOOR_OF[part]}"


def test_every_file_is_on_a_floor():
    assert {part_of(path) for path in PACKAGE.rglob("*.py")} <= set(FLOOR_OF)


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").rglob("*.*")), ids=lambda p: str(p.relative_to(ROOT)))
def test_intrinsics_live_in_the_vocabulary(path):
    words = ("_mm256_", "_mm512_", "__asm__", "immintrin", "__AVX", "__AMX", "arm_neon", "vld1q_", "__ARM")
    found = [word for word in words if word in path.read_text()]
    if not (path.name.startswith("simd") or path.name in ("amx.h", "dispatch.cpp")):
        assert not found, f"{path} uses {found}"


@pytest.mark.parametrize("path", sorted((ROOT / "csrc" / "cuda").glob("*.*")), ids=lambda p: p.name)
def test_cuda_instructions_live_in_the_vocabulary(path):
    words = ("asm", "__shfl", "__reduce", "__sync", "__threadfence", "__half", "__nv_", "_rn(", "_rz(", "atomic")
    found = [word for word in words if word in path.read_text()]
    assert path.name in ("device.h", "device_sm90.h", "device_sm120.h") or not found, f"{path} uses {found}"


def test_import_is_silent_and_light(tmp_path):
    import subprocess
    import sys

    code = "import sys, llmfp4_kernels; print(*[m for m in ('torch', 'transformers') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert run.stdout.strip() == "" and run.stderr == ""
