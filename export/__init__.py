"""Engines: the whole sampler as one ONNX graph, with the network beside it. Nothing here is imported by `import fastdiff`."""
