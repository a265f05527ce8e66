"""What a wheel holds, what the metadata promise, and what the repository must look like."""

from __future__ import annotations

import ast
import configparser
import importlib
import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import scaletransfer

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "scaletransfer"


def settings() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def requirements(text: str) -> list[Requirement]:
    return [Requirement(line) for line in text.splitlines() if line.strip()]


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.lower().replace("_", "-").split("==") for line in lines if line and not line.startswith("#"))


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # From a copy, since setuptools leaves build folders in the tree that it builds.
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    names = [
        ".gitignore",
        "LICENSE",
        "README.md",
        "configs",
        "launch",
        "pyproject.toml",
        "scaletransfer",
        "setup.cfg",
    ]
    subprocess.run(["cp", "-r", *names, str(source)], cwd=ROOT, check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(out), "."], cwd=source, check=True)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_configs_launch_files_and_types(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    shared = {name.partition(".data/data/share/scaletransfer/")[2] for name in names if ".data/data/" in name}
    wanted = {
        str(path.relative_to(ROOT))
        for folder in ("configs", "launch")
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    }
    assert wanted and shared == wanted
    modules = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")}
    assert modules <= set(names)
    assert "scaletransfer/py.typed" in names
    page = {f"scaletransfer/page/{name}" for name in ("index.html", "style.css", "charts.js", "page.js")}
    assert {"scaletransfer/paper_results.csv", *page} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "tools"))]


def test_an_installed_wheel_finds_its_configs(wheel, tmp_path):
    target = tmp_path / "site"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
    ]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r}); import scaletransfer; "
        "from scaletransfer.config import find_config; "
        "print(scaletransfer.__file__, find_config('configs/chexpert_bit50x1.yaml'))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    module, config = map(Path, done.stdout.split())
    assert module == target / "scaletransfer/__init__.py"
    assert config == target / "share/scaletransfer/configs/chexpert_bit50x1.yaml"


def test_lower_bounds_are_what_was_tested():
    parser, pinned = settings(), constraints()
    groups = [parser["options"]["install_requires"], *parser["options.extras_require"].values()]
    for requirement in (r for group in groups for r in requirements(group)):
        name = requirement.name.lower().replace("_", "-")
        assert name in pinned, f"{name} is not in constraints.txt"
        assert pinned[name] in requirement.specifier, f"{requirement} excludes {pinned[name]}"
        (bound,) = [clause.version for clause in requirement.specifier]
        shared = bound.split(".")[:2]
        if name != "setuptools":  # the build needs less than the tests happen to have
            assert pinned[name].split(".")[: len(shared)] == shared, f"{requirement}: tested with {pinned[name]}"


def test_torch_is_pinned_as_tested_and_its_own_libraries_are_left_to_it():
    pinned = constraints()
    assert (pinned["torch"], pinned["torchvision"]) == ("2.14.1", "0.29.1")
    assert not [name for name in pinned if name.startswith("nvidia-")]


def test_what_the_package_imports_is_declared():
    parser = settings()
    optional = {
        "deepspeed": "deepspeed",
        "timm": "timm",
        "matplotlib": "report",
        "onnx": "onnx",
        "onnxruntime": "onnx",
        "onnxscript": "onnx",
        "pytorch_grad_cam": "explain",
        "torchxrayvision": "dev",
        "pydicom": "dicom",
        "aiohttp": "s3",
    }
    declared = {r.name.lower() for r in requirements(parser["options"]["install_requires"])}
    aliases = {
        "cv2": "opencv-python-headless",
        "yaml": "pyyaml",
        "PIL": "pillow",
        "zlib_ng": "zlib-ng",
        "sklearn": "scikit-learn",
        "docstring_parser": "jsonargparse",
    }
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found = [node.module or ""]
            else:
                continue
            for name in {module.partition(".")[0] for module in found} - set(sys.stdlib_module_names):
                known = name in ("scaletransfer", *optional) or aliases.get(name, name) in declared
                assert known, f"{path.relative_to(ROOT)} imports {name}, which setup.cfg does not name"


def test_the_public_api_is_there():
    assert scaletransfer.__version__ == importlib.metadata.version("scaletransfer")
    for name in scaletransfer.__all__:
        assert getattr(scaletransfer, name) is not None
    assert scaletransfer.open_shards is importlib.import_module("scaletransfer.index").load_index
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = scaletransfer.nothing


def test_the_data_half_and_the_package_import_no_torch():
    code = (
        "import sys, scaletransfer; "
        "import scaletransfer.make_shards, scaletransfer.synthetic, scaletransfer.shards; "
        "scaletransfer.open_source; scaletransfer.load_index; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_no_file_of_the_package_is_over_400_lines():
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert lengths and not {path: length for path, length in lengths.items() if length > 400}


def test_make_help_lists_every_target():
    done = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("help", "install", "demo", "test", "slow", "soak", "lint", "clean"):
        assert f"  {target} " in done.stdout


def test_make_refuses_an_old_or_absent_python(tmp_path):
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for python, expected in ((old, "is older than Python 3.11"), ("python3.0", "was not found")):
        done = subprocess.run(
            ["make", "install", f"PYTHON={python}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode != 0 and expected in done.stderr
        assert not (tmp_path / ".venv").exists()
