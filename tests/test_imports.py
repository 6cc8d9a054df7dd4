"""Who imports whom, and what `import fastdiff` costs."""

import ast
import inspect
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import fastdiff as fd

PACKAGE = Path(fd.__file__).parent
HEAVY = ("triton", "onnx", "onnxruntime", "diffusers", "matplotlib", "PIL", "sklearn", "scipy", "tensorrt")

# From the bottom up: a part imports its own layer and those above it in this list. A new part goes where it belongs.
LAYERS = [
    {"errors"}, {"files", "parallel", "resume", "philox", "scalars"}, {"shipped", "streaming"}, {"schedule"},
    {"prediction", "grid", "coeffs"},
    {"plans", "program"}, {"solvers", "reference"}, {"kernels"}, {"ops"},
    {"noise", "denoiser"}, {"fused"}, {"guide", "sampling", "brownian", "pairs"},
    {"adaptive", "models", "compiled", "graph", "patching", "variants"},
    {"checkpoints"},
    {"metrics"}, {"training", "tasks", "compat"}, {"bench"}, {"distill", "tuning"}, {"export"}, {"cli"}, {"__main__"},
]  # fmt: skip
RANK = {part: i for i, layer in enumerate(LAYERS) for part in layer}
NO_TORCH = ("coeffs", "grid", "plans", "program", "reference", "solvers")
UPWARD = {("checkpoints.onnx", "export")}  # an exported engine is a checkpoint too; imported lazily


def modules():
    """(dotted name below fastdiff, syntax tree) of every file, kernels and export through their links."""
    for folder in (PACKAGE, *(p for p in PACKAGE.rglob("*") if p.is_dir()), PACKAGE / "kernels", PACKAGE / "export"):
        for path in sorted(folder.glob("*.py")):
            parts = path.relative_to(PACKAGE).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), parts, ast.parse(path.read_text())


TREES = {name: (parts, tree) for name, parts, tree in modules()}


def imports(name):
    """Absolute dotted names of everything a module imports, inside functions and for type checking too."""
    parts, tree = TREES[name]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ["fastdiff", *parts[: len(parts) - node.level]] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def inside(name):
    """The parts of fastdiff (first names) that a module imports; "" for the package's own face."""
    for target in imports(name):
        if target == "fastdiff" or target.startswith("fastdiff."):
            part = target.split(".")[1] if "." in target else ""
            yield part if part in RANK else ""


def test_the_walk_sees_the_package():
    assert {"plans", "solvers.registry", "cli.main", "checkpoints.native"} <= set(TREES)
    assert "plans" in set(inside("solvers.registry")) and "checkpoints" in set(inside("cli.sample"))


@pytest.mark.parametrize("name", [n for n in TREES if n])
def test_imports_point_down(name):
    part = name.split(".")[0]
    assert part in RANK, f"{part} is new: put it into LAYERS where it belongs"
    for target in set(inside(name)) - {""}:
        if (name, target) not in UPWARD:
            assert RANK[target] <= RANK[part], f"{name} imports {target}, which lies above it"
    if part not in ("cli", "bench"):
        assert "" not in set(inside(name)), f"{name} imports the package's own face"


@pytest.mark.parametrize("name", [n for n in TREES if n.split(".")[0] in NO_TORCH])
def test_plans_and_solvers_are_free_of_torch(name):
    assert not [t for t in imports(name) if t.split(".")[0] == "torch"]


def test_only_ops_imports_kernels_and_only_the_edge_imports_export():
    for name in TREES:
        part = name.split(".")[0]
        if part not in ("ops", "kernels"):
            assert "kernels" not in set(inside(name)), name
        if part not in ("cli", "export") and name != "checkpoints.onnx":
            assert "export" not in set(inside(name)), name


def test_nothing_imports_a_bare_kernels_or_export():
    for name in TREES:
        assert not [t for t in imports(name) if t.split(".")[0] in ("kernels", "export")], name


def test_no_public_function_bears_the_name_of_a_module():
    stems = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or p.is_dir()}
    for name in fd.__all__:
        assert inspect.ismodule(getattr(fd, name)) == (name in stems), name


def test_heavy_packages_are_imported_inside_commands():
    """Neither the package nor the command line pulls them in; a control shows that the look would find them."""
    code = (
        "import sys, fastdiff, fastdiff.cli.main\n"
        f"print([m for m in {HEAVY} if m in sys.modules])\n"
        "import PIL\n"
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "['PIL']"]


def test_import_time():
    """Under 1.5 times that of torch alone, by processor time, which other processes do not stretch."""
    times = {"torch": [], "fastdiff": []}
    for _ in range(3):
        for module, seen in times.items():
            code = f"import time; a = time.process_time(); import {module}; print(time.process_time() - a)"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            seen.append(float(done.stdout))
    torch_time, ours = (statistics.median(seen) for seen in times.values())
    assert ours < 1.5 * torch_time, f"import fastdiff takes {ours:.2f} s, import torch {torch_time:.2f} s"
