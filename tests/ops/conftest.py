import pytest

from fastif import build_info


@pytest.fixture(scope="module", params=["plain", "lazy"] if build_info()["compiled"] else ["plain"])
def kernel(request):
    """Tests of farthest_first run on the kernel that reads all points for each pick, and on the lazy one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTIF_KCENTER", request.param)
        yield request.param
