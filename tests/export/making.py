"""Engines of tiny checkpoints for tests."""

import torch

import fastdiff as fd


def make(checkpoint, out, solver="unipc-2", nfe=5, guidance=1.0, names=("round", "square", "T-bar"), form="onnx", **wish):
    from fastdiff.export.folder import Wish, export

    den = fd.load(checkpoint)
    if guidance != 1.0:
        den = fd.guide.cfg(den.bind(class_labels=torch.zeros(1, dtype=torch.long)), guidance)
    export(den, fd.plan(solver, den, nfe), out, Wish(class_names=names, **wish), form)
    return out
