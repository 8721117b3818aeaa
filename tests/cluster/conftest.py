import pytest

from deployments.serve_config import NAME_VARIABLE, PORT_VARIABLE


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch):
    for name in (PORT_VARIABLE, NAME_VARIABLE):
        monkeypatch.delenv(name, raising=False)
