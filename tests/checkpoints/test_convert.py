"""`fastdiff convert`: pickles become safetensors, in a process of their own and only when they are trusted."""

import pickle
import sys
import types

import make_malformed
import peer_networks
import torch

import fastdiff as fd


def persistent_pickle(path, weights, monkeypatch):
    """What NVIDIA's torch_utils.persistence writes: its own reconstructor, called on {module source, class, state}."""
    module = types.ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("the source in the pickle must not be run")

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", module)

    class Module:
        def __init__(self, name, parameters, modules):
            self.name, self.parameters, self.modules = name, parameters, modules

        def __reduce__(self):
            state = {"_parameters": self.parameters, "_buffers": {}, "_modules": self.modules, "training": False}
            meta = {"type": "class", "version": 6, "module_src": "raise SystemExit(3)", "class_name": self.name, "state": state}
            return _reconstruct_persistent_obj, (meta,)

    def tree(found, name):
        own = {k: torch.nn.Parameter(v) for k, v in found.items() if "." not in k}
        children = {k.split(".", 1)[0] for k in found if "." in k}
        below = {c: {k.split(".", 1)[1]: v for k, v in found.items() if k.startswith(f"{c}.")} for c in sorted(children)}
        return Module(name, own, {c: tree(below[c], "Linear") for c in below})

    with open(path, "wb") as f:
        pickle.dump({"ema": tree({f"model.{k}": v for k, v in weights.items()}, "EDMPrecond"), "loss_fn": None}, f)


def test_an_edm_pickle(fastdiff, tmp_path, monkeypatch):
    case = peer_networks.cases()["edm ddpm++"]
    path = tmp_path / "edm.pkl"
    persistent_pickle(path, peer_networks.weights(case["weights"]), monkeypatch)
    code, _, err = fastdiff("convert", path)
    assert code == 2 and "--trust-pickle" in err and not path.with_suffix(".safetensors").exists()
    code, _, err = fastdiff("convert", path, "--trust-pickle")
    assert code == 0, err
    den = fd.load(path.with_suffix(".safetensors"))
    with torch.no_grad():
        found = den.network(peer_networks.image([2, 3, 8, 8]), torch.tensor([-0.7, 0.9]))
    assert peer_networks.error(found, case) < 1e-5 and den.prediction == "edm"


def test_a_pickle_with_code_runs_only_when_trusted(fastdiff, tmp_path):
    torch.save({"state_dict": {"w": torch.ones(2)}, "callbacks": make_malformed.Bomb(tmp_path / "ran")}, tmp_path / "a.ckpt")
    code, _, err = fastdiff("convert", tmp_path / "a.ckpt")
    assert code == 2 and "trust-pickle" in err and not (tmp_path / "ran").exists()
    assert list(tmp_path.glob("*.safetensors")) == []
    assert fastdiff("convert", tmp_path / "a.ckpt", "--trust-pickle")[0] == 0 and (tmp_path / "ran").exists()
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "a.safetensors")["w"], torch.ones(2))


def test_plain_weights_need_no_trust_and_nothing_is_overwritten(fastdiff, tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    assert fastdiff("convert", tmp_path / "a.pt")[0] == 0
    code, _, err = fastdiff("convert", tmp_path / "a.pt")
    assert code == 2 and "new .safetensors" in err
    (tmp_path / "b.pkl").write_bytes(b"\x80\x04no pickle")
    code, _, err = fastdiff("convert", tmp_path / "b.pkl", "--trust-pickle")
    assert code == 2 and len(err.splitlines()) == 1 and not (tmp_path / "b.safetensors").exists()
