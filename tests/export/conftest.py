"""Engines need the packages of the extra `onnx`; without them these tests are skipped, with the reason."""

import importlib.util

import pytest

MISSING = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]


def pytest_collection_modifyitems(items):
    for item in items:
        if MISSING and "tests/export" in str(item.path) and not item.path.name.startswith(("test_table", "test_missing")):
            item.add_marker(pytest.mark.skip(reason=f"not installed: {', '.join(MISSING)} (the extra `onnx`)"))


@pytest.fixture(scope="session")
def tiny_denoiser():
    import tiny

    import fastdiff as fd

    net = tiny.network(channel_mult=[1, 2], attention=[2])  # with attention and resampling: every kind of layer there is
    return fd.Denoiser(net, fd.schedule.vp_cosine(), "v", shape=(1, 8, 8), time=lambda t: 1000 * t)


@pytest.fixture(scope="session")
def tiny_traced(tiny_denoiser):
    from fastdiff.export.network import trace

    return trace(tiny_denoiser)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, tiny_denoiser):
    import tiny

    return tiny.checkpoint(tmp_path_factory.mktemp("checkpoint") / "a.safetensors", tiny_denoiser.network)


@pytest.fixture
def traced_once(monkeypatch, tiny_traced):
    """Exports of the tiny checkpoint take its network as it was traced before, for tests of what comes after."""
    from dataclasses import replace

    from fastdiff.export import network

    monkeypatch.setattr(network, "trace", lambda denoiser, *_: replace(tiny_traced, denoiser=denoiser))
