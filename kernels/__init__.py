"""The ops in Triton, one op a file. Imported only where a CUDA build of torch calls them, or a test does.

A file holds its kernels, a launcher for each op by the op's own name and signature, and `takes`, which says
of a call's arguments whether the kernels take them; the reference serves all others. Numbers are loaded 16
bytes at a time, computed in float32 and rounded once, at the store.
"""
