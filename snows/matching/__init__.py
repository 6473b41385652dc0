"""A layer against the dense network: the operations after it, metrics, the loss, and statistics."""
