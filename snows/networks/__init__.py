"""Any `nn.Module` as pruning sees it: its batches, layers and operations, passes that start late, edits, and its twin."""
