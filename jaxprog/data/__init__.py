"""From files on disk to batches: preparation, records, preprocess, loader."""
