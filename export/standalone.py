"""Images from the engine in this folder with onnxruntime and numpy alone: the pixels of `fastdiff sample` for the same seeds."""
import argparse
import hashlib
import json
import re
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import onnxruntime

HERE = Path(__file__).resolve().parent


def normal(seed: int, draw: int, count: int) -> np.ndarray:
    """Unit normals (count,): Philox4x32-10 with key = seed and counter = (i // 4, draw), then Box-Muller in float32."""
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    block = np.arange((count + 3) // 4, dtype=np.uint64)
    c, k = [block & low, block >> shift, 0 * block + np.uint64(draw), 0 * block], [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        p, q = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [q >> shift ^ c[1] ^ np.uint64(k[0]), q & low, p >> shift ^ c[3] ^ np.uint64(k[1]), p & low]
        k = [k[0] + 0x9E3779B9 & 0xFFFFFFFF, k[1] + 0xBB67AE85 & 0xFFFFFFFF]
    u = [((w >> np.uint64(8)).astype(np.int64) + (1 - i % 2)).astype(np.float32) * np.float32(2**-24) for i, w in enumerate(c)]
    radius, angle = [np.sqrt(np.float32(-2) * np.log(v)) for v in u[::2]], [np.float32(2 * np.pi) * v for v in u[1::2]]
    pairs = [r * f(a) for r, a in zip(radius, angle, strict=True) for f in (np.cos, np.sin)]
    return np.stack(pairs, axis=-1).reshape(-1)[:count]


def png(image: np.ndarray) -> bytes:
    """The file of a (C, H, W) uint8 image of 1 or 3 channels."""
    channels, height, width = image.shape
    rows = b"".join(b"\0" + line.tobytes() for line in image.transpose(1, 2, 0))
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def main() -> None:
    """Writes one PNG a seed; seed s is of class s modulo the number of classes."""
    engine = json.loads((HERE / "manifest.json").read_text())
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seeds", default="0-15", help="a range such as 0-15")
    options.add_argument("--guidance", type=float, default=(engine["guidance"] or {}).get("default", 1.0))
    options.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="where the engine's height and width vary")
    options.add_argument("--out", type=Path, default=Path("out"))
    given = options.parse_args()
    for name, entry in engine["files"].items():
        if hashlib.sha256((HERE / name).read_bytes()).hexdigest() != entry["sha256"]:
            sys.exit(f"{name} is not the file of the manifest: the engine is damaged")
    first, last = (given.seeds.split("-") * 2)[:2]
    seeds, shape, names = range(int(first), int(last) + 1), engine["source"]["shape"], engine["source"]["classes"]
    shape = shape[:-2] + (given.size or shape[-2:])
    count = int(np.prod(shape))
    draws = [np.stack([normal(s, k, count).reshape(shape) for s in seeds]) for k in range(engine["plan"]["draws"] + 1)]
    feed = {"noise": draws[0], "noises": np.stack(draws[1:]) if draws[1:] else None, "guidance_scale": np.float32(given.guidance)}
    feed["class_labels"] = np.array([s % max(len(names), 1) for s in seeds], np.int64)
    feed.update(np.load(HERE / "plan.npz") if "plan_input" in engine else engine.get("control", {}))
    session = onnxruntime.InferenceSession(HERE / "sampler.onnx", providers=["CPUExecutionProvider"])
    wanted = {i.name: np.asarray(feed[i.name], np.float32 if i.name in ("rtol", "atol") else None) for i in session.get_inputs()}
    images = (session.run(["images"], wanted)[0] * 255).round().astype(np.uint8)
    given.out.mkdir(parents=True, exist_ok=True)
    for s, image in zip(seeds, images, strict=True):
        slug = re.sub(r"[^a-z0-9]+", "-", names[s % len(names)].lower()).strip("-") if names else ""
        label = f"_class{s % len(names)}" + (f"-{slug}" if slug and slug != str(s % len(names)) else "") if names else ""
        (given.out / f"seed{s:06d}{label}.png").write_bytes(png(image))


if __name__ == "__main__":
    main()
