"""From files on disk to batches: builders, sources, preprocess, loader."""
