"""Any `nn.Module` as pruning sees it: batches, layers, operations, late starts, edits, and its twin."""
