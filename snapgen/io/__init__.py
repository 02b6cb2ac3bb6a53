"""Files on disk: atomic writes, tensor cache, checkpoints, the hub."""
