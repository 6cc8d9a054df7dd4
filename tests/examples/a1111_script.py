"""A script for the AUTOMATIC1111 web UI (1.6 and later, and Forge): fastdiff solvers in its sampler menu.

Copy this file to extensions/fastdiff/scripts/. What the menu calls is `fastdiff.compat.kdiffusion.sample_<solver>`.
"""

from __future__ import annotations

from typing import Any

from modules import sd_samplers, sd_samplers_common  # the web UI's own
from modules.sd_samplers_kdiffusion import KDiffusionSampler

from fastdiff.compat.kdiffusion import sampler

SOLVERS = ("unipc-2", "unipc-3", "ipndm-3", "deis-tab-3", "dpmpp-3m", "dpmpp-3m-sde", "sa-solver", "er-sde-3", "restart")


def menu_entry(solver: str) -> Any:
    function = sampler(solver)
    return sd_samplers_common.SamplerData(
        f"fastdiff {solver}", lambda model: KDiffusionSampler(function, model), [f"fd_{solver.replace('-', '_')}"], {}
    )


sd_samplers.all_samplers += [menu_entry(solver) for solver in SOLVERS]
sd_samplers.all_samplers_map = {entry.name: entry for entry in sd_samplers.all_samplers}
sd_samplers.set_samplers()
