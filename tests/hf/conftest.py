from tests.launch.conftest import mfjax  # noqa: F401 - a fixture.
