"""TensorRT for RTX parses the exports and builds engines from them, which it does without a GPU; running them needs one."""

import pytest

import fastdiff as fd

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (the extra `rtx`)")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def traced(tiny_denoiser):
    from fastdiff.export.network import trace

    return trace(tiny_denoiser, target="tensorrt")


def build(model, batches=(1, 2, 4)):
    """The bytes of an engine of a model, every input with a batch of 1, 2 or 4."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        if -1 in tuple(tensor.shape):
            profile.set_shape(tensor.name, *(tuple(b if d == -1 else d for d in tensor.shape) for b in batches))
    config.add_optimization_profile(profile)
    return builder.build_serialized_network(network, config)


@pytest.mark.parametrize("solver, guided, unroll", [
    ("unipc-2", False, False), ("euler-ancestral", True, False), ("dpmpp-2m", True, True),
])  # fmt: skip
def test_an_engine_is_built(solver, guided, unroll, traced, tiny_denoiser):
    from fastdiff.export.sampler import contrast_of, sampler_model

    contrast = None
    if guided:
        import torch

        contrast = contrast_of(fd.guide.cfg(tiny_denoiser.bind(class_labels=torch.zeros(1, dtype=torch.long)), 2.0))
    model, _ = sampler_model(traced, fd.plan(solver, tiny_denoiser, 4), contrast, unroll)
    engine = build(model)
    assert engine is not None and engine.nbytes > 10_000
