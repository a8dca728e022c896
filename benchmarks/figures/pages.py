"""The pages with their tables made anew."""

from __future__ import annotations

import re

from . import checks, faithfulness, index, libraries, overheads, readme, removals, scale, tables, unlearning


def with_tables(page: str) -> str:
    """The page with what stands between `<!-- table: NAME -->` and `<!-- end -->` made anew from the kept NAME.json."""

    def table(match: re.Match[str]) -> str:
        name = match[1]
        kinds = {
            "class-removal": tables.class_removal_table,
            "certificate": unlearning.certificate_table,
            "unlearning": unlearning.unlearning_table,
            "people": unlearning.people_table,
            "removal-glance": removals.glance_table,
            "removal-spread": removals.spread_table,
            "removal-sequence": removals.sequence_table,
            "removal-layers": tables.removal_layers_table,
            "published": tables.published_table,
            "kcenter": tables.kcenter_table,
            "influence": tables.influence_table,
            "index": index.index_table,
            "memory": tables.memory_table,
            "mislabel": tables.mislabel_table,
            "lds-text": faithfulness.lds_text_table,
            "lds": faithfulness.lds_table,
            "solvers": tables.solvers_table,
            "products": tables.products_table,
            "gpu": tables.gpu_table,
            "glance": lambda _: readme.glance(),
            "story": lambda _: readme.story(),
            "zoo": tables.zoo_table,
            "ranks": scale.ranks_table,
            "scale": scale.scale_table,
            "gpt2": tables.gpt2_table,
            "invariance": lambda _: checks.invariance_table("checks"),
            "calibration": faithfulness.calibration_table,
            "looking": lambda _: checks.looking_table("checks"),
            "libraries": libraries.libraries_table,
            "overheads": overheads.overheads_table,
        }
        make = next((make for kind, make in kinds.items() if name.startswith(kind)), tables.benchmark_table)
        return f"<!-- table: {name} -->\n{make(name)}\n<!-- end -->"

    return re.sub(r"<!-- table: ([\w-]+) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)
