"""The ground everything stands on: errors, files, hashes, randomness, device, processes, progress, paths."""
