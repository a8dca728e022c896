"""What is shipped builds: the archive of the source is whole, and setup.py finds the toolkit that fits torch."""

import os
import shutil
import site
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what the repository holds, so that nothing is built beside the sources of others."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, folder)
    for name in ("csrc", "fastif"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    done = run(sys.executable, "setup.py", "-q", "sdist", "-d", folder, cwd=source, FASTIF_CUDA="0")
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    return archive


def test_source_archive_holds_every_source(source, sdist):
    with tarfile.open(sdist) as archive:
        shipped = {str(Path(*Path(name).parts[1:])) for name in archive.getnames()}
    wanted = {str(file.relative_to(source)) for folder in ("csrc", "fastif") for file in (source / folder).rglob("*.*")}
    assert wanted
    assert wanted - shipped == set()


@pytest.mark.slow
def test_install_from_the_source_archive(sdist, tmp_path):
    # Without pip: the setuptools that comes with it is too old, and would be found first.
    assert run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv").returncode == 0
    python = tmp_path / "venv" / "bin" / "python"
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (packages / "torch_and_build_tools.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    done = run(python, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", sdist, FASTIF_CUDA="0")
    assert done.returncode == 0, done.stderr[-3000:]
    code = "import fastif; info = fastif.build_info(); print(fastif.__file__, info['compiled'])"
    done = run(python, "-c", code, cwd=tmp_path, PYTHONPATH="")
    assert done.stdout.split() == [str(packages / "fastif" / "__init__.py"), "True"], done.stderr


NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
  --dryrun) echo '#$ _HERE_={toolkit}/bin' >&2; echo '#$ TOP={toolkit}/bin/..' >&2 ;;
esac
"""

TORCH = """
__version__ = "2.13.0+cu130"
class version:
    cuda = "13.0"
class cuda:
    is_available = staticmethod(lambda: False)
"""

CPP_EXTENSION = """
import os
from types import SimpleNamespace
CUDA_HOME = os.environ.get("CUDA_HOME")
def CppExtension(name, sources, **options):
    return SimpleNamespace(name=name)
def CUDAExtension(name, sources, **options):
    print("CUDA extension", CUDA_HOME, os.environ["TORCH_CUDA_ARCH_LIST"])
    return SimpleNamespace(name=name, libraries=["cudart", "c10_cuda"], library_dirs=[], extra_link_args=[])
class BuildExtension:
    pass
"""


@pytest.fixture
def machine(source, tmp_path):
    """Runs setup.py where torch is a stand-in built for CUDA 13.0, and where only the toolkits made here are found."""
    packages = tmp_path / "packages"
    (packages / "torch" / "utils").mkdir(parents=True)
    (packages / "torch" / "__init__.py").write_text(TORCH)
    (packages / "torch" / "utils" / "__init__.py").touch()
    (packages / "torch" / "utils" / "cpp_extension.py").write_text(CPP_EXTENSION)
    bare = tmp_path / "bin"
    bare.mkdir()

    class Machine:
        path, pip = bare, packages / "nvidia" / "cu13"

        @staticmethod
        def add_toolkit(toolkit: Path, version: str, nvcc: Path | None = None) -> Path:
            """Makes a toolkit with pip's layout, whose nvcc may be called by a script elsewhere."""
            nvcc = nvcc or toolkit / "bin" / "nvcc"
            for folder in (toolkit / "bin", toolkit / "lib", nvcc.parent):
                folder.mkdir(parents=True, exist_ok=True)
            (toolkit / "lib" / "libcudart.so.13").touch()
            nvcc.write_text(NVCC.format(version=version, toolkit=toolkit))
            nvcc.chmod(0o755)
            return toolkit

        @staticmethod
        def build(**environment: str) -> subprocess.CompletedProcess:
            # The choice is made before setup() is called; a toolkit of this machine must not be seen.
            code = (
                "import pathlib, setuptools\n"
                "setuptools.setup = lambda ext_modules, options, **_: "
                "print(*map(vars, ext_modules), f'options {options}', sep='\\n')\n"
                "text = pathlib.Path('setup.py').read_text().replace('/usr/local/cuda/bin/nvcc', '/nowhere/nvcc')\n"
                "exec(compile(text, str(pathlib.Path('setup.py').resolve()), 'exec'), {'__file__': 'setup.py'})"
            )
            environment = {"PATH": f"{bare}:/bin", "PYTHONPATH": str(packages), "FASTIF_CUDA": "auto", **environment}
            environment.setdefault("CUDA_HOME", "")
            return run(sys.executable, "-c", code, cwd=source, **environment)

    return Machine()


