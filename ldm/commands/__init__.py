"""The groups of commands of `ldm`, a module each."""
