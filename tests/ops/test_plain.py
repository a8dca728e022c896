"""Without the compiled extension every op works as plain torch, and one warning says so."""

import importlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastif.ops import _library, build_info
from fastif.ops import per_sample_grad as psg
from tests.ops import test_factor_dots
from tests.ops.test_farthest_first import BAD as BAD_FARTHEST_FIRST
from tests.ops.test_farthest_first import GOOD as GOOD_FARTHEST_FIRST

ff = importlib.import_module("fastif.ops.farthest_first")  # the package's names of these are the functions
fd = importlib.import_module("fastif.ops.factor_dots")
gb = importlib.import_module("fastif.ops.ggn_block")
ROOT = Path(__file__).parents[2]


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_every_op_test_passes_in_plain_torch():
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        + [
            str(ROOT / "tests" / "ops" / f"test_{name}.py")
            for name in (
                "factor_dots",
                "farthest_first",
                "farthest_first_clouds",
                "ggn_block",
                "kronecker_block",
                "per_sample_grad",
                "contracts",
                "outs",
            )
        ],
        env={**os.environ, "FASTIF_PLAIN": "1"},
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:]


def test_absent_extension_warns_once_and_says_what_to_do():
    code = (
        "import sys, warnings; sys.modules['fastif._C'] = None\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always'); import fastif, torch; fastif.ops.farthest_first(torch.eye(3), 2)\n"
        "print([str(w.message) for w in caught if 'fastif' in str(w.message)], fastif.build_info()['compiled'])"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("fastif._C could not be loaded") == 1
    assert "pip install --no-build-isolation" in result.stdout
    assert result.stdout.strip().endswith("False")


def test_the_warning_stands_at_the_users_import(tmp_path):
    (tmp_path / "users.py").write_text("import sys\nsys.modules['fastif._C'] = None\nimport fastif\n")
    result = python(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport users")
    assert f"{tmp_path / 'users.py'}:3: UserWarning: fastif: fastif._C could not be loaded" in result.stderr


@pytest.mark.skipif(not build_info()["compiled"], reason="the extension is not compiled")
def test_schemas_are_those_of_the_extension():
    for name, schema in _library.SCHEMAS.items():
        compiled = getattr(torch.ops.fastif, name).default._schema
        assert str(compiled) == str(torch._C.parse_schema(f"fastif::{name}{schema}"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plain_formulations_agree_with_the_kernels(dtype):
    g = torch.Generator().manual_seed(0)
    points = torch.randn(50, 40, generator=g, dtype=dtype)
    mask, start, both = torch.arange(50) % 7 > 0, torch.tensor([2, 5]), torch.stack([points, 2 * points])
    for given in (
        (points, 9, start),
        (points, 9, start, None, mask, 7.0),
        (both, 9, start.expand(2, 2), torch.tensor([9, 3]), mask.expand(2, 50)),
    ):
        for mine, kernels in zip(ff._plain(*given), torch.ops.fastif.farthest_first(*given), strict=True):
            assert torch.equal(mine, kernels)
    probs, weights = torch.randn(50, 4, generator=g, dtype=dtype).softmax(1), torch.rand(50, generator=g, dtype=dtype)
    out = points.new_zeros(4, 40, 4, 40)
    gb._plain(out, points, probs, weights)
    assert torch.allclose(out, gb.ggn_block(points, probs, weights), rtol=1e-4, atol=1e-5)
    outer = probs[:, :, None] * probs[:, None, :]
    gb._kronecker_plain(out.zero_(), points, outer)
    assert torch.allclose(out, gb.kronecker_block(points, outer), rtol=1e-4, atol=1e-5)
    a, u = torch.randn(9, 3, 6, generator=g, dtype=dtype), torch.randn(9, 3, 4, generator=g, dtype=dtype)
    v, groups = torch.randn(2, 4, 6, generator=g, dtype=dtype), torch.arange(9) % 2
    close = {"rtol": 1e-4, "atol": 1e-5}
    assert torch.allclose(psg._sq_norms_plain(a, u), psg.sq_norms(a, u), **close)
    assert torch.allclose(psg._sq_norms_plain(a, u, v[0].abs()), psg.sq_norms(a, u, v[0].abs()), **close)
    squares = psg._accumulate_squares_plain(a, u, weights[:9])
    assert torch.allclose(squares, psg.accumulate_squares(a, u, weights[:9]), **close)
    assert torch.allclose(psg._dots_plain(a, u, v), psg.dots(a, u, v), **close)
    assert torch.allclose(
        psg._accumulate_plain(a, u, weights[:9], groups, 2), psg.accumulate(a, u, weights[:9], groups, 2), **close
    )


@pytest.mark.parametrize("along", [False, True])
def test_plain_factor_dots_agree_with_the_kernel(along):
    given = test_factor_dots.problem(70, 3, 20, 130, 3) | (test_factor_dots.two_parts(3, 20, 130, 5) if along else {})
    mine = fd._plain(**given)
    errors = test_factor_dots.error_bound(**given)
    assert ((mine - fd.factor_dots(**given)).abs() <= 2 * errors).all()


@pytest.mark.skipif(not build_info()["compiled"], reason="the extension is not compiled")
@pytest.mark.parametrize(("given", "error", "message"), test_factor_dots.BAD)
def test_factor_dots_says_the_same_words(given, error, message):
    messages = []
    for call in (fd._plain, torch.ops.fastif.factor_dots):
        with pytest.raises(error) as caught:
            _library.run(call, **test_factor_dots.GOOD | given)
        messages.append(str(caught.value).splitlines()[0])
    assert messages[0] == messages[1]


def test_plain_checks_say_what_the_compiled_ones_say():
    """The same words on both routes, for one wrong input of each kind."""
    calls = [
        (psg._sq_norms_plain, torch.ops.fastif.per_sample_grad_sq_norms, (torch.ones(2, 1, 3), torch.ones(2, 2, 3))),
        (
            psg._sq_norms_plain,
            torch.ops.fastif.per_sample_grad_sq_norms,
            (torch.ones(2, 1, 3) / 0, torch.ones(2, 1, 3)),
        ),
    ]
    ones, squares = torch.ones(2, 1, 3), torch.ops.fastif.per_sample_grad_accumulate_squares
    norms = torch.ops.fastif.per_sample_grad_sq_norms
    calls += [
        (psg._sq_norms_plain, norms, (ones, ones, torch.full((3, 3), -0.3))),
        (psg._sq_norms_plain, norms, (ones, ones, torch.ones(3, 2))),
        (psg._sq_norms_plain, norms, (ones * 1e30, ones)),
        (psg._sq_norms_plain, norms, (ones.int(), ones)),
        (psg._accumulate_squares_plain, squares, (ones.half(), ones.half(), torch.ones(2, dtype=torch.float16))),
        (psg._accumulate_squares_plain, squares, (ones, ones, torch.ones(2, device="meta"))),
    ]
    for plain, op, args in calls:
        messages = []
        for call in (plain, op):
            with pytest.raises((ValueError, TypeError), match=":") as caught:
                _library.run(call, *args)
            messages.append(str(caught.value).splitlines()[0])
        assert messages[0] == messages[1]


def test_blocks_say_the_same_words():
    """What is wrong with an out, on both routes; those of contiguous negative views never meet a kernel of torch's."""
    x, probs, outer, w = torch.ones(3, 2), torch.full((3, 4), 0.25), torch.ones(3, 4, 4), torch.ones(3)
    shared = torch.zeros(64)
    with torch.inference_mode():
        inferred = torch.zeros(4, 2, 4, 2)
    freed = torch.zeros(4, 2, 4, 2)
    freed.untyped_storage().resize_(12)
    outs = {
        "a negative view": torch._neg_view(torch.zeros(4, 2, 4, 2)),
        "bytes between the ends": shared.view(4, 2, 4, 2),
        "an inference tensor": inferred,
        "require grad": torch.zeros(4, 2, 4, 2, requires_grad=True),
        "bytes of storage, got 12": freed,
        "finite, row 2": torch.zeros(4, 2, 4, 2).index_fill_(0, torch.tensor(2), torch.nan),
        "out| is 3.1e+38": torch.full((4, 2, 4, 2), -3.1e38),
    }
    for words, out in outs.items():
        features = shared[:6].view(3, 2) if "ends" in words else x
        for mine, op, inputs in (
            (gb._plain, torch.ops.fastif.ggn_block_, (features, probs, w)),
            (gb._kronecker_plain, torch.ops.fastif.kronecker_block_, (features, outer)),
        ):
            messages = []
            for call in (mine, op):
                with pytest.raises(ValueError, match="block: ") as caught:
                    _library.run(call, out, *inputs)
                messages.append(str(caught.value).splitlines()[0])
            assert messages[0] == messages[1]
            assert words in messages[0]


@pytest.mark.parametrize("given", [given for given, *_ in BAD_FARTHEST_FIRST], ids=[m for *_, m in BAD_FARTHEST_FIRST])
def test_farthest_first_says_the_same_words(given):
    messages = []
    for call in (ff._plain, torch.ops.fastif.farthest_first):
        with pytest.raises((ValueError, TypeError)) as caught:
            _library.run(call, **(GOOD_FARTHEST_FIRST | given))
        messages.append(str(caught.value).splitlines()[0])
    assert messages[0] == messages[1]


def test_build_info_says_what_was_built():
    info = build_info()
    assert {"fastif", "compiled", "cuda", "isa", "torch", "cuda_device", "threads"} == set(info)
    if info["compiled"]:
        assert info["isa"] in ("avx512", "avx2", "generic")


def import_with(modules: dict[str, bytes], tmp_path: Path, code: str) -> str:
    """What `code` says, which imports fastif, where compiled modules are these bytes; others are as built."""
    package = tmp_path / "fastif"
    shutil.copytree(ROOT / "fastif", package, ignore=shutil.ignore_patterns("__pycache__"))
    for module, content in modules.items():
        for built in package.glob(f"{module}.*"):
            built.unlink()
        (package / f"{module}{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(content)
    result = subprocess.run(
        [sys.executable, "-c", f"import torch\n{code}"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,  # the folder of a command comes before PYTHONPATH
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stderr + result.stdout


@pytest.mark.skipif(not build_info()["compiled"], reason="the extension is not compiled")
@pytest.mark.parametrize("kept", [None, 40, 100_000, -1])
def test_a_broken_extension_is_named_and_plain_torch_runs(tmp_path, kept):
    """Another file, or the first bytes of a whole one, which end the process where they are loaded."""
    content = b"half a library" if kept is None else Path(_library._kernels.__file__).read_bytes()[:kept]
    code = "import fastif; fastif.ops.farthest_first(torch.eye(3), 2); print(fastif.build_info()['compiled'])"
    said = import_with({"_C": content}, tmp_path, code)
    assert said.endswith("False\n")
    assert said.count("UserWarning: fastif:") == 1
    assert "fastif._C could not be loaded" in said
    assert "pip install --no-build-isolation" in said


@pytest.mark.skipif(not build_info()["compiled"], reason="the extension is not compiled")
@pytest.mark.parametrize("content", [b"no library\0fastif was built for torch 2.5.1\0", b""], ids=["another", "empty"])
def test_a_counter_for_another_torch_is_left_alone(tmp_path, content):
    """Loading it would end in "invalid ELF header"; with a real one, in the end of the process."""
    code = "import fastif; from fastif.measure import MEMORY_BY; print(fastif.build_info()['compiled'], MEMORY_BY)"
    said = import_with({"_memory": content}, tmp_path, code)
    assert said == "True resident set\n"


@pytest.mark.skipif(not build_info()["compiled"], reason="the extension is not compiled")
@pytest.mark.parametrize("there", ["13.0", None])
def test_cuda_kernels_for_another_cuda_are_not_loaded(tmp_path, there):
    code = (
        f"torch.version.cuda = {there!r}\nfrom fastif.ops import _library\n"
        "print([module is not None for module in (_library._kernels, _library._cuda_kernels)])"
    )
    said = import_with({"_C_cuda": b"no library\0fastif was built for CUDA 12\0"}, tmp_path, code)
    assert said.endswith("[True, False]\n")
    assert ("the CUDA kernels were built for CUDA 12, and this torch has CUDA 13" in said) == (there is not None)
    assert "ELF" not in said


@pytest.mark.parametrize("kind", [ValueError, TypeError, MemoryError])
def test_the_kind_of_an_error_stands_before_its_text(kind):
    """torch 2.15 makes a RuntimeError of every exception of a kernel."""

    def kernel(text):
        raise RuntimeError(text)

    with pytest.raises(kind) as caught:
        _library.run(kernel, f"{kind.__name__}: op: rule: 3")
    assert str(caught.value) == "op: rule: 3"
    with pytest.raises(RuntimeError, match="^KeyError: of others$"):
        _library.run(kernel, "KeyError: of others")