def test_setup_finds_pips_toolkit_and_lets_it_link(machine, source):
    toolkit = machine.add_toolkit(machine.pip, "13.0")
    said = machine.build()
    assert said.returncode == 0, said.stderr
    assert f"CUDA extension {toolkit} 8.0;9.0;10.0+PTX" in said.stdout
    assert "'libraries': ['cudart', 'c10_cuda'], 'library_dirs': ['" in said.stdout
    assert (source / "build" / "cudart" / "libcudart.so").resolve() == toolkit / "lib" / "libcudart.so.13"


def test_the_cuda_runtime_is_linked_in_where_the_toolkit_has_it(machine):
    toolkit = machine.add_toolkit(machine.pip, "13.0")
    (toolkit / "lib" / "libcudart_static.a").touch()
    said = machine.build().stdout
    assert f"'libraries': ['c10_cuda'], 'library_dirs': ['{toolkit / 'lib'}']" in said
    assert "-lcudart_static" in said


def test_what_is_built(machine):
    machine.add_toolkit(machine.pip, "13.0")
    names = [line.split("'")[3] for line in machine.build().stdout.splitlines() if line.startswith("{")]
    assert names == ["fastif._C", "fastif._C_cuda", "fastif._memory"]
    both = machine.build(FASTIF_MEMORY="0").stdout
    assert "options {'bdist_wheel': {'py_limited_api': 'cp310'}}" in both
    assert "_memory" not in both
    alone = machine.build(FASTIF_CUDA="0", FASTIF_MEMORY="0").stdout
    assert [line for line in alone.splitlines() if line.startswith("{")] == ["{'name': 'fastif._C'}"]


def test_setup_finds_the_toolkit_behind_a_script_on_path(machine, tmp_path):
    toolkit = machine.add_toolkit(tmp_path / "elsewhere", "13.1", nvcc=machine.path / "nvcc")
    assert f"CUDA extension {toolkit}" in machine.build().stdout


def test_setup_builds_for_the_cpu_where_nvcc_has_another_major_version(machine, tmp_path):
    machine.add_toolkit(tmp_path / "old", "12.4", nvcc=machine.path / "nvcc")
    said = machine.build()
    assert said.returncode == 0, said.stderr
    assert "building for CPU, torch" in said.stdout
    assert said.stdout.count("no CUDA kernels will be built") == 1
    assert "CUDA 13" in said.stdout
    assert f"12.4 in {tmp_path / 'old'}" in said.stdout
    forced = machine.build(FASTIF_CUDA="1")
    assert forced.returncode == 1
    assert "FASTIF_CUDA=1, but this machine lacks an nvcc of CUDA 13" in forced.stderr


def test_a_build_without_a_compiler_says_what_to_install(source, tmp_path):
    (tmp_path / "bin").mkdir()
    environment = {"PATH": str(tmp_path / "bin"), "FASTIF_CUDA": "0", "CXX": ""}
    done = run(sys.executable, "setup.py", "-q", "build_ext", "-b", tmp_path, cwd=source, **environment)
    assert done.returncode == 1
    assert done.stderr.count("no C++ compiler was found (c++): install one") == 1
    assert "FASTIF_PLAIN=1" in done.stderr


def test_a_build_in_place_leaves_no_older_library(source, tmp_path):
    """Python would take the one of the longer name, whatever it was built from."""
    older = source / "fastif" / "_C.cpython-39-other.so"
    older.touch()
    run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=source, FASTIF_CUDA="0", CXX="false")
    assert not older.exists()


def test_setup_takes_the_toolkit_that_fits_among_several(machine, tmp_path):
    machine.add_toolkit(tmp_path / "old", "12.4", nvcc=machine.path / "nvcc")
    toolkit = machine.add_toolkit(machine.pip, "13.0")
    assert f"CUDA extension {toolkit}" in machine.build().stdout
    assert "building for CPU, torch" in machine.build(CUDA_HOME=str(tmp_path / "old")).stdout
    assert "building for CPU, torch" in machine.build(FASTIF_CUDA="0").stdout
    assert "must be 0, 1 or auto, got 'yes'" in machine.build(FASTIF_CUDA="yes").stderr
