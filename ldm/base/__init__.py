"""The ground everything stands on: errors, files and hashes, randomness, device, processes, progress, paths."""
