"""Limits of the curvature room: how much is held or made at a time. Results depend on none of them but for rounding."""

MEMORY = 1 << 27
"""Bytes, 128 MiB: the default of `memory=` in Python and of `--memory` in the shell, so that either goes on with the
other's folder. It suits a laptop, and the peaks in docs/memory.md were measured with it."""

# ------------------------------------------------------------------------------------------------------------ the block

EXACT_ENTRIES = 1 << 22
"""Entries of gradients, or of outputs' Hessians, that an exact block forms at a time where it has to form them."""

EXACT_GRADIENTS = 256
"""Gradients that an exact block forms at a time while it is built; they are gathered before they are multiplied."""

GATHERED_ROWS = 1024
"""Rows whose outer products go into a block at a time: with fewer, reading the block takes as long as multiplying."""

DOWNDATE_SHARE = 1 / 8
"""A downdate of fewer columns than this share of the block is kept beside its factor: of more, a new one is cheaper."""

REFINED_COLUMNS = 64
"""Right-hand sides that a factor in place solves for at a time: refining takes several vectors beside each of them."""

# ------------------------------------------------------------------------------------------ queries, training gradients

LOW_RANK_ENTRIES = 1 << 24
"""Entries of the largest intermediate of products with queries that are kept at a low rank."""

QUERY_MATRIX_ENTRIES = 1 << 20
"""Entries of queries' matrices that are made of their factors at a time: 4 MiB in float32, which a cache holds, so that
they are not read back from memory when they meet the training gradients."""

TRAIN_MATRIX_ENTRIES = 1 << 21
"""Entries of training gradients of several positions that are formed at a time to meet queries kept in factors."""

ERROR_SAMPLE = 64
"""Queries, and training examples, on which an approximation of pairwise scores measures its error."""

# ---------------------------------------------------------------------------------------------- gradients of estimators

DATA_INF_ENTRIES = 1 << 24
"""Entries of gradients that `DataInf` forms at a time for self-influence."""

SHAMPOO_ENTRIES = 1 << 21
"""Entries of gradients that `Shampoo` forms at a time for its moments: 8 MiB in float32."""

SIGNS_MADE = 1 << 23
"""Signs of a random projection that are made at a time."""

SIGNS_KEPT = 1 << 24
"""Signs of a random projection that are made once and kept, 64 MiB in float32; more are made anew whenever needed."""

# ------------------------------------------------------------------------------------------ products with the curvature

PRODUCT_VECTORS = 16
"""Right-hand sides that share a forward pass: their tangents stand in memory side by side."""

SLICE_EXAMPLES = 8
"""Examples that a pass takes at least, however large their activations are: passes of fewer waste their overhead."""

SLICE_BYTES = 1 << 25
"""Bytes of activations and tangents at a time on the CPU: with more of them, passes wait for memory."""
