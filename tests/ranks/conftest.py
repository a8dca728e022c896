import pytest

from tests.helpers.crew import Crew


@pytest.fixture(scope="session")
def two():
    """Two ranks, for all tests that leave them alive."""
    made = Crew(2)
    yield made
    made.dismiss()
