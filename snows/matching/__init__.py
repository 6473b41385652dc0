"""A layer against the dense network: the operations after it, how a mismatch is measured, the loss, and statistics."""
