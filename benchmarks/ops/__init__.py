"""Every op, and the factor of a block, raced against the best plain torch and against peers."""
