"""The SparseAttention op and its loaders."""
